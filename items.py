"""The data's shape: what an item is, how it becomes a prompt with its completion, and where both are stored.

    items (title, category, price, summary)  →  prompts (prompt, completion)  →  train / val / test as parquet

Nothing here loads a model. The formats are those of the course "The Price Is Right", so that its datasets and ours
can be exchanged. Heavy imports stay inside the functions that need them.
"""
import csv
import hashlib
import json
import math
import os
import random
import re
import shutil
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Optional

QUESTION = "What does this cost to the nearest dollar?"
PREFIX = "Price is $"
MIN_PRICE, MAX_PRICE = 0.50, 999.49  # dollars; what rounds to 1…999, the range the course trains on
TEXT_COLUMNS = ("summary", "text", "description")
SPLITS = ("train", "val", "test")


class UserError(Exception):
    """Something the user can mend. Its text names the value, the rule and the fix; `main` prints it and exits with
    `code`: 1, or 3 where only the Hub is lacking."""

    def __init__(self, text, code=1):
        super().__init__(text)
        self.code = code


# ---------------------------------------------------------------------------------------------------------------------
# Items and prompts


def encode(texts, tokenizer, special=True):
    """The token ids of texts, lists. The tokenizer's own call gives the same in twice the time: it also makes masks."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation(), backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=special)]


def cut(summaries, tokenizer, max_tokens):
    """The summaries; those of more than `max_tokens` tokens, special ones not counted, are cut to their first
    `max_tokens`, decoded and right-stripped."""
    return [tokenizer.decode(ids[:max_tokens]).rstrip() if len(ids) > max_tokens else summary
            for summary, ids in zip(summaries, encode(summaries, tokenizer, special=False))]


def prompt_of(summary):
    return f"{QUESTION}\n\n{summary}\n\n{PREFIX}"


def completion_of(price, do_round):
    """The price to the nearest dollar (half to even, as Python rounds), or as it is."""
    return f"{round(price)}.00" if do_round else str(price)


@dataclass
class Item:
    """A product with its price in dollars. `summary` is the description that the model reads."""

    title: str
    category: str
    price: float
    full: Optional[str] = None
    weight: Optional[float] = None
    summary: Optional[str] = None
    prompt: Optional[str] = None
    completion: Optional[str] = None
    id: Optional[int] = None

    def __repr__(self):
        return f"<{self.title} = ${self.price}>"

    def count_tokens(self, tokenizer):
        """Tokens of the summary, special ones not counted."""
        return len(tokenizer.encode(self.summary, add_special_tokens=False))

    def make_prompts(self, tokenizer, max_tokens, do_round):
        """Sets `prompt`, with the summary cut to `max_tokens` tokens, and `completion`."""
        self.prompt = prompt_of(*cut([self.summary], tokenizer, max_tokens))
        self.completion = completion_of(self.price, do_round)

    def count_prompt_tokens(self, tokenizer):
        """Tokens of prompt and completion together, special ones not counted."""
        return len(tokenizer.encode(self.prompt + self.completion, add_special_tokens=False))

    def to_datapoint(self):
        return {"prompt": self.prompt, "completion": self.completion}

    @classmethod
    def from_hub(cls, dataset_name):
        """The lists of items (train, validation, test) of a dataset on the Hub."""
        from datasets import load_dataset

        splits = load_dataset(dataset_name)
        known = cls.__dataclass_fields__
        return tuple([cls(**{name: value for name, value in row.items() if name in known}) for row in splits[split]]
                     for split in ("train", "validation", "test"))

    @staticmethod
    def push_to_hub(dataset_name, train, validation, test):
        """Writes three lists of items to the Hub, private, as the splits train, validation and test."""
        item_splits(train, validation, test, asdict, "validation").push_to_hub(dataset_name, private=True)

    @staticmethod
    def push_prompts_to_hub(dataset_name, train, val, test):
        """Writes the prompts of three lists of items to the Hub, private, as the splits train, val and test."""
        item_splits(train, val, test, Item.to_datapoint, "val").push_to_hub(dataset_name, private=True)


def item_splits(train, val, test, to_row, val_name="val"):
    """A DatasetDict of three lists of items, each item a row by `to_row`."""
    from datasets import Dataset, DatasetDict

    return DatasetDict({name: Dataset.from_list([to_row(item) for item in items])
                        for name, items in (("train", train), (val_name, val), ("test", test))})


def build_prompts(splits, tokenizer, cutoff):
    """Prompts for the items of a DatasetDict (train, val, test) with the columns `summary` and `price`.

    Prices are rounded in train and val only. Returns the DatasetDict of exactly `prompt` and `completion`, and the columns
    counted on the way, numpy arrays: {split: {"cut": whether the summary was too long, "tokens": of prompt and completion,
    "price": in dollars}}.
    """
    import pyarrow

    around = len(encode([prompt_of("")], tokenizer)[0])  # what a prompt adds to its summary's tokens, but for a few

    def convert(table, do_round):
        summaries, prices = table["summary"].to_pylist(), table["price"].to_pylist()
        completions = [completion_of(price, do_round) for price in prices]
        prompts = [prompt_of(summary) for summary in summaries]
        ids = encode_rows(prompts, completions, tokenizer)
        is_cut = [False] * len(ids)
        near = [i for i, row in enumerate(ids) if len(row) > cutoff + around - 8]  # all others are tokenised once only
        for i, kept in zip(near, cut([summaries[i] for i in near], tokenizer, cutoff)):
            if kept != summaries[i]:
                prompts[i], is_cut[i] = prompt_of(kept), True
                ids[i], = encode_rows([prompts[i]], [completions[i]], tokenizer)
        return pyarrow.table({"prompt": prompts, "completion": completions, "price": prices, "cut": is_cut,
                              "tokens": [len(row) - extra for row in ids]})

    prompts, counts = type(splits)(), {}
    extra, identity = tokenizer.num_special_tokens_to_add() + 1, tokenizer_identity(tokenizer)
    for name in SPLITS:
        rows = splits[name].select_columns(["summary", "price"]).with_format("arrow")
        rows = rows.map(convert, batched=True, desc=f"prompts of {name}", fn_kwargs={"do_round": name != "test"},
                        remove_columns="summary",
                        new_fingerprint=f"{rows._fingerprint}-{cutoff}-{identity}").with_format(None)
        prompts[name] = rows.select_columns(["prompt", "completion"])
        counts[name] = {column: rows.data.column(column).to_numpy() for column in ("cut", "tokens", "price")}
    return prompts, counts


def tokenise(prompts, tokenizer, name):
    """Rows of prompt and completion as training reads them: `input_ids` of both and the end of text, `labels` the same
    but −100 in the prompt."""
    import pyarrow

    def convert(table):
        rows = table["prompt"].to_pylist(), table["completion"].to_pylist()
        return pyarrow.table(token_columns(encode_rows(*rows, tokenizer), rows[1], tokenizer))

    return prompts.with_format("arrow").map(
        convert, batched=True, remove_columns=prompts.column_names, desc=f"tokens of {name}",
        new_fingerprint=f"{prompts._fingerprint}-{tokenizer_identity(tokenizer)}").with_format(None)


def encode_rows(prompts, completions, tokenizer):
    """The token ids of each prompt with its completion and the end of text, lists."""
    return encode([prompt + completion + tokenizer.eos_token for prompt, completion in zip(prompts, completions)], tokenizer)


def token_columns(ids, completions, tokenizer):
    """`input_ids` and `labels` of rows with such token ids, Arrow columns."""
    import numpy
    import pyarrow

    start, texts = len(encode([PREFIX], tokenizer, special=False)[0]), list({*completions})
    spelled = encode([PREFIX + text + tokenizer.eos_token for text in texts], tokenizer, special=False)
    said = dict(zip(texts, (len(row) - start for row in spelled)))
    lengths = numpy.array(list(map(len, ids)))
    ends, values = lengths.cumsum(), numpy.concatenate(ids).astype(numpy.int32)
    in_prompt = numpy.arange(len(values)) < (ends - [said[completion] for completion in completions]).repeat(lengths)
    return {name: pyarrow.ListArray.from_arrays(numpy.append(0, ends).astype(numpy.int32), column)
            for name, column in (("input_ids", values), ("labels", numpy.where(in_prompt, numpy.int32(-100), values)))}


def row_lengths(tokens):
    """Tokens in each row of a tokenised split, a numpy array, of 64 bits, since bytes are reckoned with it."""
    import pyarrow.compute

    return pyarrow.compute.list_value_length(tokens.data.column("input_ids")).to_numpy().astype("int64")


def tokenizer_identity(tokenizer):
    """A hash that tells tokenizers apart."""
    from hashlib import sha256

    return sha256(f"{tokenizer.backend_tokenizer.to_str()} {tokenizer.eos_token}".encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Storage on disk


@contextmanager
def replacing(target):
    """Yields a temporary path beside `target`, an existing folder; on success it takes the place of `target`.

    A folder can't be replaced in one step, so the old one waits as `.old` meanwhile; `restore` puts it back after a
    kill between the two renames. After an error the old content stays.
    """
    target = Path(target)
    new, old = target.with_name(target.name + ".new"), target.with_name(target.name + ".old")
    restore(target)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    yield new
    if target.exists():
        os.rename(target, old)
    os.rename(new, target)
    shutil.rmtree(old, ignore_errors=True)


def restore(target):
    """Undoes a `replacing` that was killed between its two renames. Returns `target` as a Path."""
    target = Path(target)
    old = target.with_name(target.name + ".old")
    if old.exists() and not target.exists():
        os.rename(old, target)
    return target


def write_json(path, value):
    """Writes `value` as JSON, whole or not at all. NaN, which JSON lacks, becomes null."""
    clean = json.loads(json.dumps(value), parse_constant=lambda _: None)
    Path(f"{path}.new").write_text(json.dumps(clean, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(f"{path}.new", path)


def read_json(path):
    """What `write_json` wrote, or {} where there is no such file."""
    return json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).exists() else {}


def write_manifest(folder):
    """Writes manifest.json into `folder`: size and SHA-256 of each file in it. Files are on disk before it is."""
    files = {}
    for path in sorted(Path(folder).iterdir()):
        if path.name == "manifest.json":
            continue
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            files[path.name] = {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    write_json(Path(folder, "manifest.json"), files)


def manifest_problem(folder):
    """Why the files in `folder` aren't those that `write_manifest` saw, or None."""
    try:
        files = read_json(Path(folder, "manifest.json"))
    except ValueError:
        return "manifest.json is corrupt"
    if not files:
        return "manifest.json is missing"
    for name, expected in files.items():
        path = Path(folder, name)
        if not path.exists():
            return f"{name} is missing"
        with open(path, "rb") as file:
            if path.stat().st_size != expected["size"] or hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                return f"{name} is corrupt"
    return None


