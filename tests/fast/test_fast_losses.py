"""fast/losses.py against the plain losses: every value and every gradient, in every case; and what it costs."""

import pytest
import torch
from helpers import DIVERGENCES, DSKD, LEARN, V_S, V_T, D, Inputs, K, Largest, N, d

from baselines.uld import uld_loss
from fast import losses as fast_losses
from losses import RECIPES, Counts

CASES = ["sft", "kd", *DSKD]
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)


def inputs(case, dtype=torch.float64, change=""):
    i = Inputs(case, dtype)
    if change == "without gold":
        i.gold = None
    elif change == "a teacher that could learn":
        i.teacher_hidden.requires_grad_(), i.teacher_head.requires_grad_()
    elif change == "no pairs":
        i.rows, i.teacher_rows, i.label = i.rows[:0], i.teacher_rows[:0], i.label[:0]
    return i


def values_and_gradients(i, divergence, chunk):
    terms = i.terms(divergence, chunk, kd_rate=0.3)
    (3 * terms["loss"]).backward()
    leaves = [*LEARN, "teacher_hidden", "teacher_head"]
    return {name: term.detach() for name, term in terms.items()}, {name: getattr(i, name).grad for name in leaves}


# tokens at a time; of these, logits that stay in the cache; rows of the head's gradient at a time
@pytest.mark.parametrize(("chunk", "cached", "head_rows"), [(1, 1, 100), (3, 20, 5), (N, 2**20, 3), (100, 30, 8192)])
@every_divergence
@pytest.mark.parametrize(
    ("case", "change"),
    [*[(case, "") for case in CASES], *[(case, "without gold") for case in CASES[1:]], ("v2 eta", "no pairs"),
     *[(case, "a teacher that could learn") for case in CASES]],
)  # fmt: skip
def test_values_and_gradients_equal_the_plain_ones(monkeypatch, case, change, divergence, chunk, cached, head_rows):
    monkeypatch.setattr(fast_losses, "CACHED_LOGITS", cached)
    monkeypatch.setattr(fast_losses, "HEAD_ROWS", head_rows)
    expected, expected_gradients = values_and_gradients(inputs(case, change=change), divergence, chunk=0)
    found, gradients = values_and_gradients(inputs(case, change=change), divergence, chunk)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for name, gradient in gradients.items():
        plain = expected_gradients[name]
        if plain is None or gradient is None:  # where there is nothing to learn from, autograd may say so
            assert (plain is None or not plain.any()) and (gradient is None or not gradient.any()), name
        else:
            torch.testing.assert_close(gradient, plain, rtol=1e-9, atol=1e-12, msg=name)


