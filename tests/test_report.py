"""report.html in a real browser: Chromium, headless, where it is installed."""

import html
import json
import re
import shutil
import subprocess

import numpy
import pytest

import util
from app import RECIPES

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
in_browser = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
COUNT = 120
HOSTILE = '<script>window.hacked = 1</script> "it\'s" & <b>bold</b>'
LONG = "Wireless_headphones_without_any_space" * 4 + " and many more words" * 6
RUN_NAME = "a-run-with-a-long-name" * 4
SOURCE = "/home/secret/shop.csv, split 90/5/5 by title, seed 42"
# In a window of its own Chromium is at least 500 px wide
WRAPPER = """<iframe id="frame" style="width: {width}px; height: 900px; border: 0"
srcdoc="{page}"></iframe><pre id="found"></pre><script>
frame.onload = () => {{
  const view = frame.contentWindow;
  const page = frame.contentDocument;
  const found = ((page, view) => {{ {script} }})(page, view);
  document.getElementById("found").textContent = JSON.stringify(found);
}};
</script>"""
MEASURE = """
let smallest = 99;
let left = 0;
let right = 0;
for (const element of page.body.querySelectorAll("*")) {
  const hasText = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
  if (!hasText || !element.getClientRects().length) continue;
  smallest = Math.min(smallest, parseFloat(view.getComputedStyle(element).fontSize));
  const box = element.getBoundingClientRect();
  left = Math.min(left, box.left);
  right = Math.max(right, box.right);
}
const titles = [...page.querySelectorAll("h1, #worst td:first-child")];
return {
  inner: view.innerWidth,
  scroll: page.documentElement.scrollWidth,
  smallest: smallest,
  left: left,
  right: right,
  clipped: titles.filter(element => element.scrollWidth > element.clientWidth).length,
};"""
POINT = """
const chart = page.getElementById("scatter");
const box = chart.getBoundingClientRect();
const points = JSON.parse(page.getElementById("points").textContent);
const send = (type, point, kind) => {
  const clientX = box.left + box.width * point.x / 100 + 2;
  const clientY = box.top + box.height * (100 - point.y) / 100 + 2;
  chart.dispatchEvent(new view.PointerEvent(type, {clientX, clientY, pointerType: kind}));
};
const tip = page.getElementById("tip");
"""


def make_run(folder):
    """A Run that was trained for four steps."""
    history = [
        {"step": 2, "loss": 2.5},
        {"step": 2, "eval_loss": 2.25, "eval_mae": 40.0},
        {"step": 4, "loss": 1.5},
        {"step": 4, "eval_loss": 1.25, "eval_mae": 30.0},
    ]
    return util.Run(
        folder=folder,
        name=RUN_NAME,
        project="price",
        mode="lite",
        base_model="meta-llama/Llama-3.2-3B",
        recipe=RECIPES["lite"],
        seed=1,
        data={"source": SOURCE, "fingerprint": "abc"},
        steps=4,
        val_rows=12,
        history=history,
        plan={"Device": "CPU"},
    )


def make_results(count):
    """The predictions and results of an evaluation of `count` items with long titles."""
    rng = numpy.random.default_rng(0)
    rows = []
    for i in range(count):
        price = round(min(999.0, rng.lognormal(4, 1)), 2)
        description = f"Title: {i} {HOSTILE} {LONG}\nCategory: A & B {i % 5}"
        rows.append({"prompt": f"What?\n\n{description}\n\nPrice is $", "completion": f"{price}"})
    weights = rng.random((count, 1000)) ** 40
    probabilities = weights / weights.sum(1, keepdims=True)
    greedy = probabilities.argmax(1)
    answers = util.estimate_prices(probabilities, greedy, rows)
    title = f"price-{RUN_NAME} on {util.public_source(SOURCE)}"
    results, table = util.score(rows, answers, title)
    return table, results | {
        "run": RUN_NAME,
        "title": title,
        "decode": "median",
        "base_title": "Llama-3.2-3B",
        "base_identity": "abc",
        "data": {"source": SOURCE, "fingerprint": "abc", "rows": count},
        "course": True,
        "device": "CPU",
        "versions": {"torch": "2"},
        "date": "2026-01-31",
        "seed": 1,
        "items_per_s": 5.0,
    }


