"""Teach a language model to estimate a product's price from its description, by QLoRA.

    python app.py prepare --lite      # 1. items → prompts, on the Hub or on disk
    python app.py train --lite        # 2. 4-bit base + LoRA through TRL's SFTTrainer
    python app.py eval                # 3. how good is it, how sure are we

    python app.py prepare --demo && python app.py train --demo && python app.py eval --demo

The last line, the demo, needs no account, no GPU and no network: a small real model and a synthetic
catalogue, or yours (`prepare --demo --source FILE`), in minutes. `--local` keeps everything in a
folder (`outputs`); without it datasets and adapters also go to your account on the Hugging Face
Hub. `--lite` fits a free Colab T4, the default (full) an 80 GB GPU. Items, prompts and recipes are
those of the course "The Price Is Right".

Environment: HF_TOKEN (to use the Hub), WANDB_API_KEY (optional, for --log-wandb). Saved logins
(`hf auth login`, `wandb login`) count, too.
"""

# This file is the workflow; the engine behind it is in util.py, the data in items.py.

import argparse
import difflib
import importlib
import inspect
import io
import logging
import math
import os
import re
import shlex
import signal
import sys
import textwrap
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from functools import partial, wraps
from itertools import chain, count
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036 (ruff takes it for granted)
    sys.exit(f"app.py needs Python 3.11 or newer; this is {sys.version.split()[0]}.")


class Lazy:
    """A module that is imported when it is first used: --help and usage errors are instant.

    importlib's LazyLoader would do it when any library looks through sys.modules.
    """

    def __init__(self, name):
        self.name = name

    def __getattr__(self, attribute):
        return getattr(importlib.import_module(self.name), attribute)


items = Lazy("items")
util = Lazy("util")

# ------------------------------------------------------------------------------------------------
# Arguments: of the stages' functions, and the flags of the same names

AUTO = "auto"  # as in util.py
MAX_NUMBER = 2**32  # of an argument; seeds have to be below it


def at_least(minimum, kind=int, below=MAX_NUMBER, word=None):
    """A kind of argument: a number of at least `minimum`, or a word: AUTO, or `all` for None."""
    rule = f"a {'whole ' if kind is int else ''}number of at least {minimum}"
    rule += f" and below {below}" if below < MAX_NUMBER else ""
    rule += f", or `{word}`" if word else ""

    def parse(text):
        if word and text == word:
            return AUTO if word == AUTO else None
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not minimum <= value < below:
            raise argparse.ArgumentTypeError(f"{text} must be {rule}")
        return value

    return parse


def matching(pattern, rule, kind=str):
    """A kind of argument: a text that matches the pattern; `rule` says so in words."""

    def parse(text):
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"{text} must be {rule}")
        return kind(text)

    return parse


def on_or_off(text):
    """A kind of argument: True or False."""
    if text not in ("on", "off", "True", "False"):
        raise argparse.ArgumentTypeError(f"{text} must be on or off")
    return text in ("on", "True")


or_auto = partial(at_least, word=AUTO)
power_of_ten = matching(r"0\.0?1|10{0,12}(\.0)?", "0.01, 0.1, 1, 10, 100 or so on", float)
plain_name = matching(r"[\w.-]{1,96}", "letters, digits, '.', '-' and '_', 96 at most")
column = matching(
    r"(title|price|text|category)=.*\S.*", "ROLE=NAME, of title, price, text or category"
)
currency_sign = matching(
    r"[^\d\s×\"'`\\\x00-\x1f]{1,6}",
    "a currency's sign or code, such as € or CHF: at most 6 characters, no digits, quotes, blanks",
)


@dataclass(frozen=True)
class Argument:
    """An argument of the stages' functions, and the flag of the same name.

    `micro_batch` is --micro-batch, unless a `flag` is named. `kind` reads its text; bool is a
    switch, which sets `const`. Its default is in the function's signature only.
    """

    help: str
    kind: object = str
    choices: str | None = None  # separated by blanks
    nargs: str | None = None
    const: object = True
    metavar: str | None = None
    flag: str | None = None  # or several

    def flags_of(self, name):
        return (self.flag or f"--{name.replace('_', '-')}").split()

    def add_to(self, parser, name, default):
        """Adds the flag to a parser, which leaves the name out where the flag isn't given."""
        text = self.help if "default" in self.help else f"{self.help} (default: {default})"
        options = {"help": text.replace("%", "%%"), "dest": name, "default": argparse.SUPPRESS}
        if self.kind is bool:
            options |= {"action": "store_const", "const": self.const}
        else:
            choices = self.choices and self.choices.split()
            options |= {"type": self.kind, "choices": choices, "metavar": self.metavar}
            options |= {"nargs": self.nargs, "action": "extend" if self.nargs == "+" else "store"}
        if self.nargs == "?":
            options |= {"const": self.const}
        parser.add_argument(*self.flags_of(name), **options)

    def read(self, value):
        """A value from Python, as the command line would read it."""
        if isinstance(value, dict):  # of columns, which are checked with the file's
            return value
        if self.nargs == "+":
            values = [value] if isinstance(value, str | os.PathLike) else value
            return [replace(self, nargs=None).read(one) for one in values]
        if self.kind is bool and not isinstance(value, bool):
            raise argparse.ArgumentTypeError(f"{value!r} must be True or False")
        if self.choices and value not in self.choices.split():
            raise argparse.ArgumentTypeError(f"{value} must be one of: {self.choices}")
        if isinstance(value, list | tuple):
            raise argparse.ArgumentTypeError(f"{value!r} must be one text or number")
        return value if self.kind is bool else self.kind(str(value))


# ------------------------------------------------------------------------------------------------
# Configuration

