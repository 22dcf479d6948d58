"""Answers, figures, charts and reports, without a model."""
import csv
import math
import random

import pytest

import util
from util import color, evaluate, headline, metrics, parse_price


def rows(truths, title="Lamp"):
    return [{"prompt": f"What?\n\nTitle: {title} {i}\nCategory: Light\n\nPrice is $", "completion": str(t)}
            for i, t in enumerate(truths)]


@pytest.mark.parametrize("answer, price", [
    ("219.00", 219.0), ("$1,299.50", 1299.5), (" 12 dollars, or 13", 12.0), (".5", 0.5), ("-3.5", -3.5), ("-3", 3.0),
    ("about $7.", 7.0), ("1.2.3", 1.2), ("none", None), ("", None), (42, 42.0), (3.5, 3.5), (math.nan, None), (None, None)])
def test_the_first_number_of_an_answer_is_its_price(answer, price):
    assert parse_price(answer) == price


@pytest.mark.parametrize("error, truth, expected", [
    (39.99, 1, "green"), (40, 201, "green"), (40, 200, "orange"), (79.99, 1, "orange"), (80, 201, "orange"),
    (80, 200, "red"), (0, 0, "green"), (50, 0, "orange"), (90, 0, "red")])
def test_colors(error, truth, expected):
    assert color(error, truth) == expected


def test_figures_agree_with_scikit_learn():
    from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

    rng = random.Random(0)
    truths, guesses = [[rng.lognormvariate(4, 1) for _ in range(500)] for _ in "ab"]
    found = metrics(guesses, truths)
    assert found["mae"] == pytest.approx(mean_absolute_error(truths, guesses))
    assert found["mse"] == pytest.approx(mean_squared_error(truths, guesses))
    assert found["r2"] == pytest.approx(100 * r2_score(truths, guesses))


def test_figures_worked_by_hand():
    found = metrics([10, 20, 60], [10, 30, 40])  # errors 0, 10, 20: mean 10, population sd √(200/3)
    assert found["n"] == 3 and found["mae"] == 10 and found["mse"] == pytest.approx(500 / 3)
    assert found["mae_ci95"] == pytest.approx(1.96 * math.sqrt(200 / 3) / math.sqrt(3))
    assert found["r2"] == pytest.approx(100 * (1 - 500 / (16.6667**2 + 3.3333**2 + 13.3333**2)), abs=1e-2)
    assert metrics([1, 2], [3, 4])["mae_ci95"] == 0
    assert math.isnan(metrics([5], [7])["r2"])


def test_headline_has_two_none_and_one_decimals():
    assert headline({"mae": 1065.4012, "mse": 12345.6, "r2": -3.25}) == "Error: $1,065.40 MSE: 12,346 r²: -3.2%"


def test_evaluate_judges_any_function_one_by_one_or_in_batches_in_order(tmp_path, capsys):
    data = rows([10, 20.5, 300, 0, 50])
    answers = dict(zip((row["prompt"] for row in data), ("$10", "25 or so", "no idea", "3", "50.00")))
    one = evaluate(lambda row: answers[row["prompt"]], data, folder=tmp_path)
    batches = evaluate(lambda batch: [answers[row["prompt"]] for row in batch], data, batch_size=2)
    for name in ("n", "mae", "mae_ci95", "mse", "r2", "parse_failures"):
        assert one[name] == batches[name]
    assert one["n"] == 5 and one["parse_failures"] == 1 and one["mae"] == pytest.approx((0 + 4.5 + 300 + 3 + 0) / 5)
    assert {"items_per_s", "seconds"} <= one.keys()
    with open(tmp_path / "predictions.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert table[1] == {"index": "1", "title": "Lamp 1", "category": "Light", "truth": "20.5", "guess": "25.0", "error": "4.5"}
    assert [(tmp_path / name).read_bytes()[:4] for name in ("scatter.png", "running_error.png")] == [b"\x89PNG"] * 2
    assert "1 answers named no price" in capsys.readouterr().out


def test_size_takes_the_first_rows_and_no_more_than_there_are():
    assert evaluate(lambda row: 1, rows(range(1, 6)), size=2)["mae"] == 0.5
    assert evaluate(lambda row: 1, rows([1, 1]), size=200)["n"] == 2
    assert evaluate(lambda row: 1, rows([1] * 300), size=None)["n"] == 300
    assert evaluate(lambda row: 1, rows([7]))["mae"] == 6
    with pytest.raises(ValueError):
        evaluate(lambda row: 1, [])


def test_title_and_fields_come_from_the_prompt():
    assert util.title_of(rows([1])[0]["prompt"]) == "Lamp 0"
    assert util.title_of("What?\n\nOld lamp\nmade of brass\n\nPrice is $") == "Old lamp"
    assert util.field_of(rows([1])[0]["prompt"], "Category") == "Light"
    assert util.field_of("What?\n\nOld lamp\n\nPrice is $", "Category") == ""


def test_errors_by_category_by_price_and_the_worst():
    data = [row | {"prompt": row["prompt"].replace("Light", kind)} for row, kind in
            zip(rows([10, 30, 300, 2000]), ("Light > Floor", "Light", "Audio | Ears", "Audio"))]
    found = evaluate(lambda row: 0, data)
    assert found["by_category"]["Light"] == {"n": 2, "mae": 20, "mae_ci95": pytest.approx(1.96 * 10 / math.sqrt(2))}
    assert found["by_category"]["Audio"]["n"] == 2
    assert {band: group["n"] for band, group in found["by_price"].items()} == {"$0 to 20": 1, "$20 to 50": 1, "$250 to 1000": 2}
    assert [row["truth"] for row in found["worst"]] == [2000, 300, 30, 10]
    assert evaluate(lambda row: 0, rows([5, 6]))["by_category"] == {}  # one only


def test_a_paired_difference_knows_when_it_is_noise():
    rng = random.Random(0)
    errors = [rng.expovariate(1 / 40) for _ in range(400)]
    same = util.paired_difference(errors, errors, seed=1)
    assert same == {"difference": 0, "low": 0, "high": 0}
    worse = util.paired_difference([error + rng.gauss(5, 10) for error in errors], errors, seed=1)
    assert worse["low"] < worse["difference"] < worse["high"] and worse["difference"] == pytest.approx(5, abs=1.5)
    assert worse["high"] - worse["low"] == pytest.approx(2 * 1.96 * 10 / math.sqrt(400), rel=0.2)  # the pairs' spread, not 40's


def test_the_published_ladder_stands_beside_the_courses_data_only():
    figures = {"n": 5, "mae": 10.0, "mae_ci95": 1.0, "mse": 200.0, "r2": 50.0, "parse_failures": 0, "run": "a"}
    figures["decodings"] = {"median": figures.copy()}
    assert "GPT-5.1" in util.compare(figures | {"course": True}) and "2025-11" in util.compare(figures | {"course": True})
    assert "GPT-5.1" not in util.compare(figures)
    assert len(util.bars(figures | {"course": True}).axes[0].patches) == 1 + len(util.LADDER)


def test_intervals_that_keep_their_promise_lie_on_the_line():
    ranks = [(i + 0.5) / 1000 for i in range(1000)]
    line = util.reliability(ranks, "uniform").axes[0].lines[1]
    assert list(line.get_ydata()) == pytest.approx(list(line.get_xdata()), abs=0.2)
