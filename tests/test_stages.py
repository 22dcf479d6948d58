"""prepare, train and eval on a tiny Llama in real nf4, through the command line where users meet it."""
import csv
import html
import json
import os

import pytest

import app
import util
from app import RECIPES, build_quant_config, build_trainer, load_base, load_tokenizer
from conftest import TRAIN, write_catalogue
from items import load_prompts


def read(path):
    return json.loads(path.read_text("utf-8"))


@pytest.fixture(scope="module")
def splits(run, prepared):
    return load_prompts(run.folder / "outputs/datasets/items_prompts_lite")


@pytest.fixture()
def trainer(tiny_base, splits, tmp_path):
    recipe = RECIPES["lite"] | {"batch_size": 4, "max_steps": 6, "learning_rate": 1e-2}
    return build_trainer(load_base(tiny_base), load_tokenizer(tiny_base), splits, recipe, tmp_path, 1, False)


def test_prepare_says_what_it_found(run, prepared):
    folder = run.folder / "outputs/datasets/items_prompts_lite"
    found = read(folder / "prepare.json")
    assert sum(found["kept"].values()) + sum(map(len, found["dropped"].values())) == 80
    assert sorted(os.listdir(folder)) == ["prepare.json", "prepare.png", "test.parquet", "train.parquet", "val.parquet"]


def test_prepare_again_replaces_and_a_failed_one_leaves_the_old(run, prepared, tmp_path):
    folder = run.folder / "outputs/datasets/items_prompts_lite"
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"title": "A", "text": "a", "price": 0}')
    done = run("prepare", *prepared, "--source", str(bad), code=1)
    assert done.stderr.strip().splitlines()[-1].startswith(f"app.py prepare: {bad}: none of 1 rows is usable")
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_the_base_is_nf4_with_double_quantisation_and_only_adapters_train(trainer):
    import bitsandbytes

    layers = [m for m in trainer.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 2 * 7
    assert all(m.weight.quant_state.quant_type == "nf4" and m.weight.quant_state.nested for m in layers)
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 4 * 2 and all("lora_" in name for name in trainable)
    assert {str(p.dtype) for p in trainer.model.parameters() if p.requires_grad} == {"torch.float32"}


def test_the_loss_is_on_completions_only_and_ends_with_eos(trainer, splits):
    tokenizer = trainer.processing_class
    for row, source in zip(trainer.train_dataset, splits["train"]):
        labels = [label for label in row["labels"] if label != -100]
        assert tokenizer.decode(labels) == source["completion"] + tokenizer.eos_token
        assert row["labels"][-len(labels):] == labels  # nothing of the prompt


def test_training_lowers_the_loss(tiny_base, splits, tmp_path):
    recipe = RECIPES["demo"] | {"batch_size": 8, "max_steps": 30, "learning_rate": 3e-2, "logging_steps": 5}
    trainer = build_trainer(load_base(tiny_base), load_tokenizer(tiny_base), splits, recipe, tmp_path, 1, False)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


def test_the_recipe_is_the_courses(tiny_base, splits, tmp_path):
    for mode, r, targets, epochs, batch in (("lite", 32, 4, 1, 32), ("full", 256, 7, 3, 256)):
        trainer = build_trainer(load_base(tiny_base), load_tokenizer(tiny_base), splits, RECIPES[mode], tmp_path, 1, False)
        args, lora = trainer.args, trainer.model.peft_config["default"]
        assert (lora.r, lora.lora_alpha, len(lora.target_modules), lora.lora_dropout, lora.bias) == (r, 2 * r, targets, 0.1, "none")
        assert (args.num_train_epochs, args.train_batch_size * args.gradient_accumulation_steps) == (epochs, batch)
        assert (args.learning_rate, args.lr_scheduler_type, args.warmup_steps) == (1e-4, "cosine", 0.01)
        assert (args.weight_decay, args.max_grad_norm, args.save_total_limit, args.optim) == (0.001, 0.3, 10, "adamw_torch_fused")


def test_gradients_after_an_evaluation_equal_the_dequantised_models(trainer):
    import bitsandbytes
    import torch

    trainer.evaluate()  # repacks the weights on some CPUs, unless that is switched off
    model, batch = trainer.model.eval(), next(iter(trainer.get_train_dataloader()))
    assert not any(m.support_avx512bf16_for_cpu for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit))
    with torch.no_grad():  # B starts at zero, and so would half of the gradients
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(1))

    def gradients():
        model.zero_grad()
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if "lora_" in name}

    found = gradients()
    model.base_model.model.dequantize()
    assert not any(isinstance(m, bitsandbytes.nn.Linear4bit) for m in model.modules())
    expected = gradients()
    assert expected.keys() == found.keys() and len(found) == 16
    for name in expected:
        assert expected[name].abs().max() > 0
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("compiled", [False, True])
def test_training_without_padding_has_the_padded_losses(tiny_base, splits, packed_attention, tmp_path, compiled):
    recipe, histories = RECIPES["lite"] | {"batch_size": 16, "max_steps": 6, "learning_rate": 1e-2, "logging_steps": 1, "lora_dropout": 0}, []
    for attention in ("sdpa", "packed"):
        model = load_base(tiny_base)
        model.config._attn_implementation_internal = attention
        trainer = build_trainer(model, load_tokenizer(tiny_base), splits, recipe, tmp_path / attention, 1, compiled=compiled and attention == "packed")
        batches = list(trainer.get_train_dataloader())  # the last one of an epoch has fewer rows
        if attention == "packed":
            assert all(batch["input_ids"].shape[1] % 64 == 0 and len(batch["cu_seq_lens_q"]) == 16 + 8 + 1 for batch in batches)
            assert all(batch["cu_seq_lens_q"].diff().max() <= batch["max_length_q"] for batch in batches)
        trainer.evaluate = lambda *_, **__: {"eval_mae": 0.0}
        trainer.train()
        histories.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert histories[1] == pytest.approx(histories[0], abs=1e-4) and len(histories[0]) == 6


