"""The data: what an item is, how it becomes a prompt, and where both are stored.

items (title, category, price, summary)  →  prompts (prompt, completion)  →  train / val / test as
parquet

    1. Items and prompts                    6. Prices as shops write them
    2. Tokens to train on                   7. Texts as people read them
    3. Atomic files, full disks             8. The user's own catalogue
    4. Datasets, on disk and on the Hub     9. Splits without leaks
    5. Rows of the user's own file          10. The demo's synthetic catalogue

Before them come the errors that users see, which all files share. No model is loaded here. The
formats are those of the course "The Price Is Right", so that its datasets and ours can be
exchanged.
"""

import array
import atexit
import codecs
import csv
import errno
import glob
import gzip
import hashlib
import html
import io
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import tempfile
import zlib
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property, lru_cache
from itertools import islice, zip_longest
from pathlib import Path

import datasets
import httpx2
import numpy
import psutil
import pyarrow
import pyarrow.compute
import pyarrow.ipc
import pyarrow.parquet
import xxhash
from datasets import Dataset, DatasetDict, Features, List, Value, load_dataset
from datasets.exceptions import (
    DataFilesNotFoundError,
    DatasetGenerationError,
    DatasetNotFoundError,
)
from huggingface_hub import HfApi, constants, errors, get_session, get_token, hf_hub_download
from huggingface_hub.utils import validate_repo_id
from pydantic import BaseModel

QUESTION = "What does this cost to the nearest dollar?"
PREFIX = "Price is $"
SCALE_END_LEN = 60  # characters of a prompt in which its scale is
SPLITS = ("train", "val", "test")
ITEM_SPLITS = ("train", "validation", "test")  # the names in datasets of items
COURSE_USER = "ed-donner"  # whose datasets on the Hub are the course's

MIN_PRICE = 0.50  # units; the course's lowest price in dollars
MAX_PRICE = 999.49  # units; the highest that rounds to 999
HELD_SHARE = 0.995  # of the prices: what a unit has to hold to be chosen
COARSE_STEPS = 10  # of fewer steps a median price is coarse
WARNED_SHARE = 0.2  # of rows that are dropped or cut
UNIT_EXPONENTS = range(-2, 13)  # of the powers of ten that units can be
TIMES = "×"  # between the unit and the number in a prompt

IGNORED = -100  # the label of tokens that are not trained on, as in PyTorch
SHOWN_VALUE = 60  # characters of a value in an error
SHOWN_EXAMPLE = 40  # characters of a cell that shows why rows are dropped

TOKEN_CHARACTERS = 6  # most texts have fewer of them a token
MERGE_MARGIN = 8  # tokens before a text's end that what follows can change; in fact one or two
MAX_COUNTED = 20_000  # training rows whose tokens `prepare` counts
MANIFEST = "manifest.json"
RECORD = "prepare.json"
PREPARE_AGAIN = "Run the stage prepare again."
NOT_PERMITTED = (errno.EACCES, errno.EPERM, errno.EROFS)
CONNECT_S = 2.0  # seconds that a connection to the Hub may take, before it counts as away


class ShownInOneLine:
    """An exception of which a notebook shows the text, and no traceback."""

    def _render_traceback_(self):
        return [str(self)]


class UserError(ShownInOneLine, Exception):
    """An error that the user can fix. Its text names the value, the rule and the fix.

    Arguments are named in backticks as in Python. `main` prints it and exits with `code`: 1, or 3
    if only a push failed. With `resumes` the same run can be resumed; app.py adds how.
    """

    def __init__(self, text, code=1, resumes=False):
        super().__init__(text)
        self.code = code
        self.resumes = resumes


class Stopped(ShownInOneLine, KeyboardInterrupt):
    """A signal, or a notebook's Stop button, has ended a stage; app.py adds how to resume it.

    `main` prints it and exits with `code`, the one that shells expect.
    """

    def __init__(self, text, code=128 + signal.SIGINT):
        super().__init__(text)
        self.code = code


class Problems:
    """Collects the UserErrors of several checks, so that all of them are reported at once.

    `with problems: …` for each check, then `problems.report()`.
    """

    def __init__(self):
        self.texts = []

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, UserError):
            self.texts.append(str(error))
            return True
        return False

    def report(self):
        """Raises one UserError with a line for each problem, if there are any."""
        if self.texts:
            raise UserError("\n".join(dict.fromkeys(self.texts)))


def causes(error):
    """An exception, and those because of which it was raised."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


# ------------------------------------------------------------------------------------------------
# 1. Items and prompts


def encode(texts, tokenizer, special=False):
    """The token ids of `texts`, a list of lists.

    Calling the tokenizer returns the same in twice the time, because it also makes masks.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # one in Python
        return tokenizer(texts, add_special_tokens=special)["input_ids"]
    backend.no_truncation()
    backend.no_padding()
    encodings = backend.encode_batch_fast(texts, add_special_tokens=special)
    return [encoding.ids for encoding in encodings]


def truncate(summaries, tokenizer, max_tokens):
    """The summaries, those of more than `max_tokens` tokens cut to so many and right-stripped.

    Special tokens are not counted. Of a long text only the beginning is encoded if that has tokens
    enough: tokenizers read word by word, so what follows changes but the last few of them.
    """
    limit = max_tokens * TOKEN_CHARACTERS
    ids = encode([text[:limit] for text in summaries], tokenizer)
    truncated = list(summaries)
    for row, text in enumerate(summaries):
        if len(text) > limit and len(ids[row]) <= max_tokens + MERGE_MARGIN:
            (ids[row],) = encode([text], tokenizer)
        if len(ids[row]) > max_tokens:
            truncated[row] = tokenizer.decode(ids[row][:max_tokens]).rstrip()
    return truncated


@dataclass(frozen=True)
class PriceScale:
    """What the numbers 0 … 999 of a dataset mean: number × unit, in a currency.

    The prompts name both, so a dataset carries its scale wherever it goes. With unit 1 and `$` they
    are the course's.
    """

    unit: float = 1  # a power of ten
    currency: str = "$"

    @property
    def step(self):
        """One unit in words: `$10`."""
        return f"{self.currency}{format_unit(self.unit)}"

    @property
    def question(self):
        if self == COURSE_SCALE:
            return QUESTION
        return f"What does this cost to the nearest {self.step}?"

    @property
    def prefix(self):
        """The end of each prompt, without a space: a number follows."""
        return f"Price is {self.currency if self.unit == 1 else self.step + TIMES}"

    @cached_property
    def lowest(self):
        """The lowest price that is used; a larger unit doesn't drop cheap items."""
        return MIN_PRICE * min(1, self.unit)

    @cached_property
    def highest(self):
        return self.amount(MAX_PRICE)

    def describe_range(self):
        """The prices that are used, as text."""
        if self.unit == 1:
            return f"{self.currency}{MIN_PRICE:.2f}–{self.currency}{MAX_PRICE}"
        return f"{self.format(self.lowest, 3 if self.unit < 1 else 2)}–{self.format(self.highest)}"

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

    @property
    def digits(self):
        """The decimals of a whole number of units in money."""
        return max(0, -round(math.log10(self.unit)))

    def format_whole(self, amount):
        """An amount that is a whole number of units: `$57`, `$0.57`."""
        return self.format(amount, self.digits)

    def prompt(self, summary):
        """The prompt for a description."""
        return f"{self.question}\n\n{summary}\n\n{self.prefix}"

    def completion(self, price, do_round):
        """The number for a price as text: whole, or as it is. Half is rounded to even."""
        number = price if self.unit == 1 else self.number(price)
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


COURSE_SCALE = PriceScale()
SCALE_AT_END = re.compile(rf"Price is ([^\s\d{TIMES}]+)(?:([\d.]+){TIMES})?\s*$")


def format_unit(unit):
    """A unit as it stands in prompts: 0.01, 10."""
    return numpy.format_float_positional(unit, trim="-")


def scale_of(prompt):
    """The PriceScale that a prompt names at its end; the course's for any other text."""
    match = SCALE_AT_END.search(prompt[-SCALE_END_LEN:])
    if not match:
        return COURSE_SCALE
    unit = float(match[2] or 1)
    return PriceScale(int(unit) if unit >= 1 else unit, match[1])


def smallest_unit(price):
    """The exponent of the smallest unit whose numbers hold a price."""
    exponent = UNIT_EXPONENTS.start
    while price > MAX_PRICE * 10.0**exponent and exponent < UNIT_EXPONENTS.stop - 1:
        exponent += 1
    return exponent


def choose_unit(counts):
    """The smallest unit that holds HELD_SHARE of the prices, 1 without any.

    `counts` is {exponent of `smallest_unit`: prices}.
    """
    if not counts:
        return 1
    units = map(power_of_ten, UNIT_EXPONENTS)
    return next(unit for unit in units if held_share(counts, unit) >= HELD_SHARE)


def finer_scale(scale, prices):
    """The PriceScale with a tenth of the unit if that would suit most `prices` better, or None.

    It would where half of them are below COARSE_STEPS steps: a few dear items need the unit.
    """
    is_coarse = scale.unit > 1 and numpy.median(prices) < scale.amount(COARSE_STEPS)
    return PriceScale(scale.unit // 10, scale.currency) if is_coarse else None


def power_of_ten(exponent):
    """A unit: a whole number, or a float below 1."""
    return 10**exponent if exponent >= 0 else float(f"1e{exponent}")


def held_share(counts, unit):
    """The share of the prices that the numbers of a unit can say."""
    largest = round(math.log10(unit))
    held = sum(count for exponent, count in counts.items() if exponent <= largest)
    return held / max(1, sum(counts.values()))


def prompt_of(summary):
    """The course's prompt for a description."""
    return COURSE_SCALE.prompt(summary)


class Item(BaseModel):
    """A product with its price. `summary` is the description that the model reads.

    The course's: it converts a price that is text, ignores other fields, and raises a ValueError
    (pydantic's) for what is no title or price.
    """

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
        """Sets `prompt`, with the summary cut to `max_tokens` tokens, and `completion`.

        An item without a price has an empty completion.
        """
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
        head, prefix, _ = self.prompt.partition(PREFIX)
        return head + prefix

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
    """Prompts for the items of a DatasetDict with the columns `summary` and `price`.

    Prices are rounded in train and val only. Returns the DatasetDict of exactly `prompt` and
    `completion`, and what was counted on the way, numpy arrays: {split: {"cut": whether the summary
    was too long, "price": in money}}; train has "tokens" of its first MAX_COUNTED rows, too.
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
    counts = {}
    for name in SPLITS:
        items = splits[name].select_columns(["summary", "price"])
        rows = items.map(
            convert,
            batched=True,
            fn_kwargs={"do_round": name != "test"},
            remove_columns="summary",
            desc=f"prompts of {name}",
            new_fingerprint=f"{items._fingerprint}-{identity}",
        )
        prompts[name] = rows.select_columns(["prompt", "completion"])
        counts[name] = {column: rows.data.column(column).to_numpy() for column in ("cut", "price")}

    first = prompts["train"].select(range(min(len(prompts["train"]), MAX_COUNTED)))
    texts = [row["prompt"] + row["completion"] for row in first]
    counts["train"]["tokens"] = numpy.array([len(ids) for ids in encode(texts, tokenizer)])
    return prompts, counts


# ------------------------------------------------------------------------------------------------
# 2. Tokens to train on


def tokenise(prompts, tokenizer, name):
    """Rows of `prompt` and `completion` as training reads them, a Dataset; `datasets` caches it.

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
        new_fingerprint=f"{prompts._fingerprint}-{tokenizer_identity(tokenizer)}",
    )


