"""The engine behind the stages, in the order of a run: from the base model to the report.

    from util import evaluate
    evaluate(lambda row: "$49.99", rows)    # any function from a row to an answer

     1. The base model       finding, checking and loading it
     2. Reading prices       PriceReader: the probability of every price, from one forward pass
     3. Speed                all that is there for speed only, and the self-check that guards it
     4. Planning             precision, micro-batch, weights and memory, each with its reason
     5. Training             the data, the loss, the trainer and its arguments
     6. The training loop    signals, checkpoints and their pushes, memory that runs out
     7. Runs                 run.json, finding and locking them, pushing them, Weights & Biases
     8. Figures              distributions → answers → errors, scores, intervals; saved with charts
     9. Words, comparables   a regression on words; a Pricer mixes in similar items' prices
    10. Evaluations          of runs, and of own items; what they are compared with; exports
    11. Charts and report    drawn here, saved by save_predictions (8) and save_run (7); cards

app.py imports this module where a stage begins: it takes seconds.
"""

import errno
import gc
import inspect
import io
import logging
import math
import os
import re
import shutil
import signal
import statistics
import sys
import textwrap
import time
import warnings
import zipfile
from base64 import b64encode
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timedelta
from functools import cache, cached_property, partial
from hashlib import sha256
from importlib.metadata import version
from itertools import chain, groupby, islice, pairwise, product
from pathlib import Path
from unittest.mock import patch

import torch

# bitsandbytes compiles optimizers that aren't used here, and takes 4 s to import the compiler; its
# own answer to an error is not to compile them. Can go when it compiles at the first use.
with patch.object(torch, "compile", None):
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of kernels that it doesn't need
    import bitsandbytes

import jinja2
import joblib
import numpy
import pandas
import psutil
import scipy.sparse
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from huggingface_hub import (
    HfApi,
    ModelCard,
    ModelCardData,
    snapshot_download,
)
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from peft import (
    LoraConfig,
    PeftConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BatchEncoding,
    ProgressCallback,
    TrainerCallback,
    TrainerState,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import find_adapter_config_file
from transformers.utils.logging import set_tqdm_hook

import items

sys.modules.setdefault("wandb", None)  # or TRL imports it, which takes two seconds
try:
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
finally:
    if sys.modules["wandb"] is None:
        del sys.modules["wandb"]

try:  # torch ≥ 2.10
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None
try:
    import resource
except ImportError:  # Windows
    resource = None


def world_size():
    """How many processes a launcher started: torchrun and accelerate say so in the environment."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first_process():
    """Whether this process is the one of them that prepares, prints and writes."""
    return int(os.environ.get("RANK", 0)) == 0


# ------------------------------------------------------------------------------------------------
# 1. The base model

ADAPTER_FILE = "adapter_model.safetensors"
BASE_FILES = (".safetensors", ".bin", ".json", ".jinja", ".model")  # that tell bases apart


class Base:
    """A base model whose weights have not been read: a folder's, or one on the Hub."""

    def __init__(self, name, path=None, revision=None):
        self.name = name  # as it was asked for
        self.path = path or name  # its folder, or its name on the Hub
        self.revision = revision  # the commit on the Hub; None for a folder
        self.tokenizer = items.load_tokenizer(self.path, revision)

    @property
    def title(self):
        """What reports call it."""
        if self.name == items.DEMO_PACKAGE:
            return "SmolLM2-135M-Instruct"
        return self.name if self.revision else Path(self.path).name

    @cached_property
    def config(self):
        """Its configuration. Raises UserError if transformers doesn't know it."""
        with items.base_errors(self.path):
            return AutoConfig.from_pretrained(
                self.path, revision=self.revision, trust_remote_code=False
            )

    @cached_property
    def skeleton(self):
        """The model without its weights. Raises UserError if it is no causal language model."""
        # Eager attention is what all models have; experts by batched_mm need no weights
        kinds = {"attn_implementation": "eager", "experts_implementation": "batched_mm"}
        with items.base_errors(self.path), torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.config, **kinds, trust_remote_code=False)

    @cached_property
    def linear_layers(self):
        """{name: layer} of what can be adapted: the decoder's linear layers, but not the head."""
        inside = set(self.skeleton.get_decoder().modules())
        inside.discard(self.skeleton.get_output_embeddings())
        return {
            name: module
            for name, module in self.skeleton.named_modules()
            if module in inside and isinstance(module, torch.nn.Linear)
            if "Router" not in type(module).__name__  # of experts, which returns more
        }

    @cached_property
    def identity(self):
        """The commit on the Hub, or a hash of the folder's weights, settings and tokenizer."""
        if self.revision:
            return self.revision
        files = sorted(Path(self.path).glob("*"))
        files = [file for file in files if file.suffix in BASE_FILES]
        with ThreadPoolExecutor() as pool:  # files are read, and hashed, without Python's lock
            found = zip(files, pool.map(items.file_identity, files), strict=True)
            texts = [f"{file.name} {identity}" for file, identity in found]
        return sha256("".join(texts).encode()).hexdigest()[:32]

    def is_of(self, run):
        """Whether a Run was trained on it; by name if its record has no hash of whole files."""
        if len(run.base_identity or "") <= 16:
            return self.name == run.base_model
        return self.identity == run.base_identity

    def check_rows(self, tokens, highest):
        """Raises UserError for rows of so many tokens, up to the `highest`, that it can't read."""
        known = self.skeleton.get_input_embeddings().weight.shape[0]
        if highest >= known:
            reason = (
                f"knows {known:,} tokens, and its tokenizer writes the rows with {highest:,}, too"
            )
            items.refuse(self.path, reason)
        config = self.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        rotation = getattr(config, "rope_parameters", None) or {}
        if rotation.get("rope_type") in ("dynamic", "longrope"):
            # Beyond these a row's rotations depend on the longest row beside it
            positions = rotation.get("original_max_position_embeddings", positions)
        if positions and tokens > positions:
            reason = f"reads at most {positions:,} tokens, and the longest row has {tokens:,}"
            items.refuse(
                self.path, reason, "Prepare with a lower `cutoff`, or take another base model"
            )


def check_architecture(base):
    """Raises UserError for what isn't an unquantised decoder of linear layers, or nf4."""
    path, config = base.path, base.config
    stored = getattr(config, "quantization_config", {})
    if stored and not stored.get("load_in_4bit"):
        # Gradients vanish in FP8 layers without an error: transformers issue 46736
        reason = f"its weights are stored as {stored.get('quant_method')}"
        items.refuse(path, reason, "Take the original, or one in nf4")
    if stored and stored.get("bnb_4bit_quant_storage", "uint8") != "uint8":
        reason = f"its 4-bit weights are stored as {stored['bnb_4bit_quant_storage']}"
        items.refuse(path, reason, "Take the original, or one stored as uint8")
    if "/" in str(config._attn_implementation):
        reason = f"its config.json names the attention kernel {config._attn_implementation}"
        items.refuse(path, f"{reason}, which is others' code")
    if find_adapter_config_file(path, revision=base.revision):
        items.refuse(
            path, "transformers would load the adapter beside it", "Move adapter_config.json"
        )
    if config.is_encoder_decoder:
        items.refuse(path, f"{config.model_type} has an encoder")
    decoder, head = base.skeleton.get_decoder(), base.skeleton.get_output_embeddings()
    if decoder is None or head is None or decoder is head:
        items.refuse(path, "has no decoder with a head for tokens behind it")
    if not base.linear_layers:
        items.refuse(path, f"{config.model_type} has no linear layers, which adapters need")


def check_tensors(file):
    """Raises UserError unless a file of weights is complete and holds some."""
    try:
        if file.suffix == ".bin":
            problem = "" if zipfile.is_zipfile(file) else "its end is missing"
        else:
            with safe_open(file, framework="pt") as tensors:
                problem = "" if tensors.keys() else "it holds no weights"
    except (SafetensorError, OSError) as error:  # it is cut, or a pointer of Git LFS
        problem = error
    if problem:
        reason = f"is no complete file of weights ({problem})"
        items.refuse(file, reason, "Download it again, by `git lfs pull` if it comes from Git LFS")


@dataclass(frozen=True)
class Targets:
    """The layers that a recipe adapts."""

    names: tuple  # PEFT's target_modules: the layers' last names, or full ones if others share them
    layers: dict  # {full name: layer}
    text: str  # what they are, and how many

    def count_parameters(self, lora_r):
        return sum(lora_r * sum(layer.weight.shape) for layer in self.layers.values())


@cache
def find_targets(base, wanted):
    """The Targets of a base: the linear layers in its `attention`, or `all` of its decoder.

    Raises UserError if it has none.
    """
    linear = base.linear_layers
    # PEFT takes names of linear layers beside experts for the experts' own, whatever precedes them
    # (convert_peft_config_for_transformers in PEFT 0.21)
    weights = base.skeleton.named_parameters()
    has_experts = any("experts" in name and weight.ndim == 3 for name, weight in weights)
    chosen = list(linear)
    if wanted == "attention" or has_experts:
        chosen = [name for name in linear if re.search(r"(attn|attention).*\.", name)]
    if not chosen:
        remedy = "Take `targets` all" if wanted == "attention" else "Take another base model"
        items.refuse(f"`targets` {wanted}", f"{base.path} has no such layer", remedy)
    text = ", the experts are not adapted" if has_experts else ""
    unfit = find_unfit(base, chosen)
    for reason in dict.fromkeys(unfit.values()):
        layers = [name for name in unfit if unfit[name] == reason]
        kinds = ", ".join(dict.fromkeys(map(last_name, layers)))
        text += f"; left out, since {reason}: {len(layers)} {kinds}"
    chosen = [name for name in chosen if name not in unfit]
    if not chosen:
        items.refuse(f"`targets` {wanted}", f"{base.path} has no layer that can be adapted{text}")
    names = tuple(dict.fromkeys(map(last_name, chosen)))
    text = f"{', '.join(names)}: {len(chosen)} of {len(linear)} linear layers{text}"
    others = {name for name, _ in base.skeleton.named_modules()} - set(chosen)
    if any(last_name(name) in names for name in others):  # as an image encoder's
        names = tuple(chosen)
    return Targets(names, {name: linear[name] for name in chosen}, text)


def find_unfit(base, layers):
    """{name: why it can't be adapted} of those layers that PEFT or the model don't allow.

    They are tried on the model without weights: projections of Mamba are refused, parts that only
    images reach get no gradient (two processes would wait for it), and names that transformers
    converts aren't found again when an adapter is read.
    """
    unfit = {}
    adapted = adapt_skeleton(base, layers)
    if not adapted:
        kinds = set(map(last_name, layers))
        refused = {kind for kind in kinds if not adapt_skeleton(base, [kind])}
        unfit = {name: "PEFT refuses them" for name in layers if last_name(name) in refused}
        adapted = adapt_skeleton(base, [name for name in layers if name not in unfit])
    if not adapted:
        return dict.fromkeys(layers, "PEFT refuses them")
    loaded = set_peft_model_state_dict(adapted, get_peft_model_state_dict(adapted))
    parameters = {}
    if has_gradients(adapted):
        parameters = {name: one for name, one in adapted.named_parameters() if one.requires_grad}
    reasons = dict.fromkeys(loaded.missing_keys, "a saved adapter's can't be read back")
    reasons |= {
        name: "they get no gradient" for name, one in parameters.items() if one.grad is None
    }
    for name, reason in reasons.items():
        layer = name.removeprefix("base_model.model.").partition(".lora_")[0]
        if layer in layers:
            unfit[layer] = reason
    return unfit


def adapt_skeleton(base, names):
    """A Base without weights, whose layers of these names have adapters; None if PEFT refuses."""
    try:
        return get_peft_model(deepcopy(base.skeleton), LoraConfig(r=1, target_modules=names))
    except ValueError:
        return None


def has_gradients(model):
    """Whether a backward pass is possible through a model without weights; its gradients stay.

    Models of linear attention look into a mask, so they get none, for which fake tensors are needed
    (transformers' is_tracing); those take three times as long.
    """
    for mode in (nullcontext(), FakeTensorMode(allow_non_fake_inputs=True)):
        with suppress(Exception), mode:  # some look at what there isn't, in many ways
            ids = torch.zeros(1, 4, dtype=torch.long, device="meta")
            mask = torch.ones_like(ids) if isinstance(mode, nullcontext) else None
            model(input_ids=ids, attention_mask=mask, use_cache=False).logits.sum().backward()
            return True
    return False


def last_name(path):
    """`q_proj` of `model.layers.0.self_attn.q_proj`."""
    return path.rpartition(".")[-1]


def open_base(name, revision=None, demo_folder=None):
    """The Base of that name: the demo's, a folder, or one on the Hub, at a commit or the newest.

    Reads no weights. Raises one UserError that names all reasons why it can't be used.
    """
    base = Base(name, *items.find_base(name, revision, demo_folder))
    problems = items.Problems()
    with problems:
        check_architecture(base)
        for pattern in ("*.safetensors", "pytorch_model*.bin"):
            for file in sorted(Path(base.path).glob(pattern)):
                check_tensors(file)
    with problems:
        items.check_tokenizer(base.path, base.tokenizer)
    problems.report()
    return base


def load_quantised(base, quant_config, precision):
    """The model of a Base, quantised, on the GPU if any. Raises UserError if it lacks weights."""
    dtype = DTYPES[precision]
    is_stored_quantised = hasattr(base.config, "quantization_config")
    quantisation = {"quantization_config": quant_config}
    if is_stored_quantised or not quantised_layers(base.skeleton):
        quantisation = {}  # None would replace that of the base's own configuration
    # Its bar is gone at its end, so that the training's is the one
    set_tqdm_hook(lambda bar, arguments, options: bar(*arguments, **options | {"leave": False}))
    with items.base_errors(base.path):
        model, found = AutoModelForCausalLM.from_pretrained(
            base.path,
            revision=base.revision,
            dtype=dtype,
            attn_implementation="sdpa" if base.skeleton._supports_sdpa else "eager",
            device_map={"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"},
            trust_remote_code=False,
            output_loading_info=True,
            **quantisation,
        )
    missing = sorted(found["missing_keys"])
    if missing:  # transformers makes them up, in each process otherwise
        reason = f"its files lack {len(missing)} of the model's weights, such as {missing[0]}"
        items.refuse(base.path, reason)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # On CPUs with AVX512-BF16 the first forward pass without gradients repacks the weight
            # into a form through which no gradient flows, without an error (bitsandbytes 0.50,
            # _convert_weight_packed_for_cpu). Can go when that form is differentiable.
            module.support_avx512bf16_for_cpu = False
            # transformers leaves it the type in which it was stored, whatever is asked for
            module.compute_dtype = module.weight.quant_state.dtype = dtype
    if is_stored_quantised:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    return model


def load_base(base, plan, quant_config):
    """The base that a Plan trains: quantised, and dequantised once if the plan says so."""
    model = load_quantised(base, quant_config, plan.precision)
    return dequantise(model) if plan.dequantised else model


def check_adapter(folder):
    """Raises UserError unless `folder` holds a whole LoRA adapter; done before the base is read."""
    try:
        config = PeftConfig.from_pretrained(folder)
    except items.UNBUILDABLE as error:
        raise items.UserError(
            f"{folder.name}: PEFT {version('peft')} can't read its adapter_config.json ({error})."
        ) from error
    kind = config.peft_type.value
    if kind != "LORA" or config.bias != "none" or config.lora_bias or config.modules_to_save:
        reason = f"its adapter is {kind}, and only LoRA without biases or whole layers is read"
        items.refuse(folder.name, reason, "Take another run")
    check_tensors(folder / ADAPTER_FILE)


def load_adapter(model, folder):
    """The base with the adapter in `folder` beside it, a PeftModel.

    Raises UserError unless all of the adapter's weights are in the file, finite, and have a place
    in the model. PEFT only warns of them, or says nothing.
    """
    misfit = f"{folder.name}: its adapter doesn't fit {model.config.name_or_path}"
    try:
        config = PeftConfig.from_pretrained(folder)
        config.inference_mode = True
        adapted = get_peft_model(model, config).eval()
        loaded = adapted.load_adapter(folder, "default")
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, re.error, *items.UNBUILDABLE) as error:
        raise items.UserError(f"{misfit}. Check `base_model`.") from error
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if any(isinstance(layer, BaseTunerLayer) for layer in ends):
        # A tied model's share their weights: merging into one would change the other
        items.refuse(
            folder.name, "adapts head or embeddings, which isn't done here", "Take another run"
        )
    wrong = [*loaded.unexpected_keys, *loaded.missing_keys]
    weights = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    wrong += [name for name, weight in weights.items() if not weight.isfinite().all()]
    if wrong:
        reason = f"{len(wrong)} of its tensors are missing, misplaced or not finite: {wrong[0]}"
        items.refuse(misfit, reason, "Check `base_model`, or download the adapter again")
    return adapted


# ------------------------------------------------------------------------------------------------
# 2. Reading prices

NUMBERS = items.NUMBERS  # the prices that are read, in units


class NumberTree:
    """All beginnings of the numbers, as a tokenizer spells them, tuples of tokens: its nodes.

    The first is the empty one. The others are `branches`, which follow each prompt in a sequence;
    there are none where every number is one token.
    """

    def __init__(self, spellings, device):
        longest = max(map(len, spellings))
        beginnings = {spelling[:k] for spelling in spellings for k in range(1, longest)}
        self.branches = sorted(beginnings, key=len)
        self.nodes = [(), *self.branches]
        self.tokens = sorted({token for spelling in spellings for token in spelling})
        self.node_at = {node: i for i, node in enumerate(self.nodes)}
        self.number_of = {spelling: number for number, spelling in enumerate(spellings)}
        column_of = {token: i for i, token in enumerate(self.tokens)}
        columns = len(self.tokens) + 1  # the last one: any other token follows

        # is_child[node, token]: whether the token can follow the node
        is_child = torch.zeros(len(self.nodes), len(self.tokens), dtype=torch.bool)
        # paths[number]: its tokens, and its end if a token could follow, as indices of a flat row
        # of nodes × columns; the index behind that row fills up
        paths = torch.full((len(spellings), longest), len(self.nodes) * columns)
        for number, spelling in enumerate(spellings):
            for k, token in enumerate(spelling):
                node = self.node_at[spelling[:k]]
                is_child[node, column_of[token]] = True
                paths[number, k] = node * columns + column_of[token]
            if len(spelling) < longest:
                paths[number, len(spelling)] = (self.node_at[spelling] + 1) * columns - 1
        # sees[branch, other]: whether it is the branch itself or one of its beginnings
        self.sees = torch.eye(len(self.branches), dtype=torch.bool)
        for branch, row in zip(self.branches, self.sees, strict=True):
            if len(branch) > 1:
                row |= self.sees[self.node_at[branch[:-1]] - 1]

        self.token_ids = torch.tensor(self.tokens, device=device)
        self.is_child = is_child.to(device)
        self.paths = paths.to(device)

    def number_logs(self, logits):
        """The logs of the numbers' probabilities, from the logits at each node.

        A number's probability is the product along its tokens, times that of no number token after
        it, if one could follow. The remaining probability is that of any other answer. From rows ×
        nodes × vocabulary to rows × numbers, in 64 bits.
        """
        of_tokens = logits[..., self.token_ids].double()
        # Summed, not taken as 1 − p, which is rounding where a number token is nearly certain
        of_others = logits.index_fill(-1, self.token_ids, -math.inf).logsumexp(-1, keepdim=True)
        logs = torch.cat([of_tokens, of_others.double()], -1).log_softmax(-1).flatten(1)
        return torch.nn.functional.pad(logs, (0, 1))[:, self.paths].sum(-1)

    def greedy_numbers(self, logits):
        """The numbers that generating the likeliest tokens would spell, a list."""
        of_children = logits[..., self.token_ids].masked_fill(~self.is_child, -math.inf)
        best = of_children.max(-1)
        ends = best.values < logits.max(-1).values  # another token is likelier than all children
        numbers = []
        for best_child, may_end in zip(best.indices.tolist(), ends.tolist(), strict=True):
            spelled = ()
            while spelled in self.node_at:
                node = self.node_at[spelled]
                if spelled in self.number_of and may_end[node]:
                    break
                spelled = (*spelled, self.tokens[best_child[node]])
            numbers.append(self.number_of[spelled])
        return numbers


@dataclass
class Reading:
    """What a PriceReader reads of rows."""

    probabilities: numpy.ndarray  # of NUMBERS, rows × 1,000
    greedy: list  # the numbers that generation would answer
    losses: list | None = None  # of each completion's tokens, lists, if they were asked for


