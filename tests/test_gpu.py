"""What only a GPU can show: the fast path computes what the plain one does.

Skipped without a GPU of capability 8 or newer. The base is bench.py's tiny one, with a tokenizer to
which each number is one token, as to Llama 3's.
"""

import pytest
import torch
from datasets import Dataset, DatasetDict

import app
import bench
import util
from app import RECIPES, RunConfig, build_quant_config, detect_bf16_support
from conftest import train_losses

pytestmark = pytest.mark.skipif(not detect_bf16_support(), reason="needs a GPU of capability 8")

has_fp8 = pytest.mark.skipif(
    util.gpu_capability() < util.FP8_CAPABILITY, reason="needs a GPU of capability 8.9"
)

STEPS = 8
PRODUCT_ERROR = 0.045  # of an fp8 product's norm; 0.038 is to be expected
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
    part = Dataset.from_list(rows)
    return DatasetDict({"train": part, "val": part.select(range(20)), "test": part})


@pytest.fixture()
def build(base_folder, splits, tmp_path):
    """`build(fast=False, …)` returns the PriceTrainer of a new run; the rest is as asked for."""
    plans = []

    def build(fast=True, micro_batch=None, **changes):
        folder = tmp_path / str(len(plans))
        config = RunConfig(base_model=str(base_folder), local=True, output_dir=str(folder))
        run = app.new_run(config, "gpu", RECIPES["lite"], True, SETTINGS | changes)
        base = app.open_base(config)
        data = util.make_training_data(splits, base.tokenizer, run.recipe.val_size)
        plan = util.make_plan(base, run, data, True, micro_batch, fast)
        model = util.load_base(base, plan, build_quant_config(True, True, plan.dtype))
        plan = util.check_plan(plan, model, base, data)
        run.folder.mkdir(parents=True)
        run.follow(plan)
        plans.append(plan)
        return util.build_trainer(model, base.tokenizer, data, run, plan, util.StopOnSignal())

    build.plans = plans
    return build


def largest_difference(first, second):
    assert len(first) == len(second) == STEPS
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def separate_attention(module, tensors, ends, scaling, window):
    """What plain attention computes of each sequence for itself, in 32 bits."""
    separate = []
    sdpa = util.ALL_ATTENTION_FUNCTIONS["sdpa"]
    for start, end in zip(ends.tolist(), ends.tolist()[1:], strict=False):
        if start == end:
            continue
        rows = [x.float()[:, :, start:end] for x in tensors]
        sees = torch.ones(end - start, end - start, dtype=torch.bool, device="cuda").tril()
        if window:
            sees = sees.triu(1 - window)
        separate.append(sdpa(module, *rows, sees[None, None], scaling=scaling)[0])
    return torch.cat(separate, 1)


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("attention", "scaling", "window"),
    [
        (util.PACKED, 0.125, None),
        (util.PACKED, 0.125, 16),
        (util.PACKED_EFFICIENT, 0.125, None),
        (util.PACKED_EFFICIENT, 0.3, None),
        (util.PACKED_EFFICIENT, 0.125, 64),
    ],
)
def test_packed_attention_equals_separate_rows(attention, scaling, window, precision, is_compiled):
    """Forward and backward, for grouped heads, also with empty sequences as padding makes them."""
    torch.manual_seed(0)
    sizes = [5, 64, 17, 0, 1, 41, 0, 0]
    ends = torch.tensor([0, *sizes], device="cuda").cumsum(0).int()
    dtype = util.DTYPES[precision]
    query, key, value = (
        torch.randn(1, sum(sizes), heads, 64, device="cuda", dtype=dtype).transpose(1, 2)
        for heads in (8, 2, 2)
    )
    tensors = [x.requires_grad_() for x in (query, key, value)]
    module = torch.nn.Module()
    module.num_key_value_groups = 4
    module.is_causal = True
    options = {"scaling": scaling, "sliding_window": window}
    options |= {"cu_seq_lens_q": ends, "max_length_q": max(sizes)}
    attend = util.ALL_ATTENTION_FUNCTIONS[attention]
    if is_compiled:
        torch.compiler.reset()
        attend = torch.compile(attend)
    packed, _ = attend(module, *tensors, **options)
    separate = separate_attention(module, tensors, ends, scaling, window)
    torch.testing.assert_close(packed.float(), separate, atol=2e-2, rtol=2e-2)

    weights = torch.randn_like(packed)
    found = torch.autograd.grad((packed * weights).sum(), tensors)
    expected = torch.autograd.grad((separate * weights.float()).sum(), tensors)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.float(), other.float(), atol=5e-2, rtol=5e-2)


def test_one_gpu_is_used(build):
    """Of several, though CUDA has begun and sees them all, as in a notebook."""
    torch.zeros(1, device="cuda")
    trainer = build()
    assert trainer.args.n_gpu == 1
    first, *_, last = train_losses(trainer)
    assert last < first


