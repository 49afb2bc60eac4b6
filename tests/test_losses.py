"""losses.py against numbers worked out by hand, the formulas written as loops in float64, and finite differences."""

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.functional import cross_entropy

from fast import losses as fused
from losses import (
    DIVERGENCES,
    PLAIN,
    adaptive_weight,
    count_agreeing,
    dskd_loss,
    jensen_shannon,
    kd_loss,
    mined_loss,
    one_hot_terms,
    sft_loss,
    skewed_forward_kl,
    skewed_reverse_kl,
    student_space_terms,
    uld_loss,
    uld_terms,
)

NAMES = ["fkl", "rkl", "js", "skl", "srkl", "akl"]
COMBINATIONS = [("v1", "none"), ("v1", "cma"), ("v2", "none"), ("v2", "eta")]
every_divergence = pytest.mark.parametrize("name", NAMES)
every_combination = pytest.mark.parametrize(("recipe", "align"), COMBINATIONS)


def random_logits(rows=40, vocabulary=13, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, vocabulary)
    return [scale * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]


# -- the divergences, by hand ------------------------------------------------------------------------------------------

# Student p = (1/2, 1/8, 3/8), teacher q = (1/8, 1/4, 5/8). Log ratios q/p: 1/4, 2, 5/3.
FKL = 1 / 8 * math.log(1 / 4) + 1 / 4 * math.log(2) + 5 / 8 * math.log(5 / 3)
RKL = 1 / 2 * math.log(4) + 1 / 8 * math.log(1 / 2) + 3 / 8 * math.log(3 / 5)
BY_HAND = {
    "fkl": FKL,
    "rkl": RKL,
    # m = (5/16, 3/16, 1/2); q/m = 2/5, 4/3, 5/4; p/m = 8/5, 2/3, 3/4
    "js": 0.5 * (1 / 8 * math.log(2 / 5) + 1 / 4 * math.log(4 / 3) + 5 / 8 * math.log(5 / 4))
    + 0.5 * (1 / 2 * math.log(8 / 5) + 1 / 8 * math.log(2 / 3) + 3 / 8 * math.log(3 / 4)),
    # 0.1 q + 0.9 p = (0.4625, 0.1375, 0.4)
    "skl": 0.125 * math.log(0.125 / 0.4625) + 0.25 * math.log(0.25 / 0.1375) + 0.625 * math.log(0.625 / 0.4),
    # 0.9 q + 0.1 p = (0.1625, 0.2375, 0.6)
    "srkl": 0.5 * math.log(0.5 / 0.1625) + 0.125 * math.log(0.125 / 0.2375) + 0.375 * math.log(0.375 / 0.6),
    # q ascending: 1/8, 1/4 (mass 3/8, the tail), 5/8 (the head). Gaps: tail 3/8 + 1/8 = 1/2, head 1/4
    "akl": 1 / 3 * FKL + 2 / 3 * RKL,
}


@every_divergence
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_three_tokens_by_hand(name, order, temperature):
    eighths = torch.tensor([[4, 1, 3], [1, 2, 5]], dtype=torch.float64)[:, order]
    p, q = eighths[:1] / 8, eighths[1:] / 8
    # any constant may be added to logits; logits T times as large give the same distributions, and no T² comes back
    value = DIVERGENCES[name](temperature * p.log() + 5, temperature * q.log() - 7, temperature)
    assert value.shape == (1,)
    assert value.item() == pytest.approx(BY_HAND[name], rel=1e-12)


def test_all_six_are_there_and_differ():
    assert list(DIVERGENCES) == NAMES
    assert len({round(value, 6) for value in BY_HAND.values()}) == 6


@every_divergence
def test_temperature_divides_the_logits(name):
    student, teacher = random_logits()
    at_three = DIVERGENCES[name](student, teacher, 3.0)
    torch.testing.assert_close(at_three, DIVERGENCES[name](student / 3, teacher / 3, 1.0))
    assert (at_three - DIVERGENCES[name](student, teacher, 1.0)).abs().min() > 1e-6


def loop_divergence(name, student_logits, teacher_logits, temperature):
    """One token, from the table in the papers' terms, with nothing but math."""

    def softmax(logits):
        powers = [math.exp((z - max(logits)) / temperature) for z in logits]
        return [power / sum(powers) for power in powers]

    p, q = softmax(list(map(float, student_logits))), softmax(list(map(float, teacher_logits)))

    def kl(a, b):
        return sum(x * (math.log(x) - math.log(y)) for x, y in zip(a, b, strict=True))

    if name == "fkl":
        return kl(q, p)
    if name == "rkl":
        return kl(p, q)
    if name == "js":
        m = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
        return (kl(q, m) + kl(p, m)) / 2
    if name == "skl":
        return kl(q, [0.1 * y + 0.9 * x for x, y in zip(p, q, strict=True)])
    if name == "srkl":
        return kl(p, [0.9 * y + 0.1 * x for x, y in zip(p, q, strict=True)])
    head = loop_adaptive_weight(p, q, 0.5)
    return head * kl(q, p) + (1 - head) * kl(p, q)


