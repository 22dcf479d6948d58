"""Runs a stage in a process of its own, forked from a server that has imported everything.

That takes a second instead of ten. `hook` names a function of this module that is called, with
`options`, before the stage: to kill it at a step, to fill the disk.

    process = start(["train", …], folder, "kill_at_step", 3)
    finish(process), said(folder)
"""

import atexit
import ctypes
import locale
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import app

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["util", "child"])
LOG = "said.txt"


def start(arguments, folder, hook=None, *options, environment=()):
    """The process of a stage that runs in `folder`; what it prints is appended to LOG there."""
    given = (arguments, str(folder), hook, options, environment)
    process = CONTEXT.Process(target=run_stage, args=given)
    process.start()
    return process


def finish(process, within=120):
    """The exit code of a process that has to end within so many seconds."""
    process.join(within)
    assert process.exitcode is not None, f"still running after {within} s"
    return process.exitcode


def said(folder):
    """What the stages in this folder have printed."""
    log = Path(folder, LOG)
    return log.read_text("utf-8", errors="replace") if log.exists() else ""


def wait_for(text, folder, within=60):
    """Waits until a stage in this folder has printed the text."""
    deadline = time.time() + within
    while text not in said(folder):
        assert time.time() < deadline, f"{text!r} was not printed within {within} s"
        time.sleep(0.05)


def run_stage(arguments, folder, hook, options, environment):
    os.chdir(folder)
    os.environ.update(environment)
    log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.stderr = open_output()
    atexit._clear()
    if hook:
        globals()[hook](*options)
    try:
        app.main(arguments)
    finally:
        atexit._run_exitfuncs()  # as an interpreter does, but not multiprocessing


def open_output():
    """What is open as 1, as text."""
    return open(1, "w", buffering=1, encoding="utf-8", closefd=False)


def start_two(arguments, folder, hook=None, *options, rank=None):
    """Two processes as a launcher starts them; the `hook` in that of this `rank`, or in both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for one in (0, 1):
        environment = {
            "WORLD_SIZE": "2",
            "RANK": str(one),
            "LOCAL_RANK": str(one),
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        hooked = (hook, *options) if rank in (None, one) else ()
        processes.append(start(arguments, folder, *hooked, environment=environment))
    return processes


# Hooks


def drop_powers():
    """Permissions count for root, too."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, none) == 0  # as capset(2) has it


def write_output_in(encoding):
    """As in a terminal of that encoding, which refuses signs that it lacks."""
    locale.setlocale(locale.LC_ALL, "C")
    sys.stdout.reconfigure(encoding=encoding, errors="strict")


def close_reader():
    """The output becomes a pipe from which nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    sys.stdout = sys.stderr = open_output()


def fill_output():
    """The disk with the file that standard output goes to is full."""
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, 1)
    os.dup2(full, 2)
    sys.stdout = sys.stderr = open_output()


def close_output():
    """As after `>&- 2>&-`."""
    os.close(1)
    os.close(2)
    sys.stdout = sys.stderr = None


def add_callback(**methods):
    """Every trainer gets a callback with these methods."""
    import util

    build = util.build_trainer

    def build_with_callback(*arguments, **options):
        trainer = build(*arguments, **options)
        trainer.add_callback(type("Hook", (util.TrainerCallback,), methods)())
        return trainer

    util.build_trainer = build_with_callback


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_step(step):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == step:
            kill()

    add_callback(on_step_end=on_step_end)


def kill_at_file_event(number, part):
    """Kills the process at its n-th file event in a path with this part: opened, made, renamed."""
    seen = []

    def audit(event, arguments):
        if event in ("open", "os.mkdir", "os.rename", "os.remove") and part in str(arguments[:2]):
            seen.append(event)
            if len(seen) == number:
                kill()

    sys.addaudithook(audit)


def limit_file_size(limit):
    """Files can't get larger than so many bytes; for PyTorch that is as a quota that is used up."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def fill_disk(folder, room):
    """Leaves `room` KiB on the folder's disk."""
    with open(Path(folder, "ballast"), "wb", buffering=0) as file:
        with suppress(OSError):
            while True:
                file.write(bytes(4096))
        file.truncate(max(0, file.tell() - 1024 * room))


def fill_disk_at_step(step):
    """Fills the disk but for what a few lines of text need."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == step:
            fill_disk("outputs", 64)

    add_callback(on_step_end=on_step_end)


def make_weights_nan_before_step(step):
    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step == step - 1:
            weights = [p for name, p in model.named_parameters() if "lora_B" in name]
            weights[0].data.fill_(float("nan"))

    add_callback(on_step_end=on_step_end)


def slow_down(seconds):
    """Prints `sleeping` at the beginning of each step, and takes so long."""

    def on_step_begin(self, args, state, control, **_):
        print("sleeping", flush=True)
        end = time.time() + seconds
        while time.time() < end:  # a signal must not cut it short
            time.sleep(0.1)

    add_callback(on_step_begin=on_step_begin)


def limit_memory(max_rows, after_passes=0, then_rows=None):
    """Training runs out of memory with more than `max_rows` rows at once.

    After so many forward passes in training the limit is `then_rows`.
    """
    import torch

    import util

    load_base = util.load_base
    passes = []

    def check(module, _, inputs):
        if not module.training or not torch.is_grad_enabled():
            return
        limit = max_rows if then_rows is None or len(passes) < after_passes else then_rows
        if len(inputs["input_ids"]) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        passes.append(1)

    def load_with_limit(*arguments):
        model = load_base(*arguments)
        model.register_forward_pre_hook(check, with_kwargs=True)
        return model

    util.load_base = load_with_limit


def spoil_export():
    """The merged model that is written lacks what its last layers have learned."""
    import util

    load = util.load_merged

    def load_spoiled(*arguments, out_precision=None, **options):
        model = load(*arguments, out_precision=out_precision, **options)
        if out_precision:
            model.model.norm.weight.data *= -1
        return model

    util.load_merged = load_spoiled
