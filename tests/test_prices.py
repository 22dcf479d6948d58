"""The probability of every price, read from one forward pass, against a pass for each number."""

import math
import re
from dataclasses import dataclass

import numpy
import pytest
import torch

import items
import util
from conftest import make_llama, plain_loss, read_by_brute_force
from util import PriceReader, estimate_prices

QUESTION = "What does this cost to the nearest dollar?"
PRICES = (3, 7, 12, 40, 100, 219, 640, 999)


def make_row(description, completion=""):
    return {"prompt": f"{QUESTION}\n\n{description}\n\nPrice is $", "completion": completion}


ROWS = [make_row("A red lamp of brass. " * count) for count in (1, 3, 8)]


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_llama(tokenizer).eval()


@dataclass
class Speaker:
    """A model that has learnt to answer with whole dollars, and its prompts."""

    model: object
    tokenizer: object
    rows: list

    def read(self, **options):
        return PriceReader(self.model, self.tokenizer).read(self.rows, **options)


@pytest.fixture(scope="module")
def speaker(tokenizer):
    rows = []
    for i, price in enumerate(PRICES):
        rows.append(make_row("shelf " * (i % 5) + f"number {i}", f"{price}.00"))
    texts = [row["prompt"] + row["completion"] + tokenizer.eos_token for row in rows]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    answer_len = len(tokenizer.encode(f"999.00{tokenizer.eos_token}", add_special_tokens=False))
    labels = batch["input_ids"][:, -answer_len:]

    model = make_llama(tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for _ in range(30):
        logits = model(**batch, logits_to_keep=answer_len + 1).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return Speaker(model.eval(), tokenizer, rows)


# Reading


def assert_close(found, expected):
    """Two arrays of probabilities are equal but for rounding."""
    numpy.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_one_pass_equals_many(model, tokenizer):
    """In a batch of rows of other lengths, as in a pass for each beginning of a number."""
    found = PriceReader(model, tokenizer).read(ROWS).probabilities
    assert (found.sum(1) < 1).all()  # the rest is that of answers that are no price
    for row, probabilities in zip(ROWS, found, strict=True):
        expected = read_by_brute_force(model, tokenizer, row["prompt"]).exp()
        numpy.testing.assert_allclose(probabilities, expected, rtol=1e-4)


def test_greedy_equals_generation(speaker):
    prompts = [row["prompt"] for row in speaker.rows]
    batch = speaker.tokenizer(prompts, return_tensors="pt", padding=True)
    tokens = speaker.model.generate(
        **batch,
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=speaker.tokenizer.eos_token_id,
        pad_token_id=speaker.tokenizer.pad_token_id,
    )
    answers = tokens[:, batch["input_ids"].shape[1] :]
    texts = speaker.tokenizer.batch_decode(answers, skip_special_tokens=True)
    strange = [text for text in texts if not re.fullmatch(r"\d{1,3}(\.\d*)?", text)]
    assert strange == []
    assert len(set(texts)) > 4
    assert speaker.read().greedy == [int(float(text)) for text in texts]


def test_losses_equal_plain_passes(speaker):
    """And reading them leaves the prices as they are: branches don't see the completion."""
    without, found = speaker.read(), speaker.read(with_loss=True)
    for row, losses in zip(speaker.rows, found.losses, strict=True):
        text = row["completion"] + speaker.tokenizer.eos_token
        prompt = speaker.tokenizer.encode(row["prompt"])
        answer = speaker.tokenizer.encode(text, add_special_tokens=False)
        labels = [items.IGNORED] * len(prompt) + answer
        expected = plain_loss(speaker.model, {"input_ids": prompt + answer, "labels": labels})
        assert len(losses) == len(answer)
        assert sum(losses) == pytest.approx(expected, abs=1e-4)
    assert without.losses is None
    assert found.greedy == without.greedy
    assert_close(found.probabilities, without.probabilities)


# The fast path


@pytest.mark.parametrize("with_loss", [True, False])
def test_packed_attention_reads_alike(speaker, packed_attention, with_loss):
    """All prompts in one row; where numbers have several tokens, as others do."""
    expected = speaker.read(with_loss=True)
    speaker.model.set_attn_implementation(util.PACKED)
    found = speaker.read(with_loss=with_loss)
    speaker.model.set_attn_implementation("sdpa")
    assert_close(found.probabilities, expected.probabilities)
    assert found.greedy == expected.greedy
    for losses, others in zip(found.losses or (), expected.losses, strict=with_loss):
        assert losses == pytest.approx(others, abs=1e-4)


# The price loss


def make_price_loss(tokenizer, weight=2.5, spread=50.0):
    ids = torch.tensor(util.find_number_ids(tokenizer, items.COURSE_SCALE))
    return util.PriceLoss(weight, spread, ids)


def loss_by_brute_force(loss, logits, truth):
    """Of one prompt, number by number, from the logits behind it."""
    shares = logits[loss.number_ids].softmax(0)
    score = 0
    for number in items.NUMBERS:
        reached = shares[: number + 1].sum()
        score = score + (reached - float(number >= truth)) ** 2
    return loss.weight * score / loss.spread


def test_price_loss_equals_brute_force(llama_tokenizer):
    """It and its gradient, to 1e-6 in 64 bits; only tokens before a number count."""
    loss = make_price_loss(llama_tokenizer)
    torch.manual_seed(0)
    logits = torch.randn(6, len(llama_tokenizer), dtype=torch.float64, requires_grad=True)
    number = {n: int(loss.number_ids[n]) for n in (219, 0)}
    other = llama_tokenizer.encode(".00", add_special_tokens=False)[0]
    targets = torch.tensor([number[219], other, other, number[0], other, number[0]])
    is_first = torch.tensor([True, False, False, True, False, False])
    found = loss.of_tokens(logits, targets, is_first)
    expected = sum(loss_by_brute_force(loss, logits[i], n) for i, n in ((0, 219), (3, 0)))
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = [torch.autograd.grad(one, logits)[0] for one in (found, expected)]
    assert abs(gradients[0]).max() > 0
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-12)


# Estimates


def estimate_one(distribution, greedy, completion="", decode="median"):
    """The Estimate of one row from {price: probability}."""
    probabilities = numpy.zeros((1, 1000))
    for price, probability in distribution.items():
        probabilities[0, price] = probability
    rows = [make_row("a lamp", completion)]
    return estimate_prices(probabilities, [greedy], rows, decode)[0]


def test_estimate_by_hand():
    """Half of the mass is no price; of the rest $10 and $20 have 0.4 each, $300 has 0.2."""
    estimate = estimate_one({10: 0.2, 20: 0.2, 300: 0.1}, 10, "20.4", "mean")
    mean = pytest.approx(0.4 * 10 + 0.4 * 20 + 0.2 * 300)
    assert estimate.answers == {"median": 20, "mean": mean, "greedy": 10}
    assert estimate.guess == estimate.answers["mean"]
    assert estimate.low == 10
    assert estimate.high == 300
    assert estimate.outside == pytest.approx(0.5)
    assert estimate.nll == pytest.approx(-math.log(0.2))
    assert estimate.rank == pytest.approx(0.4 + 0.4 / 2)
    # ∫ (F(x) − [x ≥ 20.4])² dx: 10 … 20 at 0.4², 20 … 20.4 at 0.8², 20.4 … 300 at 0.2²
    assert estimate.crps == pytest.approx(10 * 0.16 + 0.4 * 0.64 + 279.6 * 0.04)
