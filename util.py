"""Judgement: from answers to prices, figures, charts and reports. Never loads a model.

    from util import evaluate
    evaluate(lambda row: "$49.99", rows)      # rows of prompt and completion; any function of a row will do

Figures: mean absolute error in dollars with its 95 % interval, mean squared error, r² in %. A function may answer with
a text, a number, or the decodings of a whole distribution over prices (see `decodings`), which is then judged, too.
Heavy imports stay inside the functions that need them.
"""
import base64
import csv
import html
import json
import math
import os
import re
import statistics
import sys
import textwrap
import time
from pathlib import Path

COLORS = {"green": "#2e8b57", "orange": "#e69f00", "red": "#c0392b"}
MARKERS = {"green": "o", "orange": "s", "red": "^"}  # legible in black and white, too
DECODINGS = {"median": "the median price", "mean": "the mean price", "greedy": "the likeliest number"}
BANDS = 0, 20, 50, 100, 250, 1000  # dollars
LADDER_SOURCE = "published with the course, its first 200 test items, 2025-11; each about ± 7 to 13"
LADDER = {"constant": 106.18, "base Llama 3.2, 4-bit": 110.72, "linear regression": 101.56, "human": 87.62, "NLP + LR": 76.81,
          "random forest": 72.28, "XGBoost": 68.23, "fine-tuned, lite": 65.40, "GPT-4.1-nano": 62.51,
          "Claude 4.5 Sonnet": 47.10, "deep neural net": 46.49, "GPT-5.1": 44.74, "fine-tuned, full": 39.85}


# ---------------------------------------------------------------------------------------------------------------------
# Answers and figures


def parse_price(answer):
    """The price in dollars that an answer names, or None where it names none.

    A number stands for itself, as does the `guess` of `decodings`; of a text, `$` and `,` are dropped and the first
    number is taken, as in the course.
    """
    if isinstance(answer, dict):
        answer = answer["guess"]
    if isinstance(answer, str):
        match = re.search(r"[-+]?\d*\.\d+|\d+", answer.replace("$", "").replace(",", ""))
        answer = match.group() if match else None
    price = math.nan if answer is None else float(answer)
    return price if math.isfinite(price) else None


def decodings(probabilities, greedy, rows, decode="median"):
    """What the probabilities of $0 … $999, an array of rows × 1,000, say of each row: a dict of dollars with `guess`, the
    answer by `decode`; `median`, which has the least absolute error to be expected, `mean` and `greedy`, as given; `low`
    and `high`, the ends of the 80 % interval. `outside` is what is missing to 1, left out of account elsewhere.

    Scores, of rows with a truth: `nll`, the negative log of the probability given to the truth, to the dollar;
    `crps`, in dollars (continuous ranked probability score: Gneiting & Raftery 2007); `rank`, the share of the
    distribution below the truth, half of the truth's own included.
    """
    import numpy

    inside, prices = probabilities.sum(1, keepdims=True), numpy.arange(probabilities.shape[1])
    shares = probabilities / inside
    reached = shares.cumsum(1)
    low, median, high = ((reached >= share - 1e-12).argmax(1) for share in (0.1, 0.5, 0.9))
    columns = {"median": median, "mean": shares @ prices, "greedy": greedy, "low": low, "high": high, "outside": 1 - inside[:, 0]}
    truths = numpy.array([truth_of(row) if row.get("completion") else math.nan for row in rows])
    at = range(len(rows)), numpy.nan_to_num(truths).round().clip(0, prices[-1]).astype(int)
    columns |= {"nll": -numpy.log(probabilities[at].clip(1e-12)), "rank": reached[at] - shares[at] / 2,
                "crps": (shares * abs(prices - truths[:, None])).sum(1) - (reached * (1 - reached)).sum(1)}
    values = numpy.stack([columns[name] for name in columns], 1).astype(float).tolist()
    answers = [dict(zip(columns, row)) for row in values]
    return [{"guess": answer[decode]} | answer for answer in answers]


