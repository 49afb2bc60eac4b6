"""Distil a teacher into a student: the command line and the one training loop.

    python train.py                                                the embedded tiny task, to the end
    python train.py --teacher qwen --student gpt2 --data dolly     the papers' pair
    python train.py --teacher DIR --student DIR --data FILE.jsonl  your own
    torchrun --nproc_per_node=N train.py --teacher ...             on N devices, see parallel.py

The loop is `train`; what one update does is in distill.py; what the terms mean is in losses.py.
"""

import argparse
import ctypes
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from types import NoneType
from typing import get_args, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

import lora
import parallel
import tiny
from checkpoint import Log, check_directory, restore_checkpoint, save_checkpoint, start_directory
from data import (
    Row,
    TextTokenizer,
    collate,
    cut_prompt,
    read_jsonl,
    sampled_row,
    tokenise,
    update_order,
    without_responses,
)
from distill import Distiller, Totals, choose_alignment
from eval import held_out_cross_entropy, respond
from hub import data_file, model_directory
from losses import DIVERGENCES
from model import build_model, generate, load_model, read_config, read_json
from seqkd import teacher_answers

ALIGNMENTS = ["none", "eta", "cma"]
DTYPES = ["fp32", "bf16"]


def option(default, help: str, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Options:
    """Everything a run depends on; each field is a command line option."""

    student: str | None = option(None, "preset, hub repository or directory of the student")
    teacher: str | None = option(None, "the same for the teacher")
    data: str | None = option(None, "named set or JSONL file to train on")
    valid: str | None = option(None, "named set or JSONL file held out, for valid_ce and samples")
    method: str = option("dskd", "what to train with", ["sft", "seqkd", "kd", "dskd", "uld", "mined"])
    recipe: str = option("v2", "which of the two papers DSKD follows", ["v1", "v2"])
    align: str = option("auto", "auto: none for equal vocabularies, else eta (v2) or cma (v1)", ["auto", *ALIGNMENTS])
    divergence: str = option("fkl", "D(student, teacher)", list(DIVERGENCES))
    kd_rate: float = option(0.5, "share of the distillation term, the rest is cross-entropy with the gold tokens")
    temperature: float = option(2.0, "divides all logits inside the divergence")
    on_policy: float = option(0.0, "probability that an update distils on responses sampled from the student")
    seqkd_temperature: float = option(0.0, "of the teacher's answers with --method seqkd; 0 is greedy")
    projectors: str | None = option(None, "safetensors file: t2s, s2t, query (.weight, .bias) to start from and train")
    from_scratch: bool = option(False, "initialise the student at random from its config.json")
    lora: int = option(0, "rank of the student's LoRA adapters, which alone are trained (0: train all of it)")
    lora_alpha: float | None = option(None, "the adapters are scaled by alpha / rank (default: the papers' 8)")
    lora_dropout: float | None = option(None, "dropout on the adapters' input (default: the papers' 0.1)")
    epochs: int = option(20, "passes over the data")
    max_steps: int = option(0, "updates, instead of --epochs (0: by epochs)")
    batch_size: int = option(32, "examples per forward pass, of each process")
    grad_accum: int = option(1, "forward passes per update; it is over batch size x this x processes examples")
    lr: float = option(5e-4, "peak learning rate of the student")
    projector_lr: float = option(0.0, "peak learning rate of the projectors (0: the papers' 1e-3 for v1, 5e-4 for v2)")
    weight_decay: float = option(1e-2, "AdamW's, on matrices only")
    warmup: int = option(0, "updates of linear warm-up; cosine decay to zero follows")
    clip: float = option(1.0, "largest norm of the whole gradient")
    max_len: int | None = option(None, "tokens of a whole example, per model (default: 512, or all a model has)")
    max_prompt_len: int | None = option(None, "tokens of the prompt, per model (default: half of --max-len, 256)")
    chunk: int = option(512, "tokens whose logits are in memory at once (0: all, with the plain losses)")
    seed: int = option(42, "of initialisation, data order and dropout")
    dtype: str | None = option(None, "bf16: autocast; weights and losses stay float32 (default on CUDA)", DTYPES)
    device: str | None = option(None, "cuda, cuda:1, cpu, ... (default: cuda if there is one)")
    shard: str | None = option(
        None, "with torchrun: split a model's weights over all processes (FSDP2)", ["teacher", "student", "both"]
    )
    compile: bool | None = option(None, "torch.compile both models (default: on CUDA)")
    out: str | None = option(None, "run directory (default: runs/METHOD or, without arguments, runs/tiny)")
    resume: bool = option(False, "go on with the run in --out")
    checkpoint_every: int = option(0, "updates between checkpoints and held-out scores (0: every epoch)")
    log_every: int = option(10, "updates between lines of log.jsonl")
    dry_run: bool = option(False, "no update, no dropout: print the loss terms of the first --batch-size lines")


def parse(arguments: list[str] | None = None) -> dict:
    """The options that were given on the command line: {field of Options: value}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for entry in fields(Options):
        flag, kind = "--" + entry.name.replace("_", "-"), get_type_hints(Options)[entry.name]
        kind = next((part for part in get_args(kind) if part is not NoneType), kind)  # str of "str | None"
        about = entry.metadata["help"] + ("" if not entry.default else f" (default: {entry.default})")
        common = {"default": argparse.SUPPRESS, "help": about}
        if kind is bool:  # a switch that may be left open has a --no- form too
            action = argparse.BooleanOptionalAction if entry.default is None else "store_true"
            parser.add_argument(flag, action=action, **common)
        else:
            parser.add_argument(flag, type=kind, choices=entry.metadata["choices"], **common)
    return vars(parser.parse_args(arguments))


def check(o: Options) -> Options:
    """The options with their defaults filled in. Raises ValueError naming a value that makes no sense."""
    at_least = {"epochs": 1, "batch_size": 1, "grad_accum": 1, "max_steps": 0, "warmup": 0, "max_len": 2,
                "max_prompt_len": 1, "chunk": 0, "checkpoint_every": 0, "log_every": 1, "weight_decay": 0,
                "projector_lr": 0, "seed": 0, "lora": 0, "seqkd_temperature": 0}  # fmt: skip
    for name, least in at_least.items():
        if getattr(o, name) is not None and not least <= getattr(o, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(o, name)}: must be at least {least} and finite")
    if o.seed >= 2**32:
        raise ValueError(f"--seed {o.seed}: must be below 2**32, since it is multiplied into the seeds of epochs")
    for name in ("lr", "temperature", "clip"):
        if not 0 < getattr(o, name) < math.inf:
            raise ValueError(f"--{name} {getattr(o, name)}: must be positive and finite")
    if not 0 <= o.kd_rate <= 1:
        raise ValueError(f"--kd-rate {o.kd_rate}: must be between 0 (only gold labels) and 1 (only the teacher)")
    if not 0 <= o.on_policy <= 1:
        raise ValueError(f"--on-policy {o.on_policy}: must be between 0 (gold responses) and 1 (sampled ones)")
    if o.on_policy and o.method not in ("kd", "dskd"):
        why = {"sft": "has no teacher to judge sampled responses", "seqkd": "learns the teacher's responses"}
        why = why.get(o.method, "is defined on the gold responses")
        raise ValueError(f"--on-policy belongs to --method kd and dskd; --method {o.method} {why}")
    if o.on_policy and o.dry_run:
        raise ValueError("--dry-run is on the gold responses, so that others can compare: leave out --on-policy")
    o = check_lora(o)
    for name in ("student", "data") + (() if o.method == "sft" else ("teacher",)):
        if getattr(o, name) is None:
            raise ValueError(f"--{name} is missing: --method {o.method} needs it (no arguments at all: the tiny task)")
    check_processes(o)
    device = o.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        on_cuda = torch.device(device).type == "cuda"
    except RuntimeError as error:
        raise ValueError(f"--device {device}: not a device; use cuda, cuda:1, cpu, ...") from error
    if on_cuda and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: there is no CUDA device here; use --device cpu")
    if torch.device(device).type not in ("cuda", "cpu"):
        raise ValueError(f"--device {device}: only cuda and cpu are supported (the projectors are solved in float64)")
    if o.method in ("uld", "mined") and o.divergence != "fkl":
        why = {"uld": "compares sorted probabilities by their absolute difference",
               "mined": "takes the gold token where none is aligned, which only the forward KL suits"}  # fmt: skip
        raise ValueError(f"--divergence {o.divergence}: --method {o.method} {why[o.method]}; leave --divergence out")
    if o.seqkd_temperature and o.method != "seqkd":
        raise ValueError(f"--seqkd-temperature belongs to --method seqkd; --method {o.method} generates nothing")
    if o.projectors is not None and o.method != "dskd":
        raise ValueError(f"--projectors belongs to --method dskd; --method {o.method} has none")
    if o.projectors is not None:
        try:  # only that it can be read; whether it fits is known once the models are there
            with safe_open(o.projectors, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ValueError(f"--projectors {o.projectors}: not a readable safetensors file ({error})") from error
    return replace(
        o,
        device=device,
        dtype=o.dtype or ("bf16" if on_cuda else "fp32"),
        compile=on_cuda if o.compile is None else o.compile,
        projector_lr=o.projector_lr or {"v1": 1e-3, "v2": 5e-4}[o.recipe],
        out=o.out or f"runs/{o.method}",
    )


def check_processes(o: Options) -> None:
    by_torchrun = parallel.by_torchrun()
    if o.shard and not by_torchrun:
        raise ValueError(f"--shard {o.shard} splits weights over processes: start with torchrun --nproc_per_node=N")
    if o.shard in ("teacher", "both") and o.method in ("sft", "seqkd"):
        raise ValueError(f"--shard {o.shard}: --method {o.method} trains without a teacher; use --shard student")
    if by_torchrun and o.dry_run:
        raise ValueError("--dry-run is for one process: start without torchrun")
    if by_torchrun and o.device not in (None, "cuda", "cpu"):
        raise ValueError(f"--device {o.device}: torchrun gives each process its own; use cuda, cpu or leave it out")
    if by_torchrun and o.device != "cpu" and 0 < torch.cuda.device_count() <= int(os.environ["LOCAL_RANK"]):
        raise ValueError(f"torchrun started more processes than there are CUDA devices ({torch.cuda.device_count()})")


def check_lora(o: Options) -> Options:
    alpha, dropout = o.lora_alpha, o.lora_dropout
    if not o.lora:
        if alpha is not None or dropout is not None:
            raise ValueError("--lora-alpha and --lora-dropout belong to --lora RANK, which is not given")
        return o
    alpha, dropout = 8.0 if alpha is None else alpha, 0.1 if dropout is None else dropout
    if not 0 < alpha < math.inf:
        raise ValueError(f"--lora-alpha {alpha}: must be positive and finite")
    if not 0 <= dropout < 1:
        raise ValueError(f"--lora-dropout {dropout}: must be at least 0 and below 1")
    if o.from_scratch:
        raise ValueError(
            f"--lora {o.lora} adapts a trained student; --from-scratch (so also the embedded task) starts without one"
        )
    return replace(o, lora_alpha=alpha, lora_dropout=dropout)


# ---------------------------------------------------------------------------------------------------------------------
# Loading


@dataclass
class Pieces:
    """A run's models, tokenizers and data, loaded and checked against each other."""

    student: torch.nn.Module
    student_tokenizer: TextTokenizer
    distiller: Distiller
    teacher_tokenizer: TextTokenizer | None
    rows: list[Row]
    valid_rows: list[Row]
    sample_prompts: list[str]

    def collate(self, rows: list[Row], device):
        pad = self.teacher_tokenizer.eos_id if self.teacher_tokenizer else 0
        return collate(rows, self.student_tokenizer.eos_id, pad).to(device)

    def batches(self, rows: list[Row], o: Options, count: int) -> list:
        """This process's rows of one update as batches of --batch-size: `count` of them, which is the same in all
        processes, since those that share a model's weights must run it equally often; the last may have no row."""
        parts = [rows[i * o.batch_size : (i + 1) * o.batch_size] for i in range(count)]
        batches = [self.collate(part or self.rows[:1], o.device) for part in parts]
        return [batch if part else without_responses(batch) for part, batch in zip(parts, batches, strict=True)]


def fit_lengths(o: Options, directories: dict[str, Path]) -> None:
    """Fill in --max-len and --max-prompt-len for these models. Raises ValueError where one has too few positions."""
    limits = {name: read_config(read_json(path / "config.json")).limit for name, path in directories.items()}
    if o.max_len is None:
        o.max_len = min(512, *limits.values())
    if o.max_prompt_len is None:
        o.max_prompt_len = max(1, o.max_len // 2)
    for name, limit in limits.items():
        if o.max_len > limit:
            raise ValueError(f"--max-len {o.max_len}: the {name} has only {limit} positions")


def compiled(model: torch.nn.Module) -> torch.nn.Module:
    """The model compiled; a sharded one block by block, as its weights come and go between them."""
    if not parallel.is_sharded(model):
        return torch.compile(model, dynamic=True)
    for block in model.blocks:
        block.compile(dynamic=True)
    return model


def load(o: Options) -> Pieces:
    """Everything a run needs. Whatever is wrong with the input is found here, before the first update."""
    student_directory = tiny.find(o.student, "student") or model_directory(o.student, weights=not o.from_scratch)
    student_tokenizer, teacher_tokenizer, teacher = TextTokenizer(student_directory), None, None
    if o.method != "sft":
        teacher_directory = tiny.find(o.teacher, "teacher") or model_directory(o.teacher)
        teacher_tokenizer = TextTokenizer(teacher_directory)
        if o.method != "seqkd":  # before models are loaded
            choose_alignment(o.align, o.method, o.recipe, teacher_tokenizer, student_tokenizer)
    fit_lengths(o, {"student": student_directory} | ({"teacher": teacher_directory} if o.method != "sft" else {}))
    first_lines = o.batch_size if o.dry_run else None
    examples = read_jsonl(*data_file(tiny.find(o.data, "data") or o.data, "train"))
    valid = read_jsonl(*data_file(o.valid, "valid")) if o.valid and not o.dry_run else []

    torch.manual_seed(o.seed)
    home = "cpu" if o.shard in ("student", "both") else o.device
    if o.from_scratch:
        student = build_model(read_json(student_directory / "config.json")).to(home)
    else:
        student = load_model(student_directory, torch.float32, home)
    student_tokenizer.check_model(student.embed.weight.shape[0])
    if o.lora:
        lora.attach(student, o.lora, o.lora_alpha, o.lora_dropout)
        trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
        print(f"LoRA: {trained:,} of the student's parameters are trained", file=sys.stderr)
    if o.shard in ("student", "both"):
        parallel.shard(student, o.device, torch.bfloat16 if o.dtype == "bf16" else None)
    method, dtype = o.method, torch.bfloat16 if o.dtype == "bf16" else torch.float32
    if o.method == "seqkd":  # from here on it is supervised fine-tuning
        with parallel.main_first():
            examples = teacher_answers(
                Path(o.out) / "seqkd.jsonl", examples, teacher_directory, teacher_tokenizer, student_tokenizer,
                o.max_len, o.max_prompt_len, o.seqkd_temperature, o.seed, o.batch_size, o.device, dtype, first_lines,
            )  # fmt: skip
        method, teacher_tokenizer = "sft", None
    examples = examples[:first_lines]
    if method != "sft":  # frozen, so that half precision is enough where the arithmetic is bf16 anyway
        load_teacher = parallel.load_sharded if o.shard in ("teacher", "both") else load_model
        teacher = load_teacher(teacher_directory, dtype, o.device)
        teacher_tokenizer.check_model(teacher.embed.weight.shape[0])
        teacher = compiled(teacher.requires_grad_(False)) if o.compile else teacher

    with parallel.main_first():  # MinED's map goes into a cache
        distiller = Distiller(
            student, student_tokenizer, teacher, teacher_tokenizer, method, o.recipe, o.align, o.divergence,
            o.temperature, o.kd_rate, o.projectors, o.chunk,
        )  # fmt: skip
    lengths = o.max_len, o.max_prompt_len
    rows, report = tokenise(examples, student_tokenizer, teacher_tokenizer, *lengths, distiller.align)
    print(f"train: {report}", file=sys.stderr)
    valid_rows, report = tokenise(valid, student_tokenizer, None, *lengths)
    if valid:
        print(f"valid: {report}", file=sys.stderr)
    room = min(o.max_prompt_len, o.max_len - 1)
    prompts = [cut_prompt(example, [student_tokenizer], room) for example in (valid or examples)[:5]]
    return Pieces(student, student_tokenizer, distiller, teacher_tokenizer, rows, valid_rows, prompts)


# ---------------------------------------------------------------------------------------------------------------------
# One update


def autocast(o: Options) -> torch.autocast:
    return torch.autocast(torch.device(o.device).type, torch.bfloat16, enabled=o.dtype == "bf16")


@contextmanager
def gathered(o: Options, pieces: Pieces) -> Iterator[None]:
    """For scores and samples: the student as it is, in float32; a sharded one in the dtype it is trained in."""
    with parallel.gathered(pieces.student), autocast(o) if parallel.is_sharded(pieces.student) else nullcontext():
        yield


def is_on_policy(o: Options, step: int) -> bool:
    """Whether update `step` distils on sampled responses: with probability --on-policy, and a function of (seed, step)
    alone, so that a resumed run, and every process of one run, decides alike."""
    return random.Random(f"{o.seed} on-policy {step}").random() < o.on_policy


def sample_rows(o: Options, pieces: Pieces, rows: list[Row], step: int) -> tuple[list[Row], int]:
    """The rows with responses sampled from the student as it is now (v2, eq. 18; T = 1, the whole distribution, no
    dropout, no gradient), and how many tokens were sampled. Seeded by (seed, step), like `is_on_policy`,
    and the process, each of which samples for its own share of the update.

    All these responses are sampled together: so they do not depend on how the share is split, and it is faster.
    """
    seed = random.Random(f"{o.seed} sample {step}" + f" {parallel.rank()}" * (parallel.rank() > 0)).getrandbits(63)
    tokenizer, prompts = pieces.student_tokenizer, [row.student.prompt for row in rows]
    room = [o.max_len - len(prompt) for prompt in prompts]
    with autocast(o), parallel.gathered(pieces.student):
        responses = generate(pieces.student, prompts, room, tokenizer.eos_id, seed=seed, vocabulary=tokenizer.size)
    both = tokenizer, pieces.teacher_tokenizer, o.max_len, pieces.distiller.align
    sampled = [sampled_row(row, response, *both) for row, response in zip(rows, responses, strict=True)]
    return sampled, sum(map(len, responses))


def accumulate(o: Options, pieces: Pieces, student, batches: list, sampled: list | None = None) -> dict[str, float]:
    """Loss terms of one update over its batches, with their gradient added up, also over all processes. `sampled`:
    batches of sampled responses, which L_kd is on instead of the gold ones. Raises FloatingPointError for a term that
    is not finite, naming it."""
    distiller = pieces.distiller
    distilled = sampled or batches
    distiller.refresh(pieces.student)
    with autocast(o):
        states = [distiller.teacher_states(batch) for batch in distilled]
        add_up = parallel.add_up if parallel.world() > 1 else None
        totals = distiller.totals(pieces.student, distilled, states, batches, add_up)
    parts = [(batch, state, not sampled) for batch, state in zip(distilled, states, strict=True)]
    if sampled:
        parts = [(batch, None, True) for batch in batches] + parts
    names: list[str] = []
    values = []
    for batch, state, is_gold in parts:
        with autocast(o):
            terms = distiller.loss(student, batch, state, totals, is_gold)
        terms["loss"].backward()
        names += terms
        values += [value.detach().float() for value in terms.values()]
    sums: dict[str, float] = {}
    for name, value in zip(names, torch.stack(values).tolist(), strict=True):  # the one wait for the device
        sums[name] = sums.get(name, 0.0) + value
    ratios = [ratio for batch in distilled for ratio in batch.align_ratios]
    teacher_tokens = sum(len(batch.teacher.labels) for batch in distilled if batch.teacher is not None)
    sums |= {"teacher_tokens": teacher_tokens, "ratios": sum(ratios), "examples": len(ratios)}
    sums = dict(zip(sums, parallel.add_up(list(sums.values())), strict=True))
    for name, value in sums.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"{name} is {value}")
    parallel.add_gradients([*pieces.student.parameters(), *distiller.parameters()])
    return summarise(sums, totals, distiller)


def summarise(sums: dict[str, float], totals: Totals, distiller: Distiller) -> dict[str, float]:
    """Counts turned into the ratios that are logged."""
    sums["accuracy"] = sums.pop("correct") / totals.gold_tokens
    agreeing, pairs = sums.pop("agreeing", None), sums.pop("pairs", None)
    if agreeing is not None:
        sums["t2s_agreement"] = agreeing / max(pairs, 1)
    ratios, examples, teacher_tokens = (sums.pop(name) for name in ("ratios", "examples", "teacher_tokens"))
    if distiller.align in ("eta", "mined"):
        sums["align_ratio"] = ratios / examples
    sums["student_tokens"] = totals.tokens
    if distiller.method != "sft":
        sums["teacher_tokens"] = teacher_tokens
    return sums


def make_optimizer(o: Options, pieces: Pieces) -> torch.optim.AdamW:
    """AdamW: weight decay on the student's matrices, none on its vectors; the projectors have their own rate. With
    LoRA the student's matrices are those of its adapters."""
    parameters = [p for p in pieces.student.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "lr": o.lr, "weight_decay": o.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "lr": o.lr, "weight_decay": 0.0},
    ]
    projectors = [p for p in pieces.distiller.parameters() if p.requires_grad]
    if projectors:
        groups.append({"params": projectors, "lr": o.projector_lr, "weight_decay": o.weight_decay})
    groups = [{**group, "params": part} for group in groups for part in parallel.alike(group["params"])]
    for group in groups:
        group["peak"] = group["lr"]
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=torch.device(o.device).type in ("cuda", "cpu"))


