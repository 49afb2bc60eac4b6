"""Distil a teacher into a student: what is loaded for it, one update, and the loop.

    python train.py                                                the embedded tiny task, to the end
    python train.py --teacher qwen --student gpt2 --data dolly     the papers' pair
    python train.py --teacher DIR --student DIR --data FILE.jsonl  your own
    torchrun --nproc_per_node=N train.py --teacher ...             on N devices, see docs/multi_gpu.md

The loop is `run_updates`, one update `distil`, what the methods need of the teacher `Method`, and what the terms mean
is in losses.py. The options are in runtime/options.py; runtime/run.py keeps the run directory.
"""

import hashlib
import json
import math
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import fast.losses
import lora
import losses
from align import (
    Deviations,
    ResponseTokens,
    cross_model_attention,
    deviations,
    prediction_map,
    teacher_moments,
    vocabulary_overlap,
)
from baselines import mined, uld
from baselines.seqkd import teacher_answers
from data import (
    Batch,
    Example,
    Row,
    TextTokenizer,
    ahead,
    collate,
    cut_prompt,
    padding_share,
    read_jsonl,
    sampled_row,
    split_update,
    tokenise,
    total_length,
    update_order,
    without_responses,
)
from eval import held_out_cross_entropy, respond, score
from fast.cache import TeacherCache, model_digest
from fast.cpu import by_onednn, keep_freed_memory, packed, put_on
from losses import RECIPES, Counts, predict_tokens
from model import build_model, generate, hidden_at, load_model, read_json
from projector import Projectors
from runtime import parallel
from runtime.hub import data_file, model_directory
from runtime.options import Options, check, flags, parse, say_settings, say_teacher, settings, teacher_stage
from runtime.run import (
    Meter,
    RunDirectory,
    Stopped,
    chat_of,
    check_directory,
    finish_stage,
    run_of,
    say_how_to_go_on,
    seconds_of_finished_stage,
    tokenizer_of,
    write_text,
)
from runtime.strict import check_model, choose_alignment, fit_lengths, read_projectors

# ---------------------------------------------------------------------------------------------------------------------
# The method

PAIRINGS = {"uld": uld.pair_by_position, "mined": mined.pair_by_edit_distance}  # methods that pair tokens themselves


@dataclass
class TeacherAnswer:
    """What the frozen teacher says about one batch, at the positions that are compared."""

    hidden: Tensor  # (K, D) its states; of all its response positions where tokens are not paired
    rows: Tensor | slice  # (K,) the student token that each is compared with; slice(None): all, in order
    label: Tensor | None = None  # (K,) DSKD: what the projected teacher should predict, as a token of the student


@dataclass
class Totals:
    """The normalisers of one update, over all its batches and all processes."""

    counts: Counts  # of the responses that L_kd is on
    gold: Counts  # of the gold ones: the same, unless the student sampled
    std: Deviations | None = None  # CMA's


