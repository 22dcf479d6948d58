"""How fast the real stages are, with random weights in the shape of Llama-3.2-3B.

    python tests/bench.py train                        # the lite recipe
    python tests/bench.py train --full                 # the full one
    python tests/bench.py train --batch-size 256 --base-weights fp8 --steps 30
    python tests/bench.py train --as-t4                # as a T4 would be used
    python tests/bench.py eval --size 2000
    python tests/bench.py prepare --size 100000
    python tests/bench.py demo --busy 1                # beside a process that keeps a core busy
    torchrun --nproc-per-node 2 tests/bench.py train   # after the same without torchrun
    python tests/bench.py train --peers peers.py       # then a script that times alternatives

Prints a table and appends one line of JSON a figure to bench.jsonl in --folder. Rows have 102
tokens on average; speed doesn't depend on the weights. A training step's time is the median of the
last two thirds of the steps, as the GPU measures it; busy_ms is the time of a step's kernels alone,
the mean of the last two steps. Without torchrun the data are made, which several processes must not
do at once.

A T4 is imitated: 14.5 GiB, no bf16, no flash attention, all else this GPU's. Kernels are the same,
but this GPU waits for their launches, which a T4 doesn't: only busy_ms says something. `--as-t4`
also prints what a step's kernels need on a T4 at least, from their number of operations and, for
kernels that move memory, the bytes that a copy would move here in their time.
"""

import argparse
import json
import os
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
if __name__ == "__main__":  # test_gpu.py imports this module
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

import app
import items
import util

PARAMETERS = 2.82e9  # that aren't embeddings
FLOP_PER_TOKEN = 2 * PARAMETERS  # of one forward pass
PRODUCT_VALUES = 28 * 54_272  # a token's inputs and outputs of all layers' matrix products
TRAIN_TOKENS = 102  # a row, on average
PADDED_TOKENS = 127  # a row, padded to the longest
PROFILED = 2  # steps, the last
T4_MEMORY = 14.5  # GiB
T4_FLOP = 65e12  # a second, of fp16 matrix products; this and the next from NVIDIA's data sheet
T4_BYTES = 320e9  # a second
# Kinds of kernel and parts of their names, the first that match
KERNEL_KINDS = {
    "expanding nf4": ("dequantize",),
    "attention": ("fmha", "flash", "attention"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "gemv", "splitk"),
    "optimizer": ("multi_tensor", "adam", "kblockwise", "koptimizer"),
    "other elementwise work": ("",),
}
PROMPT_TOKENS = 98
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
TINY = SHAPE | {
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
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
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
    source = f"{size:,} random rows"
    if items.read_json(folder / "prepare.json").get("source") == source:
        return
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"train": size, "val": 500, "test": size}
    splits = DatasetDict()
    for seed, (name, n) in enumerate(sizes.items()):
        splits[name] = Dataset.from_list(random_rows(n, seed))
    items.save_prompts(folder, splits, {"source": source})


def matrix_rate():
    """bf16 matrix products' FLOP a second on this GPU, None without one."""
    if not torch.cuda.is_available():
        return None
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(5):
        matrix @ matrix
    torch.cuda.synchronize()
    start = time.time()
    for _ in range(30):
        matrix @ matrix
    torch.cuda.synchronize()
    return 30 * 2 * 8192**3 / (time.time() - start)


def percent_of_limit(flop_per_s):
    """Of what bf16 matrix products alone would do on these GPUs."""
    rate = matrix_rate()
    return 100 * flop_per_s / rate / util.world_size() if rate else None


def moment():
    """Now, or when the GPU gets here: the CPU may be steps ahead of it."""
    if not torch.cuda.is_available():
        return time.time()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(before, after):
    """Between two moments."""
    if isinstance(before, float):
        return after - before
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
    """Takes the time of the first `timed` steps, and memory before the first."""

    def __init__(self, timed):
        self.timed = timed
        self.start = time.time()
        self.moments = []
        self.at_rest = 0
        self.first_step_done = 0.0

    def on_step_begin(self, args, state, control, **_):
        if not self.moments:
            self.at_rest = util.memory().used
            self.moments.append(moment())

    def on_step_end(self, args, state, control, **_):
        if state.global_step <= self.timed:
            self.moments.append(moment())
        self.first_step_done = self.first_step_done or time.time()

    def step_seconds(self, skipped):
        """The median of the steps but the first `skipped`, and what these took beyond it."""
        pairs = zip(self.moments[skipped:-1], self.moments[skipped + 1 :], strict=True)
        median = statistics.median(seconds(*pair) for pair in pairs)
        excess = seconds(self.moments[0], self.moments[skipped]) - skipped * median
        return median, excess


