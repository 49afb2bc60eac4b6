"""losses.py against the papers' formulas written as loops in float64.

The tests of the losses run the fast ones of fast/losses.py too, where what they say holds for both. Gradients are those
of autograd, which test_fast_losses.py compares with the ones that were worked out on paper.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import (
    DIVERGENCES,
    DSKD,
    TEMPERATURE,
    TOKENS,
    V_S,
    D,
    Inputs,
    K,
    M,
    N,
    add_gold_by_loops,
    cross_entropy,
    d,
    divergence_by_loops,
    values,
)

import losses
from fast import losses as fast_losses
from losses import RECIPES, Counts, adaptive_weight, predict_tokens

every_divergence = pytest.mark.parametrize("name", DIVERGENCES)
every_dskd = pytest.mark.parametrize("case", DSKD)
both = pytest.mark.parametrize("chunk", [0, 2], ids=["plain", "fast"])


def random_logits(rows=40, vocabulary=13, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, vocabulary)
    return [scale * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]


# -- the divergences, by loops -----------------------------------------------------------------------------------------


@every_divergence
def test_equals_its_definition_by_loops(name):
    student, teacher = random_logits()
    value = losses.DIVERGENCES[name](student, teacher, 1.7)
    expected = [divergence_by_loops(name, z, t, 1.7) for z, t in zip(student, teacher, strict=True)]
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-10)


def test_adaptive_tail_includes_the_token_that_reaches_alpha_exactly():
    p = torch.tensor([[0.1, 0.6, 0.1, 0.2]], dtype=torch.float64)
    q = torch.tensor([[0.1, 0.15, 0.3, 0.45]], dtype=torch.float64)
    reached = q.log().exp().cumsum(-1)[0, 1].item()  # the tail is the first two: gaps 0 + 0.45, the head's 0.2 + 0.25
    assert adaptive_weight(p.log(), q.log(), alpha=reached).item() == pytest.approx(0.45 / 0.9, rel=1e-12)
    # and not one whose sum is beyond it: the tail is the first, without a gap, the head has all of it
    assert adaptive_weight(p.log(), q.log(), alpha=reached - 1e-6).item() == pytest.approx(1, rel=1e-12)


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_huge_logits_stay_finite(name, dtype):
    student = torch.tensor([[1e4, -1e4, 0, 1e4], [0, 0, 0, -1e4], [1e4, 0, 0, 0], [-1e4, -1e4, -1e4, 1e4]], dtype=dtype)
    teacher = torch.tensor([[-1e4, 1e4, 0, -1e4], [1e4, -1e4, 0, 0], [1e4, 0, 0, 0], [1e4, 1e4, 0, 0]], dtype=dtype)
    student.requires_grad_()
    teacher.requires_grad_()
    value = losses.DIVERGENCES[name](student, teacher, 2.0)
    value.sum().backward()
    assert value.isfinite().all() and (value > -1e-6).all() and value[2].abs() < 1e-6
    assert (value[[0, 1, 3]] > 0.2).all()
    assert student.grad.isfinite().all() and teacher.grad.isfinite().all()


@every_divergence
def test_half_precision_logits_are_taken_to_float32_first(name):
    student, teacher = (logits.bfloat16() for logits in random_logits())
    value = losses.DIVERGENCES[name](student, teacher, 3.0)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, losses.DIVERGENCES[name](student.double(), teacher.double(), 3.0).float())


# -- the losses, by loops ----------------------------------------------------------------------------------------------


def by_loops(i: Inputs, divergence: str, kd_rate: float) -> dict[str, float]:
    """Every term of the case, token by token."""
    f = i.arrays()
    W_s, W_t = f["student_head"], f["teacher_head"]
    logits = [W_s @ state for state in f["student_hidden"]]
    if i.case == "sft":
        return add_gold_by_loops(i, logits, kd_rate)
    if i.case == "kd":  # the rows that both heads have
        pairs = zip(logits, (W_t[:V_S] @ state for state in f["teacher_hidden"]), strict=True)
        kd = sum(divergence_by_loops(divergence, *pair) for pair in pairs) / TOKENS
        return add_gold_by_loops(i, logits, kd_rate, kd=kd)

    t2s, s2t = [f["t2s"] @ g for g in f["teacher_hidden"]], [f["s2t"] @ h for h in f["student_hidden"]]
    # (student token, projected teacher state) and (projected student state, teacher token)
    if i.case == "v1 cma":
        pairs_s = [(n, sum(f["t2s_weights"][n, m] * t2s[m] for m in range(M))) for n in range(N)]
        pairs_t = [(sum(f["s2t_weights"][m, n] * s2t[n] for n in range(N)), m) for m in range(M)]
    else:
        pairs = zip(f["rows"], f["teacher_rows"], strict=True) if i.case == "v2 eta" else [(n, n) for n in range(N)]
        pairs_s, pairs_t = zip(*(((n, t2s[m]), (s2t[n], m)) for n, m in pairs), strict=True)
    t2s_ce = t2s_kd = agreeing = s2t_kd = 0
    for (n, state), label in zip(pairs_s, i.label, strict=True):
        t2s_ce += cross_entropy(W_s @ state, label)
        agrees = int(np.argmax(W_s @ state)) == int(label)
        agreeing += agrees
        if agrees or i.case == "v1 none":
            t2s_kd += divergence_by_loops(divergence, logits[n], W_s @ state)
    for state, m in pairs_t:
        name = "fkl" if i.case.startswith("v1") else divergence
        s2t_kd += divergence_by_loops(name, W_t @ state, W_t @ f["teacher_hidden"][m])
    over = K if i.case == "v2 eta" else TOKENS
    parts = {"t2s_ce": t2s_ce / over, "s2t_kd": s2t_kd / over}
    parts["t2s_kd"] = t2s_kd / (agreeing if i.case.startswith("v2") else TOKENS)
    return add_gold_by_loops(i, logits, kd_rate, **parts, kd=sum(parts.values()), agreeing=agreeing)


@pytest.mark.parametrize("case", ["sft", "kd", *DSKD])
@every_divergence
@both
def test_every_term_by_loops(case, name, chunk):
    i = Inputs(case)
    expected = by_loops(i, name, kd_rate=0.3)
    if i.recipe:  # so that the mask matters
        assert 0 < expected["agreeing"] < len(i.label) and expected["agreeing"] == i.counts.agreeing
    assert values(i.terms(name, chunk, kd_rate=0.3)) == pytest.approx(expected, rel=1e-10)


@every_dskd
@every_divergence
def test_which_term_teaches_what(case, name):
    i = Inputs(case)
    terms = i.terms(name)
    teaches = {
        "ce": {"student_hidden", "student_head"},
        "t2s_ce": {"t2s"},  # the projector only: not the head it speaks through
        "t2s_kd": {"student_hidden", "student_head"},  # the student only: not the projector
        "s2t_kd": {"student_hidden", "s2t"},  # through the teacher's head, and not into the student's
    }
    for term, taught in teaches.items():
        assert i.gradients(terms[term]).keys() == taught, term
    # that a teacher which could learn is not taught either: test_fast_losses.py


# -- parts of an update, and what may be missing -----------------------------------------------------------------------


@pytest.mark.parametrize("case", ["kd", *DSKD])
@both
def test_without_gold_the_distillation_term_is_the_same_and_alone(case, chunk):
    """As on sampled responses: no cross-entropy, neither its value nor its gradient."""
    with_gold, without = Inputs(case), Inputs(case)
    without.gold = None
    expected, found = with_gold.terms("skl", chunk, kd_rate=1.0), without.terms("skl", chunk, kd_rate=1.0)
    assert found.keys() == expected.keys() - {"ce", "correct"}
    torch.testing.assert_close(found, {name: expected[name] for name in found})
    torch.testing.assert_close(without.gradients(found["loss"]), with_gold.gradients(expected["loss"]))
    torch.testing.assert_close(without.terms("skl", chunk, kd_rate=0.3)["loss"], 0.3 * expected["kd"])


@every_divergence
@both
def test_no_pairs_leave_cross_entropy_alone(name, chunk):
    i = Inputs("v2 eta")
    ce = i.terms(name)["ce"]
    i.rows, i.teacher_rows, i.label = i.rows[:0], i.teacher_rows[:0], i.label[:0]
    in_all = Counts(TOKENS, pairs=0, agreeing=0), Counts(TOKENS, pairs=torch.tensor(0), agreeing=torch.tensor(0))
    for counts in (i.counts, *in_all):  # in this batch, in the whole update
        i.counts = counts
        found = i.terms(name, chunk)
        assert [found[key].item() for key in ("t2s_ce", "t2s_kd", "s2t_kd", "kd", "agreeing")] == [0] * 5
        torch.testing.assert_close(found["ce"], ce)
        gradients = i.gradients(found["loss"])
        assert gradients.keys() == {"student_hidden", "student_head"}
        torch.testing.assert_close(gradients, {k: g / 2 for k, g in i.gradients(ce).items()})


@pytest.mark.parametrize("case", DSKD[1:])
@both
def test_no_agreeing_token_gives_no_student_space_term(case, chunk):
    i = Inputs(case)
    i.label = (i.t2s_hidden() @ i.student_head.T).argmin(-1)
    i.counts, i.gold = replace(i.counts, agreeing=0), None
    terms = i.terms("fkl", chunk)
    assert terms["agreeing"] == 0 and terms["t2s_kd"] == 0
    assert terms["t2s_ce"] > 0 and terms["s2t_kd"] > 0
    assert "student_head" not in i.gradients(terms["loss"])  # L_stu would teach it


@both
def test_counts_may_be_means_below_one(chunk):
    """Over processes that average their gradients: with one agreeing token in two of them."""
    i = Inputs("v2 eta")
    whole, i.counts = i.terms(chunk=chunk), Counts(TOKENS / 8, pairs=K / 8, agreeing=3 / 8)
    for name in ("ce", "t2s_ce", "t2s_kd", "s2t_kd", "loss"):
        torch.testing.assert_close(i.terms(chunk=chunk)[name], 8 * whole[name])


@pytest.mark.parametrize("loss", ["sft", "kd", "dskd"])
@both
def test_an_update_without_a_response_is_0(loss, chunk):
    """Every prompt filled its row: nothing is taught, and nothing is NaN."""
    none, heads = torch.zeros(0, dtype=torch.long), (torch.randn(9, d, requires_grad=True), torch.randn(7, D))
    student, teacher, counts = torch.randn(0, d), torch.randn(0, D), Counts(0, 0, 0)
    arguments = {
        "sft": (student, none, heads[0], counts),
        "kd": (student, none, teacher, *heads, counts),
        "dskd": (student, none, slice(None), student, none, teacher, teacher, *heads, counts, RECIPES["v2", "none"]),
    }[loss]
    objective, how = (fast_losses, {"chunk": chunk}) if chunk else (losses, {})
    terms = getattr(objective, f"{loss}_loss")(*arguments, **how)
    terms["loss"].backward()
    assert not any(terms.values()) and not heads[0].grad.any()


# -- heads and precision -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("student_padding", "teacher_padding"), [(0, 0), (2, 0), (5, 0), (2, 6)])
@both
def test_kd_is_over_the_rows_that_both_heads_have(student_padding, teacher_padding, chunk):
    """V_T is V_S + 3; cross-entropy is over all rows of the student's head."""
    i = Inputs("kd")
    pad = {"student_head": torch.ones(student_padding, d), "teacher_head": torch.ones(teacher_padding, D)}
    for name, rows in pad.items():
        setattr(i, name, torch.cat([getattr(i, name), rows]).detach().requires_grad_(name == "student_head"))
    rows = min(len(i.student_head), len(i.teacher_head))
    logits, teacher_logits = i.student_hidden @ i.student_head.T, i.teacher_hidden @ i.teacher_head.T
    kd = losses.DIVERGENCES["fkl"](logits[:, :rows], teacher_logits[:, :rows], TEMPERATURE).sum() / TOKENS
    ce = torch.nn.functional.cross_entropy(logits, i.gold, reduction="sum") / TOKENS
    found = i.terms("fkl", chunk)
    torch.testing.assert_close([found["kd"], found["ce"]], [kd, ce])
    torch.testing.assert_close(i.gradients(found["loss"]), i.gradients((kd + ce) / 2))