EAGER = {"compile": "off", "micro_batch": 8}
WAYS = [("off", 8), ("on", 8), ("on", 16)]  # rows at once: all 16 as CUDA graphs


@pytest.mark.parametrize(
    ("settings", "others", "tolerance"),
    [
        ({"compile": "off"}, {"fast": False, "base_weights": "nf4"}, 0.03),
        (EAGER | {"compile": "on"}, EAGER, 0.03),
        ({"compile": "on"}, {"compile": "off"}, 0.03),  # as CUDA graphs
        (EAGER | {"base_weights": "bf16-from-nf4"}, EAGER | {"base_weights": "nf4"}, 0.02),
    ],
)
def test_fast_ways_train_alike(build, settings, others, tolerance):
    """The losses of the plain path, of other ways to compute and to hold the base."""
    found = train_losses(build(**settings))
    assert largest_difference(found, train_losses(build(**others))) < tolerance


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(("compiling", "micro_batch"), WAYS)
def test_efficient_attention_trains_alike(build, monkeypatch, precision, compiling, micro_batch):
    """A T4's way: packed rows by the other kernel, compiled, in fp16; against padded rows."""
    monkeypatch.setattr(util, "choose_attention", lambda *_: util.PACKED_EFFICIENT)
    settings = {"precision": precision, "micro_batch": micro_batch}
    trainer = build(compile=compiling, **settings)
    assert trainer.model.config._attn_implementation == util.PACKED_EFFICIENT
    found = train_losses(trainer)
    assert largest_difference(found, train_losses(build(fast=False, **settings))) < 0.03


def test_reading_equals_plain_reading(base_folder, splits):
    """Prices read from packed rows with fused norms: those of padded rows and the model's norms."""
    base = util.open_base(str(base_folder))
    rows = list(splits["test"].select(range(40)))
    means = []
    for fast in (True, False):
        quant_config = build_quant_config(True, True)
        reader = util.open_reader(base, None, rows, quant_config, "bf16", True, fast=fast)
        estimates, _ = reader.answer(rows, decode="mean")
        means.append([estimate.guess for estimate in estimates])
    assert means[0] == pytest.approx(means[1], rel=0.02)


def test_out_of_memory_resumes(build, monkeypatch):
    """A step that runs out of memory: smaller micro-batches go on from the newest checkpoint."""
    settings = {"compile": "off", "save_steps": 2}
    trainer = build(**settings, micro_batch=16)
    forward = util.PriceTrainer.compute_loss
    calls = []

    def allocate_too_much(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            _, total = torch.cuda.mem_get_info()
            torch.empty(2 * total, dtype=torch.uint8, device="cuda")
        return forward(self, *arguments, **options)

    monkeypatch.setattr(util.PriceTrainer, "compute_loss", allocate_too_much)
    run = util.Run(util.Path(trainer.args.output_dir), "gpu", "price", "lite")
    smaller_plan = util.fit(trainer, run, build.plans[-1])
    assert smaller_plan.micro_batch == 8
    assert util.newest_checkpoint(run.folder).endswith("checkpoint-2")

    smaller = build(**settings, micro_batch=8)
    smaller.args.output_dir = trainer.args.output_dir
    assert util.fit(smaller, run, smaller_plan) is None
    assert smaller.state.global_step == STEPS


@has_fp8
@pytest.mark.parametrize(("inputs", "outputs"), [(3072, 1024), (3072, 8192), (8192, 3072)])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_fp8_products_are_near(inputs, outputs, is_compiled):
    """Product and gradient of layers of Llama-3.2-3B, against 64 bits; 203 tokens."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(inputs, outputs, bias=False, device="cuda").bfloat16()
    layer = util.Fp8Linear(linear.requires_grad_(False))
    x = torch.randn(1, 203, inputs, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    if is_compiled:
        torch.compiler.reset()
        layer.compile()
    out = layer(x)
    upstream = 1e-6 * torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, x, upstream)

    weight = linear.weight.double()
    pairs = [(out, x.double() @ weight.T), (gradient, upstream.double() @ weight)]
    for found, expected in pairs:
        assert (found.double() - expected).norm() < PRODUCT_ERROR * expected.norm()


@has_fp8
@pytest.mark.parametrize(("compiling", "micro_batch"), WAYS)
def test_fp8_trains_as_bf16(build, compiling, micro_batch):
    """Losses that fall by 3 in these steps differ by less than a tenth of that."""
    settings = {"compile": compiling, "micro_batch": micro_batch, "targets": "all"}
    trainer = build(base_weights="fp8", **settings)
    assert any(isinstance(module, util.Fp8Linear) for module in trainer.model.modules())
    found = train_losses(trainer)
    assert largest_difference(found, train_losses(build(**settings))) < 0.3
