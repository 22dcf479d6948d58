"""Prompts letter by letter, catalogues row by row, and files that are complete or not there."""

import gzip
import json
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from decimal import Decimal

import pandas
import pyarrow
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

import child
from items import (
    DEMO_KINDS,
    MANIFEST,
    Item,
    OwnCatalogue,
    Problems,
    UserError,
    build_prompts,
    check_columns,
    completion_tokens,
    demo_items,
    encode_rows,
    finish_interrupted_replace,
    first_tokens,
    item_splits,
    load_prompts,
    manifest_problem,
    prompt_of,
    read_catalogue,
    read_prompts,
    replacing,
    save_prompts,
    split_by_title,
    tokenise,
    truncate,
    write_json,
    write_manifest,
)

SUMMARY = (
    "Title: Walnut desk\nCategory: Furniture\nBrand: Cedar\n"
    "Description: Solid and dependable.\nDetails: 48 inches"
)
QUESTION = "What does this cost to the nearest dollar?"


def make_item(price=219.0, title="Walnut desk"):
    return Item(title, "Furniture", price, summary=SUMMARY)


# Items and prompts


def test_repr_is_the_courses():
    assert repr(make_item()) == "<Walnut desk = $219.0>"


def test_prompt_letter_by_letter(tokenizer):
    item = make_item(218.51)
    item.make_prompts(tokenizer, 110, do_round=True)
    assert item.to_datapoint() == {
        "prompt": f"{QUESTION}\n\n{SUMMARY}\n\nPrice is $",
        "completion": "219.00",
    }


@pytest.mark.parametrize(
    "price, rounded",
    [
        (0.5, "0.00"),
        (1.5, "2.00"),
        (2.5, "2.00"),
        (218.5, "218.00"),
        (219.5, "220.00"),
        (999.49, "999.00"),
        (64.3, "64.00"),
    ],
)
def test_prices_round_half_to_even(smol_tokenizer, price, rounded):
    """Where rounding is asked for; otherwise the completion is the price as it is."""
    item = make_item(price)
    item.make_prompts(smol_tokenizer, 110, do_round=True)
    assert item.completion == rounded
    item.make_prompts(smol_tokenizer, 110, do_round=False)
    assert item.completion == str(price)


def test_summary_is_cut_at_max_tokens(tokenizer):
    """A summary of exactly so many tokens stays, one of one more loses its last token."""
    item = make_item()
    length = item.count_tokens(tokenizer)
    item.make_prompts(tokenizer, length, do_round=True)
    assert item.prompt == f"{QUESTION}\n\n{SUMMARY}\n\nPrice is $"

    item.make_prompts(tokenizer, length - 1, do_round=True)
    ids = tokenizer.encode(SUMMARY, add_special_tokens=False)
    kept = tokenizer.decode(ids[:-1]).rstrip()
    assert kept != SUMMARY
    assert item.prompt == f"{QUESTION}\n\n{kept}\n\nPrice is $"


def test_cut_summary_is_right_stripped(tokenizer):
    ids = tokenizer.encode(SUMMARY, add_special_tokens=False)
    beginnings = [tokenizer.decode(ids[:length]) for length in range(1, len(ids))]
    cut = next(text for text in beginnings if text[-1].isspace())
    item = make_item()
    item.make_prompts(tokenizer, beginnings.index(cut) + 1, do_round=True)
    assert item.prompt == f"{QUESTION}\n\n{cut.rstrip()}\n\nPrice is $"


@pytest.mark.parametrize("name, summary, whole", [("llama", 24, 40), ("smol", 28, 50)])
def test_known_item_has_known_lengths(request, name, summary, whole):
    """Tokens of the summary and of prompt and completion, special tokens not counted."""
    tokenizer = request.getfixturevalue(f"{name}_tokenizer")
    item = make_item()
    item.make_prompts(tokenizer, 110, do_round=True)
    assert item.count_tokens(tokenizer) == summary
    assert item.count_prompt_tokens(tokenizer) == whole


def test_prompt_tokens_begin_the_row(tokenizer):
    """The model meets the same tokens in training and when it is asked."""
    item = make_item()
    item.make_prompts(tokenizer, 110, do_round=True)
    prompt = tokenizer.encode(item.prompt)
    row = tokenizer.encode(item.prompt + item.completion)
    assert row[: len(prompt)] == prompt