@pytest.mark.parametrize("case", ["sft", "kd", "v2 none"])
@both
def test_half_precision_states_are_compared_in_float32(case, chunk):
    """Only the products are rounded to bf16: each term is that of these logits to float32's precision."""
    i = Inputs(case, torch.bfloat16)
    found = i.terms("js", chunk)
    assert all(term.dtype in (torch.float32, torch.int64) for term in found.values())
    ce = torch.nn.functional.cross_entropy((i.student_hidden @ i.student_head.T).float(), i.gold, reduction="sum")
    torch.testing.assert_close(found["ce"], ce / TOKENS)
    if case == "v2 none":
        ce = torch.nn.functional.cross_entropy((i.t2s_hidden() @ i.student_head.T).float(), i.label, reduction="sum")
        torch.testing.assert_close(found["t2s_ce"], ce / TOKENS)


@pytest.mark.parametrize("case", ["sft", "kd", "v2 none"])
def test_terms_are_on_the_device_of_their_inputs(case):
    """On the meta device, where mixing in a tensor of another device shows. (It has no autocast: not the fast ones.)"""
    i = Inputs(case)
    for name, value in vars(i).items():
        setattr(i, name, value.to("meta") if torch.is_tensor(value) else value)
    assert {term.device.type for term in i.terms().values()} == {"meta"}


