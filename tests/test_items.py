"""Prompts, tokens and published rows; files that are complete or not there."""

import glob
import hashlib
import json
import multiprocessing
import os
import sys
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

import child
import items
from conftest import flip
from items import (
    MANIFEST,
    Item,
    Prompts,
    UserError,
    build_prompts,
    completion_tokens,
    demo_items,
    fingerprint,
    finish_interrupted_replace,
    item_splits,
    prompt_of,
    read_prompts,
    read_rows,
    replacing,
    save_prompts,
    tokenise,
    truncate,
    write_json,
    write_manifest,
)

SUMMARY = (
    "Title: Walnut desk\nCategory: Furniture\nBrand: Cedar\n"
    "Description: Solid and dependable.\nDetails: 48 inches"
)


def make_item(price):
    return Item(title="Walnut desk", category="Furniture", price=price, summary=SUMMARY)


# Items and prompts


def test_batches_agree_with_single_items(tokenizer):
    """Prompts and cuts, whether few, some or nearly no items are short enough."""
    items = demo_items(200, seed=3)
    items[5].summary = " two spaces and a line after\n\n"
    items[6].summary = 40 * "antidisestablishmentarianism "
    items[7].summary = 600 * "a"
    one = items[:1]
    lengths = sorted(item.count_tokens(tokenizer) for item in items)
    for cutoff in (5, lengths[70], lengths[-2]):
        prompts, cut = build_prompts(item_splits(items, one, one), tokenizer, cutoff)
        for item in items:
            item.make_prompts(tokenizer, cutoff, do_round=True)
        assert list(prompts["train"]) == [item.to_datapoint() for item in items]
        assert cut["train"] == sum(item.count_tokens(tokenizer) > cutoff for item in items)


@pytest.mark.parametrize("word", ["word ", "價格", "x🧉", "<|endoftext|> lamp\n"])
def test_long_text_is_cut_as_whole(tokenizers, word):
    """Only its beginning is tokenised, yet what is kept is what all of its tokens would give.

    It ends with a whole character.
    """
    text = 100 * word
    for tokenizer in tokenizers:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for count in (30, 31, 32):
            (kept,) = truncate([text], tokenizer, count)
            assert kept == tokenizer.decode(ids[:count]).rstrip("\ufffd").rstrip()
            assert text.startswith(kept)


def test_only_train_and_val_are_rounded(smol_tokenizer):
    items = [make_item(10.25 + i) for i in range(3)]
    prompts, _ = build_prompts(item_splits(items, items, items), smol_tokenizer, 110)
    assert prompts["train"]["completion"][:] == ["10.00", "11.00", "12.00"]
    assert prompts["val"]["completion"][:] == ["10.00", "11.00", "12.00"]
    assert prompts["test"]["completion"][:] == ["10.25", "11.25", "12.25"]
    assert prompts["test"].column_names == ["prompt", "completion"]


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


