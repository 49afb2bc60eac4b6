"""What a run leaves on disk: `args.json`, `log.jsonl`, `student/` for the world, and `resume/` for going on exactly.

A run may end at any moment, also while it writes. So whatever is read again is written beside its place, brought to the
disk (fsync: a rename can outlive the contents when the power fails) and only then moved there; and of one checkpoint's
files resume/state.safetensors is moved last, so that the others are never older than what a run goes on from.

In all functions `o` holds the options of a run, `pieces` its models and data: `Options` and `Pieces` of train.py.
"""

import copy
import json
import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import lora
from hub import MODELS
from model import read_json, save_model

TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json generation_config.json chat_template.jinja "
    "added_tokens.json vocab.json merges.txt tokenizer.model"
).split()  # what a student's directory hands on to what was trained from it


def save_checkpoint(o, pieces, optimizer: torch.optim.AdamW, step: int, meter: dict[str, float]) -> None:
    """student/ as a Hugging Face directory, projectors.safetensors with those that are trained, and
    resume/state.safetensors with all that an exact continuation needs, also `meter`, the counts for the next line of
    the log. With LoRA student/ has the adapters merged into its weights, and adapter/ has them alone, as peft does.

    All of it is written to checkpoint.new/ first. Raises OSError if that fails; the last checkpoint is then untouched.
    """
    out, new = Path(o.out), Path(o.out) / "checkpoint.new"
    if new.exists():  # of a run that was killed
        shutil.rmtree(new)
    try:
        with explained(new):
            write_checkpoint(o, pieces, optimizer, new, {"step": str(step), "meter": json.dumps(meter)})
            for path in (out / "log.jsonl", *new.rglob("*")):
                sync(path)
            for path in sorted(new.iterdir(), key=lambda path: path.name == "resume"):
                move(path, out / path.name)
    finally:
        if new.exists():
            shutil.rmtree(new)


def write_checkpoint(o, pieces, optimizer: torch.optim.AdamW, out: Path, metadata: dict[str, str]) -> None:
    (out / "resume").mkdir(parents=True)
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
    tensors |= {f"random.{name}": value for name, value in random_state(o.device).items()}
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    trained = [name for name, parameter in pieces.distiller.named_parameters() if parameter.requires_grad]
    if trained:
        save_file({name.removeprefix("projectors."): tensors[name] for name in trained}, out / "projectors.safetensors")
    save_file(tensors, out / "resume" / "state.safetensors", metadata=metadata)


def random_state(device) -> dict[str, torch.Tensor]:
    """State of torch's random number generators: "cpu", and "cuda" if that is the device."""
    on_cuda = {"cuda": torch.cuda.get_rng_state(device)} if torch.device(device).type == "cuda" else {}
    return {"cpu": torch.get_rng_state(), **on_cuda}


