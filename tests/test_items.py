"""Prompts letter by letter, catalogues row by row, and files that are whole or not there."""
import json
import os
import random
import subprocess
import sys
from collections import Counter

import pytest

from conftest import ROOT, write_catalogue
from items import (DEMO_KINDS, Item, UserError, build_prompts, demo_items, item_splits, load_prompts,
                   read_catalogue, replacing, restore, save_prompts, split_by_title, tokenise, write_json)

SUMMARY = "Title: Walnut desk\nCategory: Furniture\nBrand: Cedar\nDescription: Solid and dependable.\nDetails: 48 inches"


def item(price=219.0, summary=SUMMARY, title="Walnut desk"):
    return Item(title, "Furniture", price, summary=summary)


def test_repr_is_the_courses():
    assert repr(item()) == "<Walnut desk = $219.0>"


def test_prompt_and_completion_letter_by_letter(tokenizer):
    one = item(218.51)
    one.make_prompts(tokenizer, 110, True)
    assert one.to_datapoint() == {
        "prompt": f"What does this cost to the nearest dollar?\n\n{SUMMARY}\n\nPrice is $", "completion": "219.00"}
    assert not one.prompt.endswith(" ")


@pytest.mark.parametrize("price, rounded", [(0.5, "0.00"), (1.5, "2.00"), (2.5, "2.00"), (218.5, "218.00"),
                                            (219.5, "220.00"), (999.49, "999.00"), (64.3, "64.00")])
def test_rounding_is_half_to_even_and_only_where_asked(smol_tokenizer, price, rounded):
    one = item(price)
    one.make_prompts(smol_tokenizer, 110, True)
    assert one.completion == rounded
    one.make_prompts(smol_tokenizer, 110, False)
    assert one.completion == str(price)


def test_cut_is_at_exactly_max_tokens(tokenizer):
    one = item()
    n = one.count_tokens(tokenizer)
    for limit, whole in ((n + 1, True), (n, True), (n - 1, False)):
        one.make_prompts(tokenizer, limit, True)
        assert (SUMMARY in one.prompt) == whole
    kept = tokenizer.decode(tokenizer.encode(SUMMARY, add_special_tokens=False)[: n - 1]).rstrip()
    assert one.prompt == f"What does this cost to the nearest dollar?\n\n{kept}\n\nPrice is $"


def test_a_cut_that_ends_in_white_space_is_stripped(tokenizer):
    ids = tokenizer.encode(SUMMARY, add_special_tokens=False)
    at = next(i for i in range(1, len(ids)) if tokenizer.decode(ids[:i]) != tokenizer.decode(ids[:i]).rstrip())
    one = item()
    one.make_prompts(tokenizer, at, True)
    assert one.prompt.endswith(tokenizer.decode(ids[:at]).rstrip() + "\n\nPrice is $")


def test_golden_lengths(llama_tokenizer, smol_tokenizer):
    one = item()
    for tokenizer, summary, whole in ((llama_tokenizer, 24, 40), (smol_tokenizer, 28, 50)):
        one.make_prompts(tokenizer, 110, True)
        assert (one.count_tokens(tokenizer), one.count_prompt_tokens(tokenizer)) == (summary, whole)


def test_llama_spells_prices_in_one_token_and_smol_digit_by_digit(llama_tokenizer, smol_tokenizer):
    assert llama_tokenizer.tokenize("219.00") == ["219", ".", "00"]
    assert smol_tokenizer.tokenize("219.00") == ["2", "1", "9", ".", "0", "0"]


def test_the_prompt_is_a_prefix_of_prompt_and_completion_in_tokens(tokenizer):
    one = item()
    one.make_prompts(tokenizer, 110, True)
    prompt, whole = tokenizer.encode(one.prompt), tokenizer.encode(one.prompt + one.completion)
    assert whole[: len(prompt)] == prompt