def color(error, truth):
    """green below $40 or 20 % of the truth, orange below $80 or 40 %, else red."""
    if error < 40 or error < 0.2 * truth:
        return "green"
    return "orange" if error < 80 or error < 0.4 * truth else "red"


def interval(errors):
    """Half the width of the 95 % interval of the mean, in dollars: 1.96 · population standard deviation / √n."""
    return 1.96 * statistics.pstdev(errors) / math.sqrt(len(errors))


def metrics(guesses, truths):
    """{n, mae, mae_ci95 (dollars), mse (dollars²), r2 (%)} of guesses against truths, two lists of dollars.

    r² is NaN where it has no meaning: a single item, or truths that are all the same.
    """
    errors = [abs(guess - truth) for guess, truth in zip(guesses, truths)]
    mse, spread = statistics.fmean(e * e for e in errors), statistics.pvariance(truths)
    return {"n": len(errors), "mae": statistics.fmean(errors), "mae_ci95": interval(errors), "mse": mse,
            "r2": 100 * (1 - mse / spread) if spread else math.nan}


def headline(figures):
    return f"Error: ${figures['mae']:,.2f} MSE: {figures['mse']:,.0f} r²: {figures['r2']:.1f}%".replace("nan%", "–")


def truth_of(row):
    return float(row["completion"])


def field_of(prompt, name):
    """What the line `name: …` of a description says, or '' where there is none."""
    match = re.search(rf"^{name}:[ \t]*(.*?)[ \t]*$", prompt, re.MULTILINE)
    return match.group(1) if match else ""


def title_of(prompt):
    """The product's title; for a description without a title line, its first line."""
    body = prompt.split("\n\n", 1)[-1].strip()
    return field_of(prompt, "Title") or (body.splitlines() or [""])[0]


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(function, data, size=200, batch_size=None, folder=None, title=None):
    """Judges `function`, from a row of prompt and completion to an answer, on the first `size` rows of `data`.

    `size=None` takes all rows, as do fewer rows than `size`. See `ask` for `batch_size` and `judge` for what is printed,
    written and returned. Raises ValueError without rows.
    """
    rows = [data[i] for i in range(len(data) if size is None else min(size, len(data)))]
    if not rows:
        raise ValueError("evaluate needs at least one row of prompt and completion")
    answers, seconds = ask(function, rows, batch_size)
    title = title or getattr(function, "__name__", "model").replace("_", " ")
    return judge(rows, answers, title, folder) | {"items_per_s": len(rows) / seconds, "seconds": seconds}


def ask(function, rows, batch_size=None, name="the model", at_once=1):
    """The answers of `function` to `rows`, in their order, and the seconds they took.

    Without `batch_size` the function is called with one row at a time, with it with a list of at most so many rows of
    similar length, the longest first, and returns a list of answers. `at_once` calls run at the same time, in threads.
    Without a `name` no bar is shown.
    """
    from concurrent.futures import ThreadPoolExecutor

    from tqdm.auto import tqdm

    order = range(len(rows))
    if batch_size:  # alike lengths together: less padding
        order = sorted(order, key=lambda i: len(rows[i]["prompt"]), reverse=True)
    batches = [order[first : first + (batch_size or 1)] for first in range(0, len(rows), batch_size or 1)]

    def call(chosen):
        batch = [rows[i] for i in chosen]
        return function(batch) if batch_size else [function(batch[0])]

    answers, total, done, start, pool = [None] * len(rows), 0.0, 0, time.perf_counter(), ThreadPoolExecutor(at_once)
    try:
        with tqdm(total=sum(map(len, batches)), desc=f"asking {name}", unit="item", disable=name is None) as bar:
            for chosen, found in zip(batches, (pool.map if at_once > 1 else map)(call, batches)):
                for i, answer in zip(chosen, found):
                    answers[i] = answer
                    if name and rows[i].get("completion"):
                        total += abs((parse_price(answer) or 0.0) - truth_of(rows[i]))
                bar.update(len(chosen))
                done += len(chosen)
                if total:
                    bar.set_postfix_str(f"mean error ${total / done:,.2f}")
    finally:
        pool.shutdown(cancel_futures=True)
    return answers, time.perf_counter() - start