class PriceReader:
    """Reads a model's probability of every price from one forward pass, without generating text.

    All beginnings of numbers (NumberTree) follow each prompt in one sequence. Each sees the prompt
    and its own beginnings only, so its logits are those of the prompt with that beginning. Some
    layers ignore the mask that says so, such as those with a state. For a model that has some
    (`in_tree=False`) each prompt is read with each beginning, which is slow; see self_check.
    """

    def __init__(self, model, tokenizer, in_tree=True, prefix=items.PREFIX):
        self.model = model
        self.tokenizer = tokenizer
        self.in_tree = in_tree
        self.prefix = prefix  # the end of the prompts
        self.tree = NumberTree(items.spell_numbers(tokenizer, prefix), model.device)
        on_gpu = torch.cuda.is_available()
        # A row's logits take 4 bytes a value three times and 2 once
        vocab_size = model.get_output_embeddings().weight.shape[0]
        row_bytes = 14 * (4 + len(self.tree.branches)) * vocab_size
        rows_that_fit = memory().available // 8 // row_bytes
        # Prompts at once; on a CPU larger batches only make the bar jump
        self.batch_size = max(1, min(256 if on_gpu else 8, rows_that_fit))
        self.threads = 2 if on_gpu else 1  # while the GPU computes one batch, the next is prepared

    def read(self, rows, with_loss=False):
        """The Reading of rows of `prompt` and, `with_loss`, `completion`."""
        prompts = self.tokenizer([row["prompt"] for row in rows])["input_ids"]
        completions = [[] for _ in rows]
        if with_loss:
            texts = [row["completion"] for row in rows]
            completions = items.completion_tokens(texts, self.tokenizer, self.prefix)
        with torch.no_grad():
            along_completions, at_nodes = self.logits(prompts, completions)
            losses = completion_losses(along_completions, completions) if with_loss else None
            probabilities = self.tree.number_logs(at_nodes).exp().cpu().numpy()
            return Reading(probabilities, self.tree.greedy_numbers(at_nodes), losses)

    def distributions(self, rows, name=None):
        """(probabilities of NUMBERS, rows × 1,000; greedy numbers, a list; the seconds)."""

        def read(batch):
            reading = self.read(batch)
            return list(zip(reading.probabilities, reading.greedy, strict=True))

        found, seconds = predict(read, rows, self.batch_size, name, self.threads)
        probabilities, greedy = zip(*found, strict=True)
        return numpy.array(probabilities), list(greedy), seconds

    def answer(self, rows, name=None, **options):
        """(Estimates of rows, the seconds they took); `options` as of estimate_prices."""
        probabilities, greedy, seconds = self.distributions(rows, name)
        return estimate_prices(probabilities, greedy, rows, **options), seconds

    def logits(self, prompts, completions):
        """(logits along the completions, logits at the tree's nodes), lists of tokens given.

        Rows × tokens of the longest completion × vocabulary, and rows × nodes × vocabulary.
        """
        if not self.in_tree:
            return self.separate_logits(prompts, completions, self.tree.nodes)
        completion_len = max(map(len, completions))
        in_one_row = is_packed(self.model) and not self.tree.branches
        make_inputs = self.one_row_inputs if in_one_row else self.tree_inputs
        inputs = BatchEncoding(make_inputs(prompts, completions, completion_len))
        logits = self.model(**inputs.to(self.model.device), use_cache=False).logits
        logits = logits.view(len(prompts), -1, logits.shape[-1])
        at_branches = logits[:, max(completion_len, 1) :]
        at_nodes = torch.cat([logits[:, :1], at_branches], 1).float()  # the first: behind prompts
        return logits[:, :completion_len], at_nodes

    def separate_logits(self, prompts, completions, nodes):
        """The same from forward passes of a prompt with a node or its completion each."""
        along, at_nodes = [], []
        for prompt, completion in zip(prompts, completions, strict=True):
            text = [prompt + completion]
            along.append(plain_logits(self.model, text, len(completion) + 1)[0, :-1])
            for _, alike in groupby(nodes, key=len):
                texts = [prompt + list(node) for node in alike]
                for start in range(0, len(texts), self.batch_size):
                    batch = texts[start : start + self.batch_size]
                    at_nodes.append(plain_logits(self.model, batch, 1))
        at_nodes = torch.cat(at_nodes).view(len(prompts), len(nodes), -1)
        return pad_sequence(along, batch_first=True), at_nodes.float()

    def tree_inputs(self, prompts, completions, completion_len):
        """Inputs of prompts, padded on the left, each before its completion and the branches.

        The mask is four-dimensional: true where a token sees another.
        """
        branches = self.tree.branches
        prompt_len = torch.tensor([len(prompt) for prompt in prompts])[:, None]
        width = int(prompt_len.max())
        text_end = width + completion_len
        total = text_end + len(branches)

        last_tokens = [branch[-1] for branch in branches]
        ids = []
        for prompt, completion in zip(prompts, completions, strict=True):
            before, after = width - len(prompt), completion_len - len(completion)
            ids.append([0] * before + prompt + completion + [0] * after + last_tokens)

        depths = torch.tensor([len(branch) for branch in branches], dtype=torch.long)
        text_positions = (torch.arange(text_end) + prompt_len - width).clamp(min=0)
        positions = torch.cat([text_positions, prompt_len + depths - 1], 1)

        sees = torch.ones(total, total, dtype=torch.bool).tril()
        sees[text_end:, width:text_end] = False
        sees[text_end:, text_end:] = self.tree.sees
        is_padding = torch.arange(total) < width - prompt_len
        # Padding sees itself, since a token that sees nothing would be NaN
        mask = sees & ~is_padding[:, None] | torch.eye(total, dtype=torch.bool)
        if self.model.config._attn_implementation == "eager":  # which adds the mask
            dtype = self.model.dtype
            mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)

        kept = [*range(width - 1, width + max(completion_len, 1) - 1), *range(text_end, total)]
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": mask[:, None],
            "position_ids": positions,
            "logits_to_keep": torch.tensor(kept),
        }

    def one_row_inputs(self, prompts, completions, completion_len):
        """The same in one row, without padding; there are no branches."""
        texts = [prompt + text for prompt, text in zip(prompts, completions, strict=True)]
        inputs = packed_inputs(texts, max(map(len, texts)))
        prompt_len = torch.tensor([len(prompt) for prompt in prompts])
        starts = inputs["cu_seq_lens_q"][:-1] + prompt_len - 1
        kept = starts[:, None] + torch.arange(max(completion_len, 1))
        last = inputs["input_ids"].shape[1] - 1
        return inputs | {"logits_to_keep": kept.clamp(max=last).flatten()}


def plain_logits(model, texts, last):
    """The logits of the last so many tokens of texts of one length: texts × last × vocabulary.

    An ordinary forward pass without a mask or padding, which every causal model computes right.
    """
    ids = torch.tensor(texts, device=model.device)
    return model(input_ids=ids, use_cache=False, logits_to_keep=last).logits[:, -last:]


def completion_losses(logits, completions):
    """The cross-entropy of each completion's tokens, lists; of rows × tokens × vocabulary."""
    losses = []
    for row, completion in zip(logits, completions, strict=True):
        targets = torch.tensor(completion, device=row.device)
        along = row[: len(completion)].float()
        losses.append(torch.nn.functional.cross_entropy(along, targets, reduction="none").tolist())
    return losses


def open_reader(base, adapter, rows, quant_config, precision, use_bf16, fast=True, opened=None):
    """The PriceReader of a Base with the adapter from the folder `adapter`, or without one.

    Checked on the longest and the shortest of the rows. `fast=False` turns off what is there for
    speed only. If it is `opened` already, only the rows are checked. Raises UserError if a row is
    too long for the base.
    """
    prefix = scale_of_rows(rows).prefix
    prompts = sorted(base.tokenizer([row["prompt"] for row in rows])["input_ids"], key=len)
    (answer,) = items.completion_tokens([ANY_COMPLETION], base.tokenizer, prefix)
    base.check_rows(len(prompts[-1]) + len(answer), max(map(max, prompts)))
    if opened:
        return opened
    model = load_merged(base, adapter, quant_config, precision)
    if fast:
        fuse_norms(model, precision)
    attention = choose_attention(precision, use_bf16) if fast else None
    found = self_check(model, base.tokenizer, [prompts[0], prompts[-1]], precision, attention)
    if not all(found.values()):
        print(f"Check: {describe_checks(found)}")
    return PriceReader(model, base.tokenizer, found[ONE_PASS], prefix)


def load_merged(base, adapter, quant_config, precision, out_precision=None):
    """The model of a Base with the adapter from the folder `adapter`, if any.

    Merged if memory has room for the dequantised weights, which is faster, or for an
    `out_precision`. They are added in 32 bits if there is room for that, and rounded once: early in
    training an adapter changes weights by less than 16 bits resolve.
    """
    model = load_quantised(base, quant_config, precision)
    weights = sum(weight.numel() for weight in base.skeleton.parameters())
    now = memory()
    room = 0.8 * now.available - now.used
    if weights * model.dtype.itemsize > room and not out_precision:
        return load_adapter(model, adapter) if adapter else model
    model = dequantise(model, torch.float32 if 4 * weights < room else model.dtype)
    if adapter:
        model = load_adapter(model, adapter).merge_and_unload()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[out_precision or precision])
    return model


# ------------------------------------------------------------------------------------------------
# 3. Speed, and the self-check that guards it
#
# `fast=False` turns all of it off, in make_plan and in open_reader. Times: one H100, the shape of
# Llama-3.2-3B, rows of 102 tokens; see tests/BENCHMARKS.md.

# The names of our attention functions in transformers' registry
PACKED = "packed"
PACKED_EFFICIENT = "packed_efficient"
PACKING_MULTIPLE = 64  # tokens; total lengths are multiples of it, so that few shapes occur
QUANTISED = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
FP8_CAPABILITY = (8, 9)  # of GPUs that multiply matrices of 8-bit floats
FP8 = torch.float8_e4m3fn  # 4 bits of exponent, 3 of mantissa
FP8_MAX = 448.0  # the largest number of FP8

# Relative differences of a model's logits that may be rounding. SmolLM2-135M has 0.01 in fp16 and
# 0.10 in bf16, and 0.44 and more where tokens see others that they shouldn't.
TOLERANCES = {"fp32": 1e-3, "fp16": 4e-2, "bf16": 0.2}
# The same for a single layer, and of a loss; SmolLM2's norms have 0.0006 and 0.005
LAYER_TOLERANCES = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 3e-2}
# The same for fp8 products and gradients, whose error is 0.038: two factors, each rounded to a 16th
FP8_TOLERANCE = 0.06
ANY_COMPLETION = "219.00"
# The checks that self_check reports
ONE_PASS = "prices from one pass"
PACKED_ROWS = "packed rows"
FP8_PRODUCTS = f"fp8 products to {FP8_TOLERANCE:.0%}"


def choose_attention(precision, use_bf16):
    """The name of the attention of concatenated rows to use here; None if PyTorch has none.

    `varlen_attn` is flash attention: 16 bits and a GPU of capability 8. CUTLASS's kernel runs on
    all GPUs, but doesn't know sliding windows. Where both run, a step takes as long with either
    (lite 91.4 and 91.8 ms); flash attention needs less memory, since it doesn't repeat heads.
    """
    if not torch.cuda.is_available():
        return None
    if varlen_attn is not None and use_bf16 and precision != "fp32":
        return PACKED
    has_precision = use_bf16 or precision != "bf16"
    return PACKED_EFFICIENT if has_precision else None


def is_packed(model):
    """Whether a model has an attention of concatenated rows."""
    return model.config._attn_implementation in (PACKED, PACKED_EFFICIENT)


def packed_attention(kernel, module, query, key, value, attention_mask=None, **options):
    """Attention by a kernel of concatenated sequences that begin at `cu_seq_lens_q`; else sdpa.

    (1, heads, tokens, size) each. Sequences padded to the longest would have 18 % more tokens.
    Raises NotImplementedError for what no kernel computes: soft caps and sinks.
    """
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise NotImplementedError("attention with a soft cap or sinks")
    starts = options.get("cu_seq_lens_q")
    if starts is None:  # generation, or the price tree with its mask
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **options)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    window = options.get("sliding_window")  # of tokens that a token sees, itself included
    longest, scaling = options["max_length_q"], options.get("scaling")
    return kernel(query, key, value, starts, longest, scaling, window), None


def flash_kernel(query, key, value, starts, longest, scaling, window):
    """The attention of packed_attention by PyTorch's flash attention."""
    # torch 2.11 takes fewer key-value heads than query heads as they are; newer versions ask for it
    # by name
    is_asked = "enable_gqa" in inspect.signature(varlen_attn).parameters
    query, key, value = (x.squeeze(0) for x in (query, key, value))
    ends = (starts, starts, longest, longest)
    grouped = {"enable_gqa": True} if is_asked else {}
    before = (window or 0) - 1  # tokens that a token sees, but itself; −1: all
    out = varlen_attn(query, key, value, *ends, scale=scaling, window_size=(before, 0), **grouped)
    return out.unsqueeze(0)


def efficient_kernel(query, key, value, starts, longest, scaling, window):
    """The same by the CUTLASS kernel of PyTorch's memory-efficient attention.

    Raises NotImplementedError for windows shorter than the longest sequence, too: the kernel's
    gradient would ignore them.
    """
    if window is not None and window < longest:
        raise NotImplementedError("attention with a sliding window")
    usual_scaling = query.shape[-1] ** -0.5
    scaling = scaling or usual_scaling
    # A `scale` can't be passed: compiling would fail, since the meta function of the kernel's
    # backward lacks the parameter `out` (torch 2.11 and 2.13, meta__efficient_attention_backward in
    # _meta_registrations.py), so that all that follow are shifted by one.
    if not math.isclose(scaling, usual_scaling):
        query = query * (scaling / usual_scaling)
    # The same function says that gradients lie in memory as their tensors do. The kernel's lie
    # contiguously, so must these.
    group = query.shape[2] // key.shape[2]  # query heads that share a head of keys and values
    key, value = (x.repeat_interleave(group, 2).contiguous() for x in (key, value))
    out, *_ = torch.ops.aten._efficient_attention_forward(
        *(query.contiguous(), key, value),
        None,  # bias
        *(starts, starts, longest, longest),
        0.0,  # dropout
        1,  # each token sees itself and what precedes it in its sequence
        True,  # keeps what the backward pass needs
    )
    return out


# No mask functions are registered with them: transformers then makes no mask (masking_utils.py)
ALL_ATTENTION_FUNCTIONS.register(PACKED, partial(packed_attention, flash_kernel))
ALL_ATTENTION_FUNCTIONS.register(PACKED_EFFICIENT, partial(packed_attention, efficient_kernel))


def packed_inputs(texts, longest):
    """The model's inputs of texts, lists of tokens, in one row; none is longer than `longest`."""
    sizes = [len(text) for text in texts]
    ends = torch.tensor([0, *sizes]).cumsum(0).int()
    return {
        "input_ids": torch.tensor([[token for text in texts for token in text]]),
        "position_ids": torch.cat([torch.arange(size) for size in sizes])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }


class PackedCollator:
    """Makes one row of the rows of a micro-batch, without padding.

    Row ends and label positions are computed here, since finding them on the GPU would mean waiting
    for it. Sequences of zeros pad the total to a multiple of PACKING_MULTIPLE tokens or, for
    `one_shape`, to a size that all but one in thousands of micro-batches stay below, so that CUDA
    graphs are recorded once.
    """

    def __init__(self, micro_batch, lengths, one_shape=False):
        self.longest = int(lengths.max())
        self.sequences = micro_batch + 8  # at most so many sequences of padding end a packed row
        spread = 3.5 * math.sqrt(micro_batch) * lengths.std()
        self.min_tokens = micro_batch * lengths.mean() + spread if one_shape else 0

    def __call__(self, rows):
        texts, labels = [], []
        for row in rows:
            texts.append(row["input_ids"])
            labels.extend(row["labels"])
        spare = (self.sequences - len(rows)) * self.longest
        total = max(len(labels), self.min_tokens)
        total = PACKING_MULTIPLE * math.ceil(total / PACKING_MULTIPLE)
        filling = min(total - len(labels), spare)
        full, rest = divmod(filling, self.longest)
        texts += [[0] * self.longest] * full + [[0] * rest]
        texts += [[]] * (self.sequences - len(texts))
        labels += [items.IGNORED] * filling
        inputs = packed_inputs(texts, self.longest)
        return inputs | labelled(torch.tensor([labels]))


def labelled(labels):
    """The inputs that say what is trained: labels, and which logits precede them, flattened."""
    is_label = labels.flatten() != items.IGNORED
    return {"labels": labels, "logits_to_keep": is_label.nonzero().flatten() - 1}


class FastLora(lora.Linear):
    """A LoRA layer that moves fewer bytes than PEFT's.

    The scaling is applied to the weights instead of to each token's output and its gradient. Types
    are left to autocast; PEFT would run dropout in 32 bits.
    """

    def forward(self, x):
        name = self.active_adapters[0]
        down = self.scaling[name] * self.lora_A[name].weight
        narrow = torch.nn.functional.linear(self.lora_dropout[name](x), down)
        return self.base_layer(x) + self.lora_B[name](narrow)


def with_fast_lora(config):
    """Has PEFT train FastLora layers; what is saved is the same. Returns the LoraConfig."""
    # PEFT's hook for custom layers: huggingface.co/docs/peft/developer_guides/custom_models
    config._register_custom_module({torch.nn.Linear: FastLora})
    return config


def quantise_rows(matrix):
    """(a matrix in 8-bit floats, the scale of each row, a column of 32-bit floats).

    A row times its scale is the original, each value to 1/16. Plain operations, which the compiler
    fuses with what precedes them.
    """
    values = matrix.float()
    largest = values.abs().amax(-1, keepdim=True).clamp(min=1e-24)  # a row of zeros has no scale
    quantised = (values * (FP8_MAX / largest)).to(FP8)
    return quantised.contiguous(), largest / FP8_MAX


def fp8_product(matrix, weight, scales):
    """matrix @ (weight with its rows scaled).T in bf16, computed in 8-bit floats.

    The matrix is rows × inputs, quantised here; the weight, outputs × inputs, is in 8-bit floats.
    The scales are 1 × outputs.
    """
    quantised, row_scales = quantise_rows(matrix)
    options = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
    return torch._scaled_mm(quantised, weight.t(), row_scales, scales, **options)


class Fp8Product(torch.autograd.Function):
    """The product with a frozen weight, and its input's gradient, both in 8-bit floats.

    torch._scaled_mm has no gradient of its own. The forward pass takes the weight and its scales,
    the backward pass those of the transposed weight.
    """

    @staticmethod
    def forward(ctx, rows, weight, scales, transposed_weight, transposed_scales):
        ctx.save_for_backward(transposed_weight, transposed_scales)
        return fp8_product(rows, weight, scales)

    @staticmethod
    def backward(ctx, gradient):
        return fp8_product(gradient, *ctx.saved_tensors), None, None, None, None


class Fp8Linear(torch.nn.Linear):
    """A frozen linear layer that multiplies in 8-bit floats.

    It holds two copies of its weight, one for the product and one, transposed, for the gradient's:
    the kernel wants the summed dimension to be contiguous. Scales are per output and per input.
    What is multiplied is quantised per token in each pass. A product's error is 3.8 % of its norm.
    """

    def __init__(self, layer):
        torch.nn.Module.__init__(self)
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.bias = layer.bias
        self.compute_dtype = torch.bfloat16  # PEFT gives adapters this type, not the weight's
        weight, scales = quantise_rows(layer.weight.detach())
        transposed_weight, transposed_scales = quantise_rows(layer.weight.detach().t())
        # Parameters, since CUDA graphs copy other tensors in each step
        frozen = partial(torch.nn.Parameter, requires_grad=False)
        self.weight, self.scales = frozen(weight), frozen(scales.t())
        self.transposed_weight = frozen(transposed_weight)
        self.transposed_scales = frozen(transposed_scales.t())

    def forward(self, x):
        rows = x.to(self.compute_dtype).flatten(0, -2)
        transposed = (self.transposed_weight, self.transposed_scales)
        out = Fp8Product.apply(rows, self.weight, self.scales, *transposed)
        out = out.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias


def fp8_layers(model):
    """Names of the layers that can be an Fp8Linear, in a dequantised model without adapters."""
    quantised = set(quantised_layers(model))
    return [
        name
        for name, module in model.named_modules()
        # torch._scaled_mm asks for sizes that are multiples of 16
        if module in quantised and module.in_features % 16 == module.out_features % 16 == 0
    ]


def hold_in_fp8(model):
    """Replaces a dequantised base's linear layers by Fp8Linear ones, one by one."""
    for name in fp8_layers(model):  # no layers, so that each is freed
        model.set_submodule(name, Fp8Linear(model.get_submodule(name)))


def fuse_norms(model, precision):
    """Computes in one kernel each norm that is an RMS norm: Llama's, not Gemma's or Cohere's.

    transformers' own code takes six, a fifth of an evaluation's time. Can go when transformers
    does it.
    """
    for module in model.modules():
        is_norm = hasattr(module, "variance_epsilon") and hasattr(module, "weight")
        if not is_norm or len(inspect.signature(module.forward).parameters) > 1:  # a gate
            continue
        weight, eps = module.weight, module.variance_epsilon
        rms_norm = torch.nn.functional.rms_norm
        fused = partial(rms_norm, normalized_shape=weight.shape, weight=weight, eps=eps)
        x = 1 + torch.randn(4, *weight.shape).to(weight)
        with torch.no_grad():
            if agrees(partial(fused, x), module(x), LAYER_TOLERANCES[precision]):
                module.forward = fused


