"""The divergences and the objectives: plain functions on plain tensors, to be read beside the papers and copied.

v1 is arXiv 2406.17328 (DSKD), v2 is arXiv 2504.11426 (DSKDv2). Shapes, everywhere in this file:

    N, M    response tokens of the student's and the teacher's tokenisation, all examples of the batch in one row
    d, D    student and teacher width            V    vocabulary size, of whichever head stands beside it

Every objective works on hidden states and heads rather than logits: the heads are the papers' point, and a response of
400 tokens has 60 million logits over a vocabulary of 152k but less than a million hidden values. The per-token terms
are written plainly here; `terms=` puts others in their place that equal them (fused.py: less memory, less time), but
have a gradient as the objective's `loss` only, not term by term.

Where this differs from the papers' text: no T² factor on any divergence, as in the official code. Where it differs from
the official code: JS has no 1e-9 inside its logarithms (they are taken in log space), and infinite logits are not
overwritten with zeros.

>>> generator = torch.Generator().manual_seed(0)
>>> logits = torch.randn(5, 11, generator=generator)
>>> DIVERGENCES["fkl"](logits, logits, temperature=2.0).abs().max().item() < 1e-6
True
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, log_softmax, pad

# ---------------------------------------------------------------------------------------------------------------------
# Divergences. log_p, log_q (N, V): log-probabilities of the student and of the teacher; each returns (N,)


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Σ q (log q − log p)"""
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Σ p (log p − log q)"""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def log_mixture(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """log(weight·a + (1 − weight)·b), without leaving log space: safe where both probabilities underflow."""
    return torch.logaddexp(log_a + math.log(weight), log_b + math.log1p(-weight))


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """½ Σ q (log q − log m) + ½ Σ p (log p − log m), m = (p + q)/2"""
    log_m = log_mixture(log_p, log_q, 0.5)
    return 0.5 * (forward_kl(log_m, log_q) + forward_kl(log_m, log_p))


def skewed_forward_kl(log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> Tensor:
    """Σ q (log q − log(λ q + (1−λ) p))"""
    return forward_kl(log_mixture(log_q, log_p, skew), log_q)


def skewed_reverse_kl(log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> Tensor:
    """Σ p (log p − log((1−λ) q + λ p))"""
    return reverse_kl(log_p, log_mixture(log_p, log_q, skew))


def adaptive_weight(log_p: Tensor, log_q: Tensor, alpha: float = 0.5) -> Tensor:
    """g_h/(g_h + g_t), (N,): the share of the teacher's head in the gap between the distributions, without gradient.

    Sorted by the teacher's probability, ascending, the tail is what has a cumulative mass ≤ alpha, the head the rest;
    g = Σ |q − p| over each.
    """
    with torch.no_grad():
        p, q = log_p.exp(), log_q.exp()
        q_ascending, order = q.sort(-1)
        gap = (q - p).abs().gather(-1, order)
        tail = q_ascending.cumsum(-1) <= alpha
        gap_tail, gap_head = (gap * tail).sum(-1), (gap * ~tail).sum(-1)
        # equal distributions have no gap at all; both divergences are 0 there, whatever the weight
        return gap_head / (gap_head + gap_tail).clamp_min(torch.finfo(gap.dtype).tiny)


def adaptive_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(g_h·FKL + g_t·RKL)/(g_h + g_t): the larger gap, over the teacher's head or tail, decides (arXiv 2404.02657)"""
    weight = adaptive_weight(log_p, log_q)
    return weight * forward_kl(log_p, log_q) + (1 - weight) * reverse_kl(log_p, log_q)


