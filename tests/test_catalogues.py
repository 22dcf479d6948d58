"""People's own catalogues: files, columns, prices and texts as shops write them; no leaks."""

import csv
import json
import math
import time

import pandas
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

import items
from items import Item, UserError, clean_text, parse_price, prompt_of, split_by_title

SUMMARY = (
    "Title: Walnut desk\nCategory: Furniture\nBrand:  <b>C</b>\n\nDescription: x   y &lt; z\n"
    "Details: 48 inches"
)


def read_items(path, columns=None, earlier=None, decimal=None):
    """{line: (price, summary) of a usable row, or why it was dropped}."""
    own = items.read_own(path, items.file_rows(path), decimal, columns or {}, earlier or {})
    found = {}
    for row in items.usable_rows(own, items.COURSE_SCALE):
        found[own.lines[row]] = (own.prices[row].amount, own.items[row]["summary"])
    for reason, lines in own.dropped.items():
        found |= dict.fromkeys(lines, reason)
    return found


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# A file with every oddity

ODD_ROWS = (  # the first line of the row, as an editor shows it; its cells; what becomes of it
    (2, ("Lamp", "1.234,50 kr", "x"), "price has another currency or word beside it than €"),
    (3, ("Sofa", "€ 912,50", "<p>Red &amp; soft</p><p>Oak</p>"), (912.5, "Red & soft\nOak")),
    (4, ("Pan", "19,99 &euro;", "Panasonic   microwave"), (19.99, "Panasonic microwave")),
    (5, ("Tea pot", "12,-", "Tea pot, blue"), (12.0, "blue")),
    (6, ("Cup", "$5 / 4€", "x"), "price is no single amount"),
    (7, ("Jug", "1,234", "x"), "price is ambiguous"),
    (8, ("Desk", "1.234,50 €", "x"), "price is outside $0.50–$999.49"),
    (9, ("Two\nlines", "€ 8", "a\n\n\nb"), (8.0, "a\nb")),
    (14, ("Tin", "3", "<br>"), "Body (HTML) is empty or not text"),
    (15, ("Zinc", "3", "x", "more"), "more cells than the header has"),
    (16, ("PAN", "19,99", "Panasonic microwave"), "duplicate of an earlier row"),
)


def test_odd_file_gives_exact_rows(tmp_path):
    """Each row is kept with its price and description, or dropped for its reason, by its line."""
    path = tmp_path / "odd.csv"
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["NAME", "Cost", "Body (HTML)"])
        writer.writerows(cells for _, cells, _ in ODD_ROWS)
    found = read_items(path)
    assert sorted(found) == [line for line, _, _ in ODD_ROWS]
    for line, _, expected in ODD_ROWS:
        if isinstance(expected, str):
            assert found[line].startswith(expected)
        else:
            price, text = expected
            assert found[line][0] == price
            assert found[line][1].endswith(f"Description: {text}")


def test_what_was_made_is_said(tmp_path):
    """Columns, decimal sign, unit, and the other currency that the prices have."""
    rows = [{"NAME": f"T{i}", "Cost": f"{i},50 €", "Body (HTML)": f"{i}"} for i in range(1, 6)]
    catalogue = items.own_catalogue(write_lines(tmp_path / "own.jsonl", *rows), seed=1)
    assert catalogue.notes == [
        "Columns: title from NAME, price from Cost, text from Body (HTML), no category",
        "Price: Cost may not be what customers pay; `columns` price=NAME chooses",
        "Prices: 1.234 and 1,234 are read with `,` as the decimal sign",
        "Unit: $0.01, for prices up to $9.99",
        "Currency: the prices are in €, the prompts say $; `currency` € makes them say €",
    ]
    assert catalogue.about["columns"]["title"] == "NAME"
    assert catalogue.about["columns"]["text"] == ["Body (HTML)"]


