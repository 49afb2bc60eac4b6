"""The divergences and the losses: plain functions on plain tensors, to be read beside the papers and copied.

v1 is arXiv 2406.17328 (DSKD), v2 is arXiv 2504.11426 (DSKDv2). Shapes, everywhere in this file:

    N  student response tokens     K  pairs of states compared in the student's space     J  in the teacher's space
    d, D  student and teacher width     V_s, V_t  their vocabularies, the rows of their heads

The state of a response token is the last hidden state, after the final norm, of the position before it, which predicts
it; end-of-text is the response's last token. In `transformers` these are rows of `hidden_states[-1]`, and the head that
reads them is `get_output_embeddings().weight`: `examples/` shows both. The losses work on hidden states and heads
rather than logits, because the heads are the papers' point. What a model does to the logits after that product is not
done here. If it scales them, scale the states instead (Cohere: multiply; Granite: divide). Not supported are a bias
(Phi), soft-capping (Gemma 2), and an adapter on the head, which is not part of the head's weight.
`fast/losses.py` has the same functions with the same arguments and results, in a fraction of the time and the memory.

As in the official code, no divergence is multiplied by T². Where this differs from the official code: JS has no 1e-9
inside its logarithms (they are taken in log space), and infinite logits are not overwritten with zeros.

>>> generator = torch.Generator().manual_seed(0)
>>> logits = torch.randn(5, 11, generator=generator)
>>> DIVERGENCES["fkl"](logits, logits, temperature=2.0).abs().max().item() < 1e-6
True
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, log_softmax

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
    """Σ q (log q − log(λ q + (1−λ) p))  (DistiLLM, arXiv 2402.03898)"""
    return forward_kl(log_mixture(log_q, log_p, skew), log_q)


def skewed_reverse_kl(log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> Tensor:
    """Σ p (log p − log((1−λ) q + λ p))  (the same)"""
    return reverse_kl(log_p, log_mixture(log_p, log_q, skew))


@torch.no_grad()
def adaptive_weight(log_p: Tensor, log_q: Tensor, alpha: float = 0.5) -> Tensor:
    """g_h/(g_h + g_t), (N,): the share of the gap g = Σ |q − p| that is in the head of q; no gradient.

    With the tokens sorted by the teacher's probability q, ascending, the tail is the part whose cumulative mass is
    ≤ alpha, and the head (not a prediction head) is the rest.
    """
    p, q = log_p.exp(), log_q.exp()
    q_ascending, order = q.sort(-1)
    gap = (q - p).abs().gather(-1, order)
    tail = q_ascending.cumsum(-1) <= alpha
    # equal distributions have no gap at all; both divergences are 0 there, whatever the weight
    return (gap * ~tail).sum(-1) / gap.sum(-1).clamp_min(torch.finfo(gap.dtype).tiny)


def adaptive_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(g_h·FKL + g_t·RKL)/(g_h + g_t), weighted by the gaps in the head and in the tail of q (arXiv 2404.02657)"""
    weight = adaptive_weight(log_p, log_q)
    return weight * forward_kl(log_p, log_q) + (1 - weight) * reverse_kl(log_p, log_q)