def dequantise(model, dtype=None):
    """Expands the quantised weights once, to `dtype` or the model's. Returns the model.

    They are the values that bitsandbytes' kernels would compute 400 times a step.
    """
    dtype = dtype or model.dtype
    layers = [module for module in model.modules() if isinstance(module, QUANTISED)]
    for layer in layers:
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            # Otherwise weights would be rounded to the model's own type first
            layer.weight.quant_state.dtype = dtype
    return model.dequantize(dtype) if layers else model


def compile_layers(model, graphs):
    """Compiles the decoder layers of a PEFT model, one by one.

    They are alike, so the compiled code of one serves all. With `graphs` they are recorded as CUDA
    graphs: a lite step takes 92 ms instead of 103 to 119.
    """
    # DDP's optimizer would split layers at its gradient buckets
    torch._dynamo.config.optimize_ddp = False
    # Otherwise LoRA's scaling is a tensor, and compiling the full recipe takes 45 s longer
    torch._dynamo.config.specialize_float = True
    base = model.get_base_model()
    if not graphs:  # or the first layer, whose input has no gradient, would be compiled separately
        base.enable_input_require_grads()
    options = {
        "fallback_random": True,  # inductor's own dropout is slower
        "emulate_precision_casts": True,  # rounds as uncompiled code does
        "triton.cudagraphs": graphs,
    }
    for layer in base.get_decoder().layers:
        layer.compile(dynamic=None if graphs else True, options=options)


def self_check(model, tokenizer, prompts, precision, attention=None, fp8_layers=()):
    """{way: whether it computes what plain forward passes do}, on prompts, lists of tokens.

    Architectures differ in what their layers do with masks and positions, and new ones appear, so
    it is measured on each model that is loaded; two prompts of different lengths show most. The
    model keeps the `attention` of packed rows if it may be used. `fp8_layers` are to be Fp8Linear:
    the model itself is in 16 bits, since fp8 differs from it by so much that errors elsewhere
    wouldn't show. Raises UserError if plain answers aren't finite or causal.
    """
    tolerance = TOLERANCES[precision]
    completions = items.completion_tokens([ANY_COMPLETION] * len(prompts), tokenizer)
    reader = PriceReader(model, tokenizer)
    # The last node of each depth: all others of its depth precede it in the tree
    chosen = list({len(node): i for i, node in enumerate(reader.tree.nodes)}.values())

    def read_in_one_pass():
        along, at_nodes = reader.logits(prompts, completions)
        return torch.cat([along, at_nodes[:, chosen]], 1)

    def read_packed_rows():
        inputs = BatchEncoding(reader.one_row_inputs(prompts, completions, len(completions[0])))
        return model(**inputs.to(model.device), use_cache=False).logits

    found = {}
    with torch.no_grad():
        nodes = [reader.tree.nodes[i] for i in chosen]
        along, at_nodes = reader.separate_logits(prompts, completions, nodes)
        name = model.config.name_or_path
        if not at_nodes.isfinite().all():
            raise items.UserError(f"{name}: its answers aren't finite. Take `precision` fp32.")
        if difference(along[:, 0], at_nodes[:, 0]) > tolerance:  # the first node: prompts alone
            items.refuse(name, "is no causal language model: its answers change with what follows")
        expected = torch.cat([along, at_nodes], 1)
        if attention:
            plain_attention = model.config._attn_implementation
            model.set_attn_implementation(attention)
            found[PACKED_ROWS] = (
                is_packed(model)
                and agrees(read_in_one_pass, expected, tolerance)
                and agrees(read_packed_rows, along.flatten(0, 1)[None], tolerance)
            )
            if not found[PACKED_ROWS]:
                model.set_attn_implementation(plain_attention)
        found[ONE_PASS] = found.get(PACKED_ROWS) or agrees(read_in_one_pass, expected, tolerance)
    if fp8_layers:
        found[FP8_PRODUCTS] = all(fp8_agrees(layer) for layer in fp8_layers)
    return found


def describe_checks(found):
    """The result of self_check in words."""
    used = " and ".join(way for way, is_right in found.items() if is_right)
    unused = " and ".join(way for way, is_right in found.items() if not is_right)
    texts = []
    if used:
        texts.append(f"same as plain forward passes: {used}")
    if unused:
        texts.append(f"different from plain forward passes, so not used: {unused}")
    return "; ".join(texts)


def difference(found, expected):
    """The largest difference of logit vectors, relative to how the expected vary; NaN: ∞."""
    found, expected = found.float(), expected.float()
    varies = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    relative = (found - expected).norm(dim=-1) / varies.clamp(min=1e-9)
    return relative.nan_to_num(math.inf).max().item()


def agrees(compute, expected, tolerance):
    """Whether a function returns what is expected, to a relative tolerance.

    False for the errors that architectures raise for inputs that they don't support: ValueError in
    40 families, IndexError or RuntimeError, as our kernels' NotImplementedError. Others propagate.
    """
    try:
        found = compute()
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError, ValueError):
        return False
    return found.shape == expected.shape and difference(found, expected) <= tolerance


def fp8_agrees(layer):
    """Whether an Fp8Linear computes a linear layer's products and gradients to FP8_TOLERANCE."""
    x = torch.randn(64, layer.in_features).to(layer.weight).requires_grad_()
    upstream = torch.randn(64, layer.out_features).to(layer.weight)

    def compute(linear):
        out = linear(x)
        return out.flatten(), torch.autograd.grad(out, x, upstream)[0].flatten()

    pairs = zip(compute(Fp8Linear(layer)), compute(layer), strict=True)
    return all(difference(found, expected) <= FP8_TOLERANCE for found, expected in pairs)


# ------------------------------------------------------------------------------------------------
# 4. Planning

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MIN_MICRO_BATCH = 4  # rows; fewer are slower than activation checkpointing
AUTO = "auto"  # of a recipe's fields: chosen by data and base
AUTO_FIELDS = ("epochs", "batch_size", "learning_rate", "price_loss")
QUANTISED_BYTES = {"nf4": 0.5 + 1 / 64, "8 bit": 1.0}  # per weight, including block scales
Memory = namedtuple("Memory", "used available peak")  # bytes of the GPU's or else the machine's


