r"""Aligning two tokenisations of one text: exactly (ETA, DSKDv2) or by attention (CMA, DSKD).

Teacher and student may cut the same response into different tokens. Before their states can be compared,
somebody has to say which teacher position speaks about which student position:

- exact token alignment, ETA (arXiv 2504.11426, eq. 14): the positions where both predict the same token after the
  same history. `exact_token_alignment` finds them, `prediction_map` translates the teacher's predictions.
- cross-model attention, CMA (arXiv 2406.17328): every student position attends to all positions of
  the teacher's response, and the reverse. `cross_model_attention` gives the two weight matrices.
- minimum edit distance, MinED (arXiv 2401.10491), a baseline: tokens that look alike. `edit_distance_alignment` pairs
  positions, `edit_distance_map` pairs whole vocabularies.

Where this differs from the official code: it compares token *strings* and so loses the rest of a response after the
first accent, newline or emoji, which byte-level and SentencePiece vocabularies spell differently. We compare *bytes*.

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
from collections.abc import Callable

import numpy as np
import torch
from tokenizers import Tokenizer

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


def _is_fallback(tokenizer: Tokenizer, size: int) -> list[bool]:
    """Which of the first `size` ids are byte-fallback tokens."""
    return [bool(BYTE_FALLBACK.fullmatch(tokenizer.id_to_token(i) or "")) for i in range(size)]


def _ids_by_bytes(tokenizer: Tokenizer, eos: int | None) -> dict[bytes, int]:
    """bytes -> id, without end-of-text; of several ids with the same bytes the first that is no byte-fallback token."""
    spelt = token_bytes(tokenizer)
    if eos is not None:
        spelt[eos] = None  # also where the vocabulary does not mark it as special
    fallback = _is_fallback(tokenizer, len(spelt))
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


def cross_model_attention(
    query: torch.Tensor, key: torch.Tensor, student_example: torch.Tensor, teacher_example: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention between the response positions of two models (v1).

    query (N, 2D): projected [E_s(input); E_s(label)]; key (M, 2D): [E_t(input); E_t(label)] / std;
    student_example (N,), teacher_example (M,): which example of the batch a position belongs to; each must occur on
    both sides. Returns the t→s weights (N, M), a softmax over teacher positions, and the s→t weights (M, N), a softmax
    of the same scores over student positions. Positions of different examples do not see each other.
    """
    scores = query @ key.T / math.sqrt(key.shape[-1])  # (N, 2D) x (2D, M) -> (N, M); 2D is the papers' 2·D
    scores = scores.masked_fill(student_example[:, None] != teacher_example[None, :], -1e5)
    return scores.softmax(dim=1), scores.T.softmax(dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Minimum edit distance (MinED)


def token_spellings(tokenizer: Tokenizer) -> list[bytes | None]:
    """`token_bytes`, with special tokens spelt by their names: MinED compares every token. None for unused ids."""
    names = (tokenizer.id_to_token(i) for i in range(len(token_bytes(tokenizer))))
    spelt = zip(token_bytes(tokenizer), names, strict=True)
    return [name.encode() if piece is None and name is not None else piece for piece, name in spelt]


def edit_distance_map(teacher: Tokenizer, student: Tokenizer, progress: Callable = list) -> np.ndarray:
    """(V_t,) for each teacher token the student token that is spelt the same, else the one of the smallest edit
    distance, of several the one of the smallest id; -1 for ids that the teacher's vocabulary does not use.

    A minute or two for a hundred thousand tokens without an equal, for each is compared with the whole vocabulary.
    `progress` is put around the parts of that search (tqdm, for instance).
    """
    spelt, spelt_student = token_spellings(teacher), token_spellings(student)
    fallback, fallback_student = _is_fallback(teacher, len(spelt)), _is_fallback(student, len(spelt_student))
    ids: dict[tuple[bytes, bool], int] = {}  # where `A` and `<0x41>` spell the same, each goes to its own kind
    for index, key in enumerate(zip(spelt_student, fallback_student, strict=True)):
        ids.setdefault(key, index)
    mapped = np.full(len(spelt), -1, dtype=np.int64)
    unmatched: dict[int, list[int]] = {}  # length -> teacher ids
    for index, (piece, kind) in enumerate(zip(spelt, fallback, strict=True)):
        if piece is not None:
            mapped[index] = ids.get((piece, kind), ids.get((piece, not kind), -1))
            if mapped[index] < 0:
                unmatched.setdefault(len(piece), []).append(index)

    student_ids = np.array([index for index, piece in enumerate(spelt_student) if piece is not None])
    order, table, lengths = _by_length([spelt_student[index] for index in student_ids])
    student_ids = student_ids[order]
    parts = [(length, ids[i : i + 16]) for length, ids in sorted(unmatched.items()) for i in range(0, len(ids), 16)]
    reach, near = -1, 0
    for length, part in progress(parts):
        if length > reach:  # any text as short as this is within `length` edits, one longer than twice that is not
            reach = length
            near = np.searchsorted(-lengths, -(length + max(length, lengths[-1])))
            near_table = np.ascontiguousarray(table[:, near:])
        distance = _edit_distances([spelt[index] for index in part], near_table, lengths[near:])
        for row, index in zip(distance, part, strict=True):
            mapped[index] = student_ids[near:][row == row.min()].min()
    return mapped


def mapped_columns(mapped: np.ndarray, teacher: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """(teacher_ids, student_ids): each student token that some teacher token maps to, and the first one that does.

    Byte-fallback tokens come last: `<0x41>` must not stand in for `A`, though its id is smaller.
    """
    order = np.argsort(np.array(_is_fallback(teacher, len(mapped))) | (mapped < 0), kind="stable")
    student_ids, first = np.unique(mapped[order], return_index=True)  # the first occurrence of each
    used = student_ids >= 0
    return order[first[used]], student_ids[used]


def edit_distance_alignment(teacher: list[bytes], student: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (teacher_index, student_index) by dynamic time warping: of all ways to walk through both token sequences at
    once, one or both a token further at each step, the one with the smallest sum of edit distances (without spaces).

    Only student tokens that meet exactly one teacher token are in a pair; a teacher token may be in several.
    Of steps that cost the same: both, the teacher, the student, seen from the end.
    """
    cost = edit_distances([t.replace(b" ", b"") for t in teacher], [s.replace(b" ", b"") for s in student])
    total = np.cumsum(cost, axis=1)  # right for the first row: there is only one way
    for i in range(1, len(teacher)):
        before = total[i - 1].copy()
        before[1:] = np.minimum(before[1:], total[i - 1, :-1])  # a step of the teacher, or of both
        # total[i, j] = cost[i, j] + min(before[j], total[i, j−1]), a loop over j that a running minimum spares us
        total[i] += np.minimum.accumulate(before - (total[i] - cost[i]))
    i, j = len(teacher) - 1, len(student) - 1
    met = [(i, j)]
    while i > 0 or j > 0:
        both = total[i - 1, j - 1] if i > 0 and j > 0 else np.inf
        teacher_step = total[i - 1, j] if i > 0 else np.inf
        student_step = total[i, j - 1] if j > 0 else np.inf
        step = int(np.argmin([both, teacher_step, student_step]))
        i, j = i - (step < 2), j - (step != 1)
        met.append((i, j))
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
    table = np.zeros((lengths.max(), len(texts)), dtype=np.uint8)
    for column, index in enumerate(order):
        table[: len(texts[index]), column] = np.frombuffer(texts[index], dtype=np.uint8)
    return order, table, lengths[order]


def _edit_distances(patterns: list[bytes], table: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Myers' algorithm (1999), in Hyyrö's form, a byte of all texts at a time.

    A column of the usual table of distances is two words per text: bit i of `plus` (of `minus`) says that entry i + 1
    is one more (one less) than entry i. The narrowest word that holds the patterns is the fastest; for more than 64
    bytes Python's integers take its place.
    """
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
        alive = slice(0, np.searchsorted(-lengths, -position))  # texts that have a byte here; they stand in front
        p, m = plus[:, alive], minus[:, alive]
        equal = where.take(table[position, alive], axis=1)
        diagonal = (((equal & p) + p) ^ p) | equal  # where the distance does not grow down the diagonal
        up, down = ((m | ~(diagonal | p)) << 1) | 1, (p & diagonal) << 1  # changes along a row; the first row grows
        keep = equal | m
        plus[:, alive] = down | ~(keep | up)
        minus[:, alive] = up & keep
    ones = np.bitwise_count  # the last entry of the last column: its first entry, and all the steps up and down
    return lengths + ones(plus & masks).astype(np.int64) - ones(minus & masks).astype(np.int64)
