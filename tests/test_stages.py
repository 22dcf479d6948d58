"""prepare, train and eval of a tiny Llama in real nf4, through the command line where users are."""

import csv
import html
import json
import os
import re
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import bitsandbytes
import pytest
import torch
from datasets import Dataset
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

import child
import items
import util
from app import RECIPES, RunConfig, build_quant_config, open_pricer, price_items
from conftest import DATASET, TRAIN, contents, flip, plain_loss, read, train_losses, write_catalogue
from items import COURSE_SCALE, IGNORED, UserError, load_prompts, tokenise, write_json

RUN = "outputs/price-first"
STEADY = {"batch_size": 16, "learning_rate": 1e-2, "logging_steps": 1, "lora_dropout": 0.0}
JUDGE = ("eval", "--local", "--run-name", "first")
SHORT = ("--max-steps=2", "--batch-size=4")
ADAPTER = util.ADAPTER_FILE
MISTAKES = (  # what a user types, where only the run `first` is: what the one line says
    ("eval --local --run-name nosuch", "no such run in outputs. There are: first."),
    ("eval --local --demo", "no finished run of price"),
    ("eval --local --run-name first --export outputs", "outputs: exists already"),
    ("eval --local --run-name first --export /proc/a/b", "/proc/a/b: can't be written to"),
    (f"{{train}} --run-name {96 * '価'}", "File name too long"),
    (f"prepare --local --base-model {300 * 'b'}", "File name too long"),
    (f"train --local --output-dir {300 * 'o'}", "File name too long"),
    ("eval --local --run-name first --compare first", "first: not evaluated yet"),
    ("eval --local --run-name first --text <br>", "The text: none of its rows is usable"),
    ("train --demo --base-model {base}", "prepare --demo"),
    ("{train} --run-name first", "price-first exists"),
    ("train --lite", "HF_TOKEN is not set"),
    ("prepare --local --base-model {base} --source nosuch.csv", "can't be read: No such file"),
    ("prepare --demo --base-model .", "holds no config.json"),
    ("prepare --demo --base-model no/such-model", "no/such-model: not on the Hub"),
    ("prepare --local --output-dir /proc/a", "/proc/a/datasets/items_prompts_full: can't be wr"),
    ("prepare --local --output-dir a::b", "items_prompts_full: has to be UTF-8 without `::`"),
    ("prepare --local --output-dir a\udce4", "items_prompts_full: has to be UTF-8 without `::`"),
    ("{train} --micro-batch 5 --batch-size 12", "--batch-size 12: has to be a multiple of 5"),
    ("{train} --price-loss 2.5", "--price-loss 2.5: needs a base whose tokenizer spells each"),
    ("{train} --base-weights fp8 --precision fp32", "--base-weights fp8: needs bf16 and a GPU"),
)
FULL_DISK = (  # what is typed, and how many KiB the disk has left, which are too few
    ("prepare {shared} --source {catalogue}", 8),
    ("eval --local --run-name first --size 4", 0),
    ("eval --local --run-name first --input few.jsonl --output outputs/out.csv", 0),
    ("eval --local --run-name first --export outputs/plain", 7168),
)
FULL = "the disk is full, or your quota or a limit on files is reached"


@pytest.fixture(scope="module")
def splits(prepared):
    return load_prompts(prepared / DATASET)


@pytest.fixture(scope="module")
def judged(call, trained, tmp_path_factory):
    """The folder of a run that is judged on all test items, as is the base. Not to be written."""
    folder = tmp_path_factory.mktemp("judged")
    shutil.copytree(trained / "outputs", folder / "outputs")
    call(*JUDGE, "--compare-base", "--size", "all", cwd=folder)
    return folder / RUN


def read_csv(path):
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


# Prepare


MESSY = "Name;Cost;Item description\nPan;19,99 $;<p>a microwave</p>\nBed;ab 9,99;soft\n"


