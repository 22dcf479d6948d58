"""Every path to the Hub and to W&B, over real HTTP by the real clients, also when they fail."""

import contextlib
import io
import json
import math
import shutil
import time
from pathlib import Path

import pytest
from datasets import Dataset
from huggingface_hub import HfFileSystem, ModelCard

import app
import util
from conftest import DATASET, HF_HOME, HUB, TRAIN, contents, read
from items import SPLITS, Item, demo_items, load_prompts, read_prompts, write_json, write_manifest

WRITER, READER = "hf_test_writer_secret", "hf_test_reader_secret"
WANDB_KEY = "secret" + 34 * "7"
SHARED = ("--lite", "--base-model", "meta/tiny")
ADAPTER = util.ADAPTER_FILE
OUTPUTS = Path("outputs")  # of the folder that `online` works in
RUN = Path("outputs/price-first")
SHORT = ("--max-steps=2", "--batch-size=4", "--save-steps=1")
FIGURES = ("n", "mae", "mae_ci95", "mse", "r2")
REFUSALS = (  # what is typed, with which token: the beginnings of the lines that say why not
    ("train --lite --base-model meta/gated", WRITER, ["meta/gated: gated. Ask for access at"]),
    ("train --lite --base-model no/such", WRITER, ["no/such: not on the Hub"]),
    ("train {shared}", READER, ["HF_TOKEN may only read."]),
    ("train {shared}", "hf_unknown", ["HF_TOKEN: the Hub refuses HF_TOKEN: it is mistyped, exp"]),
    ("train {shared} --data-user nobody", WRITER, ["nobody/items_prompts_lite: not on the Hub"]),
    ("train {shared} --data-user gaps", WRITER, ["gaps/items_prompts_lite: row 1 of val: the"]),
    ("train {shared} --data-user chat", WRITER, ["chat/items_prompts_lite: can't be loaded ("]),
    ("eval {shared} --run-name base --data-user half", WRITER, ["half/items_prompts_lite: lacks"]),
    ("eval {shared} --run-name nosuch", WRITER, ["alice/price-nosuch: not on the Hub"]),
    ("prepare {shared}", WRITER, ["ed-donner/items_lite: not on the Hub"]),
    ("train {shared} --run-name a..b", WRITER, ["alice/price-a..b: the Hub allows no such name"]),
    (
        "train --lite --base-model meta/gated --hf-user bob --data-user half --log-wandb",
        WRITER,
        ["bob: HF_TOKEN belongs", "half/items_prompts_lite: lacks", "meta/gated: gated", "--log-w"],
    ),
)


def put_dataset(hub, name, splits):
    """Puts a dataset on the Hub as its client lays it out; `splits` are Datasets by name."""
    files = {}
    for split, rows in splits.items():
        buffer = io.BytesIO()
        rows.to_parquet(buffer)
        files[f"data/{split}-00000-of-00001.parquet"] = buffer.getvalue()
    hub.put("datasets", name, files)


def copy_run(trained, **changes):
    """Copies the run `first` into outputs, with `changes` to its run.json."""
    shutil.copytree(trained / RUN, RUN)
    record = read(RUN / "run.json") | changes
    write_json(RUN / "run.json", record, with_checksum=True)
    write_manifest(RUN, skipped=["README.md"])


def assert_pushed(hub, name):
    """The Hub has, privately and byte for byte, what the run's folder has besides checkpoints."""
    here = contents(OUTPUTS / name.split("/")[1])
    for path in list(here):
        if path.startswith(("checkpoint-", ".")):
            del here[path]
    there = hub.files("models", name)
    there.pop(".gitattributes", None)
    assert there == here
    assert ADAPTER in there
    assert hub.repos["models", name].private


@pytest.fixture()
def hub(tiny_base):
    """The test Hub with the tiny base as `meta/tiny`; alice may write, rob may read."""
    HUB.users = {WRITER: ("alice", "write"), READER: ("rob", "read")}
    HUB.put("models", "meta/tiny", contents(tiny_base))
    yield HUB
    HUB.up()
    HUB.repos.clear()
    HUB.requests.clear()