def gpu_capability():
    """The GPU's compute capability, such as (7, 5) of a T4; (0, 0) without a GPU."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)


def memory():
    """The Memory of this process now."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        limit = torch.cuda.get_per_process_memory_fraction() * total
        available = min(free + torch.cuda.memory_reserved(), limit)
        return Memory(torch.cuda.memory_allocated(), available, torch.cuda.max_memory_allocated())
    process = psutil.Process().memory_info()
    available = psutil.virtual_memory().available + process.rss
    if resource is None:
        return Memory(process.rss, available, process.peak_wset)
    unit = 1 if sys.platform == "darwin" else 1024
    return Memory(process.rss, available, unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def describe_device():
    """What the program runs on, for plans and records."""
    if not torch.cuda.is_available():
        return f"CPU, {torch.get_num_threads()} threads"
    total = torch.cuda.get_device_properties(0).total_memory
    return f"{torch.cuda.get_device_name()}, {total / 2**30:.0f} GiB"


def versions():
    """{package: version} of what a run depends on, for records."""
    names = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets")
    return {name: version(name) for name in names}


def choose_precision(asked, use_bf16):
    """(bf16, fp16 or fp32 to compute in, why). Adapters and optimizer are always fp32."""
    if asked in (AUTO, "fp16") and not torch.cuda.is_available():
        return "fp32", "a CPU: most have no fp16, and emulate bf16, 25 × slower"
    if asked != AUTO:
        return asked, "as asked for"
    if use_bf16:
        return "bf16", "which the GPU has"
    return "fp16", "since the GPU lacks bf16"


def choose_schedule(recipe, auto, rows, base, scale):
    """(the Recipe with the fields `auto` set, a text on what they are and why).

    By the number of training rows and the base. Measured on validation rows of real listings: see
    tests/BENCHMARKS.md.
    """
    batch = recipe.batch_size
    if "batch_size" in auto:
        batch = world_size() * math.ceil(16 / world_size())
    epochs = math.ceil(180 * batch / rows)  # for at least 180 steps
    # hyperparam_utils.py of tinker-cookbook, whose rule doesn't depend on the rank
    width = base.config.get_text_config().hidden_size
    rate = 5e-4 * (2000 / width) ** 0.78
    chosen = {
        "epochs": min(max(epochs, 3), 12),  # at 1,000 rows 12 are no worse than 3
        "batch_size": batch,
        "learning_rate": float(f"{rate:.2g}"),
        "price_loss": 2.5,
    }
    reason = f"{rows:,} rows and a base of width {width:,}"
    if "price_loss" in auto and find_number_ids(base.tokenizer, scale) is None:
        chosen["price_loss"] = 0.0
        reason += ", which spells numbers in several tokens"
    chosen = {name: chosen[name] for name in auto}
    texts = [f"{name.replace('_', ' ')} {value:g}" for name, value in chosen.items()]
    if "epochs" in chosen and recipe.max_steps:
        texts = texts[1:]  # the steps end the run
    text = f"{', '.join(texts)}: chosen for {reason}, unless given" if texts else ""
    return replace(recipe, **chosen), text


def check_recipe(recipe, base, scale, use_bf16, micro_batch=None):
    """Raises a UserError that names all that this machine or the base can't do of a recipe."""
    problems = items.Problems()
    if recipe.base_weights == "fp8":
        precision, _ = choose_precision(recipe.precision, use_bf16)
        if precision != "bf16" or gpu_capability() < FP8_CAPABILITY:
            text = "needs bf16 and a GPU of capability 8.9 or newer. Leave it out."
            problems.append(f"`base_weights` fp8: {text}")
    if recipe.price_loss and find_number_ids(base.tokenizer, scale) is None:
        text = "needs a base whose tokenizer spells each number in one token. Leave it out, or, if "
        text += "an earlier version began the run, begin a new one."
        problems.append(f"`price_loss` {recipe.price_loss:g}: {text}")
    rows = world_size() * (micro_batch or 1)
    if recipe.batch_size % rows:
        text = f"has to be a multiple of {rows}, which is processes × `micro_batch`."
        problems.append(f"`batch_size` {recipe.batch_size}: {text}")
    problems.report()


def find_number_ids(tokenizer, scale):
    """The token of each of NUMBERS behind the prompts of a PriceScale; None if one has several."""
    spellings = items.spell_numbers(tokenizer, scale.prefix)
    return None if max(map(len, spellings)) > 1 else [token for (token,) in spellings]


def count_steps(recipe, rows):
    """Optimizer steps of a run on so many rows."""
    return recipe.max_steps or recipe.epochs * math.ceil(rows / recipe.batch_size)


def quantised_layers(skeleton):
    """The layers that bitsandbytes quantises: all linear ones but the head and subclasses."""
    head = skeleton.get_output_embeddings()
    return [one for one in skeleton.modules() if type(one) is torch.nn.Linear and one is not head]


def divisors(number, limit):
    """The divisors of `number` up to `limit`, the largest first."""
    return [n for n in range(min(number, limit), 0, -1) if number % n == 0]


@dataclass(frozen=True)
class Plan:
    """How a run is computed on this machine."""

    precision: str  # bf16, fp16 or fp32, of the base; adapters and optimizer are fp32
    targets: tuple  # endings of the names of the layers that are adapted
    storage: str = "nf4"  # or "8 bit", that the base is read in; else `precision`
    dequantised: bool = False  # the base is held in `precision`, expanded once
    micro_batch: int = 1  # rows computed at once by a process
    accumulation: int = 1  # micro-batches a step and process
    checkpointing: bool = False  # activations are computed again in the backward pass
    # The fast path
    attention: str | None = None  # of concatenated rows, which need no padding; None: padded
    fast_lora: bool = False  # LoRA layers that move fewer bytes
    compiled: bool = False  # decoder layers are compiled
    graphs: bool = False  # and recorded as CUDA graphs
    fp8: bool = False  # the base's products are computed in 8-bit floats
    in_tree: bool = True  # prices are read in one forward pass, see PriceReader
    notes: dict = field(default_factory=dict)  # texts on what else is to be known of it

    @property
    def dtype(self):
        return DTYPES[self.precision]

    @property
    def base_weights(self):
        """How the base is held."""
        if not self.dequantised:
            return self.storage
        return f"{'fp8' if self.fp8 else self.precision} from {self.storage}, dequantised once"

    @property
    def reasons(self):
        """{what: text} for the screen and run.json."""
        batch = self.micro_batch * self.accumulation * world_size()
        speed = "no padding" if self.attention else "rows padded"
        speed += ", layers compiled" if self.compiled else ", layers not compiled"
        micro_batch = (
            f"{self.micro_batch}, × {self.accumulation} accumulated × {world_size()} processes "
            f"= {batch}, activation checkpointing {'on' if self.checkpointing else 'off'}"
        )
        return self.notes | {"Micro-batch": micro_batch, "Speed": speed}

    def __str__(self):
        return "\n".join(f"{name + ':':<14}{text}" for name, text in self.reasons.items())

    def without(self, error):
        """The Plan to go on by after an error, or None.

        Without compiling; or smaller, below MIN_MICRO_BATCH rows first by activation checkpointing.
        """
        plan = replace(self, graphs=False)
        if not isinstance(error, torch.OutOfMemoryError):
            return replace(plan, compiled=False)
        if not self.checkpointing and self.micro_batch <= MIN_MICRO_BATCH:
            return replace(plan, checkpointing=True)
        rows = self.micro_batch * self.accumulation
        for size in divisors(rows, self.micro_batch - 1):
            return replace(plan, micro_batch=size, accumulation=rows // size)
        return None


def peak_bytes(plan, base, recipe, targets, lengths):
    """Bytes at the peak of a training step, about; `fit` handles memory that runs out all the same.

    Each layer keeps about 8 hidden-size and 3 MLP-size values a token, and 5 bytes for each input
    value of an adapter; compiled, which computes some of them again, 7 and 2 values, and 3 bytes if
    there is dropout. With checkpointing only its input is kept, and one layer at a time in full.
    """
    value_bytes = plan.dtype.itemsize
    parameters = sum(parameter.numel() for parameter in base.skeleton.parameters())
    quantised = sum(layer.weight.numel() for layer in quantised_layers(base.skeleton))
    held_bytes = value_bytes if plan.dequantised else QUANTISED_BYTES.get(plan.storage, 0)
    weights = value_bytes * (parameters - quantised) + held_bytes * quantised
    adapters = 16 * targets.count_parameters(recipe.lora_r)  # weights, gradients, Adam's moments

    tokens = plan.micro_batch * lengths.max()
    if plan.attention:
        deviation = math.sqrt(plan.micro_batch) * lengths.std()
        tokens = min(tokens, plan.micro_batch * lengths.mean() + 3 * deviation)
    shape = base.config.get_text_config()
    layers = shape.num_hidden_layers
    mlp = max(layer.in_features for layer in base.linear_layers.values())
    hidden, wide, adapter_bytes = 8, 3, 5
    if plan.compiled:
        hidden, wide = 7, 2
        adapter_bytes = 3 if recipe.lora_dropout else 0
    token_bytes = value_bytes * layers * (hidden * shape.hidden_size + wide * mlp)
    token_bytes += adapter_bytes * sum(layer.in_features for layer in targets.layers.values())
    if plan.checkpointing:
        token_bytes = token_bytes / layers + value_bytes * layers * shape.hidden_size
    return weights + adapters + tokens * token_bytes


def make_plan(base, run, data, use_bf16, micro_batch=None, fast=True):
    """The Plan of a run: the fastest that fits into memory with 10 % to spare, or else the least.

    `fast=False` turns the fast path off. Raises UserError for rows longer than the base can read.
    """
    recipe, rows = run.recipe, len(data.lengths)
    base.check_rows(max(len(row["input_ids"]) for row in data.extremes), data.highest)
    targets = find_targets(base, recipe.targets)
    precision, reason = choose_precision(recipe.precision, use_bf16)
    storage = "nf4" if run.use_4bit else "8 bit"
    if not quantised_layers(base.skeleton):
        storage = precision
    first = Plan(
        precision=precision,
        targets=targets.names,
        storage=storage,
        attention=choose_attention(precision, use_bf16) if fast else None,
        fast_lora=fast,
    )
    now = memory()
    for plan in possible_plans(first, base, recipe, rows, micro_batch):
        needed = now.used + peak_bytes(plan, base, recipe, targets, data.lengths)
        if 1.1 * needed < now.available:
            break
    fits = "as asked for"
    if recipe.base_weights == AUTO:
        fits = "memory has room" if plan.dequantised else "no room for it dequantised"
    parameters = targets.count_parameters(recipe.lora_r)
    loss = "cross-entropy of the completions"
    for name, kind in ADDED_LOSSES.items():
        if getattr(recipe, name):
            loss += f" + {getattr(recipe, name):g} × {kind.describe(data)}"
    steps = count_steps(recipe, rows)
    epochs = steps / math.ceil(rows / recipe.batch_size)  # of which the last step can be smaller
    notes = {name: run.plan[name] for name in ("Schedule",) if name in run.plan}
    notes |= {
        "Device": describe_device(),
        "Precision": f"{precision} ({reason}); adapters and optimizer in fp32",
        "Base": f"{type(base.skeleton).__name__}, {plan.base_weights}: {fits}",
        "Trainable": f"{parameters:,} parameters (LoRA r {recipe.lora_r} on {targets.text})",
        "Loss": loss,
        "Steps": (
            f"{steps:,} of {recipe.batch_size} rows: {epochs:.2f} epochs of {rows:,} rows, "
            f"learning rate up to {recipe.learning_rate:g}"
        ),
        "Memory": f"about {needed / 2**30:.1f} of {now.available / 2**30:.1f} GiB at the peak",
    }
    return replace(plan, notes=notes)


def possible_plans(plan, base, recipe, examples, micro_batch=None):
    """Yields the ways to go on with a Plan on this machine, the fastest first.

    The largest micro-batch; at that size the base dequantised, which has the same values and isn't
    expanded in each layer of each step. Checkpointing costs a third of the speed: only with it are
    micro-batches smaller than MIN_MICRO_BATCH. A given `micro_batch` is kept.
    """
    rows = recipe.batch_size // world_size()  # of a step and process
    sizes = [micro_batch] if micro_batch else divisors(rows, 256)  # rows; 512 are no faster
    held = {AUTO: (True, False), "nf4": (False,)}.get(recipe.base_weights, (True,))
    if not quantised_layers(base.skeleton):
        held = (False,)
    ways = list(product(sizes, held))
    # A T4 writes 5 GiB in 20 ms and multiplies 1,600 tokens by as many weights in more than 200 ms:
    # it loses nothing by fewer tokens, much by expanding. Imitated on an H100, kernels take 90.8 ms
    # a step so, 100.7 with nf4 kept. On newer GPUs small kernels end before the next is launched.
    if (0, 0) < gpu_capability() < (8, 0):
        ways = [(size, dequantised) for dequantised in held for size in sizes]
    # Compiling fewer examples takes longer than it saves; Triton needs capability 7
    is_long = count_steps(recipe, examples) * rows >= 16_000
    pays = is_long and plan.attention is not None and gpu_capability() >= (7, 0)
    for checkpointing, (size, dequantised) in product((False, True), ways):
        if size < min(MIN_MICRO_BATCH, rows) and not checkpointing and not micro_batch:
            continue
        compiling = {"on": True, "off": False, AUTO: pays and not checkpointing}
        compiled = plan.fast_lora and compiling[recipe.compile]
        yield replace(
            plan,
            micro_batch=size,
            accumulation=rows // size,
            checkpointing=checkpointing,
            dequantised=dequantised,
            fp8=dequantised and recipe.base_weights == "fp8",
            compiled=compiled,
            # Kernels of more than 64 rows run longer than their launch takes
            graphs=compiled and size == rows <= 64 and torch.cuda.is_available(),
        )


def check_plan(plan, model, base, data):
    """The Plan without what computes the loaded model wrong. All processes follow the first."""
    in_fp8 = layers_of_each_kind(model, fp8_layers(model)) if plan.fp8 else []
    rows = data.extremes
    prompts = [row["input_ids"][: row["labels"].count(items.IGNORED)] for row in rows]
    check = partial(self_check, model, base.tokenizer, prompts, plan.precision, plan.attention)
    found = broadcast(check(in_fp8))
    text = describe_checks(found)
    print(f"{'Check:':<14}{text}")
    if not found.get(FP8_PRODUCTS, True):
        reason = f"its products differ from bf16's by more than {FP8_TOLERANCE:.0%}"
        items.refuse("`base_weights` fp8", reason, "Leave it out")
    notes = plan.notes | {"Check": text}
    plan = replace(plan, in_tree=found[ONE_PASS], notes=notes)
    if plan.attention and not found[PACKED_ROWS]:
        plan = replace(plan, attention=None, compiled=False, graphs=False)
    collate = collate_padded
    if plan.attention:
        collate = PackedCollator(len(rows), numpy.array([len(row["input_ids"]) for row in rows]))
    if not loss_agrees(model, rows, collate, plan.precision):
        items.refuse(base.path, "its loss on a batch of rows is not that on each of them alone")
    return plan


def loss_agrees(model, rows, collate, precision):
    """Whether the loss of a collator's micro-batch of rows is that of a plain pass of each row."""
    expected = 0
    with torch.no_grad():
        for row in rows:
            answer = [label for label in row["labels"] if label != items.IGNORED]
            logits = plain_logits(model, [row["input_ids"]], len(answer) + 1)[:, :-1]
            expected += sum(completion_losses(logits, [answer])[0])
        found = summed_losses(model, BatchEncoding(collate(rows)).to(model.device)).item()
    return abs(found - expected) <= LAYER_TOLERANCES[precision] * expected


def layers_of_each_kind(model, endings):
    """The first layer of each kind whose name has one of these endings."""
    layers = {}
    for name, module in model.named_modules():
        if f".{name}".endswith(tuple(f".{ending}" for ending in endings)):
            layers.setdefault(re.sub(r"\.\d+\.", ".", name), module)
    return list(layers.values())


# ------------------------------------------------------------------------------------------------
# 5. Training


def join_processes():
    """Connects the processes that a launcher started, and gives each its GPU."""
    gpus = torch.cuda.device_count()
    if world_size() > 1:
        # gloo is for what the processes tell each other outside of training
        options = {"backend": "cuda:nccl,cpu:gloo"} if gpus else {}
        timeout = timedelta(hours=2)  # the first process may have much to download
        PartialState(cpu=not gpus, timeout=timeout, **options)
    elif gpus > 1:
        print(f"GPUs: one of {gpus}; torchrun starts a process for each")


def broadcast(value):
    """The first process's value, in all processes."""
    return broadcast_object_list([value])[0]


@dataclass
class TrainingData:
    """What a run trains and validates on."""

    train: object  # Dataset of input_ids and labels
    extremes: list  # its shortest and longest rows, and the longest to validate on
    train_rows: object  # Dataset of prompt and completion
    val_rows: list  # of the same
    lengths: numpy.ndarray  # tokens of each training row
    highest: int  # token of all rows
    spread: float  # money: mean absolute deviation of the training prices from their median
    scale: items.PriceScale  # that the prompts name


def prepare_training(run, prompts, base, use_bf16, micro_batch, changes):
    """The TrainingData of a run, in which data and base are recorded, or a UserError."""
    if not run.data:
        auto = auto_fields(run, prompts, changes)
        rows = len(prompts.splits["train"])
        run.recipe, text = choose_schedule(run.recipe, auto, rows, base, prompts.scale)
        run.plan = {"Schedule": text} if text else {}
    items.check_tokenizer(base.path, base.tokenizer, prompts.scale)
    check_recipe(run.recipe, base, prompts.scale, use_bf16, micro_batch)
    data = describe_data(prompts)
    if run.data and run.data["fingerprint"] != data["fingerprint"]:
        old, new = [f"{one['source']} ({one['fingerprint']})" for one in (run.data, data)]
        raise items.UserError(f"`resume` {run.name}: data was {old} and is {new}. {AS_IT_BEGAN}")
    if not base.is_of(run):
        old, new = f"{run.base_model} ({run.base_identity})", f"{base.name} ({base.identity})"
        text = f"`resume` {run.name}: its base model was {old} and is {new}. {AS_IT_BEGAN}"
        raise items.UserError(text)
    run.data, run.base_identity = data, base.identity
    return make_training_data(prompts.splits, base.tokenizer, run.recipe.val_size)


def auto_fields(run, prompts, changes):
    """The fields of a new run's recipe to choose: with own data all that `changes` don't give."""
    # Demo runs are made for CPUs
    is_asked = prompts.is_own and run.mode != "demo"
    values = dict.fromkeys(AUTO_FIELDS, AUTO) | changes if is_asked else vars(run.recipe)
    return [name for name in AUTO_FIELDS if values[name] == AUTO]


def make_training_data(splits, tokenizer, val_size):
    """The TrainingData of a dataset of prompts."""
    train = items.tokenise(splits["train"], tokenizer, "train")
    lengths = items.row_lengths(train)
    val_rows = first_rows(splits["val"], val_size)
    val = items.tokenise(splits["val"].select(range(len(val_rows))), tokenizer, "val")
    extremes = [train[int(row)] for row in (lengths.argmin(), lengths.argmax())]
    extremes.append(max(val, key=lambda row: len(row["input_ids"])))
    highest = max(items.highest_token(train), items.highest_token(val))
    spread = items.price_spread(splits["train"])
    scale = scale_of_rows(val_rows)
    rows = splits["train"], val_rows
    return TrainingData(train, extremes, *rows, lengths, highest, spread, scale)


def collate_padded(rows):
    """What a PackedCollator returns, but padded on the right, where no causal model looks."""
    inputs = dict(DataCollatorForLanguageModeling(pad_token_id=0)(rows))
    return inputs | labelled(inputs["labels"])


def summed_losses(model, inputs, added=()):
    """The losses of a micro-batch, padded or packed, each summed over its completions' tokens.

    A tensor of the cross-entropy and the `added` ones, such as a PriceLoss.

    The logits are the model's own, of these positions only: as `logits_to_keep` models take
    positions that are the same in all rows, and TRL multiplies by the head's weights itself, which
    is another model where logits are scaled or capped.
    """
    others = {name: inputs[name] for name in inputs if name not in ("labels", "logits_to_keep")}
    labels, kept = inputs["labels"].flatten(), inputs["logits_to_keep"]

    def choose(head, hidden):
        return hidden[0].flatten(0, 1)[kept][None]

    head = getattr(model, "module", model).get_output_embeddings()  # a DDP model's own
    hook = head.register_forward_pre_hook(choose)
    try:
        logits = model(**others, use_cache=False).logits.flatten(0, 1)
    finally:
        hook.remove()
    if len(logits) != len(kept):  # the model has another way to its head
        logits = logits[kept]
    logits, targets = logits.float(), labels[kept + 1]
    is_first = labels[kept] == items.IGNORED
    losses = [torch.nn.functional.cross_entropy(logits, targets, reduction="sum")]
    losses += [loss.of_tokens(logits, targets, is_first) for loss in added]
    return torch.stack(losses)


@dataclass
class PriceLoss:
    """What is added to the cross-entropy of a step: weight × CRPS / spread, summed over rows.

    So the weight means the same in every catalogue. It trains for the score of the distribution
    that is read, not of tokens only, which lowers the median's error (RAFT, arXiv 2501.19383).
    """

    weight: float
    spread: float  # units: mean absolute deviation of the training prices
    number_ids: torch.Tensor  # the token of each of NUMBERS

    @classmethod
    def of_run(cls, weight, data, tokenizer, device):
        """The loss for a run's TrainingData and tokenizer."""
        number_ids = torch.tensor(find_number_ids(tokenizer, data.scale), device=device)
        return cls(weight, max(float(data.scale.number(data.spread)), 0.5), number_ids)

    @staticmethod
    def describe(data):
        """What its weight is multiplied by, for the plan."""
        return f"CRPS of the prices / {data.scale.format(data.spread)}"

    def of_tokens(self, logits, targets, is_first):
        """The loss of logits, tokens × vocabulary, that `targets` follow."""
        # Only those count that begin a completion; to choose them would mean waiting for the GPU
        is_truth = targets[:, None] == self.number_ids
        reached = logits[:, self.number_ids].softmax(-1).cumsum(-1)
        # CRPS: ∑ (F(n) − [n ≥ truth])², in whole units (Gneiting & Raftery 2007)
        scores = (reached - is_truth.cumsum(-1)).square().sum(-1)
        return self.weight / self.spread * (scores * (is_truth.any(-1) & is_first)).sum()


# {field of the recipe, its weight: what is added to the cross-entropy if that isn't 0}
ADDED_LOSSES = {"price_loss": PriceLoss}


class PriceTrainer(SFTTrainer):
    """SFTTrainer with our loss, that also validates by the mean absolute error."""

    def __init__(self, *, val_rows, stopper, in_tree, added, **options):
        super().__init__(**options)
        self.added = added  # {name: loss} of ADDED_LOSSES
        self.sums = torch.zeros(1 + len(added), device=self.args.device)  # to be logged
        self.val_rows = val_rows  # of prompt and completion
        self.stopper = stopper
        self.validated = (None, [])  # step, what read_validation returned then
        prefix = scale_of_rows(val_rows).prefix
        self.reader = PriceReader(self.model, self.processing_class, in_tree, prefix)
        # A step's tokens are to be counted, also for models that would not be told (Gemma 4)
        self.model_accepts_loss_kwargs = True
        # Otherwise each gradient is held, and copied, twice
        self.accelerator.ddp_handler.gradient_as_bucket_view = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """A micro-batch's share of a step's loss. TRL's also waits for the GPU, to measure more."""
        if torch.cuda.is_available():  # it imports the compiler
            torch.compiler.cudagraph_mark_step_begin()  # the last step's tensors may be overwritten
        # DDP averages the processes' gradients, each of which is a share of the whole batch's
        losses = summed_losses(model, inputs, self.added.values())
        losses = losses / num_items_in_batch * world_size()
        if self.added:
            self.sums += losses.detach()
        return losses.sum()

    def log(self, logs, start_time=None):
        """Logs added losses apart, so that the `loss` is what that of the validation is."""
        if self.added and "loss" in logs:
            sums = self.accelerator.gather(self.sums[None]).sum(0)
            self.sums.zero_()
            shares = (logs["loss"] * sums / sums.sum()).tolist()
            logs |= dict(zip(("loss", *self.added), shares, strict=True))
        super().log(logs, start_time)

    def evaluate(self, *_, **__):
        """Logs and returns the loss per completion token and the median price's error, in money."""
        answers = self.read_validation()
        losses = [loss for losses_of_row, _, _ in answers for loss in losses_of_row]
        guesses = [estimate.guess for _, estimate, _ in answers]
        mae = metrics(guesses, [truth_of(row) for row in self.val_rows])["mae"]
        found = {"eval_loss": sum(losses) / len(losses), "eval_mae": mae}
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def read_validation(self):
        """[(losses of the completion's tokens, Estimate, probabilities)] of the validation rows."""

        def read(rows):
            reading = self.reader.read(rows, with_loss=True)
            estimates = estimate_prices(reading.probabilities, reading.greedy, rows)
            return list(zip(reading.losses, estimates, reading.probabilities, strict=True))

        self.model.eval()
        # Not compiled: many shapes, few batches
        with self.compute_loss_context_manager(), torch.compiler.set_stance("force_eager"):
            answers, _ = predict(
                *(read, self.val_rows, self.reader.batch_size, "the model about validation rows"),
                **{"position": 0, "leave": False},  # in the line of the bar of the steps
            )
        self.validated = (self.state.global_step, answers)
        return answers

    def validation_answers(self):
        """(the trained model's Estimates, its probabilities) of the validation rows."""
        if self.validated[0] != self.state.global_step:
            self.read_validation()
        _, estimates, probabilities = zip(*self.validated[1], strict=True)
        return estimates, numpy.array(probabilities)

    def load_adapter(self, checkpoint):
        """Replaces the adapters by those of a checkpoint; UserError if not all have a place."""
        name = self.model.active_adapter
        loaded = self.model.load_adapter(checkpoint, name, is_trainable=True)
        wrong = [*loaded.unexpected_keys, *loaded.missing_keys]
        if wrong:
            reason = f"{len(wrong)} of its tensors are missing or misplaced: {wrong[0]}"
            items.refuse(checkpoint, reason, "Begin a new run")
        self.validated = (None, [])

    def _load_from_checkpoint(self, checkpoint, model=None):
        """As Trainer's, which only warns of weights that have no place."""
        self.load_adapter(checkpoint)

    def load_best(self):
        """Loads the complete checkpoint of the least validation error; names those that aren't."""
        log = self.state.log_history
        errors = {entry["step"]: entry["eval_mae"] for entry in log if "eval_mae" in entry}
        for step in sorted(errors, key=errors.get):
            checkpoint = Path(self.args.output_dir, f"checkpoint-{step}")
            problem = items.manifest_problem(checkpoint)
            if problem is None:
                self.load_adapter(checkpoint)
                break
            print(f"{checkpoint.name}, the best, is skipped: {problem}")

    def create_model_card(self, *_, **__):
        """Nothing: TRL would write one with each checkpoint; ours comes with the adapter."""


TIMED_STEPS = 8  # the first ones may compile layers


class Progress(ProgressCallback):
    """One bar for the steps, and a line for what is logged."""

    def __init__(self, val_size, scale):
        super().__init__()
        self.val_size = val_size  # rows
        self.scale = scale
        self.ends = []  # of the first steps, in seconds

    def on_step_end(self, args, state, control, **_):
        super().on_step_end(args, state, control)
        if len(self.ends) < TIMED_STEPS:
            self.ends.append(time.time())
            if len(self.ends) == TIMED_STEPS and self.training_bar is not None:
                seconds = statistics.median(later - end for end, later in pairwise(self.ends))
                left = (state.max_steps - state.global_step) * seconds
                text = f"about {timedelta(seconds=round(left))} left, {seconds:.2g} s a step, "
                self.training_bar.write(f"{'Time:':<14}{text}without validations")

    def on_log(self, args, state, control, logs=None, **_):
        error = self.scale.format(logs.get("eval_mae", 0.0))
        texts = {
            "loss": "loss {:.3f}",
            **{name: name.replace("_", " ") + " {:.3f}" for name in ADDED_LOSSES},
            "eval_loss": "validation loss {:.3f}",
            "eval_mae": f"validation error {error} (n = {self.val_size})",
            "learning_rate": "LR {:.1e}",
        }
        parts = [text.format(logs[name]) for name, text in texts.items() if name in logs]
        if parts and self.training_bar is not None:
            self.training_bar.write(f"step {state.global_step:>5}  {'  '.join(parts)}")


def build_trainer(model, tokenizer, data, run, plan, stopper):
    """The PriceTrainer of a run: LoRA on the quantised base, adapters in fp32."""
    recipe = run.recipe
    if plan.fp8:
        hold_in_fp8(model)
    lora_config = LoraConfig(
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha or 2 * recipe.lora_r,
        target_modules=list(plan.targets),
        lora_dropout=recipe.lora_dropout,
        task_type="CAUSAL_LM",
    )
    collator = collate_padded
    if plan.attention:
        collator = PackedCollator(plan.micro_batch, data.lengths, plan.graphs)
    added = {}
    for name, kind in ADDED_LOSSES.items():
        weight = getattr(recipe, name)
        if weight:
            added[name] = kind.of_run(weight, data, tokenizer, model.device)
    trainer = PriceTrainer(
        val_rows=data.val_rows,
        stopper=stopper,
        in_tree=plan.in_tree,
        added=added,
        model=model,
        processing_class=tokenizer,
        train_dataset=data.train,
        eval_dataset=data.train,  # not read, but asked for: PriceTrainer.evaluate has its own rows
        data_collator=collator,
        peft_config=with_fast_lora(lora_config) if plan.fast_lora else lora_config,
        args=training_arguments(run, plan),
    )
    if plan.compiled:
        compile_layers(trainer.model, plan.graphs)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            # TRL casts them to bf16: small updates round to nothing, T4s fail (TRL issue 4901)
            parameter.data = parameter.data.float()
    trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)
    # The order matters: StopOnSignal requests a checkpoint, Checkpoints logs with it and completes
    # it for PushCheckpoints
    for callback in (stopper, Checkpoints(run), Progress(len(data.val_rows), data.scale)):
        trainer.add_callback(callback)
    if run.hub and is_first_process():
        trainer.add_callback(PushCheckpoints(run.hub))
    return trainer


def training_arguments(run, plan):
    """The SFTConfig of a run."""
    recipe = run.recipe
    on_gpu = torch.cuda.is_available()
    arguments = SFTConfig(
        output_dir=str(run.folder),
        report_to="wandb" if run.wandb and is_first_process() else "none",
        seed=run.seed,
        data_seed=run.seed,
        # Steps and batches
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        per_device_train_batch_size=plan.micro_batch,
        gradient_accumulation_steps=plan.accumulation,
        max_length=None,
        router_aux_loss_coef=0.0,  # of a mixture of experts: the routers are frozen
        activation_checkpointing=plan.checkpointing,
        bf16=plan.precision == "bf16",
        fp16=plan.precision == "fp16",
        use_cpu=not on_gpu,
        # Optimiser
        optim="adamw_torch_fused",  # paged_adamw_32bit can't resume: bitsandbytes issue 782
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.scheduler,
        warmup_steps=recipe.warmup,  # below 1 it is a share of the steps
        weight_decay=recipe.weight_decay,
        max_grad_norm=0.3,
        # Several processes
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        ddp_bucket_cap_mb=250,  # full on two H200s: 390 ms a step, with the usual 25 it is 394
        # Logging, validation, checkpoints. Nothing may wait for the GPU in every step, or the GPU
        # idles while the next step is prepared.
        logging_first_step=True,
        logging_steps=recipe.logging_steps,
        logging_nan_inf_filter=False,
        accelerator_config={"non_blocking": on_gpu},
        eval_strategy="steps",
        eval_steps=recipe.save_steps,
        save_strategy="steps",
        save_steps=recipe.save_steps,
        # Names the best checkpoint in the state; it is loaded by PriceTrainer.load_best
        metric_for_best_model="mae" if recipe.keep_best else None,
        greater_is_better=False,
    )
    # Of several visible GPUs a process uses the first: SFTTrainer refuses to spread a batch over
    # them. CUDA_VISIBLE_DEVICES has no effect once a notebook has used a GPU. Trainer.__init__ sets
    # this, too, for a model on several GPUs; it can go when SFTConfig takes the number.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


# ------------------------------------------------------------------------------------------------
# 6. The training loop


CHECKPOINTS_KEPT = 10
HANGUP = getattr(signal, "SIGHUP", None)  # of a closed terminal; Windows has none
STOPPING = tuple(filter(None, (signal.SIGINT, signal.SIGTERM, HANGUP)))


class StopOnSignal(TrainerCallback):
    """Ends training after the step in which one of STOPPING comes, with a checkpoint.

    A second signal does at once what it would without this. Several processes end after the next
    logged step, where they wait for each other anyway, so that all end after the same one; torchrun
    forwards signals that they got as well, so a second one does nothing there.
    """

    def __init__(self):
        self.signal_number = 0  # until a signal comes
        self.previous_handlers = {}

    def on_train_begin(self, args, state, control, **_):
        for number in STOPPING:
            if signal.getsignal(number) != signal.SIG_IGN:  # as it is under nohup
                self.previous_handlers.setdefault(number, signal.signal(number, self.on_signal))

    def on_signal(self, number, frame):
        if not self.signal_number:
            self.signal_number = number
            # print can't be called while a print is interrupted; nobody may read what is written
            with suppress(OSError):
                hint = b"" if world_size() > 1 else b"; once more to stop at once"
                os.write(2, b"\nSaving, then stopping" + hint + b"\n")
        elif world_size() == 1 and number != HANGUP:  # closed terminals send it twice
            stop_at_once = self.previous_handlers[number]
            if not callable(stop_at_once):
                os._exit(128 + number)
            stop_at_once(number, frame)  # ends the program, or in a notebook the cell

    def on_step_end(self, args, state, control, **_):
        if world_size() > 1:
            if not control.should_log:
                return
            received = torch.tensor(self.signal_number)
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
            self.signal_number = int(received)
        if self.signal_number:
            control.should_save = control.should_training_stop = True

    def restore_handlers(self):
        """Gives signals back to who had them before the training."""
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        self.previous_handlers = {}


class Checkpoints(TrainerCallback):
    """Logs the loss with each checkpoint, records the time until then, and completes it.

    The run ends if a logged number is not finite: so no checkpoint with such numbers is saved, and
    a resumed run loses no part of a logged loss. Checking every step would mean waiting for the GPU
    in each. In fp16 the scaler skips steps with such gradients: there ten in a row stop the run.
    """

    def __init__(self, run):
        self.run = run
        self.skipped = 0
        self.counted_at = time.time()  # until then, time is in the run's seconds

    def on_step_end(self, args, state, control, **_):
        if not control.should_save:
            return
        control.should_log = True  # in which processes wait for each other
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if folder.exists() and is_first_process():  # damaged: its files may not be writable
            with items.replacing(folder) as new:
                new.mkdir()

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" not in logs:
            return
        loss, norm = logs["loss"], logs["grad_norm"]
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        if not math.isfinite(loss) or self.skipped >= (10 if args.fp16 else 1):
            raise items.UserError(
                f"step {state.global_step:,}: not finite (loss {loss:.3g}, gradient {norm:.3g}). "
                "Older checkpoints are complete. Start again with a lower `learning_rate`."
            )

    def on_save(self, args, state, control, **_):
        PartialState().wait_for_everyone()  # each writes a part; the manifest comes last
        self.counted_at = self.run.add_seconds("train", self.counted_at)
        if is_first_process():
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
            self.run.write()
            self.run.write(folder)  # should that one be damaged
            items.write_manifest(folder)
            # Trainer would count copies that a user made, as `checkpoint-old`, and go by file times
            best = Path(state.best_model_checkpoint or "").name
            for _, old in checkpoints(Path(args.output_dir))[CHECKPOINTS_KEPT:]:
                if old.name != best:
                    shutil.rmtree(old, ignore_errors=True)


class PushCheckpoints(TrainerCallback):
    """Keeps the newest checkpoint on the Hub, so that a run survives the loss of its machine.

    One upload at a time, in the background, for at most 5 % of the time: a checkpoint of the full
    recipe has 5 GB. That of a stop is always pushed, the last one never, since the adapter follows.
    """

    def __init__(self, name):
        self.name = name
        self.upload = None
        self.next_upload_at = 0.0

    def on_save(self, args, state, control, **_):
        is_free = self.upload is None or self.upload.done()
        is_due = is_free and time.time() >= self.next_upload_at
        if state.global_step >= state.max_steps or not (is_due or control.should_training_stop):
            return
        self.on_train_end()
        kept = [f"checkpoint-{state.global_step}"]
        if state.best_model_checkpoint:
            kept.append(Path(state.best_model_checkpoint).name)
        self.upload = HfApi().run_as_future(self.push, args.output_dir, kept)

    def push(self, folder, checkpoints):
        """Uploads run.json and these checkpoints, the newest first; deletes others on the Hub."""
        start = time.time()
        with items.hub_errors(self.name):
            HfApi().create_repo(self.name, private=True, exist_ok=True)
            HfApi().upload_folder(
                repo_id=self.name,
                folder_path=folder,
                allow_patterns=["run.json", *(f"{checkpoint}/*" for checkpoint in checkpoints)],
                delete_patterns="checkpoint-*",
                commit_message=checkpoints[0],
            )
        self.next_upload_at = time.time() + 19 * (time.time() - start)

    def on_train_end(self, *_, **__):
        """Waits for the upload, and prints why it failed, if it did."""
        error = self.upload.exception() if self.upload else None
        if error:
            print(f"Not pushed: {error} The next push includes it.")
        self.upload = None


def train(base, run, data, plan, quant_config):
    """Trains a run to its end, from its newest complete checkpoint if it has one: its PriceTrainer.

    If memory runs out, or layers can't be compiled, it continues from that checkpoint with a
    Plan that needs less. Raises Stopped after a signal; UserError if there is no such plan.
    """
    stopper = StopOnSignal()
    while plan:
        start = time.time()
        run.follow(plan)  # should it be stopped before its first step
        model = load_base(base, plan, quant_config)
        plan = check_plan(plan, model, base, data)
        run.follow(plan)
        trainer = build_trainer(model, base.tokenizer, data, run, plan, stopper)
        run.add_seconds("load", start)
        try:
            plan = fit(trainer, run, plan)
        except Exception as error:
            print(file=sys.stderr)  # the progress bar is in this line
            problem = items.disk_problem(error)
            if problem:
                raise items.UserError(problem, resumes=True) from error
            raise
        if plan:
            model = trainer = None  # so that their memory is free, and that of compiled graphs
            gc.collect()
            torch.compiler.reset()
            torch.cuda.empty_cache()
    if run.recipe.keep_best:
        trainer.load_best()
    return trainer


def fit(trainer, run, plan):
    """Trains to the end. Returns None, or the Plan to go on by."""
    checkpoint = broadcast(newest_checkpoint(run.folder))
    try:
        if checkpoint:
            state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
        if checkpoint and state.global_step >= state.max_steps:  # Trainer would do one step more
            trainer.state = state
            trainer.load_adapter(checkpoint)
        else:
            trainer.train(resume_from_checkpoint=checkpoint)
    except (torch.OutOfMemoryError, torch._dynamo.exc.TorchDynamoException) as error:
        return go_on_without(trainer, plan, error)
    finally:
        trainer.stopper.restore_handlers()
    number = trainer.stopper.signal_number
    if number:
        step = trainer.state.global_step
        raise items.Stopped(f"Stopped after step {step:,}, which is saved.", 128 + number)
    return None


def go_on_without(trainer, plan, error):
    """The Plan to go on by after an error, or a UserError."""
    is_memory = isinstance(error, torch.OutOfMemoryError)
    # Layers are compiled when they first run, and again for other shapes: GPUs and versions that
    # the compiler doesn't support show there
    if not is_memory and not plan.compiled:
        raise error
    text = textwrap.shorten(f"{type(error).__name__}: {error}", 100)
    what = f"Step {trainer.state.global_step + 1:,}: {text}"
    if world_size() > 1:  # the others are in the middle of the step
        if is_memory:
            remedy = f"Take a `micro_batch` below {plan.micro_batch}."
            raise items.UserError(f"{what}. {remedy}", resumes=True) from error
        raise items.UserError(f"{what}. Begin a new run with `compile` off.") from error
    plan = plan.without(error)
    if plan is None:
        remedy = "Take a smaller base model, `lora_r` or `cutoff`"
        raise items.UserError(f"{what}; one row at a time doesn't fit. {remedy}.") from error
    print(
        f"{what}; going on from the newest checkpoint, in micro-batches of "
        f"{plan.reasons['Micro-batch']}"
    )
    return plan


def training_log(trainer):
    """What training logged, without timings: the same for an interrupted and a resumed run."""
    names = ["step", "epoch", "loss", *ADDED_LOSSES, "grad_norm", "learning_rate"]
    names += ["eval_loss", "eval_mae"]
    return [
        {name: entry[name] for name in names if name in entry}
        for entry in trainer.state.log_history
        if "loss" in entry or "eval_loss" in entry
    ]


# ------------------------------------------------------------------------------------------------
# 7. Runs

DATA_FIELDS = ("hub", "cutoff", "columns", "written_currency")  # of prepare.json, kept in run.json
WANDB_MODES_WITHOUT_LOGIN = ("offline", "dryrun", "disabled")


@dataclass
class Run:
    """A training run: the content of its run.json, and the folders that it is in.

    One that was published without a run.json, as the course's are, has defaults and no `data`.
    """

    folder: Path  # on this machine; evaluations are written here, too
    name: str
    project: str
    mode: str
    base_model: str | None = None
    recipe: object = None  # app.Recipe
    seed: int = 42
    use_4bit: bool = True
    versions: dict = field(default_factory=dict)
    device: str = ""
    hub: str | None = None  # its name on the Hub; None for a run that stays on this machine
    wandb: bool = False
    data: dict = field(default_factory=dict)  # what describe_data says of it
    base_identity: str | None = None
    processes: int = 1
    micro_batch: int | None = None  # dropout depends on it: resuming is exact with the same
    base_weights: str = ""
    plan: dict = field(default_factory=dict)  # the reasons of the Plan
    steps: int = 0
    val_rows: int = 0  # that it was validated on; 0 in older records
    history: list = field(default_factory=list)
    calibration: dict = field(default_factory=dict)  # of the intervals; {} if they are as read
    comparables: dict = field(default_factory=dict)  # see choose_comparables; {} in older records
    seconds: dict = field(default_factory=dict)  # of loading and training, all sessions together
    peak_memory_bytes: int = 0
    adapter: Path | None = None  # where its weights are read; None: the untouched base

    @classmethod
    def from_record(cls, folder, record):
        """The Run that run.json's content describes; what this version doesn't know is ignored."""
        known = {one.name for one in fields(cls)} - {"folder", "name", "adapter"}
        values = {name: value for name, value in record.items() if name in known}
        return cls(folder=folder, name=record["run"], **values)

    @property
    def scale(self):
        """The PriceScale of the prompts that it was trained on."""
        return items.PriceScale.from_record(self.data)

    @property
    def account(self):
        """The account on the Hub to which it is pushed, or None."""
        return self.hub.split("/")[0] if self.hub else None

    def write(self, folder=None):
        """Writes run.json into `folder`, its own by default."""
        record = {"run": self.name, **asdict(self)}
        for name in ("folder", "name", "adapter"):
            del record[name]
        items.write_json(Path(folder or self.folder, "run.json"), record, with_checksum=True)

    def add_seconds(self, name, since):
        """Adds the time since then to that of `name`, over all sessions. Returns now."""
        now = time.time()
        self.seconds[name] = round(self.seconds.get(name, 0) + now - since, 2)
        return now

    def follow(self, plan):
        """Records the Plan by which it is trained."""
        self.micro_batch = plan.micro_batch
        self.base_weights = plan.base_weights
        self.plan = plan.reasons
        if is_first_process():
            self.write()


@dataclass(frozen=True)
class Project:
    """The runs of a project in a folder on this machine."""

    place: Path
    name: str

    def folder(self, run_name):
        return self.place / f"{self.name}-{run_name}"

    def short(self, run_name):
        """A run's name; that of its folder is accepted, too."""
        return str(run_name).removeprefix(f"{self.name}-")

    def has(self, run_name):
        """Whether a run is finished, and so needn't be fetched."""
        return has_adapter(self.folder(run_name))

    @cached_property
    def records(self):
        """{name: run.json's content} of the runs, the newest last."""
        records = {}
        for folder in sorted(self.place.glob("[!.]*/"), key=last_change):
            record = read_record(folder)
            if record and folder == self.folder(record["run"]):
                records[record["run"]] = record
        return records

    def newest(self, is_finished, mode=None):
        """The name of the newest finished or unfinished run, of a mode if it is given."""
        names = [
            name
            for name, record in self.records.items()
            if self.has(name) == is_finished and mode in (None, record["mode"])
        ]
        if not names:
            kind = f"{'finished' if is_finished else 'unfinished'} run of {self.name}"
            in_mode = f" in mode {mode}" if mode else ""
            raise items.UserError(f"{self.place}: no {kind}{in_mode}. Train one, or name a run.")
        return names[-1]

    def new(self, run_name, mode, base_model, recipe, seed, use_4bit):
        """The Run that is about to begin. Raises UserError if its name is taken."""
        name = self.short(run_name)
        folder = self.folder(name)
        if name == items.UNTOUCHED or folder.is_file() or any(folder.glob("[!.]*")):
            text = f"`run_name` {name}: {folder} exists. Give another name, or resume it."
            raise items.UserError(text, resumes=name in self.records)
        return Run(
            folder=folder,
            name=name,
            project=self.name,
            mode=mode,
            base_model=base_model,
            recipe=recipe,
            seed=seed,
            use_4bit=use_4bit,
            versions=versions(),
            device=describe_device(),
            processes=world_size(),
        )

    def open(self, name, mode, is_finished, on_hub=None, revision=None):
        """The Run to evaluate or, unless `is_finished`, to resume. Its recipe is a dict.

        Fetched from `on_hub`, its name on the Hub, if that is given. A run without a record has the
        `mode`, or lite's by its name. Raises UserError if it is damaged.
        """
        folder = self.folder(name)
        if name == items.UNTOUCHED:
            return Run(folder, name, self.name, mode)
        if not is_finished:
            if on_hub:
                fetch_run(on_hub, local_dir=folder)
            return resumable_run(folder)
        adapter = fetch_run(on_hub, revision=revision) if on_hub else folder
        problem = finished_problem(adapter)
        if problem and on_hub:
            raise items.UserError(f"{name}: {problem}. Remove {adapter} and fetch it again.")
        if problem:
            raise items.UserError(f"{name}: {problem}.", resumes=name in self.records)
        check_adapter(adapter)
        record = read_record(adapter)
        if not record:
            mode = "lite" if name.endswith("-lite") else mode
            config = items.read_json(adapter / "adapter_config.json")
            record = {"run": name, "project": self.name, "mode": mode}
            record["base_model"] = config.get("base_model_name_or_path")
            record["base_identity"] = config.get("revision")  # a commit of it, perhaps
        run = Run.from_record(folder, record)
        return replace(run, adapter=adapter, hub=on_hub or run.hub)


def has_adapter(folder):
    """Whether the folder holds a finished run: the adapter's weights are written last."""
    return (folder / ADAPTER_FILE).exists()


def finished_problem(folder):
    """Why the folder holds no finished run, in a few words, or None. Reads all of it."""
    if not has_adapter(folder):  # PEFT would take an adapter_model.bin, which may hold any code
        return f"holds no {ADAPTER_FILE}: the run isn't finished"
    return items.manifest_problem(folder, must_exist=False)


def last_change(folder):
    """When a run's record was last written, in seconds; that of its folder without one."""
    file = folder / "run.json"
    return (file if file.exists() else folder).stat().st_mtime


def checkpoints(folder):
    """[(step, folder)] of a run's checkpoints, the newest first."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("*")]
    return sorted([(int(match[1]), path) for match, path in found if match], reverse=True)


def checkpoint_problem(folder):
    """Why training can't go on from a checkpoint, in a few words, or None."""
    problem = items.manifest_problem(folder)
    for file in [] if problem else folder.glob("*.pt*"):
        try:
            with safe_globals():
                torch.load(file, map_location="meta", weights_only=True)
        except (RuntimeError, EOFError, *items.UNBUILDABLE):
            return f"{file.name} can't be loaded"
    return problem


def newest_checkpoint(folder, say=print):
    """The newest complete checkpoint in a run's folder, as text, or None; says which."""
    found = checkpoints(folder)
    for step, path in found:
        problem = checkpoint_problem(path)
        if not problem:
            say(f"Resuming from step {step:,}, the newest complete checkpoint")
            return str(path)
        say(f"{path.name} is skipped: {problem}")
    if found:
        say("No checkpoint is complete: starting at step 0")
    return None


def read_record(folder):
    """The content of a run's run.json, or of its copy in the newest complete checkpoint, or {}."""
    try:
        record = items.read_json(folder / "run.json")
        if record.get("xxh3") not in (None, items.checksum(record)):  # older ones have none
            raise ValueError("it has changed since it was written")
        if {"run", "mode", "recipe"} <= record.keys():
            return record
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        print(f"{folder / 'run.json'} can't be read: {error}")
    checkpoint = newest_checkpoint(folder, say=str)
    return read_record(Path(checkpoint)) if checkpoint else {}


def resumable_run(folder):
    """The Run to resume in a folder.

    Raises UserError if it has no record, or if another process is training it.
    """
    record = read_record(folder)
    if not record:
        raise items.UserError(f"{folder}: has no run.json, so it can't be resumed.")
    if is_first_process():
        lock_run(folder).release()
    run = Run.from_record(folder, record)
    problem = finished_problem(folder)
    if not problem:
        print(f"{run.name} is finished")
    elif has_adapter(folder):
        print(f"{run.name}: {problem}: rebuilding it from its newest checkpoint")
    if run.processes != world_size():  # its micro-batch was for another share of the batch
        run.processes = world_size()
        run.micro_batch = None
    return run


def fetch_run(on_hub, **options):
    """Downloads a run from the Hub. Returns its folder.

    run.json comes last: without it there is no run to resume. Adapters are read from safetensors
    only.
    """
    with items.hub_errors(on_hub):
        snapshot_download(on_hub, ignore_patterns=["*.bin", "eval/*", "run.json"], **options)
        folder = snapshot_download(on_hub, allow_patterns="run.json", **options)
    print(f"Fetched: {on_hub}")
    return Path(folder)


def lock_run(folder):
    """The lock of a run's folder, held until it is released or the process ends.

    Raises UserError if another process holds it.
    """
    path = folder / ".lock"
    try:
        lock = FileLock(path, timeout=0, mode=0o666)
        lock.acquire()
        return lock
    except Timeout:
        raise items.UserError(
            f"{folder.name}: another process is training it. Wait until it ends, or stop it first."
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP):  # some network drives have no locks
            return FileLock(path)
        raise items.UserError(f"{path}: can't be locked ({error.strerror}).") from error


@contextmanager
def claimed(run, is_new):
    """Makes a new run's folder, and locks it as long as the run is trained, by one process."""
    if not is_first_process():
        yield
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    lock = lock_run(run.folder)
    try:
        if is_new and any(run.folder.glob("[!.]*")):
            text = f"`run_name` {run.name}: another training has just begun by this name."
            raise items.UserError(f"{text} Give another name.")
        run.write()
        if run.wandb:
            start_wandb(run)
        yield
    finally:
        lock.release()


AS_IT_BEGAN = "Resume with what it began with, or start a new run."


def check_resumable(run, changes, use_4bit):
    """Raises UserError for settings that an earlier run didn't begin with.

    More steps than a finished run's would not equal one longer run: its learning rate has ended.
    """
    settings = asdict(run.recipe) | {"seed": run.seed}
    changed = [
        f"{name.replace('_', ' ')} was {settings[name]} and is {value}"
        for name, value in changes.items()
        if value not in (AUTO, settings[name])
    ]
    if run.use_4bit and not use_4bit:
        changed.append("its base was in 4 bits")
    if changed:
        raise items.UserError(f"`resume` {run.name}: {'; '.join(changed)}. {AS_IT_BEGAN}")


def save_run(run, trainer, data):
    """Writes adapter, tokenizer, run.json, chart and card into the run's folder.

    The weights and then the manifest are moved in last: a run that has both is complete.
    """
    run.steps = trainer.state.global_step
    run.val_rows = len(trainer.val_rows)
    run.history = training_log(trainer)
    run.peak_memory_bytes = max(run.peak_memory_bytes, memory().peak)
    if not is_first_process():
        return
    estimates, probabilities = trainer.validation_answers()
    run.calibration = calibrate([estimate.rank for estimate in estimates])
    run.comparables = choose_comparables(Comparables(data.train_rows), data.val_rows, probabilities)
    new = run.folder / "adapter.new"
    trainer.model.save_pretrained(new)
    trainer.processing_class.save_pretrained(new)
    chart = loss_chart(run.history, run.folder.name, run.val_rows, run.scale.currency)
    save_figure(chart, new, "loss.png")
    run.write(new)
    write_card(new, run)
    items.write_manifest(new, skipped=["README.md"])  # which evaluations add to
    order = {ADAPTER_FILE: 1, items.MANIFEST: 2}  # the others before them
    for file in sorted(new.iterdir(), key=lambda file: order.get(file.name, 0)):
        os.replace(file, run.folder / file.name)
    items.sync(run.folder)
    new.rmdir()
    print(
        f"Trained to step {run.steps:,} in {run.seconds.get('train', 0):,.0f} s; "
        f"the adapter is in {run.folder}"
    )


def push_run(run):
    """Pushes a run without its checkpoints and the evaluations that are not its own.

    The client uploads only what has changed. Raises UserError, code 3, if it can't.
    """

    def upload():
        HfApi().create_repo(run.hub, private=True, exist_ok=True)
        HfApi().upload_folder(
            repo_id=run.hub,
            folder_path=run.folder,
            delete_patterns="checkpoint-*",
            ignore_patterns=["checkpoint-*", "*.new/*", ".*", "eval-*"],
        )

    if is_first_process():
        items.push_or_explain(run.hub, upload)


def check_wandb():
    """Raises UserError if Weights & Biases can't log: it would ask for a login, and wait."""
    import wandb  # only if it is asked for: that takes up to two seconds

    try:
        mode = os.environ.get("WANDB_MODE", wandb.setup().settings.mode)
        if mode in WANDB_MODES_WITHOUT_LOGIN or wandb.login(prompt=False, verify=False):
            return
        reason = "WANDB_API_KEY is not set, and no login is saved"
    except (ValueError, wandb.Error) as error:
        reason = " ".join(str(error).split()).rstrip(".")
    raise items.UserError(
        f"`log_wandb`: {reason}. Set it, `wandb login`, or set WANDB_MODE=offline to log to disk "
        "only."
    )


def start_wandb(run):
    """Opens or continues the run's page on Weights & Biases, to which the trainer logs."""
    import wandb

    page = {"project": run.project, "name": run.name, "id": run.folder.name, "resume": "allow"}
    try:
        wandb.init(**page, dir=run.folder.parent)
    except wandb.Error as error:
        text = f"`log_wandb`: {error} Leave it out, or set WANDB_MODE=offline."
        raise items.UserError(text) from error


# ------------------------------------------------------------------------------------------------
# 8. Figures

BANDS = (0, 20, 50, 100, 250, 1000)  # units: where the bands begin that errors are grouped by
INTERVAL_WIDTHS = range(0, 101, 5)  # %, of the central intervals that are calibrated and charted


def quantile(shares, level):
    """The smallest numbers that have at least `level` of the distributions at or below them."""
    is_reached = shares.cumsum(1) >= level - 1e-12
    return is_reached.argmax(1).astype(float)  # the first one


DECODINGS = {  # {name: (in words, its numbers of shares, rows × NUMBERS, and greedy numbers)}
    # It minimises the expected absolute error
    "median": ("the median price", lambda shares, greedy: quantile(shares, 0.5)),
    "mean": ("the mean price", lambda shares, greedy: shares @ numpy.array(NUMBERS)),
    # Token by token, which is not always the likeliest number
    "greedy": ("what generation answers", lambda shares, greedy: numpy.array(greedy, dtype=float)),
}


@dataclass(frozen=True)
class Estimate:
    """What a distribution over the prices of NUMBERS says of one item.

    In money unless noted. The scores need a true price and are NaN without one.
    """

    guess: float  # one of the answers
    answers: dict  # {one of DECODINGS: its answer}
    low: float  # ends of the 80 % interval, which is central
    high: float
    outside: float  # probability of an answer that is none of these prices
    nll: float  # negative log of the probability given to the truth, to the unit
    crps: float  # continuous ranked probability score (Gneiting & Raftery 2007)
    rank: float  # share of the distribution below the truth, half of its own included


def estimate_prices(probabilities, greedy, rows, decode="median", width=0.8):
    """The Estimates of rows from their probabilities of NUMBERS, an array of rows × 1,000.

    `decode` names the answer, `width` is the share of a distribution that the 80 % interval has:
    see `calibrate`. Probability outside the prices counts in `outside` and `nll` only.
    """
    if len(rows) > 1000:  # or 40,000 rows would take gigabytes
        options = {"decode": decode, "width": width}
        blocks = [slice(start, start + 1000) for start in range(0, len(rows), 1000)]
        parts = [(probabilities[one], greedy[one], rows[one]) for one in blocks]
        return list(chain(*(estimate_prices(*part, **options) for part in parts)))
    scale = scale_of_rows(rows)
    inside = probabilities.sum(1)
    shares = probabilities / inside[:, None]
    columns = {
        "low": scale.amount(quantile(shares, (1 - width) / 2)),
        "high": scale.amount(quantile(shares, (1 + width) / 2)),
        "outside": 1 - inside,
    }
    for name, (_, numbers_of) in DECODINGS.items():
        columns[name] = scale.amount(numbers_of(shares, greedy))
    truths = [float(row.get("completion") or math.nan) for row in rows]
    columns |= score_shares(probabilities, shares, numpy.array(truths))
    columns["crps"] = scale.amount(columns["crps"])

    estimates = []
    for values in pandas.DataFrame(columns).to_dict("records"):
        answers = {name: values.pop(name) for name in DECODINGS}
        estimates.append(Estimate(answers[decode], answers, **values))
    return estimates


def score_shares(probabilities, shares, truths):
    """{score: an array} of distributions, as in Estimate; NaN where the truth is.

    The shares are those of the probabilities' sum. Truths and "crps" are in units.
    """
    numbers = numpy.arange(shares.shape[1])
    nearest = numpy.nan_to_num(truths).round().clip(0, numbers[-1])
    at_truth = numpy.arange(len(truths)), nearest.astype(int)
    reached = shares.cumsum(1)
    distances = abs(numbers - truths[:, None])
    mean_distance = (shares * distances).sum(1)
    spread = (reached * (1 - reached)).sum(1)  # half the mean distance of two draws
    scores = {
        "nll": -numpy.log(probabilities[at_truth].clip(1e-12)),
        "crps": mean_distance - spread,
        "rank": reached[at_truth] - shares[at_truth] / 2,
    }
    is_unknown = numpy.isnan(truths)
    return {name: numpy.where(is_unknown, math.nan, score) for name, score in scores.items()}


def calibrate(ranks):
    """How wide central intervals must be to keep their promise: {"rows": n, "widths": shares}.

    For each of INTERVAL_WIDTHS the share of a distribution that the central interval must have to
    hold so many true prices: by split conformal prediction (Lei et al. 2018, arXiv 1604.04173) the
    ⌈(n + 1) · promise⌉-th smallest of the distances from the middle. {} for too few of the `ranks`.
    """
    count = len(ranks)
    if count < 20:  # the levels would be mostly chance
        return {}
    distances = [0.0, *sorted(abs(2 * rank - 1) for rank in ranks), 1.0]
    places = [math.ceil((count + 1) * promise / 100) for promise in INTERVAL_WIDTHS]
    return {"rows": count, "widths": [distances[place] for place in places]}


def interval_width(calibration, promise=80):
    """The share of a distribution that an interval must have; the promise without calibration."""
    if not calibration:
        return promise / 100
    return calibration["widths"][INTERVAL_WIDTHS.index(promise)]


def shares_within(ranks, calibration=None):
    """The share of true prices in the central intervals of each of INTERVAL_WIDTHS."""
    distances = abs(2 * numpy.array(ranks) - 1)
    widths = [interval_width(calibration, promise) for promise in INTERVAL_WIDTHS]
    return [float((distances <= width).mean()) for width in widths]


def parse_price(answer):
    """The price that an answer names, or None: of a text its first number, as in the course."""
    if isinstance(answer, Estimate):
        answer = answer.guess
    if isinstance(answer, str):
        match = re.search(r"[-+]?\d*\.\d+|\d+", answer.replace("$", "").replace(",", ""))
        answer = match.group() if match else None
    price = math.nan if answer is None else float(answer)
    return price if math.isfinite(price) else None


def color(error, truth, unit=1):
    """green below 40 units or 20 % of the truth, orange below 80 or 40 %, else red."""
    if error < 40 * unit or error < 0.2 * truth:
        return "green"
    return "orange" if error < 80 * unit or error < 0.4 * truth else "red"


def mean_error(errors):
    """{n, mae, mae_ci95}: with half the 95 % interval of the mean, NaN for a single error."""
    interval = math.nan
    if len(errors) > 1:
        interval = 1.96 * statistics.pstdev(errors) / math.sqrt(len(errors))
    return {"n": len(errors), "mae": statistics.fmean(errors), "mae_ci95": interval}


def metrics(guesses, truths):
    """{n, mae, mae_ci95, mse, r2} of guesses against truths, two lists of money.

    r2 is in %, and NaN for truths that are all the same.
    """
    errors = [abs(guess - truth) for guess, truth in zip(guesses, truths, strict=True)]
    squares = [error * error for error in errors]
    mse = statistics.fmean(squares)
    spread = statistics.pvariance(truths)
    r2 = 100 * (1 - mse / spread) if spread else math.nan
    return mean_error(errors) | {"mse": mse, "r2": r2}


def compare_guesses(guesses, of_run, truths, seed, draws=2000):
    """The `metrics` of guesses, and how much larger the mean error of a run's guesses is.

    {…, difference, low, high}: with its 95 % interval, by bootstrap over items (Efron 1979).
    """
    errors = abs(numpy.subtract(guesses, truths))
    errors_of_run = abs(numpy.subtract(of_run, truths))
    differences = errors_of_run - errors
    low = high = math.nan
    if len(differences) > 1:
        rng = numpy.random.default_rng(seed)
        means = [rng.choice(differences, len(differences)).mean() for _ in range(draws)]
        low, high = numpy.quantile(means, (0.025, 0.975)).tolist()
    found = metrics(guesses, truths)
    return found | {"difference": float(differences.mean()), "low": low, "high": high}


def truth_of(row):
    """The true price of a row, in money."""
    return float(items.scale_of(row.get("prompt", "")).amount(float(row["completion"])))


def scale_of_rows(rows):
    """The PriceScale of rows, which is that of the first; the course's of rows without prompts."""
    return items.scale_of(rows[0].get("prompt", ""))


def field_of(prompt, name):
    """What the line `name: …` of a description says, or '' if there is none."""
    match = re.search(rf"^{name}:[ \t]*(.*?)[ \t]*$", prompt, re.MULTILINE)
    return match.group(1) if match else ""


def title_of(prompt):
    """The product's title; for a description without a title line, its first line."""
    lines = prompt.split("\n\n", 1)[-1].strip().splitlines()
    return field_of(prompt, "Title") or "".join(lines[:1])


def category_of(prompt):
    """The top category that a description names: `Audio` of `Category: Audio > Headphones`."""
    return re.split(r"\s*[>|]\s*", field_of(prompt, "Category"))[0]


def band_of(price, scale):
    """The band that a price is in, as text; the last one holds all that is dearer, too."""
    for low, high in pairwise(scale.amount(bound) for bound in BANDS):
        name = f"{scale.format_whole(low)} to {high:,.{scale.digits}f}"
        if price < high:
            break
    return name


def errors_by(table, group_of):
    """{group: mean_error} of a table of predictions; {} if there is one group."""
    errors = {}
    for row in sorted(table, key=lambda row: row["truth"]):
        errors.setdefault(group_of(row), []).append(row["error"])
    if len(errors) == 1:
        return {}
    return {group: mean_error(found) for group, found in errors.items()}


def evaluate(function, data, size=200, workers=1, folder=None, title=None):
    """Evaluates `function`, from an item to an answer, on the first `size` items of `data`.

    `data` are rows of prompt and completion, Items or dicts with a price, in a list, a Dataset or a
    slice of one, a DataFrame or any iterable. `size=None` takes all. `workers` calls run at the
    same time. See `score` for what is printed and returned, `save_predictions` for `folder`. Raises
    ValueError without items, or for one without a price.
    """
    if isinstance(data, dict):  # a slice of a Dataset
        data = pandas.DataFrame(data)
    if isinstance(data, pandas.DataFrame):
        data = data.astype(object).where(data.notna(), None).to_dict("records")
    rows = [row_to_score(item) for item in islice(data, size)]
    if not rows:
        raise ValueError("evaluate needs at least one row of prompt and completion, or Item")

    def answer(batch):
        return [function(row["item"]) for row in batch]

    answers, seconds = predict(answer, rows, batch_size=1, threads=workers)
    if title is None:
        title = getattr(function, "__name__", "model").replace("__", ".").replace("_", " ")
    figures, table = score(rows, answers, title)
    save_predictions(figures, table, title, folder)
    return figures | {"items_per_s": len(rows) / seconds, "seconds": seconds}


def row_to_score(item):
    """A row of prompt and completion of what `evaluate` is given, and the `item` itself."""
    is_row = isinstance(item, dict)
    fields = item if is_row else vars(item)
    if is_row and item.get("completion") is not None:
        return {"prompt": item.get("prompt") or "", "completion": item["completion"], "item": item}
    price = parse_price(fields.get("price"))
    if price is None:
        raise ValueError(f"evaluate needs a completion or a price, which {item!r:.80} has not")
    description = f"Title: {fields.get('title')}\nCategory: {fields.get('category') or ''}"
    return {"prompt": items.prompt_of(description), "completion": price, "item": item}


def predict(function, rows, batch_size, name="the model", threads=1, **bar_options):
    """(the answers to `rows`, in their order; the seconds they took).

    The function returns the answers to a list of at most `batch_size` rows of similar length, the
    longest first. `threads` calls run at the same time. Without a `name` there is no progress bar.
    """
    order = list(range(len(rows)))
    if batch_size > 1:  # rows of similar length together need less padding
        order.sort(key=lambda i: len(rows[i]["prompt"]), reverse=True)
    batches = []
    for first in range(0, len(rows), batch_size):
        batches.append([rows[i] for i in order[first : first + batch_size]])
    found = []
    pool = ThreadPoolExecutor(threads)
    answer_all = pool.map if threads > 1 else map
    start = time.perf_counter()
    bar_options |= {"unit": "item", "disable": name is None}
    bar = tqdm(total=len(rows), desc=f"asking {name}", **bar_options)
    try:
        for answers in answer_all(partial(answer_in_memory, function), batches):
            found.extend(answers)
            bar.update(len(answers))
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)
    seconds = time.perf_counter() - start
    answer_of = dict(zip(order, found, strict=True))
    return [answer_of[i] for i in range(len(rows))], seconds