def test_course_texts_stay_whole(tmp_path):
    """Letter by letter, with whatever stands in them; others get the course's form."""
    rows = [
        {"title": " Desk", "category": "c", "summary": SUMMARY, "price": 7.0},
        {"title": "Desk", "category": ["c", "d"], "summary": "Walnut", "price": 2},
    ]
    found = read_items(write_lines(tmp_path / "own.jsonl", *rows))
    assert [text for _, text in found.values()] == [
        SUMMARY,
        "Title: Desk\nCategory: c > d\nDescription: Walnut",
    ]


# Files

ROWS = [
    {"title": f"T{i}", "price": f"{i}.25", "text": f"text, {i}", "category": "C"}
    for i in range(1, 6)
]


@pytest.mark.parametrize(
    "ending, separator",
    [
        *(("csv", separator) for separator in ",;|\t"),
        *(("tsv", "\t"), ("jsonl", None), ("json", None), ("parquet", None)),
    ],
)
def test_every_format_reads_alike(tmp_path, ending, separator):
    path = tmp_path / f"own.{ending}"
    if separator:
        pandas.DataFrame(ROWS).to_csv(path, sep=separator, index=False, lineterminator="\r\n")
    elif ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif ending == "jsonl":
        write_lines(path, *ROWS)
    else:
        path.write_text(json.dumps(ROWS, indent=1))
    assert list(read_items(path).values()) == [
        (i + 0.25, f"Title: T{i}\nCategory: C\nDescription: text, {i}") for i in range(1, 6)
    ]


@pytest.mark.parametrize("content", [{"a": {"total": 5, "items": ROWS}}, dict(enumerate(ROWS))])
def test_rows_within_an_object_are_read(tmp_path, content):
    """Under a key, or each under its own."""
    path = tmp_path / "own.json"
    path.write_text(json.dumps(content, indent=1))
    assert [price for price, _ in read_items(path).values()] == [1.25, 2.25, 3.25, 4.25, 5.25]


BAD_ROWS = [  # from line 2 on
    ('{"title": "B", "text": "b"}', "price is missing"),
    ('{"title": "B", "text": "b", "price": 0}', "price is zero or negative"),
    ('{"title": "B", "text": "b", "price": true}', "price is no single amount"),
    ('{"title": "B", "text": "nan", "price": 3}', "text is empty or not text"),
    ('{"title": "N/A", "text": "b", "price": 3}', "title is empty or not text"),
    ('{"title": "B", "text": "<p>None</p>", "price": 3}', "text is empty or not text"),
    ('"B"', "not a JSON object"),
    (f'{{"title": "B", "text": "b", "price": 1{"0" * 400}}}', "price is no single amount"),
    ('{"title": "B \\ud800", "text": "b", "price": 3}', "title has an incomplete character"),
]


def test_bad_rows_are_named_by_line(tmp_path):
    """They are dropped, each reason with its lines; the rows beside them are kept."""
    first = '{"title": "A", "text": "a", "price": 1.5}'
    last = ["", '{"title": "Y", "text": "y", "price": 999.49}']
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join([first, *(line for line, _ in BAD_ROWS), *last]))
    found = read_items(path)
    assert (found.pop(1)[0], found.pop(len(BAD_ROWS) + 3)[0]) == (1.5, 999.49)
    assert found == {line: reason for line, (_, reason) in enumerate(BAD_ROWS, 2)}


def test_quotes_in_tsv_enclose_cells(tmp_path):
    """Else they are letters: one at a cell's start would join rows."""
    path = tmp_path / "own.tsv"
    path.write_text('title\ttext\tprice\n"24"" TV"\t"Flat\nand wide"\t120.00\n')
    assert read_items(path) == {2: (120, 'Title: 24" TV\nDescription: Flat\nand wide')}
    for brand in ("Brass", '"Brass" is hard'):
        path.write_text(f'title\ttext\tprice\n"The lamp\t{brand}\t19.99\nTV 24"\tFlat\t120.00\n')
        assert read_items(path) == {
            2: (19.99, f'Title: "The lamp\nDescription: {brand}'),
            3: (120, 'Title: TV 24"\nDescription: Flat'),
        }


