"""People's own catalogues: files, columns, prices and texts as shops write them; no leaks."""

import csv
import gzip
import io
import json
import math
from collections import Counter
from decimal import Decimal

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import example, given, settings
from hypothesis import strategies as st

from items import (
    Item,
    OwnCatalogue,
    PriceSurvey,
    UserError,
    clean_text,
    count_near_duplicates,
    cut_title,
    dropped_warning,
    fold_space,
    format_cut,
    html_to_text,
    parse_price,
    prompt_of,
    read_catalogue,
    split_by_title,
    word_grams,
)

# A file with every oddity

ODD_ROWS = (  # the first line of the row, as an editor shows it; its cells; what becomes of it
    (3, ("Lamp", "1.234,50 kr", "x"), "price is in another currency than most (EUR)"),
    (4, ("Sofa", "€ 912,50", "<p>Red &amp; soft</p><p>Oak</p>"), (912.5, "Red & soft\nOak")),
    (5, ("Pan", "19,99 EUR", "Panasonic   microwave"), (19.99, "Panasonic microwave")),
    (6, ("Tea pot", "12,-", "Tea pot, blue"), (12.0, "blue")),
    (7, ("Rug", "ab 9,99", "x"), "price is open, like `from` or `up to`"),
    (8, ("Bed", "10 - 15 €", "x"), "price is a range"),
    (9, ("Cup", "$5 / 4€", "x"), "price is in several currencies"),
    (10, ("Mug", "1.5", "x"), "price has another decimal sign than the column"),
    (11, ("Jug", "1.234", "x"), "price is ambiguous: its comma or point may be for thousands or"),
    (12, ("Desk", "1.234,50 €", "x"), "price is outside $0.50–$999.49"),
    (13, ("Vase", "N/A", "x"), "price is missing"),
    (14, ("Bowl", "7 each", "x"), "price has other words or numbers beside it"),
    (15, ("Two\nlines", "EUR 8", "a\n\n\nb"), (8.0, "a\nb")),
    (20, ("Oak", "free", "x"), "price is no number"),
    (21, ("", "3", "x"), "title is empty or not text"),
    (22, ("Tin", "3", "<br>"), "Body (HTML) is empty or not text"),
    (23, ("Zinc", "3", "x", "more"), "more cells than the header has"),
    (24, ("Pan", "19,99", "Panasonic microwave"), "duplicate of an earlier row"),
    (25, ("Last", "'3,5", "x"), "price has other words or numbers beside it"),
    (26, ("Last", "−3,5", "x"), "price is zero or negative"),
)


@pytest.fixture()
def odd_file(tmp_path):
    """A gzip'd CSV as Excel writes it, with every oddity."""
    text = io.StringIO(newline="")
    text.write("sep=;\r\n")
    writer = csv.writer(text, delimiter=";")
    writer.writerow(["NAME", "Cost", "Body (HTML)"])
    writer.writerows(cells for _, cells, _ in ODD_ROWS)
    path = tmp_path / "odd.csv.gz"
    path.write_bytes(gzip.compress(("\ufeff" + text.getvalue()).encode()))
    return path


def test_odd_file_gives_exact_rows(odd_file):
    """Each row is kept with its price and description, or dropped for its reason, by its line."""
    catalogue = OwnCatalogue(odd_file)
    found = {}
    for item in catalogue.items():
        found[item.id] = (item.price, item.summary.split("Description: ")[1])
    for reason, lines in catalogue.dropped.items():
        found |= dict.fromkeys(lines, reason)
    assert sorted(found) == [line for line, _, _ in ODD_ROWS]
    for line, _, expected in ODD_ROWS:
        if isinstance(expected, str):
            assert found[line].startswith(expected)
        else:
            assert found[line] == expected


