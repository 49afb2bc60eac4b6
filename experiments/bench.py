"""Time and memory of every hot path, compared with straightforward code, in one run, as one table.

    python -m experiments.bench         everything, at the size of the papers' pair Qwen1.5-1.8B -> GPT-2 120M
    python -m experiments.bench steps alignment   some cases only
    python -m experiments.bench --data FILE.jsonl --student-tokenizer DIR --teacher-tokenizer DIR   real text
    python -m experiments.bench --device cuda --quick --json FILE   on a GPU: the papers' pairs, in 7 minutes
    python -m experiments.bench --tiny   the same at a size for any machine: does it all still work?

Cases: steps (one update of four methods), body (a decoder alone, forward and backward), generation, alignment, growth
(of a step with batch, length and vocabulary, also with `--recompute`); on a GPU steps, lora_pair (the papers' larger
pair, in the largest batch that fits) and generation. Ours is compared with:

- "plain": the same update with this repository's decoders, written in the obvious way (`plain_step.py`): padded to the
  longest, logits at all positions, autograd, no chunks;
- "transformers": that plain update with transformers' models, if installed; on a GPU also "compiled", model and losses.

All compute the same loss, which is checked. Weights are random, with the real shapes; without --data the text is
generated, with the lengths of Dolly. A cell is the median (smallest–largest) after a warm-up. On a CPU everything is
eager, and the alternatives take turns (A B A B), each in a fresh process. On a GPU each alternative has one process for
all its steps, ours is compiled, and an update includes AdamW's step, with a learning rate of 0. Memory is what a step
needs above weights, gradients and moments; on a GPU, what PyTorch reserves, including the graphs. "In all" includes
weights, gradients and moments. MFU is `paper.operations` per second, as a share of the GPU's bf16 peak.
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice, pairwise, product, zip_longest
from multiprocessing import get_context
from pathlib import Path
from string import ascii_lowercase
from types import SimpleNamespace

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

import lora
import train
from align import exact_token_alignment
from data import Row, tokenise
from experiments import memory, paper, tiny
from experiments.memory import gpt2, llama
from experiments.plain_step import KD_RATE, METHODS, TEMPERATURE, as_transformers, pad, pair_positions, plain_loss
from experiments.reproduce import string_alignment, token_strings
from fast.cpu import by_onednn, keep_freed_memory, packed, put_on
from fast.cuda import graphed
from model import build_model, generate
from runtime.formats import read_examples
from runtime.order import count_tokens
from runtime.parallel import compile_model, uses_graphs
from runtime.strict import check_device
from runtime.tokenizer import TextTokenizer, read_tokenizer
from scores.tables import table

# ---------------------------------------------------------------------------------------------------------------------
# Sizes


FULL = {
    "student": memory.CONFIGS["GPT-2 120M"],
    "teacher": llama(2048, 5504, 2, 16, 16, 151936, "qwen2"),  # Qwen1.5-1.8B with 2 of its 24 layers
    "same_teacher": gpt2(1280, 2, 20),  # GPT-2 large with 2 of its 36
    "overlap": 42256,  # tokens that GPT-2 and Qwen1.5 share, as vocabulary_overlap counts them
    "batches": [4], "max_len": 512, "rounds": 2, "enough": 10.0, "dtypes": ["fp32", "bf16"],
    "bodies": {"GPT-2 small": memory.CONFIGS["GPT-2 120M"], "SmolLM2-135M": llama(576, 1536, 30, 9, 3, 49152)},
    "body_shape": [4, 512], "square": 4096,
    "generator": memory.CONFIGS["GPT-2 120M"], "prompts": 8, "new_tokens": 128, "repeats": 5,
    "aligned_lengths": [256, 1024, 4096, 16384, 65536],
    "growth": {"batch": [1, 2, 4, 8], "max_len": [128, 256, 512, 1024], "vocabulary": [38000, 76000, 151936]},
    "growth_teacher": llama(1024, 2752, 2, 16, 16, 151936, "qwen2"),
}  # fmt: skip
CARD = {  # nothing is smaller than in the papers; with one vocabulary, the teacher is the same except its embeddings
    **FULL,
    "teacher": memory.CONFIGS["Qwen1.5 1.8B"],
    "same_teacher": {**memory.CONFIGS["Qwen1.5 1.8B"], "vocab_size": 50257}, "card": True,
    "batches": [4, 8, 32], "rounds": 1, "enough": 3.0, "dtypes": ["bf16"], "prompts": 32,
    "lora_pair": {"models": {"student": memory.CONFIGS["TinyLlama 1.1B"], "teacher": memory.CONFIGS["Llama-2 7B"]},
                  "rank": 256, "batches": [96, 64, 48, 32, 16, 8, 4], "what": "TinyLlama and Llama-2-7B, LoRA, eager"},
}  # fmt: skip
TINY = {
    **CARD, "student": gpt2(32, 2, 2, 600), "teacher": llama(48, 64, 1, 2, 2, 900, "qwen2"),
    "same_teacher": gpt2(48, 1, 2, 600), "overlap": 400, "batches": [2, 4], "max_len": 64,
    "enough": 1e-3, "dtypes": ["fp32"], "generator": gpt2(32, 1, 2, 600), "prompts": 4, "new_tokens": 4,
    "repeats": 1, "aligned_lengths": [64, 256], "body_shape": [2, 32], "square": 64,
    "bodies": {"GPT-2 small": gpt2(32, 2, 2, 600), "LLaMA": llama(32, 64, 2, 2, 1, 600)},
    "growth": {"batch": [1], "max_len": [32], "vocabulary": [800]},
    "growth_teacher": llama(48, 64, 1, 2, 2, 900, "qwen2"),
    "lora_pair": {"models": {"student": llama(32, 64, 2, 2, 1, 600), "teacher": llama(48, 64, 1, 2, 2, 600)}, "rank": 4,
                  "batches": [4], "what": "LoRA"},
}  # fmt: skip
# Changes to any of them. against: which batches of which methods are compared with alternatives on a GPU; without: all
QUICK = {"against": {"eta": [4, 8]}, "rounds": 1, "enough": 1.0, "repeats": 1}
CARD_CASES = ["generation", "lora_pair", "steps"]

# ---------------------------------------------------------------------------------------------------------------------
# Text: given, or generated with the lengths of Dolly and two vocabularies that overlap like GPT-2's and Qwen1.5's

# Quantiles of the GPT-2 tokens of 1,000 Dolly examples (databricks-dolly-15k) in the Alpaca template, cut to
# --max-len 512 and --max-prompt-len 256; 90% of the response tokens align exactly with Qwen1.5's.
QUANTILES = [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0]
PROMPT_TOKENS = [33, 36, 39, 43, 57, 151, 233, 256, 256]
RESPONSE_TOKENS = [3, 12, 24, 48, 100, 193, 269, 443, 474]
ONE_SIDED = 0.035  # share of words that are one token in one vocabulary and two in the other, for each direction


def stand_in(size: dict, examples: int, directory: Path, filled: int = 0) -> dict[str, str]:
    """Generate data.jsonl and the tokenizers student/ and teacher/; returns {"data", "student", "teacher": path}.

    Words and endings are tokens of both vocabularies; a compound, which is a word with an ending, is a token of only
    one. `filled`: the minimum number of tokens of a prompt or response.
    """
    shared = size["overlap"] - 256  # without the 256 bytes
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
        """A text of about this many student tokens."""
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
    """A byte-level tokenizer that splits a word into as few of these tokens as possible; end-of-text has id 0."""
    tokens = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *tokens]
    tokenizer = Tokenizer(models.Unigram([(token, -1.0) for token in tokens], 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens[:1])
    tiny.save_tokenizer(tokenizer, directory, {"eos_token": tokens[0]})


def representative(rows: list[Row], count: int) -> list[Row]:
    """A typical batch: one row from each of `count` equal parts of the rows, sorted by length. Of many such draws, the
    one whose sums are nearest to an average batch's. Response tokens count too, since ours computes logits only for
    these, but a padded step for all positions."""
    by_length, draw = sorted(rows, key=lambda row: sum(count_tokens(row))), random.Random(0)
    bounds = [part * len(rows) // count for part in range(count + 1)]
    parts = [by_length[first : max(end, first + 1)] for first, end in pairwise(bounds)]

    def sums(batch: list[Row]) -> np.ndarray:
        return np.sum([[len(row.student), len(row.teacher), len(row.student.response)] for row in batch], axis=0)

    average = sums(rows) * count / len(rows)
    draws = [[draw.choice(part) for part in parts] for _ in range(2000)]
    return min(draws, key=lambda batch: abs(sums(batch) / average - 1).max())


# ---------------------------------------------------------------------------------------------------------------------
# One alternative of a step

OURS = "ours", "--recompute"  # the second one is ours with that option
COMPILED = "transformers, compiled"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@functools.cache  # for jobs that share a process
def read_rows(data: str, student: str, teacher: str, max_len: int, align: str) -> tuple:
    """All rows and both tokenizers."""
    tokenizers = [read_tokenizer(directory) for directory in (student, teacher)]
    rows, _ = tokenise(read_examples(data, 0, 200), *tokenizers, max_len, max_len // 2, align)
    return rows, *tokenizers


def step_rows(job: dict) -> tuple[list[Row], TextTokenizer, TextTokenizer]:
    """The rows of the job's batch, with both tokenizers (the student's twice where the vocabularies are equal)."""
    text, cross = job["text"], job["name"] in ("eta", "cma")
    sides = text["student"], text["teacher" if cross else "student"]
    rows, *tokenizers = read_rows(text["data"], *sides, job["max_len"], job["options"]["align"])
    return representative(rows, job["batch"]), *tokenizers


@functools.cache
def make_model(config: str, device: str, dtype: torch.dtype, rank: int = 0) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(json.loads(config), device).to(dtype)
    return lora.attach(model, rank, 8.0, 0.1) if rank else model


@functools.cache
def make_theirs(*model) -> nn.Module:
    return as_transformers(make_model(*model))


def predict_shared_tokens(teacher: nn.Module, shared: Tensor) -> None:
    """Make the teacher predict shared tokens, as a trained one does. A random teacher predicts tokens of its whole
    vocabulary; three quarters of them, which the student's lacks, would make no pair for ETA (v2, eq. 14)."""
    weight, (ids, others) = teacher.head_weight.data, (mask.nonzero()[:, 0] for mask in (shared, ~shared))
    weight[others] = weight[ids[torch.arange(len(others), device=ids.device) % len(ids)]] / 2


