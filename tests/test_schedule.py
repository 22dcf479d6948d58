"""The schedule of data that aren't the course's: epochs, batch, learning rate, price loss."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

import app
import items
import util
from app import RECIPES, RunConfig
from conftest import read
from items import COURSE_SCALE, UserError

LITE = RECIPES["lite"]
FIELDS = ("epochs", "batch_size", "learning_rate", "price_loss")


def choose(base, auto=FIELDS, rows=1000, recipe=LITE):
    return util.choose_schedule(recipe, auto, rows, base, COURSE_SCALE)


@pytest.fixture()
def base(tiny_base):
    return util.Base(tiny_base)


@pytest.mark.parametrize(
    ("rows", "epochs"), [(20, 12), (480, 6), (1000, 3), (6000, 3), (1_000_000, 3)]
)
def test_rows_choose_the_epochs(base, rows, epochs):
    """At least 180 steps, but no row more than 12 times."""
    recipe, text = choose(base, rows=rows)
    assert [getattr(recipe, name) for name in FIELDS] == [epochs, 16, 7.3e-3, 0.0]
    assert f"epochs {epochs}, batch size 16, learning rate 0.0073, price loss 0: " in text
    assert f"chosen for {rows:,} rows and a base of width 64" in text


@pytest.mark.parametrize(("width", "rate"), [(576, 1.3e-3), (2048, 4.9e-4), (3072, 3.6e-4)])
def test_width_chooses_learning_rate(width, rate):
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=width))
    recipe, _ = choose(SimpleNamespace(config=config), ["learning_rate"])
    assert recipe == replace(LITE, learning_rate=rate)


def test_price_loss_needs_whole_numbers(tokenizer, base):
    """Where a number is one token it is free; else it is left out, or refused if it was given."""
    base.tokenizer = tokenizer
    recipe, text = choose(base, ["price_loss"])
    given = replace(LITE, price_loss=1.0)
    if len(items.spell_numbers(tokenizer)[999]) == 1:
        assert recipe.price_loss == 2.5
        util.check_recipe(given, base, COURSE_SCALE, False)
        return
    assert recipe.price_loss == 0
    assert "which spells numbers in several tokens" in text
    with pytest.raises(UserError, match="`price_loss` 1: needs a base whose tokenizer spells each"):
        util.check_recipe(given, base, COURSE_SCALE, False)


def test_batch_suits_any_processes(base, monkeypatch):
    monkeypatch.setattr(util, "world_size", lambda: 3)
    assert choose(base)[0].batch_size == 18


@pytest.mark.parametrize(
    ("mode", "is_own", "changes", "expected"),
    [
        ("lite", True, {}, list(FIELDS)),
        ("lite", True, {"epochs": 5, "price_loss": 0.0}, list(FIELDS[1:3])),
        ("full", False, {}, []),
        ("full", False, {"learning_rate": "auto"}, ["learning_rate"]),
        ("demo", True, {}, []),
    ],
)
def test_own_data_choose_what_is_not_given(tiny_base, tmp_path, mode, is_own, changes, expected):
    """The course's data keep its recipe, and the demo its own, which is made for CPUs."""
    config = RunConfig(base_model=tiny_base, local=True, output_dir=str(tmp_path))
    config.lite_mode, config.demo_mode = mode == "lite", mode == "demo"
    run = app.new_run(config, "run", RECIPES[mode], True, changes)
    assert util.auto_fields(run, SimpleNamespace(is_own=is_own), changes) == expected


def test_plan_and_record_have_the_schedule(call, shared, project):
    """And resuming asks for no other, also by `--epochs auto`."""
    said = call("train", *shared, "--dry-run", cwd=project)
    assert "Schedule:     epochs 12, batch size 16, learning rate 0.0073, price loss 0: " in said
    assert "Steps:        60 of 16 rows: 12.00 epochs of 72 rows" in said
    assert "Loss:         cross-entropy of the completions\n" in said
    flags = ("--max-steps", "1", "--batch-size", "2", "--price-loss", "auto")
    call("train", *shared, "--run-name", "run", *flags, cwd=project)
    record = read(project / "outputs/price-run/run.json")
    assert record["recipe"]["learning_rate"] == 7.3e-3
    assert "learning rate 0.0073" in record["plan"]["Schedule"]
    call("train", "--local", "--resume", "run", "--epochs", "auto", cwd=project)