DEFAULT_BASE_MODEL = "meta-llama/Llama-3.2-3B"
DEFAULT_PROJECT_NAME = "price"
DEFAULT_DATA_USER = "ed-donner"  # publishes the course's datasets
DEFAULT_OUTPUT_DIR = "outputs"
DEFAULT_CUTOFF = 110  # tokens of a description, as in items.py: with the price within 128


def setting(default, meaning, kind=str, none="none", full=None, demo=None, **options):
    """A field of a dataclass that is an Argument, too: `lora_r` is --lora-r.

    `full` and `demo` are its values in these modes, if they differ; `none` says what None means.
    """
    values = {"full": full, "demo": demo}
    values = {mode: default if value is None else value for mode, value in values.items()}
    argument = Argument(meaning, kind, **options)
    metadata = {"argument": argument, "none": none, "modes": {"lite": default, **values}}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Recipe:
    """How a run is trained. The defaults are lite's; lite and full are the course's.

    What can be AUTO is, with data that aren't the course's, unless it is given.
    """

    epochs: int | str = setting(1, "passes over the rows, or auto", or_auto(1), full=3)
    max_steps: int | None = setting(None, "steps after which training ends", at_least(1), demo=80)
    batch_size: int | str = setting(32, "rows a step, all processes", or_auto(1), full=256, demo=4)
    learning_rate: float | str = setting(1e-4, "its peak", or_auto(1e-12, float), demo=1.5e-3)
    scheduler: str = setting(
        "cosine", "the learning rate's course", choices="cosine linear constant_with_warmup"
    )
    warmup: float = setting(0.01, "share of steps in which the rate rises", at_least(0, float, 1))
    weight_decay: float = setting(0.001, "of AdamW", at_least(0, float))
    lora_r: int = setting(32, "rank of the adapters", at_least(1), full=256, demo=16)
    lora_alpha: int | None = setting(None, "adapters' scale × rank", at_least(1), "twice the rank")
    lora_dropout: float = setting(0.1, "of adapters' inputs", at_least(0, float, 1), demo=0.0)
    targets: str = setting(
        "attention", "layers that get adapters", full="all", demo="all", choices="attention all"
    )
    price_loss: float | str = setting(
        0.0, "weight of the prices' CRPS; needs one token a number, as Llama 3", or_auto(0, float)
    )
    val_size: int = setting(500, "validation rows", at_least(1), full=1000, demo=60)
    logging_steps: int = setting(5, "steps between logged losses", at_least(1), full=10, demo=10)
    save_steps: int = setting(100, "steps between checkpoints", at_least(1), full=200, demo=40)
    keep_best: bool = setting(False, "end with the checkpoint of least validation error", bool)
    precision: str = setting(
        "auto", "auto: bf16, fp16 on older GPUs, fp32 on CPUs", choices="auto bf16 fp16 fp32"
    )
    base_weights: str = setting(
        "auto",
        "4 bits, or dequantised once: faster, same values; fp8: faster, less exact, from an L4 on",
        choices="auto nf4 bf16-from-nf4 fp8",
    )
    compile: str = setting(
        "auto", "compile the layers; auto: in runs of 16,000 or more rows", choices="auto on off"
    )

    @classmethod
    def from_record(cls, record):
        """The Recipe of a run.json: missing fields get defaults, unknown ones are ignored."""
        known = {one.name for one in fields(cls)}
        values = {name: value for name, value in record.items() if name in known}
        return cls(**values)


RECIPES = {
    mode: Recipe(**{one.name: one.metadata["modes"][mode] for one in fields(Recipe)})
    for mode in ("lite", "full", "demo")
}


@dataclass
class RunConfig:
    """What the three stages share. The default mode is full."""

    base_model: str | None = setting(
        None, f"name or folder (default: {DEFAULT_BASE_MODEL}, demo SmolLM2-135M; eval: the run's)"
    )
    project_name: str = setting(DEFAULT_PROJECT_NAME, "first part of run names", plain_name)
    data_user: str | None = setting(
        None, "whose datasets to read", none="as found: local, yours or the course's"
    )
    lite_mode: bool = setting(
        False, "20,000 items, LoRA r 32 (default: full, 800,000, r 256)", bool, flag="--lite"
    )
    demo_mode: bool = setting(
        False, "a small real model and items, on the CPU (default: full)", bool, flag="--demo"
    )
    local: bool = setting(False, "push nothing, need no token (default: the Hub, too)", bool)
    output_dir: str = setting(DEFAULT_OUTPUT_DIR, "folder for everything written")
    seed: int = setting(42, "for split, adapters, order and dropout", at_least(0))

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
        return self.base_model or (items.DEMO_PACKAGE if self.demo_mode else DEFAULT_BASE_MODEL)

    @property
    def base_folder(self):
        """Where the demo's base is unpacked."""
        return Path(self.output_dir, "base")

    @property
    def dataset_folder(self):
        return Path(self.output_dir, "datasets", f"items_prompts_{self.mode}")

    @property
    def project(self):
        """The util.Project whose runs are meant."""
        return util.Project(Path(self.output_dir), self.project_name)

    def for_run(self, run):
        """The config for that run: its mode and, unless another is named, its base model."""
        modes = {"lite_mode": run.mode == "lite", "demo_mode": run.mode == "demo"}
        return replace(self, **modes, base_model=self.base_model or run.base_model)

    def command(self, text):
        """A command for messages, with the flags that say where the runs are."""
        if self.output_dir != DEFAULT_OUTPUT_DIR:
            text += f" --output-dir {shlex.quote(str(self.output_dir))}"
        if self.project_name != DEFAULT_PROJECT_NAME:
            text += f" --project-name {self.project_name}"
        return f"`python app.py {text}`"