def test_other_currencies_decide_no_sign(tmp_path):
    """One price in dollars makes no price in euros ambiguous."""
    path = tmp_path / "shop.csv"
    rows = ["Pan;19,99 €;Steel", "Sofa;1.299 €;Linen", "Lamp;$49.99;Brass"]
    path.write_text("\n".join(["name;price;text", *rows]), "utf-8")
    catalogue = OwnCatalogue(path)
    catalogue.choose_scale(None, "€")
    assert [item.price for item in catalogue.items()] == [19.99, 1299]
    assert catalogue.dropped == {"price is in another currency than most (EUR)": [4]}


def test_what_was_made_is_said(odd_file):
    """Columns, decimal sign with two examples, what was changed; dropped reasons by example."""
    catalogue = OwnCatalogue(odd_file)
    list(catalogue.items())
    columns, prices, changed = catalogue.notes()
    assert columns == "Columns: title from NAME, price from Cost, text from Body (HTML)"
    assert prices.startswith(
        "Prices: the comma is the decimal sign, since '€ 912,50' is 912.5 and '19,99 EUR' is 19.99"
    )
    assert "such as '1.5': dropped; currency EUR" in prices
    assert "1 × HTML became text" in changed
    assert "2 × white space was folded" in changed
    assert "1 × the title, repeated at the description's start, was cut" in changed
    assert catalogue.examples["price is a range"] == "10 - 15 €"


def test_whole_texts_are_noted(tmp_path):
    rows = [
        {"title": "Lamp", "text": "Title: Brass lamp", "price": 1},
        {"title": "Desk", "text": "Walnut", "price": 2},
    ]
    catalogue = OwnCatalogue(write_lines(tmp_path / "own.jsonl", *rows))
    found = [item.summary for item in catalogue.items()]
    assert found == ["Title: Brass lamp", "Title: Desk\nDescription: Walnut"]
    assert "begin with `Title:`, as the course's do: 1; they are" in catalogue.notes()[-1]


def test_many_cuts_hint_at_the_cutoff():
    cut = {"train": 20, "val": 0, "test": 0}
    line = format_cut({"cutoff": 110, "cut": cut}, kept=100)
    assert line == "Cut at 110 tokens: 20 of 100 descriptions"
    assert "--cutoff keeps more" in format_cut({"cutoff": 110, "cut": cut}, kept=99)


def test_many_dropped_rows_are_warned_of():
    assert dropped_warning(80, {"price is missing": list(range(20))}) == ""
    warning = dropped_warning(79, {"price is missing": list(range(20)), "x": [1]})
    assert "WARNING: 21 of 100 rows (21%) were dropped, most because: price is missing" in warning


# Files

ROWS = [
    {"title": f"T{i}", "price": f"{i}.25", "text": f"text, {i}", "category": "C"}
    for i in range(1, 6)
]


def write_rows(path):
    """ROWS in the format that the ending of `path` names."""
    name = path.name.removesuffix(".gz")
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
        content = path.read_bytes()
    elif name.endswith("jsonl"):
        content = "\n".join(json.dumps(row) for row in ROWS).encode()
    elif name.endswith("json"):
        content = json.dumps(ROWS, indent=1).encode()
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, ROWS[0], delimiter="\t" if name.endswith("tsv") else ",")
        writer.writeheader()
        writer.writerows(ROWS)
        content = text.getvalue().encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("compressed", ["", ".gz"])
@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_format_reads_alike(tmp_path, ending, compressed):
    path = tmp_path / f"own.{ending}{compressed}"
    write_rows(path)
    items, dropped = read_catalogue(path)
    assert dropped == {}
    assert [(item.title, item.price) for item in items] == [
        (f"T{i}", i + 0.25) for i in range(1, 6)
    ]
    assert items[0].summary == "Title: T1\nCategory: C\nDescription: text, 1"


def test_array_rows_are_named_by_line(tmp_path):
    path = tmp_path / "own.json"
    path.write_text(
        '\n[{"title": "A",\n"price": 1, "text": "a"},\n3, {"title": "B",\n"price": 2}\n]'
    )
    items, dropped = read_catalogue(path)
    assert [item.id for item in items] == [2]
    assert dropped == {"not a JSON object": [4], "text is empty or not text": [4]}