def test_batches_to_be_recorded_have_one_shape():
    import numpy

    rng = numpy.random.default_rng(0)
    lengths = rng.normal(102, 18, 8000).clip(33, 127).astype(int)
    collate = app.pack(32, lengths, one_shape=True)
    rows = [{"input_ids": [1] * n, "labels": [-100] * (n - 3) + [5, 6, 7]} for n in lengths]
    batches = [collate(rows[first : first + 32]) for first in range(0, len(rows), 32)] + [collate(rows[:20])]
    sizes = [batch["input_ids"].shape[1] for batch in batches]
    assert sizes.count(sizes[0]) > 0.98 * len(sizes) and len({len(batch["cu_seq_lens_q"]) for batch in batches}) == 1
    for batch, size in zip(batches, sizes):
        assert batch["position_ids"].shape == batch["labels"].shape == (1, size) and batch["cu_seq_lens_q"][-1] == size
        assert len(batch["logits_to_keep"]) % 3 == 0 and set(batch["labels"][0, batch["logits_to_keep"] + 1].tolist()) == {5, 6, 7}


def test_the_dequantised_base_gives_the_same_training(run, call, prepared):
    for weights in ("nf4", "bf16-from-nf4"):
        said = call("train", *prepared, "--run-name", weights, "--base-weights", weights, *TRAIN)
        assert "float32 from nf4 (--base-weights)" in said if weights != "nf4" else "nf4 (--base-weights)" in said
    one, other = (read(run.folder / f"outputs/price-{name}/run.json")["history"] for name in ("nf4", "bf16-from-nf4"))
    assert [entry.get("loss", 0) for entry in one] == pytest.approx([entry.get("loss", 0) for entry in other], abs=1e-4)
    assert "from nf4: dequantised once, memory has room" in call("train", *prepared, "--dry-run")