def test_windows_1252_is_read(tmp_path, capsys):
    path = tmp_path / "own.csv"
    path.write_text("title,price,text\nMöbel,1,„weiß“\n", "cp1252")
    assert read_items(path) == {2: (1, "Title: Möbel\nDescription: „weiß“")}
    assert f"{path} isn't UTF-8, and is read as Windows-1252" in capsys.readouterr().out


QUESTION = (
    "Price A (1, 5) or Price B (2, 4)? Say which is the price by `columns`, like 'price=Price A'"
)


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("own.jsonl", b'{"title": "A", "text": "a"}', "no column for price; found: title, text."),
        ("own.csv", b"title,price,text\n", "none of its rows is usable; there are none"),
        ("own.json", b"5", "none of its rows is usable; 1 × not a JSON object"),
        ("own.json", b"{}", "no column for title and price and text"),
        (
            "own.json",
            b'{"a": [{"title": 1}], "b": [{"x": 1}]}',
            "has several lists: a, b. Keep only",
        ),
        ("own.json", b"[1, 2]", "none of its rows is usable; 2 × not a JSON object"),
        ("own.json", b'[{"title": "A"},\n{"title": "B" "text"}]', "line 2 is no JSON: Expecting"),
        ("own.json", b'[{"title": "A"}\n]\n[{"title": "B"}]', "line 3 is no JSON: Extra data"),
        ("own.jsonl", b'{"title": "A"}\n{"title": "B"\n{}', "line 2 is no JSON: Expecting"),
        ("own.parquet", b"no parquet", "can't be read: "),
        ("own.csv", b"title,price,text\na,1,\xc3\xa9\n\xff\xfe,1,2", "not in UTF-8"),
        ("own.csv", "title,price,text\na,1,b".encode("utf-16"), "is text in UTF-16. Save"),
        (
            "own.csv",
            b"\nStock of May;;\nTitle;Price;Text",
            "line 2, Stock of May, has one cell, so",
        ),
        (
            "own.csv",
            b'title,price,text\nA,1,"a\n\nb" c\n',
            "(line 4, in the row that begins in line 2). Close each quote",
        ),
        ("own.csv", b"title,price,price,text\na,1,2,b\n", "more than one column is called price"),
        ("own.csv", b"title,price,text,,\nPan,19,99,Steel pan,,\n", "more cells than the header"),
        ("own.csv", b"title,Price A,Price B,text\na,1,2,b\nc,,4,d\ne,5,6,d", QUESTION),
        (
            "own.csv",
            b"SKU;Bezeichnung;Info;Preis brutto\n1;Ein Tisch;Aus Eiche und Glas;9,50",
            "like title=Bezeichnung 'price=Preis brutto' text=Info.",
        ),
        ("https://x.org/own.csv", None, "is an address. Download the file"),
        (
            "own.csv",
            b"title,price,text\na,1,b\nc,2,d\n",
            "differ in title and description: 2; 3 are needed.",
        ),
        ("own.xlsx", b"", "Save it as `CSV UTF-8`"),
        ("own.csv", b"PK\x03\x04", "is an Excel workbook or a ZIP archive"),
        ("own.csv", b"\n<!doctype html>", "is a web page or XML"),
        ("own.json", b"version https://git-lfs.github.com/spec/v1", "is a pointer of Git LFS"),
        ("missing.csv", None, "can't be read: No such file"),
    ],
)
def test_bad_file_is_one_line(tmp_path, name, content, expected):
    """A file of no use is named and explained in one line."""
    path = name if "://" in name else tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        items.own_catalogue(path, seed=1)
    text = str(error.value)
    assert text.startswith(f"{path}: ")
    assert expected in text
    assert "\n" not in text


# Columns


