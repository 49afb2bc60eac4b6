"""How fast and how lean: every hot path beside the straightforward way to write it, in one run, as one table.

    python -m experiments.bench         everything, at the size of the papers' pair Qwen1.5-1.8B -> GPT-2 120M
    python -m experiments.bench --quick   small sizes, few repeats: does it all still work, and roughly how well
    python -m experiments.bench steps alignment   some cases only
    python -m experiments.bench --data FILE.jsonl --student-tokenizer DIR --teacher-tokenizer DIR   real text

Cases: steps (one update of four methods), body, generation, alignment, projectors, growth (of a step with batch, length
and vocabulary, also with `--recompute`), cache (an epoch with `--cache-teacher`). What runs beside ours:

- "plain": the same update with this repository's decoders, written as anyone would write it first (`plain_step.py`):
  padded to --max-len, logits at all positions, autograd, no chunks;
- "transformers": that plain update with transformers' models, if they are installed.

All compute the same loss, which is checked. Weights are random, of the real shapes; without --data the text is made up,
with the lengths of Dolly. Repeats of the alternatives take turns (A B A B), so that noise meets all of them; a cell
is the median (smallest–largest). Steps are timed in a fresh process each; their memory is what a step needs above the
weights and gradients. Everything is eager, on CUDA too.
"""

import argparse
import contextlib
import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice, product
from multiprocessing import get_context
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

import train
from align import exact_token_alignment
from data import Row, tokenise
from experiments import memory, tiny
from experiments.plain_step import KD_RATE, METHODS, TEMPERATURE, as_transformers, pad, pair_positions, plain_loss
from experiments.reproduce import string_alignment, token_strings
from fast.cpu import by_onednn, keep_freed_memory, packed
from model import Decoder, build_model, generate, read_config, save_model
from projector import logit_preserving_weight
from runtime.formats import read_examples
from runtime.order import count_tokens
from runtime.tokenizer import TextTokenizer, read_tokenizer
from scores.tables import table

# ---------------------------------------------------------------------------------------------------------------------
# Sizes


def gpt2(width: int, layers: int, heads: int, vocabulary: int, positions: int = 1024) -> dict:
    return {"model_type": "gpt2", "vocab_size": vocabulary, "n_positions": positions, "n_embd": width,
            "n_layer": layers, "n_head": heads}  # fmt: skip