@pytest.fixture()
def online(hub, tmp_path, monkeypatch):
    """Runs a stage in this process, in a folder of its own and with an empty cache.

    As alice, unless told otherwise; without HF_TOKEN if `token` is None. Returns what it printed.
    """
    HfFileSystem.clear_instance_cache()
    for cache in Path(HF_HOME.name).iterdir():
        if cache.is_dir():
            shutil.rmtree(cache)
        else:
            cache.unlink()
    monkeypatch.chdir(tmp_path)

    def online(*arguments, code=0, token=WRITER):
        monkeypatch.delenv("HF_TOKEN", raising=False)
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        said = io.StringIO()
        found = 0
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                app.main(arguments)
            except SystemExit as end:
                found = end.code
        assert found == code, said.getvalue()
        return said.getvalue()

    return online


@pytest.fixture()
def catalogue(prepared):
    return str(prepared / "catalogue.jsonl")


@pytest.fixture()
def data(online, catalogue):
    """The prompts are prepared, on disk and in alice's account."""
    online("prepare", *SHARED, "--source", catalogue)


# Without failures


def test_hub_and_disk_agree(online, hub, data, call, trained, tmp_path):
    """Adapter, to the bit, and figures are the same, by the Hub or without it."""
    shutil.rmtree(OUTPUTS)
    online("train", *SHARED, "--run-name", "first", *TRAIN)
    expected = (trained / RUN / ADAPTER).read_bytes()
    assert hub.files("models", "alice/price-first")[ADAPTER] == expected
    assert_pushed(hub, "alice/price-first")

    shutil.rmtree(OUTPUTS)
    online("eval", "--lite", "--hf-user", "alice", "--run-name", "first")
    local = tmp_path / "local"
    shutil.copytree(trained / "outputs", local / "outputs")
    call("eval", "--local", "--run-name", "first", cwd=local)
    by_hub = read(RUN / "eval/results.json")
    by_disk = read(local / RUN / "eval/results.json")
    for name in FIGURES:
        assert by_hub[name] == by_disk[name]


def test_saved_login_is_used(online, hub, catalogue):
    """A token that `hf auth login` has saved counts as HF_TOKEN does, and is named if refused."""
    login = Path(HF_HOME.name, "token")
    prepare = ("prepare", *SHARED, "--source", catalogue)
    online(*prepare, token=None, code=1)
    login.write_text(WRITER)
    online(*prepare, token=None)
    assert hub.repos["datasets", "alice/items_prompts_lite"].private
    login.write_text(READER)
    assert "the saved login may only read" in online(*prepare, token=None, code=1)
    login.unlink()
    login.mkdir()
    assert "the saved login can't be read" in online(*prepare, token=None, code=1)


def test_card_says_what_was_trained(online, hub, data):
    """Base, data and recipe; once judged also the figures."""
    online("train", *SHARED, "--run-name", "carded", *SHORT)
    online("eval", "--size", "all")
    files = hub.files("models", "alice/price-carded")
    card = ModelCard(files["README.md"].decode())
    results = json.loads(files["eval/results.json"])
    assert card.data.base_model == "meta/tiny"
    assert card.data.library_name == "peft"
    assert card.data.datasets == "alice/items_prompts_lite"
    error = f"{results['mae']:,.2f}"
    for text in ("| lora_r | 32 |", "| seed | 42 |", "alice/price-carded", error):
        assert text in card.text
    for chart in ("loss.png", "eval/scatter.png", "eval/running_error.png"):
        assert f"({chart})" in card.text
        assert chart in files


def test_items_on_the_hub_become_prompts(online, monkeypatch):
    """Unusable ones are dropped and named; the prompts go to the token's own account."""
    monkeypatch.setenv("HF_TOKEN", WRITER)
    items = demo_items(90, seed=2)
    items[3].price = 0.0
    items[7].summary = "  "
    parts = items[:60], items[60:75], items[75:]
    Item.push_to_hub("alice/items_lite", *parts)
    assert Item.from_hub("alice/items_lite") == parts
    said = online("prepare", *SHARED, "--data-user", "alice")
    assert "price is zero or negative (line train 4)" in said
    assert "summary is empty or not text (line train 8)" in said
    shutil.rmtree(OUTPUTS)
    said = online("train", *SHARED, "--dry-run")
    assert "Data: alice/items_prompts_lite (your account's)" in said


