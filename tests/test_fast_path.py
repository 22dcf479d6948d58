"""Parts of the fast path that a CPU can compute, too; test_gpu.py has the rest."""

from types import SimpleNamespace

import pytest
import torch

import util
from conftest import train_losses

PRODUCT_ERROR = 0.05  # of the norm of a row of an fp8 product; 0.038 is to be expected


def random_linear(inputs, outputs, bias=False):
    torch.manual_seed(0)
    return torch.nn.Linear(inputs, outputs, bias).bfloat16().requires_grad_(False)


def relative_error(found, expected):
    """The largest of all rows."""
    errors = (found.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    return errors.max().item()


def test_what_is_not_finite_shows():
    """A loss that is not finite stops a run, so fp8 must not hide it."""
    layer = util.Fp8Linear(random_linear(32, 16))
    x = torch.ones(2, 32)
    x[0, 3] = torch.inf
    out = layer(x)
    assert not out[0].isfinite().any()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("bias", [False, True])
def test_fp8_products_are_near(bias):
    """Product and gradient, against 64 bits, whatever the size of a row's numbers."""
    linear = random_linear(256, 96, bias)
    layer = util.Fp8Linear(linear)
    sizes = torch.logspace(-12, 12, 30)[:, None]
    x = (sizes * torch.randn(2, 30, 256)).bfloat16().requires_grad_()
    out = layer(x)
    upstream = (sizes * torch.randn(out.shape)).bfloat16()
    (gradient,) = torch.autograd.grad(out, x, upstream)

    exact = linear.double()
    assert relative_error(out, exact(x.double())) < PRODUCT_ERROR
    assert relative_error(gradient, upstream.double() @ exact.weight) < PRODUCT_ERROR
    assert (out.dtype, gradient.dtype) == (torch.bfloat16, torch.bfloat16)


def test_check_sees_wrong_fp8(monkeypatch):
    layer = random_linear(64, 64)
    assert util.fp8_agrees(layer)
    monkeypatch.setattr(util.Fp8Product, "backward", lambda ctx, gradient: (gradient, *[None] * 4))
    assert not util.fp8_agrees(layer)


def test_fast_lora_computes_as_peft(build):
    """The same losses as PEFT's layers, for several steps."""
    settings = {"max_steps": 3, "lora_dropout": 0.0, "logging_steps": 1, "learning_rate": 1e-2}
    losses = {}
    for fast in (True, False):
        trainer = build(fast=fast, batch_size=4, **settings)
        has_fast_layers = any(isinstance(one, util.FastLora) for one in trainer.model.modules())
        assert has_fast_layers == fast
        trainer.train()
        losses[fast] = [one["loss"] for one in trainer.state.log_history if "loss" in one]
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)


def test_fp8_trains_as_bf16(build):
    """All linear layers but the head; adapters stay in 32 bits; the losses of bf16, nearly."""
    settings = {"precision": "bf16", "max_steps": 3, "lora_dropout": 0.0, "logging_steps": 1}
    losses = {}
    for weights in ("bf16-from-nf4", "fp8"):
        trainer = build(base_weights=weights, learning_rate=1e-2, batch_size=4, **settings)
        losses[weights] = train_losses(trainer)
    model = trainer.model
    in_fp8 = [module for module in model.modules() if isinstance(module, util.Fp8Linear)]
    assert len(in_fp8) == 2 * 7
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert losses["fp8"] == pytest.approx(losses["bf16-from-nf4"], rel=0.03)
    assert losses["fp8"] != losses["bf16-from-nf4"]


@pytest.mark.parametrize(
    ("flash", "use_bf16", "precision", "expected"),
    [
        (True, True, "bf16", util.PACKED),
        (True, True, "fp32", util.PACKED_EFFICIENT),
        (False, True, "bf16", util.PACKED_EFFICIENT),
        (True, False, "fp16", util.PACKED_EFFICIENT),
        (True, False, "bf16", None),
    ],
)
def test_attention_suits_the_gpu(monkeypatch, flash, use_bf16, precision, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(util, "varlen_attn", flash or None)
    assert util.choose_attention(precision, use_bf16) == expected


def test_efficient_attention_refuses_windows():
    """Its gradient would ignore them; one that no row reaches does no harm."""
    query = torch.randn(1, 2, 8, 16)
    options = {"cu_seq_lens_q": torch.tensor([0, 8]).int(), "max_length_q": 8, "sliding_window": 4}
    attend = util.ALL_ATTENTION_FUNCTIONS[util.PACKED_EFFICIENT]
    with pytest.raises(NotImplementedError, match="sliding window"):
        attend(None, query, query, query, **options)


def test_failed_compiling_goes_on_without(capsys):
    plan = util.Plan("fp16", (), attention=util.PACKED, compiled=True, graphs=True)
    state = SimpleNamespace(global_step=0)
    trainer = SimpleNamespace(state=state)
    error = torch._dynamo.exc.InternalTorchDynamoError("no PTX for sm_60\nand more")
    plan = util.go_on_without(trainer, plan, error)
    assert (plan.compiled, plan.graphs) == (False, False)
    assert plan.reasons["Speed"] == "no padding, layers not compiled"
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "no PTX for sm_60" in said
