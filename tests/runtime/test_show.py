"""What aligns, for people: kinds of tokens, the warning, and the command line of align.py."""

import json
import runpy
import shutil
import sys

import numpy as np
import pytest
from helpers import arguments

import align
import train
from runtime.show import describe_alignment, kind_of, measure_alignment, show_pairs, show_token

TEACHER = [b"It", b" is", b" ", b"4", b"8", b".", None]
STUDENT = [b"It", b" is", b" 48", b".", None]


@pytest.mark.parametrize(
    "kind, tokens",
    [("words", [b" fox", b"'s", b"f("]), ("numerals", [b" 48", b"x1"]), ("punctuation", [b".", b" (", b".\n"]),
     ("white space", [b" ", b"\n\n", b"\t", b""]), ("non-ASCII", ["café".encode(), b"\xe5\x8c"]),
     ("code", [b"_", b" = ", b"x_y", b"**", b"</"]), ("end-of-text", [None])],
)  # fmt: skip
def test_kinds_of_tokens(kind, tokens):
    assert {kind_of(token) for token in tokens} == {kind}


def test_both_tokenisations_stand_over_each_other():
    pairs = align.exact_token_alignment(TEACHER, STUDENT)
    assert show_pairs(TEACHER, STUDENT, pairs).splitlines() == [
        "teacher It ␣is ␣·4·8 . end",
        "        |  |   ×     | |",
        "student It ␣is ␣48   . end",
    ]
    lines = show_pairs(TEACHER, STUDENT, pairs, width=19).splitlines()
    assert [line.strip() for line in lines[3:]] == ["", "␣·4·8 . end", "×     | |", "␣48   . end"]


def test_what_a_terminal_cannot_show_well_is_a_number():
    tokens = b" a\n", b"\t\x1b", "狐".encode(), b"\xe5\x8c", None
    assert [*map(show_token, tokens)] == ["␣a↵", "U+9U+1B", "U+72D0", "E5 8C", "end"]


def test_a_kind_far_behind_is_warned_of():
    pairs = align.exact_token_alignment(TEACHER, STUDENT)
    shares = measure_alignment([(STUDENT, pairs[1])] * 12)
    assert shares["numerals"] == {"tokens": 12, "aligned": 0.0, "missed": "␣48"}
    assert shares["words"] == {"tokens": 24, "aligned": 1.0} and shares["all"] == {"tokens": 60, "aligned": 0.8}
    assert measure_alignment([([b"a"] * 3, np.arange(1))])["words"]["aligned"] == 0.3333
    line, warning = describe_alignment(shares).splitlines()
    assert "words 100.0% of 24" in line and "numerals 0.0% of 12" in line and line.endswith("all 80.0% of 60")
    assert warning.startswith("warning: the two vocabularies split numerals differently (such as ␣48)")
    for whole, warned in (3, True), (8, False):  # responses of which all aligns: numerals 3 of 12 and 8 of 12
        mixed = measure_alignment([(STUDENT, pairs[1])] * (12 - whole) + [(STUDENT, np.arange(5))] * whole)
        assert ("\nwarning" in describe_alignment(mixed)) == warned
    for few in ([(STUDENT, pairs[1])] * 9, [(STUDENT, pairs[1])] * 12 + [([b" the"] * 1200, np.arange(1200))]):
        assert "\nwarning" not in describe_alignment(measure_alignment(few))  # fewer than 10, or than 1% of all tokens


def show(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["align.py", *map(str, words)])
    runpy.run_path(align.__file__, run_name="__main__")
    return capsys.readouterr().out


def test_command_line(tiny_task, tmp_path, monkeypatch, capsys):
    both = ["--teacher", tiny_task / "teacher", "--student", tiny_task / "student"]
    out = show(monkeypatch, capsys, "The fox dances.", *both)
    assert out.startswith("teacher ␣The ␣") and "\nstudent The  ␣" in out and "end-of-text 100.0% of 1" in out
    for file in ("tokenizer.json", "tokenizer_config.json"):  # a directory without a model
        shutil.copy(tiny_task / "student" / file, tmp_path)
    assert show(monkeypatch, capsys, "The fox dances.", *both[:3], tmp_path) == out
    out = show(monkeypatch, capsys, tiny_task / "train.jsonl", *both, "--show", "2")
    assert out.count("teacher ") == 2 and "end-of-text 100.0% of 40" in out
    with pytest.raises(SystemExit, match="error: .*nowhere"):
        show(monkeypatch, capsys, "x", "--teacher", "./nowhere", *both[2:])
    with pytest.raises(SystemExit, match="error: data 'tran.jsonl' is neither a file"):
        show(monkeypatch, capsys, "tran.jsonl", *both)
    with pytest.raises(SystemExit, match="error: .*surrogates not allowed"):
        show(monkeypatch, capsys, "caf\udce9", *both)


def test_a_run_says_and_keeps_what_aligns(tiny_task, tmp_path, capsys):
    train.main(arguments(tiny_task, tmp_path / "run", max_steps=1))
    shares = json.loads((tmp_path / "run" / "args.json").read_text())["aligned"]
    assert describe_alignment(shares) in capsys.readouterr().err and shares["end-of-text"]["aligned"] == 1
    train.main(arguments(tiny_task, tmp_path / "twin", teacher=tiny_task / "twin", max_steps=1))
    assert "aligned" not in json.loads((tmp_path / "twin" / "args.json").read_text())
    assert "aligned tokens" not in capsys.readouterr().err
