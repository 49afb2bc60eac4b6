"""What a run writes to disk: `args.json`, `log.jsonl`, `student/` for users, and `resume/` for an exact continuation.

A run may be killed at any moment, even while it writes. So each file that is read again is written under another name,
flushed to disk (fsync, because after a power failure a rename can survive without the contents), and only then renamed.
Of a checkpoint, resume/state.safetensors is moved last, so the other files are never older than the state resumed from.

`o` holds the options of a run (`Options`), `pieces` its models and data (`Pieces` of load.py).
"""

import json
import math
import os
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import Field, asdict, fields, replace
from pathlib import Path
from typing import get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

import lora
from model import Decoder, read_config, read_json, save_model
from runtime import parallel
from runtime.chat import FORMER
from runtime.hub import MODELS
from runtime.options import Options
from runtime.peft import save_adapter
from runtime.presets import shorten
from runtime.serving import write_as_trained
from runtime.tokenizer import TextTokenizer, check_size, read_tokenizer

TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json generation_config.json chat_template.jinja "
    "added_tokens.json vocab.json merges.txt tokenizer.model"
).split()  # files that are copied from the initial student's directory to the trained student's
FREE = {"processes", "shard", "recompute", "tensorboard"}  # options that a run may change: its updates stay the same
KEPT_BY = {"rouge": "valid_rouge_l", "ce": "valid_ce"}  # --keep-best: the score's name in log.jsonl and args.json


def save_checkpoint(o, pieces, optimizer, step: int, meter: dict[str, float], score: float | None = None) -> None:
    """Write what `write_student` writes, and resume/state.safetensors with everything for an exact continuation, even
    `meter`, the counts for the next line of the log. With --keep-best, the student is written only if this update's
    `score` (None: not scored) is the best so far; args.json then has the update and its score. Raises OSError if the
    files cannot be written; the last checkpoint is then untouched.

    Process 0 writes, but all processes call this. The files do not depend on how the student was sharded or on the
    number of processes, except random.*, which has a row for each process.
    """
    tensors = parallel.gather_state(name_modules(pieces), optimizer)
    tensors |= {f"random.{name}": parallel.gather(state) for name, state in random_state(o.device).items()}
    counted = [name for name, count in meter.items() if isinstance(count, int)]
    meter = meter | dict(zip(counted, parallel.add_up([meter[name] for name in counted]), strict=True))
    if score is not None and not math.isfinite(score):  # it cannot be compared with another update's
        score = None
    if parallel.rank() == 0:
        metadata = {"step": str(step), "meter": json.dumps(meter), "examples": pieces.digest, "frozen": pieces.frozen}
        replace_checkpoint(o, pieces, tensors, metadata, score)
    parallel.wait_for_all()


def replace_checkpoint(o, pieces, tensors: dict[str, Tensor], metadata: dict[str, str], score: float | None) -> None:
    """Write all files of `save_checkpoint` into another folder, then move them to their places."""
    out, new = Path(o.out), Path(o.out) / "checkpoint.new"
    shutil.rmtree(new, ignore_errors=True)  # left by a run that was killed
    try:
        with name_file_in_errors(new):
            (new / "resume").mkdir(parents=True)
            best, sign = best_checkpoint(o), 1 if o.keep_best == "rouge" else -1  # a lower cross-entropy is better
            if best is None or (score is not None and sign * score > sign * best[KEPT_BY[o.keep_best]]):
                write_student(o, pieces, tensors, new)
                if score is not None:
                    best = {"step": int(metadata["step"]), KEPT_BY[o.keep_best]: score}
                    record = {**read_json(out / "args.json"), "best": best}
                    (new / "args.json").write_text(json.dumps(record, indent=1) + "\n")
            frozen = {f"student.{name}" for name, p in pieces.student.named_parameters() if not p.requires_grad}
            kept = {name: tensor.contiguous() for name, tensor in tensors.items() if name not in frozen}
            save_file(kept, new / "resume" / "state.safetensors", metadata=metadata)
            for path in (out / "log.jsonl", *new.rglob("*")):
                if path.is_file():
                    shutil.copymode(out / "log.jsonl", path)  # safetensors writes files that only the owner may read
                sync(path)
            # args.json names the best student only once that is in place; at worst, a resumed run repeats its updates
            order = {"args.json": 1, "resume": 2}
            for path in sorted(new.iterdir(), key=lambda path: order.get(path.name, 0)):
                move(path, out / path.name)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def best_checkpoint(o) -> dict | None:
    """{"step": update, name of the score: its value} of the student that --keep-best has kept so far, or None."""
    return read_json(Path(o.out) / "args.json").get("best") if o.keep_best else None


