"""Every path to the Hub, over real HTTP by the real clients, in fine weather and in bad."""
import json
import shutil
from pathlib import Path

import pytest

import app
from conftest import TRAIN
from hub_server import TestHub

WRITER, READER = "hf_test_writer_secret", "hf_test_reader_secret"


@pytest.fixture()
def hub():
    hub = TestHub()
    hub.users = {WRITER: ("alice", "write"), READER: ("rob", "read")}
    yield hub
    hub.close()


@pytest.fixture()
def online(run, hub, tmp_path):
    """Calls the program with an empty cache, as alice unless told otherwise, in a folder of its own."""
    def call(*arguments, code=0, token=WRITER, cwd=None):
        cwd = cwd or tmp_path / "work"
        cwd.mkdir(exist_ok=True)
        done = run(*arguments, cwd=cwd, code=code, HF_ENDPOINT=hub.url, HF_TOKEN=token, HF_HOME=str(tmp_path / "hf"),
                   HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1", NO_PROXY="127.0.0.1")
        assert "secret" not in done.stdout + done.stderr
        return done

    call.folder = tmp_path / "work"
    return call


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def said(done, stage, text):
    return any(line.startswith(f"app.py {stage}: ") and text in line for line in done.stderr.splitlines())


SHARED = ("--lite", "--base-model", "meta/tiny")


@pytest.fixture()
def base(hub, tiny_base):
    hub.put("models", "meta/tiny", files_of(tiny_base))


def test_prepare_train_and_eval_through_the_hub_equal_those_on_disk(online, hub, base, catalogue, trained, run):
    run("eval", "--local", "--run-name", "first")
    online("prepare", *SHARED, "--source", catalogue)
    shutil.rmtree(online.folder / "outputs")  # nothing on disk: the prompts come from the account
    online("train", *SHARED, "--run-name", "first", *TRAIN)
    stored = hub.files("models", "alice/price-first")
    assert stored[app.ADAPTER_FILE] == (trained / app.ADAPTER_FILE).read_bytes()
    assert not any(path.startswith("checkpoint-") for path in stored)
    shutil.rmtree(online.folder / "outputs")
    online("eval", "--lite", "--hf-user", "alice", "--run-name", "first")
    here, there = (json.loads((folder / "eval/results.json").read_text("utf-8"))
                   for folder in (online.folder / "outputs/price-first", trained))
    assert [here[name] for name in ("n", "mae", "mae_ci95", "mse", "r2")] == [there[name] for name in ("n", "mae", "mae_ci95", "mse", "r2")]
    card = hub.files("models", "alice/price-first")["README.md"].decode()
    assert "model-index" in card and "meta/tiny" in card and "alice/items_prompts_lite" in card
    for content in [*files_of(online.folder).values(), *hub.files("models", "alice/price-first").values()]:
        assert WRITER.encode() not in content


def test_an_adapter_in_the_published_layout_loads_at_its_revision(online, hub, base, prepared, trained, run):
    layout = {name: (trained / name).read_bytes() for name in ("adapter_config.json", app.ADAPTER_FILE)}
    hub.put("models", "ed-donner/price-2025-11-30_15.10.55-lite", layout)
    revision = hub.commits("models", "ed-donner/price-2025-11-30_15.10.55-lite")[-1]
    hub.put("models", "ed-donner/price-2025-11-30_15.10.55-lite", {app.ADAPTER_FILE: b"broken since"})
    hub.put("datasets", "ed-donner/items_prompts_lite", {
        f"data/{name}-00000-of-00001.parquet": (run.folder / f"outputs/datasets/items_prompts_lite/{name}.parquet").read_bytes()
        for name in ("train", "val", "test")})
    online("eval", *SHARED, "--hf-user", "ed-donner", "--run-name", "2025-11-30_15.10.55-lite", "--revision", revision)


@pytest.mark.parametrize("arguments, token, stage_says", [
    (("train", "--lite", "--base-model", "meta/gated"), WRITER, "meta/gated: gated. Ask for access at"),
    (("train", *SHARED, "--hf-user", "somebody"), WRITER, "somebody: HF_TOKEN is alice's"),
    (("train", *SHARED), READER, "HF_TOKEN may only read"),
    (("train", *SHARED), "hf_unknown_secret", "HF_TOKEN: Invalid user token"),
    (("train", *SHARED, "--data-user", "nobody"), WRITER, "nobody/items_prompts_lite: not on the Hub"),
    (("train", *SHARED, "--data-user", "half"), WRITER, "half/items_prompts_lite: lacks completion"),
    (("eval", *SHARED, "--run-name", "nosuch"), WRITER, "alice/price-nosuch: not on the Hub"),
    (("prepare", *SHARED), WRITER, "ed-donner/items_lite: not on the Hub"),
])
def test_what_the_hub_refuses_is_said_before_any_work(online, hub, base, tiny_base, arguments, token, stage_says):
    hub.put("models", "meta/gated", files_of(tiny_base), gated=True)
    rows = "".join(json.dumps({"prompt": f"{i}"}) + "\n" for i in range(3)).encode()
    hub.put("datasets", "half/items_prompts_lite", {f"{name}.jsonl": rows for name in ("train", "val", "test")} | {
        "README.md": b"---\nconfigs:\n- config_name: default\n  data_files:\n" + b"".join(
            b"  - split: %s\n    path: %s.jsonl\n" % (name, name) for name in (b"train", b"val", b"test")) + b"---\n"})
    assert said(online(*arguments, code=1, token=token), arguments[0], stage_says)


def test_a_hub_down_at_the_end_loses_nothing_and_resume_pushes_later(online, hub, base, catalogue, monkeypatch):
    online("prepare", *SHARED, "--source", catalogue)
    hub.fail("POST /api/models/alice/price-late/commit", status=503, times=None)
    done = online("train", *SHARED, "--run-name", "late", *TRAIN, code=3)
    folder = online.folder / "outputs/price-late"
    assert said(done, "train", "train --resume late") and (folder / app.ADAPTER_FILE).exists()
    hub.up()
    assert "Pushed: alice/price-late" in online("train", *SHARED, "--resume", "late").stdout
    stored = hub.files("models", "alice/price-late")
    for name in ("README.md", "adapter_config.json", app.ADAPTER_FILE, "tokenizer.json", "loss.png"):
        assert stored[name] == (folder / name).read_bytes()
    assert "late is finished" in online("train", *SHARED, "--resume", "late").stdout


def test_a_lost_machine_goes_on_from_the_hub(online, hub, base, catalogue, trained):
    online("prepare", *SHARED, "--source", catalogue)
    online("train", *SHARED, "--local", "--run-name", "lost", *TRAIN)
    left = files_of(online.folder / "outputs/price-lost")  # what the Hub had when the machine went, after three steps
    hub.put("models", "alice/price-lost", {name: content for name, content in left.items()
                                           if name == "run.json" or name.startswith("checkpoint-3/")}, private=True)
    shutil.rmtree(online.folder / "outputs")
    done = online("train", *SHARED, "--resume", "lost")
    assert "Fetched: alice/price-lost" in done.stdout and "Going on from step 3" in done.stdout
    stored = hub.files("models", "alice/price-lost")
    assert stored[app.ADAPTER_FILE] == (trained / app.ADAPTER_FILE).read_bytes()
    assert not any(name.startswith("checkpoint-") for name in stored)


def test_the_newest_state_is_on_the_hub_while_training_goes_on(online, hub, base, catalogue):
    online("prepare", *SHARED, "--source", catalogue)
    hub.fail("POST /api/models/alice/price-on/commit", status=503, times=None, after=1)  # all but the first
    online("train", *SHARED, "--run-name", "on", *TRAIN, code=3)
    hub.up()
    stored = hub.files("models", "alice/price-on")
    assert {"run.json", "checkpoint-3/trainer_state.json", "checkpoint-3/optimizer.pt"} <= stored.keys()
    kept = online.folder / "outputs/price-on/checkpoint-3"
    assert all(stored[f"checkpoint-3/{name}"] == content for name, content in files_of(kept).items())


def test_dry_run_checks_everything_and_writes_nothing(online, hub, base, catalogue):
    online("prepare", *SHARED, "--source", catalogue)
    done = online("train", *SHARED, "--dry-run", "--run-name", "dry")
    assert "Memory:" in done.stdout and not (online.folder / "outputs/price-dry").exists()
    assert not any("create" in path and "dry" in path for _, path in hub.requests)