def say_next(config, stage, more=""):
    """Prints the command of the stage that follows."""
    flags = {"--demo": config.demo_mode, "--lite": config.lite_mode}
    flags |= {"--local": config.local and not config.demo_mode}
    words = [stage, *(flag for flag, is_given in flags.items() if is_given)]
    if config.base_model and stage == "train":
        words.append(f"--base-model {shlex.quote(str(config.base_model))}")
    print(f"Next: {config.command(' '.join([*words, more]).rstrip())}")


# ------------------------------------------------------------------------------------------------
# Environment


def get_env(name: str, required: bool = False) -> str | None:
    """The environment variable's value, or None if it is unset or empty.

    Without HF_TOKEN it is the token of a saved login. Raises UserError if it is required.
    """
    value = os.environ.get(name) or None
    if name == "HF_TOKEN" and not value:
        value = items.saved_token()
    if required and not value:
        raise items.UserError(
            f"{name} is not set, no login is saved, and the Hub is needed: `hf auth login`, or "
            f"`export {name}=…` (on Colab: a secret of that name). `local` stays on this machine; "
            "`demo_mode` tries the program without account and GPU."
        )
    return value


def login_huggingface(namespace: str | None = None, write: bool = False) -> str:
    """Looks up the account of HF_TOKEN or a saved login. Returns `namespace`, or else that account.

    To read from a `namespace` nothing has to be looked up. The libraries find the token as get_env
    does, nothing is stored. Raises UserError if the token is refused or, if `write` is asked for,
    may not write to that account.
    """
    get_env("HF_TOKEN", required=True)
    if namespace and not write:
        return namespace  # so that what is cached needs no Hub
    accounts = items.look_up_accounts(write)
    if write and namespace not in (None, *accounts):
        text = f"{items.token_name()} belongs to {accounts[0]} and may not write there."
        raise items.UserError(f"{namespace}: {text} Name another account.")
    return namespace or accounts[0]


def detect_bf16_support() -> bool:
    """Whether there is a GPU with bf16: compute capability 8.0 and higher (A100, not T4)."""
    return util.gpu_capability() >= (8, 0)


def build_quant_config(use_4bit: bool, use_bf16: bool, compute_dtype=None):
    """The BitsAndBytesConfig of the base: 4-bit nf4 with double quantisation, or 8-bit.

    4-bit layers compute in `compute_dtype`; by default in bf16, or fp16 on GPUs without it. Source:
    QLoRA, arXiv 2305.14314.
    """
    from transformers import BitsAndBytesConfig

    if not use_4bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype or ("bfloat16" if use_bf16 else "float16"),
    )


def set_up_libraries():
    """Sets what the libraries read when they are imported; silences what a user can't act on."""
    # Threads that wait for each other spin so long: more takes the time of what else runs on a
    # machine, less slows a quiet one (tests/BENCHMARKS.md, "A busy machine")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Or `datasets` and TRL would report what they read and train to hosts of their own
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # What `accelerate config` and W&B's own settings would change, the plan wouldn't say
    for name in list(os.environ):
        if name.startswith("ACCELERATE_") or name in ("WANDB_LOG_MODEL", "WANDB_WATCH"):
            del os.environ[name]
    # Warnings between the pinned libraries
    warnings.simplefilter("ignore", FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    warnings.filterwarnings("ignore", message="IProgress not found")  # of tqdm in notebooks
    logging.getLogger("transformers.integrations.bitsandbytes").setLevel(logging.ERROR)
    # util.has_gradients tries what may fail
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)


def stage(function):
    """A decorator of what notebooks call, too: values are read as a command's flags are.

    The libraries' warnings are hidden, and a Stop button ends it with one line, as items.Stopped.
    Commands call `__wrapped__`, since argparse has read their values.
    """

    @wraps(function)
    def call(*arguments, **options):
        values = inspect.signature(function).bind(*arguments, **options).arguments
        config = values.pop("config")
        if not isinstance(config, RunConfig):
            raise TypeError(f"{config!r} isn't a RunConfig, such as RunConfig(demo_mode=True)")
        with warnings.catch_warnings():
            set_up_libraries()
            items.probe_hub.cache_clear()  # the Hub is asked once in a stage whether it is there
            values = check_values(config, values | values.pop("changes", {}))
            try:
                return function(config, **values)
            except KeyboardInterrupt as error:
                if isinstance(error, items.Stopped):
                    raise
                raise items.Stopped(f"{function.__name__} is stopped: call it again.") from None

    return call


def check_values(config, values):
    """The values of a call from Python by name, as the command line would read them.

    Raises UserError, a line for each value that it would refuse, of the config's, too.
    """
    checked = {}
    problems = []
    for name, value in (vars(config) | values).items():
        checked[name] = value
        try:
            if value is not None and name in ARGUMENTS:
                checked[name] = ARGUMENTS[name].read(value)
        except argparse.ArgumentTypeError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise items.UserError("\n".join(problems))
    return {name: checked[name] for name in values}


# ------------------------------------------------------------------------------------------------
# Which data, which run


