"""Answers, figures, charts and reports, without a model."""

import csv
import json
import math
import random
from functools import partial
from types import SimpleNamespace

import numpy
import pytest
import torch
from datasets import Dataset

import util
from items import COURSE_SCALE, UserError, demo_items, write_json, write_manifest, write_table
from util import compare_guesses, evaluate, metrics, parse_price


def make_rows(truths, category="Light"):
    """One row for each true price: `Lamp 0`, `Lamp 1`, …"""
    rows = []
    for i, truth in enumerate(truths):
        description = f"Title: Lamp {i}\nCategory: {category}"
        rows.append({"prompt": f"What?\n\n{description}\n\nPrice is $", "completion": str(truth)})
    return rows


def always(answer):
    """A function that gives this answer to every row."""
    return lambda row: answer


# Answers


def test_first_number_is_the_price():
    answers = ["$1,299.50", ".5", "-3.5", "about $7., or 13", 42, "none", math.nan, None]
    prices = [1299.5, 0.5, -3.5, 7, 42, None, None, None]
    assert [parse_price(answer) for answer in answers] == prices


# Figures


def test_metrics_worked_by_hand():
    """Errors are 0, 10 and 20, the truths' distances from their mean 50/3, 10/3 and 40/3."""
    assert metrics([10, 20, 60], [10, 30, 40]) == {
        "n": 3,
        "mae": 10,
        "mae_ci95": pytest.approx(1.96 * math.sqrt(200 / 3) / math.sqrt(3)),
        "mse": pytest.approx(500 / 3),
        "r2": pytest.approx(100 * (1 - 500 / (4200 / 9))),
    }


def test_paired_difference_knows_its_noise():
    """Its interval is as wide as the pairs' spread (10) makes it, not the errors' own (40)."""
    rng = random.Random(0)
    truths = [0] * 400
    errors = [rng.expovariate(1 / 40) + 50 for _ in truths]
    others = [error + rng.gauss(5, 10) for error in errors]
    found = compare_guesses(errors, others, truths, seed=1)
    assert found["difference"] == pytest.approx(5, abs=1.5)
    assert found["low"] < found["difference"] < found["high"]
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * 10 / math.sqrt(400), rel=0.2)


# Evaluating any function

TRUTHS = [10, 20.5, 300, 0, 50]
ANSWERS = ["$10", "25 or so", "no idea", "3", "50.00"]


def answer_of(row):
    """The answer from ANSWERS to one of the five rows."""
    return ANSWERS[int(util.title_of(row["prompt"]).removeprefix("Lamp "))]