def test_batches_agree_with_one_by_one(tokenizer):
    items = demo_items(300, seed=3)
    items[5].summary = " two spaces and a line after\n\n"
    lengths = sorted(one.count_tokens(tokenizer) for one in items)
    for limit in (5, lengths[100], lengths[-2]):
        prompts, counts = build_prompts(item_splits(items, items[:1], items[:1], vars), tokenizer, limit)
        for i, one in enumerate(items):
            one.make_prompts(tokenizer, limit, True)
            assert prompts["train"][i] == one.to_datapoint()
            assert counts["train"]["cut"][i] == (one.count_tokens(tokenizer) > limit)
            assert counts["train"]["tokens"][i] == one.count_prompt_tokens(tokenizer)


def test_prompts_of_splits_round_train_and_val_only(smol_tokenizer):
    items = [item(10.25 + i) for i in range(3)]
    prompts, counts = build_prompts(item_splits(items, items, items, vars), smol_tokenizer, 110)
    assert prompts["train"]["completion"] == prompts["val"]["completion"] == ["10.00", "11.00", "12.00"]
    assert prompts["test"]["completion"] == ["10.25", "11.25", "12.25"]
    assert prompts["test"].column_names == ["prompt", "completion"]
    items[0].make_prompts(smol_tokenizer, 110, True)
    assert counts["train"]["tokens"][0] == items[0].count_prompt_tokens(smol_tokenizer)


# Own catalogues

BAD = {
    2: ('{"title": "B", "text": "b"}', "price is missing"),
    3: ('{"title": "B", "text": "b", "price": null}', "price is missing"),
    4: ('{"title": "B", "text": "b", "price": 0}', "price is zero or negative"),
    5: ('{"title": "B", "text": "b", "price": -3}', "price is zero or negative"),
    6: ('{"title": "B", "text": "b", "price": NaN}', "price is no plain number like 12.99"),
    7: ('{"title": "B", "text": "b", "price": "about ten"}', "price is no plain number like 12.99"),
    8: ('{"title": "B", "text": "b", "price": true}', "price is no plain number like 12.99"),
    9: ('{"title": "B", "text": " ", "price": 3}', "text is empty or not text"),
    10: ('{"title": "", "text": "b", "price": 3}', "title is empty or not text"),
    11: ('{"title": "B", "text": "b", "price": 0.49}', "price is outside $0.50–$999.49"),
    12: ('{"title": "B", "text": "b", "price": 999.5}', "price is outside $0.50–$999.49"),
    13: ('{"title": "B", "text": "b", "price": 3', "not a JSON object"),
    14: ('[1, 2]', "not a JSON object"),
    15: ('{"title": "B", "text": "b", "price": 1%s}' % ("0" * 400), "price is no plain number like 12.99"),
    16: ('{"title": "B \\ud800", "text": "b", "price": 3}', "title has half a character"),
    17: ('{"title": "A", "text": "a", "price": 1.5}', "duplicate of an earlier row"),
}


def test_unusable_rows_are_named_by_line_and_dropped(tmp_path):
    path = tmp_path / "own.jsonl"
    lines = ['{"title": "A", "text": "a", "price": 1.5}', *(line for line, _ in BAD.values()),
             '{"title": "Z", "text": "z", "price": "0.50"}', "", '{"title": "Y", "text": "y", "price": 999.49}']
    path.write_text("\n".join(lines))
    items, dropped = read_catalogue(path)
    assert [(i.id, i.title, i.price) for i in items] == [(1, "A", 1.5), (18, "Z", 0.5), (20, "Y", 999.49)]
    expected = {}
    for line, (_, reason) in BAD.items():
        expected.setdefault(reason, []).append(line)
    assert dropped == expected