class Method(nn.Module):
    """What a method needs beside the student: the frozen teacher, the projectors, and how the two vocabularies relate.

    Its parameters are the projectors' alone: the teacher is neither trained nor saved. `teacher` is None for sft.
    """

    def __init__(
        self,
        o: Options,
        student: nn.Module,
        student_tokenizer: TextTokenizer,
        teacher: nn.Module | None = None,
        teacher_tokenizer: TextTokenizer | None = None,
    ):
        super().__init__()
        self.o, self.name, self.align, self.projectors, self.recipe = o, o.method, "none", None, None
        self.objective = fast.losses if o.chunk else losses
        if o.method == "sft":
            return
        self._teacher = [teacher.requires_grad_(False).eval()]  # in a list: not a submodule
        self.align = choose_alignment(o.align, o.method, o.recipe, teacher_tokenizer, student_tokenizer)
        device, shared = student.head_weight.device, slice(min(len(student.head_weight), len(teacher.head_weight)))
        self.teacher_shared = self.student_shared = shared  # rows of both heads; one tokenizer, perhaps padded heads
        both = teacher_tokenizer.tokenizer, student_tokenizer.tokenizer
        ends = teacher_tokenizer.eos_id, student_tokenizer.eos_id
        if self.align == "eta":
            overlap = vocabulary_overlap(*both, *ends)
            self.teacher_shared, self.student_shared = (torch.from_numpy(ids).to(device) for ids in overlap)
            mapped = prediction_map(*both, *ends, size=len(teacher.head_weight))
            self.register_buffer("student_token", torch.from_numpy(mapped).to(device), persistent=False)
        elif self.align == "mined":
            columns = mined.mapped_columns(mined.edit_distance_ids(teacher_tokenizer, student_tokenizer), both[0])
            self.columns = [torch.from_numpy(ids).to(device) for ids in columns]  # (teacher ids, student ids)
        if o.method == "dskd":
            self.recipe = RECIPES[o.recipe, self.align]
            heads = student.head_weight, teacher.head_weight
            if o.recipe == "v2":
                heads = self.shared_head(student), teacher.head_weight[self.teacher_shared].float()
            widths = [head.shape[1] for head in heads]
            given = read_projectors(o.projectors, *widths, self.align) if o.projectors else {}
            self.projectors = Projectors(*heads, o.recipe, query=self.align == "cma", given=given)

    @property
    def teacher(self) -> nn.Module:
        return self._teacher[0]

    @property
    def predicting_head(self) -> Tensor | None:
        """(V, D) the teacher's head over what it may predict; None where the method does not ask for predictions."""
        if self.recipe is None or self.recipe.labels != "teacher":
            return None
        return self.teacher.head_weight if self.align == "eta" else self.teacher.head_weight[self.teacher_shared]

    def shared_head(self, student: nn.Module) -> Tensor:
        """(V, d) the student's head over the shared vocabulary, in float32."""
        return student.head_weight.detach()[self.student_shared].float()

    def refresh(self, student: nn.Module) -> None:
        """Once per update, before its losses: s2t for the student head as it is now, where it is solved (v2)."""
        if self.projectors is not None and self.projectors.teacher_inverse is not None:
            self.projectors.refresh_s2t(self.shared_head(student))

    @torch.no_grad()
    def ask_teacher(self, batch: Batch) -> TeacherAnswer | None:
        """The teacher's forward pass, or what the batch has of an earlier one (fast/cache.py); None for sft."""
        if self.name == "sft":
            return None
        hidden, predicted = batch.teacher_hidden, batch.teacher_predictions
        hidden = hidden_at(self.teacher, batch.teacher) if hidden is None else hidden.to(self.teacher.head_weight.dtype)
        if self.name != "dskd":
            if self.name in PAIRINGS:
                return TeacherAnswer(hidden[batch.teacher_index], batch.student_index)
            return TeacherAnswer(hidden, slice(None))
        if self.align == "eta":
            hidden = hidden[batch.teacher_index]
            predicted = None if predicted is None else predicted[batch.teacher_index]
        if self.recipe.labels == "gold":
            return TeacherAnswer(hidden, slice(None), batch.student.labels)
        predicted = predict_tokens(hidden, self.predicting_head) if predicted is None else predicted
        if self.align == "none":
            return TeacherAnswer(hidden, slice(None), predicted)
        label = self.student_token[predicted]
        known = label >= 0  # eq. 14: only pairs whose prediction exists in the student's vocabulary
        return TeacherAnswer(hidden[known], batch.student_index[known], label[known])

    @torch.no_grad()
    def count(self, student: nn.Module, compared: list[Batch], said: list, gold: list[Batch]) -> Totals:
        """The normalisers of an update: from the batches that L_kd is on, what the teacher says about each, and the
        gold batches. Neither the projected teacher nor its label depends on the student's states, so that the agreeing
        ones can be counted before the first loss."""
        tokens, gold_tokens = (sum(len(batch.student.labels) for batch in batches) for batches in (compared, gold))
        pairs = agreeing = 0
        moments: list[float] = []
        if self.recipe is not None:
            pairs = sum(len(answer.label) for answer in said)
        if self.recipe is not None and self.recipe.average_stu == "agreeing":
            for answer in said:
                predicted = predict_tokens(self.projectors.t2s(answer.hidden), student.head_weight)
                agreeing += int((predicted == answer.label).sum())
        if self.align == "cma":
            each = [teacher_moments(self.teacher_tokens(*both)) for both in zip(compared, said, strict=True)]
            moments = [sum(column) for column in zip(*each, strict=True)]
        tokens, gold_tokens, pairs, agreeing, *moments = parallel.add_up(
            [tokens, gold_tokens, pairs, agreeing, *moments]
        )
        return Totals(Counts(tokens, pairs, agreeing), Counts(gold_tokens), deviations(moments) if moments else None)

    def teacher_tokens(self, batch: Batch, answer: TeacherAnswer) -> ResponseTokens:
        side = batch.teacher
        return ResponseTokens(side.inputs, side.labels, side.lengths, self.teacher.embed.weight, answer.hidden)

    def loss(self, student, batch: Batch, answer: TeacherAnswer | None, totals: Totals, is_gold=True) -> dict:
        """{ce, ..., kd, loss}: this batch's part of the update's terms, and the loss, on which to call backward().

        Without the teacher's `answer`: the gold part alone (sft, and the gold side of on-policy distillation). Not
        `is_gold`: L_kd alone (its sampled side). `student` may be compiled; its head is read from it.
        """
        o, side, head = self.o, batch.student, student.head_weight
        hidden, gold = hidden_at(student, side), side.labels if is_gold else None  # (N, d), (N,)
        chunk = {"chunk": o.chunk} if o.chunk else {}
        if answer is None:
            rate = 0.0 if self.name == "sft" else o.kd_rate
            return self.objective.sft_loss(hidden, side.labels, head, totals.gold, rate, **chunk)
        teacher_head, counts = self.teacher.head_weight, totals.counts
        if self.name == "kd":
            options = o.divergence, o.temperature, o.kd_rate
            return self.objective.kd_loss(hidden, gold, answer.hidden, head, teacher_head, counts, *options, **chunk)
        states = hidden, gold, answer.rows, answer.hidden, head, teacher_head
        if self.name == "uld":
            return uld.uld_loss(*states, counts, o.kd_rate, **chunk)
        if self.name == "mined":
            return mined.mined_loss(*states, *self.columns, counts, o.temperature, o.kd_rate, **chunk)

        if self.align == "cma":
            ours = ResponseTokens(side.inputs, side.labels, side.lengths, student.embed.weight, hidden)
            theirs = self.teacher_tokens(batch, answer)
            t2s_hidden, s2t_hidden = cross_model_attention(ours, theirs, self.projectors, totals.std)
        else:
            t2s_hidden, s2t_hidden = self.projectors.t2s(answer.hidden), self.projectors.s2t(hidden[answer.rows])
        return self.objective.dskd_loss(
            hidden, gold, answer.rows, t2s_hidden, answer.label, s2t_hidden, answer.hidden, head, teacher_head,
            counts, self.recipe, o.divergence, o.temperature, o.kd_rate, **chunk,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Loading


@dataclass
class Pieces:
    """A run's models, tokenizers and data, loaded and checked against each other."""

    student: nn.Module
    student_tokenizer: TextTokenizer
    method: Method
    teacher_tokenizer: TextTokenizer | None
    rows: list[Row]  # to train on
    examples: list[Example] = field(default_factory=list)  # what they are made of
    valid_rows: list[Row] = field(default_factory=list)  # held out
    valid: list[Example] = field(default_factory=list)
    frozen: str = ""  # sha256 of the models that are read and not trained, for --resume; in process 0 alone

    @cached_property
    def digest(self) -> str:
        """sha256 of all training examples' tokens, in order, by which --resume knows that they are the same."""
        hasher = hashlib.sha256()
        for row in self.rows:
            for ids in (part for side in (row.student, row.teacher) if side for part in (side.prompt, side.response)):
                hasher.update(np.array([len(ids), *ids], np.int64).tobytes())
        return hasher.hexdigest()

    def collate(self, rows: list[Row], device) -> Batch:
        pad = self.teacher_tokenizer.eos_id if self.teacher_tokenizer else 0
        return collate(rows, self.student_tokenizer.eos_id, pad).to(device)

    def batches(self, rows: list[Row], o: Options, count: int = 0) -> list[Batch]:
        """The rows of one update as batches of --batch-size, or of --tokens-per-batch; at least `count` of them, the
        last of which then have no row: processes that share a model's weights must run it equally often."""
        parts = split_update(rows, o.batch_size, o.tokens_per_batch)
        parts += [[]] * (count - len(parts))
        batches = [(part, self.collate(part or self.rows[:1], o.device)) for part in parts]
        return [batch if part else without_responses(batch) for part, batch in batches]


def find_model(name: str, role: str, weights: bool = True) -> Path:
    """The directory of a model ("tiny": the embedded task's). Raises if it lacks something, or cannot be used."""
    if name == "tiny":
        from experiments import tiny  # which imports this file

        directory = tiny.find(role)
    else:
        directory = model_directory(name, weights)
    check_model(directory, weights)
    return directory


def find_data(name: str, split: str) -> list[Example]:
    if name == "tiny":
        from experiments import tiny

        name = str(tiny.find("data"))
    return read_jsonl(*data_file(name, split))


def load(o: Options) -> Pieces:
    """Everything a run needs. Whatever is wrong with the input is found here, before the first update."""
    student_directory, teacher_directory, tokenizer, teacher_tokenizer = open_tokenizers(o)
    align = "none"
    if o.method not in ("sft", "seqkd"):
        align = choose_alignment(o.align, o.method, o.recipe, teacher_tokenizer, tokenizer)
    examples = find_data(o.data, "train")
    valid = find_data(o.valid, "valid") if o.valid and not o.dry_run else []
    torch.manual_seed(o.seed)
    student = load_student(o, student_directory, tokenizer)

    dtype, method = torch.bfloat16 if o.dtype == "bf16" else torch.float32, o
    first_lines = o.batch_size if o.dry_run else None
    if o.method == "seqkd":  # from here on it is supervised fine-tuning
        with parallel.main_first():
            examples = teacher_answers(
                Path(o.out) / "seqkd.jsonl", examples, teacher_directory, teacher_tokenizer, tokenizer,
                o.max_len, o.max_prompt_len, o.seqkd_temperature, o.seed, o.batch_size, o.device, dtype, first_lines,
            )  # fmt: skip
        method, teacher_tokenizer = replace(o, method="sft"), None
    examples = examples[:first_lines]
    rows, report = tokenise(examples, tokenizer, teacher_tokenizer, o.max_len, o.max_prompt_len, align)
    print(f"train: {report}", file=sys.stderr)
    if o.method in PAIRINGS:
        for row in rows:
            row.pairs = PAIRINGS[o.method](row, tokenizer, teacher_tokenizer)
    valid_rows, report = tokenise(valid, tokenizer, None, o.max_len, o.max_prompt_len)
    if valid:
        print(f"valid: {report}", file=sys.stderr)

    teacher = load_teacher(o, teacher_directory, teacher_tokenizer, dtype) if teacher_tokenizer else None
    if o.cache_teacher is not None:  # made, if it is not there, while the student is not on the device yet
        cache = TeacherCache(o.cache_teacher, teacher_directory, rows, dtype, o.device, o.batch_size)
        with parallel.main_first():
            cache.attach_states(o.compile)
    if o.shard in ("student", "both"):
        parallel.shard(student, o.device, torch.bfloat16 if o.dtype == "bf16" else None)
    student.to(o.device)
    with parallel.main_first():  # it may leave MinED's map and the teacher's predictions for the others
        made = Method(method, student, tokenizer, teacher, teacher_tokenizer)
        if o.cache_teacher is not None and made.predicting_head is not None:
            cache.attach_predictions(made.predicting_head)
    untrained = [teacher_directory] if teacher is not None else []
    untrained += [student_directory] if o.lora else []
    frozen = "" if o.dry_run or parallel.rank() > 0 else model_digest(*untrained)
    return Pieces(student, tokenizer, made, teacher_tokenizer, rows, examples, valid_rows, valid, frozen)


def open_tokenizers(o: Options) -> tuple[Path, Path | None, TextTokenizer, TextTokenizer | None]:
    """Both models' directories and tokenizers, and the options that follow from them; no weights yet."""
    student_directory, teacher_directory = find_model(o.student, "student", weights=not o.from_scratch), None
    o.student_chat = o.student_chat or chat_of(student_directory)
    tokenizer, teacher_tokenizer = tokenizer_of(student_directory, o.student_chat, o.bos), None
    tokenizer.say_if_forgotten("--student-chat", o.bos is None and not o.from_scratch)
    if o.method != "sft":
        teacher_directory = find_model(o.teacher, "teacher")
        o.teacher_chat = o.teacher_chat or chat_of(teacher_directory)
        teacher_tokenizer = tokenizer_of(teacher_directory, o.teacher_chat, o.bos)
        teacher_tokenizer.say_if_forgotten("--teacher-chat", o.bos is None)
    fit_lengths(o, {"student": student_directory} | ({"teacher": teacher_directory} if teacher_directory else {}))
    return student_directory, teacher_directory, tokenizer, teacher_tokenizer


def load_student(o: Options, directory: Path, tokenizer: TextTokenizer) -> nn.Module:
    """On the CPU, in float32, with its adapters."""
    student = build_model(read_json(directory / "config.json")) if o.from_scratch else load_model(directory)
    tokenizer.check_model(student.embed.weight.shape[0])
    if o.lora:
        o.lora_targets = lora.default_targets(student) if o.lora_targets is None else o.lora_targets
        try:
            lora.attach(student, o.lora, o.lora_alpha, o.lora_dropout, o.lora_targets)
        except ValueError as error:  # of all its arguments only the targets have not been checked against the model yet
            raise ValueError(f"--lora-targets: {error}") from None
        trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
        print(f"LoRA on {', '.join(o.lora_targets)}: {trained:,} parameters are trained", file=sys.stderr)
    student.recompute = o.recompute
    if torch.device(o.device).type == "cpu":
        put_on(student)
    return student


def load_teacher(o: Options, directory: Path, tokenizer: TextTokenizer, dtype: torch.dtype) -> nn.Module:
    """Frozen, so that half precision is enough where the arithmetic is bf16 anyway; with a cache, its head alone."""
    if o.shard in ("teacher", "both"):
        teacher = parallel.load_sharded(directory, dtype, o.device)
    else:
        teacher = load_model(directory, dtype, o.device, body=o.cache_teacher is None)
    tokenizer.check_model(teacher.embed.weight.shape[0])
    teacher.requires_grad_(False)
    return parallel.compile_model(teacher) if o.compile else teacher


# ---------------------------------------------------------------------------------------------------------------------
# One update


def autocast(o: Options) -> torch.autocast:
    return torch.autocast(torch.device(o.device).type, torch.bfloat16, enabled=o.dtype == "bf16")


@contextmanager
def gather_parameters(o: Options, pieces: Pieces) -> Iterator[None]:
    """For scores and samples: the student as it is, in float32; a sharded one in the dtype it is trained in."""
    sharded = parallel.is_sharded(pieces.student)
    with parallel.gather_parameters(pieces.student), autocast(o) if sharded else nullcontext():
        yield


def is_on_policy(o: Options, step: int, updates_per_epoch: int) -> bool:
    """Whether update `step` distils on sampled responses: none of the first --on-policy-after epochs, then with
    probability --on-policy. A function of its arguments alone, so that a resumed run, and every process of one run,
    decides alike."""
    if step < o.on_policy_after * updates_per_epoch:
        return False
    return random.Random(f"{o.seed} on-policy {step}").random() < o.on_policy


def sample_rows(o: Options, pieces: Pieces, rows: list[Row], step: int) -> tuple[list[Row], int]:
    """The rows with responses sampled from the student as it is now (v2, eq. 18; T = 1, the whole distribution, no
    dropout, no gradient), and how many tokens were sampled. Seeded by (seed, step), like `is_on_policy`,
    and the process, each of which samples for its own share of the update.

    All these responses are sampled together: so they do not depend on how the share is split, and it is faster.
    """
    seed = random.Random(f"{o.seed} sample {step}" + f" {parallel.rank()}" * (parallel.rank() > 0)).getrandbits(63)
    tokenizer, prompts = pieces.student_tokenizer, [row.student.prompt for row in rows]
    room = [o.max_len - len(prompt) for prompt in prompts]
    responses, failure = [], None
    with autocast(o), parallel.gather_parameters(pieces.student), packed(pieces.student):
        try:
            responses = generate(pieces.student, prompts, room, tokenizer.end_ids, seed=seed, vocabulary=tokenizer.size)
        except FloatingPointError as error:
            failure = error
    if parallel.highest(failure is not None):  # all processes have it, or none
        raise failure or FloatingPointError("sample: the logits of another process are not finite")
    both = tokenizer, pieces.teacher_tokenizer, o.max_len, pieces.method.align
    sampled = [sampled_row(row, response, *both) for row, response in zip(rows, responses, strict=True)]
    return sampled, sum(map(len, responses))


def sample_batches(o: Options, pieces: Pieces, rows: list[Row], step: int, meter: Meter) -> tuple[list[Row], list]:
    """The sampled rows, and the batches of them."""
    began = time.perf_counter()
    sampled, tokens = sample_rows(o, pieces, rows, step)
    meter.count_generation(time.perf_counter() - began, tokens, len(sampled))
    count = parallel.highest(len(split_update(sampled, o.batch_size, o.tokens_per_batch)))
    return sampled, pieces.batches(sampled, o, count)


def distil(o: Options, pieces: Pieces, student, batches: list, sampled: list | None = None) -> dict[str, float]:
    """Loss terms of one update over its batches, with their gradient added up, also over all processes. `sampled`:
    batches of responses that the student sampled, which L_kd is on instead of the gold ones (v2, eq. 18). Raises
    FloatingPointError for a term that is not finite, naming it."""
    method, compared = pieces.method, sampled or batches
    method.refresh(pieces.student)
    with autocast(o):
        said = [method.ask_teacher(batch) for batch in compared]
        totals = method.count(pieces.student, compared, said, batches)
    parts = [(batch, None, True) for batch in batches] if sampled else []
    parts += [(batch, answer, not sampled) for batch, answer in zip(compared, said, strict=True)]
    names: list[str] = []
    values = []
    for batch, answer, is_gold in parts:
        with autocast(o):
            terms = method.loss(student, batch, answer, totals, is_gold)
        terms["loss"].backward()
        names += terms
        values += [value.detach().float() for value in terms.values()]
    sums: dict[str, float] = {}
    for name, value in zip(names, torch.stack(values).tolist(), strict=True):  # the one wait for the device
        sums[name] = sums.get(name, 0.0) + value
    ratios = [ratio for batch in compared for ratio in batch.align_ratios]
    teacher_tokens = sum(len(batch.teacher.labels) for batch in compared if batch.teacher is not None)
    sums |= {"teacher_tokens": teacher_tokens, "ratios": sum(ratios), "examples": len(ratios)}
    sums = dict(zip(sums, parallel.add_up(list(sums.values())), strict=True))
    for name, value in sums.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"{name} is {value}")
    parallel.add_gradients([*pieces.student.parameters(), *method.parameters()])
    return summarise(sums, totals, method)


