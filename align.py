r"""Aligning two tokenisations of one text: exactly (ETA, DSKDv2) or by attention (CMA, DSKD).

Teacher and student may cut the same response into different tokens. Before their states can be compared,
somebody has to say which teacher position speaks about which student position:

- exact token alignment, ETA (arXiv 2504.11426, eq. 14): the positions where both predict the same token after the
  same history. `exact_token_alignment` finds them, `prediction_map` translates the teacher's predictions.
- cross-model attention, CMA (arXiv 2406.17328): every student position attends to all positions of the teacher's
  response, and the reverse. `cross_model_attention` gives each model's states as seen from the other's positions.

Where this differs from the official code: it compares token *strings* and so loses the rest of a response after the
first accent, newline or emoji, which byte-level and SentencePiece vocabularies spell differently. We compare *bytes*.

A tokenizer here is one of the `tokenizers` library: with `transformers`, pass `tokenizer.backend_tokenizer`.

Example (a SentencePiece-like teacher with its dummy leading space, a byte-level student, None = end-of-text):

>>> teacher = [b" Caf", b"\xc3", b"\xa9", b" noir", None]
>>> student = [b"C", b"af", b"\xc3\xa9", b" noir", None]
>>> teacher_index, student_index = exact_token_alignment(teacher, student)
>>> teacher_index.tolist(), student_index.tolist()
([3, 4], [3, 4])
"""

import json
import math
import re
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------------------------
# Canonical bytes: what a token spells, whatever its vocabulary calls it


def byte_level_table() -> dict[str, int]:
    """The character that byte-level BPE (GPT-2) writes for each of the 256 bytes, inverted: character -> byte.

    Printable Latin-1 bytes are written as themselves; the other 68, in order, as U+0100, U+0101, ...
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    table, extra = {}, 0
    for byte in range(256):
        if byte in printable:
            table[chr(byte)] = byte
        else:
            table[chr(256 + extra)] = byte
            extra += 1
    return table


BYTE_LEVEL = byte_level_table()
BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's token for one byte of an unknown character


def _spelling(tokenizer: Tokenizer) -> tuple[str, str | None]:
    """"byte-level" (GPT-2, Llama 3, Qwen, SmolLM2) or "sentencepiece" (Llama 2, TinyLlama, Mistral), and the unknown
    token's name."""
    description = json.loads(tokenizer.to_str())
    model = description["model"]
    parts = json.dumps([description["pre_tokenizer"], description["decoder"], description["normalizer"]])
    unknown = model.get("unk_token")
    if model.get("unk_id") is not None:  # Unigram names it by id
        unknown = model["vocab"][model["unk_id"]][0]
    marked = model.get("end_of_word_suffix") or model.get("continuing_subword_prefix")  # "</w>", "##": not in the text
    if '"ByteLevel"' in parts and not marked:
        return "byte-level", unknown
    if ('"Metaspace"' in parts or "\\u2581" in parts) and not marked:  # U+2581 is SentencePiece's visible space
        return "sentencepiece", unknown
    raise ValueError(
        f"cannot tell which bytes this tokenizer's tokens spell (model {model['type']}, decoder "
        f"{(description['decoder'] or {}).get('type')}): byte-level BPE and SentencePiece-style can be aligned"
    )


def token_bytes(tokenizer: Tokenizer) -> list[bytes | None]:
    """The bytes each token spells, by id. None for special tokens, the unknown token, and unused ids.

    Byte-level tokens go through GPT-2's byte table; in SentencePiece vocabularies U+2581 is a space and `<0xE9>` that
    byte; added tokens that are not special are plain text. Raises ValueError for another kind of tokenizer.
    """
    kind, unknown = _spelling(tokenizer)
    added = tokenizer.get_added_tokens_decoder()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    spelt: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for token, index in vocabulary.items():
        if index in added:
            spelt[index] = None if added[index].special else token.encode()
        elif token == unknown:
            spelt[index] = None
        elif kind == "byte-level":
            # a character outside the table can only come from a token that training never produced: plain text
            spelt[index] = b"".join(bytes([BYTE_LEVEL[c]]) if c in BYTE_LEVEL else c.encode() for c in token)
        elif match := BYTE_FALLBACK.fullmatch(token):
            spelt[index] = bytes([int(match[1], 16)])
        else:
            spelt[index] = token.replace("\u2581", " ").encode()
    return spelt


def is_byte_fallback(tokenizer: Tokenizer, size: int) -> list[bool]:
    """Which of the first `size` ids are byte-fallback tokens."""
    return [bool(BYTE_FALLBACK.fullmatch(tokenizer.id_to_token(i) or "")) for i in range(size)]


