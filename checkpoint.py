"""What a run leaves on disk: `args.json`, `log.jsonl`, `student/` for the world, and `resume/` for going on exactly.

In all functions `o` holds the options of a run, `pieces` its models and data: `Options` and `Pieces` of train.py.
"""

import copy
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import lora
import parallel
from hub import MODELS
from model import Decoder, save_model

TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json generation_config.json chat_template.jinja "
    "added_tokens.json vocab.json merges.txt tokenizer.model"
).split()  # what a student's directory hands on to what was trained from it


def save_checkpoint(o, pieces, optimizer: torch.optim.AdamW, step: int) -> None:
    """student/ as a Hugging Face directory, projectors.safetensors with those that are trained, and
    resume/state.safetensors with all that an exact continuation needs: one file, replaced at once, so of one update.
    With LoRA student/ has the adapters merged into its weights, and adapter/ has them alone, as peft does.

    Process 0 writes, but all processes have to call it: a sharded student is put together, and nothing that is written
    depends on how it was sharded, or on the number of processes; but random.*, which has a row for each.
    """
    student = whole_copy(o, pieces.student) if parallel.is_sharded(pieces.student) else pieces.student
    tensors = state_tensors(o, pieces, optimizer)
    if parallel.rank() == 0:
        write_checkpoint(o, pieces, student, tensors, step)


def write_checkpoint(o, pieces, student: torch.nn.Module, tensors: dict[str, torch.Tensor], step: int) -> None:
    out = Path(o.out)
    if o.lora:
        base = str(Path(o.student).resolve()) if Path(o.student).is_dir() else MODELS.get(o.student, o.student)
        lora.save_adapter(student, out / "adapter", base)
        save_model(merged_copy(student), out / "student")
    else:
        save_model(student, out / "student")
    for file in TOKENIZER_FILES:
        source = pieces.student_tokenizer.directory / file
        if source.is_file():
            (out / "student" / file).write_bytes(source.read_bytes())
    (out / "resume").mkdir(exist_ok=True)
    new = out / "resume" / "state.safetensors.new"
    trained = [name for name, parameter in pieces.distiller.named_parameters() if parameter.requires_grad]
    if trained:
        save_file({name.removeprefix("projectors."): tensors[name] for name in trained}, out / "projectors.safetensors")
    save_file(tensors, new, metadata={"step": str(step)})
    os.replace(new, out / "resume" / "state.safetensors")