def summarise(sums: dict[str, float], totals: Totals, method: Method) -> dict[str, float]:
    """Counts turned into the ratios that are logged."""
    sums["accuracy"] = sums.pop("correct") / totals.gold.tokens
    if "agreeing" in sums:
        sums["t2s_agreement"] = sums.pop("agreeing") / max(totals.counts.pairs, 1)
    ratios, examples, teacher_tokens = (sums.pop(name) for name in ("ratios", "examples", "teacher_tokens"))
    if method.align in ("eta", "mined"):
        sums["align_ratio"] = ratios / examples
    sums["student_tokens"] = totals.counts.tokens
    if method.name != "sft":
        sums["teacher_tokens"] = teacher_tokens
    return sums


def make_optimizer(o: Options, pieces: Pieces) -> torch.optim.AdamW:
    """AdamW with weight decay on the student's matrices (with LoRA those of its adapters), none on its vectors, and on
    all of the projectors, v1's biases too, as in the official code. The projectors have their own rate."""
    parameters = [p for p in pieces.student.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "lr": o.lr, "weight_decay": o.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "lr": o.lr, "weight_decay": 0.0},
    ]
    projectors = [p for p in pieces.method.parameters() if p.requires_grad]
    if projectors:
        groups.append({"params": projectors, "lr": o.projector_lr, "weight_decay": o.weight_decay})
    groups = [{**group, "params": part} for group in groups for part in parallel.split_by_placement(group["params"])]
    for group in groups:
        group["peak"] = group["lr"]
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=torch.device(o.device).type in ("cuda", "cpu"))