def completion_tokens(completions, tokenizer, prefix=PREFIX):
    """The token ids of each completion with its end of text, behind the prefix; lists.

    Encoded alone a completion can differ: Llama 2's tokenizer puts a space before it.
    """
    (prefix_ids,) = encode([prefix], tokenizer)
    unique = sorted(set(completions))
    ids = encode([f"{prefix}{text}{tokenizer.eos_token}" for text in unique], tokenizer)
    tokens = {text: row[len(prefix_ids) :] for text, row in zip(unique, ids, strict=True)}
    return [tokens[text] for text in completions]


def row_lengths(tokens):
    """Tokens in each row of a tokenised Dataset, a numpy array.

    Of 64-bit integers, since bytes are computed from it.
    """
    lengths = pyarrow.compute.list_value_length(tokens.data.column("input_ids"))
    return lengths.to_numpy().astype("int64")


def tokenizer_identity(tokenizer):
    """A hash that tells tokenizers apart."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend else str(sorted(tokenizer.get_vocab().items()))
    text = f"{content} {tokenizer.eos_token}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------
# 3. Atomic files, full disks

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_disk_full(error):
    """Whether a full disk, a used-up quota or a limit on files is the reason of an exception.

    Libraries in C++ and Rust have no errno: the system's words are in their texts.
    """
    words = [os.strerror(number) for number in DISK_FULL]
    return any(
        getattr(one, "errno", None) in DISK_FULL or any(word in str(one) for word in words)
        for one in causes(error)
    )


def temporary_folder(target):
    """The hidden folder beside `target` in which this process writes it."""
    return target.with_name(f".{target.name}~{socket.gethostname()}-{os.getpid()}")


@contextmanager
def replacing(target):
    """Yields a path beside `target`, for a file or a folder that the caller makes.

    On success it is flushed to the disk and becomes `target`, of links what they lead to. After an
    error the old content stays. A folder can't be replaced in one step, so the old one is moved
    aside first: see `finish_interrupted_replace`. Of two processes at once, one's stays, whole.
    """
    target = finish_interrupted_replace(Path(target).resolve())
    for leftover in leftovers(target):
        shutil.rmtree(leftover, ignore_errors=True)
    folder = temporary_folder(target)
    folder.mkdir(parents=True)
    new = folder / "new"
    try:
        yield new
        for path in (*new.rglob("*"), new):
            sync(path)
        while True:
            if target.is_dir():
                with suppress(FileNotFoundError):  # another process has moved it
                    os.rename(target, tempfile.mkdtemp(prefix="old", dir=folder))
            try:
                os.replace(new, target)
                break
            except OSError as error:  # another process has just put its folder there
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        sync(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def finish_interrupted_replace(target):
    """Puts the old folder back if a `replacing` was killed between its two renames.

    Returns `target` as a Path.
    """
    resolved = Path(target).resolve()
    for folder in [] if resolved.exists() else leftovers(resolved):
        olds = [old for old in folder.glob("old*") if any(old.iterdir())]
        if olds and (folder / "new").exists():  # else it has taken the old one's place
            os.rename(olds[-1], resolved)
            break
    return Path(target)


def leftovers(target):
    """The temporary folders that killed processes of this machine left beside `target`."""
    start = re.escape(temporary_folder(target).name.rpartition("-")[0])
    for folder in target.parent.glob(".*~*"):
        match = re.fullmatch(rf"{start}-(\d+)", folder.name)
        if match and (int(match[1]) == os.getpid() or not psutil.pid_exists(int(match[1]))):
            yield folder


def sync(path):
    """Has a file's content, or a folder's names, on the disk before anything relies on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path, text):
    """Writes a text entirely or not at all; what isn't text in it becomes question marks."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8", errors="replace", newline="")


def write_json(path, value):
    """Writes `value` as JSON. NaN, which JSON lacks, becomes null."""
    clean = json.loads(json.dumps(value), parse_constant=lambda _: None)
    write_text(path, json.dumps(clean, indent=2, ensure_ascii=False) + "\n")


def read_json(path):
    """What `write_json` wrote, or {} if there is no such file."""
    path = Path(path)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_table(path, table):
    """Writes a list of dicts as CSV or, by the ending, as JSON lines."""
    is_json = Path(path).suffix.lower() == ".jsonl"
    with replacing(path) as new, open(new, "w", encoding="utf-8", newline="") as file:
        if is_json:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in table)
        else:
            writer = csv.DictWriter(file, table[0])
            writer.writeheader()
            writer.writerows(table)


def write_manifest(folder, skipped=()):
    """Writes MANIFEST into `folder`: size in bytes and checksum of each file but the `skipped`.

    The files are on the disk before it is. A folder with a manifest is complete, since it is
    written last.
    """
    files = {}
    for path in sorted(Path(folder).iterdir()):
        is_hidden = path.name.startswith(".")  # what a killed process left
        if path.is_file() and not is_hidden and path.name not in (MANIFEST, *skipped):
            sync(path)
            files[path.name] = file_identity(path)
    write_json(Path(folder, MANIFEST), files)


def manifest_problem(folder, must_exist=True):
    """Why the files in `folder` are not those of its manifest, in a few words, or None.

    Unless it `must_exist`, a folder without one, of an older version or of somebody else, has no
    problem.
    """
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
    """Size in bytes and checksum of a file.

    XXH3 reads a checkpoint of 5 GB in a fifth of a second, SHA-256 in two and a half. It tells
    damage, no forgery.
    """
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, xxhash.xxh3_128)
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
        raise UserError(f"`output` {path}: its folder doesn't exist. Give another file.")
    if source and path.resolve() == Path(source).resolve():
        raise UserError(f"`output` {path}: would overwrite the input. Give another file.")
    check_writable(path.parent, path.name)


def check_writable(folder, name="any"):
    """Raises UserError if `name` can't be written into `folder`, which is made if need be."""
    probe = temporary_folder(Path(folder, name))
    try:
        probe.mkdir(parents=True, exist_ok=True)
        probe.rmdir()
    except OSError as error:
        text = f"{folder}: can't be written to ({error.strerror}). Give another place."
        raise UserError(text) from error


# ------------------------------------------------------------------------------------------------
# 4. Datasets, on disk and on the Hub

NOT_FOUND = "not on the Hub, or {token} may not read it. Check the name and the token."
AWAY = "the Hub can't be reached. Check the network, or the name of a folder."
HUB_ANSWERS = {  # the Hub's own word for an error, or else its status: what it means
    "GatedRepo": "gated. Ask for access at {endpoint}/{what}, then run this again.",
    "RevisionNotFound": "no such revision on the Hub. Check `revision`.",
    401: NOT_FOUND,
    404: NOT_FOUND,
}
HUB_ERRORS = {  # of its client, without an answer
    errors.HFValidationError: "the Hub allows no such name: {error}",
    errors.LocalEntryNotFoundError: AWAY,
    httpx2.TransportError: AWAY,
    ConnectionError: AWAY,
    DatasetNotFoundError: NOT_FOUND,
}
TOKEN_REFUSED = (
    "{token}: the Hub refuses {token}: it is mistyped, expired or revoked. Set HF_TOKEN to a valid "
    "one, made at https://huggingface.co/settings/tokens, or log in again by `hf auth login`."
)


@lru_cache(maxsize=1)
def probe_hub():
    """Asks once in a stage whether the Hub can be reached; app.py clears the cache.

    If not, its libraries read what is cached, as with HF_HUB_OFFLINE=1. They would wait or retry
    for up to half a minute, each request anew.
    """
    if os.environ.get("HF_HUB_OFFLINE"):
        return
    timeout = httpx2.Timeout(5 * CONNECT_S, connect=CONNECT_S)
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = False
    for _ in range(2):
        with suppress(httpx2.TransportError):
            get_session().head(constants.ENDPOINT, timeout=timeout)
            return
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


@contextmanager
def hub_errors(what):
    """Turns what the Hub says of `what`, or its absence, into a UserError.

    Other exceptions, such as a bug's, keep their traceback.
    """
    if not os.path.exists(what):
        probe_hub()
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = None if is_disk_full(error) else describe_hub_error(what, error)
        if text is None:
            raise
        raise UserError(text) from error


def describe_hub_error(what, error):
    """What an error of the Hub or of the way to it says of `what`; None for any other error."""
    chain = list(causes(error))
    answers = [one.response for one in chain if isinstance(one, errors.HfHubHTTPError)]
    kinds = [kind for kind in HUB_ERRORS if any(isinstance(one, kind) for one in chain)]
    if answers:
        if answers[0].status_code == 401 and get_token():
            return TOKEN_REFUSED.format(token=token_name())
        code = answers[0].headers.get("X-Error-Code")
        text = HUB_ANSWERS.get(code) or HUB_ANSWERS.get(answers[0].status_code)
    elif kinds:
        text = HUB_ERRORS[kinds[0]]
    else:
        return None
    names = {"endpoint": constants.ENDPOINT, "what": what, "token": token_name()}
    return f"{what}: {(text or '{error}').format(error=first_line(error), **names)}"


def first_line(error):
    """The first line of an exception's text, or its name."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def saved_token():
    """The Hub's token of a saved login, or of a Colab secret, as its client finds it, or None.

    Raises UserError if it can't be read.
    """
    try:
        return get_token()
    except (OSError, ValueError, errors.OIDCError) as error:
        raise UserError(
            f"{constants.HF_TOKEN_PATH}: the saved login can't be read ({error}). Log in again by "
            "`hf auth login`, or set HF_TOKEN."
        ) from error


def token_name():
    """What messages call the Hub's token: where it comes from."""
    return "HF_TOKEN" if os.environ.get("HF_TOKEN") else "the saved login"


def account_names(account):
    """The names to which an account can write, own and organisations', of the answer to whoami."""
    return [account["name"], *(organisation["name"] for organisation in account.get("orgs", ()))]


def check_hub_name(name):
    """Raises UserError if the Hub allows no repository of that name, `account/run`."""
    with hub_errors(name):
        validate_repo_id(name)


def push_or_explain(name, upload, kind="model"):
    """Calls `upload`, whose client retries by itself. Prints whether the repository is public.

    Raises UserError with code 3 if it can't be pushed now. `kind` is model or dataset.
    """
    try:
        with hub_errors(name):
            upload()
    except UserError as error:
        raise UserError(f"{error} Everything is on disk.", code=3, resumes=True) from error
    is_public = False  # or not known
    with suppress(OSError, httpx2.TransportError):
        is_public = HfApi().repo_info(name, repo_type=kind).private is False
    # One that existed before: this program makes private ones
    print(f"Pushed: {name}{', which is public: anybody can read it' if is_public else ''}")


def push_prompts(name, prompts, folder, about):
    """Pushes prompts to a dataset on the Hub, with what is recorded of them but their file's name.

    Records the dataset's name in their folder.
    """
    record = {key: value for key, value in about.items() if key != "source"}

    def upload():
        prompts.push_to_hub(name, private=True)
        HfApi().upload_file(
            repo_id=name,
            repo_type="dataset",
            path_in_repo=RECORD,
            path_or_fileobj=json.dumps(record, indent=2).encode(),
        )

    push_or_explain(name, upload, kind="dataset")
    write_json(folder / RECORD, {"hub": name} | about)
    write_manifest(folder)