@every_divergence
@pytest.mark.parametrize("case", CASES)
def test_in_float32_and_under_bf16_autocast(case, divergence):
    """Under autocast products are in bf16, the rest in float32: gradients as close as bf16 is (3 digits)."""
    for autocast, tolerance in ((False, 1e-5), (True, 2e-2)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected, expected_gradients = values_and_gradients(inputs(case, torch.float32), divergence, chunk=0)
            found, gradients = values_and_gradients(inputs(case, torch.float32), divergence, chunk=3)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        for name, plain in expected_gradients.items():
            if plain is not None:
                assert gradients[name].dtype == plain.dtype
                assert (gradients[name] - plain).norm() <= tolerance * plain.norm(), name


@every_divergence
def test_logits_so_far_apart_that_probabilities_are_0(divergence):
    """Their logarithms are not."""
    both = []
    for chunk in (0, 3):
        i = inputs("kd", torch.float32)
        with torch.no_grad():
            i.student_head *= 200
        both.append(values_and_gradients(i, divergence, chunk))
        p = (i.student_hidden @ i.student_head.T).softmax(-1)
        assert (p == 0).any() and (p.gather(1, i.gold[:, None]) == 0).any()
    (expected, expected_gradients), (found, gradients) = both
    assert all(value.isfinite() for value in expected.values())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for name in LEARN:
        if (plain := expected_gradients[name]) is not None:
            assert (gradients[name] - plain).norm() <= 1e-4 * plain.norm(), name


def test_the_heads_gradient_is_summed_in_float32_over_many_chunks():
    """In bf16 a sum stands still where it is 256 times what is added: here after a fifth of the chunks."""
    hidden, gold = torch.rand(1500, d) + 0.5, torch.zeros(1500, dtype=torch.long)
    gradients = []
    for autocast in (False, True):
        head = torch.zeros(V_S, d, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            fast_losses.sft_loss(hidden, gold, head, Counts(1), chunk=1)["loss"].backward()
        assert head.grad.dtype == torch.float32
        gradients.append(head.grad)
    assert (gradients[1] - gradients[0]).norm() < 3e-3 * gradients[0].norm()


@pytest.mark.parametrize("learns", [True, False])
def test_no_tensor_of_all_logits_and_none_like_a_head_that_does_not_learn(learns):
    n, vocabulary, chunk = 64, 1000, 8
    student_hidden, t2s_hidden = torch.randn(2, n, d)
    s2t_hidden, teacher_hidden = torch.randn(2, n, D)
    student_head, teacher_head = torch.randn(vocabulary, d), torch.randn(vocabulary, D)
    gold, label = torch.randint(vocabulary, (2, n))
    for learning in (student_hidden, t2s_hidden, s2t_hidden):
        learning.requires_grad_()
    student_head.requires_grad_(learns)
    with Largest() as largest:
        fast_losses.dskd_loss(
            student_hidden, gold, slice(None), t2s_hidden, label, s2t_hidden, teacher_hidden, student_head,
            teacher_head, Counts(n, n, n), RECIPES["v2", "none"], chunk=chunk,
        )["loss"].backward()  # fmt: skip
    assert largest.elements == vocabulary * chunk  # which is more than a head of this width


def test_the_loss_alone_has_a_gradient_and_once():
    terms = Inputs("v2 none").terms(chunk=4)
    loss = terms.pop("loss")
    assert not any(term.requires_grad for term in terms.values())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="works only once"):
        loss.backward()


def test_float16_is_refused():
    """There a gradient below 6e-8 is 0, and a GradScaler would come too late."""
    hidden, head = torch.randn(2, d, requires_grad=True), torch.randn(V_S, d)
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="float16"):
        fast_losses.sft_loss(hidden, torch.tensor([0, 1]), head, Counts(2))


@pytest.mark.parametrize("count", [K - 1, K + 1])
def test_numbers_of_tokens_that_do_not_fit_are_refused(count):
    """A chunk would take those that are there. The plain losses refuse them because the shapes do not fit."""
    hidden, teacher_hidden, heads = torch.randn(K, d), torch.randn(count, D), (torch.randn(V_S, d), torch.randn(V_T, D))
    gold, wrong = torch.zeros(K, dtype=torch.long), torch.zeros(count, dtype=torch.long)
    with pytest.raises(ValueError, match=f"gold {count}"):
        fast_losses.sft_loss(hidden, wrong, heads[0], Counts(K), chunk=2)
    with pytest.raises(ValueError, match=f"teacher_hidden has {count}"):
        fast_losses.kd_loss(hidden, gold, teacher_hidden, *heads, Counts(K), chunk=2)
    with pytest.raises(ValueError, match=f"teacher_hidden has {count}"):
        uld_loss(hidden, gold, torch.arange(K), teacher_hidden, *heads, Counts(K), chunk=2)


def test_fused_works_on_a_cpu_whose_cache_is_full(monkeypatch):
    """As with any real vocabulary. Nothing is compiled here."""
    monkeypatch.setattr(fast_losses, "fuse", lambda function: function)
    monkeypatch.setattr(fast_losses, "CACHED_LOGITS", 1)
    i = Inputs("kd")
    arguments = i.student_hidden, i.gold, i.teacher_hidden, i.student_head, i.teacher_head, i.counts
    found = [fast_losses.kd_loss(*arguments, chunk=4, fused=fused) for fused in (False, True)]
    torch.testing.assert_close(*found)
