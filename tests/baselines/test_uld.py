"""baselines/uld.py by hand and by loops; and the fast path, whose gradient is a formula, against the plain one."""

import math

import pytest
import torch
from helpers import LEARN, TOKENS, Inputs, N, add_gold_by_loops, softmax, values

from baselines.uld import pair_by_position, uld_loss
from data import Row, Side
from losses import Counts

both = pytest.mark.parametrize("chunk", [0, 2], ids=["plain", "fast"])


@both
def test_by_hand(chunk):
    """Student 5/8, 2/8, 1/8; teacher 3/8, 3/8, 1/8, 1/8: 2/8 + 1/8 + 0 + 1/8. Which token has which does not matter."""
    p, q = torch.tensor([[1, 5, 2]]) / 8, torch.tensor([[3, 1, 1, 3]]) / 8
    hidden, gold, row = torch.ones(1, 1), torch.tensor([1]), torch.tensor([0])
    for student, teacher in ((p, q), (q, p)):  # also where the student's vocabulary is the larger one
        terms = values(uld_loss(hidden, gold, row, hidden, student.log().T, teacher.log().T, Counts(1), 0.25, chunk))
        expected = {"ce": -math.log(student[0, 1]), "correct": int(student is p), "kd": 1 / 2}
        assert terms == pytest.approx({**expected, "loss": 0.75 * expected["ce"] + 0.25 * 1 / 2})
        usual = uld_loss(hidden, gold, row, hidden, student.log().T, teacher.log().T, Counts(1), chunk=chunk)
        assert usual["loss"].item() == pytest.approx((expected["ce"] + 1 / 2) / 2)


@both
def test_by_loops(chunk):
    i = Inputs("uld")
    f = i.arrays()
    student = [f["student_head"] @ state for state in f["student_hidden"]]
    kd = 0
    for n, state in zip(i.rows.tolist(), f["teacher_hidden"][f["teacher_rows"]], strict=True):
        p, q = (sorted(softmax(logits), reverse=True) for logits in (student[n], f["teacher_head"] @ state))
        p += [0] * (len(q) - len(p))
        kd += sum(abs(x - y) for x, y in zip(p, q, strict=True))
    assert len(i.rows) < N
    expected = add_gold_by_loops(i, student, 0.3, kd=kd / TOKENS)
    assert values(i.terms(chunk=chunk, kd_rate=0.3)) == pytest.approx(expected, rel=1e-10)


def test_a_teacher_that_could_learn_has_no_gradient():
    i = Inputs("uld")
    i.teacher_head.requires_grad_()
    assert torch.autograd.grad(i.terms()["kd"], i.teacher_head, allow_unused=True) == (None,)


@pytest.mark.parametrize("chunk", [1, 3, N, 100])
@pytest.mark.parametrize("padding", [0, 9], ids=["larger teacher", "larger student"])
def test_the_fast_path_equals_the_plain_one(padding, chunk):
    found = []
    for size in (0, chunk):
        i = Inputs("uld")
        head = torch.cat([i.student_head, i.student_head[:1].expand(padding, -1) / 2]).detach().requires_grad_()
        i.student_head = head
        terms = i.terms(chunk=size, kd_rate=0.3)
        (2 * terms["loss"]).backward()
        found.append([*terms.values(), i.student_hidden.grad, head.grad])
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


@both
def test_without_any_pair(chunk):
    i = Inputs("uld")
    expected = i.gradients(i.terms()["ce"])
    i.rows, i.teacher_rows = i.rows[:0], i.teacher_rows[:0]
    terms = i.terms(chunk=chunk)
    assert terms["kd"] == 0 and terms["ce"] > 0
    torch.testing.assert_close(i.gradients(terms["loss"]), {name: g / 2 for name, g in expected.items()})
    assert expected.keys() < set(LEARN)


def test_pairs_end_with_the_shorter_response():
    for lengths in ((3, 5), (5, 3)):
        student, teacher = (Side([1], list(range(n))) for n in lengths)
        for index in pair_by_position(Row(student, teacher), None, None):
            assert index.tolist() == [0, 1, 2]