def _from_logits(divergence):
    """D over log-probabilities -> D over logits: divided by the temperature, in float32 or better."""

    def from_logits(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
        dtype = torch.promote_types(student_logits.dtype, torch.float32)
        log_p = log_softmax(student_logits.to(dtype) / temperature, dim=-1)
        log_q = log_softmax(teacher_logits.to(dtype) / temperature, dim=-1)
        return divergence(log_p, log_q)

    from_logits.__doc__ = (
        f"{divergence.__doc__.splitlines()[0]}\n\n"
        "student_logits (N, V), teacher_logits (N, V), both divided by `temperature` -> (N,) in float32."
    )
    return from_logits


DIVERGENCES = {
    "fkl": _from_logits(forward_kl),
    "rkl": _from_logits(reverse_kl),
    "js": _from_logits(jensen_shannon),
    "skl": _from_logits(skewed_forward_kl),
    "srkl": _from_logits(skewed_reverse_kl),
    "akl": _from_logits(adaptive_kl),
}

# ---------------------------------------------------------------------------------------------------------------------
# Per-token terms: hidden states and heads in, one number per token out


def logits_under(hidden: Tensor, head: Tensor) -> Tensor:
    """(n, d) x (d, V) -> (n, V), in float32 or better: the product may be bf16 (autocast), what follows must not be."""
    logits = linear(hidden, head)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def against_gold(logits: Tensor, gold: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cross-entropy with the gold token, and whether it is the arg-max, each (n,); zeros where none is given."""
    if gold is None:
        return logits.new_zeros(len(logits)), logits.new_zeros(len(logits), dtype=torch.bool)
    return cross_entropy(logits, gold, reduction="none"), logits.argmax(-1) == gold


def gold_terms(student_hidden: Tensor, gold: Tensor, student_head: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy with the gold token, and whether it is the arg-max: (n, d), (n,), (V, d) -> (n,), (n,)."""
    return against_gold(logits_under(student_hidden, student_head), gold)


def kd_terms(student_hidden, gold, teacher_hidden, student_head, teacher_head, divergence: str, temperature: float):
    """Vanilla KD, per token: (cross-entropy, gold is arg-max, D(p ‖ q)), each (n,); the vocabularies are equal.

    gold None: the first two are 0. Heads of one tokenizer may be padded to different numbers of rows; the divergence is
    over the rows both have.
    """
    student_logits = logits_under(student_hidden, student_head)
    teacher_logits = logits_under(teacher_hidden, teacher_head)
    rows = min(student_logits.shape[-1], teacher_logits.shape[-1])
    kd = DIVERGENCES[divergence](student_logits[:, :rows], teacher_logits[:, :rows], temperature)
    return *against_gold(student_logits, gold), kd


def student_space_terms(
    student_hidden, gold, t2s_hidden, t2s_label, student_head, divergence: str, temperature: float, only_agreeing=False
):
    """DSKD in the student's space, per token: both states under the student's head.

    student_hidden (n, d), the student's states, and t2s_hidden (k, d), the teacher's, projected, for the first k ≤ n of
    them; gold (n,), may be None: no cross-entropy; t2s_label (k,). Returns (ce, gold is arg-max, t2s_ce, t2s_kd,
    agrees), the first two (n,), the others (k,): t2s_ce teaches the projector (and nothing else: the head is detached)
    to speak through the student's head; t2s_kd teaches the student (and nothing else: the projected logits are
    detached); agrees says where the projected teacher's arg-max is its label, that is where it can be trusted. With
    `only_agreeing`, t2s_kd is 0 elsewhere.
    """
    student_logits = logits_under(student_hidden, student_head)
    t2s_logits = logits_under(t2s_hidden, student_head.detach())
    t2s_ce, agrees = against_gold(t2s_logits, t2s_label)
    t2s_kd = DIVERGENCES[divergence](student_logits[: len(t2s_logits)], t2s_logits.detach(), temperature)
    if only_agreeing:
        t2s_kd = t2s_kd * agrees
    return *against_gold(student_logits, gold), t2s_ce, t2s_kd, agrees


def teacher_space_terms(s2t_hidden, teacher_hidden, teacher_head, divergence: str, temperature: float) -> Tensor:
    """DSKD in the teacher's space, per token: both states under the teacher's head.

    s2t_hidden (n, D): the student's states, projected; teacher_hidden (n, D); teacher_head (V, D), which is frozen but
    passes the gradient on to the student. Returns D(p ‖ q) as (n,).
    """
    s2t_logits = logits_under(s2t_hidden, teacher_head)
    teacher_logits = logits_under(teacher_hidden, teacher_head)
    return DIVERGENCES[divergence](s2t_logits, teacher_logits, temperature)


def uld_terms(student_hidden, gold, teacher_hidden, student_head, teacher_head):
    """Universal logit distillation (arXiv 2402.12030), per token: (ce, gold is arg-max, Σ_k |p_k − q_k|), each (n,).

    p_k, q_k: the k-th largest probability of the student and of the teacher, without temperature, 0 beyond the end of
    a vocabulary. (n, d), (n,), (n, D), (V_s, d), (V_t, D).
    """
    student_logits = logits_under(student_hidden, student_head)
    teacher_logits = logits_under(teacher_hidden, teacher_head).detach()
    p, q = (z.softmax(-1).sort(-1, descending=True).values for z in (student_logits, teacher_logits))
    larger = max(p.shape[-1], q.shape[-1])
    p, q = (pad(x, (0, larger - x.shape[-1])) for x in (p, q))
    ce = cross_entropy(student_logits, gold, reduction="none")
    return ce, student_logits.argmax(-1) == gold, (p - q).abs().sum(-1)


def mined_terms(
    student_hidden, gold, teacher_hidden, student_head, teacher_head, student_ids, teacher_ids, temperature: float
):
    """MinED (arXiv 2401.10491), per aligned token: (ce, gold is arg-max, Σ q (log q − log p)), each (n,).

    q is the teacher's distribution in the student's vocabulary: student token student_ids[k] has the logit of the
    teacher token teacher_ids[k], and a token that is not among them no probability. (S,) both, no student id twice.
    """
    student_logits = logits_under(student_hidden, student_head)
    teacher_logits = logits_under(teacher_hidden, teacher_head).detach()
    log_p = log_softmax(student_logits / temperature, -1)[:, student_ids]
    log_q = log_softmax(teacher_logits[:, teacher_ids] / temperature, -1)
    ce = cross_entropy(student_logits, gold, reduction="none")
    return ce, student_logits.argmax(-1) == gold, forward_kl(log_p, log_q)


def one_hot_terms(student_hidden, gold, student_head, temperature: float):
    """MinED, per token that is not aligned: the same with q = 1 at the gold token, so that the last is −log p(gold)."""
    student_logits = logits_under(student_hidden, student_head)
    ce, kd = (cross_entropy(z, gold, reduction="none") for z in (student_logits, student_logits / temperature))
    return ce, student_logits.argmax(-1) == gold, kd


def weighted(per_token: Callable) -> Callable:
    """One of the functions above, called with `weights`, a number for each term it returns (but what is true or false):
    returns (loss, *what it returns), loss being Σ weight · term over its terms and all tokens."""

    def with_loss(*arguments, weights: tuple[float, ...]):
        found = per_token(*arguments)
        found = (found,) if isinstance(found, Tensor) else found
        terms = [term.sum() for term in found if term.is_floating_point()]
        return sum(weight * term for weight, term in zip(weights, terms, strict=True)), *found

    return with_loss


class Terms(NamedTuple):
    """The functions above, `weighted`, or others that equal them: what the objectives below are made of.

    A loss whose weights are known beforehand can have its gradient made while its logits are there (fused.py).
    """

    gold: Callable = weighted(gold_terms)
    kd: Callable = weighted(kd_terms)
    student_space: Callable = weighted(student_space_terms)
    teacher_space: Callable = weighted(teacher_space_terms)
    uld: Callable = weighted(uld_terms)
    mined: Callable = weighted(mined_terms)
    one_hot: Callable = weighted(one_hot_terms)


PLAIN = Terms()


# ---------------------------------------------------------------------------------------------------------------------
# Objectives. `tokens` normalises: the number of student response tokens of the whole batch that one update is made of,
# so that a batch may come in parts whose losses add up. Each returns a dict of scalars: the terms, counts to log, and
# loss = (1 − kd_rate)·ce + kd_rate·kd, which is what to go back from. gold None, for responses that are not gold
# (on-policy: the student's own): the distillation terms alone, no ce.


def sft_loss(
    student_hidden: Tensor,  # (N, d)
    gold: Tensor,  # (N,)
    student_head: Tensor,  # (V, d)
    tokens: float,
    terms: Terms = PLAIN,
    kd_rate: float = 0.0,  # where this is one part of the loss
) -> dict[str, Tensor]:
    """Supervised fine-tuning: cross-entropy with the gold tokens. {ce, correct, loss}"""
    loss, ce, correct = terms.gold(student_hidden, gold, student_head, weights=((1 - kd_rate) / tokens,))
    return {"ce": ce.sum() / tokens, "correct": correct.sum(), "loss": loss}


def kd_loss(
    student_hidden: Tensor,  # (N, d)
    gold: Tensor | None,  # (N,)
    teacher_hidden: Tensor,  # (N, D)
    student_head: Tensor,  # (V, d)
    teacher_head: Tensor,  # (V, D)
    tokens: float,
    divergence: str = "fkl",
    temperature: float = 2.0,
    terms: Terms = PLAIN,
    kd_rate: float = 0.5,
) -> dict[str, Tensor]:
    """Vanilla KD: every student token against the teacher's distribution at the same place. {ce, kd, correct, loss}"""
    states, weights = (student_hidden, gold, teacher_hidden), ((1 - kd_rate) / tokens, kd_rate / tokens)
    loss, ce, correct, kd = terms.kd(*states, student_head, teacher_head, divergence, temperature, weights=weights)
    on_gold = {} if gold is None else {"ce": ce.sum() / tokens, "correct": correct.sum()}
    return {**on_gold, "kd": kd.sum() / tokens, "loss": loss}


def all_but(rows: Tensor, gold: Tensor) -> Tensor:
    """Mask (N,) of the tokens that are not among `rows`."""
    alone = torch.ones(len(gold), dtype=torch.bool, device=gold.device)
    alone[rows] = False
    return alone


def uld_loss(
    student_hidden: Tensor,  # (N, d)
    gold: Tensor,  # (N,)
    teacher_hidden: Tensor,  # (K, D)
    student_rows: Tensor,  # (K,) the student token each of them is compared with
    student_head: Tensor,  # (V_s, d)
    teacher_head: Tensor,  # (V_t, D)
    tokens: float,
    terms: Terms = PLAIN,
    kd_rate: float = 0.5,
) -> dict[str, Tensor]:
    """ULD: the sorted probabilities of both, position by position until the shorter response ends.
    {ce, kd, correct, loss}

    Normalised by all student tokens, as in the official code: those beyond the teacher's response add 0.
    """
    heads, alone = (student_head, teacher_head), all_but(student_rows, gold)
    paired = student_hidden[student_rows], gold[student_rows], teacher_hidden
    weights = (1 - kd_rate) / tokens, kd_rate / tokens
    loss, ce, correct, kd = terms.uld(*paired, *heads, weights=weights)
    rest = terms.gold(student_hidden[alone], gold[alone], student_head, weights=weights[:1])
    loss, ce, correct = loss + rest[0], ce.sum() + rest[1].sum(), correct.sum() + rest[2].sum()
    return {"ce": ce / tokens, "kd": kd.sum() / tokens, "correct": correct, "loss": loss}


def mined_loss(
    student_hidden: Tensor,  # (N, d)
    gold: Tensor,  # (N,)
    teacher_hidden: Tensor,  # (K, D)
    student_rows: Tensor,  # (K,) the student token each of them is aligned with
    student_head: Tensor,  # (V_s, d)
    teacher_head: Tensor,  # (V_t, D)
    student_ids: Tensor,  # (S,) student tokens that a teacher token maps to
    teacher_ids: Tensor,  # (S,) that teacher token
    tokens: float,
    temperature: float = 2.0,
    terms: Terms = PLAIN,
    kd_rate: float = 0.5,
) -> dict[str, Tensor]:
    """MinED: forward KL from the teacher where a token is aligned, from the gold token elsewhere.
    {ce, kd, correct, loss}

    The student's logits are only read (in float32 the official code overwrites them with the target: no gradient).
    """
    heads, alone = (student_head, teacher_head), all_but(student_rows, gold)
    aligned = student_hidden[student_rows], gold[student_rows], teacher_hidden
    weights = (1 - kd_rate) / tokens, kd_rate / tokens
    columns = zip(
        terms.mined(*aligned, *heads, student_ids, teacher_ids, temperature, weights=weights),
        terms.one_hot(student_hidden[alone], gold[alone], student_head, temperature, weights=weights),
        strict=True,
    )
    loss, ce, correct, kd = (part.sum() + rest.sum() for part, rest in columns)
    return {"ce": ce / tokens, "kd": kd / tokens, "correct": correct, "loss": loss}


def dskd_loss(
    student_hidden: Tensor,  # (N, d)
    gold: Tensor | None,  # (N,)
    t2s_hidden: Tensor,  # (K, d) the teacher's states in the student's space
    t2s_label: Tensor,  # (K,) what they should predict there: gold tokens (v1), the teacher's own predictions (v2)
    s2t_hidden: Tensor,  # (J, D) the student's states in the teacher's space
    teacher_hidden: Tensor,  # (J, D)
    student_head: Tensor,  # (V_s, d)
    teacher_head: Tensor,  # (V_t, D)
    tokens: float,
    student_rows: Tensor | None = None,  # (K,) which student tokens t2s_hidden stands for; None: all N, in order
    recipe: str = "v2",
    align: str = "none",
    divergence: str = "fkl",
    temperature: float = 2.0,
    pairs: float | None = None,
    agreeing: float | None = None,
    terms: Terms = PLAIN,
    kd_rate: float = 0.5,
) -> dict[str, Tensor]:
    """DSKD: L_kd = L_stu + L_ce + L_tea, for all four combinations of the papers:

    recipe align   t2s_label      L_stu (t2s_kd)                 L_ce (t2s_ce)   L_tea (s2t_kd)
    v1     none    gold           all tokens / tokens            / tokens        forward KL / tokens
    v1     cma     gold           agreeing tokens / tokens       / tokens        forward KL / tokens
    v2     none    teacher's      agreeing tokens / their number / tokens        D / tokens
    v2     eta     teacher's      agreeing pairs / their number  / pairs         D / pairs

    An agreeing token is one where the projected teacher predicts its label. `pairs` and `agreeing` are those numbers
    for the whole batch if this is a part of it (`count_agreeing` counts); None: this is all of it. No pair, or no
    agreeing one: the term is 0. Returns {ce, t2s_ce, t2s_kd, s2t_kd, kd, correct, agreeing, pairs, loss}.
    """
    if (recipe, align) not in {("v1", "none"), ("v1", "cma"), ("v2", "none"), ("v2", "eta")}:
        raise ValueError(f"recipe {recipe!r} with align {align!r}: v1 goes with none or cma, v2 with none or eta")
    pairs = len(t2s_label) if pairs is None else pairs
    if recipe == "v2" and agreeing is None:
        agreeing = count_agreeing(t2s_hidden, t2s_label, student_head)
    normaliser = max(pairs, 1) if align == "eta" else tokens
    t2s_kd_normaliser = max(agreeing, 1) if recipe == "v2" else tokens

    if student_rows is not None:  # tokens without a counterpart come last; they have only their cross-entropy
        order = student_rows if gold is None else torch.cat([student_rows, all_but(student_rows, gold).nonzero()[:, 0]])
        student_hidden, gold = student_hidden[order], None if gold is None else gold[order]
    loss, ce, correct, t2s_ce, t2s_kd, agrees = terms.student_space(
        student_hidden,
        gold,
        t2s_hidden,
        t2s_label,
        student_head,
        divergence,
        temperature,
        not (recipe == "v1" and align == "none"),
        weights=((1 - kd_rate) / tokens, kd_rate / normaliser, kd_rate / t2s_kd_normaliser),
    )
    s2t_divergence, weights = "fkl" if recipe == "v1" else divergence, (kd_rate / normaliser,)
    s2t_loss, s2t_kd = terms.teacher_space(
        s2t_hidden, teacher_hidden, teacher_head, s2t_divergence, temperature, weights=weights
    )
    kd = {
        "t2s_ce": t2s_ce.sum() / normaliser,
        "t2s_kd": t2s_kd.sum() / t2s_kd_normaliser,
        "s2t_kd": s2t_kd.sum() / normaliser,
    }
    count = agrees.sum()
    return {
        **({} if gold is None else {"ce": ce.sum() / tokens, "correct": correct.sum()}),
        **kd,
        "kd": sum(kd.values()),
        "agreeing": count,
        "pairs": torch.full_like(count, len(t2s_label)),
        "loss": loss + s2t_loss,
    }


@torch.no_grad()
def count_agreeing(t2s_hidden: Tensor, t2s_label: Tensor, student_head: Tensor, chunk: int = 1024) -> int:
    """How many projected teacher states (K, d) predict their label (K,) under the student's head (V, d).

    Neither depends on the student's states, so that a batch in parts can know the normaliser before its first part.
    """
    parts = zip(t2s_hidden.split(chunk), t2s_label.split(chunk), strict=True)
    return sum(int((logits_under(hidden, student_head).argmax(-1) == label).sum()) for hidden, label in parts)