def judge(rows, answers, title, folder=None):
    """The figures of the answers to rows of prompt and completion, {n, mae, mae_ci95, mse, r2, parse_failures,
    by_category, by_price, worst}, and for `decodings` their `decodings` and `distribution`.

    An answer without a number counts as $0 and is counted in `parse_failures`. Prints the figures, draws the charts,
    shown in a notebook and written to `folder`, with predictions.csv, where one is given.
    """
    prices = [parse_price(answer) for answer in answers]
    guesses, truths = [price or 0.0 for price in prices], [truth_of(row) for row in rows]
    figures = metrics(guesses, truths) | {"parse_failures": prices.count(None)}
    print(f"{title}: {headline(figures)} (± {figures['mae_ci95']:.2f}, n = {figures['n']:,})")
    if len(rows) < 30:
        print("Fewer than 30 items: even the interval is a rough guess")
    if figures["parse_failures"]:
        print(f"{figures['parse_failures']:,} answers named no price and count as $0")
    show(scatter(guesses, truths, figures, title), folder, "scatter.png")
    show(running_error(guesses, truths, figures, title), folder, "running_error.png")

    has_distribution = all(isinstance(answer, dict) for answer in answers)
    table = [{"index": i, "title": title_of(row["prompt"]), "category": category_of(row["prompt"]), "truth": truth,
              "guess": guess, "error": round(abs(guess - truth), 2)}
             | ({"low": answer["low"], "high": answer["high"]} if has_distribution else {})
             for i, (row, truth, guess, answer) in enumerate(zip(rows, truths, guesses, answers))]
    figures |= {"by_category": by_group(table, lambda row: row["category"]), "by_price": by_group(table, band_of),
                "worst": sorted(table, key=lambda row: -row["error"])[:10]}
    if has_distribution:
        covered = [row["low"] <= round(row["truth"]) <= row["high"] for row in table]
        figures["decodings"] = {how: metrics([answer[how] for answer in answers], truths) for how in DECODINGS}
        figures["distribution"] = {"coverage_80": statistics.fmean(covered)} | {
            name: statistics.fmean(answer[name] for answer in answers) for name in ("nll", "crps", "outside")}
        show(reliability([answer["rank"] for answer in answers], title), folder, "reliability.png")
    if folder:
        write_table(Path(folder) / "predictions.csv", table)
    return figures


def category_of(prompt):
    """The top category that a description names: `Audio` of `Category: Audio > Headphones`."""
    return re.split(r"\s*[>|]\s*", field_of(prompt, "Category"))[0]


def band_of(row):
    top = next(i for i, bound in enumerate((*BANDS[1:-1], math.inf)) if row["truth"] < bound)
    return f"${BANDS[top]} to {BANDS[top + 1]}"


def by_group(table, group_of):
    """{group: {n, mae, mae_ci95}} of a table of predictions; nothing where there is one group only."""
    errors = {}
    for row in sorted(table, key=lambda row: row["truth"]):
        errors.setdefault(group_of(row), []).append(row["error"])
    return {group: {"n": len(found), "mae": statistics.fmean(found), "mae_ci95": interval(found)}
            for group, found in errors.items() if len(errors) > 1}


def paired_difference(errors, others, seed, draws=2000):
    """How much larger the mean of `errors` is than that of `others`, two lists of dollars on the same items:
    {difference, low, high}, with the 95 % interval of the bootstrap over items (Efron 1979)."""
    import numpy

    differences, rng = numpy.subtract(errors, others), numpy.random.default_rng(seed)
    means = [rng.choice(differences, len(differences)).mean() for _ in range(draws)]
    low, high = numpy.quantile(means, (0.025, 0.975))
    return {"difference": float(differences.mean()), "low": float(low), "high": float(high)}


def write_table(path, table):
    """Writes a list of dicts as CSV or, by the path's ending, as JSONL: whole or not at all."""
    with open(f"{path}.new", "w", encoding="utf-8", newline="") as file:
        if Path(path).suffix.lower() == ".jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in table)
        else:
            writer = csv.DictWriter(file, table[0])
            writer.writeheader()
            writer.writerows(table)
    os.replace(f"{path}.new", path)