def _ids_by_bytes(tokenizer: Tokenizer, eos: int | None) -> dict[bytes, int]:
    """bytes -> id, without end-of-text; of several ids with the same bytes the first that is no byte-fallback token."""
    spelt = token_bytes(tokenizer)
    if eos is not None:
        spelt[eos] = None  # also where the vocabulary does not mark it as special
    fallback = is_byte_fallback(tokenizer, len(spelt))
    ids: dict[bytes, int] = {}
    for index in sorted(range(len(spelt)), key=lambda i: (fallback[i], i)):
        if spelt[index]:
            ids.setdefault(spelt[index], index)
    return ids


def vocabulary_overlap(
    teacher: Tokenizer, student: Tokenizer, teacher_eos: int | None = None, student_eos: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Ids (teacher_ids, student_ids) of the tokens that both vocabularies have, ordered by student id.

    Special tokens and end-of-text take no part: what they mean differs even where their names agree.
    """
    teacher_ids, student_ids = _ids_by_bytes(teacher, teacher_eos), _ids_by_bytes(student, student_eos)
    common = sorted((student_ids[b], teacher_ids[b]) for b in student_ids.keys() & teacher_ids.keys())
    student_side, teacher_side = np.array(common, dtype=np.int64).reshape(-1, 2).T
    return teacher_side.copy(), student_side.copy()


def prediction_map(teacher: Tokenizer, student: Tokenizer, teacher_eos: int, student_eos: int, size: int) -> np.ndarray:
    """(size,) student id of each teacher id, -1 where the student has no such token: the ŷᵗ ∈ V_stu of eq. 14.

    Every teacher id that spells a token of the student maps to it; the two end-of-text tokens map to each other.
    Eq. 14 keeps only the aligned pairs where the teacher's prediction maps to an id >= 0.
    `size` is the number of rows of the teacher's head, which may be padded beyond its tokenizer.
    """
    student_ids = _ids_by_bytes(student, student_eos)
    mapped = np.full(size, -1, dtype=np.int64)
    for index, spelt in enumerate(token_bytes(teacher)[:size]):
        mapped[index] = student_ids.get(spelt, -1) if spelt else -1
    mapped[teacher_eos] = student_eos
    return mapped


# ---------------------------------------------------------------------------------------------------------------------
# Exact token alignment (ETA)


def exact_token_alignment(
    teacher: list[bytes | None], student: list[bytes | None]
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (teacher_index, student_index) of response tokens that are equal and have equal histories (v2, eq. 14).

    teacher, student: the canonical bytes of each response token in order; None is end-of-text and matches None. Returns
    two int64 arrays of equal length, both increasing. One leading space that only one side has (SentencePiece's
    dummy prefix) is ignored. Where both sides spell the same bytes this is one sweep over the two offset arrays;
    where a tokenizer changed the text (NFC, lower-casing) `align_by_programme` aligns what can be aligned.

    The bytes of a response are `[None if i == eos else spelt[i] or b"" for i in ids]` with `spelt = token_bytes(...)`:
    special tokens other than end-of-text spell nothing. The indices count from the start of the response; where the
    responses of a batch are flattened into one row, add the lengths of those before it.
    """
    teacher, student = _without_dummy_prefix(teacher, student)
    if _stream(teacher) == _stream(student):
        return align_by_sweep(teacher, student)
    return align_by_programme(teacher, student)


def _stream(tokens: list[bytes | None]) -> tuple[bytes, list[int]]:
    """What a token sequence spells: its bytes, and after how many bytes each end-of-text stands."""
    if None not in tokens:
        return b"".join(tokens), []
    if tokens.index(None) == len(tokens) - 1:  # the usual response: one end-of-text, at the end
        text = b"".join(tokens[:-1])
        return text, [len(text)]
    ends, length = [], 0
    for token in tokens:
        if token is None:
            ends.append(length)
        else:
            length += len(token)
    return b"".join(token for token in tokens if token is not None), ends


def _leading_spaces(tokens: list[bytes | None]) -> int:
    """Number of spaces the sequence starts with."""
    count = 0
    for token in tokens:
        if token is None or token.strip(b" "):
            return count + (len(token) - len(token.lstrip(b" ")) if token else 0)
        count += len(token)
    return count


def _without_dummy_prefix(teacher, student):
    """Drop one leading space from the side that has more of them."""
    surplus = _leading_spaces(teacher) - _leading_spaces(student)
    if surplus > 0:
        teacher = _drop_first_byte(teacher)
    elif surplus < 0:
        student = _drop_first_byte(student)
    return teacher, student


def _drop_first_byte(tokens):
    first = next(i for i, token in enumerate(tokens) if token)
    return [*tokens[:first], tokens[first][1:], *tokens[first + 1 :]]


def align_by_sweep(teacher: list[bytes | None], student: list[bytes | None]) -> tuple[np.ndarray, np.ndarray]:
    """Fast path of `align_by_programme` for sides that spell the same: tokens whose byte spans coincide.

    With equal texts, equal histories mean equal start offsets and equal tokens equal end offsets, so that the
    programme's free cells are the shared offsets and one linear intersection finds all matches.
    """
    teacher_index, teacher_spans = _spans(teacher)
    student_index, student_spans = _spans(student)
    _, in_teacher, in_student = np.intersect1d(teacher_spans, student_spans, assume_unique=True, return_indices=True)
    return teacher_index[in_teacher], student_index[in_student]


def _spans(tokens: list[bytes | None]) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the tokens that are not empty, and their spans [start, end) packed into one integer each."""
    # end-of-text counts as one byte: the caller has checked that both sides have them in the same places
    lengths = np.array([1 if token is None else len(token) for token in tokens], dtype=np.int64)
    ends = lengths.cumsum()
    index = np.flatnonzero(lengths)
    return index, (ends[index] - lengths[index] << 32) | ends[index]


def align_by_programme(teacher: list[bytes | None], student: list[bytes | None]) -> tuple[np.ndarray, np.ndarray]:
    """The definition of the alignment, as a dynamic programme over pairs of prefixes; works for any two sequences.

    A cell (x, y) is a pair of prefixes, x symbols of the teacher's text and y of the student's (a symbol is a byte or
    an end-of-text). A step to the next cell deletes a symbol, inserts one, or keeps an equal one; a *match* keeps two
    whole equal tokens at once. Of all ways from (0, 0) to the end with the fewest deletions and insertions we take the
    one with the most matches. Equal texts need no deletion, so that only cells whose prefixes spell the same bytes are
    reached, which is eq. 14 to the letter; where the texts differ, what the difference does not touch still aligns.
    O(length²) time and memory, one vectorised row per byte of the teacher's text.
    """
    teacher_symbols, teacher_ends = _symbols(teacher)
    student_symbols, student_ends = _symbols(student)
    edit = min(len(teacher), len(student)) + 1  # one edit outweighs all matches there can be
    ladder = edit * np.arange(len(student_symbols) + 1)  # cost of inserting y symbols

    same_token: dict[bytes | None, list[int]] = {}
    for j, token in enumerate(student):
        same_token.setdefault(token, []).append(j)
    # a token that spells nothing (a stripped dummy prefix) is left out: it says nothing
    match_at = {end: i for i, end in enumerate(teacher_ends) if teacher[i] != b""}

    def starts(i: int, ends: list[int], tokens: list) -> int:
        return ends[i] - (1 if tokens[i] is None else len(tokens[i]))

    cost = np.empty((len(teacher_symbols) + 1, len(student_symbols) + 1), dtype=np.int64)
    cost[0] = ladder
    for x in range(1, len(teacher_symbols) + 1):
        row = cost[x - 1] + edit  # delete the teacher's symbol
        kept = student_symbols == teacher_symbols[x - 1]
        row[1:][kept] = np.minimum(row[1:][kept], cost[x - 1, :-1][kept])  # keep an equal symbol
        if (i := match_at.get(x)) is not None:
            x0 = starts(i, teacher_ends, teacher)
            for j in same_token.get(teacher[i], ()):
                y, y0 = student_ends[j], starts(j, student_ends, student)
                row[y] = min(row[y], cost[x0, y0] - 1)  # match two whole tokens
        cost[x] = np.minimum.accumulate(row - ladder) + ladder  # insert symbols of the student

    pairs = []
    x, y = len(teacher_symbols), len(student_symbols)
    token_at = {end: j for j, end in enumerate(student_ends) if student[j] != b""}
    while x > 0 or y > 0:  # walk back along the steps that explain each cost
        i, j = match_at.get(x), token_at.get(y)
        if i is not None and j is not None and teacher[i] == student[j]:
            x0, y0 = starts(i, teacher_ends, teacher), starts(j, student_ends, student)
            if cost[x, y] == cost[x0, y0] - 1:
                pairs.append((i, j))
                x, y = x0, y0
                continue
        if x > 0 and y > 0 and teacher_symbols[x - 1] == student_symbols[y - 1] and cost[x, y] == cost[x - 1, y - 1]:
            x, y = x - 1, y - 1
        elif x > 0 and cost[x, y] == cost[x - 1, y] + edit:
            x -= 1
        else:
            y -= 1
    teacher_index, student_index = np.array(pairs[::-1], dtype=np.int64).reshape(-1, 2).T
    return teacher_index.copy(), student_index.copy()


def _symbols(tokens: list[bytes | None]) -> tuple[np.ndarray, list[int]]:
    """The sequence as integers, a byte each and 256 for end-of-text, and the offset at which each token ends."""
    symbols: list[int] = []
    ends = []
    for token in tokens:
        symbols.extend([256] if token is None else token)
        ends.append(len(symbols))
    return np.array(symbols, dtype=np.int64), ends


# ---------------------------------------------------------------------------------------------------------------------
# Cross-model attention (CMA)


class ResponseTokens(NamedTuple):
    """One model's R response positions, all examples of the batch in one row."""

    inputs: Tensor  # (R,) the token that is read at each position
    labels: Tensor  # (R,) the token that follows, which the position predicts
    lengths: list[int]  # how many of the R belong to each example
    embed: Tensor  # (V, width) the model's token embeddings
    hidden: Tensor  # (R, width) its last hidden states

    def embeddings(self) -> tuple[Tensor, Tensor]:
        """E(x) and E(y), (R, width) each, in float32 or better, without gradient."""
        return tuple(at_least_float32(self.embed.detach()[tokens]) for tokens in (self.inputs, self.labels))


class Deviations(NamedTuple):
    """The standard deviations by which CMA divides the teacher's side, each over all the numbers of its tensor, at the
    response positions of the whole update. (In the official code padding takes part: its loss depends on it.)"""

    key: float  # of [E_t(x); E_t(y)]
    label: float  # of E_t(y)
    hidden: float  # of the last hidden states


def cross_model_attention(
    student: ResponseTokens,
    teacher: ResponseTokens,
    projectors: nn.Module,  # .query 2d -> 2D, .t2s D -> d, .s2t d -> D
    std: Deviations,
) -> tuple[Tensor, Tensor]:
    """Each model's states, seen from the other's positions (v1): t2s (N, d) and s2t (M, D).

    Q = W_q [E_s(x); E_s(y)]    K = [E_t(x); E_t(y)]/σ    V = t2s(h_t/σ + E_t(y)/σ)    x is read, y predicted
    A = Q Kᵀ/√(2D)              t2s = softmax_M(A) V      s2t = softmax_N(A)ᵀ s2t(h_s)

    Examples do not see each other. All in float32, whatever autocast says: the scores decide who is heard.
    """
    with torch.autocast(student.hidden.device.type, enabled=False):
        teacher_inputs, teacher_labels = teacher.embeddings()
        query = projectors.query(torch.cat(student.embeddings(), -1))  # (N, 2D)
        key = torch.cat([teacher_inputs, teacher_labels], -1) / std.key  # (M, 2D)
        t2s_value = projectors.t2s(at_least_float32(teacher.hidden) / std.hidden + teacher_labels / std.label)  # (M, d)
        s2t_value = projectors.s2t(at_least_float32(student.hidden))  # (N, D)

        t2s, s2t = [], []
        of_student = zip(query.split(student.lengths), s2t_value.split(student.lengths), strict=True)
        of_teacher = zip(key.split(teacher.lengths), t2s_value.split(teacher.lengths), strict=True)
        for (q, v_s), (k, v_t) in zip(of_student, of_teacher, strict=True):  # an example's n and m positions
            scores = q @ k.T / math.sqrt(k.shape[-1])  # (n, 2D) x (2D, m) -> (n, m); 2D is the papers' 2·D
            t2s.append(scores.softmax(1) @ v_t)  # (n, m) x (m, d) -> (n, d)
            s2t.append(scores.T.softmax(1) @ v_s)  # (m, n) x (n, D) -> (m, D)
        return torch.cat(t2s), torch.cat(s2t)


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def teacher_moments(teacher: ResponseTokens) -> list[float]:
    """(count, sum, sum of squares) of each of the three tensors of `Deviations`, nine numbers in float64: they add up
    over batches and processes."""
    inputs, labels = teacher.embeddings()
    moments: list[float] = []
    for x in (torch.cat([inputs, labels], -1), labels, teacher.hidden):
        squares = torch.linalg.vector_norm(x, dtype=torch.float64) ** 2
        moments += [x.numel(), float(x.sum(dtype=torch.float64)), float(squares)]
    return moments


def deviations(moments: list[float]) -> Deviations:
    """From the sums of `teacher_moments`; unbiased, as torch's: divided by count − 1."""
    columns = zip(moments[0::3], moments[1::3], moments[2::3], strict=True)
    return Deviations(*(math.sqrt((squares - total**2 / n) / (n - 1)) for n, total, squares in columns))