def test_messy_catalogue_is_prepared(call, shared, trained_project):
    """What is dropped is said by line; `eval --input` reads the same columns."""
    folder = trained_project
    mugs = [f"Mug {n};7,{n};tin of {n} grams\n" for n in range(20, 50)]
    (folder / "messy.csv").write_text(MESSY + "".join(mugs), encoding="utf-8")
    columns = ("--columns", "title=Name", "price=Cost", "text=Item description")
    said = call("prepare", *shared, "--source", "messy.csv", *columns, "--unit", "1", cwd=folder)
    assert "price is no single amount (line 3" in said
    splits = load_prompts(folder / f"{DATASET}-messy")
    prompts = {row["prompt"].split("\n\n")[1] for split in splits.values() for row in split}
    assert "Title: Pan\nDescription: a microwave" in prompts
    assert len(prompts) == 31
    files = ("--input", "messy.csv", *columns, "--output", "out.csv")
    said = call(*JUDGE, *files, cwd=folder)
    text = (folder / "out.csv").read_text("utf-8")
    assert text.startswith("Name;Cost;Item description;guess;low;high;similar_1;")
    assert re.search("^Pan;19,99 .;<p>a microwave</p>;[0-9]+,[0-9]+;", text, re.MULTILINE)
    assert "price is no single amount (line 3" in said


def test_each_source_has_its_dataset(call, shared, trained_project):
    """It is replaced by its own source only, and not if a run was trained on it."""
    folder = trained_project
    for name in ("catalogue", "other", "other", "catalogue"):
        write_catalogue(folder / f"{name}.jsonl", 40 + len(list(folder.glob("outputs/datasets/*"))))
        said = call("prepare", *shared, "--source", f"{name}.jsonl", cwd=folder)
        assert f"Saved: {DATASET}" in said
        assert "Next: `python app.py train --lite --local --base-model " in said
    found = sorted(path.name for path in folder.glob("outputs/datasets/*"))
    assert found == [Path(DATASET + end).name for end in ("", "-catalogue", "-other")]
    assert f"Data: {DATASET} " in call(*JUDGE, "--size", "2", cwd=folder)
    said = call("train", *shared, "--dry-run", cwd=folder)
    assert f"Data: {DATASET}-catalogue " in said


# Train