def schedule(step: int, total: int, warmup: int) -> float:
    """Share of the peak learning rate at update `step` of `total`: linear warm-up, then cosine decay to zero."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def train(o: Options, description: str = "train") -> dict[str, float]:
    """One run, from options to a run directory; returns the last logged line. docs/log.md says what is logged.

    Raises Stopped when Ctrl-C or SIGTERM ended it early, FloatingPointError when a number was not finite.
    """
    o = check(o)
    if torch.device(o.device).type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, for all that autocast leaves in float32
    else:
        keep_freed_memory()
    if not o.dry_run:
        check_directory(o)
    with by_onednn(o.device):
        pieces = load(o)
        student = parallel.compile_model(pieces.student) if o.compile else pieces.student
        return dry_run(o, pieces, student) if o.dry_run else run_updates(o, pieces, student, description)


def run_updates(o: Options, pieces: Pieces, student, description: str = "train") -> dict[str, float]:
    """The updates that are still to be done; returns the last logged line. `student`: compiled, or the same."""
    optimizer = make_optimizer(o, pieces)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    per_epoch = -(-len(pieces.rows) // examples_per_update(o))
    total = o.max_steps or o.epochs * per_epoch
    say_padding(o, pieces, per_epoch)

    with RunDirectory(o, pieces, optimizer, total, per_epoch, description) as run:  # lock, log, checkpoints, Ctrl-C
        pieces.student.train()
        for step, (indices, rows, batches) in enumerate(ahead(prepare_updates(o, pieces, run.start, total)), run.start):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(step, total, o.warmup)

            # One update: forward and backward pass of every batch. The loss is a mean over the tokens of them all.
            with run.save_state_on_failure(step, indices):  # and name the examples of a term that is not finite
                sampled, sampled_batches = [], []
                if is_on_policy(o, step, per_epoch):
                    sampled, sampled_batches = sample_batches(o, pieces, rows, step, run.meter)
                terms = distil(o, pieces, student, batches, sampled_batches)
                terms["grad_norm"] = parallel.clip_gradients(parameters, o.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            done = step + 1
            run.log(done, terms, rows, sampled)
            if run.is_due(done) or run.asked_to_stop():
                run.check_weights(done)
                run.save(done, held_out_scores(o, pieces) if run.is_due(done) else {})  # Stopped, if that was asked
        run.progress.close()
        write_samples(o, pieces)
    return run.line


def say_padding(o: Options, pieces: Pieces, per_epoch: int) -> None:
    first_epoch = ([pieces.rows[i] for i in update] for update in islice(make_order(o, pieces), per_epoch))
    parts = [part for rows in first_epoch for share in split_of_all(o, rows) for part in share]
    padding = f"{padding_share(parts):.1%} of their positions are padding, which attention alone computes"
    print(f"{len(parts)} batches per epoch, {padding}", file=sys.stderr)


def make_order(o: Options, pieces: Pieces, start: int = 0) -> Iterator[list[int]]:
    """The examples of each update from the `start`-th on, as indices."""
    lengths = [total_length(row) for row in pieces.rows] if o.bucket else None
    return update_order(len(pieces.rows), examples_per_update(o), o.seed, start, lengths)


def examples_per_update(o: Options) -> int:
    return o.batch_size * o.grad_accum * parallel.world()


def split_of_all(o: Options, rows: list[Row]) -> list[list[list[Row]]]:
    """The forward passes of every process in an update over these rows."""
    shares = [parallel.share(rows, process) for process in range(parallel.world())]
    return [split_update(share, o.batch_size, o.tokens_per_batch) for share in shares]


def prepare_updates(o: Options, pieces: Pieces, start: int, total: int) -> Iterator[tuple]:
    """Each update's indices, and this process's rows and batches of it: all that is known before the update."""
    for indices in islice(make_order(o, pieces, start), total - start):
        rows = [pieces.rows[i] for i in indices]
        count = max(map(len, split_of_all(o, rows)))
        rows = parallel.share(rows, parallel.rank())
        yield indices, rows, pieces.batches(rows, o, count)


def dry_run(o: Options, pieces: Pieces, student) -> dict[str, float]:
    """The loss terms and the student's gradient norm on the first batch; dropout is off, so that others can compare."""
    pieces.student.eval()
    terms = distil(o, pieces, student, [pieces.collate(pieces.rows, o.device)])
    gradients = [p.grad.flatten() for p in pieces.student.parameters() if p.grad is not None]
    terms["grad_norm"] = float(torch.cat(gradients).norm())
    names = "loss ce kd t2s_ce t2s_kd s2t_kd t2s_agreement align_ratio student_tokens teacher_tokens grad_norm".split()
    return {name: terms[name] for name in names if name in terms}