def describe_prompts(prompts, counts, catalogue, **settings):
    """What prepare.json records: settings, rows kept, dropped and cut, their source."""
    return {
        **settings,
        **catalogue.scale.record(),
        "fingerprint": fingerprint(prompts),
        "kept": {name: len(columns["cut"]) for name, columns in counts.items()},
        "dropped": catalogue.dropped,
        "cut": {name: int(columns["cut"].sum()) for name, columns in counts.items()},
        "near_duplicates": count_near_duplicates(prompts),
    } | catalogue.about


def format_prompts(about, counts):
    """What was kept, dropped and cut, how prices and lengths are spread; a text."""
    kept, cut = sum(about["kept"].values()), sum(about["cut"].values())
    dropped = sum(len(lines) for lines in about["dropped"].values())
    splits = ", ".join(f"{count:,} {name}" for name, count in about["kept"].items())
    rows = f"Rows: {kept:,} kept ({splits}), {dropped:,} dropped"
    if dropped:
        rows = with_lines(rows, drop_reasons(about["dropped"], about.get("dropped_examples")))
    cuts = f"Cut at {about['cutoff']} tokens: {cut:,} of {kept:,} descriptions"
    if cut > WARNED_SHARE * kept:
        cuts += ", title and category included; a larger `cutoff` keeps more"
    scale = PriceScale.from_record(about)
    prices, tokens = counts["train"]["price"], counts["train"]["tokens"]
    counted = "an item, train" if len(tokens) == len(prices) else f"first {len(tokens):,}"
    near, compared = about["near_duplicates"]["near"], about["near_duplicates"]["compared"]
    lines = [
        rows,
        cuts,
        f"{f'Price, train, in {scale.currency}:':<26}{format_quantiles(prices, 2)}",
        f"{f'Tokens, {counted}:':<26}{format_quantiles(tokens)}",
        f"Near duplicates: {near:,} of {compared:,} test rows ({near / compared:.1%}) share at "
        f"least {NEAR_SHARE:.0%} of their runs of {GRAM_WORDS} words with one training row",
    ]
    half = scale.amount(0.5)
    zeros = sum(int((columns["price"] <= half).sum()) for columns in counts.values())
    if zeros and scale.unit > 1:
        lines.append(
            f"Note: {zeros:,} of {kept:,} prices are at most half the unit, {scale.format(half)}: "
            "they are learned as 0"
        )
    return "\n".join(lines)


def format_quantiles(values, digits=0):
    """'min 5 · 25 % 20 · median 55 · 75 % 160 · max 999' of numbers."""
    names = ("min", "25 %", "median", "75 %", "max")
    found = numpy.quantile(values, (0, 0.25, 0.5, 0.75, 1), method="nearest")
    pairs = zip(names, found, strict=True)
    return " · ".join(f"{name} {value:,.{digits}f}" for name, value in pairs)


def save_prompts(folder, prompts, about):
    """Writes train.parquet, val.parquet, test.parquet and prepare.json into a new `folder`."""
    Path(folder).mkdir(exist_ok=True)
    for name in SPLITS:
        path = Path(folder, f"{name}.parquet")
        # Chunks by content, which spare uploads, abort the process on a full disk (pyarrow 26)
        prompts[name].to_parquet(path, batch_size=50_000, use_content_defined_chunking=False)
    write_json(Path(folder, RECORD), about)


def read_record(path):
    """What a prepare.json says of its dataset; {} if it is missing or can't be read."""
    try:
        return dict(read_json(path))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def replaced_source(folder, about):
    """A note that a dataset replaces one from another source, '' if it doesn't."""
    older = read_record(finish_interrupted_replace(folder) / RECORD)
    replaced = older.get("source")
    scales = [PriceScale.from_record(record) for record in (older, about)]
    if replaced and scales[0] != scales[1]:
        replaced += f" in steps of {scales[0].step}"
    return "" if replaced in (None, about["source"]) else f", replacing: {replaced}"


@contextmanager
def data_errors(place, remedy="All splits need the same columns."):
    """Turns what `datasets` raises of data that it can't load into a UserError."""
    try:
        with hub_errors(place):
            yield
    except (DatasetGenerationError, DataFilesNotFoundError, OSError, ValueError) as error:
        if is_disk_full(error):
            raise
        for one in causes(error):
            if getattr(one, "errno", None) in NOT_PERMITTED:
                text = f"{one.filename}: {one.strerror}. Set HF_HOME for another cache."
                raise UserError(text) from error
        reason = first_line(error.__cause__ or error)
        raise UserError(f"{place}: can't be loaded ({reason}). {remedy}") from error


def load_prompts(folder, **options):
    """The DatasetDict (train, val, test) that `save_prompts` wrote.

    Memory-mapped from the cache of `datasets`, which also keeps what is made of it.
    """
    paths = {name: Path(folder, f"{name}.parquet").absolute() for name in SPLITS}
    files = {name: glob.escape(str(path)) for name, path in paths.items()}
    with data_errors(folder, PREPARE_AGAIN):
        return load_dataset("parquet", data_files=files, **options)


@dataclass
class Prompts:
    """The prompts to train or evaluate on.

    `place` is the folder or the name on the Hub from which they were read, `about` the content of
    prepare.json there: `source`, `hub`, `cutoff` and more.
    """

    splits: DatasetDict
    place: str
    about: dict

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
        recorded = self.about.get("fingerprint")
        return are_texts and recorded is not None and recorded == self.fingerprint

    @property
    def is_own(self):
        """Whether they are not the course's: `prepare` has read a file, or another made them."""
        is_prepared = "cutoff" in self.about
        is_course = is_prepared or self.place.startswith(f"{COURSE_USER}/")
        return "columns" in self.about or not is_course


def read_prompts(place):
    """The Prompts in a folder, or in a dataset on the Hub.

    Raises UserError if a file is damaged, a column is missing or a row can't be used. What differs
    from the record was made elsewhere, or is damaged in the cache of `datasets`.
    """
    place = str(place)
    if finish_interrupted_replace(place).exists():
        problem = manifest_problem(place, must_exist=False)
        if problem:
            raise UserError(f"{place}: {problem}. {PREPARE_AGAIN}")
        about = read_record(Path(place, RECORD))
        prompts = Prompts(load_prompts(place), place, about)
        if "fingerprint" in about and not prompts.is_recorded:
            print(f"{place}: its copy in the cache of `datasets` is corrupt, and is made again")
            prompts = Prompts(load_prompts(place, download_mode="force_redownload"), place, about)
    else:
        about = {"source": place, "hub": place}
        with data_errors(place):
            splits, record = load_dataset(place), {}
            with suppress(errors.EntryNotFoundError):
                record = read_record(hf_hub_download(place, RECORD, repo_type="dataset"))
        prompts = Prompts(splits, place, record | about)
    check_columns(place, prompts.splits, SPLITS, ("prompt", "completion"))
    if prompts.is_recorded:
        return prompts
    return Prompts(read_rows(place, prompts.splits), place, about)


def check_columns(place, splits, names, columns):
    """Raises UserError if a dataset lacks a split, a column or, in a split, rows."""
    missing = [name for name in names if name not in splits]
    if not missing:
        missing = [name for name in columns if name not in splits[names[0]].column_names]
        missing += [f"rows in {name}" for name in names if not len(splits[name])]
    if missing:
        required = f"{', '.join(names)} with {' and '.join(columns)}"
        raise UserError(f"{place}: lacks {', '.join(missing)}; required: {required}.")


COMPLETION = re.compile(r"(\$?)\s*((?:0|[1-9]\d{0,2})(?:\.\d+)?)", re.ASCII)


def read_rows(place, splits):
    """The splits with exactly `prompt` and `completion`, as training and evaluation read them.

    All prompts end with the prefix of the first one's PriceScale. Raises one UserError that names
    the first row which can't be used, and the number of such rows.
    """
    first = splits["train"][0]["prompt"]
    prefix = scale_of(first if isinstance(first, str) else "").prefix
    bad = []  # (split, row, prompt, completion)
    rewritten = 0
    read = DatasetDict()
    for split in SPLITS:
        dataset = splits[split].with_format(None).select_columns(["prompt", "completion"])
        texts = []
        for row, (prompt, completion) in enumerate(pairs_of(dataset), 1):
            text = read_completion(completion, do_round=split != "test")
            texts.append(text)
            if text is None or not isinstance(prompt, str) or not prompt.endswith(prefix):
                bad.append((split, row, prompt, completion))
            rewritten += text != completion
        if rewritten and not bad:
            identity = f"{dataset._fingerprint}-read"  # for the cache
            dataset = dataset.remove_columns("completion")
            dataset = dataset.add_column("completion", texts, new_fingerprint=identity)
        read[split] = dataset
    if bad:
        split, row, prompt, completion = bad[0]
        raise UserError(
            f"{place}: row {row:,} of {split}: the completion {shorten(repr(completion))} has to "
            f"be a price like 219.00, at most {MAX_PRICE}, the prompt, …{str(prompt)[-20:]!r}, to "
            f"end with `{prefix}`. {len(bad):,} rows can't be used: correct the dataset, or take "
            "another."
        )
    if rewritten:
        print(
            f"Data: {rewritten:,} completions are written differently, or have cents in training "
            "rows; they are read as 219.00 is"
        )
    return read


def pairs_of(dataset):
    """Yields the prompt and the completion of each row."""
    for batch in dataset.iter(10_000):
        yield from zip(batch["prompt"], batch["completion"], strict=True)


def read_completion(completion, do_round):
    """A completion as text, or None if it is no price from 0 to MAX_PRICE.

    A plain number stays letter by letter, but models are trained on whole ones: `do_round`.
    """
    if isinstance(completion, int | float | Decimal) and not isinstance(completion, bool):
        completion = f"{completion:.2f}"
    match = COMPLETION.fullmatch(completion) if isinstance(completion, str) else None
    if not match or float(match[2]) > MAX_PRICE:
        return None
    number = float(match[2])
    if do_round and number % 1:
        return f"{round(number)}.00"
    return f"{number:.2f}" if match[1] else completion


def shorten(text, length=SHOWN_VALUE):
    """The text, cut to so many characters."""
    return text if len(text) <= length else f"{text[:length]}…"


def fingerprint(splits):
    """A hash of every prompt and completion, in order.

    Equal data have equal fingerprints, wherever they are stored.
    """
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
    """Items to make prompts of.

    `splits` (train, val, test) have the columns `summary` and `price`, which are to be written in
    the `scale`; `dropped` is {reason: [line, …]}; `about` is to be recorded: `source`, in words,
    and more; `notes` are lines for the screen.
    """

    splits: DatasetDict
    dropped: dict
    about: dict
    scale: PriceScale = COURSE_SCALE
    notes: list = field(default_factory=list)