def schedule(step: int, total: int, warmup: int) -> float:
    """Share of the peak learning rate at update `step` of `total`: linear warm-up, then cosine decay to zero."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def keep_freed_memory() -> None:
    """On Linux's C library: keep large freed buffers instead of giving them back to the system after every use, which
    then hands them out again page by page, zeroed. On a CPU that is up to half of a training step."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no buffer of its own mapping
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def train(o: Options, description: str = "train") -> dict[str, float]:
    """One run, from options to a run directory; returns the last logged line. See README.md for what is logged."""
    o = check(o)
    if torch.device(o.device).type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    else:
        keep_freed_memory()
    writes = parallel.rank() == 0
    if not o.dry_run and writes:
        check_directory(o)
    pieces = load(o)
    student = compiled(pieces.student) if o.compile else pieces.student
    if o.dry_run:
        return dry_run(o, pieces, student)

    if writes:
        start_directory(o)  # only now, when nothing is wrong with the input
    optimizer = make_optimizer(o, pieces)
    per_update = o.batch_size * o.grad_accum * parallel.world()
    updates_per_epoch = -(-len(pieces.rows) // per_update)
    total = o.max_steps or o.epochs * updates_per_epoch
    checkpoint_every = o.checkpoint_every or updates_per_epoch
    start = restore_checkpoint(o, pieces, optimizer) if o.resume else 0
    log = Log(Path(o.out) / "log.jsonl", start) if writes else None
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parallel.start_alike(parameters)
    if not start and not writes:  # dropout of its own
        parallel.seed_process(o.seed, start)
    if parallel.add_up([start])[0] != start * parallel.world():
        raise ValueError(f"--resume: {o.out} is not the same directory for all processes; they need a shared one")
    pieces.student.train()
    line: dict[str, float] = {}
    every = 0.1 if sys.stderr.isatty() else 30  # seconds; a log file needs no animation
    progress = tqdm(total=total, initial=start, desc=description, unit="update", dynamic_ncols=True, mininterval=every)
    order = update_order(len(pieces.rows), per_update, o.seed, start)
    meter = Meter()
    for step, indices in enumerate(islice(order, total - start), start):
        rows, sampled = [pieces.rows[i] for i in parallel.share(indices)], None
        count = math.ceil(len(indices) / (o.batch_size * parallel.world()))  # of forward passes
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, total, o.warmup)
        try:
            if is_on_policy(o, step):
                sampled = meter.time_generation(sample_rows, o, pieces, rows, step)
            batches = [None if part is None else pieces.batches(part, o, count) for part in (rows, sampled)]
            terms = accumulate(o, pieces, student, *batches)
            grad_norm = parallel.clip_gradients(parameters, o.clip)
            if not math.isfinite(grad_norm):
                raise FloatingPointError(f"the gradient's norm is {grad_norm}")
        except FloatingPointError as error:
            raise FloatingPointError(
                f"update {step + 1}: {error} (examples {indices[:8]}{'...' * (len(indices) > 8)}); the weights of the "
                f"last checkpoint are in {o.out}; a lower --lr or --dtype fp32 may help"
            ) from None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        sampled = sampled or []
        meter.tokens += sum(len(row.student.prompt) + len(row.student.response) for row in rows + sampled)
        if o.on_policy:  # a response that could not be used left the gold one in its place
            used = parallel.add_up([sum(new is not row for new, row in zip(sampled, rows, strict=False))])[0]
            terms["on_policy"] = used / len(indices)
        done = step + 1
        if done % o.log_every == 0 or done == total or step == start:
            line = {"step": done, "epoch": round(done / updates_per_epoch, 3), **terms, "grad_norm": grad_norm}
            line |= {"lr": optimizer.param_groups[0]["lr"], **meter.read(o.on_policy > 0)}
            speed = f"{line['tokens_per_second']:,.0f} tokens/s"
            progress.set_postfix_str(f"loss {terms['loss']:.3f}, {speed}", refresh=False)
            if writes:
                log.write(line)
        progress.update()
        if done % checkpoint_every == 0 or done == total:
            paused = time.perf_counter()
            if pieces.valid_rows:
                line["valid_ce"] = valid_cross_entropy(o, pieces)
                if writes:
                    log.write({"step": done, "valid_ce": line["valid_ce"]})
            save_checkpoint(o, pieces, optimizer, done)
            meter.since += time.perf_counter() - paused  # not training
    progress.close()
    write_samples(o, pieces)
    return line