def held_out_scores(o: Options, pieces: Pieces) -> dict[str, float]:
    """{valid_ce, and with --keep-best rouge valid_rouge_l}; {} without --valid."""
    scores = {}
    if pieces.valid_rows:
        scores["valid_ce"] = valid_cross_entropy(o, pieces)
        if o.keep_best == "rouge":
            scores["valid_rouge_l"] = valid_rouge_l(o, pieces)
    return scores


def valid_cross_entropy(o: Options, pieces: Pieces) -> float:
    """Of all held-out rows, of which each process scores its share."""
    rows, total = parallel.share(pieces.valid_rows, parallel.rank()), 0.0
    tokens = sum(len(row.student.response) for row in rows)
    with gather_parameters(o, pieces):
        if rows:
            eos_id = pieces.student_tokenizer.eos_id
            total = tokens * held_out_cross_entropy(pieces.student, rows, eos_id, o.device)
    total, tokens = parallel.add_up([total, tokens])
    return total / tokens


def valid_rouge_l(o: Options, pieces: Pieces) -> float:
    """Held-out Rouge-L in per cent, of responses that are sampled as eval.py does, with one seed; each process answers
    its share of the prompts."""
    examples, tokenizer, total = parallel.share(pieces.valid, parallel.rank()), pieces.student_tokenizer, 0.0
    room = min(o.max_prompt_len, o.max_len - 1)
    prompts = [cut_prompt(example, [tokenizer], room) for example in examples]
    with gather_parameters(o, pieces):
        if examples:
            responses = respond(pieces.student, tokenizer, prompts, o.max_len - room, temperature=1.0, seed=o.seed)
            total = len(examples) * score(responses, examples)["rouge_l"]
    total, count = parallel.add_up([total, len(examples)])
    return total / count