def test_batches_agree_with_single_items(tokenizer):
    """Prompts, cuts and token counts, whether few, some or nearly no items are short enough."""
    items = demo_items(200, seed=3)
    items[5].summary = " two spaces and a line after\n\n"
    items[6].summary = 40 * "antidisestablishmentarianism "
    items[7].summary = 600 * "a"
    one = items[:1]
    lengths = sorted(item.count_tokens(tokenizer) for item in items)
    for cutoff in (5, lengths[70], lengths[-2]):
        prompts, counts = build_prompts(item_splits(items, one, one), tokenizer, cutoff)
        for item in items:
            item.make_prompts(tokenizer, cutoff, do_round=True)
        found = counts["train"]
        assert list(prompts["train"]) == [item.to_datapoint() for item in items]
        assert list(found["cut"]) == [item.count_tokens(tokenizer) > cutoff for item in items]
        assert list(found["tokens"]) == [item.count_prompt_tokens(tokenizer) for item in items]


@given(
    words=st.lists(st.text(min_size=1, max_size=9), min_size=1, max_size=40),
    repeats=st.integers(1, 12),
    spaces=st.sampled_from([" ", "  ", "\n", " \n ", ""]),
)
@example(words=["antidisestablishmentarianism"], repeats=12, spaces="")
@example(words=["价格"], repeats=12, spaces="")
@example(words=["internationalization"], repeats=12, spaces=" ")
@example(words=["<|endoftext|>", "lamp"], repeats=12, spaces=" ")
@settings(deadline=None, max_examples=200)
def test_long_text_is_cut_as_whole(tokenizers, words, repeats, spaces):
    """Only its beginning is tokenised, yet what is kept is what all of its tokens would give."""
    text = spaces.join(repeats * words)
    for tokenizer in tokenizers:
        for cutoff in (3, 10, 30):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            kept = tokenizer.decode(ids[:cutoff]).rstrip() if len(ids) > cutoff else text
            assert truncate([text], tokenizer, cutoff) == [kept]


def test_long_text_costs_its_beginning(smol_tokenizer):
    """A description of a megabyte isn't tokenised to its end."""
    text = 200_000 * "word "
    (ids,) = first_tokens([text], smol_tokenizer, 110)
    assert 110 < len(ids) < 600


def test_long_words_need_longer_beginnings(smol_tokenizer):
    text = 50 * "internationalization "
    (ids,) = first_tokens([text], smol_tokenizer, 8)
    assert ids == smol_tokenizer(text)["input_ids"][: len(ids)]
    assert len(ids) > 8


def test_tokens_of_first_rows_count(smol_tokenizer, monkeypatch):
    monkeypatch.setattr("items.MAX_COUNTED", 2)
    items = demo_items(5, seed=3)
    _, counts = build_prompts(item_splits(items, items, items), smol_tokenizer, 110)
    assert len(counts["train"]["tokens"]) == 2
    assert len(counts["train"]["price"]) == 5


def test_only_train_and_val_are_rounded(smol_tokenizer):
    items = [make_item(10.25 + i) for i in range(3)]
    prompts, counts = build_prompts(item_splits(items, items, items), smol_tokenizer, 110)
    assert prompts["train"]["completion"][:] == ["10.00", "11.00", "12.00"]
    assert prompts["val"]["completion"][:] == ["10.00", "11.00", "12.00"]
    assert prompts["test"]["completion"][:] == ["10.25", "11.25", "12.25"]
    assert prompts["test"].column_names == ["prompt", "completion"]
    assert list(counts["train"]["price"]) == [10.25, 11.25, 12.25]


# Tokens to train on


def test_only_completions_are_labelled(tokenizer):
    """Rows are prompt, completion and end of text; the labels are the last two's tokens."""
    items = demo_items(40, seed=1)
    prompts, _ = build_prompts(item_splits(items, items, items), tokenizer, 30)
    rows = tokenise(prompts["train"], tokenizer, "train")
    for row, source in zip(rows, prompts["train"], strict=True):
        answer = source["completion"] + tokenizer.eos_token
        labelled = [label for label in row["labels"] if label != -100]
        unlabelled = [-100] * (len(row["input_ids"]) - len(labelled))
        assert row["input_ids"] == tokenizer.encode(source["prompt"] + answer)
        assert tokenizer.decode(labelled) == answer
        assert row["labels"] == unlabelled + labelled
        assert row["input_ids"][-len(labelled) :] == labelled