def test_record_goes_with_the_prompts(online, hub, data, monkeypatch):
    """But for the name of the file; it doesn't count for what was pushed later without it."""
    name = "alice/items_prompts_lite"
    monkeypatch.setenv("HF_TOKEN", WRITER)
    assert "catalogue.jsonl" not in hub.files("datasets", name)["prepare.json"].decode()
    on_disk, on_hub = read_prompts(DATASET), read_prompts(name)
    assert on_hub.fingerprint == on_disk.fingerprint
    assert on_hub.is_own
    assert on_hub.about["cutoff"] == 110
    assert on_hub.source == name
    items = demo_items(9, seed=2)
    for item in items:
        item.prompt, item.completion = "Price is $", "5.00"
    Item.push_prompts_to_hub(name, items[:3], items[3:6], items[6:])
    assert read_prompts(name).about == {"source": name, "hub": name}


def test_published_adapter_loads_at_revision(online, hub, prepared, trained):
    """Another account's, on the course's data: neither pushed nor logged, and evaluated apart."""
    name = "ed-donner/price-2025-11-30_15.10.55-lite"
    on_disk = contents(trained / RUN)
    record = json.loads(on_disk["run.json"]) | {"hub": name, "wandb": True, "xxh3": None}
    files = {path: on_disk[path] for path in ("adapter_config.json", ADAPTER)}
    hub.put("models", name, files | {"run.json": json.dumps(record).encode()})
    revision = hub.commits("models", name)[-1]
    hub.put("models", name, {ADAPTER: b"broken since", "adapter_config.json": b"{}"})
    put_dataset(hub, "ed-donner/items_prompts_lite", load_prompts(prepared / DATASET))
    hub.requests.clear()
    judged = ("--hf-user", "ed-donner", "--run-name", "2025-11-30_15.10.55-lite")
    said = online("eval", *SHARED, *judged, "--revision", revision)
    assert "ed-donner/items_prompts_lite (the course's)" in said
    (apart,) = Path("outputs/price-2025-11-30_15.10.55-lite").iterdir()
    reason = "the adapter is another account's, or not the newest commit"
    assert f"so it stays in {apart}, unpublished: {reason}" in said
    results = read(apart / "results.json")
    data, base = results["data"]["fingerprint"][:8], results["base_identity"][:8]
    assert apart.name == f"eval-{data}-{base}-ed-donner-{revision}"
    assert results["revision"] == revision
    assert {method for method, _ in hub.requests} <= {"GET", "HEAD"}


def test_other_data_are_not_published(online, hub, data, trained):
    """Neither by that evaluation nor by the next push."""
    name = "alice/price-first"
    copy_run(trained, hub=name)
    splits = load_prompts(DATASET)
    put_dataset(hub, "carol/items_prompts_lite", dict(splits, val=splits["val"].select([0])))
    card = (RUN / "README.md").read_bytes()
    online("eval", "--size", "2", "--data-user", "carol")
    assert list(RUN.glob("eval-*"))
    assert (RUN / "README.md").read_bytes() == card
    assert ("models", name) not in hub.repos

    online("eval", "--size", "2")
    pushed = hub.files("models", name)
    assert "eval/results.json" in pushed
    assert not [path for path in pushed if path.startswith("eval-")]


def test_run_keeps_the_commit_of_its_base(online, hub, data, tiny_base):
    """Whatever is pushed to the base's repository later, weights included."""
    commit = hub.commits("models", "meta/tiny")[-1]
    online("train", *SHARED, "--run-name", "pinned", *SHORT)
    run = OUTPUTS / "price-pinned"
    assert read(run / "run.json")["base_identity"] == commit
    adapter = (run / ADAPTER).read_bytes()
    online("eval", "--run-name", "pinned", "--size", "2")
    guesses = (run / "eval/predictions.csv").read_bytes()

    other = contents(tiny_base) | {"README.md": b"# Edited"}
    other["model.safetensors"] = bytes(reversed(other["model.safetensors"]))
    hub.put("models", "meta/tiny", other)
    (run / ADAPTER).unlink()
    online("train", "--resume", "pinned")
    assert (run / ADAPTER).read_bytes() == adapter
    online("eval", "--run-name", "pinned", "--size", "2")
    assert (run / "eval/predictions.csv").read_bytes() == guesses
    online("eval", "--run-name", "pinned", "--export", "merged")


