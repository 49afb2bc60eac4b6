"""The update of each method, written in the obvious way; `bench.py` compares ours with it.

Examples are padded to the longest, states and logits are computed at all positions, every term is over (B, T, V), and
autograd computes the gradients: slow, large, and easy to read. It specifies `train.distil` and all that it calls: same
loss, same gradients (`tests/test_method.py`). It runs on this repository's decoders, or on transformers'.

Shapes: B batch, T the longest example's tokens, d student width, D teacher width, V vocabulary.
"""

import math
import tempfile
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, linear, log_softmax
from torch.nn.utils.rnn import pad_sequence

from data import Row, Side
from model import Decoder, save_model
from train import Method

TEMPERATURE, KD_RATE = 2.0, 0.5
METHODS = {
    "eta": ("DSKD v2 + ETA", {"method": "dskd", "recipe": "v2", "align": "eta"}),
    "cma": ("DSKD v1 + CMA", {"method": "dskd", "recipe": "v1", "align": "cma"}),
    "same": ("DSKD v2", {"method": "dskd", "recipe": "v2", "align": "none"}),
    "kd": ("KD", {"method": "kd", "recipe": "v2", "align": "none"}),
}


@dataclass
class Padded:
    """One model's side of a batch, all (B, T); labels are −100 except at response positions."""

    ids: Tensor
    mask: Tensor
    labels: Tensor


def pad(sides: list[Side], pad_id: int, device) -> Padded:
    """Pad on the right to the longest, and shift the labels by one."""
    ids = [torch.tensor(side.prompt + side.response[:-1]) for side in sides]
    mask = [torch.ones_like(row) for row in ids]
    labels = [torch.tensor((len(side.prompt) - 1) * [-100] + side.response) for side in sides]
    columns = zip((ids, mask, labels), (pad_id, 0, -100), strict=True)
    return Padded(*(pad_sequence(rows, batch_first=True, padding_value=value).to(device) for rows, value in columns))


def pair_positions(rows: list[Row], device) -> tuple[Tensor, Tensor, Tensor]:
    """(example, teacher position, student position) of all aligned pairs, each (A,)."""
    columns = []
    for example, row in enumerate(rows):
        i, j = row.pairs  # indices into the responses; a response's first token is predicted by the prompt's last
        columns.append((0 * i + example, i + len(row.teacher.prompt) - 1, j + len(row.student.prompt) - 1))
    return tuple(torch.from_numpy(np.concatenate(column)).to(device) for column in zip(*columns, strict=True))


def states(model, side: Padded) -> tuple[Tensor, Tensor]:
    """Hidden states (B, T, D) and logits (B, T, V)."""
    if isinstance(model, Decoder):
        hidden = model(side.ids)
        return hidden, model.logits(hidden)
    hidden = model.base_model(input_ids=side.ids, attention_mask=side.mask, use_cache=False).last_hidden_state
    return hidden, model.get_output_embeddings()(hidden)


def head_of(model) -> Tensor:
    """(V, D)"""
    return model.head_weight if isinstance(model, Decoder) else model.get_output_embeddings().weight


