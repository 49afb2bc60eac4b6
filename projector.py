"""Projectors between the teacher's and the student's representation space, and where they start.

The point of DSKD: two models with different heads predict in different spaces. A projector carries the hidden states of
one model into the space of the other, so that both are read by the same head:

    t2s: D -> d   teacher states under the student's head      s2t: d -> D   student states under the teacher's head

v1 (arXiv 2406.17328) starts both at random and trains both, with biases. v2 (arXiv 2504.11426) starts where the
projected logits equal the original ones as nearly as a linear map allows (`logit_preserving_weight`), trains t2s, and
recomputes s2t from the current student head at every step.

>>> head = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
>>> weight = logit_preserving_weight(source_head=head[:, :4], target_head=head)   # 4 -> 8
>>> torch.allclose(weight, torch.eye(8, 4), atol=1e-5)                            # those four directions, kept
True
"""

import torch
from torch import Tensor, nn


def pseudo_inverse(head: Tensor, rows: int = 8192) -> Tensor:
    """pinv(head) (D, V) of a head (V, D), through its D x D Gram matrix: no decomposition of a V x D matrix.

    With head = U S Rᵀ the Gram matrix headᵀ head is R S² Rᵀ: its eigenvectors R and eigenvalues S² give
    pinv(head) = (headᵀ head)⁺ headᵀ. Directions with a singular value below max(D, V)·ε(float32)·σ_max are dropped, as
    `torch.linalg.pinv` does with a float32 head. Computed in float64, `rows` rows at a time, because squaring the
    singular values squares their ratio; returned in float32 or better, because in half precision the rounding of the
    large directions would hide the small ones.
    """
    head, dtype = head.detach(), torch.promote_types(head.dtype, torch.float32)
    gram = sum(part.T @ part for part in map(Tensor.double, head.split(rows)))  # (D, V) x (V, D) -> (D, D)
    squared, directions = torch.linalg.eigh(gram)  # ascending (D,), (D, D)
    cut = (max(head.shape) * torch.finfo(torch.float32).eps) ** 2 * squared[-1]
    gram_inverse = directions * torch.where(squared > cut, 1 / squared, 0.0) @ directions.T
    return torch.cat([(gram_inverse @ part.double().T).to(dtype) for part in head.split(rows)], dim=1)


def logit_preserving_weight(source_head: Tensor, target_head: Tensor) -> Tensor:
    """W = argmin ‖ source_head − target_head · W ‖_F: the projected states give the original logits (v2).

    source_head (V, d_in), target_head (V, d_out), rows in the same vocabulary order -> (d_out, d_in), the layout of
    `nn.Linear(d_in, d_out).weight`, in float32 or better.
    """
    if len(source_head) != len(target_head):
        raise ValueError(f"the heads must list the same tokens: source_head has {len(source_head)} rows, target_head "
                         f"{len(target_head)}; take the rows of the shared vocabulary first")  # fmt: skip
    inverse = pseudo_inverse(target_head)
    with torch.autocast(inverse.device.type, enabled=False):
        return inverse @ source_head.detach().to(inverse.dtype)  # (d_out, V) x (V, d_in) -> (d_out, d_in)


class Projectors(nn.Module):
    """t2s (D -> d), s2t (d -> D) and CMA's query (2d -> 2D), all linear; `query` is None without CMA.

    student_head (V, d) and teacher_head (V, D) list the shared vocabulary in the same order, in float32.
    If the heads of one vocabulary are padded to different lengths, give the rows that both have, here and to
    `refresh_s2t`, and take the teacher's predictions over these rows of its head alone.
    v1: all start at random, as `nn.Linear` does, with biases, and all are trained.
    v2: no biases. t2s starts where it preserves the teacher's logits, and is trained; s2t is solved for the current
    student head by `refresh_s2t`, before every update, and no optimiser touches it.
    Besides the student, the optimiser gets the projectors that have `requires_grad`. With different tokenizers, give
    student_head[student_ids] and teacher_head[teacher_ids] as heads, with the ids of `align.vocabulary_overlap`.
    For models in half precision, convert t2s and s2t, not the whole module: the inverse behind s2t stays in float32.
    With several processes, average the projectors' gradient too: make them a part of the student before it is wrapped
    (in DDP with broadcast_buffers=False, or every forward pass sends that inverse, as large as the teacher's head). The
    forward pass must be the wrapped student's, or nothing is averaged; heads and projectors come from its `.module`.
    given: weights {"t2s.weight": ..., "s2t.bias": ...} that replace the recipe's, and are trained (even v2's s2t).
    """

    @torch.no_grad()
    def __init__(self, student_head: Tensor, teacher_head: Tensor, recipe="v2", query=False, given: dict | None = None):
        super().__init__()
        given, d, D = given or {}, student_head.shape[1], teacher_head.shape[1]

        def linear(name: str, d_in: int, d_out: int) -> nn.Linear:
            biased = f"{name}.bias" in given or (recipe == "v1" and f"{name}.weight" not in given)
            return nn.Linear(d_in, d_out, bias=biased)

        self.t2s, self.s2t = linear("t2s", D, d), linear("s2t", d, D)
        self.query = linear("query", 2 * d, 2 * D) if query else None
        self.register_buffer("teacher_inverse", None, persistent=False)  # (D, V) where s2t is solved, not trained
        self.load_state_dict(given, strict=False)
        self.to(student_head.device)
        if recipe == "v2" and "t2s.weight" not in given:
            self.t2s.weight.copy_(logit_preserving_weight(source_head=teacher_head, target_head=student_head))
        if recipe == "v2" and "s2t.weight" not in given:
            self.s2t.weight.requires_grad_(False)
            self.teacher_inverse = pseudo_inverse(teacher_head)  # once: the teacher's head never changes
            self.refresh_s2t(student_head)

    @torch.no_grad()
    def refresh_s2t(self, student_head: Tensor) -> None:
        """s2t for the current student head (V, d), where it is solved; no gradient flows through the solution."""
        if (inverse := self.teacher_inverse) is not None:  # `logit_preserving_weight(student_head, teacher_head)`
            with torch.autocast(inverse.device.type, enabled=False):
                self.s2t.weight.copy_(inverse @ student_head.to(inverse.dtype))  # (D, V) x (V, d)
