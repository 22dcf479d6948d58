"""How fast the real stages are, with random weights in the shape of Llama-3.2-3B.

    python tests/bench.py train                        # the lite recipe
    python tests/bench.py train --full                 # the full one
    python tests/bench.py train --batch-size 256 --dropout 0 --base-weights fp8 --steps 30
    python tests/bench.py train --as-t4                # as a T4 would be used
    python tests/bench.py eval --size 2000
    python tests/bench.py demo --busy 1                # beside a process that keeps a core busy
    torchrun --nproc-per-node 2 tests/bench.py train   # after the same without torchrun

Prints a line a figure and appends it, as JSON, to bench.jsonl in --folder. Rows have 102 tokens on
average; speed doesn't depend on the weights. A training step's time is the median of the last two
thirds of the steps, as the GPU measures it; busy_ms is the time of a step's kernels alone, the mean
of the last two steps. Without torchrun the data are made, which several processes must not do at
once.

A T4 is imitated: 14.5 GiB, no bf16, no flash attention, all else this GPU's. Kernels are the same,
but this GPU waits for their launches, which a T4 doesn't: only busy_ms says something.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
if __name__ == "__main__":  # test_gpu.py imports this module
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

import app
import items
import util

FLOP_PER_TOKEN = 2 * 2.82e9  # of a forward pass: parameters that aren't embeddings
TRAIN_TOKENS = 102  # a row, on average
PROMPT_TOKENS = 98
PROFILED = 2  # steps, the last
T4_MEMORY = 14.5  # GiB
SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
TINY = SHAPE | {  # of test_gpu.py
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def build_base(folder, shape):
    """Writes a random model with a tokenizer of words: each number 0 … 999 is one token."""
    if (folder / "config.json").exists():
        return
    words = [str(number) for number in range(1000)]
    words += [".", "00", "$", "?", *items.QUESTION.rstrip("?").split(), "Price", "is", "</s>", "?w"]
    words += [f"w{i}" for i in range(shape["vocab_size"] - len(words))]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?w"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)

    end = vocabulary["</s>"]
    torch.manual_seed(0)
    config = LlamaConfig(**shape, bos_token_id=end, eos_token_id=end, pad_token_id=end)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder)


def random_rows(n, seed):
    """n rows of prompt and completion with 102 tokens on average, at most 127."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        length = max(15, min(109, int(rng.gauss(87, 18))))
        text = " ".join(f"w{rng.randrange(100_000)}" for _ in range(length))
        prompt = f"{items.QUESTION}\n\n{text}\n\n{items.PREFIX}"
        rows.append({"prompt": prompt, "completion": f"{rng.randrange(1, 1000)}.00"})
    return rows


def write_dataset(folder, size):
    """Writes random prompts as prepare would, unless they are there."""
    record = folder / "prepare.json"
    source = json.dumps({"source": f"{size:,} random rows", "cutoff": 110})  # the course's
    if record.exists() and record.read_text("utf-8") == source:
        return
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"train": size, "val": 500, "test": size}
    for seed, (name, n) in enumerate(sizes.items()):
        Dataset.from_list(random_rows(n, seed)).to_parquet(folder / f"{name}.parquet")
    record.write_text(source, "utf-8")


def percent_of_limit(flop_per_s):
    """Of what bf16 matrix products alone would do on these GPUs."""
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(5):
        matrix @ matrix
    before = moment()
    for _ in range(30):
        matrix @ matrix
    rate = 30 * 2 * 8192**3 / seconds(before, moment())
    return 100 * flop_per_s / rate / util.world_size()


def moment():
    """When the GPU gets here: the CPU may be steps ahead of it."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(before, after):
    """Between two moments."""
    after.synchronize()
    return before.elapsed_time(after) / 1000


def report(folder, what, **figures):
    """Prints figures and appends them to bench.jsonl."""
    if util.world_size() > 1:
        what += f" on {util.world_size()} GPUs"
    record = {
        "what": what,
        "device": util.describe_device(),
        "versions": util.versions(),
        "date": time.strftime("%Y-%m-%d"),
    }
    with open(folder / "bench.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record | figures) + "\n")
    texts = []
    for name, value in figures.items():
        texts.append(f"{name} {value:,.1f}" if isinstance(value, float) else f"{name} {value}")
    print(f"BENCH {what:<46}  {'  '.join(texts)}", flush=True)


class Clock(TrainerCallback):
    """Takes the time of the first `timed` steps, and the GPU's busy time in those behind them."""

    def __init__(self, timed):
        self.timed = timed
        self.moments = []
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self.busy_ms = None  # of a step

    def on_step_begin(self, args, state, control, **_):
        if not self.moments:
            self.moments.append(moment())
        if state.global_step == self.timed:
            torch.cuda.synchronize()
            self.profiler.start()

    def on_step_end(self, args, state, control, **_):
        if state.global_step <= self.timed:
            self.moments.append(moment())
        if state.global_step == state.max_steps:  # before what is saved is copied
            self.read_profiler(state.max_steps - self.timed)

    def read_profiler(self, steps):
        torch.cuda.synchronize()
        self.profiler.stop()
        microseconds = 0.0
        for event in self.profiler.events():
            is_on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
            if is_on_gpu and not getattr(event, "is_user_annotation", False):
                microseconds += event.time_range.elapsed_us()
        self.busy_ms = microseconds / 1000 / steps

    def step_seconds(self, skipped):
        """The median of the steps but the first `skipped`, and what these took beyond it."""
        pairs = zip(self.moments[skipped:-1], self.moments[skipped + 1 :], strict=True)
        median = statistics.median(seconds(*pair) for pair in pairs)
        excess = seconds(self.moments[0], self.moments[skipped]) - skipped * median
        return median, excess