@pytest.mark.parametrize("size", [0, 2**20 - 20, 3 * 2**20])
def test_bad_byte_is_the_files(tmp_path, size):
    """However far into the file, behind a byte order mark, and gzip'd."""
    start = "\ufefftitle,price,text\n".encode() + "é".encode() * (size // 2)
    path = tmp_path / "own.csv.gz"
    path.write_bytes(gzip.compress(start + b"\xe9,1,2"))
    with pytest.raises(UserError) as error:
        read_catalogue(path)
    assert f"(byte {len(start):,})" in str(error.value)


@pytest.mark.parametrize(
    "text, line",
    [
        ('title,price,text\nA,1,"a" b\nB,2,b\n', "(line 2;"),
        ('title,price,text\nA,1,"a\n\nb" c\nB,2,b\n', "(line 4, in the row that begins in line 2;"),
        ('sep=,\ntitle,price,text\nA,1,a\n\nB,2,"a" b\n', "(line 5;"),
        ('title,price,text\nA,1,a\nB,2,"b\nC,3,c\n', "(line 3;"),
    ],
)
def test_broken_quotes_name_the_line(tmp_path, text, line):
    path = tmp_path / "own.csv"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_catalogue(path)
    assert line in str(error.value)


# Columns


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_chosen_columns_are_read(tmp_path):
    row = {"Name": "A", "title": "no", "Cost": 2, "price": 1, "Item description": "a", "text": "no"}
    path = write_lines(tmp_path / "own.jsonl", row)
    chosen = {"title": ["Name"], "price": ["cost"], "text": ["Item description"]}
    (item,), _ = read_catalogue(path, columns=chosen)
    assert (item.title, item.price, item.full) == ("A", 2, "a")
    with pytest.raises(UserError, match="no column Nmae .*; found: Name, title, Cost"):
        read_catalogue(path, columns={"title": ["Nmae"]})


def test_earlier_columns_are_known(tmp_path):
    """Where the file has all of a role's; what is chosen goes before."""
    row = {"Artikel": "A", "title": "B", "Betrag": "2", "price": 1, "summary": "no", "Lang": "long"}
    path = write_lines(tmp_path / "own.jsonl", row)
    earlier = {"title": "Artikel", "price": "Betrag", "text": ["Lang"], "category": []}
    (item,) = OwnCatalogue(path, earlier=earlier).items()
    assert (item.title, item.price, item.full) == ("A", 2, "long")
    (item,) = OwnCatalogue(path, {"title": ["title"]}, earlier=earlier).items()
    assert (item.title, item.price) == ("B", 2)
    earlier = {"title": "Titel", "price": None, "text": ["Lang", "Kurz"], "category": []}
    (item,) = OwnCatalogue(path, earlier=earlier).items()
    assert (item.title, item.price, item.full) == ("B", 1, "no")


def test_next_text_column_counts(tmp_path):
    """Where one is blank, NaN or a list; lists of texts are joined if there is nothing else."""
    summaries = ["s", " ", math.nan, None, ["x"], "null"]
    rows = [
        {"title": f"T{i}", "summary": summary, "body": f"b{i}", "price": 1}
        for i, summary in enumerate(summaries)
    ]
    rows.append({"title": "L", "summary": [], "body": ["One.", "Two."], "price": 1})
    items, _ = read_catalogue(write_lines(tmp_path / "own.jsonl", *rows))
    assert [item.full for item in items] == ["s", "b1", "b2", "b3", "b4", "b5", "One.\nTwo."]


def test_lists_of_categories_become_paths(tmp_path):
    rows = [
        {"title": f"T{i}", "categories": value, "text": "x", "price": 1}
        for i, value in enumerate((["Home", "Kitchen"], [["A", "B"], ["C"]], "One", [], None))
    ]
    items, _ = read_catalogue(write_lines(tmp_path / "own.jsonl", *rows))
    assert [item.category for item in items] == ["Home > Kitchen", "A > B", "One", "", ""]


# Prices


@pytest.mark.parametrize(
    "text, by_point, by_comma",
    [
        ("12", 12, 12),
        ("12.99", 12.99, None),
        ("12,99", None, 12.99),
        ("1,234", 1234, 1.234),
        ("1.234,50", None, 1234.5),
        ("1,234.50", 1234.5, None),
        ("1 234,50 €", None, 1234.5),
        ("1\u202f234.50\u00a0€", 1234.5, None),
        ("CHF 1'234.–", 1234, 1234),
        ("US$ 1,23,456.78", 123456.78, None),
        ("$12 CAD", 12, 12),
        ("-3.50 zł", -3.5, None),
        (".5", 0.5, None),
        ("0,125", None, 0.125),
        ("1,2,3", None, None),
        ("1,234.567,8", None, None),
        ("12 34", None, None),
        ("1e3", None, None),
        ("$12 €", None, None),
        ("12.99 - 15.99", None, None),
        ("٣", None, None),
    ],
)
def test_price_by_both_conventions(text, by_point, by_comma):
    for decimal, expected in ((".", by_point), (",", by_comma)):
        found = parse_price(text, decimal)
        assert math.isnan(found) if expected is None else found == expected


def read_column(texts):
    survey = PriceSurvey()
    for text in texts:
        survey.add(text)
    price_format = survey.result()
    return [price_format.read(text)[0] for text in texts]


def test_the_whole_column_decides():
    assert read_column(["1,234", "5"]) == [None, 5]
    assert read_column(["1,234", "5.5"]) == [1234, 5.5]
    assert read_column(["1.234", "5,5"]) == [1234, 5.5]
    assert read_column(["1,234", "5,5"]) == [None, 5.5]
    assert read_column(["1,234", "0,125"]) == [1.234, 0.125]
    assert read_column(["1,234", "5,5", "5.5"]) == [None, None, None]
    assert read_column(["1,234", "5,5", "5.5", "6.5"]) == [None, None, 5.5, 6.5]


def written(cents, decimal, thousands, places, sign, before):
    """An amount as a shop writes it."""
    whole, rest = divmod(cents, 100)
    text = f"{whole:,}".replace(",", thousands)
    if places:
        text += f"{decimal}{rest:02}"[: places + 1]
    return f"{sign}{text}" if before else f"{text}{sign}"


STYLES = [  # the decimal sign and the one between thousands
    *((".", sign) for sign in (",", " ", "'", "\u202f", "")),
    *((",", sign) for sign in (".", " ", "’", "\u00a0", "")),
]
CENTS = st.lists(st.integers(50, 10**9), min_size=1, max_size=20)


@given(
    CENTS,
    st.sampled_from(STYLES),
    st.sampled_from([0, 1, 2]),
    st.sampled_from(["", "$", "€ ", " EUR", "kr", "US$ ", " zł"]),
    st.booleans(),
)
@settings(deadline=None, max_examples=300)
def test_prices_are_right_or_dropped(cents, style, places, sign, before):
    """Whatever a column's style is, no price is read as another number."""
    texts = [written(amount, *style, places, sign, before) for amount in cents]
    expected = [amount // 10 ** (2 - places) / 10**places for amount in cents]
    found = read_column(texts)
    for price, right in zip(found, expected, strict=True):
        assert price is None or price == right
    if places:
        assert found == expected


@given(CENTS, st.lists(st.tuples(st.sampled_from(STYLES), st.sampled_from([0, 2])), min_size=20))
@settings(deadline=None, max_examples=300)
def test_mixed_styles_are_right_or_dropped(cents, styles):
    """Each price in a style of its own: what could be another number is dropped."""
    texts = []
    for amount, (style, places) in zip(cents, styles, strict=False):
        texts.append(written(amount, *style, places, "", True))
    found = read_column(texts)
    for text, price, amount, (_, places) in zip(texts, found, cents, styles, strict=False):
        right = amount / 100 if places else amount // 100
        assert price is None or price == right, text


PIECES = [
    "$",
    "€",
    "kr",
    "İNR",
    "USD",
    "US$",
    "Fr.",
    " ",
    "\u00a0",
    "-",
    "–",
    ".",
    ",",
    "'",
    "from",
]


@given(st.lists(st.sampled_from([*PIECES, *"0123456789"]), max_size=12).map("".join) | st.text())
@example("9007199254740993")  # which no float is
@settings(deadline=None, max_examples=500)
def test_a_price_has_all_its_digits(text):
    """Whatever the text is: the number has its digits and no other, or there is none."""
    for decimal in ".,":
        price = parse_price(text, decimal)
        assert not math.isinf(price)
        if not math.isnan(price):
            digits = "".join(sign for sign in text if sign in "0123456789")
            found = format(Decimal(repr(price)), "f")
            found = "".join(sign for sign in found if sign in "0123456789")
            assert digits.strip("0") == found.strip("0")


CELLS = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]) | st.sampled_from('\n",;\t|'),
    min_size=1,
    max_size=20,
)


