"""One update of each method: from a batch and two models to the loss terms. Nothing here knows of files or schedules.

An update is made of one or more batches (gradient accumulation), in two phases:

1. `teacher_states` of every batch: the frozen teacher's hidden states and predictions at its response positions, and
   `totals`, the counts and statistics over all of them that normalise the losses;
2. `loss` of every batch, for a backward pass each. The parts add up to the loss of the whole, however it is split.

On-policy (v2, eq. 18) the distillation term is taken on other batches, of responses that the student sampled, and the
gold batches have their cross-entropy alone; it is the same `loss`, called for both.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from align import cross_model_attention, mapped_columns, prediction_map, vocabulary_overlap
from data import Batch, ModelBatch, TextTokenizer, edit_distance_ids
from fast.losses import fused_terms
from losses import (
    DIVERGENCES,
    PLAIN,
    count_agreeing,
    dskd_loss,
    kd_loss,
    logits_under,
    mined_loss,
    sft_loss,
    uld_loss,
)
from projector import Projectors


@dataclass
class TeacherStates:
    """What the frozen teacher says about one batch; nothing else of it is needed."""

    hidden: Tensor  # (M, D) at its response positions
    teacher_index: Tensor | None = None  # (K,) the pairs of the batch; ETA's whose prediction the student can say
    student_index: Tensor | None = None  # (K,)
    label: Tensor | None = None  # (K,) that prediction as a student token; without ETA (N,), all tokens


@dataclass
class Totals:
    """Numbers over all batches of one update."""

    tokens: int  # student response tokens that L_kd is over
    gold_tokens: int  # gold response tokens; the same, unless the student sampled
    pairs: int = 0  # ETA pairs
    agreeing: int = 0  # v2: pairs or tokens where the projected teacher predicts its label
    key_std: float = 1.0  # CMA: of [E_t(input); E_t(label)], of E_t(label) and of the teacher's hidden states,
    label_std: float = 1.0  # over the response positions, so that padding has no say (the official code's does)
    hidden_std: float = 1.0


def hidden_at(model: nn.Module, side: ModelBatch) -> Tensor:
    """The model's hidden states at the response positions: (R, width)."""
    return model(side.input_ids, real=side.real).flatten(0, 1)[side.positions]


def argmax_tokens(hidden: Tensor, head: Tensor, chunk: int = 1024) -> Tensor:
    """The predicted token of each state, (R, D) and (V, D) -> (R,)."""
    return torch.cat([logits_under(part, head).argmax(-1) for part in hidden.split(chunk)])


def moments(x: Tensor) -> tuple[int, float, float]:
    """(count, sum, sum of squares) of all elements, in float64: numbers that add up over processes."""
    squares = torch.linalg.vector_norm(x, dtype=torch.float64) ** 2
    return x.numel(), float(x.sum(dtype=torch.float64)), float(squares)


def standard_deviation(count: int, total: float, squares: float) -> float:
    """Of the elements that these moments are of; as torch's, divided by count - 1."""
    return math.sqrt((squares - total**2 / count) / (count - 1))


def choose_alignment(align: str, method: str, recipe: str, teacher: TextTokenizer, student: TextTokenizer) -> str:
    """`align` with "auto" resolved, checked against the method. Raises ValueError saying why it cannot be.

    Methods uld and mined pair tokens in their own way, which has the method's name.
    """
    if method in ("uld", "mined"):
        if align != "auto":
            how = {"uld": "position by position", "mined": "by edit distance"}[method]
            raise ValueError(f"--method {method} pairs tokens itself, {how}: --align {align} belongs to --method dskd")
        return method
    equal = teacher.vocabulary() == student.vocabulary() and teacher.eos_id == student.eos_id
    if align == "auto":
        align = "none" if equal or method == "kd" else {"v1": "cma", "v2": "eta"}[recipe]
    if method == "kd" and align != "none":
        raise ValueError(f"--method kd compares position by position, --align {align} belongs to --method dskd")
    if align == "none" and not equal:
        ends = [tokenizer.tokenizer.id_to_token(tokenizer.eos_id) for tokenizer in (teacher, student)]
        differ = "differ" if ends[0] == ends[1] else f"differ (end-of-text: {ends[0]!r} and {ends[1]!r})"
        raise ValueError(
            f"--method {method} --align none needs equal vocabularies; {teacher.directory} and {student.directory} "
            f"{differ}: use --method dskd with --align eta (recipe v2) or cma (recipe v1)"
        )
    if (recipe, align) in {("v1", "eta"), ("v2", "cma")}:
        other = {"eta": "v2", "cma": "v1"}[align]
        raise ValueError(f"--align {align} belongs to --recipe {other} (the papers pair v1 with cma, v2 with eta)")
    return align