COMPLETIONS = ["0.00", "7.00", "64.3", "219.00", "999.49", "7.00"]


def test_completion_tokens_end_the_row(tokenizer):
    """They are the last tokens of prompt + completion + end of text."""
    prompts = [prompt_of(SUMMARY)] * len(COMPLETIONS)
    rows = encode_rows(prompts, COMPLETIONS, tokenizer)
    found = completion_tokens(COMPLETIONS, tokenizer)
    texts = [tokenizer.decode(ids) for ids in found]
    assert texts == [text + tokenizer.eos_token for text in COMPLETIONS]
    assert found == [row[-len(ids) :] for row, ids in zip(rows, found, strict=True)]


def test_completion_tokens_have_no_space():
    """Not with a tokenizer either that puts a space before each text, as Llama 2's does."""
    characters = sorted(set(prompt_of(SUMMARY) + "".join(COMPLETIONS)) - {" "})
    vocabulary = {token: i for i, token in enumerate(["</s>", "▁", *characters])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    spaces = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence(list(spaces))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert tokenizer.tokenize("7") == ["▁", "7"]

    found = completion_tokens(["7"], tokenizer)
    assert found == [tokenizer.convert_tokens_to_ids(["7", "</s>"])]
    assert encode_rows([prompt_of(SUMMARY)], ["7"], tokenizer)[0][-2:] == found[0]


# The user's own catalogue

NO_NUMBER = "price is no number"
OUTSIDE = "price is outside $0.50–$999.49"
BAD_ROWS = [  # from line 2 on
    ('{"title": "B", "text": "b"}', "price is missing"),
    ('{"title": "B", "text": "b", "price": null}', "price is missing"),
    ('{"title": "B", "text": "b", "price": 0}', "price is zero or negative"),
    ('{"title": "B", "text": "b", "price": -3}', "price is zero or negative"),
    ('{"title": "B", "text": "b", "price": NaN}', "price is missing"),
    ('{"title": "B", "text": "b", "price": "about ten"}', NO_NUMBER),
    ('{"title": "B", "text": "b", "price": true}', NO_NUMBER),
    ('{"title": "B", "text": " ", "price": 3}', "text is empty or not text"),
    ('{"title": "", "text": "b", "price": 3}', "title is empty or not text"),
    ('{"title": "B", "text": "b", "price": 0.49}', OUTSIDE),
    ('{"title": "B", "text": "b", "price": 999.5}', OUTSIDE),
    ('{"title": "B", "text": "b", "price": 3', "not a JSON object"),
    ("[1, 2]", "not a JSON object"),
    (f'{{"title": "B", "text": "b", "price": 1{"0" * 400}}}', NO_NUMBER),
    ('{"title": "B \\ud800", "text": "b", "price": 3}', "title has an incomplete character"),
    ('{"title": "A", "text": "a", "price": 1.5}', "duplicate of an earlier row"),
]


def test_bad_rows_are_named_by_line(tmp_path):
    """They are dropped, each reason with its lines; the rows beside them are kept."""
    lines = [
        '{"title": "A", "text": "a", "price": 1.5}',
        *(line for line, _ in BAD_ROWS),
        '{"title": "Z", "text": "z", "price": "0.50"}',
        "",
        '{"title": "Y", "text": "y", "price": 999.49}',
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(lines))
    items, dropped = read_catalogue(path)

    found = [(item.id, item.title, item.price) for item in items]
    assert found == [(1, "A", 1.5), (18, "Z", 0.5), (20, "Y", 999.49)]
    expected = {}
    for line, (_, reason) in enumerate(BAD_ROWS, 2):
        expected.setdefault(reason, []).append(line)
    assert dropped == expected


@pytest.mark.parametrize("column", ["summary", "text", "description"])
@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_all_formats_give_equal_items(tmp_path, ending, column):
    """Whichever of the three columns for texts they have."""
    path = tmp_path / f"own.{ending}"
    columns = {
        "title": ["Lamp", "Sofa, red"],
        "price": [12.5, 300.0],
        column: ["Brass.\nTall.", "Soft."],
        "category": ["Light", "Seat"],
    }
    table = pandas.DataFrame(columns)
    if ending == "jsonl":
        table.to_json(path, orient="records", lines=True)
    elif ending == "csv":
        table.to_csv(path, index=False)
    else:
        table.to_parquet(path)
    items, dropped = read_catalogue(path)
    assert dropped == {}
    found = [(item.title, item.category, item.price) for item in items]
    assert found == [("Lamp", "Light", 12.5), ("Sofa, red", "Seat", 300.0)]
    assert items[0].summary == "Title: Lamp\nCategory: Light\nDescription: Brass.\nTall."


@pytest.mark.parametrize("separator", [",", ";", "\t"], ids=["comma", "semicolon", "tab"])
def test_csv_separators_and_capitals_vary(tmp_path, separator):
    """A row with more cells than the header is named by its line."""
    rows = [
        (" Title", "Price", "DESCRIPTION "),
        ("Lamp", "12.5", "Brass"),
        ("Sofa", "30", "red", "soft"),
        ("Bed", "1_0", "x"),
    ]
    path = tmp_path / "own.csv"
    path.write_text("\n".join(separator.join(row) for row in rows))
    items, dropped = read_catalogue(path)
    assert [(item.title, item.price) for item in items] == [("Lamp", 12.5)]
    words = "price has other words or numbers beside it"
    assert dropped == {"more cells than the header has": [3], words: [4]}


def test_course_descriptions_stay_unchanged(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"title": "Walnut desk", "summary": SUMMARY, "price": 1}))
    items, _ = read_catalogue(path)
    assert items[0].summary == SUMMARY


