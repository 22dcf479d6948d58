"""Adapters: every tensor is loaded and used as PEFT uses it, or the adapter is refused."""

import json

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import items
import util
from conftest import cut, load_merged, load_quantised

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PROMPTS = [items.prompt_of("Title: Lamp"), items.prompt_of("Title: A desk of oak, 48 inches")]


def lora_config(**changes):
    settings = {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION}
    return LoraConfig(**settings | changes)


RIGHT = {
    "plain": lora_config,
    "rslora": lambda: lora_config(use_rslora=True),
    "dora": lambda: lora_config(use_dora=True),
    "patterns": lambda: lora_config(rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 32}),
}
REFUSED = {
    "ia3": (lambda: IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "is IA3"),
    "prompt": (lambda: PromptTuningConfig(num_virtual_tokens=4), "is PROMPT_TUNING"),
    "bias": (lambda: lora_config(bias="all"), "only LoRA without biases"),
    "saved_norm": (lambda: lora_config(modules_to_save=["norm"]), "biases or whole layers"),
    "lm_head": (lambda: lora_config(target_modules=["lm_head"]), "adapts head or embeddings"),
}
CONFIGS = RIGHT | {kind: config for kind, (config, _) in REFUSED.items()}


def make_adapter(kind, base, folder):
    """Writes an adapter with random weights, as PEFT saves it. Returns the folder."""
    torch.manual_seed(1)
    base_model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = CONFIGS[kind]()
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(base_model, config)
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


@pytest.mark.parametrize("kind", RIGHT)
def test_adapter_answers_as_by_peft(kind, tiny_base, tmp_path):
    """Merged in 32 bits, and exported in 16; against PEFT, where the adapter is beside the base."""
    folder = make_adapter(kind, tiny_base, tmp_path / "adapter")
    base = util.Base(tiny_base)
    beside = PeftModel.from_pretrained(util.dequantise(load_quantised(base)), folder).eval()
    expected = answers(beside, base.tokenizer)
    util.check_adapter(folder)
    merged = load_merged(base, folder)
    load_merged(base, folder, out_precision="bf16").save_pretrained(tmp_path / "merged")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for model, tolerance in ((merged, 1e-4), (exported, 0.05)):
        for one, other in zip(answers(model, base.tokenizer), expected, strict=True):
            assert util.difference(one, other) < tolerance


@pytest.mark.parametrize("kind", REFUSED)
def test_odd_adapter_is_refused(kind, tiny_base, tmp_path):
    """By name: what would need code of its own to be read or merged right."""
    folder = make_adapter(kind, tiny_base, tmp_path / "adapter")
    with pytest.raises(items.UserError, match=REFUSED[kind][1]):
        util.check_adapter(folder)
        load_merged(util.Base(tiny_base), folder)


def test_merged_weights_are_rounded_once(tiny_base, tmp_path):
    """They are added in 32 bits, also where the run is read in 16."""
    folder = make_adapter("plain", tiny_base, tmp_path / "adapter")
    base = util.dequantise(load_quantised(util.Base(tiny_base), "bf16"), torch.float32)
    exact = util.load_adapter(base, folder).merge_and_unload().state_dict()
    merged = load_merged(util.Base(tiny_base), folder, "bf16").state_dict()
    assert merged.keys() == exact.keys()
    for name, weight in exact.items():
        assert merged[name].equal(weight.bfloat16()), name


def test_little_memory_keeps_base_quantised(tiny_base, tmp_path, monkeypatch):
    """Without room for the dequantised weights nothing is merged, unless it has to be."""
    folder = make_adapter("plain", tiny_base, tmp_path / "adapter")
    no_room = util.Memory(used=2**30, available=2**30, peak=2**30)
    monkeypatch.setattr(util, "memory", lambda: no_room)
    base = util.Base(tiny_base)
    kept, exported = load_merged(base, folder), load_merged(base, folder, out_precision="bf16")
    for model, is_quantised in ((kept, True), (exported, False)):
        assert any(isinstance(one, util.QUANTISED) for one in model.modules()) == is_quantised
    assert exported.dtype == torch.bfloat16


def change_weights(change):
    """A damage: the adapter's file has the weights that `change` makes of {name: weight}."""

    def damage(folder):
        file = folder / util.ADAPTER_FILE
        save_file(change(load_file(file)), file)

    return damage


def rename_as_compiled(weights):
    return {name.replace("base", "_orig_mod.base", 1): weights[name] for name in weights}


def keep_second_layer(weights):
    return {name: weight for name, weight in weights.items() if ".layers.1." in name}


def make_one_nan(weights):
    weights[next(iter(weights))][0, 0] = float("nan")
    return weights


def make_pointer(folder):
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * '0'}\nsize 116744\n"
    (folder / util.ADAPTER_FILE).write_text(text)


def change_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


DAMAGES = {
    "empty": (change_weights(lambda weights: {}), "it holds no weights"),
    "compiled": (change_weights(rename_as_compiled), "misplaced"),
    "half": (change_weights(keep_second_layer), "8 of its tensors are missing"),
    "nan": (change_weights(make_one_nan), "1 of its tensors are missing, misplaced or not finite"),
    "cut": (lambda folder: cut(folder / util.ADAPTER_FILE), "is no complete file of weights"),
    "pointer": (make_pointer, "git lfs pull"),
    "rank": (lambda folder: change_config(folder, r=4), "its adapter doesn't fit"),
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
        load_merged(util.Base(tiny_base), folder)
    assert problem in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_adapter_without_base_is_refused(call, tiny_base, tmp_path):
    """Unless the base is given."""
    folder = make_adapter("plain", tiny_base, tmp_path / "outputs" / "price-orphan")
    change_config(folder, base_model_name_or_path=None)
    flags = ("--local", "--run-name", "orphan", "--text", "Lamp")
    said = call("eval", *flags, cwd=tmp_path, code=1)
    assert "names no base model. Give it by --base-model" in said
    said = call("eval", *flags, "--base-model", tiny_base, cwd=tmp_path)
    assert "80 %" in said