def make_step(job: dict) -> SimpleNamespace:
    """`update`: runs forward and backward pass, returns the loss and leaves gradients; `trained`: student and
    projectors; `frozen`: the teacher; `rows`: the batch's."""
    rows, *tokenizers = step_rows(job)
    device, dtype, how = job["device"], job["dtype"], job["how"]
    student_of = json.dumps(job["student"]), device, torch.float32, job["options"].get("lora", 0)
    teacher_of = json.dumps(job["teacher"]), device, DTYPES[dtype]
    student, teacher = make_model(*student_of), make_model(*teacher_of)
    o = train.check_options(train.Options(
        student="-", teacher="-", data="-", device=device, dtype=dtype, kd_rate=KD_RATE, temperature=TEMPERATURE,
        batch_size=len(rows), max_len=job["max_len"], compile=job["compile"], **job["options"],
    ))  # fmt: skip
    if torch.device(device).type == "cuda":
        torch.set_float32_matmul_precision("high")  # as training does
    compile_ours = partial(compile_model, graphs=uses_graphs(o)) if o.compile and how in OURS else lambda model: model
    torch.manual_seed(1)  # v1's projectors are the same for all
    method = train.Method(o, student, tokenizers[0], compile_ours(teacher), tokenizers[1])
    if job["name"] == "eta":
        predict_shared_tokens(teacher, method.student_token >= 0)
    if how in OURS:
        student.recompute = how == "--recompute"
        if torch.device(device).type == "cpu":
            put_on(student)  # as training does
        pieces = train.Pieces(student, tokenizers[0], teacher, tokenizers[1], rows, method=method)
        run, batches, trained = compile_ours(student), pieces.batches(rows, o), nn.ModuleList([student, method])

        def update_ours() -> float:
            return train.distil(o, pieces, run, batches)["loss"]

        return SimpleNamespace(update=update_ours, trained=trained, frozen=teacher, rows=rows)
    both, loss_of = [student, teacher], plain_loss
    if how != "plain":
        both = [make_theirs(*student_of), make_theirs(*teacher_of).requires_grad_(False)]
    if how == COMPILED:
        loss_of = torch.compile(plain_loss)
    sides = [[row.student for row in rows], [row.teacher for row in rows]]
    sides = [pad(side, t.eos_id, device) for side, t in zip(sides, tokenizers, strict=True)]
    pairs = pair_positions(rows, device) if job["name"] == "eta" else None

    def update() -> float:
        method.refresh(student)  # s2t is solved again from the inverse, as in ours; the weights never change here
        with train.autocast(o):
            loss = loss_of(job["name"], method, both, sides, pairs)
        loss.backward()
        return float(loss.detach())

    return SimpleNamespace(update=update, trained=nn.ModuleList([both[0], method]), frozen=both[1], rows=rows)


