"""baselines/mined.py: edit distances, warping and the vocabulary map against their definitions; the loss by loops and
by finite differences."""

import collections
import math
import random

import numpy as np
import pytest
import torch
from helpers import (
    STUDENT_IDS,
    TEACHER_IDS,
    TEMPERATURE,
    TOKENS,
    Inputs,
    N,
    add_gold_by_loops,
    byte_level,
    sentencepiece,
    softmax,
    values,
)
from torch.autograd import gradcheck

from align import is_byte_fallback
from baselines import mined
from baselines.mined import (
    edit_distance_alignment,
    edit_distance_ids,
    edit_distance_map,
    edit_distances,
    mapped_columns,
    pair_by_edit_distance,
    token_spellings,
)
from data import Example, Row, Side, tokenise
from runtime.tokenizer import TextTokenizer, read_tokenizer

# -- edit distances and warping ----------------------------------------------------------------------------------------


def levenshtein(a, b):
    """The definition, row by row."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


def random_words(generator, count, longest, letters=b"ab "):
    return [bytes(generator.choices(letters, k=generator.randrange(longest + 1))) for _ in range(count)]


def test_edit_distances_by_hand():
    found = edit_distances([b"kitten", b"", b"\xff"], [b"sitting", b"kitten", b"", b"\xff\xff"])
    assert found.tolist() == [[3, 0, 6, 6], [7, 6, 0, 2], [7, 6, 1, 1]]


@pytest.mark.parametrize("longest", [3, 8, 9, 16, 17, 33, 64, 65, 100])
def test_edit_distances_against_the_definition(longest):
    """With patterns in words of each width, and beyond; one of the longest is always there."""
    generator = random.Random(longest)
    for letters in (b"ab", bytes(range(256))):
        patterns = [bytes(generator.choices(letters, k=longest)), *random_words(generator, 3, longest, letters)]
        texts = [*random_words(generator, 6, 12, letters), bytes(generator.choices(letters, k=longest + 3))]
        expected = [[levenshtein(a, b) for b in texts] for a in patterns]
        assert edit_distances(patterns, texts).tolist() == expected


def warp(cost):
    """Dynamic time warping, plainly: all cells, then the way back, of equal steps both, the first, the second."""
    total = {}
    for i, row in enumerate(cost):
        for j, here in enumerate(row):
            before = [total[step] for step in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if step in total]
            total[i, j] = here + min(before, default=0)
    i, j = len(cost) - 1, len(cost[0]) - 1
    way = [(i, j)]
    while (i, j) != (0, 0):
        steps = [step for step in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if step in total]
        i, j = min(steps, key=total.get)  # the first of the smallest
        way.append((i, j))
    return way[::-1]


def warped(teacher, student):
    return list(zip(*(index.tolist() for index in edit_distance_alignment(teacher, student)), strict=True))


def test_warping_against_a_plain_programme():
    generator, lonely = random.Random(0), 0
    for _ in range(200):
        teacher, student = (random_words(generator, generator.randrange(1, 9), 3) for _ in range(2))
        way = warp([[levenshtein(t.replace(b" ", b""), s.replace(b" ", b"")) for s in student] for t in teacher])
        met = collections.Counter(j for _, j in way)
        expected = [(i, j) for i, j in way if met[j] == 1]
        assert warped(teacher, student) == expected
        lonely += len(expected) < len(student)
    assert 20 < lonely < 180


def test_warping_by_hand():
    assert warped([b"a", b" cat"], [b" a", b"cat"]) == [(0, 0), (1, 1)]  # spaces cost nothing
    assert warped([b"sun", b"flow", b"er"], [b"sun", b"flower"]) == [(0, 0)]  # two teacher tokens meet " flower"
    assert warped([b"sun", b"flower"], [b"sun", b"flow", b"er"]) == [(0, 0), (1, 1), (1, 2)]


# -- the vocabulary map ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("teacher", "student"), [("byte-level", "nfc"), ("nfc", "sentencepiece")])
def test_the_map_against_the_definition(trained, teacher, student):
    spelt, texts = (token_spellings(trained[name]) for name in (teacher, student))
    fallback = is_byte_fallback(trained[student], len(texts))
    mapped = edit_distance_map(trained[teacher], trained[student])
    assert len(mapped) == len(spelt)
    new = 0
    for index in random.Random(0).sample(range(len(spelt)), 120):
        distance, _, nearest = min((levenshtein(spelt[index], text), fallback[j], j) for j, text in enumerate(texts))
        assert mapped[index] == nearest if distance else texts[mapped[index]] == spelt[index]
        new += distance > 0
    assert 20 < new < 100


def test_the_map_by_hand():
    pieces = ["</s>", "<0x41>", "A", "▁he", "hens", "q" * 70, "he"]
    student_pieces = ["<eos>", "A", "<0x41>", "▁he", "hen", "q" * 66, "pens", "he", "</s>", " he"]
    teacher, student = (sentencepiece(dict(zip(p, range(10), strict=False))) for p in (pieces, student_pieces))
    teacher.add_special_tokens(["</s>"]), student.add_special_tokens(["<eos>"])
    mapped = edit_distance_map(teacher, student)
    # special tokens by their names, each A to its own kind, of two ids that are equal or one edit away the smaller one
    assert mapped.tolist() == [8, 2, 1, 3, 4, 5, 7]
    teacher_ids, student_ids = mapped_columns(mapped, teacher)
    assert (teacher_ids.tolist(), student_ids.tolist()) == ([2, 1, 3, 4, 5, 6, 0], [1, 2, 3, 4, 5, 7, 8])

    mapped = edit_distance_map(teacher, byte_level({"he": 0, "A": 1, "Ġhe": 2}))  # it has no byte-fallback token
    assert mapped.tolist() == [0, 1, 1, 2, 0, 0, 0]
    teacher_ids, student_ids = mapped_columns(mapped, teacher)
    assert (teacher_ids.tolist(), student_ids.tolist()) == ([0, 2, 3], [0, 1, 2])  # A's logit is A's, not <0x41>'s


def test_unused_ids_map_to_nothing_and_nothing_maps_to_them():
    mapped = edit_distance_map(byte_level({"a": 0, "b": 2, "ac": 5}), byte_level({"b": 1, "a": 4}))
    assert mapped.tolist() == [4, -1, 1, -1, -1, 4]
    assert edit_distance_map(byte_level({"a": 0}), byte_level({"bcd": 0, "abc": 1})).tolist() == [1]  # no short one


def test_columns_take_the_first_teacher_token(trained):
    teacher = trained["byte-level"]
    columns = mapped_columns(np.array([3, -1, 5, 3, 5, 0]), teacher)
    assert [ids.tolist() for ids in columns] == [[5, 0, 2], [0, 3, 5]]
    own = edit_distance_map(teacher, teacher)
    every = list(range(len(own)))
    assert own.tolist() == every and [ids.tolist() for ids in mapped_columns(own, teacher)] == [every, every]


@pytest.fixture
def tokenizers(trained_folder):
    """(teacher's, student's)"""
    return read_tokenizer(trained_folder / "teacher"), read_tokenizer(trained_folder / "student")


def test_pairs_are_of_the_tokens_that_are_read(tokenizers):
    teacher, student = tokenizers
    (row,), _ = tokenise([Example("here", ["a fox and a dog, café"], prompt="the p")], student, teacher)
    pairs = list(zip(*pair_by_edit_distance(row, student, teacher), strict=True))
    ours, theirs = ((side.prompt + side.response)[len(side.prompt) - 1 : -1] for side in (row.student, row.teacher))
    mapped = edit_distance_map(teacher.tokenizer, student.tokenizer)
    spelt = [[token_spellings(t.tokenizer)[i] for i in ids] for t, ids in ((teacher, theirs), (student, ours))]
    expected = [(m, n) for m, n in warped(*spelt) if mapped[theirs[m]] == ours[n]]
    assert pairs == expected and 0 < len(expected) < len(ours)


@pytest.mark.parametrize(("theirs", "ours", "expected"), [("▁x", "x", [2]), ("x", "▁x", [2]), ("▁▁▁", "▁▁", [2]),
                                                         ("▁▁", "▁▁", [0, 1, 2]), ("▁x", "▁▁▁", [0, 2])])  # fmt: skip
def test_a_first_token_with_a_space_more_is_in_no_pair(theirs, ours, expected):
    """SentencePiece's added space, also before a response that begins with spaces itself."""
    ids = {token: i for i, token in enumerate(["<end>", "x", "▁x", "▁▁", "▁▁▁"])}
    student = byte_level({token.replace("▁", "Ġ"): i for token, i in ids.items()})
    teacher, student = (TextTokenizer(None, tokenizer, [0]) for tokenizer in (sentencepiece(ids), student))
    row = Row(*(Side([1], [ids[first], 1, 0]) for first in (ours, theirs)))
    assert pair_by_edit_distance(row, student, teacher)[1].tolist() == expected