def write_samples(o: Options, pieces: Pieces) -> None:
    """samples.txt: greedy responses of student/ to a few held-out (else training) prompts."""
    tokenizer, room = pieces.student_tokenizer, min(o.max_prompt_len, o.max_len - 1)
    prompts = [cut_prompt(example, [tokenizer], room) for example in (pieces.valid or pieces.examples)[:5]]
    longest = max(len(tokenizer.encode_prompt(prompt)) for prompt in prompts)
    with gather_parameters(o, pieces):
        if parallel.rank() > 0:
            return
        student = load_model(Path(o.out) / "student", device=o.device) if o.keep_best else pieces.student
        responses = respond(student, tokenizer, prompts, min(128, max(pieces.student.limit - longest, 1)))
    shown = zip(prompts, responses, strict=True)
    text = "\n\n".join(f"### prompt\n{prompt}\n### response\n{response}" for prompt, response in shown)
    write_text(Path(o.out) / "samples.txt", text + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def main(arguments: list[str] | None = None) -> None:
    with parallel.session():
        given = parse(arguments, __doc__)
        try:
            run(given)
        except (ValueError, OSError, FloatingPointError) as error:
            sys.exit(f"error: {error}")
        except (KeyboardInterrupt, Stopped) as stopped:  # at once, or after saving
            print(f"\n{str(stopped) or 'stopped at once'}\n{say_how_to_go_on(given, arguments)}", file=sys.stderr)
            sys.exit(128 + getattr(stopped, "number", signal.SIGINT))


def run(given: dict) -> None:
    """What a command line asks for."""
    if not given.keys() & {"student", "teacher", "data"}:
        if given.get("dry_run"):
            raise ValueError("--dry-run needs --teacher, --student and --data: the embedded task trains its own")
        if given.keys() & {"task", "teacher_sft"}:
            raise ValueError("--task, --teacher-sft: the embedded task has its own settings and trains its teacher")
        if parallel.by_torchrun():
            raise ValueError("torchrun needs --student and --data: the embedded task is for one process")
        from experiments import tiny  # which imports this file

        tiny.run(given)
        return
    o = check(Options(**settings(given)))
    say_settings(given)
    if given.get("teacher_sft"):
        o = run_teacher_stage(given, o)
    elif o.method != "sft":
        teacher = find_model(o.teacher, "teacher")
        say_teacher(given, o, teacher, run_of(teacher))
    if o.dry_run:
        print(json.dumps(train(o)))
    else:
        train(o)
        print(f"student: {Path(o.out) / 'student'}")


def run_teacher_stage(given: dict, o: Options) -> Options:
    """Fine-tune the teacher, or keep what is finished; returns the options with that teacher. Raises before the stage
    begins where the run after it could not."""
    if o.method == "sft" or o.dry_run:
        raise ValueError("--teacher-sft belongs to training with a teacher, not to --method sft or --dry-run")
    stage = teacher_stage(given, o.out)
    after = replace(o, teacher=str(Path(stage["out"]) / "student"), teacher_chat=None)
    check_directory(after)
    base, student = find_model(o.teacher, "teacher"), find_model(o.student, "student", weights=not o.from_scratch)
    tokenizers = tokenizer_of(base, o.teacher_chat), tokenizer_of(student, o.student_chat)
    if o.method != "seqkd":
        choose_alignment(o.align, o.method, o.recipe, *tokenizers)
    print(f"teacher: {base}, fine-tuned first:\n    python train.py {flags(stage)}", file=sys.stderr)
    run_stage(Options(**stage), "teacher")
    return after


def run_stage(o: Options, name: str) -> float:
    """Train one stage, or keep it if it is finished; an interrupted one goes on. Returns its seconds of training."""
    seconds = seconds_of_finished_stage(o)
    if seconds is None:
        o.resume, began = (Path(o.out) / "args.json").is_file(), time.perf_counter()
        train(o, description=f"{name:8}")
        seconds = time.perf_counter() - began
        finish_stage(o, seconds)
    return seconds


if __name__ == "__main__":
    main()
    parallel.leave()
