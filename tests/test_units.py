"""Prices in other units and currencies: number × unit, named by the prompts, money elsewhere."""

import csv
import json
import re
import shutil
import statistics
from decimal import Decimal

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import items
import util
from conftest import DATASET, TRAIN, contents, read, write_catalogue
from items import COURSE_SCALE, PriceScale, load_prompts, own_catalogue, scale_of

RUN = "outputs/price-run"
SCALES = [
    PriceScale(unit, currency)
    for unit in (0.01, 0.1, 1, 10, 1000)
    for currency in ("$", "€", "CHF", "kr.")
]


# Scales


@pytest.mark.parametrize("scale", SCALES, ids=lambda scale: scale.step)
def test_prompts_name_their_scale(scale):
    prompt = scale.prompt("Title: Lamp, Price is $10×, 12 cm")
    assert scale_of(prompt) == scale
    assert scale_of(f"{prompt} \n") == scale


@pytest.mark.parametrize(
    ("scale", "step", "end"),
    [
        (COURSE_SCALE, "dollar", "$"),
        (PriceScale(1, "€"), "€1", "€"),
        (PriceScale(10, "$"), "$10", "$10×"),
        (PriceScale(0.01, "CHF"), "CHF0.01", "CHF0.01×"),
    ],
)
def test_prompts_in_words(scale, step, end):
    question = f"What does this cost to the nearest {step}?"
    assert scale.prompt("Lamp") == f"{question}\n\nLamp\n\nPrice is {end}"


def test_other_texts_are_the_courses():
    for text in ("", "Price is $", "Lamp", "Price is 219"):
        assert scale_of(text) == COURSE_SCALE


@pytest.mark.parametrize(
    ("unit", "price", "rounded", "exact"),
    [
        (1, 219.35, "219.00", "219.35"),
        (1, 0.5, "0.00", "0.5"),
        (1, 1.5, "2.00", "1.5"),
        (1, 999.49, "999.00", "999.49"),
        (10, 2193.5, "219.00", "219.35"),
        (0.01, 0.57, "57.00", "57"),
        (0.01, 0.125, "12.00", "12.5"),
        (0.1, 4.35, "44.00", "43.5"),
    ],
)
def test_completions_are_in_units(unit, price, rounded, exact):
    """Half is rounded to even."""
    scale = PriceScale(unit)
    assert scale.completion(price, do_round=True) == rounded
    assert scale.completion(price, do_round=False) == exact


@given(st.integers(1, 99_949), st.sampled_from(SCALES))
def test_money_survives_the_prompt(hundredths, scale):
    """What a completion says, times its unit, is the price, to the last digit."""
    price = float(Decimal(hundredths) / 100 * Decimal(items.format_unit(scale.unit)))
    row = {"prompt": scale.prompt("Lamp"), "completion": scale.completion(price, do_round=False)}
    assert util.truth_of(row) == pytest.approx(price, rel=1e-15)


def test_money_is_written_plainly():
    assert PriceScale(1).format(1234.5) == "$1,234.50"
    assert PriceScale(1, "CHF").format(-20) == "−CHF 20.00"
    assert PriceScale(10).format_whole(570) == "$570"
    assert PriceScale(0.01).format_whole(0.57) == "$0.57"


# The choice of the unit


def write_prices(path, prices):
    rows = [f'Lamp {i},"{price}",A lamp of kind {i}' for i, price in enumerate(prices)]
    path.write_text("\n".join(["title,price,text", *rows]), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("prices", "unit"),
    [
        (["5.00", "9.99", "9.99"], 0.01),
        (["5.00", "10.00", "1.00"], 0.1),
        (["5.00", "999.49", "1.00"], 1),
        (["5.00", "999.50", "1.00"], 10),
        (["1.299,00", "12,50", "3"], 10),
        (["$5", "$900", "$1", "€90,000"], 1),
        (["0", "-3", "free", "12.00", "13", "14"], 0.1),
        (["100"] * 995 + ["5000"] * 5, 1),
        (["100"] * 994 + ["5000"] * 6, 10),
    ],
)
def test_smallest_unit_is_chosen(tmp_path, prices, unit):
    """The smallest that holds 99.5 % of the prices that can be read."""
    catalogue = own_catalogue(write_prices(tmp_path / "prices.csv", prices), seed=1)
    assert catalogue.scale.unit == unit
    assert f"Unit: ${items.format_unit(unit)}, for prices" in "\n".join(catalogue.notes)


def test_asked_unit_drops_dear_items(tmp_path):
    """A larger unit doesn't drop cheap ones."""
    prices = ["5.00", "999.49", "999.50", "0.49", "0.50"]
    path = write_prices(tmp_path / "prices.csv", prices)
    dropped = {"price is outside $0.50–$999.49": [4, 5]}
    assert own_catalogue(path, seed=1, unit=1).dropped == dropped
    path = write_prices(path, ["3.00", "99000", "50000"])
    assert own_catalogue(path, seed=1).dropped == {}


def test_colors_go_by_the_unit():
    """What is $40 in the course is 40 units; a share of the price is enough, too."""
    pairs = [(0, 399), (0, 400), (0, 800), (5000, 5990), (5000, 6990), (5000, 7000)]
    table = [{"truth": truth, "guess": guess} for truth, guess in pairs]
    groups = util.group_by_color(table, PriceScale(10, "€"))
    assert [(label, rows) for _, _, label, rows in groups] == [
        ("error < €400 or 20 %: 2 of 6", [table[0], table[3]]),
        ("error < €800 or 40 %: 2 of 6", [table[1], table[4]]),
        ("larger: 2 of 6", [table[2], table[5]]),
    ]