def loop_adaptive_weight(p, q, alpha):
    """g_h/(g_h + g_t), by walking up the teacher's probabilities."""
    mass, gap_tail, gap_head = 0.0, 0.0, 0.0
    for token in sorted(range(len(q)), key=lambda token: q[token]):
        mass += q[token]
        if mass <= alpha:
            gap_tail += abs(q[token] - p[token])
        else:
            gap_head += abs(q[token] - p[token])
    return gap_head / (gap_head + gap_tail)


@every_divergence
def test_equals_its_definition_by_loops(name):
    student, teacher = random_logits()
    value = DIVERGENCES[name](student, teacher, 1.7)
    expected = [loop_divergence(name, z, t, 1.7) for z, t in zip(student, teacher, strict=True)]
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-10)


@every_divergence
def test_never_negative_and_zero_only_where_equal(name):
    student, teacher = random_logits(rows=200)
    assert (DIVERGENCES[name](student, teacher, 2.0) > 1e-4).all()
    assert DIVERGENCES[name](teacher + 3, teacher, 2.0).abs().max() < 1e-14


def test_jensen_shannon_is_symmetric_and_at_most_log_2():
    student, teacher = random_logits(scale=20.0)
    js = DIVERGENCES["js"](student, teacher, 1.0)
    torch.testing.assert_close(js, DIVERGENCES["js"](teacher, student, 1.0))
    assert js.max() <= math.log(2) + 1e-12
    assert js.max() > 0.68  # some of these distributions hardly overlap, so that the bound is felt
    apart = torch.tensor([[60.0, -60.0]])
    assert DIVERGENCES["js"](apart, -apart, 1.0).item() == pytest.approx(math.log(2), rel=1e-6)
    # at a half the mixtures of the skewed divergences are m
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    halves = skewed_forward_kl(log_p, log_q, skew=0.5) + skewed_reverse_kl(log_p, log_q, skew=0.5)
    torch.testing.assert_close(jensen_shannon(log_p, log_q), halves / 2)


def test_skewed_divergences_between_their_limits():
    student, teacher = random_logits()
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    for skewed, plain in ((skewed_forward_kl, DIVERGENCES["fkl"]), (skewed_reverse_kl, DIVERGENCES["rkl"])):
        torch.testing.assert_close(skewed(log_p, log_q, skew=1e-12), plain(student, teacher, 1.0))
        assert skewed(log_p, log_q, skew=1 - 1e-6).abs().max() < 1e-5
    # a student without any mass where the teacher has it: plain divergences grow without limit, these stop at −log λ
    apart = torch.tensor([[500.0, -500.0]])
    for name in ("skl", "srkl"):
        assert DIVERGENCES[name](apart, -apart, 1.0).item() == pytest.approx(math.log(10), rel=1e-6)


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
    value = DIVERGENCES[name](student, teacher, 2.0)
    value.sum().backward()
    assert value.isfinite().all() and (value > -1e-6).all() and value[2].abs() < 1e-6
    assert (value[[0, 1, 3]] > 0.2).all()
    assert student.grad.isfinite().all() and teacher.grad.isfinite().all()


@every_divergence
def test_half_precision_logits_are_taken_to_float32_first(name):
    student, teacher = (logits.bfloat16() for logits in random_logits())
    value = DIVERGENCES[name](student, teacher, 3.0)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, DIVERGENCES[name](student.double(), teacher.double(), 3.0).float())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "akl"])
def test_gradients_by_finite_differences(name):
    student, teacher = (logits.requires_grad_() for logits in random_logits(rows=4, vocabulary=5))
    assert gradcheck(lambda z, t: DIVERGENCES[name](z, t, 2.0), (student, teacher))


def test_adaptive_gradient_leaves_the_weights_alone():
    student, teacher = (logits.requires_grad_() for logits in random_logits(rows=4, vocabulary=5))
    p, q = (logits.detach().div(2).softmax(-1).tolist() for logits in (student, teacher))
    weight = torch.tensor([loop_adaptive_weight(*row, 0.5) for row in zip(p, q, strict=True)], dtype=torch.float64)
    assert weight.min() < 0.5 < weight.max() and (weight.unique().numel() == 4)

    def with_fixed_weights(z, t):
        log_p, log_q = (z / 2).log_softmax(-1), (t / 2).log_softmax(-1)
        fkl, rkl = (log_q.exp() * (log_q - log_p)).sum(-1), (log_p.exp() * (log_p - log_q)).sum(-1)
        return weight * fkl + (1 - weight) * rkl

    assert gradcheck(with_fixed_weights, (student, teacher))
    ours, fixed = (
        torch.autograd.grad(values.sum(), (student, teacher))
        for values in (DIVERGENCES["akl"](student, teacher, 2.0), with_fixed_weights(student, teacher))
    )
    torch.testing.assert_close(ours, fixed)


