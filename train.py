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
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
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
from cache import TeacherCache
from checkpoint import (
    Log,
    Stopped,
    StopSignals,
    chat_of,
    check_directory,
    hold_directory,
    random_state,
    restore_checkpoint,
    run_of,
    save_checkpoint,
    set_random_state,
    write_text,
)
from data import (
    CHATS,
    Row,
    TextTokenizer,
    ahead,
    collate,
    cut_prompt,
    padding_share,
    read_jsonl,
    sampled_row,
    split_update,
    tokenise,
    total_length,
    update_order,
    without_responses,
)
from distill import Distiller, Totals, choose_alignment
from eval import check_device, held_out_cross_entropy, respond
from hub import MODELS, data_file, model_directory
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
    cache_teacher: str | None = option(None, "directory for the teacher's hidden states, which are then computed once")
    valid: str | None = option(None, "named set or JSONL file held out, for valid_ce and samples")
    student_chat: str | None = option(
        None, "chat format of the student's prompts (default: that of the run which trained it here, else none)",
        ["none", *CHATS],
    )  # fmt: skip
    teacher_chat: str | None = option(None, "the same for the teacher's; it may be another one", ["none", *CHATS])
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
    bucket: bool = option(False, "make updates of examples of similar length, for less padding")
    tokens_per_batch: int = option(0, "split updates by length into passes of at most so many tokens (0: --batch-size)")
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
    about = "start from v2's settings for mathematics or code (default: from the papers' settings for the student)"
    parser.add_argument("--task", choices=["math", "code"], default=argparse.SUPPRESS, help=about)
    about = "first fine-tune the teacher on the data, into OUT/teacher (kept if it is finished), and learn from that"
    parser.add_argument("--teacher-sft", action="store_true", default=argparse.SUPPRESS, help=about)
    return vars(parser.parse_args(arguments))


# ---------------------------------------------------------------------------------------------------------------------
# The papers' settings, and the stage before distillation

_LORA = {"epochs": 10, "batch_size": 32, "lr": 1e-3, "lora": 256, "lora_alpha": 8.0, "lora_dropout": 0.1}
_TEACHER = {"epochs": 10, "batch_size": 32, "lr": 2e-5}  # fine-tuned as a whole
RECIPES = {  # the model that is trained, by whatever method, or a task: its settings; the rest are the defaults
    "gpt2": {"epochs": 20, "batch_size": 32, "lr": 5e-4},
    "tinyllama": _LORA,
    "qwen": _TEACHER,
    "llama2": _LORA,
    "mistral": _LORA,
    "math": {"epochs": 3, "batch_size": 128, "lr": 1e-5, "projector_lr": 1e-3, "temperature": 1.0},
    "code": {"epochs": 1, "batch_size": 128, "lr": 1e-5, "projector_lr": 1e-3, "temperature": 1.0},
}
TEACHER_STAGE = (  # options that hold for the teacher too; what else is given is about the student and how it learns
    "data valid max_steps batch_size grad_accum bucket tokens_per_batch max_len max_prompt_len chunk seed dtype "
    "device compile checkpoint_every log_every"
).split()


def recipe_name(given: dict) -> str:
    """Which of RECIPES holds for the given options: --task, else the student's preset; "" if none does."""
    student = given.get("student", "")
    preset = next((name for name in MODELS if student in (name, MODELS[name])), "")
    name = given.get("task", "" if Path(student).is_dir() or given.get("from_scratch") else preset)
    without_lora = given.get("lora") == 0 and "lora" in RECIPES.get(name, {})  # nothing else of it holds then
    return name if name in RECIPES and not without_lora else ""