def test_chosen_columns_are_read(tmp_path):
    row = {"Name": "A", "title": "no", "Cost": 2, "price": 1, "Item description": "a", "text": "no"}
    path = write_lines(tmp_path / "own.jsonl", row)
    chosen = {"title": ["Name"], "price": ["cost"], "text": ["Item description"]}
    assert read_items(path, chosen) == {1: (2, "Title: A\nDescription: a")}
    with pytest.raises(UserError, match="no column for Nmae; found: Name, title, Cost"):
        read_items(path, {"title": ["Nmae"]})


def test_earlier_columns_are_known(tmp_path):
    """Where the file has them; what is chosen goes before."""
    row = {"Artikel": "A", "title": "B", "Betrag": "2", "price": 1, "summary": "no", "Lang": "long"}
    path = write_lines(tmp_path / "own.jsonl", row)
    earlier = {"title": "Artikel", "price": "Betrag", "text": ["Lang"], "category": []}
    assert read_items(path, earlier=earlier) == {1: (2, "Title: A\nDescription: long")}
    found = read_items(path, {"title": ["title"]}, earlier)
    assert found == {1: (2, "Title: B\nDescription: long")}
    earlier = {"title": "Titel", "price": None, "text": ["Kurz"], "category": []}
    assert read_items(path, earlier=earlier) == {1: (1, "Title: B\nDescription: no")}


EXPORTS = [  # columns of shops' programs, and the price; None where only the shop knows
    ("Title,Variant Price,Variant Compare At Price,Cost per item,Price / International", 1),
    ("Title,Price,Compare-at price,Cost per item,Unit price base measure", 1),
    ("Name,Date sale price starts,Low stock amount,Sale price,Regular price", 4),
    ("name,cost,special_price,special_price_from_date,map_price,msrp_price,price", 6),
    ("*Title,*StartPrice,BuyItNowPrice,ShippingService-1:Cost", None),
    ("Title,Start price,Auction Buy It Now price,Reserve price,Current price", 4),
    ("Product Name,Price,Cost Price,Retail Price,Sale Price,Fixed Shipping Cost", None),
    ("Item,Default Cost,MSRP - Price,Default - Price,Online - Price", 3),
    ("item_name,standard_price,list_price,sale_price,sale_from_date", None),
    ("name,price_net,price_gross,purchase_prices_net,purchase_prices_gross", 2),
    ("Name *,Wholesale price,Price tax excluded,Price tax included,Discount amount", 3),
    ("product_name,product_cost_price,product_compare_to_price,product_price", 3),
    ("Name,Purchase Cost,Sales Price / Rate", 2),
    ("name,Amount,Unit Price,priceCurrency,MSRP", 2),
    ("name,MSRP,Compare at price", None),
]


@pytest.mark.parametrize("header, column", EXPORTS)
def test_customers_price_is_chosen(header, column):
    """Or which it is is asked."""
    names = [*header.split(","), "text"]
    rows = [{name: f"{i}.50" for i, name in enumerate(names, 1)}]
    if column is None:
        with pytest.raises(UserError, match="Say which is the price by `columns`, like"):
            items.find_columns("own.csv", names, {}, rows=rows)
    else:
        found = items.find_columns("own.csv", names, {}, rows=rows)
        assert found["price"] == names[column]


@pytest.mark.parametrize(
    "names, chosen, role, expected",
    [
        (["name", "Price ($)", "Price (€)"], {"price": ["Price (€)"]}, "price", "Price (€)"),
        (["Product", "Item", "Price"], {"category": ["Product"]}, "title", "Item"),
    ],
)
def test_chosen_columns_have_one_role(names, chosen, role, expected):
    assert items.find_columns("own.csv", [*names, "text"], chosen)[role] == expected


