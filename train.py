"""Distil a teacher into a student: the one training loop, and what is loaded for it.

    python train.py                                                the embedded tiny task, to the end
    python train.py --teacher qwen --student gpt2 --data dolly     the papers' pair
    python train.py --teacher DIR --student DIR --data FILE.jsonl  your own
    torchrun --nproc_per_node=N train.py --teacher ...             on N devices, see parallel.py

The loop is `run_updates`. The options are in options.py, what one update does in distill.py, what the terms mean in
losses.py.
"""

import ctypes
import hashlib
import json
import math
import os
import random
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

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
from eval import held_out_cross_entropy, respond
from fast.cache import TeacherCache
from fast.cpu import by_onednn, packed
from losses import RECIPES, Counts, predict_tokens
from model import build_model, generate, hidden_at, load_model, read_config, read_json
from projector import Projectors
from runtime import parallel
from runtime.hub import MODELS, data_file, model_directory
from runtime.options import Options, check, flags, parse, say_settings, settings, teacher_stage
from runtime.run import (
    Log,
    Stopped,
    StopSignals,
    chat_of,
    check_directory,
    hold_directory,
    random_state,
    restore_checkpoint,
    run_of,
    save_checkpoint,
    set_random_state,
    write_text,
)
from runtime.strict import choose_alignment, read_projectors

# ---------------------------------------------------------------------------------------------------------------------
# The stage before distillation


def run_teacher_stage(given: dict, o: Options) -> Options:
    """Fine-tune the teacher, or keep what is finished; returns the options with that teacher. Raises before the stage
    begins where the run after it could not."""
    if o.method == "sft" or o.dry_run:
        raise ValueError("--teacher-sft belongs to training with a teacher, not to --method sft or --dry-run")
    stage = teacher_stage(given, o.out)
    after = replace(o, teacher=str(Path(stage["out"]) / "student"), teacher_chat=None)
    check_directory(after)
    base, student = model_directory(o.teacher), model_directory(o.student, weights=not o.from_scratch)
    tokenizers = [TextTokenizer(base, o.teacher_chat or chat_of(base)),
                  TextTokenizer(student, o.student_chat or chat_of(student))]  # fmt: skip
    if o.method != "seqkd":
        choose_alignment(o.align, o.method, o.recipe, *tokenizers)
    print(f"teacher: {base}, fine-tuned first:\n    python train.py {flags(stage)}", file=sys.stderr)
    run_stage(Options(**stage), "teacher")
    return after


def run_stage(o: Options, name: str) -> float:
    """Train one stage, or keep it if it is finished; an interrupted one goes on. Returns its seconds of training."""
    directory, asked = Path(o.out), asdict(replace(o, resume=False))
    if (directory / "finished.json").is_file():
        finished = read_json(directory / "finished.json")
        before = finished["options"]
        changed = [key for key in asked if asked[key] != before.get(key, asked[key])]
        if changed:
            raise ValueError(
                f"{directory} was trained with --{changed[0].replace('_', '-')} {before[changed[0]]!r}; "
                "give another --out, or remove it to train it again"
            )
        return finished["seconds"]
    o.resume = (directory / "args.json").is_file()  # interrupted: it goes on
    start = time.perf_counter()
    train(o, description=f"{name:8}")
    seconds = time.perf_counter() - start
    write_text(directory / "finished.json", json.dumps({"seconds": seconds, "options": asked}) + "\n")
    return seconds


def of_embedded_task(name: str | None, role: str) -> Path | None:
    """What the name "tiny" stands for as a student, teacher or data; None for other names."""
    if name != "tiny":
        return None
    from experiments import tiny  # which imports this file

    return tiny.find(role)