class Distiller(nn.Module):
    """The teacher's side of a method: the frozen teacher, the projectors, and how the two vocabularies relate.

    Its parameters are the projectors' alone; the teacher is kept out of `parameters()`, as it is neither trained nor
    saved. `teacher` is None for method sft.
    """

    def __init__(
        self,
        student: nn.Module,
        student_tokenizer: TextTokenizer,
        teacher: nn.Module | None = None,
        teacher_tokenizer: TextTokenizer | None = None,
        method: str = "dskd",
        recipe: str = "v2",
        align: str = "auto",
        divergence: str = "fkl",
        temperature: float = 2.0,
        kd_rate: float = 0.5,
        projectors_file: str | None = None,
        chunk: int = 512,
    ):
        super().__init__()
        assert divergence in DIVERGENCES and method in {"sft", "kd", "dskd", "uld", "mined"}
        self.method, self.recipe, self.divergence = method, recipe, divergence
        self.temperature, self.terms = temperature, fused_terms(chunk) if chunk else PLAIN
        self.kd_rate = 0.0 if method == "sft" else kd_rate
        self.align, self.projectors = "none", None
        if method == "sft":
            return
        self._teacher = [teacher.requires_grad_(False).eval()]  # in a list: not a submodule
        self.align = choose_alignment(align, method, recipe, teacher_tokenizer, student_tokenizer)
        device = student.head_weight.device
        if self.align == "eta":
            tokenizers = teacher_tokenizer.tokenizer, student_tokenizer.tokenizer
            ends = teacher_tokenizer.eos_id, student_tokenizer.eos_id
            shared = vocabulary_overlap(*tokenizers, *ends)
            self.shared_teacher_ids, self.shared_student_ids = (torch.from_numpy(ids).to(device) for ids in shared)
            mapped = prediction_map(*tokenizers, *ends, size=teacher.head_weight.shape[0])
            self.register_buffer("student_token", torch.from_numpy(mapped).to(device), persistent=False)
        elif self.align == "mined":
            mapped = edit_distance_ids(teacher_tokenizer, student_tokenizer)
            columns = mapped_columns(mapped, teacher_tokenizer.tokenizer)
            self.columns = [torch.from_numpy(ids).to(device) for ids in columns]  # (teacher ids, student ids)
        elif self.align != "uld":  # equal vocabularies, perhaps padded to different numbers of rows
            self.rows = min(student.head_weight.shape[0], teacher.head_weight.shape[0])
            self.shared_teacher_ids = self.shared_student_ids = slice(self.rows)
        if method == "dskd":
            self._start_projectors(student, projectors_file)

    @property
    def teacher(self) -> nn.Module:
        return self._teacher[0]

    @property
    def predicting_head(self) -> Tensor | None:
        """(V, D) the teacher's head over what it may predict; None where the method does not ask for predictions."""
        if self.method != "dskd" or self.recipe != "v2":
            return None
        return self.teacher.head_weight[: self.rows] if self.align == "none" else self.teacher.head_weight

    def _start_projectors(self, student: nn.Module, file: str | None) -> None:
        """v1: random, with biases. v2: where the logits are preserved. `file`: some or all of them from there."""
        student_head, teacher_head = student.head_weight, self.teacher.head_weight
        widths = student_head.shape[1], teacher_head.shape[1]
        given = load_file(file) if file else {}
        if self.align != "cma" and (unused := [name for name in given if name.startswith("query.")]):
            print(f"{file}: {' and '.join(unused)} belong to --align cma and are not used", file=sys.stderr)
            given = {name: value for name, value in given.items() if name not in unused}
        self.projectors = Projectors(*widths, bias=True, query=self.align == "cma").to(student_head.device)
        for name, layer in self.projectors.named_children():
            biased = f"{name}.bias" in given if f"{name}.weight" in given else self.recipe == "v1"
            if not biased:
                layer.bias = None
        own = self.projectors.state_dict()
        for name, value in given.items():
            if name not in own or own[name].shape != value.shape:
                expected = ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in own.items())
                raise ValueError(f"{file}: {name} {list(value.shape)} does not fit; expected {expected}")
        if self.recipe == "v2":  # what the file gives is trained, s2t too; what it does not is solved
            heads = self._shared_heads(student)
            if "t2s.weight" not in given:
                self.projectors.start_t2s(*heads)
            if "s2t.weight" not in given:
                self.projectors.solve_s2t(*heads)
        self.projectors.load_state_dict(given, strict=False)

    def _shared_heads(self, student: nn.Module) -> tuple[Tensor, Tensor]:
        """Both heads over the shared vocabulary, in the same order, in float32: (V, d), (V, D)."""
        student_head, teacher_head = student.head_weight.detach(), self.teacher.head_weight
        return student_head[self.shared_student_ids].float(), teacher_head[self.shared_teacher_ids].float()

    @torch.no_grad()
    def refresh(self, student: nn.Module) -> None:
        """Once per update, before its losses: s2t for the student head as it is now, where it is solved (v2)."""
        if self.projectors is not None and self.projectors.teacher_inverse is not None:
            self.projectors.refresh_s2t(student.head_weight.detach()[self.shared_student_ids].float())

    @torch.no_grad()
    def teacher_states(self, batch: Batch) -> TeacherStates | None:
        """The teacher's forward pass, or what the batch has of an earlier one (cache.py); None for sft."""
        if self.method == "sft":
            return None
        if batch.teacher_hidden is None:
            hidden = hidden_at(self.teacher, batch.teacher)
        else:
            hidden = batch.teacher_hidden.to(self.teacher.head_weight.dtype)
        states = TeacherStates(hidden, batch.teacher_index, batch.student_index)
        head, cached = self.predicting_head, batch.teacher_predictions
        if head is not None:
            if self.align == "none":
                states.label = argmax_tokens(hidden, head) if cached is None else cached
            else:  # eq. 14: only pairs whose prediction exists in the student's vocabulary
                paired = batch.teacher_index
                predicted = argmax_tokens(hidden[paired], head) if cached is None else cached[paired]
                label = self.student_token[predicted]
                known = label >= 0
                states.label = label[known]
                states.teacher_index, states.student_index = batch.teacher_index[known], batch.student_index[known]
        return states

    @torch.no_grad()
    def totals(
        self,
        student: nn.Module,
        batches: list[Batch],
        states: list[TeacherStates | None],
        gold: list[Batch] | None = None,
        add_up: Callable[[list], list] | None = None,
    ) -> Totals:
        """The normalisers of one update, from all the batches that L_kd is on, the teacher's states of each, and all
        gold batches (None: the same ones; the student did not sample). Where several processes share the update,
        `add_up` gives the sums of a list of numbers over all of them."""
        tokens, gold_tokens = (sum(len(batch.student.labels) for batch in part) for part in (batches, gold or batches))
        pairs = sum(len(state.label) for state in states) if self.align == "eta" else 0
        agreeing, spread = 0, []
        if self.align == "cma":
            embed = self.teacher.embed.weight
            inputs, labels = (torch.cat([getattr(b.teacher, name) for b in batches]) for name in ("inputs", "labels"))
            key, hidden = torch.cat([embed[inputs], embed[labels]], -1), torch.cat([state.hidden for state in states])
            spread = [*moments(key), *moments(embed[labels]), *moments(hidden)]
        if self.method == "dskd" and self.recipe == "v2":
            agreeing = sum(
                count_agreeing(self.projectors.t2s(self._paired(state)), state.label, student.head_weight)
                for state in states
            )
        if add_up:
            tokens, gold_tokens, pairs, agreeing, *spread = add_up([tokens, gold_tokens, pairs, agreeing, *spread])
        stds = (standard_deviation(*spread[i : i + 3]) for i in range(0, len(spread), 3))
        return Totals(tokens, gold_tokens, pairs, agreeing, *stds)

    def _paired(self, states: TeacherStates) -> Tensor:
        """The teacher states that are paired with a student position: (K, D) with ETA, ULD and MinED, else all."""
        return states.hidden if states.teacher_index is None else states.hidden[states.teacher_index]

    def loss(
        self, student: nn.Module, batch: Batch, states: TeacherStates | None, totals: Totals, is_gold: bool = True
    ) -> dict[str, Tensor]:
        """{ce, t2s_ce, ..., kd, loss}: this batch's part of the update's terms and loss (this with gradient); sums come
        after what they are made of, so that the first that is not finite is the one to look at.

        loss = (1 − kd_rate)·ce + kd_rate·kd. Without the teacher's `states`: the first part alone (sft, and the gold
        side of on-policy distillation); not `is_gold`: the second alone (its sampled side). `student` may be a compiled
        model; its head is read from it.
        """
        student_hidden, labels, head = hidden_at(student, batch.student), batch.student.labels, student.head_weight
        gold, teacher_head = labels if is_gold else None, None if states is None else self.teacher.head_weight
        options, temperature = {"terms": self.terms, "kd_rate": self.kd_rate}, {"temperature": self.temperature}
        divergence = {"divergence": self.divergence, **temperature}
        if states is None:
            return sft_loss(student_hidden, labels, head, totals.gold_tokens, **options)
        paired, heads, tokens = self._paired(states), (head, teacher_head), totals.tokens
        if self.method == "kd":
            return kd_loss(student_hidden, gold, paired, *heads, tokens, **divergence, **options)
        if self.method == "uld":
            return uld_loss(student_hidden, gold, paired, states.student_index, *heads, tokens, **options)
        if self.method == "mined":
            rows, (teacher_ids, student_ids) = states.student_index, self.columns
            columns = student_ids, teacher_ids
            return mined_loss(student_hidden, gold, paired, rows, *heads, *columns, tokens, **temperature, **options)
        t2s, s2t = self.projectors.t2s, self.projectors.s2t
        if self.align == "cma":
            t2s_hidden, s2t_hidden = self._attend(student, batch, student_hidden, states.hidden, totals)
        elif self.align == "eta":
            t2s_hidden, s2t_hidden = t2s(paired), s2t(student_hidden[states.student_index])
        else:
            t2s_hidden, s2t_hidden = t2s(paired), s2t(student_hidden)
        return dskd_loss(
            student_hidden,
            gold,
            t2s_hidden,
            labels if states.label is None else states.label,
            s2t_hidden,
            paired,
            *heads,
            tokens=tokens,
            student_rows=states.student_index,
            recipe=self.recipe,
            align=self.align,
            pairs=totals.pairs,
            agreeing=totals.agreeing,
            **divergence,
            **options,
        )

    def _attend(self, student, batch: Batch, student_hidden: Tensor, teacher_hidden: Tensor, totals: Totals):
        """CMA (v1): each side's states seen from the other's positions, t2s (N, d) and s2t (M, D)."""
        student_embed, teacher_embed = student.embed.weight.detach(), self.teacher.embed.weight
        ours, theirs = batch.student, batch.teacher
        query = self.projectors.query(torch.cat([student_embed[ours.inputs], student_embed[ours.labels]], -1))
        label_embeddings = teacher_embed[theirs.labels]
        key = torch.cat([teacher_embed[theirs.inputs], label_embeddings], -1) / totals.key_std
        t2s_weights, s2t_weights = cross_model_attention(query, key, ours.example, theirs.example)
        value = teacher_hidden / totals.hidden_std + label_embeddings / totals.label_std
        return t2s_weights @ self.projectors.t2s(value), s2t_weights @ self.projectors.s2t(student_hidden)
