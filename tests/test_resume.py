"""What a run survives: kills, corrupt files, signals, full disks, bad numbers, too little memory.

The measure is the uninterrupted run.
"""

import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import app
import bench
import child
import items
import util
from conftest import plain_loss, read, train_losses
from items import MANIFEST, write_manifest
from util import ADAPTER_FILE

# 12 steps in 2 epochs, a checkpoint every second one
TRAIN = ("--epochs=2", "--batch-size=12", "--micro-batch=4", "--save-steps=2")
TRAIN += ("--learning-rate=1e-2",)
RUN = "outputs/price-run"
RESUME = ("train", "--local", "--resume", "run")


@pytest.fixture(scope="module")
def begin(shared):
    """The arguments that begin the run."""
    return ("train", *shared, "--run-name", "run", *TRAIN)


@pytest.fixture(scope="module")
def whole(call, begin, prepared, tmp_path_factory):
    """A folder in which the uninterrupted run has ended."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(prepared / "outputs", folder / "outputs")
    call(*begin, cwd=folder)
    return folder


def assert_same_run(folder, whole, only_validations=False):
    """Adapter bit for bit, and the same losses at the same steps.

    A stop between two logged steps moves where losses are averaged, but no validation.
    """
    assert (folder / RUN / ADAPTER_FILE).read_bytes() == (whole / RUN / ADAPTER_FILE).read_bytes()
    found, expected = [read(path / RUN / "run.json")["history"] for path in (folder, whole)]
    if only_validations:
        found, expected = [[e for e in log if "eval_mae" in e] for log in (found, expected)]
    assert found == expected


def copy_unfinished(whole, folder, last=12):
    """A copy of the run as it was when checkpoint-`last` had been written. Returns its folder."""
    shutil.copytree(whole / "outputs", folder / "outputs")
    run = folder / RUN
    (run / ADAPTER_FILE).unlink()
    for path in run.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > last:
            shutil.rmtree(path)
    return run


# Kills


@pytest.mark.parametrize(
    ("hook", "options", "step"),
    [
        ("kill_at_step", [3], 2),
        ("kill_at_file_event", [1, f"checkpoint-8/.{MANIFEST}~"], 6),
        ("kill_at_file_event", [11, "checkpoint-12"], 10),
        ("kill_at_file_event", [11, "adapter.new"], 12),
    ],
)
def test_killed_run_resumes_exactly(call, begin, whole, project, hook, options, step):
    """Killed in a step, in the second epoch's first one, and in saves, also the last."""
    call(*begin, cwd=project, code=-signal.SIGKILL, hook=hook, options=options)
    said = call(*RESUME, cwd=project)
    assert f"Resuming from step {step}, the newest complete checkpoint" in said
    assert_same_run(project, whole)


def test_finished_run_is_left_alone(call, whole, tmp_path):
    """More epochs would be another schedule: it is said why, and nothing changes."""
    shutil.copytree(whole / "outputs", tmp_path / "outputs")
    said = call(*RESUME, "--epochs", "2", cwd=tmp_path)
    assert said.rstrip().endswith("run is finished")
    said = call(*RESUME, "--epochs", "3", cwd=tmp_path, code=1)
    assert "--resume run: epochs was 2 and is 3. Resume with what it began with" in said
    assert_same_run(tmp_path, whole)


def test_no_complete_checkpoint_starts_anew(call, whole, tmp_path):
    run = copy_unfinished(whole, tmp_path, last=2)
    (run / "checkpoint-2" / MANIFEST).unlink()
    said = call(*RESUME, cwd=tmp_path)
    assert "No checkpoint is complete: starting at step 0" in said
    assert_same_run(tmp_path, whole)


def test_misplaced_weights_end_a_resume(call, whole, tmp_path):
    """transformers only warns of them."""
    checkpoint = copy_unfinished(whole, tmp_path, last=2) / "checkpoint-2"
    weights = load_file(checkpoint / ADAPTER_FILE)
    del weights[min(weights)]
    save_file(weights, checkpoint / ADAPTER_FILE)
    write_manifest(checkpoint)
    said = call(*RESUME, cwd=tmp_path, code=1)
    assert "checkpoint-2: 1 of its tensors are missing or misplaced" in said


def test_copies_of_checkpoints_stay(build):
    """Of a run's own the ten newest are kept, and the best."""
    trainer = build(max_steps=13, save_steps=1, batch_size=4, val_size=1, keep_best=True)
    folder = Path(trainer.args.output_dir)
    (folder / "checkpoint-old").mkdir(parents=True)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint).name
    kept = {f"checkpoint-{step}" for step in range(4, 14)}
    assert {path.name for path in folder.glob("checkpoint-*")} == kept | {best, "checkpoint-old"}


# Signals