def test_course_rows_make_the_courses_prompts(tmp_path, smol_tokenizer):
    """Letter by letter, with whatever stands in them."""
    summary = "Title: Desk\nCategory: a &amp; b\nBrand:  <b>C</b>\n\nDescription: x   y &lt; z"
    row = {"title": " Desk", "category": "c", "summary": summary, "price": 7.0}
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(row))
    catalogue = OwnCatalogue(path)
    (item,) = catalogue.items()
    item.make_prompts(smol_tokenizer, 110, do_round=True)
    assert item.prompt == f"{QUESTION}\n\n{summary}\n\nPrice is $"
    assert not catalogue.changes


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("own.jsonl", b'{"title": "A", "text": "a"}', "no column for price; found: title, text."),
        ("own.jsonl", b'{"title": "A", "price": 1}', "no column for a description"),
        ("own.jsonl", b'{"a": "A"}', "title=NAME price=NAME text=NAME, and category=NAME if"),
        ("own.jsonl", b"", "holds no rows"),
        ("own.csv", b"title,price,text\n", "holds no rows"),
        ("own.json", b'{\n"title": "A"\n}', "none of 3 rows is a JSON object"),
        ("own.json", b"[1, 2]", "none of 1 rows is a JSON object"),
        ("own.json", b'[{"title": "A"},\n{"title": "B" "text"}]', "delimiter (line 2)"),
        ("own.json", b'[{"title": "A"}\n{"title": "B"}]', "expected behind an object (line 2)"),
        ("own.csv.gz", b"title,price,text\n", "can't be read: Not a gzipped file"),
        ("own.csv.gz", gzip.compress(b"title,price,text\n" * 9, mtime=0)[:-9], "can't be read: "),
        ("own.csv", b"PK\x03\x04...", "is a spreadsheet or ZIP file. Save it as `CSV UTF-8`"),
        ("own.jsonl", b'{"title": "A", "text": "a", "price": 0}', "none of 1 rows is usable"),
        ("own.parquet", b"no parquet", "can't be read: "),
        ("own.csv", b"title,price,text\n\xff\xfe,1,2", "not in UTF-8 (byte 17)"),
        ("own.csv", b'title,price,text\na,1,"b\nc,2,d\n', "is a quote left open?"),
        ("own.csv", b"title,price,Price,text\na,1,2,b\n", "more than one column is called price"),
        ("own.xlsx", b"", "the ending is .xlsx. Save it as `CSV UTF-8`"),
        ("missing.csv", None, "can't be read: No such file"),
    ],
)
def test_bad_file_is_one_line(tmp_path, name, content, expected):
    """A file of no use is named and explained in one line."""
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_catalogue(path)
    text = str(error.value)
    assert text.startswith(f"{path}: ")
    assert expected in text
    assert "\n" not in text