# -- the objectives, by loops ------------------------------------------------------------------------------------------

N, M, K, d, D, V, V_T = 7, 9, 5, 3, 4, 8, 11  # V_T: the teacher's vocabulary where it is another one
TOKENS, TEMPERATURE = 12.5, 1.5  # a mean over several ranks need not be a whole number


class Inputs:
    """Random states, heads and projectors of one combination, as leaves, with labels that half of the tokens meet."""

    def __init__(self, recipe="v2", align="none", seed=0, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

        same = align == "none"
        self.recipe, self.align = recipe, align
        self.student_hidden, self.teacher_hidden = random(N, d), random(N if same else M, D)
        self.student_head, self.teacher_head = random(V, d), random(V if same else V_T, D)
        self.t2s, self.s2t = random(d, D), random(D, d)
        self.t2s_weights, self.s2t_weights = random(N, M).detach().softmax(1), random(M, N).detach().softmax(1)
        self.student_rows = torch.tensor([6, 0, 2, 3, 5]) if align == "eta" else None  # K distinct, in any order
        self.teacher_rows = torch.tensor([8, 1, 2, 4, 7]) if align == "eta" else None
        with torch.no_grad():  # every second gold token, and every second label, is the arg-max
            best = (self.student_hidden @ self.student_head.T).argmax(-1)
            self.gold = (best + torch.arange(N) % 2) % V
            best = (self.t2s_hidden() @ self.student_head.T).argmax(-1)
            self.t2s_label = (best + torch.arange(len(best)) % 2) % V
            if recipe == "v1":
                self.gold = self.t2s_label

    def leaves(self):
        names = ("student_hidden", "teacher_hidden", "student_head", "teacher_head", "t2s", "s2t")
        return {name: getattr(self, name) for name in names}

    def paired(self):
        return self.teacher_hidden if self.align != "eta" else self.teacher_hidden[self.teacher_rows]

    def t2s_hidden(self):
        projected = self.paired() @ self.t2s.T
        return self.t2s_weights @ projected if self.align == "cma" else projected

    def s2t_hidden(self):
        states = self.student_hidden if self.align != "eta" else self.student_hidden[self.student_rows]
        return self.s2t_weights @ (states @ self.s2t.T) if self.align == "cma" else states @ self.s2t.T

    def loss(self, divergence, terms=PLAIN, kd_rate=0.5):
        return dskd_loss(
            self.student_hidden, self.gold, self.t2s_hidden(), self.t2s_label, self.s2t_hidden(), self.paired(),
            self.student_head, self.teacher_head, TOKENS, self.student_rows, self.recipe, self.align, divergence,
            TEMPERATURE, terms=terms, kd_rate=kd_rate,
        )  # fmt: skip


def loop_cross_entropy(logits, label):
    top = max(logits)
    return top + math.log(sum(math.exp(z - top) for z in logits)) - logits[label]


def by_loops(i: Inputs, divergence):
    """Every term of the combination, token by token in float64."""
    f = {name: leaf.detach().double().numpy() for name, leaf in i.leaves().items()}
    t2s = [f["t2s"] @ state for state in f["teacher_hidden"]]
    s2t = [f["s2t"] @ state for state in f["student_hidden"]]
    # (student token, projected teacher state) and (projected student state, teacher token)
    if i.align == "none":
        pairs_s = [(n, t2s[n]) for n in range(N)]
        pairs_t = [(s2t[n], n) for n in range(N)]
    elif i.align == "cma":
        weights, back = i.t2s_weights.double().numpy(), i.s2t_weights.double().numpy()
        pairs_s = [(n, sum(weights[n, m] * t2s[m] for m in range(M))) for n in range(N)]
        pairs_t = [(sum(back[m, n] * s2t[n] for n in range(N)), m) for m in range(M)]
    else:
        pairs = list(zip(i.student_rows.tolist(), i.teacher_rows.tolist(), strict=True))
        pairs_s = [(n, t2s[m]) for n, m in pairs]
        pairs_t = [(s2t[n], m) for n, m in pairs]

    student_logits = [f["student_head"] @ state for state in f["student_hidden"]]
    ce = sum(loop_cross_entropy(student_logits[n], int(i.gold[n])) for n in range(N)) / TOKENS
    correct = sum(int(np.argmax(student_logits[n])) == int(i.gold[n]) for n in range(N))
    t2s_ce = t2s_kd = agreeing = 0
    for k, (n, state) in enumerate(pairs_s):
        label, logits = int(i.t2s_label[k]), f["student_head"] @ state
        t2s_ce += loop_cross_entropy(logits, label)
        agrees = int(np.argmax(logits)) == label
        agreeing += agrees
        if agrees or (i.recipe, i.align) == ("v1", "none"):
            t2s_kd += loop_divergence(divergence, student_logits[n], logits, TEMPERATURE)
    s2t_kd = 0
    for state, m in pairs_t:
        name = "fkl" if i.recipe == "v1" else divergence
        logits, teacher = f["teacher_head"] @ state, f["teacher_head"] @ f["teacher_hidden"][m]
        s2t_kd += loop_divergence(name, logits, teacher, TEMPERATURE)
    over = len(pairs_s) if i.align == "eta" else TOKENS
    terms = {
        "t2s_ce": t2s_ce / over,
        "t2s_kd": t2s_kd / (agreeing if i.recipe == "v2" else TOKENS),
        "s2t_kd": s2t_kd / over,
    }
    counts = {"correct": correct, "agreeing": agreeing, "pairs": len(pairs_s)}
    kd = sum(terms.values())
    return {"ce": ce, "kd": kd, **terms, **counts, "loss": 0.5 * ce + 0.5 * kd}


@every_divergence
@every_combination
def test_dskd_by_loops(recipe, align, name):
    inputs = Inputs(recipe, align)
    expected = by_loops(inputs, name)
    assert 0 < expected["agreeing"] < expected["pairs"] and 0 < expected["correct"] < N  # so that the masks matter
    ours = inputs.loss(name)
    assert ours.keys() == expected.keys()
    for term, value in expected.items():
        assert float(ours[term].detach()) == pytest.approx(value, rel=1e-6, abs=1e-6), term


@every_divergence
def test_kd_and_sft_by_loops(name):
    i = Inputs()
    ours = kd_loss(
        i.student_hidden, i.gold, i.teacher_hidden, i.student_head, i.teacher_head, TOKENS, name, TEMPERATURE
    )
    student, teacher = (i.student_hidden @ i.student_head.T).tolist(), (i.teacher_hidden @ i.teacher_head.T).tolist()
    ce = sum(loop_cross_entropy(student[n], int(i.gold[n])) for n in range(N)) / TOKENS
    kd = sum(loop_divergence(name, student[n], teacher[n], TEMPERATURE) for n in range(N)) / TOKENS
    correct = sum(int(np.argmax(student[n])) == int(i.gold[n]) for n in range(N))
    assert 0 < correct < N
    expected = {"ce": ce, "kd": kd, "correct": correct, "loss": 0.5 * ce + 0.5 * kd}
    assert {key: value.item() for key, value in ours.items()} == pytest.approx(expected)
    sft = sft_loss(i.student_hidden, i.gold, i.student_head, TOKENS)
    expected = {"ce": ce, "correct": correct, "loss": ce}
    assert {key: value.item() for key, value in sft.items()} == pytest.approx(expected)


@every_combination
def test_which_term_teaches_what(recipe, align):
    teaches = {
        "ce": {"student_hidden", "student_head"},
        "t2s_ce": {"t2s"},  # the projector only: not the head it speaks through
        "t2s_kd": {"student_hidden", "student_head"},  # the student only: not the projector
        "s2t_kd": {"student_hidden", "s2t"},  # through the teacher's head, and not into the student's
    }
    for name in NAMES:
        inputs = Inputs(recipe, align)
        inputs.teacher_hidden.requires_grad_(False)  # frozen, as in training: its head passes gradient all the same
        inputs.teacher_head.requires_grad_(False)
        leaves = {key: leaf for key, leaf in inputs.leaves().items() if leaf.requires_grad}
        terms = inputs.loss(name)
        for term, taught in teaches.items():
            gradients = torch.autograd.grad(terms[term], list(leaves.values()), retain_graph=True, allow_unused=True)
            reached = {key for key, g in zip(leaves, gradients, strict=True) if g is not None and g.abs().max() > 0}
            assert reached == taught, (term, name)
        whole = torch.autograd.grad(terms["kd"], inputs.student_hidden, retain_graph=True)[0]
        parts = [terms[term] for term in ("t2s_ce", "t2s_kd", "s2t_kd")]
        torch.testing.assert_close(whole, torch.autograd.grad(sum(parts), inputs.student_hidden)[0])


def test_gradients_of_forward_kl_by_hand():
    """∂fkl/∂z = (p − q)/T for logits z, ∂CE/∂z = softmax(z) − onehot; the chain rule does the rest."""
    i = Inputs("v2", "eta", dtype=torch.float64)
    terms = i.loss("fkl")
    h, g = i.student_hidden.detach(), i.teacher_hidden.detach()[i.teacher_rows]
    W, W_t, A, S = (x.detach() for x in (i.student_head, i.teacher_head, i.t2s, i.s2t))
    projected = g @ A.T @ W.T
    agrees = projected.argmax(-1) == i.t2s_label
    p, q = ((z / TEMPERATURE).softmax(-1) for z in (h[i.student_rows] @ W.T, projected))
    slope = (p - q) / TEMPERATURE * agrees[:, None] / agrees.sum()
    expected = torch.zeros_like(h)
    expected[i.student_rows] = slope @ W
    torch.testing.assert_close(torch.autograd.grad(terms["t2s_kd"], i.student_hidden, retain_graph=True)[0], expected)
    slope = (projected.softmax(-1) - torch.eye(V).double()[i.t2s_label]) / K
    gradient = torch.autograd.grad(terms["t2s_ce"], i.t2s, retain_graph=True)[0]
    torch.testing.assert_close(gradient, W.T @ slope.T @ g)
    p, q = ((z / TEMPERATURE).softmax(-1) for z in (h[i.student_rows] @ S.T @ W_t.T, g @ W_t.T))
    slope = (p - q) / TEMPERATURE / K
    torch.testing.assert_close(
        torch.autograd.grad(terms["s2t_kd"], i.s2t, retain_graph=True)[0], W_t.T @ slope.T @ h[i.student_rows]
    )
    expected = torch.zeros_like(h)
    expected[i.student_rows] = slope @ W_t @ S
    torch.testing.assert_close(torch.autograd.grad(terms["s2t_kd"], i.student_hidden)[0], expected)


# -- ULD and MinED -----------------------------------------------------------------------------------------------------

STUDENT_IDS, TEACHER_IDS = torch.tensor([0, 2, 3, 7]), torch.tensor([10, 1, 1, 4])  # 4 of 8 student tokens are meant


def baseline_loss(name, i: Inputs, terms=PLAIN, kd_rate=0.5):
    """ULD or MinED on the pairs of ETA's inputs; their vocabularies are of different size."""
    arguments = i.student_hidden, i.gold, i.paired(), i.student_rows, i.student_head, i.teacher_head
    if name == "uld":
        return uld_loss(*arguments, TOKENS, terms, kd_rate)
    return mined_loss(*arguments, STUDENT_IDS, TEACHER_IDS, TOKENS, TEMPERATURE, terms, kd_rate)


def test_uld_by_hand():
    """Student 5/8, 2/8, 1/8; teacher 3/8, 3/8, 1/8, 1/8: 2/8 + 1/8 + 0 + 1/8. Which token has which does not matter."""
    p, q = torch.tensor([[1, 5, 2]]) / 8, torch.tensor([[3, 1, 1, 3]]) / 8
    hidden, gold = torch.ones(1, 1), torch.tensor([1])
    for student, teacher in ((p, q), (q, p)):
        ce, correct, kd = uld_terms(hidden, gold, hidden, student.log().T, teacher.log().T)
        assert kd.item() == pytest.approx(1 / 2)
        assert ce.item() == pytest.approx(-math.log(student[0, 1])) and correct.item() == (student is p)


def test_mined_by_hand():
    """Teacher 1/8, 4/8, 3/8; student token 0 takes the 4/8, token 2 the 3/8, renormalised to 4/7 and 3/7."""
    p, q = torch.tensor([[1, 5, 2]]) / 8, torch.tensor([[1, 4, 3]]) / 8
    hidden, heads = torch.ones(2, 1), (p.log().T, q.log().T)
    ids = torch.tensor([0, 2]), torch.tensor([1, 2])
    found = mined_loss(hidden, torch.tensor([1, 2]), hidden[:1], torch.tensor([1]), *heads, *ids, 2, temperature=1.0)
    aligned = 4 / 7 * math.log(4 / 7 / (1 / 8)) + 3 / 7 * math.log(3 / 7 / (2 / 8))
    assert found["kd"].item() == pytest.approx((aligned - math.log(5 / 8)) / 2)
    assert found["ce"].item() == pytest.approx(-(math.log(5 / 8) + math.log(2 / 8)) / 2)
    assert found["correct"] == 1
    # at temperature 2 the token without a partner is still compared with a one-hot distribution
    roots = [math.sqrt(x) for x in (1, 5, 2)]
    kd = one_hot_terms(hidden[:1], torch.tensor([1]), heads[0], 2.0)[2]
    assert kd.item() == pytest.approx(-math.log(roots[1] / sum(roots)))


@pytest.mark.parametrize("terms", [PLAIN, fused.fused_terms(2)], ids=["plain", "fused"])
@pytest.mark.parametrize("name", ["uld", "mined"])
def test_baselines_by_loops(name, terms):
    i = Inputs("v2", "eta")
    f = {key: leaf.detach().double().numpy() for key, leaf in i.leaves().items()}
    student = [f["student_head"] @ state for state in f["student_hidden"]]
    teacher = [f["teacher_head"] @ state for state in f["teacher_hidden"]]
    partner = dict(zip(i.student_rows.tolist(), i.teacher_rows.tolist(), strict=True))
    assert 0 < len(partner) < N

    def softmax(logits, temperature):
        powers = [math.exp(z / temperature) for z in logits]
        return [power / sum(powers) for power in powers]

    kd = 0
    for n in range(N):
        if name == "uld" and n in partner:
            p, q = (sorted(softmax(z, 1), reverse=True) for z in (student[n], teacher[partner[n]]))
            p += [0] * (V_T - V)
            kd += sum(abs(x - y) for x, y in zip(p, q, strict=True))
        elif name == "mined":
            target = {int(i.gold[n]): 1.0}
            if n in partner:
                logits = [teacher[partner[n]][t] for t in TEACHER_IDS.tolist()]
                target = dict(zip(STUDENT_IDS.tolist(), softmax(logits, TEMPERATURE), strict=True))
            p = softmax(student[n], TEMPERATURE)
            kd += sum(x * (math.log(x) - math.log(p[token])) for token, x in target.items())
    ce = sum(loop_cross_entropy(student[n], int(i.gold[n])) for n in range(N))
    correct = sum(int(np.argmax(student[n])) == int(i.gold[n]) for n in range(N))
    found = baseline_loss(name, i, terms, kd_rate=0.25)
    expected = {"ce": ce / TOKENS, "kd": kd / TOKENS, "correct": correct, "loss": (0.75 * ce + 0.25 * kd) / TOKENS}
    assert {key: value.item() for key, value in found.items()} == pytest.approx(expected, rel=1e-5)
    assert 0 < correct < N and kd > 0


def test_gradients_of_the_baselines():
    """Finite differences, in float64; the teacher has none."""
    for name in ("uld", "mined"):
        i = Inputs("v2", "eta", dtype=torch.float64)

        def kd(student_hidden, student_head, i=i, name=name):
            i.student_hidden, i.student_head = student_hidden, student_head
            return baseline_loss(name, i)["kd"]

        assert gradcheck(kd, (i.student_hidden, i.student_head))
        baseline_loss(name, i)["kd"].backward()
        assert i.teacher_hidden.grad is None and i.teacher_head.grad is None


@pytest.mark.parametrize("terms", [PLAIN, fused.fused_terms(2)], ids=["plain", "fused"])
@pytest.mark.parametrize("name", ["uld", "mined"])
def test_baselines_without_any_pair(name, terms):
    i = Inputs("v2", "eta")
    i.student_rows, i.teacher_rows = (torch.tensor([], dtype=torch.long) for _ in range(2))
    found = baseline_loss(name, i, terms)
    logits = (i.student_hidden @ i.student_head.T).detach()
    kd = 0 if name == "uld" else cross_entropy(logits / TEMPERATURE, i.gold, reduction="sum") / TOKENS
    torch.testing.assert_close(found["kd"].detach(), torch.as_tensor(kd, dtype=torch.float32))
    torch.testing.assert_close(found["ce"].detach(), cross_entropy(logits, i.gold, reduction="sum") / TOKENS)
    found["loss"].backward()
    assert i.student_hidden.grad.abs().min() > 0


# -- chunks and parts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [10**6, 24])  # logits: all of a chunk, or only 3 rows (2 of the teacher's) at once
@pytest.mark.parametrize("chunk", [1, 3, 4, N, 100])
@pytest.mark.parametrize("case", ["sft", "kd", "uld", "mined", *COMBINATIONS])
def test_chunks_change_neither_value_nor_gradient(case, chunk, cached, monkeypatch):
    """The terms that training uses, a few tokens at a time, against the plain ones."""
    monkeypatch.setattr(fused, "CACHED_LOGITS", cached)

    def run(terms, kd_rate=0.3):
        i = Inputs(*(case if isinstance(case, tuple) else ("v2", "eta" if case in ("uld", "mined") else "none")))
        i.teacher_hidden.requires_grad_(False)
        i.teacher_head.requires_grad_(False)
        if case == "sft":
            found = sft_loss(i.student_hidden, i.gold, i.student_head, TOKENS, terms, kd_rate)
        elif case == "kd":
            states = i.student_hidden, i.gold, i.teacher_hidden, i.student_head, i.teacher_head
            found = kd_loss(*states, TOKENS, "js", TEMPERATURE, terms, kd_rate)
        elif case in ("uld", "mined"):
            found = baseline_loss(case, i, terms, kd_rate)
        else:
            found = i.loss("js", terms, kd_rate)
        (2 * found["loss"]).backward()
        gradients = {name: leaf.grad for name, leaf in i.leaves().items() if leaf.grad is not None}
        return {name: value.detach() for name, value in found.items()}, gradients

    values, gradients = run(fused.fused_terms(chunk))
    expected_values, expected_gradients = run(PLAIN)
    names = {"student_hidden", "student_head"} | ({"t2s", "s2t"} if isinstance(case, tuple) else set())
    assert gradients.keys() == expected_gradients.keys() == names
    torch.testing.assert_close(values, expected_values)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-7)