@given(
    st.lists(st.tuples(CELLS, st.integers(50, 99949), CELLS), min_size=1, max_size=8),
    st.sampled_from(",;\t|"),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.booleans(),
    st.booleans(),
)
@settings(deadline=None, max_examples=200)
def test_csv_dialects_are_right_or_dropped(
    tmp_path_factory, rows, delimiter, line_end, quoting, has_sep, has_comma
):
    """Each row is kept with its own title, price and text, or dropped, by its line."""
    text = io.StringIO(newline="")
    if has_sep:
        text.write(f"sep={delimiter}{line_end}")
    writer = csv.writer(text, delimiter=delimiter, lineterminator=line_end, quoting=quoting)
    writer.writerow(["Item", "Amount", "Details"])
    expected = {}
    for title, cents, details in rows:
        line = len(text.getvalue().split("\n"))
        price = f"{cents / 100:.2f}"
        writer.writerow([title, price.replace(".", ",") if has_comma else price, details])
        expected[line] = (title, cents / 100, details)
    path = tmp_path_factory.mktemp("csv") / "own.csv"
    path.write_bytes(text.getvalue().encode())
    try:
        items, dropped = read_catalogue(path)
    except UserError as error:
        assert "none of" in str(error)
        return
    lines = [item.id for item in items] + [line for lines in dropped.values() for line in lines]
    assert sorted(lines) == sorted(expected)
    for item in items:
        title, price, _ = expected[item.id]
        assert item.price == price
        assert item.title == clean_text(title, Counter()).replace("\n", " ")