def write_student(o, pieces, tensors: dict[str, Tensor], out: Path) -> None:
    """Write the files for users: student/ as a Hugging Face directory, with LoRA adapters merged; adapter/, the
    adapters alone in peft's format; and the trained projectors. The student in training, which may be sharded, is not
    changed: the gathered weights are put into another model."""
    with torch.device("meta"):
        student = Decoder(pieces.student.config)
        if o.lora:
            lora.attach(student, o.lora, o.lora_alpha, o.lora_dropout, o.lora_targets)
    student.load_state_dict({name: tensors[f"student.{name}"] for name in student.state_dict()}, assign=True)
    if o.lora:
        base, is_local = pieces.student_tokenizer.directory.resolve(), Path(o.student).is_dir()
        save_adapter(student, out / "adapter", str(base) if is_local else MODELS.get(o.student, o.student))
        lora.merge(student)
    save_model(student, out / "student")
    for file in TOKENIZER_FILES:
        source = pieces.student_tokenizer.directory / file
        if source.is_file():
            (out / "student" / file).write_bytes(source.read_bytes())
    write_as_trained(pieces.student_tokenizer, out / "student")
    trained = [name for name, parameter in pieces.method.named_parameters() if parameter.requires_grad]
    if trained:
        weights = {name.removeprefix("projectors."): tensors[name].contiguous() for name in trained}
        save_file(weights, out / "projectors.safetensors")


def random_state(device) -> dict[str, Tensor]:
    """The state of torch's random number generators: "cpu", and "cuda" if that is the device."""
    on_cuda = {"cuda": torch.cuda.get_rng_state(device)} if torch.device(device).type == "cuda" else {}
    return {"cpu": torch.get_rng_state(), **on_cuda}