def divided(recipe: dict) -> dict:
    """A recipe, with its batch divided among all processes."""
    return recipe and {**recipe, "batch_size": max(1, recipe["batch_size"] // parallel.world())}


def settings(given: dict) -> dict:
    """The given options, completed with the recipe that holds for them; without --task and --teacher-sft."""
    options = {name: value for name, value in given.items() if name not in ("task", "teacher_sft")}
    return {**divided(RECIPES.get(recipe_name(given), {})), **options}


def flags(options: dict) -> str:
    """The options as words of a command line."""
    words = []
    for name, value in options.items():
        flag = ("--no-" if value is False else "--") + name.replace("_", "-")
        words += [flag] if isinstance(value, bool) else [flag, shlex.quote(str(value))]
    return " ".join(words)


def say_settings(given: dict) -> None:
    """One line on standard error: what comes from the papers' recipe, and what was given instead of it."""
    name = recipe_name(given)
    recipe = divided(RECIPES.get(name, {}))
    taken = flags({option: value for option, value in recipe.items() if option not in given})
    instead = flags({option: given[option] for option in recipe if option in given})
    line = f"{taken or 'none'} from the papers' for {name}" if name else f"none are published for {given['student']}"
    line += f", given instead: {instead}" if instead else ""
    print(f"settings: {line}; the rest as given, else the defaults", file=sys.stderr)


def teacher_stage(given: dict, out: str) -> dict:
    """The options of the stage that fine-tunes the teacher, as the papers do before they distil it."""
    stage = {"method": "sft", "student": given["teacher"]}
    if given.get("teacher_chat"):
        stage["student_chat"] = given["teacher_chat"]
    stage |= {name: given[name] for name in TEACHER_STAGE if name in given}
    if given.get("shard") in ("teacher", "both"):  # here it is the student
        stage["shard"] = "student"
    return {**divided(RECIPES.get(recipe_name(stage), _TEACHER)), **stage, "out": f"{out}/teacher"}


def run_teacher_stage(given: dict, o: Options) -> Options:
    """Fine-tune the teacher, or keep what is finished; returns the options with that teacher. Raises before the stage
    begins where the run after it could not."""
    if o.method == "sft" or o.dry_run:
        raise ValueError("--teacher-sft belongs to training with a teacher, not to --method sft or --dry-run")
    stage = teacher_stage(given, o.out)
    after = replace(o, teacher=str(Path(stage["out"]) / "student"), teacher_chat=None)
    check_directory(after)
    base, student = model_directory(o.teacher), model_directory(o.student, weights=not o.from_scratch)
    tokenizers = [TextTokenizer(base, o.teacher_chat or chat_of(base)),
                  TextTokenizer(student, o.student_chat or chat_of(student))]  # fmt: skip
    if o.method != "seqkd":
        choose_alignment(o.align, o.method, o.recipe, *tokenizers)
    print(f"teacher: {base}, fine-tuned first:\n    python train.py {flags(stage)}", file=sys.stderr)
    tiny.run_stage(Options(**stage), train, "teacher")
    return after


def say_teacher(given: dict, o: Options) -> None:
    """On standard error: which checkpoint the teacher is and what is known of its training; where that is not on this
    data, the command for it."""
    directory = tiny.find(o.teacher, "teacher") or model_directory(o.teacher)
    run = run_of(directory)
    if run:
        line = f"teacher: {directory}, trained here: --method {run.get('method')} on --data {run.get('data')}"
        same = Path(run.get("data", "")).resolve() == Path(o.data).resolve()
        print(line + ("" if same else f"; this run is on --data {o.data}"), file=sys.stderr)
        return
    published = directory != Path(o.teacher)  # came from the hub, under a preset's or a repository's name
    known = f"the model as {MODELS.get(o.teacher, o.teacher)} publishes it" if published else "of no run (no args.json)"
    which = f"it has not been fine-tuned on --data {o.data}" if published else f"whether it knows {o.data} is not known"
    print(
        f"teacher: {directory}, {known}; {which}. The papers do that first:\n"
        f"    python train.py {flags(teacher_stage(given, o.out))}\n"
        f"and then --teacher {o.out}/teacher/student; --teacher-sft does both",
        file=sys.stderr,
    )


def check(o: Options) -> Options:
    """The options with their defaults filled in. Raises ValueError naming a value that makes no sense."""
    empty = [name for name, value in asdict(o).items() if value in ("", [])]  # argparse makes [] of "--lr=--"
    if empty:
        raise ValueError(f"--{empty[0].replace('_', '-')} is empty; leave it out for the default")
    at_least = {"epochs": 1, "batch_size": 1, "grad_accum": 1, "max_steps": 0, "warmup": 0, "max_len": 2,
                "max_prompt_len": 1, "chunk": 0, "checkpoint_every": 0, "log_every": 1, "weight_decay": 0,
                "projector_lr": 0, "seed": 0, "lora": 0, "seqkd_temperature": 0,
                "tokens_per_batch": 0}  # fmt: skip
    below = {"weight_decay": math.inf, "projector_lr": math.inf, "seqkd_temperature": math.inf, "lora": 2**16,
             "seed": 2**32}  # it is multiplied into the seeds of epochs # fmt: skip
    for name, least in at_least.items():
        value, most = getattr(o, name), below.get(name, 2**31)
        if value is not None and not least <= value < most:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least {least} and below {most}")
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
    if o.teacher_chat not in (None, "none") and o.method == "sft":
        raise ValueError("--teacher-chat belongs to a teacher; --method sft has none, its model is the --student")
    if o.cache_teacher is not None:
        check_cache(o)
    o = check_lora(o)
    for name in ("student", "data") + (() if o.method == "sft" else ("teacher",)):
        if getattr(o, name) is None:
            raise ValueError(f"--{name} is missing: --method {o.method} needs it (no arguments at all: the tiny task)")
    check_processes(o)
    device = o.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_cuda = check_device(device).type == "cuda"
    if on_cuda and parallel.by_torchrun():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if o.method in ("uld", "mined") and o.divergence != "fkl":
        why = {"uld": "compares sorted probabilities by their absolute difference",
               "mined": "takes the gold token where none is aligned, which only the forward KL suits"}  # fmt: skip
        raise ValueError(f"--divergence {o.divergence}: --method {o.method} {why[o.method]}; leave --divergence out")
    if 0 < o.seqkd_temperature < 1e-3:
        raise ValueError(f"--seqkd-temperature {o.seqkd_temperature}: must be 0 (greedy) or at least 0.001")
    if o.seqkd_temperature and o.method != "seqkd":
        raise ValueError(f"--seqkd-temperature belongs to --method seqkd; --method {o.method} generates nothing")
    if o.projectors is not None and o.method != "dskd":
        raise ValueError(f"--projectors belongs to --method dskd; --method {o.method} has none")
    if o.projectors is not None:
        if not Path(o.projectors).is_file():
            raise FileNotFoundError(f"--projectors {o.projectors}: no such file")
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
    by_torchrun, own = parallel.by_torchrun(), f"cuda:{os.environ.get('LOCAL_RANK')}"
    if o.shard and not by_torchrun:
        raise ValueError(f"--shard {o.shard} splits weights over processes: start with torchrun --nproc_per_node=N")
    if o.shard in ("teacher", "both") and o.method in ("sft", "seqkd"):
        raise ValueError(f"--shard {o.shard}: --method {o.method} trains without a teacher; use --shard student")
    if by_torchrun and o.dry_run:
        raise ValueError("--dry-run is for one process: start without torchrun")
    if by_torchrun and o.device not in (None, "cuda", "cpu", own):
        raise ValueError(f"--device {o.device}: torchrun gives each process its own; use cuda, cpu or leave it out")
    if by_torchrun and o.device != "cpu" and 0 < torch.cuda.device_count() <= int(os.environ["LOCAL_RANK"]):
        raise ValueError(f"torchrun started more processes than there are CUDA devices ({torch.cuda.device_count()})")


def check_cache(o: Options) -> None:
    why = ""
    if o.method in ("sft", "seqkd"):
        why = {"sft": "--method sft has no teacher", "seqkd": "--method seqkd keeps the teacher's text, in seqkd.jsonl"}
        why = why[o.method]
    elif o.on_policy:
        why = "with --on-policy the teacher reads responses that are new in every update"
    elif o.dry_run:
        why = "--dry-run is for exact comparisons, and what is cached is rounded to bfloat16"
    elif o.shard in ("teacher", "both"):
        why = f"--shard {o.shard} is for a teacher that runs in every update, and the cache is filled by whole ones"
    if why:
        raise ValueError(f"--cache-teacher {o.cache_teacher}: {why}; leave it out")
    if Path(o.cache_teacher).exists() and not Path(o.cache_teacher).is_dir():
        raise ValueError(f"--cache-teacher {o.cache_teacher}: not a directory")


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
    where: list[str] = field(default_factory=list)  # "file, line 7" of each of `rows`

    def collate(self, rows: list[Row], device):
        pad = self.teacher_tokenizer.eos_id if self.teacher_tokenizer else 0
        return collate(rows, self.student_tokenizer.eos_id, pad).to(device)

    def batches(self, rows: list[Row], o: Options, count: int = 0) -> list:
        """The rows of one update as batches of --batch-size, or of --tokens-per-batch; at least `count` of them, the
        last of which then have no row: processes that share a model's weights must run it equally often."""
        parts = split_update(rows, o.batch_size, o.tokens_per_batch)
        parts += [[]] * (count - len(parts))
        batches = [(part, self.collate(part or self.rows[:1], o.device)) for part in parts]
        return [batch if part else without_responses(batch) for part, batch in batches]


def fit_lengths(o: Options, directories: dict[str, Path]) -> None:
    """Fill in --max-len and --max-prompt-len for these models. Raises ValueError where one has too few positions."""
    files = {name: path / "config.json" for name, path in directories.items()}
    limits = {name: read_config(read_json(file), file).limit for name, file in files.items()}
    if o.max_len is None:
        o.max_len = min(512, *limits.values())
    if o.max_prompt_len is None:
        o.max_prompt_len = max(1, o.max_len // 2)
    for name, limit in limits.items():
        if o.max_len > limit:
            raise ValueError(f"--max-len {o.max_len}: the {name} has only {limit} positions")
    if 0 < o.tokens_per_batch < o.max_len:
        raise ValueError(f"--tokens-per-batch {o.tokens_per_batch}: one example may have --max-len {o.max_len}")


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
    o.student_chat = o.student_chat or chat_of(student_directory)
    student_tokenizer, teacher_tokenizer, teacher = TextTokenizer(student_directory, o.student_chat), None, None
    student_tokenizer.say_if_forgotten("--student-chat")
    align = "none"
    if o.method != "sft":
        teacher_directory = tiny.find(o.teacher, "teacher") or model_directory(o.teacher)
        o.teacher_chat = o.teacher_chat or chat_of(teacher_directory)
        teacher_tokenizer = TextTokenizer(teacher_directory, o.teacher_chat)
        teacher_tokenizer.say_if_forgotten("--teacher-chat")
        if o.method != "seqkd":  # before models are loaded
            align = choose_alignment(o.align, o.method, o.recipe, teacher_tokenizer, student_tokenizer)
    fit_lengths(o, {"student": student_directory} | ({"teacher": teacher_directory} if o.method != "sft" else {}))
    first_lines = o.batch_size if o.dry_run else None
    examples = read_jsonl(*data_file(tiny.find(o.data, "data") or o.data, "train"))
    valid = read_jsonl(*data_file(o.valid, "valid")) if o.valid and not o.dry_run else []

    torch.manual_seed(o.seed)
    if o.from_scratch:
        student = build_model(read_json(student_directory / "config.json"))
    else:
        student = load_model(student_directory, torch.float32)
    student_tokenizer.check_model(student.embed.weight.shape[0])
    if o.lora:
        lora.attach(student, o.lora, o.lora_alpha, o.lora_dropout)
        trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
        print(f"LoRA: {trained:,} of the student's parameters are trained", file=sys.stderr)
    method, dtype = o.method, torch.bfloat16 if o.dtype == "bf16" else torch.float32
    if o.method == "seqkd":  # from here on it is supervised fine-tuning
        with parallel.main_first():
            examples = teacher_answers(
                Path(o.out) / "seqkd.jsonl", examples, teacher_directory, teacher_tokenizer, student_tokenizer,
                o.max_len, o.max_prompt_len, o.seqkd_temperature, o.seed, o.batch_size, o.device, dtype, first_lines,
            )  # fmt: skip
        method, teacher_tokenizer = "sft", None
    examples = examples[:first_lines]
    lengths = o.max_len, o.max_prompt_len
    rows, report = tokenise(examples, student_tokenizer, teacher_tokenizer, *lengths, align)
    print(f"train: {report}", file=sys.stderr)
    if method != "sft":  # frozen, so that half precision is enough where the arithmetic is bf16 anyway
        if o.shard in ("teacher", "both"):
            teacher = parallel.load_sharded(teacher_directory, dtype, o.device)
        else:
            teacher = load_model(teacher_directory, dtype, o.device, body=o.cache_teacher is None)
        teacher_tokenizer.check_model(teacher.embed.weight.shape[0])
        teacher = compiled(teacher.requires_grad_(False)) if o.compile else teacher
    if o.cache_teacher is not None:  # made, if it is not there, while the student is not on the device yet
        cache = TeacherCache(o.cache_teacher, teacher_directory, rows, dtype, o.device, o.batch_size)
        with parallel.main_first():
            cache.attach_states(o.compile)
    if o.shard in ("student", "both"):
        parallel.shard(student, o.device, torch.bfloat16 if o.dtype == "bf16" else None)
    student.to(o.device)

    with parallel.main_first():  # it may leave MinED's map and the teacher's predictions for the others
        distiller = Distiller(
            student, student_tokenizer, teacher, teacher_tokenizer, method, o.recipe, o.align, o.divergence,
            o.temperature, o.kd_rate, o.projectors, o.chunk,
        )  # fmt: skip
        if o.cache_teacher is not None and distiller.predicting_head is not None:
            cache.attach_predictions(distiller.predicting_head)
    valid_rows, report = tokenise(valid, student_tokenizer, None, *lengths)
    if valid:
        print(f"valid: {report}", file=sys.stderr)
    room = min(o.max_prompt_len, o.max_len - 1)
    prompts = [cut_prompt(example, [student_tokenizer], room) for example in (valid or examples)[:5]]
    where = [example.where for example in examples]
    return Pieces(student, student_tokenizer, distiller, teacher_tokenizer, rows, valid_rows, prompts, where)


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
    responses, failure = [], None
    with autocast(o), parallel.gathered(pieces.student):
        try:
            responses = generate(pieces.student, prompts, room, tokenizer.eos_id, seed=seed, vocabulary=tokenizer.size)
        except FloatingPointError as error:
            failure = error
    if parallel.highest(failure is not None):  # all processes have it, or none
        raise failure or FloatingPointError("sample: the logits of another process are not finite")
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
    """One run, from options to a run directory; returns the last logged line. See README.md for what is logged.

    Raises Stopped when Ctrl-C or SIGTERM ended it early, FloatingPointError when a number was not finite.
    """
    o = check(o)
    if torch.device(o.device).type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    else:
        keep_freed_memory()
    if not o.dry_run:
        check_directory(o)
    pieces = load(o)
    student = compiled(pieces.student) if o.compile else pieces.student
    if o.dry_run:
        return dry_run(o, pieces, student)

    with hold_directory(o), StopSignals() as stop:  # only now, when nothing is wrong with the input
        return run_updates(o, pieces, student, stop, description)


def run_updates(o: Options, pieces: Pieces, student, stop: StopSignals, description: str) -> dict[str, float]:
    """The updates of `train` that are still to be done, and the samples at their end."""
    optimizer = make_optimizer(o, pieces)
    updates_per_epoch = -(-len(pieces.rows) // examples_per_update(o))
    first_epoch = ([pieces.rows[i] for i in update] for update in islice(make_order(o, pieces), updates_per_epoch))
    parts = [part for rows in first_epoch for share in split_of_all(o, rows) for part in share]
    print(f"{len(parts)} batches per epoch, {padding_share(parts):.1%} of their positions are padding", file=sys.stderr)
    total = o.max_steps or o.epochs * updates_per_epoch
    checkpoint_every = o.checkpoint_every or updates_per_epoch
    start, counts = restore_checkpoint(o, pieces, optimizer) if o.resume else (0, {})
    log = Log(Path(o.out) / "log.jsonl", start)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parallel.start_alike(parameters)
    if not start and parallel.rank() > 0:  # dropout of its own
        parallel.seed_process(o.seed, start)
    if parallel.highest(start) != start:
        raise ValueError(f"--resume: {o.out} is not the same directory for all processes; they need a shared one")
    pieces.student.train()
    line: dict[str, float] = {}
    every = 0.1 if sys.stderr.isatty() else 30  # seconds; a log file needs no animation
    progress = tqdm(total=total, initial=start, desc=description, unit="update", dynamic_ncols=True, mininterval=every)
    order = make_order(o, pieces, start)
    meter, compiled = Meter(**counts), compilations()
    for step, (indices, rows, batches) in enumerate(ahead(prepared(o, pieces, islice(order, total - start))), start):
        sampled, sampled_batches = [], []
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, total, o.warmup)
        before = random_state(o.device), meter.counts()
        try:
            if is_on_policy(o, step):
                sampled = meter.time_generation(sample_rows, o, pieces, rows, step)
                count = parallel.highest(len(split_update(sampled, o.batch_size, o.tokens_per_batch)))
                sampled_batches = pieces.batches(sampled, o, count)
            terms = accumulate(o, pieces, student, batches, sampled_batches)
            grad_norm = parallel.clip_gradients(parameters, o.clip)
            if not math.isfinite(grad_norm):
                raise FloatingPointError(f"the gradient's norm is {grad_norm}")
        except FloatingPointError as error:
            progress.close()
            about = save_if_finite(o, pieces, optimizer, step, *before)
            file, lines = pieces.where[0].rpartition(", line ")[0], [pieces.where[i].split()[-1] for i in indices[:8]]
            examples = f"{file}, lines {', '.join(lines)}{', ...' * (len(indices) > 8)}"
            raise FloatingPointError(f"update {step + 1}: {error} ({examples}); {about}") from None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        meter.tokens += sum(len(row.student.prompt) + len(row.student.response) for row in rows + sampled)
        if o.on_policy:  # a response that could not be used left the gold one in its place
            used = parallel.add_up([sum(new is not row for new, row in zip(sampled, rows, strict=False))])[0]
            terms["on_policy"] = used / len(indices)
        done = step + 1
        if done % o.log_every == 0 or done == total or step == 0:
            line = {"step": done, "epoch": round(done / updates_per_epoch, 3), **terms, "grad_norm": grad_norm}
            line |= {"lr": optimizer.param_groups[0]["lr"], **meter.read(o.on_policy > 0)}
            if o.compile:
                line["compilations"] = compilations() - compiled
            speed = f"{line['tokens_per_second']:,.0f} tokens/s"
            progress.set_postfix_str(f"loss {terms['loss']:.3f}, {speed}", refresh=False)
            log.write(line)
        progress.update()
        paused, counts = time.perf_counter(), meter.counts()
        due = done % checkpoint_every == 0 or done == total
        stopping = parallel.highest(stop.number)
        if (due or stopping) and not parallel.all_finite(parameters):
            raise FloatingPointError(
                f"update {done}: it left weights that are not finite; those in {o.out} are from before; a lower --lr "
                "or --weight-decay may help"
            )
        if due and pieces.valid_rows:
            line["valid_ce"] = valid_cross_entropy(o, pieces)
            log.write({"step": done, "valid_ce": line["valid_ce"]})
            stopping = parallel.highest(stop.number)  # asked meanwhile
        if due or stopping:
            save_checkpoint(o, pieces, optimizer, done, counts)
        meter.since += time.perf_counter() - paused  # not training
        if stopping:
            progress.close()
            raise Stopped(f"stopped after update {done} of {total}, which is saved in {o.out}", stopping)
    progress.close()
    write_samples(o, pieces)
    if stop.number:  # while it wrote them
        raise Stopped(f"stopped after the last update, which is saved in {o.out}", stop.number)
    return line


def make_order(o: Options, pieces: Pieces, start: int = 0) -> Iterator[list[int]]:
    """The examples of each update from the `start`-th on, as indices."""
    lengths = [total_length(row) for row in pieces.rows] if o.bucket else None
    return update_order(len(pieces.rows), examples_per_update(o), o.seed, start, lengths)


def examples_per_update(o: Options) -> int:
    return o.batch_size * o.grad_accum * parallel.world()


def split_of_all(o: Options, rows: list[Row]) -> list[list[list[Row]]]:
    """The forward passes of every process in an update over these rows."""
    shares = [parallel.share(rows, process) for process in range(parallel.world())]
    return [split_update(share, o.batch_size, o.tokens_per_batch) for share in shares]


def prepared(o: Options, pieces: Pieces, order: Iterator[list[int]]) -> Iterator[tuple]:
    """Each update's indices, and this process's rows and batches of it; all that an update waits for from data that is
    known beforehand."""
    for indices in order:
        rows = [pieces.rows[i] for i in indices]
        count = max(map(len, split_of_all(o, rows)))
        rows = parallel.share(rows, parallel.rank())
        yield indices, rows, pieces.batches(rows, o, count)


def compilations() -> int:
    """How many graphs torch.compile has compiled in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # importing it takes a second, and nothing else may need it
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


def save_if_finite(o: Options, pieces: Pieces, optimizer: torch.optim.AdamW, step: int, random, counts) -> str:
    """Save the state before update `step`, which failed, for whoever looks into it; says where it is."""
    modules = pieces.student, pieces.distiller
    trained = (pair for module in modules for pair in module.named_parameters() if pair[1].requires_grad)
    spoilt = [name for name, parameter in trained if not parallel.local(parameter).isfinite().all()]
    if parallel.highest(len(spoilt)):  # of a sharded one perhaps only in another process
        name = spoilt[0] if spoilt else "a parameter"
        return f"{name} was not finite before it, so that nothing but the last checkpoint is in {o.out}"
    set_random_state(o.device, random)
    save_checkpoint(o, pieces, optimizer, step, counts)
    return f"the state before it is in {o.out}; a new run with a lower --lr or with --dtype fp32 may help"


class Meter:
    """What the time since the last logged line brought; all processes read it together."""

    def __init__(self, seconds=0.0, tokens=0, generating=0.0, generated=0, responses=0):
        self.since, self.tokens = time.perf_counter() - seconds, tokens
        self.generating, self.generated, self.responses = generating, generated, responses

    def counts(self) -> dict[str, float]:
        """For a checkpoint; Meter(**counts) goes on with them."""
        counts = {**vars(self), "seconds": time.perf_counter() - self.since}
        del counts["since"]
        return counts

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
    rows, total = parallel.share(pieces.valid_rows, parallel.rank()), 0.0
    tokens = sum(len(row.student.response) for row in rows)
    with gathered(o, pieces):
        if rows:
            eos_id = pieces.student_tokenizer.eos_id
            total = tokens * held_out_cross_entropy(pieces.student, rows, eos_id, o.device)
    total, tokens = parallel.add_up([total, tokens])
    return total / tokens


def write_samples(o: Options, pieces: Pieces) -> None:
    """samples.txt: greedy responses to a few held-out (else training) prompts."""
    tokenizer = pieces.student_tokenizer
    room = pieces.student.limit - max(len(tokenizer.encode_prompt(prompt)) for prompt in pieces.sample_prompts)
    with gathered(o, pieces):
        if parallel.rank() > 0:
            return
        responses = respond(pieces.student, tokenizer, pieces.sample_prompts, min(128, max(room, 1)))
    shown = zip(pieces.sample_prompts, responses, strict=True)
    text = "\n\n".join(f"### prompt\n{prompt}\n### response\n{response}" for prompt, response in shown)
    write_text(Path(o.out) / "samples.txt", text + "\n")


def main(arguments: list[str] | None = None) -> None:
    with parallel.session():
        given = parse(arguments)
        try:
            run(given)
        except (ValueError, OSError, FloatingPointError) as error:
            sys.exit(f"error: {error}")
        except (KeyboardInterrupt, Stopped) as stopped:  # at once, or after saving
            print(f"\n{str(stopped) or 'stopped at once'}\n{way_on(given, arguments)}", file=sys.stderr)
            sys.exit(128 + getattr(stopped, "number", signal.SIGINT))


def run(given: dict) -> None:
    """What a command line asks for."""
    if not given.keys() & {"student", "teacher", "data"}:
        if given.get("dry_run"):
            raise ValueError("--dry-run needs --teacher, --student and --data: the embedded task trains its own")
        if given.keys() & {"task", "teacher_sft"}:
            raise ValueError("--task, --teacher-sft: the embedded task has its own settings and trains its teacher")
        if parallel.by_torchrun():
            raise ValueError("torchrun needs --student and --data: the embedded task is for one process")
        names = {"student": "tiny", "teacher": "tiny", "data": "tiny"}
        check(Options(**{**tiny.DEFAULTS, **given, **names}))  # before anything is made
        tiny.run(given, Options, train)
        return
    o = check(Options(**settings(given)))
    say_settings(given)
    if given.get("teacher_sft"):
        o = run_teacher_stage(given, o)
    elif o.method != "sft":
        say_teacher(given, o)
    if o.dry_run:
        print(json.dumps(train(o)))
    else:
        train(o)
        print(f"student: {Path(o.out) / 'student'}")


def way_on(given: dict, arguments: list[str] | None) -> str:
    """How to continue the command that was given."""
    start = ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"] if parallel.by_torchrun() else ["python"]
    words = [*start, sys.argv[0], *(sys.argv[1:] if arguments is None else arguments)]
    embedded = not given.keys() & {"student", "teacher", "data"}
    out = Path(given.get("out", f"runs/{given.get('method', Options.method)}"))
    if embedded or (out / "args.json").is_file():
        return f"go on with: {shlex.join(words + ['--resume'] * ('resume' not in given))}"
    return f"there is nothing yet to go on with; start again with: {shlex.join(words)}"


if __name__ == "__main__":
    main()