def save_prompts(folder, prompts):
    """Writes a DatasetDict of prompts into `folder` as train.parquet, val.parquet and test.parquet."""
    for name in SPLITS:
        prompts[name].to_parquet(Path(folder) / f"{name}.parquet", batch_size=50_000)


def load_prompts(folder):
    """The DatasetDict (train, val, test) that `save_prompts` wrote. Raises UserError where a file is damaged."""
    from datasets import DatasetDict, load_dataset
    from datasets.exceptions import DatasetGenerationError

    files = {name: str(Path(folder, f"{name}.parquet")) for name in SPLITS}
    try:
        return load_dataset("parquet", data_files=files)  # memory-mapped, and what is made of it cached
    except (OSError, DatasetGenerationError) as error:
        raise UserError(f"{folder}: not a whole dataset ({error.__cause__ or error}). Run `python app.py prepare` again.") from error


# ---------------------------------------------------------------------------------------------------------------------
# The user's own catalogue


def read_rows(path):
    """(line, row) for each row of a JSONL, CSV or Parquet file; in place of a row that can't be read, why.

    Lines count from 1 as an editor shows them (a CSV's header is line 1), a Parquet file's rows from 1. Raises
    UserError where the file can't be read at all.
    """
    path, ending = Path(path), Path(path).suffix.lower()
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give a .jsonl, .csv or .parquet file.")
    if ending not in (".jsonl", ".json", ".csv", ".parquet"):
        raise UserError(f"{path}: the ending is {ending or 'missing'}; give a .jsonl, .csv or .parquet file.")
    try:
        if ending == ".parquet":
            import pyarrow.parquet

            return list(enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1))
        with open(path, encoding="utf-8-sig", newline="") as file:
            if ending == ".csv":
                return read_csv(file)
            return [(line, json_object(text)) for line, text in enumerate(file, 1) if text.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not in UTF-8 (byte {error.start:,}). Save it as UTF-8; Excel calls that `CSV UTF-8`.") from error
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise UserError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}.") from error


