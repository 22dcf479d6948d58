"""Adapters: every tensor is loaded and used as PEFT uses it, or the adapter is refused."""

import json

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import items
import util
from conftest import cut, open_run_reader

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PROMPTS = [items.prompt_of("Title: Lamp"), items.prompt_of("Title: A desk of oak, 48 inches")]


def lora_config(**changes):
    settings = {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION, "task_type": "CAUSAL_LM"}
    return LoraConfig(**settings | changes)


CONFIGS = {
    "plain": lora_config,
    "rslora": lambda: lora_config(use_rslora=True),
    "dora": lambda: lora_config(use_dora=True),
    "patterns": lambda: lora_config(rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 32}),
    "bias": lambda: lora_config(bias="all"),
    "saved_norm": lambda: lora_config(modules_to_save=["norm"]),
    "saved_head": lambda: lora_config(modules_to_save=["lm_head"]),
    "lm_head": lambda: lora_config(target_modules=[*ATTENTION, "lm_head"]),
    "embed": lambda: lora_config(target_modules=[*ATTENTION, "embed_tokens"]),
    "loha": lambda: LoHaConfig(r=4, target_modules=ATTENTION, task_type="CAUSAL_LM"),
    "oft": lambda: OFTConfig(
        r=0, oft_block_size=4, target_modules=ATTENTION, task_type="CAUSAL_LM"
    ),
    "ia3": lambda: IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    ),
    "lora_bias": lambda: lora_config(lora_bias=True),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}
RIGHT = [name for name in CONFIGS if name not in ("prompt", "prefix")]


@pytest.fixture(scope="module")
def untied_base(tiny_base, tmp_path_factory):
    """The tiny base with a head of its own."""
    folder = tmp_path_factory.mktemp("untied")
    torch.manual_seed(0)
    config = AutoModelForCausalLM.from_pretrained(tiny_base).config
    config.tie_word_embeddings = False
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folder)
    return str(folder)


def make_adapter(kind, base, folder):
    """Writes an adapter with random weights, as PEFT saves it. Returns the folder."""
    torch.manual_seed(1)
    base_model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(base_model, CONFIGS[kind]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def answers(model, tokenizer):
    """The logits behind each prompt."""
    with torch.no_grad():
        return [util.plain_logits(model, [ids], 1)[0, 0] for ids in tokenizer(PROMPTS)["input_ids"]]


@pytest.mark.parametrize("base_kind", ["tied", "untied"])
@pytest.mark.parametrize("kind", RIGHT)
def test_adapter_answers_as_by_peft(kind, base_kind, tiny_base, untied_base, tmp_path):
    """Read by `eval`, mostly merged; against PEFT, where the adapter is beside the base."""
    base = tiny_base if base_kind == "tied" else untied_base
    folder = make_adapter(kind, base, tmp_path / "adapter")
    reader = open_run_reader(util.Base(base))
    quantised = util.load_quantised(reader.base, reader.quant_config, "fp32")
    beside = PeftModel.from_pretrained(util.dequantise(quantised), folder).eval()

    util.check_adapter(folder)
    found = answers(reader.load(folder), reader.base.tokenizer)
    for one, expected in zip(found, answers(beside, reader.base.tokenizer), strict=True):
        assert util.difference(one, expected) < 1e-4


@pytest.mark.parametrize("base_kind", ["tied", "untied"])
@pytest.mark.parametrize("kind", ["plain", "saved_head", "lm_head", "embed"])
def test_export_answers_as_the_run(kind, base_kind, tiny_base, untied_base, tmp_path):
    """But for its 16 bits: head and embeddings of a tied base don't change each other."""
    base = tiny_base if base_kind == "tied" else untied_base
    folder = make_adapter(kind, base, tmp_path / "adapter")
    reader = open_run_reader(util.Base(base))
    expected = answers(reader.load(folder), reader.base.tokenizer)
    merged = reader.load(folder, out_precision="bf16")
    merged.save_pretrained(tmp_path / "merged")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for one, other in zip(answers(exported, reader.base.tokenizer), expected, strict=True):
        assert util.difference(one, other) < 0.05


def rename(folder, old, new):
    file = folder / util.ADAPTER_FILE
    save_file({name.replace(old, new, 1): w for name, w in load_file(file).items()}, file)


def keep_second_layer(folder):
    file = folder / util.ADAPTER_FILE
    save_file({name: w for name, w in load_file(file).items() if ".layers.1." in name}, file)


def make_one_nan(folder):
    file = folder / util.ADAPTER_FILE
    weights = load_file(file)
    weights[next(iter(weights))][0, 0] = float("nan")
    save_file(weights, file)


def make_pointer(folder):
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * '0'}\nsize 116744\n"
    (folder / util.ADAPTER_FILE).write_text(text)


def change_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


DAMAGES = {
    "empty": (lambda folder: save_file({}, folder / util.ADAPTER_FILE), "holds no weights"),
    "compiled": (lambda folder: rename(folder, "base", "_orig_mod.base"), "fit nowhere"),
    "nested": (lambda folder: rename(folder, "layers", "language_model.layers"), "fit nowhere"),
    "half": (keep_second_layer, "8 of the adapter's 16 tensors are missing or not finite"),
    "nan": (make_one_nan, "1 of the adapter's 16 tensors are missing or not finite"),
    "cut": (lambda folder: cut(folder / util.ADAPTER_FILE), "is no complete safetensors file"),
    "pointer": (make_pointer, "a pointer of Git LFS"),
    "rank": (lambda folder: change_config(folder, r=4), "the adapter doesn't fit"),
    "no layer": (lambda folder: change_config(folder, target_modules=["x"]), "doesn't fit"),
    "unknown kind": (lambda folder: change_config(folder, peft_type="NEW"), "can't read"),
    "no settings": (lambda folder: (folder / "adapter_config.json").write_text(""), "can't read"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_adapter_is_refused(kind, tiny_base, tmp_path):
    damage, problem = DAMAGES[kind]
    folder = make_adapter("plain", tiny_base, tmp_path / "price-damaged")
    damage(folder)
    with pytest.raises(items.UserError) as refusal:
        util.check_adapter(folder)
        open_run_reader(util.Base(tiny_base)).load(folder)
    assert problem in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_prompt_adapters_are_refused(kind, tiny_base, tmp_path):
    folder = make_adapter(kind, tiny_base, tmp_path / "adapter")
    with pytest.raises(items.UserError, match="before each prompt"):
        util.check_adapter(folder)


def test_adapter_with_biases_is_not_exported(tiny_base, tmp_path):
    """Merging it would need biases, which the base's layers don't have."""
    folder = make_adapter("lora_bias", tiny_base, tmp_path / "adapter")
    with pytest.raises(items.UserError, match="can't be merged"):
        open_run_reader(util.Base(tiny_base)).load(folder, out_precision="bf16")


def test_adapter_without_base_is_refused(call, tiny_base, tmp_path):
    """Unless the base is given."""
    folder = make_adapter("plain", tiny_base, tmp_path / "outputs" / "price-orphan")
    change_config(folder, base_model_name_or_path=None)
    flags = ("--local", "--run-name", "orphan", "--text", "Lamp")
    said = call("eval", *flags, cwd=tmp_path, code=1)
    assert "names no base model. Give it by --base-model" in said
    said = call("eval", *flags, "--base-model", tiny_base, cwd=tmp_path)
    assert "80 %" in said