def score_numbers(scale):
    """The figures and the table of 40 prices, always the same numbers of a scale's units."""
    rng = numpy.random.default_rng(0)
    weights = rng.random((40, 1000)) ** 40
    rows = []
    for number in rng.lognormal(5, 1, 40).clip(1, 999).round(1):
        rows.append({"prompt": scale.prompt("Title: Lamp"), "completion": str(number)})
    estimates = util.estimate_prices(weights / weights.sum(1, keepdims=True), [7] * 40, rows)
    return util.score(rows, estimates, "alike")


@pytest.mark.parametrize("unit", [0.01, 1000])
def test_units_are_scored_alike(unit):
    """What is money is that of the course's unit times the unit; the rest is the same."""
    expected, dollars = score_numbers(COURSE_SCALE)
    found, table = score_numbers(PriceScale(unit, "€"))
    assert (found["unit"], found["currency"]) == (unit, "€")
    for row, other in zip(table, dollars, strict=True):
        for name in ("truth", "guess", "low", "high"):
            assert row[name] == pytest.approx(unit * other[name])
    for name in ("mae", "mae_ci95"):
        assert found[name] == pytest.approx(unit * expected[name])
    assert found["r2"] == pytest.approx(expected["r2"])
    assert found["intervals"] == expected["intervals"]
    sizes = [[group["n"] for group in one["by_price"].values()] for one in (found, expected)]
    assert sizes[0] == sizes[1]
    scores = expected["distribution"]
    crps = unit * scores["crps"]
    assert found["distribution"] == pytest.approx(scores | {"crps": crps})


# Stages


@pytest.fixture(scope="module")
def tens(call, shared, tmp_path_factory):
    """A folder with a run in steps of €10, whose prompts say so."""
    folder = tmp_path_factory.mktemp("tens")
    catalogue = folder / "catalogue.jsonl"
    write_catalogue(catalogue, factor=Decimal(10))
    catalogue.write_text(catalogue.read_text("utf-8").replace('"price":', '"Betrag":'), "utf-8")
    file = ("--source", "catalogue.jsonl", "--columns", "price=Betrag")
    call("prepare", *shared, *file, "--currency", "€", cwd=folder)
    call("train", *shared, "--run-name", "run", *TRAIN, cwd=folder)
    call("eval", "--local", cwd=folder)
    return folder


def test_records_name_the_scale(tens):
    dataset = read(tens / DATASET / "prepare.json")
    for record in (dataset, read(tens / RUN / "run.json")["data"]):
        assert (record["unit"], record["currency"]) == (10, "€")
    card = (tens / RUN / "README.md").read_text("utf-8")
    assert "`Price is €10×`" in card
    assert "times 10 is the price in €" in card
    assert re.search("mean absolute error +n +€", card)
    report = (tens / RUN / "eval/report.html").read_text("utf-8")
    assert "guess over its true price, in €" in report
    assert "$" not in report.partition("<h2>How it was measured")[0].partition("<h1>")[2]


def test_figures_are_in_money(tens):
    """Of validations and baselines, too; guesses by the median are whole steps."""
    splits = load_prompts(tens / DATASET)
    truths = {name: [util.truth_of(row) for row in rows] for name, rows in splits.items()}
    constant = statistics.median(truths["train"])
    expected = statistics.fmean(abs(constant - truth) for truth in truths["test"])
    results = read(tens / RUN / "eval/results.json")
    assert results["baselines"]["constant_median"]["mae"] == pytest.approx(expected)
    errors = [entry.get("eval_mae") for entry in read(tens / RUN / "run.json")["history"]]
    assert expected / 4 < min(filter(None, errors))
    with open(tens / RUN / "eval/predictions.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["truth"]) for row in table] == truths["test"]
    assert {float(row["guess"]) % 10 for row in table} == {0}


def test_own_items_are_priced_in_its_unit(call, tens):
    said = call("eval", "--local", "--text", "A lamp", cwd=tens)
    *_, guess, note = said.splitlines()
    assert guess.lstrip().startswith("€")
    assert note == "All these prices are to the nearest €10"


def test_columns_of_its_data_are_known(call, tens):
    """A file is read like the one that was trained on, without --columns."""
    row = {"title": "Lamp", "text": "A dear lamp", "Betrag": 5000, "price": 1}
    (tens / "other.jsonl").write_text(json.dumps(row), encoding="utf-8")
    said = call("eval", "--local", "--input", "other.jsonl", cwd=tens)
    assert "Columns: title from title, price from Betrag, text from" in said
    assert "Not judged" not in said
    said = call("eval", "--local", "--input", "other.jsonl", "--columns", "price=price", cwd=tens)
    assert "price from price" in said


def test_other_scale_is_refused(call, shared, tens, project):
    """A run in steps of €10 isn't judged on prices in steps of $1."""
    shutil.copytree(tens / RUN, project / RUN)
    before = contents(project)
    said = call("eval", "--local", "--run-name", "run", cwd=project, code=1)
    assert "run: its prices are in steps of €10, those of" in said
    assert "Prepare what it was trained on again: " in said
    after = contents(project)
    after.pop("said.txt")
    assert after == before