def measure_step(job: dict) -> dict:
    """{seconds: [...], tokens: the student's, the teacher's and the student's response tokens, pairs: how many of the
    latter are compared, peak and `weights` in bytes, and the part of the peak that is `kept` from update to update;
    with job["check"]: loss, gradient}. The first steps, which may compile, are the warm-up."""
    ours, device = job["how"] in OURS, job["device"]
    with by_onednn(device) if ours else contextlib.nullcontext():  # as training does
        step, result = make_step(job), {"seconds": []}
        sides = [[len(row.student), len(row.teacher), len(row.student.response)] for row in step.rows]
        result["tokens"] = [sum(column) for column in zip(*sides, strict=True)]
        result["pairs"] = sum(len(row.pairs[0]) for row in step.rows) if job["name"] == "eta" else result["tokens"][2]
        parameters = [p for p in step.trained.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)

        def update() -> None:
            step.update()
            if job["card"]:
                optimizer.step()

        if job["check"]:
            step.trained.eval()  # dropout off, so that all alternatives must agree
            with torch.compiler.set_stance("force_eager"):
                result["loss"] = step.update()
            gradients = [p.grad for p in parameters if p.grad is not None]
            result["gradient"] = float(torch.nn.utils.get_total_norm(gradients))
        step.trained.train()
        step.trained.zero_grad()
        before = memory_floor(device)
        if job["card"]:  # all updates but the first start with AdamW's moments
            for p in parameters:
                p.grad = torch.zeros_like(p)
            optimizer.step()
            step.trained.zero_grad()
        if ours and device == "cpu":
            keep_freed_memory()  # as training does
        update()
        if torch.device(device).type == "cuda":
            for _ in range(3):  # the third one captures no more graphs
                memory_floor(device)  # so that memory for compiling and capturing is not counted
                step.trained.zero_grad()
                update()
        moments = [x for state in optimizer.state.values() for x in state.values()]
        result["kept"] = sum(x.nbytes for x in [*(p.grad for p in parameters if p.grad is not None), *moments])
        tensors = [*step.trained.parameters(), *step.trained.buffers(), *step.frozen.parameters()]
        result["weights"] = sum({x.data_ptr(): x.nbytes for x in tensors}.values())
        if ours and torch.device(device).type == "cuda":
            before = result["weights"]  # these graphs reuse a part of the memory that graphs of smaller batches hold
        result["peak"] = None if before is None else memory_peak(device) - before
        while sum(result["seconds"]) < job["enough"]:
            step.trained.zero_grad()
            result["seconds"].append(seconds(update, device))
        if job["profile"]:
            with torch.profiler.profile() as profile:
                step.trained.zero_grad()
                seconds(update, device)
            by = "self_cuda_time_total" if torch.device(device).type == "cuda" else "self_cpu_time_total"
            result["profile"] = profile.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=60)
        step.trained.zero_grad()
    return result


