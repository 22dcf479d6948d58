"""A stage in a process of its own, forked from a server that has imported everything: a second instead of ten.

    process = start(["train", …], folder, "kill_at_step", 3)
    process.join(), process.exitcode, said(folder)
"""
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import app

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["bitsandbytes", "datasets", "peft", "trl", "trl.trainer.sft_trainer", "child"])


def start(arguments, folder, hook=None, *options):
    process = CONTEXT.Process(target=stage, args=(arguments, str(folder), hook, options))
    process.start()
    return process


def said(folder):
    """What the stages in this folder have printed."""
    return Path(folder, "said.txt").read_text("utf-8", errors="replace")


def stage(arguments, folder, hook, options):
    os.chdir(folder)
    log = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, encoding="utf-8", closefd=False)
    if hook:
        globals()[hook](*options)
    app.main(arguments)


def start_two(arguments, folder, hook=None, *options, rank=None):
    """Two processes as a launcher starts them, the `hook` in the one with this `rank`, or in both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(arguments, folder, "launched", k, port, *((hook, *options) if hook and rank in (None, k) else ())) for k in (0, 1)]


def launched(rank, port, hook=None, *options):
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if hook:
        globals()[hook](*options)


def without_dropout():
    app.RECIPES["lite"]["lora_dropout"] = 0.0


def add_callback(**methods):
    """Has every trainer get a callback with these methods."""
    from transformers import TrainerCallback

    build = app.build_trainer

    def build_with_callback(*arguments, **options):
        trainer = build(*arguments, **options)
        trainer.add_callback(type("Hook", (TrainerCallback,), methods)())
        return trainer

    app.build_trainer = build_with_callback


def kill_if(condition):
    if condition:
        os.kill(os.getpid(), signal.SIGKILL)


def kill_at_step(step):
    add_callback(on_step_end=lambda self, args, state, control, **_: kill_if(state.global_step == step))


def kill_at_the_end_of_epoch(epoch):
    add_callback(on_epoch_end=lambda self, args, state, control, **_: kill_if(round(state.epoch) == epoch))


def kill_when_opening(ending):
    sys.addaudithook(lambda event, arguments: kill_if(event == "open" and str(arguments[0]).endswith(ending)))


def fill_the_disk_at_step(step):
    def fill(self, args, state, control, **_):
        if state.global_step == step:
            with open("ballast", "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    file.truncate(max(0, file.tell() - 65536))  # what a few lines of text need

    add_callback(on_step_end=fill)


def lose_the_number_at_step(step):
    def spoil(self, args, state, control, model=None, **_):
        if state.global_step == step - 1:
            next(p for name, p in model.named_parameters() if "lora_B" in name).data.fill_(float("nan"))

    add_callback(on_step_end=spoil)


def slow_down(seconds):
    def sleep(self, args, state, control, **_):
        print("sleeping", flush=True)
        end = time.time() + seconds
        while time.time() < end:  # a signal interrupts no sleep
            time.sleep(0.1)

    add_callback(on_step_begin=sleep)
