r"""Aligning two tokenisations of one text: exactly (ETA, DSKDv2) or by attention (CMA, DSKD).

Teacher and student may split the same response into different tokens. Before their states can be compared, teacher
positions must be matched with student positions:

- exact token alignment, ETA (arXiv 2504.11426, eq. 14): pairs of equal response tokens that have equal histories.
  `exact_token_alignment` finds them, `prediction_map` translates the teacher's predictions.
- cross-model attention, CMA (arXiv 2406.17328): every student position attends to all positions of the teacher's
  response, and the reverse. `cross_model_attention` gives each model's states as seen from the other's positions.

Difference from the official code: that code compares token *strings* and so loses the rest of a response after the
first accent, newline or emoji, which byte-level and SentencePiece vocabularies spell differently. We compare *bytes*.

A tokenizer here is one of the `tokenizers` library: with `transformers`, pass `tokenizer.backend_tokenizer`.
`python align.py TEXT --teacher DIR --student DIR` (or a data file in place of TEXT) shows what aligns.

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
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_LEVEL = byte_level_table()
BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's token for one byte of an unknown character


def token_bytes(tokenizer: Tokenizer) -> list[bytes | None]:
    """The bytes each token spells, by id. None for special tokens, the unknown token, and unused ids.

    Byte-level tokens (GPT-2, Llama 3, Qwen) go through GPT-2's byte table; in SentencePiece vocabularies (Llama 2,
    TinyLlama, Mistral) U+2581 is a space and `<0xE9>` that byte. Added tokens that are not special are plain text, with
    the space that a normaliser puts before them; those made of U+2581 alone are spaces.
    Raises ValueError for other kinds of tokenizers.
    """
    description = json.loads(tokenizer.to_str())
    model = description["model"]
    around = json.dumps([description["pre_tokenizer"], description["decoder"], description["normalizer"]])
    byte_level, sentencepiece = '"ByteLevel"' in around, '"Metaspace"' in around or "\\u2581" in around
    marked = model.get("end_of_word_suffix") or model.get("continuing_subword_prefix")  # "</w>", "##": not in the text
    if marked or not (byte_level or sentencepiece):
        decoder = (description["decoder"] or {}).get("type")
        raise ValueError(f"cannot tell which bytes this tokenizer's tokens spell (model {model['type']}, decoder "
                         f"{decoder}): only byte-level BPE and SentencePiece can be aligned")  # fmt: skip
    unknown = model.get("unk_token")
    if model.get("unk_id") is not None:  # Unigram names it by id
        unknown = model["vocab"][model["unk_id"]][0]

    added = tokenizer.get_added_tokens_decoder()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    spelt: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for token, index in vocabulary.items():
        if index in added:
            if added[index].normalized and not byte_level:  # Llama 2 finds "▁<tool>", not "<tool>"
                token = tokenizer.id_to_token(index).replace("\u2581", " ")
            spaces = not byte_level and not token.strip("\u2581")  # Gemma's runs of them
            spelt[index] = None if added[index].special else b" " * len(token) if spaces else token.encode()
        elif token == unknown:
            spelt[index] = None
        elif byte_level:
            # a character outside the table is plain text: the token was not made by training the vocabulary
            spelt[index] = b"".join(bytes([BYTE_LEVEL[c]]) if c in BYTE_LEVEL else c.encode() for c in token)
        elif match := BYTE_FALLBACK.fullmatch(token):
            spelt[index] = bytes([int(match[1], 16)])
        else:
            spelt[index] = token.replace("\u2581", " ").encode()
    return spelt


def is_byte_fallback(tokenizer: Tokenizer, size: int) -> list[bool]:
    """Which of the first `size` ids are byte-fallback tokens."""
    return [bool(BYTE_FALLBACK.fullmatch(tokenizer.id_to_token(i) or "")) for i in range(size)]


def ids_by_bytes(tokenizer: Tokenizer, eos: int | None) -> dict[bytes, int]:
    """bytes -> id, without end-of-text, which a vocabulary need not mark as special. Of several ids with the same
    bytes, the first that is not a byte-fallback token is taken."""
    spelt = token_bytes(tokenizer)
    fallback = is_byte_fallback(tokenizer, len(spelt))
    ids: dict[bytes, int] = {}
    for index in sorted(range(len(spelt)), key=fallback.__getitem__):
        if spelt[index] and index != eos:
            ids.setdefault(spelt[index], index)
    return ids


def vocabulary_overlap(
    teacher: Tokenizer, student: Tokenizer, teacher_eos: int | None = None, student_eos: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Ids (teacher_ids, student_ids) of the tokens that both vocabularies have, ordered by student id.

    Special tokens and end-of-text are left out: their meanings differ even where their names agree.
    """
    teacher_ids, student_ids = ids_by_bytes(teacher, teacher_eos), ids_by_bytes(student, student_eos)
    common = sorted((student_ids[spelt], teacher_ids[spelt]) for spelt in student_ids.keys() & teacher_ids.keys())
    return tuple(np.array(common, dtype=np.int64).reshape(-1, 2).T[::-1])


