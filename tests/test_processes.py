"""Several processes, as torchrun or accelerate start them, on CPUs.

The measure is what one process does.
"""

import os
import shutil
import signal
import subprocess
import sys

import numpy
import pytest
from safetensors.numpy import load_file

import child
import items
from conftest import ROOT, read
from util import ADAPTER_FILE

TRAIN = ("--epochs=2", "--batch-size=12", "--save-steps=2", "--learning-rate=1e-3")
RUN = "outputs/price-run"


@pytest.fixture(scope="module")
def begin(shared):
    """The arguments that begin the run."""
    return ("train", *shared, "--run-name", "run", *TRAIN)


@pytest.fixture(scope="module")
def one(call, begin, prepared, tmp_path_factory):
    """The folder of the run by one process, without dropout: each process draws its own."""
    folder = tmp_path_factory.mktemp("one")
    shutil.copytree(prepared / "outputs", folder / "outputs")
    call(*begin, "--lora-dropout", "0", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def two(begin, prepared, tmp_path_factory):
    """The folder of the same run by two processes."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(prepared / "outputs", folder / "outputs")
    run_two([*begin, "--micro-batch", "3", "--lora-dropout", "0"], folder)
    return folder


def run_two(arguments, folder):
    processes = child.start_two(list(arguments), folder)
    codes = [child.finish(process) for process in processes]
    assert codes == [0, 0], child.said(folder)


def test_two_processes_train_as_one(one, two):
    """The same adapter and losses to 1e-5, with the same batch."""
    adapter = load_file(two / RUN / ADAPTER_FILE)
    expected = load_file(one / RUN / ADAPTER_FILE)
    assert adapter.keys() == expected.keys()
    for name, values in expected.items():
        numpy.testing.assert_allclose(adapter[name], values, atol=1e-5, rtol=0)
    history = read(two / RUN / "run.json")["history"]
    for found, entry in zip(history, read(one / RUN / "run.json")["history"], strict=True):
        assert found == pytest.approx(entry, abs=1e-4, rel=1e-4)


def test_one_process_talks_and_records(two):
    record = read(two / RUN / "run.json")
    assert record["processes"] == 2
    assert "3, × 2 accumulated × 2 processes = 12" in record["plan"]["Micro-batch"]
    said = child.said(two)
    assert said.count("Trained to step 12") == 1
    assert said.count("Device:") == 1
    assert "Traceback" not in said


def test_killed_processes_resume_exactly(begin, prepared, tmp_path):
    """With dropout: either is killed, in a step and while a checkpoint is saved."""
    start = [*begin, "--micro-batch", "3"]
    for name in ("whole", "0", "1"):
        shutil.copytree(prepared / "outputs", tmp_path / name / "outputs")
    whole = tmp_path / "whole"
    run_two(start, whole)
    for rank, hook in enumerate([("kill_at_file_event", 7, "checkpoint-6"), ("kill_at_step", 5)]):
        folder = tmp_path / str(rank)
        processes = child.start_two(start, folder, *hook, rank=rank)
        assert child.finish(processes[rank]) == -signal.SIGKILL
        processes[1 - rank].kill()  # as the launcher does
        child.finish(processes[1 - rank])
        run_two(["train", "--local", "--resume", "run"], folder)
        assert "Resuming from step 4" in child.said(folder)
        found, expected = [(path / RUN / ADAPTER_FILE).read_bytes() for path in (folder, whole)]
        assert found == expected
        found, expected = [read(path / RUN / "run.json")["history"] for path in (folder, whole)]
        assert found == expected


def test_signal_stops_both_alike(begin, project):
    """A signal to one process ends both after the same step, which is saved."""
    processes = child.start_two([*begin, "--micro-batch", "3"], project, "slow_down", 1)
    child.wait_for("sleeping", project)
    os.kill(processes[1].pid, signal.SIGTERM)
    codes = [child.finish(process) for process in processes]
    said = child.said(project)
    assert codes == [128 + signal.SIGTERM] * 2, said
    assert "which is saved. Resume by `" in said
    assert "Traceback" not in said
    (checkpoint,) = (project / RUN).glob("checkpoint-*")
    assert items.manifest_problem(checkpoint) is None
    assert len(list(checkpoint.glob("rng_state_*.pth"))) == 2


def test_impossible_settings_are_said_once(begin, project):
    processes = child.start_two([*begin, "--micro-batch", "4"], project)
    assert child.finish(processes[0]) == 1
    processes[1].kill()  # as the launcher does
    child.finish(processes[1])
    problem = "app.py train: --batch-size 12: has to be a multiple of 8"
    assert child.said(project).count(problem) == 1


def test_torchrun_starts_it(begin, project):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--"]
    command += [ROOT / "app.py", *begin, "--max-steps", "2"]
    options = {"capture_output": True, "text": True, "timeout": 200}
    done = subprocess.run(command, cwd=project, **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Trained to step 2") == 1


def test_other_stages_run_once(two, shared, tmp_path):
    """Of several processes one prepares and evaluates."""
    shutil.copytree(two / "outputs", tmp_path / "outputs")
    run_two(["eval", "--local", "--size", "2"], tmp_path)
    assert child.said(tmp_path).count("Saved: outputs/price-run/eval") == 1