def find_prompts(config, trained_on=None):
    """The items.Prompts to train or evaluate on; prints which.

    In this order: `data_user`'s; those of a run's record of what it was `trained_on`, in a folder
    or else on the Hub; the newest that `prepare` left; the own account's; the course's.
    """
    trained_on = trained_on or {}
    name, on_hub = config.dataset_folder.name, trained_on.get("hub")
    found = items.local_datasets(config.dataset_folder, trained_on.get("fingerprint"))
    place, reason = f"{DEFAULT_DATA_USER}/{name}", "the course's"
    if config.data_user:
        place, reason = f"{config.data_user}/{name}", "data_user"
    elif found and (found[0].is_wanted or not on_hub):
        place, reason = found[0].folder, "the local copy that prepare left"
    elif on_hub:
        place, reason = on_hub, "the run was trained on it"
    elif config.local and trained_on.get("fingerprint"):
        raise items.UserError(
            f"{config.dataset_folder.parent}: lacks the data that the run was trained on "
            f"({trained_on['source']}). Copy their folder here, or prepare them again."
        )
    elif config.demo_mode:
        command = config.command("prepare --demo")
        raise items.UserError(f"{config.dataset_folder}: no such dataset yet. Run {command} first.")
    elif not config.local:
        own = f"{login_huggingface()}/{name}"
        if items.is_on_hub(own):
            place, reason = own, "your account's"
    print(f"Data: {place} ({reason})")
    return items.read_prompts(str(place))


def new_dataset_folder(config, source, about):
    """The folder for a dataset: a new one, or that of its source, but for what runs learned."""
    kept = items.fingerprints_of_runs(config.output_dir) - {about["fingerprint"]}

    def is_free(folder):
        found = items.read_about(folder)
        is_same = found.get("source", about["source"]) == about["source"]
        return is_same and found.get("fingerprint") not in kept

    folder = config.dataset_folder
    stem = re.sub(r"[^\w.-]+", "_", items.readable(Path(source or config.mode).stem))[:60]
    ends = chain(("", f"-{stem}"), (f"-{stem}-{number}" for number in count(2)))
    return next(filter(is_free, (folder.with_name(folder.name + end) for end in ends)))


def open_base(config, run=None):
    """The util.Base of a config; on the Hub the commit that the `run` was trained on, if any."""
    identity = run.base_identity if run and run.base_model == config.base_name else None
    revision = identity if identity and len(identity) == 40 else None  # a folder's is shorter
    return util.open_base(config.base_name, revision, config.base_folder)


def new_run(config, name, recipe, use_4bit, changes):
    """The util.Run that is about to begin; `changes` replace fields of the recipe, and the seed."""
    changes = {"seed": config.seed} | changes
    if "epochs" in changes:
        changes.setdefault("max_steps", None)  # asking for epochs means whole ones
    seed = changes.pop("seed")
    recipe = replace(recipe, **changes)
    return config.project.new(name, config.mode, config.base_name, recipe, seed, use_4bit)


def check_run_exists(config, name):
    """Raises UserError unless that run has a folder, before the engine is imported."""
    prefix = f"{config.project_name}-"
    folders = Path(config.output_dir).glob(f"{prefix}*/")
    known = sorted(folder.name.removeprefix(prefix) for folder in folders)
    if str(name).removeprefix(prefix) not in (*known, items.UNTOUCHED):
        raise items.UserError(
            f"{name}: no such run in {config.output_dir}. There are: "
            f"{', '.join(known) or 'no runs'}. One on the Hub needs HF_TOKEN, or a login, and no "
            "`local`."
        )


def find_run(config, name, hf_user=None, revision=None, is_finished=True):
    """The util.Run to evaluate or, unless `is_finished`, to resume; prints which.

    Without a name it is the newest such local run of the project, and of the mode if one was asked
    for. A run that isn't on disk is fetched from the Hub, as is one at a `revision`.
    """
    has_account = not config.local and get_env("HF_TOKEN")
    if name and not has_account:
        check_run_exists(config, name)
    project = config.project
    mode = None if config.mode == "full" else config.mode
    name = project.short(name or project.newest(is_finished, mode))
    print(f"Run: {project.folder(name).name}")
    is_here = project.has(name) or (name in project.records and not is_finished)
    on_hub = None
    if has_account and name != items.UNTOUCHED and (revision or not is_here):
        on_hub = f"{login_huggingface(hf_user)}/{project.folder(name).name}"
    with saying_how_to_resume(config, name):
        run = project.open(name, config.mode, is_finished, on_hub, revision)
    if run.adapter and not (run.base_model or config.base_model):
        raise items.UserError(f"{name}: names no base model. Give it by `base_model`.")
    return replace(run, recipe=run.recipe and Recipe.from_record(run.recipe))


@contextmanager
def saying_how_to_resume(config, name):
    """Adds the command that resumes a run to the errors that say it can be."""
    try:
        yield
    except (items.UserError, items.Stopped) as error:
        if not error.resumes:
            raise
        command = config.command(f"train --resume {name}")
        raise type(error)(f"{error} Resume by {command}.", error.code) from error


# ------------------------------------------------------------------------------------------------
# Stage 1: prepare


