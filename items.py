"""The data: what an item is, how it becomes a prompt, and where both are stored.

items (title, category, price, summary)  →  prompts (prompt, completion)  →  train / val / test as
parquet

    1. Items and prompts       4. Datasets, on disk and on the Hub
    2. Tokens to train on      5. The user's own catalogue
    3. Atomic files            6. The demo's synthetic catalogue

Before them come the errors that users see, which all files share. No model is loaded here. The
formats are those of the course "The Price Is Right", so that its
datasets and ours can be exchanged.
"""

import csv
import errno
import hashlib
import json
import math
import os
import random
import re
import shlex
import shutil
import socket
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import httpx2
import numpy
import psutil
import pyarrow
import pyarrow.compute
import pyarrow.parquet
import xxhash
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub import HfApi, constants, errors

QUESTION = "What does this cost to the nearest dollar?"
PREFIX = "Price is $"
SPLITS = ("train", "val", "test")
ITEM_SPLITS = ("train", "validation", "test")  # the names in datasets of items

MIN_PRICE = 0.50  # dollars; the course's lowest price
MAX_PRICE = 999.49  # dollars; the highest that rounds to 999
TEXT_COLUMNS = ("summary", "text", "description")
CATALOGUE_ENDINGS = (".jsonl", ".json", ".csv", ".parquet")

IGNORED = -100  # the label of tokens that are not trained on, as in PyTorch
MERGE_MARGIN = 8  # tokens that can merge where texts meet; in fact one or two do
MANIFEST = "manifest.json"


class UserError(Exception):
    """An error that the user can fix. Its text names the value, the rule and the fix.

    `main` prints it and exits with `code`: 1, or 3 if only a push failed.
    """

    def __init__(self, text, code=1):
        super().__init__(text)
        self.code = code


