"""losses.py again, a chunk of tokens at a time: the same functions, arguments and results, less memory and less time.

In the plain version, a divergence over a vocabulary of V creates a dozen (tokens, V) tensors and keeps them for the
backward pass, which also has the products that carry the logits' gradient through the head. Here

- logits exist for `chunk` tokens at a time, and are freed in the forward pass: the gradient is computed together with
  the value, by formulas derived by hand (DIVERGENCES), and immediately propagated through the head. That needs the
  weights of the terms beforehand, so only the loss, their weighted sum, has a gradient. (To do this in the backward
  pass would need the logits again: 5 products instead of 3 under the teacher's head, the largest of all.)
- each gradient overwrites the logits that it belongs to;
- on the CPU, the elementwise work covers a few rows at a time, which stay in the cache; with `fused`, meant for CUDA,
  torch.compile turns it into a few kernels, which read and write the logits a sixth as often.

`tests/fast/test_fast_losses.py` holds every value and gradient equal to the plain version's.

>>> import losses
>>> hidden, gold, head = torch.ones(5, 3), torch.tensor([0, 1, 2, 3, 4]), torch.eye(9, 3)
>>> loss, plain = sft_loss(hidden, gold, head, Counts(5), chunk=2), losses.sft_loss(hidden, gold, head, Counts(5))
>>> torch.allclose(loss["loss"], plain["loss"])
True
"""

from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import pad

from losses import Counts, Recipe, adaptive_weight, check_dskd_arguments, log_mixture

# D and dD/du for the student's distribution p = softmax(u) and the teacher's q: p, q, log_p, log_q (n, V) ->
# (n,), (n, V). Through a softmax, dD/du = p·(g − Σ p g) with g = dD/dp, to which a constant may be added: rkl and srkl
# omit a 1. Each docstring gives dD/du or g.