@pytest.mark.parametrize(
    "cells, text",
    [
        ({"summary": "s", "body": "b"}, "s"),
        *(({"summary": cell, "body": "b"}, "b") for cell in (" ", math.nan, None, "null", "[]")),
        *(({"summary": cell, "body": "b"}, "b") for cell in (["x"], "['a', 'b']")),
        ({"summary": [], "body": ["One.", "Two."]}, "One.\nTwo."),
        ({"summary": "['A', 'B']", "body": None}, "A\nB"),
        ({}, ""),
    ],
)
def test_next_text_column_counts(cells, text):
    """Where one is blank or a list; lists of texts are joined if there is nothing else."""
    assert items.text_of(cells, ["summary", "body"]) == text


# Prices


@pytest.mark.parametrize(
    "text, amount, decimal",
    [
        ("12", 12, ""),
        ("1.234,50", 1234.5, ","),
        ("1\u202f234.50\u00a0€", 1234.5, "."),
        ("CHF 1'234.–", 1234, "."),
        ("1.299,-", 1299, ","),
        ("US $ 1,29,999", 129999, "."),
        ("Rs.999/-", 999, ""),
        ("￥5,500.5", 5500.5, "."),
        ("&pound;12.50&nbsp;", 12.5, "."),
        ("19.989999999999998", 19.989999999999998, "."),
        ("1e+05", 100000, "."),
        ("１２９９．５０円", 1299.5, "."),
        ("-3.50 zł", None, ""),
        ("$.50", 0.5, "."),
        ("0,125", 0.125, ","),
        ("from $9.99", None, ""),
        ("99¢", None, ""),
        ("12<sup>99</sup>", None, ""),
        ("1,234.567,8", None, ""),
        ("19⁹⁹", None, ""),
        ("٣", None, ""),
    ],
)
def test_price_is_read(text, amount, decimal):
    found = parse_price(text)
    assert bool(found.problem) == (amount is None)
    assert not found.is_open
    if amount is not None:
        assert (found.amount, found.decimal) == (amount, decimal)


def read_column(cells, decimal=None):
    """The amounts of a column of prices, None where there is none."""
    read, _, _ = items.read_prices([parse_price(cell) for cell in cells], decimal)
    return [None if price.problem else price.amount for price in read]


@pytest.mark.parametrize(
    "cells, decimal, expected",
    [
        (["1,234", "5"], None, [None, 5]),
        (["1,234", "5"], ".", [1234, 5]),
        (["1,234", "5"], ",", [1.234, 5]),
        (["1,234", "5.5"], None, [1234, 5.5]),
        (["1.299", "5,5"], None, [1299, 5.5]),
        (["1.299", "19.99"], None, [None, 19.99]),
        (["19.990", "1250.000"], None, [None, 1250]),
        (["19.990", "5.500"], None, [None, None]),
        (["¥19,990", "¥5,500"], None, [19990, 5500]),
        (["KWD 19.990", "KWD 5.500"], None, [None, None]),
        (["1,234", "5,5", "5.5"], None, [None, 5.5, 5.5]),
        (["19,99 €", "1.299 €", "$49.99", "5"], None, [19.99, 1299, None, 5]),
        (["5 €", "EUR 7", "9 Euro", "$4"], None, [5, 7, 9, None]),
        (["12 грн", "5 грн", "7 each"], None, [12, 5, None]),
        (["12", "5", "7 each"], None, [12, 5, None]),
        (["12", "5", "7 €"], None, [12, 5, 7]),
    ],
)
def test_the_whole_column_decides(cells, decimal, expected):
    """On thousands or decimals, and on the currency, of which no other sign or word counts."""
    assert read_column(cells, decimal) == expected