def world_size():
    """How many processes a launcher started: torchrun and accelerate say so in the environment."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first_process():
    """Whether this process is the one of them that prepares, prints and writes."""
    return int(os.environ.get("RANK", 0)) == 0


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
            unique = dict.fromkeys(self.texts)
            raise UserError("\n".join(unique))


# ------------------------------------------------------------------------------------------------
# 1. Items and prompts


def encode(texts, tokenizer, special=True):
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
    """The summaries, those of more than `max_tokens` tokens cut to so many.

    Special tokens are not counted. What is cut is decoded and right-stripped.
    """
    truncated = []
    for summary, ids in zip(summaries, encode(summaries, tokenizer, special=False), strict=True):
        if len(ids) > max_tokens:
            summary = tokenizer.decode(ids[:max_tokens]).rstrip()
        truncated.append(summary)
    return truncated


def prompt_of(summary):
    """The prompt for a description. It ends with PREFIX and no space: a number follows."""
    return f"{QUESTION}\n\n{summary}\n\n{PREFIX}"


def completion_of(price, do_round):
    """The price in dollars as text: to the nearest dollar, or as it is.

    Half is rounded to even, as Python does.
    """
    return f"{round(price)}.00" if do_round else str(price)


@dataclass
class Item:
    """A product with its price in dollars. `summary` is the description that the model reads."""

    title: str
    category: str
    price: float
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

    def make_prompts(self, tokenizer, max_tokens, do_round):
        """Sets `prompt`, with the summary cut to `max_tokens` tokens, and `completion`."""
        (summary,) = truncate([self.summary], tokenizer, max_tokens)
        self.prompt = prompt_of(summary)
        self.completion = completion_of(self.price, do_round)

    def count_prompt_tokens(self, tokenizer):
        """Tokens of prompt and completion together, special ones not counted."""
        return len(tokenizer.encode(self.prompt + self.completion, add_special_tokens=False))

    def to_datapoint(self):
        """The row that models are trained and evaluated on: exactly `prompt` and `completion`."""
        return {"prompt": self.prompt, "completion": self.completion}

    @classmethod
    def from_hub(cls, dataset_name):
        """The lists of items (train, validation, test) of a dataset on the Hub."""
        names = {field.name for field in fields(cls)}

        def to_item(row):
            return cls(**{name: value for name, value in row.items() if name in names})

        splits = load_dataset(dataset_name)
        return tuple([to_item(row) for row in splits[name]] for name in ITEM_SPLITS)

    @staticmethod
    def push_to_hub(dataset_name, train, validation, test):
        """Writes three lists of items to the Hub, private: train, validation and test."""
        splits = item_splits(train, validation, test, asdict, ITEM_SPLITS)
        splits.push_to_hub(dataset_name, private=True)

    @staticmethod
    def push_prompts_to_hub(dataset_name, train, val, test):
        """Writes the prompts of three lists of items to the Hub, private: train, val, test."""
        splits = item_splits(train, val, test, Item.to_datapoint)
        splits.push_to_hub(dataset_name, private=True)


def item_splits(train, val, test, to_row=asdict, names=SPLITS):
    """A DatasetDict of three lists of items, each item made a row by `to_row`."""
    parts = zip(names, (train, val, test), strict=True)
    return DatasetDict(
        {name: Dataset.from_list([to_row(item) for item in items]) for name, items in parts}
    )


class PromptMaker:
    """Makes prompts of batches of items.

    Each text is tokenised once, except those near the cutoff.
    """

    def __init__(self, tokenizer, cutoff):
        self.tokenizer = tokenizer
        self.cutoff = cutoff
        # Tokens can merge where a summary and the rest of its prompt meet, so that a prompt has a
        # few less than the two have alone. Up to this length a summary surely needn't be cut.
        empty_prompt_len = len(encode([prompt_of("")], tokenizer)[0])
        self.max_uncut_len = cutoff + empty_prompt_len - MERGE_MARGIN
        self.special_tokens = tokenizer.num_special_tokens_to_add() + 1  # and the end of text

    def __call__(self, table, do_round):
        """From a table of `summary` and `price` to one of prompts.

        Both are Arrow tables; the columns are `prompt`, `completion`, `price`, `cut`, `tokens`.
        """
        summaries = table["summary"].to_pylist()
        prices = table["price"].to_pylist()
        completions = [completion_of(price, do_round) for price in prices]
        prompts = [prompt_of(summary) for summary in summaries]
        lengths = self.count(prompts, completions)

        is_cut = [False] * len(prompts)
        near = [i for i, length in enumerate(lengths) if length > self.max_uncut_len]
        kept = truncate([summaries[i] for i in near], self.tokenizer, self.cutoff)
        for i, summary in zip(near, kept, strict=True):
            if summary != summaries[i]:
                is_cut[i] = True
                prompts[i] = prompt_of(summary)
                (lengths[i],) = self.count([prompts[i]], [completions[i]])

        tokens = [length - self.special_tokens for length in lengths]
        columns = {
            "prompt": prompts,
            "completion": completions,
            "price": prices,
            "cut": is_cut,
            "tokens": tokens,
        }
        return pyarrow.table(columns)

    def count(self, prompts, completions):
        """Tokens of each row as it is trained on."""
        return [len(ids) for ids in encode_rows(prompts, completions, self.tokenizer)]


def build_prompts(splits, tokenizer, cutoff):
    """Prompts for the items of a DatasetDict with the columns `summary` and `price`.

    Prices are rounded in train and val only. Returns the DatasetDict of exactly `prompt` and
    `completion`, and what was counted on the way, numpy arrays: {split: {"cut": whether the summary
    was too long, "tokens": of prompt and completion, "price": in dollars}}.
    """
    maker = PromptMaker(tokenizer, cutoff)
    identity = tokenizer_identity(tokenizer)
    prompts = DatasetDict()
    counts = {}
    for name in SPLITS:
        items = splits[name].select_columns(["summary", "price"]).with_format("arrow")
        rows = items.map(
            maker,
            batched=True,
            fn_kwargs={"do_round": name != "test"},
            remove_columns="summary",
            desc=f"prompts of {name}",
            new_fingerprint=f"{items._fingerprint}-{cutoff}-{identity}",
        ).with_format(None)
        prompts[name] = rows.select_columns(["prompt", "completion"])
        counts[name] = {
            column: rows.data.column(column).to_numpy() for column in ("cut", "tokens", "price")
        }
    return prompts, counts


# ------------------------------------------------------------------------------------------------
# 2. Tokens to train on


def tokenise(prompts, tokenizer, name):
    """Rows of `prompt` and `completion` as training reads them, a Dataset; `datasets` caches it.

    `input_ids` are the tokens of both and the end of text, `labels` the same but IGNORED in the
    prompt.
    """

    def convert(table):
        texts = table["prompt"].to_pylist(), table["completion"].to_pylist()
        ids = encode_rows(*texts, tokenizer)
        return pyarrow.table(token_columns(ids, texts[1], tokenizer))

    return (
        prompts.with_format("arrow")
        .map(
            convert,
            batched=True,
            remove_columns=prompts.column_names,
            desc=f"tokens of {name}",
            new_fingerprint=f"{prompts._fingerprint}-{tokenizer_identity(tokenizer)}",
        )
        .with_format(None)
    )


def encode_rows(prompts, completions, tokenizer):
    """The token ids of each prompt with its completion and the end of text, a list of lists."""
    texts = [
        f"{prompt}{completion}{tokenizer.eos_token}"
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    return encode(texts, tokenizer)


def completion_tokens(completions, tokenizer):
    """The token ids of each completion with its end of text, behind PREFIX; lists.

    Encoded alone a completion can differ: Llama 2's tokenizer puts a space before it.
    """
    prefix_len = len(encode([PREFIX], tokenizer, special=False)[0])
    unique = sorted(set(completions))
    texts = [f"{PREFIX}{text}{tokenizer.eos_token}" for text in unique]
    ids = encode(texts, tokenizer, special=False)
    tokens = {text: row[prefix_len:] for text, row in zip(unique, ids, strict=True)}
    return [tokens[text] for text in completions]


def token_columns(ids, completions, tokenizer):
    """`input_ids` and `labels` of rows with the token ids `ids`, as Arrow columns."""
    lengths = numpy.array([len(row) for row in ids])
    completion_len = numpy.array([len(row) for row in completion_tokens(completions, tokenizer)])
    ends = lengths.cumsum()
    completion_starts = ends - completion_len

    values = numpy.concatenate(ids).astype(numpy.int32)
    in_prompt = numpy.arange(len(values)) < completion_starts.repeat(lengths)
    labels = numpy.where(in_prompt, numpy.int32(IGNORED), values)

    offsets = numpy.append(0, ends).astype(numpy.int32)
    return {
        "input_ids": pyarrow.ListArray.from_arrays(offsets, values),
        "labels": pyarrow.ListArray.from_arrays(offsets, labels),
    }


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
# 3. Atomic files


def temporary_name(path, ending):
    """A hidden name beside `path` that no other process uses."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.{ending}")