def test_signals_leave_a_resumable_run(call, begin, whole, project):
    """At random moments: the promised exit code, and in the end the uninterrupted run."""
    rng = random.Random(7)
    start = begin
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        process = child.start(list(start), project)
        process.join(rng.uniform(0.5, 6))
        if process.exitcode is None:
            os.kill(process.pid, number)
        before_main = -number
        assert child.finish(process) in (0, 128 + number, before_main), child.said(project)
        start = RESUME if (project / RUN / "run.json").exists() else begin
    call(*start, cwd=project)
    said = child.said(project)
    pattern = r"Stopped after step (\d+), which is saved. Resume by .*?Resuming from step (\d+)"
    for stopped, resumed in re.findall(pattern, said, re.DOTALL):
        assert stopped == resumed
    assert "Traceback" not in said
    assert_same_run(project, whole, only_validations=True)


def test_second_signal_ends_at_once(begin, project):
    process = child.start(list(begin), project, "slow_down", 30)
    child.wait_for("sleeping", project)
    for _ in range(2):
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.5)
    assert child.finish(process, within=5) == 128 + signal.SIGTERM


def test_signal_needs_no_terminal(monkeypatch):
    """After Ctrl-C in `| tee log` nobody reads what is said; the step is saved all the same."""

    def refuse(*_):
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", refuse)
    stopper = util.StopOnSignal()
    stopper.on_signal(signal.SIGINT, None)
    control = SimpleNamespace()
    stopper.on_step_end(None, None, control)
    assert control.should_save
    assert control.should_training_stop


# Full disks


def test_full_disk_leaves_older_checkpoints(call, begin, whole, prepared, small_disk):
    """It is one line, and once there is room the run resumes exactly."""
    disk = small_disk(400)
    folder = disk.parent
    shutil.copytree(prepared / "outputs", disk, dirs_exist_ok=True)
    said = call(*begin, cwd=folder, code=1, hook="fill_disk_at_step", options=(7,))
    assert "\napp.py train: the disk is full" in said
    assert items.manifest_problem(folder / RUN / "checkpoint-6") is None
    (disk / "ballast").unlink()
    call(*RESUME, cwd=folder)
    assert_same_run(folder, whole)


def test_checkpoint_beyond_the_quota_is_explained(call, begin, project):
    """PyTorch's error names no reason, and the disk has room."""
    options = (3_600_000,)  # bytes: the tokenizer's file has fewer, optimizer.pt at this rank more
    begin = (*begin, "--lora-r", "512")
    said = call(*begin, cwd=project, code=1, hook="limit_file_size", options=options)
    assert "\napp.py train: the disk is full" in said


# Bad numbers


def test_bad_loss_stops_the_run(call, begin, whole, project):
    """No checkpoint is saved with it, so that resuming, with good numbers, is exact."""
    hook = "make_weights_nan_before_step"
    said = call(*begin, cwd=project, code=1, hook=hook, options=(6,))
    assert "step 6: not finite (loss nan" in said
    assert not (project / RUN / "checkpoint-6").exists()
    call(*RESUME, cwd=project)
    assert_same_run(project, whole, only_validations=True)


# What must not change


def change_data(folder):
    data = folder / "outputs/datasets/items_prompts_lite"
    shutil.copy(data / "test.parquet", data / "val.parquet")
    write_manifest(data)


@pytest.mark.parametrize(
    ("change", "flags", "problem"),
    [
        (None, ("--lora-r", "8", "--epochs", "2"), "lora r was 32 and is 8."),
        (None, ("--base-model", "base"), "its base model was "),
        (change_data, (), "data was "),
    ],
)
def test_changes_are_refused_on_resume(call, whole, tiny_base, tmp_path, change, flags, problem):
    copy_unfinished(whole, tmp_path)
    shutil.copytree(tiny_base, tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text().replace("512", "513"))
    if change:
        change(tmp_path)
    said = call(*RESUME, *flags, cwd=tmp_path, code=1)
    assert f"--resume run: {problem}" in said


# Memory and precision


SMALL = {
    "batch_size": 12,
    "max_steps": 4,
    "learning_rate": 1e-2,
    "lora_dropout": 0.0,
    "logging_steps": 1,
}


@pytest.mark.parametrize(("micro_batch", "accepts"), [(4, True), (1, True), (4, False)])
def test_micro_batches_equal_the_batch(build, monkeypatch, micro_batch, accepts):
    """Also for models that say that they don't take the number of tokens, as Gemma 4 does."""
    monkeypatch.setattr(LlamaForCausalLM, "accepts_loss_kwargs", accepts, raising=False)
    whole = train_losses(build(**SMALL))
    accumulated = train_losses(build(**SMALL, micro_batch=micro_batch))
    assert accumulated == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("is_packed", [False, True])
def test_trained_loss_is_the_models(build, packed_attention, is_packed):
    """Of padded and of packed rows; the model scales its logits as only itself knows."""
    trainer = build(**SMALL)
    model = trainer.model.eval()
    rows = [trainer.train_dataset[i] for i in range(5)]
    assert len({len(row["input_ids"]) for row in rows}) > 1
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, logits: 5 * torch.tanh(logits / 5))
    expected = sum(plain_loss(model, row) for row in rows)
    collate = util.collate_padded
    if is_packed:
        lengths = numpy.array([len(row["input_ids"]) for row in rows])
        collate = util.PackedCollator(len(rows), lengths)
        model.set_attn_implementation(util.PACKED)
    assert util.summed_losses(model, collate(rows)).item() == pytest.approx(expected, rel=1e-5)