def published_items(name, scale=COURSE_SCALE):
    """The Catalogue of a dataset of items on the Hub; what is dropped is named by split and row."""
    with data_errors(name):
        published = load_dataset(name)
    check_columns(name, published, ITEM_SPLITS, ("summary", "price"))
    dropped = {}

    def is_usable(batch, rows, split):
        problems = [
            text_problem(text, "summary") or price_problem(price, scale)
            for text, price in zip(batch["summary"], batch["price"], strict=True)
        ]
        for row, problem in zip(rows, problems, strict=True):
            if problem:
                dropped.setdefault(problem, []).append(f"{split} {row + 1}")
        return [not problem for problem in problems]

    splits = DatasetDict()
    for split, name_on_hub in zip(SPLITS, ITEM_SPLITS, strict=True):
        splits[split] = published[name_on_hub].filter(
            is_usable,
            with_indices=True,
            batched=True,
            fn_kwargs={"split": split},
            load_from_cache_file=False,  # or `dropped` would stay empty
            desc=f"checking {split}",
        )
    check_columns(name, splits, SPLITS, ("summary", "price"))
    pyarrow.default_memory_pool().release_unused()  # what reading Parquet took, half a GiB
    return Catalogue(splits, dropped, {"source": name}, scale)


def own_catalogue(path, seed, columns=None, unit=None, currency="$"):
    """The Catalogue of the user's own file. Its items are on disk, where a million find room."""
    catalogue = OwnCatalogue(path, columns)
    catalogue.choose_scale(unit, currency)
    items, keys = spool_items(catalogue.items())
    try:
        parts = split_rows(keys, seed)
    except UserError as error:
        dropped = "; ".join(drop_reasons(catalogue.dropped, catalogue.examples)) or "no row"
        raise UserError(f"{path}: {error} Dropped: {dropped}.") from None
    splits = DatasetDict()
    for name, rows in zip(SPLITS, parts, strict=True):
        splits[name] = items.select(rows)
    source = f"{readable(path)}, split 90/5/5 by title and description, seed {seed}"
    about = {"source": source} | catalogue.record()
    return Catalogue(splits, catalogue.dropped, about, catalogue.scale, catalogue.notes())


def spool_items(items):
    """(a Dataset of `summary` and `price` on disk, the columns of `leak_keys`, hashed).

    Its folder is removed when the program ends.
    """
    folder = Path(tempfile.mkdtemp(prefix="items-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    keys = [array.array("Q") for _ in range(3)]
    schema = pyarrow.schema({"summary": pyarrow.string(), "price": pyarrow.float64()})
    path = folder / "items.arrow"
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as stream:
        for batch in batched(items, 1000):
            for item in batch:
                for column, key in zip(keys, leak_keys(item), strict=True):
                    column.append(hashed(key))
            columns = [[item.summary for item in batch], [item.price for item in batch]]
            stream.write_batch(pyarrow.record_batch(columns, schema=schema))
    return Dataset.from_file(str(path)), keys


def batched(values, size):
    """Lists of `size` values, the last one shorter."""
    iterator = iter(values)
    while batch := list(islice(iterator, size)):
        yield batch


# ------------------------------------------------------------------------------------------------
# 5. Rows of the user's own file

DELIMITERS = ",;\t|"
GZIP_START = b"\x1f\x8b"
ZIP_START = b"PK\x03\x04"  # of .xlsx and .ods
SPREADSHEETS = (".xlsx", ".xlsm", ".xls", ".ods", ".numbers")
SAVE_AS_CSV = "Save it as `CSV UTF-8` (in Excel: File, Save As; in LibreOffice: Text CSV) instead"
FORMATS = ".csv, .tsv, .jsonl, .json or .parquet file"
KINDS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
}


class RowFile:
    """A file of rows: CSV, TSV, JSON lines, a JSON array or Parquet, each perhaps gzip'd.

    `rows()` reads it from the start each time. Raises UserError if it is no such file.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.kind = self.find_kind()

    def find_kind(self):
        """csv, tsv, json or parquet, by the ending; one of .gz is ignored."""
        path = self.path
        if path.is_dir():
            raise UserError(f"{path}: is a folder; give a {FORMATS}.")
        name = path.with_suffix("") if path.suffix.lower() == ".gz" else path
        ending = name.suffix.lower()
        if ending in SPREADSHEETS:
            raise UserError(f"{path}: the ending is {ending}. {SAVE_AS_CSV}.")
        if ending not in KINDS:
            raise UserError(f"{path}: the ending is {ending or 'missing'}; give a {FORMATS}.")
        return KINDS[ending]

    def rows(self, columns=None):
        """Yields (line, row), a dict, for each row; for one that can't be read, the reason as text.

        The line is the one where the row begins, as an editor shows it (a CSV's header is line 1);
        a Parquet file's rows count from 1. Of Parquet only `columns` are read, if given. Raises
        UserError if the file can't be read.
        """
        with self.explain_errors():
            if self.kind == "parquet":
                yield from self.parquet_rows(columns)
                return
            with self.open_text() as file:
                if self.kind == "json":
                    yield from json_rows(file)
                else:
                    yield from csv_rows(file, "\t" if self.kind == "tsv" else None)

    def schema_names(self):
        """The columns of a Parquet file; None for other files, whose rows must be read first."""
        if self.kind != "parquet":
            return None
        with self.explain_errors(), self.open_parquet() as file:
            return pyarrow.parquet.ParquetFile(file).schema_arrow.names

    def parquet_rows(self, columns):
        line = 0
        with self.open_parquet() as file:
            table = pyarrow.parquet.ParquetFile(file)
            for batch in table.iter_batches(batch_size=2_000, columns=columns):
                for row in batch.to_pylist() or [{}] * batch.num_rows:
                    line += 1
                    yield line, row

    def open_bytes(self):
        """The file's bytes, decompressed."""
        file = open(self.path, "rb")  # noqa: SIM115 (closed by the caller)
        start = file.read(4)
        file.seek(0)
        if start == ZIP_START:
            file.close()
            raise UserError(f"{self.path}: is a spreadsheet or ZIP file. {SAVE_AS_CSV}.")
        if start.startswith(GZIP_START) or self.path.suffix.lower() == ".gz":
            return gzip.open(file)
        return file

    def open_parquet(self):
        """As `open_bytes`. Parquet is read back and forth, which gzip'd files can't be."""
        file = self.open_bytes()
        if not isinstance(file, gzip.GzipFile):
            return file
        plain = tempfile.TemporaryFile()  # noqa: SIM115 (closed by the caller)
        with file:
            shutil.copyfileobj(file, plain, 2**20)
        return plain

    def open_text(self):
        return io.TextIOWrapper(self.open_bytes(), encoding="utf-8-sig", newline="")

    @contextmanager
    def explain_errors(self):
        """Turns the errors of reading into a UserError."""
        try:
            yield
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.path}: not in UTF-8 (byte {self.first_bad_byte():,}). Save it as UTF-8; "
                "Excel calls that `CSV UTF-8`."
            ) from error
        except (OSError, EOFError, ValueError, zlib.error, pyarrow.ArrowException) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0].rstrip(".")
            raise UserError(f"{self.path}: can't be read: {reason}.") from error

    def first_bad_byte(self):
        """Where the file, decompressed, stops being UTF-8. A decoder's number is its chunk's."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        position = 0
        with self.open_bytes() as file:
            while True:
                chunk = file.read(2**20)
                kept = len(decoder.getstate()[0])  # bytes of a character that a chunk cut
                try:
                    decoder.decode(chunk, final=not chunk)
                except UnicodeDecodeError as error:
                    return position - kept + error.start
                if not chunk:
                    return position
                position += len(chunk)


def json_rows(file):
    """`RowFile.rows` of one JSON object a line, or of an array of objects."""
    first = next((text for text in file if text.strip()), "")
    file.seek(0)
    if begins_array(first):
        yield from json_array_rows(file.read())
        return
    for line, text in enumerate(file, 1):
        if text.strip():
            yield line, parse_json_object(text)


def begins_array(line):
    """Whether a file with this first line is one array of objects, over several lines or one."""
    if not line.lstrip().startswith("["):
        return False
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return True
    return not row or isinstance(row[0], dict)


def json_array_rows(text):
    """`RowFile.rows` of an array of objects. Raises ValueError where it is no JSON."""
    decoder = json.JSONDecoder()
    position = text.index("[") + 1
    line = 1
    counted = 0  # characters whose line ends are in `line`
    while True:
        position = skip(r"\s*", text, position)
        line += text.count("\n", counted, position)
        counted = position
        if text[position : position + 1] == "]":
            return
        try:
            row, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise ValueError(f"{error.msg} (line {error.lineno})") from error
        yield line, row if isinstance(row, dict) else "not a JSON object"
        position = skip(r"\s*", text, position)
        sign = text[position : position + 1]
        if sign not in (",", "]"):
            line += text.count("\n", counted, position)
            raise ValueError(f"',' or ']' expected behind an object (line {line})")
        position += sign == ","


def skip(pattern, text, position):
    """The position behind what `pattern` matches there."""
    return re.compile(pattern).match(text, position).end()


def parse_json_object(text):
    """The dict that a line holds, or why there is none, in a few words."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return "not a JSON object"
    return row if isinstance(row, dict) else "not a JSON object"


def csv_rows(file, delimiter=None):
    """`RowFile.rows` of a CSV.

    Cells are separated by what separates those of the header, unless `delimiter` is given; the
    first line may be Excel's `sep=;`. Raises ValueError if quotes are wrong.
    """
    csv.field_size_limit(2**31 - 1)
    header = file.readline()
    skipped = 0  # lines before the header
    excel = re.fullmatch(r'"?sep=(.)"?\s*', header, re.IGNORECASE)
    if excel:
        delimiter = excel[1]
        skipped = 1
    else:
        file.seek(0)
    delimiter = delimiter or find_delimiter(header)
    reader = csv.reader(file, delimiter=delimiter, strict=True, skipinitialspace=True)
    names = None
    while True:
        start = skipped + reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(explain_csv_error(error, start, skipped + reader.line_num)) from error
        if cells is None:
            return
        if not cells:  # an empty line
            continue
        if names is None:
            names = unique_names(cells)
        elif any(cells[len(names) :]):
            yield start, "more cells than the header has"
        else:
            yield start, dict(zip_longest(names, cells[: len(names)]))


def find_delimiter(header):
    """The one of DELIMITERS that is most often in a CSV's first line, outside of quotes."""
    outside = re.sub(r'"[^"]*"', "", header)
    return max(DELIMITERS, key=outside.count)


def explain_csv_error(error, start, lines_read):
    """What is wrong with the record that begins in line `start`, and in which line."""
    if "unexpected end" in str(error):
        return f"the row is never ended (line {start}; is a quote left open?)"
    record = "" if lines_read == start else f", in the row that begins in line {start}"
    return f"{error} (line {lines_read}{record}; is a quote left open?)"


def unique_names(cells):
    """A CSV's header without outer spaces, but a repeated name gets some: no cell hides another."""
    counts = Counter()
    names = []
    for cell in cells:
        name = cell.strip()
        names.append(name + " " * counts[name])
        counts[name] += 1
    return names


# ------------------------------------------------------------------------------------------------
# 6. Prices as shops write them

