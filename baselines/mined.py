"""Minimum edit distance alignment (MinED, arXiv 2401.10491): tokens that look alike stand for each other.

Positions are paired by dynamic time warping over edit distances (`edit_distance_alignment`); a teacher token maps to
the student token with the most similar spelling (`edit_distance_map`). Where a student's token is paired with a teacher
token that maps to it, the student learns the teacher's distribution, translated by the map; elsewhere the gold token.

>>> teacher_index, student_index = edit_distance_alignment([b"sun", b" flower"], [b" sun", b"flow", b"er"])
>>> list(zip(teacher_index.tolist(), student_index.tolist()))
[(0, 0), (1, 1), (1, 2)]
"""

import functools
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import log_softmax
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from align import is_byte_fallback, token_bytes
from data import Row
from fast.losses import rest_of
from losses import Counts, cross_entropy_sum, forward_kl, logits_under


def pair_by_edit_distance(row: Row, student, teacher) -> tuple[np.ndarray, np.ndarray]:
    """MinED's aligned positions: warping pairs the tokens that are *read* there, and these must map to each other."""
    inputs = [np.array(side.prompt[-1:] + side.response[:-1]) for side in (row.teacher, row.student)]
    spellings = token_spellings(teacher.tokenizer), token_spellings(student.tokenizer)
    spelt = [[spelling[i] for i in ids] for spelling, ids in zip(spellings, inputs, strict=True)]
    teacher_index, student_index = edit_distance_alignment(*spelt)
    equal = edit_distance_ids(teacher, student)[inputs[0][teacher_index]] == inputs[1][student_index]
    theirs, ours = spellings[0][row.teacher.response[0]], spellings[1][row.student.response[0]]
    if theirs == b" " + ours or ours == b" " + theirs:
        equal &= student_index > 0  # SentencePiece's added space: the teacher would teach a token with it (see ETA)
    return teacher_index[equal], student_index[equal]


