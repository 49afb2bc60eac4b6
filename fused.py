"""The terms of losses.py again, fast: same values, same gradients, a fraction of the memory and time.

Written plainly, a divergence over a vocabulary of V makes a dozen (tokens, V) tensors and keeps them for the backward
pass; passing over them can cost several times more than the matrix products that made the logits. Here

- logits exist for `chunk` tokens at a time, in the forward pass and, made again, in the backward pass;
- the backward pass writes each gradient over the logits it belongs to, by formulas worked out on paper (DIVERGENCES);
- on the CPU, the elementwise work goes through a few rows at a time, which stay in the cache.

`tests/test_fused.py` holds every value and gradient equal to the plain version's.
"""

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from torch.utils.checkpoint import checkpoint

import losses
from losses import adaptive_weight, log_mixture

# dD/du for the student's distribution p = softmax(u) and the teacher's q; log_p, log_q (n, V) -> (n, V).
# Through a softmax, dD/du = p·(g − Σ p g) with g = dD/dp.


def forward_kl_gradient(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p − q"""
    return log_p.exp() - log_q.exp()


def reverse_kl_gradient(log_p: Tensor, log_q: Tensor) -> Tensor:
    """g = log p − log q"""
    return through_softmax(log_p.exp(), log_p - log_q)


def jensen_shannon_gradient(log_p: Tensor, log_q: Tensor) -> Tensor:
    """g = ½ (log p − log m)"""
    return through_softmax(log_p.exp(), 0.5 * (log_p - log_mixture(log_p, log_q, 0.5)))


def skewed_forward_kl_gradient(log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> Tensor:
    """g = −(1−λ) q/m, m = λ q + (1−λ) p"""
    return through_softmax(log_p.exp(), (log_q - log_mixture(log_q, log_p, skew)).exp() * (skew - 1))


def skewed_reverse_kl_gradient(log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> Tensor:
    """g = log p − log m − λ p/m, m = (1−λ) q + λ p"""
    log_ratio = log_p - log_mixture(log_p, log_q, skew)
    return through_softmax(log_p.exp(), log_ratio - skew * log_ratio.exp())


def adaptive_kl_gradient(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The two gradients, weighted as the two divergences are; the weight has no gradient."""
    weight = adaptive_weight(log_p, log_q)[:, None]
    return weight * forward_kl_gradient(log_p, log_q) + (1 - weight) * reverse_kl_gradient(log_p, log_q)


def through_softmax(p: Tensor, g: Tensor) -> Tensor:
    """p·(g − Σ p g)"""
    return p * (g - (p * g).sum(-1, keepdim=True))


DIVERGENCES = {  # name: (D, dD/du), both of log_p, log_q
    "fkl": (losses.forward_kl, forward_kl_gradient),
    "rkl": (losses.reverse_kl, reverse_kl_gradient),
    "js": (losses.jensen_shannon, jensen_shannon_gradient),
    "skl": (losses.skewed_forward_kl, skewed_forward_kl_gradient),
    "srkl": (losses.skewed_reverse_kl, skewed_reverse_kl_gradient),
    "akl": (losses.adaptive_kl, adaptive_kl_gradient),
}

CACHED_LOGITS = 2**19  # 2 MiB in float32, and a handful of tensors of that size at a time


def cross_entropy_gradient(logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """weight·(softmax − one-hot): (n, V), (n,), (n,) -> (n, V)"""
    gradient = logits.softmax(-1).mul_(weight[:, None])
    gradient[torch.arange(len(label), device=label.device), label] -= weight
    return gradient


def row_blocks(logits: Tensor, start: int) -> list[tuple[slice, slice]]:
    """A few rows at a time that fit into a CPU's cache (elsewhere all): their places in `logits`, whose first row is
    token `start`, and among all tokens."""
    rows = max(1, CACHED_LOGITS // logits.shape[-1]) if logits.device.type == "cpu" else len(logits)
    blocks = [slice(first, min(first + rows, len(logits))) for first in range(0, len(logits), rows)]
    return [(block, slice(start + block.start, start + block.stop)) for block in blocks]


class HeadTerms(torch.autograd.Function):
    """Two states per token under their heads, and every term that the methods take from them:

    ce        cross-entropy of logits = hidden @ headᵀ with `gold`                (None: 0)
    target_ce cross-entropy of target = target_hidden @ target_headᵀ with `label` (None: 0)
    kd        D(softmax(logits/T), softmax(target/T)), target detached            (target_hidden None: 0)

    hidden (n, d), head (V, d), target_hidden (n, D), target_head (V', D) or None for the same head; the divergence is
    over the rows that both heads have. Returns (ce, correct, target_ce, agrees, kd), each (n,). Gradients reach hidden,
    head and, through target_ce, target_hidden; never target_head. Products are in autocast's dtype, everything else in
    float32.
    """

    @staticmethod
    def forward(ctx, hidden, head, target_hidden, target_head, gold, label, divergence, temperature, chunk):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        ctx.dtypes = hidden.dtype, head.dtype, None if target_hidden is None else target_hidden.dtype
        cast = [None if x is None else x.detach().to(dtype) for x in (hidden, head, target_hidden, target_head)]
        hidden, head, target_hidden, target_head = cast
        if target_hidden is not None and target_head is None:
            target_head = head
        ctx.save_for_backward(hidden, head, target_hidden, target_head, gold, label)
        ctx.options = divergence, temperature, chunk
        n, exact = len(hidden), torch.promote_types(dtype, torch.float32)
        ce, target_ce, kd = hidden.new_zeros((3, n), dtype=exact)
        correct, agrees = torch.zeros((2, n), dtype=torch.bool, device=hidden.device)
        with torch.autocast(device, enabled=False):
            for start in range(0, n, chunk):
                logits = hidden[start : start + chunk] @ head.T
                target = None if target_hidden is None else target_hidden[start : start + chunk] @ target_head.T
                for block, at in row_blocks(logits, start):
                    u = logits[block].to(exact)
                    if gold is not None:
                        ce[at] = -log_softmax(u, -1).gather(1, gold[at, None])[:, 0]
                        correct[at] = u.argmax(-1) == gold[at]
                    if target is None:
                        continue
                    v = target[block].to(exact)
                    if label is not None:
                        target_ce[at] = -log_softmax(v, -1).gather(1, label[at, None])[:, 0]
                        agrees[at] = v.argmax(-1) == label[at]
                    log_p, log_q = log_distributions(u, v, temperature)
                    kd[at] = DIVERGENCES[divergence][0](log_p, log_q)
        ctx.mark_non_differentiable(correct, agrees)
        return ce, correct, target_ce, agrees, kd

    @staticmethod
    def backward(ctx, d_ce, _, d_target_ce, __, d_kd):
        hidden, head, target_hidden, target_head, gold, label = ctx.saved_tensors
        divergence, temperature, chunk = ctx.options
        n, exact = len(hidden), torch.promote_types(hidden.dtype, torch.float32)
        wants_hidden, wants_head, wants_target = ctx.needs_input_grad[:3]
        wants_target = wants_target and label is not None  # through target_ce alone
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_head = torch.zeros_like(head, dtype=exact) if wants_head else None
        d_target = torch.empty_like(target_hidden) if wants_target else None
        for start in range(0, n, chunk):
            rows = slice(start, start + chunk)
            logits = hidden[rows] @ head.T
            target = None if target_hidden is None else target_hidden[rows] @ target_head.T
            for block, at in row_blocks(logits, start):
                u = logits[block].to(exact)
                gradient = torch.zeros_like(u) if gold is None else cross_entropy_gradient(u, gold[at], d_ce[at])
                if target is not None:
                    v = target[block].to(exact)
                    log_p, log_q = log_distributions(u, v, temperature)
                    by_kd = DIVERGENCES[divergence][1](log_p, log_q).mul_(d_kd[at, None] / temperature)
                    gradient[:, : by_kd.shape[1]] += by_kd
                    if wants_target:
                        target[block] = cross_entropy_gradient(v, label[at], d_target_ce[at]).to(target.dtype)
                logits[block] = gradient.to(logits.dtype)  # the logits are done with: their gradient takes their place
            if wants_hidden:
                d_hidden[rows] = logits @ head
            if wants_head:
                d_head += logits.T @ hidden[rows]
            if wants_target:
                d_target[rows] = target @ target_head
        gradients = zip((d_hidden, d_head, d_target), ctx.dtypes, strict=True)
        return *[None if d is None else d.to(dtype) for d, dtype in gradients], *[None] * 6


def log_distributions(u: Tensor, v: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log p and log q over the rows both have, at the temperature."""
    rows = min(u.shape[-1], v.shape[-1])
    return log_softmax(u[:, :rows] / temperature, -1), log_softmax(v[:, :rows] / temperature, -1)


def fused_terms(chunk: int) -> losses.Terms:
    """The terms of losses.py, `chunk` tokens at a time."""

    def gold(student_hidden, gold, student_head):
        ce, correct, *_ = HeadTerms.apply(student_hidden, student_head, None, None, gold, None, None, None, chunk)
        return ce, correct

    def kd(student_hidden, gold, teacher_hidden, student_head, teacher_head, divergence, temperature):
        ce, correct, _, _, kd = HeadTerms.apply(
            student_hidden, student_head, teacher_hidden, teacher_head, gold, None, divergence, temperature, chunk
        )
        return ce, correct, kd

    def student_space(student_hidden, gold, t2s_hidden, t2s_label, student_head, divergence, temperature):
        ce, correct, t2s_ce, agrees, t2s_kd = HeadTerms.apply(
            student_hidden, student_head, t2s_hidden, None, gold, t2s_label, divergence, temperature, chunk
        )
        return ce, correct, t2s_ce, t2s_kd, agrees

    def teacher_space(s2t_hidden, teacher_hidden, teacher_head, divergence, temperature):
        return HeadTerms.apply(
            s2t_hidden, teacher_head, teacher_hidden, None, None, None, divergence, temperature, chunk
        )[-1]

    return losses.Terms(
        gold, kd, student_space, teacher_space,
        uld=in_chunks(losses.uld_terms, chunk),
        mined=in_chunks(losses.mined_terms, chunk),
        one_hot=in_chunks(losses.one_hot_terms, chunk, inputs=2),
    )  # fmt: skip


def in_chunks(terms, chunk: int, inputs: int = 3):
    """The function `terms`, whose first `inputs` arguments have a row per token, `chunk` tokens at a time.

    What it makes is made again for the backward pass, which is autograd's: the memory of one chunk at a time.
    """

    def chunked(*arguments):
        parts = zip(*(argument.split(chunk) for argument in arguments[:inputs]), strict=True)
        rest, options = arguments[inputs:], {"use_reentrant": False, "preserve_rng_state": False}
        columns = zip(*(checkpoint(terms, *part, *rest, **options) for part in parts), strict=True)
        return tuple(torch.cat(column) for column in columns)

    return chunked