def test_completion_tokens_have_no_space():
    """Not with a tokenizer either that puts a space before each text, as Llama 2's does."""
    characters = sorted(set(prompt_of(SUMMARY) + "7") - {" "})
    vocabulary = {token: i for i, token in enumerate(["</s>", "▁", *characters])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    spaces = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence(list(spaces))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert tokenizer.tokenize("7") == ["▁", "7"]

    found = completion_tokens(["7"], tokenizer)
    assert found == [tokenizer.convert_tokens_to_ids(["7", "</s>"])]
    assert tokenizer(prompt_of(SUMMARY) + "7</s>")["input_ids"][-2:] == found[0]


# Prompts as people publish them

FINE = {"prompt": [prompt_of("Title: Lamp")], "completion": ["5.00"]}


def splits_of(completions, prompts=None, split="test"):
    """A DatasetDict with these rows in `split`, and one that is fine in the others."""
    prompts = prompts or FINE["prompt"] * len(completions)
    splits = DatasetDict({name: Dataset.from_dict(FINE) for name in items.SPLITS})
    columns = {"prompt": prompts, "completion": completions, "more": [1] * len(prompts)}
    splits[split] = Dataset.from_dict(columns)
    return splits


@pytest.mark.parametrize(
    "published, in_test, in_train",
    [
        (["219.00", "0.5", "19.995", "5"], "219.00 0.5 19.995 5", "219.00 0.00 20.00 5"),
        (["$219", "$5.5", "3.00"], "219.00 5.50 3.00", "219.00 6.00 3.00"),
        ([219.0, 19.99, 2.5, 0.0], "219.00 19.99 2.50 0.00", "219.00 20.00 2.00 0.00"),
        ([219, 5], "219.00 5.00", "219.00 5.00"),
        ([Decimal("5.10")], "5.10", "5.00"),
    ],
)
def test_completions_are_read_as_meant(capsys, published, in_test, in_train):
    """Plain ones letter by letter, cents in training rows rounded; other columns are left out."""
    test = read_rows("a/b", splits_of(published))["test"]
    assert test["completion"][:] == in_test.split()
    assert test.column_names == ["prompt", "completion"]
    train = read_rows("a/b", splits_of(published, split="train"))["train"]
    assert train["completion"][:] == in_train.split()
    assert "completions are read as whole numbers" in capsys.readouterr().out


NO_PRICES = ("1,299.00", "nan", "12 USD", "1e2", "-5", "999.50", "١٢", None, -1.0, 1299.0, True)
NO_PROMPTS = ("What does it cost?", f"{FINE['prompt'][0]} ", None, [{"x": "y"}])


@pytest.mark.parametrize(
    "prompt, completion",
    [(FINE["prompt"][0], bad) for bad in (*NO_PRICES, float("nan"), [{"role": "x"}])]
    + [(bad, "5.00") for bad in NO_PROMPTS],
)
def test_unusable_row_is_named(prompt, completion):
    with pytest.raises(UserError) as refusal:
        read_rows("a/b", splits_of([completion], [prompt]))
    rule = f"the completion {completion!r} has to be a price like 219.00, at most 999.49, and the"
    assert str(refusal.value).startswith(f"a/b: row 1 of test: {rule} prompt to end with `Price is")


def test_missing_rows_are_named():
    """And a missing split."""
    splits = splits_of(["5.00"])
    columns = ("prompt", "completion")
    splits["val"] = splits["val"].select([])
    with pytest.raises(UserError, match="a/b: lacks rows in val; required: train, val, test"):
        items.check_columns("a/b", splits, items.SPLITS, columns)
    del splits["val"]
    with pytest.raises(UserError, match="a/b: lacks val; required: train, val, test with prompt"):
        items.check_columns("a/b", splits, items.SPLITS, columns)


OWN = {"cutoff": 110, "columns": {}}


@pytest.mark.parametrize(
    "place, about, is_own",
    [
        ("ed-donner/items_prompts_lite", {}, False),
        ("alice/items_prompts_lite", {}, True),
        ("outputs/datasets/items_prompts_lite", {"cutoff": 110}, False),
        ("outputs/datasets/items_prompts_lite", OWN, True),
    ],
)
def test_record_tells_own_data_from_the_courses(place, about, is_own):
    """Whatever their size."""
    assert Prompts(DatasetDict(), place, about).is_own == is_own


# Files that are never half


@pytest.fixture()
def saved(tmp_path, smol_tokenizer):
    """The folder of a small dataset, as `prepare` writes it; its name could be a pattern."""
    folder = tmp_path / "data [v2]\n*"
    rows = demo_items(30, seed=0)
    splits = item_splits(rows[:20], rows[20:25], rows[25:])
    prompts, _ = build_prompts(splits, smol_tokenizer, 110)
    save_prompts(folder, prompts, {"source": "a test", "fingerprint": fingerprint(prompts)})
    write_manifest(folder)
    return folder


def test_damaged_cache_is_made_again(saved, capsys):
    """The libraries read a copy of the dataset there, which no manifest covers."""
    expected = read_prompts(saved).fingerprint
    pattern = f"{os.environ['HF_HOME']}/datasets/parquet/**/parquet-train.arrow"
    for file in glob.glob(pattern, recursive=True):
        flip(Path(file))
    assert read_prompts(saved).fingerprint == expected
    assert "its copy in the cache of `datasets` is corrupt, and is made again" in (
        capsys.readouterr().out
    )


def test_corrupt_dataset_is_one_line(saved):
    """Also where no manifest names the file."""
    (saved / "val.parquet").write_bytes(b"PAR1 cut")
    (saved / MANIFEST).unlink()
    with pytest.raises(UserError, match="can't be loaded .*Run the stage prepare again"):
        read_prompts(saved)


def test_other_data_of_same_time_are_read(saved):
    """The cache of `datasets` tells files apart by their times alone."""
    first = read_prompts(saved)
    rows = first.splits | {"train": first.splits["train"].select(range(5, 20))}
    times = {file: file.stat().st_mtime_ns for file in saved.glob("*.parquet")}
    save_prompts(saved, rows, {"fingerprint": fingerprint(rows)})
    write_manifest(saved)
    for file, time in times.items():
        os.utime(file, ns=(time, time))
    assert read_prompts(saved).fingerprint == fingerprint(rows)


def test_cached_tokens_are_not_trained_on(saved, smol_tokenizer):
    """Nor are damaged ones, which no manifest covers."""
    prompts = read_prompts(saved).splits["train"]
    expected = tokenise(prompts, smol_tokenizer, "train")[:]
    for file in prompts.cache_files:
        for cached in Path(file["filename"]).parent.glob("cache-*.arrow"):
            flip(cached)
    assert tokenise(prompts, smol_tokenizer, "train")[:] == expected


def test_unwritable_cache_is_named(saved, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(UserError, match="/cache.*'. Allow it, or set HF_HOME for another"):
        read_prompts(saved)


def write_files(folder, text):
    folder.mkdir(exist_ok=True)
    for name in "abc":
        (folder / name).write_text(text)
    write_json(folder / "d.json", text)


def test_link_leads_to_what_is_replaced(tmp_path):
    """It stays, and nothing old is kept from which removed data could come back."""
    write_files(tmp_path / "real", "old")
    link = tmp_path / "link"
    link.symlink_to("real")
    with replacing(link) as new:
        write_files(new, "new")
    assert link.is_symlink()
    assert (tmp_path / "real/a").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_only_own_dead_leftovers_are_removed(tmp_path, monkeypatch):
    """Of any target; not what another machine or a live process is writing."""
    monkeypatch.setattr("socket.gethostname", lambda: "gpu")
    dead = [".a~gpu-4194000", f".a~gpu-{os.getpid()}", ".a.b~gpu-4194000"]
    alive = [
        f".a~gpu-{os.getppid()}",
        ".a~gpu-1-4194000",
        f".b~gpu-{os.getpid()}",
        ".a~gpux-4194000",
    ]
    for name in (*dead, *alive):
        (tmp_path / name).mkdir()
    items.write_text(tmp_path / "a", "text")
    assert sorted(os.listdir(tmp_path)) == sorted(["a", *alive])


FORK = multiprocessing.get_context("fork")  # the child has nothing to import
FILE_EVENTS = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree")


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
    """The old or the new one, whichever the moment of the kill; the next one clears up."""
    seen = Counter()
    for moments in range(60):
        folder = tmp_path / str(moments) / "data"
        folder.parent.mkdir()
        write_files(folder, "old")
        process = FORK.Process(target=replace_until_killed, args=(folder, moments))
        process.start()
        was_killed = child.finish(process) != 0

        finish_interrupted_replace(folder)
        texts = {path.name: path.read_text().strip('"\n') for path in folder.iterdir()}
        assert sorted(texts) == ["a", "b", "c", "d.json"]
        assert len(set(texts.values())) == 1
        seen[was_killed, texts["a"]] += 1
        with replacing(folder) as new:
            write_files(new, "third")
        assert os.listdir(folder.parent) == ["data"]
        if not was_killed:
            break
    assert seen[True, "old"] >= 6
    assert seen[True, "new"] >= 1
    assert seen[False, "new"] == 1
    assert seen[False, "old"] == 0


def test_json_is_replaced_as_a_whole(tmp_path):
    """A value that JSON can't hold leaves the old file, and nothing beside it; NaN is null."""
    path = tmp_path / "a.json"
    write_json(path, {"x": [1.5, "§", float("nan")]})
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert json.loads(path.read_text("utf-8")) == {"x": [1.5, "§", None]}
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("name", ["none/a.csv", "a.txt", "in.csv", ".csv", f"{'x' * 250}.csv"])
def test_unwritable_output_is_named_first(tmp_path, name):
    (tmp_path / ".csv").mkdir()
    with pytest.raises(UserError, match=str(tmp_path)):
        items.check_output(tmp_path / name, tmp_path / "in.csv")


# The demo's synthetic catalogue


def test_demo_is_the_same_for_a_seed():
    """To the bit: older runs are evaluated on it."""
    text = "".join(f"{item.summary}{item.price}" for item in demo_items(500, seed=7))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "dd869a2a29074418"