def test_sale_prices_fill_gaps(tmp_path):
    """Row by row; what is not read is named, and so is a price that customers may not pay."""
    rows = [
        {"name": "A", "text": "a", "Regular price": "", "Sale price": "5", "Cost": "1"},
        {"name": "B", "text": "b", "Regular price": "9", "Sale price": "7", "Cost": "1"},
    ]
    path = write_lines(tmp_path / "own.jsonl", *rows)
    own = items.read_own(path, items.file_rows(path), None, {})
    assert [price.amount for price in own.prices] == [5, 9]
    said = "price from Regular price, if that is empty from Sale price, text from text, no category"
    assert f"{said}; not Cost, less likely" in own.notes[0]
    write_lines(path, {"name": "A", "text": "a", "Cost": "1"})
    own = items.read_own(path, items.file_rows(path), None, {})
    assert own.notes[1].startswith("Price: Cost may not be what customers pay")


def test_spreadsheets_run_nothing(tmp_path):
    path = tmp_path / "priced.csv"
    items.write_table(path, [{"title": "=1+1", "guess": -3.5}])
    assert path.read_text() == "title,guess\n'=1+1,-3.5\n"


def test_a_column_names_the_currency(tmp_path):
    rows = [
        {"title": "T", "text": f"{i}", "price": "12.50", "Currency code": code}
        for i, code in enumerate(("EUR", "usd", "eur"))
    ]
    found = read_items(write_lines(tmp_path / "own.jsonl", *rows))
    assert found[2] == "price has another currency or word beside it than EUR"
    assert found[1][0] == found[3][0] == 12.5


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
    st.sampled_from(["", "$", "€ ", " EUR", "kr", "US$ ", " zł", "Rs."]),
    st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_prices_are_right_or_dropped(cents, style, places, sign, before):
    """Whatever a column's style is, no price is read as another number."""
    texts = [written(amount, *style, places, sign, before) for amount in cents]
    expected = [amount // 10 ** (2 - places) / 10**places for amount in cents]
    found = read_column(texts)
    for price, right in zip(found, expected, strict=True):
        assert price is None or price == right
    if places and sign != " ":
        assert found == expected


@given(CENTS, st.lists(st.tuples(st.sampled_from(STYLES), st.sampled_from([0, 2])), min_size=20))
@settings(deadline=None, max_examples=100)
def test_mixed_styles_are_right_or_dropped(cents, styles):
    """Each price in a style of its own: what could be another number is dropped."""
    texts = []
    for amount, (style, places) in zip(cents, styles, strict=False):
        texts.append(written(amount, *style, places, "", True))
    found = read_column(texts)
    for text, price, amount, (_, places) in zip(texts, found, cents, styles, strict=False):
        right = amount / 100 if places else amount // 100
        assert price is None or price == right, text


PARTS = ["<", "<!--", "<a ", '<a "', "</", "<![CDATA[", "<script>", "</style ", "&", "&#", "['"]


@given(
    st.lists(st.sampled_from([*PARTS, "[", "\\n", ".", ",", " ", "1", "é"]), min_size=1, max_size=4)
)
@settings(deadline=None, max_examples=200)
def test_no_cell_takes_long(parts):
    """However its text repeats itself; the best of three times."""
    text = ("".join(parts) * 2000)[:2000]
    times = []
    for _ in range(3):
        parse_price.cache_clear()
        start = time.perf_counter()
        parse_price(text)
        clean_text(items.text_of({"text": text}, ["text"]))
        items.cut_title(text, text[:50])
        times.append(time.perf_counter() - start)
    assert min(times) < 0.005


CELLS = st.lists(st.text("ab \"'<\n;,\\", max_size=8), min_size=3, max_size=3)


@given(st.lists(CELLS, max_size=20), st.sampled_from(sorted(items.READERS)), st.booleans())
@settings(deadline=None, max_examples=200)
def test_each_row_is_kept_or_dropped(tmp_path_factory, cells, ending, within):
    """In every format, as an array or `within` an object; each is counted once, at its own line."""
    path = tmp_path_factory.mktemp("own") / f"own{ending}"
    rows = [dict(zip(("title", "price", "text"), row, strict=True)) for row in cells]
    rows += [{"title": "A", "price": "1", "text": "b"}] * 2
    if ending in (".csv", ".tsv"):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if ending == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif ending == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif ending == ".json":
        path.write_text(json.dumps(dict(enumerate(rows)) if within else rows))
    else:
        write_lines(path, *rows)
    assert len(read_items(path)) == len(rows)


# Texts


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<p>One</p>\n<p class='x'>Two &amp; <b>bold</b>ly</p>", "One\nTwo & boldly"),
        ("A<br/>B<BR>C&nbsp;D<input disabled>", "A\nB\nC D"),
        ("&lt;p&gt;From a feed&lt;/p&gt;", "From a feed"),
        ("<style>p {color: red}</style>x<!-- no\n<b> -->y", "xy"),
        ("<p>Red <o:p></o:p></p><my-tag x=1>oak", "Red\noak"),
        ("<![CDATA[<p>Soft</p>]]>", "Soft"),
        ("Soft\\nand\\r\\nwarm", "Soft\nand\nwarm"),
        ("size <5 and >3", "size <5 and >3"),
        ("1 < 2 & 3 > 2; & co;", "1 < 2 & 3 > 2; & co;"),
        ("R&D, AT&T, a&copy, &unknown;", "R&D, AT&T, a&copy, &unknown;"),
        ("  a \t b\r\n\r\n  c\u00a0\u2009d ", "a b\nc d"),
    ],
)
def test_html_becomes_text(text, expected):
    assert clean_text(text) == expected
    assert clean_text(expected) == expected