def random_items():
    """2,000 items with some 300 titles, written in two ways."""
    rng = random.Random(0)
    titles = [f"t{rng.randrange(300)}" for _ in range(2000)]
    variants = [title if rng.random() < 0.5 else f"  {title.upper()} " for title in titles]
    items = [make_item(title=title) for title in variants]
    for item in items:
        item.summary = f"Title: {item.title}"
    return items


def test_equal_titles_share_a_split():
    """Capitals and spaces don't count; the splits are about 90, 5 and 5 %."""
    parts = split_by_title(random_items(), seed=1)
    train, val, test = ({item.title.lower().strip() for item in part} for part in parts)
    assert train.isdisjoint(val)
    assert train.isdisjoint(test)
    assert val.isdisjoint(test)
    assert sum(len(part) for part in parts) == 2000
    assert 90 <= len(parts[1]) <= 120
    assert 90 <= len(parts[2]) <= 120


def test_split_depends_on_the_seed():
    parts = split_by_title(random_items(), seed=1)
    assert split_by_title(random_items(), seed=1) == parts
    assert split_by_title(random_items(), seed=2) != parts


def test_three_titles_fill_every_split():
    items = [Item(title, "", 1.0, summary=f"Title: {title}") for title in "abc"]
    parts = split_by_title(items, seed=0)
    assert [len(part) for part in parts] == [1, 1, 1]


def test_two_titles_are_too_few():
    with pytest.raises(UserError, match="at least 3"):
        split_by_title([make_item(title=title) for title in "ab"], seed=0)


# Prompts as people publish them


def splits_of(completions, prompts=None):
    """A DatasetDict with these rows in `test`, and one that is fine in the other splits."""
    prompt = prompt_of("Title: Lamp")
    fine = Dataset.from_dict({"prompt": [prompt], "completion": ["5.00"], "more": [1]})
    table = {"prompt": prompts or [prompt] * len(completions), "completion": completions}
    test = Dataset(pyarrow.table(table))
    return DatasetDict({"train": fine, "val": fine, "test": test})


@pytest.mark.parametrize(
    "published, read",
    [
        (["219.00", "5", "0.5", "999.49", "19.995"], ["219.00", "5", "0.5", "999.49", "19.995"]),
        (["$219", "$ 5.5", " 7\n", "3.", ".99", "007", "1"], "219.00 5.50 7.00 3.00 0.99 7.00 1"),
        ([219.0, 19.99, 0.0], "219.00 19.99 0.00"),
        (pyarrow.array([19.99], "float32"), "19.99"),
        ([219, 5], "219.00 5.00"),
        ([Decimal("5.10")], "5.10"),
        (pyarrow.array(["$5", "6.00"], "large_string"), "5.00 6.00"),
    ],
)
def test_completions_are_read_as_meant(published, read):
    """Plain ones letter by letter; other columns are left out."""
    splits = read_prompts("a/b", splits_of(published))
    assert list(splits["test"]["completion"]) == (read.split() if isinstance(read, str) else read)
    for split in splits.values():
        assert set(split.column_names) == {"prompt", "completion"}


@pytest.mark.parametrize(
    "bad",
    ["1,299.00", "$1,299", None, "nan", "", "12 USD", "1e2", "-5", "999.50", "five", "١٢"],
)
def test_text_that_is_no_price_is_named(bad):
    with pytest.raises(UserError) as refusal:
        read_prompts("a/b", splits_of(["5.00", "$6", bad, bad]))
    line = f"a/b: row 3 of test: the completion {bad!r} is no price from $0 to $999.49, like 219.00"
    assert str(refusal.value).startswith(f"{line}. 2 of 6 rows can't be used: correct")


@pytest.mark.parametrize(
    "bad", [float("nan"), None, -1.0, 1299.0, float("inf"), True, [{"role": "x", "content": "5"}]]
)
def test_other_value_that_is_no_price_is_named(bad):
    first = [] if isinstance(bad, bool | list) else [5.0]
    with pytest.raises(UserError) as refusal:
        read_prompts("a/b", splits_of([*first, bad]))
    line = f"a/b: row {len(first) + 1} of test: the completion {bad!r} is no price"
    assert str(refusal.value).startswith(line)


