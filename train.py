"""Distil a teacher into a student: the command line and the one training loop.

    python train.py                                                the embedded tiny task, to the end
    python train.py --teacher qwen --student gpt2 --data dolly     the papers' pair
    python train.py --teacher DIR --student DIR --data FILE.jsonl  your own

The loop is `train`; what one update does is in distill.py; what the terms mean is in losses.py.
"""

import argparse
import ctypes
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from types import NoneType
from typing import get_args, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import tiny
from data import Row, TextTokenizer, collate, read_jsonl, tokenise, update_order
from distill import Distiller, choose_alignment
from eval import held_out_cross_entropy, respond
from hub import data_file, model_directory
from losses import DIVERGENCES
from model import build_model, load_model, read_json, save_model
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
    seqkd_temperature: float = option(0.0, "of the teacher's answers with --method seqkd; 0 is greedy")
    projectors: str | None = option(None, "safetensors file: start from t2s, s2t, query (.weight, .bias) given there")
    from_scratch: bool = option(False, "initialise the student at random from its config.json")
    epochs: int = option(20, "passes over the data")
    max_steps: int = option(0, "updates, instead of --epochs (0: by epochs)")
    batch_size: int = option(32, "examples per forward pass")
    grad_accum: int = option(1, "forward passes per update")
    lr: float = option(5e-4, "peak learning rate of the student")
    projector_lr: float = option(0.0, "peak learning rate of the projectors (0: the papers' 1e-3 for v1, 5e-4 for v2)")
    weight_decay: float = option(1e-2, "AdamW's, on matrices only")
    warmup: int = option(0, "updates of linear warm-up; cosine decay to zero follows")
    clip: float = option(1.0, "largest norm of the whole gradient")
    max_len: int = option(512, "tokens of prompt, response and end-of-text together, per model")
    max_prompt_len: int = option(256, "tokens of the prompt, per model")
    chunk: int = option(512, "tokens whose logits are in memory at once (0: all, with the plain losses)")
    seed: int = option(42, "of initialisation, data order and dropout")
    dtype: str | None = option(None, "bf16: autocast; weights and losses stay float32 (default on CUDA)", DTYPES)
    device: str | None = option(None, "cuda, cuda:1, cpu, ... (default: cuda if there is one)")
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
                "projector_lr": 0, "seed": 0, "seqkd_temperature": 0}  # fmt: skip
    for name, least in at_least.items():
        if not least <= getattr(o, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(o, name)}: must be at least {least} and finite")
    if o.seed >= 2**32:
        raise ValueError(f"--seed {o.seed}: must be below 2**32, since it is multiplied into the seeds of epochs")
    for name in ("lr", "temperature", "clip"):
        if not 0 < getattr(o, name) < math.inf:
            raise ValueError(f"--{name} {getattr(o, name)}: must be positive and finite")
    if not 0 <= o.kd_rate <= 1:
        raise ValueError(f"--kd-rate {o.kd_rate}: must be between 0 (only gold labels) and 1 (only the teacher)")
    for name in ("student", "data") + (() if o.method == "sft" else ("teacher",)):
        if getattr(o, name) is None:
            raise ValueError(f"--{name} is missing: --method {o.method} needs it (no arguments at all: the tiny task)")
    device = o.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        on_cuda = torch.device(device).type == "cuda"
    except RuntimeError as error:
        raise ValueError(f"--device {device}: not a device; use cuda, cuda:1, cpu, ...") from error
    if on_cuda and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: this machine has no CUDA device; use --device cpu")
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


def check_model(o: Options, name: str, model, tokenizer: TextTokenizer) -> None:
    """Raises ValueError unless the model fits its tokenizer and has room for --max-len tokens."""
    tokenizer.check_model(model.embed.weight.shape[0])
    if o.max_len > model.limit:
        raise ValueError(f"--max-len {o.max_len}: the {name} has only {model.limit} positions")