@pytest.mark.parametrize(
    "title, text, expected",
    [
        ("Pan", "Panasonic microwave", "Panasonic microwave"),
        ("Pan", "Pan with a lid", "with a lid"),
        ("Pan", "Pan: with a lid", "with a lid"),
        ("Pan", "Pan\nwith a lid", "with a lid"),
        ("Pan", "Pan", ""),
        ("Freezer", "Freezer -5 degrees", "-5 degrees"),
        ("Pan", "Pan's lid", "Pan's lid"),
        ("12", "12.5 V", "12.5 V"),
    ],
)
def test_titles_are_cut_at_word_ends(title, text, expected):
    assert items.cut_title(text, title) == expected


# Splits


def named(titles, text="Title: {}"):
    """Items with these titles."""
    return [Item(title=t, category="", price=1.0, summary=text.format(t)) for t in titles]


def test_equal_descriptions_share_a_split(tmp_path):
    """And what is connected through others: three rows a text, two of whose titles connect it."""
    rows = []
    for i in range(60):
        title = f"Title {i // 3 if i % 3 else 100 + i}"
        text = f"text  {(i + i // 30) // 3}"
        rows.append({"title": title, "text": text.upper() if i % 2 else text, "price": i + 1})
    path = write_lines(tmp_path / "own.jsonl", *rows)
    splits = items.own_catalogue(path, seed=1).splits
    assert sum(len(split) for split in splits.values()) == 60
    for part in (0, 1):  # titles, descriptions
        train, val, test = (
            {row["summary"].lower().split("\n")[part] for row in splits[name]}
            for name in items.SPLITS
        )
        assert train.isdisjoint(val | test)
        assert val.isdisjoint(test)


@pytest.mark.parametrize(
    "large, small, expected",
    [
        (1, 599, (540, 30, 30)),
        (90, 10, (90, 5, 5)),
        (98, 2, (98, 1, 1)),
        (1, 2, (1, 1, 1)),
    ],
)
def test_large_group_goes_to_train(large, small, expected):
    """A text that most rows share must not fill the small splits, which are never empty."""
    rows = named([f"T{i}" for i in range(large)], "x") + named([f"S{i}" for i in range(small)])
    parts = split_by_title(rows, seed=3)
    assert tuple(len(part) for part in parts) == expected
    assert split_by_title(rows, seed=3) == parts
    assert split_by_title(rows, seed=4) != parts


def prompts_of(**splits):
    found = DatasetDict()
    for name, texts in splits.items():
        found[name] = Dataset.from_dict({"prompt": [prompt_of(text) for text in texts]})
    return found