# ---------------------------------------------------------------------------------------------------------------------
# Charts


def new_figure(columns=1, width=7.5, height=6.0):
    from matplotlib.figure import Figure  # not pyplot: no screen, no global state

    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    return figure, figure.subplots(1, columns)


def show(figure, folder=None, name=None):
    """Writes a chart to `folder`, where given, and shows it where the program runs inside a notebook."""
    if folder:
        figure.savefig(Path(folder) / name)
    if "ipykernel" in sys.modules:
        from IPython.display import display

        display(figure)


def set_title(axes, title, figures):
    axes.set_title(f"{textwrap.fill(title, 85)}\n{headline(figures)}".replace("$", "\\$"))


def scatter(guesses, truths, figures, title):
    """Each item's guess over its true price, with the line of perfect guesses."""
    figure, axes = new_figure()
    shades = [color(abs(guess - truth), truth) for guess, truth in zip(guesses, truths)]
    for shade, label in (("green", "error < \\$40 or 20 %"), ("orange", "error < \\$80 or 40 %"), ("red", "larger")):
        points = [(t, g) for t, g, s in zip(truths, guesses, shades) if s == shade]
        if points:
            axes.scatter(*zip(*points), s=22, c=COLORS[shade], marker=MARKERS[shade], alpha=0.7, linewidths=0, clip_on=False,
                         label=f"{label}: {len(points):,} of {len(truths):,}")
    limit = 1.03 * max(1.0, *truths, *guesses)
    axes.plot([0, limit], [0, limit], color="black", linewidth=1, linestyle="--", label="guess = truth")
    axes.set(xlim=(0, limit), ylim=(0, limit), xlabel="true price ($)", ylabel="guess ($)")
    set_title(axes, title, figures)
    axes.legend(loc="upper left")
    return figure


def running_error(guesses, truths, figures, title):
    """The mean absolute error of the first n items over n, with its 95 % band."""
    import numpy

    figure, axes = new_figure(height=4.5)
    errors, count = abs(numpy.subtract(guesses, truths)), numpy.arange(1, len(truths) + 1)
    means = errors.cumsum() / count
    bands = 1.96 * (((errors**2).cumsum() / count - means**2).clip(0) / count) ** 0.5
    axes.fill_between(count, means - bands, means + bands, color="0.85", label="95 % interval")
    axes.plot(count, means, color="black", label=f"\\${means[-1]:,.2f} ± {bands[-1]:,.2f} after {len(means):,} items")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="items judged", ylabel="mean absolute error ($)", ylim=(0, None))
    set_title(axes, title, figures)
    axes.legend()
    return figure


def data_chart(prices, tokens, cutoff, source):
    """How the prices (dollars) and lengths (tokens of prompt and completion) of the training split are spread."""
    figure, (left, right) = new_figure(columns=2, width=10, height=4)
    left.hist(prices, bins=50, color="0.45")
    left.set(xlabel="price ($)", ylabel="items", title=f"{len(prices):,} training items")
    right.hist(tokens, bins=range(min(tokens), max(tokens) + 2), color="0.45")
    right.set(xlabel="tokens of prompt and completion", ylabel="items", title=f"descriptions cut at {cutoff} tokens")
    figure.suptitle(source)
    return figure


def reliability(ranks, title):
    """How many truths lie within the central intervals of each width, over what the distributions promise."""
    figure, axes = new_figure(height=5)
    widths = [width / 20 for width in range(21)]
    within = [statistics.fmean(abs(2 * rank - 1) <= width for rank in ranks) for width in widths]
    axes.plot([0, 100], [0, 100], color="black", linewidth=1, linestyle="--", label="as promised")
    axes.plot([100 * width for width in widths], [100 * share for share in within], color="0.35", marker="o", markersize=4,
              label=f"{len(ranks):,} items; above the line: too cautious, below: too sure")
    axes.set(xlabel="promised: width of the interval (% of the probability)", ylabel="found: true prices within it (%)",
             xlim=(0, 100), ylim=(0, 100), title=textwrap.fill(title, 85))
    axes.legend(loc="lower right")
    return figure