def answer_in_memory(function, rows):
    """The answers of `function` to rows, in smaller batches if memory runs out."""
    try:
        return function(rows)
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)):
            raise
        if len(rows) == 1:
            text = f"Out of memory with one row of {len(rows[0]['prompt']):,} characters"
            raise items.UserError(f"{text}. Take a smaller `base_model`.") from error
    torch.cuda.empty_cache()
    half = len(rows) // 2
    parts = rows[:half], rows[half:]
    return [answer for part in parts for answer in answer_in_memory(function, part)]


def score(rows, answers, title, calibration=None):
    """(the figures of the answers to rows of prompt and completion, a dict a row). Prints them.

    The figures are those of `metrics`, by category and price, too, the worst items, and for
    Estimates those of score_distributions. An answer without a number counts as 0 and as one of the
    `parse_failures`. `calibration` is what the answers' intervals were made by.
    """
    scale = scale_of_rows(rows)
    prices = [parse_price(answer) for answer in answers]
    table = []
    for index, (row, answer, price) in enumerate(zip(rows, answers, prices, strict=True)):
        guess, truth = price or 0.0, truth_of(row)
        entry = {
            "index": index,
            "title": title_of(row["prompt"]),
            "category": category_of(row["prompt"]),
            "truth": truth,
            "guess": guess,
            "error": round(abs(guess - truth), 2),
        }
        if isinstance(answer, Estimate):
            entry |= {"low": answer.low, "high": answer.high}
        table.append(entry)

    truths = [row["truth"] for row in table]
    figures = metrics([row["guess"] for row in table], truths) | scale.record()
    interval = format_number(figures["mae_ci95"])
    print(f"{title}: {headline(figures)} (± {interval}, n = {len(rows):,})")
    failures = prices.count(None)
    figures["parse_failures"] = failures
    if failures:
        print(f"{failures:,} answers named no price and count as {scale.currency}0")
    figures["by_category"] = errors_by(table, lambda row: row["category"])
    figures["by_price"] = errors_by(table, lambda row: band_of(row["truth"], scale))
    figures["worst"] = sorted(table, key=lambda row: -row["error"])[:100]
    if all(isinstance(answer, Estimate) for answer in answers):
        figures |= score_distributions(answers, truths, scale, calibration)
    return figures, table