def test_out_of_memory_takes_smaller_micro_batches(call, shared, project):
    """And goes on from the newest checkpoint, twice; the last error is one line."""
    start = ("train", *shared, "--run-name", "run", "--batch-size", "12", "--max-steps", "8")
    options = (6, 6, 4)  # rows; in the fourth step of two micro-batches 4
    said = call(*start, "--save-steps", "2", cwd=project, hook="limit_memory", options=options)
    pattern = r"Step (\d): OutOfMemoryError: .*; going on from .*, in micro-batches of (\d)"
    found = re.findall(pattern, said)
    assert found == [("1", "6"), ("4", "4")]
    assert "Resuming from step 2, the newest complete checkpoint" in said
    assert "Trained to step 8" in said


def test_out_of_memory_with_one_row(call, shared, project):
    """Checkpointing is tried, then it is one line."""
    start = ("train", *shared, "--batch-size", "12", "--micro-batch", "1", "--max-steps", "2")
    said = call(*start, cwd=project, code=1, hook="limit_memory", options=(0,))
    assert "micro-batches of 1, × 12 accumulated × 1 processes = 12, activation ch" in said
    assert "one row at a time doesn't fit. Take a smaller base model" in said


@pytest.fixture(scope="module")
def large_base(tiny_base):
    """A Base in the shape of Llama-3.2-3B."""
    config = LlamaConfig(**bench.SHAPE)
    base = util.Base(tiny_base)
    base.config = config
    with torch.device("meta"):
        base.skeleton = LlamaForCausalLM(config).bfloat16()
    return base


LENGTHS = numpy.array([100, 128])


@pytest.fixture()
def plan_for(large_base, monkeypatch):
    """`plan_for(bytes, lora_r=8)` is the Plan of lite for that shape with so much memory."""

    def plan_for(available, micro_batch=None, **changes):
        monkeypatch.setattr(util, "memory", lambda: util.Memory(0, available, 0))
        config = app.RunConfig(base_model=large_base.path, lite_mode=True, local=True)
        run = app.new_run(config, "planned", app.RECIPES["lite"], True, changes)
        row = {"input_ids": [0] * int(LENGTHS.max())}
        data = SimpleNamespace(lengths=LENGTHS, extremes=[row], highest=0)
        return util.make_plan(large_base, run, data, False, micro_batch)

    return plan_for


def peak_bytes(base, rows, checkpointing, dequantised, precision="fp32"):
    recipe = app.RECIPES["lite"]
    targets = util.find_targets(base, recipe.targets)
    plan = util.Plan(precision, targets.names, "nf4", dequantised, rows, 1, checkpointing)
    return util.peak_bytes(plan, base, recipe, targets, LENGTHS)


def test_memory_estimate_is_near(large_base):
    """32 rows of Llama-3.2-3B took 17.2 GiB; checkpointing needs less."""
    peak = peak_bytes(large_base, 32, False, False, "bf16")
    assert 16 < peak / 2**30 < 32
    assert peak_bytes(large_base, 1, True, False) < peak_bytes(large_base, 1, False, False)


@pytest.mark.parametrize(
    ("fits", "asked", "expected"),
    [
        ((32, False, True), None, (32, False, True)),
        ((32, False, False), None, (32, False, False)),
        ((16, False, False), None, (16, False, False)),
        ((4, False, False), None, (4, False, False)),
        ((1, True, False), None, (1, True, False)),
        ((0, True, False), None, (1, True, False)),
        ((8, True, False), 8, (8, True, False)),
    ],
)
def test_fastest_plan_that_fits(large_base, plan_for, fits, asked, expected):
    """As many rows as fit, or were asked for, then dequantised; checkpointing below four rows."""
    plan = plan_for(1.11 * peak_bytes(large_base, *fits), asked)
    assert (plan.micro_batch, plan.checkpointing, plan.dequantised) == expected
    assert plan.micro_batch * plan.accumulation == 32


@pytest.mark.parametrize(
    ("capability", "changes", "rows", "text"),
    [
        ((7, 5), {}, 16, "fp16 from nf4, dequantised once: memory has room"),
        ((8, 6), {}, 32, "nf4: no room for it dequantised"),
        ((7, 5), {"base_weights": "nf4"}, 32, "nf4: as asked for"),
        ((8, 9), {"base_weights": "fp8"}, 16, "fp8 from nf4, dequantised once: as asked for"),
    ],
)
def test_weights_suit_the_gpu(plan_for, monkeypatch, capability, changes, rows, text):
    """A T4 gains by a dequantised base even where that takes smaller micro-batches."""
    monkeypatch.setattr(util, "choose_precision", lambda *_: ("fp16", "no bf16"))
    monkeypatch.setattr(util, "choose_attention", lambda *_: util.PACKED_EFFICIENT)
    monkeypatch.setattr(util, "gpu_capability", lambda: capability)
    plan = plan_for(14 * 2**30, compile="on", lora_dropout=0.0, **changes)
    assert plan.micro_batch == rows
    assert plan.reasons["Base"] == f"LlamaForCausalLM, {text}"
    assert not plan.checkpointing
