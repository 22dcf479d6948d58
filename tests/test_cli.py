"""The command line: instant, and the same before and after the subcommand."""
import subprocess
import sys

import pytest

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
