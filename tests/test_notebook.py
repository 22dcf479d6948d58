"""The demo as a notebook, in a real kernel: a cell shows what its reader expects, and no more."""

import os
import re

import pytest
from jupyter_client.manager import start_new_kernel

from conftest import ROOT

SECONDS = 120  # that a cell may take
DATA = "outputs/datasets/items_prompts_demo (the local copy that prepare left)"


class Outputs:
    """What is below a cell."""

    def __init__(self):
        self.text = ""  # printed
        self.errors = ""  # printed to standard error, as progress bars are
        self.charts = 0
        self.values = []  # of the last line, as text
        self.error = None  # the lines of an exception

    def add(self, kind, content):
        if kind == "stream" and content["name"] == "stdout":
            self.text += content["text"]
        elif kind == "stream":
            self.errors += content["text"]
        elif kind == "error":
            self.error = content["traceback"]
        elif "image/png" in content.get("data", ()):
            self.charts += 1
        elif "data" in content:
            self.values.append(content["data"]["text/plain"])

    @property
    def bars(self):
        """What is left of the progress bars, but those of `datasets`: each line's last state."""
        states = [line.rpartition("\r")[2] for line in self.errors.split("\n")]
        return [one for one in states if one.strip() and not re.search("examples|ba/s", one)]


@pytest.fixture()
def run_cell(tmp_path):
    """`run_cell(code)` returns the Outputs of a cell of one notebook.

    The Stop button is pressed once it has printed `stop_after`.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    manager, client = start_new_kernel(SECONDS, cwd=str(tmp_path), env=environment)

    def run_cell(code, stop_after=None):
        outputs = Outputs()
        waited_for = [stop_after] if stop_after else []

        def add(message):
            outputs.add(message["msg_type"], message["content"])
            if waited_for and waited_for[0] in outputs.text:
                waited_for.clear()
                manager.interrupt_kernel()

        client.execute_interactive(code, timeout=SECONDS, output_hook=add)
        return outputs

    yield run_cell
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_demo_runs_in_notebook(run_cell, tiny_base):
    """Charts without a magic, one bar for training, a Stop button that saves the step."""
    setup = (
        "from app import RunConfig, evaluate_model, prepare_prompts, price_items, train_model\n"
        f"config = RunConfig(demo_mode=True, base_model={tiny_base!r})\n"
    )
    prepared = run_cell(setup + "folder = prepare_prompts(config)")
    assert prepared.text.startswith("Items")
    assert prepared.values == []
    assert prepared.bars == []

    stopped = run_cell("train_model(config, val_size=8)", stop_after="step    10")
    (line,) = stopped.error
    assert re.fullmatch(r"Stopped after step \d+, which is saved\. Resume by `(.+)`\.", line)
    assert stopped.text.startswith(f"Data: {DATA}\nDevice: ")
    assert len(stopped.bars) == 1
    name = re.search(r"--resume ([\w.-]+)", line)[1]
    resumed = run_cell(f"run = train_model(config, resume={name!r})")
    assert "\nResuming from step " in resumed.text
    assert "\nTrained to step 80 in " in resumed.text
    assert resumed.error is None
    assert resumed.bars[0].startswith("100%")
    assert len(resumed.bars) == 1
    assert resumed.charts == 1

    judged = run_cell("results = evaluate_model(config, size=8)")
    assert judged.text.startswith("Run: ")
    assert "best reachable: the catalogue's own noise" in judged.text
    assert [bar.split(":")[0] for bar in judged.bars] == ["asking the base", "asking the run"]
    assert judged.charts == 3

    chart = run_cell(
        "from items import load_prompts\n"
        "from util import evaluate\n"
        "rows = load_prompts(folder)['test']\n"
        "figures = evaluate(lambda row: 99, rows, size=50, title='always 99')\n"
    )
    assert chart.text.startswith("always 99: Error: ")
    assert chart.charts == 2

    priced = run_cell("price_items(config, text='Brass table lamp')")
    assert re.search(r"\$\d+\.\d\d  \(80 %: \$\d+ to \$\d+\)  Brass table lamp", priced.text)
    (value,) = priced.values
    assert "'title': 'Brass table lamp'" in value

    refused = run_cell("price_items(config, run_name='nosuch', text='lamp')")
    (line,) = refused.error
    assert line.startswith("nosuch: no such run in outputs.")