def embeddings_of(model) -> Tensor:
    """(V, D), without gradient."""
    return (model.embed if isinstance(model, Decoder) else model.get_input_embeddings()).weight.detach()


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Σ q (log q − log p): (B, T, V) x 2 -> (B, T)"""
    log_p = log_softmax(student_logits.float() / TEMPERATURE, -1)
    log_q = log_softmax(teacher_logits.float() / TEMPERATURE, -1)
    return kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")  # skips −100


def plain_loss(
    name: str,  # of METHODS
    method: Method,  # for its projectors and ETA's map of the teacher's tokens
    models: tuple,  # student and teacher, ours or transformers'
    sides: tuple[Padded, Padded],  # the student's, the teacher's
    pairs: tuple[Tensor, Tensor, Tensor] | None = None,  # `pair_positions`, for ETA
) -> Tensor:
    """The loss of one update: (1 − kd_rate)·ce + kd_rate·kd."""
    student, teacher = sides
    student_head, teacher_head = map(head_of, models)
    student_hidden, student_logits = states(models[0], student)
    with torch.no_grad():
        teacher_hidden, teacher_logits = states(models[1], teacher)
    response, tokens = student.labels != -100, (student.labels != -100).sum()  # (B, T) and N
    ce = summed_cross_entropy(student_logits, student.labels) / tokens
    if name == "kd":
        kd = (forward_kl(student_logits, teacher_logits) * response).sum() / tokens
        return (1 - KD_RATE) * ce + KD_RATE * kd

    t2s, s2t = method.projectors.t2s, method.projectors.s2t
    if name == "same":
        t2s_hidden, s2t_hidden = t2s(teacher_hidden), s2t(student_hidden)
        t2s_label = teacher_logits.argmax(-1).where(response, -100)
        s2t_mask, normaliser = response, tokens
    elif name == "eta":  # positions without a pair are zero vectors without a label
        example, i, j = pairs
        label = method.student_token[teacher_logits.argmax(-1)[example, i]]
        example, i, j, label = (column[label >= 0] for column in (example, i, j, label))
        t2s_hidden, s2t_hidden = torch.zeros_like(student_hidden), torch.zeros_like(teacher_hidden)
        t2s_hidden = t2s_hidden.index_put((example, j), t2s(teacher_hidden)[example, i].to(t2s_hidden.dtype))
        s2t_hidden = s2t_hidden.index_put((example, i), s2t(student_hidden)[example, j].to(s2t_hidden.dtype))
        t2s_label = torch.full_like(student.labels, -100).index_put((example, j), label)
        s2t_mask = torch.zeros_like(teacher.labels).index_put((example, i), torch.ones_like(i))
        normaliser = max(len(label), 1)
    else:  # cma
        t2s_hidden, s2t_hidden = attend(method.projectors, models, sides, student_hidden, teacher_hidden)
        t2s_label, s2t_mask, normaliser = student.labels, teacher.labels != -100, tokens

    t2s_logits = linear(t2s_hidden, student_head.detach())
    s2t_logits = linear(s2t_hidden, teacher_head)
    t2s_ce = summed_cross_entropy(t2s_logits, t2s_label) / normaliser
    agrees = t2s_logits.argmax(-1) == t2s_label
    t2s_kd = (forward_kl(student_logits, t2s_logits.detach()) * agrees).sum()
    t2s_kd = t2s_kd / (tokens if name == "cma" else agrees.sum().clamp(min=1))
    s2t_kd = (forward_kl(s2t_logits, teacher_logits) * s2t_mask).sum() / normaliser
    return (1 - KD_RATE) * ce + KD_RATE * (t2s_ce + t2s_kd + s2t_kd)


def attend(projectors, models, sides, student_hidden: Tensor, teacher_hidden: Tensor) -> tuple[Tensor, Tensor]:
    """CMA (v1): the teacher's states seen from the student's positions (B, T, d), and the reverse (B, T, D)."""
    student, teacher = sides
    ours, theirs = student.labels != -100, teacher.labels != -100
    student_embed, teacher_embed = map(embeddings_of, models)
    query = projectors.query(torch.cat([student_embed[student.ids], student_embed[student.labels * ours]], -1))
    label_embeddings = teacher_embed[teacher.labels * theirs]
    key = torch.cat([teacher_embed[teacher.ids], label_embeddings], -1)
    key_std, label_std, hidden_std = (x[theirs].float().std() for x in (key, label_embeddings, teacher_hidden))
    scores = query @ (key / key_std).mT / math.sqrt(key.shape[-1])  # (B, T, 2D) x (B, 2D, T) -> (B, T, T)
    scores = scores + ~(ours[:, :, None] & theirs[:, None, :]) * -1e5
    value = teacher_hidden / hidden_std + label_embeddings / label_std
    return scores.softmax(-1) @ projectors.t2s(value), scores.mT.softmax(-1) @ projectors.s2t(student_hidden)


def as_transformers(ours: Decoder):
    """The same model in transformers, loaded from files that we write."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save_model(ours, folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=ours.embed.weight.dtype)
    return theirs.to(ours.embed.weight.device)