def prediction_map(
    teacher: Tokenizer, student: Tokenizer, teacher_eos: int | None, student_eos: int | None, size: int
) -> np.ndarray:
    """(size,) student id of each teacher id, -1 where the student has no such token: the ŷᵗ ∈ V_stu of eq. 14.

    A teacher id that spells a token of the student maps to that token; the teacher's end-of-text maps to the student's,
    if both models have one (None: it has none).
    Eq. 14 keeps only the aligned pairs where the teacher's prediction maps to an id >= 0.
    `size` is the number of rows of the teacher's head, which may be padded beyond its tokenizer.
    """
    student_ids, spelt = ids_by_bytes(student, student_eos), token_bytes(teacher)[:size]
    mapped = np.full(size, -1, dtype=np.int64)
    mapped[: len(spelt)] = [student_ids.get(piece, -1) for piece in spelt]
    if teacher_eos is not None and student_eos is not None:
        mapped[teacher_eos] = student_eos
    return mapped


# ---------------------------------------------------------------------------------------------------------------------
# Exact token alignment (ETA)


def exact_token_alignment(teacher: list[bytes | None], student: list[bytes | None]) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (teacher_index, student_index) of response tokens that are equal and have equal histories (v2, eq. 14).

    teacher, student: the canonical bytes of each response token in order; None is end-of-text and matches None. Returns
    two int64 arrays of equal length, both increasing. One leading space that only one side has (SentencePiece's dummy
    prefix) does not count in the histories, but the token that begins with it is not paired: " The" and "The" are
    different tokens, and the student would learn to begin with a space. If both sides spell the same bytes, this is one
    sweep over the two offset arrays; if a tokenizer changed the text (NFC, lower-casing), `align_by_programme` aligns
    what can be aligned.

    The bytes of a response are `[None if i == eos else spelt[i] or b"" for i in ids]` with `spelt = token_bytes(...)`:
    special tokens other than end-of-text spell nothing. The indices count from the start of the response; if the
    responses of a batch are flattened into one row, add the lengths of the responses before.
    """
    teacher_text, student_text = spell(teacher), spell(student)
    spaces, student_spaces = (len(text) - len(text.lstrip(" ")) for text in (teacher_text, student_text))
    shortened = [-1, -1]  # each side's token that loses a space here: it equals no token of the other side
    if spaces > student_spaces:
        shortened[0], teacher, teacher_text = *without_first_byte(teacher), teacher_text[1:]
    elif spaces < student_spaces:
        shortened[1], student, student_text = *without_first_byte(student), student_text[1:]
    align = align_by_sweep if teacher_text == student_text else align_by_programme
    teacher_index, student_index = align(teacher, student)
    equal = (teacher_index != shortened[0]) & (student_index != shortened[1])
    return teacher_index[equal], student_index[equal]


def spell(tokens: list[bytes | None]) -> str:
    """What the tokens spell, as a string of symbols: one character for each byte, U+0100 for end-of-text."""
    return "".join("\u0100" if token is None else token.decode("latin-1") for token in tokens)


def without_first_byte(tokens: list[bytes | None]) -> tuple[int, list[bytes | None]]:
    """The index of the token that begins the text, and the tokens without its first byte."""
    first = next(i for i, token in enumerate(tokens) if token)
    return first, [*tokens[:first], tokens[first][1:], *tokens[first + 1 :]]


def token_spans(tokens: list[bytes | None]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Index, start and end, in symbols, of each token. Empty tokens (a stripped dummy prefix) are left out."""
    lengths = np.array([1 if token is None else len(token) for token in tokens], dtype=np.int64)
    index, ends = np.flatnonzero(lengths), lengths.cumsum()
    return index, (ends - lengths)[index], ends[index]