CURRENCIES = {  # how they are written: the code
    "$": "USD",
    "US$": "USD",
    "dollar": "USD",
    "dollars": "USD",
    "€": "EUR",
    "euro": "EUR",
    "euros": "EUR",
    "£": "GBP",
    "¥": "JPY",
    "円": "JPY",
    "元": "CNY",
    "RMB": "CNY",
    "₹": "INR",
    "Rs.": "INR",
    "Rs": "INR",
    "₩": "KRW",
    "₽": "RUB",
    "руб.": "RUB",
    "руб": "RUB",
    "₺": "TRY",
    "TL": "TRY",
    "₫": "VND",
    "฿": "THB",
    "₪": "ILS",
    "₴": "UAH",
    "₦": "NGN",
    "₱": "PHP",
    "zł": "PLN",
    "Kč": "CZK",
    "Ft": "HUF",
    "lei": "RON",
    "kr.": "kr",
    "kr": "kr",
    "SFr.": "CHF",
    "Fr.": "CHF",
    "R$": "BRL",
    "C$": "CAD",
    "CA$": "CAD",
    "A$": "AUD",
    "AU$": "AUD",
    "NZ$": "NZD",
    "HK$": "HKD",
    "S$": "SGD",
    "MX$": "MXN",
}
CURRENCY_CODES = (
    "USD EUR GBP JPY CNY INR KRW RUB TRY VND THB ILS UAH NGN PHP PLN CZK HUF RON SEK NOK DKK ISK "
    "CHF BRL CAD AUD NZD HKD SGD MXN ZAR AED SAR TWD IDR MYR CLP COP ARS EGP BGN"
)
CURRENCIES |= {code: code for code in CURRENCY_CODES.split()}
CURRENCY_CODE_OF = {written.casefold(): code for written, code in CURRENCIES.items()}
CURRENCY_SIGNS = {code: sign for sign, code in reversed(CURRENCIES.items())}  # the first of each
SHARED_SIGNS = {  # signs of several currencies, which a code beside them tells apart
    "$": "USD CAD AUD NZD HKD SGD MXN TWD CLP COP ARS",
    "¥": "JPY CNY",
    "kr": "SEK NOK DKK ISK",
    "£": "GBP EGP",
}

SPACES = " \u00a0\u2009\u202f"  # between groups of digits: plain, no-break, thin, narrow
CURRENCY = "|".join(re.escape(written) for written in sorted(CURRENCIES, key=len, reverse=True))
GAP = rf"[\t{SPACES}]*"
PRICE = re.compile(
    rf"(?P<sign>[-+−]?){GAP}(?P<before>{CURRENCY})?{GAP}(?P<inner_sign>[-+−]?){GAP}"
    rf"(?P<number>[.,]?\d(?:[\d.,'’{SPACES}]*\d)?)(?P<whole>[.,](?:[-–—]{{1,2}})?)?"
    rf"{GAP}(?P<after>{CURRENCY})?",
    re.ASCII | re.IGNORECASE,
)
LONGEST_PRICE = 100  # characters
FLOAT_DIGITS = 15  # that a float holds, whichever they are
NUMBER = r"\d(?:[\d.,'’]*\d)?"
RANGE = re.compile(
    rf"{NUMBER}\D*?(?:[-–—~…]|\.\.+|\b(?:to|bis|and|à|a|til)\b)\D*{NUMBER}",
    re.IGNORECASE,
)
OPEN_ENDED = re.compile(
    r"\W*(?:from|starting|starts|as low as|up to|under|over|about|approx|circa|ca\b|ab\b|bis\b|"
    r"à partir|dès|desde|da\b|vanaf|fra\b|från|min\b|max\b)|\s*[~≈<>]|.*\d\s*\+\s*$",
    re.IGNORECASE,
)
NO_PRICE = ("", "none", "null", "nan", "n/a", "na", "-", "--", "–", "—", "?", "tba", "tbd", "nil")

PRICE_MISSING = "price is missing"
PRICE_NO_NUMBER = "price is no number"
PRICE_RANGE = "price is a range"
PRICE_OUTSIDE = "price is outside"
PRICE_OPEN = "price is open, like `from` or `up to`"
PRICE_WORDS = "price has other words or numbers beside it"
PRICE_CURRENCIES = "price is in several currencies"
PRICE_AMBIGUOUS = "price is ambiguous: its comma or point may be for thousands or decimals"
PRICE_MIXED = "price has another decimal sign than the column"


@dataclass(frozen=True)
class WrittenPrice:
    """What a text says of a price: the number if the point is the decimal sign, and if the comma.

    None where it is no number by that rule. `currency` is a code or None. A text that can't be a
    price at all has a `problem`, in a few words.
    """

    by_point: float | None = None
    by_comma: float | None = None
    currency: str | None = None
    problem: str | None = None

    def amount(self, decimal):
        return self.by_point if decimal == "." else self.by_comma

    @property
    def depends_on_decimal(self):
        return self.by_point != self.by_comma


def parse_price(text, decimal):
    """The money that a text names, a float; `decimal` is `.` or `,`. NaN if it names none."""
    amount = analyse_price(text).amount(decimal)
    return math.nan if amount is None else amount


@lru_cache(maxsize=100_000)
def analyse_price(text):
    """The WrittenPrice of a text, in any currency and of any size."""
    text = text.strip()
    if text.casefold() in NO_PRICE:
        return WrittenPrice(problem=PRICE_MISSING)
    match = PRICE.fullmatch(text) if len(text) <= LONGEST_PRICE else None
    if not match:
        return WrittenPrice(problem=explain_price(text))
    currencies = named_currencies(match["before"], match["after"])
    if len(currencies) > 1:
        return WrittenPrice(problem=PRICE_CURRENCIES)
    number = match["number"]
    if match["whole"] and re.search("[.,]", number):  # `12,-` is 12, but `1.234,-` isn't certain
        return WrittenPrice(problem=PRICE_NO_NUMBER)
    by_point = parse_number(number, ".")
    by_comma = parse_number(number, ",")
    if by_point is None and by_comma is None:
        return WrittenPrice(problem=PRICE_NO_NUMBER)
    signs = match["sign"] + match["inner_sign"]
    if len(signs) > 1:
        return WrittenPrice(problem=PRICE_NO_NUMBER)
    if signs in ("-", "−"):
        by_point = None if by_point is None else -by_point
        by_comma = None if by_comma is None else -by_comma
    return WrittenPrice(by_point, by_comma, next(iter(currencies), None))


def named_currencies(*written):
    """The set of codes that currency signs stand for; a code beside a shared sign decides it."""
    signs = [sign.casefold().rstrip(".") for sign in written if sign]
    codes = {CURRENCY_CODE_OF.get(sign) or CURRENCY_CODE_OF[f"{sign}."] for sign in signs}
    if len(codes) == 2:
        for sign in signs:
            own = CURRENCY_CODE_OF.get(sign)
            others = codes - {own}
            if others <= set(SHARED_SIGNS.get(sign, "").split()):
                return others
    return codes


@lru_cache
def number_pattern(decimal):
    """The pattern of digits, in groups or not, and decimals behind that sign."""
    point = re.escape(decimal)
    thousands = re.escape("," if decimal == "." else ".")
    grouped = rf"[1-9]\d{{0,2}}(?P<sign>[{thousands}'’{SPACES}])\d{{3}}(?:(?P=sign)\d{{3}})*"
    wholes = [grouped, r"\d*"]
    if decimal == ".":
        wholes.append(r"[1-9]\d?(?:,\d{2})+,\d{3}")  # as in India
    whole = "|".join(wholes)
    return re.compile(rf"(?P<whole>{whole})(?:{point}(?P<decimals>\d+))?", re.ASCII)


def parse_number(text, decimal):
    """The float that a text of digits and separators is with that decimal sign, or None."""
    match = number_pattern(decimal).fullmatch(text)
    if not match or not text:
        return None
    whole = re.sub(r"\D", "", match["whole"], flags=re.ASCII)
    decimals = match["decimals"] or ""
    if len((whole + decimals).strip("0")) > FLOAT_DIGITS:
        return None
    number = float(f"{whole or 0}.{decimals or 0}")
    return number if math.isfinite(number) else None


def explain_price(text):
    """Why a text, which is no single amount, can't be a price, in a few words."""
    numbers = re.findall(NUMBER, text, re.ASCII)
    if not numbers:
        return PRICE_NO_NUMBER
    signs = re.findall(CURRENCY, text, re.ASCII | re.IGNORECASE)
    if len(numbers) > 1 and len(named_currencies(*signs)) > 1:
        return PRICE_CURRENCIES
    if OPEN_ENDED.match(text):
        return PRICE_OPEN
    return PRICE_RANGE if RANGE.search(text) else PRICE_WORDS


class PriceSurvey:
    """What the texts of a whole column tell about how it writes prices."""

    def __init__(self):
        # Of texts that can't have the other decimal sign, by (sign, currency or None)
        self.shown = {}
        self.counts = Counter()
        self.long_counts = Counter()  # of those with three decimals or more
        self.currencies = Counter()
        self.sizes = Counter()  # of (decimal sign or None, currency, exponent of smallest_unit)

    def add(self, value):
        if not isinstance(value, str):
            is_number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
            if is_number and 0 < value < math.inf:
                self.sizes[None, None, smallest_unit(value)] += 1
            return
        price = analyse_price(value)
        self.add_size(price)
        if price.currency:
            self.currencies[price.currency] += 1
        if not price.problem and price.depends_on_decimal:
            if price.by_comma is None:
                self.note(".", price.currency, value)
            elif price.by_point is None:
                self.note(",", price.currency, value)

    def add_size(self, price):
        """Counts how large a WrittenPrice is by each decimal sign that it can have."""
        amounts = {".": price.by_point, ",": price.by_comma}
        if not price.depends_on_decimal:
            amounts = {None: price.by_point}
        for decimal, amount in amounts.items():
            if amount is not None and amount > 0:
                self.sizes[decimal, price.currency, smallest_unit(amount)] += 1

    def note(self, decimal, currency, value):
        self.counts[decimal, currency] += 1
        if re.search(rf"{re.escape(decimal)}\d{{3}}", value):
            self.long_counts[decimal, currency] += 1
        shown = self.shown.setdefault((decimal, currency), [])
        if len(shown) < 2 and value.strip() not in shown:
            shown.append(value.strip())

    def result(self):
        """The PriceFormat of the column: of the prices in its main currency or without one."""
        currency = next((code for code, _ in self.currencies.most_common(1)), None)
        codes = dict.fromkeys((currency, None))
        counts = {sign: sum(self.counts[sign, code] for code in codes) for sign in ".,"}
        points, commas = counts["."], counts[","]
        decimal = None
        if points != commas:
            decimal = "." if points > commas else ","
        examples = self.examples(decimal or ".", codes)
        others = self.examples("," if decimal == "." else ".", codes)
        is_mixed = points > 0 and commas > 0
        has_long_decimals = any(self.long_counts[decimal, code] > 0 for code in codes)
        sizes = Counter()  # of what can be read
        for (sign, code, exponent), count in self.sizes.items():
            if sign in (None, decimal) and code in (None, currency):
                sizes[exponent] += count
        return PriceFormat(decimal, currency, is_mixed, has_long_decimals, examples, others, sizes)

    def examples(self, decimal, codes):
        """At most two texts of these currencies that can only have that decimal sign."""
        found = [text for code in codes for text in self.shown.get((decimal, code), ())]
        return tuple(found[:2])