def forward_kl(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """p − q"""
    return (q * (log_q - log_p)).sum(-1), p - q


def reverse_kl(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """g = log p − log q, and D = Σ p g"""
    return through_softmax(p, log_p - log_q)


def jensen_shannon(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """g = ½ (log p − log m)"""
    log_m = log_mixture(log_p, log_q, 0.5)
    of_p, gradient = through_softmax(p, 0.5 * (log_p - log_m))
    return 0.5 * (q * (log_q - log_m)).sum(-1) + of_p, gradient


def skewed_forward_kl(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> tuple[Tensor, Tensor]:
    """g = −(1−λ) q/m, m = λ q + (1−λ) p"""
    log_ratio = log_q - log_mixture(log_q, log_p, skew)
    _, gradient = through_softmax(p, (skew - 1) * log_ratio.exp())
    return (q * log_ratio).sum(-1), gradient


def skewed_reverse_kl(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> tuple[Tensor, Tensor]:
    """g = log p − log m − λ p/m, m = (1−λ) q + λ p"""
    log_ratio = log_p - log_mixture(log_p, log_q, skew)
    _, gradient = through_softmax(p, log_ratio - skew * log_ratio.exp())
    return (p * log_ratio).sum(-1), gradient


def adaptive_kl(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted sum of the two; the weight has no gradient."""
    weight = adaptive_weight(log_p, log_q)
    forward, forward_gradient = forward_kl(p, q, log_p, log_q)
    reverse, reverse_gradient = reverse_kl(p, q, log_p, log_q)
    gradient = weight[:, None] * forward_gradient + (1 - weight[:, None]) * reverse_gradient
    return weight * forward + (1 - weight) * reverse, gradient


def universal_logit(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """ULD: g = sign(p_k − q_k) at the k-th largest of both; q (n, V'); beyond a vocabulary probabilities are 0"""
    (p_sorted, order), (q_sorted, _) = (x.sort(-1, descending=True) for x in (p, q))
    larger = max(p.shape[-1], q.shape[-1])
    gap = pad(p_sorted, (0, larger - p.shape[-1])) - pad(q_sorted, (0, larger - q.shape[-1]))
    g = torch.empty_like(p).scatter_(-1, order, gap[:, : p.shape[-1]].sign())
    return gap.abs().sum(-1), through_softmax(p, g)[1]


def through_softmax(p: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Σ p g, (n,), and p·(g − Σ p g)"""
    mean = (p * g).sum(-1)
    return mean, p * (g - mean[:, None])


DIVERGENCES = {
    "fkl": forward_kl,
    "rkl": reverse_kl,
    "js": jensen_shannon,
    "skl": skewed_forward_kl,
    "srkl": skewed_reverse_kl,
    "akl": adaptive_kl,
    "uld": universal_logit,
}

CACHED_LOGITS = 2**19  # 2 MiB in float32; a handful of tensors of that size exist at a time
HEAD_ROWS = 8192  # rows of a head's gradient that are updated at once, so that no second tensor of its size exists


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def softmax_and_log(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Both (n, V). On a CPU with one exponential: the likeliest token's probability is 1 / Σ exp(logit − its logit)."""
    if logits.is_cuda:  # where an exponential costs less than another pass over the logits
        log_p = logits.log_softmax(-1)
        return log_p.exp(), log_p
    p = logits.softmax(-1)
    log_sum = logits.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()
    return p, logits - log_sum


def product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of autocast, or else that of the states. Raises ValueError for float16."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if dtype == torch.float16:
        raise ValueError("fast/losses.py: in float16 small gradients would become 0, since they are computed before a "
                         "GradScaler scales the loss; use bfloat16, or losses.py")  # fmt: skip
    return dtype


def pad_head(head: Tensor, dtype: torch.dtype) -> Tensor:
    """The head in `dtype`; on CUDA padded with rows of 0 to a multiple of 64, because with GPT-2's 50,257 rows products
    would take three times as long."""
    more = -len(head) % 64 if head.is_cuda else 0
    if not more:
        return head.detach().to(dtype)
    padded = head.new_zeros(len(head) + more, head.shape[1], dtype=dtype)
    padded[: len(head)] = head.detach()
    return padded


@torch.no_grad()
def predict_tokens(hidden: Tensor, head: Tensor, chunk: int = 1024) -> Tensor:
    """As `losses.predict_tokens`, (n, d) and (V, d) -> (n,), but the head is padded (`pad_head`)."""
    dtype, V = product_dtype(hidden), len(head)
    head = pad_head(head, dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        return torch.cat([(part.to(dtype) @ head.T)[:, :V].argmax(-1) for part in hidden.split(chunk)])


def cross_entropy(logits: Tensor, vocabulary: int, label: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy with the label, whether it is the arg-max, and weight·(softmax − one-hot): (n,), (n,), (n, V)."""
    logits = at_least_float32(logits[:, :vocabulary])
    p, (best, token), label = logits.softmax(-1), logits.max(-1, keepdim=True), label[:, None]
    log_sum = best - p.gather(1, token).log()
    gradient = p.mul_(weight).scatter_add_(1, label, p.new_ones(label.shape) * -weight)
    return (log_sum - logits.gather(1, label))[:, 0], (token == label)[:, 0], gradient


def add_divergence(
    gradient: Tensor,  # (n, V)
    logits: Tensor,  # (n, V)
    target: Tensor,  # (k, V'), k ≤ n
    vocabularies: tuple[int, int],  # how many columns of each are compared
    agrees: Tensor | None,  # (k,)
    weight: float,
    divergence: str,
    temperature: float,
) -> Tensor:
    """D(softmax(logits/T), softmax(target/T)) of the first k tokens, (k,), 0 for tokens that do not agree; adds the
    gradient of weight·D to `gradient`."""
    p, log_p = softmax_and_log(at_least_float32(logits[: len(target), : vocabularies[0]]) / temperature)
    q, log_q = softmax_and_log(at_least_float32(target[:, : vocabularies[1]]) / temperature)
    kd, by_kd = DIVERGENCES[divergence](p, q, log_p, log_q)
    if agrees is not None:
        kd = kd * agrees
        by_kd *= agrees[:, None]
    gradient[: len(target), : vocabularies[0]] += by_kd.mul_(weight / temperature)
    return kd


@cache
def fuse(function):
    """The function, compiled once for any number of tokens and any vocabulary."""
    return torch.compile(function, dynamic=True)


def row_blocks(logits: Tensor) -> list[slice]:
    """Blocks of a few rows, which fit into a CPU's cache; on other devices, one block of all rows."""
    rows = max(1, CACHED_LOGITS // logits.shape[-1]) if logits.device.type == "cpu" else len(logits)
    return [slice(first, min(first + rows, len(logits))) for first in range(0, len(logits), rows)]


class HeadTerms(torch.autograd.Function):
    """Two states per token under their heads, and every loss term that the methods compute from them:

    ce        cross-entropy of logits = hidden @ headᵀ with `gold`                (None: 0)
    target_ce cross-entropy of target = target_hidden @ target_headᵀ with `label` (None: 0)
    kd        D(softmax(logits/T), softmax(target/T)), target detached

    hidden (n, d), head (V, d); target_hidden (k, D), for the first k ≤ n tokens, target_head (V', D). The divergence is
    over the rows that both heads have (ULD: all rows of each) and, if `only_agreeing`, 0 where the target's arg-max is
    not its label. Returns (loss, ce, correct, target_ce, agrees, kd). Only loss = Σ weights · (ce, target_ce, kd) has a
    gradient: for hidden, head and, through target_ce, target_hidden, but not for target_head. The others, (n,) or
    (k,), have none. Products are in autocast's dtype, everything else in float32.
    """

    @staticmethod
    def forward(
        ctx, hidden, head, target_hidden, target_head, gold, label, only_agreeing, weights, divergence, temperature,
        chunk, fused,
    ):  # fmt: skip
        inputs, (wants_hidden, wants_head, wants_target) = (hidden, head, target_hidden), ctx.needs_input_grad[:3]
        device, shared = hidden.device.type, target_head is head
        dtype = product_dtype(hidden)
        exact = torch.promote_types(dtype, torch.float32)
        d_head = torch.zeros_like(head, dtype=exact) if wants_head else None
        V, target_V = len(head), len(target_head)
        vocabularies = (V, target_V) if divergence == "uld" else (min(V, target_V),) * 2
        hidden, target_hidden = hidden.detach().to(dtype), target_hidden.detach().to(dtype)
        head = pad_head(head, dtype)
        target_head = head if shared else pad_head(target_head, dtype)
        if fused:  # as tensors: numbers would be compiled in, but they differ in every update
            weights = [hidden.new_zeros((), dtype=exact) + weight for weight in weights]
        ce_weight, target_ce_weight, kd_weight = weights
        ce_terms, kd_terms = map(fuse, (cross_entropy, add_divergence)) if fused else (cross_entropy, add_divergence)
        ce, correct = hidden.new_zeros(len(hidden), dtype=exact), hidden.new_zeros(len(hidden), dtype=torch.bool)
        target_ce, kd = hidden.new_zeros((2, len(target_hidden)), dtype=exact)
        agrees = torch.zeros_like(kd, dtype=torch.bool)
        d_hidden, d_target = torch.zeros_like(hidden), torch.zeros_like(target_hidden)
        with torch.autocast(device, enabled=False):
            for start in range(0, len(hidden), chunk):
                rows = slice(start, start + chunk)
                logits = hidden[rows] @ head.T
                target = target_hidden[rows] @ target_head.T  # fewer rows than the logits if k < n, or none
                for block in [slice(0, len(logits))] if fused else row_blocks(logits):
                    at = slice(start + block.start, start + block.stop)
                    u, v = logits, target  # fused: the kernels cast; no views, because guards would check their base
                    if not fused:
                        u, v = logits[block].to(exact), target[block].to(exact)
                    if gold is None:
                        gradient = u.new_zeros((len(u), V), dtype=exact)
                    else:
                        ce[at], correct[at], gradient = ce_terms(u, V, gold[at].clone(), ce_weight)
                    if len(v):
                        agree = None
                        if label is not None:
                            target_ce[at], agree, by_target = ce_terms(v, target_V, label[at].clone(), target_ce_weight)
                            agrees[at] = agree
                        agree = agree if only_agreeing else None
                        kd[at] = kd_terms(gradient, u, v, vocabularies, agree, kd_weight, divergence, temperature)
                        if label is not None:  # v is no longer needed: its gradient takes its place
                            target[block, :target_V] = by_target
                    logits[block, :V] = gradient  # the same for u
                if wants_hidden:
                    d_hidden[rows] = logits @ head
                if wants_head:
                    parts = d_head.split(HEAD_ROWS), logits[:, :V].split(HEAD_ROWS, dim=1)
                    for d_rows, columns in zip(*parts, strict=True):
                        d_rows += columns.T @ hidden[rows]
                if wants_target and label is not None:
                    d_target[rows] = target @ target_head
        gradients = zip((d_hidden, d_head, d_target), inputs, ctx.needs_input_grad[:3], strict=True)
        ctx.gradients = [d.to(x.dtype) if wanted else None for d, x, wanted in gradients]
        ctx.mark_non_differentiable(ce, correct, target_ce, agrees, kd)
        loss = ce_weight * ce.sum() + target_ce_weight * target_ce.sum() + kd_weight * kd.sum()
        return loss, ce, correct, target_ce, agrees, kd

    @staticmethod
    def backward(ctx, d_loss, *_):
        if ctx.gradients is None:
            raise RuntimeError("HeadTerms: backward() works only once, since it uses up the forward pass's gradient")
        gradients, ctx.gradients = ctx.gradients, None
        return *[None if d is None else d.mul_(d_loss) for d in gradients], *[None] * 9


def rest_of(rows: Tensor, count: int) -> Tensor:
    """(count − k,) the numbers below `count` that are not in `rows` (k,), ascending. Not by `nonzero`, which would wait
    for the device to learn how many there are."""
    absent = torch.ones(count, dtype=torch.uint8, device=rows.device).index_fill_(0, rows, 0)
    return absent.argsort(descending=True, stable=True)[: count - len(rows)]


def head_terms(
    hidden: Tensor,  # (n, d)
    head: Tensor,  # (V, d)
    target_hidden: Tensor | None = None,  # (k, D)
    target_head: Tensor | None = None,  # (V', D)
    rows: Tensor | slice = slice(None),  # (k,) which of the n each target belongs to
    gold: Tensor | None = None,  # (n,)
    label: Tensor | None = None,  # (k,)
    only_agreeing: bool = False,
    ce_weight: float = 0.0,
    target_ce_weight: float = 0.0,
    kd_weight: float = 0.0,
    divergence: str = "fkl",
    temperature: float = 1.0,
    chunk: int = 512,
    fused: bool = False,
) -> SimpleNamespace:
    """Sums of `HeadTerms` over all tokens: loss, with a gradient; ce, correct, target_ce, agrees and kd, without.
    Raises ValueError if the numbers of tokens do not fit together: in chunks, they would still give a number."""
    pairs = len(hidden) if isinstance(rows, slice) else len(rows)
    if gold is not None and len(gold) != len(hidden):
        raise ValueError(f"student_hidden has {len(hidden)} states, but gold {len(gold)} tokens")
    if target_hidden is None:
        target_hidden, target_head = hidden[:0].detach(), head
    elif len(target_hidden) != pairs:
        raise ValueError(f"{pairs} student states are compared, but teacher_hidden has {len(target_hidden)} states")
    if not isinstance(rows, slice):  # HeadTerms needs the tokens that have a target first
        order = rows
        if gold is not None:
            order = torch.cat([rows, rest_of(rows, len(hidden))])
            gold = gold[order]
        hidden = hidden[order]
    weights = (ce_weight, target_ce_weight, kd_weight)
    loss, *terms = HeadTerms.apply(
        hidden, head, target_hidden, target_head, gold, label, only_agreeing, weights, divergence, temperature, chunk,
        fused,
    )  # fmt: skip
    names = ("ce", "correct", "target_ce", "agrees", "kd")
    return SimpleNamespace(loss=loss, **{name: term.sum() for name, term in zip(names, terms, strict=True)})


def sft_loss(
    student_hidden: Tensor,
    gold: Tensor,
    student_head: Tensor,
    counts: Counts,
    kd_rate: float = 0.0,
    chunk: int = 512,
    fused: bool = False,
) -> dict[str, Tensor]:
    """As `losses.sft_loss`."""
    tokens = counts.over("tokens")
    weight = (1 - kd_rate) / tokens
    sums = head_terms(student_hidden, student_head, gold=gold, ce_weight=weight, chunk=chunk, fused=fused)
    return {"ce": sums.ce / tokens, "correct": sums.correct, "loss": sums.loss}


def kd_loss(
    student_hidden: Tensor,
    gold: Tensor | None,
    teacher_hidden: Tensor,
    student_head: Tensor,
    teacher_head: Tensor,
    counts: Counts,
    divergence: str = "fkl",
    temperature: float = 2.0,
    kd_rate: float = 0.5,
    chunk: int = 512,
    fused: bool = False,
) -> dict[str, Tensor]:
    """As `losses.kd_loss`."""
    tokens = counts.over("tokens")
    sums = head_terms(
        student_hidden, student_head, teacher_hidden, teacher_head, gold=gold,
        ce_weight=(1 - kd_rate) / tokens, kd_weight=kd_rate / tokens,
        divergence=divergence, temperature=temperature, chunk=chunk, fused=fused,
    )  # fmt: skip
    on_gold = {} if gold is None else {"ce": sums.ce / tokens, "correct": sums.correct}
    return {**on_gold, "kd": sums.kd / tokens, "loss": sums.loss}


def dskd_loss(
    student_hidden: Tensor,
    gold: Tensor | None,
    rows: Tensor | slice,
    t2s_hidden: Tensor,
    label: Tensor,
    s2t_hidden: Tensor,
    teacher_hidden: Tensor,
    student_head: Tensor,
    teacher_head: Tensor,
    counts: Counts,
    recipe: Recipe,
    divergence: str = "fkl",
    temperature: float = 2.0,
    kd_rate: float = 0.5,
    chunk: int = 512,
    fused: bool = False,
) -> dict[str, Tensor]:
    """As `losses.dskd_loss`, but no token may occur twice in `rows`: L_gold would count it twice, and omit another."""
    check_dskd_arguments(student_hidden, rows, t2s_hidden, label, s2t_hidden, teacher_hidden, recipe)
    tokens, over, over_stu = map(counts.over, ("tokens", recipe.average, recipe.average_stu))
    options = {"temperature": temperature, "chunk": chunk, "fused": fused}

    in_student_space = head_terms(
        student_hidden, student_head, t2s_hidden, student_head, rows, gold, label, recipe.only_agreeing,
        ce_weight=(1 - kd_rate) / tokens, target_ce_weight=kd_rate / over, kd_weight=kd_rate / over_stu,
        divergence=divergence, **options,
    )  # fmt: skip
    in_teacher_space = head_terms(
        s2t_hidden, teacher_head, teacher_hidden, teacher_head,
        kd_weight=kd_rate / over, divergence=recipe.divergence or divergence, **options,
    )  # fmt: skip
    t2s_ce, t2s_kd = in_student_space.target_ce / over, in_student_space.kd / over_stu
    s2t_kd = in_teacher_space.kd / over
    on_gold = {} if gold is None else {"ce": in_student_space.ce / tokens, "correct": in_student_space.correct}
    return {
        **on_gold, "t2s_ce": t2s_ce, "t2s_kd": t2s_kd, "s2t_kd": s2t_kd, "kd": t2s_ce + t2s_kd + s2t_kd,
        "agreeing": in_student_space.agrees, "loss": in_student_space.loss + in_teacher_space.loss,
    }  # fmt: skip