def say_teacher(given: dict, o: Options) -> None:
    """On standard error: which checkpoint the teacher is and what is known of its training; where that is not on this
    data, the command for it."""
    directory = of_embedded_task(o.teacher, "teacher") or model_directory(o.teacher)
    run = run_of(directory)
    if run:
        line = f"teacher: {directory}, trained here: --method {run.get('method')} on --data {run.get('data')}"
        same = Path(run.get("data", "")).resolve() == Path(o.data).resolve()
        print(line + ("" if same else f"; this run is on --data {o.data}"), file=sys.stderr)
        return
    published = directory != Path(o.teacher)  # came from the hub, under a preset's or a repository's name
    known = f"the model as {MODELS.get(o.teacher, o.teacher)} publishes it" if published else "of no run (no args.json)"
    which = f"it has not been fine-tuned on --data {o.data}" if published else f"whether it knows {o.data} is not known"
    print(
        f"teacher: {directory}, {known}; {which}. The papers do that first:\n"
        f"    python train.py {flags(teacher_stage(given, o.out))}\n"
        f"and then --teacher {o.out}/teacher/student; --teacher-sft does both",
        file=sys.stderr,
    )


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

    student: torch.nn.Module
    student_tokenizer: TextTokenizer
    method: Method
    teacher_tokenizer: TextTokenizer | None
    rows: list[Row]
    valid_rows: list[Row]
    sample_prompts: list[str]
    where: list[str] = field(default_factory=list)  # "file, line 7" of each of `rows`

    @cached_property
    def digest(self) -> str:
        """sha256 of all training examples' tokens, in order, by which --resume knows that they are the same."""
        hasher = hashlib.sha256()
        for row in self.rows:
            for ids in (part for side in (row.student, row.teacher) if side for part in (side.prompt, side.response)):
                hasher.update(np.array([len(ids), *ids], np.int64).tobytes())
        return hasher.hexdigest()

    def collate(self, rows: list[Row], device):
        pad = self.teacher_tokenizer.eos_id if self.teacher_tokenizer else 0
        return collate(rows, self.student_tokenizer.eos_id, pad).to(device)

    def batches(self, rows: list[Row], o: Options, count: int = 0) -> list:
        """The rows of one update as batches of --batch-size, or of --tokens-per-batch; at least `count` of them, the
        last of which then have no row: processes that share a model's weights must run it equally often."""
        parts = split_update(rows, o.batch_size, o.tokens_per_batch)
        parts += [[]] * (count - len(parts))
        batches = [(part, self.collate(part or self.rows[:1], o.device)) for part in parts]
        return [batch if part else without_responses(batch) for part, batch in batches]