@stage
def prepare_prompts(
    config: RunConfig,
    cutoff: int = DEFAULT_CUTOFF,
    hf_dataset_user: str | None = None,
    source: str | None = None,
    columns: dict | None = None,
    unit: float | None = None,
    currency: str = "$",
    decimal: str | None = None,
) -> Path:
    """Items → prompts, from the course's dataset on the Hub, the file `source`, or the demo.

    `columns` of the file are {role: name or names}, `unit` and `currency` as in items.PriceScale;
    descriptions are cut to `cutoff` tokens. Writes to `{output_dir}/datasets`, then pushes to
    `hf_dataset_user` unless the config is local. Returns the dataset's folder.
    """
    # 1) Check everything up front and report all problems together
    if not config.local:
        get_env("HF_TOKEN", required=True)
    items.check_writable(config.dataset_folder)
    problems = items.Problems()
    with problems:
        account = None if config.local else login_huggingface(hf_dataset_user, write=True)
    with problems:
        user = config.data_user or DEFAULT_DATA_USER
        options = {"columns": columns, "unit": unit, "currency": currency, "decimal": decimal}
        catalogue = items.find_catalogue(source, user, config.mode, config.seed, **options)
    if config.demo_mode:
        problems.report()  # before the base is unpacked, which takes 40 s
    with problems:
        path, commit = items.find_base(config.base_name, None, config.base_folder)
        tokenizer = items.load_tokenizer(path, commit)
    problems.report()
    items.check_tokenizer(path, tokenizer, catalogue.scale)

    # 2) Build the prompts and describe them
    prompts, cut = items.build_prompts(catalogue.splits, tokenizer, cutoff, catalogue.scale)
    print("\n".join([f"Items: {catalogue.about['source']}", *map(with_flags, catalogue.notes)]))
    settings = {"mode": config.mode, "cutoff": cutoff, "seed": config.seed}
    settings |= {"base_model": config.base_name}
    about = items.describe_prompts(prompts, cut, catalogue, **settings)
    print(items.format_prompts(about))
    first = prompts["train"][0]
    sample = items.shorten(first["prompt"] + first["completion"], 800)
    print(f"The first row to train on:\n{textwrap.indent(sample, '  ')}")

    # 3) Write the folder, replacing an older one, then push
    folder = new_dataset_folder(config, source, about)
    with items.replacing(folder) as new:
        items.save_prompts(new, prompts, about)
        items.write_manifest(new)
    print(f"Saved: {folder}")
    if account:
        items.push_prompts(f"{account}/{config.dataset_folder.name}", prompts, folder, about)
    say_next(config, "train", "--epochs auto" if source and config.demo_mode else "")
    return folder


# ------------------------------------------------------------------------------------------------
# Stage 2: train


@stage
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

    `changes` replace fields of the mode's Recipe; `resume` is a run's name, '' the newest
    unfinished one. Returns the run's folder, which is pushed unless the run is local. Raises
    UserError, with code 3 if only a push failed, items.Stopped after a signal.
    """
    # 1) Open a new run or one to resume
    util.join_processes()
    changes |= {"seed": seed}
    changes = {name: value for name, value in changes.items() if value is not None}
    now = datetime.now().strftime("%Y-%m-%d_%H.%M.%S")
    name = util.broadcast(run_name or (now if config.mode == "full" else f"{now}-{config.mode}"))
    with util.PartialState().main_process_first():
        if resume is None:
            with saying_how_to_resume(config, config.project.short(name)):
                run = new_run(config, name, RECIPES[config.mode], use_4bit, changes)
        else:
            run = find_run(config, resume, hf_user, is_finished=False)
            util.check_resumable(run, changes, use_4bit)
            config = replace(config, local=config.local or not run.hub)
    with saying_how_to_resume(config, run.name):
        if util.finished_problem(run.folder) is None:
            return run.folder if dry_run else push(config, run)

        # 2) Check everything, then plan how it is computed here; the plan has the reasons
        run.wandb = run.wandb or log_wandb
        config = config.for_run(run)
        use_bf16 = detect_bf16_support()
        with util.PartialState().main_process_first():
            data, base = check_all(config, run, hf_user, use_bf16, micro_batch, changes)
        plan = util.make_plan(base, run, data, use_bf16, micro_batch or run.micro_batch)
        plan = util.broadcast(plan)
        print(plan)
        if dry_run:
            print("Dry run: nothing trained, nothing written")
            return run.folder

        # 3) Train: resumes, stops on signals, takes another plan if memory runs out; then push
        quant_config = build_quant_config(run.use_4bit, use_bf16, plan.dtype)
        with util.claimed(run, is_new=resume is None):
            trainer = util.train(base, run, data, plan, quant_config)
            util.save_run(run, trainer, data)
        folder = push(config, run)
        say_next(config, "eval")
        return folder


def check_all(config, run, hf_user, use_bf16, micro_batch, changes):
    """(util.TrainingData, util.Base) of a run. Records data, base and name on the Hub in the run.

    Checks everything that can fail before weights are read; raises one UserError for all problems.
    """
    account = None
    if not config.local:
        get_env("HF_TOKEN", required=True)  # nothing else can be checked without a token
    items.check_writable(run.folder)
    problems = items.Problems()
    with problems:
        if not config.local:
            account = login_huggingface(hf_user or run.account, write=True)
            items.check_hub_name(f"{account}/{run.folder.name}")
    with problems:
        prompts = find_prompts(config, run.data)
    if config.demo_mode:
        problems.report()  # before the base is unpacked, which takes 40 s
    with problems:
        base = open_base(config, run)
    with problems:
        if run.wandb:
            util.check_wandb()
    problems.report()
    run.hub = f"{account}/{run.folder.name}" if account else None
    return util.prepare_training(run, prompts, base, use_bf16, micro_batch, changes), base


def push(config, run):
    """Pushes a run's folder unless the config is local. Returns the folder."""
    if run.hub and not config.local:
        with saying_how_to_resume(config, run.name):
            util.push_run(run)
    return run.folder


# ------------------------------------------------------------------------------------------------
# Stage 3: eval


def open_run(config, run_name, hf_user, revision):
    """(the config of a run to evaluate, the run, its base, options of util.open_reader)."""
    run = find_run(config, run_name, hf_user, revision)
    config = config.for_run(run)
    use_bf16 = detect_bf16_support()
    precision, _ = util.choose_precision(run.recipe.precision if run.recipe else "auto", use_bf16)
    quant_config = build_quant_config(run.use_4bit, use_bf16, util.DTYPES[precision])
    options = {"quant_config": quant_config, "precision": precision, "use_bf16": use_bf16}
    return config, run, open_base(config, run), options


