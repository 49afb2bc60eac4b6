"""Two ideas from beyond both papers, each one function, in the tables of `python -m experiments.reproduce beyond`.

- Spans: ETA leaves out the tokens that the two tokenizers cut differently. Where they do, both models still give a
  probability to the same text: the product over the tokens of a *span*, the fewest tokens of each with equal bytes
  (as ALM does, arXiv 2503.20083).
- Entropy: a token counts more where the student is uncertain and the teacher is not (the idea of DWA-KD's weights,
  arXiv 2602.21669; the formula is ours).

They change `losses.py` from outside, as a list of patches around one run with --chunk 0.
"""

import math
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import align
import losses
import train
from model import hidden_at


def weigh_by_entropy(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """w = H(p)/ln V · (1 − H(q)/ln V), scaled to a mean of 1, without gradient: (N, V) x 2 -> (N,)"""
    if not len(student_logits):
        return student_logits.new_zeros(0)
    entropies = (torch.distributions.Categorical(logits=z.detach().float()).entropy() for z in
                 (student_logits, teacher_logits))  # fmt: skip
    uncertain, certain = (entropy / math.log(student_logits.shape[-1]) for entropy in entropies)
    weight = uncertain * (1 - certain)
    return weight / weight.mean().clamp_min(torch.finfo(weight.dtype).tiny)


def by_entropy() -> list:
    """L_stu and L_tea with each token's divergence times its weight, in the space where it is taken."""

    def weighted(divergence):
        def weigh(student_logits, teacher_logits, temperature):
            found = divergence(student_logits, teacher_logits, temperature)
            return weigh_by_entropy(student_logits, teacher_logits) * found

        return weigh

    changed = {name: weighted(divergence) for name, divergence in losses.DIVERGENCES.items()}
    return [patch.dict(losses.DIVERGENCES, changed)]


def find_spans(teacher: list[bytes | None], student: list[bytes | None]) -> list[tuple[slice, slice]]:
    """The fewest tokens of each, one after the other, that spell the same bytes; none if the whole texts differ. None,
    end-of-text, is a token by itself."""
    sides = align.without_dummy_space(teacher, student)
    if align.spell(sides[0]) != align.spell(sides[1]):
        return []
    tokens, _, ends = zip(*map(align.token_spans, sides), strict=True)
    shared = np.intersect1d(*ends)
    stops = (index[np.searchsorted(end, shared)] + 1 for index, end in zip(tokens, ends, strict=True))
    return list(zip(*(map(slice, [0, *stop[:-1]], stop) for stop in stops), strict=True))


def span_divergence(student_log_p: Tensor, teacher_log_p: Tensor) -> Tensor:
    """KL of the teacher's and the student's answer to "does the text go on like this?": (n,) log-probabilities of n
    spans -> (n,)"""
    student, teacher = (x.clamp(max=-1e-6) for x in (student_log_p, teacher_log_p))
    no, teachers_no = (torch.log(-torch.expm1(x)) for x in (student, teacher))
    return teacher.exp() * (teacher - student) + teachers_no.exp() * (teachers_no - no)


def by_spans() -> list:
    """L_kd with one more term: the mean divergence of the spans that are no aligned pair."""
    whole_init, whole_loss = train.Method.__init__, train.Method.loss

    def __init__(self, o, student, student_tokenizer, teacher=None, teacher_tokenizer=None):
        whole_init(self, o, student, student_tokenizer, teacher, teacher_tokenizer)
        self.spell = student_tokenizer.spell, teacher_tokenizer.spell

    def loss(self, student, batch, answer, totals, is_gold=True):
        terms = whole_loss(self, student, batch, answer, totals, is_gold)
        sides, models, log_p = (batch.student, batch.teacher), (student, self.teacher), []
        for side, model in zip(sides, models, strict=True):
            with torch.set_grad_enabled(model is student):
                logits = losses.logits_under(hidden_at(model, side), model.head_weight)
                log_p.append(-cross_entropy(logits, side.labels, reduction="none"))
        found = []
        parts = [[x.split(side.lengths) for x in (side.labels, of_tokens)] for side, of_tokens in
                 zip(sides, log_p, strict=True)]  # fmt: skip
        for ours, our_log_p, theirs, their_log_p in zip(*parts[0], *parts[1], strict=True):
            spelt = [spell(ids.tolist()) for spell, ids in zip(self.spell, (ours, theirs), strict=True)]
            for at, here in find_spans(spelt[1], spelt[0]):
                if (at.stop - at.start, here.stop - here.start) != (1, 1):
                    found.append(torch.stack([our_log_p[here].sum(), their_log_p[at].sum()]))
        if found:
            term = span_divergence(*torch.stack(found, 1)).mean()
            terms = {**terms, "kd": terms["kd"] + term.detach(), "loss": terms["loss"] + self.o.kd_rate * term}
        return terms

    return [patch.multiple(train.Method, __init__=__init__, loss=loss)]
