"""The schedule of data that aren't the course's: epochs, batch, learning rate, price loss."""

import pytest
from datasets import Dataset, DatasetDict

import util
from app import RECIPES, RunConfig, build_quant_config
from conftest import DATASET, read
from items import COURSE_SIZES, Prompts, UserError, load_prompts

SCHEDULE = ("epochs", "batch_size", "learning_rate", "price_loss")


@pytest.fixture()
def choose(tiny_base, tmp_path):
    """`choose(rows, mode, epochs="auto", …)` returns the Run whose schedule was chosen."""

    def choose(rows, mode="lite", place=tmp_path, about=None, is_new=True, **changes):
        config = RunConfig(base_model=tiny_base, local=True, output_dir=str(tmp_path / "outputs"))
        config.demo_mode = mode == "demo"
        config.lite_mode = mode == "lite"
        run = util.new_run(config, "run", RECIPES[mode], True, changes)
        run.is_new = is_new
        train = Dataset.from_dict({"prompt": ["Price is $"] * rows})
        about = {"columns": {}} if about is None else about
        prompts = Prompts(DatasetDict({"train": train}), str(place), about)
        util.choose_schedule(run, changes, prompts, util.open_base(config))
        return run

    return choose


def values(recipe):
    return tuple(getattr(recipe, name) for name in SCHEDULE)


@pytest.mark.parametrize(
    ("rows", "epochs"), [(20, 12), (480, 6), (1000, 3), (6000, 3), (1_000_000, 3)]
)
def test_rows_choose_the_epochs(choose, rows, epochs):
    """At least 180 steps, but no row more than 12 times."""
    run = choose(rows)
    assert values(run.recipe) == (epochs, 16, 7.3e-3, 2.5)
    assert run.auto == list(SCHEDULE)
    assert f"for {rows:,} rows" in run.schedule
    assert "learning rate 0.0073 for a base of width 64" in run.schedule


@pytest.mark.parametrize(("width", "rate"), [(576, 1.3e-3), (2048, 4.9e-4), (3072, 3.6e-4)])
def test_width_chooses_learning_rate(width, rate):
    assert util.auto_learning_rate(width) == rate


def test_given_values_are_kept(choose):
    run = choose(1000, epochs=5, price_loss=0.0)
    assert values(run.recipe)[0] == 5
    assert values(run.recipe)[3] == 0.0
    assert run.auto == ["batch_size", "learning_rate"]


def test_max_steps_hide_the_epochs(choose):
    assert "epochs" not in choose(1000, max_steps=7).schedule
    given = dict.fromkeys(SCHEDULE[1:], 1)
    assert choose(1000, max_steps=7, **given).schedule == ""


@pytest.mark.parametrize("mode", ["lite", "full"])
@pytest.mark.parametrize("where", ["disk", "hub"])
def test_course_data_keep_its_recipe(choose, tmp_path, mode, where):
    if where == "disk":
        run = choose(50, mode, about={"source": "ed-donner/items_lite"})
    else:
        run = choose(COURSE_SIZES[0], mode, place="you/items_prompts_lite", about={})
    assert run.recipe == RECIPES[mode]
    assert run.schedule == ""


def test_own_data_on_hub_are_seen(choose):
    """By their number of rows: what `prepare` found isn't there."""
    assert choose(3000, place="you/items_prompts_lite", about={}).recipe.epochs == 3


def test_demo_keeps_its_recipe(choose):
    """It is made for CPUs."""
    assert choose(2000, "demo").recipe == RECIPES["demo"]


def test_auto_can_be_asked_for(choose):
    run = choose(1000, about={}, learning_rate="auto")
    assert run.recipe.learning_rate == 7.3e-3
    assert run.recipe.epochs == RECIPES["lite"].epochs


def test_auto_changes_no_earlier_run(choose):
    """`--resume run --epochs auto` asks for what the run has."""
    run = choose(1000, is_new=False)
    assert run.recipe == RECIPES["lite"]
    changes = {"epochs": "auto", "seed": 42}
    assert util.describe_changes(util.changed_settings(run, changes)) == ""


def test_batch_suits_any_processes(choose, monkeypatch):
    monkeypatch.setattr(util, "world_size", lambda: 3)
    assert choose(1000).recipe.batch_size == 18


def test_plan_states_the_schedule(call, shared, project):
    said = call("train", *shared, "--dry-run", cwd=project)
    chosen = "epochs 12 for 72 rows, batch size 16, learning rate 0.0073 for a base of width 64"
    assert f"Schedule:     {chosen}, price loss 2.5: chosen for these data" in said
    assert "Steps:        60 of 16 rows: 12.00 epochs of 72 rows" in said
    assert "Loss:         cross-entropy of the completions + 2.5 × CRPS of the prices" in said


def test_record_has_the_schedule(call, shared, project):
    flags = ("--max-steps", "1", "--batch-size", "2", "--price-loss", "auto")
    call("train", *shared, "--run-name", "run", *flags, cwd=project)
    record = read(project / "outputs/price-run/run.json")
    assert record["auto"] == ["epochs", "learning_rate", "price_loss"]
    assert record["recipe"]["learning_rate"] == 7.3e-3
    assert "learning rate 0.0073" in record["plan"]["Schedule"]


@pytest.mark.parametrize("is_auto", [True, False])
def test_price_loss_needs_the_tree(choose, prepared, tiny_base, monkeypatch, is_auto):
    """A base whose prices are read number by number: left out, or refused if it was asked for."""
    monkeypatch.setattr(util.SelfCheck, "tree_agrees", lambda check: False)
    run = choose(1000, **{} if is_auto else {"price_loss": 1.0})
    base = util.Base(tiny_base)
    data = util.make_training_data(load_prompts(prepared / DATASET), base.tokenizer, 4)
    plan = util.make_plan(base, run, data, False)
    model = util.load_base(base, plan, build_quant_config(True, False, plan.dtype))
    if not is_auto:
        with pytest.raises(UserError, match="can't be read in one pass. Leave it out"):
            util.check_plan(plan, model, base, data, run)
        return
    plan = util.check_plan(plan, model, base, data, run)
    assert run.recipe.price_loss == 0
    assert "cross-entropy only" in plan.reasons["Loss"]
