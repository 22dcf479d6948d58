"""Damaged files, and two processes at once: what each fault comes to.

The table in BENCHMARKS.md, with full disks and the Hub's faults, is what this prints:

    python -m pytest -q tests/test_faults.py tests/test_stages.py tests/test_hub.py --fault-table
"""

import os
import shutil

import pytest

import child
import items
from conftest import DATASET, cut, flip, read, write_catalogue
from util import ADAPTER_FILE

RUN = "outputs/price-first"
RESUME = ("train", "--local", "--resume", "first")


def remove(file):
    file.unlink()


def empty(file):
    os.truncate(file, 0)


DAMAGES = {"removed": remove, "emptied": empty, "cut to half": cut, "one bit flipped": flip}
UNCHECKED = ("README.md", "loss.png", "prepare.png")  # nothing is read from them


def files_of(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def assert_each_file_is_checked(folder, damage):
    """Whichever file is damaged, the manifest names it; README.md isn't in it."""
    for name in files_of(folder):
        if name == "README.md":
            continue
        content = (folder / name).read_bytes()
        DAMAGES[damage](folder / name)
        problem = items.manifest_problem(folder)
        assert name in problem or (name == items.MANIFEST and problem), name
        (folder / name).write_bytes(content)
    assert items.manifest_problem(folder) is None


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_skipped(call, trained, tmp_path, outcomes, damage):
    """Whichever of its files: named in one line, and the checkpoint before it counts."""
    shutil.copytree(trained / "outputs", tmp_path / "outputs")
    run = tmp_path / RUN
    newest = run / "checkpoint-6"
    assert_each_file_is_checked(newest, damage)
    DAMAGES[damage](newest / "optimizer.pt")
    (run / ADAPTER_FILE).unlink()
    said = call(*RESUME, cwd=tmp_path)
    assert "checkpoint-6 is skipped: optimizer.pt is " in said
    assert "Resuming from step 3" in said
    assert (run / ADAPTER_FILE).read_bytes() == (trained / RUN / ADAPTER_FILE).read_bytes()
    outcomes["each file of a checkpoint", damage] = "named; the checkpoint before it counts, exact"


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_run_is_made_again(call, shared, trained, tmp_path, outcomes, damage):
    """`eval` names the file; `--resume` makes it again, the same to the bit.

    Every file and damage is found; the program is called for each file, and for each damage.
    """
    before = (trained / RUN / ADAPTER_FILE).read_bytes()
    shutil.copytree(trained / RUN, tmp_path / "checked")
    assert_each_file_is_checked(tmp_path / "checked", damage)
    names = ["run.json", ADAPTER_FILE]
    if damage == "one bit flipped":
        names += ["adapter_config.json", "tokenizer.json"]
    for name in names:
        folder = tmp_path / name
        shutil.copytree(trained / "outputs", folder / "outputs")
        DAMAGES[damage](folder / RUN / name)
        if not (name == ADAPTER_FILE and damage == "removed"):  # then it is unfinished
            evaluate = ("eval", *shared, "--run-name", "first", "--size", "1")
            assert f"app.py eval: first: {name} is " in call(*evaluate, cwd=folder, code=1)
        call(*RESUME, cwd=folder)
        assert (folder / RUN / ADAPTER_FILE).read_bytes() == before
        assert items.manifest_problem(folder / RUN) is None
    outcomes["each file of a finished run", damage] = "named by eval; --resume makes it again"


@pytest.mark.parametrize("damage", ["emptied", "cut to half", "one bit flipped"])
def test_damaged_record_stops_no_other_run(call, shared, trained, tmp_path, outcomes, damage):
    shutil.copytree(trained / "outputs", tmp_path / "outputs")
    shutil.copytree(tmp_path / RUN, tmp_path / "outputs/price-other")
    DAMAGES[damage](tmp_path / "outputs/price-other/run.json")
    said = call("eval", *shared, "--size", "1", cwd=tmp_path)
    assert "Run: price-first" in said
    outcomes["run.json of another run", damage] = "skipped"


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_dataset_is_named(call, shared, prepared, tmp_path, outcomes, damage):
    for name in files_of(prepared / DATASET):
        if name in (items.MANIFEST, *UNCHECKED):
            continue
        folder = tmp_path / name
        shutil.copytree(prepared / "outputs", folder / "outputs")
        DAMAGES[damage](folder / DATASET / name)
        said = call("train", *shared, "--max-steps", "1", cwd=folder, code=1)
        assert f"{DATASET}: {name} is " in said
        assert "Run the stage prepare again" in said
        assert not list((folder / "outputs").glob("price-*"))
    outcomes["each file of a dataset", damage] = "named before training; prepare makes it again"


# Two at once


def run_two(first, second, folder):
    """The exit codes of two stages that run at the same time."""
    processes = [child.start(list(arguments), folder) for arguments in (first, second)]
    return sorted(child.finish(process) for process in processes)


def test_two_trainings_get_two_folders(shared, project, outcomes):
    """Default names are those of a second; both end with a whole run."""
    start = ("train", *shared, "--max-steps", "2", "--batch-size", "4")
    codes = [0, 0]
    assert run_two(start, start, project) == codes
    runs = sorted((project / "outputs").glob("price-*"))
    assert len(runs) == 2
    for run in runs:
        assert items.manifest_problem(run) is None
        assert read(run / "run.json")["run"] == run.name.removeprefix("price-")
    outcomes["train × train", "no name"] = "two whole runs"


def test_two_trainings_cannot_share_a_name(shared, project, outcomes):
    start = ("train", *shared, "--run-name", "one", "--max-steps", "2", "--batch-size", "4")
    assert run_two(start, start, project) == [0, 1]
    assert items.manifest_problem(project / "outputs/price-one") is None
    said = child.said(project)
    assert "Traceback" not in said
    assert "exists already" in said or "has just begun by this name" in said
    outcomes["train × train", "one name"] = "one trains, the other is one line"


def test_live_run_is_not_resumed(call, shared, project, outcomes):
    """Neither by name, nor as the newest, nor by a new run of its name."""
    start = ["train", *shared, "--run-name", "live", "--max-steps", "400", "--batch-size", "4"]
    process = child.start(start, project)
    child.wait_for("step     1", project)
    for flags in (("--resume", "live"), ("--resume",)):
        said = call("train", "--local", *flags, cwd=project, code=1)
        assert "live: another process is training it" in said
    said = call(*start, cwd=project, code=1)
    assert "exists already. Resume it by --resume live" in said
    process.kill()
    child.finish(process)
    call("train", "--local", "--resume", "live", "--dry-run", cwd=project)
    outcomes["train × --resume", "one run"] = "one line; free again when the first has ended"


def test_leftovers_are_no_new_run(call, shared, project):
    folder = project / "outputs/price-mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("keep")
    said = call("train", *shared, "--run-name", "mine", cwd=project, code=1)
    assert "exists, and is no run. Remove it or give another name" in said


def test_two_evaluations_leave_one_whole(shared, trained_project, outcomes):
    first = ("eval", *shared, "--run-name", "first", "--size", "4")
    second = ("eval", *shared, "--run-name", "first", "--size", "2")
    assert run_two(first, second, trained_project) == [0, 0]
    folder = trained_project / RUN / "eval"
    results = read(folder / "results.json")
    lines = (folder / "predictions.csv").read_text().strip().splitlines()
    assert len(lines) - 1 == results["n"]
    assert not list(folder.parent.glob(".*"))
    outcomes["eval × eval", "one run, two sizes"] = "both end; the later one stays, whole"


def test_two_prepares_leave_one_whole(shared, tmp_path, outcomes):
    catalogues = [write_catalogue(tmp_path / f"{n}.jsonl", n) for n in (60, 80)]
    stages = [("prepare", *shared, "--source", catalogue) for catalogue in catalogues]
    assert run_two(*stages, tmp_path) == [0, 0]
    folder = tmp_path / DATASET
    assert items.manifest_problem(folder) is None
    kept = sum(read(folder / "prepare.json")["kept"].values())
    assert sum(map(len, items.load_prompts(folder).values())) == kept
    outcomes["prepare × prepare", "one dataset"] = "both end; the later one stays, whole"
