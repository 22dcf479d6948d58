"""How fast the real stages are, with random weights in the shape of Llama-3.2-3B: speed doesn't depend on them.

    python tests/bench.py train                        # the lite recipe
    python tests/bench.py train --full                 # the full one
    python tests/bench.py train --batch-size 256 --base-weights nf4 --steps 30
    python tests/bench.py eval --size 2000
    python tests/bench.py prepare --size 100000
    torchrun --nproc-per-node 2 tests/bench.py train   # after the same without torchrun, which makes the data
    python tests/bench.py train --peers peers.py       # the peers' figures from the same call, where that script is

Prints a table and appends one line of JSON a figure to bench.jsonl in --folder. Rows have 102 tokens on average. A
training step's time is the median of the last two thirds of the steps.
"""
import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import app
from items import QUESTION, Item, demo_items

FLOP_PER_TOKEN = 2 * 2.82e9  # of one forward pass: two for each parameter that isn't an embedding
SHAPE = dict(vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
             num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, rms_norm_eps=1e-5, rope_theta=500000.0)
TINY = dict(SHAPE, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)


def build_base(folder, shape):
    """A random model with a tokenizer of words, to which each number 0 … 999 is one token, as to Llama 3's."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if (folder / "config.json").exists():
        return
    words = [*map(str, range(1000)), ".", "00", "$", "?", *QUESTION.rstrip("?").split(), "Price", "is", "</s>", "?w"]
    words += [f"w{i}" for i in range(shape["vocab_size"] - len(words))]
    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?w"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token="</s>", pad_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        end = words.index("</s>")
        model = LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=end, eos_token_id=end, pad_token_id=end)).bfloat16()
    model.save_pretrained(folder)
    del model


def rows(n, seed):
    """n rows of prompt and completion with 102 tokens on average, at most 127."""
    rng = random.Random(seed)
    for _ in range(n):
        text = " ".join(f"w{rng.randrange(100_000)}" for _ in range(max(15, min(109, int(rng.gauss(87, 18))))))
        yield {"prompt": f"{QUESTION}\n\n{text}\n\nPrice is $", "completion": f"{rng.randrange(1, 1000)}.00"}


def write_dataset(folder, size):
    from datasets import Dataset, DatasetDict

    from items import save_prompts, write_json

    source = f"{size:,} random rows"
    if app.read_json(folder / "prepare.json").get("source") == source:
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_prompts(folder, DatasetDict({name: Dataset.from_list([*rows(n, seed)]) for seed, (name, n) in enumerate(
        (("train", size), ("val", 500), ("test", size)))}))
    write_json(folder / "prepare.json", {"source": source})


def matrix_rate():
    """bf16 matrix products' FLOP a second on this GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(5):
        a @ a
    torch.cuda.synchronize()
    start = time.time()
    for _ in range(30):
        a @ a
    torch.cuda.synchronize()
    return 30 * 2 * 8192**3 / (time.time() - start)


def moment():
    """Now, or when the GPU gets here: the CPU may be steps ahead of it."""
    import torch

    if not torch.cuda.is_available():
        return time.time()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(before, after):
    if isinstance(before, float):
        return after - before
    after.synchronize()
    return before.elapsed_time(after) / 1000


def report(folder, what, **figures):
    what += f" on {app.processes()[0]} GPUs" * (app.processes()[0] > 1)
    with open(folder / "bench.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"what": what, "device": app.describe_device(), "versions": app.versions(),
                               "date": time.strftime("%Y-%m-%d")} | figures) + "\n")
    print(f"BENCH {what:<44}" + "  ".join(f"{name} {value:,.1f}" if isinstance(value, float) else f"{name} {value}"
                                         for name, value in figures.items()), flush=True)