def set_random_state(device, state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def name_modules(pieces) -> nn.ModuleDict:
    """The trained modules, with their names in resume/: student.blocks.0..., projectors.t2s.weight, ..."""
    return nn.ModuleDict({"student": pieces.student, "projectors": pieces.method.projectors})


def restore_checkpoint(o, pieces, optimizer) -> tuple[int, dict[str, float]]:
    """Restore the state that `save_checkpoint` wrote, if any; returns the number of updates done and the meter's
    counts. Raises ValueError for a damaged file, and if the examples or the untrained models have changed since."""
    path = Path(o.out) / "resume" / "state.safetensors"
    if not path.is_file():
        return 0, {}
    try:
        with safe_open(path, "pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
        if metadata.get("examples", pieces.digest) != pieces.digest:
            changed = f"examples of {o.data}, or their tokens,"
        elif parallel.rank() == 0 and metadata.get("frozen", pieces.frozen) != pieces.frozen:  # missing in older files
            models = [f"--teacher {o.teacher}"] if pieces.teacher_tokenizer else []
            changed = f"weights of {' or '.join(models + [f'--student {o.student}'] * bool(o.lora))}"
        else:
            return take_up(o, pieces, optimizer, tensors, metadata)
    except torch.OutOfMemoryError:  # a RuntimeError, but the file is sound
        raise
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: not readable ({error!r:.200}); start again with another --out") from error
    raise ValueError(f"--resume: the {changed} are not those that {o.out} was started with; restore the original ones, "
                     "or start again with another --out")  # fmt: skip


@torch.no_grad()
def take_up(o, pieces, optimizer, tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[int, dict]:
    """Copy weights, optimiser and random states to their places; returns what `restore_checkpoint` returns."""
    for name, parameter in name_modules(pieces).named_parameters():
        if name.startswith("student.") and not parameter.requires_grad:
            continue  # a layer under an adapter still has the weights that were loaded
        parallel.copy_into(parameter, tensors[name])
        state = {key: f"optimizer.{name}.{key}" for key in ("step", "exp_avg", "exp_avg_sq")}
        if not tensors.keys() & state.values():
            continue  # a projector that is solved, or a state before the first update
        for key, saved in state.items():  # a copy, not a view of the file, which will be replaced
            place = torch.empty((), device=o.device) if key == "step" else torch.empty_like(parameter)
            optimizer.state[parameter][key] = parallel.copy_into(place, tensors[saved])
    step, processes = int(metadata["step"]), len(tensors["random.cpu"])
    if processes == parallel.world():
        own = {name: tensors[f"random.{name}"][parallel.rank()].clone() for name in random_state(o.device)}
        set_random_state(o.device, own)
    else:  # another number of processes: new random draws
        parallel.seed_process(o.seed, step)
    meter = dict(json.loads(metadata["meter"]))
    if parallel.rank() > 0:  # the counts are sums over the processes
        meter = {name: meter[name] for name in ("seconds", "generating")}
    return step, meter


# ---------------------------------------------------------------------------------------------------------------------
# Whose directory it is


def check_directory(o) -> None:
    """Raises unless --out is free for a new run or, with --resume, holds this same run."""
    out = Path(o.out)
    if o.resume:
        check_resumed(o)
    elif out.is_file():
        raise FileExistsError(f"--out {out} is a file: give another --out")
    elif (out / "args.json").exists() or (out / "student").exists():
        raise FileExistsError(f"{out} already holds a run: give another --out, or --resume to continue it")
    place = next(place for place in (out, *out.parents) if place.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise PermissionError(f"--out {out}: {place} is not a writable directory")
    if parallel.rank() == 0 and (out / "resume" / "lock").is_file():  # before the models are loaded
        with lock_directory(out):
            pass


def check_resumed(o) -> None:
    """Raises unless the options are those of the run in --out, except those that do not change its updates. Options
    that are None take the value of that run."""
    asked, before = record_of(o), read_record(o)
    for name, value in asked.items():  # an option left open keeps its value, even one that followed from the models
        if value is None and name != "shard":
            setattr(o, name, before.get(name))
    check_update_size(o, before)
    free = free_options(asked, before)
    free |= {name for name in ("student_chat", "teacher_chat") if before.get(name) in FORMER}  # the tokens are compared
    for name in sorted(asked.keys() - free):
        if asked[name] not in (None, before.get(name)):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"--resume: {flag} is {asked[name]!r}, but {o.out} was started with {before.get(name)!r}; "
                             f"leave it out, or train {o.out}/student further with another --out")  # fmt: skip


def read_record(o) -> dict:
    """args.json of the run in --out. Raises FileNotFoundError if there is none, ValueError for an impossible value."""
    file = Path(o.out) / "args.json"
    if not file.is_file():
        raise FileNotFoundError(f"--resume: {o.out} holds no run; start without --resume")
    record = {"processes": 1, "on_policy_after": 0, **read_json(file)}  # older runs do not name these two
    if record.get("lora"):  # older runs did not name the adapted layers: it was all of them
        record = {"lora_targets": ["all-linear"], **record}
    wrong = [entry.name for entry in fields(o) if not is_value(record.get(entry.name), entry)]
    sizes = "batch_size", "grad_accum", "processes"
    wrong += [name for name in sizes if type(record.get(name)) is not int or record[name] < 1]
    if not wrong and "best" in record:
        best = record["best"] if isinstance(record["best"], dict) else {}
        step, score = best.get("step"), best.get(KEPT_BY.get(record.get("keep_best")))
        if type(step) is not int or type(score) not in (int, float) or not math.isfinite(score):
            wrong.append("best")
    if wrong:
        raise ValueError(f"{file}: {record.get(wrong[0])!r:.60} is not a possible value of {wrong[0]}")
    tuned = Path("teacher", "student")  # with --teacher-sft; the run may have been moved, or --out spelt differently
    if record.get("out") and record.get("teacher") == str(record["out"] / tuned):
        record["teacher"] = str(o.out / tuned)
    return {**record, "out": o.out}


def record_of(o) -> dict:
    """The options as args.json records them."""
    device = o.device if not parallel.by_torchrun() else o.device and torch.device(o.device).type
    return {**asdict(replace(o, resume=False)), "device": device, "processes": parallel.world()}


def free_options(asked: dict, before: dict) -> set[str]:
    """The options that may differ between these two records of a run, because its updates stay the same."""
    sizes = [x["batch_size"] * x["grad_accum"] * x["processes"] for x in (asked, before)]
    kinds = [str(x.get("device")).partition(":")[0] for x in (asked, before)]  # it may be another card
    free = FREE | ({"batch_size", "grad_accum"} if sizes[0] == sizes[1] else set())
    return free | ({"device"} if kinds[0] == kinds[1] else set())


def is_value(value, entry: Field) -> bool:
    """Whether an option may have this value, or None. Here a bool is not a number, but an int is a float."""
    kinds = get_args(entry.type) or (entry.type,)
    fits = type(value) in kinds or (type(value) is int and float in kinds)
    if fits and type(value) is str and entry.name.endswith("_chat"):
        return value in ("own", "thinking", "none", *FORMER) or Path(value).exists()
    return value is None or fits and value in (entry.metadata["choices"] or [value])


def stored_options(given: dict) -> dict:
    """The options of the run in --out, as if they were given, for --resume and --out without models; otherwise {}."""
    models, out = given.keys() & {"student", "teacher", "data"}, given.get("out")
    if not given.get("resume") or models or out is None or not (Path(out) / "args.json").is_file():
        return {}
    record = read_record(Options(out=out))
    if not parallel.by_torchrun():  # one process has nothing to split
        record["shard"] = None
    return shorten({entry.name: record.get(entry.name, entry.default) for entry in fields(Options)})


def check_update_size(o, before: dict) -> None:
    """Raises ValueError unless an update covers as many examples as in the run `before`, and so the same ones."""
    asked, size = (x["batch_size"] * x["grad_accum"] * x["processes"] for x in (record_of(o), before))
    each, rest = divmod(size, parallel.world())
    if asked == size:
        return
    was = f"--resume: an update of {o.out} covers {size} examples"
    now = f"{o.batch_size} --grad-accum {o.grad_accum} with {parallel.world()} process(es) makes {asked}"
    if rest:
        raise ValueError(f"{was}, but --batch-size {now}, and that number of processes does not divide {size}")
    fits = max(n for n in range(1, min(each, before["batch_size"]) + 1) if each % n == 0)
    raise ValueError(f"{was}, but --batch-size {now}: use --batch-size {fits} --grad-accum {each // fits}")


def run_of(directory: str | Path) -> dict | None:
    """If this model directory is the student/ of a run, that run's options, else None."""
    directory = Path(os.path.abspath(directory))
    record = directory.parent / "args.json"
    return read_json(record) if directory.name == "student" and record.is_file() else None


def chat_of(directory: str | Path) -> str | None:
    """The chat template that a model was trained with here: "own" (its files contain the template), "thinking" or
    "none"; None if it was not trained here. A name of FORMER is returned as it is, and `read_chat` refuses it."""
    record = run_of(directory)
    chat = record and (record.get("student_chat") or "none")
    return chat if chat in (None, "none", "thinking", *FORMER) else "own"


def tokenizer_of(directory: str | Path, chat: str | None = None, bos: bool | None = None) -> TextTokenizer:
    """The tokenizer of a model directory. If `chat` and `bos` are None, prompts are as in the model's training here: a
    run's student gets a begin-of-text token if its files add one, a model from elsewhere gets none. Raises ValueError
    for a tokenizer that cannot belong to the model."""
    if bos is None:
        bos = "bos" in (run_of(directory) or {})  # not in older runs, whose tokenizer files are the initial model's
    rows = read_config(read_json(Path(directory) / "config.json")).vocab_size
    tokenizer = read_tokenizer(directory, chat or chat_of(directory) or "none", bos, rows)
    check_size(tokenizer, rows)
    return tokenizer


@contextmanager
def hold_directory(o, facts: dict) -> Iterator[None]:
    """Hold the run directory, with args.json (the options and these facts), for this run alone; created if missing."""
    if parallel.rank() > 0:
        yield
        return
    out = Path(o.out)
    (out / "resume").mkdir(parents=True, exist_ok=True)
    with lock_directory(out):
        if not o.resume and (out / "args.json").exists():
            raise FileExistsError(f"another run took {out} while this one was loading: give another --out")
        best = best_checkpoint(o) if o.resume else None
        record = record_of(o) | facts | ({"best": best} if best else {})
        write_text(out / "args.json", json.dumps(record, indent=1) + "\n")
        yield


@contextmanager
def lock_directory(out: Path) -> Iterator[None]:
    """Raises FileExistsError if another process holds the lock, which the system releases when that process ends, even
    if it is killed."""
    import fcntl  # here, because it exists only on Unix, and eval.py also runs elsewhere

    with open(out / "resume" / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise FileExistsError(
                f"{out} is in use by {file.read()}: wait for it or stop it, or give another --out"
            ) from None
        except OSError as error:
            print(f"{out} cannot be locked ({error}): make sure that no other run writes there", file=sys.stderr)
        file.truncate(0)
        with name_file_in_errors(Path(file.name)):  # at once: what a buffer still holds would fail again in closing
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Files that are either complete or absent


def write_text(path: Path, text: str) -> None:
    """Write the whole file or, with an OSError, leave the old one in place. Only process 0 writes."""
    if parallel.rank() > 0:
        return
    new = path.with_name(f"{path.name}.new")
    with name_file_in_errors(path):
        try:
            new.write_text(text, encoding="utf-8")
            sync(new)
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)


@contextmanager
def name_file_in_errors(path: Path) -> Iterator[None]:
    """Add to an error in writing which file it concerns, and what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{path} could not be written ({error}). What was saved before is complete: make room, then run the same "
            "command again, with --resume if it is a training run"
        ) from error


def move(source: Path, target: Path) -> None:
    """Move a file or directory to its place: file by file into an existing directory, a new directory in one step."""
    if target.is_dir():
        for path in source.iterdir():
            move(path, target / path.name)
    else:
        os.replace(source, target)
        sync(target.parent)


def sync(path: Path) -> None:
    """Flush a file, or the names in a directory, to the disk."""
    if os.name == "posix":  # elsewhere a directory cannot be opened
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_log(path: Path) -> list[dict]:
    """The lines of a log.jsonl, without an incomplete last line. Raises ValueError for any other damaged line."""
    texts, lines = path.read_bytes().split(b"\n"), []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and type(line.get("step")) is int:
            lines.append(line)
        elif number < len(texts):
            raise ValueError(f"{path}, line {number}: not a JSON object with a step; repair or remove that line")
    return lines


class Log:
    """log.jsonl: one JSON object per line, written immediately; lines after the update that is resumed from are
    dropped. With `tensorboard`, the same numbers also go into event files beside it."""

    def __init__(self, path: Path, start: int, tensorboard: bool = False):
        self.path, self.board = path, None
        if tensorboard and parallel.rank() == 0:
            from torch.utils.tensorboard import SummaryWriter  # optional; runtime/strict.py has checked that it exists

            self.board = SummaryWriter(path.parent / "tensorboard", purge_step=start + 1)
        lines = read_log(path) if start and path.is_file() else []
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= start))

    def write(self, line: dict) -> None:
        if parallel.rank() > 0:
            return
        with name_file_in_errors(self.path), open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        if self.board:
            for name in line.keys() - {"step"}:
                self.board.add_scalar(name, line[name], line["step"])
            self.board.flush()


class Stopped(Exception):
    """Raised by a run that was asked to stop, after saving its state; `number` is the signal's."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


@contextmanager
def note_signals() -> Iterator[list[int]]:
    """Inside this context the first Ctrl-C or SIGTERM is only noted in the list, so that the loop finishes its update
    and saves. The second one has its usual effect."""
    noted, before = [], {}

    def note(number: int, frame) -> None:
        restore()
        noted.append(number)
        once_more = "a second signal stops it at once"
        if parallel.by_torchrun():  # it then kills the process, even in the middle of saving
            once_more = "torchrun allows 30 seconds for that, or its --shutdown-timeout"
        text = f"\nstopping: this update is finished and saved first ({once_more})\n"
        os.write(2, text.encode())  # print could fail here, inside another print

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    if threading.current_thread() is threading.main_thread():  # other threads may not set signal handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # ignored with nohup, for instance
                before[number] = signal.signal(number, note)
    try:
        yield noted
    finally:
        restore()


# ---------------------------------------------------------------------------------------------------------------------
# A run while it trains


class Meter:
    """Counts tokens and time since the last logged line; all processes must call `read` together."""

    def __init__(self, seconds=0.0, tokens=0, generating=0.0, generated=0, responses=0):
        self.since, self.tokens = time.perf_counter() - seconds, tokens
        self.generating, self.generated, self.responses = generating, generated, responses

    def counts(self) -> dict[str, float]:
        """The counts for a checkpoint; Meter(**counts) continues from them."""
        counts = {**vars(self), "seconds": time.perf_counter() - self.since}
        del counts["since"]
        return counts

    def count_generation(self, seconds: float, tokens: int, responses: int) -> None:
        self.generating += seconds
        self.generated += tokens
        self.responses += responses

    def read(self, on_policy: bool) -> dict[str, float]:
        """The keys to log; starts again from 0. Without sampled responses their speed and length are left out."""
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


class RunDirectory:
    """A run's directory during training: its lock, log, progress bar, checkpoints, and Ctrl-C. `start`: the number of
    updates done before (--resume). `line`: the last line logged. `meter`: the counts for the next one."""

    def __init__(self, o, pieces, optimizer, total: int, per_epoch: int, description: str):
        self.o, self.pieces, self.optimizer, self.total, self.per_epoch = o, pieces, optimizer, total, per_epoch
        self.description, self.every, self.line = description, o.checkpoint_every or per_epoch, {}
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def __enter__(self):
        with ExitStack() as stack:
            stack.enter_context(hold_directory(self.o, self.pieces.facts(self.o)))
            self.signals = stack.enter_context(note_signals())
            self.start, self.counts = 0, {}
            if self.o.resume:
                self.start, self.counts = restore_checkpoint(self.o, self.pieces, self.optimizer)
            if parallel.highest(self.start) != self.start:
                raise ValueError(f"--resume: {self.o.out} is not the same directory in all processes; they need a "
                                 "shared one")  # fmt: skip
            self.log_file = Log(Path(self.o.out) / "log.jsonl", self.start, self.o.tensorboard)
            parallel.start_alike(self.parameters)
            if not self.start and parallel.rank() > 0:  # each process has its own dropout
                parallel.seed_process(self.o.seed, self.start)
            every = 0.1 if sys.stderr.isatty() else 30  # seconds; a log file needs no animation
            bar = {"desc": self.description, "unit": "update", "dynamic_ncols": True, "mininterval": every}
            self.progress = tqdm(total=self.total, initial=self.start, **bar)
            self.meter, self.compiled_before = Meter(**self.counts), count_compilations()
            self.stack = stack.pop_all()
        return self

    def __exit__(self, kind, *error) -> None:
        self.progress.close()
        # Process 0 has written the samples; the others wait for it here, while signals are still only noted.
        number = self.asked_to_stop() if kind is None else 0
        self.stack.close()
        if kind is not None:
            return
        if parallel.rank() == 0 and (best := best_checkpoint(self.o)):
            name = KEPT_BY[self.o.keep_best]
            about = f"update {best['step']}, which has the best {name}: {best[name]:.4f}"
            print(f"student/ is from {about}", file=sys.stderr)
        if number:
            raise Stopped(f"stopped after the last update; the state is saved in {self.o.out}", number)

    def log(self, done: int, terms: dict[str, float], rows: list, sampled: list) -> None:
        """Count update `done`, over these rows and those with sampled responses; a line every --log-every updates."""
        self.meter.tokens += sum(len(row.student) for row in rows + sampled)
        if self.o.on_policy:  # where a response could not be used, the gold one stayed in its place
            used = sum(new is not row for new, row in zip(sampled, rows, strict=False))
            used, examples = parallel.add_up([used, len(rows)])
            terms["on_policy"] = used / examples
        if done % self.o.log_every == 0 or done == self.total or done == 1:
            self.line = {"step": done, "epoch": round(done / self.per_epoch, 3), **terms}
            self.line |= {"lr": self.optimizer.param_groups[0]["lr"], **self.meter.read(self.o.on_policy > 0)}
            if self.o.compile:
                self.line["compilations"] = count_compilations() - self.compiled_before
            speed = f"{self.line['tokens_per_second']:,.0f} tokens/s"
            self.progress.set_postfix_str(f"loss {terms['loss']:.3f}, {speed}", refresh=False)
            self.log_file.write(self.line)
        self.progress.update()
        self.paused, self.counts = time.perf_counter(), self.meter.counts()

    def is_due(self, done: int) -> bool:
        """Whether a checkpoint is due after this update."""
        return done % self.every == 0 or done == self.total

    def asked_to_stop(self) -> int:
        """The number of the signal that any process received; 0 for none."""
        return parallel.highest(sum(self.signals))

    def check_weights(self, done: int) -> None:
        """Raises FloatingPointError if update `done` left a weight that is not finite."""
        if not parallel.all_finite(self.parameters):
            raise FloatingPointError(
                f"update {done} left weights that are not finite; {self.o.out} has the last checkpoint before it. A "
                "lower --lr or --weight-decay may help"
            )

    def save(self, done: int, scores: dict[str, float]) -> None:
        """Log the held-out scores and write a checkpoint. Raises Stopped if the run was asked to stop."""
        if scores:
            self.line |= scores
            self.log_file.write({"step": done, **scores})
        score = scores.get(KEPT_BY.get(self.o.keep_best))
        save_checkpoint(self.o, self.pieces, self.optimizer, done, self.counts, score)
        self.meter.since += time.perf_counter() - self.paused  # this time was not spent on training
        if number := self.asked_to_stop():
            raise Stopped(f"stopped after update {done} of {self.total}; the state is saved in {self.o.out}", number)

    @contextmanager
    def save_state_on_failure(self, step: int, indices: list[int]) -> Iterator[None]:
        """Around an update: if it raises a FloatingPointError, save the state before it, so that the failure can be
        reproduced, and raise the error again with the update's examples."""
        o, pieces, random, counts = self.o, self.pieces, random_state(self.o.device), self.meter.counts()
        try:
            yield
        except FloatingPointError as error:
            parameters = [*pieces.student.named_parameters(), *pieces.method.named_parameters()]
            trained = {name: parallel.local_part(p) for name, p in parameters if p.requires_grad}
            spoilt = [name for name, part in trained.items() if not part.isfinite().all()]
            if parallel.highest(len(spoilt)):  # with sharding perhaps only in another process
                name = spoilt[0] if spoilt else "a parameter"
                about = f"{name} was not finite before this update, so {o.out} keeps the last checkpoint"
            else:
                set_random_state(o.device, random)
                save_checkpoint(o, pieces, self.optimizer, step, counts)
                about = f"the state before it is in {o.out}; a new run with a lower --lr or with --dtype fp32 may help"
            places = [pieces.examples[i].where.rpartition(" ") for i in indices[:8]]  # "FILE, line", or item, or row
            lines = ", ".join([line for _, _, line in places] + ["..."] * (len(indices) > 8))
            raise FloatingPointError(f"update {step + 1}: {error} ({places[0][0]}s {lines}); {about}") from None


def count_compilations() -> int:
    """How many graphs torch.compile has compiled in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # not imported here, because that takes a second
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


# ---------------------------------------------------------------------------------------------------------------------
# Before and after a run


def say_how_to_go_on(given: dict, arguments: list[str] | None) -> str:
    """Say how to continue the given command."""
    words = [*parallel.launcher().split(), sys.argv[0], *(sys.argv[1:] if arguments is None else arguments)]
    embedded = not given.keys() & {"student", "teacher", "data"}
    out = Path(given.get("out", f"runs/{given.get('method', 'dskd')}"))
    if not embedded and (out / "args.json").is_file():
        return f"continue with: {shlex.join(words + ['--resume'] * ('resume' not in given))}"
    if embedded or given.get("teacher_sft") and (out / "teacher" / "args.json").is_file():
        return f"continue with: {shlex.join(words)}"
    return f"there is nothing to resume yet; start again with: {shlex.join(words)}"


def is_finished(o) -> bool:
    """Whether the training in --out is finished. Raises ValueError if it is, but with options that change updates."""
    file, asked = Path(o.out) / "finished.json", record_of(o)
    if not file.is_file():
        return False
    before = read_json(file)["options"]
    record = read_record(o)  # has the values of options that were left open, and this --out: it may have been moved
    changed = [name for name, value in before.items() if asked.get(name, value) not in (value, record.get(name))]
    changed = [name for name in changed if name not in free_options(asked, record)]
    if changed:
        was = f"--{changed[0].replace('_', '-')} {record.get(changed[0])!r}"
        raise ValueError(f"{o.out} was trained with {was}; give another --out, or remove it to train again")
    return True


def finish_stage(o) -> None:
    content = {"options": asdict(replace(o, resume=False))}
    write_text(Path(o.out) / "finished.json", json.dumps(content) + "\n")