def test_one_seed_gives_one_adapter_bit_for_bit(run, call, prepared, trained):
    for name, seed in (("again", "42"), ("other", "43")):
        call("train", *prepared, "--run-name", name, "--seed", seed, *TRAIN)
    first, again, other = [(run.folder / f"outputs/price-{name}" / app.ADAPTER_FILE).read_bytes()
                           for name in ("first", "again", "other")]
    assert first == again != other


def test_train_leaves_a_whole_run(trained):
    record = read(trained / "run.json")
    assert record["steps"] == 6 and record["seed"] == 42
    assert record["recipe"]["lora_r"] == 32 and record["recipe"]["max_steps"] == 6
    assert len(record["data"]["fingerprint"]) == 16 and record["versions"].keys() >= {"torch", "trl", "peft"}
    assert {"adapter_config.json", app.ADAPTER_FILE, "tokenizer.json", "loss.png", "checkpoint-3", "checkpoint-6"} <= set(os.listdir(trained))


def test_a_run_name_is_used_once(run, prepared, trained):
    before = (trained / app.ADAPTER_FILE).read_bytes()
    assert "exists already" in run("train", *prepared, "--run-name", "first", *TRAIN, code=1).stderr
    assert (trained / app.ADAPTER_FILE).read_bytes() == before