def of_logits(divergence, student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """A divergence of logits (N, V), both divided by the temperature -> (N,), in float32 or better."""
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    log_p, log_q = (log_softmax(z.to(dtype) / temperature, dim=-1) for z in (student_logits, teacher_logits))
    return divergence(log_p, log_q)


DIVERGENCES = {  # each a function of (student_logits, teacher_logits, temperature)
    "fkl": partial(of_logits, forward_kl),
    "rkl": partial(of_logits, reverse_kl),
    "js": partial(of_logits, jensen_shannon),
    "skl": partial(of_logits, skewed_forward_kl),
    "srkl": partial(of_logits, skewed_reverse_kl),
    "akl": partial(of_logits, adaptive_kl),
}

# ---------------------------------------------------------------------------------------------------------------------
# The losses. Each returns a dict of scalars: the terms, counts for the log, and "loss", on which to call backward().


@dataclass(frozen=True)
class Recipe:
    """How the papers' four kinds of DSKD differ."""

    labels: str  # what the projected teacher should predict: the "gold" tokens, or the "teacher"'s own predictions
    only_agreeing: bool  # L_stu only where it does predict its label, because only there it can be trusted
    average: str  # L_ce and L_tea are averaged over the student's "tokens" or over the aligned "pairs"
    average_stu: str  # L_stu over "tokens", or over the "agreeing" pairs
    divergence: str | None  # the divergence of L_tea; None: the chosen one, as in L_stu


RECIPES = {  # (recipe, alignment)
    ("v1", "none"): Recipe("gold", False, "tokens", "tokens", "fkl"),
    ("v1", "cma"): Recipe("gold", True, "tokens", "tokens", "fkl"),
    ("v2", "none"): Recipe("teacher", True, "tokens", "agreeing", None),
    ("v2", "eta"): Recipe("teacher", True, "pairs", "agreeing", None),
}


@dataclass
class Counts:
    """The normalisers of one update, counted over all its batches, so that the batches' losses add up to the update's
    (accelerate divides each loss by its gradient_accumulation_steps: undo that). If processes average their gradients,
    give the mean of their counts. A count may be a 0-d tensor, which saves a synchronisation. None: not counted."""

    tokens: float | Tensor  # student response tokens
    pairs: float | Tensor | None = None  # aligned pairs whose teacher prediction is in the student's vocabulary (ETA)
    agreeing: float | Tensor | None = None  # pairs or tokens where the projected teacher predicts its label (v2)

    def over(self, what: str) -> float | Tensor:
        """The divisor of a term; 1 if the count is 0, because the term is then 0 too."""
        count = getattr(self, what)
        if count is None:
            raise ValueError(f"counts.{what} is None, but the recipe averages over it: count it over the whole update")
        return count + (count == 0)


def logits_under(hidden: Tensor, head: Tensor) -> Tensor:
    """(n, d) x (d, V) -> (n, V), in float32 or better: the product may be bf16 (autocast), but not what follows."""
    logits = linear(hidden, head)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@torch.no_grad()
def predict_tokens(hidden: Tensor, head: Tensor, chunk: int = 1024) -> Tensor:
    """The likeliest token of each state under a head: (n, d) and (V, d) -> (n,)."""
    return torch.cat([linear(part, head).argmax(-1) for part in hidden.split(chunk)])


def cross_entropy_sum(logits: Tensor, label: Tensor) -> Tensor:
    """Σ −log softmax(logits)(label): (n, V), (n,) -> (). Marks of prompts and padding (-100, -1) give an error, since
    such positions would count in all other terms."""
    return cross_entropy(logits, label, reduction="sum", ignore_index=-(2**31))  # no token has this id


def add_gold(terms: dict[str, Tensor], logits: Tensor, gold: Tensor | None, tokens: float, kd_rate: float) -> dict:
    """{ce, correct, ...terms, loss}: loss = (1 − kd_rate)·L_gold + kd_rate·L_kd, with L_kd = terms["kd"].

    logits (n, V), gold (n,). Responses that the student sampled have no gold tokens (None): only L_kd is left.
    """
    if gold is None:
        return {**terms, "loss": kd_rate * terms["kd"]}
    ce = cross_entropy_sum(logits, gold) / tokens
    correct = (logits.argmax(-1) == gold).sum()
    return {"ce": ce, "correct": correct, **terms, "loss": (1 - kd_rate) * ce + kd_rate * terms.get("kd", 0.0)}


def sft_loss(student_hidden: Tensor, gold: Tensor, student_head: Tensor, counts: Counts, kd_rate: float = 0.0) -> dict:
    """Supervised fine-tuning: L_gold, cross-entropy with the gold tokens. {ce, correct, loss}

    student_hidden (N, d), gold (N,), student_head (V_s, d). If this is only the gold part of a loss with a `kd_rate`,
    give that rate: its weight is then 1 − kd_rate.
    """
    return add_gold({}, logits_under(student_hidden, student_head), gold, counts.over("tokens"), kd_rate)


def kd_loss(
    student_hidden: Tensor,  # (N, d)
    gold: Tensor | None,  # (N,) gold tokens; None: the student sampled this response
    teacher_hidden: Tensor,  # (N, D)
    student_head: Tensor,  # (V_s, d)
    teacher_head: Tensor,  # (V_t, D)
    counts: Counts,
    divergence: str = "fkl",
    temperature: float = 2.0,
    kd_rate: float = 0.5,
) -> dict[str, Tensor]:
    """Vanilla KD: D(p, q) between both models' distributions for each response token. {ce, correct, kd, loss}

    Heads of one tokenizer may be padded to different numbers of rows; the divergence is over the rows that both have.
    """
    student_logits = logits_under(student_hidden, student_head)
    teacher_logits = logits_under(teacher_hidden, teacher_head)
    shared = min(len(student_head), len(teacher_head))
    kd = DIVERGENCES[divergence](student_logits[:, :shared], teacher_logits[:, :shared].detach(), temperature)
    tokens = counts.over("tokens")
    return add_gold({"kd": kd.sum() / tokens}, student_logits, gold, tokens, kd_rate)


def dskd_loss(
    student_hidden: Tensor,  # (N, d)
    gold: Tensor | None,  # (N,) gold tokens; None: the student sampled this response
    rows: Tensor | slice,  # (K,) the student token of each pair; slice(None): all N, in order
    t2s_hidden: Tensor,  # (K, d) the teacher's states, projected into the student's space
    label: Tensor,  # (K,) what they should predict there: `recipe.labels`, as tokens of the student
    s2t_hidden: Tensor,  # (J, D) the student's states, projected into the teacher's space
    teacher_hidden: Tensor,  # (J, D) the teacher's own
    student_head: Tensor,  # (V_s, d)
    teacher_head: Tensor,  # (V_t, D)
    counts: Counts,
    recipe: Recipe,
    divergence: str = "fkl",
    temperature: float = 2.0,
    kd_rate: float = 0.5,
) -> dict[str, Tensor]:
    """DSKD: loss = (1 − kd_rate)·L_gold + kd_rate·(L_stu + L_ce + L_tea)

    L_stu = D(p, sg(q_t→s))    L_ce = −log softmax(z_t→s)(label)    L_tea = D(p_s→t, q)    q_t→s = softmax(z_t→s/T)

    J is N without alignment, K with ETA, the number of the teacher's response tokens with CMA. A term without any pair,
    or any agreeing one, is 0. Returns {ce, correct, t2s_ce, t2s_kd, s2t_kd, kd, agreeing, loss}. Raises ValueError,
    naming an argument, if the arguments do not fit together.
    """
    check_dskd_arguments(student_hidden, rows, t2s_hidden, label, s2t_hidden, teacher_hidden, recipe)
    tokens, over, over_stu = map(counts.over, ("tokens", recipe.average, recipe.average_stu))
    D_stu, D_tea = DIVERGENCES[divergence], DIVERGENCES[recipe.divergence or divergence]

    # Student space: both models under the student's head. L_ce teaches the projector to speak through that head, so the
    # head is detached. L_stu teaches the student, so the projected teacher is detached.
    student_logits = logits_under(student_hidden, student_head)  # (N, V_s)
    t2s_logits = logits_under(t2s_hidden, student_head.detach())  # (K, V_s)
    t2s_ce = cross_entropy_sum(t2s_logits, label) / over
    agrees = t2s_logits.argmax(-1) == label  # (K,)
    stu = D_stu(student_logits[rows], t2s_logits.detach(), temperature)  # (K,)
    t2s_kd = (stu * agrees if recipe.only_agreeing else stu).sum() / over_stu

    # Teacher space: both models under the teacher's head, which is frozen but passes the gradient on to the student.
    s2t_logits = logits_under(s2t_hidden, teacher_head)  # (J, V_t)
    teacher_logits = logits_under(teacher_hidden, teacher_head)  # (J, V_t)
    s2t_kd = D_tea(s2t_logits, teacher_logits.detach(), temperature).sum() / over

    terms = {"t2s_ce": t2s_ce, "t2s_kd": t2s_kd, "s2t_kd": s2t_kd, "kd": t2s_ce + t2s_kd + s2t_kd}
    return add_gold({**terms, "agreeing": agrees.sum()}, student_logits, gold, tokens, kd_rate)


def check_dskd_arguments(student_hidden, rows, t2s_hidden, label, s2t_hidden, teacher_hidden, recipe: Recipe) -> None:
    """Raises ValueError, naming the argument, for mistakes that would still give a number."""
    tokens = len(student_hidden)
    pairs = tokens if isinstance(rows, slice) else len(rows)
    if not len(t2s_hidden) == len(label) == pairs:
        raise ValueError(f"dskd_loss: rows has {pairs} pairs, but t2s_hidden has {len(t2s_hidden)} states and label "
                         f"{len(label)} tokens")  # fmt: skip
    if len(s2t_hidden) != len(teacher_hidden):
        raise ValueError(f"dskd_loss: s2t_hidden has {len(s2t_hidden)} states, teacher_hidden {len(teacher_hidden)}")
    if recipe.average == "tokens" and pairs != tokens:
        raise ValueError(f"dskd_loss: rows has {pairs} of {tokens} tokens, but recipe averages over all tokens; for "
                         'exact alignment use RECIPES["v2", "eta"]')  # fmt: skip
