"""The command line: instant, and the same before and after the subcommand."""

import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest

from app import (
    PACKAGES,
    RECIPES,
    Recipe,
    RunConfig,
    build_parser,
    check_call,
    describe_default,
    evaluate_model,
    parse_arguments,
    prepare_prompts,
    price_items,
    stage_function,
    train_model,
)
from conftest import ROOT
from items import Stopped, UserError

SHARED_FLAGS = (
    ["--lite"],
    ["--demo"],
    ["--local"],
    ["--base-model", "m"],
    ["--project-name", "p"],
    ["--data-user", "u"],
    ["--output-dir", "o"],
    ["--seed", "7"],
)
NONSENSE = (
    "",
    "fly",
    "train --epochs 0",
    "train --batch-size -1",
    "train --max-steps 1.5",
    "train --learning-rate 0",
    "train --lora-r x",
    "train --seed -1",
    "train --nosuch",
    "train --run-name ../up",
    "train --resume one --run-name two",
    "--project-name a/b train",
    "--lite train --demo",
    "train --lite --demo",
    "eval --size 0",
    "eval @nosuch.txt",
    "eval --output out.csv",
    "eval --local --revision abc",
    "prepare --cutoff 0",
    "prepare --columns title=Name",
    "prepare --source a.csv --columns Name",
    "prepare --source a.csv --columns name=Name",
    "prepare --source a.csv --columns title=A title=B",
    "eval --text lamp --columns title=Name",
    "eval --text lamp --size 5",
    "eval --input a.csv --data-user u",
    "eval --export new --compare-base",
    "eval --local --hf-user u",
    "train --local --hf-user u",
    "prepare --demo --data-user u",
    "prepare --local --hf-dataset-user u",
)


def run_without_packages(*arguments):
    """app.py by an interpreter that sees no installed package."""
    command = [sys.executable, "-S", "-E", ROOT / "app.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_help_is_instant():
    """Within 0.3 seconds, and with no package installed."""
    start = time.time()
    done = run_without_packages("--help")
    taken = time.time() - start
    assert "python app.py prepare" in done.stdout
    assert done.returncode == 0
    assert taken < 0.3


@pytest.mark.parametrize("stage", ["prepare", "train", "eval"])
def test_stage_help_needs_no_package(stage):
    assert run_without_packages(stage, "--help").returncode == 0


@pytest.mark.parametrize("line", NONSENSE)
def test_nonsense_is_a_usage_error(line):
    """One line, exit code 2, and no package is needed for it."""
    done = run_without_packages(*line.split())
    assert done.returncode == 2
    assert "error:" in done.stderr
    assert "Traceback" not in done.stderr


def test_unknown_flag_suggests_nearest():
    for typed, meant in (("--epoch=3", "--epochs"), ("--hf_user me", "--hf-user")):
        done = run_without_packages("train", *typed.split())
        assert f"unknown: {typed}; did you mean {meant}? See `" in done.stderr
    assert "unknown: --nosuch; see `" in run_without_packages("train", "--nosuch").stderr


def test_missing_packages_are_one_line():
    """As when the virtual environment was not activated: named, with what to do."""
    done = run_without_packages("train", "--demo")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "app.py train: torch, transformers" in line
    assert f"pip install -r {ROOT / 'requirements.txt'}" in line


def test_packages_are_those_required():
    lines = (ROOT / "requirements.txt").read_text("utf-8").split()
    assert [re.match(r"\w+", line).group() for line in lines] == list(PACKAGES)


def test_printed_commands_can_be_pasted():
    """They name the program by the path that was typed, and a Python that isn't on the PATH."""
    assert f"see `python {ROOT / 'app.py'} train --help`" in unknown_flag_error()
    path = os.environ["PATH"].replace(str(Path(sys.executable).parent), "/nonexistent")
    assert f"see `{sys.executable} {ROOT / 'app.py'} train --help`" in unknown_flag_error(PATH=path)
    config = RunConfig(program="/here/app.py", output_dir="runs")
    assert config.resume_command("first") == (
        "`python /here/app.py train --resume first --output-dir runs`"
    )


def unknown_flag_error(**environment):
    """What the program prints of a flag that it doesn't know."""
    command = [sys.executable, "-S", ROOT / "app.py", "train", "--nosuch"]
    environment = os.environ | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True).stderr


def test_calls_are_printed_in_python():
    """Who calls the stages from Python reads how to go on in Python."""
    config = RunConfig(demo_mode=True)
    assert config.resume_command("first") == "`train_model(config, resume='first')`"


