"""The command line of train.py: every option, the values that the papers publish, and what makes no sense."""

import argparse
import math
import os
import shlex
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import get_args, get_type_hints

import torch
from safetensors import SafetensorError, safe_open

from data import CHATS
from losses import DIVERGENCES
from runtime import parallel
from runtime.hub import MODELS
from runtime.strict import check_device, check_values

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
    keep_best: str | None = option(
        None, "leave in student/ not the last checkpoint but the one with the best score on --valid: Rouge-L of a "
        "response sampled to each prompt, or cross-entropy", ["rouge", "ce"],
    )  # fmt: skip
    student_chat: str | None = option(
        None, "chat format of the student's prompts (default: that of the run which trained it here, else none)",
        ["none", *CHATS],
    )  # fmt: skip
    teacher_chat: str | None = option(None, "the same for the teacher's; it may be another one", ["none", *CHATS])
    bos: bool | None = option(
        None, "begin each prompt as the model's own tokenizer begins a text, with <s> for instance (default: as in the "
        "run which trained the model here, else not)",
    )  # fmt: skip
    method: str = option("dskd", "what to train with", ["sft", "seqkd", "kd", "dskd", "uld", "mined"])
    recipe: str = option("v2", "which of the two papers DSKD follows", ["v1", "v2"])
    align: str = option("auto", "auto: none for equal vocabularies, else eta (v2) or cma (v1)", ["auto", *ALIGNMENTS])
    divergence: str = option("fkl", "D(student, teacher)", list(DIVERGENCES))
    kd_rate: float = option(0.5, "share of the distillation term, the rest is cross-entropy with the gold tokens")
    temperature: float = option(2.0, "divides all logits inside the divergence")
    on_policy: float = option(0.0, "probability that an update distils on responses sampled from the student")
    on_policy_after: int = option(0, "epochs before the first on-policy update (the official run: 3)")
    seqkd_temperature: float = option(0.0, "of the teacher's answers with --method seqkd; 0 is greedy")
    projectors: str | None = option(None, "safetensors file: t2s, s2t, query (.weight, .bias) to start from and train")
    from_scratch: bool = option(False, "initialise the student at random from its config.json")
    lora: int = option(0, "rank of the student's LoRA adapters, which alone are trained (0: train all of it)")
    lora_targets: list | None = option(  # of str
        None, "linear layers that get an adapter: names as in peft, or all-linear for all but the head (default: "
        "peft's and so the papers', q_proj v_proj or GPT-2's c_attn)",
    )  # fmt: skip
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
    weight_decay: float = option(1e-2, "AdamW's: on the student's matrices, and on all of the projectors")
    warmup: int = option(0, "updates of linear warm-up; cosine decay to zero follows")
    clip: float = option(1.0, "largest norm of the whole gradient")
    max_len: int | None = option(None, "tokens of a whole example, per model (default: 512, or all a model has)")
    max_prompt_len: int | None = option(None, "tokens of the prompt, per model (default: half of --max-len, 256)")
    chunk: int = option(512, "tokens whose logits are in memory at once (0: all, with the plain losses)")
    recompute: bool = option(False, "less memory, more time: keep only the inputs of the student's blocks for backward")
    seed: int = option(42, "of initialisation, data order and dropout")
    dtype: str | None = option(
        None, "bf16: autocast (default on CUDA). Weights and losses stay float32; on CUDA, also with fp32, products of "
        "float32 are TF32's, whose factors have 10 bits instead of 23", DTYPES,
    )  # fmt: skip
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


def parse(arguments: list[str] | None = None, description: str | None = None) -> dict:
    """The options that were given on the command line: {field of Options: value}."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for entry in fields(Options):
        flag, kind = "--" + entry.name.replace("_", "-"), get_type_hints(Options)[entry.name]
        kind = next((part for part in get_args(kind) if part is not NoneType), kind)  # str of "str | None"
        about = entry.metadata["help"] + ("" if not entry.default else f" (default: {entry.default})")
        common = {"default": argparse.SUPPRESS, "help": about}
        if kind is bool:  # a switch that may be left open has a --no- form too
            action = argparse.BooleanOptionalAction if entry.default is None else "store_true"
            parser.add_argument(flag, action=action, **common)
        elif kind is list:
            parser.add_argument(flag, nargs="+", **common)
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
    "data valid bos keep_best max_steps batch_size grad_accum bucket tokens_per_batch max_len max_prompt_len chunk "
    "recompute seed dtype device compile checkpoint_every log_every"
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


# ---------------------------------------------------------------------------------------------------------------------
# What makes no sense


def check(o: Options) -> Options:
    """The options with their defaults filled in. Raises ValueError naming a value that makes no sense."""
    at_least = {"epochs": 1, "batch_size": 1, "grad_accum": 1, "max_steps": 0, "warmup": 0, "max_len": 2,
                "max_prompt_len": 1, "chunk": 0, "checkpoint_every": 0, "log_every": 1, "weight_decay": 0,
                "projector_lr": 0, "seed": 0, "lora": 0, "seqkd_temperature": 0,
                "tokens_per_batch": 0, "on_policy_after": 0}  # fmt: skip
    below = {"weight_decay": math.inf, "projector_lr": math.inf, "seqkd_temperature": math.inf, "lora": 2**16,
             "seed": 2**32}  # it is multiplied into the seeds of epochs # fmt: skip
    check_values(asdict(o), at_least, below)
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
    if o.on_policy_after and not o.on_policy:
        raise ValueError(f"--on-policy-after {o.on_policy_after} belongs to --on-policy, which is not given")
    if o.on_policy_after >= o.epochs and not o.max_steps:
        why = f"the run ends after --epochs {o.epochs}, so that no update would be on-policy"
        raise ValueError(f"--on-policy-after {o.on_policy_after}: {why}")
    if o.teacher_chat not in (None, "none") and o.method == "sft":
        raise ValueError("--teacher-chat belongs to a teacher; --method sft has none, its model is the --student")
    if o.keep_best and o.valid is None:
        raise ValueError(f"--keep-best {o.keep_best} is by the scores on held-out examples: give them with --valid")
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
            raise FileNotFoundError(f"--projectors {o.projectors}: not a readable safetensors file (no such file)")
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
    alpha, dropout, targets = o.lora_alpha, o.lora_dropout, o.lora_targets
    if not o.lora:
        if alpha is not None or dropout is not None or targets is not None:
            raise ValueError(
                "--lora-targets, --lora-alpha and --lora-dropout belong to --lora RANK, which is not given"
            )
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
    if targets is not None:  # with commas or spaces between, in one order, which is what --resume compares
        targets = sorted(set(" ".join(targets).replace(",", " ").split()))
    return replace(o, lora_alpha=alpha, lora_dropout=dropout, lora_targets=targets)