@pytest.mark.parametrize("column", ["summary", "text", "description"])
@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_every_format_and_text_column_gives_the_same_items(tmp_path, ending, column):
    import pandas

    table = pandas.DataFrame({"title": ["Lamp", "Sofa, red"], "price": [12.5, 300.0], column: ["Brass.\nTall.", "Soft."],
                              "category": ["Light", "Seat"]})
    path = tmp_path / f"own.{ending}"
    {"jsonl": lambda: table.to_json(path, orient="records", lines=True), "csv": lambda: table.to_csv(path, index=False),
     "parquet": lambda: table.to_parquet(path)}[ending]()
    items, dropped = read_catalogue(path)
    assert not dropped and [(i.title, i.category, i.price) for i in items] == [("Lamp", "Light", 12.5), ("Sofa, red", "Seat", 300.0)]
    assert items[0].summary == "Title: Lamp\nCategory: Light\nDescription: Brass.\nTall."


@pytest.mark.parametrize("sign", [",", ";", "\t"])
def test_a_csv_may_have_other_separators_and_capitals_and_says_which_rows_have_too_many_cells(tmp_path, sign):
    rows = [" Title", "Price", "DESCRIPTION "], ["Lamp", "12.5", "Brass"], ["Sofa", "30", "red", "soft"], ["Bed", "1_0", "-"]
    (tmp_path / "own.csv").write_text("\n".join(map(sign.join, rows)))
    items, dropped = read_catalogue(tmp_path / "own.csv")
    assert [(i.title, i.price) for i in items] == [("Lamp", 12.5)]
    assert dropped == {"more cells than the header has": [3], "price is no plain number like 12.99": [4]}


def test_a_description_in_the_courses_form_stays_as_it_is(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"title": "Walnut desk", "summary": SUMMARY, "price": 1}))
    assert read_catalogue(path)[0][0].summary == SUMMARY