@dataclass(frozen=True)
class PriceFormat:
    """How a column writes prices: the decimal sign, `.` or `,` or None, and the currency, or None.

    `is_mixed`: some prices can only have the other sign, `others`. `has_long_decimals`: some surely
    have three decimals or more. `examples` show the sign. `sizes` are the `counts` of choose_unit.
    """

    decimal: str | None = None
    currency: str | None = None
    is_mixed: bool = False
    has_long_decimals: bool = False
    examples: tuple = ()
    others: tuple = ()
    sizes: dict = field(default_factory=dict)

    def read(self, value):
        """(the amount, None) or (None, why there is none, in a few words)."""
        if isinstance(value, str):
            return self.read_text(value)
        if value is None:
            return None, PRICE_MISSING
        if isinstance(value, bool):
            return None, PRICE_NO_NUMBER
        try:
            amount = float(value)
        except (TypeError, ValueError, OverflowError):
            return None, PRICE_NO_NUMBER
        if math.isnan(amount):
            return None, PRICE_MISSING
        return (None, PRICE_NO_NUMBER) if math.isinf(amount) else (amount, None)

    def read_text(self, text):
        price = analyse_price(text)
        if price.problem:
            return None, price.problem
        if price.currency not in (None, self.currency):
            return None, f"price is in another currency than most ({self.currency})"
        if not price.depends_on_decimal:
            return price.by_point, None
        if None not in (price.by_point, price.by_comma) and not self.is_decided(price):
            return None, PRICE_AMBIGUOUS
        amount = price.amount(self.decimal) if self.decimal else None
        return (None, PRICE_MIXED) if amount is None else (amount, None)

    def is_decided(self, price):
        """Whether the column tells which of a price's two numbers is meant, as 1234 and 1.234.

        Three decimals are so rare that they must be seen elsewhere in it.
        """
        if self.decimal is None or self.is_mixed:
            return False
        has_three_decimals = abs(price.amount(self.decimal)) == min(
            abs(price.by_point), abs(price.by_comma)
        )
        return self.has_long_decimals or not has_three_decimals

    def __str__(self):
        """What was decided and what it is taken from, a line; '' if there was nothing to decide."""
        parts = []
        if self.decimal:
            name = "point" if self.decimal == "." else "comma"
            shown = [f"{text!r} is {parse_price(text, self.decimal)}" for text in self.examples]
            parts.append(f"the {name} is the decimal sign, since {' and '.join(shown)}")
        elif self.is_mixed:
            parts.append("as many prices have a decimal point as a decimal comma: none is read")
        if self.is_mixed and self.decimal:
            parts.append(f"some have the other one, such as {self.others[0]!r}: dropped")
        if self.currency:
            parts.append(f"currency {self.currency}")
        return "; ".join(parts)


def price_problem(price, scale=COURSE_SCALE):
    """Why the number `price` can't be used, in a few words, or None.

    Usable are those that the numbers 0 … 999 of the scale can say.
    """
    if price is None or (isinstance(price, float) and math.isnan(price)):
        return PRICE_MISSING
    if isinstance(price, bool | str) or not math.isfinite(price):
        return PRICE_NO_NUMBER
    if price <= 0:
        return "price is zero or negative"
    if not scale.lowest <= price <= scale.highest:
        return f"{PRICE_OUTSIDE} {scale.describe_range()}"
    return None


# ------------------------------------------------------------------------------------------------
# 7. Texts as people read them

INLINE_TAG_NAMES = (
    "a abbr acronym b bdi bdo big cite code data del dfn em font i img ins kbd label mark q s samp "
    "small span strike strong sub sup time tt u var wbr"
)
BLOCK_TAG_NAMES = (
    "address article aside blockquote body br button caption center col colgroup dd details div dl "
    "dt fieldset figcaption figure footer form h1 h2 h3 h4 h5 h6 head header hr html iframe input "
    "legend li link main meta nav object ol option p pre section select source summary svg table "
    "tbody td textarea tfoot th thead title tr ul video"
)
INLINE_TAGS = frozenset(INLINE_TAG_NAMES.split())
TAG_NAMES = "|".join((INLINE_TAG_NAMES + " " + BLOCK_TAG_NAMES).split())
# An attribute has a value, so that `<b and c>` in a formula is no tag
ATTRIBUTES = r"""(?:\s+[\w:.-]+\s*=\s*(?:"[^"]*"|'[^']*'|[^\s"'<>]+))*"""
TAG = re.compile(rf"</?({TAG_NAMES}|[movw]:\w+)\b{ATTRIBUTES}\s*/?>", re.IGNORECASE)
NO_TEXT = re.compile(r"<!--.*?-->|<(script|style)\b[^>]*>.*?</\1\s*>", re.IGNORECASE | re.DOTALL)
ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][\da-fA-F]{1,6}|[a-zA-Z][a-zA-Z\d]{1,31});", re.ASCII)
REPETITION_END = re.compile(r"$|\s|[,;:.!?|–—-]+(?=\s|$)")
BEFORE_REST = re.compile(r"\s*(?:[,;:.!?|–—-]+(?=\s|$))?\s*")
NO_TEXTS = ("nan", "none", "null")

HTML_CHANGED = "HTML became text"
SPACE_FOLDED = "white space was folded"
TITLE_CUT = "the title, repeated at the description's start, was cut"
LIST_JOINED = "a list of texts was joined"
PATH_JOINED = "a list of categories became a path"


def html_to_text(text):
    """The text that a browser shows of `text`: tags become line ends or nothing, entities signs.

    What is escaped twice, as in feeds, is unescaped twice. Only HTML's own tags count as tags.
    """
    for _ in range(2):
        if "<" in text:
            text = NO_TEXT.sub("", text)
            text = TAG.sub(tag_text, text)
        if "&" not in text:
            break
        text = ENTITY.sub(lambda match: html.unescape(match[0]), text)
    return text


def tag_text(match):
    """What a tag leaves behind: a line end, if it ends a line."""
    is_inline = match[1].lower() in INLINE_TAGS or ":" in match[1]
    return "" if is_inline else "\n"


def fold_space(text):
    """`text` with single spaces and single line ends, and none at its start and end."""
    if "\n" not in text and "\r" not in text:
        return " ".join(text.split())
    lines = [" ".join(line.split()) for line in re.split("[\r\n]", text)]
    return "\n".join(line for line in lines if line)


def clean_text(text, changes):
    """A text without HTML and superfluous white space; a Counter `changes` counts what was done."""
    plain = html_to_text(text)
    folded = fold_space(plain)
    if plain != text:
        changes[HTML_CHANGED] += 1
    elif folded != plain:
        changes[SPACE_FOLDED] += 1
    return folded


def clean_title(text, changes):
    """As `clean_text`, in one line."""
    cleaned = clean_text(text, changes)
    if "\n" in cleaned:
        changes[SPACE_FOLDED] += 1
    return cleaned.replace("\n", " ")


def is_in_course_form(text):
    """Whether a text begins with `Title:`, as the course's do. Such a text stays as it is."""
    return text.lstrip().startswith("Title:")


def cut_title(text, title):
    """`text` without the title that it begins with, if the title ends there as a word does."""
    if not text.startswith(title) or not REPETITION_END.match(text, len(title)):
        return text
    return text[BEFORE_REST.match(text, len(title)).end() :]


def describe_item(title, category, text):
    """Title, category and description, one labelled line each, as in the course.

    A text that begins with `Title:` has that form already.
    """
    if is_in_course_form(text):
        return text.strip()
    parts = {"Title": title, "Category": category, "Description": cut_title(text.strip(), title)}
    return "\n".join(f"{name}: {part}" for name, part in parts.items() if part)


def text_problem(value, name):
    """Why `value` can't be used as the text `name`, in a few words, or None."""
    if not isinstance(value, str) or not value.strip():
        return f"{name} is empty or not text"
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        return f"{name} has an incomplete character"  # half of a surrogate pair
    return None


# ------------------------------------------------------------------------------------------------
# 8. The user's own catalogue

ROLES = ("title", "price", "text", "category")
USUAL_COLUMNS = {  # the role: names that are recognised, the first first; see `fold_name`
    "title": "title name product item producttitle productname itemtitle itemname",
    "price": "price cost amount sellingprice saleprice retailprice regularprice currentprice "
    "listprice unitprice variantprice itemprice productprice",
    "text": "summary text description body bodyhtml details productdescription itemdescription "
    "longdescription shortdescription features content about specifications",
    "category": "category categories maincategory productcategory itemcategory department",
}
SHOWN_UNUSED = 6  # names of columns
SHOWN_LINES = 5  # of the rows that are dropped for one reason


@dataclass
class Columns:
    """Which columns of a file are read: one or none for title and price, those of texts in order.

    `names` are all that the file has.
    """

    names: list
    title: str | None = None
    price: str | None = None
    text: tuple = ()
    category: tuple = ()

    @property
    def used(self):
        single = [name for name in (self.title, self.price) if name is not None]
        return [*single, *self.text, *self.category]

    def __str__(self):
        """'title from Name, price from Cost, text from summary or body; unused: SKU'."""
        parts = []
        for role in ROLES:
            names = getattr(self, role)
            names = [names] if isinstance(names, str) else names
            if names:
                parts.append(f"{role} from {' or '.join(name.strip() for name in names)}")
        unused = [str(name).strip() for name in self.names if name not in self.used]
        unused = [name for name in unused if name]
        if not unused:
            return ", ".join(parts)
        more = ", …" if len(unused) > SHOWN_UNUSED else ""
        return f"{', '.join(parts)}; unused: {', '.join(unused[:SHOWN_UNUSED])}{more}"


def fold_name(name):
    """A column's name in small letters and digits only: `Body (HTML)` is bodyhtml."""
    return re.sub(r"[\W_]+", "", str(name)).casefold()


def find_columns(path, names, chosen, needs_price):
    """The Columns of a file with the columns `names`; `chosen` is {role: [name, …]} of --columns.

    Raises UserError if one is missing, or two have the same name.
    """
    columns = Columns(names)
    taken = set()
    for role, wanted in chosen.items():
        found = [find_chosen_column(path, names, role, name) for name in wanted]
        set_role(columns, role, found)
        taken.update(found)
    for role in ROLES:
        if role not in chosen:
            free = [name for name in names if name not in taken]
            set_role(columns, role, find_usual_columns(path, free, role))
    check_found(path, columns, needs_price)
    return columns


def set_role(columns, role, names):
    if role in ("title", "price"):
        setattr(columns, role, names[0] if names else None)
    else:
        setattr(columns, role, tuple(names))


def known_columns(names, earlier):
    """The columns, as --columns chooses them, by which a file is read like an `earlier` one.

    `earlier` is what prepare.json has of that one, {role: name or names}; a role counts if all its
    columns are among `names`.
    """
    known = {}
    for role, columns in earlier.items():
        wanted = [columns] if isinstance(columns, str) else columns
        if wanted and set(wanted) <= set(names):
            known[role] = wanted
    return known


def find_chosen_column(path, names, role, wanted):
    """The one of `names` that `--columns role=wanted` means."""
    exact = [name for name in names if str(name).strip() == wanted.strip()]
    found = exact or [name for name in names if fold_name(name) == fold_name(wanted)]
    if not found:
        raise UserError(f"{path}: no column {wanted} (--columns {role}); found: {listed(names)}.")
    if len(found) > 1:
        raise UserError(f"{path}: more than one column is called {wanted}. Rename one of them.")
    return found[0]


def find_usual_columns(path, names, role):
    """Those of `names` that are usual for the role, in the order of USUAL_COLUMNS."""
    found = []
    for usual in USUAL_COLUMNS[role].split():
        same = [name for name in names if fold_name(name) == usual]
        is_read = role in ("text", "category") or not found
        if len(same) > 1 and is_read:
            raise UserError(
                f"{path}: more than one column is called {usual}. Rename one, or choose others "
                f"by --columns {role}=NAME."
            )
        found.extend(same)
    return found