def test_the_map_is_cached(tokenizers, tmp_path, monkeypatch, capsys):
    """Made once; a spoilt file is made again; a directory that cannot be written is no error."""
    teacher, student = tokenizers
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return edit_distance_map(*arguments)

    def ids(first, second):
        edit_distance_ids.cache_clear()  # as in another process
        return edit_distance_ids(first, second)

    monkeypatch.setattr(mined, "edit_distance_map", counted)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    expected = edit_distance_map(teacher.tokenizer, student.tokenizer)
    for _ in range(2):
        assert np.array_equal(ids(teacher, student), expected)
    assert len(calls) == 1
    (file,) = (tmp_path / "cache" / "dskd").iterdir()  # nothing else is left
    assert len(ids(student, teacher)) == student.size and len(calls) == 2  # the other way round is another map
    for spoilt in (b"", file.read_bytes()[:200], b"not an array"):
        file.write_bytes(spoilt)
        assert np.array_equal(ids(teacher, student), expected)
        assert f"{file}: cannot be read; computing it again" in capsys.readouterr().err
    for wrong in (expected[:-1], expected.astype(np.int32), expected + student.size):
        np.save(file, wrong)
        assert np.array_equal(ids(teacher, student), expected)
        assert f"{file}: not a vocabulary map" in capsys.readouterr().err
    assert np.array_equal(np.load(file), expected) and len(calls) == 8

    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    assert np.array_equal(ids(teacher, student), expected)
    assert "cannot be written" in capsys.readouterr().err

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # a user without a home
    assert np.array_equal(ids(teacher, student), expected)


