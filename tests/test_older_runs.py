"""Runs, checkpoints, datasets and evaluations of an earlier version, commit 8f7428f, are read.

tests/data has what it wrote with the tiny base: a dataset, the evaluated run `first`, and `second`,
killed after its first checkpoint. The tokenizer's large file is that of the base.
"""

import shutil
import tarfile
from pathlib import Path

import pytest

from conftest import read

ARCHIVE = Path(__file__).with_name("data") / "runs_of_8f7428f.tar.xz"
FIRST = Path("outputs/price-first")
SECOND = Path("outputs/price-second")
EVAL = ("eval", "--local", "--size", "all")


@pytest.fixture()
def older(tiny_base, tmp_path):
    """The folder of an older project, and of its base `tiny`."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    shutil.copytree(tiny_base, tmp_path / "tiny")
    for folder in (FIRST, SECOND / "checkpoint-3"):
        shutil.copy(tmp_path / "tiny/tokenizer.json", tmp_path / folder)
    return tmp_path


def test_older_run_is_evaluated_alike(call, older):
    """Its own evaluation, as then to the cent, by the model alone."""
    expected = read(older / FIRST / "eval/results.json")
    predictions = (older / FIRST / "eval/predictions.csv").read_text()
    call(*EVAL, "--run-name", "first", cwd=older)
    assert read(older / FIRST / "eval/results.json")["alone"]["mae"] == expected["mae"]
    call(*EVAL, "--run-name", "first", "--comparables", "off", cwd=older)
    found = read(older / FIRST / "eval/results.json")
    assert found["mae"] == expected["mae"]
    assert found["decodings"] == expected["decodings"]
    assert (older / FIRST / "eval/predictions.csv").read_text() == predictions


def test_older_run_resumes_and_compares(call, older):
    """It goes on from its checkpoint by its own settings; the older evaluation is compared with."""
    said = call("train", "--local", "--resume", "second", cwd=older)
    assert "Resuming from step 3, the newest complete checkpoint" in said
    record = read(older / SECOND / "run.json")
    assert (record["steps"], record["recipe"]["lora_r"]) == (6, 2)
    said = call(*EVAL, "--run-name", "second", "--compare", "first", cwd=older)
    assert "Against first, on the same items: " in said