def check_found(path, columns, needs_price):
    missing = {}
    if columns.title is None:
        missing["title"] = "title"
    if columns.price is None and needs_price:
        missing["price"] = "price"
    if not columns.text:
        missing["text"] = "a description (summary, text, description, body, …)"
    if missing:
        choices = " ".join(f"{role}=NAME" for role in missing)
        if not columns.category:
            choices += ", and category=NAME if there is one"
        raise UserError(
            f"{path}: no column for {' and '.join(missing.values())}; found: "
            f"{listed(columns.names)}. Say which by --columns {choices}."
        )


def listed(names):
    return ", ".join(str(name).strip() for name in names)


class OwnCatalogue:
    """The items of the user's own file, read twice: how it is written, then row by row.

    Needs columns for title, price and description; see USUAL_COLUMNS. `chosen` is {role: [name,
    …]} of --columns; for other roles the columns of an `earlier` file are taken where this one has
    them: see `known_columns`. Without `needs_price` the price may be missing or unusable, None
    then, and rows may repeat others.

    What was dropped and changed is known once `items()` has ended: `dropped` is {reason: [line,
    …]}, and so is `unjudged`, of rows without a usable price; `examples` has a value for some
    reasons, `changes` counts, and `whole_texts` is how many have the course's form.

    Raises UserError if the file can't be read or a column is missing.
    """

    def __init__(self, path, chosen=None, needs_price=True, bar=None, earlier=None):
        self.path = path
        self.needs_price = needs_price
        self.bar = bar
        self.file = RowFile(path)
        self.row_count = 0
        self.columns, self.price_format = self.survey(chosen or {}, earlier or {})
        self.scale = COURSE_SCALE
        self.scale_notes = []
        self.clear()

    def clear(self):
        self.dropped = {}
        self.unjudged = {}
        self.examples = {}
        self.changes = Counter()
        self.whole_texts = 0
        self.seen = set()

    def survey(self, chosen, earlier):
        """(the Columns, the PriceFormat): how the whole file is written."""
        usual = USUAL_COLUMNS["price"].split()
        if earlier.get("price"):
            usual.append(earlier["price"])
        wanted = [fold_name(name) for name in chosen.get("price", usual)]
        names = dict.fromkeys(self.file.schema_names() or ())
        known_schema = list(names) if names else None
        surveys = {name: PriceSurvey() for name in names if fold_name(name) in wanted}
        for _, row in self.file.rows(known_schema and list(surveys)):
            self.count_row()
            if isinstance(row, str):
                continue
            if not row.keys() <= names.keys():
                names |= dict.fromkeys(row)
                for name in row:
                    if fold_name(name) in wanted:
                        surveys.setdefault(name, PriceSurvey())
            for name, survey in surveys.items():
                survey.add(row.get(name))
        if not self.row_count:
            raise UserError(f"{self.path}: holds no rows.")
        if not names:
            raise UserError(f"{self.path}: none of {self.row_count:,} rows is a JSON object.")
        chosen = known_columns(names, earlier) | chosen
        columns = find_columns(self.path, list(names), chosen, self.needs_price)
        survey = surveys.get(columns.price, PriceSurvey())
        return columns, survey.result()

    def choose_scale(self, unit, currency):
        """Sets the PriceScale: of the `unit`, or of the smallest that holds nearly all prices."""
        sizes = self.price_format.sizes
        self.scale = PriceScale(unit or choose_unit(sizes), currency)
        how = "--unit"
        if unit is None:
            how = f"the smallest that holds {HELD_SHARE:.1%}; --unit chooses another"
        held = held_share(sizes, self.scale.unit)
        self.scale_notes = [
            f"Unit: {self.scale.step}, whose numbers 0 … 999 hold {held:.1%} of the prices ({how})"
        ]
        written = self.price_format.currency
        if written not in (None, CURRENCY_CODE_OF.get(currency.casefold(), currency)):
            sign = CURRENCY_SIGNS.get(written, written)
            self.scale_notes.append(
                f"Currency: the prices are in {written}, the prompts say {currency}; `--currency "
                f"{sign}` makes them say {sign}"
            )

    def count_row(self):
        self.row_count += 1
        if self.bar is not None:
            self.bar.update()

    def items(self):
        """Yields the usable Items. Raises UserError at the end if there were none."""
        self.clear()
        count = 0
        for line, row in self.file.rows(self.columns.used):
            if self.bar is not None:
                self.bar.update()
            item, problem = (None, row) if isinstance(row, str) else self.read_row(line, row)
            if problem:
                self.dropped.setdefault(problem, []).append(line)
                continue
            count += 1
            yield item
        if not count:
            reasons = "; ".join(drop_reasons(self.dropped, self.examples))
            raise UserError(f"{self.path}: none of {self.row_count:,} rows is usable; {reasons}.")

    def read_row(self, line, row):
        """(the Item, None) or (None, why the row can't be used, in a few words)."""
        title = row.get(self.columns.title)
        text = self.text_of(row)
        problem = text_problem(title, "title") or text_problem(text, self.columns.text[0].strip())
        if problem:
            return None, problem
        price, problem = self.price_of(row)
        if problem and self.needs_price:
            return None, problem
        if problem:
            self.unjudged.setdefault(problem, []).append(line)

        changes = Counter()
        title = clean_title(title, changes)
        if not is_in_course_form(text):
            text = clean_text(text, changes)
        problem = text_problem(title, "title") or text_problem(text, self.columns.text[0].strip())
        if problem:  # nothing but tags
            return None, problem
        category = self.category_of(row, changes)
        summary = describe_item(title, category, text)
        if self.needs_price and self.is_repeated(summary, price):
            return None, "duplicate of an earlier row"
        if is_in_course_form(text):  # its prompt is as it was
            self.whole_texts += 1
        else:
            self.count_changes(row, title, text, changes)
        item = Item(
            title=title, category=category, price=price, full=text, summary=summary, id=line
        )
        return item, None

    def is_repeated(self, summary, price):
        """Whether an earlier row has the same title, description and price."""
        key = hashed(f"{price} {summary}")
        if key in self.seen:
            return True
        self.seen.add(key)
        return False

    def count_changes(self, row, title, text, changes):
        """Adds what was changed in a row that is kept: each kind once a row."""
        if cut_title(text, title) != text:
            changes[TITLE_CUT] += 1
        if text_of_row(row, self.columns.text) is None:
            changes[LIST_JOINED] += 1
        self.changes.update(changes.keys())

    def text_of(self, row):
        """The first description that a row has, or else its first list of texts, joined; or None.

        A blank, or a text that pandas writes for a missing one, is none.
        """
        text = text_of_row(row, self.columns.text)
        if text is not None:
            return text
        lists = (join_texts(row.get(name), "\n") for name in self.columns.text)
        return next((text for text in lists if text), None)

    def category_of(self, row, changes):
        """The first category that a row has, a list's as a path; '' without one."""
        for name in self.columns.category:
            value = row.get(name)
            category = value if isinstance(value, str) else join_texts(value, " > ")
            if category and category.strip() and not text_problem(category, "category"):
                if not isinstance(value, str):
                    changes[PATH_JOINED] += 1
                return clean_title(category, changes)
        return ""

    def price_of(self, row):
        """(the price, None) or (None, why it can't be used); (None, None) if it needn't be there.

        A reason gets an example, the first value.
        """
        value = row.get(self.columns.price) if self.columns.price is not None else None
        price, problem = self.price_format.read(value)
        if problem == PRICE_MISSING:
            return None, problem if self.needs_price else None
        problem = problem or price_problem(price, self.scale)
        if problem:
            self.examples.setdefault(problem, shown_value(value))
            return None, problem
        return price, None

    def notes(self):
        """What was made of the file: columns, prices, what was changed; lines for the screen."""
        lines = [f"Columns: {self.columns}"]
        if str(self.price_format):
            lines.append(f"Prices: {self.price_format}")
        lines += self.scale_notes
        if self.changes:
            parts = [f"{count:,} × {change}" for change, count in self.changes.most_common()]
            lines.append(f"Changed: {'; '.join(parts)}")
        if self.whole_texts:
            lines.append(
                f"Note: texts that begin with `Title:`, as the course's do: {self.whole_texts:,}; "
                "they are taken whole, without the columns of title and category"
            )
        return lines

    def record(self):
        """What prepare.json has of it."""
        return {
            "columns": {role: getattr(self.columns, role) for role in ROLES},
            "decimal": self.price_format.decimal,
            "written_currency": self.price_format.currency,
            "changed": dict(self.changes),
            "whole_texts": self.whole_texts,
            "dropped_examples": self.examples,
        }


def text_of_row(row, columns):
    """The first of the columns with a text in it that isn't blank, or None."""
    for name in columns:
        value = row.get(name)
        if isinstance(value, str) and value.strip() and value.strip().lower() not in NO_TEXTS:
            return value
    return None


def join_texts(value, between):
    """The texts of a list, joined, '' without any. Of a list of lists the first one counts."""
    if not isinstance(value, list):
        return ""
    if value and isinstance(value[0], list):
        value = value[0]
    texts = [text.strip() for text in value if isinstance(text, str)]
    return between.join(text for text in texts if text)


def shown_value(value):
    """A value of a cell as an example, shortened."""
    text = value if isinstance(value, str) else repr(value)
    return shorten(" ".join(text.split()), SHOWN_EXAMPLE)


def read_catalogue(path, needs_price=True, columns=None):
    """(items of the user's own file, what was dropped: {reason: [line, …]}): see OwnCatalogue."""
    catalogue = OwnCatalogue(path, columns, needs_price)
    items = list(catalogue.items())
    return items, catalogue.dropped


def own_rows(path, text, tokenizer, cutoff, columns=None, scale=COURSE_SCALE, earlier=None):
    """(rows of the user's own items to price, their OwnCatalogue, or None without a file).

    They come from the file at `path` or are the one described by `text`. A row has prompt,
    completion ('' without a price), line and title. `columns` are the chosen ones, `earlier` those
    of the file that was trained on.
    """
    catalogue = None
    if path:
        catalogue = OwnCatalogue(path, columns, needs_price=False, earlier=earlier)
        catalogue.scale = scale
        items = list(catalogue.items())
    elif text is None:
        raise UserError("Nothing to price: give --input FILE or --text DESCRIPTION.")
    elif text_problem(text, "text"):
        raise UserError(
            "--text: is empty or has an incomplete character. Give a description, in quotes."
        )
    else:
        items = [item_of_text(text)]
    rows = []
    for item in items:
        item.make_prompts(tokenizer, cutoff, do_round=False, scale=scale)
        rows.append(item.to_datapoint() | {"line": item.id, "title": item.title})
    return rows, catalogue


def item_of_text(text):
    """The Item that `--text` describes; its first line is the title."""
    if not is_in_course_form(text):
        text = clean_text(text, Counter())
    title = text.strip().splitlines()[0].removeprefix("Title:").strip()
    summary = describe_item(title, "", text)
    return Item(title=title, category="", price=None, summary=summary, id=1)


def format_own_rows(rows, catalogue):
    """What was made of the user's own file that is priced; lines, and a warning behind them."""
    lines = catalogue.notes()
    if catalogue.dropped:
        count = sum(len(lines) for lines in catalogue.dropped.values())
        reasons = drop_reasons(catalogue.dropped, catalogue.examples)
        lines.append(with_lines(f"Rows: {len(rows):,} priced, {count:,} skipped", reasons))
    if catalogue.unjudged:
        reasons = drop_reasons(catalogue.unjudged, catalogue.examples)
        lines.append(with_lines("Not judged, since they have no usable price", reasons))
    warning = dropped_warning(len(rows), catalogue.dropped)
    return "\n".join([*lines, warning] if warning else lines)