def align_by_sweep(teacher: list[bytes | None], student: list[bytes | None]) -> tuple[np.ndarray, np.ndarray]:
    """Fast path of `align_by_programme` for sides that spell the same text: tokens whose spans coincide.

    With equal texts, equal histories mean equal start offsets, and equal tokens also mean equal end offsets. So the
    programme's cells without an edit are the shared offsets, and one linear intersection finds all matches.
    """
    (teacher_index, *teacher_span), (student_index, *student_span) = token_spans(teacher), token_spans(student)
    spans = (start << 32 | end for start, end in (teacher_span, student_span))  # a number each
    _, in_teacher, in_student = np.intersect1d(*spans, assume_unique=True, return_indices=True)
    return teacher_index[in_teacher], student_index[in_student]


def align_by_programme(teacher: list[bytes | None], student: list[bytes | None]) -> tuple[np.ndarray, np.ndarray]:
    """The definition of the alignment, as a dynamic programme over pairs of prefixes; works for any two sequences.

    A cell (x, y) is a pair of prefixes, x symbols of the teacher's text and y of the student's (`spell`). A step to the
    next cell deletes a symbol, inserts one, or keeps an equal one; a *match* keeps two whole equal tokens at once. Of
    all paths from (0, 0) to the end with the fewest deletions and insertions, we take the one with the most matches.
    Equal texts need no deletion, so only cells whose prefixes spell the same bytes are reached: this is exactly eq. 14.
    If the texts differ, the parts that the difference does not touch still align.
    O(length²) time and memory, one vectorised row per symbol of the teacher's text.
    """
    teacher_text, student_text = spell(teacher), spell(student)
    student_codes = np.array([ord(symbol) for symbol in student_text])
    teacher_at, student_at = (  # end -> (index, start) of the token that ends there
        {end: (index, start) for index, start, end in np.transpose(token_spans(side)).tolist()}
        for side in (teacher, student)
    )
    edit = min(len(teacher), len(student)) + 1  # one edit outweighs all possible matches
    insertions = edit * np.arange(len(student_text) + 1)  # the cost of inserting y symbols

    cost = np.empty((len(teacher_text) + 1, len(student_text) + 1), dtype=np.int64)
    cost[0] = insertions
    for x, symbol in enumerate(teacher_text, start=1):
        row = cost[x - 1] + edit  # delete the teacher's symbol
        y = 1 + np.flatnonzero(student_codes == ord(symbol))
        row[y] = np.minimum(row[y], cost[x - 1, y - 1])  # keep an equal symbol
        if x in teacher_at:
            j, start = teacher_at[x]
            for y, (i, first) in student_at.items():
                if student[i] == teacher[j]:
                    row[y] = min(row[y], cost[start, first] - 1)  # match two whole tokens
        cost[x] = np.minimum.accumulate(row - insertions) + insertions  # insert symbols of the student

    pairs, x, y, nothing = [], len(teacher_text), len(student_text), (None, None)
    while x > 0 or y > 0:  # walk back along the steps that explain each cost
        (j, start), (i, first) = teacher_at.get(x, nothing), student_at.get(y, nothing)
        if None not in (i, j) and teacher[j] == student[i] and cost[x, y] == cost[start, first] - 1:
            pairs.append((j, i))
            x, y = start, first
        elif x > 0 and y > 0 and teacher_text[x - 1] == student_text[y - 1] and cost[x, y] == cost[x - 1, y - 1]:
            x, y = x - 1, y - 1
        elif x > 0 and cost[x, y] == cost[x - 1, y] + edit:
            x -= 1
        else:
            y -= 1
    return tuple(np.array(pairs[::-1], dtype=np.int64).reshape(-1, 2).T)


