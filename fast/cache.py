"""The teacher's hidden states on disk: computed once, then read. A run that finds them loads no layer of the teacher.

From a frozen teacher, distillation needs the hidden states at the response positions, the head, and the embeddings.
Head and embeddings are small, and the states never change. So the states are computed before the first update, while
the teacher has the device to itself; every epoch and every later run reads them. In KEY/, inside the given directory:

    states.bin         M tokens × D, bfloat16, one example after the other, the teacher's longest first
    predictions-V.bin  M tokens, int32: the arg-max over V rows of the head, for methods that need it (DSKD v2)
    *.json             how many examples in that file are done, and the SHA-256 of their contents

KEY is the SHA-256 of everything that the states depend on: the teacher's config.json and weights, the arithmetic (fp32
or bf16), and the ids of every example as the teacher reads them. These ids reflect its tokenizer, the data, the
template and the length limits. Runs with another student, method, alignment or learning rate share the files, so the
order of the examples in them must depend on these ids alone.

bfloat16 is what a bf16 run computes with anyway. A float32 run gets the numbers of a teacher whose states are rounded
to bfloat16 (8 significant bits). Predictions are made from the rounded states, so that both are consistent.
"""

import functools
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import Row, collate_side
from losses import predict_tokens
from model import checkpoint_files, hidden_at, load_model, read_config, read_json

RECORD_EVERY = 10.0  # seconds of work that are lost at most if the process is killed while filling the cache


class TeacherCache:
    """The cache of one teacher on one list of rows."""

    def __init__(self, root: str | Path, teacher: Path, rows: list[Row], dtype: torch.dtype, device, batch_size: int):
        """dtype: of the teacher's weights; with bfloat16 the teacher runs under autocast, as in training."""
        self.teacher, self.dtype, self.device, self.batch_size = teacher, dtype, device, batch_size
        # By length: little padding, and the largest memory need comes first. Not by the student's lengths, because
        # other students read the same file. Rows of equal length keep the order of the data, which is part of the key.
        self.rows = sorted(rows, key=lambda row: len(row.teacher), reverse=True)
        self.folder = Path(root) / cache_key(teacher, rows, dtype)

    def attach_states(self, compiled: bool = False) -> None:
        """Give every row its `states`, computed now if they are missing. Raises ValueError as `stored` does."""

        @functools.cache
        def teacher():  # loaded only if states are missing, and freed on return
            model = load_model(self.teacher, self.dtype, self.device).requires_grad_(False)
            return torch.compile(model, dynamic=True) if compiled else model

        @torch.no_grad()
        def compute(rows: list[Row]) -> np.ndarray:
            side = collate_side([row.teacher for row in rows], pad_id=0).to(self.device)
            with self.autocast():
                hidden = hidden_at(teacher(), side)
            return hidden.bfloat16().view(torch.int16).cpu().numpy()

        width = read_config(read_json(self.teacher / "config.json")).width
        for row, states in zip(self.rows, self.stored("states.bin", np.int16, (width,), compute), strict=True):
            row.states = states

    def attach_predictions(self, head: torch.Tensor) -> None:
        """Likewise give every row, which must have states, its `predictions` under `head` (V, D)."""

        @torch.no_grad()
        def compute(rows: list[Row]) -> np.ndarray:
            states = torch.from_numpy(np.concatenate([row.states for row in rows])).view(torch.bfloat16)
            with self.autocast():
                return predict_tokens(states.to(self.device, head.dtype), head).int().cpu().numpy()

        parts = self.stored(f"predictions-{len(head)}.bin", np.int32, (), compute)
        for row, predictions in zip(self.rows, parts, strict=True):
            row.predictions = predictions

    def autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def stored(self, name: str, kind: type, shape: tuple, compute: Callable) -> list[np.ndarray]:
        """One array (M, *shape) of dtype `kind` per row, mapped from the file `name`.

        Missing rows are appended: `compute` takes some rows and returns their arrays, concatenated. The record beside
        the file says how many rows are done, and is replaced only after these are on disk; anything beyond them is
        dropped and computed again. Raises ValueError if the file does not match its record, or if the disk is too
        small. Waits while another process is filling the file.
        """
        file, record = self.folder / name, (self.folder / name).with_suffix(".json")
        lengths = [len(row.teacher.response) for row in self.rows]
        tokens = [0, *accumulate(lengths)]  # the number of tokens before each row, and in all rows
        token_bytes = np.dtype(kind).itemsize * int(np.prod(shape))
        self.folder.mkdir(parents=True, exist_ok=True)
        read_only = file.is_file() and not os.access(file, os.W_OK)  # of somebody else, or on a read-only disk
        with name_in_errors(file), open(file, "rb" if read_only else "a+b") as stream:
            wait_for_lock(stream, file)
            done, hasher = self.verify(stream, file, record, [count * token_bytes for count in tokens])
            missing = (tokens[-1] - tokens[done]) * token_bytes
            if missing:
                about = f"{file}: {tokens[-1]:,} tokens × {token_bytes} bytes = {gigabytes(tokens[-1] * token_bytes)}"
                if read_only:
                    raise ValueError(f"{about}; {gigabytes(missing)} are missing, but the file cannot be written: give "
                                     "another directory")  # fmt: skip
                print(about + f", {gigabytes(missing)} to go" * (done > 0), file=sys.stderr)
                free = shutil.disk_usage(self.folder).free
                if missing > free:
                    raise ValueError(f"{about}; the disk has {gigabytes(free)} left, but {gigabytes(missing)} are "
                                     "needed: give another directory")  # fmt: skip
                stream.truncate(tokens[done] * token_bytes)
            saved, every = time.monotonic(), 0.1 if sys.stderr.isatty() else 30  # seconds
            progress = tqdm(total=len(self.rows), initial=done, desc=name, unit="example", mininterval=every,
                            disable=not missing)  # fmt: skip
            while done < len(self.rows):
                part = self.rows[done : done + self.batch_size]
                content = np.ascontiguousarray(compute(part), kind).tobytes()
                stream.write(content)
                hasher.update(content)
                done += len(part)
                progress.update(len(part))
                if done == len(self.rows) or time.monotonic() - saved >= RECORD_EVERY:
                    stream.flush()
                    os.fsync(stream.fileno())
                    write_record(record, {"rows": done, "sha256": hasher.hexdigest()})
                    saved = time.monotonic()
            progress.close()
        array = np.asarray(np.memmap(file, kind, "r", shape=(tokens[-1], *shape)))
        return [array[first : first + length] for first, length in zip(tokens, lengths, strict=False)]

    def verify(self, stream, file: Path, record: Path, ends: list[int]):
        """The number of rows that are done according to the record, and their hash, checked against the record's. ends:
        the number of bytes before each row, and of all rows."""
        done, expected, hasher = 0, hashlib.sha256().hexdigest(), hashlib.sha256()
        damaged = ValueError(f"{file} is damaged or was changed: delete {self.folder}, and the next run fills it again")
        if record.is_file():
            try:
                content = json.loads(record.read_text())
                done, expected = content["rows"], content["sha256"]
            except (ValueError, KeyError, TypeError) as error:
                raise damaged from error
        if type(done) is not int or not 0 <= done < len(ends):
            raise damaged
        stream.seek(0)
        left = ends[done]
        while block := stream.read(min(1 << 24, left)):
            hasher.update(block)
            left -= len(block)
        beyond = stream.seek(0, os.SEEK_END) > ends[-1]
        if left or hasher.hexdigest() != expected or (beyond and done == len(self.rows)):
            raise damaged
        return done, hasher