# Texts


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<p>One</p>\n<p class='x'>Two &amp; <b>bold</b>ly</p>", "One\nTwo & boldly"),
        ("A<br/>B<BR>C&nbsp;D", "A\nB\nC D"),
        ("&lt;p&gt;From a feed&lt;/p&gt;", "From a feed"),
        ("<style>p {color: red}</style>x<!-- no\n<b> -->y", "xy"),
        ("size <5 and >3, a <b and c> d", "size <5 and >3, a <b and c> d"),
        ("R&D, AT&T, a&copy, &unknown;", "R&D, AT&T, a&copy, &unknown;"),
        ("12&#34; x &#x41;", '12" x A'),
        ("  a \t b\r\n\r\n  c\u00a0\u2009d ", "a b\nc d"),
    ],
)
def test_html_becomes_text(text, expected):
    changes = Counter()
    assert clean_text(text, changes) == expected
    assert bool(changes) == (text != expected)
    assert clean_text(expected, Counter()) == expected


@given(st.text(max_size=60))
@settings(deadline=None)
def test_folding_keeps_every_word(text):
    folded = fold_space(text)
    assert folded.split() == text.split()
    assert fold_space(folded) == folded


def test_plain_text_stays_as_it_is():
    assert html_to_text("1 < 2 & 3 > 2; <unknown> & co;") == "1 < 2 & 3 > 2; <unknown> & co;"