def read_csv(file):
    """`read_rows` of a CSV with a comma, semicolon or tab between cells and a header in upper or lower case."""
    header = file.readline()
    file.seek(0)
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(file, delimiter=max(",;\t", key=header.count), strict=True)
    try:
        names = reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
        if twins := {name for name in names if name and names.count(name) > 1}:
            raise ValueError(f"more than one column is called {' and '.join(sorted(twins))}")
        return [(reader.line_num, "more cells than the header has" if None in row else row) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{error} (line {reader.line_num}; is a quote left open?)") from error


def json_object(text):
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        row = None
    return row if isinstance(row, dict) else "not a JSON object"


def price_problem(price):
    """Why `price` can't be used, in a few words, or None for one within MIN_PRICE … MAX_PRICE dollars."""
    if price is None or price == "":
        return "price is missing"
    if isinstance(price, str) and not re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)\s*", price, re.ASCII):
        return "price is no plain number like 12.99"
    try:
        price = math.nan if isinstance(price, bool) else float(price)
    except (TypeError, ValueError, OverflowError):
        price = math.nan
    if math.isnan(price):
        return "price is no plain number like 12.99"
    if price <= 0:
        return "price is zero or negative"
    return None if MIN_PRICE <= price <= MAX_PRICE else f"price is outside ${MIN_PRICE:.2f}–${MAX_PRICE}"