WORDS = st.lists(st.sampled_from("abc"), min_size=1, max_size=12).map(" ".join)


@given(st.lists(WORDS, min_size=1, max_size=6), st.lists(WORDS, min_size=1, max_size=6))
@settings(deadline=None, max_examples=60)
def test_near_duplicates_are_found_exactly(train, test):
    """As by comparing every pair; capitals don't count."""
    near = 0
    for text in test:
        grams = items.word_grams(text)
        shares = [len(grams & items.word_grams(other)) / len(grams) for other in train]
        near += max(shares) >= 0.8
    found = items.count_near_duplicates(prompts_of(train=train, test=map(str.upper, test)))
    assert found == {"compared": len(test), "near": near}


# Own items to price


@pytest.mark.parametrize(
    "prices, note",
    [
        ([None, None], "Prices: the file has none, so the guesses aren't scored"),
        (["5.00", None], "Not judged:\n  1 × price is missing (line 2)"),
        (["5.00", "-1"], "Not judged:\n  1 × price is no single amount (line 2)"),
        (
            ["5.00", "6.00"],
            "Columns: title from title, price from price, text from text, no category",
        ),
    ],
)
def test_notes_name_unscored_rows(tmp_path, smol_tokenizer, prices, note):
    rows = [{"title": "A", "text": f"a {price}", "price": price} for price in prices]
    path = write_lines(tmp_path / "own.jsonl", *rows)
    notes = items.own_rows(path, (), smol_tokenizer, {}).notes
    assert note in notes
    assert " 0 × " not in "\n".join(notes)


@pytest.mark.parametrize(
    "trained_on, completion",
    [({}, ""), ({"currency": "€"}, "5.0"), ({"written_currency": "EUR"}, "5.0")],
)
def test_other_currencies_are_not_judged(tmp_path, smol_tokenizer, trained_on, completion):
    """A code and a sign of one currency are the same."""
    row = {"title": "A", "text": "a", "price": "EUR 5.00"}
    path = write_lines(tmp_path / "own.jsonl", row)
    own = items.own_rows(path, (), smol_tokenizer, trained_on)
    assert own.rows[0]["completion"] == completion
    assert ("price is in EUR, the run's are in $ (line 1)" in own.notes[-1]) == (not completion)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252"])
def test_output_is_like_the_input(tmp_path, smol_tokenizer, encoding):
    """All its columns, rows, signs and letters; what spreadsheets would run is quoted."""
    content = 'Nr;Titel;Text;Preis;Rabatt\r\n7;Schöner Topf;=1+1;"1.299,50";-5\r\n8;;x;2,5;\r\n'
    path, out = tmp_path / "a.csv", tmp_path / "b.csv"
    path.write_bytes(content.encode(encoding))
    columns = {"title": "Titel", "price": "Preis"}
    own = items.own_rows(path, (), smol_tokenizer, {}, columns)
    own.write(out, [{"line": 2, "title": "Schöner Topf", "guess": 12.5, "price": 1299.5}])
    expected = content.replace("Rabatt", "Rabatt;guess").replace("=1", "'=1").replace('"', "")
    expected = expected.replace("-5", "-5;12,5").replace("2,5;", "2,5;;")
    assert out.read_bytes() == expected.encode(encoding)
    path.write_text("Titel;Text;Preis\na;b;\n")  # no price shows how spreadsheets write numbers
    items.own_rows(path, (), smol_tokenizer, {}, columns).write(out, [{"line": 2, "guess": 2.5}])
    assert out.read_text().endswith("a;b;;2,5\n")
    own.write(tmp_path / "b.jsonl", [{"line": 3, "guess": 1.5}])
    *_, last = (tmp_path / "b.jsonl").read_text("utf-8").splitlines()
    assert json.loads(last)["Nr"] == "8"
    assert json.loads(last)["guess"] == 1.5
