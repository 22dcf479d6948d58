"""Every path to the Hub and to W&B, over real HTTP by the real clients, in fine weather and in bad."""
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import app
from conftest import HF_HOME, HUB, TRAIN
from items import Item, demo_items

WRITER, READER, WANDB_KEY = "hf_test_writer_secret", "hf_test_reader_secret", "secret" + 34 * "7"
SHARED = ("--lite", "--base-model", "meta/tiny")
FIGURES = ("n", "mae", "mae_ci95", "mse", "r2")


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture()
def hub(tiny_base):
    HUB.repos.clear(), HUB.requests.clear(), HUB.up()
    HUB.users = {WRITER: ("alice", "write"), READER: ("rob", "read")}
    HUB.put("models", "meta/tiny", files_of(tiny_base))
    yield HUB
    HUB.up()


@pytest.fixture()
def online(hub, tmp_path, monkeypatch):
    """Calls a stage with an empty cache, as alice unless told otherwise, in a folder of its own. Returns what it said."""
    from huggingface_hub import HfFileSystem

    HfFileSystem.clear_instance_cache()
    for cache in Path(HF_HOME.name).iterdir():
        shutil.rmtree(cache) if cache.is_dir() else cache.unlink()
    monkeypatch.chdir(tmp_path)

    def call(*arguments, code=0, token=WRITER):
        monkeypatch.setenv("HF_TOKEN", token)
        out, err, got = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                app.main(arguments)
            except SystemExit as end:
                got = end.code
        said = SimpleNamespace(out=out.getvalue(), err=err.getvalue())
        assert got == code, said.out + said.err
        return said

    call.folder = tmp_path / "outputs"
    return call


@pytest.fixture()
def data(online, catalogue):
    """The prompts are prepared, on disk and in alice's account."""
    online("prepare", *SHARED, "--source", catalogue)


def is_pushed(hub, name, folder, but=()):
    """Whether the Hub has, byte for byte, what the run's folder has besides its checkpoints."""
    here = {path: content for path, content in files_of(folder).items()
            if not path.startswith(("checkpoint-", ".cache", *but))}
    there = {path: content for path, content in hub.files("models", name).items() if path != ".gitattributes"}
    return here and here == there


# Fine weather


def test_prepare_train_and_eval_through_the_hub_equal_those_on_disk(online, hub, data, trained, run):
    run("eval", "--local", "--run-name", "first")
    shutil.rmtree(online.folder)  # nothing on disk: the prompts come from the account
    online("train", *SHARED, "--run-name", "first", *TRAIN)
    assert hub.files("models", "alice/price-first")[app.ADAPTER_FILE] == (trained / app.ADAPTER_FILE).read_bytes()
    assert is_pushed(hub, "alice/price-first", online.folder / "price-first")
    shutil.rmtree(online.folder)
    online("eval", "--lite", "--hf-user", "alice", "--run-name", "first")
    here, there = (json.loads((folder / "eval/results.json").read_text("utf-8"))
                   for folder in (online.folder / "price-first", trained))
    assert [here[name] for name in FIGURES] == [there[name] for name in FIGURES]
    assert all(hub.repos[kind, name].private for kind, name in hub.repos if name.startswith("alice/"))


def test_the_card_has_base_data_recipe_and_after_eval_the_figures(online, hub, data):
    from huggingface_hub import ModelCard

    online("train", *SHARED, "--run-name", "carded", *TRAIN)
    online("eval", "--size", "all")
    files = hub.files("models", "alice/price-carded")
    card = ModelCard(files["README.md"].decode())
    results = json.loads(files["eval/results.json"])
    assert (card.data.base_model, card.data.library_name, card.data.datasets) == ("meta/tiny", "peft", "alice/items_prompts_lite")
    figures = {figure.metric_type: figure.metric_value for figure in card.data.eval_results}
    assert figures == {"mae": results["mae"], "mse": results["mse"], "r_squared": results["r2"]}
    assert "| lora_r | 32 |" in card.text and "alice/price-carded" in card.text and "| seed | 42 |" in card.text
    for chart in ("loss.png", "eval/scatter.png", "eval/running_error.png"):
        assert f"({chart})" in card.text and chart in files