@contextmanager
def replacing(target):
    """Yields a temporary folder beside `target`; on success it takes the place of `target`.

    A folder can't be replaced in one step, so the old one is renamed meanwhile, and
    `finish_interrupted_replace` puts it back after a kill between the two renames. After an error
    the old content stays. Of two processes at once the later one's folder stays, whole.
    """
    target = finish_interrupted_replace(target)
    remove_leftovers(target)
    new = temporary_name(target, "new")
    new.mkdir(parents=True)
    yield new
    for path in new.rglob("*"):
        sync(path)
    sync(new)
    put_in_place(new, target)
    sync(target.parent)


def put_in_place(new, target):
    """Renames the folder `new` to `target`, which may exist, and removes the old one."""
    old = temporary_name(target, "old")
    while True:
        with suppress(FileNotFoundError):
            os.rename(target, old)
        try:
            os.rename(new, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # Another process has just put its folder there
            shutil.rmtree(old, ignore_errors=True)
        else:
            shutil.rmtree(old, ignore_errors=True)
            return


def sync(path):
    """Has a file's content, or a folder's names, on the disk before anything relies on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finish_interrupted_replace(target):
    """Undoes a `replacing` that was killed between its two renames. Returns `target` as a Path."""
    target = Path(target)
    if not target.exists():
        for old in target.parent.glob(f".{target.name}.*.old"):
            os.rename(old, target)
            break
    return target


def remove_leftovers(target):
    """Removes what killed processes of this machine left of their `replacing` of `target`."""
    host = socket.gethostname()
    for path in target.parent.glob(f".{target.name}.{host}-*"):
        process = int(path.name.rsplit(".", 1)[0].rsplit("-", 1)[1])
        if process == os.getpid() or not psutil.pid_exists(process):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def writing(path):
    """Yields a text file that becomes `path` on success.

    It is written under another name, flushed to the disk, then renamed.
    """
    new = temporary_name(Path(path), "new")
    with open(new, "w", encoding="utf-8", newline="") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    sync(new.parent)


def write_json(path, value):
    """Writes `value` as JSON, entirely or not at all. NaN, which JSON lacks, becomes null."""
    clean = json.loads(json.dumps(value), parse_constant=lambda _: None)
    with writing(path) as file:
        file.write(json.dumps(clean, indent=2, ensure_ascii=False) + "\n")


def read_json(path):
    """What `write_json` wrote, or {} if there is no such file."""
    path = Path(path)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_table(path, table):
    """Writes a list of dicts as CSV or, by the ending, as JSON lines: entirely or not at all."""
    with writing(path) as file:
        if Path(path).suffix.lower() == ".jsonl":
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
        if path.is_file() and path.name not in (MANIFEST, *skipped):
            sync(path)
            files[path.name] = file_identity(path)
    write_json(Path(folder, MANIFEST), files)


def manifest_problem(folder):
    """Why the files in `folder` are not those of its manifest, in a few words, or None."""
    try:
        files = read_json(Path(folder, MANIFEST))
    except ValueError:
        return f"{MANIFEST} is corrupt"
    if not files:
        return f"{MANIFEST} is missing"
    if not isinstance(files, dict):
        return f"{MANIFEST} is corrupt"
    for name, identity in files.items():
        path = Path(folder, name)
        if not path.exists():
            return f"{name} is missing"
        if file_identity(path) != identity:
            return f"{name} is corrupt"
    return None


def file_identity(path):
    """Size in bytes and checksum of a file.

    XXH3 reads a checkpoint of 5 GB in a fifth of a second, SHA-256 in two and a half. It tells
    damage, no forgery.
    """
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return {"size": path.stat().st_size, "xxh3": digest.hexdigest()}


def check_output(path, source=None):
    """Raises UserError if guesses can't be written to `path`, or `source` is that file."""
    if path is None:
        return
    if Path(path).suffix.lower() not in (".csv", ".jsonl"):
        raise UserError(f"--output {path}: the ending is unknown; give a .csv or .jsonl file.")
    if not Path(path).parent.is_dir():
        raise UserError(f"--output {path}: its folder doesn't exist. Give another file.")
    if source and Path(path).resolve() == Path(source).resolve():
        raise UserError(f"--output {path}: would overwrite the input. Give another file.")


def check_writable(folder):
    """Raises UserError if `folder` can't be written to; makes it if it doesn't exist."""
    folder = Path(folder)
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: can't be written to ({error.strerror}). Give another --output-dir."
        ) from error