@both
@pytest.mark.parametrize("case", ["kd", "uld", "mined"])
@pytest.mark.parametrize("mark", [-100, -1])
def test_gold_tokens_are_tokens(case, chunk, mark):
    """A mark of prompts and padding would be left out of the cross-entropy alone."""
    i = Inputs(case)
    i.gold = i.gold.clone()
    i.gold[2] = mark
    with pytest.raises((IndexError, RuntimeError), match=f"{mark} is out of bounds"):
        i.terms(chunk=chunk)


@both
@pytest.mark.parametrize("case", ["v2 none", "v2 eta", "v1 cma"])
@pytest.mark.parametrize("mark", [-100, -1])
def test_labels_are_tokens(case, chunk, mark):
    """A pair without a label would be left out of L_ce, but not of its divisor, of L_stu and of L_tea."""
    i = Inputs(case)
    i.label = i.label.clone()
    i.label[1] = mark
    with pytest.raises((IndexError, RuntimeError), match=f"{mark} is out of bounds"):
        i.terms(chunk=chunk)


def test_predictions_by_parts():
    hidden, head = torch.randn(7, 4), torch.randn(9, 4)
    for predict in (predict_tokens, fast_losses.predict_tokens):
        for chunk in (1, 3, 7, 100):
            assert torch.equal(predict(hidden, head, chunk), (hidden @ head.T).argmax(-1))
        assert predict(hidden[:0], head).shape == (0,)