def test_the_courses_items_on_the_hub_become_prompts_in_the_tokens_account(online, hub, monkeypatch):
    items = demo_items(90, seed=2)
    items[3].price, items[7].summary = 0.0, "  "
    monkeypatch.setenv("HF_TOKEN", WRITER)
    Item.push_to_hub("alice/items_lite", items[:60], items[60:75], items[75:])
    assert [list(map(repr, part)) for part in Item.from_hub("alice/items_lite")] == [
        list(map(repr, part)) for part in (items[:60], items[60:75], items[75:])]
    said = online("prepare", *SHARED, "--data-user", "alice")
    assert "price is zero or negative (line train 4)" in said.out and "summary is empty or not text (line train 8)" in said.out
    online("train", *SHARED, "--data-user", "alice", "--dry-run")
    monkeypatch.chdir(online.folder.parent)
    shutil.rmtree(online.folder)
    assert "Data: alice/items_prompts_lite (your account's)" in online("train", *SHARED, "--dry-run").out


def test_an_adapter_in_the_published_layout_loads_at_its_revision(online, hub, prepared, trained, run):
    name, data = "ed-donner/price-2025-11-30_15.10.55-lite", run.folder / "outputs/datasets/items_prompts_lite"
    hub.put("models", name, {file: (trained / file).read_bytes() for file in ("adapter_config.json", app.ADAPTER_FILE)})
    revision = hub.commits("models", name)[-1]
    hub.put("models", name, {app.ADAPTER_FILE: b"broken since", "adapter_config.json": b"{}"})
    hub.put("datasets", "ed-donner/items_prompts_lite", {
        f"data/{split}-00000-of-00001.parquet": (data / f"{split}.parquet").read_bytes() for split in ("train", "val", "test")})
    online("eval", *SHARED, "--hf-user", "ed-donner", "--run-name", "2025-11-30_15.10.55-lite", "--revision", revision)


def test_an_adapter_that_is_no_safetensors_is_not_loaded(online, hub, data, trained):
    hub.put("models", "alice/price-old", {"adapter_config.json": (trained / "adapter_config.json").read_bytes(),
                                          "adapter_model.bin": b"any code at all"})
    assert "old: holds no adapter_model.safetensors" in online("eval", *SHARED, "--run-name", "old", code=1).err
    assert not any("adapter_model.bin" in path for _, path in hub.requests)


def test_a_lost_machine_goes_on_from_the_hub(online, hub, data, trained):
    online("train", *SHARED, "--local", "--run-name", "lost", *TRAIN)
    left = files_of(online.folder / "price-lost")  # what the Hub had when the machine went, after three steps
    hub.put("models", "alice/price-lost", {name: content for name, content in left.items()
                                           if name == "run.json" or name.startswith("checkpoint-3/")}, private=True)
    record = json.loads(left["run.json"]) | {"hub": "alice/price-lost"}
    hub.put("models", "alice/price-lost", hub.files("models", "alice/price-lost") | {"run.json": json.dumps(record).encode()})
    shutil.rmtree(online.folder)
    hub.fail("checkpoint-3/optimizer.pt", 403, times=None, delay=1)
    assert "alice/price-lost" in online("train", *SHARED, "--resume", "lost", code=1).err
    assert not (online.folder / "price-lost/run.json").exists()  # fetched half, it is no run: the next one fetches the rest
    hub.up()
    said = online("train", *SHARED, "--resume", "lost")
    assert "Fetched: alice/price-lost" in said.out and "Going on from step 3" in said.out
    assert hub.files("models", "alice/price-lost")[app.ADAPTER_FILE] == (trained / app.ADAPTER_FILE).read_bytes()
    assert is_pushed(hub, "alice/price-lost", online.folder / "price-lost")