# ------------------------------------------------------------------------------------------------
# 4. Datasets, on disk and on the Hub


@contextmanager
def hub_errors(what):
    """Turns the Hub's errors about `what` into a UserError that says what to do."""
    try:
        yield
    except (
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
        httpx2.TransportError,
        ConnectionError,
    ) as error:
        text = f"{what}: the Hub can't be reached. Check the network, or the name of a folder."
        raise UserError(text) from error
    except errors.GatedRepoError as error:
        text = f"{what}: gated. Ask for access at {constants.ENDPOINT}/{what}, then run this again."
        raise UserError(text) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{what}: no such revision on the Hub. Check --revision.") from error
    except (
        errors.RepositoryNotFoundError,
        errors.EntryNotFoundError,
        errors.HFValidationError,
        DatasetNotFoundError,
    ) as error:
        text = f"{what}: not on the Hub, or HF_TOKEN may not read it. Check the name and the token."
        raise UserError(text) from error
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # a refusal, files that can't be loaded, an aborted upload
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{what}: {lines[0]}") from error


def push_or_explain(name, upload, resume_command="the same command again"):
    """Calls `upload`, whose client retries by itself.

    Raises UserError with code 3 and the command that pushes later.
    """
    try:
        with hub_errors(name):
            upload()
    except UserError as error:
        text = f"{error} Everything is on disk; to push it later: {resume_command}"
        raise UserError(text, code=3) from error
    print(f"Pushed: {name}")