@contextlib.contextmanager
def own_process(in_this_one: bool) -> Iterator[Callable]:
    """`measure_step` in a new process, which is kept for further jobs. Returns a future, whose `result()` waits."""
    if in_this_one:
        yield lambda job: SimpleNamespace(result=partial(measure_step, job))
        return
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield partial(pool.submit, measure_step)


def seconds(run: Callable, device: str) -> float:
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - began


def memory_floor(device: str) -> int | None:
    """Bytes in use now; resets the peak that `memory_peak` reads. None where this cannot be measured (not Linux)."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_reserved(device)  # not memory_allocated, which leaves out what CUDA graphs hold
    try:
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # returns free memory to the system, so that it does not count
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:
        return None
    return kernel_figure("self/status", "VmRSS")


def memory_peak(device: str) -> int:
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return kernel_figure("self/status", "VmHWM")


def kernel_figure(file: str, name: str) -> int:
    """A number of bytes that Linux gives under /proc. Raises OSError elsewhere."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc", file).read_text())[1]) * 1024


# ---------------------------------------------------------------------------------------------------------------------
# The table


@dataclass
class Result:
    """One comparison. For the units "s" and "B" (bytes) smaller is better, for rates ("tokens/s") larger."""

    what: str
    against: str
    dtype: str
    ours: list[float] | str  # a str says why there are no values
    other: list[float] | str
    unit: str
    note: str = ""
    ratio: float | None = field(init=False, default=None)  # how much better ours is, 1: the same

    def __post_init__(self):
        if not isinstance(self.ours, str) and not isinstance(self.other, str):
            ours, other = statistics.median(self.ours), statistics.median(self.other)
            self.ratio = ours / other if self.unit.endswith("/s") else other / max(ours, 1e-12)

    def cells(self) -> list[str]:
        """The cells under HEADER."""
        ratio = "" if self.ratio is None else f"{self.ratio:.3g}"
        both = (values if isinstance(values, str) else spread(values, self.unit) for values in (self.ours, self.other))
        return [ratio, self.what, self.against, self.dtype, *both, self.note]


HEADER = ["ratio", "what", "against", "dtype", "ours", "the other", "remark"]
SCALES = {  # unit: {unit to print: smallest value from which it is used}
    "B": {"GiB": 2**30, "MiB": 2**20},
    "s": {"s": 1, "ms": 1e-3},
    "FLOP/s": {"TFLOP/s": 1e12, "GFLOP/s": 1e9},
    "tokens/s": {"M tokens/s": 1e6, "k tokens/s": 1e3, "tokens/s": 1},
}


def spread(values: list[float], unit: str) -> str:
    """The median (smallest–largest), in a unit that reads well."""
    middle, scales = statistics.median(values), SCALES[unit]
    shown = next((name for name, scale in scales.items() if middle >= scale), list(scales)[-1])
    one, least, most = (f"{value / scales[shown]:.3g}" for value in (middle, min(values), max(values)))
    return f"{one} {shown}" if least == most else f"{one} ({least}–{most}) {shown}"


def report(results: list[Result]) -> str:
    return table([HEADER, *(result.cells() for result in results)])


