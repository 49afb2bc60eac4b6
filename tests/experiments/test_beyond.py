from contextlib import ExitStack

import pytest
import torch
from helpers import arguments

import losses
import train
from experiments.beyond import by_entropy, by_spans, find_spans, span_divergence, weigh_by_entropy


@pytest.mark.parametrize(
    "teacher, student, expected",
    [
        ([b"a", b"bc", None], [b"a", b"bc", None], [(1, 1)] * 3),
        ([b"ab", b"c", b"d", None], [b"a", b"bc", b"d", None], [(2, 2), (1, 1), (1, 1)]),
        ([b"abc", b"d"], [b"a", b"b", b"c", b"d"], [(1, 3), (1, 1)]),
        ([b"The", b" fox", None], [b" The", b" f", b"", b"ox", None], [(1, 1), (1, 3), (1, 1)]),  # a dummy space
        ([b"a", b"xy"], [b"a", b"xz"], []),
        ([b"ab", None], [b"a", None], []),
    ],
)
def test_spans(teacher, student, expected):
    found = find_spans(teacher, student)
    assert [(a.stop - a.start, b.stop - b.start) for a, b in found] == expected
    for a, b in found:
        if teacher[a] != [None]:
            assert b"".join(teacher[a]).strip() == b"".join(student[b]).strip()
    assert [a.start for a, _ in found[1:]] == [a.stop for a, _ in found[:-1]]


def test_span_divergence():
    log_p = torch.tensor([-0.1, -2.0, -0.7], requires_grad=True)
    assert torch.allclose(span_divergence(log_p, log_p.detach()), torch.zeros(3), atol=1e-6)
    p, q = log_p.exp(), torch.tensor([0.5, 0.5, 0.9])
    expected = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    found = span_divergence(log_p, q.log())
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert (log_p.grad.sign() == (p - q).sign()).all() and span_divergence(torch.zeros(1), torch.zeros(1)).isfinite()


def test_entropy_weights():
    sharp, flat = torch.tensor([9.0, 0.0, 0.0]), torch.zeros(3)
    weight = weigh_by_entropy(torch.stack([flat, sharp, flat]), torch.stack([sharp, sharp, flat]))
    assert weight[0] > 2.9 and weight[2] < 1e-6 < weight[1] and weight.mean() == pytest.approx(1)
    student, teacher = torch.randn(2, 4, 7)
    plain = losses.DIVERGENCES["rkl"](student, teacher, 2.0)
    [change] = by_entropy()
    with change:
        found = losses.DIVERGENCES["rkl"](student, teacher, 2.0)
    torch.testing.assert_close(found, plain * weigh_by_entropy(student, teacher))


@pytest.mark.parametrize("changes", [by_entropy, by_spans])
def test_a_run_is_changed(tiny_task, tmp_path, changes):
    """And what is logged as the loss is what has the gradient."""
    words = [*arguments(tiny_task, tmp_path / "run", recipe="v2", align="eta", chunk=0), "--dry-run"]
    found = []
    for patches in ([], changes()):
        with ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            found.append(train.train(train.Options(**train.settings(train.parse(words)))))
    plain, changed = found
    assert changed["ce"] == plain["ce"] and changed["grad_norm"] != plain["grad_norm"] and changed["kd"] != plain["kd"]
    assert changed["loss"] == pytest.approx((changed["ce"] + changed["kd"]) / 2)
