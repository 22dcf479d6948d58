"""The distribution over prices, read from one forward pass, against each number scored by a pass of its own."""
import math
import re

import numpy
import pytest
import torch

import app
from util import decodings

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
    (together, _), spellings = app.price_reader(model, tokenizer)(ROWS), app.spell_numbers(tokenizer)
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
    numpy.testing.assert_allclose(read(ROWS)[0], numpy.concatenate([read([row])[0] for row in ROWS]), rtol=1e-4)
    assert read(ROWS)[1] == [read([row])[1][0] for row in ROWS]


@pytest.fixture(scope="module")
def integer_speaker(model_and_tokenizer):
    """A model that has learnt to answer with whole dollars, and its prompts."""
    import copy

    model, tokenizer = model_and_tokenizer
    model = copy.deepcopy(model).train()
    prices = [3, 7, 12, 40, 55, 100, 219, 640, 999, 0, 88, 301]
    rows = [{"prompt": f"What does this cost to the nearest dollar?\n\n{'shelf ' * (i % 5)}number {i}\n\nPrice is $",
             "completion": f"{price}.00"} for i, price in enumerate(prices)]
    batch = tokenizer([row["prompt"] + row["completion"] + tokenizer.eos_token for row in rows], return_tensors="pt", padding=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        logits = model(**batch, logits_to_keep=9).logits[:, :-1]  # the answers, at the rows' ends
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, -8:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad()
    return model.eval(), tokenizer, rows


def test_greedy_equals_generation(integer_speaker):
    model, tokenizer, rows = integer_speaker
    said = []
    for row in rows:
        batch = tokenizer([row["prompt"]], return_tensors="pt")
        tokens = model.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=tokenizer.eos_token_id,
                                pad_token_id=tokenizer.pad_token_id)
        said.append(tokenizer.decode(tokens[0, batch["input_ids"].shape[1]:], skip_special_tokens=True))
    assert [text for text in said if not re.fullmatch(r"\d{1,3}(\.\d*)?", text)] == [] and len(set(said)) > 6
    assert app.price_reader(model, tokenizer)(rows)[1] == [int(float(text)) for text in said]


def test_losses_of_completions_equal_a_plain_forward_pass(integer_speaker):
    model, tokenizer, rows = integer_speaker
    rows, expected = rows[:5], []
    probabilities, _, losses = app.price_reader(model, tokenizer)(rows, with_loss=True)
    for row in rows:
        prompt, text = tokenizer.encode(row["prompt"]), tokenizer.encode(row["completion"] + tokenizer.eos_token, add_special_tokens=False)
        with torch.inference_mode():
            logs = model(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected += [-float(logs[i, token]) for i, token in enumerate(text)]
    assert sum(losses, []) == pytest.approx(expected, abs=1e-4)
    numpy.testing.assert_allclose(probabilities, app.price_reader(model, tokenizer)(rows)[0], atol=1e-5)


def test_prompts_in_one_row_are_read_as_each_alone(integer_speaker, packed_attention, monkeypatch):
    model, tokenizer, rows = integer_speaker
    padded = app.price_reader(model, tokenizer)(rows, with_loss=True)
    if len(app.spell_numbers(tokenizer)[999]) > 1:
        pytest.skip("the tree keeps its mask")
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "packed")
    packed = app.price_reader(model, tokenizer)(rows, with_loss=True)
    numpy.testing.assert_allclose(packed[0], padded[0], atol=1e-5)
    assert packed[1] == padded[1] and sum(packed[2], []) == pytest.approx(sum(padded[2], []), abs=1e-4)


def test_decodings_by_hand():
    probabilities = numpy.zeros((2, 1000))
    probabilities[0, [10, 20, 300]] = 0.2, 0.2, 0.1  # half of the mass is no number
    probabilities[1, 999] = 0.5
    rows = [{"prompt": "", "completion": "20.4"}, {"prompt": "", "completion": ""}]
    first, second = decodings(probabilities, [10, 999], rows, "mean")
    assert (first["median"], first["greedy"], first["low"], first["high"]) == (20, 10, 10, 300)
    assert first["guess"] == first["mean"] == pytest.approx(0.4 * 10 + 0.4 * 20 + 0.2 * 300)
    assert first["outside"] == second["outside"] == pytest.approx(0.5)
    assert first["nll"] == pytest.approx(-math.log(0.2)) and first["rank"] == pytest.approx(0.4 + 0.4 / 2)
    # ∫ (F(x) − [x ≥ 20.4])² dx: 10…20 at 0.4², 20…20.4 at 0.8², 20.4…300 at 0.2²
    assert first["crps"] == pytest.approx(10 * 0.16 + 0.4 * 0.64 + 279.6 * 0.04)
    assert second["median"] == second["guess"] == 999 and math.isnan(second["crps"])


def test_the_distribution_sums_to_one_less_the_mass_outside(model_and_tokenizer):
    probabilities, greedy = app.price_reader(*model_and_tokenizer)(ROWS)
    for row, answer in zip(probabilities, decodings(probabilities, greedy, ROWS)):
        assert row.sum() == pytest.approx(1 - answer["outside"]) and 0 < answer["outside"] < 1


def test_the_median_has_the_least_absolute_error():
    rng = numpy.random.default_rng(0)
    probabilities = rng.dirichlet(numpy.ones(1000) * 0.05, 20)
    best = (probabilities[:, :, None] * abs(numpy.arange(1000)[:, None] - numpy.arange(1000))).sum(1).min(1)
    guesses = [answer["guess"] for answer in decodings(probabilities, [0] * 20, [{}] * 20)]
    found = [(row * abs(numpy.arange(1000) - guess)).sum() for row, guess in zip(probabilities, guesses)]
    assert found == pytest.approx(best)


def test_merging_into_the_dequantised_base_changes_nothing(tiny_base, trained):
    """The largest difference to nf4 + adapter, in fp32, stays below 1e-6 of the probability."""
    tokenizer, quantised = app.load_tokenizer(tiny_base), app.load_base(tiny_base)
    apart = app.load_adapter(quantised, trained)
    merged = app.load_run(tiny_base, trained, {})
    assert not any("lora" in name or module.__class__.__name__ == "Linear4bit" for name, module in merged.named_modules())
    expected, found = (app.price_reader(model, tokenizer)(ROWS)[0] for model in (apart, merged))
    assert abs(expected - found).max() < 1e-6
    base = app.price_reader(app.load_run(tiny_base, None, {}), tokenizer)(ROWS)[0]
    assert abs(base - found).max() > 1e-5  # the adapter does something


def test_merged_weights_are_rounded_once(tiny_base, trained, monkeypatch):
    import torch

    monkeypatch.setattr(app, "choose_precision", lambda asked: ("bf16", "as on a GPU"))
    base = app.dequantise(app.load_base(tiny_base), torch.float32)
    assert not all(weight.equal(weight.bfloat16().float()) for name, weight in base.named_parameters() if "q_proj" in name)
    exact, merged = app.load_adapter(base, trained).state_dict(), app.load_run(tiny_base, trained, {}).state_dict()
    assert all(merged[name].equal(exact[name].bfloat16()) for name in exact)