def text_problem(value, name):
    if not isinstance(value, str) or not value.strip():
        return f"{name} is empty or not text"
    return f"{name} has half a character" if re.search("[\ud800-\udfff]", value) else None


def five_lines(title, category, text):
    """The description in the course's form, unless it has that form already."""
    if text.lstrip().startswith("Title:"):
        return text.strip()
    parts = {"Title": title, "Category": category, "Description": text.strip().removeprefix(title).strip()}
    return "\n".join(f"{name}: {part}" for name, part in parts.items() if part)


def read_catalogue(path, to_price=False):
    """Items of the user's own file, and what was dropped: {reason: [line, …]}.

    Needs the columns `title`, `price` and one of TEXT_COLUMNS; `category` is optional. A duplicate is a row with the
    title, description and price of an earlier one. Items `to_price` may lack their price, None then, and repeat others.
    Raises UserError where a column is missing or no row is usable.
    """
    rows = read_rows(path)
    if not rows:
        raise UserError(f"{path}: holds no rows.")
    columns = dict.fromkeys(column for _, row in rows if isinstance(row, dict) for column in row)
    text_columns = [column for column in TEXT_COLUMNS if column in columns]
    missing = [column for column in ("title", "price")[: 2 - to_price] if column not in columns]
    missing += [] if text_columns else ["a description (" + ", ".join(TEXT_COLUMNS) + ")"]
    if missing and columns:
        raise UserError(f"{path}: no column for {' and '.join(missing)}; found: {', '.join(map(str, columns))}.")

    items, dropped, seen = [], {}, set()
    for line, row in rows:
        text = None if isinstance(row, str) else next((row[name] for name in text_columns if row.get(name)), None)
        problem = row if isinstance(row, str) else (
            text_problem(row.get("title"), "title") or text_problem(text, text_columns[0])
            or (None if to_price and row.get("price") in (None, "") else price_problem(row.get("price"))))
        if not problem:
            title, category = row["title"].strip(), row.get("category")
            category = category.strip() if isinstance(category, str) else ""
            summary, price = five_lines(title, category, text), float(row["price"]) if row.get("price") else None
            problem = "duplicate of an earlier row" if (summary, price) in seen and not to_price else None
        if problem:
            dropped.setdefault(problem, []).append(line)
        else:
            seen.add((summary, price))
            items.append(Item(title, category, price, summary=summary, id=line))
    if not items:
        raise UserError(f"{path}: none of {len(rows):,} rows is usable; {describe(dropped)}.")
    return items, dropped


