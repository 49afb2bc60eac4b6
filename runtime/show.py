"""Show what aligns: two tokenisations one above the other, and the aligned share by kind of token.

If one vocabulary joins what the other splits (GPT-2 has "48", Qwen and Llama "4" and "8"), exact alignment skips those
tokens, so the student learns them from the labels alone. An average over all tokens hides that.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable
from functools import cache
from os.path import isfile
from pathlib import Path

import numpy as np

from align import exact_token_alignment
from runtime.formats import read_examples
from runtime.hub import data_file, model_directory
from runtime.tokenizer import TextTokenizer, escape_what_cannot_be_printed, read_tokenizer

KINDS = {  # kind of token: the bytes that make it one; the first that fits
    "non-ASCII": rb"[\x80-\xff]",
    "numerals": rb"\d",
    "code": rb"[#$%&*+/<=>@[\\\]^_`{|}~]",  # and formulas
    "words": rb"[A-Za-z]",
    "punctuation": rb"\S",
    "white space": rb"",
}


@cache
def kind_of(token: bytes | None) -> str:
    """One of KINDS, or "end-of-text" (None)."""
    return "end-of-text" if token is None else next(kind for kind, found in KINDS.items() if re.search(found, token))


def measure_alignment(responses: Iterable[tuple[list[bytes | None], np.ndarray]]) -> dict[str, dict]:
    """{kind of token, or "all": {tokens, aligned (their share), missed (the text of one that is not aligned)}} for the
    student's response tokens. responses: for each, its tokens and the indices of those that are aligned."""
    tokens, aligned, missed = Counter(), Counter(), {}
    for spelt, index in responses:
        kinds = [kind_of(token) for token in spelt]
        tokens.update(kinds)
        aligned.update(kinds[i] for i in index.tolist())
        for i in {*range(len(kinds))} - {*index.tolist()}:
            missed.setdefault(kinds[i], show_token(spelt[i]))
    shares = {kind: {"tokens": n, "aligned": round(aligned[kind] / n, 4)} for kind, n in tokens.most_common()}
    for kind, text in missed.items():
        shares[kind]["missed"] = text
    return {**shares, "all": {"tokens": tokens.total(), "aligned": round(aligned.total() / tokens.total(), 4)}}


def describe_alignment(shares: dict[str, dict]) -> str:
    """A line with all shares, and a warning for each kind whose aligned share is less than half of that of all."""
    parts = [f"{kind} {share['aligned']:.1%} of {share['tokens']:,}" for kind, share in shares.items()]
    lines, everything = [f"aligned tokens of the student's responses: {', '.join(parts)}"], shares["all"]
    for kind, share in shares.items():
        behind = share["aligned"] < everything["aligned"] / 2
        if behind and share["tokens"] >= max(10, everything["tokens"] / 100):
            lines.append(
                f"warning: the two vocabularies split {kind} differently (such as {share['missed']}): only "
                f"{share['aligned']:.1%} align, so ETA teaches almost nothing about them; use --recipe v1 (CMA)"
            )
    return "\n".join(lines)


def show_token(token: bytes | None) -> str:
    """A token's bytes as a label: spaces and line ends are made visible; bytes that are not text are hexadecimal."""
    if token is None:
        return "end"
    try:
        text = token.decode().replace(" ", "␣").replace("\n", "↵")
    except UnicodeDecodeError:
        return token.hex(" ").upper()
    # fonts often lack glyphs beyond this point, and terminals show some of them two columns wide
    return "".join(c if c.isprintable() and ord(c) < 0x2E80 else f"U+{ord(c):X}" for c in text)


def show_pairs(teacher: list[bytes | None], student: list[bytes | None], pairs, width: int = 110) -> str:
    """Both rows of tokens, one above the other, in lines of at most `width` characters: aligned tokens share a column
    marked |, the tokens between them a column marked ×."""
    columns, i, j = [], 0, 0
    for next_i, next_j in [*np.transpose(pairs).tolist(), (len(teacher), len(student))]:
        columns.append((teacher[i:next_i], "×", student[j:next_j]))
        i, j = next_i + 1, next_j + 1
        columns.append((teacher[next_i:i], "|", student[next_j:j]))
    lines = [["teacher ", "        ", "student "]]
    for theirs, mark, ours in columns:
        cells = "·".join(map(show_token, theirs)), mark, "·".join(map(show_token, ours))
        space = max(map(len, cells)) if theirs or ours else 0
        if space and len(lines[-1][0]) + space > width:
            lines.append(["        "] * 3)
        lines[-1] = [line + cell.ljust(space + 1) * bool(space) for line, cell in zip(lines[-1], cells, strict=True)]
    return "\n\n".join("\n".join(map(str.rstrip, rows)) for rows in lines)


def find_tokenizer(name: str) -> TextTokenizer:
    """The tokenizer of a run, of a model (name or directory), or of a directory that has only the tokenizer's files."""
    places = [place for place in (Path(name), Path(name, "student")) if (place / "tokenizer.json").is_file()]
    return read_tokenizer(places[0] if places else model_directory(name, weights=False))


def main(description: str, arguments: list[str] | None = None) -> None:
    """The command line of align.py."""
    escape_what_cannot_be_printed()
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="align.py", description=description, formatter_class=form)
    parser.add_argument("text", metavar="TEXT", help="a response, or a data file (its first 1,000 responses are read)")
    parser.add_argument("--teacher", required=True, help="run, model or directory with its tokenizer.json")
    parser.add_argument("--student", required=True, help="the same for the student")
    parser.add_argument("--show", type=int, default=3, help="responses of a data file to print (default: 3)")
    o = parser.parse_args(arguments)
    try:
        tokenizers = find_tokenizer(o.teacher), find_tokenizer(o.student)
        texts = [o.text]
        o.text.encode()  # raises ValueError: bytes that are not UTF-8 arrive here as lone surrogates
        if isfile(o.text) or o.text.endswith(".jsonl"):
            texts = [example.outputs[0] for example in read_examples(*data_file(o.text, "train"))[:1000]]
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    spelt = [[t.spell([*t.encode(text), t.eos_id]) for t in tokenizers] for text in texts]  # with end-of-text
    aligned = [(*sides, exact_token_alignment(*sides)) for sides in spelt]
    print("\n\n".join(show_pairs(*sides) for sides in aligned[: o.show]))
    print("\n" + describe_alignment(measure_alignment((student, pairs[1]) for _, student, pairs in aligned)))