@pytest.mark.parametrize("bad", ["What does it cost?", None, [{"role": "user", "content": "x"}]])
def test_prompt_without_prefix_is_named(bad):
    with pytest.raises(
        UserError, match="^a/b: row 1 of test: the prompt .*`Price is \\$`"
    ) as refusal:
        read_prompts("a/b", splits_of(["5.00"], [bad]))
    assert repr(bad) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_blanks_behind_the_prefix_are_cut():
    prompt = prompt_of("Title: Lamp")
    splits = read_prompts("a/b", splits_of(["5.00"], [f"{prompt} \n"]))
    assert splits["test"]["prompt"][0] == prompt


def test_split_without_rows_is_named():
    splits = splits_of(["5.00"])
    splits["val"] = splits["val"].select([])
    with pytest.raises(UserError, match="a/b: val without rows"):
        check_columns("a/b", splits, ("train", "val", "test"), ("prompt", "completion"))


def test_full_dataset_is_read_in_seconds():
    """800,000 rows, all written differently."""
    rows = 800_000
    splits = splits_of(["$219"] * rows, [f"{row} {prompt_of('Lamp')}" for row in range(rows)])
    start = time.time()
    read_prompts("a/b", splits)
    assert time.time() - start < 3


# Files that are never half


def save_demo_prompts(folder, tokenizer):
    """Writes a small dataset into the folder; returns what was written."""
    items = demo_items(30, seed=0)
    splits = item_splits(items[:20], items[20:25], items[25:])
    prompts, _ = build_prompts(splits, tokenizer, 110)
    save_prompts(folder, prompts, {"source": "a test"})
    return prompts


def test_saved_prompts_load_unchanged(tmp_path, smol_tokenizer):
    prompts = save_demo_prompts(tmp_path, smol_tokenizer)
    loaded = load_prompts(tmp_path)
    assert set(loaded) == {"train", "val", "test"}
    for name, split in loaded.items():
        assert list(split) == list(prompts[name])


