"""What a run survives: kills, torn files, signals, full disks, bad numbers. The measure is the uninterrupted run."""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time

import numpy
import pytest

import app
import child
from items import load_prompts, row_lengths

TRAIN = ("--epochs", "2", "--batch-size", "12", "--micro-batch", "4", "--save-steps", "2", "--learning-rate", "1e-2")


@pytest.fixture(scope="module")
def whole(run, prepared, tmp_path_factory):
    """The folder in which an uninterrupted run of 12 steps in 2 epochs, `price-run`, has ended."""
    folder = tmp_path_factory.mktemp("whole")
    copy_data(run.folder, folder)
    assert ends(child.start(["train", *prepared, "--run-name", "run", *TRAIN], folder)) == 0
    return folder


def copy_data(source, folder):
    shutil.copytree(source / "outputs/datasets", folder / "outputs/datasets")
    return folder


def ends(process, within=120):
    process.join(within)
    assert process.exitcode is not None
    return process.exitcode


def go_on(folder, *arguments):
    assert ends(child.start(["train", "--local", "--resume", "run", *arguments], folder)) == 0


def assert_same_run(folder, whole):
    """Adapter bit for bit, and the same losses at the same steps."""
    assert_same_end(folder, whole)
    here, there = folder / "outputs/price-run", whole / "outputs/price-run"
    assert read(here / "run.json")["history"] == read(there / "run.json")["history"]


def assert_same_end(folder, whole):
    """Adapter bit for bit, and the same validations: a stop between two logged steps moves where losses are averaged."""
    here, there = folder / "outputs/price-run", whole / "outputs/price-run"
    assert (here / app.ADAPTER_FILE).read_bytes() == (there / app.ADAPTER_FILE).read_bytes()
    found, expected = ([entry for entry in read(one / "run.json")["history"] if "eval_loss" in entry] for one in (here, there))
    assert found == expected


def read(path):
    return json.loads(path.read_text("utf-8"))


@pytest.mark.parametrize("hook, option, step", [
    ("kill_at_step", 3, 2), ("kill_at_step", 9, 8), ("kill_at_the_end_of_epoch", 1, 6),
    ("kill_when_opening", "checkpoint-8/trainer_state.json", 6), ("kill_when_opening", "adapter.new/run.json.new", 12)])
def test_a_killed_run_ends_as_if_it_had_not_been(whole, run, prepared, tmp_path, hook, option, step):
    folder = copy_data(run.folder, tmp_path)
    assert ends(child.start(["train", *prepared, "--run-name", "run", *TRAIN], folder, hook, option)) == -signal.SIGKILL
    go_on(folder)
    assert f"Going on from step {step}, the newest complete checkpoint" in child.said(folder)
    assert_same_run(folder, whole)
    go_on(folder)
    assert child.said(folder).rstrip().endswith("run is finished")


def unfinished(whole, folder, last=12):
    """A copy of the run as it was while checkpoint-`last` was written. Returns its folder."""
    shutil.copytree(whole / "outputs", folder / "outputs")
    one = folder / "outputs/price-run"
    (one / app.ADAPTER_FILE).unlink()
    for path in one.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > last:
            shutil.rmtree(path)
    return one


def test_whatever_a_kill_leaves_of_a_save_is_gone_on_with(whole, tmp_path, monkeypatch):
    reference = whole / "outputs/price-run/checkpoint-4"
    names = sorted(os.listdir(reference), key=lambda name: (reference / name).stat().st_mtime_ns)
    assert names[-1] == "manifest.json" and len(names) >= 8
    for done, name in enumerate(names):  # each file: made, half written, written; the later ones not there yet
        for part in (0, 0.5, 1):
            folder = tmp_path / f"{name}-{part}"
            checkpoint = unfinished(whole, folder, last=4) / "checkpoint-4"
            for later in names[done + 1:]:
                (checkpoint / later).unlink()
            os.truncate(checkpoint / name, int(part * (checkpoint / name).stat().st_size))
            is_whole = part == 1 and name == names[-1]
            assert app.newest_checkpoint(checkpoint.parent).endswith("checkpoint-4" if is_whole else "checkpoint-2")
            if part == 0.5:
                monkeypatch.chdir(folder)
                app.main(["train", "--local", "--resume", "run"])
                assert_same_run(folder, whole)
            shutil.rmtree(folder)