def load(o: Options) -> Pieces:
    """Everything a run needs. Whatever is wrong with the input is found here, before the first update."""
    student_directory = tiny.find(o.student, "student") or model_directory(o.student, weights=not o.from_scratch)
    student_tokenizer, teacher_tokenizer, teacher = TextTokenizer(student_directory), None, None
    if o.method != "sft":
        teacher_directory = tiny.find(o.teacher, "teacher") or model_directory(o.teacher)
        teacher_tokenizer = TextTokenizer(teacher_directory)
        if o.method != "seqkd":  # before models are loaded
            choose_alignment(o.align, o.method, o.recipe, teacher_tokenizer, student_tokenizer)
    first_lines = o.batch_size if o.dry_run else None
    examples = read_jsonl(*data_file(tiny.find(o.data, "data") or o.data, "train"))
    valid = read_jsonl(*data_file(o.valid, "valid")) if o.valid and not o.dry_run else []

    torch.manual_seed(o.seed)
    if o.from_scratch:
        student = build_model(read_json(student_directory / "config.json")).to(o.device)
    else:
        student = load_model(student_directory, torch.float32, o.device)
    check_model(o, "student", student, student_tokenizer)
    method, dtype = o.method, torch.bfloat16 if o.dtype == "bf16" else torch.float32
    if o.method == "seqkd":  # from here on it is supervised fine-tuning
        examples = teacher_answers(
            Path(o.out) / "seqkd.jsonl", examples, teacher_directory, teacher_tokenizer, student_tokenizer, o.max_len,
            o.max_prompt_len, o.seqkd_temperature, o.seed, o.batch_size, o.device, dtype, first_lines,
        )  # fmt: skip
        method, teacher_tokenizer = "sft", None
    examples = examples[:first_lines]
    if method != "sft":  # frozen, so that half precision is enough where the arithmetic is bf16 anyway
        teacher = load_model(teacher_directory, dtype, o.device)
        check_model(o, "teacher", teacher, teacher_tokenizer)

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
    prompts = [example.prompt_text() for example in (valid or examples)[:5]]
    return Pieces(student, student_tokenizer, distiller, teacher_tokenizer, rows, valid_rows, prompts)


# ---------------------------------------------------------------------------------------------------------------------
# One update


def accumulate(o: Options, pieces: Pieces, student, batches: list) -> dict[str, float]:
    """Loss terms of one update over its batches, with their gradient added up. Raises FloatingPointError for a term
    that is not finite, naming it."""
    distiller = pieces.distiller
    autocast = torch.autocast(torch.device(o.device).type, torch.bfloat16, enabled=o.dtype == "bf16")
    distiller.refresh(pieces.student)
    with autocast:
        states = [distiller.teacher_states(batch) for batch in batches]
        totals = distiller.totals(pieces.student, batches, states)
    sums: dict[str, float] = {}
    for batch, state in zip(batches, states, strict=True):
        with autocast:
            terms = distiller.loss(student, batch, state, totals)
        values = torch.stack([value.detach().double() for value in terms.values()]).tolist()  # one wait for the device
        for name, value in zip(terms, values, strict=True):
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} is {value}")
            sums[name] = sums.get(name, 0.0) + value
        terms["loss"].backward()
    return summarise(sums, batches, totals.tokens, distiller.align)


def summarise(sums: dict[str, float], batches: list, tokens: int, align: str) -> dict[str, float]:
    """Counts turned into the ratios that are logged."""
    sums["accuracy"] = sums.pop("correct") / tokens
    agreeing, pairs = sums.pop("agreeing", None), sums.pop("pairs", None)
    if agreeing is not None:
        sums["t2s_agreement"] = agreeing / max(pairs, 1)
    if align in ("eta", "mined"):
        ratios = [ratio for batch in batches for ratio in batch.align_ratios]
        sums["align_ratio"] = sum(ratios) / len(ratios)
    sums["student_tokens"] = tokens
    if batches[0].teacher is not None:
        sums["teacher_tokens"] = sum(len(batch.teacher.labels) for batch in batches)
    return sums


def make_optimizer(o: Options, pieces: Pieces) -> torch.optim.AdamW:
    """AdamW: weight decay on the student's matrices, none on its vectors; the projectors have their own rate."""
    parameters = list(pieces.student.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "lr": o.lr, "weight_decay": o.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "lr": o.lr, "weight_decay": 0.0},
    ]
    projectors = [p for p in pieces.distiller.parameters() if p.requires_grad]
    if projectors:
        groups.append({"params": projectors, "lr": o.projector_lr, "weight_decay": o.weight_decay})
    for group in groups:
        group["peak"] = group["lr"]
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=torch.device(o.device).type in ("cuda", "cpu"))