def describe_prompts(config, cutoff, catalogue, counts):
    """What prepare.json records: settings, rows kept, dropped and cut, their source."""
    return {
        "mode": config.mode,
        "cutoff": cutoff,
        "seed": config.seed,
        "base_model": config.base_name,
        "kept": {name: len(columns["cut"]) for name, columns in counts.items()},
        "dropped": catalogue.dropped,
        "cut": {name: int(columns["cut"].sum()) for name, columns in counts.items()},
    } | catalogue.about


def format_prompts(about, counts):
    """What was kept, dropped and cut, how prices and lengths are spread; a text."""
    kept = sum(about["kept"].values())
    dropped = sum(len(lines) for lines in about["dropped"].values())
    splits = ", ".join(f"{count:,} {name}" for name, count in about["kept"].items())
    reasons = f": {format_dropped(about['dropped'])}" if dropped else ""
    train = counts["train"]
    lines = [
        f"Rows: {kept:,} kept ({splits}), {dropped:,} dropped{reasons}",
        f"Cut at {about['cutoff']} tokens: {sum(about['cut'].values()):,} of {kept:,} descriptions",
        f"Price, train, in $:       {format_quantiles(train['price'], 2)}",
        f"Tokens an item, train:    {format_quantiles(train['tokens'])}",
    ]
    return "\n".join(lines)


def format_quantiles(values, digits=0):
    """'min 5 · 25 % 20 · median 55 · 75 % 160 · max 999' of numbers."""
    ordered = numpy.sort(values)
    shares = {"min": 0.0, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "max": 1.0}
    parts = []
    for name, share in shares.items():
        value = ordered[round(share * (len(ordered) - 1))]
        parts.append(f"{name} {value:,.{digits}f}")
    return " · ".join(parts)


def save_prompts(folder, prompts, about):
    """Writes train.parquet, val.parquet, test.parquet and prepare.json into `folder`."""
    for name in SPLITS:
        prompts[name].to_parquet(Path(folder, f"{name}.parquet"), batch_size=50_000)
    write_json(Path(folder, "prepare.json"), about)


def check_dataset(folder):
    """Raises UserError if a dataset's files aren't those that `prepare` wrote."""
    problem = manifest_problem(folder) if Path(folder, MANIFEST).exists() else None
    if problem:
        raise UserError(f"{folder}: {problem}. Run `python app.py prepare` again.")


def replaced_source(folder, about):
    """A note that a dataset replaces one from another source, '' if it doesn't."""
    try:
        older = read_json(finish_interrupted_replace(folder) / "prepare.json")
    except ValueError:
        return ", replacing a corrupt one"
    if not older or older["source"] == about["source"]:
        return ""
    return f", replacing: {older['source']}"


def load_prompts(folder):
    """The DatasetDict (train, val, test) that `save_prompts` wrote.

    Memory-mapped from the cache of `datasets`, which also keeps what is made of it. Raises
    UserError if a file is damaged or missing.
    """
    files = {name: str(Path(folder, f"{name}.parquet")) for name in SPLITS}
    try:
        return load_dataset("parquet", data_files=files)
    except (OSError, DatasetGenerationError) as error:
        text = f"{folder}: the dataset is corrupt or incomplete ({error.__cause__ or error})."
        raise UserError(f"{text} Run `python app.py prepare` again.") from error


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


def find_prompts(config, trained_on=None):
    """The Prompts to train or evaluate on; prints which.

    In this order: `--data-user`'s; the local copy that `prepare` left, unless a run was
    `trained_on` another dataset on the Hub; that dataset; the own account's; the course's.
    Raises UserError if there are none, or if a column is missing.
    """
    place, reason = locate_prompts(config, trained_on)
    print(f"Data: {place} ({reason})")
    if Path(place).exists():
        splits = load_prompts(place)
        about = read_json(Path(place, "prepare.json"))
    else:
        with hub_errors(place):
            splits = load_dataset(place)
        about = {"source": place, "hub": place}
    check_columns(place, splits, SPLITS, ("prompt", "completion"))
    return Prompts(splits, place, about)