def test_whatever_a_kill_leaves_of_the_last_save_is_gone_on_with(whole, tmp_path, monkeypatch):
    names = [path.name for path in (whole / "outputs/price-run").iterdir() if path.is_file() and path.name != "run.json"]
    names.sort(key=lambda name: name == app.ADAPTER_FILE)  # the last to come
    for done in range(len(names)):
        folder = tmp_path / str(done)
        one = unfinished(whole, folder)
        (one / "adapter.new").mkdir()
        for name in names[done:]:
            (one / name).unlink(missing_ok=True)
            (one / "adapter.new" / name).write_text("half")
        monkeypatch.chdir(folder)
        app.main(["train", "--local", "--resume"])
        assert_same_run(folder, whole)


def test_a_run_that_only_lacks_its_last_save_does_no_step_more(run, prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(copy_data(run.folder, tmp_path))
    app.main(["train", *prepared, "--run-name", "run", *TRAIN, "--max-steps", "4"])  # ends within an epoch
    adapter = tmp_path / "outputs/price-run" / app.ADAPTER_FILE
    before = adapter.read_bytes()
    adapter.unlink()
    app.main(["train", "--local", "--resume", "run"])
    assert adapter.read_bytes() == before and read(adapter.parent / "run.json")["steps"] == 4


@pytest.mark.parametrize("name, spoil", [
    (app.ADAPTER_FILE, "torn"), ("optimizer.pt", "torn"), ("optimizer.pt", "missing"), ("trainer_state.json", "torn"),
    ("trainer_state.json", "missing"), ("rng_state.pth", "torn"), ("adapter_config.json", "missing"), ("manifest.json", "torn"),
    (app.ADAPTER_FILE, "flipped")])
def test_a_damaged_checkpoint_is_left_aside_for_the_one_before(whole, tmp_path, monkeypatch, capsys, name, spoil):
    file = unfinished(whole, tmp_path, last=8) / "checkpoint-8" / name
    if spoil == "missing":
        file.unlink()
    elif spoil == "torn":
        os.truncate(file, file.stat().st_size // 2)
    else:
        content = bytearray(file.read_bytes())
        content[-9] ^= 1
        file.write_bytes(content)
    monkeypatch.chdir(tmp_path)
    app.main(["train", "--local", "--resume", "run"])
    said = capsys.readouterr().out
    assert f"checkpoint-8 is skipped: {name} is {'missing' if spoil == 'missing' else 'corrupt'}" in said and "Going on from step 6" in said
    assert_same_run(tmp_path, whole)


def test_signals_at_any_moment_leave_a_run_to_go_on_with_and_the_promised_exit_code(whole, run, prepared, tmp_path):
    rng, folder, sent = random.Random(7), copy_data(run.folder, tmp_path), []
    start = ["train", *prepared, "--run-name", "run", *TRAIN]
    while len(sent) < 20:
        process, number = child.start(start, folder), rng.choice([signal.SIGTERM, signal.SIGINT])
        process.join(rng.uniform(0.3, 3))
        if process.exitcode is None:
            os.kill(process.pid, number)
        code = ends(process)
        if code == 0:  # the run had ended before
            assert_same_end(folder, whole)
            shutil.rmtree(folder / "outputs/price-run")
        else:
            assert code in (128 + number, -number), child.said(folder)  # the second: before `main` was reached
            sent.append(number)
        begun = (folder / "outputs/price-run/run.json").exists()
        start = ["train", "--local", "--resume", "run"] if begun else ["train", *prepared, "--run-name", "run", *TRAIN]
    assert set(sent) == {signal.SIGTERM, signal.SIGINT}
    said = child.said(folder)
    assert "Traceback" not in said and "Go on by `python app.py train --resume run`" in said
    stops = re.findall(r"Stopped after step (\d+), which is saved.*?(?:Going on from step (\d+)|\Z)", said, re.DOTALL)
    assert len(stops) >= 3 and all(stopped == went_on for stopped, went_on in stops if went_on)
    assert ends(child.start(start, folder)) == 0
    assert_same_end(folder, whole)


def test_a_second_signal_ends_at_once(run, prepared, tmp_path):
    folder = copy_data(run.folder, tmp_path)
    process = child.start(["train", *prepared, "--run-name", "run", *TRAIN], folder, "slow_down", 30)
    while "sleeping" not in (child.said(folder) if (folder / "said.txt").exists() else ""):
        time.sleep(0.1)
    for _ in range(2):
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.5)
    assert ends(process, within=5) == 143


def test_a_full_disk_leaves_older_checkpoints_and_goes_on_once_there_is_room(whole, run, prepared, tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk can't be mounted here")
    try:
        folder = copy_data(run.folder, tmp_path)
        begin = ["train", *prepared, "--run-name", "run", *TRAIN]
        assert ends(child.start(begin, folder, "fill_the_disk_at_step", 7)) == 1
        assert "the disk is full. Older checkpoints are whole: make room, then go on by `python app.py train" in child.said(folder)
        assert not app.manifest_problem(folder / "outputs/price-run/checkpoint-6")
        (folder / "ballast").unlink()
        assert ends(child.start(["train", "--local", "--resume", "run"], folder)) == 0, child.said(folder)
        assert_same_run(folder, whole)
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_too_little_room_for_the_checkpoints_is_said_first(run, prepared, tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("a small disk can't be mounted here")
    try:
        folder = copy_data(run.folder, tmp_path)
        assert ends(child.start(["train", *prepared, *TRAIN], folder)) == 1
        assert "needed for 10 checkpoints. Make room or give another --output-dir" in child.said(folder)
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_loss_that_is_no_number_stops_the_run(whole, run, prepared, tmp_path):
    folder = copy_data(run.folder, tmp_path)
    assert ends(child.start(["train", *prepared, "--run-name", "run", *TRAIN], folder, "lose_the_number_at_step", 6)) == 1
    assert "step 6: the loss is not finite, at learning rate" in child.said(folder)
    go_on(folder)  # from checkpoint-4; nothing spoils the numbers now
    assert_same_run(folder, whole)


def other_base(folder, base):
    shutil.copytree(base, folder / "base")
    config = folder / "base/config.json"
    config.write_text(config.read_text().replace("512", "513"))
    return ["--base-model", "base"]


def other_data(folder, base):
    data = folder / "outputs/datasets/items_prompts_lite"
    shutil.copy(data / "test.parquet", data / "val.parquet")
    return []


@pytest.mark.parametrize("change, said", [
    (lambda folder, base: ["--lora-r", "8", "--epochs", "2"], "lora r was 32 and is 8."),
    (lambda folder, base: ["--precision", "bf16"], "precision was auto and is bf16."),
    (lambda folder, base: ["--seed", "7"], "seed was 42 and is 7."),
    (other_base, "base model was "), (other_data, "data was ")])
def test_another_recipe_base_or_data_are_refused_with_the_differences(
        whole, prepared, tmp_path, monkeypatch, capsys, change, said):
    unfinished(whole, tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="1"):
        app.main(["train", "--local", "--resume", "run", *change(tmp_path, prepared[-1])])
    assert f"--resume run: {said}" in capsys.readouterr().err


# Memory, precision, determinism


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture()
def build(tiny_base, run, prepared, tmp_path):
    splits = load_prompts(run.folder / "outputs/datasets/items_prompts_lite")
    recipe = app.RECIPES["lite"] | dict(batch_size=12, max_steps=4, learning_rate=1e-2, lora_dropout=0.0, logging_steps=1)

    def build(seed=1, micro_batch=None, **changes):
        return app.build_trainer(app.load_base(tiny_base), app.load_tokenizer(tiny_base), splits, recipe | changes, tmp_path,
                                 seed, micro_batch=micro_batch)

    return build


def test_accumulated_micro_batches_equal_the_whole_batch(build):
    whole = losses(build())
    assert losses(build(micro_batch=4)) == pytest.approx(whole, abs=1e-5)
    assert losses(build(micro_batch=1)) == pytest.approx(whole, abs=1e-5)


def test_the_order_of_the_data_depends_on_the_seed_only(build):
    def order(**options):
        trainer, rows = build(**options), []
        for batch in trainer.get_train_dataloader():
            rows += trainer.processing_class.batch_decode(batch["input_ids"], skip_special_tokens=True)
        return rows

    first = order(seed=1)
    assert first == order(seed=1, micro_batch=4, lora_dropout=0.1) == order(seed=1, lora_r=8, learning_rate=1.0)
    assert first != order(seed=2) and sorted(first) == sorted(order(seed=2))


@pytest.fixture()
def memory_for(monkeypatch):
    """Has training run out of memory with more rows at once than a function of the forward passes so far says."""
    import torch

    load, passes = app.load_base, []

    def limit(most):
        def small_memory(*arguments):
            model = load(*arguments)

            def check(module, _, inputs):
                if module.training and torch.is_grad_enabled() and len(inputs["input_ids"]) > most(len(passes)):
                    raise torch.OutOfMemoryError("CUDA out of memory.")
                passes.append(1)

            model.register_forward_pre_hook(check, with_kwargs=True)
            return model

        monkeypatch.setattr(app, "load_base", small_memory)

    return limit


def test_out_of_memory_halves_the_micro_batch_and_goes_on_from_the_last_step(
        whole, run, prepared, tmp_path, monkeypatch, capsys, memory_for):
    memory_for(lambda passes: 12 if passes < 5 else 4)
    copy_data(run.folder, tmp_path)
    monkeypatch.chdir(tmp_path)
    app.main(["train", *prepared, "--run-name", "run", *TRAIN[:4], *TRAIN[6:], "--max-steps", "8"])
    said = capsys.readouterr().out
    (step, micro), again = re.findall(r"Out of memory at step (\d): going on from step \d with micro-batches of (\d)", said)
    assert step == again[0] and (micro, again[1]) == ("6", "4")
    assert said.count(f"Going on from step {int(step) - 1}, the newest complete checkpoint") == 2 and "Trained to step 8" in said


def test_out_of_memory_with_one_row_leaves_the_last_step_saved(run, prepared, tmp_path, monkeypatch, capsys, memory_for):
    memory_for(lambda passes: 1 if passes < 30 else 0)  # the third step of twelve rows
    copy_data(run.folder, tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        app.main(["train", *prepared, "--run-name", "run", "--batch-size", "12", "--micro-batch", "1", "--max-steps", "8", "--save-steps", "50"])
    assert "Out of memory with one row at a time" in capsys.readouterr().err
    assert app.manifest_problem(tmp_path / "outputs/price-run/checkpoint-2") is None


def test_the_micro_batch_fits_the_memory_and_checkpointing_comes_only_where_it_must(build, monkeypatch):
    model, recipe, lengths = build().model.get_base_model(), app.RECIPES["lite"], numpy.array([100, 128])
    need = {(micro, checkpointing): app.estimate_memory(model, recipe, lengths, micro, checkpointing)
            for micro in (1, 2, 4, 8, 16, 32) for checkpointing in (False, True)}
    assert all(need[micro, True] < need[micro, False] for micro in (1, 2, 4, 8, 16, 32))
    for memory, expected in ((need[32, False], (32, False)), (need[16, False], (16, False)), (need[4, False], (4, False)),
                             (need[32, True], (32, True)), (need[1, True], (1, True)), (0, (1, True))):
        monkeypatch.setattr(app, "memory", lambda: (0, 1.11 * memory, 0))
        assert app.choose_micro_batch(model, recipe, lengths)[:2] == expected or need[32, True] > need[4, False]
    monkeypatch.setattr(app, "memory", lambda: (0, 1.11 * need[8, True], 0))
    assert app.choose_micro_batch(model, recipe, lengths, micro_batch=8) == (8, True, False)


def test_memory_of_a_large_model_is_reckoned_with_large_numbers():
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):  # the shape of Llama-3.2-3B: without checkpointing 32 rows took 17.2 GiB
        model = LlamaForCausalLM(LlamaConfig(vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
                                             num_attention_heads=24, num_key_value_heads=8, tie_word_embeddings=True)).bfloat16()
    lengths = row_lengths(Dataset.from_dict({"input_ids": [[0] * 128] * 2}))
    assert 16 < app.estimate_memory(model, app.RECIPES["lite"], lengths, 32, checkpointing=False) / 2**30 < 32


@pytest.mark.parametrize("arguments, said", [
    (("--micro-batch", "5", "--batch-size", "12"), "--micro-batch 5: 12 rows a step can't be divided by it"),
    (("--precision", "fp16"), "--precision fp16: needs a GPU")])
def test_what_can_not_be_computed_is_said_first(run, prepared, tmp_path, monkeypatch, capsys, arguments, said):
    import torch

    if torch.cuda.is_available() and "fp16" in arguments:
        pytest.skip("there is a GPU")
    copy_data(run.folder, tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="1"):
        app.main(["train", *prepared, *arguments])
    assert said in capsys.readouterr().err


def test_precision_can_be_forced(build):
    import torch

    trainer = build(precision="bf16", max_steps=2)
    assert trainer.args.bf16 and all(p.dtype == torch.float32 for p in trainer.model.parameters() if p.requires_grad)