def test_evaluate_judges_any_function(tmp_path, capsys):
    """An answer without a price counts as $0, and is counted."""
    found = evaluate(answer_of, make_rows(TRUTHS), folder=tmp_path)
    assert found["n"] == 5
    assert found["mae"] == pytest.approx((0 + 4.5 + 300 + 3 + 0) / 5)
    assert found["parse_failures"] == 1
    assert found["items_per_s"] == pytest.approx(5 / found["seconds"])
    said = capsys.readouterr().out
    assert said.startswith("answer of: Error: $61.50 MSE: 18,006 r²: −40.5% (± ")
    assert "1 answers named no price" in said
    with open(tmp_path / "predictions.csv", encoding="utf-8") as file:
        row = list(csv.DictReader(file))[1]
    expected = {"index": "1", "title": "Lamp 1", "category": "Light"}
    assert row == expected | {"truth": "20.5", "guess": "25.0", "error": "4.5"}
    for name in ("scatter.png", "running_error.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="at least one row"):
        evaluate(answer_of, [])


def test_errors_by_category_and_price():
    """Categories are the top ones; the worst items come first."""
    rows = [
        *make_rows([10], "Light > Floor"),
        *make_rows([30], "Light"),
        *make_rows([300], "Audio | Ears"),
        *make_rows([2000], "Audio"),
    ]
    found = evaluate(always(0), rows)
    interval = 1.96 * 10 / math.sqrt(2)
    light = {"n": 2, "mae": 20, "mae_ci95": pytest.approx(interval)}
    assert found["by_category"]["Light"] == light
    assert found["by_category"]["Audio"]["n"] == 2
    counts = {band: group["n"] for band, group in found["by_price"].items()}
    assert counts == {"$0 to 20": 1, "$20 to 50": 1, "$250 to 1,000": 2}
    assert [row["truth"] for row in found["worst"]] == [2000, 300, 30, 10]
    assert evaluate(always(0), rows[:2])["by_category"] == {}


# Tables and charts


@pytest.fixture()
def results():
    """What results.json has of a run, as far as tables and charts need it."""
    figures = {"n": 5, "mae": 10.0, "mae_ci95": 1.0, "mse": 200.0, "r2": 50.0}
    scores = {"coverage_80": 0.95, "nll": 5, "crps": 9, "outside": -1e-7}
    decodings = {"median": figures, "mean": figures | {"mae": 12.0}}
    found = {"run": "a", "decodings": decodings, "distribution": scores}
    return figures | found | {"baselines": {}, "earlier": {}}


@pytest.mark.parametrize(
    "difference, low, high, expected",
    [
        (-11.42, -18.87, -0.15, "$11.42 better (0.15 to 18.87)"),
        (14.93, 1.5, 1020.25, "$14.93 worse (1.50 to 1,020.25)"),
        (-3, -9, 3, "$3.00 better (−3.00 to 9.00), within the noise"),
        (0, 0, 0, "$0.00 apart (0.00 to 0.00), within the noise"),
        (5, math.nan, math.nan, "$5.00 worse"),
    ],
)
def test_differences_say_which_is_better(difference, low, high, expected):
    """A smaller error is better; a single item has no interval."""
    figures = {"difference": difference, "low": low, "high": high}
    found = util.format_difference("a", figures)
    assert found == f"Against a, on the same items: {expected}"


def test_table_says_what_intervals_hold(results):
    """Rounding can leave a little less than no probability."""
    table = util.format_table(results)
    held = "The 80 % intervals hold 95 % (to the nearest $1) of the true prices"
    assert f"{held}; their width isn't calibrated" in table
    assert "no price 0.00 %" in table
    results["distribution"]["calibrated_on"] = 500
    table = util.format_table(results)
    assert f"{held}; 500 validation rows set their width;" in table


def test_ladder_stands_beside_course_data(results):
    """What the course published is compared on its own data only."""
    assert "GPT-5.1" not in util.format_table(results)
    results["course"] = True
    table = util.format_table(results)
    assert "GPT-5.1" in table
    assert "2025-11" in table
    assert len(util.table_rows(results)) == 2 + len(util.LADDER)


@pytest.mark.parametrize("letter", ["W", "i", "W W "])
def test_titles_are_never_clipped(letter):
    """All of a long title is inside the picture, whatever its letters."""
    title = letter * (300 // len(letter))
    figure = util.loss_chart([{"step": 1, "loss": 2.0}], title, 5)
    figure.draw_without_rendering()
    box = figure._suptitle.get_window_extent()
    assert figure.bbox.containsx(box.x0)
    assert figure.bbox.containsx(box.x1)
    assert figure.bbox.containsy(box.y1)
    assert "".join(figure.get_suptitle().split()).startswith(title.replace(" ", ""))


# What words alone tell


def test_words_tell_much_of_the_demo():
    rows = [
        {"prompt": COURSE_SCALE.prompt(item.summary), "completion": str(item.price)}
        for item in demo_items(600, seed=3)
    ]
    splits = {"train": Dataset.from_list(rows[:500]), "val": Dataset.from_list(rows[500:550])}
    truths = [util.truth_of(row) for row in rows[550:]]
    error = metrics(util.word_guesses(splits, rows[550:]), truths)["mae"]
    assert error < 0.6 * metrics([float(numpy.median(truths))] * 50, truths)["mae"]


# Comparables


def rows_of(prices):
    """A row for each of {text: price}."""
    pairs = prices.items()
    return [{"prompt": COURSE_SCALE.prompt(text), "completion": f"{n}.00"} for text, n in pairs]


def whole_demo_rows(count):
    """The demo's items as rows, their prices in whole dollars."""
    return [
        {"prompt": COURSE_SCALE.prompt(item.summary), "completion": f"{item.price:.0f}.00"}
        for item in demo_items(count, seed=3)
    ]


def test_nearest_items_are_brute_forces():
    """By cosine similarity of all rows; what shares no word with a row isn't near it."""
    rows = whole_demo_rows(300)
    index = util.WordIndex([row["prompt"] for row in rows[:200]])
    similar = (index.transform(rows[200:]) @ index.matrix.T).toarray()
    known = util.Comparables(Dataset.from_list(rows[:200]))
    for (others, similarities), row in zip(known.find(rows[200:]), similar, strict=True):
        expected = numpy.sort(row)[::-1][: util.NEIGHBOURS]
        assert numpy.allclose(similarities, expected, atol=1e-6)
        assert numpy.allclose(row[others], similarities)


def test_right_neighbour_decides_the_price():
    """For a model that knows nothing; where nothing is similar, the model decides."""
    train = rows_of({"Brass lamp, tall": 80, "Brass lamp": 70, "Oak desk": 400, "Red mug": 8})
    known = util.Comparables(Dataset.from_list(train))
    rows = rows_of({"Oak desk, used": 0, "A brass lamp": 0, "Xylophone": 0})
    found = known.find(rows)
    shares = known.shares(found)
    assert numpy.allclose(shares.sum(1), [1, 1, 0])
    uniform = numpy.full((3, 1000), 0.001)
    answers = util.estimate_prices(util.mix(uniform, shares, 0.9), [0] * 3, rows)
    assert [answer.guess for answer in answers] == pytest.approx([400, 70, 499], rel=0.02)
    assert numpy.array_equal(util.mix(uniform, shares, 0), uniform)
    names = known.describe(*found[0])
    assert (names["similar_1"], names["similar_1_price"]) == ("Oak desk", 400)
    assert names["similar_3"] is None
    alike = util.Comparables(Dataset.from_list(rows_of({"…": 5}) * 3))
    assert alike.shares(alike.find(rows)).sum() == 0
    assert util.similar_items(names, COURSE_SCALE) == "Oak desk $400 (1.00)"


def test_weight_has_the_least_crps():
    """Of all mixtures of validation rows. For intervals, each half has the other's weight."""
    rows = whole_demo_rows(600)
    known, val = util.Comparables(Dataset.from_list(rows[:500])), rows[500:]
    constant = numpy.zeros((100, 1000))
    constant[:, 50:350] = 1 / 300
    chosen = util.choose_comparables(known, val, constant)
    shares = known.shares(known.find(val))

    def crps(weight):
        mixed = util.mix(constant, shares, weight)
        return numpy.mean([one.crps for one in util.estimate_prices(mixed, [0] * 100, val)])

    assert 0 < chosen["weight"] < 1
    best = min(numpy.arange(0, 1.001, 0.01), key=crps)
    assert chosen["weight"] == pytest.approx(best, abs=0.011)
    assert chosen["calibration"]["rows"] == chosen["rows"] == 100
    of_halves = [util.choose_comparables(known, val[k::2], constant[k::2]) for k in (0, 1)]
    weights = numpy.array([[one["weight"] for one in of_halves[::-1]] * 50]).T
    estimates = util.estimate_prices(util.mix(constant, shares, weights), [0] * 100, val)
    assert chosen["calibration"] == util.calibrate([one.rank for one in estimates])
    exact = numpy.zeros((100, 1000))
    exact[range(100), [round(util.truth_of(row)) for row in val]] = 1
    assert util.choose_comparables(known, val, exact)["weight"] == 0


# Earlier evaluations


def write_evaluation(folder, rows, guess, **results):
    """An evaluation of always the same guess by the median, with base `a`."""
    folder.mkdir(parents=True)
    _, table = util.score(rows, [guess] * len(rows), "a run")
    write_table(folder / "predictions.csv", table)
    write_json(folder / "results.json", {"decode": "median", "base_identity": "a"} | results)


def read_earlier(folder, rows, base="a", names=("one",)):
    """The guesses of runs in a folder by the median, with a base of that identity."""
    project = util.Project(folder, "price")
    return util.read_earlier(project, names, rows, "median", SimpleNamespace(identity=base))


def test_earlier_guesses_are_of_same_rows(tmp_path):
    """Of the first evaluation that has them, also among more, with the base asked for."""
    rows = make_rows(TRUTHS)
    run = tmp_path / "price-one"
    write_evaluation(run / "eval", rows[1:], 1)
    write_evaluation(run / "eval-data", rows, 2)
    write_evaluation(run / "eval-other", rows, 3, base_identity="b")
    assert read_earlier(tmp_path, rows[:3]) == {"one": [2.0] * 3}
    assert read_earlier(tmp_path, rows, "b") == {"one": [3.0] * 5}


def test_earlier_guesses_of_any_titles(tmp_path):
    """A title may look like a number or like nothing, and hold line ends and quotes."""
    rows = make_rows(TRUTHS)
    for row, title in zip(rows, ("NA", "007", 'a "b", c', "nan", "x\ry"), strict=True):
        row["prompt"] = COURSE_SCALE.prompt(f"Title: {title}")
    write_evaluation(tmp_path / "price-one/eval", rows, 0.1)
    assert read_earlier(tmp_path, rows) == {"one": [0.1] * 5}


@pytest.mark.parametrize(
    "spoil, problem",
    [
        ("folder", "not evaluated yet"),
        ({"base_identity": "b"}, "its base_identity is b, not a"),
        ({"decode": "mean"}, "its decode is mean, not median"),
        ({"revision": "v1"}, "its revision is v1, not None"),
        ("rows", "it has other items, or fewer"),
        ("a digit", "its eval can't be compared: predictions.csv is corrupt"),
        ("no table", "No such file"),
    ],
)
def test_other_evaluations_are_not_compared(tmp_path, spoil, problem):
    """All are named at once, each with its reason; the last line says what to do."""
    rows = make_rows(TRUTHS)
    folder = tmp_path / "price-one/eval"
    changes = spoil if isinstance(spoil, dict) else {}
    write_evaluation(folder, rows[spoil == "rows" :], 1, **changes)
    predictions = folder / "predictions.csv"
    if spoil == "folder":
        folder.rename(tmp_path / "other")
    if spoil == "a digit":
        write_manifest(folder)
        predictions.write_text(predictions.read_text("utf-8").replace("1.0", "7.0"), "utf-8")
    if spoil == "no table":
        predictions.unlink()
    with pytest.raises(UserError) as raised:
        read_earlier(tmp_path, rows, names=("one", "price-two"))
    one, two = str(raised.value).splitlines()
    assert one.startswith("`earlier` one: ")
    assert problem in one
    assert two.startswith("`earlier` two: not evaluated yet.")
    assert two.endswith("with `size` 5 and `decode` median.")


# Calibration


def test_calibration_by_hand():
    """Of 24 distances from the middle the ⌈25 × 80 %⌉ = 20th holds 80 %; 19 are too few."""
    distances = [i / 100 for i in range(1, 25)]
    calibration = util.calibrate([0.5 + distance / 2 for distance in distances])
    assert calibration["rows"] == 24
    for promise, width in ((80, 0.2), (0, 0), (100, 1)):
        assert util.interval_width(calibration, promise) == pytest.approx(width)
    assert calibration["widths"] == sorted(calibration["widths"])
    assert util.calibrate([0.5] * 19) == {}
    assert util.interval_width({}, 80) == 0.8


@pytest.mark.parametrize("sharpness", [0.3, 1, 3], ids=["cautious", "right", "too sure"])
def test_calibrated_intervals_keep_their_promise(sharpness):
    """77 to 83 % of 2,000 unseen prices, however wrong the model's own widths are."""
    rng = numpy.random.default_rng(0)
    numbers = numpy.arange(1000)

    def draw(count, width):
        centres = rng.uniform(200, 800, count)
        truths = rng.normal(centres, 40).round().clip(0, 999)
        shape = numpy.exp(-0.5 * ((numbers - centres[:, None]) * sharpness / 40) ** 2)
        rows = [{"completion": str(truth)} for truth in truths]
        shares = shape / shape.sum(1, keepdims=True)
        return truths, util.estimate_prices(shares, [0] * count, rows, width=width)

    _, estimates = draw(500, 0.8)
    calibration = util.calibrate([estimate.rank for estimate in estimates])
    truths, estimates = draw(2000, util.interval_width(calibration))
    found = util.score_distributions(estimates, truths, calibration=calibration)
    assert 0.77 < found["distribution"]["coverage_80"] < 0.83
    assert found["intervals"]["calibrated"][16] == pytest.approx(0.8, abs=0.04)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_out_of_memory_halves_the_batch(error):
    """Answers stay in their order; only one row that doesn't fit is an error."""
    rows = [{"prompt": "x" * length} for length in (5, 2, 9, 4, 7, 1, 3)]
    sizes = []

    def answer(batch, most):
        sizes.append(len(batch))
        if len(batch) > most:
            raise error
        return [len(row["prompt"]) for row in batch]

    answers, _ = util.predict(partial(answer, most=2), rows, batch_size=5, name=None)
    assert answers == [5, 2, 9, 4, 7, 1, 3]
    assert max(sizes) == 5
    with pytest.raises(UserError, match="Out of memory with one row of 9 characters"):
        util.predict(partial(answer, most=0), rows, batch_size=5, name=None)


def test_projects_see_own_runs_only(tmp_path):
    """Also where one project's name begins another's."""
    for project, run in (("price", "a"), ("price-lab", "b"), ("price", "lab-c")):
        folder = tmp_path / f"{project}-{run}"
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps({"run": run, "mode": "lite", "recipe": {}}))
    for project, runs in (("price", {"a", "lab-c"}), ("price-lab", {"b"}), ("other", set())):
        assert util.Project(tmp_path, project).records.keys() == runs
