"""Base models of many architectures: right, or refused before their weights are read.

Tiny random bases. By default the families in ALWAYS are tried; all of them by

    python -m pytest -q tests/test_bases.py --all-bases
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

import app
import items
import util
from conftest import DATASET, attend_on_cpu, flip, load_quantised, read_by_brute_force

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
VOCABULARY = 49152
OLD = {"vocab_size": VOCABULARY, "hidden_size": 64, **SPECIAL}
HEADS = {"num_attention_heads": 4}
SHAPE = {
    **OLD,
    **HEADS,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
}
FOUR_LAYERS = SHAPE | {"num_hidden_layers": 4}
HEAD = {"head_dim": 16}
GEMMA = HEAD | {"query_pre_attn_scalar": 16, "sliding_window": 512}
EXPERTS = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
SHARED_EXPERTS = EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1}
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
GEMMA3 = {"text_config": SHAPE | GEMMA | {"model_type": "gemma3_text"}, "vision_config": VISION}
OPT = {"num_hidden_layers": 2, "ffn_dim": 128, "word_embed_proj_dim": 64}

# {family: (configuration class, its settings)}
FAMILIES = {
    "llama": ("LlamaConfig", SHAPE),
    "mistral": ("MistralConfig", SHAPE | {"sliding_window": 512}),
    "qwen2": ("Qwen2Config", SHAPE),
    "qwen3": ("Qwen3Config", SHAPE | HEAD),
    "gemma": ("GemmaConfig", SHAPE | HEAD),
    "gemma2": ("Gemma2Config", SHAPE | GEMMA),
    "gemma3_text": ("Gemma3TextConfig", SHAPE | GEMMA),
    "gemma3": ("Gemma3Config", GEMMA3 | SPECIAL),
    "phi3": ("Phi3Config", SHAPE),
    "phi": ("PhiConfig", SHAPE),
    "smollm3": ("SmolLM3Config", SHAPE),
    "olmo2": ("Olmo2Config", SHAPE),
    "granite": ("GraniteConfig", SHAPE),
    "glm4": ("Glm4Config", SHAPE | HEAD),
    "stablelm": ("StableLmConfig", SHAPE),
    "cohere": ("CohereConfig", SHAPE),
    "starcoder2": ("Starcoder2Config", SHAPE),
    "gpt_neox": ("GPTNeoXConfig", OLD | HEADS | {"num_hidden_layers": 2, "intermediate_size": 128}),
    "opt": ("OPTConfig", OLD | HEADS | OPT),
    "falcon": ("FalconConfig", OLD | HEADS | {"num_hidden_layers": 2}),
    "bloom": ("BloomConfig", OLD | {"n_layer": 2, "n_head": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", SHAPE | HEAD | EXPERTS),
    "mixtral": ("MixtralConfig", SHAPE | {"num_local_experts": 4}),
    "glm4_moe": ("Glm4MoeConfig", FOUR_LAYERS | HEAD | SHARED_EXPERTS),
    "gpt_oss": ("GptOssConfig", SHAPE | HEAD | EXPERTS | {"num_local_experts": 4}),
    "lfm2": ("Lfm2Config", FOUR_LAYERS | {"layer_types": 2 * ["conv", "full_attention"]}),
    "qwen3_5_text": ("Qwen3_5TextConfig", FOUR_LAYERS | HEAD | LINEAR_ATTENTION),
    "bamba": ("BambaConfig", SHAPE | MAMBA | {"attn_layer_indices": [1]}),
}
ALWAYS = ["llama", "gemma2", "gemma3", "cohere", "qwen3_moe", "lfm2"]
UNTAUGHT = ("llama", "lfm2")  # families that are read untaught by default, too
SLOW_READING = {"lfm2", "qwen3_5_text", "bamba", "bloom"}  # where the mask reaches not all layers


def pytest_generate_tests(metafunc):
    """Parametrises `family`."""
    if "family" in metafunc.fixturenames:
        all_bases = metafunc.config.getoption("--all-bases")
        metafunc.parametrize("family", FAMILIES if all_bases else ALWAYS, scope="module")


def make_base(class_name, settings, tokenizer, folder):
    """Writes a tiny random base. Returns the folder as text."""
    torch.manual_seed(0)
    config = getattr(transformers, class_name)(**settings)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.ndim == 1:  # or mistaking one for another shows little
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def base(family, smol_tokenizer, tmp_path_factory):
    return make_base(*FAMILIES[family], smol_tokenizer, tmp_path_factory.mktemp(family))


@pytest.fixture(scope="module")
def run(base, prepared, tmp_path_factory):
    """A run of 12 steps with two checkpoints, validated, and resumed from the first."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(prepared / DATASET, folder / DATASET.removeprefix("outputs/"))
    config = app.RunConfig(
        base_model=base, lite_mode=True, local=True, output_dir=str(folder), seed=1
    )
    # At 1e-2 Qwen 3.5's gates get so steep that adding the adapter's product beside a weight or to
    # it differs by 2e-3 in 32 bits
    settings = {"max_steps": 12, "save_steps": 6, "batch_size": 4, "learning_rate": 3e-3}
    run_folder = app.train_model(config, run_name="taught", **settings)
    adapter = (run_folder / util.ADAPTER_FILE).read_bytes()
    (run_folder / util.ADAPTER_FILE).unlink()
    shutil.rmtree(run_folder / "checkpoint-12")
    app.train_model(config, resume="taught")
    assert (run_folder / util.ADAPTER_FILE).read_bytes() == adapter
    return config, run_folder