def compares(run, splits, is_asked):
    """Whether a run's answers are mixed with prices of the splits' items."""
    if not is_asked or not run.adapter or run.comparables.get("weight") == 0:
        return False
    if splits is None:
        print("Comparables: the items that the run was trained on aren't here: the model alone")
    return splits is not None


@stage
def open_pricer(
    config: RunConfig,
    hf_user: str | None = None,
    run_name: str | None = None,
    revision: str | None = None,
    decode: str = "median",
    comparables: bool = True,
):
    """A run to price items with in programs, as `open_pricer(config)(["Brass table lamp", …])`.

    Returns a util.Pricer, which reads the model once. A call with any number of descriptions
    returns what price_items does.
    """
    config, run, base, options = open_run(config, run_name, hf_user, revision)
    splits = items.splits_trained_on(config.dataset_folder, run.data.get("fingerprint"))
    is_mixed = compares(run, splits, comparables)
    return util.Pricer(run, base, splits, decode, is_mixed, **options)


@stage
def evaluate_model(
    config: RunConfig,
    hf_user: str | None = None,
    run_name: str | None = None,
    revision: str | None = None,
    size: int | None = 200,
    compare_base: bool = False,
    decode: str = "median",
    comparables: bool = True,
    earlier: tuple = (),
) -> dict:
    """Evaluates a run on the first `size` rows of its test split.

    Compares it with constants, words alone, runs evaluated `earlier` and, if asked for, the
    untouched base. Mode and, unless the config names others, base and data are the run's. Writes
    figures, charts and a report to `{run's folder}/eval` and publishes them or, if data, base or
    commit aren't the run's own, to a folder beside it. Returns the content of results.json.
    """
    # 1) Find the run, its test rows and what it is compared with
    config, run, base, options = open_run(config, run_name, hf_user, revision)
    prompts = find_prompts(config, run.data)
    rows = util.first_rows(prompts.splits["test"], size)
    items.check_tokenizer(base.path, base.tokenizer, prompts.scale)
    data = util.describe_data(prompts)
    is_fetched = run.adapter not in (None, run.folder)
    own = items.own_accounts() if is_fetched else [run.account]
    origin = [name for name in (run.account, revision) if name and name not in own]
    folder, differences = util.evaluation_folder(run, data, base, "-".join(origin))
    items.check_writable(folder)
    if differences:
        reasons = "; ".join(differences)
        print(f"Not the run's own evaluation, so it stays in {folder}, unpublished: {reasons}")
    earlier_guesses = util.read_earlier(config.project, earlier, rows, decode, base)

    # 2) Read its answers and the untouched base's
    is_known = run.data.get("fingerprint") == prompts.fingerprint
    splits = prompts.splits if is_known else None
    is_mixed = compares(run, splits, comparables)
    pricer = util.Pricer(run, base, splits, decode, is_mixed, **options)
    answers = pricer.answer(rows, compare_base or config.demo_mode)

    # 3) Write figures, charts and the report, replacing an older evaluation
    with items.replacing(folder) as new:
        new.mkdir()
        results, table = util.score_run(
            run, base, prompts, data, rows, answers, earlier_guesses, config.seed, new
        )
        results |= {"revision": revision, "differences": differences}
        util.write_evaluation(new, results, run, table)
    print(util.format_table(results))
    print(f"Saved: {folder}; open {folder / 'report.html'} for all of it")

    # 4) Publish them, if they are its own: the run's card, the Hub
    if not differences:
        if run.data:
            util.write_card(run.folder, run, results)
        push(config, run)
    named = f"--run-name {run.name} " if run_name else ""
    say_next(config, "eval", f"{named}--input new.csv --output priced.csv")
    return results


@stage
def price_items(
    config: RunConfig,
    hf_user: str | None = None,
    run_name: str | None = None,
    revision: str | None = None,
    decode: str = "median",
    comparables: bool = True,
    source: str | None = None,
    text: str | None = None,
    output: str | None = None,
    columns: dict | None = None,
    decimal: str | None = None,
) -> list:
    """Prices the items of the user's own file `source`, or the one that `text` describes.

    Prints guesses with their 80 % intervals and writes them to `output`, CSV or JSON lines, behind
    the file's own columns. If it has prices, the guesses are scored. `columns` as in
    prepare_prompts; those of the data that the run was trained on are known. Returns a dict per
    item: line, title, guess, low, high, price, and the most similar training items.
    """
    if output:
        items.check_output(output, source)
    if source:
        items.check_source(source, columns)
    options = (hf_user, run_name, revision, decode, comparables)
    pricer = open_pricer.__wrapped__(config, *options)
    own = pricer.own_rows(source, [text or ""], columns, decimal)
    for note in own.notes:
        print(with_flags(note))

    answers = pricer.answer(own.rows)
    table = util.price_table(own.rows, answers)
    print(util.format_prices(table, pricer.run.scale))
    if output:
        own.write(output, table)
        print(f"Saved: {output}")
    results = util.score_own_rows(pricer, answers, own.rows, source, config.seed)
    if results:
        print(util.format_table(results))
    return table


@stage
def export_model(
    config: RunConfig,
    folder: str,
    hf_user: str | None = None,
    run_name: str | None = None,
    revision: str | None = None,
) -> Path:
    """Writes a run as an ordinary 16-bit model into a new folder, which is returned.

    For vLLM, TGI, llama.cpp, Ollama. The adapter is merged into the dequantised base, against which
    it was trained. What was written is compared with the run on validation rows, if the data that
    it was trained on are available.
    """
    if Path(folder).exists():
        raise items.UserError(f"`folder` {folder}: exists already. Give a new folder.")
    items.check_writable(folder)
    config, run, base, options = open_run(config, run_name, hf_user, revision)
    splits = items.splits_trained_on(config.dataset_folder, run.data.get("fingerprint"))
    with items.replacing(folder) as new:
        new.mkdir()
        print(util.export_run(run, base, splits, new, **options))
    print(f"Exported: {folder}, bf16")
    return Path(folder)