@dataclass
class Bench:
    """What the cases need."""

    size: dict
    text: dict[str, str]  # paths: data, student, teacher
    device: str
    dtypes: list[str]
    others: list[str]  # "plain", and "transformers" if it is installed
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    in_this_process: bool = False  # run the steps in this process too
    profile: bool = False  # print the time of the operations of each step
    json: Path | None = None  # written again with every result
    until: float = math.inf  # time.monotonic() after which no step is started
    results: list[Result] = field(default_factory=list)

    def add(self, what: str, against: str, dtype: str, *values) -> None:
        self.results.append(Result(what, against, dtype, *values))
        line = " | ".join(cell for cell in self.results[-1].cells() if cell)
        print(f"  {time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)
        if self.json:
            record = {"machine": machine(self.device), "results": [asdict(result) for result in self.results]}
            self.json.write_text(json.dumps(record, indent=1) + "\n")


def take_turns(runs: dict[str, Callable], repeats: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each, after one run to warm up, in turns: A B A B."""
    for run in runs.values():
        run()
    rounds = [[seconds(run, device) for run in runs.values()] for _ in range(repeats)]
    return {name: list(times) for name, times in zip(runs, zip(*rounds, strict=True), strict=True)}


# ---------------------------------------------------------------------------------------------------------------------
# The cases

SAME = {"fp32": 1e-4, "bf16": 2e-2}  # relative, of loss and gradient norm; bf16 has three digits


def free_memory() -> int:
    """Bytes that are available."""
    try:
        return kernel_figure("meminfo", "MemAvailable")
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def needed_memory(job: dict) -> int:
    """Roughly the bytes that a plain step's process needs: weights, gradients, the (B, T, V) tensors, activations."""
    student, teacher = (memory.counts(job[side]) for side in ("student", "teacher"))
    weights = 8 * (student.matrices + student.rest)
    weights += (2 if job["dtype"] == "bf16" else 4) * (teacher.matrices + teacher.rest)
    per_token = 4 * (10 * student.vocabulary + 8 * teacher.vocabulary)  # logits at the peak
    longest = max(len(side) for row in step_rows(job)[0] for side in (row.student, row.teacher or ()))
    return weights + job["batch"] * longest * per_token + 2**31


def measure_steps(bench: Bench, jobs: list[dict]) -> None:
    """Time and memory of ours against each alternative. On a CPU every step has its own process, and the alternatives
    take turns. On a GPU, an alternative has one process for all jobs of a method, so that it is compiled once and has
    only its own graphs in memory. Ours of all methods, and the first alternative, compile at the same time, which takes
    minutes; nothing is timed before all have finished. On a card of less than 64 GB, they follow each other."""
    rounds, found = bench.size["rounds"], {}
    groups = [[(job, how, turn)] for job in jobs for turn in range(rounds) for how in job["hows"]]
    together = 0
    if bench.size.get("card"):
        hows = "ours", COMPILED, "transformers", "plain"  # the most important first, in case the time runs out
        names = sorted(bench.methods, key=lambda name: name not in (bench.size.get("against") or bench.methods))
        groups = [[(job, how, 0) for job in jobs if job["name"] == name and how in job["hows"]]
                  for how, name in product(hows, names)]  # fmt: skip
        memory_of = torch.cuda.get_device_properties
        if torch.device(bench.device).type != "cuda" or memory_of(bench.device).total_memory > 64e9:
            together = len(names) + 1  # smaller cards do not hold all of them
    measured = [measure_group(bench, group, found) for group in groups if group]
    for _ in range(2):  # to the first and to the second `yield` of all
        for part in measured[:together]:
            next(part)
    for part in measured:
        list(part)


def measure_group(bench: Bench, group: list[tuple], found: dict) -> Iterator[None]:
    """Measure the steps of a process, as `measure_steps` says. What compiles first runs its steps without timing them
    (an alternative only its first, because of its memory). It stops until all have begun, and until all are done."""
    warm_up, how = [job for job, _, _ in group if job["card"]], group[0][1]
    warm_up = warm_up if how == "ours" else warm_up[:1] if how == COMPILED else []
    with own_process(bench.in_this_process) as run_step:
        first = [run_step({**job, "how": how, "check": True, "enough": 0.0, "profile": False}) for job in warm_up]
        yield
        first = [measure_one(bench, {**job, "how": how}, lambda _, run=run: run)
                 for job, run in zip(warm_up, first, strict=True)]  # fmt: skip
        yield
        for (job, how, turn), known in zip_longest(group, first, fillvalue={}):
            if known == "does not fit":  # beside the other processes
                known = {}
            one = known
            if not isinstance(known, str):
                one = measure_one(bench, {**job, "how": how, "check": turn == 0 and not known}, run_step)
            if isinstance(one, dict):
                one |= known | {"seconds": one["seconds"]}
                if "profile" in one:
                    print(f"{job['what']}, {how}, {job['dtype']}:\n{one['profile']}")
            result = found.setdefault((job["what"], job["dtype"], how), one)
            if result is not one and not isinstance(result, str) and not isinstance(one, str):
                result["seconds"] += one["seconds"]
            if turn == bench.size["rounds"] - 1:
                compare_step(bench, job, how, found[job["what"], job["dtype"], "ours"], result)


def measure_one(bench: Bench, job: dict, run_step: Callable) -> dict | str:
    """The result of `run_step` or, in words, why there is none."""
    needed, free = needed_memory(job), free_memory()
    if job["how"] not in OURS and not job["card"] and needed > free:
        return f"does not fit: {needed / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB free"
    if time.monotonic() > bench.until:
        return "no time left"
    try:
        return run_step(job).result()
    except torch.OutOfMemoryError:
        return "does not fit"
    except Exception as error:  # the other steps continue; `main` exits with an error at the end
        return f"failed: {type(error).__name__}: {error}"[:300]


def say_speed(job: dict, result: dict) -> str:
    """Tokens per second and, on a GPU with a known peak, MFU."""
    took, rank = statistics.median(result["seconds"]), job["options"].get("lora", 0)
    models = memory.counts(job["student"], rank), memory.counts(job["teacher"])
    recipe = job["options"]["recipe"] if job["options"]["method"] == "dskd" else ""
    work = paper.operations(*models, *result["tokens"], rank, recipe, result["pairs"])
    peak = next((peak for card, peak in paper.PEAKS.items() if card in machine(job["device"])), None)
    return f"{result['tokens'][0] / took:,.0f} tokens/s" + (f", MFU {work / took / peak:.1%}" if peak else "")


def compare_step(bench: Bench, job: dict, how: str, ours: dict | str, other: dict | str) -> None:
    """Compare ours with an alternative, checking that both compute the same; or ours with memory.py's forecast."""
    what, dtype = f"{job['what']}, time", job["dtype"]
    if isinstance(ours, str) or isinstance(other, str):
        times = ours if isinstance(ours, str) else ours["seconds"]
        return bench.add(what, how, dtype, times, other if isinstance(other, str) else other["seconds"], "s")
    remark, seen = say_speed(job, ours), ours["peak"] is not None
    if how == "ours":
        if not job["card"]:
            return None
        bench.add(what, "", dtype, ours["seconds"], "", "s", remark)
        rank, tokens = job["options"].get("lora", 0), ours["tokens"][0]
        size = {"max_len": tokens, "graphs": job["compile"]}
        forecast = sum(memory.needs(job["teacher"], job["student"], rank, 1, None, 1, **size).values())
        if seen:
            total = ours["peak"] + ours["weights"]
            bench.add(f"{job['what']}, memory in all", "forecast", dtype, [total], [forecast], "B")
        return None
    if job["card"]:
        remark += f" ({how}: {say_speed(job, other)})"
    errors = [abs(other[key] / ours[key] - 1) for key in ("loss", "gradient")]
    same = "same" if max(errors) < SAME[dtype] else "NOT THE SAME"
    remark += f"; {same} loss to {errors[0]:.0e}, gradient norm to {errors[1]:.0e}"
    bench.add(what, how, dtype, ours["seconds"], other["seconds"], "s", remark)
    if seen:
        above = ([result["peak"] - result["kept"]] for result in (ours, other))
        bench.add(f"{job['what']}, memory", how, dtype, *above, "B")


def make_job(bench: Bench, name: str, dtype: str, batch: int, **changes) -> dict:
    size, card = bench.size, bench.size.get("card", False)
    hows = ["ours", *bench.others]
    if card:
        if (against := size.get("against")) and batch not in against.get(name, []):
            hows = ["ours"]
        hows += [COMPILED] * (batch > 4 and "transformers" in hows)
    return {
        "name": name, "options": METHODS[name][1], "dtype": dtype, "device": bench.device, "text": bench.text,
        "student": size["student"], "teacher": size["teacher" if name in ("eta", "cma") else "same_teacher"],
        "batch": batch, "max_len": size["max_len"], "enough": size["enough"], "card": card,
        "compile": card and torch.device(bench.device).type == "cuda",
        "hows": hows, "profile": bench.profile,
        "what": METHODS[name][0] + f", {batch} examples" * card, **changes,
    }  # fmt: skip


def steps(bench: Bench) -> None:
    """One update of each method: time and memory."""
    each = product(bench.methods, bench.dtypes, bench.size["batches"])
    measure_steps(bench, [make_job(bench, *one) for one in each])


def lora_pair(bench: Bench) -> None:
    """An update of the papers' larger pair, TinyLlama and Llama-2-7B with adapters, in the largest batch that fits."""
    pair = bench.size["lora_pair"]
    size = {side: {"vocab_size": pair["models"]["student"]["vocab_size"]} for side in ("student", "teacher")}
    with tempfile.TemporaryDirectory() as folder, own_process(bench.in_this_process) as run_step:
        text = stand_in({**size, "overlap": size["student"]["vocab_size"] * 2 // 3}, 200, Path(folder))
        for batch in pair["batches"]:
            options = METHODS["same"][1] | {"lora": pair["rank"]}
            changes = {**pair["models"], "text": text, "options": options, "compile": False}
            job = make_job(bench, "same", bench.dtypes[0], batch, **changes)
            job["what"] = f"{pair['what']}, {job['what']}"
            result = measure_one(bench, {**job, "how": "ours", "check": False}, run_step)
            compare_step(bench, job, "ours", result, result)
            if result != "does not fit":
                return


def body(bench: Bench) -> None:
    """Forward and backward pass of decoders without head, compared with transformers and square matrix products."""
    for (label, config), dtype in product(bench.size["bodies"].items(), bench.dtypes):
        measure_body(bench, f"body of {label}", config, dtype)


def measure_body(bench: Bench, what: str, config: dict, dtype: str) -> None:
    torch.manual_seed(0)
    ours, shape, n = build_model(config, bench.device).train(), bench.size["body_shape"], bench.size["square"]
    ids = torch.randint(config["vocab_size"], shape, device=bench.device)
    direction = torch.randn(*shape, ours.embed.weight.shape[1], device=bench.device)
    a, b = torch.randn(2, n, n, device=bench.device).to(DTYPES[dtype])

    def update(model, states_of) -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=dtype == "bf16"):
            states = states_of(ids)
        (states.float() * direction).sum().backward()

    if torch.device(bench.device).type == "cpu":
        put_on(ours)
    by_ours = by_onednn(bench.device)
    runs = {"ours": by_ours(partial(update, ours, ours)), "product": partial(torch.mm, a, b)}
    runs["product by oneDNN"] = by_ours(runs["product"])
    if "transformers" in bench.others:
        theirs = as_transformers(ours).train()
        states_of = partial(theirs.base_model, use_cache=False)
        runs["transformers"] = partial(update, theirs, lambda ids: states_of(ids).last_hidden_state)
    times = take_turns(runs, bench.size["repeats"], bench.device)
    if "transformers" in times:
        bench.add(what, "transformers", dtype, times["ours"], times["transformers"], "s")
    counts = memory.counts({**config, "vocab_size": 0})
    work = 6 * math.prod(shape) * counts.matrices
    ceiling = 2 * n**3 / min(times["product"] + times["product by oneDNN"])
    bench.add(what, "matrix product", dtype, [work / t for t in times["ours"]], [ceiling], "FLOP/s")


def generation(bench: Bench) -> None:
    """Greedy generation for a batch of prompts, with models of each dtype."""
    for dtype in bench.dtypes:
        measure_generation(bench, dtype)


def measure_generation(bench: Bench, dtype: str) -> None:
    rng, size, on_cuda = random.Random(0), bench.size, torch.device(bench.device).type == "cuda"
    new, vocabulary, B = size["new_tokens"], size["generator"]["vocab_size"], size["prompts"]
    lengths = [int(np.interp((i + 0.5) / B, QUANTILES, PROMPT_TOKENS)) for i in range(B)]
    prompts = [[rng.randrange(1, vocabulary) for _ in range(n)] for n in lengths]
    width = max(lengths)  # transformers needs them padded on the left
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=bench.device)
    torch.manual_seed(0)
    ours = build_model(size["generator"], bench.device).eval().to(dtype=DTYPES[dtype])
    theirs, written = as_transformers(ours) if "transformers" in bench.others else None, {}

    def run_ours() -> None:
        with by_onednn(bench.device), packed(ours), graphed(ours):
            written["ours"] = generate(ours, prompts, new, None, temperature=0)

    def run_theirs(how: str) -> None:
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        if how == COMPILED:  # with a static cache, transformers compiles by itself
            options["cache_implementation"] = "static"
        with torch.no_grad():
            output = theirs.generate(input_ids=ids, attention_mask=(ids > 0).long(), **options)
        written[how] = output[:, width:].tolist()

    hows = ["transformers", *[COMPILED] * on_cuda] if theirs else []
    runs = {"ours": run_ours, **{how: partial(run_theirs, how) for how in hows}}
    times = take_turns(runs, size["repeats"], bench.device)
    rates = {name: [B * new / t for t in values] for name, values in times.items()}
    for how in hows or ["not installed"]:
        same = sum(a == b for a, b in zip(written["ours"], written.get(how, []), strict=False))
        bench.add(f"generation, {B} prompts", how, dtype, rates["ours"], rates.get(how, ""), "tokens/s",
                  f"{same} of {B} responses are the same")  # fmt: skip


def alignment(bench: Bench) -> None:
    """Exact alignment from token ids to pairs, on one core, at the lengths of the data and at growing ones."""
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

        times = take_turns({"ours": ours, "official rule": official}, bench.size["repeats"])
        tokens = sum(len(mine) for _, mine in ids)
        mine, other = ([tokens / t for t in values] for values in times.values())
        bench.add(what, "official rule", "", mine, other, "tokens/s")
        return mine

    rates(texts, "alignment, Dolly's lengths")
    long = " ".join(texts * (1 + 6 * max(bench.size["aligned_lengths"]) // sum(map(len, texts))))
    characters = len(long[:100_000]) / len(student.encode(long[:100_000]))
    at = {n: rates([long[: round(n * characters)]], f"alignment, {n} tokens") for n in bench.size["aligned_lengths"]}
    bench.add(f"alignment, {max(at)} tokens", f"{min(at)} tokens", "", at[max(at)], at[min(at)], "tokens/s")


def growth(bench: Bench) -> None:
    """DSKD v2 + ETA on generated text that fills --max-len, in float32. Varies one of batch, length and vocabulary at a
    time; compared with plain, and with ours with --recompute."""
    size = bench.size
    largest = size["growth_teacher"]["vocab_size"]
    base = {"batch": size["batches"][0], "max_len": size["max_len"], "vocabulary": largest}
    settings = [base | {name: value} for name, values in size["growth"].items() for value in values]
    once = {**size, "rounds": 1, "against": None}
    once = replace(bench, size=once, others=["plain", "--recompute"])  # adds to the same results
    for batch, max_len, vocabulary in dict.fromkeys(tuple(setting.values()) for setting in settings):  # each once
        teacher = {**size["growth_teacher"], "vocab_size": vocabulary}
        overlap = size["overlap"] * vocabulary // largest
        with tempfile.TemporaryDirectory() as folder:
            text = stand_in({**size, "teacher": teacher, "overlap": overlap}, batch, Path(folder), filled=max_len)
            changes = {"max_len": max_len, "teacher": teacher, "text": text}
            changes["what"] = f"growth: {batch} x {max_len} tokens, vocabulary {vocabulary}"
            measure_steps(once, [make_job(once, "eta", "fp32", batch, **changes)])


CASES = {f.__name__: f for f in (steps, lora_pair, body, generation, alignment, growth)}


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def machine(device: str) -> str:
    """The machine and the versions that the figures were measured with."""
    installed = [name for name in ("torch", "transformers") if importlib.util.find_spec(name)]
    versions = [f"Python {platform.python_version()}"]
    versions += [f"{name} {importlib.metadata.version(name)}" for name in installed]
    if torch.device(device).type == "cuda":
        return ", ".join([torch.cuda.get_device_name(device), *versions])
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*: (.*)", info.read_text())):
        name = found[1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ", ".join([name, f"{cores} cores, {torch.get_num_threads()} threads", *versions])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=["all", *CASES], default="all")
    parser.add_argument("--quick", action="store_true", help="fewer repeats and alternatives: 7 minutes on a GPU")
    parser.add_argument("--tiny", action="store_true", help="the GPU's cases at a size for any machine, in seconds")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="methods to measure")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="(default: both; on a GPU bf16)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", help="JSONL file of prompts and responses (default: generated text)")
    parser.add_argument("--student-tokenizer", help="directory with tokenizer.json, for --data")
    parser.add_argument("--teacher-tokenizer", help="the same for the teacher")
    parser.add_argument("--profile", action="store_true", help="also print the time of the operations of each step")
    parser.add_argument("--json", type=Path, help="file for the results")
    o = parser.parse_args(arguments)
    given = {"data": o.data, "student": o.student_tokenizer, "teacher": o.teacher_tokenizer}
    if any(given.values()) and not all(given.values()):
        parser.error("--data, --student-tokenizer and --teacher-tokenizer go together: give all three or none")
    try:  # before anything is measured
        on_cuda = check_device(o.device).type == "cuda"
        if o.json:
            o.json.touch()
        if o.data:
            read_examples(o.data, 0, 1)
            list(map(read_tokenizer, (o.student_tokenizer, o.teacher_tokenizer)))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    size = {**(TINY if o.tiny else CARD if on_cuda else FULL), **(QUICK if o.quick else {})}
    if "lora_pair" in o.cases and "lora_pair" not in size:
        parser.error("lora_pair needs a GPU; in miniature, with --tiny, it runs anywhere")
    until = time.monotonic() + 7 * 60 if o.quick and on_cuda else math.inf  # no step starts after this
    limits = {"until": until, "json": o.json, "in_this_process": o.tiny, "profile": o.profile}
    cases = o.cases
    if "all" in cases:
        cases = CARD_CASES if "card" in size else [name for name in CASES if name != "lora_pair"]
    with tempfile.TemporaryDirectory() as folder:
        text = given if o.data else stand_in(size, 200, Path(folder))
        for name in ("student", "teacher", "same_teacher"):  # a head may have more rows than its tokenizer, not fewer
            rows = read_tokenizer(text["teacher" if name == "teacher" else "student"]).size
            size[name] = {**size[name], "vocab_size": max(size[name]["vocab_size"], rows)}
        others = ["plain", *["transformers"] * bool(importlib.util.find_spec("transformers"))]
        bench = Bench(size, text, o.device, o.dtype or size["dtypes"], others, o.methods, **limits)
        stopped = True
        with contextlib.suppress(KeyboardInterrupt):  # the table has what was measured before
            for name in cases:
                print(f"{name}: {CASES[name].__doc__.splitlines()[0]}", file=sys.stderr)
                print(f"  {seconds(partial(CASES[name], bench), 'cpu'):.0f} s", file=sys.stderr)
                gc.collect()
            stopped = False
    print(f"{machine(o.device)}\n\n{report(bench.results)}")
    failed = (str(cell).startswith("failed") for result in bench.results for cell in (result.ours, result.other))
    if stopped or any(failed):
        sys.exit(1)


if __name__ == "__main__":
    main()