def test_pickled_adapter_is_not_loaded(online, hub, trained):
    """It isn't even fetched: a pickle may hold any code."""
    config = (trained / RUN / "adapter_config.json").read_bytes()
    files = {"adapter_config.json": config, "adapter_model.bin": b"any code at all"}
    hub.put("models", "alice/price-old", files)
    said = online("eval", *SHARED, "--run-name", "old", code=1)
    assert "old: holds no adapter_model.safetensors" in said
    fetched = [path for _, path in hub.requests if "adapter_model.bin" in path]
    assert not fetched


def test_lost_machine_resumes_from_hub(online, hub, data, trained):
    """From what the Hub had when the machine went: run.json and a checkpoint."""
    name = "alice/price-first"
    on_disk = contents(trained / RUN)
    pushed = {path: on_disk[path] for path in on_disk if path.startswith("checkpoint-3/")}
    record = json.loads(on_disk["run.json"]) | {"hub": name, "xxh3": None}
    pushed["run.json"] = json.dumps(record).encode()
    hub.put("models", name, pushed, private=True)
    shutil.rmtree(OUTPUTS)

    # Fetched half, it is no run: the next try fetches the rest
    hub.fail("checkpoint-3/optimizer.pt", 403, times=math.inf)
    assert name in online("train", "--lite", "--resume", "first", code=1)
    assert not (RUN / "run.json").exists()
    hub.up()
    said = online("train", "--lite", "--resume", "first")
    assert f"Fetched: {name}" in said
    assert "Resuming from step 3" in said
    assert hub.files("models", name)[ADAPTER] == on_disk[ADAPTER]
    assert_pushed(hub, name)


def test_resuming_keeps_account_and_wandb(online, data, trained):
    """Without --hf-user and --log-wandb the run still goes where it went."""
    copy_run(trained, hub="acme/price-first", wandb=True)
    (RUN / ADAPTER).unlink()
    said = online("train", "--lite", "--resume", "first", code=1)
    assert "acme: HF_TOKEN belongs to alice and may not write there" in said
    assert "WANDB_API_KEY is not set" in said


def test_newest_and_best_checkpoint_are_pushed(online, hub, tmp_path, monkeypatch):
    """Older ones are removed from the Hub."""
    monkeypatch.setenv("HF_TOKEN", WRITER)
    folder = tmp_path / "price-best"
    for step in (2, 4, 6):
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text("{}", encoding="utf-8")
    pusher = util.PushCheckpoints("alice/price-best")
    pusher.push(folder, ["checkpoint-4", "checkpoint-2"])
    pusher.push(folder, ["checkpoint-6", "checkpoint-2"])
    names = {path.split("/")[0] for path in hub.files("models", "alice/price-best")}
    assert names == {".gitattributes", "checkpoint-2", "checkpoint-6"}


def test_dry_run_writes_nothing(online, hub, data):
    """Neither on disk nor on the Hub, which is looked for once, or again if that is dropped."""
    before = contents(OUTPUTS)
    hub.requests.clear()
    hub.fail("HEAD /", drop=True)
    said = online("train", *SHARED, "--dry-run", "--run-name", "dry")
    assert "Memory:" in said
    assert contents(OUTPUTS) == before
    assert {method for method, _ in hub.requests} <= {"GET", "HEAD"}
    assert hub.requests.count(("HEAD", "/")) == 2


# What the Hub refuses


@pytest.mark.parametrize("typed, token, lines", REFUSALS, ids=[typed for typed, *_ in REFUSALS])
def test_refusals_come_at_once(online, hub, prepared, tiny_base, monkeypatch, typed, token, lines):
    """One line each, all of them, before any weights are read."""
    splits = load_prompts(prepared / DATASET)
    half = Dataset.from_list([{"prompt": "What?"}])
    put_dataset(hub, "ed-donner/items_prompts_lite", splits)
    put_dataset(hub, "half/items_prompts_lite", dict.fromkeys(SPLITS, half))
    put_dataset(hub, "gaps/items_prompts_lite", dict(splits, val=half))
    chat = Dataset.from_list([{"prompt": [{"role": "user", "content": "What?"}]}])
    put_dataset(hub, "chat/items_prompts_lite", dict(splits, val=chat))
    hub.put("models", "meta/gated", contents(tiny_base), gated=True)
    monkeypatch.setattr(util, "load_quantised", None)
    start = time.time()
    said = online(*typed.format(shared=" ".join(SHARED)).split(), code=1, token=token)
    taken = time.time() - start
    prefix = f"app.py {typed.split()[0]}: "
    printed = [line for line in said.splitlines() if line.startswith(prefix)]
    assert len(printed) == len(lines)
    for line, beginning in zip(printed, lines, strict=True):
        assert line.removeprefix(prefix).startswith(beginning)
    assert taken < 10