def test_going_on_keeps_the_account_and_wandb(online, hub, data, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    online("train", *SHARED, "--local", "--run-name", "kept", *TRAIN)
    folder = online.folder / "price-kept"
    (folder / app.ADAPTER_FILE).unlink()
    record = json.loads((folder / "run.json").read_text("utf-8")) | {"hub": "acme/price-kept", "wandb": True}
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    said = online("train", *SHARED, "--resume", "kept", code=1).err
    assert "acme: HF_TOKEN is alice's and may not write there" in said and "WANDB_API_KEY is not set" in said


def test_the_newest_and_the_best_checkpoint_are_on_the_hub(online, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    folder, pusher = tmp_path / "price-best", app.checkpoint_pusher("alice/price-best")
    for step in (2, 4, 6):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        (folder / f"checkpoint-{step}/trainer_state.json").write_text("{}", encoding="utf-8")
    (folder / "run.json").write_text("{}", encoding="utf-8")
    for newest in ("checkpoint-4", "checkpoint-6"):
        pusher.push(folder, newest, "checkpoint-2")
    assert {path.split("/")[0] for path in hub.files("models", "alice/price-best")} - {".gitattributes"} == {
        "run.json", "checkpoint-2", "checkpoint-6"}


def test_dry_run_checks_everything_and_writes_nothing(online, hub, data):
    said = online("train", *SHARED, "--dry-run", "--run-name", "dry")
    assert "Memory:" in said.out and not (online.folder / "price-dry").exists()
    assert not any("create" in path and "dry" in path for _, path in hub.requests)


# What the Hub refuses


@pytest.mark.parametrize("arguments, token, lines", [
    (("train", "--lite", "--base-model", "meta/gated"), WRITER, ["meta/gated: gated. Ask for access at"]),
    (("train", *SHARED, "--hf-user", "somebody"), WRITER, ["somebody: HF_TOKEN is alice's"]),
    (("train", *SHARED), READER, ["HF_TOKEN may only read"]),
    (("train", *SHARED), "hf_unknown_secret", ["HF_TOKEN: Invalid user token"]),
    (("train", *SHARED, "--data-user", "nobody"), WRITER, ["nobody/items_prompts_lite: not on the Hub"]),
    (("train", *SHARED, "--data-user", "half"), WRITER, ["half/items_prompts_lite: lacks completion"]),
    (("train", *SHARED, "--log-wandb", "--data-user", "half"), WRITER, ["WANDB_API_KEY is not set"]),
    (("eval", *SHARED, "--run-name", "nosuch"), WRITER, ["alice/price-nosuch: not on the Hub"]),
    (("prepare", *SHARED), WRITER, ["ed-donner/items_lite: not on the Hub"]),
    (("train", "--lite", "--base-model", "meta/gated", "--hf-user", "bob", "--data-user", "half", "--log-wandb"), WRITER,
     ["meta/gated: gated", "bob: HF_TOKEN is alice's", "half/items_prompts_lite: lacks", "WANDB_API_KEY"]),
])
def test_what_is_refused_is_said_at_once_in_one_line_each_before_any_model_is_loaded(
        online, hub, tiny_base, monkeypatch, arguments, token, lines):
    hub.put("models", "meta/gated", files_of(tiny_base), gated=True)
    rows = "".join(json.dumps({"prompt": f"{i}"}) + "\n" for i in range(3)).encode()
    hub.put("datasets", "half/items_prompts_lite", {f"{name}.jsonl": rows for name in ("train", "val", "test")} | {
        "README.md": b"---\nconfigs:\n- config_name: default\n  data_files:\n" + b"".join(
            b"  - split: %s\n    path: %s.jsonl\n" % (name, name) for name in (b"train", b"val", b"test")) + b"---\n"})
    monkeypatch.setattr(app, "load_base", None)
    start = time.time()
    said = online(*arguments, code=1, token=token)
    assert time.time() - start < 10
    printed = [line for line in said.err.splitlines() if line.startswith(f"app.py {arguments[0]}: ")]
    assert len(printed) == len([line for line in said.err.splitlines() if "app.py" in line])
    for line in lines:
        assert any(line in one for one in printed)


# Outages: nothing is lost, and the later push completes


def test_a_hub_down_at_the_start_is_said_before_any_work(online, hub, data):
    before = files_of(online.folder)
    hub.down()
    for arguments in (("prepare", *SHARED, "--source", "any.csv"), ("train", *SHARED), ("eval", *SHARED, "--run-name", "x")):
        assert "the Hub can't be reached" in online(*arguments, code=1).err
    assert files_of(online.folder) == before


def test_a_hub_down_while_prompts_are_made_leaves_them_on_disk_and_the_same_command_pushes_them(online, hub, catalogue):
    hub.fail("POST /api/datasets/alice/items_prompts_lite/commit", times=None)
    said = online("prepare", *SHARED, "--source", catalogue, code=3)
    assert "Everything is on disk" in said.err and (online.folder / "datasets/items_prompts_lite/train.parquet").exists()
    hub.up()
    online("prepare", *SHARED, "--source", catalogue)
    from items import load_prompts
    from datasets import load_dataset

    assert load_dataset("alice/items_prompts_lite").data.keys() == {"train", "val", "test"}
    here, there = load_prompts(online.folder / "datasets/items_prompts_lite"), load_dataset("alice/items_prompts_lite")
    assert app.fingerprint(here) == app.fingerprint(there)


def test_a_hub_down_from_the_middle_stops_no_training(online, hub, data, trained):
    for name in ("warm", "counted"):
        hub.requests.clear()
        online("train", *SHARED, "--run-name", name, *TRAIN)
    hub.down(after=1 + next(i for i, (_, path) in enumerate(hub.requests) if "/commit/" in path))
    said = online("train", *SHARED, "--run-name", "middle", *TRAIN, code=3)
    folder = online.folder / "price-middle"
    assert "python app.py train --resume middle" in said.err and "the adapter is in outputs/price-middle" in said.out
    assert (folder / app.ADAPTER_FILE).read_bytes() == (trained / app.ADAPTER_FILE).read_bytes()
    hub.up()
    assert "Pushed: alice/price-middle" in online("train", *SHARED, "--resume", "middle").out
    assert is_pushed(hub, "alice/price-middle", folder)


def test_a_hub_down_at_the_end_loses_nothing_and_resume_pushes_later(online, hub, data):
    hub.fail("POST /api/models/alice/price-late/commit", times=None, after=1)  # after the first checkpoint
    said = online("train", *SHARED, "--run-name", "late", *TRAIN, code=3)
    folder = online.folder / "price-late"
    assert "train --resume late" in said.err and (folder / app.ADAPTER_FILE).exists()
    stored, kept = hub.files("models", "alice/price-late"), files_of(folder / "checkpoint-3")
    assert kept and all(stored[f"checkpoint-3/{name}"] == content for name, content in kept.items())
    hub.up()
    assert "Pushed: alice/price-late" in online("train", *SHARED, "--resume", "late").out
    assert is_pushed(hub, "alice/price-late", folder)
    commits = hub.commits("models", "alice/price-late")
    assert "late is finished" in online("train", *SHARED, "--resume", "late").out
    assert hub.commits("models", "alice/price-late") == commits  # nothing was missing


def test_a_checkpoint_that_did_not_go_up_is_reported_and_the_next_one_does(online, hub, data):
    hub.fail("POST /api/models/alice/price-gap/commit", times=1)
    said = online("train", *SHARED, "--run-name", "gap", *TRAIN)
    assert "Not pushed: alice/price-gap" in said.out and "Pushed: alice/price-gap" in said.out
    assert is_pushed(hub, "alice/price-gap", online.folder / "price-gap")


@pytest.mark.parametrize("status", [429, 503])
def test_a_burst_of_refusals_is_waited_for(online, hub, data, status):
    hub.fail("/price-burst", status, times=2, retry_after=1)
    hub.fail("POST /api/models/alice/price-burst/preupload", status, times=2, after=3, retry_after=1)
    online("train", *SHARED, "--run-name", "burst", *TRAIN)
    assert is_pushed(hub, "alice/price-burst", online.folder / "price-burst")


@pytest.mark.parametrize("drop", [True, "answer"])
def test_a_connection_dropped_in_mid_upload_is_made_up_for(online, hub, data, drop):
    hub.fail("PUT /lfs", times=1, drop=drop)
    hub.fail("POST /api/models/alice/price-drop/commit", times=1, drop=drop)
    online("train", *SHARED, "--run-name", "drop", *TRAIN)
    assert is_pushed(hub, "alice/price-drop", online.folder / "price-drop")


def test_figures_that_could_not_be_pushed_are_pushed_by_the_next_eval(online, hub, data):
    online("train", *SHARED, "--run-name", "judged", *TRAIN)
    hub.fail("POST /api/models/alice/price-judged/commit", times=None)
    assert "Everything is on disk" in online("eval", "--size", "2", code=3).err
    hub.up()
    online("eval", "--size", "2")
    assert is_pushed(hub, "alice/price-judged", online.folder / "price-judged")


# Weights & Biases


def records(folder):
    """What the real client wrote for its server while offline: the records of each run file, which is a LevelDB log
    (blocks of 32 KiB; each piece has a checksum of 4 bytes, a length of 2 and a type: whole, first, middle or last)."""
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted(Path(folder).rglob("*.wandb")):
        content, at, whole = path.read_bytes(), 7, b""
        assert content[:4] == b":W&B"
        while at + 7 <= len(content):
            if 32768 - at % 32768 < 7:  # no piece begins here
                at += 32768 - at % 32768
                continue
            length, kind = int.from_bytes(content[at + 4:at + 6], "little"), content[at + 6]
            whole += content[at + 7:at + 7 + length]
            at += 7 + length
            if kind in (1, 4):
                yield Record.FromString(whole)
                whole = b""


def test_wandb_gets_config_losses_and_figures_in_one_run(run, prepared, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)  # kept out by `train` without the flag
    environment = {"WANDB_MODE": "offline", "WANDB_API_KEY": WANDB_KEY, "HF_TOKEN": WRITER}
    shutil.copytree(run.folder / "outputs/datasets", tmp_path / "outputs/datasets")
    for stage in (("train", *prepared, "--log-wandb", "--run-name", "logged", *TRAIN), ("eval", "--local", "--size", "3")):
        done = run(*stage, cwd=tmp_path, **environment)
        assert "secret" not in done.stdout + done.stderr
    assert not (tmp_path / "wandb").exists()
    found = list(records(tmp_path / "outputs/wandb"))
    runs = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    assert {(one.project, one.display_name, one.run_id) for one in runs} == {("price", "logged", "price-logged")}
    logged = {item.key or item.nested_key[0] for record in found for item in record.history.item}
    assert {"train/loss", "train/learning_rate", "eval/loss", "eval/mae", "test/mae", "test/mae_ci95", "test/scatter"} <= logged
    settings = {item.key or item.nested_key[0] for record in found for part in (record.run.config, record.config)
                for item in part.update}
    assert {"learning_rate", "seed", "max_steps", "peft_config"} <= settings


def test_without_the_flag_nothing_of_wandb_is_imported(run, prepared, tmp_path):
    code = ("import sys; sys.path.insert(0, %r); import app; app.main(sys.argv[1:]); "
            "sys.exit(9 if any(n.startswith('wandb.') for n in sys.modules) else 0)" % str(Path(app.__file__).parent))
    shutil.copytree(run.folder / "outputs/datasets", tmp_path / "outputs/datasets")
    done = subprocess.run([sys.executable, "-c", code, "train", *prepared, *TRAIN], cwd=tmp_path, capture_output=True,
                          text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stdout + done.stderr


# Secrets


def test_no_token_is_in_anything_written(tmp_path_factory):
    written = [path for path in [*tmp_path_factory.getbasetemp().rglob("*"), *Path(HF_HOME.name).rglob("*")] if path.is_file()]
    assert len(written) > 100
    for path in written:
        content = path.read_bytes()
        assert not any(secret.encode() in content for secret in (WRITER, READER, WANDB_KEY)), path