def schedule(step: int, total: int, warmup: int) -> float:
    """Share of the peak learning rate at update `step` of `total`: linear warm-up, then cosine decay to zero."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: student/ for the world, resume/ for going on


def save_checkpoint(o: Options, pieces: Pieces, optimizer: torch.optim.AdamW, step: int) -> None:
    """student/ as a Hugging Face directory, projectors.safetensors with those that are trained, and
    resume/state.safetensors with all that an exact continuation needs: one file, replaced at once, so of one update.
    """
    out = Path(o.out)
    save_model(pieces.student, out / "student")
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        source = pieces.student_tokenizer.directory / file
        if source.is_file():
            (out / "student" / file).write_bytes(source.read_bytes())
    tensors = {f"student.{name}": value for name, value in pieces.student.named_parameters()}
    tensors |= dict(pieces.distiller.named_parameters())  # projectors.t2s.weight, ...
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    (out / "resume").mkdir(exist_ok=True)
    new = out / "resume" / "state.safetensors.new"
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    trained = [name for name, parameter in pieces.distiller.named_parameters() if parameter.requires_grad]
    if trained:
        save_file({name.removeprefix("projectors."): tensors[name] for name in trained}, out / "projectors.safetensors")
    save_file(tensors, new, metadata={"step": str(step)})
    os.replace(new, out / "resume" / "state.safetensors")


def restore_checkpoint(o: Options, pieces: Pieces, optimizer: torch.optim.AdamW) -> int:
    """Take up the state that `save_checkpoint` left, if it came to that; returns the number of updates done."""
    path = Path(o.out) / "resume" / "state.safetensors"
    if not path.is_file():
        return 0
    with safe_open(path, "pt") as file:
        tensors, step = {name: file.get_tensor(name) for name in file.keys()}, int(file.metadata()["step"])
    state: dict[int, dict] = {}
    with torch.no_grad():
        for name, parameter in pieces.student.named_parameters():
            parameter.copy_(tensors[f"student.{name}"])
        for name, parameter in pieces.distiller.named_parameters():
            parameter.copy_(tensors[name])
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    return step


def check_directory(o: Options) -> None:
    """Raises unless --out is free for a new run, or --resume is given and it holds this very run."""
    out, record = Path(o.out), asdict(replace(o, resume=False))
    if o.resume and not (out / "args.json").is_file():
        raise FileNotFoundError(f"--resume: {out} holds no run; start without --resume")
    if o.resume:
        before = json.loads((out / "args.json").read_text())
        changed = {name for name in record if record[name] != before.get(name)}
        if changed:
            name = sorted(changed)[0]
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"--resume: {flag} is {record[name]!r}, but {out} was started with {before.get(name)!r}")
    elif out.is_file():
        raise FileExistsError(f"--out {out} is a file: give another --out")
    elif (out / "args.json").exists() or (out / "student").exists():
        raise FileExistsError(f"{out} already holds a run: give another --out, or --resume to go on with it")


def start_directory(o: Options) -> None:
    """The run directory with args.json."""
    Path(o.out).mkdir(parents=True, exist_ok=True)
    (Path(o.out) / "args.json").write_text(json.dumps(asdict(replace(o, resume=False)), indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def keep_freed_memory() -> None:
    """On Linux's C library: keep large freed buffers instead of giving them back to the system after every use, which
    then hands them out again page by page, zeroed. On a CPU that is up to half of a training step."""
    libc = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no buffer of its own mapping
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def train(o: Options, description: str = "train") -> dict[str, float]:
    """One run, from options to a run directory; returns the last logged line. See README.md for what is logged."""
    o = check(o)
    if torch.device(o.device).type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    else:
        keep_freed_memory()
    if not o.dry_run:
        check_directory(o)
    pieces = load(o)
    student = torch.compile(pieces.student, dynamic=True) if o.compile else pieces.student
    if o.dry_run:
        return dry_run(o, pieces, student)

    start_directory(o)  # only now, when nothing is wrong with the input
    optimizer = make_optimizer(o, pieces)
    per_update = o.batch_size * o.grad_accum
    updates_per_epoch = -(-len(pieces.rows) // per_update)
    total = o.max_steps or o.epochs * updates_per_epoch
    checkpoint_every = o.checkpoint_every or updates_per_epoch
    start = restore_checkpoint(o, pieces, optimizer) if o.resume else 0
    log = Log(Path(o.out) / "log.jsonl", start)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    pieces.student.train()
    line: dict[str, float] = {}
    every = 0.1 if sys.stderr.isatty() else 30  # seconds; a log file needs no animation
    progress = tqdm(total=total, initial=start, desc=description, unit="update", dynamic_ncols=True, mininterval=every)
    order = update_order(len(pieces.rows), per_update, o.seed, start)
    clock, clock_tokens = time.perf_counter(), 0
    for step, indices in enumerate(islice(order, total - start), start):
        rows = [pieces.rows[i] for i in indices]
        batches = [pieces.collate(rows[i : i + o.batch_size], o.device) for i in range(0, len(rows), o.batch_size)]
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, total, o.warmup)
        try:
            terms = accumulate(o, pieces, student, batches)
            grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, o.clip))
            if not math.isfinite(grad_norm):
                raise FloatingPointError(f"the gradient's norm is {grad_norm}")
        except FloatingPointError as error:
            raise FloatingPointError(
                f"update {step + 1}: {error} (examples {indices[:8]}{'...' * (len(indices) > 8)}); the weights of the "
                f"last checkpoint are in {o.out}; a lower --lr or --dtype fp32 may help"
            ) from None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        clock_tokens += sum(len(row.student.prompt) + len(row.student.response) for row in rows)
        done = step + 1
        if done % o.log_every == 0 or done == total or step == start:
            now = time.perf_counter()
            speed, clock, clock_tokens = clock_tokens / (now - clock), now, 0
            line = {"step": done, "epoch": round(done / updates_per_epoch, 3), **terms, "grad_norm": grad_norm}
            line |= {"lr": optimizer.param_groups[0]["lr"], "tokens_per_second": round(speed, 1)}
            progress.set_postfix_str(f"loss {terms['loss']:.3f}, {speed:,.0f} tokens/s", refresh=False)
            log.write(line)
        progress.update()
        if done % checkpoint_every == 0 or done == total:
            if pieces.valid_rows:
                eos_id = pieces.student_tokenizer.eos_id
                line["valid_ce"] = held_out_cross_entropy(pieces.student, pieces.valid_rows, eos_id, o.device)
                log.write({"step": done, "valid_ce": line["valid_ce"]})
            save_checkpoint(o, pieces, optimizer, done)
            clock = time.perf_counter()
    progress.close()
    write_samples(o, pieces)
    return line


class Log:
    """log.jsonl: one JSON object per line, written at once; lines after the point of resumption are dropped."""

    def __init__(self, path: Path, start: int):
        self.path = path
        kept = []
        if start and path.is_file():
            kept = [line for line in path.read_text().split("\n") if line and json.loads(line)["step"] <= start]
        path.write_text("".join(line + "\n" for line in kept))

    def write(self, line: dict) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


def dry_run(o: Options, pieces: Pieces, student) -> dict[str, float]:
    """The loss terms and the student's gradient norm on the first batch; dropout is off, so that others can compare."""
    pieces.student.eval()
    terms = accumulate(o, pieces, student, [pieces.collate(pieces.rows, o.device)])
    gradients = [p.grad.flatten() for p in pieces.student.parameters() if p.grad is not None]
    terms["grad_norm"] = float(torch.cat(gradients).norm())
    names = "loss ce kd t2s_ce t2s_kd s2t_kd t2s_agreement align_ratio student_tokens teacher_tokens grad_norm".split()
    return {name: terms[name] for name in names if name in terms}


def write_samples(o: Options, pieces: Pieces) -> None:
    """samples.txt: greedy responses to a few held-out (else training) prompts."""
    room = pieces.student.limit - max(len(pieces.student_tokenizer.encode(prompt)) for prompt in pieces.sample_prompts)
    responses = respond(pieces.student, pieces.student_tokenizer, pieces.sample_prompts, min(128, max(room, 1)))
    shown = zip(pieces.sample_prompts, responses, strict=True)
    text = "\n\n".join(f"### prompt\n{prompt}\n### response\n{response}" for prompt, response in shown)
    (Path(o.out) / "samples.txt").write_text(text + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    try:
        if not given.keys() & {"student", "teacher", "data"}:
            check(Options(**given, student="tiny", teacher="tiny", data="tiny"))  # before anything is made
            tiny.run(given, Options, train)
            return
        o = Options(**given)
        if o.dry_run:
            print(json.dumps(train(o)))
        else:
            train(o)
            print(f"student: {Path(check(o).out) / 'student'}")
    except (ValueError, FileNotFoundError, FileExistsError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