def set_random_state(device, state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.device(device).type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def merged_copy(student: torch.nn.Module) -> torch.nn.Module:
    """The student with its adapters merged, on the CPU. In place would round the weights that training goes on from."""
    on_cpu = {id(p): torch.nn.Parameter(p.detach().cpu(), requires_grad=False) for p in student.parameters()}
    return lora.merge(copy.deepcopy(student, on_cpu))  # deepcopy takes its copies of the parameters from there


def restore_checkpoint(o, pieces, optimizer: torch.optim.AdamW) -> tuple[int, dict[str, float]]:
    """Take up the state that `save_checkpoint` left, if it came to that; returns the number of updates done and the
    meter's counts. Raises ValueError for a damaged file."""
    path = Path(o.out) / "resume" / "state.safetensors"
    if not path.is_file():
        return 0, {}
    try:
        with safe_open(path, "pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    except SafetensorError as error:
        raise ValueError(f"{path}: not readable ({error}); start again with another --out") from error
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
            state.setdefault(int(index), {})[key] = value.clone()  # not a view of the file, which is soon replaced
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    set_random_state(o.device, {name: tensors[f"random.{name}"] for name in random_state(o.device)})
    return int(metadata["step"]), json.loads(metadata["meter"])


def check_directory(o) -> None:
    """Raises unless --out is free for a new run, or --resume is given and it holds this very run; options that are None
    then take the value of that run."""
    out, record = Path(o.out), asdict(replace(o, resume=False))
    if o.resume and not (out / "args.json").is_file():
        raise FileNotFoundError(f"--resume: {out} holds no run; start without --resume")
    if o.resume:
        before = read_json(out / "args.json")
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
    if (out / "resume" / "lock").is_file():  # before the models are loaded
        with locked(out):
            pass


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


@contextmanager
def hold_directory(o) -> Iterator[None]:
    """The run directory with args.json, made if need be, and for this process alone."""
    out = Path(o.out)
    (out / "resume").mkdir(parents=True, exist_ok=True)
    with locked(out):
        if not o.resume and (out / "args.json").exists():
            raise FileExistsError(f"{out} was taken by another run while this one was loading: give another --out")
        write_text(out / "args.json", json.dumps(asdict(replace(o, resume=False)), indent=1) + "\n")
        yield


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Raises FileExistsError if another process is in here. The system drops the lock when its process ends, however it
    does. Only on Unix; where a file system has no locks, a warning says so."""
    if os.name != "posix":
        yield
        return
    import fcntl

    with open(out / "resume" / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise FileExistsError(
                f"{out} is in use by {file.read()}: wait for it or stop it, or give another --out"
            ) from None
        except OSError as error:
            print(f"{out} cannot be locked ({error}): see that no other run writes there", file=sys.stderr)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Files that are whole or not there


def write_text(path: Path, text: str) -> None:
    """The whole file or, with an OSError, the one that was there before."""
    new = path.with_name(f"{path.name}.new")
    with explained(path):
        try:
            new.write_text(text, encoding="utf-8")
            sync(new)
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Says of an error while writing which file it is about, and what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{path} could not be written ({error}); what was saved before is whole: make room there, then run this "
            "again, a training run with --resume"
        ) from error


def move(source: Path, target: Path) -> None:
    """Put a file or directory in its place, file by file where there is one; a new directory appears full."""
    if target.is_dir():
        for path in source.iterdir():
            move(path, target / path.name)
    else:
        os.replace(source, target)
        sync(target.parent)


def sync(path: Path) -> None:
    """Bring a file, or the names in a directory, to the disk."""
    if os.name == "posix":  # elsewhere only an open file can be, not a directory
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_log(path: Path) -> list[dict]:
    """The lines of a log.jsonl. The last one may have been cut off by the end of its process, or not be written to its
    end yet: then it is left out. Raises ValueError for any other line that is damaged."""
    texts, lines = path.read_bytes().split(b"\n"), []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
        elif number < len(texts):
            raise ValueError(f"{path}, line {number}: not a JSON object with a step; repair or remove that line")
    return lines


class Log:
    """log.jsonl: one JSON object per line, written at once; lines after the point of resumption are dropped."""

    def __init__(self, path: Path, start: int):
        self.path = path
        lines = read_log(path) if start and path.is_file() else []
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= start))

    def write(self, line: dict) -> None:
        with explained(self.path), open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Stopping


class Stopped(Exception):
    """A run that was asked to stop has saved its state; `number` is the signal's."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


class StopSignals:
    """Within it the first Ctrl-C or SIGTERM is only noted, in `number`: the loop finishes its update and saves. The
    next one does what it always does."""

    def __init__(self):
        self.number, self.before = 0, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # no other may change what signals do
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:  # started with nohup, for instance
                    self.before[number] = signal.signal(number, self.note)
        return self

    def note(self, number: int, frame) -> None:
        self.__exit__()
        self.number = number
        text = "\nstopping: this update is finished and saved first (once more: stop at once)\n"
        os.write(2, text.encode())  # print could fail here, in the middle of another one

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}