class KernelTimes(TrainerCallback):
    """Takes the time of each kernel of the GPU in the steps behind the first `skipped`."""

    def __init__(self, skipped):
        self.skipped = skipped
        self.profiler = None
        self.milliseconds = {}  # {name: of a step}

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.skipped and torch.cuda.is_available():
            torch.cuda.synchronize()
            activities = [torch.profiler.ProfilerActivity.CUDA]
            self.profiler = torch.profiler.profile(activities=activities)
            self.profiler.start()

    def on_train_end(self, args, state, control, **_):
        if not self.profiler:
            return
        torch.cuda.synchronize()
        self.profiler.stop()
        steps = state.global_step - self.skipped
        for event in self.profiler.events():
            is_on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
            if is_on_gpu and not getattr(event, "is_user_annotation", False):
                milliseconds = event.time_range.elapsed_us() / 1000 / steps
                self.milliseconds[event.name] = self.milliseconds.get(event.name, 0) + milliseconds

    def busy(self):
        """Milliseconds of a step in which the GPU works."""
        return float(sum(self.milliseconds.values()))

    def print_longest(self, count=16):
        """Prints the kernels that take longest."""
        by_time = sorted(self.milliseconds.items(), key=lambda pair: -pair[1])
        for name, milliseconds in by_time[:count]:
            print(f"{milliseconds:8.2f} ms  {kernel_kind(name):<24}{name[:70]}")

    def by_kind(self):
        """{kind of kernel: milliseconds of a step}."""
        kinds = dict.fromkeys(KERNEL_KINDS, 0.0)
        for name, milliseconds in self.milliseconds.items():
            kinds[kernel_kind(name)] += milliseconds
        return kinds


def kernel_kind(name):
    """The kind of a kernel; those that the compiler makes are elementwise."""
    name = name.lower()
    if name.startswith("triton"):
        return "other elementwise work"
    kinds = (kind for kind, parts in KERNEL_KINDS.items() if any(part in name for part in parts))
    return next(kinds)


def copy_rate(values):
    """Bytes a second, read and written, of copying so many fp16 values on this GPU."""
    source = torch.zeros(values, device="cuda", dtype=torch.float16)
    target = torch.empty_like(source)
    for _ in range(5):
        target.copy_(source)
    before = moment()
    for _ in range(100):
        target.copy_(source)
    return 100 * 4 * values / seconds(before, moment())