@every_combination
def test_parts_of_a_batch_add_up(recipe, align):
    i = Inputs(recipe, align)
    if align == "cma":  # the attended states of a part are rows of the whole's
        parts = [(slice(0, 4), slice(0, 4), slice(0, 2)), (slice(4, N), slice(4, N), slice(2, M))]
    elif align == "eta":  # pairs of student tokens 0, 2, 3 and of 6, 5
        parts = [(slice(0, 4), [1, 2, 3], [1, 2, 3]), (slice(4, N), [0, 4], [0, 4])]
    else:
        parts = [(slice(0, 4),) * 3, (slice(4, N),) * 3]
    whole = i.loss("srkl")
    agreeing = count_agreeing(i.t2s_hidden(), i.t2s_label, i.student_head, chunk=2)
    assert agreeing == whole["agreeing"]
    assert 0 < agreeing < len(i.t2s_label)
    sums = {}
    for tokens, pairs_s, pairs_t in parts:
        rows = None if i.student_rows is None else i.student_rows[pairs_s] - tokens.start
        terms = dskd_loss(
            i.student_hidden[tokens], i.gold[tokens], i.t2s_hidden()[pairs_s], i.t2s_label[pairs_s],
            i.s2t_hidden()[pairs_t], i.paired()[pairs_t], i.student_head, i.teacher_head, TOKENS, rows, recipe, align,
            "srkl", TEMPERATURE, pairs=len(i.t2s_label), agreeing=agreeing,
        )  # fmt: skip
        sums = {name: sums.get(name, 0) + value for name, value in terms.items()}
    torch.testing.assert_close(sums, whole)