def bench_train(config, folder, arguments):
    from transformers import TrainerCallback

    moments, before_first, after_first, start, steps = [], [], [], time.time(), arguments.steps
    build = app.build_trainer

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if not moments:
                moments.append(moment())
                before_first.append(app.memory()[0])

        def on_step_end(self, args, state, control, **_):
            moments.append(moment())
            after_first or after_first.append(time.time())

    def build_with_clock(*given, **options):
        trainer = build(*given, **options)
        trainer.add_callback(Clock())
        trainer.args.save_strategy = trainer.args.eval_strategy = "no"
        return trainer

    app.build_trainer = build_with_clock
    recipe = app.RECIPES[config.mode]
    if arguments.dropout is not None:
        recipe["lora_dropout"] = arguments.dropout
    batch = arguments.batch_size or recipe["batch_size"]
    write_dataset(config.dataset_folder, min(steps * batch, 12_000))
    run = f"bench-{time.time():.0f}-{os.getpid()}"
    app.train_model(config, run_name=run, max_steps=steps, batch_size=arguments.batch_size, lora_r=arguments.lora_r,
                    micro_batch=arguments.micro_batch, base_weights=arguments.base_weights, compile=arguments.compile, save_steps=10 * steps)
    if not app.is_first():
        return
    record = app.read_json(config.run_folder(run) / "run.json")
    taken = statistics.median(seconds(*pair) for pair in zip(moments[steps // 3:], moments[steps // 3 + 1:]))
    rate, used = matrix_rate(), 4 / 2 * FLOP_PER_TOKEN * 102 * batch / taken  # backward: as much again, the base is frozen
    report(folder, f"train {config.mode} batch {batch} r {record['recipe']['lora_r']} {record['base_weights'].split(':')[0]}",
           step_ms=1000 * taken, examples_per_s=batch / taken, percent_of_limit=100 * used / rate / app.processes()[0] if rate else None,
           peak_gib=record["peak_memory_bytes"] / 2**30, at_rest_gib=before_first[0] / 2**30,
           compiling_s=seconds(moments[0], moments[steps // 3]) - steps // 3 * taken, first_step_s=after_first[0] - start,
           micro_batch=record["micro_batch"])


def bench_eval(config, folder, arguments):
    write_dataset(config.dataset_folder, arguments.size)
    results = [app.evaluate_model(config, run_name="base", size=arguments.size) for _ in range(2)]
    if not app.is_first():
        return
    first, second = (found["items_per_s"] for found in results)
    rate = matrix_rate()
    report(folder, f"eval {arguments.size:,} items", items_per_s=second, the_first_time=first,
           percent_of_limit=100 * FLOP_PER_TOKEN * 98 * second / rate / app.processes()[0] if rate else None)


def descriptions(n, seed):
    """n descriptions in the course's form, of some 90 tokens to Llama 3, with their prices."""
    for i in range(n):
        one, *others = demo_items(3, seed * n + i)
        more = " ".join(f"Goes well with the {other.title} of {other.category}, {i % 9973:x}." for other in others)
        yield {"summary": one.summary.replace("\nDetails", f" Comes with a manual, its cables and a warranty. {more}\nDetails"), "price": one.price}


def bench_prepare(config, folder, arguments):
    """Published items of a name, as they come from the Hub: here the name is that of a folder."""
    import resource

    from datasets import Dataset

    data, name = folder / "bench" / config.dataset_name.replace("prompts_", ""), {"train": arguments.size, "validation": 1000, "test": 1000}
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True)
    for seed, (split, n) in enumerate(name.items()):
        Dataset.from_generator(descriptions, gen_kwargs={"n": n, "seed": seed}, cache_dir=str(folder)).to_parquet(data / f"{split}.parquet")
    os.chdir(folder)
    peak, stop = [0], threading.Event()

    def watch():  # memory of its own; pages of mapped files are the system's to take back
        while not stop.wait(0.05):
            text = Path("/proc/self/status").read_text("utf-8")
            peak[0] = max(peak[0], int(re.search(r"RssAnon:\s+(\d+)", text)[1]) * 1024)

    start = time.time()
    threading.Thread(target=watch, daemon=True).start()
    app.prepare_prompts(config, app.DEFAULT_CUTOFF)
    taken = time.time() - start
    stop.set()
    tokenizer = app.load_tokenizer(config.base_model)
    items = [Item("", "", row["price"], summary=row["summary"]) for row in descriptions(2000, 9)]
    start = time.time()
    for item in items:
        item.make_prompts(tokenizer, app.DEFAULT_CUTOFF, True)
    one_by_one = len(items) / (time.time() - start)
    report(folder, f"prepare {arguments.size:,} items", items_per_s=arguments.size / taken, seconds=taken, one_by_one_items_per_s=one_by_one,
           peak_gib=peak[0] / 2**30, with_mapped_files_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "eval", "prepare"])
    parser.add_argument("--full", action="store_true", help="the full recipe instead of lite's")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to try the benchmark itself on a CPU")
    parser.add_argument("--base", type=Path, help="a folder with another base model, or for `prepare` a tokenizer only")
    parser.add_argument("--size", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--lora-r", type=int)
    parser.add_argument("--dropout", type=float)
    parser.add_argument("--base-weights", choices=["auto", "nf4", "bf16-from-nf4"])
    parser.add_argument("--compile", choices=["auto", "on", "off"], default="on")
    parser.add_argument("--memory", type=float, metavar="GIB", help="as if the GPU had so much")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "bench"))
    parser.add_argument("--peers", type=Path, help="a script that times what one would use instead")
    arguments = parser.parse_args()
    base = arguments.base or arguments.folder / ("tiny" if arguments.tiny else "3b")
    arguments.base or build_base(base, TINY if arguments.tiny else SHAPE)
    config = app.RunConfig(str(base), "bench", "bench" if arguments.what == "prepare" else None, not arguments.full, local=True, output_dir=str(arguments.folder / "outputs"))
    if arguments.memory:
        import torch

        torch.cuda.set_per_process_memory_fraction(arguments.memory * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    globals()[f"bench_{arguments.what}"](config, arguments.folder, arguments)
    if arguments.peers and arguments.what != "prepare":
        batch, r, targets = ("256", "256", "all") if arguments.full else ("32", "32", "attn")
        subprocess.run([sys.executable, arguments.peers, "build"], check=True)
        subprocess.run([sys.executable, arguments.peers, *(
            ["notebook_eval"] if arguments.what == "eval" else ["notebook", batch, r, targets, "20"])], check=True)


if __name__ == "__main__":
    main()