@pytest.mark.parametrize(
    "title, text, expected",
    [
        ("Pan", "Panasonic microwave", "Panasonic microwave"),
        ("Pan", "Pan with a lid", "with a lid"),
        ("Pan", "Pan - with a lid", "with a lid"),
        ("Pan", "Pan: with a lid", "with a lid"),
        ("Pan", "Pan\nwith a lid", "with a lid"),
        ("Pan", "Pan", ""),
        ("Freezer", "Freezer -5 degrees", "-5 degrees"),
        ("Pan", "Pan's lid", "Pan's lid"),
        ("T", "T-shirt", "T-shirt"),
        ("12", "12.5 V", "12.5 V"),
        ("Sony α", "Sony α7", "Sony α7"),
    ],
)
def test_titles_are_cut_at_word_ends(title, text, expected):
    assert cut_title(text, title) == expected


# Splits


def test_equal_descriptions_share_a_split(tmp_path):
    """As equal titles do, and what is connected through others; capitals and spaces don't count."""
    rows = []
    for i in range(60):  # three rows a text, of two of which the titles connect it to the next
        title = f"Title {i // 3 if i % 3 else 100 + i}"
        text = f"text  {(i + i // 30) // 3}"
        rows.append({"title": title, "text": text.upper() if i % 2 else text, "price": i + 1})
    items, _ = read_catalogue(write_lines(tmp_path / "own.jsonl", *rows))
    parts = split_by_title(items, seed=1)
    assert sum(len(part) for part in parts) == 60
    for keys in (
        [{item.title.lower() for item in part} for part in parts],
        [{" ".join(item.full.lower().split()) for item in part} for part in parts],
        [{item.summary.split("\nDescription: ")[1].lower() for item in part} for part in parts],
    ):
        assert keys[0].isdisjoint(keys[1] | keys[2])
        assert keys[1].isdisjoint(keys[2])


def test_large_group_goes_to_train():
    """A description that most rows share must not fill the small splits."""
    items = [
        Item(title=f"T{i}", category="", price=1, full="see photo", summary="x") for i in range(90)
    ]
    items += [
        Item(title=f"S{i}", category="", price=1, full=f"own {i}", summary=f"{i}")
        for i in range(10)
    ]
    train, val, test = split_by_title(items, seed=3)
    assert (len(train), len(val), len(test)) == (90, 5, 5)


def prompts_of(**splits):
    return DatasetDict(
        {
            name: Dataset.from_dict({"prompt": [prompt_of(text) for text in texts]})
            for name, texts in splits.items()
        }
    )


def test_near_duplicates_are_counted():
    """A test row of 24 words has 20 runs of five words: 16 of them in one row are near."""
    words = [f"w{i}" for i in range(24)]
    near = " ".join(["other", *words[4:]])
    less = " ".join([*words[:19], "other"])
    halves = [" ".join(words[:12]), " ".join(words[8:])]
    test = [" ".join(words).upper(), "short one", "another text"]
    assert count_near_duplicates(prompts_of(train=[near, "x"], test=test)) == {
        "compared": 3,
        "near": 1,
    }
    for train in ([less], halves):
        assert count_near_duplicates(prompts_of(train=train, test=test))["near"] == 0
    assert count_near_duplicates(prompts_of(train=["Short  one."], test=test))["near"] == 1


WORDS = st.lists(st.sampled_from("abc"), min_size=1, max_size=12).map(" ".join)


@given(st.lists(WORDS, min_size=1, max_size=6), st.lists(WORDS, min_size=1, max_size=6))
@settings(deadline=None, max_examples=60)
def test_near_duplicates_are_found_exactly(train, test):
    """As by comparing every pair."""
    near = 0
    for text in test:
        grams = word_grams(text)
        shares = [len(grams & word_grams(other)) / len(grams) for other in train]
        near += max(shares) >= 0.8
    assert count_near_duplicates(prompts_of(train=train, test=test))["near"] == near


# Scale


def test_items_are_read_one_by_one(tmp_path):
    """Not all at once, for which a million has no room."""
    rows = [{"title": f"T{i}", "text": f"text {i}", "price": 1} for i in range(100)]
    catalogue = OwnCatalogue(write_lines(tmp_path / "own.jsonl", *rows))
    items = catalogue.items()
    assert next(items).title == "T0"
    assert len(catalogue.seen) == 1