def test_eval_reports_the_run_the_base_and_the_constants(run, call, trained):
    call("eval", "--local", "--run-name", "first", "--compare-base", "--size", "all")  # base and data: the run's own
    results = read(trained / "eval/results.json")
    keys = {"n", "mae", "mae_ci95", "mse", "r2", "parse_failures", "items_per_s", "seconds"}
    assert keys <= results.keys() and keys - {"items_per_s", "seconds"} <= results["base"].keys()
    assert results["decode"] == "median" and results["decodings"].keys() == {"median", "mean", "greedy"}
    assert results["decodings"]["median"]["mae"] == results["mae"] and 0 <= results["distribution"]["coverage_80"] <= 1
    assert results["baselines"].keys() == {"constant_mean", "constant_median"}
    with open(trained / "eval/predictions.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert len(table) == results["n"] and list(table[0]) == ["index", "title", "category", "truth", "guess", "error", "low", "high"]
    assert all(float(row["low"]) <= float(row["guess"]) <= float(row["high"]) for row in table)
    assert results["mae"] == pytest.approx(sum(float(row["error"]) for row in table) / len(table), abs=0.01)
    prices = sorted(float(price) for price in load_prompts(run.folder / "outputs/datasets/items_prompts_lite")["train"]["completion"])
    median = (prices[(len(prices) - 1) // 2] + prices[len(prices) // 2]) / 2
    expected = sum(abs(median - float(row["truth"])) for row in table) / len(table)
    assert results["baselines"]["constant_median"]["mae"] == pytest.approx(expected)
    assert set(os.listdir(trained / "eval")) == {"results.json", "predictions.csv", "report.html", "scatter.png", "running_error.png",
                                                 "reliability.png", "comparison.png"}


def test_the_report_is_one_file_with_everything_in_it(run, call, trained):
    call("eval", "--local", "--run-name", "first", "--size", "all")
    page, results = (trained / "eval/report.html").read_text("utf-8"), read(trained / "eval/results.json")
    assert "<script" not in page and "http" not in page and page.count('src="data:image/png;base64,') == 4
    for figures in (results, *results["decodings"].values(), *results["baselines"].values()):
        assert f"{figures['mae']:,.2f}" in page
    assert all(html.escape(row["title"]) in page for row in results["worst"])
    assert all(html.escape(group) in page for group in results["by_category"])
    assert f"${results['mae']:,.2f}"[1:] in (trained / "README.md").read_text("utf-8")  # the card has the same figures


def test_eval_compares_with_earlier_runs_on_the_same_items(run, call, prepared, trained, tmp_path):
    import shutil

    shutil.copytree(run.folder / "outputs", tmp_path / "outputs")
    call("train", *prepared, "--run-name", "second", "--seed", "7", *TRAIN, cwd=tmp_path)
    judge = ("eval", "--local", "--size", "4", "--run-name")
    shutil.rmtree(tmp_path / "outputs/price-first/eval", ignore_errors=True)
    assert "--compare first: not judged yet. Run `python app.py eval --run-name first --size 4`" in call(
        *judge, "second", "--compare", "first", cwd=tmp_path, code=1)
    call(*judge, "first", cwd=tmp_path)
    said = call(*judge, "second", "--compare", "first", cwd=tmp_path)
    first, second = (read(tmp_path / f"outputs/price-{name}/eval/results.json") for name in ("first", "second"))
    found = second["earlier"]["first"]
    assert found["mae"] == first["mae"] and found["difference"] == pytest.approx(second["mae"] - first["mae"])
    assert found["low"] <= found["difference"] <= found["high"] and "less that of first" in said


def test_own_items_are_priced_as_the_test_items_are(run, call, prepared, trained, tmp_path):
    test = load_prompts(run.folder / "outputs/datasets/items_prompts_lite")["test"]
    lines = [{"title": "x", "text": row["prompt"].split("\n\n")[1], "price": row["completion"]} for row in test]
    lines[1]["price"] = ""  # is priced all the same
    lines += [{"title": "", "text": "no title", "price": "5"}, lines[0]]  # left out; priced a second time
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps(line) + "\n" for line in lines))
    call("eval", "--local", "--run-name", "first", "--size", "all")
    said = call("eval", "--local", "--run-name", "first", "--input", str(own), "--output", str(tmp_path / "out.csv"))
    with open(tmp_path / "out.csv", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    with open(trained / "eval/predictions.csv", encoding="utf-8") as file:
        expected = list(csv.DictReader(file))
    assert [row["line"] for row in found] == ["1", "2", "3", "4", "6"] and found[1]["price"] == ""
    for one, other in zip(found, [*expected, expected[0]]):
        assert [one[name] for name in ("guess", "low", "high")] == [other[name] for name in ("guess", "low", "high")]
    assert "5 priced, 1 left out: 1 × title is empty or not text (line 5)" in said and "n = 4" in said


def test_one_description_is_priced(run, call, trained, tmp_path):
    said = call("eval", "--local", "--run-name", "first", "--text", "Brass lamp\nwith a shade", "--output", str(tmp_path / "o.jsonl"))
    row = json.loads((tmp_path / "o.jsonl").read_text("utf-8"))
    assert row["title"] == "Brass lamp" and row["low"] <= row["guess"] <= row["high"] and row["price"] is None
    assert f"(80 %: ${row['low']:.0f} to ${row['high']:.0f})  Brass lamp" in said


def test_an_exported_model_answers_as_the_run_does_with_transformers_alone(run, call, trained, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    call("eval", "--local", "--run-name", "first", "--export", str(tmp_path / "plain"))
    call("eval", "--local", "--run-name", "first", "--size", "all", "--decode", "greedy")
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(os.listdir(tmp_path / "plain"))
    assert "quantization_config" not in read(tmp_path / "plain/config.json")
    model, tokenizer = (kind.from_pretrained(tmp_path / "plain") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.dtype == torch.bfloat16
    probabilities, greedy = app.price_reader(model.float(), app.load_tokenizer(str(tmp_path / "plain")))(
        list(load_prompts(run.folder / "outputs/datasets/items_prompts_lite")["test"]))
    with open(trained / "eval/predictions.csv", encoding="utf-8") as file:
        assert greedy == [float(row["guess"]) for row in csv.DictReader(file)]
    assert "is there already" in call("eval", "--local", "--run-name", "first", "--export", str(tmp_path / "plain"), code=1)


def test_validation_measures_the_metric_beside_the_loss(trainer, splits):
    from trl import SFTTrainer

    trainer.train()
    found = [entry for entry in app.history(trainer) if "eval_mae" in entry][-1]
    assert found["eval_loss"] == pytest.approx(SFTTrainer.evaluate(trainer)["eval_loss"], rel=1e-3)
    rows = list(splits["val"])
    read = app.price_reader(trainer.model.eval(), trainer.processing_class)
    guesses = [answer["median"] for answer in util.decodings(*read(rows), rows)]
    assert found["eval_mae"] == pytest.approx(util.metrics(guesses, [util.truth_of(row) for row in rows])["mae"])


def test_keep_best_ends_with_the_least_validation_error(run, call, prepared, tmp_path):
    import shutil

    from safetensors.torch import load_file

    shutil.copytree(run.folder / "outputs/datasets", tmp_path / "outputs/datasets")
    call("train", *prepared, "--run-name", "best", "--keep-best", *TRAIN[:-1], "0.3", "--max-steps", "8", "--save-steps", "2", cwd=tmp_path)
    folder = tmp_path / "outputs/price-best"
    errors = {entry["step"]: entry["eval_mae"] for entry in read(folder / "run.json")["history"] if "eval_mae" in entry}
    best = min(errors, key=errors.get)
    adapter = load_file(folder / app.ADAPTER_FILE)
    for step in errors:
        saved = load_file(folder / f"checkpoint-{step}" / app.ADAPTER_FILE)
        assert all(saved[name].equal(adapter[name]) for name in saved) == (step == best)


def test_eval_of_the_untouched_base(run, call, prepared):
    call("eval", *prepared, "--run-name", "base", "--size", "2")
    assert read(run.folder / "outputs/price-base/eval/results.json")["n"] == 2


def test_eval_notices_changed_data(run, call, prepared, trained, tmp_path):
    import shutil

    shutil.copytree(run.folder / "outputs", tmp_path / "outputs")
    shared = prepared[:-2] + ("--base-model", prepared[-1])
    call("prepare", *shared, "--source", write_catalogue(tmp_path / "new.jsonl", 60), cwd=tmp_path)
    assert "not the data that the run was trained on" in call("eval", "--local", "--run-name", "first", cwd=tmp_path)


def test_eight_bit_stays_reachable(call, prepared):
    call("train", *prepared, "--run-name", "eight", "--no-4bit", *TRAIN)
    call("eval", "--local", "--run-name", "eight", "--size", "2")
    assert build_quant_config(False, False).load_in_8bit
    four = build_quant_config(True, True)
    assert (four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant, str(four.bnb_4bit_compute_dtype)) == ("nf4", True, "torch.bfloat16")


def test_without_cuda_bf16_is_not_supported_and_nothing_raises():
    import torch

    if not torch.cuda.is_available():
        assert app.detect_bf16_support() is False


# Errors: one line that says what to do

@pytest.mark.parametrize("arguments, said", [
    (("eval", "--local", "--run-name", "nosuch"), "no such run"),
    (("eval", "--local", "--demo"), "no finished run of project price in this mode. Run `python app.py train --demo` first"),
    (("train", "--demo"), "Run `python app.py prepare --demo` first"),
    (("prepare", "--lite"), "HF_TOKEN is not set"),
    (("train", "--lite"), "HF_TOKEN is not set"),
    (("prepare", "--local", "--source", "nosuch.csv"), "can't be read: No such file"),
    (("prepare", "--local", "--source", "catalogue.jsonl", "--base-model", "."), "holds no config.json"),
    (("prepare", "--local", "--source", "catalogue.jsonl", "--base-model", "no/such-model"), "no/such-model: the Hub can't be reached"),
    (("prepare", "--local", "--lite"), "ed-donner/items_lite: the Hub can't be reached"),
    (("prepare", "--local", "--source", "catalogue.jsonl", "--output-dir", "/proc/nowhere"), "can't be written to"),
])
def test_what_a_user_can_cause_ends_in_one_line(run, trained, arguments, said, tmp_path):
    done = run(*arguments, code=1, HF_TOKEN="", HF_HOME=str(tmp_path))
    lines = [line for line in done.stderr.splitlines() if line.startswith(f"app.py {arguments[0]}: ")]
    assert any(said in line for line in lines)
