"""The command line: instant, and the same before and after the subcommand."""

import ast
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
    Recipe,
    RunConfig,
    build_parser,
    check_values,
    defaults_of,
    evaluate_model,
    parse_arguments,
    prepare_prompts,
    price_items,
    stage,
    train_model,
)
from conftest import ROOT
from items import Stopped, UserError

SHARED_FLAGS = ["--lite", "--demo", "--local", "--base-model m", "--project-name p"]
SHARED_FLAGS += ["--data-user u", "--output-dir o", "--seed 7"]
NONSENSE = {  # what is typed: part of the answer
    "": "required: {prepare,train,eval}",
    "fly": "invalid choice: 'fly'",
    "train --epochs 0": "0 must be a whole number of at least 1, or `auto`",
    "train --lora-dropout 1": "1 must be a number of at least 0 and below 1",
    "train --nosuch": "unknown: --nosuch; see `python app.py train --help`",
    "train --epoch=3": "unknown: --epoch=3; did you mean --epochs?; see",
    "train --hf_user me": "did you mean --hf-user?",
    "train --source a.csv": "--source is a flag of prepare and eval",
    "prepare --lr 1e-4": "--learning-rate is a flag of train",
    "train --lr 1e-4": "did you mean --learning-rate?",
    "eval --input a.csv --text lamp": "--input and --text exclude each other",
    "train --run-name ../up": "../up must be letters, digits",
    "train --resume one --run-name two": "--resume an earlier one",
    "--lite train --demo": "--lite and --demo exclude each other",
    "eval --size 0": "0 must be a whole number of at least 1, or `all`",
    "eval @nosuch.txt": "No such file",
    "prepare --unit 7": "7 must be 0.01, 0.1, 1, 10",
    "prepare --columns title=Name": "--columns: does nothing here",
    "prepare --source a.csv --columns Name": "Name must be ROLE=NAME",
    "eval --text lamp --size 5": "--size: does nothing here",
    "train --demo --hf-user u": "--hf-user: does nothing here",
}