def write_page(folder, count):
    """report.html of an evaluation of `count` items, as text."""
    table, results = make_results(count)
    util.write_report(folder, results, make_run(folder), table)
    return (folder / "report.html").read_text("utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_page(tmp_path_factory.mktemp("report"), COUNT)


@pytest.fixture()
def browse(tmp_path):
    """`browse(page, script, width)` returns what the script, a function's body, returns.

    It runs in a frame of that width, in pixels, in which the page has been loaded.
    """

    def browse(page, script, width=1200):
        wrapper = WRAPPER.format(width=width, page=html.escape(page), script=script)
        file = tmp_path / "wrapper.html"
        file.write_text(wrapper, encoding="utf-8")
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        size = "--window-size=1300,1000"
        done = subprocess.run(
            [*command, profile, size, file.as_uri()], capture_output=True, timeout=120, check=True
        )
        content = done.stdout.decode().rpartition('<pre id="found">')[2].partition("</pre>")[0]
        assert content, done.stderr.decode()[-2000:]
        return json.loads(html.unescape(content))

    return browse


def text_of(page):
    """The page's text without styles and scripts."""
    body = re.sub(r"<(style|script)\b.*?</\1>", "", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]*>", " ", body))


@in_browser
@pytest.mark.parametrize("width", [1200, 400, 320])
def test_report_fits_any_screen(browse, page, width):
    """No sideways scrolling, no text below 12 px, nothing cut off."""
    found = browse(page, MEASURE, width)
    assert found["inner"] == width
    assert found["scroll"] <= width
    assert found["left"] >= 0
    assert found["right"] <= width
    assert found["smallest"] >= 12
    assert found["clipped"] == 0


@in_browser
def test_prices_of_any_size_fit(browse, tmp_path):
    """A phone shows amounts of ten millions, in charts and tables."""
    table, results = make_results(30)
    for row in table:
        for name in ("truth", "guess", "error", "low", "high"):
            row[name] *= 100_000
    util.write_report(tmp_path, results | {"worst": table}, make_run(tmp_path), table)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert ",000,000</text>" in page
    found = browse(page, MEASURE, 400)
    assert found["scroll"] <= 400
    assert found["left"] >= 0
    assert found["right"] <= 400


@in_browser
@pytest.mark.parametrize(
    "event, kind", [("pointermove", "mouse"), ("pointerdown", "touch")], ids=["hover", "tap"]
)
def test_points_tell_their_item(browse, page, event, kind):
    """Title, price, guess and interval of the item under the pointer, and of no other."""
    script = f"""{POINT}
    const said = [];
    for (const index of [0, 7, 99]) {{
      send("{event}", points[index], "{kind}");
      const lines = [...tip.children].map(element => element.textContent);
      const box = tip.getBoundingClientRect();
      said.push([lines[0], lines[1], box.left >= 0 && box.right <= view.innerWidth]);
    }}
    return said;"""
    for title, text, is_inside in browse(page, script, 400):
        number = title.split()[0]
        assert title == f"{number} {HOSTILE} {LONG}"
        pattern = r"price \$[\d.]+, guess \$[\d.]+, off by \$[\d.]+; 80 % interval \$\d+ to \$\d+"
        assert re.fullmatch(pattern, text)
        assert is_inside


@in_browser
def test_text_goes_with_the_pointer(browse, page):
    script = f"""{POINT}
    send("pointermove", points[0], "mouse");
    const before = tip.hidden;
    send("pointerleave", points[0], "mouse");
    return [before, tip.hidden];"""
    assert browse(page, script) == [False, True]


@in_browser
def test_text_stays_when_bars_hide(browse, page):
    """Phones resize the page while it is scrolled."""
    script = f"""{POINT}
    send("pointerdown", points[0], "touch");
    view.dispatchEvent(new view.Event("resize"));
    return [tip.hidden, tip.children[0].textContent.split(" ")[0]];"""
    is_hidden, number = browse(page, script)
    assert not is_hidden
    assert number.isdigit()


@in_browser
def test_arrow_keys_reach_all_items(browse, page):
    """From the cheapest item to the dearest, each once; Escape closes the text."""
    script = f"""{POINT}
    const press = key => chart.dispatchEvent(new view.KeyboardEvent("keydown", {{key}}));
    const texts = points.map(() => {{
      press("ArrowRight");
      return tip.children[0].textContent + tip.children[1].textContent;
    }});
    press("Escape");
    return [texts, tip.hidden, chart.tabIndex];"""
    texts, is_hidden, tab_index = browse(page, script)
    prices = [float(re.search(r"price \$([\d.]+)", text).group(1)) for text in texts]
    assert prices == sorted(prices)
    assert len(set(texts)) == COUNT
    assert is_hidden
    assert tab_index == 0


@in_browser
def test_worst_are_sorted_by_any_column(browse, page):
    """Numbers by value, titles as texts; a second click turns the order."""
    script = """
    const table = page.getElementById("worst");
    const column = index => [...table.tBodies[0].rows].map(row => row.cells[index].textContent);
    const found = {initial: column(3)};
    const buttons = table.tHead.querySelectorAll("button");
    buttons[1].click();
    found.dearest = column(1);
    buttons[1].click();
    found.cheapest = column(1);
    found.sorted = table.tHead.rows[0].cells[1].getAttribute("aria-sort");
    return found;"""
    found = browse(page, script)
    numbers = {
        name: [float(text.replace(",", "")) for text in found[name]]
        for name in ("initial", "dearest", "cheapest")
    }
    assert len(numbers["initial"]) == util.WORST_ITEMS
    assert numbers["initial"] == sorted(numbers["initial"], reverse=True)
    assert numbers["dearest"] == sorted(numbers["dearest"], reverse=True)
    assert numbers["cheapest"] == sorted(numbers["cheapest"])
    assert found["sorted"] == "ascending"


SEARCH = """
const search = page.getElementById("search");
search.value = "a & B 3";
search.dispatchEvent(new view.Event("input"));
const rows = [...page.getElementById("worst").tBodies[0].rows];
const shown = rows.filter(row => view.getComputedStyle(row).display !== "none");
return [shown.map(row => row.cells[0].textContent), page.getElementById("found").textContent];"""


@in_browser
def test_worst_are_searched(browse, page):
    """By all words, in any case, of title and category."""
    shown, found = browse(page, SEARCH)
    expected = [text for text in shown if "A & B 3" in text]
    assert expected
    assert found == f"{len(shown)} of {util.WORST_ITEMS}"
    assert len(shown) < util.WORST_ITEMS


@in_browser
def test_print_has_all_the_worst(browse, page):
    """Even those that a search hides; on paper's 700 px nothing is cut off."""
    printed = page.replace("@media screen", "@media not all").replace("@media print", "@media all")
    shown, _ = browse(printed, SEARCH)
    assert len(shown) == util.WORST_ITEMS
    found = browse(printed, MEASURE, 700)
    assert found["scroll"] <= 700
    assert found["clipped"] == 0


@in_browser
def test_titles_are_only_text(browse, page):
    """No title becomes a script or markup."""
    script = """
    const bold = page.querySelectorAll("td b, #tip b b").length;
    return [page.scripts.length, bold, String(view.hacked)];"""
    assert browse(page, script) == [2, 0, "undefined"]


@in_browser
def test_many_points_stay_smooth(browse, tmp_path):
    """2,000 points: a move of the pointer takes a fraction of a frame's 16 ms."""
    page = write_page(tmp_path, 2000)
    script = f"""{POINT}
    const start = view.performance.now();
    for (let index = 0; index < 200; index++) send("pointermove", points[index], "mouse");
    return [chart.querySelectorAll("use").length, (view.performance.now() - start) / 200];"""
    count, milliseconds = browse(page, script)
    assert count == 2000
    assert milliseconds < 16


def test_report_needs_nothing_else(page):
    """No network, no file; the data's folder isn't told."""
    for needed in ("http", "src=", "<link", "@import", "url("):
        assert needed not in page
    assert "secret" not in page
    assert "shop.csv, split 90/5/5 by title" in page


def test_report_has_losses_and_settings(page):
    """The curves' ends, the validation's n, and the recipe without exponents."""
    assert page.count("validation, n = 12") == 2
    assert "<td>learning rate</td><td>0.0001</td>" in page
    (losses,) = re.findall(r'<polyline class="weak" points="(.*?) "', page)
    assert losses == "50.0,2.91 100.0,41.75"  # 1.03 × 2.5 is on top


def test_base_without_training_has_a_report(tmp_path):
    """Neither the untouched base nor the course's runs have history and recipe."""
    table, results = make_results(1)
    run = util.Run(tmp_path, "base", "price", "lite", None, None, 1)
    util.write_report(tmp_path, results, run, table)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "How it was trained" not in page
    assert "nan" not in text_of(page).split()


def test_minus_signs_are_alike(page):
    """A true minus before each number, in the report as on the screen."""
    text = text_of(page)
    assert "r² −" in text
    assert not re.search(r"(^|[\s($])-\d", text)