def locate_prompts(config, trained_on):
    """(folder or name on the Hub, why that one): see `find_prompts`."""
    local = finish_interrupted_replace(config.dataset_folder)
    if config.data_user:
        return f"{config.data_user}/{config.dataset_name}", "--data-user"
    if local.exists():
        check_dataset(local)
    if local.exists() and trained_on in (None, read_json(local / "prepare.json").get("hub")):
        return str(local), "the local copy that prepare left"
    if trained_on:
        return trained_on, "the run was trained on it"
    if config.demo_mode:
        command = "python app.py prepare --demo"
        if config.output_dir != "outputs":
            command += f" --output-dir {shlex.quote(config.output_dir)}"
        raise UserError(f"{local}: no such dataset yet. Run `{command}` first.")
    if not config.local:
        own = f"{config.login()}/{config.dataset_name}"
        with hub_errors(own):
            if HfApi().repo_exists(own, repo_type="dataset"):
                return own, "your account's"
    return f"{config.course_user}/{config.dataset_name}", "the course's"


def check_columns(place, splits, names, columns):
    """Raises UserError if a dataset lacks one of the splits `names`, or of the `columns`."""
    missing = [name for name in names if name not in splits]
    if not missing:
        found = [set(splits[name].column_names) for name in names]
        missing = [
            column
            for column in columns
            if any(column not in columns_of_split for columns_of_split in found)
        ]
    if missing:
        required = f"{', '.join(names)} with {' and '.join(columns)}"
        raise UserError(f"{place}: lacks {', '.join(missing)}; required: {required}.")


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


def constant_guesses(train):
    """The mean and median of the training prices, in dollars: guesses that read nothing."""
    prices = numpy.array(train["completion"][:], dtype=float)
    return {"constant_mean": float(prices.mean()), "constant_median": float(numpy.median(prices))}


def price_spread(train):
    """The mean absolute deviation of the training prices from their median, in dollars."""
    prices = numpy.array(train["completion"][:], dtype=float)
    return float(abs(prices - numpy.median(prices)).mean())


@dataclass
class Catalogue:
    """Items to make prompts of.

    `splits` (train, val, test) have the columns `summary` and `price`; `dropped` is {reason: [line,
    …]}; `about` is to be recorded: `source`, in words, and more.
    """

    splits: DatasetDict
    dropped: dict
    about: dict


def find_items(config, path=None):
    """The Catalogue to prepare: the file's at `path`, the demo's, or the course's."""
    if path is not None:
        items, dropped = read_catalogue(path)
        source = f"{path}, split 90/5/5 by title, seed {config.seed}"
        return Catalogue(
            item_splits(*split_by_title(items, config.seed)), dropped, {"source": source}
        )
    if config.demo_mode:
        return demo_catalogue(config.seed)
    return published_items(f"{config.data_user or config.course_user}/items_{config.mode}")