def test_local_project_asks_no_hub(online, hub, tiny_base, catalogue):
    """With a base on disk; --export, too."""
    hub.requests.clear()
    local = ("--lite", "--local", "--base-model", tiny_base)
    online("prepare", *local, "--source", catalogue)
    online("train", *local, "--run-name", "alone", *SHORT)
    online("eval", "--local", "--size", "2")
    online("eval", "--local", "--export", "merged")
    assert not hub.requests


# Outages: nothing is lost, and the later push completes


@pytest.mark.parametrize(
    "typed",
    [
        "prepare {shared} --source any.csv",
        "train {shared}",
        "eval {shared} --run-name nosuch",
        "eval {shared} --run-name base",
    ],
)
def test_absent_hub_is_said_in_seconds(online, hub, typed):
    """Before any work, and data that are there stay as they are."""
    older = OUTPUTS / "datasets/items_prompts_full/prepare.json"
    older.parent.mkdir(parents=True)
    older.write_text("{}")
    before = contents(OUTPUTS)
    hub.down()
    start = time.time()
    said = online(*typed.format(shared=" ".join(SHARED)).split(), code=1)
    taken = time.time() - start
    lines = [line for line in said.splitlines() if line.startswith("app.py")]
    assert lines
    assert any("the Hub can't be reached" in line for line in lines)
    assert contents(OUTPUTS) == before
    assert taken < 8


def test_cached_run_needs_no_hub(online, hub, prepared, trained):
    """Nor its base and data, if all of them were fetched before."""
    put_dataset(hub, "ed-donner/items_prompts_lite", load_prompts(prepared / DATASET))
    files = {path: (trained / RUN / path).read_bytes() for path in ("adapter_config.json", ADAPTER)}
    hub.put("models", "bob/price-first", files)
    fetched = ("eval", *SHARED, "--hf-user", "bob", "--run-name", "first", "--size", "2")
    fetched += ("--data-user", "ed-donner")
    online(*fetched)
    (apart,) = RUN.iterdir()
    expected = read(apart / "results.json")
    hub.down()
    online(*fetched)
    results = read(apart / "results.json")
    for name in FIGURES:
        assert results[name] == expected[name]


@pytest.mark.parametrize(
    "status, reason",
    [(503, "503"), (401, "the Hub refuses HF_TOKEN: it is mistyped, expired or revoked")],
)
def test_prompts_are_pushed_later(online, hub, catalogue, status, reason):
    """They are on disk, the reason is said, and the same command pushes them."""
    prepare = ("prepare", *SHARED, "--source", catalogue)
    hub.fail("POST /api/datasets/alice/items_prompts_lite/commit", status, times=math.inf)
    said = online(*prepare, code=3)
    assert reason in said
    assert "Everything is on disk" in said
    on_disk = read_prompts(DATASET)
    hub.up()
    online(*prepare)
    assert read_prompts("alice/items_prompts_lite").fingerprint == on_disk.fingerprint


def test_hub_down_in_training_stops_nothing(online, hub, data, trained, monkeypatch):
    """It goes down after the first checkpoint is pushed; the run ends as it would have."""
    push = util.PushCheckpoints.push

    def push_once(*arguments):
        push(*arguments)
        hub.down()

    monkeypatch.setattr(util.PushCheckpoints, "push", push_once)
    said = online("train", *SHARED, "--run-name", "middle", *TRAIN, code=3)
    assert "the adapter is in outputs/price-middle" in said
    assert "python app.py train --resume middle" in said
    expected = (trained / RUN / ADAPTER).read_bytes()
    assert Path("outputs/price-middle", ADAPTER).read_bytes() == expected

    hub.up()
    for _ in range(2):  # what the Hub has isn't pushed again
        assert "Pushed: alice/price-middle" in online("train", *SHARED, "--resume", "middle")
        assert_pushed(hub, "alice/price-middle")
    assert len(hub.commits("models", "alice/price-middle")) == 3


LFS, COMMIT = "PUT /lfs", "POST /api/models/alice/price-gap/commit"