# -- mistakes of whoever calls it --------------------------------------------------------------------------------------

MISTAKES = {  # case: what is changed, and the argument that the error names
    "rows forgotten": ("v2 eta", {"rows": slice(None)}, "rows"),
    "rows too short": ("v2 eta", {"rows": torch.tensor([6, 0, 2])}, "rows"),
    "too few projected states": ("v2 eta", {"t2s_hidden": torch.randn(K - 1, d)}, "t2s_hidden"),
    "too few labels": ("v2 eta", {"label": torch.zeros(K - 1, dtype=torch.long)}, "label"),
    "labels of all tokens": ("v2 eta", {"label": torch.zeros(N, dtype=torch.long)}, "label"),
    "too few projected student states": ("v1 cma", {"s2t_hidden": torch.randn(M - 1, D)}, "s2t_hidden"),
    "all of the teacher's states": ("v2 eta", {"teacher_hidden": torch.randn(M, D)}, "teacher_hidden"),
    "ETA's pairs with v2's other recipe": ("v2 eta", {"recipe": RECIPES["v2", "none"]}, 'RECIPES["v2", "eta"]'),
    "ETA's pairs with CMA's recipe": ("v2 eta", {"recipe": RECIPES["v1", "cma"]}, "recipe"),
    "pairs not counted": ("v2 eta", {"counts": Counts(TOKENS, agreeing=3)}, "counts.pairs"),
    "agreeing not counted": ("v2 none", {"counts": Counts(TOKENS)}, "counts.agreeing"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("objective", [losses, fast_losses], ids=["plain", "fast"])
def test_mistakes_are_refused_by_name(mistake, objective):
    case, changed, named = MISTAKES[mistake]
    with pytest.raises(ValueError) as error:
        objective.dskd_loss(**{**Inputs(case, torch.float32).arguments(), **changed})
    assert named in str(error.value)