# ------------------------------------------------------------------------------------------------
# Command line

OWN_FILE_FLAGS = "--source --input"  # as `prepare` and as `eval` call it
ARGUMENTS = {
    "cutoff": Argument("tokens kept of title, category and text together", at_least(1)),
    "hf_dataset_user": Argument("whose account the prompts go to (default: the token's own)"),
    "source": Argument("your CSV, TSV, JSON or Parquet file (default: none)", flag=OWN_FILE_FLAGS),
    "columns": Argument(
        "ROLE=NAME for title, price, text, category (default: usual names)", column, nargs="+"
    ),
    "decimal": Argument(
        "the file's decimal sign (default: as its prices show)", choices=". ,", metavar="SIGN"
    ),
    "unit": Argument("money that a step of 0 … 999 is (default: suits the prices)", power_of_ten),
    "currency": Argument("how prompts, tables and charts call it: $, €, CHF, …", currency_sign),
    "hf_user": Argument("whose account the adapter is in, or goes to (default: the token's own)"),
    "log_wandb": Argument("log to Weights & Biases, needs its login (default: off)", bool),
    "run_name": Argument("the run; eval: or `base` (default: date and time; newest)", plain_name),
    "use_4bit": Argument("base in 8 bits (default: 4)", bool, const=False, flag="--no-4bit"),
    "resume": Argument("resume or push a run (default: the newest)", nargs="?", const=""),
    "dry_run": Argument("check everything, print the plan and stop (default: train)", bool),
    "micro_batch": Argument("rows computed at once by a process (default: what fits)", at_least(1)),
    "revision": Argument("the adapter's commit on the Hub (default: the newest)"),
    "size": Argument("test items", at_least(1, word="all"), metavar="N|all"),
    "compare_base": Argument("evaluate the base, too (default: only of the demo's runs)", bool),
    "decode": Argument("answer by median or mean, or generate", choices="median mean greedy"),
    "comparables": Argument(
        "mix in similar training items' prices (default: on)", on_or_off, metavar="on|off"
    ),
    "earlier": Argument("evaluated runs (default: none)", plain_name, nargs="+", flag="--compare"),
    "text": Argument("price the item of this description (default: evaluate)"),
    "output": Argument("also write the guesses, CSV or JSONL (default: the screen only)"),
    "folder": Argument("write a merged 16-bit model there (default: evaluate)", flag="--export"),
}
ARGUMENTS |= {
    one.name: one.metadata["argument"] for kind in (Recipe, RunConfig) for one in fields(kind)
}
SYNONYMS = {  # in other programs
    "--lr": "--learning-rate",
    "--rank": "--lora-r",
    "--model": "--base-model",
    "--file": "--source",
    "--csv": "--source",
}
OF_DEVICES = ("--gpu", "--device", "--cuda", "--cpu")  # in other programs
PLAN_LINES = (
    "The plan's lines. Data: the dataset. Schedule: what is chosen for its rows. Device: what the "
    "training runs on. Precision: the number format of computations. Base: the format of its "
    "weights. Trainable: the adapter's parameters. Loss: what is minimised. Steps: updates of the "
    "adapter, and passes over the rows. Memory: a rough estimate, and what is free. Micro-batch: "
    "rows at once, × those accumulated to a step, × processes. Speed: whether rows are packed, one "
    "behind the other, or padded. Check: the fast paths that agree with plain forward passes. "
    "Time: how long the rest takes."
)
STAGES = {
    "prepare": [prepare_prompts],
    "train": [train_model],
    "eval": [evaluate_model, price_items, export_model],
}


def defaults_of(function):
    """{name: default, as text} of a stage's arguments, the recipe's among them."""
    parameters = inspect.signature(function).parameters
    defaults = {name: one.default for name, one in parameters.items() if name in ARGUMENTS}
    if "changes" in parameters:
        defaults |= {one.name: describe_default(one) for one in fields(Recipe)}
    defaults.pop("seed", None)  # RunConfig has it
    return defaults


def describe_default(one):
    """The default of a field of Recipe or RunConfig as text, in each mode if they differ."""
    none, modes = one.metadata["none"], one.metadata["modes"]
    texts = {mode: none if value is None else str(value) for mode, value in modes.items()}
    if len(set(texts.values())) == 1:
        return texts["lite"].replace("False", "off")
    return ", ".join(f"{mode} {text}" for mode, text in texts.items())


def build_parser() -> argparse.ArgumentParser:
    """The parser of the three subcommands; what it returns holds only what was given.

    What they share is accepted before and after the subcommand and means the same.
    """
    parser = argparse.ArgumentParser(
        prog="app.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        fromfile_prefix_chars="@",
        epilog="@FILE reads arguments from a file. With data of your own, epochs, batch size, "
        "learning rate and price loss are chosen by rows and base model unless they are given.",
    )
    parser.convert_arg_line_to_args = partial(shlex.split, comments=True)
    stages = parser.add_subparsers(dest="stage", required=True, metavar="{prepare,train,eval}")
    parsers = [parser]
    for name, functions in STAGES.items():
        text = functions[0].__doc__.splitlines()[0]
        usage = f"app.py {name} [flags]"  # shown with each error; --help lists the flags below it
        epilog = f"{PLAN_LINES} {parser.epilog}" if name == "train" else parser.epilog
        options = {"usage": usage, "description": text, "epilog": epilog}
        parsers.append(stages.add_parser(name, help=text, allow_abbrev=False, **options))
        defaults = dict(pair for one in functions for pair in defaults_of(one).items())
        for argument, default in defaults.items():
            ARGUMENTS[argument].add_to(parsers[-1], argument, default)
    parser.stages = stages.choices
    for one in parsers:
        shared = one.add_argument_group("shared", "before or after the subcommand")
        for of_config in fields(RunConfig):
            default = describe_default(of_config)
            of_config.metadata["argument"].add_to(shared, of_config.name, default)
    return parser


