"""What a run leaves on disk: `args.json`, `log.jsonl`, `student/` for the world, and `resume/` for going on exactly.

A run may end at any moment, also while it writes. So whatever is read again is written beside its place, brought to the
disk (fsync: a rename can outlive the contents when the power fails) and only then moved there; of a checkpoint
resume/state.safetensors is moved last, so that the other files are never older than what a run goes on from.

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
).split()  # what a student's directory hands on to what was trained from it
KEPT_BY = {"rouge": "valid_rouge_l", "ce": "valid_ce"}  # --keep-best: the score's name in log.jsonl and args.json


def save_checkpoint(o, pieces, optimizer, step: int, meter: dict[str, float], score: float | None = None) -> None:
    """What `write_student` writes, and resume/state.safetensors with all that an exact continuation needs, also
    `meter`, the counts for the next line of the log. With --keep-best the former only if this update's `score` (None:
    it was not scored) is the best so far; args.json then has the update and its score. Raises OSError if it cannot be
    written; the last checkpoint is then untouched.

    Process 0 writes, but all processes call this. Nothing in the files depends on how the student was sharded, or on
    the number of processes; but random.*, which has a row for each.
    """
    tensors = parallel.gather_state(name_modules(pieces), optimizer)
    tensors |= {f"random.{name}": parallel.gather(state) for name, state in random_state(o.device).items()}
    counted = [name for name, count in meter.items() if isinstance(count, int)]
    meter = meter | dict(zip(counted, parallel.add_up([meter[name] for name in counted]), strict=True))
    if score is not None and not math.isfinite(score):  # nothing that another update could be compared with
        score = None
    if parallel.rank() == 0:
        metadata = {"step": str(step), "meter": json.dumps(meter), "examples": pieces.digest, "frozen": pieces.frozen}
        replace_checkpoint(o, pieces, tensors, metadata, score)
    parallel.wait_for_all()


def replace_checkpoint(o, pieces, tensors: dict[str, Tensor], metadata: dict[str, str], score: float | None) -> None:
    """Write all files of `save_checkpoint` beside their places, and then move them there."""
    out, new = Path(o.out), Path(o.out) / "checkpoint.new"
    shutil.rmtree(new, ignore_errors=True)  # of a run that was killed
    try:
        with name_file_in_errors(new):
            (new / "resume").mkdir(parents=True)
            best, sign = best_checkpoint(o), 1 if o.keep_best == "rouge" else -1  # of cross-entropy, less is better
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
                    shutil.copymode(out / "log.jsonl", path)  # safetensors' files are their owner's alone
                sync(path)
            # args.json names the best student once that is in its place; the updates that led to it may be done again
            order = {"args.json": 1, "resume": 2}
            for path in sorted(new.iterdir(), key=lambda path: order.get(path.name, 0)):
                move(path, out / path.name)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def best_checkpoint(o) -> dict | None:
    """{"step": update, name of the score: its value} of the student that --keep-best has kept so far; else None."""
    return read_json(Path(o.out) / "args.json").get("best") if o.keep_best else None


def write_student(o, pieces, tensors: dict[str, Tensor], out: Path) -> None:
    """What the world reads: student/ as a Hugging Face directory, with LoRA's adapters merged; adapter/, where they are
    alone, as peft has them; and the projectors that are trained. The student in training, which may be sharded, stays
    as it is: the gathered weights are put into another one."""
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
    """State of torch's random number generators: "cpu", and "cuda" if that is the device."""
    on_cuda = {"cuda": torch.cuda.get_rng_state(device)} if torch.device(device).type == "cuda" else {}
    return {"cpu": torch.get_rng_state(), **on_cuda}