# -- without gold ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", [PLAIN, fused.fused_terms(2)], ids=["plain", "fused"])
@pytest.mark.parametrize("case", ["kd", *COMBINATIONS])
def test_without_gold_the_distillation_term_is_the_same_and_alone(case, terms):
    """As on sampled responses: no cross-entropy, neither its value nor its gradient."""

    def run(gold):
        i = Inputs(*(case if isinstance(case, tuple) else ("v2", "none")))
        i.teacher_hidden.requires_grad_(False)
        i.teacher_head.requires_grad_(False)
        i.gold = i.gold if gold else None
        if case == "kd":
            heads = i.student_head, i.teacher_head
            found = kd_loss(i.student_hidden, i.gold, i.teacher_hidden, *heads, TOKENS, "skl", TEMPERATURE, terms, 1.0)
        else:
            found = i.loss("skl", terms, kd_rate=1.0)
        found["loss"].backward()
        return found, {name: leaf.grad for name, leaf in i.leaves().items() if leaf.grad is not None}

    (found, gradients), (expected, expected_gradients) = run(gold=False), run(gold=True)
    assert found.keys() == expected.keys() - {"ce", "correct"}
    torch.testing.assert_close(found, {name: expected[name] for name in found})
    torch.testing.assert_close(gradients, expected_gradients)