def score_distributions(estimates, truths, scale=items.COURSE_SCALE, calibration=None):
    """`decodings`, the figures by each way to answer; `distribution`, its scores; `intervals`.

    `coverage_80` is the share of true prices in the 80 % intervals: rather more than 0.8 without
    calibration, since intervals end at whole units.
    """
    decodings = {}
    for how in DECODINGS:
        guesses = [estimate.answers[how] for estimate in estimates]
        decodings[how] = metrics(guesses, truths)
    is_within = []
    for estimate, truth in zip(estimates, truths, strict=True):
        nearest = scale.amount(round(scale.number(truth)))
        is_within.append(estimate.low <= nearest <= estimate.high)
    distribution = {"coverage_80": statistics.fmean(is_within)}
    for name in ("nll", "crps", "outside"):
        scores = [getattr(estimate, name) for estimate in estimates]
        distribution[name] = statistics.fmean(scores)
    ranks = [estimate.rank for estimate in estimates]
    intervals = {"as read": shares_within(ranks)}
    if calibration:
        distribution["calibrated_on"] = calibration["rows"]
        intervals["calibrated"] = shares_within(ranks, calibration)
    return {"decodings": decodings, "distribution": distribution, "intervals": intervals}


def save_predictions(figures, table, title, folder=None):
    """Writes predictions.csv and charts of what `score` returns to `folder`, if given."""
    save_figure(scatter(table, figures, title), folder, "scatter.png")
    save_figure(running_error(table, figures, title), folder, "running_error.png")
    if "intervals" in figures:
        chart = reliability(figures["intervals"], len(table), title)
        save_figure(chart, folder, "reliability.png")
    if folder:
        items.write_table(Path(folder, "predictions.csv"), table)


# ------------------------------------------------------------------------------------------------
# 9. Words, comparables, and answers with them

WORD_PENALTIES = (10, 3, 1, 0.3, 0.1, 0.03)
NEIGHBOURS = 8  # training items that tell of a price
KERNEL_WIDTH = 0.1  # of their similarities, in their weights
PRICE_SPREAD = 0.1  # about what share of its price a similar item may differ by
SHOWN_NEIGHBOURS = 3
NEARLY_SAME = 0.7  # the similarity of items that may be variants of one


