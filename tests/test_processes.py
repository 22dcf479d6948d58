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

TRAIN = (
    *("--epochs", "2"),
    *("--batch-size", "12"),
    *("--save-steps", "2"),
    *("--learning-rate", "1e-3"),
)
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
    call(*begin, cwd=folder, hook="without_dropout")
    return folder


@pytest.fixture(scope="module")
def two(begin, prepared, tmp_path_factory):
    """The folder of the same run by two processes."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(prepared / "outputs", folder / "outputs")
    run_two([*begin, "--micro-batch", "3"], folder, "without_dropout")
    return folder


def run_two(arguments, folder, hook=None, codes=(0, 0)):
    processes = child.start_two(list(arguments), folder, hook)
    found = tuple(child.finish(process) for process in processes)
    assert found == codes, child.said(folder)


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


@pytest.fixture(scope="module")
def whole(begin, prepared, tmp_path_factory):
    """The folder of the run by two processes, with dropout."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(prepared / "outputs", folder / "outputs")
    run_two([*begin, "--micro-batch", "3"], folder)
    return folder


def begin_and_kill(begin, folder, rank, hook, *options):
    """Begins the run, whose process of this rank the hook kills; the launcher ends the other.

    Returns whether it was killed before it had ended.
    """
    start = [*begin, "--micro-batch", "3"]
    processes = child.start_two(start, folder, hook, *options, rank=rank)
    code = child.finish(processes[rank])
    was_killed = code == -signal.SIGKILL
    assert was_killed or code == 0, child.said(folder)
    if was_killed:
        processes[1 - rank].kill()
    child.finish(processes[1 - rank])
    return was_killed


def resume_and_compare(folder, whole):
    """Both processes resume the run; it has to end as one that was never interrupted."""
    run_two(["train", "--local", "--resume", "run"], folder)
    assert (folder / RUN / ADAPTER_FILE).read_bytes() == (whole / RUN / ADAPTER_FILE).read_bytes()
    assert read(folder / RUN / "run.json")["history"] == read(whole / RUN / "run.json")["history"]


def test_killed_process_resumes_exactly(begin, whole, project):
    assert begin_and_kill(begin, project, 1, "kill_at_step", 5)
    resume_and_compare(project, whole)
    assert "Resuming from step 4" in child.said(project)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("part", ["checkpoint-4", "checkpoint-12", "adapter.new"])
def test_kill_at_any_file_event(begin, whole, prepared, tmp_path, request, rank, part):
    """Of either process: of a save in mid-epoch, at the second epoch's end, and of the last."""
    all_kills = request.config.getoption("--all-kills")
    if not all_kills and (rank, part) != (0, "checkpoint-4"):
        pytest.skip("one of them is enough without --all-kills")
    for number in range(1, 200) if all_kills else (7,):
        folder = tmp_path / str(number)
        shutil.copytree(prepared / "outputs", folder / "outputs")
        if not begin_and_kill(begin, folder, rank, "kill_at_file_event", number, part):
            break  # there are fewer events
        resume_and_compare(folder, whole)
        shutil.rmtree(folder)
    else:
        assert not all_kills, "there are more events"


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


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--batch-size 7", "`batch_size` 7: can't be divided among 2 processes"),
        ("--micro-batch 4", "`micro_batch` 4: 6 rows a step and process can't be divided by it"),
        ("--run-name taken", "--run-name taken: outputs/price-taken exists already"),
    ],
)
def test_impossible_settings_are_said_once(begin, project, flags, problem):
    (project / "outputs/price-taken").mkdir()
    (project / "outputs/price-taken/run.json").write_text('{"run": "taken"}', encoding="utf-8")
    processes = child.start_two([*begin, *flags.split()], project)
    assert child.finish(processes[0]) == 1
    processes[1].kill()  # as the launcher does
    child.finish(processes[1])
    assert child.said(project).count(f"app.py train: {problem}") == 1


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