def test_another_vocabulary_is_another_file(tmp_path, monkeypatch):
    """Also with the same spellings (the first two), or with the same names (the first and the last)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    vocabulary, student = {"A": 0, "<0x41>": 1}, TextTokenizer(None, byte_level({"a": 0}), [0])
    teachers = sentencepiece(vocabulary), sentencepiece({"<0x41>": 0, "A": 1}), byte_level(vocabulary)
    for count, teacher in enumerate(teachers, 1):
        edit_distance_ids(TextTokenizer(None, teacher, [0]), student)
        assert len([*(tmp_path / "dskd").iterdir()]) == count


# -- the loss ----------------------------------------------------------------------------------------------------------

every_chunk = pytest.mark.parametrize("chunk", [0, 1, 2, 100])


@every_chunk
def test_the_loss_by_loops(chunk):
    i = Inputs("mined")
    f = i.arrays()
    student = [f["student_head"] @ state for state in f["student_hidden"]]
    partner = dict(zip(i.rows.tolist(), f["teacher_hidden"][f["teacher_rows"]], strict=True))
    kd = 0
    for n in range(N):
        target = {int(i.gold[n]): 1.0}
        if n in partner:
            q = softmax((f["teacher_head"] @ partner[n])[TEACHER_IDS], TEMPERATURE)
            target = dict(zip(STUDENT_IDS.tolist(), q, strict=True))
        p = softmax(student[n], TEMPERATURE)
        kd += sum(x * (math.log(x) - math.log(p[token])) for token, x in target.items())
    assert 0 < len(partner) < N
    expected = add_gold_by_loops(i, student, 0.3, kd=kd / TOKENS)
    assert values(i.terms(chunk=chunk, kd_rate=0.3)) == pytest.approx(expected, rel=1e-10)


@every_chunk
def test_gradients_by_finite_differences(chunk):
    """The teacher, were it not frozen, has none."""
    i = Inputs("mined")

    def loss(student_hidden, student_head):
        i.student_hidden, i.student_head = student_hidden, student_head
        return i.terms(chunk=chunk)["loss"]

    assert gradcheck(loss, (i.student_hidden, i.student_head))
    i.teacher_head.requires_grad_()
    assert torch.autograd.grad(i.terms(chunk=chunk)["kd"], i.teacher_head, allow_unused=True) == (None,)


@every_chunk
def test_without_any_pair(chunk):
    i = Inputs("mined")
    i.rows, i.teacher_rows = i.rows[:0], i.teacher_rows[:0]
    terms = i.terms(chunk=chunk)
    logits = i.student_hidden @ i.student_head.T
    ce, kd = (torch.nn.functional.cross_entropy(logits / T, i.gold, reduction="sum") / TOKENS for T in (1, TEMPERATURE))
    torch.testing.assert_close([terms["ce"], terms["kd"]], [ce, kd])
    heads = i.student_head, i.teacher_head, TEACHER_IDS, STUDENT_IDS
    usual = mined.mined_loss(i.student_hidden, i.gold, i.rows, i.aligned_teacher(), *heads, i.counts, chunk=chunk)
    softer = torch.nn.functional.cross_entropy(logits / 2, i.gold, reduction="sum") / TOKENS
    torch.testing.assert_close(usual["loss"], (ce + softer) / 2)
    torch.testing.assert_close(i.gradients(terms["loss"]), i.gradients((ce + kd) / 2))