def load_plainly(base, adapter=None):
    """The base in nf4 with the adapter beside it, by transformers and PEFT alone."""
    quantisation = app.build_quant_config(True, False, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=quantisation, device_map="cpu"
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # its packed form can't be this small
            module.support_avx512bf16_for_cpu = False
    return (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()


def read_rows(base, adapter, rows, fast):
    """(log probabilities of the numbers, whether they come from one pass), as `eval` reads them."""
    quant_config = app.build_quant_config(True, False, torch.float32)
    reader = util.open_reader(base, adapter, rows, quant_config, "fp32", False, fast)
    return torch.tensor(reader.read(rows).probabilities).log(), reader.in_tree


@pytest.fixture(scope="module")
def rows(prepared):
    """The longest and the shortest test row."""
    test = items.load_prompts(prepared / DATASET)["test"]
    by_length = sorted(test, key=lambda row: len(row["prompt"]))
    return [by_length[-1], by_length[0]]


@pytest.mark.parametrize("is_taught", [True, False], ids=["taught", "untaught"])
def test_prices_equal_brute_force(
    family, base, run, rows, is_taught, packed_attention, monkeypatch, request
):
    """To 1e-3 in log probability, with the fast path and without."""
    monkeypatch.setattr(util, "choose_attention", lambda *_: util.PACKED)
    all_bases = request.config.getoption("--all-bases")
    if not (is_taught or all_bases or family in UNTAUGHT):
        pytest.skip("of some families only without --all-bases")
    judged = [0, 1] if all_bases else [1]  # the padded one
    adapter = run[1] if is_taught else None
    plain = load_plainly(base, adapter)
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompts = [rows[i]["prompt"] for i in judged]
    expected = torch.stack([read_by_brute_force(plain, tokenizer, one) for one in prompts])
    likely = expected > -40  # less is rounding
    assert likely.sum() > 100
    for fast in (False, True):
        found, in_tree = read_rows(util.Base(base), adapter, rows, fast)
        assert (found[judged] - expected)[likely].abs().max() < 1e-3
        assert in_tree == (family not in SLOW_READING)


def test_run_is_judged_and_exported(base, run, rows, tmp_path):
    """The exported model answers as the run does, but for its 16 bits."""
    config, folder = run
    results = app.evaluate_model(config, run_name="taught", size=4)
    assert results["n"] == 4
    history = json.loads((folder / "run.json").read_text())["history"]
    assert [entry["step"] for entry in history if "eval_mae" in entry] == [6, 12]

    exported = app.export_model(config, str(tmp_path / "merged"), run_name="taught")
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ids = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    with torch.no_grad():
        for prompt in ids:
            found = util.plain_logits(model, [prompt], 1)
            expected = util.plain_logits(load_plainly(base, folder), [prompt], 1)
            assert util.difference(found, expected) < 0.1


def test_micro_batches_add_up(base, prepared):
    """The loss and every gradient of 8 rows are those of 2 × 4 and of 4 × 2, in 64 bits."""
    tokenizer = util.Base(base).tokenizer
    train = items.load_prompts(prepared / DATASET)["train"]
    tokens = items.tokenise(train.select(range(8)), tokenizer, "train")
    options = {"dtype": torch.float64, "experts_implementation": "batched_mm"}
    model = AutoModelForCausalLM.from_pretrained(base, **options)
    found = {}
    for size in (8, 4, 2):
        model.zero_grad()
        losses = []
        for start in range(0, len(tokens), size):
            batch = [tokens[row] for row in range(start, start + size)]
            losses.append(util.summed_losses(model, util.collate_padded(batch)))
            losses[-1].backward()
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        found[size] = [sum(losses).detach(), *(gradient.clone() for gradient in gradients)]
    for size in (4, 2):
        for one, whole in zip(found[size], found[8], strict=True):
            assert (one - whole).norm() <= 1e-6 * whole.norm() + 1e-12


def test_what_is_adapted_is_what_is_said(base, run):
    """Both recipes reach the linear layers that they mean, and count them; experts never."""
    adapted = json.loads((run[1] / "adapter_config.json").read_text())["target_modules"]
    loaded = util.Base(base)
    attention = util.find_targets(loaded, "attention")
    assert all(any(layer.endswith(name) for name in adapted) for layer in attention.layers)
    for name in loaded.linear_layers:
        assert (name in attention.layers) == ("attn" in name or "attention" in name)
    every = util.find_targets(loaded, "all")
    has_experts = "experts are not adapted" in str(every)
    assert every.layers == (attention.layers if has_experts else loaded.linear_layers)
    assert not any(name.endswith(("lm_head", "embed_out")) for name in every.layers)
    config = LoraConfig(r=2, target_modules=list(every.names), task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == every.count_parameters(2)


# Bases that can't be used


def copy_base(source, folder, **changes):
    """A copy of a base's folder with changes of its config.json."""
    shutil.copytree(source, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def merge_dollar(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken("$0", normalized=False)])
    tokenizer.save_pretrained(folder)


def drop_end_of_text(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)


def keep_half(folder):
    (folder / "model.safetensors").write_bytes(bytes(8) + b"{}")


def write_pointer(folder):
    (folder / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1")


def with_own_code(folder):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    del config["architectures"]
    auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    file.write_text(json.dumps(config | {"model_type": "own", "auto_map": auto_map}))
    (folder / "own.py").write_text("raise SystemExit('ran code of the repository')")


GPTQ = {"quantization_config": {"quant_method": "gptq"}}
EIGHT_BITS = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
IN_BF16 = {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}
UNUSABLE = {
    "encoder": ({"model_type": "t5"}, None, "t5 has an encoder"),
    "transposed": ({"model_type": "gpt2"}, None, "gpt2 has no linear layers"),
    "unknown": ({"model_type": "no-such-type"}, None, "can't load it as a causal language model"),
    "own code": ({}, with_own_code, "needs code from its own repository"),
    "merged": ({}, merge_dollar, r"merges the 0 of `Price is \$0.00` with what is beside it"),
    "two problems": (GPTQ, drop_end_of_text, "stored as gptq.*\n.*has no end-of-text token"),
    "8 bits": (EIGHT_BITS, None, "are stored as bitsandbytes"),
    "4 bits in 16": ({"quantization_config": IN_BF16}, None, "weights are stored as bfloat16"),
    "kernel": (
        {"_attn_implementation": "some/kernel"},
        None,
        "names the attention kernel some/kernel",
    ),
    "cut": ({}, keep_half, "is no complete file of weights"),
    "cut pickle": ({}, write_pointer, "is no complete file of weights"),
    "adapter": ({}, lambda folder: (folder / "adapter_config.json").touch(), "the adapter beside"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_unusable_base_is_refused(tiny_base, tmp_path, kind):
    """In a line a problem, before weights are read: there are none."""
    changes, damage, problem = UNUSABLE[kind]
    folder = copy_base(tiny_base, tmp_path / "base", **changes)
    (folder / "model.safetensors").unlink()
    if damage:
        damage(folder)
    with pytest.raises(items.UserError, match=problem) as refusal:
        util.open_base(str(folder))
    assert str(refusal.value).count("\n") == problem.count("\n")


STATE = OLD | {"num_hidden_layers": 2, "state_size": 8}
INDEXED = FOUR_LAYERS | SHARED_EXPERTS | {"num_key_value_heads": 4}
INDEXED |= {
    "topk_group": 1,
    "index_n_heads": 2,
    "index_head_dim": 64,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
}
INKLING = SHAPE | HEAD | SHARED_EXPERTS | {"layer_types": 2 * ["full_attention"]}
PARTLY = {
    "Mamba": (STATE, "PEFT refuses them: 2 out_proj; .*they get no gradient: 2 dt_proj"),
    "Afmoe": (SHAPE | HEAD | EXPERTS, "PEFT refuses them: 2 gate_proj"),
    "DeepseekV32": (INDEXED, "they get no gradient: 12 wq_b, wk, weights_proj"),
    "Inkling2Text": (INKLING, "a saved adapter's can't be read back: 4 weight_proj"),
}


@pytest.mark.parametrize("kind", PARTLY)
def test_what_cant_be_adapted_is_left_out(smol_tokenizer, tmp_path, kind):
    """Before weights are read; a recipe that reaches nothing else is refused."""
    settings, text = PARTLY[kind]
    base = util.Base(make_base(f"{kind}Config", settings, smol_tokenizer, tmp_path))
    found = util.find_targets(base, "all")
    assert re.search(f"left out, since {text}", found.text)
    assert found.layers.keys() < base.linear_layers.keys()
    if kind == "Mamba":
        with pytest.raises(items.UserError, match="`targets` attention: .* has no such layer"):
            util.find_targets(base, "attention")


def test_missing_weights_are_not_made_up(tiny_base, tmp_path):
    folder = copy_base(tiny_base, tmp_path / "base", tie_word_embeddings=False)
    with pytest.raises(items.UserError, match="lack 1 of the model's weights, such as lm_head"):
        load_quantised(util.open_base(str(folder)))


def test_rows_longer_than_the_base_are_refused(tiny_base, rows, tmp_path):
    base = util.Base(str(copy_base(tiny_base, tmp_path / "base", max_position_embeddings=40)))
    with pytest.raises(items.UserError, match="reads at most 40 tokens, and the longest row has"):
        read_rows(base, None, rows, fast=False)


def test_tokens_beyond_the_embeddings_are_refused(tiny_base, smol_tokenizer, rows, tmp_path):
    base = util.Base(make_base("LlamaConfig", SHAPE, smol_tokenizer, tmp_path))
    base.tokenizer.add_tokens(["lamp"])
    lamp = {"prompt": items.prompt_of("A lamp")}
    with pytest.raises(items.UserError, match="knows 49,152 tokens, and .* with 49,152, too"):
        read_rows(base, None, [lamp], fast=False)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_identity_covers_whole_files(tiny_base, tmp_path, file):
    """A merge of an adapter, say, leaves the embeddings, which come first, as they are."""
    base = util.Base(str(copy_base(tiny_base, tmp_path / "other")))
    before = base.identity
    del base.identity
    flip(Path(base.path, file))
    assert base.identity != before


# The self-check


@pytest.fixture()
def tiny_model(tiny_base):
    base = util.Base(tiny_base)
    return base, load_quantised(base)


def check(tiny_model, rows, attention=util.PACKED):
    base, model = tiny_model
    prompts = base.tokenizer([row["prompt"] for row in rows])["input_ids"]
    return util.self_check(model, base.tokenizer, prompts, "fp32", attention)


def ignore_the_mask(patch):
    """Attention that is causal, but lets the branches of the tree see each other."""
    plain = util.ALL_ATTENTION_FUNCTIONS["sdpa"]

    def broken(module, query, key, value, mask, **options):
        return plain(module, query, key, value, None, **options | {"is_causal": True})

    patch.setitem(util.ALL_ATTENTION_FUNCTIONS, "sdpa", broken)


def mix_packed_rows(patch):
    """Packed attention that ignores where a row ends."""

    def broken(query, key, value, starts, *others, **options):
        return attend_on_cpu(query, key, value, starts[[0, -1]], *others, **options)

    patch.setattr(util, "varlen_attn", broken)


@pytest.mark.parametrize(
    ("damage", "unused"),
    [
        (lambda patch: None, set()),
        (ignore_the_mask, {util.ONE_PASS, util.PACKED_ROWS}),
        (mix_packed_rows, {util.PACKED_ROWS}),
    ],
)
def test_check_sees_what_is_wrong(tiny_model, rows, packed_attention, monkeypatch, damage, unused):
    damage(monkeypatch)
    found = check(tiny_model, rows)
    assert {way for way, is_right in found.items() if not is_right} == unused
    is_packed = tiny_model[1].config._attn_implementation == util.PACKED
    assert is_packed == (util.PACKED_ROWS not in unused)


def test_check_refuses_models_that_look_ahead(tiny_model, rows, monkeypatch):
    plain = util.ALL_ATTENTION_FUNCTIONS["sdpa"]

    def looking_ahead(module, query, key, value, mask, **options):
        everything = torch.zeros(1, 1, query.shape[2], key.shape[2])
        return plain(module, query, key, value, everything, **options)

    monkeypatch.setitem(util.ALL_ATTENTION_FUNCTIONS, "sdpa", looking_ahead)
    with pytest.raises(items.UserError, match="no causal language model"):
        check(tiny_model, rows)


def test_wrong_loss_is_seen(tiny_model, prepared):
    """That of rows in a batch is compared with that of each row alone."""
    base, model = tiny_model
    train = items.load_prompts(prepared / DATASET)["train"]
    rows = list(items.tokenise(train, base.tokenizer, "train").select(range(2)))

    def without_positions(rows):
        inputs = util.collate_padded(rows)
        return inputs | {"position_ids": torch.zeros_like(inputs["input_ids"])}

    assert util.loss_agrees(model, rows, util.collate_padded, "fp32")
    assert not util.loss_agrees(model, rows, without_positions, "fp32")


def test_window_shorter_than_a_row_is_seen(smol_tokenizer, rows, packed_attention, tmp_path):
    """The tree of prices can't be used, so nothing is; by tokens one row of them is the longest."""
    settings = SHAPE | {"sliding_window": 16}
    base = util.Base(make_base("MistralConfig", settings, smol_tokenizer, tmp_path))
    model = load_quantised(base)
    assert not any(check((base, model), rows)[way] for way in (util.ONE_PASS, util.PACKED_ROWS))
    short = {"prompt": items.prompt_of("lamp " * 30)}
    long = {"prompt": items.prompt_of("書架" * 20)}  # fewer characters, more tokens
    quant_config = app.build_quant_config(True, False, torch.float32)
    reader = util.open_reader(base, None, [short, long], quant_config, "fp32", False)
    assert not reader.in_tree


# Checkpoints that are stored in 4 bits


def test_stored_nf4_computes_in_the_plans_type(tiny_base, tmp_path):
    """Its own type is bf16; here all is computed in fp32. It can be exported, too."""
    quantisation = app.build_quant_config(True, True)
    stored = AutoModelForCausalLM.from_pretrained(
        tiny_base, dtype=torch.bfloat16, quantization_config=quantisation, device_map="cpu"
    )
    stored.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path)
    model = load_quantised(util.open_base(str(tmp_path)))
    layers = [m for m in model.modules() if isinstance(m, util.QUANTISED)]
    assert len(layers) == 14
    assert {layer.compute_dtype for layer in layers} == {torch.float32}
    floats = [p.dtype for p in model.parameters() if p.is_floating_point()]
    assert set(floats) == {torch.float32}
    assert {p.dtype for p in util.dequantise(model).parameters()} == {torch.float32}

    config = app.RunConfig(base_model=str(tmp_path), local=True, output_dir=str(tmp_path))
    merged = app.export_model(config, str(tmp_path / "merged"), run_name="base")
    assert AutoModelForCausalLM.from_pretrained(merged).dtype == torch.bfloat16