def state_tensors(o, pieces, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """What resume/ holds, whole and on the CPU of process 0: what is trained, the optimiser's state of it, and random
    states."""
    trained = {f"student.{name}": p for name, p in pieces.student.named_parameters() if p.requires_grad}
    trained |= dict(pieces.distiller.named_parameters())  # projectors.t2s.weight, ...
    placed, tensors = dict(trained), {}
    for name, parameter in trained.items():
        state = optimizer.state.get(parameter, {})  # a projector that is solved has none
        placed |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
    for name, value in placed.items():
        value = parallel.whole(value.detach())
        if parallel.rank() == 0:
            tensors[name] = value.cpu().contiguous().clone()
    tensors["random.cpu"] = parallel.gather(torch.get_rng_state())
    if torch.device(o.device).type == "cuda":
        tensors["random.cuda"] = parallel.gather(torch.cuda.get_rng_state(o.device))
    return tensors


def whole_copy(o, student: torch.nn.Module) -> torch.nn.Module:
    """A sharded student put together on the CPU of process 0; other processes get a model without weights."""
    with torch.device("meta"):
        copied = Decoder(student.config)
        if o.lora:
            lora.attach(copied, o.lora, o.lora_alpha)
    for name, parameter in student.named_parameters():
        tensor = parallel.whole(parameter.detach())
        if parallel.rank() == 0:
            copied.load_state_dict({name: tensor.cpu()}, strict=False, assign=True)
    return copied


def merged_copy(student: torch.nn.Module) -> torch.nn.Module:
    """The student with its adapters merged, on the CPU. In place would round the weights that training goes on from."""
    on_cpu = {id(p): torch.nn.Parameter(p.detach().cpu(), requires_grad=False) for p in student.parameters()}
    return lora.merge(copy.deepcopy(student, on_cpu))  # deepcopy takes its copies of the parameters from there


def restore_checkpoint(o, pieces, optimizer: torch.optim.AdamW) -> int:
    """Take up the state that `save_checkpoint` left, if it came to that; returns the number of updates done."""
    path = Path(o.out) / "resume" / "state.safetensors"
    if not path.is_file():
        return 0
    with safe_open(path, "pt") as file:
        tensors, step = {name: file.get_tensor(name) for name in file.keys()}, int(file.metadata()["step"])
    trained = {f"student.{name}": p for name, p in pieces.student.named_parameters() if p.requires_grad}
    trained |= dict(pieces.distiller.named_parameters())  # with LoRA the rest of the student is as --student has it
    with torch.no_grad():
        for name, parameter in trained.items():
            parallel.copy_into(parameter, tensors[name])
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if (value := tensors.get(f"optimizer.{name}.{key}")) is not None:
                    placed = value.to(o.device, copy=True) if key == "step" else parallel.like(parameter, value)
                    optimizer.state[parameter][key] = placed
    if len(tensors["random.cpu"]) != parallel.world():  # no state for each process: draws that were not made before
        parallel.seed_process(o.seed, step)
        return step
    torch.set_rng_state(tensors["random.cpu"][parallel.rank()].clone())  # a row of its own, not a view
    if torch.device(o.device).type == "cuda":
        torch.cuda.set_rng_state(tensors["random.cuda"][parallel.rank()].clone(), o.device)
    return step


def check_directory(o) -> None:
    """Raises unless --out is free for a new run, or --resume is given and it holds this very run."""
    out, record = Path(o.out), record_of(o)
    if o.resume and not (out / "args.json").is_file():
        raise FileNotFoundError(f"--resume: {out} holds no run; start without --resume")
    if o.resume:
        before = json.loads((out / "args.json").read_text())
        check_update_size(o, before)
        free = {"batch_size", "grad_accum", "processes", "shard"}  # as long as an update is over as many examples
        changed = {name for name in record.keys() - free if record[name] not in (None, before.get(name))}
        if changed:
            name = sorted(changed)[0]
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"--resume: {flag} is {record[name]!r}, but {out} was started with {before.get(name)!r}")
    elif out.is_file():
        raise FileExistsError(f"--out {out} is a file: give another --out")
    elif (out / "args.json").exists() or (out / "student").exists():
        raise FileExistsError(f"{out} already holds a run: give another --out, or --resume to go on with it")


def record_of(o) -> dict:
    """What args.json says."""
    return {**asdict(replace(o, resume=False)), "processes": parallel.world()}


def check_update_size(o, before: dict) -> None:
    """Raises ValueError unless a resumed run's updates are over as many examples as those of the run `before`, and so
    over the same ones, however they are split over processes and forward passes."""
    asked, size = (x["batch_size"] * x["grad_accum"] * x.get("processes", 1) for x in (record_of(o), before))
    each, rest = divmod(size, parallel.world())
    if asked == size:
        return
    was = f"--resume: an update of {o.out} is over {size} examples"
    now = f"{o.batch_size} --grad-accum {o.grad_accum} with {parallel.world()} process(es) makes {asked}"
    if rest:
        raise ValueError(f"{was}, --batch-size {now}; that number of processes does not divide {size}")
    fits = max(n for n in range(1, min(each, before["batch_size"]) + 1) if each % n == 0)
    raise ValueError(f"{was}, --batch-size {now}: use --batch-size {fits} --grad-accum {each // fits}")


def start_directory(o) -> None:
    """The run directory with args.json."""
    Path(o.out).mkdir(parents=True, exist_ok=True)
    (Path(o.out) / "args.json").write_text(json.dumps(record_of(o), indent=1) + "\n")


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
