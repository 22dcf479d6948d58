"""Damaged files, and two processes at once."""

import itertools
import os
import pickle
import shutil

import pytest

import child
import items
import util
from conftest import DATASET, TRAIN, cut, flip, read, write_catalogue
from util import ADAPTER_FILE

RUN = "outputs/price-first"
RESUME = ("train", "--local", "--resume", "first")


def test_each_file_is_checked(trained_project):
    """Whichever is damaged, in a dataset, a run or a checkpoint: a manifest names it."""
    for place in (DATASET, RUN, f"{RUN}/checkpoint-6"):
        folder = trained_project / place
        names = items.read_json(folder / items.MANIFEST)
        files = {path.name for path in folder.iterdir() if path.is_file()}
        assert files - {*names} <= {items.MANIFEST, "README.md", ".lock"}
        for name in names:
            flip(folder / name)
            assert items.manifest_problem(folder) == f"{name} is corrupt"
            flip(folder / name)
        assert items.manifest_problem(folder) is None
        cut(folder / items.MANIFEST)
        assert items.manifest_problem(folder) == "manifest.json is corrupt"


def forbid(file):
    file.chmod(0)


def put_folder(file):
    file.unlink()
    file.mkdir()


def put_pickle(file):
    """That a manifest covers, as of a checkpoint from elsewhere."""
    file.write_bytes(pickle.dumps(print))
    items.write_manifest(file.parent)


def put_file(file):
    """In the place of the folder that it is in."""
    shutil.rmtree(file.parent)
    file.parent.write_text("a file")


@pytest.mark.parametrize("damage", [os.remove, cut, flip, forbid, put_folder, put_file, put_pickle])
def test_damaged_checkpoint_is_skipped(call, trained, trained_project, damage):
    """It is named, the one before it counts; times add up."""
    run = trained_project / RUN
    damage(run / "checkpoint-6/optimizer.pt")
    (run / ADAPTER_FILE).unlink()
    record = read(run / "run.json")
    changed = {"seconds": {"load": 100, "train": 1000}}
    items.write_json(run / "run.json", record | changed, with_checksum=True)
    said = call(*RESUME, cwd=trained_project, hook="drop_powers")
    name = "manifest.json" if damage is put_file else "optimizer.pt"
    assert f"checkpoint-6 is skipped: {name} " in said
    assert "Resuming from step 3" in said
    assert (run / ADAPTER_FILE).read_bytes() == (trained / RUN / ADAPTER_FILE).read_bytes()
    assert read(run / "run.json")["history"] == record["history"]
    seconds = read(run / "run.json")["seconds"]
    assert seconds["load"] > 100
    assert seconds["train"] > 1000


@pytest.mark.parametrize(
    "name, damage",
    [("run.json", flip), (ADAPTER_FILE, flip), ("adapter_config.json", forbid)],
)
def test_damaged_run_is_made_again(call, shared, trained_project, name, damage):
    """`eval` names the file; `--resume` makes it again, the same to the bit."""
    run = trained_project / RUN
    before = (run / ADAPTER_FILE).read_bytes()
    damage(run / name)
    evaluate = ("eval", *shared, "--run-name", "first", "--size", "1")
    said = call(*evaluate, cwd=trained_project, code=1, hook="drop_powers")
    assert f"app.py eval: first: {name} " in said
    call(*RESUME, cwd=trained_project)
    assert (run / ADAPTER_FILE).read_bytes() == before
    assert items.manifest_problem(run) is None


def test_no_flip_changes_a_setting(trained, tmp_path):
    """In any byte of run.json, names of fields included, where no checkpoint has a copy yet."""
    file = tmp_path / "run.json"
    written = (trained / RUN / "run.json").read_bytes()
    file.write_bytes(written)
    expected = util.Run.from_record(tmp_path, util.read_record(tmp_path))
    for place, bit in itertools.product(range(len(written)), (1, 4)):
        flipped = bytearray(written)
        flipped[place] ^= bit
        file.write_bytes(flipped)
        record = util.read_record(tmp_path)
        assert not record or util.Run.from_record(tmp_path, record) == expected


def test_old_evaluation_stops_no_new_one(call, shared, trained_project):
    """Whatever has its name."""
    evaluate = ("eval", *shared, "--run-name", "first", "--size", "1")
    folder = trained_project / RUN / "eval"
    folder.write_text("a file")
    call(*evaluate, cwd=trained_project)
    (folder / "results.json").write_text('{"data": null}')
    call(*evaluate, cwd=trained_project)
    assert read(folder / "results.json")["n"] == 1


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files to another user")
def test_other_users_files_stop_no_own_run(call, shared, trained_project):
    """In one folder; what can't be replaced is one line before the work."""
    outputs = trained_project / "outputs"
    for path in outputs.rglob("*"):
        os.chown(path, 65534, 65534)
    outputs.chmod(0o777)
    here = {"cwd": trained_project, "hook": "drop_powers"}
    call("train", *shared, "--run-name", "own", "--max-steps", "2", "--batch-size", "4", **here)
    call("eval", "--local", "--run-name", "own", "--size", "1", **here)
    said = call("eval", "--local", "--run-name", "first", "--size", "1", code=1, **here)
    assert "asking" not in said
    assert f"{RUN}/eval: can't be written to (Permission denied)" in said
    catalogue = write_catalogue(trained_project / "new.jsonl")
    said = call("prepare", *shared, "--source", catalogue, code=1, **here)
    assert f"{DATASET}: can't be written to (Permission denied)" in said