def with_lines(heading, lines):
    """The heading, a colon and the lines below it, indented."""
    return "\n  ".join([f"{heading}:", *lines])


def drop_reasons(dropped, examples=None):
    """Texts like '3 × price is a range, such as `5 - 9` (lines 17, 40, 41)', most rows first."""
    parts = []
    for reason, lines in sorted(dropped.items(), key=lambda pair: -len(pair[1])):
        shown = [str(line) for line in lines[:SHOWN_LINES]]
        if len(lines) > SHOWN_LINES:
            shown.append("…")
        word = "line" if len(lines) == 1 else "lines"
        example = f", such as `{examples[reason]}`" if reason in (examples or {}) else ""
        parts.append(f"{len(lines):,} × {reason}{example} ({word} {', '.join(shown)})")
    return parts


def dropped_warning(kept, dropped):
    """A framed warning if more than WARNED_SHARE of the rows were dropped, or ''."""
    count = sum(len(lines) for lines in dropped.values())
    if count <= WARNED_SHARE * (kept + count):
        return ""
    main_reason = max(dropped, key=lambda reason: len(dropped[reason]))
    question = "Is the right column read, and are the prices\nwritten in one way?"
    if main_reason.startswith(PRICE_OUTSIDE):
        question = "Is the right column read, and --unit\nlarge enough?"
    frame = "!" * 80
    return (
        f"{frame}\nWARNING: {count:,} of {kept + count:,} rows ({count / (kept + count):.0%}) were "
        f"dropped, most because: {main_reason}.\nThe lines above name all reasons and rows. "
        f"{question}\n{frame}"
    )


# ------------------------------------------------------------------------------------------------
# 9. Splits without leaks

GRAM_WORDS = 5
NEAR_SHARE = 0.8  # of an item's word 5-grams
MAX_COMPARED = 1000  # test rows


def normalised(text):
    """A text for comparison: capitals and white space don't count."""
    return " ".join(text.casefold().split())


def leak_keys(item):
    """(title, text, description) of an item, normalised: items that share one belong together.

    The text is what the file has, the description what the prompt has of it.
    """
    title = normalised(item.title)
    text = item.full or item.summary
    _, _, description = item.summary.partition("\nDescription: ")
    if is_in_course_form(text) or not description:
        description = text
    text_key = normalised(text)
    description_key = text_key if description == text else normalised(description)
    return title, text_key, description_key


def hashed(text):
    """A text's 64-bit hash: a million of them fit into 8 MB, and equal ones are equal texts."""
    return xxhash.xxh3_64_intdigest(text.encode())


def connected_groups(keys):
    """Groups of rows that share a key with another row of theirs; lists of row numbers.

    `keys` is a list of columns, each with a sortable key a row. By union-find.
    """
    parents = list(range(len(keys[0])))
    for column in keys:
        values = numpy.asarray(column)
        order = numpy.argsort(values, kind="stable")
        is_equal = values[order[1:]] == values[order[:-1]]
        pairs = zip(order[:-1][is_equal].tolist(), order[1:][is_equal].tolist(), strict=True)
        for one, other in pairs:
            parents[root_of(parents, one)] = root_of(parents, other)
    groups = {}
    for row in range(len(parents)):
        groups.setdefault(root_of(parents, row), []).append(row)
    return list(groups.values())


def root_of(parents, row):
    """The row that stands for a row's group; shortens the way to it."""
    while parents[row] != row:
        parents[row] = parents[parents[row]]
        row = parents[row]
    return row


def split_rows(keys, seed):
    """(train, val, test), row numbers of about 90, 5 and 5 %; equal keys stay in one split.

    `keys` as in `connected_groups`, the titles' first. A group of more than 5 % of the rows goes to
    train. Raises UserError if there are fewer than three groups.
    """
    groups = connected_groups(keys)
    if len(groups) < 3:
        raise UserError(
            f"{len(groups)} different titles or descriptions: at least 3 are needed for train, val "
            "and test."
        )
    titles = keys[0]
    groups.sort(key=lambda group: min(titles[row] for row in group))
    rng = random.Random(seed)
    rng.shuffle(groups)

    share = len(titles) / 20
    limit = max(1, share)
    groups.sort(key=lambda group: -len(group) if len(group) > limit else 0)
    train, val, test = [], [], []
    for part in (val, test):
        while len(groups) > 1 and len(part) < limit:
            part.extend(groups.pop())
    for group in groups:
        train.extend(group)
    for part in (train, val, test):  # so that the first N rows of a split are a fair sample of it
        rng.shuffle(part)
    return train, val, test


def split_by_title(items, seed):
    """(train, val, test), lists of the items: `split_rows` by title and description."""
    keys = list(zip(*(leak_keys(item) for item in items), strict=True))
    return tuple([items[row] for row in rows] for rows in split_rows(keys, seed))


def word_grams(text):
    """The set of a text's runs of GRAM_WORDS words; of a shorter text all its words are one."""
    words = re.findall(r"\w+", text.casefold())
    if len(words) < GRAM_WORDS:
        return {tuple(words)}
    return set(zip(*(words[start:] for start in range(GRAM_WORDS)), strict=False))


def description_in(prompt):
    _, _, rest = prompt.partition("\n\n")  # the question
    description, _, _ = rest.rpartition("\n\n")
    return description


def count_near_duplicates(prompts):
    """How many of the first MAX_COMPARED test rows are nearly the same as a training row.

    That is: one training row has NEAR_SHARE of the test row's word 5-grams. Returns {"compared":
    rows, "near": rows}. Exact: a training row that lacks at most a fifth of them has one of any
    fifth and one more, so only those that have one of a test row's rarest ones are compared.
    """
    tests = prompts["test"]["prompt"][:MAX_COMPARED]
    grams = [word_grams(description_in(prompt)) for prompt in tests]
    counts = Counter(gram for row in grams for gram in row)
    rows_with = {}  # the rarest of a test row's 5-grams: its rows
    for number, row in enumerate(grams):
        rarest = sorted(row, key=lambda gram: (counts[gram], gram))
        for gram in rarest[: len(row) - math.ceil(NEAR_SHARE * len(row)) + 1]:
            rows_with.setdefault(gram, set()).add(number)

    near = set()
    for batch in prompts["train"].select_columns(["prompt"]).iter(1000):
        for prompt in batch["prompt"]:
            found = word_grams(description_in(prompt))
            candidates = set()
            for gram in rows_with.keys() & found:
                candidates |= rows_with[gram]
            for number in candidates - near:
                if len(grams[number] & found) >= NEAR_SHARE * len(grams[number]):
                    near.add(number)
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
DEMO_KINDS = {  # category: (kind, dollars in the middle size of a middle brand, unit, three sizes)
    "Appliances": (
        ("refrigerator", 560, "cubic feet", 14, 18, 25),
        ("washing machine", 480, "pounds", 12, 16, 20),
        ("dishwasher", 440, "settings", 8, 12, 15),
        ("electric oven", 520, "liters", 45, 60, 75),
        ("freezer", 380, "cubic feet", 5, 7, 14),
        ("air conditioner", 410, "square feet", 150, 350, 700),
    ),
    "Electronics": (
        ("laptop computer", 540, "GB", 8, 16, 32),
        ("television", 460, "inches", 32, 50, 65),
        ("smartphone", 520, "GB", 64, 128, 256),
        ("computer monitor", 230, "inches", 22, 27, 32),
        ("digital camera", 430, "megapixels", 16, 24, 45),
        ("game console", 390, "GB", 500, 1000, 2000),
    ),
    "Furniture": (
        ("sofa", 540, "seats", 2, 3, 4),
        ("mattress", 450, "inches", 8, 10, 12),
        ("dining table", 380, "seats", 4, 6, 8),
        ("wardrobe", 340, "doors", 2, 3, 4),
        ("desk", 260, "inches", 40, 48, 60),
        ("bookcase", 120, "shelves", 3, 5, 6),
    ),
    "Accessories": (
        ("flash drive", 14, "GB", 32, 64, 128),
        ("phone charger", 18, "watts", 20, 30, 65),
        ("mouse pad", 11, "inches", 9, 12, 31),
        ("charging cable", 10, "feet", 3, 6, 10),
        ("earbuds", 28, "hours", 20, 30, 50),
        ("power strip", 20, "outlets", 4, 6, 12),
    ),
    "Kitchen": (
        ("frying pan", 28, "inches", 8, 10, 12),
        ("chef knife", 32, "inches", 6, 8, 10),
        ("mixing bowl", 17, "quarts", 2, 3, 5),
        ("water bottle", 16, "ounces", 16, 24, 40),
        ("cutting board", 21, "inches", 10, 14, 18),
        ("coffee maker", 60, "cups", 4, 8, 12),
    ),
    "Toys": (
        ("building blocks", 30, "pieces", 150, 400, 900),
        ("jigsaw puzzle", 15, "pieces", 300, 1000, 2000),
        ("teddy bear", 20, "inches", 10, 16, 30),
        ("board game", 28, "players", 2, 4, 8),
    ),
    "Tools": (
        ("screwdriver", 10, "inches", 4, 6, 8),
        ("tape measure", 12, "feet", 12, 25, 35),
        ("tool box", 32, "inches", 13, 16, 22),
        ("cordless drill", 85, "volts", 12, 18, 20),
        ("ladder", 75, "feet", 4, 6, 8),
        ("garden hose", 30, "feet", 25, 50, 100),
    ),
    "Sports": (
        ("treadmill", 540, "horsepower", 2, 2.5, 3.5),
        ("mountain bike", 480, "gears", 7, 21, 24),
        ("rowing machine", 420, "levels", 8, 12, 16),
        ("camping tent", 140, "persons", 2, 4, 8),
    ),
}


def demo_items(n, seed, noise=DEMO_NOISE):
    """`n` items of a synthetic catalogue, the same for the same seed.

    Invented brands, everyday kinds of product. Price = what such a thing costs × brand × √(size /
    middle size) × condition × log-normal noise, within $5 … $999. With `noise=0` the same items
    come with the price that their wording implies, the median of what they may cost: the mean
    distance between the two is the least mean absolute error that any model can reach.
    """
    rng = random.Random(seed)
    kinds = [(category, *kind) for category, group in DEMO_KINDS.items() for kind in group]
    brands = list(DEMO_BRANDS)
    conditions = list(DEMO_CONDITIONS)
    items = []
    for number in range(n):
        category, kind, dollars, unit, *sizes = rng.choice(kinds)
        brand = rng.choice(brands)
        size = rng.choice(sizes)
        condition = rng.choice(conditions)

        brand_factor, praise = DEMO_BRANDS[brand]
        size_factor = math.sqrt(size / sizes[1])
        implied = dollars * brand_factor * size_factor * DEMO_CONDITIONS[condition]
        price = implied * math.exp(noise * rng.gauss(0, 1))
        price = round(min(DEMO_MAX, max(DEMO_MIN, price)), 2)

        title = f"{brand} {kind}, {size:g} {unit}"
        lines = (
            f"Title: {title}",
            f"Category: {category}",
            f"Brand: {brand}",
            f"Description: {praise}.",
            f"Details: {condition}",
        )
        summary = "\n".join(lines)
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
