"""Several processes, as torchrun or accelerate start them, on CPUs: the measure is what one process does."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy
import pytest
from safetensors.numpy import load_file

import app
import child
from conftest import ROOT

TRAIN = ("--epochs", "2", "--batch-size", "12", "--save-steps", "2", "--learning-rate", "1e-3")


def read(path):
    return json.loads(path.read_text("utf-8"))


def end(processes, codes=(0, 0)):
    for process in processes:
        process.join(120)
    assert tuple(process.exitcode for process in processes) == codes


def copy_data(source, folder):
    shutil.copytree(source / "outputs/datasets", folder / "outputs/datasets")
    return folder


@pytest.fixture(scope="module")
def one(run, prepared, tmp_path_factory):
    """The run of a single process, without dropout: each process draws its own."""
    folder = copy_data(run.folder, tmp_path_factory.mktemp("one"))
    end([child.start(["train", *prepared, "--run-name", "run", *TRAIN], folder, "without_dropout")], (0,))
    return folder / "outputs/price-run"


@pytest.fixture(scope="module")
def two(run, prepared, tmp_path_factory):
    folder = copy_data(run.folder, tmp_path_factory.mktemp("two"))
    end(child.start_two(["train", *prepared, "--run-name", "run", *TRAIN, "--micro-batch", "3"], folder, "without_dropout"))
    return folder / "outputs/price-run"


def assert_equal_runs(one, other, within):
    adapter, expected = (load_file(folder / app.ADAPTER_FILE) for folder in (other, one))
    assert adapter.keys() == expected.keys()
    for name in expected:
        numpy.testing.assert_allclose(adapter[name], expected[name], atol=within, rtol=0)
    for found, entry in zip(read(other / "run.json")["history"], read(one / "run.json")["history"], strict=True):
        assert found == pytest.approx(entry, abs=10 * within, rel=1e-4)


def test_two_processes_train_as_one_with_the_same_batch(one, two):
    assert read(two / "run.json")["processes"] == 2 and "3, × 2 accumulated × 2 processes = 12" in read(two / "run.json")["plan"]["Micro-batch"]
    assert_equal_runs(one, two, 1e-5)


def test_one_process_talks(two):
    said = child.said(two.parents[1])
    assert said.count("Trained to step 12") == 1 and said.count("Device:") == 1 and "Traceback" not in said


def torchrun(arguments, folder, **environment):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--", ROOT / "app.py", *arguments],
                          cwd=folder, capture_output=True, text=True, timeout=200, env=os.environ | environment)


def test_a_killed_process_ends_the_other_and_the_run_goes_on_exactly(run, prepared, tmp_path):
    whole, folder = copy_data(run.folder, tmp_path / "whole"), copy_data(run.folder, tmp_path / "killed")
    start = ["train", *prepared, "--run-name", "run", *TRAIN, "--micro-batch", "3"]  # with dropout
    end(child.start_two(start, whole))
    processes = child.start_two(start, folder, "kill_at_step", 5, rank=1)
    processes[1].join(120)
    processes[0].terminate()  # as torchrun does
    processes[0].join(5)
    processes[0].kill()  # and 30 s later
    end(child.start_two(["train", "--local", "--resume", "run"], folder))
    assert "Going on from step 4" in child.said(folder)
    runs = [one / "outputs/price-run" for one in (whole, folder)]
    assert len({(one / app.ADAPTER_FILE).read_bytes() for one in runs}) == 1
    assert read(runs[0] / "run.json")["history"] == read(runs[1] / "run.json")["history"]


def test_a_signal_to_one_process_stops_both_after_the_same_step(run, prepared, tmp_path):
    folder = copy_data(run.folder, tmp_path)
    processes = child.start_two(["train", *prepared, "--run-name", "run", *TRAIN, "--micro-batch", "3"], folder, "slow_down", 1)
    while "sleeping" not in (child.said(folder) if (folder / "said.txt").exists() else ""):
        time.sleep(0.1)
    os.kill(processes[1].pid, signal.SIGTERM)
    end(processes, (143, 143))
    said = child.said(folder)
    assert "which is saved. Go on by `torchrun --nproc-per-node 2 -- app.py train --resume run" in said and "Traceback" not in said
    assert sorted((folder / "outputs/price-run/checkpoint-2").glob("rng_state_*.pth")) != []  # the step after the signal's
    assert app.manifest_problem(folder / "outputs/price-run/checkpoint-2") is None


@pytest.mark.parametrize("arguments, said", [
    (("--batch-size", "7"), "--batch-size 7: can't be divided among 2 processes"),
    (("--micro-batch", "4"), "--micro-batch 4: 6 rows a step and process can't be divided by it"),
    (("--run-name", "there"), "--run-name there: outputs/price-there exists already")])
def test_what_two_processes_can_not_do_is_said_once(run, prepared, tmp_path, arguments, said):
    folder = copy_data(run.folder, tmp_path)
    (folder / "outputs/price-there").mkdir()
    (folder / "outputs/price-there/run.json").write_text("{}", encoding="utf-8")
    done = torchrun(["train", *prepared, "--run-name", "run", *TRAIN, *arguments], folder)
    assert done.returncode == 1 and done.stderr.count(f"app.py train: {said}") == 1, done.stdout + done.stderr


def test_torchrun_starts_it(run, prepared, one, tmp_path):
    folder = copy_data(run.folder, tmp_path)
    done = torchrun(["train", *prepared, "--run-name", "run", "--max-steps", "2", "--batch-size", "12"], folder)
    assert done.returncode == 0 and done.stdout.count("Trained to step 2") == 1, done.stdout + done.stderr