def fit_lengths(o: Options, directories: dict[str, Path]) -> None:
    """Fill in --max-len and --max-prompt-len for these models. Raises ValueError where one has too few positions."""
    files = {name: path / "config.json" for name, path in directories.items()}
    limits = {name: read_config(read_json(file), file).limit for name, file in files.items()}
    if o.max_len is None:
        o.max_len = min(512, *limits.values())
    if o.max_prompt_len is None:
        o.max_prompt_len = max(1, o.max_len // 2)
    for name, limit in limits.items():
        if o.max_len > limit:
            raise ValueError(f"--max-len {o.max_len}: the {name} has only {limit} positions")
    if 0 < o.tokens_per_batch < o.max_len:
        raise ValueError(f"--tokens-per-batch {o.tokens_per_batch}: one example may have --max-len {o.max_len}")


def compiled(model: torch.nn.Module) -> torch.nn.Module:
    """The model compiled; a sharded one block by block, as its weights come and go between them."""
    if not parallel.is_sharded(model):
        return torch.compile(model, dynamic=True)
    for block in model.blocks:
        block.compile(dynamic=True)
    return model


def load(o: Options) -> Pieces:
    """Everything a run needs. Whatever is wrong with the input is found here, before the first update."""
    student_directory = of_embedded_task(o.student, "student") or model_directory(o.student, weights=not o.from_scratch)
    o.student_chat = o.student_chat or chat_of(student_directory)
    student_tokenizer, teacher_tokenizer, teacher = TextTokenizer(student_directory, o.student_chat), None, None
    student_tokenizer.say_if_forgotten("--student-chat")
    align = "none"
    if o.method != "sft":
        teacher_directory = of_embedded_task(o.teacher, "teacher") or model_directory(o.teacher)
        o.teacher_chat = o.teacher_chat or chat_of(teacher_directory)
        teacher_tokenizer = TextTokenizer(teacher_directory, o.teacher_chat)
        teacher_tokenizer.say_if_forgotten("--teacher-chat")
        if o.method != "seqkd":  # before models are loaded
            align = choose_alignment(o.align, o.method, o.recipe, teacher_tokenizer, student_tokenizer)
    fit_lengths(o, {"student": student_directory} | ({"teacher": teacher_directory} if o.method != "sft" else {}))
    first_lines = o.batch_size if o.dry_run else None
    examples = read_jsonl(*data_file(of_embedded_task(o.data, "data") or o.data, "train"))
    valid = read_jsonl(*data_file(o.valid, "valid")) if o.valid and not o.dry_run else []

    torch.manual_seed(o.seed)
    if o.from_scratch:
        student = build_model(read_json(student_directory / "config.json"))
    else:
        student = load_model(student_directory, torch.float32)
    student_tokenizer.check_model(student.embed.weight.shape[0])
    if o.lora:
        lora.attach(student, o.lora, o.lora_alpha, o.lora_dropout)
        trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
        print(f"LoRA: {trained:,} of the student's parameters are trained", file=sys.stderr)
    method, dtype = o.method, torch.bfloat16 if o.dtype == "bf16" else torch.float32
    if o.method == "seqkd":  # from here on it is supervised fine-tuning
        with parallel.main_first():
            examples = teacher_answers(
                Path(o.out) / "seqkd.jsonl", examples, teacher_directory, teacher_tokenizer, student_tokenizer,
                o.max_len, o.max_prompt_len, o.seqkd_temperature, o.seed, o.batch_size, o.device, dtype, first_lines,
            )  # fmt: skip
        method, teacher_tokenizer = "sft", None
    examples = examples[:first_lines]
    lengths = o.max_len, o.max_prompt_len
    rows, report = tokenise(examples, student_tokenizer, teacher_tokenizer, *lengths, align)
    print(f"train: {report}", file=sys.stderr)
    if pair := PAIRINGS.get(method):
        for row in rows:
            row.pairs = pair(row, student_tokenizer, teacher_tokenizer)
    if method != "sft":  # frozen, so that half precision is enough where the arithmetic is bf16 anyway
        if o.shard in ("teacher", "both"):
            teacher = parallel.load_sharded(teacher_directory, dtype, o.device)
        else:
            teacher = load_model(teacher_directory, dtype, o.device, body=o.cache_teacher is None)
        teacher_tokenizer.check_model(teacher.embed.weight.shape[0])
        teacher = compiled(teacher.requires_grad_(False)) if o.compile else teacher
    if o.cache_teacher is not None:  # made, if it is not there, while the student is not on the device yet
        cache = TeacherCache(o.cache_teacher, teacher_directory, rows, dtype, o.device, o.batch_size)
        with parallel.main_first():
            cache.attach_states(o.compile)
    student.recompute = o.recompute
    if o.shard in ("student", "both"):
        parallel.shard(student, o.device, torch.bfloat16 if o.dtype == "bf16" else None)
    student.to(o.device)

    with parallel.main_first():  # it may leave MinED's map and the teacher's predictions for the others
        made = Method(replace(o, method=method), student, student_tokenizer, teacher, teacher_tokenizer)
        if o.cache_teacher is not None and made.predicting_head is not None:
            cache.attach_predictions(made.predicting_head)
    valid_rows, report = tokenise(valid, student_tokenizer, None, *lengths)
    if valid:
        print(f"valid: {report}", file=sys.stderr)
    room = min(o.max_prompt_len, o.max_len - 1)
    prompts = [cut_prompt(example, [student_tokenizer], room) for example in (valid or examples)[:5]]
    where = [example.where for example in examples]
    return Pieces(student, student_tokenizer, made, teacher_tokenizer, rows, valid_rows, prompts, where)


# ---------------------------------------------------------------------------------------------------------------------
# One update


def autocast(o: Options) -> torch.autocast:
    return torch.autocast(torch.device(o.device).type, torch.bfloat16, enabled=o.dtype == "bf16")


@contextmanager
def gathered(o: Options, pieces: Pieces) -> Iterator[None]:
    """For scores and samples: the student as it is, in float32; a sharded one in the dtype it is trained in."""
    with parallel.gathered(pieces.student), autocast(o) if parallel.is_sharded(pieces.student) else nullcontext():
        yield


def is_on_policy(o: Options, step: int) -> bool:
    """Whether update `step` distils on sampled responses: with probability --on-policy, and a function of (seed, step)
    alone, so that a resumed run, and every process of one run, decides alike."""
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
    with autocast(o), parallel.gathered(pieces.student), packed(pieces.student):
        try:
            responses = generate(pieces.student, prompts, room, tokenizer.eos_id, seed=seed, vocabulary=tokenizer.size)
        except FloatingPointError as error:
            failure = error
    if parallel.highest(failure is not None):  # all processes have it, or none
        raise failure or FloatingPointError("sample: the logits of another process are not finite")
    both = tokenizer, pieces.teacher_tokenizer, o.max_len, pieces.method.align
    sampled = [sampled_row(row, response, *both) for row, response in zip(rows, responses, strict=True)]
    return sampled, sum(map(len, responses))


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
    """AdamW: weight decay on the student's matrices, none on its vectors; the projectors have their own rate. With
    LoRA the student's matrices are those of its adapters."""
    parameters = [p for p in pieces.student.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "lr": o.lr, "weight_decay": o.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "lr": o.lr, "weight_decay": 0.0},
    ]
    projectors = [p for p in pieces.method.parameters() if p.requires_grad]
    if projectors:
        groups.append({"params": projectors, "lr": o.projector_lr, "weight_decay": o.weight_decay})
    groups = [{**group, "params": part} for group in groups for part in parallel.alike(group["params"])]
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