def bars(results):
    """The mean absolute errors that `compared` lists, with their 95 % intervals."""
    rows = compared(results)[::-1]
    figure, axes = new_figure(width=9, height=1.6 + 0.36 * len(rows))
    for at, (name, row) in enumerate(rows):
        shade = "0.5" if name.startswith("run ") else "0.75" if "mae_ci95" in row else "white"
        axes.barh(at, row["mae"], xerr=row.get("mae_ci95"), color=shade, edgecolor="black", linewidth=0.6, capsize=3)
        axes.text(row["mae"] + row.get("mae_ci95", 0), at, f"  \\${row['mae']:,.2f}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.margins(x=0.2)
    axes.set(xlabel=f"mean absolute error (\\$) with its 95 % interval, n = {results['n']:,}")
    if any("mae_ci95" not in row for _, row in rows):
        axes.set_title(f"white: {LADDER_SOURCE}", fontsize=8)
    return figure


def loss_chart(history, title, rows):
    """Training and validation loss, and the error in dollars on so many validation rows, over the steps, from the trainer's
    log history."""
    figure, (left, right) = new_figure(columns=2, width=10, height=4)
    for axes, key, label, style in ((left, "loss", "training", "0.5"), (left, "eval_loss", f"validation, n = {rows:,}", "black"),
                                    (right, "eval_mae", f"validation, by the median price, n = {rows:,}", "black")):
        points = [(entry["step"], entry[key]) for entry in history if entry.get(key) is not None]
        if points:
            axes.plot(*zip(*points), color=style, marker="o", markersize=3, label=label)
            axes.legend()
    left.set(xlabel="step", ylabel="loss per completion token")
    right.set(xlabel="step", ylabel="mean absolute error ($)", ylim=(0, None))
    figure.suptitle(title)
    return figure


def quantiles(values, digits=0):
    """'min 5 · 25 % 20 · median 55 · 75 % 160 · max 999' of numbers."""
    import numpy

    ordered = numpy.sort(values)
    at = {"min": 0.0, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "max": 1.0}
    return " · ".join(f"{name} {ordered[round(share * (len(ordered) - 1))]:,.{digits}f}" for name, share in at.items())


# ---------------------------------------------------------------------------------------------------------------------
# Reports


def compared(results):
    """[(name, figures)] of all that a results.json compares: constants, base, earlier runs, this run by each decoding,
    what can be reached; on the course's own data also what it published, which has `n` and `mae` only."""
    run, baselines = f"run {results['run']}", results.get("baselines", {})
    rows = {"constant: training mean": baselines.get("constant_mean"),
            "constant: training median": baselines.get("constant_median"),
            "the untouched base model": results.get("base")}
    rows |= {f"earlier {name}": figures for name, figures in results.get("earlier", {}).items()}
    rows |= {f"{run}, {DECODINGS[how]}": figures for how, figures in reversed(results["decodings"].items())}
    rows["best reachable: the catalogue's own noise"] = results.get("best_reachable")
    if results.get("course"):
        rows |= {f"published: {name}": {"n": 200, "mae": mae} for name, mae in LADDER.items()}
    return [(name, figures) for name, figures in rows.items() if figures]


def notes(results):
    """What a results.json says beyond the table, a line each."""
    lines = [f"This run's error less that of {name}, on the same items: ${figures['difference']:+,.2f} "
             f"({figures['low']:+,.2f} to {figures['high']:+,.2f})" for name, figures in results.get("earlier", {}).items()]
    if scores := results.get("distribution"):
        lines.append(f"The 80 % intervals hold {100 * scores['coverage_80']:.0f} % of the true prices; log score "
                     f"{scores['nll']:.3f}, CRPS ${scores['crps']:,.2f}, probability of no price {100 * scores['outside']:.2f} %")
    if results["parse_failures"]:
        lines.append(f"{results['parse_failures']:,} answers of the run named no price and count as $0")
    if results.get("course"):
        lines.append(f"Published: {LADDER_SOURCE}")
    return lines


def compare(results):
    """`compared` as a table, each figure with its 95 % interval, and the `notes`."""
    rows = compared(results)
    width = max(len(name) for name, _ in rows)
    lines = [f"{'mean absolute error':<{width}}{'n':>8}{'$':>9}{'± 95 %':>9}{'r² %':>9}"]
    for name, row in rows:
        lines.append(f"{name:<{width}}{row['n']:>8,}{row['mae']:>9,.2f}"
                     + (f"{row['mae_ci95']:>9,.2f}{number(row['r2'], 1):>9}" if "mae_ci95" in row else ""))
    return "\n".join(lines + notes(results))


def number(value, digits=2):
    """A figure for people, '–' for none: r² has no meaning for a single item."""
    return "–" if value is None or isinstance(value, float) and math.isnan(value) else f"{value:,.{digits}f}".replace("-", "−")


def write_report(folder, results):
    """Writes report.html: all figures and charts of an evaluation in one file that needs nothing beside it."""
    def table(heads, rows):
        cells = [[f"<td>{html.escape(str(cell))}</td>" for cell in row] for row in rows]
        return (f"<table{' class=figures' * bool(heads[0])}><tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"
                + "".join(f"<tr>{''.join(row)}</tr>" for row in cells) + "</table>")

    def errors(rows, *also):
        return [(name, f"{row['n']:,}", number(row["mae"]), number(row.get("mae_ci95")), *(number(row.get(key), 1) for key in also))
                for name, row in rows]

    charts = {"comparison": "Mean absolute errors with their 95 % intervals", "scatter": "Each item's guess over its true price",
              "running_error": "The error as items are added", "reliability": "Whether the intervals keep what they promise"}
    parts = [f"<h1>{html.escape(results['title'])}</h1><p class=big>off by <b>${results['mae']:,.2f}</b> ± "
             f"{results['mae_ci95']:,.2f} on average, {results['n']:,} items, r² {number(results['r2'], 1)} %; base model "
             f"{html.escape(str(results['base_model']))}</p>",
             table(("mean absolute error", "n", "$", "± 95 %", "r² %"), errors(compared(results), "r2")),
             *(f"<p>{html.escape(line)}</p>" for line in notes(results))]
    for name, caption in charts.items():
        if (folder / f"{name}.png").exists():
            image = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
            parts.append(f'<figure><img alt="{caption}" src="data:image/png;base64,{image}"><figcaption>{caption}</figcaption></figure>')
    for head, key in (("category", "by_category"), ("true price", "by_price")):
        if results[key]:
            parts.append(f"<h2>Mean absolute error by {head}</h2>" + table((head, "n", "$", "± 95 %"), errors(results[key].items())))
    parts.append("<h2>The ten worst</h2>" + table(("item", "true price, $", "guess, $", "error, $", "80 % interval, $"), [
        (row["title"], *(number(row[name]) for name in ("truth", "guess", "error")),
         f"{row['low']:.0f} to {row['high']:.0f}" if "low" in row else "–") for row in results["worst"]]))
    parts.append("<h2>How it was measured</h2>" + table(("", ""), [
        ("date", results["date"]), ("base model", results["base_model"]), ("answers", f"{results['decode']}: {DECODINGS[results['decode']]}"),
        ("data", f"{results['data']['source']}, test split of {results['data']['rows']:,} rows"), ("device", results["device"]),
        ("items a second", number(results["items_per_s"], 1)), ("seed", results["seed"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in results["versions"].items()))]))
    style = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.5rem}h2{margin-top:2.5rem;font-size:1.2rem}.big{font-size:1.3rem}img{max-width:100%}figure{margin:2rem 0}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .9rem .25rem 0;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}
.figures td:nth-child(n+2),.figures th:nth-child(n+2){font-variant-numeric:tabular-nums;text-align:right}figcaption{color:#555}"""
    Path(folder, "report.html").write_text(
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(results['title'])}</title><style>{style}</style>{''.join(parts)}</html>", encoding="utf-8")