def test_base_is_nf4_and_adapters_fp32(build):
    model = build(base_weights="nf4").model
    layers = [one for one in model.modules() if isinstance(one, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 2 * 7
    for layer in layers:
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.weight.quant_state.nested
        assert not layer.support_avx512bf16_for_cpu  # or gradients are lost after an evaluation
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 4 * 2
    for name, parameter in trainable.items():
        assert "lora_" in name
        assert parameter.dtype == torch.float32


ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
ALL_LINEAR = ATTENTION | {"gate_proj", "up_proj", "down_proj"}
CHANGES = {"scheduler": "linear", "warmup": 0.2, "weight_decay": 0.05, "lora_alpha": 24}
CHANGES["targets"] = "all"


@pytest.mark.parametrize(
    ("mode", "changes", "targets"),
    [("lite", {}, ATTENTION), ("full", {}, ALL_LINEAR), ("lite", CHANGES, ALL_LINEAR)],
)
def test_recipe_reaches_the_trainer(build, mode, changes, targets):
    trainer = build(mode, micro_batch=8, **changes)
    recipe = replace(RECIPES[mode], **changes)
    args, lora = trainer.args, trainer.model.peft_config["default"]
    assert (lora.r, lora.lora_alpha) == (recipe.lora_r, recipe.lora_alpha or 2 * recipe.lora_r)
    assert (lora.lora_dropout, lora.bias) == (recipe.lora_dropout, "none")
    assert lora.target_modules == targets
    assert args.num_train_epochs == recipe.epochs
    assert args.train_batch_size * args.gradient_accumulation_steps == recipe.batch_size
    assert (args.learning_rate, args.lr_scheduler_type) == (recipe.learning_rate, recipe.scheduler)
    assert (args.warmup_steps, args.weight_decay) == (recipe.warmup, recipe.weight_decay)
    assert (args.max_grad_norm, args.optim) == (0.3, "adamw_torch_fused")


def test_price_loss_trains_the_distribution(build, number_base):
    """It lowers the score that it is for, in equal steps, and is logged apart from the loss."""
    settings = {"max_steps": 10, "learning_rate": 1e-2, "logging_steps": 1, "batch_size": 4}
    first_losses, scores = [], []
    for weight in (0.0, 20.0):
        trainer = build(price_loss=weight, base=number_base, lora_dropout=0.0, **settings)
        first_losses.append(train_losses(trainer)[0])
        rows = trainer.val_rows
        reading = trainer.reader.read(rows)
        estimates = util.estimate_prices(reading.probabilities, reading.greedy, rows)
        scores.append(sum(estimate.crps for estimate in estimates))
    assert first_losses[1] == pytest.approx(first_losses[0], abs=1e-5)
    found = [entry["price_loss"] for entry in trainer.state.log_history if "price_loss" in entry]
    assert len(found) == 10
    assert scores[1] < scores[0]


@pytest.fixture()
def build_packed(build, packed_attention, monkeypatch):
    """As `build`, for training without padding, which CPUs don't do else."""

    def build_packed(**changes):
        with monkeypatch.context() as patch:
            patch.setattr(util, "choose_attention", lambda *_: util.PACKED)
            return build(**changes)

    return build_packed


def test_packed_training_has_padded_losses(build, build_packed):
    """An epoch's last batch, which has fewer rows, included; validation has the same figures."""
    padded, packed = (make(max_steps=6, **STEADY) for make in (build, build_packed))
    assert packed.evaluate() == pytest.approx(padded.evaluate(), rel=1e-5)
    losses = train_losses(padded)
    assert len(losses) == 6
    assert train_losses(packed) == pytest.approx(losses, abs=1e-4)


def test_longest_validation_row_is_checked(splits, tiny_base):
    """Its length can be what a window or learned positions don't allow."""
    row = {"prompt": COURSE_SCALE.prompt("Title: " + 90 * "lamp "), "completion": "9.00"}
    val = Dataset.from_list([splits["val"][0], row])
    tokenizer = util.Base(tiny_base).tokenizer
    data = util.make_training_data(dict(splits, val=val), tokenizer, 2)
    assert len(data.extremes[-1]["input_ids"]) > data.lengths.max()


def test_compiled_training_has_padded_losses(build, build_packed):
    """Both layers use the code of one, which batches of other lengths use, too."""
    changes = STEADY | {"max_steps": 2, "targets": "attention"}
    padded = train_losses(build(**changes))
    counters.clear()
    # Scalar code: to find out which vectors this CPU has takes half of the time
    with torch._inductor.config.patch({"cpp.vec_isa_ok": False}):
        compiled = train_losses(build_packed(compile="on", **changes))
    assert counters["stats"]["unique_graphs"] == 1
    assert compiled == pytest.approx(padded, abs=1e-4)


def test_base_weights_change_no_loss(call, shared, trained, project):
    """Dequantised once where memory has room, or in each layer of each step: the same numbers."""
    call("train", *shared, "--run-name", "nf4", "--base-weights", "nf4", *TRAIN, cwd=project)
    dequantised = read(trained / RUN / "run.json")
    quantised = read(project / "outputs/price-nf4/run.json")
    assert dequantised["base_weights"] == "fp32 from nf4, dequantised once"
    assert quantised["base_weights"] == "nf4"
    for name in ("loss", "eval_loss"):  # those of validations, behind which training goes on
        expected = [entry[name] for entry in dequantised["history"] if name in entry]
        found = [entry[name] for entry in quantised["history"] if name in entry]
        assert found == pytest.approx(expected, abs=1e-4)
    said = call("train", *shared, "--base-weights", "bf16-from-nf4", "--dry-run", cwd=project)
    assert "fp32 from nf4, dequantised once: as asked for" in said


def test_train_leaves_whole_run(trained):
    found = set(os.listdir(trained / RUN))
    assert found >= {"adapter_config.json", ADAPTER, "tokenizer.json", "README.md", "loss.png"}
    assert found >= {"checkpoint-3", "checkpoint-6"}
    files = [path for path in (trained / RUN).rglob("[!.]*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~items.UMASK}
    record = read(trained / RUN / "run.json")
    assert (record["steps"], record["seed"]) == (6, 42)
    assert (record["recipe"]["lora_r"], record["recipe"]["max_steps"]) == (32, 6)
    assert len(record["data"]["fingerprint"]) == 16
    assert record["versions"].keys() >= {"torch", "trl", "peft"}


def test_validation_measures_loss_and_dollars(build, splits):
    """The loss is the model's own, the error that of the median price."""
    trainer = build(max_steps=3, batch_size=4, learning_rate=1e-2)
    trainer.train()
    found = util.training_log(trainer)[-1]
    rows = tokenise(splits["val"], trainer.processing_class, "val")
    tokens = sum(label != IGNORED for row in rows for label in row["labels"])
    loss = sum(plain_loss(trainer.model.eval(), row) for row in rows) / tokens
    assert found["eval_loss"] == pytest.approx(loss, rel=1e-3)

    rows = list(splits["val"])
    reader = util.PriceReader(trainer.model.eval(), trainer.processing_class)
    guesses = [estimate.guess for estimate in reader.answer(rows)[0]]
    truths = [float(row["completion"]) for row in rows]
    assert found["eval_mae"] == pytest.approx(util.metrics(guesses, truths)["mae"])


def test_keep_best_ends_with_least_error(call, shared, project):
    """The adapter is the best checkpoint's, or the next best's if that is damaged."""
    recipe = ("--max-steps=8", "--save-steps=2", "--batch-size=4", "--keep-best")
    rate = "--learning-rate=0.3"  # too high, so that the last isn't the best
    said = call("train", *shared, "--run-name", "best", *recipe, rate, cwd=project)
    assert re.search(r"Time: +about 0:00:00 left, \S+ s a step", said)
    folder = project / "outputs/price-best"
    history = read(folder / "run.json")["history"]
    errors = {entry["step"]: entry["eval_mae"] for entry in history if "eval_mae" in entry}
    best, next_best, *_ = sorted(errors, key=errors.get)
    assert list(errors) == [2, 4, 6, 8]
    assert best != 8
    adapters = {step: (folder / f"checkpoint-{step}" / ADAPTER).read_bytes() for step in errors}
    assert (folder / ADAPTER).read_bytes() == adapters[best]

    (folder / ADAPTER).unlink()
    flip(folder / f"checkpoint-{best}" / ADAPTER)
    said = call("train", "--local", "--resume", "best", cwd=project)
    assert f"checkpoint-{best}, the best, is skipped: {ADAPTER} is corrupt" in said
    assert (folder / ADAPTER).read_bytes() == adapters[next_best]


def test_eight_bit_stays_reachable(call, shared, project):
    """By default it is 4 bits, which compute in bf16 where the GPU does."""
    call("train", *shared, "--run-name", "eight", "--no-4bit", *SHORT, cwd=project)
    call("eval", "--local", "--run-name", "eight", "--size", "2", cwd=project)
    assert not read(project / "outputs/price-eight/run.json")["use_4bit"]
    assert build_quant_config(False, False).load_in_8bit
    assert build_quant_config(True, True).bnb_4bit_compute_dtype == torch.bfloat16


# Eval


def test_eval_leaves_figures_and_charts(judged, splits):
    """Of the run by each decoding, the base, and the training prices' mean and median."""
    files = {"results.json", "predictions.csv", "report.html", "manifest.json"}
    charts = {"scatter.png", "running_error.png", "reliability.png"}
    assert set(os.listdir(judged / "eval")) == files | charts
    results = read(judged / "eval/results.json")
    figures = {"n", "mae", "mae_ci95", "mse", "r2", "parse_failures"}
    assert results.keys() >= figures | {"items_per_s", "seconds", "words", "distribution"}
    assert results["base"].keys() >= figures
    assert results["decodings"].keys() == {"median", "mean", "greedy"}
    assert results["decodings"]["median"]["mae"] == results["mae"]
    prices = [float(price) for price in splits["train"]["completion"]]
    truths = [float(price) for price in splits["test"]["completion"]]
    for name in ("mean", "median"):
        constant = getattr(statistics, name)(prices)
        expected = statistics.fmean(abs(constant - truth) for truth in truths)
        assert results["baselines"][f"constant_{name}"]["mae"] == pytest.approx(expected)

    table = read_csv(judged / "eval/predictions.csv")
    similar = [f"similar_{i}{end}" for i in (1, 2, 3) for end in ("", "_price", "_similarity")]
    plain = ["index", "title", "category", "truth", "guess", "error", "low", "high"]
    assert [*table[0]] == plain + similar
    error = statistics.fmean(float(row["error"]) for row in table)
    assert results["mae"] == pytest.approx(error, abs=0.01)


def test_report_is_one_file(judged):
    """It needs no network and no file beside it; has no local path, but the base's real name."""
    page = (judged / "eval/report.html").read_text("utf-8")
    needed = re.findall(r"""(?:src|href)=["']?([^"'> ]*)""", page)
    assert not [link for link in needed if not link.startswith(("data:", "#"))]
    assert "@import" not in page
    assert str(judged.parents[1]) not in page
    record = read(judged / "run.json")
    assert record["base_model"] not in page
    results = read(judged / "eval/results.json")
    for shown in (Path(record["base_model"]).name, results["base_identity"], "catalogue.jsonl, "):
        assert shown in page
    for figures in (results, results["base"], *results["decodings"].values()):
        assert f"{figures['mae']:,.2f}" in page
    for row in results["worst"]:
        assert html.escape(row["title"]) in page


def test_intervals_are_calibrated(call, shared, tmp_path):
    """By the validation rows, in training; `eval` uses what run.json has of it."""
    catalogue = write_catalogue(tmp_path / "catalogue.jsonl", 500)
    call("prepare", *shared, "--source", catalogue, cwd=tmp_path)
    call("train", *shared, "--run-name", "first", *TRAIN, "--max-steps", "2", cwd=tmp_path)
    record = read(tmp_path / RUN / "run.json")
    for calibration in (record["calibration"], record["comparables"]["calibration"]):
        assert calibration["rows"] == 26
        assert len(calibration["widths"]) == len(util.INTERVAL_WIDTHS)
    for mode in ("on", "off"):
        said = call(*JUDGE, "--size", "all", "--comparables", mode, cwd=tmp_path)
        assert "of the true prices; 26 validation rows set their width" in said
        results = read(tmp_path / RUN / "eval/results.json")
        assert set(results["intervals"]) == {"as read", "calibrated"}


def test_eval_compares_with_earlier_runs(call, shared, trained_project):
    """On the same items, by the difference of the errors and its interval."""
    folder = trained_project
    call("train", *shared, "--run-name", "second", *SHORT, cwd=folder)
    call(*JUDGE, "--size", "4", cwd=folder)
    second = ("eval", "--local", "--run-name", "second", "--compare", "price-first")
    said = call(*second, "--size", "4", cwd=folder)
    first = read(folder / RUN / "eval/results.json")
    results = read(folder / "outputs/price-second/eval/results.json")
    found = results["earlier"]["first"]
    assert found["mae"] == first["mae"]
    assert found["difference"] == pytest.approx(results["mae"] - first["mae"])
    assert found["low"] <= found["difference"] <= found["high"]
    assert "Against first, on the same items" in said


def test_own_items_get_same_prices(call, trained_project, judged, splits):
    """Rows without a price are priced, repeated ones each time; those of no use are skipped.

    How many were trained on is said: an error over them flatters.
    """
    rows = []
    for row in (*splits["test"], *splits["train"].select(range(2))):
        text = row["prompt"].split("\n\n")[1]
        rows.append({"title": "x", "text": text, "price": row["completion"]})
    rows[1]["price"] = ""
    rows += [{"title": "", "text": "no title", "price": "5"}, rows[0]]
    own = trained_project / "own.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    said = call(*JUDGE, "--input", "own.jsonl", "--output", "out.csv", cwd=trained_project)

    found = read_csv(trained_project / "out.csv")
    expected = read_csv(judged / "eval/predictions.csv")
    assert [row["price"] for row in found] == [row["price"] for row in rows]
    assert found[6]["guess"] == ""
    for row, other in zip([*found[:4], found[7]], [*expected, expected[0]], strict=True):
        for name in ("guess", "low", "high"):
            assert row[name] == other[name]
    assert "Skipped:\n  1 × title is empty or not text (line 7)" in said
    assert "Not judged:\n  1 × price is missing (line 2)" in said
    assert "n = 6" in said
    assert "words alone: ridge regression" in said
    assert "Note: 2 of these rows were trained on" in said


def test_one_description_is_priced(call, trained_project):
    text = ("--text", "Brass <b>lamp</b>\nwith a shade", "--decode", "mean")
    said = call(*JUDGE, *text, "--output", "o.jsonl", cwd=trained_project)
    row = read(trained_project / "o.jsonl")
    assert row["title"] == "Brass lamp"
    assert row["price"] is None
    assert row["low"] <= row["high"]
    interval = f"80 %: ${row['low']:.0f} to ${row['high']:.0f}"
    assert f"${row['guess']:.2f}  ({interval})  Brass lamp" in said


def test_pricer_reads_its_run_once(trained, monkeypatch):
    """Its prices are price_items', also of several descriptions at once."""
    monkeypatch.chdir(trained)
    config = RunConfig(local=True)
    texts = ["Brass lamp\nwith a shade", "Sofa of linen"]
    pricer = open_pricer(config, run_name="first")
    first, second = pricer(texts)
    reader = pricer.reader
    assert pricer(texts[1:]) == [second | {"line": 1}]
    assert pricer.reader is reader
    assert pricer({"title": "Brass lamp", "text": "with a shade"}) == [first]
    assert price_items(config, run_name="first", text=texts[0]) == [first]
    assert first["low"] <= first["guess"] <= first["high"]
    assert "similar_1_price" in first
    with pytest.raises(UserError, match="title is empty or not text .line 2."):
        pricer(["Lamp", " "])
    with pytest.raises(UserError, match="None: an item is a text, or a dict of title, text"):
        pricer([None])


def test_demo_base_unpacks_alike(tmp_path):
    """Whether the Hub may be asked or not: it can be deleted, and its runs resumed."""
    base = items.unpack_demo_base(tmp_path / "base")
    assert read(base / "tokenizer_config.json")["local_files_only"]


def test_exported_model_answers_as_run(call, trained_project, splits):
    """With transformers alone; it is compared with the run on validation rows, to 16 bits."""
    said = call(*JUDGE, "--export", "plain", cwd=trained_project)
    found = re.search(r"Check: on 4 validation rows .* by at most (.*)% of the probability", said)
    assert 0 < float(found[1]) < 15
    plain = trained_project / "plain"
    assert set(os.listdir(plain)) >= {"model.safetensors", "tokenizer.json", "README.md"}
    config = read(plain / "config.json")
    assert "quantization_config" not in config
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]  # for transformers 4
    assert read(plain / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    model = AutoModelForCausalLM.from_pretrained(plain)
    assert model.dtype == torch.bfloat16

    call(*JUDGE, "--size", "all", "--decode", "greedy", cwd=trained_project)
    expected = read_csv(trained_project / RUN / "eval/predictions.csv")
    reader = util.PriceReader(model.float(), items.load_tokenizer(str(plain)))
    found = reader.read(list(splits["test"])).greedy
    assert found == [float(row["guess"]) for row in expected]


def test_wrong_export_is_refused(call, trained_project):
    """And leaves nothing behind."""
    before = sorted(path.name for path in trained_project.iterdir())
    said = call(*JUDGE, "--export", "plain", cwd=trained_project, code=1, hook="spoil_export")
    assert "app.py eval: The exported model doesn't answer as the run does: on 4 validation" in said
    assert sorted(path.name for path in trained_project.iterdir()) == sorted({*before, child.LOG})


def test_export_needs_no_data(call, trained_project):
    shutil.rmtree(trained_project / "outputs/datasets")
    said = call(*JUDGE, "--export", "plain", cwd=trained_project)
    assert "The export is not checked: the data that the run was trained on aren't" in said
    assert (trained_project / "plain/model.safetensors").exists()


def test_single_item_leaves_no_nan(call, trained_project):
    """What has no value is null in results.json, and a dash in card and report."""
    said = call(*JUDGE, "--size", "1", "--compare-base", cwd=trained_project)
    assert "(± –, n = 1)" in said
    folder = trained_project / RUN
    assert "NaN" not in (folder / "eval/results.json").read_text("utf-8")
    results = read(folder / "eval/results.json")
    assert results["mae_ci95"] is None
    assert results["base"]["r2"] is None
    texts = [(folder / name).read_text("utf-8") for name in ("README.md", "eval/report.html")]
    assert str(trained_project) not in (folder / "run.json").read_text("utf-8")
    for text in (said, *texts):
        assert not re.search(r"\bnan\b", text)


def test_card_snippet_prices_item(trained, monkeypatch, capsys):
    """As it stands, from the prompt to its price."""
    monkeypatch.chdir(trained / RUN)
    card = Path("README.md").read_text("utf-8")
    snippet = card.split("```python\n")[1].split("```")[0]
    exec(snippet, {})
    prompt, _, price = capsys.readouterr().out.rpartition("Price is $")
    assert "Title: Brass table lamp" in prompt
    assert price.strip()


def test_other_data_are_evaluated_apart(call, shared, trained_project):
    """In a folder of their own, with a note; the run's own evaluation and card stay."""
    call(*JUDGE, "--size", "2", cwd=trained_project)
    catalogue = write_catalogue(trained_project / "new.jsonl", 60)
    call("prepare", *shared, "--source", catalogue, cwd=trained_project)
    assert f"Data: {DATASET} " in call(*JUDGE, "--size", "2", cwd=trained_project)
    run = trained_project / RUN
    before = contents(run)
    shutil.rmtree(trained_project / DATASET)
    said = call(*JUDGE, "--size", "3", cwd=trained_project)
    note = "the run was trained on other data, perhaps on some of these test items; words alone "
    assert f"Note: {note}" in said
    assert "the items that the run was trained on aren't here: the model alone" in said
    (apart,) = run.glob("eval-*")
    assert f"so it stays in {RUN}/{apart.name}, unpublished: {note}" in said
    results = read(apart / "results.json")
    fingerprint, identity = results["data"]["fingerprint"], results["base_identity"]
    assert apart.name == f"eval-{fingerprint[:8]}-{identity[:8]}"
    assert contents(run).items() >= before.items()

    # Runs are compared on them, too
    said = call(*JUDGE, "--size", "3", "--compare", "first", cwd=trained_project)
    assert "Against first, on the same items: $0.00 apart" in said


def test_other_base_is_evaluated_apart(call, shared, tiny_base, trained_project):
    """Another one by its files, not by its name; `--compare base` takes the same base's only."""
    run, copy = trained_project / RUN, trained_project / "copy"
    shutil.copytree(tiny_base, copy)
    judge = (*JUDGE, "--size", "2", "--base-model", "copy")
    call(*judge, cwd=trained_project)
    assert read(run / "eval/results.json")["base_model"] == "copy"
    base = (*shared, "--run-name", "base", "--size", "2")
    call("eval", *base, cwd=trained_project)
    assert "on the same items" in call(*judge, "--compare", "base", cwd=trained_project)
    before = contents(run)

    write_json(copy / "config.json", read(copy / "config.json") | {"rms_norm_eps": 1e-3})
    assert "the base model is copy" in call(*judge, cwd=trained_project)
    (apart,) = run.glob("eval-*")
    assert apart.name.endswith(f"-{read(apart / 'results.json')['base_identity'][:8]}")
    assert contents(run).items() > before.items()
    call("eval", *base, "--base-model", "copy", cwd=trained_project)
    said = call(*JUDGE, "--size", "2", "--compare", "base", cwd=trained_project, code=1)
    assert "--compare base: its eval can't be compared: its base_identity is" in said


# Full disks


@pytest.mark.parametrize("typed, room", FULL_DISK)
def test_full_disk_is_one_line(call, shared, trained, small_disk, typed, room):
    """Whatever room was left at the start; the disk holds the same as before."""
    disk = small_disk(40)
    shutil.copytree(trained / "outputs", disk, dirs_exist_ok=True)
    child.fill_disk(disk, room)
    before = contents(disk)
    catalogue = write_catalogue(disk.parent / "new.jsonl", 2000)
    write_catalogue(disk.parent / "few.jsonl", 4)
    arguments = typed.format(shared=" ".join(shared), catalogue=catalogue).split()
    said = call(*arguments, cwd=disk.parent, code=1)
    assert re.match(f"app.py {arguments[0]}: {FULL}", said.splitlines()[-1])
    assert contents(disk) == before
    assert not [path for path in disk.rglob("*") if "~" in path.name]


# Mistakes


@pytest.mark.parametrize("arguments, line", MISTAKES, ids=[typed for typed, _ in MISTAKES])
def test_mistakes_end_in_one_line(call, shared, tiny_base, trained_project, arguments, line):
    """With exit code 1; the line says what is wrong, and nothing is changed."""
    before = contents(trained_project / "outputs")
    typed = arguments.format(base=tiny_base, train=" ".join(("train", *shared))).split()
    said = call(*typed, cwd=trained_project, code=1)
    (shown,) = [one for one in said.splitlines() if one.startswith(f"app.py {typed[0]}: ")]
    assert line in shown
    if "--demo" not in typed:  # which unpacks its base
        assert contents(trained_project / "outputs") == before