def keep_freed_memory() -> None:
    """On Linux's C library: keep large freed buffers instead of giving them back to the system after every use, which
    then hands them out again page by page, zeroed. On a CPU that is up to half of a training step."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no buffer of its own mapping
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def train(o: Options, description: str = "train") -> dict[str, float]:
    """One run, from options to a run directory; returns the last logged line. See README.md for what is logged.

    Raises Stopped when Ctrl-C or SIGTERM ended it early, FloatingPointError when a number was not finite.
    """
    o = check(o)
    if torch.device(o.device).type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    else:
        keep_freed_memory()
    if not o.dry_run:
        check_directory(o)
    with by_onednn(o.device):
        pieces = load(o)
        student = compiled(pieces.student) if o.compile else pieces.student
        if o.dry_run:
            return dry_run(o, pieces, student)

        with hold_directory(o), StopSignals() as stop:  # only now, when nothing is wrong with the input
            return run_updates(o, pieces, student, stop, description)


def run_updates(o: Options, pieces: Pieces, student, stop: StopSignals, description: str) -> dict[str, float]:
    """The updates of `train` that are still to be done, and the samples at their end."""
    optimizer = make_optimizer(o, pieces)
    updates_per_epoch = -(-len(pieces.rows) // examples_per_update(o))
    first_epoch = ([pieces.rows[i] for i in update] for update in islice(make_order(o, pieces), updates_per_epoch))
    parts = [part for rows in first_epoch for share in split_of_all(o, rows) for part in share]
    padding = f"{padding_share(parts):.1%} of their positions are padding, which attention alone computes"
    print(f"{len(parts)} batches per epoch, {padding}", file=sys.stderr)
    total = o.max_steps or o.epochs * updates_per_epoch
    checkpoint_every = o.checkpoint_every or updates_per_epoch
    start, counts = restore_checkpoint(o, pieces, optimizer) if o.resume else (0, {})
    log = Log(Path(o.out) / "log.jsonl", start)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parallel.start_alike(parameters)
    if not start and parallel.rank() > 0:  # dropout of its own
        parallel.seed_process(o.seed, start)
    if parallel.highest(start) != start:
        raise ValueError(f"--resume: {o.out} is not the same directory for all processes; they need a shared one")
    pieces.student.train()
    line: dict[str, float] = {}
    every = 0.1 if sys.stderr.isatty() else 30  # seconds; a log file needs no animation
    progress = tqdm(total=total, initial=start, desc=description, unit="update", dynamic_ncols=True, mininterval=every)
    order = make_order(o, pieces, start)
    meter, compiled_before = Meter(**counts), compilations()
    for step, (indices, rows, batches) in enumerate(ahead(prepared(o, pieces, islice(order, total - start))), start):
        sampled, sampled_batches = [], []
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, total, o.warmup)
        before = random_state(o.device), meter.counts()
        try:
            if is_on_policy(o, step):
                sampled = meter.time_generation(sample_rows, o, pieces, rows, step)
                count = parallel.highest(len(split_update(sampled, o.batch_size, o.tokens_per_batch)))
                sampled_batches = pieces.batches(sampled, o, count)
            terms = distil(o, pieces, student, batches, sampled_batches)
            grad_norm = parallel.clip_gradients(parameters, o.clip)
            if not math.isfinite(grad_norm):
                raise FloatingPointError(f"the gradient's norm is {grad_norm}")
        except FloatingPointError as error:
            progress.close()
            about = save_if_finite(o, pieces, optimizer, step, *before)
            file, lines = pieces.where[0].rpartition(", line ")[0], [pieces.where[i].split()[-1] for i in indices[:8]]
            examples = f"{file}, lines {', '.join(lines)}{', ...' * (len(indices) > 8)}"
            raise FloatingPointError(f"update {step + 1}: {error} ({examples}); {about}") from None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        meter.tokens += sum(len(row.student.prompt) + len(row.student.response) for row in rows + sampled)
        if o.on_policy:  # a response that could not be used left the gold one in its place
            used = parallel.add_up([sum(new is not row for new, row in zip(sampled, rows, strict=False))])[0]
            terms["on_policy"] = used / len(indices)
        done = step + 1
        if done % o.log_every == 0 or done == total or step == 0:
            line = {"step": done, "epoch": round(done / updates_per_epoch, 3), **terms, "grad_norm": grad_norm}
            line |= {"lr": optimizer.param_groups[0]["lr"], **meter.read(o.on_policy > 0)}
            if o.compile:
                line["compilations"] = compilations() - compiled_before
            speed = f"{line['tokens_per_second']:,.0f} tokens/s"
            progress.set_postfix_str(f"loss {terms['loss']:.3f}, {speed}", refresh=False)
            log.write(line)
        progress.update()
        paused, counts = time.perf_counter(), meter.counts()
        due = done % checkpoint_every == 0 or done == total
        stopping = parallel.highest(stop.number)
        if (due or stopping) and not parallel.all_finite(parameters):
            raise FloatingPointError(
                f"update {done}: it left weights that are not finite; those in {o.out} are from before; a lower --lr "
                "or --weight-decay may help"
            )
        if due and pieces.valid_rows:
            line["valid_ce"] = valid_cross_entropy(o, pieces)
            log.write({"step": done, "valid_ce": line["valid_ce"]})
            stopping = parallel.highest(stop.number)  # asked meanwhile
        if due or stopping:
            save_checkpoint(o, pieces, optimizer, done, counts)
        meter.since += time.perf_counter() - paused  # not training
        if stopping:
            progress.close()
            raise Stopped(f"stopped after update {done} of {total}, which is saved in {o.out}", stopping)
    progress.close()
    write_samples(o, pieces)
    if stop.number:  # while it wrote them
        raise Stopped(f"stopped after the last update, which is saved in {o.out}", stop.number)
    return line


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


def prepared(o: Options, pieces: Pieces, order: Iterator[list[int]]) -> Iterator[tuple]:
    """Each update's indices, and this process's rows and batches of it; all that an update waits for from data that is
    known beforehand."""
    for indices in order:
        rows = [pieces.rows[i] for i in indices]
        count = max(map(len, split_of_all(o, rows)))
        rows = parallel.share(rows, parallel.rank())
        yield indices, rows, pieces.batches(rows, o, count)


def compilations() -> int:
    """How many graphs torch.compile has compiled in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # importing it takes a second, and nothing else may need it
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


