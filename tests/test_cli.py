"""The command line: instant, and the same before and after the subcommand."""
import json
import subprocess
import sys

import pytest

import app
from app import build_parser
from conftest import ROOT


def without_packages(*arguments):
    """Runs app.py by an interpreter that sees no installed package."""
    return subprocess.run([sys.executable, "-S", "-E", ROOT / "app.py", *arguments], capture_output=True, text=True)


def test_help_needs_no_package():
    done = without_packages("--help")
    assert done.returncode == 0 and "python app.py prepare" in done.stdout
    for stage in ("prepare", "train", "eval"):
        assert without_packages(stage, "--help").returncode == 0


@pytest.mark.parametrize("arguments", [
    (), ("fly",), ("train", "--epochs", "0"), ("train", "--batch-size", "-1"), ("train", "--max-steps", "1.5"),
    ("train", "--learning-rate", "0"), ("train", "--lora-r", "x"), ("train", "--seed", "-1"), ("eval", "--size", "0"), ("prepare", "--cutoff", "0"),
    ("--lite", "train", "--demo"), ("train", "--lite", "--demo"), ("train", "--nosuch"), ("eval", "@nosuch.txt"),
    ("train", "--run-name", "../up"), ("--project-name", "a/b", "train")])
def test_usage_errors_need_no_package_and_exit_2(arguments):
    done = without_packages(*arguments)
    assert done.returncode == 2 and "error:" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("flags", [["--lite"], ["--demo"], ["--local"], ["--base-model", "m"], ["--project-name", "p"],
                                   ["--data-user", "u"], ["--output-dir", "o"], ["--seed", "7"]])
@pytest.mark.parametrize("stage", ["prepare", "train", "eval"])
def test_shared_flags_mean_the_same_before_and_after_the_subcommand(stage, flags):
    parser = build_parser()
    before, after = parser.parse_args([*flags, stage]), parser.parse_args([stage, *flags])
    assert vars(before) == vars(after) != vars(parser.parse_args([stage]))


def test_the_commands_of_the_original_readme_parse():
    parser = build_parser()
    parser.parse_args("prepare --lite --hf-dataset-user me".split())
    parser.parse_args("train --lite --hf-user me --log-wandb --seed 42".split())
    args = parser.parse_args("eval --lite --hf-user me --run-name 2025-11-30_15.10.55-lite --seed 42".split())
    assert args.lite and args.run_name == "2025-11-30_15.10.55-lite" and args.size == 200
    assert parser.parse_args("eval --size all".split()).size is None


def test_a_file_of_arguments_keeps_one_runs_settings(tmp_path):
    (tmp_path / "run.txt").write_text("train --lite  # the course's\n--learning-rate 2e-4\n\n--run-name 'my-run'\n")
    args = build_parser().parse_args([f"@{tmp_path / 'run.txt'}"])
    assert (args.stage, args.lite, args.learning_rate, args.run_name) == ("train", True, 2e-4, "my-run")


def test_a_project_sees_its_own_runs_only(tmp_path):
    for project, run in (("price", "one"), ("price-lab", "two")):
        (tmp_path / f"{project}-{run}").mkdir()
        (tmp_path / f"{project}-{run}/run.json").write_text(json.dumps({"run": run}), encoding="utf-8")
    for project, run in (("price", "one"), ("price-lab", "two")):
        assert [*app.local_runs(app.RunConfig(None, project, None, True, output_dir=str(tmp_path)))] == [run]


def test_a_run_that_is_not_finished_is_called_so(capsys, tmp_path):
    (tmp_path / "price-half").mkdir()
    (tmp_path / "price-half/run.json").write_text(json.dumps({"run": "half", "mode": "lite"}), encoding="utf-8")
    with pytest.raises(SystemExit):
        app.main(["eval", "--local", "--output-dir", str(tmp_path), "--run-name", "half"])
    assert "If it isn't finished, go on by `python app.py train --resume half" in capsys.readouterr().err
