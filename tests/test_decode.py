"""The distribution over prices, read from one forward pass, against each number scored by a pass of its own."""
import json

import numpy
import pytest
import torch

import app
from util import decide

ROWS = [{"prompt": f"What does this cost to the nearest dollar?\n\n{'A red lamp of brass. ' * n}\n\nPrice is $"} for n in (1, 3, 8)]


@pytest.fixture(scope="module", params=["llama", "smol"])
def model_and_tokenizer(request):
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = request.getfixturevalue(f"{request.param}_tokenizer")
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.4, tie_word_embeddings=True)).eval(), tokenizer


def test_numbers_are_spelled_as_the_tokenizer_does(llama_tokenizer, smol_tokenizer):
    assert {len(spelling) for spelling in app.spell_numbers(llama_tokenizer)} == {1}
    assert [len(app.spell_numbers(smol_tokenizer)[n]) for n in (0, 9, 10, 99, 100, 999)] == [1, 1, 2, 2, 3, 3]


def test_one_pass_equals_a_pass_for_each_number(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    together, spellings = app.price_reader(model, tokenizer)(ROWS), app.spell_numbers(tokenizer)
    tokens = sorted({token for spelling in spellings for token in spelling})
    longest = max(map(len, spellings))
    for row, probabilities in zip(ROWS, together):
        prompt = tokenizer.encode(row["prompt"])
        for n in [*range(0, 1000, 37), 5, 10, 42, 99, 100, 999]:
            with torch.inference_mode():
                logs = model(torch.tensor([prompt + list(spellings[n])])).logits[0].log_softmax(-1)
            expected = numpy.prod([logs[len(prompt) - 1 + k, token].exp() for k, token in enumerate(spellings[n])])
            if len(spellings[n]) < longest:
                expected *= 1 - logs[-1, tokens].exp().sum()
            assert probabilities[n] == pytest.approx(float(expected), rel=1e-4)
        assert 0 < probabilities.sum() <= 1 + 1e-6


def test_a_row_is_read_alike_alone_and_in_a_batch(model_and_tokenizer):
    read = app.price_reader(*model_and_tokenizer)
    numpy.testing.assert_allclose(read(ROWS), numpy.concatenate([read([row]) for row in ROWS]), rtol=1e-4)


def test_median_and_mean_by_hand():
    probabilities = numpy.zeros((2, 1000))
    probabilities[0, [10, 20, 300]] = 0.2, 0.2, 0.1  # half of the mass is no number
    probabilities[1, 999] = 0.5
    assert decide(probabilities, "median") == [20.0, 999.0]
    assert decide(probabilities, "mean") == pytest.approx([0.4 * 10 + 0.4 * 20 + 0.2 * 300, 999])


def test_the_median_has_the_least_absolute_error():
    rng = numpy.random.default_rng(0)
    probabilities = rng.dirichlet(numpy.ones(1000) * 0.05, 20)
    best = (probabilities[:, :, None] * abs(numpy.arange(1000)[:, None] - numpy.arange(1000))).sum(1).min(1)
    found = [(row * abs(numpy.arange(1000) - guess)).sum() for row, guess in zip(probabilities, decide(probabilities, "median"))]
    assert found == pytest.approx(best)


def test_eval_answers_with_the_median_when_asked(run, trained):
    run("eval", "--local", "--run-name", "first", "--decode", "median", "--size", "5")
    results = json.loads((trained / "eval/results.json").read_text("utf-8"))
    assert results["decode"] == "median" and results["parse_failures"] == 0 and results["n"] == 4