class WordIndex:
    """TF-IDF of words and pairs of words in the descriptions of training prompts, a `matrix`.

    Hashed, since a vocabulary of 800,000 descriptions takes gigabytes. Words of more than half
    of the rows, or 5,000, are left out: they tell little, and take most of the time.
    """

    def __init__(self, prompts):
        from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

        self.vectoriser = HashingVectorizer(
            n_features=2**22,
            ngram_range=(1, 2),
            token_pattern=r"\w+|^\W*$",  # a text without any word is one itself
            alternate_sign=False,
            norm=None,
            dtype=numpy.float32,
        )
        counts = self.count_words(prompts)
        rows_with = counts.getnnz(axis=0)
        is_rare = (rows_with > 0) & (rows_with <= min(5000, len(prompts) // 2))
        # There has to be one, also where all descriptions are alike
        self.columns = numpy.flatnonzero(is_rare if is_rare.any() else rows_with)
        self.weights = TfidfTransformer(sublinear_tf=True)
        self.matrix = self.weights.fit_transform(counts[:, self.columns])

    def count_words(self, prompts):
        """A sparse matrix of prompts × hashed words; of many in several processes."""
        texts = list(map(items.description_in, prompts))
        blocks = [texts[start : start + 10_000] for start in range(0, len(texts), 10_000)]
        is_long = len(blocks) > 5
        processes = min(8, joblib.cpu_count()) if is_long else 1
        bar = tqdm(blocks, "indexing items", unit="block", disable=not is_long)
        count = joblib.delayed(self.vectoriser.transform)
        found = joblib.Parallel(n_jobs=processes)(count(block) for block in bar)
        return scipy.sparse.vstack(found, "csr")

    def transform(self, rows):
        """The same features of other rows, a sparse matrix."""
        counts = self.count_words([row["prompt"] for row in rows])
        return self.weights.transform(counts[:, self.columns])


def word_guesses(splits, rows, index=None):
    """What words alone tell of the prices of rows, in money: what a model has to beat.

    By ridge regression of the log price on a WordIndex. Validation rows choose its penalty.
    """
    from sklearn.linear_model import Ridge

    train = first_rows(splits["train"], 50_000)
    val = first_rows(splits["val"], 50_000)
    if not index or len(splits["train"]) > len(train):
        index = WordIndex([row["prompt"] for row in train])
    features, val_features = index.matrix[: len(train)], index.transform(val)
    prices = numpy.array([truth_of(row) for row in train])
    half_a_unit = scale_of_rows(train).amount(0.5)  # 0 has no logarithm
    logs = numpy.log(prices.clip(half_a_unit))
    val_prices = [truth_of(row) for row in val]
    least_error = math.inf
    for penalty in WORD_PENALTIES:
        fit = Ridge(penalty, solver="sparse_cg").fit(features, logs)
        error = abs(numpy.exp(fit.predict(val_features)) - val_prices).mean()
        if error < least_error:
            best, least_error = fit, error
    return numpy.exp(best.predict(index.transform(rows))).tolist()


class Comparables:
    """What the training items cost that are most similar to an item, as a second distribution.

    Of its NEIGHBOURS nearest training rows i by cosine similarity s, whose prices are the numbers
    n_i: q(n) ∝ ∑ exp(s_i / KERNEL_WIDTH) K(n_i, n), where K is log-normal, PRICE_SPREAD wide, so
    that no price is impossible beside them. It is mixed with the model's, p: (1 − w) p + w q, as
    Khandelwal et al. mix token by token (2020, arXiv 1911.00172).
    """

    def __init__(self, train):
        self.train = train  # Dataset of prompt and completion
        prompts, completions = zip(*items.pairs_of(train, "prompt", "completion"), strict=True)
        self.index = WordIndex(prompts)
        self.rows_with = self.index.matrix.T.tocsr()
        self.numbers = numpy.array(list(map(float, completions))).round().astype(int)
        values = numpy.array(NUMBERS) + 2  # so that 0 and 1 are near each other
        logs = numpy.log(values)
        kernel = numpy.exp(-(((logs - logs[:, None]) / PRICE_SPREAD) ** 2) / 2) / values
        self.kernel = kernel / kernel.sum(1, keepdims=True)

    def find(self, rows):
        """[(row numbers, similarities)] of each row's nearest training rows, the nearest first.

        Those that share no word with it are none.
        """
        found = []
        features = self.index.transform(rows)
        starts = range(0, len(rows), 64)  # 64 × all training rows, at most, are held at once
        for start in tqdm(starts, "similar items", unit="block", disable=len(rows) < 5000):
            similar = (features[start : start + 64] @ self.rows_with).tocsr()
            for first, end in pairwise(similar.indptr):
                others, similarities = similar.indices[first:end], similar.data[first:end]
                if len(others) > NEIGHBOURS:
                    best = numpy.argpartition(-similarities, NEIGHBOURS)[:NEIGHBOURS]
                    others, similarities = others[best], similarities[best]
                order = numpy.lexsort((others, -similarities))
                found.append((others[order], similarities[order].astype(float)))
        return found

    def shares(self, found):
        """q of what `find` found, rows × NUMBERS; zeros where nothing is similar."""
        shares = numpy.zeros((len(found), len(NUMBERS)))
        for row, (others, similarities) in zip(shares, found, strict=True):
            weights = numpy.exp(similarities / KERNEL_WIDTH)
            row += weights / max(weights.sum(), 1e-9) @ self.kernel[self.numbers[others]]
        return shares

    def describe(self, others, similarities):
        """{column: title, price in money, similarity} of the SHOWN_NEIGHBOURS nearest rows."""
        columns = {}
        for place in range(SHOWN_NEIGHBOURS):
            title = price = similarity = None
            if place < len(others):
                row = self.train[int(others[place])]
                title, price = title_of(row["prompt"]), truth_of(row)
                similarity = round(float(similarities[place]), 2)
            name = f"similar_{place + 1}"
            columns |= {name: title, f"{name}_price": price, f"{name}_similarity": similarity}
        return columns


def mix(probabilities, shares, weight):
    """The model's probabilities of NUMBERS with that weight of the comparables' shares, if any."""
    weights = weight * shares.sum(1, keepdims=True).round()
    return (1 - weights) * probabilities + weights * shares


def best_weight(probabilities, shares, truths):
    """The weight of the shares that has the least CRPS, which is a quadratic function of it."""
    of_model = probabilities / probabilities.sum(1, keepdims=True)
    reached = of_model.cumsum(1)
    step = mix(of_model, shares, 1).cumsum(1) - reached
    is_reached = numpy.array(NUMBERS) >= truths[:, None]
    weight = ((is_reached - reached) * step).sum() / max((step**2).sum(), 1e-9)
    return round(float(weight.clip(0, 1)), 3)


def choose_comparables(comparables, rows, probabilities):
    """How a run mixes: {"weight": w, "rows": n, "calibration": of its intervals}.

    All n validation rows choose the weight. They calibrate the intervals, too, each mixed with the
    weight that the other half of the rows chooses, since a choice is too good on its own rows.
    """
    shares = comparables.shares(comparables.find(rows))
    scale = scale_of_rows(rows)
    truths = numpy.array([float(scale.number(truth_of(row))) for row in rows])
    chosen = numpy.zeros((len(rows), 1))
    halves = slice(0, None, 2), slice(1, None, 2)
    for half, other in (halves, halves[::-1]):
        chosen[half] = best_weight(probabilities[other], shares[other], truths[other])
    estimates = estimate_prices(mix(probabilities, shares, chosen), [0] * len(rows), rows)
    weight = best_weight(probabilities, shares, truths)
    calibration = calibrate([estimate.rank for estimate in estimates])
    return {"weight": weight, "rows": len(rows), "calibration": calibration}


def score_comparables(answers, truths, compare):
    """What comparables change: {"alone": the run without, "comparables": weight, similar items}.

    `without_similar` is the difference without items that have a nearly same training item.
    """
    guesses = [estimate.guess for estimate in answers.alone]
    is_new = [(one["similar_1_similarity"] or 0) < NEARLY_SAME for one in answers.similar]
    changes = abs(numpy.array([one.guess for one in answers.of_run]) - truths)
    changes -= abs(numpy.array(guesses) - truths)
    scores = {
        name: statistics.fmean(getattr(estimate, name) for estimate in answers.alone)
        for name in ("nll", "crps")
    }
    without = float(changes[is_new].mean()) if any(is_new) else None
    details = {"similar": is_new.count(False), "without_similar": without}
    return {
        "alone": compare(guesses) | scores,
        "comparables": {"weight": answers.weight} | details,
    }


def similar_items(row, scale):
    """The similar training items of a table's row, as text: `Brass lamp $39.00 (0.71); …`."""
    texts = []
    for place in range(1, SHOWN_NEIGHBOURS + 1):
        name = f"similar_{place}"
        if row.get(name) is not None:
            title = items.shorten(" ".join(row[name].split()), 40)
            price = scale.format_whole(row[f"{name}_price"])  # as it was trained on
            texts.append(f"{title} {price} ({row[f'{name}_similarity']:.2f})")
    return "; ".join(texts)


@dataclass
class Answers:
    """The Estimates of rows by a run and, if asked for, by the untouched base."""

    of_run: list
    of_base: list | None
    seconds: float  # the run's
    decode: str  # which decoding is the answer
    calibration: dict  # of the run's intervals
    similar: list  # what Comparables.describe says of each row; {} each without comparables
    alone: list | None = None  # the run's without its comparables, where it has some
    comparables: object = None  # Comparables
    weight: float = 0.0  # of their prices


class Pricer:
    """Prices items by a Run, whose model is read, and whose training items are indexed, once.

    `splits` are those that it was trained on, None if they aren't here; with `is_mixed` their items
    are its comparables. `options` are those of open_reader.
    """

    def __init__(self, run, base, splits, decode, is_mixed, **options):
        self.run = run
        self.base = base
        self.splits = splits
        self.decode = decode
        self.is_mixed = is_mixed
        self.open_reader = partial(open_reader, base, **options)
        self.reader = None

    def __call__(self, descriptions):
        """What a list of descriptions costs: a dict each, as in price_table.

        A description is a text, whose first line is the title, or a dict of title, text and, if
        there is one, category. Raises UserError for an empty one.
        """
        if isinstance(descriptions, str | dict):
            descriptions = [descriptions]
        with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # of the libraries
            rows = self.own_rows(None, descriptions).rows
            return price_table(rows, self.answer(rows, has_bar=False))

    def own_rows(self, path, texts, *choice):
        """items.own_rows for the run's prompts."""
        return items.own_rows(path, texts, self.base.tokenizer, self.run.data, *choice)

    @cached_property
    def comparables(self):
        return Comparables(self.splits["train"])

    @cached_property
    def mixing(self):
        """What choose_comparables says; of an older run it is found here."""
        if self.run.comparables:
            return self.run.comparables
        rows = first_rows(self.splits["val"], self.run.val_rows or 500)
        probabilities, _, _ = self.reader.distributions(rows, "the run about validation rows")
        return choose_comparables(self.comparables, rows, probabilities)

    def answer(self, rows, compare_base=False, has_bar=True):
        """The Answers to rows; `compare_base` asks the untouched base, too."""
        run, decode = self.run, self.decode
        name = "the run" if run.adapter else "the base"
        of_base = None
        if run.adapter and compare_base:
            of_base, _ = self.open_reader(None, rows).answer(rows, "the base", decode=decode)
        self.reader = self.open_reader(run.adapter, rows, opened=self.reader)
        probabilities, greedy, seconds = self.reader.distributions(rows, name if has_bar else None)
        estimate = partial(estimate_prices, greedy=greedy, rows=rows, decode=decode)
        alone = estimate(probabilities, width=interval_width(run.calibration))
        if not self.is_mixed:
            similar = [{} for _ in rows]
            return Answers(alone, of_base, seconds, decode, run.calibration, similar)
        weight, calibration = self.mixing["weight"], self.mixing["calibration"]
        found = self.comparables.find(rows)
        mixed = mix(probabilities, self.comparables.shares(found), weight)
        of_run = estimate(mixed, width=interval_width(calibration))
        similar = [self.comparables.describe(*one) for one in found]
        known = {"alone": alone, "comparables": self.comparables, "weight": weight}
        return Answers(of_run, of_base, seconds, decode, calibration, similar, **known)


# ------------------------------------------------------------------------------------------------
# 10. Evaluations

MAX_MOVED = 0.25  # of a distribution's probability, between a run and its export
SHOWN_ITEMS = 20  # of the user's own, on the screen
LADDER_SOURCE = "published with the course, its first 200 test items, 2025-11; each about ± 7 to 13"
LADDER = {  # mean absolute error in dollars
    "constant": 106.18,
    "base Llama 3.2, 4-bit": 110.72,
    "linear regression": 101.56,
    "human": 87.62,
    "NLP + LR": 76.81,
    "random forest": 72.28,
    "XGBoost": 68.23,
    "fine-tuned, lite": 65.40,
    "GPT-4.1-nano": 62.51,
    "Claude 4.5 Sonnet": 47.10,
    "deep neural net": 46.49,
    "GPT-5.1": 44.74,
    "fine-tuned, full": 39.85,
}


def first_rows(split, size):
    """The first `size` rows of a split, all without one; a list."""
    return list(islice(split, size))


def describe_data(prompts):
    """What run.json and results.json record of the data."""
    found = {name: prompts.about.get(name) for name in DATA_FIELDS}
    # Runs are pushed: nobody has to know where a file is on this machine
    names = {"place": prompts.place, "source": prompts.source}
    found |= {name: public_source(text) for name, text in names.items()} | prompts.scale.record()
    constants = items.constant_guesses(prompts.splits["train"])
    return found | {"fingerprint": prompts.fingerprint, "constants": constants}


def evaluation_folder(run, data, base, origin=""):
    """(the folder of an evaluation, how it differs from the run's own in words, a list).

    `origin` names the account or the commit of an adapter that isn't the user's newest.
    """
    scale = items.PriceScale.from_record(data)
    if run.data and run.scale != scale:
        raise items.UserError(
            f"{run.name}: its prices are in steps of {run.scale.step}, those of {data['place']} in "
            f"steps of {scale.step}. Prepare what it was trained on again: {run.data['source']}."
        )
    differences = []
    if origin:
        differences.append("the adapter is another account's, or not the newest commit")
    if run.adapter and not base.is_of(run):
        differences.append(f"the base model is {base.name}, not what the run was trained on")
    if run.data and run.data["fingerprint"] != data["fingerprint"]:
        differences.append(
            "the run was trained on other data, perhaps on some of these test items; words alone "
            "and constants are of the training items of these data"
        )
    if not differences:
        return run.folder / "eval", []
    name = f"eval-{data['fingerprint'][:8]}-{base.identity[:8]}"
    if origin:
        name += "-" + re.sub(r"[^\w.]+", "-", origin)
    return run.folder / name, differences


def read_earlier(project, names, rows, decode, base):
    """{run: its guesses} of earlier evaluations on the same rows, of the untouched base by `base`.

    Raises one UserError that names all that can't be compared.
    """
    guesses = {}
    problems = items.Problems()
    for name in map(project.short, names):
        identity = project.records.get(name, {}).get("base_identity") or base.identity
        expected = {"decode": decode, "base_identity": identity, "revision": None}
        problem = "not evaluated yet"
        for folder in sorted(project.folder(name).glob("eval*")):
            try:
                guesses[name] = read_guesses(folder, rows, expected)
                break
            except (*items.UNREADABLE, LookupError, TypeError) as error:
                problem = f"its {folder.name} can't be compared: {error}"
        if name not in guesses:
            problems.append(f"`earlier` {name}: {problem}.")
    if problems:
        size = f"`size` {len(rows)} and `decode` {decode}"
        problems[-1] += f" Evaluate on the same data first, with {size}."
    problems.report()
    return guesses


def read_guesses(folder, rows, expected):
    """The guesses, in money, of an evaluation whose results.json has what is expected.

    Raises ValueError if it is damaged, or another one.
    """
    damage = items.manifest_problem(folder, must_exist=False)
    if damage:
        raise ValueError(damage)
    results = dict(items.read_json(folder / "results.json"))
    for name, value in expected.items():
        if results.get(name) != value:
            raise ValueError(f"its {name} is {results.get(name)}, not {value}")
    options = {"dtype": {"title": str}, "keep_default_na": False}
    table = pandas.read_csv(folder / "predictions.csv", nrows=len(rows), **options)
    titles = [title_of(row["prompt"]) for row in rows]
    truths = [truth_of(row) for row in rows]
    # A quote may precede what looks like a formula, see items.csv_cell
    is_same = [one.lstrip("'") for one in table["title"]] == [one.lstrip("'") for one in titles]
    # Versions of pandas before 3 may read the last digit differently
    if not is_same or not numpy.allclose(table["truth"], truths, rtol=1e-12, atol=0):
        raise ValueError("it has other items, or fewer")
    return table["guess"].tolist()


def score_run(run, base, prompts, data, rows, answers, earlier, seed, folder):
    """(the content of results.json of an evaluation, the table of its predictions).

    `earlier` is {run: its guesses}. Charts and predictions.csv are written to `folder`.
    """
    title = f"{run.folder.name} on {public_source(prompts.source)}"
    results, table = score(rows, answers.of_run, title, answers.calibration)
    for row, similar in zip(table, answers.similar, strict=True):
        row |= similar
    save_predictions(results, table, title, folder)
    results |= {
        "run": run.name,
        "title": title,
        "decode": answers.decode,
        "items_per_s": len(rows) / answers.seconds,
        "seconds": answers.seconds,
        "base_model": base.name,
        "base_title": base.title,
        # As the run's record has it, which is what read_earlier expects
        "base_identity": (base.is_of(run) and run.base_identity) or base.identity,
        "seed": seed,
        "data": data | {"split": "test", "rows": len(prompts.splits["test"])},
        "course": prompts.source.startswith(f"{items.COURSE_USER}/"),
        "device": describe_device(),
        "versions": versions(),
        "date": datetime.now().isoformat(timespec="seconds"),
    }
    results |= score_others(rows, answers, data["constants"], prompts.splits, earlier, seed)
    if "implied_prices" in prompts.about:
        implied = prompts.about["implied_prices"][: len(rows)]
        results["best_reachable"] = metrics(implied, [row["truth"] for row in table])
    return results, table


def score_others(rows, answers, constants, splits, earlier, seed):
    """The figures of what a run's Answers are compared with; `splits` may be None."""
    truths = [truth_of(row) for row in rows]
    of_run = [estimate.guess for estimate in answers.of_run]
    compare = partial(compare_guesses, of_run=of_run, truths=truths, seed=seed)
    found = {"baselines": {}, "earlier": {}}
    for name, guess in constants.items():
        found["baselines"][name] = metrics([guess] * len(rows), truths)
    for name, guesses in earlier.items():
        found["earlier"][name] = compare(guesses)
    if splits:
        index = answers.comparables and answers.comparables.index
        found["words"] = compare(word_guesses(splits, rows, index))
    if answers.alone:
        found |= score_comparables(answers, truths, compare)
    if answers.of_base:
        found["base"], _ = score(rows, answers.of_base, "the untouched base model")
    return found


def write_evaluation(folder, results, run, table):
    """Writes results.json, the report and at last the manifest."""
    items.write_json(folder / "results.json", results)
    write_report(folder, results, run, table)
    items.write_manifest(folder)


def table_rows(results):
    """{name: figures} of all that results compare; those of the run are of `kind` run."""
    baselines = results["baselines"]
    rows = {
        "constant: training mean": baselines.get("constant_mean"),
        "constant: training median": baselines.get("constant_median"),
        "words alone: ridge regression": results.get("words"),
        "the untouched base model": results.get("base"),
    }
    for name, figures in results["earlier"].items():
        rows[f"earlier {name}"] = figures
    alone = results.get("alone")
    rows[f"run {results['run']}, the model alone"] = alone
    for how, figures in reversed(results["decodings"].items()):
        words, _ = DECODINGS[how]
        words += " with comparables" if alone and how != "greedy" else ""
        is_answer = how == results.get("decode")
        rows[f"run {results['run']}, {words}"] = figures | {"kind": "run" if is_answer else ""}
    rows["best reachable: the catalogue's own noise"] = results.get("best_reachable")
    if results.get("course"):
        for name, mae in LADDER.items():
            rows[f"published: {name}"] = {"n": 200, "mae": mae}
    return {name: figures for name, figures in rows.items() if figures}


def footnotes(results):
    """What a results.json says beyond the table, a line each."""
    scale = items.PriceScale.from_record(results)
    notes = list(results.get("differences", []))
    if results.get("trained_on"):
        count = f"{results['trained_on']:,} of these rows were trained on"
        notes.append(f"{count}; their error says nothing about other items")
    lines = [f"Note: {note}" for note in notes]
    others = results["earlier"]
    if "words" in results:
        others = others | {"words alone": results["words"]}
    if "alone" in results:
        others = others | {"the model alone": results["alone"]}
    lines += [format_difference(name, figures, scale) for name, figures in others.items()]
    if "alone" in results:
        mixed, change = results["comparables"], results["comparables"]["without_similar"]
        others = results["n"] - mixed["similar"]
        text = f"Comparables: prices of similar training items, weight {mixed['weight']:.2f}; "
        text += f"{mixed['similar']:,} of {results['n']:,} items have one of similarity "
        text += f"{NEARLY_SAME} or more"
        if 0 < others < results["n"]:
            text += f"; on the other {others:,} the error changes by {scale.format(change)}"
        text += f"; the model alone has log score {results['alone']['nll']:.3f}, "
        lines.append(f"{text}CRPS {scale.format(results['alone']['crps'])}")
    scores = results["distribution"]
    step = f" (to the nearest {scale.step})"
    width = "; their width isn't calibrated, which takes 20 validation rows"
    if "calibrated_on" in scores:
        width = f"; {scores['calibrated_on']:,} validation rows set their width"
    outside = 100 * max(0, scores["outside"])  # rounding makes it negative
    lines.append(
        f"The 80 % intervals hold {100 * scores['coverage_80']:.0f} %{step} of the true prices"
        f"{width}; log score {scores['nll']:.3f}, CRPS {scale.format(scores['crps'])}, "
        f"probability of no price {outside:.2f} %"
    )
    if results.get("course"):
        lines.append(f"Published: {LADDER_SOURCE}")
    return lines


def format_difference(name, figures, scale=items.COURSE_SCALE):
    """What the difference of `compare_guesses` says of a run, compared with `name`, in words."""
    difference, ends = figures["difference"], [figures["low"], figures["high"]]
    is_noise = ends[0] <= 0 <= ends[1]
    word = "worse" if difference else "apart"
    if difference < 0:
        word, ends = "better", [-end for end in reversed(ends)]
    text = f"Against {name}, on the same items: {scale.format(abs(difference))} {word}"
    if not math.isnan(ends[0]):
        text += f" ({format_number(ends[0])} to {format_number(ends[1])})"
    return f"{text}, within the noise" if is_noise else text


def format_number(value, digits=2):
    """A figure for people, '–' for none: r² has no meaning for a single item."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:,.{digits}f}".replace("-", "−")


def headline(figures):
    """The course's line of figures: `Error: $39.85 MSE: 5,555 r²: 70.1%`, with a true minus."""
    scale = items.PriceScale.from_record(figures)
    mse = format_number(figures["mse"], 0 if scale.unit >= 1 else 2)
    percent = "" if math.isnan(figures["r2"]) else "%"
    error = scale.format(figures["mae"])
    return f"Error: {error} MSE: {mse} r²: {format_number(figures['r2'], 1)}{percent}"


def format_table(results):
    """`table_rows` as text, each figure with its 95 % interval, and the footnotes."""
    currency = items.PriceScale.from_record(results).currency
    lines = [("mean absolute error", "n", currency, "± 95 %", "r² %")]
    for name, row in table_rows(results).items():
        error = format_number(row["mae"])
        interval = format_number(row.get("mae_ci95"))
        r2 = format_number(row.get("r2"), 1)
        lines.append((name, f"{row['n']:,}", error, interval, r2))
    return "\n".join(align(lines, "<>>>>") + footnotes(results))


def align(lines, sides):
    """Lines of cells as texts in columns; `sides` has `<` or `>`, left or right, for each."""
    columns = []
    for side, cells in zip(sides, zip(*lines, strict=True), strict=True):
        width = max(map(len, cells))
        columns.append([f"{cell:{side}{width}}" for cell in cells])
    return ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]


def price_table(rows, answers):
    """What price_items returns, a dict per item; in money, None for an unknown price."""
    table = []
    for row, estimate, similar in zip(rows, answers.of_run, answers.similar, strict=True):
        entry = {"line": row["line"], "title": row["title"], "guess": round(estimate.guess, 2)}
        entry |= {"low": estimate.low, "high": estimate.high}
        entry |= {"price": truth_of(row) if row["completion"] else None}
        table.append(entry | similar)
    return table


def format_prices(table, scale=items.COURSE_SCALE):
    """The first items of a price_table with their 80 % intervals, a line each; a text."""
    lines = []
    for row in table[:SHOWN_ITEMS]:
        low, high = scale.format_whole(row["low"]), scale.format_whole(row["high"])
        title = " ".join(row["title"].split())
        guess = scale.format(row["guess"])
        lines.append((guess, f"(80 %: {low} to {high})", items.shorten(title, 80)))
    texts = []
    for row, line in zip(table, align(lines, "><<"), strict=False):
        similar = similar_items(row, scale)
        texts += [line, f"    similar: {similar}"] if similar else [line]
    if len(table) > SHOWN_ITEMS:
        texts.append(f"… and {len(table) - SHOWN_ITEMS:,} more")
    if scale.unit > 1:
        texts.append(f"All these prices are to the nearest {scale.step}")
    return "\n".join(texts)


def score_own_rows(pricer, answers, rows, source, seed):
    """The figures of those of the user's own rows that have a price; {} if none has.

    If the items that it was trained on are here, also how many of the rows these have, and words
    alone.
    """
    run, splits = pricer.run, pricer.splits
    priced = [i for i, row in enumerate(rows) if row["completion"]]
    if not priced:
        return {}
    rows = [rows[i] for i in priced]
    lists = {"of_run": answers.of_run, "similar": answers.similar}
    if answers.alone:
        lists["alone"] = answers.alone
    answers = replace(answers, **{name: [one[i] for i in priced] for name, one in lists.items()})
    title = f"{run.folder.name} on {items.readable(Path(source).name)}"
    results, _ = score(rows, answers.of_run, title, answers.calibration)
    constants = run.data.get("constants", {})
    results |= score_others(rows, answers, constants, splits, {}, seed)
    results["run"] = run.name
    if splits:
        prompts = {row["prompt"] for row in rows}
        trained_on = (prompt for (prompt,) in items.pairs_of(splits["train"], "prompt"))
        seen = prompts.intersection(trained_on)
        results["trained_on"] = sum(row["prompt"] in seen for row in rows)
    return results


def export_run(run, base, splits, folder, **reader_options):
    """Writes a run as a merged 16-bit model into `folder`; returns a line on how it was checked.

    Loaded by transformers alone, its price distributions are compared with the run's. Raises
    UserError if more than MAX_MOVED of one's probability is elsewhere in the other's.
    """
    rows = first_rows(splits["val"], 20) if splits else []
    if rows:
        reader = open_reader(base, run.adapter, rows, **reader_options)
        expected, in_tree = price_shares(reader, rows), reader.in_tree
        reader = None
        gc.collect()  # models have reference cycles
    options = {name: reader_options[name] for name in ("quant_config", "precision")}
    model = load_merged(base, run.adapter, **options, out_precision="bf16")
    if hasattr(base.config, "quantization_config"):
        # Those of 4-bit weights can't be reversed; transformers does the same for GGUF files
        model._weight_conversions = None
    model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    name_as_before(folder)
    card = f"# {run.folder.name}\n\n{run.base_model} in bf16, with this run's LoRA adapter merged "
    card += f"into it, without its comparables. {prompt_form(run.scale)}\n"
    items.write_text(Path(folder, "README.md"), card)
    model = None
    gc.collect()
    if not rows:
        return "The export is not checked: the data that the run was trained on aren't available"

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    reader = PriceReader(model, items.load_tokenizer(str(folder)), in_tree, run.scale.prefix)
    moved = float(abs(price_shares(reader, rows) - expected).sum(1).max() / 2)
    text = (
        f"on {len(rows)} validation rows its price distributions differ from the run's by at most "
        f"{moved:.1%} of the probability (at most {MAX_MOVED:.0%} is allowed)"
    )
    if not moved <= MAX_MOVED:
        raise items.UserError(f"The exported model doesn't answer as the run does: {text}.")
    return f"Check: {text}"


def name_as_before(folder):
    """Adds to a model's folder the names that transformers 4 reads, which servers still use.

    Without `rope_theta` it silently takes 10,000: vllm issue 42624.
    """
    config = items.read_json(folder / "config.json")
    rotation = config.get("rope_parameters") or {}
    if "rope_theta" in rotation:
        config["rope_theta"] = rotation["rope_theta"]
        if rotation.get("rope_type", "default") != "default":
            config["rope_scaling"] = rotation
    items.write_json(folder / "config.json", config)
    tokenizer = items.read_json(folder / "tokenizer_config.json")
    if tokenizer["tokenizer_class"] == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
        items.write_json(folder / "tokenizer_config.json", tokenizer)


def price_shares(reader, rows):
    """The shares of NUMBERS in each row's distribution, an array of rows × 1,000."""
    probabilities, _, _ = reader.distributions(rows)
    return probabilities / probabilities.sum(1, keepdims=True)


# ------------------------------------------------------------------------------------------------
# 11. Charts and report

SHADES = {  # of `color`: (colour, marker, limit in units, what it means)
    "green": ("#2e8b57", "o", 40, "error < {} or 20 %"),
    "orange": ("#e69f00", "s", 80, "error < {} or 40 %"),
    "red": ("#c0392b", "^", 0, "larger"),
}
CHART_STYLE = {"font.size": 9, "text.parse_math": False}  # `$` is a currency


def public_source(source):
    """A dataset's source for titles: of a local file or folder the name, not where it is."""
    path, *split = source.rsplit(", split ", 1)
    is_local = split or path.startswith(("/", ".", "~")) or path.count("/") > 1
    name = path.rsplit("/", 1)[-1] if is_local else path
    return ", split ".join([name, *split])


def new_figure(title, height=4.0, rows=1):
    """(Figure, its axes), without pyplot: no screen, no global state. Legible on a phone."""
    figure = Figure(figsize=(5, height), layout="constrained", dpi=200)
    lines = [part for line in title.splitlines() for part in textwrap.wrap(line, 40)]  # 40 W fit
    figure.suptitle("\n".join(lines), fontsize=9)
    return figure, figure.subplots(rows)


@rc_context(CHART_STYLE)
def save_figure(figure, folder=None, name=None):
    """Writes a chart to `folder`, if given, as PNG, and shows it in a notebook."""
    if folder:
        figure.savefig(Path(folder, name))
    if "ipykernel" in sys.modules:
        from IPython.display import Image, display

        image = io.BytesIO()
        figure.savefig(image, format="png")
        display(Image(image.getvalue(), width=550))  # pyplot's backend alone shows a Figure


def group_by_color(table, scale):
    """[(colour, marker, label, rows)] of the shades of `color` that occur in a table."""
    rows_of = {shade: [] for shade in SHADES}
    for row in table:
        error = abs(row["guess"] - row["truth"])
        rows_of[color(error, row["truth"], scale.unit)].append(row)
    groups = []
    for shade, (fill, marker, limit, meaning) in SHADES.items():
        rows = rows_of[shade]
        money = scale.format_whole(scale.amount(limit))
        label = f"{meaning.format(money)}: {len(rows):,} of {len(table):,}"
        if rows:
            groups.append((fill, marker, label, rows))
    return groups


@rc_context(CHART_STYLE)
def scatter(table, figures, title):
    """Each item's guess over its true price, with the line of perfect guesses."""
    scale = items.PriceScale.from_record(figures)
    figure, axes = new_figure(f"{title}\n{headline(figures)}", height=5)
    style = {"s": 14, "alpha": 0.7, "linewidths": 0, "clip_on": False}
    largest = scale.unit
    for fill, marker, label, rows in group_by_color(table, scale):
        truths = [row["truth"] for row in rows]
        guesses = [row["guess"] for row in rows]
        axes.scatter(truths, guesses, color=fill, marker=marker, label=label, **style)
        largest = max(largest, *truths, *guesses)
    ends = [0, 1.03 * largest]
    axes.plot(ends, ends, "k--", linewidth=1, label="guess = truth")
    axes.set(xlabel=f"true price ({scale.currency})", ylabel=f"guess ({scale.currency})")
    axes.set(xlim=ends, ylim=ends)
    axes.legend(loc="upper left")
    return figure


@rc_context(CHART_STYLE)
def running_error(table, figures, title):
    """The mean absolute error of the first n items over n, with its 95 % band."""
    scale = items.PriceScale.from_record(figures)
    figure, axes = new_figure(f"{title}\n{headline(figures)}")
    errors = pandas.Series([abs(row["guess"] - row["truth"]) for row in table])
    errors.index += 1
    counts = errors.index
    means = errors.expanding().mean()
    deviations = errors.expanding(2).std(ddof=0)  # as mean_error: a single item has no interval
    bands = 1.96 * deviations / counts**0.5
    axes.fill_between(counts, means - bands, means + bands, color="0.85", label="95 % interval")
    axes.plot(means, "k.-", markevery=[-1], label=f"after all {len(errors):,} items")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="items evaluated", ylabel=f"mean absolute error ({scale.currency})")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