# -- edges -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", [PLAIN, fused.fused_terms(2)], ids=["plain", "fused"])
@every_divergence
def test_no_pairs_leave_cross_entropy_alone(name, terms):
    i = Inputs("v2", "eta")
    i.teacher_hidden.requires_grad_(False)
    i.teacher_head.requires_grad_(False)
    ce = i.loss(name)["ce"]
    i.student_rows, i.teacher_rows, i.t2s_label = i.student_rows[:0], i.teacher_rows[:0], i.t2s_label[:0]
    found = i.loss(name, terms)
    assert [found[key].item() for key in ("t2s_ce", "t2s_kd", "s2t_kd", "kd", "agreeing", "pairs")] == [0] * 6
    torch.testing.assert_close(found["ce"], ce)
    found["loss"].backward()
    assert i.student_hidden.grad.abs().min() > 0
    for leaf in i.leaves().values():
        assert leaf.grad is None or leaf.grad.isfinite().all()
    assert i.t2s.grad is None or not i.t2s.grad.any()


@pytest.mark.parametrize(("recipe", "align"), COMBINATIONS[1:])
def test_no_agreeing_token_gives_no_student_space_term(recipe, align):
    i = Inputs(recipe, align)
    with torch.no_grad():
        i.t2s_label = (i.t2s_hidden() @ i.student_head.T).argmin(-1)
    terms = i.loss("fkl")
    assert terms["agreeing"] == 0 and terms["t2s_kd"] == 0
    assert terms["t2s_ce"] > 0 and terms["s2t_kd"] > 0
    terms["t2s_kd"].backward()
    assert not i.student_hidden.grad.any()  # and so finite