def test_help_needs_no_encoding():
    """Signs that a terminal's encoding lacks become question marks."""
    command = [sys.executable, "-S", ROOT / "app.py", "--help"]
    environment = os.environ | {"PYTHONUTF8": "0", "LC_ALL": "C"}
    done = subprocess.run(command, env=environment, capture_output=True)
    assert "items ? prompts" in done.stdout.decode("ascii")


@pytest.mark.parametrize("flags", SHARED_FLAGS, ids=lambda flags: flags[0])
@pytest.mark.parametrize("stage", ["prepare", "train", "eval"])
def test_shared_flags_work_everywhere(stage, flags):
    """They mean the same before and after the subcommand."""
    parser = build_parser()
    before = vars(parser.parse_args([*flags, stage]))
    after = vars(parser.parse_args([stage, *flags]))
    assert before == after
    assert before != vars(parser.parse_args([stage]))


@pytest.mark.parametrize(
    "line",
    [
        "prepare --lite --hf-dataset-user me",
        "train --lite --hf-user me --log-wandb --seed 42",
        "eval --lite --hf-user me --run-name 2025-11-30_15.10.55-lite --seed 42",
    ],
)
def test_original_commands_parse(line):
    assert build_parser().parse_args(line.split()).lite


def test_columns_become_a_dict():
    """Given at once or one by one; a description may be in several columns."""
    line = "prepare --source a.csv --columns title=Name text=A=B --columns text=C"
    args = build_parser().parse_args(line.split())
    assert args.columns == {"title": ["Name"], "text": ["A=B", "C"]}


def test_size_all_means_none():
    """The default is the course's 200."""
    assert build_parser().parse_args(["eval", "--size", "all"]).size is None
    assert build_parser().parse_args(["eval"]).size == 200


def test_folder_names_name_runs():
    """A run's folder has the project's name before the run's."""
    typed = "eval --run-name price-first --compare price-second third"
    args = parse_arguments(typed.split())
    assert (args.run_name, args.compare) == ("first", ["second", "third"])
    assert parse_arguments(["train", "--resume", "price-first"]).resume == "first"
    other = parse_arguments(["--project-name", "lab", "eval", "--run-name", "price-first"])
    assert other.run_name == "price-first"


def test_arguments_come_from_a_file(tmp_path):
    file = tmp_path / "run.txt"
    file.write_text("train --lite  # the course's\n--learning-rate 2e-4\n\n--run-name 'my-run'\n")
    args = build_parser().parse_args([f"@{file}"])
    expected = build_parser().parse_args(
        shlex.split("train --lite --learning-rate 2e-4 --run-name my-run")
    )
    assert args == expected


def test_every_flag_states_its_default():
    """But for those that are a switch for something else, or name what is to be done instead."""
    actions = build_parser()._subparsers._group_actions[0].choices
    instead = {"--compare", "--input", "--text", "--export", "--resume", "--dry-run"}
    silent = {"--help", "--lite", "--demo", *instead}
    for parser in actions.values():
        for action in parser._actions:
            flag = action.option_strings[-1]
            if flag not in silent:
                assert "default" in action.help, flag