@rc_context(CHART_STYLE)
def reliability(intervals, count, title):
    """The shares_within "as read" and perhaps "calibrated" intervals, over the promised shares."""
    figure, axes = new_figure(title, height=4.5)
    axes.plot([0, 100], [0, 100], "k--", linewidth=1, label="as promised")
    for name, shares in intervals.items():
        shade = "tab:orange" if name == "as read" else "black"
        axes.plot(INTERVAL_WIDTHS, 100 * numpy.array(shares), ".-", color=shade, label=name)
    axes.set(xlabel="promised: width of the interval (% of the probability)")
    axes.set(ylabel="found: true prices within it (%)", xlim=(0, 100), ylim=(0, 100))
    axes.legend(loc="lower right", title=f"{count:,} items; above the line: too cautious")
    return figure


@rc_context(CHART_STYLE)
def loss_chart(history, title, val_size, currency="$"):
    """Training and validation loss, and validation error in money, of a trainer's log history."""
    figure, (top, bottom) = new_figure(title, height=5, rows=2)
    validation = f"validation, n = {val_size:,}"
    lines = {
        "loss": (top, "0.6", "training"),
        "eval_loss": (top, "black", validation),
        "eval_mae": (bottom, "black", f"{validation}, by the median price"),
    }
    for key, (axes, shade, label) in lines.items():
        points = {entry["step"]: entry[key] for entry in history if entry.get(key) is not None}
        if points:
            axes.plot(points.keys(), points.values(), ".-", color=shade, label=label)
            axes.legend()
    top.sharex(bottom)
    top.set(ylabel="cross-entropy\nper completion token")
    bottom.set(xlabel="step", ylabel=f"mean absolute error ({currency})")
    bottom.set_ylim(bottom=0)
    return figure


def training_settings(run):
    """{name: value} of how a Run was trained."""
    settings = {"mode": run.mode, "seed": run.seed} | asdict(run.recipe) | run.plan
    settings["training time"] = f"{run.seconds.get('train', 0):,.0f} s"
    settings["peak memory"] = f"{run.peak_memory_bytes / 2**30:.1f} GiB"
    return settings


def write_report(folder, results, run, table):
    """Writes report.html: an evaluation, its charts and its Run in one file that needs no other."""
    scale = items.PriceScale.from_record(results)
    table = sorted(table, key=lambda row: row["error"], reverse=True)
    largest = max(max(row["guess"], row["truth"]) for row in table) / scale.unit
    charts = [*sorted(Path(folder).glob("*.png")), *run.folder.glob("loss.png")]
    names = ("date", "decode", "seed", "device", "base_title", "base_identity")
    settings = {"How it was measured": {name: results[name] for name in names}}
    settings["How it was measured"] |= results["versions"]
    if run.recipe:
        settings["How it was trained"] = training_settings(run)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = format_number
    environment.filters["similar"] = partial(similar_items, scale=scale)
    environment.filters["money"] = partial(format_number, digits=2 if scale.unit < 100 else 0)
    page = environment.from_string(REPORT).render(
        results=results,
        tables={
            "Mean absolute error": table_rows(results),
            "By category": results["by_category"],
            "By true price": results["by_price"],
        },
        footnotes=footnotes(results),
        table=table,
        ticks=scale.amount(MaxNLocator(4, integer=True).tick_values(0, max(1, largest))),
        groups=group_by_color(table, scale),
        charts={file.stem: b64encode(file.read_bytes()).decode() for file in charts},
        settings=settings,
        scale=scale,
    )
    Path(folder, "report.html").write_text(page, encoding="utf-8")


def prompt_form(scale):
    """How the prompts are written, for model cards."""
    times = "" if scale.unit == 1 else f"times {items.format_unit(scale.unit)} "
    return (
        f"The prompt is the question `{scale.question}`, a blank line, the description, a blank "
        f"line and `{scale.prefix}`. The number that follows {times}is the price in "
        f"{scale.currency}."
    )


def write_card(folder, run, results=None):
    """Writes README.md of a run: base model, data, recipe, loss chart, how to load it.

    With the results of its own evaluation also the figures and what they were measured on.
    """
    data = run.data
    is_on_hub = "/" in run.base_model and not Path(run.base_model).exists()
    metadata = ModelCardData(
        base_model=run.base_model if is_on_hub else None,
        library_name="peft",
        datasets=data.get("hub"),
        tags=["lora", "price"],
    )
    card = ModelCard.from_template(
        metadata,
        template_str=CARD,
        run=run,
        base="../base" if run.base_model == items.DEMO_PACKAGE else run.base_model,  # both may move
        dataset=data.get("hub") or public_source(data.get("source", "")),
        settings=training_settings(run),
        results=results,
        table=format_table(results) if results else "",
        prompt_form=prompt_form(run.scale),
    )
    items.write_text(Path(folder, "README.md"), str(card))


CARD = '''\
---
{{ card_data }}
---
# {{ run.folder.name }}

Estimates a product's price from its description. A LoRA adapter for {{ run.base_model }}, trained
on {{ dataset }} (fingerprint {{ run.data.fingerprint }}). {{ prompt_form }}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

run = "{{ run.hub or "." }}"{{ "" if run.hub else "  # the folder of this file" }}
base = AutoModelForCausalLM.from_pretrained("{{ base }}", device_map="auto")
model = PeftModel.from_pretrained(base, run)
tokenizer = AutoTokenizer.from_pretrained(run)
prompt = """{{ run.scale.prompt("Title: Brass table lamp\\nDescription: With a linen shade.") }}"""
inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
```
{% if table %}

On the first {{ results.n }} of {{ results.data.rows }} test items of {{ dataset }} (fingerprint
{{ results.data.fingerprint }}), with the base model {{ results.base_model }}
({{ results.base_identity }}). The charts show the answers of
`--decode {{ results.decode }}`.

```
{{ table }}
```

![](eval/scatter.png)
![](eval/running_error.png)
{% endif %}

| setting | value |
|---|---|
{% for name, value in settings.items() if value is not none -%}
| {{ name }} | {{ value }} |
{% endfor %}

![](loss.png)
'''

REPORT = """\
{% macro share(money) %}{{ (100 * money / ticks[-1]) | round(2) }}%{% endmacro %}
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ results.title }}</title>
<style>
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1, h2 { font-size: 1.3rem; margin-top: 2.5rem }
table { display: block; overflow: auto; border-collapse: collapse }
thead { position: sticky; top: 0; background: Canvas }
td, th { padding: .2rem 1rem .2rem 0; text-align: left; border-bottom: 1px solid #8886 }
td:first-child { min-width: 12rem }
td + td, th { overflow-wrap: normal }
.run, dt { font-weight: bold }
#items { max-height: 40rem }
#items :is(thead, tbody) { display: block }
#items tr { display: grid; grid-template-columns: 4fr 1fr 1fr 1fr 2fr; min-width: 36rem }
#items tbody tr { content-visibility: auto; contain-intrinsic-size: auto 3rem }
#items [hidden] { display: none }
#items thead { cursor: pointer; text-decoration: underline dotted }
#near { display: block; min-height: 5rem }
#plot { width: 100%; height: 34rem; margin-bottom: 2rem; overflow: visible }
#plot { font-size: 13px; fill: currentColor; touch-action: pan-y }
line { stroke: #8886 }
.chosen { stroke: currentColor; stroke-width: 3 }
img { max-width: 30rem; width: 100%; background: white }
</style>
<h1>{{ results.title }}</h1>
<p>Off by <b>{{ scale.format(results.mae) }}</b> ± {{ results.mae_ci95 | money }} on average,
{{ "{:,}".format(results.n) }} items, r² {{ results.r2 | number(1) }} %; base model
{{ results.base_title }}</p>
{% for line in footnotes %}
<p>{{ line }}</p>
{% endfor %}
{% for head, rows in tables.items() if rows %}
{% set has_r2 = loop.first %}
<h2>{{ head }}</h2>
<table>
<tr><th><th>n<th>{{ scale.currency }}<th>± 95 %{% if has_r2 %}<th>r² %{% endif +%}
{% for name, row in rows.items() %}
<tr class="{{ row.kind }}"><td>{{ name or "(none)" }}<td>{{ "{:,}".format(row.n) }}
<td>{{ row.mae | money }}<td>{{ row.get("mae_ci95") | money }}
{% if has_r2 %}<td>{{ row.get("r2") | number(1) }}{% endif +%}
{% endfor %}
</table>
{% endfor %}

<h2>Each item's guess over its true price, in {{ scale.currency }}</h2>
<output id="near">Point at an item or tap it.</output>
<svg id="plot" role="img" aria-label="guesses over true prices; the table below has all items">
<line y1="100%" x2="100%" y2="0"/>
{% for tick in ticks %}
<line x1="{{ share(tick) }}" x2="{{ share(tick) }}" y2="100%"/>
<line y1="{{ share(tick) }}" y2="{{ share(tick) }}" x2="100%"/>
<text x="{{ share(tick) }}" y="100%" dy="18" text-anchor="end">{{ scale.format_whole(tick) }}</text>
<text x="4" y="{{ share(ticks[-1] - tick) }}" dy="-4">{{ scale.format_whole(tick) }}</text>
{% endfor %}
{% for fill, _, _, rows in groups %}
{% for row in rows %}
<circle r="4" fill="{{ fill }}" cx="{{ share(row.truth) }}" cy="{{ share(ticks[-1] - row.guess) }}">
<title>{{ row.title }}: price {{ scale.format(row.truth) }}, guess {{ scale.format(row.guess) }},
off by {{ scale.format(row.error) }}; 80 % interval {{ scale.format_whole(row.low) }} to
{{ scale.format_whole(row.high) }}{% if row.similar_1 %}; similar: {{ row | similar }}{% endif %}
</title></circle>
{% endfor %}
{% endfor %}
</svg>
{% for fill, _, label, _ in groups %}
<span style="color: {{ fill }}">●</span> {{ label }}<br>
{% endfor %}

<h2>All items</h2>
<label>Search <input type="search" id="search"></label> <output id="found"></output>
<table id="items">
<thead><tr><th>item<th>price<th>guess<th>error<th>80 % interval</thead>
{% for row in table %}
<tr><td>{{ row.title }} <small>{{ row.category }}
{% if row.similar_1 %}
<br>Similar: {{ row | similar }}
{% endif %}
</small><td>{{ row.truth | money }}
<td>{{ row.guess | money }}<td>{{ row.error | money }}
<td>{{ row.low | number(scale.digits) }} to {{ row.high | number(scale.digits) }}
{% endfor %}
</table>

{% for name, image in charts.items() if name != "scatter" %}
<img alt="{{ name | replace("_", " ") }}" src="data:image/png;base64,{{ image }}">
{% endfor %}
{% for head, values in settings.items() %}
<h2>{{ head }}</h2>
<table>
{% for name, value in values.items() if value is not none %}
<tr><td>{{ name | replace("_", " ") }}<td>{{ value }}
{% endfor %}
</table>
{% endfor %}

<h2>What the words mean</h2>
<dl>
<dt>± 95 %<dd>Half the 95 % interval of the mean error: what another sample could change.
<dt>r²<dd>The part of the prices' variance that the guesses explain; 0 % if all are their mean.
<dt>80 % interval<dd>Four of five true prices should lie within it.
<dt>Log score<dd>Minus the logarithm of the probability given to the true price; smaller is better.
<dt>CRPS<dd>How far the whole distribution is from the true price, in money; smaller is better.
<dt>Probability of no price<dd>The model's probability of answers that aren't prices.
<dt>Comparables<dd>The prices of the most similar training items, mixed into the answers; the number
behind each is its similarity, from 0 to 1.
<dt>Words alone<dd>A regression on the words of the training items, without a language model.
</dl>
<script>
const find = name => document.querySelector(name), plot = find("#plot"), table = find("#items");
const dots = [...plot.querySelectorAll("circle")], rows = [...table.tBodies[0].rows];
const places = dots.map(dot => ["cx", "cy"].map(name => parseFloat(dot.getAttribute(name)) / 100));
plot.onpointermove = plot.onpointerdown = event => {
  const box = plot.getBoundingClientRect();
  const distances = places.map(([x, y]) => Math.hypot(
    box.x + x * box.width - event.clientX, box.y + y * box.height - event.clientY));
  const nearest = dots[distances.indexOf(Math.min(...distances))];
  find(".chosen")?.classList.remove("chosen");
  nearest.classList.add("chosen");
  find("#near").textContent = nearest.textContent;
};
find("#search").oninput = event => {
  const words = event.target.value.toLowerCase().split(/\\s+/);
  const isFound = row => words.every(word => row.textContent.toLowerCase().includes(word));
  for (const row of rows) row.hidden = !isFound(row);
  find("#found").textContent = `${rows.filter(isFound).length} of ${rows.length}`;
};
let sorted = 3;
table.tHead.onclick = event => {
  const column = event.target.cellIndex, text = row => row.cells[column].textContent;
  const number = row => parseFloat(text(row).replaceAll(",", ""));
  if (column === sorted) rows.reverse();
  else rows.sort((a, b) => column ? number(b) - number(a) : text(a) < text(b) ? -1 : 1);
  sorted = column;
  table.tBodies[0].append(...rows);
};
</script>
</html>
"""