def print_t4_table(kinds, tokens, passes, micro_batches):
    """What a step's kernels need on a T4 at least, by kind.

    `kinds` are milliseconds of a step here, `tokens` those of a step with padding; there are so
    many `passes` through the base, forward and backward, of each of the micro-batches.
    """
    product_bytes = 2 * passes * (tokens * PRODUCT_VALUES + micro_batches * PARAMETERS)
    rate = copy_rate(tokens // micro_batches * SHAPE["intermediate_size"])
    print("| kernels | ms here | TFLOP | GB | ms on a T4, at least |")
    print("|---|---|---|---|---|")
    total = 0
    for kind, milliseconds in kinds.items():
        flop, moved = 0, milliseconds / 1000 * rate
        if kind == "matrix products":
            flop, moved = passes * tokens * FLOP_PER_TOKEN, product_bytes
        needed = 1000 * max(flop / T4_FLOP, moved / T4_BYTES)
        total += needed
        figures = [f"{milliseconds:.1f}", f"{flop / 1e12:.1f}", f"{moved / 1e9:.1f}"]
        print(f"| {' | '.join([kind, *figures, f'{needed:.0f}'])} |")
    print(f"| all | {sum(kinds.values()):.1f} | | | {total:.0f} |")


def bench_train(config, folder, arguments):
    steps = arguments.steps
    clock = Clock(steps - PROFILED)
    kernels = KernelTimes(steps - PROFILED)
    build = util.build_trainer

    collators = []

    def build_with_clock(*given, **options):
        trainer = build(*given, **options)
        collators.append(trainer.data_collator)
        trainer.add_callback(clock)
        trainer.add_callback(kernels)
        trainer.args.save_strategy = trainer.args.eval_strategy = "no"
        return trainer

    util.build_trainer = build_with_clock
    recipe = app.RECIPES[config.mode]
    batch = arguments.batch_size or recipe.batch_size
    write_dataset(config.dataset_folder, min(steps * batch, 12_000))
    run = f"{time.time():.0f}-{os.getpid()}"  # no two trainings share one
    app.train_model(
        config,
        run_name=run,
        max_steps=steps,
        batch_size=arguments.batch_size,
        lora_r=arguments.lora_r,
        lora_dropout=arguments.dropout,
        micro_batch=arguments.micro_batch,
        base_weights=arguments.base_weights,
        compile=arguments.compile,
        save_steps=10 * steps,
    )
    if not util.is_first_process():
        return
    record = items.read_json(config.run_folder(run) / "run.json")
    step, excess = clock.step_seconds(steps // 3)
    passes = 2  # the backward pass costs as much as the forward: the base is frozen
    flop_per_s = passes * FLOP_PER_TOKEN * TRAIN_TOKENS * batch / step
    report(
        folder,
        train_title(record, batch, arguments),
        step_ms=1000 * step,
        examples_per_s=batch / step,
        busy_ms=kernels.busy(),
        percent_of_limit=percent_of_limit(flop_per_s),
        peak_gib=record["peak_memory_bytes"] / 2**30,
        at_rest_gib=clock.at_rest / 2**30,
        compiling_s=excess,
        first_step_s=clock.first_step_done - clock.start,
        train_s=record["seconds"]["train"],
        micro_batch=record["micro_batch"],
    )
    if arguments.kernels:
        kernels.print_longest()
    if arguments.as_t4 and torch.cuda.is_available():
        is_packed = isinstance(collators[-1], util.PackedCollator)
        tokens = batch * (TRAIN_TOKENS if is_packed else PADDED_TOKENS)
        print_t4_table(kernels.by_kind(), tokens, passes, batch // record["micro_batch"])


def train_title(record, batch, arguments):
    """What a training was, from its run.json."""
    recipe = "full" if arguments.full else "lite"
    weights = re.split("[:,]", record["base_weights"])[0]
    attention = f" {arguments.attention}" if arguments.attention else ""
    as_t4 = " as on a T4" if arguments.as_t4 else ""
    return (
        f"train {recipe} batch {batch} r {record['recipe']['lora_r']} {weights}{attention}{as_t4}"
    )


def imitate_t4():
    """Has the program see what it would on a T4."""
    util.gpu_capability = lambda: (7, 5)
    app.detect_bf16_support = lambda: False
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def bench_eval(config, folder, arguments):
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


def descriptions(n, seed):
    """n descriptions in the course's form, of some 90 tokens to Llama 3, with their prices."""
    for i in range(n):
        one, *others = items.demo_items(3, seed * n + i)
        sentences = [
            f"Goes well with the {other.title} of {other.category}, {i % 9973:x}."
            for other in others
        ]
        more = f" Comes with a manual, its cables and a warranty. {' '.join(sentences)}"
        yield {"summary": one.summary.replace("\nDetails", f"{more}\nDetails"), "price": one.price}


class PeakMemory(threading.Thread):
    """Watches this process's own memory; pages of mapped files are the system's to take back."""

    def __init__(self):
        super().__init__(daemon=True)
        self.bytes = 0
        self.stopped = threading.Event()

    def run(self):
        while not self.stopped.wait(0.05):
            text = Path("/proc/self/status").read_text("utf-8")
            kilobytes = int(re.search(r"RssAnon:\s+(\d+)", text)[1])
            self.bytes = max(self.bytes, kilobytes * 1024)


def bench_prepare(config, folder, arguments):
    """Published items of a name, as they come from the Hub: here the name is that of a folder."""
    data = folder / "bench" / config.dataset_name.replace("prompts_", "")
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True)
    sizes = {"train": arguments.size, "validation": 1000, "test": 1000}
    for seed, (split, n) in enumerate(sizes.items()):
        given = {"n": n, "seed": seed}
        rows = Dataset.from_generator(descriptions, gen_kwargs=given, cache_dir=str(folder))
        rows.to_parquet(data / f"{split}.parquet")
    os.chdir(folder)

    peak = PeakMemory()
    peak.start()
    start = time.time()
    app.prepare_prompts(config)
    taken = time.time() - start
    peak.stopped.set()

    tokenizer = util.load_tokenizer(config.base_model)
    one_by_one = []
    for row in descriptions(2000, 9):
        one_by_one.append(items.Item("", "", row["price"], summary=row["summary"]))
    start = time.time()
    for item in one_by_one:
        item.make_prompts(tokenizer, app.DEFAULT_CUTOFF, True)
    rate_one_by_one = len(one_by_one) / (time.time() - start)
    report(
        folder,
        f"prepare {arguments.size:,} items",
        items_per_s=arguments.size / taken,
        seconds=taken,
        one_by_one_items_per_s=rate_one_by_one,
        peak_gib=peak.bytes / 2**30,
        with_mapped_files_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
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
    arguments.folder.mkdir(exist_ok=True)
    report(arguments.folder, f"demo beside {arguments.busy} busy processes", **seconds)


def run_peers(arguments):
    """Runs the script that times what one would use instead, in the same call."""
    script = [sys.executable, arguments.peers]
    subprocess.run([*script, "build"], check=True)
    if arguments.what == "eval":
        subprocess.run([*script, "notebook_eval"], check=True)
        return
    batch, r, targets = ("256", "256", "all") if arguments.full else ("32", "32", "attn")
    t4 = ["t4"] if arguments.as_t4 else []
    subprocess.run([*script, "notebook", batch, r, targets, "20", *t4], check=True)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", choices=["train", "eval", "prepare", "demo"])
    add("--full", action="store_true", help="the full recipe instead of lite's")
    add("--tiny", action="store_true", help="a tiny shape, to try the benchmark itself on a CPU")
    add(
        "--base",
        type=Path,
        help="a folder with another base; `prepare` needs its config and tokenizer only",
    )
    add("--size", type=int, default=2000)
    add("--steps", type=int, default=45)
    add("--batch-size", type=int)
    add("--micro-batch", type=int)
    add("--lora-r", type=int)
    add("--dropout", type=float)
    add("--base-weights", choices=["auto", "nf4", "bf16-from-nf4", "fp8"])
    add("--compile", choices=["auto", "on", "off"], default="on")
    add("--attention", choices=["packed", "packed_efficient", "padded"], help="instead of util's")
    add("--as-t4", action="store_true", help="as a T4 would be used")
    add("--memory", type=float, metavar="GIB", help="as if the GPU had so much")
    add("--busy", type=int, default=0, help="processes that keep a core busy beside the demo")
    add("--kernels", action="store_true", help="print the kernels that take longest")
    add("--folder", type=Path, default=Path(tempfile.gettempdir(), "bench"))
    add("--peers", type=Path, help="a script that times what one would use instead")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    if arguments.what == "demo":
        bench_demo(arguments)
        return
    base = arguments.base or arguments.folder / ("tiny" if arguments.tiny else "3b")
    if not arguments.base:
        build_base(base, TINY if arguments.tiny else SHAPE)
    config = app.RunConfig(
        base_model=str(base),
        project_name="bench",
        data_user="bench" if arguments.what == "prepare" else None,
        lite_mode=not arguments.full,
        local=True,
        output_dir=str(arguments.folder / "outputs"),
    )
    if arguments.as_t4:
        imitate_t4()
        arguments.memory = arguments.memory or T4_MEMORY
    if arguments.attention:
        name = None if arguments.attention == "padded" else arguments.attention
        util.choose_attention = lambda *_: name
    if arguments.memory and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(arguments.memory * 2**30 / total)
    stages = {"train": bench_train, "eval": bench_eval, "prepare": bench_prepare}
    stages[arguments.what](config, arguments.folder, arguments)
    if arguments.peers and arguments.what != "prepare":
        run_peers(arguments)


if __name__ == "__main__":
    main()