def test_threads_wait_without_spinning():
    """Set before PyTorch is imported, which reads it only then."""
    code = (
        "import app, os, sys; app.set_up_libraries(); "
        "print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False PASSIVE\n"


def test_stop_button_is_one_line():
    """Also where no training goes on: no traceback of a library in a notebook."""

    @stage_function
    def wait():
        raise KeyboardInterrupt

    with pytest.raises(Stopped) as stopped:
        wait()
    assert stopped.value._render_traceback_() == ["wait is stopped: call it again."]


def test_unknown_settings_raise_typeerror():
    with pytest.raises(TypeError, match="no argument learning_rat; did you mean learning_rate?"):
        train_model(RunConfig(local=True), learning_rat=1e-3)
    with pytest.raises(TypeError, match="prepare_prompts.* no argument curency; did you mean curr"):
        prepare_prompts(RunConfig(local=True), curency="€")


@pytest.mark.parametrize(
    "stage, name, value",
    [
        (prepare_prompts, "cutoff", 0),
        (prepare_prompts, "unit", 7),
        (prepare_prompts, "currency", "1 $"),
        (train_model, "epochs", 1.5),
        (train_model, "learning_rate", "fast"),
        (train_model, "targets", "everything"),
        (train_model, "keep_best", "yes"),
        (train_model, "run_name", "a/b"),
        (train_model, "seed", -1),
        (evaluate_model, "size", 0),
        (evaluate_model, "decode", "best"),
        (price_items, "decode", "best"),
    ],
)
def test_python_values_are_checked(stage, name, value):
    """As a command's, before anything slow."""
    with pytest.raises(UserError, match=rf"^{name}: .*{re.escape(str(value))}.* (must|may) "):
        stage(RunConfig(local=True), **{name: value})


def test_values_of_other_types_are_refused():
    config = RunConfig(demo_mode=True)
    calls = [
        (
            price_items,
            {"text": ["a lamp", "a sofa"]},
            "text: ['a lamp', 'a sofa'] must be a string",
        ),
        (price_items, {"text": 5}, "text: 5 must be a string"),
        (price_items, {"source": 5}, "source: 5 must be a string"),
        (prepare_prompts, {"columns": 3}, "columns: 3 must be ROLE=NAME"),
        (evaluate_model, {"run_name": ["a", "b"]}, "run_name: ['a', 'b'] must be a string"),
        (evaluate_model, {"hf_user": 20}, "hf_user: 20 must be a string"),
    ]
    for stage, values, expected in calls:
        with pytest.raises(UserError) as refused:
            stage(config, **values)
        assert str(refused.value).startswith(expected)
    with pytest.raises(TypeError, match="takes a RunConfig first"):
        train_model("outputs")


def test_refused_values_are_named_together():
    config = RunConfig(local=True, project_name="my project")
    with pytest.raises(UserError) as refused:
        train_model(config, epochs=0, lora_r=-1)
    names = [line.partition(":")[0] for line in str(refused.value).splitlines()]
    assert names == ["project_name", "epochs", "lora_r"]


def test_python_values_may_be_text():
    """They are read as the command line reads them; one column needs no list."""
    lists = {"columns": {"title": ["Name"], "text": ["Body", "Details"]}}
    layers = {"targets": ("q_proj", "v_proj")}
    calls = [
        ("train_model", {"batch_size": "16"}, {"batch_size": 16}),
        ("train_model", layers, layers),
        ("evaluate_model", {"size": None}, {"size": None}),
        ("evaluate_model", {"run_name": "price-first"}, {"run_name": "first"}),
        ("evaluate_model", {"run_name": Path("price-first")}, {"run_name": "first"}),
        ("evaluate_model", {"earlier": "price-second"}, {"earlier": ["second"]}),
        (
            "prepare_prompts",
            {"columns": {"title": "Name", "text": ["Body", "Details"]}},
            lists,
        ),
        ("prepare_prompts", {"columns": ["title=Name", "text=Body", "text=Details"]}, lists),
    ]
    for function, given, expected in calls:
        assert check_call(function, given) == expected
    with pytest.raises(UserError, match="^columns: name=Product must be ROLE=NAME"):
        check_call("prepare_prompts", {"columns": {"name": "Product"}})
    with pytest.raises(UserError, match="^columns: title is named twice"):
        check_call("prepare_prompts", {"columns": {"title": ["Name", "Product"]}})


def test_recipes_are_the_courses():
    lite, full = RECIPES["lite"], RECIPES["full"]
    assert (lite.epochs, lite.batch_size, lite.lora_r, lite.val_size) == (1, 32, 32, 500)
    assert (full.epochs, full.batch_size, full.lora_r, full.val_size) == (3, 256, 256, 1000)
    assert (lite.logging_steps, lite.save_steps) == (5, 100)
    assert (full.logging_steps, full.save_steps) == (10, 200)
    assert (lite.targets, full.targets) == ("attention", "all")
    assert lite.lora_dropout == full.lora_dropout == 0.1
    assert lite.learning_rate == full.learning_rate == 1e-4


VALUES = {  # a value of each kind that no recipe has
    "keep_best": [],
    "scheduler": ["linear"],
    "targets": ["all"],
    "precision": ["fp32"],
    "base_weights": ["nf4"],
    "compile": ["off"],
    "lora_dropout": ["0.25"],
    "warmup": ["0.25"],
}


@pytest.mark.parametrize("name", [one.name for one in fields(Recipe)])
def test_recipe_fields_are_flags(name):
    """Each field of Recipe can be given, and is None, the mode's own value, if it isn't."""
    flag = "--" + name.replace("_", "-")
    args = vars(parse_arguments(["train", flag, *VALUES.get(name, ["7"])]))
    assert args[name] in (True, 7, 0.25, *VALUES.get(name, ()))
    assert vars(parse_arguments(["train"]))[name] is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("lora_r", "lite 32, full 256, demo 16"),
        ("lora_alpha", "twice the rank"),
        ("warmup", "0.01"),
        ("max_steps", "lite none, full none, demo 80"),
        ("keep_best", "the last"),
    ],
)
def test_help_states_recipe_defaults(name, text):
    (one,) = [one for one in fields(Recipe) if one.name == name]
    assert describe_default(one) == text