@pytest.mark.parametrize(("recipe", "align"), [("v1", "eta"), ("v2", "cma"), ("v3", "none"), ("v2", "auto")])
def test_combinations_the_papers_do_not_have_are_refused(recipe, align):
    i = Inputs(align=align if align in ("eta", "cma") else "none")  # states as the alignment would have them
    i.recipe, i.align = recipe, align
    with pytest.raises(ValueError, match=f"'{recipe}' with align '{align}'"):
        i.loss("fkl")


@pytest.mark.parametrize(("student_padding", "teacher_padding"), [(3, 0), (0, 3), (2, 5)])
def test_heads_with_more_rows_than_the_tokenizer(student_padding, teacher_padding):
    i = Inputs()
    arguments = i.student_hidden, i.gold, i.teacher_hidden
    expected = kd_loss(*arguments, i.student_head, i.teacher_head, TOKENS, "fkl", TEMPERATURE)
    student_head = torch.cat([i.student_head, torch.zeros(student_padding, d)])
    teacher_head = torch.cat([i.teacher_head, torch.zeros(teacher_padding, D)])
    terms = kd_loss(*arguments, student_head, teacher_head, TOKENS, "fkl", TEMPERATURE)
    rows = V + min(student_padding, teacher_padding)
    by_hand = DIVERGENCES["fkl"](
        i.student_hidden @ student_head[:rows].T, i.teacher_hidden @ teacher_head[:rows].T, TEMPERATURE
    )
    torch.testing.assert_close(terms["kd"], by_hand.sum() / TOKENS)
    if min(student_padding, teacher_padding) == 0:
        torch.testing.assert_close(terms["kd"], expected["kd"])
    # cross-entropy is over all rows of the student's head
    logits = i.student_hidden @ student_head.T
    ce = (logits.logsumexp(-1) - logits.gather(-1, i.gold[:, None])[:, 0]).sum() / TOKENS
    torch.testing.assert_close(terms["ce"], ce)

    for recipe in ("v1", "v2"):  # each space has its own head: padding one leaves the other's terms as they are
        i = Inputs(recipe)
        plain = i.loss("fkl")
        i.student_head = torch.cat([i.student_head, torch.zeros(student_padding, d)]).detach().requires_grad_()
        i.teacher_head = torch.cat([i.teacher_head, torch.zeros(teacher_padding, D)]).detach()
        padded = i.loss("fkl")
        assert torch.equal(padded["t2s_ce"], plain["t2s_ce"]) == (student_padding == 0)
        assert torch.equal(padded["s2t_kd"], plain["s2t_kd"]) == (teacher_padding == 0)
        padded["kd"].backward()
        assert i.student_head.grad.shape == (V + student_padding, d) and i.student_head.grad.isfinite().all()


def test_terms_are_per_token():
    i = Inputs()
    arguments = i.student_hidden, i.gold, i.t2s_hidden(), i.t2s_label, i.student_head, "fkl", 2.0
    terms = student_space_terms(*arguments)
    assert [tuple(term.shape) for term in terms] == [(N,)] * 5
    assert terms[1].tolist() == terms[4].tolist() == [n % 2 == 0 for n in range(N)]


def test_cross_entropy_of_half_precision_states_is_worked_out_in_float32():
    i = Inputs()
    hidden, head, t2s = (x.detach().bfloat16() for x in (i.student_hidden, i.student_head, i.t2s_hidden()))
    for states, label, place in ((hidden, i.gold, 0), (t2s, i.t2s_label, 2)):
        ce = student_space_terms(hidden, i.gold, t2s, i.t2s_label, head, "fkl", 2.0)[place]
        assert ce.dtype == torch.float32
        torch.testing.assert_close(ce, cross_entropy((states @ head.T).float(), label, reduction="none"))
    assert sft_loss(hidden, i.gold, head, TOKENS)["ce"].dtype == torch.float32