def bench_train(config, folder, arguments):
    """Times a training of `--steps` steps through app.train_model."""
    steps = arguments.steps
    clock = Clock(steps - PROFILED)
    build = util.build_trainer

    def build_with_clock(*given, **options):
        trainer = build(*given, **options)
        trainer.add_callback(clock)
        trainer.args.eval_strategy = "no"
        return trainer

    util.build_trainer = build_with_clock
    batch = arguments.batch_size or app.RECIPES[config.mode].batch_size
    write_dataset(config.dataset_folder, min(steps * batch, 12_000))
    run = f"{time.time():.0f}-{os.getpid()}"  # no two trainings share one
    app.train_model(
        config,
        run_name=run,
        max_steps=steps,
        batch_size=arguments.batch_size,
        lora_dropout=arguments.dropout,
        base_weights=arguments.base_weights,
        compile="on",
        save_steps=10 * steps,  # once, at the end
    )
    if not util.is_first_process():
        return
    record = items.read_json(config.project.folder(run) / "run.json")
    step, excess = clock.step_seconds(steps // 3)
    passes = 2  # the backward pass costs as much as the forward: the base is frozen
    flop_per_s = passes * FLOP_PER_TOKEN * TRAIN_TOKENS * batch / step
    title = ["train", "full" if arguments.full else "lite", "batch", str(batch)]
    title += ["r", str(record["recipe"]["lora_r"]), re.split("[:,]", record["base_weights"])[0]]
    if arguments.as_t4:
        title.append("as on a T4")
    report(
        folder,
        " ".join(title),
        step_ms=1000 * step,
        examples_per_s=batch / step,
        busy_ms=clock.busy_ms,
        percent_of_limit=percent_of_limit(flop_per_s),
        peak_gib=record["peak_memory_bytes"] / 2**30,
        compiling_s=excess,
        micro_batch=record["micro_batch"],
    )


def imitate_t4():
    """Has the program see what it would on a T4."""
    util.gpu_capability = lambda: (7, 5)
    app.detect_bf16_support = lambda: False
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(T4_MEMORY * 2**30 / total)


def bench_eval(config, folder, arguments):
    """Times two evaluations of the untouched base; the first one warms up."""
    write_dataset(config.dataset_folder, arguments.size)
    rates = []
    for _ in range(2):
        results = app.evaluate_model(config, run_name="base", size=arguments.size)
        rates.append(results["items_per_s"])
    report(
        folder,
        f"eval {arguments.size:,} items",
        items_per_s=rates[1],
        the_first_time=rates[0],
        percent_of_limit=percent_of_limit(FLOP_PER_TOKEN * PROMPT_TOKENS * rates[1]),
    )


def bench_demo(arguments):
    """Times the demo's three commands, as a user types them, beside `--busy` processes."""
    loop = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(loop) for _ in range(arguments.busy)]
    seconds = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            for stage in ("prepare", "train", "eval"):
                command = [sys.executable, app.__file__, stage, "--demo"]
                start = time.perf_counter()
                subprocess.run(command, cwd=folder, check=True)
                seconds[stage] = time.perf_counter() - start
    finally:
        for process in others:
            process.kill()
            process.wait()
    seconds["all"] = sum(seconds.values())
    report(arguments.folder, f"demo beside {arguments.busy} busy processes", **seconds)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", choices=["train", "eval", "demo"])
    add("--full", action="store_true", help="the full recipe instead of lite's")
    add("--as-t4", action="store_true", help="as a T4 would be used")
    add("--size", type=int, default=2000, help="items of eval (default 2000)")
    add("--steps", type=int, default=45, help="of train (default 45)")
    add("--batch-size", type=int)
    add("--dropout", type=float)
    add("--base-weights", choices=["auto", "nf4", "bf16-from-nf4", "fp8"])
    add("--busy", type=int, default=0, help="processes that keep a core busy beside the demo")
    add("--folder", type=Path, default=Path(tempfile.gettempdir(), "bench"))
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    arguments.folder.mkdir(exist_ok=True)
    if arguments.what == "demo":
        bench_demo(arguments)
        return
    base = arguments.folder / "3b"
    build_base(base, SHAPE)
    config = app.RunConfig(
        base_model=str(base),
        project_name="bench",
        lite_mode=not arguments.full,
        local=True,
        output_dir=str(arguments.folder / "outputs"),
    )
    if arguments.as_t4:
        imitate_t4()
    bench = bench_train if arguments.what == "train" else bench_eval
    bench(config, arguments.folder, arguments)


if __name__ == "__main__":
    main()
