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
from hub import MODELS
from model import save_model

TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json generation_config.json chat_template.jinja "
    "added_tokens.json vocab.json merges.txt tokenizer.model"
).split()  # what a student's directory hands on to what was trained from it


def save_checkpoint(o, pieces, optimizer: torch.optim.AdamW, step: int) -> None:
    """student/ as a Hugging Face directory, projectors.safetensors with those that are trained, and
    resume/state.safetensors with all that an exact continuation needs: one file, replaced at once, so of one update.
    With LoRA student/ has the adapters merged into its weights, and adapter/ has them alone, as peft does.
    """
    out = Path(o.out)
    if o.lora:
        base = str(Path(o.student).resolve()) if Path(o.student).is_dir() else MODELS.get(o.student, o.student)
        lora.save_adapter(pieces.student, out / "adapter", base)
        save_model(merged_copy(pieces.student), out / "student")
    else:
        save_model(pieces.student, out / "student")
    for file in TOKENIZER_FILES:
        source = pieces.student_tokenizer.directory / file
        if source.is_file():
            (out / "student" / file).write_bytes(source.read_bytes())
    if pieces.student_tokenizer.chat != "none":
        pieces.student_tokenizer.write_end(out / "student")
    tensors = {f"student.{name}": value for name, value in pieces.student.named_parameters() if value.requires_grad}
    tensors |= dict(pieces.distiller.named_parameters())  # projectors.t2s.weight, ...
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.device(o.device).type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(o.device)
    (out / "resume").mkdir(exist_ok=True)
    new = out / "resume" / "state.safetensors.new"
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    trained = [name for name, parameter in pieces.distiller.named_parameters() if parameter.requires_grad]
    if trained:
        save_file({name.removeprefix("projectors."): tensors[name] for name in trained}, out / "projectors.safetensors")
    save_file(tensors, new, metadata={"step": str(step)})
    os.replace(new, out / "resume" / "state.safetensors")


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
    state: dict[int, dict] = {}
    with torch.no_grad():
        for name, parameter in pieces.student.named_parameters():
            if parameter.requires_grad:  # with LoRA the rest is as --student has it
                parameter.copy_(tensors[f"student.{name}"])
        for name, parameter in pieces.distiller.named_parameters():
            parameter.copy_(tensors[name])
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["random.cpu"])
    if torch.device(o.device).type == "cuda":
        torch.cuda.set_rng_state(tensors["random.cuda"], o.device)
    return step


def check_directory(o) -> None:
    """Raises unless --out is free for a new run, or --resume is given and it holds this very run; options that are None
    then take the value of that run."""
    out, record = Path(o.out), asdict(replace(o, resume=False))
    if o.resume and not (out / "args.json").is_file():
        raise FileNotFoundError(f"--resume: {out} holds no run; start without --resume")
    if o.resume:
        before = json.loads((out / "args.json").read_text())
        for name in record:  # what is open in the options is as it was, also where it followed from the models
            if record[name] is None:
                setattr(o, name, before.get(name))
        changed = {name for name in record if record[name] not in (None, before.get(name))}
        if changed:
            name = sorted(changed)[0]
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"--resume: {flag} is {record[name]!r}, but {out} was started with {before.get(name)!r}")
    elif out.is_file():
        raise FileExistsError(f"--out {out} is a file: give another --out")
    elif (out / "args.json").exists() or (out / "student").exists():
        raise FileExistsError(f"{out} already holds a run: give another --out, or --resume to go on with it")


def run_of(directory: str | Path) -> dict | None:
    """The options of the run whose student/ this model directory is; None for any other model."""
    directory = Path(os.path.abspath(directory))
    record = directory.parent / "args.json"
    if directory.name != "student" or not record.is_file():
        return None
    options = json.loads(record.read_text(encoding="utf-8"))
    if not isinstance(options, dict):
        raise ValueError(f"{record}: expected a JSON object with the options of a run")
    return options


def chat_of(directory: str | Path) -> str:
    """The chat format that a model directory was trained with here, "none" if it was not."""
    return (run_of(directory) or {}).get("student_chat") or "none"


def start_directory(o) -> None:
    """The run directory with args.json."""
    Path(o.out).mkdir(parents=True, exist_ok=True)
    (Path(o.out) / "args.json").write_text(json.dumps(asdict(replace(o, resume=False)), indent=1) + "\n")


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