class Meter:
    """What the time since the last logged line brought; all processes read it together."""

    def __init__(self):
        self.since, self.tokens = time.perf_counter(), 0
        self.generating, self.generated, self.responses = 0.0, 0, 0

    def time_generation(self, sample: Callable, *arguments) -> list[Row]:
        began = time.perf_counter()
        rows, tokens = sample(*arguments)
        self.generating += time.perf_counter() - began
        self.generated += tokens
        self.responses += len(rows)
        return rows

    def read(self, on_policy: bool) -> dict[str, float]:
        """The keys to log, and a new start. Without a sampled response there is no speed or length of them."""
        seconds = time.perf_counter() - self.since
        self.tokens, self.generated, self.responses = parallel.add_up([self.tokens, self.generated, self.responses])
        line = {"tokens_per_second": round(self.tokens / seconds, 1)}
        if on_policy:
            line["generation_share"] = round(self.generating / seconds, 4)
        if self.responses:
            line["generation_tokens_per_second"] = round(self.generated / self.generating, 1)
            line["sampled_length"] = self.generated / self.responses
        self.__init__()
        return line


def dry_run(o: Options, pieces: Pieces, student) -> dict[str, float]:
    """The loss terms and the student's gradient norm on the first batch; dropout is off, so that others can compare."""
    pieces.student.eval()
    terms = accumulate(o, pieces, student, [pieces.collate(pieces.rows, o.device)])
    gradients = [p.grad.flatten() for p in pieces.student.parameters() if p.grad is not None]
    terms["grad_norm"] = float(torch.cat(gradients).norm())
    names = "loss ce kd t2s_ce t2s_kd s2t_kd t2s_agreement align_ratio student_tokens teacher_tokens grad_norm".split()
    return {name: terms[name] for name in names if name in terms}