def save_if_finite(o: Options, pieces: Pieces, optimizer: torch.optim.AdamW, step: int, random, counts) -> str:
    """Save the state before update `step`, which failed, for whoever looks into it; says where it is."""
    modules = pieces.student, pieces.method
    trained = (pair for module in modules for pair in module.named_parameters() if pair[1].requires_grad)
    spoilt = [name for name, parameter in trained if not parallel.local(parameter).isfinite().all()]
    if parallel.highest(len(spoilt)):  # of a sharded one perhaps only in another process
        name = spoilt[0] if spoilt else "a parameter"
        return f"{name} was not finite before it, so that nothing but the last checkpoint is in {o.out}"
    set_random_state(o.device, random)
    save_checkpoint(o, pieces, optimizer, step, counts)
    return f"the state before it is in {o.out}; a new run with a lower --lr or with --dtype fp32 may help"


class Meter:
    """What the time since the last logged line brought; all processes read it together."""

    def __init__(self, seconds=0.0, tokens=0, generating=0.0, generated=0, responses=0):
        self.since, self.tokens = time.perf_counter() - seconds, tokens
        self.generating, self.generated, self.responses = generating, generated, responses

    def counts(self) -> dict[str, float]:
        """For a checkpoint; Meter(**counts) goes on with them."""
        counts = {**vars(self), "seconds": time.perf_counter() - self.since}
        del counts["since"]
        return counts

    def time_generation(self, sample: Callable, *arguments) -> list[Row]:
        began = time.perf_counter()
        rows, tokens = sample(*arguments)
        self.generating += time.perf_counter() - began
        self.generated += tokens
        self.responses += len(rows)
        return rows

    def read(self, on_policy: bool) -> dict[str, float]:
        """The keys to log, and a new start. Without a sampled response there is no speed or length of them."""
        seconds = time.perf_counter() - self.since
        self.tokens, self.generated, self.responses = parallel.add_up([self.tokens, self.generated, self.responses])
        line = {"tokens_per_second": round(self.tokens / seconds, 1)}
        if on_policy:
            line["generation_share"] = round(self.generating / seconds, 4)
        if self.responses:
            line["generation_tokens_per_second"] = round(self.generated / self.generating, 1)
            line["sampled_length"] = self.generated / self.responses
        self.__init__()
        return line


