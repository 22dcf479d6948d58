"""Judgement: from answers to prices, figures, charts and reports. Never loads a model.

    from util import evaluate
    evaluate(lambda row: "$49.99", rows)      # rows of prompt and completion; any function of a row will do

Figures: mean absolute error in dollars with its 95 % interval, mean squared error, r² in %. Heavy imports stay inside
the functions that need them.
"""
import csv
import math
import re
import statistics
import sys
import textwrap
import time
from pathlib import Path

COLORS = {"green": "#2e8b57", "orange": "#e69f00", "red": "#c0392b"}
MARKERS = {"green": "o", "orange": "s", "red": "^"}  # legible in black and white, too


# ---------------------------------------------------------------------------------------------------------------------
# Answers and figures


def parse_price(answer):
    """The price in dollars that an answer names, or None where it names none.

    A number stands for itself; of a text, `$` and `,` are dropped and the first number is taken, as in the course.
    """
    if isinstance(answer, str):
        match = re.search(r"[-+]?\d*\.\d+|\d+", answer.replace("$", "").replace(",", ""))
        answer = match.group() if match else None
    price = math.nan if answer is None else float(answer)
    return price if math.isfinite(price) else None


def decide(probabilities, how):
    """Answers in dollars, given the probabilities of $0 … $999, an array of rows × 1,000: their median, which has the
    least absolute error to be expected, or their mean. What is missing to 1 in a row is left out of account."""
    import numpy

    shares = probabilities / probabilities.sum(1, keepdims=True)
    if how == "mean":
        return (shares @ numpy.arange(1000)).tolist()
    return (shares.cumsum(1) >= 0.5 - 1e-12).argmax(1).astype(float).tolist()


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
    return f"Error: ${figures['mae']:,.2f} MSE: {figures['mse']:,.0f} r²: {figures['r2']:.1f}%"


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


def ask(function, rows, batch_size=None):
    """The answers of `function` to `rows`, in their order, and the seconds they took.

    Without `batch_size` the function is called with one row at a time, with it with a list of at most so many rows of
    similar length, the longest first, and returns a list of answers.
    """
    from tqdm.auto import tqdm

    order = range(len(rows))
    if batch_size:  # alike lengths together: less padding
        order = sorted(order, key=lambda i: len(rows[i]["prompt"]), reverse=True)
    answers, total, start = [None] * len(rows), 0.0, time.perf_counter()
    with tqdm(total=len(rows), desc="evaluating", unit="item") as bar:
        for first in range(0, len(rows), batch_size or 1):
            chosen = order[first : first + (batch_size or 1)]
            batch = [rows[i] for i in chosen]
            for i, answer in zip(chosen, function(batch) if batch_size else [function(batch[0])]):
                answers[i] = answer
                total += abs((parse_price(answer) or 0.0) - truth_of(rows[i]))
            bar.update(len(chosen))
            bar.set_postfix_str(f"mean error ${total / bar.n:,.2f}")
    return answers, time.perf_counter() - start


def evaluate(function, data, size=200, batch_size=None, folder=None, title=None):
    """Judges `function`, from a row of prompt and completion to an answer, on the first `size` rows of `data`.

    `size=None` takes all rows, as do fewer rows than `size`. See `ask` for `batch_size`. An answer without a number
    counts as $0 and is counted in `parse_failures`. Prints the figures, draws both charts, shown in a notebook and
    written to `folder`, with predictions.csv, where one is given. Returns {n, mae, mae_ci95, mse, r2,
    parse_failures, items_per_s, seconds}. Raises ValueError without rows.
    """
    rows = [data[i] for i in range(len(data) if size is None else min(size, len(data)))]
    if not rows:
        raise ValueError("evaluate needs at least one row of prompt and completion")
    answers, seconds = ask(function, rows, batch_size)
    prices = [parse_price(answer) for answer in answers]
    guesses, truths = [price or 0.0 for price in prices], [truth_of(row) for row in rows]
    figures = metrics(guesses, truths) | {
        "parse_failures": prices.count(None), "items_per_s": len(rows) / seconds, "seconds": seconds}
    title = title or getattr(function, "__name__", "model").replace("_", " ")
    print(f"{title}: {headline(figures)} (± {figures['mae_ci95']:.2f}, n = {figures['n']:,})")
    if len(rows) < 30:
        print("Fewer than 30 items: even the interval is a rough guess")
    if figures["parse_failures"]:
        print(f"{figures['parse_failures']:,} answers named no price and count as $0")
    show(scatter(guesses, truths, figures, title), folder, "scatter.png")
    show(running_error(guesses, truths, figures, title), folder, "running_error.png")
    if folder:
        with open(Path(folder) / "predictions.csv", "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["index", "title", "truth", "guess", "error"])
            table.writerows([i, title_of(row["prompt"]), truth, guess, round(abs(guess - truth), 2)]
                            for i, (row, truth, guess) in enumerate(zip(rows, truths, guesses)))
    return figures


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
    figure, axes = new_figure(height=4.5)
    means, bands, mean, squares = [], [], 0.0, 0.0
    for n, (guess, truth) in enumerate(zip(guesses, truths), 1):  # Welford: never the root of a negative number
        error = abs(guess - truth)
        step = error - mean
        mean += step / n
        squares += step * (error - mean)
        means.append(mean)
        bands.append(1.96 * math.sqrt(squares / n) / math.sqrt(n))
    count = range(1, len(means) + 1)
    axes.fill_between(count, [m - b for m, b in zip(means, bands)], [m + b for m, b in zip(means, bands)],
                      color="0.85", label="95 % interval")
    axes.plot(count, means, color="black", label=f"\\${mean:,.2f} ± {bands[-1]:,.2f} after {len(means):,} items")
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


def loss_chart(history, title):
    """Training and validation loss over the steps, from the trainer's log history."""
    figure, axes = new_figure(height=4.5)
    for key, label, style in (("loss", "training", "0.5"), ("eval_loss", "validation", "black")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points), color=style, marker="o", markersize=3, label=label)
    axes.set(xlabel="step", ylabel="loss per completion token", title=title)
    axes.legend()
    return figure


def quantiles(values, digits=0):
    """'min 5 · 25 % 20 · median 55 · 75 % 160 · max 999' of a list of numbers."""
    ordered = sorted(values)
    at = {"min": 0.0, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "max": 1.0}
    return " · ".join(f"{name} {ordered[round(share * (len(ordered) - 1))]:,.{digits}f}" for name, share in at.items())


def compare(results):
    """A table of a results.json's figures: constants, base, run and what is reachable, each with its 95 % interval."""
    rows = {"constant: training mean": results["baselines"]["constant_mean"],
            "constant: training median": results["baselines"]["constant_median"],
            "the untouched base model": results.get("base"), f"run {results['run']}": results,
            "best reachable: the catalogue's own noise": results.get("best_reachable")}
    heading = f"mean absolute error on {results['n']:,} test items"
    return "\n".join([f"{heading:<46}{'$':>9}{'± 95 %':>9}{'r² %':>9}"] + [
        f"{name:<46}{row['mae']:>9,.2f}{row['mae_ci95']:>9,.2f}{row['r2']:>9.1f}" for name, row in rows.items() if row]
        + [f"{results['parse_failures']:,} answers of the run named no price and count as $0"] * bool(results["parse_failures"]))