def llama(width, inner, layers, heads, kv_heads, vocabulary, kind="llama", positions=2048) -> dict:
    return {"model_type": kind, "vocab_size": vocabulary, "max_position_embeddings": positions, "hidden_size": width,
            "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "tie_word_embeddings": kind == "llama"}  # fmt: skip


FULL = {
    "student": gpt2(768, 12, 12, 50257),  # GPT-2 120M
    "teacher": llama(2048, 5504, 2, 16, 16, 151936, "qwen2"),  # Qwen1.5-1.8B with 2 of its 24 layers
    "same_teacher": gpt2(1280, 2, 20, 50257),  # GPT-2 large with 2 of its 36
    "overlap": 42256,  # tokens that GPT-2 and Qwen1.5 share, as vocabulary_overlap counts them
    "batch": 4, "max_len": 512, "rounds": 2, "enough": 10.0, "dtypes": ["fp32", "bf16"],
    "bodies": {"GPT-2 small": gpt2(768, 12, 12, 50257), "SmolLM2-135M": llama(576, 1536, 30, 9, 3, 49152)},
    "body_shape": [4, 512], "body_repeats": 5, "square": 4096,
    "generator": gpt2(768, 12, 12, 50257), "new_tokens": 128, "generation_repeats": 3,
    "aligned_lengths": [256, 1024, 4096, 16384, 65536], "align_repeats": 9,
    "heads": [[42000, 2048, 768], [42000, 768, 2048]],  # rows, source width, target width (whose inverse is taken)
    "head_repeats": 3,
    "growth": {"batch": [1, 2, 4, 8], "max_len": [128, 256, 512, 1024], "vocabulary": [38000, 76000, 151936]},
    "growth_teacher": llama(1024, 2752, 2, 16, 16, 151936, "qwen2"),
    "epoch": {"student": gpt2(768, 3, 12, 12564), "teacher": gpt2(1600, 12, 25, 12564), "batch": 8, "updates": 5,
              "rounds": 2},  # GPT-2 1.5B and 120M with a quarter of layers and vocabulary: bodies 17 to 1
}  # fmt: skip
QUICK = {
    **FULL,
    "student": gpt2(256, 2, 4, 8192), "teacher": llama(384, 1024, 2, 6, 6, 20480, "qwen2"),
    "same_teacher": gpt2(384, 2, 6, 8192), "overlap": 6000, "max_len": 256, "rounds": 1, "enough": 1.0,
    "dtypes": ["fp32"],
    "bodies": {"GPT-2 small, 4 layers": gpt2(768, 4, 12, 50257),
               "SmolLM2-135M, 6 layers": llama(576, 1536, 6, 9, 3, 49152)},
    "body_shape": [2, 256], "body_repeats": 3, "square": 2048, "generator": gpt2(768, 4, 12, 50257), "new_tokens": 24,
    "aligned_lengths": [256, 4096, 16384], "heads": [[12000, 512, 256], [12000, 256, 512]],
    "growth": {"batch": [2, 4], "max_len": [128], "vocabulary": [10240]},
    "growth_teacher": llama(384, 1024, 2, 6, 6, 20480, "qwen2"),
    "epoch": {"student": gpt2(192, 3, 3, 4096), "teacher": gpt2(400, 12, 5, 4096), "batch": 8, "updates": 3,
              "rounds": 2},
}  # fmt: skip

# (what, against, dtype) -> the least `Result.ratio`, at the full sizes
TARGETS = {
    ("DSKD v2 + ETA, time", "plain", "fp32"): 6, ("DSKD v2 + ETA, time", "plain", "bf16"): 8,
    ("DSKD v2 + ETA, memory", "plain", ""): 12,
    ("DSKD v2, time", "plain", ""): 5, ("DSKD v2, memory", "plain", ""): 8,
    ("KD, time", "plain", ""): 5, ("KD, memory", "plain", ""): 8,
    ("body of GPT-2 small", "transformers", ""): 1,
    ("body of GPT-2 small", "matrix product", "fp32"): 0.65, ("body of GPT-2 small", "matrix product", "bf16"): 0.45,
    ("generation", "transformers", ""): 3,
    ("alignment, Dolly's lengths", "2 M/s", ""): 1,
    ("alignment, 65536 tokens", "256 tokens", ""): 0.5,  # linear (a quadratic one: 0.004)
    ("t2s start, 768 x 42000", "pinv", ""): 6, ("t2s start, 2048 x 42000", "pinv", ""): 4,
    ("t2s start, 768 x 42000, difference", "1e-4", ""): 1, ("t2s start, 2048 x 42000, difference", "1e-4", ""): 1,
    ("training with the teacher's states cached", "without", "fp32"): 3,
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# Text: given, or made up with the lengths of Dolly and two vocabularies that overlap as GPT-2's and Qwen1.5's do

# Quantiles of the GPT-2 tokens of 1,000 Dolly examples (databricks-dolly-15k) in the Alpaca template, cut to
# --max-len 512 and --max-prompt-len 256; 90% of the response tokens align exactly with Qwen1.5's.
QUANTILES = [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0]
PROMPT_TOKENS = [33, 36, 39, 43, 57, 151, 233, 256, 256]
RESPONSE_TOKENS = [3, 12, 24, 48, 100, 193, 269, 443, 474]
ONE_SIDED = 0.035  # share of words that are one token of one vocabulary and two of the other, each way


def stand_in(size: dict, examples: int, directory: Path, filled: int = 0) -> dict[str, str]:
    """Made-up data.jsonl and the tokenizers student/ and teacher/: {"data", "student", "teacher": path}.

    Words and endings are tokens of both vocabularies; a compound, which is a word with an ending, is a token of one of
    them. `filled`: prompts and responses have at least so many tokens.
    """
    shared = size["overlap"] - 256  # the bytes
    endings = ["".join(x) for x in islice(product(ascii_lowercase, repeat=3), min(shared // 4, 8000))]
    words = ["Ġ" + "".join(x) for x in islice(product(ascii_lowercase, repeat=4), shared - len(endings))]  # Ġ: a space
    sizes = [size[side]["vocab_size"] - size["overlap"] - 1 for side in ("student", "teacher")]
    pairs = (divmod(i, len(endings)) for i in random.Random(0).sample(range(len(words) * len(endings)), sum(sizes)))
    compounds = [words[i] + endings[j] for i, j in pairs]
    tables = words, compounds[: sizes[0]], compounds[sizes[0] :]
    for side, own in zip(("student", "teacher"), tables[1:], strict=True):
        save_tokenizer([*words, *endings, *own], directory / side)
    rng = np.random.default_rng(0)

    def text(tokens: int) -> str:
        """Of about so many student tokens."""
        pieces, count = [], 0
        while count < tokens:
            kind = rng.choice(3, p=[1 - 2 * ONE_SIDED, ONE_SIDED, ONE_SIDED])
            pieces.append(tables[kind][rng.integers(len(tables[kind]))])
            count += 2 if kind == 2 else 1  # the student has no token for the teacher's compounds
        return "".join(pieces).replace("Ġ", " ")

    def length(quantiles: list[int]) -> int:
        return max(filled, int(np.interp(rng.random(), QUANTILES, quantiles)))

    lines = ({"prompt": text(length(PROMPT_TOKENS)), "output": text(length(RESPONSE_TOKENS) - 1)}
             for _ in range(examples))  # fmt: skip
    tiny.write_jsonl(directory / "data.jsonl", lines)
    return {name: str(directory / name) for name in ("student", "teacher")} | {"data": str(directory / "data.jsonl")}


def save_tokenizer(tokens: list[str], directory: Path) -> None:
    """A byte-level tokenizer that cuts a word into as few of these tokens as it can, end-of-text first among them."""
    tokens = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *tokens]
    tokenizer = Tokenizer(models.Unigram([(token, -1.0) for token in tokens], 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens[:1])
    tiny.save_tokenizer(tokenizer, directory, {"eos_token": tokens[0]})


def representative(rows: list[Row], count: int) -> list[Row]:
    """The rows in the middle of `count` equal parts of the rows, sorted by length: a batch like the whole."""
    by_length = sorted(rows, key=lambda row: sum(count_tokens(row)))
    return [by_length[(2 * part + 1) * len(rows) // (2 * count)] for part in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# One alternative of a step, in a process of its own

OURS = "ours", "--recompute"  # the latter is ours too, with that option
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def step_rows(job: dict) -> tuple[list[Row], TextTokenizer, TextTokenizer]:
    """The rows of the job's batch, with both tokenizers (the student's twice where the vocabularies are equal)."""
    cross = job["name"] in ("eta", "cma")
    student, teacher = (read_tokenizer(job["text"][side]) for side in ("student", "teacher" if cross else "student"))
    lengths = job["max_len"], job["max_len"] // 2
    rows, _ = tokenise(read_examples(job["text"]["data"], 0, 200), student, teacher, *lengths, job["options"]["align"])
    return representative(rows, job["batch"]), student, teacher


def make_step(job: dict) -> tuple[Callable[[], float], nn.Module, int]:
    """(one update, which returns its loss and leaves gradients; student and projectors; the update's tokens)."""
    rows, *tokenizers = step_rows(job)
    device, dtype = job["device"], job["dtype"]
    torch.manual_seed(0)
    student = build_model(job["student"]).to(device)
    teacher = build_model(job["teacher"]).to(device, DTYPES[dtype])
    o = train.check_options(train.Options(
        student="-", teacher="-", data="-", device=device, dtype=dtype, kd_rate=KD_RATE, temperature=TEMPERATURE,
        batch_size=len(rows), compile=False, **job["options"],
    ))  # fmt: skip
    method = train.Method(o, student, tokenizers[0], teacher, tokenizers[1])
    tokens = sum(len(row.student.prompt) + len(row.student.response) for row in rows)
    if job["how"] in OURS:
        student.recompute = job["how"] == "--recompute"
        pieces = train.Pieces(student, tokenizers[0], teacher, tokenizers[1], rows, method=method)
        trained = nn.ModuleList([student, method])
        return lambda: train.distil(o, pieces, student, pieces.batches(rows, o))["loss"], trained, tokens

    both = [student, teacher]
    if job["how"] == "transformers":
        both = [as_transformers(model) for model in both]
        both[1].requires_grad_(False)
    sides = [[row.student for row in rows], [row.teacher for row in rows]]
    sides = [pad(side, t.eos_id, job["max_len"], device) for side, t in zip(sides, tokenizers, strict=True)]
    pairs = pair_positions(rows, device) if job["name"] == "eta" else None

    def update() -> float:
        method.refresh(student)  # s2t is solved anew, from the inverse, as in ours; the weights never change here
        with train.autocast(o):
            loss = plain_loss(job["name"], method, both, sides, pairs)
        loss.backward()
        return float(loss.detach())

    return update, nn.ModuleList([both[0], method]), tokens


def measure_step(job: dict) -> dict:
    """{seconds: [...], tokens, peak, and with job["check"]: loss, gradient}. The first step is the warm-up."""
    ours, device = job["how"] in OURS, job["device"]
    with by_onednn(device) if ours else contextlib.nullcontext():  # as training does
        step, trained, tokens = make_step(job)
        result = {"tokens": tokens, "seconds": []}

        def gradients() -> list[torch.Tensor]:
            return [p.grad for p in trained.parameters() if p.grad is not None]

        if job["check"]:
            trained.eval()  # dropout off, so that all alternatives must agree
            result["loss"] = step()
            result["gradient"] = float(torch.nn.utils.get_total_norm(gradients()))
        trained.train()
        trained.zero_grad()
        before = memory_floor(device)
        if ours and device == "cpu":
            keep_freed_memory()  # as training does
        step()
        kept = sum(gradient.nbytes for gradient in gradients())
        result["peak"] = None if before is None else memory_peak(device) - before - kept
        while sum(result["seconds"]) < job["enough"]:
            trained.zero_grad()
            result["seconds"].append(seconds(step, device))
    return result


def seconds(run: Callable, device: str) -> float:
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - began


def memory_floor(device: str) -> int | None:
    """Bytes in use now, from where `memory_peak` looks for the largest. None where that cannot be seen (not Linux)."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system, not to be counted as in use
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    except OSError:
        return None
    return kernel_figure("self/status", "VmRSS")


def memory_peak(device: str) -> int:
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return kernel_figure("self/status", "VmHWM")


def kernel_figure(file: str, name: str) -> int:
    """Bytes, as Linux states them under /proc. Raises OSError elsewhere."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc", file).read_text())[1]) * 1024


def fresh_process(job: dict) -> dict:
    """`measure_step` in a new process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(measure_step, job).result()


# ---------------------------------------------------------------------------------------------------------------------
# The table


@dataclass
class Result:
    """One comparison. `unit` "s" and "B" (bytes) are better small, rates ("tokens/s", "FLOP/s") are better large."""

    what: str
    against: str
    dtype: str
    ours: list[float]
    other: list[float] | str  # or why there is none
    unit: str
    note: str = ""
    target: float | None = None
    ratio: float | None = field(init=False, default=None)  # how much better ours is, 1: the same

    def __post_init__(self):
        if not isinstance(self.other, str):
            ours, other = statistics.median(self.ours), statistics.median(self.other)
            self.ratio = ours / other if self.unit.endswith("/s") else other / max(ours, 1e-12)

    def cells(self) -> list[str]:
        """Of HEADER."""
        ratio = target = ""
        if self.target is not None:
            target = f"{self.target:g}"
        if self.ratio is not None:
            ratio = f"{self.ratio:.3g}"
            if target:
                target += " met" if self.ratio >= self.target else " missed"
        other = self.other if isinstance(self.other, str) else spread(self.other, self.unit)
        return [ratio, target, self.what, self.against, self.dtype, spread(self.ours, self.unit), other, self.note]


HEADER = ["ratio", "target", "what", "against", "dtype", "ours", "the other", "remark"]
SCALES = {  # unit: what reads well from which value on
    "B": {"GiB": 2**30, "MiB": 2**20},
    "s": {"s": 1, "ms": 1e-3},
    "tokens/s": {"M tokens/s": 1e6, "k tokens/s": 1e3, "tokens/s": 1},
    "FLOP/s": {"TFLOP/s": 1e12, "GFLOP/s": 1e9, "MFLOP/s": 1e6},
}


def spread(values: list[float], unit: str) -> str:
    """The median (smallest–largest), in a unit that reads well."""
    middle, scales = statistics.median(values), SCALES.get(unit, {unit: 1})
    shown = next((name for name, scale in scales.items() if middle >= scale), list(scales)[-1])
    one, least, most = (f"{value / scales[shown]:.3g}" for value in (middle, min(values), max(values)))
    return f"{one} {shown}" if least == most else f"{one} ({least}–{most}) {shown}"


def report(results: list[Result]) -> str:
    return table([HEADER, *(result.cells() for result in results)])


@dataclass
class Bench:
    """What the cases need to know."""

    size: dict
    text: dict[str, str]  # paths: data, student, teacher
    device: str
    dtypes: list[str]
    others: list[str]  # "plain", and "transformers" if it is installed
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    run_step: Callable[[dict], dict] = fresh_process
    results: list[Result] = field(default_factory=list)

    def add(self, what: str, against: str, dtype: str, *values) -> None:
        """A `Result`, with its target if this is the full setting."""
        targets = TARGETS if self.size["student"] == FULL["student"] else {}
        target = targets.get((what, against, dtype), targets.get((what, against, "")))
        self.results.append(Result(what, against, dtype, *values, target=target))
        print("  " + " | ".join(cell for cell in self.results[-1].cells() if cell), file=sys.stderr)


def take_turns(runs: dict[str, Callable], repeats: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each, after one run to warm up, in turns: A B A B."""
    for run in runs.values():
        run()
    rounds = [[seconds(run, device) for run in runs.values()] for _ in range(repeats)]
    return {name: list(times) for name, times in zip(runs, zip(*rounds, strict=True), strict=True)}


# ---------------------------------------------------------------------------------------------------------------------
# The cases

LOGIT_TENSORS = {"eta": (10, 8), "cma": (10, 8), "same": (10, 8), "kd": (6, 4)}  # at the peak: over V_s, over V_t
SAME = {"fp32": 1e-4, "bf16": 2e-2}  # relative, of loss and gradient norm; bf16 has three digits


def free_memory(device: str) -> int:
    """Bytes that can be had."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return kernel_figure("meminfo", "MemAvailable")
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def needed_memory(job: dict) -> int:
    """Bytes that a plain step's process takes, roughly: weights, gradients, the tensors of (B, T, V), activations."""
    student, teacher = (memory.counts(job[side]) for side in ("student", "teacher"))
    weights = 8 * (student.matrices + student.rest)
    weights += (2 if job["dtype"] == "bf16" else 4) * (teacher.matrices + teacher.rest)
    of_student, of_teacher = LOGIT_TENSORS[job["name"]]
    per_token = 4 * (of_student * student.vocabulary + of_teacher * teacher.vocabulary)
    return weights + job["batch"] * job["max_len"] * per_token + 2**31


def add_step(bench: Bench, what: str, job: dict) -> None:
    """Time and memory of ours against each alternative; the remark is the check, that they compute the same."""
    found: dict[str, dict | str] = {}  # the seconds of all rounds, or why there are none
    for turn in range(bench.size["rounds"]):
        for how in ("ours", *bench.others):
            needed, free = needed_memory(job), free_memory(bench.device)
            if how not in OURS and needed > free:
                found.setdefault(how, f"does not fit: {needed / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB free")
            if isinstance(found.get(how), str):
                continue
            result = bench.run_step(job | {"how": how, "check": turn == 0})
            if how in found:
                found[how]["seconds"] += result["seconds"]
            else:
                found[how] = result
    ours = found.pop("ours")
    for how, other in found.items():
        remark = f"{ours['tokens'] / statistics.median(ours['seconds']):,.0f} tokens/s"
        times = peak = other
        if not isinstance(other, str):
            times, peak = other["seconds"], [other["peak"]]
            errors = [abs(other[key] / ours[key] - 1) for key in ("loss", "gradient")]
            same = "same" if max(errors) < SAME[job["dtype"]] else "NOT THE SAME"
            remark += f"; {same} loss to {errors[0]:.0e}, gradient norm to {errors[1]:.0e}"
        bench.add(f"{what}, time", how, job["dtype"], ours["seconds"], times, "s", remark)
        if ours["peak"] is not None:
            bench.add(f"{what}, memory", how, job["dtype"], [ours["peak"]], peak, "B")


def make_job(bench: Bench, name: str, dtype: str, **changes) -> dict:
    size = bench.size
    teacher = size["teacher" if name in ("eta", "cma") else "same_teacher"]
    job = {key: size[key] for key in ("batch", "max_len", "enough", "student")}
    return job | {"name": name, "options": METHODS[name][1], "dtype": dtype, "device": bench.device,
                  "text": bench.text, "teacher": teacher, **changes}  # fmt: skip


def steps(bench: Bench) -> None:
    """One update of each method: time and memory."""
    for name in bench.methods:
        for dtype in bench.dtypes:
            add_step(bench, METHODS[name][0], make_job(bench, name, dtype))


def body(bench: Bench) -> None:
    """Forward and backward pass of the decoders without head, against transformers and against matrix products."""
    for label, config in bench.size["bodies"].items():
        for dtype in bench.dtypes:
            measure_body(bench, f"body of {label}", config, dtype)


def measure_body(bench: Bench, what: str, config: dict, dtype: str) -> None:
    batch, length = bench.size["body_shape"]
    torch.manual_seed(0)
    ours = build_model(config).to(bench.device).train()
    ids = torch.randint(config["vocab_size"], (batch, length), device=bench.device)
    direction = torch.randn(batch, length, ours.embed.weight.shape[1], device=bench.device)
    n = bench.size["square"]
    a, b = torch.randn(2, n, n, device=bench.device).to(DTYPES[dtype])

    def update(model, states_of) -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=dtype == "bf16"):
            states = states_of(ids)
        (states.float() * direction).sum().backward()

    by_ours = by_onednn(bench.device)  # on a CPU
    runs = {"ours": by_ours(partial(update, ours, ours)), "product": partial(torch.mm, a, b)}
    runs["product by oneDNN"] = by_ours(runs["product"])
    if "transformers" in bench.others:
        theirs = as_transformers(ours).train()
        states_of = partial(theirs.base_model, use_cache=False)
        runs["transformers"] = partial(update, theirs, lambda ids: states_of(ids).last_hidden_state)
    times = take_turns(runs, bench.size["body_repeats"], bench.device)
    if "transformers" in times:
        rate = f"{batch * length / statistics.median(times['ours']):,.0f} tokens/s"
        bench.add(what, "transformers", dtype, times["ours"], times["transformers"], "s", rate)
    ceiling = 2 * n**3 / min(times["product"] + times["product by oneDNN"])
    work = body_work(ours, batch, length)
    bench.add(what, "matrix product", dtype, [work / t for t in times["ours"]], [ceiling], "FLOP/s")


def body_work(m: Decoder, batch: int, length: int) -> int:
    """Operations of a forward and backward pass: 6 per weight and token, and of the attention its causal half."""
    weights = sum(p.numel() for p in m.blocks.parameters() if p.dim() == 2)
    c = read_config(m.config)
    attention = 2 * c.layers * c.heads * c.head_dim * length  # two products of 2·d·(T/2) on average, per token
    return batch * length * (6 * weights + 3 * attention)


def generation(bench: Bench) -> None:
    """Greedy generation of a batch of 8 prompts, in models of each dtype."""
    for dtype in bench.dtypes:
        measure_generation(bench, dtype)


def measure_generation(bench: Bench, dtype: str) -> None:
    rng, size = random.Random(0), bench.size
    new, vocabulary = size["new_tokens"], size["generator"]["vocab_size"]
    lengths = [int(np.interp((i + 0.5) / 8, QUANTILES, PROMPT_TOKENS)) for i in range(8)]
    prompts = [[rng.randrange(1, vocabulary) for _ in range(n)] for n in lengths]
    width = max(lengths)  # transformers wants them padded on the left
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=bench.device)
    torch.manual_seed(0)
    ours = build_model(size["generator"]).eval().to(bench.device, DTYPES[dtype])
    theirs = as_transformers(ours) if "transformers" in bench.others else None
    written = {}

    def run_ours() -> None:
        with by_onednn(bench.device), packed(ours):
            written["ours"] = generate(ours, prompts, new, None, temperature=0)

    def run_theirs() -> None:
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        with torch.no_grad():
            output = theirs.generate(input_ids=ids, attention_mask=(ids > 0).long(), **options)
        written["transformers"] = output[:, width:].tolist()

    runs = {"ours": run_ours} | ({"transformers": run_theirs} if theirs else {})
    times = take_turns(runs, size["generation_repeats"], bench.device)
    rates = {name: [8 * new / t for t in values] for name, values in times.items()}
    remark = ""
    if theirs:
        same = sum(a == b for a, b in zip(written["ours"], written["transformers"], strict=True))
        remark = f"{same} of 8 responses are the same"
    other = rates.get("transformers", "not installed")
    bench.add("generation", "transformers", dtype, rates["ours"], other, "tokens/s", remark)


def alignment(bench: Bench) -> None:
    """Exact alignment from token ids to pairs, on one core; at the lengths of the data, and how it grows."""
    student, teacher = (read_tokenizer(bench.text[side]) for side in ("student", "teacher"))
    texts = [example.outputs[0] for example in read_examples(bench.text["data"], 0, 200)]

    def rates(texts: list[str], what: str) -> list[float]:
        ids = [(teacher.encode(text) + [teacher.eos_id], student.encode(text) + [student.eos_id]) for text in texts]

        def ours() -> None:
            for theirs, mine in ids:
                exact_token_alignment(teacher.spell(theirs), student.spell(mine))

        def official() -> None:
            for theirs, mine in ids:
                string_alignment(token_strings(teacher, theirs), token_strings(student, mine))

        times = take_turns({"ours": ours, "official rule": official}, bench.size["align_repeats"])
        tokens = sum(len(mine) for _, mine in ids)
        mine, other = ([tokens / t for t in values] for values in times.values())
        bench.add(what, "official rule", "", mine, other, "tokens/s")
        return mine

    bench.add("alignment, Dolly's lengths", "2 M/s", "", rates(texts, "alignment, Dolly's lengths"), [2e6], "tokens/s")
    long = " ".join(texts * (1 + 6 * max(bench.size["aligned_lengths"]) // sum(map(len, texts))))
    characters = len(long[:100_000]) / len(student.encode(long[:100_000]))
    at = {n: rates([long[: round(n * characters)]], f"alignment, {n} tokens") for n in bench.size["aligned_lengths"]}
    bench.add(f"alignment, {max(at)} tokens", f"{min(at)} tokens", "", at[max(at)], at[min(at)], "tokens/s")


def projectors(bench: Bench) -> None:
    """Where the projectors start, against the pseudo-inverse through an SVD; singular values that span 1 to 100."""
    generator = torch.Generator().manual_seed(0)
    for rows, source_width, width in bench.size["heads"]:
        source = torch.randn(rows, source_width, generator=generator).to(bench.device)
        rotation = torch.linalg.qr(torch.randn(width, width, generator=generator))[0] * torch.logspace(0, -2, width)
        target = (torch.randn(rows, width, generator=generator) @ rotation.T).to(bench.device)
        solve = {"ours": logit_preserving_weight, "pinv": lambda source, target: torch.linalg.pinv(target) @ source}
        runs = {name: partial(f, source, target) for name, f in solve.items()}
        times = take_turns(runs, bench.size["head_repeats"], bench.device)
        what, (ours, pinv) = f"t2s start, {width} x {rows}", (run() for run in runs.values())
        bench.add(what, "pinv", "fp32", times["ours"], times["pinv"], "s")
        difference = float((ours - pinv).abs().max() / pinv.abs().max())
        bench.add(f"{what}, difference", "1e-4", "fp32", [difference], [1e-4], "of the largest weight")


def growth(bench: Bench) -> None:
    """DSKD v2 + ETA on made-up text that fills --max-len: one of batch, length and vocabulary at a time, in float32;
    beside plain, and beside ours with --recompute."""
    size = bench.size
    largest = size["growth_teacher"]["vocab_size"]
    base = {"batch": size["batch"], "max_len": size["max_len"], "vocabulary": largest}
    settings = [base | {name: value} for name, values in size["growth"].items() for value in values]
    once = replace(bench, size={**size, "rounds": 1}, others=["plain", "--recompute"])  # adds to the same results
    for batch, max_len, vocabulary in dict.fromkeys(tuple(setting.values()) for setting in settings):  # each once
        teacher = {**size["growth_teacher"], "vocab_size": vocabulary}
        overlap = size["overlap"] * vocabulary // largest
        with tempfile.TemporaryDirectory() as folder:
            text = stand_in({**size, "teacher": teacher, "overlap": overlap}, batch, Path(folder), filled=max_len)
            changes = {"batch": batch, "max_len": max_len, "teacher": teacher, "text": text}
            what = f"growth: {batch} x {max_len} tokens, vocabulary {vocabulary}"
            add_step(once, what, make_job(once, "eta", "fp32", **changes))


def cache(bench: Bench) -> None:
    """Training (DSKD v2) with --cache-teacher, in tokens/s after the first update; the cache is full already."""
    epoch = bench.size["epoch"]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        size = {**bench.size, **epoch, "overlap": 2 * epoch["teacher"]["vocab_size"] // 3}
        paths = stand_in(size, epoch["batch"] * epoch["updates"], root)
        shutil.copytree(root / "student", root / "teacher", dirs_exist_ok=True)  # the same vocabulary
        for name in ("student", "teacher"):
            save_model(build_model(epoch[name]), root / name)
        o = {**paths, "batch_size": epoch["batch"], "epochs": 1, "log_every": 10**6, "device": bench.device,
             "compile": False}  # fmt: skip
        for dtype in bench.dtypes:
            rates: dict[str | None, list[float]] = {None: [], str(root / f"cache-{dtype}"): []}
            for turn in range(epoch["rounds"] + 1):
                for directory in rates:
                    out = str(root / f"run-{dtype}-{turn}-{bool(directory)}")
                    options = train.Options(**o, cache_teacher=directory, out=out, dtype=dtype)
                    rate = train.train(options, "epoch")["tokens_per_second"]
                    if turn:  # the first fills the cache
                        rates[directory].append(rate)
            without, cached = rates.values()
            bench.add("training with the teacher's states cached", "without", dtype, cached, without, "tokens/s")


CASES = {f.__name__: f for f in (steps, body, generation, alignment, projectors, growth, cache)}


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def machine(device: str) -> str:
    """What the figures were measured on."""
    installed = [name for name in ("torch", "transformers") if importlib.util.find_spec(name)]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in installed]
    versions.append(f"Python {platform.python_version()}")
    if torch.device(device).type == "cuda":
        return ", ".join([torch.cuda.get_device_name(device), *versions])
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*: (.*)", info.read_text())):
        name = found[1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ", ".join([name, f"{cores} cores, {torch.get_num_threads()} threads", *versions])


def fitting_vocabularies(size: dict, text: dict[str, str]) -> dict:
    """The models of the steps with as many embeddings as the given tokenizers have, where that is another number."""
    rows = {side: read_tokenizer(text[side]).size for side in ("student", "teacher")}
    changed = {}
    for name, needed in {**rows, "same_teacher": rows["student"]}.items():
        if not needed <= size[name]["vocab_size"] <= 1.1 * needed:  # what is there may be padded a little
            changed[name] = {**size[name], "vocab_size": needed}
    return changed


def run(size: dict, text: dict[str, str], device: str, dtypes: list[str], cases: list[str], **options) -> list[Result]:
    others = ["plain", *(["transformers"] if importlib.util.find_spec("transformers") else [])]
    bench = Bench(size, text, device, dtypes, others, **options)
    for name in cases:
        print(f"{name}: {CASES[name].__doc__.splitlines()[0]}", file=sys.stderr)
        took = seconds(partial(CASES[name], bench), "cpu")
        print(f"  {took:.0f} s", file=sys.stderr)
        gc.collect()
    return bench.results


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=["all", *CASES], default="all")
    parser.add_argument("--quick", action="store_true", help="small sizes and few repeats, in float32: about 3 minutes")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="whose steps")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: both, with --quick fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", help="JSONL file of prompts and responses (default: made-up text)")
    parser.add_argument("--student-tokenizer", help="directory with tokenizer.json, for --data")
    parser.add_argument("--teacher-tokenizer", help="the same of the teacher")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    o = parser.parse_args(arguments)
    given = {"data": o.data, "student": o.student_tokenizer, "teacher": o.teacher_tokenizer}
    if any(given.values()) and not all(given.values()):
        parser.error("--data, --student-tokenizer and --teacher-tokenizer belong together: give all three or none")
    size = QUICK if o.quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        text = given if o.data else stand_in(size, 200, Path(folder))
        if o.data:
            size = size | fitting_vocabularies(size, text)
        cases = list(CASES) if "all" in o.cases else o.cases
        results = run(size, text, o.device, o.dtype or size["dtypes"], cases, methods=o.methods)
    print(f"{machine(o.device)}\n\n{report(results)}")
    if o.json:
        record = {"machine": machine(o.device), "quick": o.quick, "results": [asdict(result) for result in results]}
        o.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