@pytest.mark.parametrize("name, content, said", [
    ("own.jsonl", '{"title": "A", "text": "a"}', "price"),
    ("own.jsonl", '{"title": "A", "price": 1}', "description"),
    ("own.jsonl", "", "holds no rows"),
    ("own.csv", "title,price,text\n", "holds no rows"),
    ("own.json", '[{"title": "A", "text": "a", "price": 1}]', "not a JSON object"),
    ("own.jsonl", '{"title": "A", "text": "a", "price": 0}', "none of 1 rows is usable"),
    ("own.parquet", "no parquet", "can't be read: "),
    ("own.csv", b"title,price,text\n\xff\xfe,1,2", "not in UTF-8 (byte 17)"),
    ("own.csv", 'title,price,text\na,1,"b\nc,2,d\n', "is a quote left open?"),
    ("own.csv", "title,price,Price,text\na,1,2,b\n", "more than one column is called price"),
    ("own.xlsx", "", "the ending is .xlsx"),
    ("missing.csv", None, "can't be read: No such file"),
])
def test_a_file_of_no_use_is_said_in_one_line(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        read_catalogue(tmp_path / name)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_equal_titles_stay_in_one_split_of_90_5_5():
    rng = random.Random(0)
    items = [item(title=f"  T{rng.randrange(300)} ".swapcase() if rng.random() < 0.5 else f"t{rng.randrange(300)}") for _ in range(2000)]
    parts = split_by_title(items, seed=1)
    assert sum(map(len, parts)) == 2000 and all(90 <= len(part) <= 120 for part in parts[1:])
    titles = [{i.title.casefold().strip() for i in part} for part in parts]
    assert not titles[0] & titles[1] and not titles[0] & titles[2] and not titles[1] & titles[2]
    assert [list(map(repr, part)) for part in split_by_title(items, 1)] == [list(map(repr, part)) for part in parts]
    assert [list(map(repr, part)) for part in split_by_title(items, 2)] != [list(map(repr, part)) for part in parts]


def test_small_catalogues_fill_every_split_or_say_why():
    assert [len(part) for part in split_by_title([item(title=t) for t in "abc"], 0)] == [1, 1, 1]
    with pytest.raises(UserError, match="at least 3"):
        split_by_title([item(title=t) for t in "ab"], 0)


# Storage


def test_parquet_gives_back_the_prompts(tmp_path, smol_tokenizer):
    items = demo_items(30, 0)
    prompts, _ = build_prompts(item_splits(items[:20], items[20:25], items[25:], vars), smol_tokenizer, 110)
    save_prompts(tmp_path, prompts)
    loaded = load_prompts(tmp_path)
    assert {name: list(split) for name, split in loaded.items()} == {name: list(split) for name, split in prompts.items()}
    (tmp_path / "val.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(UserError, match="not a whole dataset"):
        load_prompts(tmp_path)


def test_an_error_while_writing_leaves_the_old_folder(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a").write_text("old")
    with pytest.raises(KeyError), replacing(tmp_path / "data") as new:
        (new / "a").write_text("half")
        raise KeyError
    assert (restore(tmp_path / "data") / "a").read_text() == "old"


KILL = """
import os, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from items import replacing, write_json
count = 0
def at(event, arguments):
    global count
    if event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree") and {folder!r} in str(arguments[0]):
        count += 1
        if count == {n}:
            os._exit(9)
sys.addaudithook(at)
with replacing({folder!r} + "/data") as new:
    for name in "abc":
        (new / name).write_text("new")
    write_json(new / "d.json", "new")
"""


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_folder_whole(tmp_path):
    seen = Counter()
    for n in range(1, 40):
        folder = tmp_path / str(n)
        (folder / "data").mkdir(parents=True)
        for name in "abc":
            (folder / "data" / name).write_text("old")
        write_json(folder / "data" / "d.json", "old")
        done = subprocess.run([sys.executable, "-c", KILL.format(root=str(ROOT), folder=str(folder), n=n)])
        files = {path.name: path.read_text().strip('"\n') for path in restore(folder / "data").iterdir()}
        assert sorted(files) == ["a", "b", "c", "d.json"] and len(set(files.values())) == 1
        seen[done.returncode, files["a"]] += 1
        if done.returncode == 0:
            break
    assert seen[9, "old"] >= 6 and seen[9, "new"] >= 1 and seen[0, "new"] == 1


def test_json_is_replaced_whole_and_knows_no_nan(tmp_path):
    write_json(tmp_path / "a.json", {"x": float("nan"), "y": [1.5, "§"]})
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"x": None, "y": [1.5, "§"]}
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text("utf-8"))["y"] == [1.5, "§"]
    assert os.listdir(tmp_path) == ["a.json"]


# The synthetic catalogue


def test_demo_items_depend_on_the_seed_only_and_imply_their_price():
    items, again, other = demo_items(500, 7), demo_items(500, 7), demo_items(500, 8)
    assert items == again != other
    assert 40 <= sum(map(len, DEMO_KINDS.values())) <= 60
    assert all(5 <= i.price <= 999 for i in items)
    implied = demo_items(500, 7, noise=0)
    assert [i.summary for i in implied] == [i.summary for i in items]
    by_wording = {}
    for one in implied:  # without noise the wording alone makes the price
        assert by_wording.setdefault(one.summary, one.price) == one.price
    ratios = sorted(a.price / b.price for a, b in zip(items, implied))
    assert 0.95 < ratios[250] < 1.05 and ratios[40] < 0.85 and ratios[460] > 1.15
    for line in ("Title: ", "Category: ", "Brand: ", "Description: ", "Details: "):
        assert all(line in i.summary for i in items)


def test_write_catalogue_is_usable(tmp_path):
    items, dropped = read_catalogue(write_catalogue(tmp_path / "own.jsonl", 30))
    assert len(items) + sum(map(len, dropped.values())) == 30


def test_rows_are_tokenised_as_training_needs_them(tokenizer):
    rows = build_prompts(item_splits(*[demo_items(40, 1)] * 3, vars), tokenizer, 30)[0]["train"]
    for row, source in zip(tokenise(rows, tokenizer, "train"), rows):
        assert row["input_ids"] == tokenizer.encode(source["prompt"] + source["completion"] + tokenizer.eos_token)
        said = [label for label in row["labels"] if label != -100]
        assert tokenizer.decode(said) == source["completion"] + tokenizer.eos_token
        assert row["labels"] == [-100] * (len(row["input_ids"]) - len(said)) + said
        assert row["input_ids"][-len(said):] == said