def own_rows(source, text, tokenizer, cutoff):
    """Rows of the user's own items to price, from the file `source` or the one description `text`, and what was left out:
    {reason: [line, …]}. A row has prompt, completion ('' without a price), line and title."""
    dropped = {}
    if source:
        items, dropped = read_catalogue(source, to_price=True)
    elif text_problem(text, "text"):
        raise UserError("--text: is empty or has half a character. Give a description, in quotes.")
    else:
        title = text.strip().splitlines()[0].removeprefix("Title:").strip()
        items = [Item(title, "", None, summary=five_lines(title, "", text), id=1)]
    for item in items:
        item.make_prompts(tokenizer, cutoff, do_round=False)
    return [{"prompt": item.prompt, "completion": "" if item.price is None else item.completion, "line": item.id,
             "title": item.title} for item in items], dropped


def describe(dropped, most=5):
    """'3 × price is missing (lines 17, 40, 41)' for each reason."""
    return "; ".join(
        f"{len(lines):,} × {reason} (line{'s' * (len(lines) > 1)} {', '.join(map(str, lines[:most]))}"
        f"{', …' if len(lines) > most else ''})" for reason, lines in dropped.items())


def split_by_title(items, seed):
    """(train, val, test) of about 90, 5 and 5 % of the items; equal titles stay in one split. Raises UserError
    where there are fewer than three different titles."""
    by_title = {}
    for item in items:
        by_title.setdefault(" ".join(item.title.casefold().split()), []).append(item)
    if len(by_title) < 3:
        raise UserError(f"{len(by_title)} different title(s): at least 3 are needed to make train, val and test.")
    groups, rng = [by_title[title] for title in sorted(by_title)], random.Random(seed)
    rng.shuffle(groups)
    share, parts = len(items) / 20, ([], [], [])
    for part in parts[1:]:
        while len(groups) > 1 and len(part) < max(1, share):
            part += groups.pop()
    parts[0].extend(item for group in groups for item in group)
    for part in parts:  # so that the first N of a split are a fair sample of it
        rng.shuffle(part)
    return parts


# ---------------------------------------------------------------------------------------------------------------------
# The demo's synthetic catalogue