def test_damaged_record_stops_no_other_run(call, shared, trained_project):
    other = trained_project / "outputs/price-other"
    shutil.copytree(trained_project / RUN, other)
    cut(other / "run.json")
    assert "Run: price-first" in call("eval", *shared, "--size", "1", cwd=trained_project)


def test_what_others_left_stops_nothing(tmp_path):
    """Copies of checkpoints, another program's record, what another host is writing."""
    for name in ("checkpoint-old", "checkpoint-10.bak", "checkpoint-3"):
        (tmp_path / name).mkdir()
    assert [step for step, _ in util.checkpoints(tmp_path)] == [3]
    (tmp_path / "run.json").write_text('{"epochs": 3}')
    assert util.read_record(tmp_path) == {}
    written = items.temporary_folder(tmp_path / "data")
    start = written.name.removesuffix(str(os.getpid()))
    others = written.with_name(f"{start}1-999999999")  # of a host whose name begins like ours
    others.mkdir()
    items.finish_interrupted_replace(tmp_path / "data")
    assert others.exists()


def test_damaged_dataset_is_named(call, shared, project):
    """Before anything is trained."""
    flip(project / DATASET / "val.parquet")
    said = call("train", *shared, "--max-steps", "1", cwd=project, code=1)
    assert f"{DATASET}: val.parquet is corrupt. Run the stage prepare again" in said
    assert not list((project / "outputs").glob("price-*"))


# Two at once


def run_two(first, second, folder):
    """The exit codes of two stages that run at the same time."""
    processes = [child.start(list(arguments), folder) for arguments in (first, second)]
    return sorted(child.finish(process) for process in processes)


def test_two_trainings_cannot_share_a_name(shared, project):
    start = ("train", *shared, "--run-name", "one", "--max-steps", "2", "--batch-size", "4")
    assert run_two(start, start, project) == [0, 1]
    assert items.manifest_problem(project / "outputs/price-one") is None
    said = child.said(project)
    assert "Traceback" not in said
    reasons = ("exists. Give another", "has just begun by this name", "another process is training")
    assert any(reason in said for reason in reasons)


def test_live_run_is_not_resumed(call, shared, project):
    """Neither by name, nor as the newest, nor by a new run of its name."""
    start = ["train", *shared, "--run-name", "live", "--max-steps", "400", "--batch-size", "4"]
    process = child.start(start, project)
    child.wait_for("step     1", project)
    for flags in (("--resume", "live"), ("--resume",)):
        said = call("train", "--local", *flags, cwd=project, code=1)
        assert "live: another process is training it" in said
    said = call(*start, cwd=project, code=1)
    assert "outputs/price-live exists. Give another name, or resume it" in said
    process.kill()
    child.finish(process)
    call("train", "--local", "--resume", "live", "--dry-run", cwd=project)


def test_two_evaluations_leave_one_whole(shared, trained_project):
    evaluate = ("eval", *shared, "--run-name", "first", "--size")
    assert run_two((*evaluate, "4"), (*evaluate, "2"), trained_project) == [0, 0]
    folder = trained_project / RUN / "eval"
    results = read(folder / "results.json")
    lines = (folder / "predictions.csv").read_text().strip().splitlines()
    assert len(lines) - 1 == results["n"]
    assert not list(folder.parent.glob(".*~*"))


def test_two_prepares_leave_one_whole(shared, tmp_path):
    catalogues = [write_catalogue(tmp_path / f"{n}.jsonl", n) for n in (60, 80)]
    stages = [("prepare", *shared, "--source", catalogue) for catalogue in catalogues]
    assert run_two(*stages, tmp_path) == [0, 0]
    folder = tmp_path / DATASET
    assert items.manifest_problem(folder) is None
    kept = sum(read(folder / "prepare.json")["kept"].values())
    assert sum(map(len, items.load_prompts(folder).values())) == kept


def test_accelerate_config_changes_nothing(call, shared, trained, project):
    """What `accelerate config` answered would change the precision; the plan is what counts."""
    environment = {"ACCELERATE_MIXED_PRECISION": "bf16"}
    call("train", *shared, "--run-name", "first", *TRAIN, cwd=project, environment=environment)
    assert (project / RUN / ADAPTER_FILE).read_bytes() == (
        trained / RUN / ADAPTER_FILE
    ).read_bytes()