def valid_cross_entropy(o: Options, pieces: Pieces) -> float:
    """Of all held-out rows, of which each process scores its share."""
    rows, total = parallel.share(pieces.valid_rows), 0.0
    tokens = sum(len(row.student.response) for row in rows)
    with gathered(o, pieces):
        if rows:
            eos_id = pieces.student_tokenizer.eos_id
            total = tokens * held_out_cross_entropy(pieces.student, rows, eos_id, o.device)
    total, tokens = parallel.add_up([total, tokens])
    return total / tokens


def write_samples(o: Options, pieces: Pieces) -> None:
    """samples.txt: greedy responses to a few held-out (else training) prompts."""
    room = pieces.student.limit - max(len(pieces.student_tokenizer.encode(prompt)) for prompt in pieces.sample_prompts)
    with gathered(o, pieces):
        if parallel.rank() > 0:
            return
        responses = respond(pieces.student, pieces.student_tokenizer, pieces.sample_prompts, min(128, max(room, 1)))
    shown = zip(pieces.sample_prompts, responses, strict=True)
    text = "\n\n".join(f"### prompt\n{prompt}\n### response\n{response}" for prompt, response in shown)
    (Path(o.out) / "samples.txt").write_text(text + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    with parallel.session():
        given = parse(arguments)
        try:
            run(given)
        except (ValueError, FileNotFoundError, FileExistsError, FloatingPointError) as error:
            sys.exit(f"error: {error}")


def run(given: dict) -> None:
    """What a command line asks for."""
    if given.keys() & {"student", "teacher", "data"}:
        o = Options(**given)
        if o.dry_run:
            print(json.dumps(train(o)))
        else:
            train(o)
            print(f"student: {Path(check(o).out) / 'student'}")
        return
    if given.get("dry_run"):
        raise ValueError("--dry-run needs --teacher, --student and --data: the embedded task trains its own")
    if parallel.by_torchrun():
        raise ValueError("torchrun needs --student and --data: the embedded task is for one process")
    names = {"student": "tiny", "teacher": "tiny", "data": "tiny"}
    check(Options(**{**tiny.DEFAULTS, **given, **names}))  # before anything is made
    tiny.run(given, Options, train)


if __name__ == "__main__":
    main()
