"""What only a GPU can show: the fast path computes what the plain one does.

Skipped without a GPU of capability 8 or newer. The base is bench.py's tiny one, with a tokenizer to
which each number is one token, as to Llama 3's.
"""

import pytest
import torch

import bench
import util
from app import RECIPES, RunConfig, build_quant_config, detect_bf16_support

pytestmark = pytest.mark.skipif(not detect_bf16_support(), reason="needs a GPU of capability 8")

STEPS = 8
SETTINGS = {
    "batch_size": 16,
    "max_steps": STEPS,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_steps": 100,
    "lora_dropout": 0.0,
}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    bench.build_base(folder, bench.TINY | {"initializer_range": 0.2})
    return folder


@pytest.fixture(scope="module")
def splits():
    rows = bench.random_rows(300, seed=1)
    part = bench.Dataset.from_list(rows)
    return bench.DatasetDict({"train": part, "val": part.select(range(20)), "test": part})


@pytest.fixture()
def build(base_folder, splits, tmp_path):
    """`build(fast=False, …)` returns the PriceTrainer of a new run; the rest is as asked for."""
    plans = []

    def build(fast=True, micro_batch=None, **changes):
        folder = tmp_path / str(len(plans))
        config = RunConfig(base_model=str(base_folder), local=True, output_dir=str(folder))
        run = util.new_run(config, "gpu", RECIPES["lite"], True, SETTINGS | changes)
        base = util.open_base(config)
        data = util.make_training_data(splits, base.tokenizer, run.recipe.val_size)
        plan = util.make_plan(base, run, data, True, micro_batch, fast)
        model = util.load_base(base, plan, build_quant_config(True, True, plan.dtype))
        run.folder.mkdir(parents=True)
        run.begin(plan)
        plans.append(plan)
        return util.build_trainer(model, base.tokenizer, data, run, plan, util.StopOnSignal())

    build.plans = plans
    return build


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def largest_difference(first, second):
    assert len(first) == len(second) == STEPS
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("window", [None, 16])
def test_packed_attention_equals_separate_rows(window):
    """Forward and backward, in bf16, for grouped heads, with a sliding window and without."""
    torch.manual_seed(0)
    sizes = [5, 64, 17, 1]
    ends = torch.tensor([0, *sizes], device="cuda").cumsum(0)
    shapes = {"query": (1, 8, sum(sizes), 64), "key": (1, 2, sum(sizes), 64)}
    query, key, value = (
        torch.randn(shapes[name], device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for name in ("query", "key", "key")
    )
    module = torch.nn.Module()
    module.num_key_value_groups = 4
    module.is_causal = True
    inputs = util.packed_attention_inputs(ends, max(sizes))
    options = {"scaling": 0.125, "sliding_window": window}
    packed, _ = util.packed_attention(module, query, key, value, **options, **inputs)

    separate = []
    sdpa = util.ALL_ATTENTION_FUNCTIONS["sdpa"]
    for start, size in zip(ends.tolist(), sizes, strict=False):
        rows = [x[:, :, start : start + size] for x in (query, key, value)]
        sees = torch.ones(size, size, dtype=torch.bool, device="cuda").tril()
        if window:
            sees = sees.triu(1 - window)
        separate.append(sdpa(module, *rows, sees[None, None], scaling=0.125)[0])
    separate = torch.cat(separate, 1)
    torch.testing.assert_close(packed, separate, atol=2e-2, rtol=2e-2)

    weights = torch.randn_like(packed)
    found = torch.autograd.grad((packed * weights).sum(), (query, key, value))
    expected = torch.autograd.grad((separate * weights).sum(), (query, key, value))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=5e-2, rtol=5e-2)


def test_fast_path_trains_as_plain(build):
    """No padding, FastLora, dequantised: the losses of the plain path, as far as bf16 tells."""
    fast = losses(build(compile="off"))
    plain = losses(build(fast=False, base_weights="nf4"))
    assert largest_difference(fast, plain) < 0.03


def test_compiled_layers_train_alike(build):
    compiled = losses(build(compile="on", micro_batch=8))
    plain = losses(build(compile="off", micro_batch=8))
    assert largest_difference(compiled, plain) < 0.03


def test_recorded_graphs_train_alike(build):
    trainer = build(compile="on")
    names = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert "MarkGraphSteps" in names
    assert largest_difference(losses(trainer), losses(build(compile="off"))) < 0.03


def test_dequantised_base_trains_alike(build):
    """The same numbers, expanded once or in each layer of each step."""
    dequantised = losses(build(compile="off", base_weights="bf16-from-nf4"))
    quantised = losses(build(compile="off", base_weights="nf4"))
    assert largest_difference(dequantised, quantised) < 0.02


def test_fast_lora_equals_peft(build):
    """One forward and backward pass of the same adapters on the same packed rows."""
    found = []
    for fast_lora in (True, False):
        trainer = build(compile="off")
        model = trainer.model
        layers = [m for m in model.modules() if isinstance(m, util.FastLora)]
        assert layers
        torch.manual_seed(3)
        for layer in layers:
            layer.lora_B["default"].weight.data.normal_(std=0.02)
            if not fast_lora:
                layer.forward = util.lora.Linear.forward.__get__(layer)
        batch = next(iter(trainer.get_train_dataloader()))
        with torch.autocast("cuda", torch.bfloat16):
            loss = trainer.compute_loss(model, batch, num_items_in_batch=100)
        loss.backward()
        gradient = torch.cat([layer.lora_A["default"].weight.grad.flatten() for layer in layers])
        found.append((loss.item(), gradient))
    (loss, gradient), (expected_loss, expected) = found
    assert loss == pytest.approx(expected_loss, rel=2e-3)
    assert (gradient - expected).norm() < 0.02 * expected.norm()


def test_reading_equals_plain_reading(base_folder, splits):
    """Prices read from packed rows with fused norms: those of padded rows and the model's norms."""
    config = RunConfig(base_model=str(base_folder), local=True)
    base = util.open_base(config)
    rows = list(splits["test"].select(range(40)))
    medians = []
    for fast in (True, False):
        quant_config = build_quant_config(True, True)
        reader = util.RunReader(base, quant_config, "bf16", True, fast=fast)
        estimates, _ = reader.estimate_rows(None, rows, "median", "the base")
        medians.append([estimate.mean for estimate in estimates])
    assert medians[0] == pytest.approx(medians[1], rel=0.02)


def test_out_of_memory_resumes(build, monkeypatch):
    """A step that runs out of memory: saved, and resumed with smaller micro-batches."""
    trainer = build(compile="off", micro_batch=16)
    forward = util.PriceTrainer.compute_loss
    calls = []

    def allocate_too_much(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            free, total = torch.cuda.mem_get_info()
            torch.empty(2 * total, dtype=torch.uint8, device="cuda")
        return forward(self, *arguments, **options)

    monkeypatch.setattr(util.PriceTrainer, "compute_loss", allocate_too_much)
    config = RunConfig(base_model="-", local=True)
    run = util.Run(util.Path(trainer.args.output_dir), "gpu", "price", "lite", "-", None, 1)
    run.resume_command = config.resume_command("gpu")
    smaller_plan = util.fit(trainer, run, build.plans[-1])
    assert smaller_plan.micro_batch == 8
    assert util.newest_checkpoint(run.folder).endswith("checkpoint-3")

    smaller = build(compile="off", micro_batch=8)
    smaller.args.output_dir = trainer.args.output_dir
    assert util.fit(smaller, run, smaller_plan) is None
    assert smaller.state.global_step == STEPS