@pytest.mark.parametrize(
    "faults",
    [
        [("/price-gap", 429, {}), (COMMIT, 503, {})],
        [(LFS, None, {"drop": True}), (COMMIT, None, {"drop": True})],
        [(LFS, None, {"drop": "answer"}), (COMMIT, None, {"drop": "answer"})],
        [(COMMIT, 403, {})],
    ],
    ids=["busy", "request lost", "answer lost", "refused"],
)
def test_next_push_makes_up_for_one(online, hub, data, faults):
    """A checkpoint's that fails ends no training; it is reported, and the next push has all."""
    for match, status, options in faults:
        hub.fail(match, status, **options)
    said = online("train", *SHARED, "--run-name", "gap", *SHORT)
    assert "Not pushed: alice/price-gap" in said
    assert "Pushed: alice/price-gap" in said
    assert_pushed(hub, "alice/price-gap")


def test_next_eval_pushes_the_figures(online, hub, data, trained):
    """Those that could not be pushed when they were made."""
    name = "alice/price-first"
    copy_run(trained, hub=name)
    hub.fail(f"POST /api/models/{name}/commit", 503, times=math.inf)
    assert "Everything is on disk" in online("eval", "--size", "2", code=3)
    hub.up()
    online("eval", "--size", "2")
    assert "eval/results.json" in hub.files("models", name)
    assert_pushed(hub, name)


# Weights & Biases

OFFLINE = {"WANDB_MODE": "offline", "WANDB_API_KEY": WANDB_KEY}
NO_NETRC = {"NETRC": "/nonexistent"}


def test_wandb_gets_one_run(call, shared, project):
    """With config, losses and validation errors."""
    logged_run = ("train", *shared, "--log-wandb", "--run-name", "logged", *SHORT)
    call(*logged_run, cwd=project, environment=OFFLINE)
    assert not (project / "wandb").exists()
    files = sorted((project / "outputs/wandb").rglob("*.wandb"))
    assert {file.name for file in files} == {"run-price-logged.wandb"}
    logged = b"".join(file.read_bytes() for file in files)
    for name in ("learning_rate", "seed", "max_steps", "peft_config"):
        assert name.encode() in logged
    for name in ("train/loss", "train/learning_rate", "eval/loss", "eval/mae"):
        assert name.encode() in logged


@pytest.mark.parametrize(
    "environment, reason",
    [
        ({"NETRC": "netrc"}, None),
        (NO_NETRC | {"WANDB_MODE": "disabled"}, None),
        (NO_NETRC | {"WANDB_MODE": "offline", "WANDB_API_KEY": "mistyped"}, None),
        (NO_NETRC | {"WANDB_API_KEY": "mistyped"}, "WANDB_API_KEY invalid"),
        ({"WANDB_MODE": "off"}, "Input should be 'online', 'offline'"),
    ],
    ids=["netrc", "disabled", "offline", "bad key", "bad mode"],
)
def test_wandb_login_is_checked(environment, reason, call, shared, project):
    """A login in netrc counts; a mode that sends nothing needs none; what is wrong is named."""
    netrc = f"machine api.wandb.ai login user password {WANDB_KEY}"
    (project / "netrc").write_text(netrc)
    typed = ("train", *shared, "--log-wandb", "--dry-run")
    said = call(*typed, cwd=project, environment=environment, code=1 if reason else 0)
    if reason:
        assert "app.py train: --log-wandb: " in said
        assert reason in said


# Secrets


def test_no_token_is_written(online, hub, call, catalogue, tmp_path):
    """Neither into a file of the project or the caches, nor on the screen, which is a file here."""
    writer = {"cwd": tmp_path, "environment": {"HF_TOKEN": WRITER} | OFFLINE}
    call("prepare", *SHARED, "--source", catalogue, **writer)
    call("train", *SHARED, "--log-wandb", *SHORT, **writer)
    call("eval", "--size", "2", **writer)
    call("train", *SHARED, cwd=tmp_path, environment={"HF_TOKEN": READER}, code=1)
    assert [name for _, name in hub.repos if "alice/price-" in name]

    for folder in (tmp_path, HF_HOME.name):
        written = contents(folder)
        assert len(written) > 10
        for path, content in written.items():
            for secret in (WRITER, READER, WANDB_KEY):
                assert secret.encode() not in content, path