DEMO_NOISE = 0.25  # standard deviation of the log-normal noise on each price
DEMO_BRANDS = {  # invented brands: (their factor on the price, how the description speaks of them)
    **dict.fromkeys(("Maple", "Harbor", "Cedar"), (0.7, "Basic and affordable")),
    **dict.fromkeys(("Summit", "Atlas", "Pioneer"), (1.0, "Solid and dependable")),
    **dict.fromkeys(("Sterling", "Regal", "Crown"), (1.5, "Premium and finely made")),
}
DEMO_CONDITIONS = {"new": 1.0, "open box": 0.9, "refurbished": 0.75, "used": 0.6}
DEMO_KINDS = {  # category: (kind, dollars in the middle size of a middle brand, unit, sizes)
    "Appliances": (("refrigerator", 560, "cubic feet", 14, 18, 25), ("washing machine", 480, "pounds", 12, 16, 20),
                   ("dishwasher", 440, "settings", 8, 12, 15), ("electric oven", 520, "liters", 45, 60, 75),
                   ("freezer", 380, "cubic feet", 5, 7, 14), ("air conditioner", 410, "square feet", 150, 350, 700)),
    "Electronics": (("laptop computer", 540, "GB", 8, 16, 32), ("television", 460, "inches", 32, 50, 65),
                    ("smartphone", 520, "GB", 64, 128, 256), ("computer monitor", 230, "inches", 22, 27, 32),
                    ("digital camera", 430, "megapixels", 16, 24, 45), ("game console", 390, "GB", 500, 1000, 2000)),
    "Furniture": (("sofa", 540, "seats", 2, 3, 4), ("mattress", 450, "inches", 8, 10, 12),
                  ("dining table", 380, "seats", 4, 6, 8), ("wardrobe", 340, "doors", 2, 3, 4),
                  ("desk", 260, "inches", 40, 48, 60), ("bookcase", 120, "shelves", 3, 5, 6)),
    "Accessories": (("flash drive", 14, "GB", 32, 64, 128), ("phone charger", 18, "watts", 20, 30, 65),
                    ("mouse pad", 11, "inches", 9, 12, 31), ("charging cable", 10, "feet", 3, 6, 10),
                    ("earbuds", 28, "hours", 20, 30, 50), ("power strip", 20, "outlets", 4, 6, 12)),
    "Kitchen": (("frying pan", 28, "inches", 8, 10, 12), ("chef knife", 32, "inches", 6, 8, 10),
                ("mixing bowl", 17, "quarts", 2, 3, 5), ("water bottle", 16, "ounces", 16, 24, 40),
                ("cutting board", 21, "inches", 10, 14, 18), ("coffee maker", 60, "cups", 4, 8, 12)),
    "Toys": (("building blocks", 30, "pieces", 150, 400, 900), ("jigsaw puzzle", 15, "pieces", 300, 1000, 2000),
             ("teddy bear", 20, "inches", 10, 16, 30), ("board game", 28, "players", 2, 4, 8)),
    "Tools": (("screwdriver", 10, "inches", 4, 6, 8), ("tape measure", 12, "feet", 12, 25, 35),
              ("tool box", 32, "inches", 13, 16, 22), ("cordless drill", 85, "volts", 12, 18, 20),
              ("ladder", 75, "feet", 4, 6, 8), ("garden hose", 30, "feet", 25, 50, 100)),
    "Sports": (("treadmill", 540, "horsepower", 2, 2.5, 3.5), ("mountain bike", 480, "gears", 7, 21, 24),
               ("rowing machine", 420, "levels", 8, 12, 16), ("camping tent", 140, "persons", 2, 4, 8)),
}


def demo_items(n, seed, noise=DEMO_NOISE):
    """`n` items of a synthetic catalogue, the same for the same seed: invented brands, everyday kinds of product.

    Price = what such a thing costs × brand × √(size / middle size) × condition × log-normal noise, within
    $5 … $999. With `noise=0` the same items come with the price that their wording implies, the median of what they
    may cost: the mean distance between the two is the best mean absolute error that any model can reach.
    """
    rng = random.Random(seed)
    kinds = [(category, *kind) for category, group in DEMO_KINDS.items() for kind in group]
    items = []
    for number in range(n):
        category, kind, dollars, unit, *sizes = rng.choice(kinds)
        brand, size, condition = rng.choice(list(DEMO_BRANDS)), rng.choice(sizes), rng.choice(list(DEMO_CONDITIONS))
        factor, praise = DEMO_BRANDS[brand]
        price = dollars * factor * math.sqrt(size / sizes[1]) * DEMO_CONDITIONS[condition]
        price = round(min(999.0, max(5.0, price * math.exp(noise * rng.gauss(0, 1)))), 2)
        title = f"{brand} {kind}, {size:g} {unit}"
        summary = (f"Title: {title}\nCategory: {category}\nBrand: {brand}\n"
                   f"Description: {praise}.\nDetails: {condition}")
        items.append(Item(title, category, price, summary=summary, id=number))
    return items