def dry_run(o: Options, pieces: Pieces, student) -> dict[str, float]:
    """The loss terms and the student's gradient norm on the first batch; dropout is off, so that others can compare."""
    pieces.student.eval()
    terms = distil(o, pieces, student, [pieces.collate(pieces.rows, o.device)])
    gradients = [p.grad.flatten() for p in pieces.student.parameters() if p.grad is not None]
    terms["grad_norm"] = float(torch.cat(gradients).norm())
    names = "loss ce kd t2s_ce t2s_kd s2t_kd t2s_agreement align_ratio student_tokens teacher_tokens grad_norm".split()
    return {name: terms[name] for name in names if name in terms}


def valid_cross_entropy(o: Options, pieces: Pieces) -> float:
    """Of all held-out rows, of which each process scores its share."""
    rows, total = parallel.share(pieces.valid_rows, parallel.rank()), 0.0
    tokens = sum(len(row.student.response) for row in rows)
    with gathered(o, pieces):
        if rows:
            eos_id = pieces.student_tokenizer.eos_id
            total = tokens * held_out_cross_entropy(pieces.student, rows, eos_id, o.device)
    total, tokens = parallel.add_up([total, tokens])
    return total / tokens


def write_samples(o: Options, pieces: Pieces) -> None:
    """samples.txt: greedy responses to a few held-out (else training) prompts."""
    tokenizer = pieces.student_tokenizer
    room = pieces.student.limit - max(len(tokenizer.encode_prompt(prompt)) for prompt in pieces.sample_prompts)
    with gathered(o, pieces):
        if parallel.rank() > 0:
            return
        responses = respond(pieces.student, tokenizer, pieces.sample_prompts, min(128, max(room, 1)))
    shown = zip(pieces.sample_prompts, responses, strict=True)
    text = "\n\n".join(f"### prompt\n{prompt}\n### response\n{response}" for prompt, response in shown)
    write_text(Path(o.out) / "samples.txt", text + "\n")


def main(arguments: list[str] | None = None) -> None:
    with parallel.session():
        given = parse(arguments, __doc__)
        try:
            run(given)
        except (ValueError, OSError, FloatingPointError) as error:
            sys.exit(f"error: {error}")
        except (KeyboardInterrupt, Stopped) as stopped:  # at once, or after saving
            print(f"\n{str(stopped) or 'stopped at once'}\n{way_on(given, arguments)}", file=sys.stderr)
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
        say_teacher(given, o)
    if o.dry_run:
        print(json.dumps(train(o)))
    else:
        train(o)
        print(f"student: {Path(o.out) / 'student'}")


def way_on(given: dict, arguments: list[str] | None) -> str:
    """How to continue the command that was given."""
    start = ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"] if parallel.by_torchrun() else ["python"]
    words = [*start, sys.argv[0], *(sys.argv[1:] if arguments is None else arguments)]
    embedded = not given.keys() & {"student", "teacher", "data"}
    out = Path(given.get("out", f"runs/{given.get('method', Options.method)}"))
    if embedded or (out / "args.json").is_file():
        return f"go on with: {shlex.join(words + ['--resume'] * ('resume' not in given))}"
    return f"there is nothing yet to go on with; start again with: {shlex.join(words)}"


if __name__ == "__main__":
    main()
    parallel.leave()