# ---------------------------------------------------------------------------------------------------------------------
# Cross-model attention (CMA)


class ResponseTokens(NamedTuple):
    """One model's R response positions; all examples of the batch are in one row."""

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
    response positions of the whole update. (The official code includes padding, so its loss depends on padding.)"""

    key: float  # σ_K, of [E_t(x); E_t(y)]
    label: float  # σ_y, of E_t(y)
    hidden: float  # σ_h, of the last hidden states


def cross_model_attention(
    student: ResponseTokens, teacher: ResponseTokens, projectors: nn.Module, std: Deviations
) -> tuple[Tensor, Tensor]:
    """Each model's states, seen from the other's positions (v1): t2s (N, d) and s2t (M, D).

    Q = P_q [E_s(x); E_s(y)]    K = [E_t(x); E_t(y)]/σ_K    V = P_t→s(h_t/σ_h + E_t(y)/σ_y)    x is read, y predicted
    A = Q Kᵀ/√(2D)              h_t→s = softmax_M(A) V      h_s→t = softmax_N(A)ᵀ P_s→t(h_s)

    projectors: .query 2d -> 2D, .t2s D -> d, .s2t d -> D. Examples do not see each other. Computed in float32, even
    under autocast, because the scores decide which positions count. So the projectors stay in float32; without
    autocast, convert the states and heads of half-precision models to float32 for `dskd_loss` too.
    """
    with torch.autocast(student.hidden.device.type, enabled=False):
        teacher_inputs, teacher_labels = teacher.embeddings()
        query = projectors.query(torch.cat(student.embeddings(), -1))  # (N, 2D)
        key = torch.cat([teacher_inputs, teacher_labels], -1) / std.key  # (M, 2D)
        t2s_value = projectors.t2s(at_least_float32(teacher.hidden) / std.hidden + teacher_labels / std.label)  # (M, d)
        s2t_value = projectors.s2t(at_least_float32(student.hidden))  # (N, D)

        t2s, s2t = [], []
        of_student = query.split(student.lengths), s2t_value.split(student.lengths)
        of_teacher = key.split(teacher.lengths), t2s_value.split(teacher.lengths)
        for q, v_s, k, v_t in zip(*of_student, *of_teacher, strict=True):  # an example's n and m positions
            scores = q @ k.T / math.sqrt(k.shape[-1])  # (n, 2D) x (2D, m) -> (n, m)
            t2s.append(scores.softmax(1) @ v_t)  # (n, m) x (m, d) -> (n, d)
            s2t.append(scores.T.softmax(1) @ v_s)  # (m, n) x (n, D) -> (m, D)
        return torch.cat(t2s), torch.cat(s2t)


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def teacher_moments(teacher: ResponseTokens) -> list[float]:
    """(count, sum, sum of squares) of each of the three tensors of `Deviations`: nine numbers in float64, which add up
    over batches and processes."""
    inputs, labels = teacher.embeddings()
    three = torch.cat([inputs, labels], -1), labels, teacher.hidden
    sums = [[x.sum(dtype=torch.float64), torch.linalg.vector_norm(x, dtype=torch.float64) ** 2] for x in three]
    sums = torch.stack(sum(sums, [])).view(3, 2).tolist()  # one wait for the device
    return [number for x, both in zip(three, sums, strict=True) for number in (x.numel(), *both)]


def deviations(moments: list[float]) -> Deviations:
    """From the sums of `teacher_moments`; unbiased as in torch: divided by count − 1. 0 without a response."""
    columns = zip(moments[0::3], moments[1::3], moments[2::3], strict=True)
    return Deviations(*(math.sqrt((squares - total**2 / n) / (n - 1)) if n else 0.0 for n, total, squares in columns))


if __name__ == "__main__":
    try:
        from runtime.show import main  # only for printing; nothing else here needs another file of the project
    except ModuleNotFoundError as error:
        raise SystemExit(f"error: {error}; a copied align.py is only a module, its command needs the project") from None
    main(__doc__.partition("\nA tokenizer here")[0])
