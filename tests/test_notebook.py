"""The demo as a notebook, in a real kernel: a cell shows what its reader expects, and no more."""

import os
import re
import time

import pytest
from jupyter_client import KernelManager

from conftest import ROOT

SECONDS = 120  # that a cell may take
DATA = "outputs/datasets/items_prompts_demo (the local copy that prepare left)"


class Notebook:
    """A kernel whose cells are run one by one."""

    def __init__(self, folder):
        self.manager = KernelManager()
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.manager.start_kernel(cwd=str(folder), env=environment)
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=SECONDS)

    def run(self, code, stop_after=None):
        """The Outputs of a cell; the Stop button is pressed once it has printed `stop_after`."""
        request = self.client.execute(code)
        outputs = Outputs()
        deadline = time.time() + SECONDS
        while time.time() < deadline:
            message = self.client.get_iopub_msg(timeout=SECONDS)
            if message["parent_header"].get("msg_id") != request:
                continue
            if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                return outputs
            outputs.add(message["msg_type"], message["content"])
            if stop_after and stop_after in outputs.text:
                self.manager.interrupt_kernel()
                stop_after = None
        raise TimeoutError(outputs.text)

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


class Outputs:
    """What is below a cell."""

    def __init__(self):
        self.text = ""  # printed
        self.errors = ""  # printed to standard error, as progress bars are
        self.charts = 0
        self.values = []  # of the last line, as text
        self.others = []  # kinds of results that a reader doesn't expect
        self.error = None  # the lines of an exception

    def add(self, kind, content):
        if kind == "stream":
            name = "text" if content["name"] == "stdout" else "errors"
            setattr(self, name, getattr(self, name) + content["text"])
        elif kind == "error":
            self.error = content["traceback"]
        elif kind in ("display_data", "execute_result"):
            if "image/png" in content["data"]:
                self.charts += 1
            else:
                self.values.append(content["data"]["text/plain"])
        elif kind not in ("execute_input", "status"):
            self.others.append(kind)

    @property
    def topics(self):
        """The first words of the printed lines."""
        return [line.split()[0].strip(":,") for line in self.text.splitlines()]

    @property
    def bars(self):
        """What is left of the progress bars: the last state of each line."""
        states = [line.rpartition("\r")[2] for line in self.errors.split("\n")]
        return [state for state in states if state.strip()]


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    notebook = Notebook(tmp_path_factory.mktemp("notebook"))
    yield notebook
    notebook.close()


def test_demo_runs_in_notebook(notebook, tiny_base):
    """Charts without a magic, one bar for training, a Stop button that saves the step."""
    setup = (
        "from app import RunConfig, evaluate_model, prepare_prompts, price_items, train_model\n"
        f"config = RunConfig(demo_mode=True, base_model={tiny_base!r})\n"
    )
    prepared = notebook.run(setup + "folder = prepare_prompts(config)")
    assert prepared.topics == ["Items", "Rows", "Cut", "Price", "Tokens", "Near", "Saved"]
    assert prepared.bars == []
    assert prepared.charts == 1

    stopped = notebook.run("train_model(config, val_size=8)", stop_after="step    10")
    (line,) = stopped.error
    assert re.fullmatch(r"Stopped after step \d+, which is saved\. Resume by `(.+)`\.", line)
    assert stopped.text.startswith(f"Data: {DATA}\nDevice: ")
    assert len(stopped.bars) == 1
    resume = line.split("`")[1]
    resumed = notebook.run(f"run = {resume}")
    assert "\nResuming from step " in resumed.text
    assert "\nTrained to step 80 in " in resumed.text
    assert resumed.error is None
    assert resumed.bars[0].startswith("100%")
    assert len(resumed.bars) == 1
    assert resumed.charts == 1

    judged = notebook.run("results = evaluate_model(config, size=8)")
    assert judged.topics[:2] == ["Run", "Data"]
    assert "best reachable: the catalogue's own noise" in judged.text
    assert [bar.split(":")[0] for bar in judged.bars] == ["asking the base", "asking the run"]
    assert judged.charts == 4

    chart = notebook.run(
        "from items import load_prompts\n"
        "from util import evaluate\n"
        "rows = load_prompts(folder)['test']\n"
        "figures = evaluate(lambda row: 99, rows, size=50, title='always 99')\n"
    )
    assert chart.topics == ["always"]
    assert chart.charts == 2

    priced = notebook.run("price_items(config, text='Brass table lamp')")
    assert re.search(r"\$\d+\.\d\d  \(80 %: \$\d+ to \$\d+\)  Brass table lamp", priced.text)
    (value,) = priced.values
    assert "'title': 'Brass table lamp'" in value

    refused = notebook.run("price_items(config, run_name='nosuch', text='lamp')")
    (line,) = refused.error
    assert line.startswith("nosuch: no such run in outputs.")
    for cell in (prepared, stopped, resumed, judged, chart, priced, refused):
        assert cell.others == []
