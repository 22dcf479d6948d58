"""Output that isn't UTF-8, or that nobody reads, ends no stage."""

import json

import pytest

from conftest import DATASET, read
from items import demo_items

SHORT = ("--max-steps", "2", "--batch-size", "4", "--run-name", "first")


@pytest.fixture()
def accented(tmp_path):
    """The path of a catalogue with signs of many alphabets, by a name that isn't UTF-8."""
    path = tmp_path / "K\udce4talog.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for item in demo_items(80, seed=1):
            row = {"title": f"Crème ☕ {item.title}", "price": item.price, "text": item.summary}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return str(path)


def test_other_encodings_end_no_stage(call, shared, accented, tmp_path):
    """What ASCII lacks becomes question marks on the screen; files are UTF-8 all the same."""
    hook = {"cwd": tmp_path, "hook": "write_output_in", "options": ["ascii"]}
    said = call("prepare", *shared, "--source", accented, "--currency", "€", **hook)
    assert "Saved: outputs" in said
    record = read(tmp_path / DATASET / "prepare.json")
    assert record["currency"] == "€"
    assert "K�talog.jsonl, split" in record["source"]
    call("train", *shared, *SHORT, **hook)
    priced = ("--text", "Crème ☕ lamp", "--output", "priced.jsonl")
    said = call("eval", "--local", *priced, **hook)
    assert "?" in said
    assert "Crème ☕" in (tmp_path / "priced.jsonl").read_text("utf-8")


@pytest.mark.parametrize("hook", ["close_reader", "fill_output", "close_output"])
def test_lost_output_ends_no_stage(call, shared, project, hook):
    """As after `| head`, or where a log's disk is full."""
    call("train", *shared, *SHORT, cwd=project, hook=hook)
    call("eval", "--local", "--size", "2", cwd=project, hook=hook)
    assert (project / "outputs/price-first/eval/report.html").exists()