def set_random_state(device, state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def name_modules(pieces) -> nn.ModuleDict:
    """What is trained, under its names in resume/: student.blocks.0..., projectors.t2s.weight, ..."""
    return nn.ModuleDict({"student": pieces.student, "projectors": pieces.method.projectors})


def restore_checkpoint(o, pieces, optimizer) -> tuple[int, dict[str, float]]:
    """Take up the state that `save_checkpoint` left, if any: the number of updates done, and the meter's counts. Raises
    ValueError for a damaged file, and if the examples, or models that are not trained, have changed since."""
    path = Path(o.out) / "resume" / "state.safetensors"
    if not path.is_file():
        return 0, {}
    try:
        with safe_open(path, "pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
        if metadata.get("examples", pieces.digest) != pieces.digest:
            changed = f"examples of {o.data}, or their tokens,"
        elif parallel.rank() == 0 and metadata.get("frozen", pieces.frozen) != pieces.frozen:  # older files do not say
            models = [f"--teacher {o.teacher}"] if pieces.teacher_tokenizer else []
            changed = f"weights of {' or '.join(models + [f'--student {o.student}'] * bool(o.lora))}"
        else:
            return take_up(o, pieces, optimizer, tensors, metadata)
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: not readable ({error!r:.200}); start again with another --out") from error
    raise ValueError(f"--resume: the {changed} are not those that {o.out} was started with; bring these back, or start "
                     "again with another --out")  # fmt: skip


@torch.no_grad()
def take_up(o, pieces, optimizer, tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[int, dict]:
    """What `restore_checkpoint` returns, after putting weights, optimiser and random states in their places."""
    for name, parameter in name_modules(pieces).named_parameters():
        if name.startswith("student.") and not parameter.requires_grad:
            continue  # a layer under an adapter, which is as it was loaded
        parallel.copy_into(parameter, tensors[name])
        state = {key: f"optimizer.{name}.{key}" for key in ("step", "exp_avg", "exp_avg_sq")}
        if not tensors.keys() & state.values():
            continue  # a projector that is solved, or before the first update
        for key, saved in state.items():  # copied: not a view of the file, which is soon replaced
            place = torch.empty((), device=o.device) if key == "step" else torch.empty_like(parameter)
            optimizer.state[parameter][key] = parallel.copy_into(place, tensors[saved])
    step, processes = int(metadata["step"]), len(tensors["random.cpu"])
    if processes == parallel.world():
        own = {name: tensors[f"random.{name}"][parallel.rank()].clone() for name in random_state(o.device)}
        set_random_state(o.device, own)
    else:  # no state for each process: draws that were not made before
        parallel.seed_process(o.seed, step)
    meter = dict(json.loads(metadata["meter"]))
    return step, meter if parallel.rank() == 0 else {}


# ---------------------------------------------------------------------------------------------------------------------
# Whose directory it is


def check_directory(o) -> None:
    """Raises unless --out is free for a new run or, with --resume, holds this very one."""
    out = Path(o.out)
    if o.resume:
        check_resumed(o)
    elif out.is_file():
        raise FileExistsError(f"--out {out} is a file: give another --out")
    elif (out / "args.json").exists() or (out / "student").exists():
        raise FileExistsError(f"{out} already holds a run: give another --out, or --resume to go on with it")
    place = next(place for place in (out, *out.parents) if place.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise PermissionError(f"--out {out}: {place} is no directory that can be written to")
    if parallel.rank() == 0 and (out / "resume" / "lock").is_file():  # before the models are loaded
        with lock_directory(out):
            pass


def check_resumed(o) -> None:
    """Raises unless the options are those of the run in --out, but for what leaves its updates as they were. Options
    that are None take the value of that run."""
    asked, before = record_of(o), read_record(o)
    for name, value in asked.items():  # what is left open is as it was, also where it followed from the models
        if value is None and name != "shard":
            setattr(o, name, before.get(name))
    check_update_size(o, before)
    free = {"batch_size", "grad_accum", "processes", "shard", "recompute", "tensorboard"}
    free |= {name for name in ("student_chat", "teacher_chat") if before.get(name) in FORMER}  # the tokens are compared
    for name in sorted(asked.keys() - free):
        if asked[name] not in (None, before.get(name)):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"--resume: {flag} is {asked[name]!r}, but {o.out} was started with {before.get(name)!r}")


def read_record(o) -> dict:
    """args.json of the run in --out. Raises FileNotFoundError if there is none, ValueError for what it cannot say."""
    file = Path(o.out) / "args.json"
    if not file.is_file():
        raise FileNotFoundError(f"--resume: {o.out} holds no run; start without --resume")
    record = {"processes": 1, "on_policy_after": 0, **read_json(file)}  # which older runs do not name
    if record.get("lora"):  # older runs, which do not name their layers, adapted them all
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
        raise ValueError(f"{file}: {record.get(wrong[0])!r:.60} is no value of {wrong[0]}")
    tuned = Path("teacher", "student")  # of --teacher-sft: where a run is now, or how --out spells it, is no option
    if record.get("out") and record.get("teacher") == str(record["out"] / tuned):
        record["teacher"] = str(o.out / tuned)
    return {**record, "out": o.out}


def record_of(o) -> dict:
    """What args.json says."""
    device = o.device if not parallel.by_torchrun() else o.device and torch.device(o.device).type
    return {**asdict(replace(o, resume=False)), "device": device, "processes": parallel.world()}


def is_value(value, entry: Field) -> bool:
    """Whether an option may have this value, or None. A truth value is no number here, but an integer is a float."""
    kinds = get_args(entry.type) or (entry.type,)
    fits = type(value) in kinds or (type(value) is int and float in kinds)
    if fits and type(value) is str and entry.name.endswith("_chat"):
        return value in ("own", "thinking", "none", *FORMER) or Path(value).exists()
    return value is None or fits and value in (entry.metadata["choices"] or [value])


def stored_options(given: dict) -> dict:
    """With --resume and --out, but no models: the options of the run in --out, as if they were given; else {}."""
    models = given.keys() & {"student", "teacher", "data"}
    if not given.get("resume") or models or not (Path(given.get("out", "")) / "args.json").is_file():
        return {}
    record = read_record(Options(out=given["out"]))
    return shorten({entry.name: record.get(entry.name, entry.default) for entry in fields(Options)})


def check_update_size(o, before: dict) -> None:
    """Raises ValueError unless updates are over as many examples as in the run `before`, and so over the same ones."""
    asked, size = (x["batch_size"] * x["grad_accum"] * x["processes"] for x in (record_of(o), before))
    each, rest = divmod(size, parallel.world())
    if asked == size:
        return
    was = f"--resume: an update of {o.out} is over {size} examples"
    now = f"{o.batch_size} --grad-accum {o.grad_accum} with {parallel.world()} process(es) makes {asked}"
    if rest:
        raise ValueError(f"{was}, --batch-size {now}; that number of processes does not divide {size}")
    fits = max(n for n in range(1, min(each, before["batch_size"]) + 1) if each % n == 0)
    raise ValueError(f"{was}, --batch-size {now}: use --batch-size {fits} --grad-accum {each // fits}")


def run_of(directory: str | Path) -> dict | None:
    """The options of the run whose student/ this model directory is; None for any other model."""
    directory = Path(os.path.abspath(directory))
    record = directory.parent / "args.json"
    return read_json(record) if directory.name == "student" and record.is_file() else None


def chat_of(directory: str | Path) -> str | None:
    """The chat template that a model directory was trained with here, which is its own since then, or "none"; None if
    it was not trained here. `read_chat` refuses those of FORMER."""
    record = run_of(directory)
    chat = record and (record.get("student_chat") or "none")
    return chat if chat in (None, "none", "thinking", *FORMER) else "own"


def tokenizer_of(directory: str | Path, chat: str | None = None, bos: bool | None = None) -> TextTokenizer:
    """The tokenizer of a model directory, with the prompts that the model was trained with here where `chat` and `bos`
    are None: a run's student has a begin-of-text where its files say so, a model from elsewhere none. Raises ValueError
    for a tokenizer that cannot belong to the model."""
    if bos is None:
        bos = "bos" in (run_of(directory) or {})  # older runs do not say: their files are another model's
    rows = read_config(read_json(Path(directory) / "config.json")).vocab_size
    tokenizer = read_tokenizer(directory, chat or chat_of(directory) or "none", bos, rows)
    check_size(tokenizer, rows)
    return tokenizer


@contextmanager
def hold_directory(o, facts: dict) -> Iterator[None]:
    """The run directory with args.json (the options, and these facts), made if need be, for this run alone."""
    if parallel.rank() > 0:
        yield
        return
    out = Path(o.out)
    (out / "resume").mkdir(parents=True, exist_ok=True)
    with lock_directory(out):
        if not o.resume and (out / "args.json").exists():
            raise FileExistsError(f"{out} was taken by another run while this one was loading: give another --out")
        best = best_checkpoint(o) if o.resume else None
        record = record_of(o) | facts | ({"best": best} if best else {})
        write_text(out / "args.json", json.dumps(record, indent=1) + "\n")
        yield


@contextmanager
def lock_directory(out: Path) -> Iterator[None]:
    """Raises FileExistsError if another process is in here. The system drops the lock when its process ends, however it
    does."""
    import fcntl  # here, for it needs a Unix, which eval.py does not

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
    """The whole file or, with an OSError, the one that was there before. Only process 0 writes."""
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
    """The lines of a log.jsonl, without a last one that was cut off, or is not complete yet. Raises ValueError for any
    other line that is damaged."""
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
    """log.jsonl: one JSON object per line, written at once; lines after the point of resumption are dropped. With
    `tensorboard` the same numbers in its event files, beside it."""

    def __init__(self, path: Path, start: int, tensorboard: bool = False):
        self.path, self.board = path, None
        if tensorboard and parallel.rank() == 0:
            from torch.utils.tensorboard import SummaryWriter  # an extra; runtime/strict.py has looked for it

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
    """A run that was asked to stop has saved its state; `number` is the signal's."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


@contextmanager
def note_signals() -> Iterator[list[int]]:
    """Within it the first Ctrl-C or SIGTERM is only noted, in this list: the loop finishes its update and saves. The
    next one does what it always does."""
    noted, before = [], {}

    def note(number: int, frame) -> None:
        restore()
        noted.append(number)
        once_more = "once more: stop at once"
        if parallel.by_torchrun():  # which kills what has not ended by then, also in the middle of saving
            once_more = "torchrun gives it 30 seconds, or its --shutdown-timeout"
        text = f"\nstopping: this update is finished and saved first ({once_more})\n"
        os.write(2, text.encode())  # print could fail here, in the middle of another one

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    if threading.current_thread() is threading.main_thread():  # no other may change what signals do
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # started with nohup, for instance
                before[number] = signal.signal(number, note)
    try:
        yield noted
    finally:
        restore()


# ---------------------------------------------------------------------------------------------------------------------
# A run while it trains


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

    def count_generation(self, seconds: float, tokens: int, responses: int) -> None:
        self.generating += seconds
        self.generated += tokens
        self.responses += responses

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


class RunDirectory:
    """A run's directory while its updates are done: its lock, log, progress bar, checkpoints, and Ctrl-C. `start`:
    updates done before (--resume). `line`: the last that was logged. `meter`: what the next one counts."""

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
                raise ValueError(f"--resume: {self.o.out} is not the same directory for all processes; they need a "
                                 "shared one")  # fmt: skip
            self.log_file = Log(Path(self.o.out) / "log.jsonl", self.start, self.o.tensorboard)
            parallel.start_alike(self.parameters)
            if not self.start and parallel.rank() > 0:  # dropout of its own
                parallel.seed_process(self.o.seed, self.start)
            every = 0.1 if sys.stderr.isatty() else 30  # seconds; a log file needs no animation
            bar = {"desc": self.description, "unit": "update", "dynamic_ncols": True, "mininterval": every}
            self.progress = tqdm(total=self.total, initial=self.start, **bar)
            self.meter, self.compiled_before = Meter(**self.counts), count_compilations()
            self.stack = stack.pop_all()
        return self

    def __exit__(self, kind, *error) -> None:
        self.progress.close()
        # Process 0 has written the samples; the others have waited for it here, where signals are still noted.
        number = self.asked_to_stop() if kind is None else 0
        self.stack.close()
        if kind is not None:
            return
        if parallel.rank() == 0 and (best := best_checkpoint(self.o)):
            name = KEPT_BY[self.o.keep_best]
            about = f"update {best['step']}, which has the best {name}: {best[name]:.4f}"
            print(f"student/ is from {about}", file=sys.stderr)
        if number:
            raise Stopped(f"stopped after the last update, which is saved in {self.o.out}", number)

    def log(self, done: int, terms: dict[str, float], rows: list, sampled: list) -> None:
        """After update `done`, over these rows and the ones with sampled responses; a line every --log-every."""
        self.meter.tokens += sum(len(row.student.prompt) + len(row.student.response) for row in rows + sampled)
        if self.o.on_policy:  # a response that could not be used left the gold one in its place
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
        """Whether a checkpoint is to be written after this update."""
        return done % self.every == 0 or done == self.total

    def asked_to_stop(self) -> int:
        """The number of the signal that any process was given; 0 for none."""
        return parallel.highest(sum(self.signals))

    def check_weights(self, done: int) -> None:
        """Raises FloatingPointError where update `done` left a weight that is not finite."""
        if not parallel.all_finite(self.parameters):
            raise FloatingPointError(
                f"update {done}: it left weights that are not finite; those in {self.o.out} are from before; a lower "
                "--lr or --weight-decay may help"
            )

    def save(self, done: int, scores: dict[str, float]) -> None:
        """A checkpoint, after logging the held-out scores. Raises Stopped if the run was asked to stop."""
        if scores:
            self.line |= scores
            self.log_file.write({"step": done, **scores})
        score = scores.get(KEPT_BY.get(self.o.keep_best))
        save_checkpoint(self.o, self.pieces, self.optimizer, done, self.counts, score)
        self.meter.since += time.perf_counter() - self.paused  # not training
        if number := self.asked_to_stop():
            raise Stopped(f"stopped after update {done} of {self.total}, which is saved in {self.o.out}", number)

    @contextmanager
    def save_state_on_failure(self, step: int, indices: list[int]) -> Iterator[None]:
        """Around an update: where it raises a FloatingPointError, the state before it is saved, for whoever looks into
        it, and the error raised again with the update's examples."""
        o, pieces, random, counts = self.o, self.pieces, random_state(self.o.device), self.meter.counts()
        try:
            yield
        except FloatingPointError as error:
            parameters = [*pieces.student.named_parameters(), *pieces.method.named_parameters()]
            trained = {name: parallel.local_part(p) for name, p in parameters if p.requires_grad}
            spoilt = [name for name, part in trained.items() if not part.isfinite().all()]
            if parallel.highest(len(spoilt)):  # of a sharded one perhaps only in another process
                name = spoilt[0] if spoilt else "a parameter"
                about = f"{name} was not finite before it, so that nothing but the last checkpoint is in {o.out}"
            else:
                set_random_state(o.device, random)
                save_checkpoint(o, pieces, self.optimizer, step, counts)
                about = f"the state before it is in {o.out}; a new run with a lower --lr or with --dtype fp32 may help"
            places = [pieces.examples[i].where.rpartition(" ") for i in indices[:8]]  # "FILE, line", or item, or row
            lines = ", ".join([line for _, _, line in places] + ["..."] * (len(indices) > 8))
            raise FloatingPointError(f"update {step + 1}: {error} ({places[0][0]}s {lines}); {about}") from None


def count_compilations() -> int:
    """How many graphs torch.compile has compiled in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # importing it takes a second, and nothing else may need it
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


# ---------------------------------------------------------------------------------------------------------------------
# Before and after a run


def say_how_to_go_on(given: dict, arguments: list[str] | None) -> str:
    """How to continue the command that was given."""
    words = [*parallel.launcher().split(), sys.argv[0], *(sys.argv[1:] if arguments is None else arguments)]
    embedded = not given.keys() & {"student", "teacher", "data"}
    out = Path(given.get("out", f"runs/{given.get('method', 'dskd')}"))
    if embedded or (out / "args.json").is_file():
        return f"go on with: {shlex.join(words + ['--resume'] * ('resume' not in given))}"
    if given.get("teacher_sft") and (out / "teacher" / "args.json").is_file():
        return f"go on with: {shlex.join(words)}"
    return f"there is nothing yet to go on with; start again with: {shlex.join(words)}"


def seconds_of_finished_stage(o) -> float | None:
    """How long the training in --out took, if it is finished. Raises ValueError if its options were others."""
    file, asked = Path(o.out) / "finished.json", asdict(replace(o, resume=False))
    if not file.is_file():
        return None
    finished = read_json(file)
    before = {**finished["options"], "out": o.out}  # it may have been moved
    changed = [name for name, value in before.items() if asked.get(name, value) != value]
    if changed:
        was = f"--{changed[0].replace('_', '-')} {before[changed[0]]!r}"
        raise ValueError(f"{o.out} was trained with {was}; give another --out, or remove it to train it again")
    return finished["seconds"]


def finish_stage(o, seconds: float) -> None:
    content = {"seconds": seconds, "options": asdict(replace(o, resume=False))}
    write_text(Path(o.out) / "finished.json", json.dumps(content) + "\n")


def finished_runs(root: Path) -> dict[str, float]:
    """Of each finished stage in a directory: its name, and how long it was trained."""
    return {file.parent.name: read_json(file)["seconds"] for file in sorted(root.glob("*/finished.json"))}