@functools.lru_cache(maxsize=4)
def edit_distance_ids(teacher, student) -> np.ndarray:
    """`edit_distance_map` of two tokenizers. As it may take minutes, it is kept in the user's cache ($XDG_CACHE_HOME or
    ~/.cache) under a name derived from both vocabularies. If the cache cannot be read or written, a note says so."""
    names = json.dumps([sorted(tokenizer.tokenizer.get_vocab().items()) for tokenizer in (teacher, student)])
    spelt = repr([token_spellings(tokenizer.tokenizer) for tokenizer in (teacher, student)])
    key = hashlib.sha256((names + spelt + "2").encode()).hexdigest()[:32]  # 2: byte-fallback tokens come last
    file = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "dskd" / f"mined-{key}.npy"
    if file.is_file():
        try:
            mapped = np.load(file, allow_pickle=False)
            if mapped.shape == (teacher.size,) and mapped.dtype == np.int64 and mapped.max() < student.size:
                return mapped
            print(f"{file}: not a vocabulary map; computing it again", file=sys.stderr)
        except (OSError, ValueError, EOFError) as error:
            print(f"{file}: cannot be read; computing it again ({error})", file=sys.stderr)
    mapped = edit_distance_map(teacher.tokenizer, student.tokenizer)
    new = file.with_suffix(f".{os.getpid()}.new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(new, "wb") as stream:
            np.save(stream, mapped)
        os.replace(new, file)
    except OSError as error:
        print(f"{file}: cannot be written, so the next run will compute it again ({error})", file=sys.stderr)
    return mapped


@functools.lru_cache(maxsize=4)
def token_spellings(tokenizer: Tokenizer) -> list[bytes | None]:
    """`token_bytes`, with special tokens spelt by their names: MinED compares every token. None for unused ids."""
    named = [(piece, tokenizer.id_to_token(i)) for i, piece in enumerate(token_bytes(tokenizer))]
    return [name.encode() if piece is None and name is not None else piece for piece, name in named]


def edit_distance_map(teacher: Tokenizer, student: Tokenizer) -> np.ndarray:
    """(V_t,) for each teacher token the student token with the same spelling, else the one with the smallest edit
    distance (of several, the first that is not a byte-fallback token); -1 for ids that the teacher's vocabulary does
    not use. Takes a minute or two for a hundred thousand tokens without an exact match."""
    spelt, spelt_student = token_spellings(teacher), token_spellings(student)
    fallback, fallback_student = is_byte_fallback(teacher, len(spelt)), is_byte_fallback(student, len(spelt_student))
    ids: dict[tuple[bytes, bool], int] = {}  # `A` and `<0x41>` spell the same; each maps to its own kind
    for index, key in enumerate(zip(spelt_student, fallback_student, strict=True)):
        ids.setdefault(key, index)
    mapped = np.full(len(spelt), -1, dtype=np.int64)
    unmatched: dict[int, list[int]] = {}  # length -> teacher ids
    for index, (piece, kind) in enumerate(zip(spelt, fallback, strict=True)):
        if piece is not None:
            mapped[index] = ids.get((piece, kind), -1)
            if mapped[index] < 0:
                unmatched.setdefault(len(piece), []).append(index)

    student_ids = np.array([index for index, piece in enumerate(spelt_student) if piece is not None])
    order, table, lengths = _by_length([spelt_student[index] for index in student_ids])
    student_ids = student_ids[order]
    parts = [(length, ids[i : i + 16]) for length, ids in sorted(unmatched.items()) for i in range(0, len(ids), 16)]
    reach, near = -1, 0
    every = 0.1 if sys.stderr.isatty() else 30  # seconds; a log file needs no animation
    bar = {"desc": "MinED vocabulary map", "unit": "part", "leave": False, "delay": 2, "mininterval": every}
    for length, part in tqdm(parts, **bar):
        if length > reach:  # any text of up to this length is within `length` edits, but none of over twice that
            reach = length
            near = np.searchsorted(-lengths, -(length + max(length, lengths[-1])))
            near_table = np.ascontiguousarray(table[:, near:])
        distance = _edit_distances([spelt[index] for index in part], near_table, lengths[near:])
        for row, index in zip(distance, part, strict=True):
            nearest = student_ids[near:][row == row.min()].tolist()
            mapped[index] = min(nearest, key=lambda i: (fallback_student[i], i))
    return mapped


def mapped_columns(mapped: np.ndarray, teacher: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """(teacher_ids, student_ids): each student token that a teacher token maps to, and the first teacher token that
    does. Byte-fallback tokens come last: `<0x41>` must not replace `A`, though its id is smaller."""
    order = np.argsort(np.array(is_byte_fallback(teacher, len(mapped))) | (mapped < 0), kind="stable")
    student_ids, first = np.unique(mapped[order], return_index=True)  # the first occurrence of each
    used = student_ids >= 0
    return order[first[used]], student_ids[used]


def edit_distance_alignment(teacher: list[bytes], student: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (teacher_index, student_index) by dynamic time warping. A path advances in one or both token sequences at
    each step; the one with the smallest sum of edit distances (without spaces) is chosen. If steps cost the same, seen
    from the end, the order of preference is both, the teacher, the student. Only student tokens that meet exactly one
    teacher token are paired; a teacher token may be in several pairs."""
    cost = edit_distances([t.replace(b" ", b"") for t in teacher], [s.replace(b" ", b"") for s in student])
    total = np.full((len(teacher) + 1, len(student) + 1), np.inf)  # of the first i and j tokens
    total[0, 0] = 0
    for i, row in enumerate(cost):
        before = np.minimum(total[i, 1:], total[i, :-1])  # a step of the teacher, or of both
        # total[i+1, j+1] = row[j] + min(before[j], total[i+1, j]); a running minimum replaces the loop over j
        sums = np.cumsum(row)
        total[i + 1, 1:] = sums + np.minimum.accumulate(before - (sums - row))
    i, j = len(teacher), len(student)
    met = []
    while i > 0:
        met.append((i - 1, j - 1))
        step = int(np.argmin([total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]]))
        i, j = i - (step < 2), j - (step != 1)
    teacher_index, student_index = np.array(met[::-1], dtype=np.int64).T
    once = np.bincount(student_index)[student_index] == 1
    return teacher_index[once], student_index[once]


def edit_distances(patterns: list[bytes], texts: list[bytes]) -> np.ndarray:
    """Levenshtein distances (P, n) of P strings to n others."""
    order, table, lengths = _by_length(texts)
    distance = np.empty((len(patterns), len(texts)), dtype=np.int64)
    distance[:, order] = _edit_distances(patterns, table, lengths)
    return distance


def _by_length(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The texts as columns (length, n) of bytes, the longest first: their order, the columns, and their lengths."""
    lengths = np.array([len(text) for text in texts])
    order = np.argsort(-lengths, kind="stable")
    table = np.array([np.frombuffer(texts[i].ljust(lengths.max(), b"\0"), dtype=np.uint8) for i in order])
    return order, table.T, lengths[order]


def _edit_distances(patterns: list[bytes], table: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Myers' algorithm (1999) in Hyyrö's form, one byte of all texts at a time. Two words per text encode a column of
    the usual table: bit i of `plus` (`minus`) is set if entry i + 1 is one more (less) than entry i. The narrowest word
    that holds the patterns is the fastest; for more than 64 bytes, Python's integers are used."""
    longest = max(map(len, patterns))
    word = np.dtype(next((f"u{bits // 8}" for bits in (8, 16, 32, 64) if longest <= bits), object))
    where = np.zeros((len(patterns), 256), dtype=word)  # bit i: the pattern has this byte at i
    for row, pattern in enumerate(patterns):
        for i, byte in enumerate(pattern):
            where[row, byte] |= np.array(1 << i, dtype=word)[()]
    masks = np.array([[(1 << len(pattern)) - 1] for pattern in patterns], dtype=word)
    plus = np.repeat(masks, len(lengths), axis=1)  # against an empty text, entry i is i
    minus = np.zeros_like(plus)
    for position in range(lengths[0]):
        alive = slice(0, np.searchsorted(-lengths, -position))  # texts that have a byte here: the first ones
        p, m = plus[:, alive], minus[:, alive]
        equal = where.take(table[position, alive], axis=1)
        diagonal = (((equal & p) + p) ^ p) | equal  # where the distance does not grow down the diagonal
        up, down = ((m | ~(diagonal | p)) << 1) | 1, (p & diagonal) << 1  # changes along a row; the first row grows
        keep = equal | m
        plus[:, alive] = down | ~(keep | up)
        minus[:, alive] = up & keep
    ones = np.bitwise_count  # the last entry of the last column: its first entry, and all the steps up and down
    return lengths + ones(plus & masks).astype(np.int64) - ones(minus & masks).astype(np.int64)


def mined_loss(
    student_hidden: Tensor,  # (N, d)
    gold: Tensor,  # (N,)
    rows: Tensor,  # (K,) the student token that each teacher state is aligned with
    teacher_hidden: Tensor,  # (K, D)
    student_head: Tensor,  # (V_s, d)
    teacher_head: Tensor,  # (V_t, D)
    teacher_ids: Tensor,  # (S,) `mapped_columns`: the teacher token whose logit ...
    student_ids: Tensor,  # (S,) ... each of these student tokens takes
    counts: Counts,
    temperature: float = 2.0,
    kd_rate: float = 0.5,
    chunk: int = 0,
) -> dict[str, Tensor]:
    """loss = (1 − kd_rate)·L_gold + kd_rate·Σ q (log q − log p)/N. {ce, correct, kd, loss}

    q is the teacher's distribution in the student's vocabulary where a token is aligned, elsewhere 1 at the gold token.
    `chunk`: the number of tokens at a time, whose logits are computed again in the backward pass; 0: all at once. The
    student's logits are only read (in float32 the official code overwrites them with the target: no gradient).
    """

    def sums(hidden, gold, teacher_hidden=None):
        """ce, correct and kd of tokens that all have a partner, or of which none has."""
        logits = logits_under(hidden, student_head)  # (n, V_s)
        ce, correct = cross_entropy_sum(logits, gold), (logits.argmax(-1) == gold).sum()
        if teacher_hidden is None:
            return ce, correct, cross_entropy_sum(logits / temperature, gold)
        teacher_logits = logits_under(teacher_hidden, teacher_head).detach()  # (n, V_t)
        log_p = log_softmax(logits / temperature, -1)[:, student_ids]  # (n, S)
        log_q = log_softmax(teacher_logits[:, teacher_ids] / temperature, -1)  # (n, S)
        return ce, correct, forward_kl(log_p, log_q).sum()

    alone = rest_of(rows, len(gold))
    groups = (student_hidden[rows], gold[rows], teacher_hidden), (student_hidden[alone], gold[alone])
    parts = [part for group in groups for part in zip(*(x.split(chunk or max(1, len(x))) for x in group), strict=True)]
    terms = [checkpoint(sums, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    ce, correct, kd = (sum(column) for column in zip(*terms, strict=True))
    ce, kd = (total / counts.over("tokens") for total in (ce, kd))
    return {"ce": ce, "correct": correct, "kd": kd, "loss": (1 - kd_rate) * ce + kd_rate * kd}
