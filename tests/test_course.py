"""What the course's notebooks of weeks 6 and 7 call, on our modules."""

import threading

import numpy
import pandas
import pytest
from datasets import Dataset

from items import QUESTION, Item, demo_items
from util import evaluate

ITEMS = demo_items(40, seed=3)
TITLES = [item.title for item in ITEMS]
ROWS = [
    {
        "prompt": f"{QUESTION}\n\n{item.summary}\n\nPrice is $",
        "completion": str(item.price),
    }
    for item in ITEMS
]
DUMPED = [item.model_dump() for item in ITEMS]
DATA = {
    "items": ITEMS,
    "a generator": (item for item in ITEMS),
    "dumped items": DUMPED,
    "rows": ROWS,
    "a slice of it": Dataset.from_list(ROWS)[:30],
    "a Dataset of items": Dataset.from_list(DUMPED),
    "a DataFrame of items": pandas.DataFrame(DUMPED),
    "a DataFrame of rows": pandas.DataFrame(ROWS),
}
FIELDS = {"title": "Brass lamp", "category": "Lamps", "price": "12.50", "features": ["tall"]}


@pytest.mark.parametrize("name", DATA)
def test_evaluate_takes_any_data(name):
    """The first `size` items, whatever holds them; titles and categories are found."""
    found = evaluate(lambda item: 50, DATA[name], 20, 5)  # as in the course, by position
    expected = numpy.mean([abs(item.price - 50) for item in ITEMS[:20]])
    assert found["n"] == 20
    assert found["mae"] == pytest.approx(expected)
    assert {row["title"] for row in found["worst"]} == set(TITLES[:20])
    assert "" not in found["by_category"]


@pytest.mark.parametrize(
    ("pricer", "data"),
    [
        (lambda item: item.price, ITEMS),
        (lambda item: f"The price is ${item.price:,.2f}", ITEMS),
        (lambda item: numpy.float32(item.price), ITEMS),
        (lambda row: float(row["completion"]), ROWS),
        (lambda row: row["price"], pandas.DataFrame(DUMPED)),
    ],
    ids=["number", "text", "numpy", "row", "frame"],
)
def test_pricers_get_what_data_hold(pricer, data):
    """An Item, or a row; they answer with a number or a text."""
    assert evaluate(pricer, data)["mae"] == pytest.approx(0, abs=0.01)


def test_workers_call_at_once():
    """As many calls as workers wait for each other, and the answers keep their order."""
    together = threading.Barrier(4, timeout=20)

    def remote_pricer(item):
        together.wait()
        return item.price

    assert evaluate(remote_pricer, ITEMS, workers=4)["mae"] == 0


def test_items_without_price_are_named():
    with pytest.raises(ValueError, match="completion or a price, which {'title': 'lamp'} has not"):
        evaluate(lambda item: 1, [{"title": "lamp"}])


def test_items_validate_like_the_courses():
    """A price that is text is converted, other fields are ignored, what is no price is refused."""
    item = Item.model_validate(FIELDS)
    assert repr(item) == "<Brass lamp = $12.5>"
    assert list(item.model_dump()) == [
        *("title", "category", "price", "full", "weight", "summary", "prompt", "completion", "id")
    ]
    with pytest.raises(ValueError, match="price"):
        Item.model_validate(FIELDS | {"price": "cheap"})
    with pytest.raises(ValueError, match="title"):
        Item.model_validate(FIELDS | {"title": None})


def test_prompts_are_those_of_week_six():
    """With the price to train on, without it to test."""
    item = Item(**FIELDS)
    item.make_prompt("A lamp of brass.")
    prompt = f"{QUESTION}\n\nA lamp of brass.\n\nPrice is $"
    assert item.prompt == f"{prompt}12.00"
    assert item.test_prompt() == prompt
    item.prompt = prompt
    assert item.test_prompt() == prompt
