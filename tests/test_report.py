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
COUNT = 121
HOSTILE = '</script><script>hacked = 1</script><img src=x onerror="hacked = 1"> {{7*7}} "it\'s" &'
LONG = "Wireless_headphones_without_any_space" * 4 + " and many more words" * 6
RUN_NAME = "a-run-with-a-long-name" * 4
SOURCE = "/home/secret/shop.csv, split 90/5/5 by title, seed 42"
RESULTS = {
    "run": RUN_NAME,
    "title": f"price-{RUN_NAME} on {util.public_source(SOURCE)}",
    "decode": "median",
    "base_title": "Llama-3.2-3B",
    "base_identity": "abc",
    "data": {"source": SOURCE, "fingerprint": "abc", "rows": 500},
    "course": True,
    "device": "CPU",
    "versions": {"torch": "2"},
    "date": "2026-01-31",
    "seed": 1,
    "items_per_s": 5.0,
    "baselines": {},
    "earlier": {},
}
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
const texts = [...page.body.querySelectorAll("*")].filter(element =>
  [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())
  && element.getClientRects().length);
return {
  scroll: page.documentElement.scrollWidth,
  smallest: Math.min(...texts.map(text => parseFloat(view.getComputedStyle(text).fontSize))),
};"""
ITEMS = """
const body = page.getElementById("items").tBodies[0], rows = [...body.rows];
const column = index => [...body.rows].map(row => row.cells[index].textContent);
"""


def write_page(folder, count=COUNT, unit=1):
    """report.html of an evaluation of `count` items with long titles, as text."""
    rng = numpy.random.default_rng(0)
    scale = util.items.PriceScale(unit)
    rows = []
    for i, price in enumerate(rng.lognormal(4, 1, count).clip(1, 999).round(2)):
        description = f"Title: {i} {HOSTILE} {LONG}\nCategory: A & B {i % 5}"
        rows.append({"prompt": scale.prompt(description), "completion": str(price)})
    weights = rng.random((count, 1000)) ** 40
    answers = util.estimate_prices(weights / weights.sum(1, keepdims=True), [7] * count, rows)
    figures, table = util.score(rows, answers, RESULTS["title"])
    util.save_predictions(figures, table, RESULTS["title"], folder)
    run = util.Run(folder, "base", "price", "lite", None, None, 1)
    run.recipe = RECIPES["lite"]
    run.data = {"source": SOURCE, "fingerprint": "abc"}
    util.write_report(folder, figures | RESULTS, run, table)
    return (folder / "report.html").read_text("utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_page(tmp_path_factory.mktemp("report"))


@pytest.fixture()
def browse(tmp_path):
    """`browse(page, script, width)` returns what the script, a function's body, returns.

    It runs in a frame of that width, in pixels, in which the page has been loaded.
    """

    def browse(page, script, width=1200, options=()):
        wrapper = WRAPPER.format(width=width, page=html.escape(page), script=script)
        file = tmp_path / "wrapper.html"
        file.write_text(wrapper, encoding="utf-8")
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", *options]
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        size = "--window-size=1300,1000"
        done = subprocess.run(
            [*command, profile, size, file.as_uri()], capture_output=True, timeout=120, check=True
        )
        content = done.stdout.decode().rpartition('<pre id="found">')[2].partition("</pre>")[0]
        assert content, done.stderr.decode()[-2000:]
        return json.loads(html.unescape(content))

    return browse


@in_browser
@pytest.mark.parametrize("width, unit", [(1200, 1), (400, 1), (320, 1), (400, 100_000)])
def test_report_fits_any_screen(browse, tmp_path, width, unit):
    """No sideways scrolling, no text below 12 px; prices of ten millions fit, too."""
    found = browse(write_page(tmp_path, 30, unit), MEASURE, width)
    assert found["scroll"] <= width
    assert found["smallest"] >= 12


@in_browser
def test_report_follows_dark_mode(browse, page):
    """The reader's choice decides; charts keep their white ground."""
    script = """
    const style = element => view.getComputedStyle(element);
    return [style(page.body).color, style(page.querySelector("img")).backgroundColor];"""
    light, dark = [
        browse(page, script, options=[f"--blink-settings=preferredColorScheme={scheme}"])
        for scheme in (1, 0)
    ]
    assert light == ["rgb(0, 0, 0)", "rgb(255, 255, 255)"]
    assert dark == ["rgb(255, 255, 255)", "rgb(255, 255, 255)"]


@in_browser
@pytest.mark.parametrize("event", ["pointermove", "pointerdown"])
def test_pointer_tells_nearest_item(browse, page, event):
    """Title, price, guess and interval, by hovering and tapping."""
    script = f"""
    const plot = page.getElementById("plot"), dots = [...plot.querySelectorAll("circle")];
    return [0, 7, 99].map(index => {{
      const box = dots[index].getBoundingClientRect();
      const at = {{clientX: box.x + 5, clientY: box.y + 5}};
      plot.dispatchEvent(new view.PointerEvent("{event}", at));
      return [page.getElementById("near").textContent, dots[index].textContent];
    }});"""
    pattern = r"price \$\S+, guess \$\S+, off by \$\S+; 80 % interval \$\d+ to \$\d+"
    for said, expected in browse(page, script, 400):
        assert said == expected
        number, figures = " ".join(said.split()).split(f" {HOSTILE} {LONG}: ")
        assert number.isdigit()
        assert re.fullmatch(pattern, figures)


@in_browser
def test_items_are_sorted_by_any_column(browse, page):
    """All of them: numbers by value, titles as texts; a second click turns the order."""
    script = f"""{ITEMS}
    const found = [column(3)];
    for (const index of [1, 1, 0]) {{
      page.querySelectorAll("#items th")[index].click();
      found.push(column(index));
    }}
    return found;"""
    *found, titles = browse(page, script)
    worst, dearest, cheapest = ([float(text.replace(",", "")) for text in one] for one in found)
    assert len(worst) == COUNT
    assert worst == sorted(worst, reverse=True)
    assert dearest == sorted(dearest, reverse=True)
    assert cheapest == sorted(cheapest)
    assert titles == sorted(titles)


@in_browser
def test_items_are_searched(browse, page):
    """By all words, in any case, of title and category."""
    script = f"""{ITEMS}
    const input = page.getElementById("search");
    input.value = "a & B 3 wireless";
    input.dispatchEvent(new view.Event("input"));
    const shown = rows.filter(row => row.checkVisibility());
    return [shown.map(row => row.textContent), page.getElementById("found").textContent];"""
    shown, found = browse(page, script)
    assert all("3" in text for text in shown)
    assert 0 < len(shown) < COUNT
    assert found == f"{len(shown)} of {COUNT}"


@in_browser
def test_titles_are_only_text(browse, page):
    """No title becomes a script, markup or a template's expression."""
    script = "return [page.scripts.length, page.images.length, String(view.hacked)];"
    assert browse(page, script) == [1, 2, "undefined"]
    assert "{{7*7}}" in page


def test_report_explains_itself(page):
    """Settings, terms, true minus signs, the data's name without its folder."""
    assert "shop.csv, split 90/5/5 by title" in page
    assert "secret" not in page
    assert "<td>learning rate<td>0.0001" in page
    for term in ("r²", "Log score", "CRPS", "Probability of no price", "Words alone"):
        assert f"<dt>{term}<dd>" in page
    text = re.sub(r"<(style|script)\b.*?</\1>|<[^>]*>", " ", page, flags=re.DOTALL)
    assert "r² −" in text
    assert not re.search(r"(^|[\s($])-\d", text)
