"""Universal logit distillation (ULD, arXiv 2402.12030): sorted probabilities, compared rank by rank.

No vocabulary is translated: only the shape of the sorted distribution counts, not which token has which probability.
Tokens are paired position by position from the start of the response, up to the end of the shorter one.

>>> import torch
>>> p, q = torch.tensor([[0.0, 2.0]]).log_softmax(-1), torch.tensor([[2.0, 0.0, -1e9]]).log_softmax(-1)
>>> bool(universal_logit_distance(p.exp(), q.exp()).abs() < 1e-6)       # the same, sorted and padded with a 0
True
"""

import numpy as np
from torch import Tensor
from torch.nn.functional import pad

from data import Row
from fast.losses import head_terms
from losses import Counts, add_gold, logits_under


def pair_by_position(row: Row, student, teacher) -> tuple[np.ndarray, np.ndarray]:
    """Aligned (teacher, student) response positions: equal positions, up to the end of the shorter response."""
    places = np.arange(min(len(row.teacher.response), len(row.student.response)))
    return places, places


def universal_logit_distance(p: Tensor, q: Tensor) -> Tensor:
    """Σ_k |p_k − q_k| of the k-th largest probabilities, 0 beyond a vocabulary: (n, V_s), (n, V_t) -> (n,)."""
    p, q = (x.sort(-1, descending=True).values for x in (p, q))
    larger = max(p.shape[-1], q.shape[-1])
    p, q = (pad(x, (0, larger - x.shape[-1])) for x in (p, q))
    return (p - q).abs().sum(-1)


def uld_loss(
    student_hidden: Tensor,  # (N, d)
    gold: Tensor,  # (N,)
    rows: Tensor,  # (K,) the student token that each teacher state is compared with
    teacher_hidden: Tensor,  # (K, D)
    student_head: Tensor,  # (V_s, d)
    teacher_head: Tensor,  # (V_t, D)
    counts: Counts,
    kd_rate: float = 0.5,
    chunk: int = 0,
    fused: bool = False,
) -> dict[str, Tensor]:
    """loss = (1 − kd_rate)·L_gold + kd_rate·Σ distance / N, without temperature. {ce, correct, kd, loss}

    Normalised by all student tokens, as in the official code: those beyond the teacher's response add 0. `chunk`: use
    the fast path with this many tokens at a time, and its `fused`; 0: the plain path.
    """
    tokens = counts.over("tokens")
    if chunk:
        sums = head_terms(
            student_hidden, student_head, teacher_hidden, teacher_head, rows, gold, ce_weight=(1 - kd_rate) / tokens,
            kd_weight=kd_rate / tokens, divergence="uld", chunk=chunk, fused=fused,
        )  # fmt: skip
        ce, kd = sums.ce / tokens, sums.kd / tokens
        return {"ce": ce, "correct": sums.correct, "kd": kd, "loss": sums.loss}
    student_logits = logits_under(student_hidden, student_head)  # (N, V_s)
    teacher_logits = logits_under(teacher_hidden, teacher_head).detach()  # (K, V_t)
    distance = universal_logit_distance(student_logits[rows].softmax(-1), teacher_logits.softmax(-1))  # (K,)
    return add_gold({"kd": distance.sum() / tokens}, student_logits, gold, tokens, kd_rate)