def test_corrupt_dataset_is_one_line(tmp_path, smol_tokenizer):
    save_demo_prompts(tmp_path, smol_tokenizer)
    (tmp_path / "val.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(UserError, match="corrupt or incomplete.*Run the stage `prepare`"):
        load_prompts(tmp_path)


def test_error_keeps_the_old_folder(tmp_path):
    """What was half written when the error came doesn't count."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a").write_text("old")
    with pytest.raises(KeyError), replacing(folder) as new:
        (new / "a").write_text("half")
        raise KeyError
    assert finish_interrupted_replace(folder) == folder
    assert (folder / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["data"]


FORK = multiprocessing.get_context("fork")  # the child has nothing to import
FILE_EVENTS = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree")


def write_files(folder, text):
    for name in "abc":
        (folder / name).write_text(text)
    write_json(folder / "d.json", text)


def replace_until_killed(folder, moments):
    """Replaces `folder`; is killed when as many files beside it were touched as `moments` says."""
    remaining = iter(range(moments))

    def audit(event, arguments):
        if event not in FILE_EVENTS or str(folder.parent) not in str(arguments[0]):
            return
        if next(remaining, None) is None:
            child.kill()

    sys.addaudithook(audit)
    with replacing(folder) as new:
        write_files(new, "new")


def test_killed_replace_leaves_whole_folder(tmp_path):
    """The old or the new one, whichever the moment of the kill."""
    seen = Counter()
    for moments in range(40):
        folder = tmp_path / str(moments) / "data"
        folder.mkdir(parents=True)
        write_files(folder, "old")
        process = FORK.Process(target=replace_until_killed, args=(folder, moments))
        process.start()
        was_killed = child.finish(process) != 0

        finish_interrupted_replace(folder)
        texts = {path.name: path.read_text().strip('"\n') for path in folder.iterdir()}
        assert sorted(texts) == ["a", "b", "c", "d.json"]
        assert len(set(texts.values())) == 1
        seen[was_killed, texts["a"]] += 1
        if not was_killed:
            break
    assert seen[True, "old"] >= 6
    assert seen[True, "new"] >= 1
    assert seen[False, "new"] == 1
    assert seen[False, "old"] == 0


def test_json_is_replaced_as_a_whole(tmp_path):
    """A value that JSON can't hold leaves the old file, and nothing beside it."""
    path = tmp_path / "a.json"
    write_json(path, {"x": [1.5, "§"]})
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert json.loads(path.read_text("utf-8")) == {"x": [1.5, "§"]}
    assert os.listdir(tmp_path) == ["a.json"]


def test_nan_is_null_in_json(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": float("nan"), "y": 1.5})
    assert json.loads(path.read_text("utf-8")) == {"x": None, "y": 1.5}


@pytest.fixture()
def sealed(tmp_path):
    """A folder with two files and a manifest."""
    (tmp_path / "state.json").write_text('{"step": 3}')
    (tmp_path / "weights.bin").write_bytes(bytes(range(256)) * 16)
    write_manifest(tmp_path)
    return tmp_path


def remove_weights(folder):
    (folder / "weights.bin").unlink()


def cut_weights(folder):
    os.truncate(folder / "weights.bin", 1000)


def flip_a_byte(folder):
    content = bytearray((folder / "weights.bin").read_bytes())
    content[1234] ^= 1
    (folder / "weights.bin").write_bytes(content)


def remove_manifest(folder):
    (folder / MANIFEST).unlink()


def cut_manifest(folder):
    os.truncate(folder / MANIFEST, 100)


def empty_manifest(folder):
    os.truncate(folder / MANIFEST, 0)


def test_sealed_folder_has_no_problem(sealed):
    """Nor does one that is sealed again, or has files that came later."""
    assert manifest_problem(sealed) is None
    write_manifest(sealed)
    (sealed / "later.txt").write_text("later")
    assert manifest_problem(sealed) is None


DAMAGES = {
    remove_weights: "weights.bin is missing",
    cut_weights: "weights.bin is corrupt",
    flip_a_byte: "weights.bin is corrupt",
    remove_manifest: "manifest.json is missing",
    cut_manifest: "manifest.json is corrupt",
    empty_manifest: "manifest.json is corrupt",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_manifest_notices_damage(sealed, damage):
    damage(sealed)
    assert manifest_problem(sealed) == DAMAGES[damage]


# Problems


def test_problems_are_reported_at_once():
    """One line each in the order of the checks, equal ones once; what passes is not listed."""
    problems = Problems()
    passed = []
    for text in ("--source: missing", None, "HF_TOKEN: refused", "--source: missing"):
        with problems:
            if text:
                raise UserError(text)
            passed.append(text)
    with pytest.raises(UserError) as error:
        problems.report()
    assert str(error.value) == "--source: missing\nHF_TOKEN: refused"
    assert passed == [None]


def test_no_problem_reports_nothing():
    problems = Problems()
    with problems:
        pass
    problems.report()


def test_other_errors_pass_through():
    """A mistake in the program is no problem that a user could mend."""
    with pytest.raises(KeyError), Problems():
        raise KeyError


# The demo's synthetic catalogue


def test_demo_depends_on_the_seed():
    items = demo_items(500, seed=7)
    assert demo_items(500, seed=7) == items
    assert demo_items(500, seed=8) != items


def test_demo_items_are_usable():
    """Descriptions have the course's five lines, prices are within $5 … $999."""
    kinds = [kind for group in DEMO_KINDS.values() for kind in group]
    assert 40 <= len(kinds) <= 60
    starts = ["Title", "Category", "Brand", "Description", "Details"]
    for item in demo_items(500, seed=7):
        assert [line.split(": ")[0] for line in item.summary.splitlines()] == starts
        assert 5 <= item.price <= 999


def test_demo_wording_implies_the_price():
    """Without noise equal wordings have equal prices; noise spreads about that price."""
    items = demo_items(500, seed=7)
    implied = demo_items(500, seed=7, noise=0)
    assert [item.summary for item in implied] == [item.summary for item in items]
    price_of = {item.summary: item.price for item in implied}
    assert [item.price for item in implied] == [price_of[item.summary] for item in implied]

    ratios = sorted(item.price / price_of[item.summary] for item in items)
    assert ratios[40] < 0.85
    assert 0.95 < ratios[250] < 1.05
    assert ratios[460] > 1.15