def run_without_packages(*arguments):
    """app.py by an interpreter that sees no installed package."""
    command = [sys.executable, "-S", "-E", ROOT / "app.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def parse(line):
    """(function, config, arguments) of what is typed."""
    return parse_arguments(shlex.split(line))[1:]


@pytest.mark.parametrize("name", ["", "prepare", "train", "eval"])
def test_help_is_instant(name):
    """Within 0.3 seconds, and with no package installed."""
    start = time.time()
    done = run_without_packages(*name.split(), "--help")
    taken = time.time() - start
    assert f"app.py {name}" in done.stdout
    assert done.returncode == 0
    assert taken < 0.3


@pytest.mark.parametrize("line", NONSENSE)
def test_nonsense_is_a_usage_error(line):
    """One line, exit code 2, and no package is needed for it."""
    done = run_without_packages(*line.split())
    assert done.returncode == 2
    assert NONSENSE[line] in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_packages_are_one_line():
    """As when the virtual environment was not activated: named, with what to do."""
    done = run_without_packages("train", "--demo")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("app.py train: ")
    assert "pip install -r requirements.txt" in line


def test_older_pythons_are_one_line():
    """The file has to be readable for them, up to the line that says so."""
    source = (ROOT / "app.py").read_text("utf-8")
    before, check, _ = source.partition('    sys.exit(f"app.py needs Python 3.11')
    assert check
    ast.parse(source, feature_version=(3, 7))
    assert "@dataclass" not in before


WITHOUT_POSIX = """
import signal, sys, types
import util  # the libraries need more of Linux than our modules do
for name in ("util", "items"):
    del sys.modules[name]
sys.modules |= {"fcntl": None, "resource": None}
for name in ("SIGALRM", "SIGHUP", "SIGKILL", "SIGQUIT", "SIGUSR1"):
    delattr(signal, name)
import util, items, app
found = types.SimpleNamespace(rss=1, peak_wset=2)
util.psutil.Process = lambda: types.SimpleNamespace(memory_info=lambda: found)
print(app.STAGES.keys(), util.memory().peak)
"""


def test_modules_need_no_posix():
    done = subprocess.run([sys.executable, "-c", WITHOUT_POSIX], cwd=ROOT, capture_output=True)
    assert done.stdout.endswith(b" 2\n"), done.stderr


@pytest.mark.parametrize(
    "line, said",
    [
        ("prepare --demo --source nosuch.csv", "nosuch.csv: can't be read: No such file"),
        ("prepare --demo --source own.csv --columns price=Preiss", "no column for Preiss"),
        ("eval --demo --input nosuch.csv", "nosuch.csv: can't be read: No such file"),
        ("eval --demo --input own.csv --columns price=Preiss", "no column for Preiss"),
        ("eval --demo --input own.csv --output no/folder.csv", "there is no folder no. Make it"),
    ],
)
def test_mistakes_need_no_torch(tmp_path, line, said):
    """They are found before the imports that take seconds."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')")
    (tmp_path / "own.csv").write_text("Name;Preis;Text\nLamp;5;of brass\n")
    command = [sys.executable, ROOT / "app.py", *line.split()]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert said in done.stderr
    assert done.returncode == 1


def test_help_needs_no_encoding():
    """Signs that a terminal's encoding lacks become question marks."""
    command = [sys.executable, "-S", ROOT / "app.py", "--help"]
    environment = os.environ | {"PYTHONUTF8": "0", "LC_ALL": "C"}
    done = subprocess.run(command, env=environment, capture_output=True)
    assert "items ? prompts" in done.stdout.decode("ascii")


@pytest.mark.parametrize("name", ["prepare", "train", "eval"])
def test_shared_flags_work_everywhere(name):
    """They mean the same before and after the subcommand."""
    for flag in SHARED_FLAGS:
        assert parse(f"{flag} {name}") == parse(f"{name} {flag}")
        assert parse(f"{flag} {name}") != parse(name)


def test_original_commands_parse():
    for line in (
        "prepare --lite --hf-dataset-user me",
        "train --lite --hf-user me --log-wandb --seed 42",
        "eval --lite --hf-user me --run-name 2025-11-30_15.10.55-lite --seed 42",
    ):
        assert parse(line)[1].lite_mode


def test_only_given_values_are_passed():
    """All others are the functions' own defaults; `all` test items are None."""
    line = "eval --size all --compare price-one two --lite"
    assert parse(line)[1:] == (
        RunConfig(lite_mode=True),
        {"size": None, "earlier": ["price-one", "two"]},
    )
    assert defaults_of(evaluate_model)["size"] == 200
    assert parse("train --no-4bit --resume")[2] == {"use_4bit": False, "resume": ""}
    line = "prepare --source a.csv --columns title=Name text=A=B --columns text=C --unit 10"
    columns = ["title=Name", "text=A=B", "text=C"]
    assert parse(line)[2] == {"source": "a.csv", "columns": columns, "unit": 10}


def test_arguments_come_from_a_file(tmp_path):
    file = tmp_path / "run.txt"
    file.write_text("train --lite  # the course's\n--learning-rate 2e-4\n\n--run-name 'my-run'\n")
    assert parse(f"@{file}") == parse("train --lite --learning-rate 2e-4 --run-name my-run")


def test_every_flag_states_its_default():
    for parser in build_parser()._subparsers._group_actions[0].choices.values():
        for action in parser._actions[1:]:
            assert "default" in action.help, action.dest


def test_stop_button_is_one_line():
    """Also where no training goes on: no traceback of a library in a notebook."""

    @stage
    def wait(config):
        raise KeyboardInterrupt

    with pytest.raises(Stopped) as stopped:
        wait(RunConfig())
    assert stopped.value._render_traceback_() == ["wait is stopped: call it again."]


def test_unknown_settings_raise_typeerror():
    for name in ("learning_rat", "curency"):
        for function in (train_model, prepare_prompts):
            with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
                function(RunConfig(local=True), **{name: 1})
    with pytest.raises(TypeError, match="'outputs' isn't a RunConfig"):
        train_model("outputs")


@pytest.mark.parametrize(
    "function, name, value",
    [
        (prepare_prompts, "unit", 7),
        (prepare_prompts, "currency", "1 $"),
        (train_model, "epochs", 1.5),
        (train_model, "learning_rate", "fast"),
        (train_model, "keep_best", "yes"),
        (train_model, "run_name", "a/b"),
        (evaluate_model, "size", 0),
        (price_items, "decode", "best"),
        (price_items, "text", ["a lamp", "a sofa"]),
    ],
)
def test_python_values_are_checked(function, name, value):
    """As a command's, before anything slow."""
    with pytest.raises(UserError, match=rf"^{name}: .*{re.escape(str(value))}.* must be "):
        function(RunConfig(local=True), **{name: value})


def test_refused_values_are_named_together():
    config = RunConfig(local=True, project_name="my project")
    with pytest.raises(UserError) as refused:
        train_model(config, epochs=0, lora_r=-1)
    names = [line.partition(":")[0] for line in str(refused.value).splitlines()]
    assert names == ["project_name", "epochs", "lora_r"]


def test_python_values_may_be_text():
    """They are read as the command line reads them; one of several needs no list."""
    columns = {"title": "Name", "text": ["Body", "Details"]}
    pairs = [
        ({"batch_size": "16"}, {"batch_size": 16}),
        ({"size": None}, {"size": None}),
        ({"run_name": Path("first")}, {"run_name": "first"}),
        ({"earlier": "second"}, {"earlier": ["second"]}),
        ({"columns": columns}, {"columns": columns}),
        ({"unit": 10.0}, {"unit": 10}),
    ]
    for given, expected in pairs:
        assert check_values(RunConfig(), given) == expected


def test_recipe_fields_are_flags():
    """Each can be given to `train`, and is passed on by its own name."""
    train = build_parser()._subparsers._group_actions[0].choices["train"]
    flags = {action.dest: action.option_strings[0] for action in train._actions}
    for one in fields(Recipe):
        assert flags[one.name] == "--" + one.name.replace("_", "-")


def test_help_states_recipe_defaults():
    defaults = defaults_of(train_model)
    assert defaults["lora_r"] == "lite 32, full 256, demo 16"
    assert defaults["lora_alpha"] == "twice the rank"
    assert defaults["max_steps"] == "lite none, full none, demo 80"
    assert defaults["keep_best"] == "off"