def published_items(name):
    """The Catalogue of a dataset of items on the Hub; what is dropped is named by split and row."""
    with hub_errors(name):
        published = load_dataset(name)
    check_columns(name, published, ITEM_SPLITS, ("summary", "price"))
    dropped = {}

    def is_usable(batch, rows, split):
        problems = [
            text_problem(text, "summary") or price_problem(price)
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
    pyarrow.default_memory_pool().release_unused()  # what reading Parquet took, half a GiB
    return Catalogue(splits, dropped, {"source": name})


# ------------------------------------------------------------------------------------------------
# 5. The user's own catalogue


def read_rows(path):
    """(line, row) for each row of a JSON lines, CSV or Parquet file.

    For a row that can't be read, the reason as text. Lines count from 1 as an editor shows them (a
    CSV's header is line 1), a Parquet file's rows from 1. Raises UserError if the file can't be
    read at all.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give a .jsonl, .csv or .parquet file.")
    if ending not in CATALOGUE_ENDINGS:
        raise UserError(
            f"{path}: the ending is {ending or 'missing'}; give a .jsonl, .csv or .parquet file."
        )
    try:
        if ending == ".parquet":
            return list(enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1))
        with open(path, encoding="utf-8-sig", newline="") as file:
            return read_csv(file) if ending == ".csv" else read_json_lines(file)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not in UTF-8 (byte {error.start:,}). Save it as UTF-8; Excel calls that "
            "`CSV UTF-8`."
        ) from error
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise UserError(
            f"{path}: can't be read: {getattr(error, 'strerror', None) or error}."
        ) from error


def read_json_lines(file):
    """`read_rows` of a file with one JSON object a line; empty lines are ignored."""
    return [(line, parse_json_object(text)) for line, text in enumerate(file, 1) if text.strip()]


def parse_json_object(text):
    """The dict that a line holds, or why there is none, in a few words."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return "not a JSON object"
    return row if isinstance(row, dict) else "not a JSON object"


def read_csv(file):
    """`read_rows` of a CSV.

    Cells are separated by commas, semicolons or tabs; the header may be in upper case.
    """
    header = file.readline()
    file.seek(0)
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(file, delimiter=max(",;\t", key=header.count), strict=True)
    try:
        names = [name.strip().lower() for name in reader.fieldnames or ()]
        repeated = sorted({name for name in names if name and names.count(name) > 1})
        if repeated:
            raise ValueError(f"more than one column is called {' and '.join(repeated)}")
        reader.fieldnames = names
        rows = []
        for row in reader:
            too_long = None in row
            rows.append((reader.line_num, "more cells than the header has" if too_long else row))
        return rows
    except csv.Error as error:
        raise ValueError(f"{error} (line {reader.line_num}; is a quote left open?)") from error


def price_problem(price):
    """Why `price` can't be used, in a few words, or None.

    Usable are numbers from MIN_PRICE to MAX_PRICE dollars.
    """
    if price is None or price == "":
        return "price is missing"
    number = parse_plain_number(price)
    if math.isnan(number):
        return "price is no plain number like 12.99"
    if number <= 0:
        return "price is zero or negative"
    if not MIN_PRICE <= number <= MAX_PRICE:
        return f"price is outside ${MIN_PRICE:.2f}–${MAX_PRICE}"
    return None


def parse_plain_number(value):
    """`value`, a number or a text like 12.99, as a float; NaN for anything else."""
    if isinstance(value, bool):
        return math.nan
    if isinstance(value, str) and not re.fullmatch(
        r"\s*[-+]?(\d+\.?\d*|\.\d+)\s*", value, re.ASCII
    ):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def text_problem(value, name):
    """Why `value` can't be used as the text `name`, in a few words, or None."""
    if not isinstance(value, str) or not value.strip():
        return f"{name} is empty or not text"
    if re.search("[\ud800-\udfff]", value):
        return f"{name} has an incomplete character"  # half of a surrogate pair
    return None


def describe_item(title, category, text):
    """Title, category and description, one labelled line each, as in the course.

    A text that begins with `Title:` has that form already.
    """
    text = text.strip()
    if text.startswith("Title:"):
        return text
    parts = {"Title": title, "Category": category, "Description": text.removeprefix(title).strip()}
    return "\n".join(f"{name}: {part}" for name, part in parts.items() if part)


def read_catalogue(path, needs_price=True):
    """(items of the user's own file, what was dropped: {reason: [line, …]}).

    Needs the columns `title`, `price` and one of TEXT_COLUMNS; `category` is optional. A row with
    the title, description and price of an earlier one is dropped. Without `needs_price` the price
    may be missing, None then, and rows may repeat others. Raises UserError if a column is
    missing or no row is usable.
    """
    rows = read_rows(path)
    if not rows:
        raise UserError(f"{path}: holds no rows.")
    text_columns = find_text_columns(path, rows, needs_price)

    items = []
    dropped = {}
    seen = set()
    for line, row in rows:
        problem = row if isinstance(row, str) else row_problem(row, text_columns, needs_price)
        if not problem:
            item = item_of_row(row, text_columns, line)
            key = (item.summary, item.price)
            if needs_price and key in seen:
                problem = "duplicate of an earlier row"
        if problem:
            dropped.setdefault(problem, []).append(line)
        else:
            seen.add(key)
            items.append(item)
    if not items:
        raise UserError(f"{path}: none of {len(rows):,} rows is usable; {format_dropped(dropped)}.")
    return items, dropped


def find_text_columns(path, rows, needs_price):
    """Those of TEXT_COLUMNS that the rows have. Raises UserError if a column is missing."""
    columns = dict.fromkeys(column for _, row in rows if isinstance(row, dict) for column in row)
    text_columns = [column for column in TEXT_COLUMNS if column in columns]
    required = ("title", "price") if needs_price else ("title",)
    missing = [column for column in required if column not in columns]
    if not text_columns:
        missing.append(f"a description ({', '.join(TEXT_COLUMNS)})")
    if missing and columns:
        found = ", ".join(str(column) for column in columns)
        raise UserError(f"{path}: no column for {' and '.join(missing)}; found: {found}.")
    return text_columns


def description_of(row, text_columns):
    """The first description that a row has, or None."""
    return next((row[name] for name in text_columns if row.get(name)), None)


def row_problem(row, text_columns, needs_price):
    """Why a row can't be used, in a few words, or None."""
    price = row.get("price")
    has_no_price = price is None or price == ""
    problem = text_problem(row.get("title"), "title")
    problem = problem or text_problem(description_of(row, text_columns), text_columns[0])
    if problem or (has_no_price and not needs_price):
        return problem
    return price_problem(price)


def item_of_row(row, text_columns, line):
    """The Item of a row that has no problem; its id is the line."""
    title = row["title"].strip()
    category = row.get("category")
    category = category.strip() if isinstance(category, str) else ""
    price = float(row["price"]) if row.get("price") else None
    summary = describe_item(title, category, description_of(row, text_columns))
    return Item(title, category, price, summary=summary, id=line)


def own_rows(path, text, tokenizer, cutoff):
    """(rows of the user's own items to price, what was dropped: {reason: [line, …]}).

    They come from the file at `path` or are the one described by `text`. A row has prompt,
    completion ('' without a price), line and title.
    """
    dropped = {}
    if path:
        items, dropped = read_catalogue(path, needs_price=False)
    elif text_problem(text, "text"):
        raise UserError(
            "--text: is empty or has an incomplete character. Give a description, in quotes."
        )
    else:
        title = text.strip().splitlines()[0].removeprefix("Title:").strip()
        items = [Item(title, "", None, summary=describe_item(title, "", text), id=1)]
    rows = []
    for item in items:
        item.make_prompts(tokenizer, cutoff, do_round=False)
        completion = "" if item.price is None else item.completion
        rows.append(
            {"prompt": item.prompt, "completion": completion, "line": item.id, "title": item.title}
        )
    return rows, dropped


def format_dropped(dropped, max_lines=5):
    """'3 × price is missing (lines 17, 40, 41)' for each reason."""
    parts = []
    for reason, lines in dropped.items():
        shown = [str(line) for line in lines[:max_lines]]
        if len(lines) > max_lines:
            shown.append("…")
        word = "line" if len(lines) == 1 else "lines"
        parts.append(f"{len(lines):,} × {reason} ({word} {', '.join(shown)})")
    return "; ".join(parts)


def split_by_title(items, seed):
    """(train, val, test) of about 90, 5 and 5 % of the items; equal titles stay in one split.

    Raises UserError if there are fewer than three different titles.
    """
    by_title = {}
    for item in items:
        title = " ".join(item.title.casefold().split())
        by_title.setdefault(title, []).append(item)
    if len(by_title) < 3:
        raise UserError(
            f"{len(by_title)} different titles: at least 3 are needed for train, val and test."
        )
    groups = [by_title[title] for title in sorted(by_title)]
    rng = random.Random(seed)
    rng.shuffle(groups)

    share = len(items) / 20
    train, val, test = [], [], []
    for part in (val, test):
        while len(groups) > 1 and len(part) < max(1, share):
            part.extend(groups.pop())
    for group in groups:
        train.extend(group)
    for part in (train, val, test):  # so that the first N rows of a split are a fair sample of it
        rng.shuffle(part)
    return train, val, test


# ------------------------------------------------------------------------------------------------
# 6. The demo's synthetic catalogue

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
        items.append(Item(title, category, price, summary="\n".join(lines), id=number))
    return items


def demo_catalogue(seed):
    """The demo's Catalogue, with the prices that the test items' wording implies."""
    train, val, test = split_by_title(demo_items(DEMO_ROWS, seed), seed)
    implied = {item.id: item.price for item in demo_items(DEMO_ROWS, seed, noise=0)}
    about = {
        "source": f"synthetic catalogue of {DEMO_ROWS:,} items, seed {seed}",
        "implied_prices": [implied[item.id] for item in test],
    }
    return Catalogue(item_splits(train, val, test), {}, about)