def hint_for(text, stage):
    """What an unknown flag of a stage may be meant to be; '' if nothing is like it."""
    typed = text.partition("=")[0].replace("_", "-")
    if typed in OF_DEVICES:
        return "a GPU is used if PyTorch sees one; "
    flags = {flag: one for one, argument in ARGUMENTS.items() for flag in argument.flags_of(one)}
    nearest = difflib.get_close_matches(SYNONYMS.get(typed, typed), flags, 1, cutoff=0.7)
    if not nearest:
        return ""
    known = {name: chain(*map(defaults_of, functions)) for name, functions in STAGES.items()}
    stages = [name for name, arguments in known.items() if flags[nearest[0]] in arguments]
    if stages and stage not in stages:
        return f"{nearest[0]} is a flag of {' and '.join(stages)}; "
    return f"did you mean {nearest[0]}?; "


def parse_arguments(argv):
    """(name of the stage, its function, a RunConfig, the function's arguments).

    Exits with code 2 and a message if they are invalid.
    """
    parser = build_parser()
    try:
        parsed, unknown = parser.parse_known_args(argv)
    except ValueError as error:
        parser.error(f"@FILE: {error}")
    given = vars(parsed)
    name = given.pop("stage")
    parser = parser.stages[name]
    if unknown:
        text = f"unknown: {' '.join(unknown)}; {hint_for(unknown[0], name)}see"
        parser.error(f"{text} `python app.py {name} --help`")
    function = STAGES[name][0]
    if name == "eval" and given.keys() & {"source", "text"}:
        function = price_items
    if "folder" in given:
        function = export_model
    shared = {one.name: given.pop(one.name) for one in fields(RunConfig) if one.name in given}
    config = RunConfig(**shared)
    if config.lite_mode and config.demo_mode:
        parser.error("--lite and --demo exclude each other")
    if "source" in given and "text" in given:
        parser.error("--input and --text exclude each other")
    if "resume" in given and "run_name" in given:
        parser.error("--run-name names a new run, --resume an earlier one: give one of them")
    useless = given.keys() - defaults_of(function).keys()
    if "source" not in given:
        useless |= given.keys() & {"columns", "decimal"}
    if config.local:
        useless |= given.keys() & {"hf_user", "hf_dataset_user", "revision"}
    for one in sorted(useless):
        parser.error(f"{ARGUMENTS[one].flags_of(one)[0]}: does nothing here; leave it out")
    if function is train_model and "seed" in shared:
        given["seed"] = config.seed  # a run that is resumed keeps its own
    return name, function, config, given


class LastingFile(io.FileIO):
    """Standard output or error that never ends a stage, as after `| head`: the rest is lost."""

    def write(self, data):
        with suppress(OSError):
            return super().write(data) or len(data)  # None where it would have to wait
        return len(data)


def lasting(stream):
    """A text stream in place of `stream`; what its encoding lacks becomes a question mark."""
    try:
        file = io.BufferedWriter(LastingFile(stream.fileno(), "w", closefd=False))
    except (AttributeError, OSError, ValueError):  # none of the process, or it was closed: then
        return stream or open(os.devnull, "w")  # files must not get its number  # noqa: SIM115
    return io.TextIOWrapper(file, stream.encoding, "replace", line_buffering=True)


def exit_on_signal(number, frame):
    """Ends the program at once: libraries could swallow an exception, and files stay whole.

    While training, util.StopOnSignal takes its place.
    """
    with suppress(OSError):  # nobody reads any more
        os.write(2, b"\napp.py: stopped\n")
    os._exit(128 + number)


def with_flags(text):
    """A text in which arguments, such as `micro_batch`, are named as their flags."""
    return re.sub(r"`(\w+)`", flag_of, text)


def flag_of(match):
    """What a shell calls the argument that an error names, as `micro_batch`."""
    argument = ARGUMENTS.get(match[1])
    return argument.flags_of(match[1])[0] if argument else match[0]


def main(argv=None) -> None:
    """Parses the command line and calls the stage that it names."""
    sys.stdout, sys.stderr = lasting(sys.stdout), lasting(sys.stderr)
    name, function, config, given = parse_arguments(argv)
    if config.demo_mode:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if not sys.stderr.isatty():  # in a log each state of a progress bar stays
        os.environ.setdefault("TQDM_MININTERVAL", "30")
    set_up_libraries()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, exit_on_signal)
    is_first = int(os.environ.get("RANK", 0)) == 0
    if not is_first:  # only the first process prepares, evaluates and prints
        if name != "train":
            return
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
        os.environ["TQDM_DISABLE"] = "1"
    code = 1
    try:
        items.probe_hub.cache_clear()
        function.__wrapped__(config, **given)
        return
    except ModuleNotFoundError as error:
        text = f"{error.name} is not installed for {sys.executable}. Activate the virtual "
        text += "environment, or `python -m pip install -r requirements.txt`."
    except (items.UserError, items.Stopped) as error:
        text, code = with_flags(str(error)), error.code
        if isinstance(error, items.Stopped) and not is_first:
            text = ""
    except Exception as error:
        text = items.disk_problem(error)
        if not text:
            raise
    for line in text.splitlines():
        print(f"app.py {name}: {line}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