def cache_key(teacher: Path, rows: list[Row], dtype: torch.dtype) -> str:
    """The name under which the teacher's states on these rows are kept; reads all of the weights."""
    # Version 2: the order of the rows no longer depends on the student. Files of version 1 are not used.
    hasher = hashlib.sha256(f"teacher states, version 2, {dtype}, {model_digest(teacher)}".encode())
    for row in rows:
        ids = [len(row.teacher.prompt), len(row.teacher.response), *row.teacher.prompt, *row.teacher.response]
        hasher.update(np.array(ids, np.int64).tobytes())
    return hasher.hexdigest()[:32]


def model_digest(*directories: Path) -> str:
    """sha256 of the models' contents, wherever they are stored: config.json and the weights, all of which it reads."""
    hasher = hashlib.sha256()
    for file in (file for path in directories for file in (path / "config.json", *checkpoint_files(path))):
        content = hashlib.sha256()
        with open(file, "rb") as stream:
            while block := stream.read(1 << 24):
                content.update(block)
        hasher.update(content.digest())
    return hasher.hexdigest()


def wait_for_lock(stream, file: Path) -> None:
    """Lock the open file until it is closed, or the process ends."""
    import fcntl  # here, because it exists only on Unix, and eval.py also runs elsewhere

    kind = fcntl.LOCK_EX if stream.writable() else fcntl.LOCK_SH  # NFS has no exclusive lock for who only reads
    try:
        fcntl.flock(stream, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{file}: waiting for another run that uses it", file=sys.stderr)
        fcntl.flock(stream, kind)


@contextmanager
def name_in_errors(file: Path) -> Iterator[None]:
    """Add to an error in writing, such as a full disk, which file it concerns."""
    try:
        yield
    except OSError as error:
        if error.filename or error.errno is None:  # the message already names a file
            raise
        raise OSError(f"{file} could not be written ({error.strerror}); the examples that are done are kept: make "
                      "room, then run the same command again") from error  # fmt: skip


def write_record(record: Path, content: dict) -> None:
    new = record.with_suffix(".json.new")
    with open(new, "w") as stream:
        stream.write(json.dumps(content) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(new, record)


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
