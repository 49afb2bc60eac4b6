"""Distil a teacher into a student.

    python train.py                                                the embedded tiny task, to the end
    python train.py --teacher qwen --student gpt2                  the papers' pair, on Dolly
    python train.py --teacher DIR --student DIR --data FILE.jsonl  your own
    torchrun --nproc_per_node=N train.py --teacher ...             on N devices, see docs/multi_gpu.md

In this file: what the methods need from the teacher, `Method`; one update, `distil`; the loop, `run_updates`. The loss
terms are in losses.py, the options in runtime/options.py; runtime/run.py manages the run directory.
"""

import json
import math
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import fast.losses
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
from data import Batch, Row, replace_response
from eval import held_out_cross_entropy, respond, score
from fast.cache import model_digest
from fast.cpu import by_onednn, keep_freed_memory, packed
from fast.cuda import graphed
from losses import RECIPES, Counts
from model import generate, hidden_at, load_model
from projector import Projectors
from runtime import parallel
from runtime.device import say_device
from runtime.load import PAIRINGS, Pieces, find_model, load, plan_teacher_stage
from runtime.options import Options, parse
from runtime.order import prefetch, split_update
from runtime.presets import say_settings, say_teacher, settings
from runtime.report import say_next, write_card
from runtime.run import (
    Meter,
    RunDirectory,
    Stopped,
    check_directory,
    finish_stage,
    is_finished,
    run_of,
    say_how_to_go_on,
    stored_options,
    write_text,
)
from runtime.strict import check_options, choose_alignment, read_projectors
from runtime.tokenizer import TextTokenizer, count_shared, escape_what_cannot_be_printed

SAMPLE_TOKENS = 128  # of each response in samples.txt, at most

# ---------------------------------------------------------------------------------------------------------------------
# The method


@dataclass
class TeacherAnswer:
    """What the frozen teacher says about one batch, at the positions that are compared."""

    hidden: Tensor  # (J, D) its states there; at all its response positions if tokens are not paired
    rows: Tensor | slice  # (K,) the student token of each pair; slice(None): all, in order
    label: Tensor | None = None  # (K,) DSKD: what the projected teacher should predict, as a token of the student


@dataclass
class Totals:
    """The normalisers of one update, over all its batches and all processes."""

    counts: Counts  # of the responses that L_kd is computed on
    gold: Counts  # of the gold responses: the same, unless the student sampled
    std: Deviations | None = None  # CMA's


class Method(nn.Module):
    """What a method needs besides the student: the frozen teacher, the projectors, and how the vocabularies relate.

    Its only parameters are the projectors': the teacher is neither trained nor saved. `teacher` is None for sft.
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
        self.name = "sft" if o.method == "seqkd" else o.method  # seqkd is sft on the teacher's answers
        self.o, self.align, self.projectors, self.recipe = o, "none", None, None
        self.objective = fast.losses if o.chunk else losses
        if self.name == "sft":
            return
        object.__setattr__(self, "teacher", teacher.requires_grad_(False).eval())  # so that it is not a submodule
        self.align = choose_alignment(o.align, o.method, o.recipe, teacher_tokenizer, student_tokenizer)
        device, rows = student.head_weight.device, min(len(student.head_weight), len(teacher.head_weight))
        shared = count_shared(teacher_tokenizer, student_tokenizer)
        if shared == max(teacher_tokenizer.size, student_tokenizer.size):
            shared = rows  # one vocabulary; the heads may be padded
        self.teacher_shared = self.student_shared = slice(shared)  # rows of both heads
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
    def predicting_head(self) -> Tensor | None:
        """(V, D) the teacher's head over what it may predict; None where the method does not ask for predictions."""
        if self.recipe is None or self.recipe.labels != "teacher":
            return None
        return self.teacher.head_weight if self.align == "eta" else self.teacher.head_weight[self.teacher_shared]

    def shared_head(self, student: nn.Module) -> Tensor:
        """(V, d) the student's head over the shared vocabulary, in float32."""
        return student.head_weight.detach()[self.student_shared].float()

    def refresh(self, student: nn.Module) -> None:
        """Solve s2t for the current student head (v2 only). To be called once per update, before its losses."""
        if self.projectors is not None and self.projectors.teacher_inverse is not None:  # else no copy of the head
            self.projectors.refresh_s2t(self.shared_head(student))

    @torch.no_grad()
    def ask_teacher(self, batch: Batch) -> TeacherAnswer | None:
        """Run the teacher, or use the states of an earlier run if the batch has them (fast/cache.py); None for sft."""
        if self.name == "sft":
            return None
        hidden, predicted = batch.teacher_hidden, batch.teacher_predictions
        hidden = hidden_at(self.teacher, batch.teacher) if hidden is None else hidden.to(self.teacher.head_weight.dtype)
        if self.name == "kd":
            return TeacherAnswer(hidden, slice(None))
        if self.name in PAIRINGS:
            return TeacherAnswer(hidden[batch.teacher_index], batch.student_index)
        if self.align == "eta":
            hidden = hidden[batch.teacher_index]
            predicted = None if predicted is None else predicted[batch.teacher_index]
        if self.recipe.labels == "gold":
            return TeacherAnswer(hidden, slice(None), batch.student.labels)
        if predicted is None:
            predicted = self.objective.predict_tokens(hidden, self.predicting_head)
        if self.align == "none":
            return TeacherAnswer(hidden, slice(None), predicted)
        label = self.student_token[predicted]
        known = (label >= 0).nonzero()[:, 0]  # eq. 14: only pairs whose prediction exists in the student's vocabulary
        return TeacherAnswer(hidden[known], batch.student_index[known], label[known])

    @torch.no_grad()
    def count(self, student: nn.Module, compared: list[Batch], answers: list, gold: list[Batch]) -> Totals:
        """The normalisers of an update. compared: the batches that L_kd is computed on; answers: the teacher's, one for
        each; gold: the gold batches. Neither the projected teacher nor its label depends on the student's states, so
        the pairs that agree can be counted before the first loss."""
        tokens, gold_tokens = (sum(len(batch.student.labels) for batch in batches) for batches in (compared, gold))
        pairs = agreeing = 0
        moments: list[float] = []
        if self.recipe is not None:
            pairs = sum(len(answer.label) for answer in answers)
        if self.recipe is not None and self.recipe.average_stu == "agreeing":
            for answer in answers:
                predicted = self.objective.predict_tokens(self.projectors.t2s(answer.hidden), student.head_weight)
                agreeing += (predicted == answer.label).sum()  # a tensor, so that nothing waits for the device
        if self.align == "cma":
            each = [teacher_moments(self.teacher_tokens(*both)) for both in zip(compared, answers, strict=True)]
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

        Without the teacher's `answer`, only the gold part (sft, and the gold side of on-policy distillation); without
        `is_gold`, only L_kd (its sampled side). `student` may be compiled; its head is read from it.
        """
        o, side, head = self.o, batch.student, student.head_weight
        hidden, gold = hidden_at(student, side), side.labels if is_gold else None  # (N, d), (N,)
        how = {"chunk": o.chunk, "fused": o.compile and head.is_cuda} if o.chunk else {}
        if answer is None:
            rate = 0.0 if self.name == "sft" else o.kd_rate
            return self.objective.sft_loss(hidden, side.labels, head, totals.gold, rate, **how)
        teacher_head, counts = self.teacher.head_weight, totals.counts
        if self.name == "kd":
            options = counts, o.divergence, o.temperature, o.kd_rate
            teacher_head = teacher_head[self.teacher_shared]  # the divergence is over these rows
            return self.objective.kd_loss(hidden, gold, answer.hidden, head, teacher_head, *options, **how)
        states = hidden, gold, answer.rows, answer.hidden, head, teacher_head
        if self.name == "uld":
            return uld.uld_loss(*states, counts, o.kd_rate, **how)
        if self.name == "mined":
            return mined.mined_loss(*states, *self.columns, counts, o.temperature, o.kd_rate, o.chunk)

        if self.align == "cma":
            ours = ResponseTokens(side.inputs, side.labels, side.lengths, student.embed.weight, hidden)
            theirs = self.teacher_tokens(batch, answer)
            t2s_hidden, s2t_hidden = cross_model_attention(ours, theirs, self.projectors, totals.std)
        else:
            t2s_hidden, s2t_hidden = self.projectors.t2s(answer.hidden), self.projectors.s2t(hidden[answer.rows])
        return self.objective.dskd_loss(
            hidden, gold, answer.rows, t2s_hidden=t2s_hidden, label=answer.label, s2t_hidden=s2t_hidden,
            teacher_hidden=answer.hidden, student_head=head, teacher_head=teacher_head, counts=counts,
            recipe=self.recipe, divergence=o.divergence, temperature=o.temperature, kd_rate=o.kd_rate, **how,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# One update


def autocast(o: Options, wanted: bool = True) -> torch.autocast:
    return torch.autocast(torch.device(o.device).type, torch.bfloat16, enabled=wanted and o.dtype == "bf16")


def is_on_policy(o: Options, step: int, updates_per_epoch: int) -> bool:
    """Whether update `step` distils on sampled responses: never in the first --on-policy-after epochs, then with
    probability --on-policy. The decision depends on the arguments alone, so it is the same in a resumed run and in
    every process of a run."""
    if step < o.on_policy_after * updates_per_epoch:
        return False
    return random.Random(f"{o.seed} on-policy {step}").random() < o.on_policy


def sample_rows(o: Options, pieces: Pieces, rows: list[Row], step: int) -> tuple[list[Row], int]:
    """The rows with responses sampled from the current student (v2, eq. 18; T = 1, the whole distribution, no dropout,
    no gradient), and the number of sampled tokens. The seed is made from (seed, step), as in `is_on_policy`, and the
    process, because each process samples for its own share of the update.

    All responses are sampled together. That is faster, and they do not depend on how the share is split into batches.
    """
    process = f" {parallel.rank()}" if parallel.rank() > 0 else ""
    seed = random.Random(f"{o.seed} sample {step}{process}").getrandbits(63)
    tokenizer, prompts = pieces.student_tokenizer, [row.student.prompt for row in rows]
    room = [o.max_len - len(prompt) for prompt in prompts]
    responses, failure = [], None
    student = pieces.student
    with autocast(o), parallel.gather_parameters(student), packed(student), graphed(student):
        try:
            responses = generate(student, prompts, room, tokenizer.end_ids, seed=seed, vocabulary=tokenizer.size)
        except FloatingPointError as error:
            failure = error
    if parallel.highest(failure is not None):  # raise in all processes, or in none
        raise failure or FloatingPointError("sample: the logits of another process are not finite")
    both = tokenizer, pieces.teacher_tokenizer, o.max_len, pieces.method.align
    sampled = [replace_response(row, response, *both) for row, response in zip(rows, responses, strict=True)]
    return sampled, sum(map(len, responses))


def sample_batches(o: Options, pieces: Pieces, rows: list[Row], step: int, meter: Meter) -> tuple[list[Row], list]:
    """The sampled rows, and the same rows in batches."""
    began = time.perf_counter()
    sampled, tokens = sample_rows(o, pieces, rows, step)
    meter.count_generation(time.perf_counter() - began, tokens, len(sampled))
    count = parallel.highest(len(split_update(sampled, o.batch_size, o.tokens_per_batch)))
    return sampled, pieces.batches(sampled, o, count)


def distil(o: Options, pieces: Pieces, student, batches: list, sampled: list | None = None) -> dict[str, float]:
    """The loss terms of one update over its batches; the gradients are summed over the batches and all processes.
    `sampled`: batches of responses that the student sampled; L_kd is computed on them instead of the gold ones (v2,
    eq. 18). Raises FloatingPointError, naming the term, if one is not finite."""
    method, compared = pieces.method, sampled or batches
    method.refresh(pieces.student)
    with autocast(o):
        answers = [method.ask_teacher(batch) for batch in compared]
        totals = method.count(pieces.student, compared, answers, batches)
    parts = [(batch, None, True) for batch in batches] if sampled else []
    parts += [(batch, answer, not sampled) for batch, answer in zip(compared, answers, strict=True)]
    if len(parts) > 1 and parallel.uses_graphs(o):
        parallel.make_gradients(pieces.student)
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
    """Turn the counts into the ratios that are logged."""
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
    """AdamW with weight decay on the student's matrices (with LoRA, its adapters') but not on its vectors, and on all
    projector parameters, even v1's biases, as in the official code. The projectors have their own learning rate."""
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
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)


def schedule(step: int, total: int, warmup: int) -> float:
    """Share of the peak learning rate at update `step` of `total`: linear warm-up, then cosine decay to zero."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def train(o: Options, description: str = "train") -> dict[str, float]:
    """Do one run, from options to a run directory; returns the last logged line. docs/log.md explains the log.

    Raises Stopped when Ctrl-C or SIGTERM ended it early, FloatingPointError when a number was not finite.
    """
    o = check_options(o)
    if torch.device(o.device).type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, for all that autocast leaves in float32
    else:
        keep_freed_memory()
    if not o.dry_run:
        check_directory(o)
    with by_onednn(o.device):
        pieces = load(o)
        add_method(o, pieces)
        student = parallel.compile_model(pieces.student, parallel.uses_graphs(o)) if o.compile else pieces.student
        return dry_run(o, pieces, student) if o.dry_run else run_updates(o, pieces, student, description)


def add_method(o: Options, pieces: Pieces) -> None:
    both = pieces.student, pieces.student_tokenizer, pieces.teacher, pieces.teacher_tokenizer
    with parallel.main_first():  # process 0 may write MinED's map and the teacher's predictions for the others
        pieces.method = Method(o, *both)
        if pieces.cache is not None and pieces.method.predicting_head is not None:
            pieces.cache.attach_predictions(pieces.method.predicting_head)


def run_updates(o: Options, pieces: Pieces, student, description: str) -> dict[str, float]:
    """Do the remaining updates; returns the last logged line. `student`: the compiled model, or the plain one."""
    optimizer = make_optimizer(o, pieces)
    per_epoch = pieces.updates_per_epoch(o)
    total = o.max_steps or o.epochs * per_epoch
    pieces.say_padding(o)

    with RunDirectory(o, pieces, optimizer, total, per_epoch, description) as run:  # lock, log, checkpoints, Ctrl-C
        pieces.student.train()
        for step, (indices, rows, batches) in enumerate(prefetch(pieces.updates(o, run.start, total)), run.start):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(step, total, o.warmup)

            # One update: forward and backward pass of every batch. The loss is a mean over the tokens of all batches.
            with run.save_state_on_failure(step, indices):  # and name the examples of a term that is not finite
                sampled, sampled_batches = [], []
                if is_on_policy(o, step, per_epoch):
                    sampled, sampled_batches = sample_batches(o, pieces, rows, step, run.meter)
                terms = distil(o, pieces, student, batches, sampled_batches)
                terms["grad_norm"] = parallel.clip_gradients(run.parameters, o.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            done = step + 1
            run.log(done, terms, rows, sampled)
            if run.is_due(done) or run.asked_to_stop():
                run.check_weights(done)
                run.save(done, held_out_scores(o, pieces) if run.is_due(done) else {})  # may raise Stopped
        run.progress.close()
        write_samples(o, pieces)
        if parallel.rank() == 0:
            write_card(Path(o.out), model_digest(Path(o.out) / "student"))
    return run.line


def dry_run(o: Options, pieces: Pieces, student) -> dict[str, float]:
    """The loss terms and the student's gradient norm on the first batch, without dropout, to compare with others."""
    pieces.student.eval()
    terms = distil(o, pieces, student, [pieces.collate(pieces.rows, o.device)])
    terms["grad_norm"] = parallel.clip_gradients([*pieces.student.parameters()], math.inf)  # scales nothing
    names = "loss ce kd t2s_ce t2s_kd s2t_kd t2s_agreement align_ratio student_tokens teacher_tokens grad_norm".split()
    return {name: terms[name] for name in names if name in terms}


def held_out_scores(o: Options, pieces: Pieces) -> dict[str, float]:
    """{valid_ce}, with --keep-best rouge also valid_rouge_l; {} without --valid. Rouge-L is in per cent, of responses
    that are sampled as in eval.py, with one seed. Each process scores its share."""
    if not pieces.valid_rows:
        return {}
    student, tokenizer = pieces.student, pieces.student_tokenizer
    rows, examples = (parallel.share(held_out, parallel.rank()) for held_out in (pieces.valid_rows, pieces.valid))
    tokens, ce, rouge_l = sum(len(row.student.response) for row in rows), 0.0, 0.0
    # computed with the float32 weights; those of a sharded student are gathered in the dtype of its training
    with parallel.gather_parameters(student), autocast(o, parallel.is_sharded(student)):
        if rows:  # one for each example; a process may have none
            ce = tokens * held_out_cross_entropy(student, rows, tokenizer.eos_id, o.device)
        if rows and o.keep_best == "rouge":
            prompts, room = tokenizer.fit_prompts(examples, o.max_prompt_len), o.max_len - o.max_prompt_len
            responses = respond(student, tokenizer, prompts, room, temperature=1.0, seed=o.seed)
            rouge_l = len(examples) * score(responses, examples)["rouge_l"]
    ce, tokens, rouge_l, count = parallel.add_up([ce, tokens, rouge_l, len(examples)])
    of_responses = {"valid_rouge_l": rouge_l / count} if o.keep_best == "rouge" else {}
    return {"valid_ce": ce / tokens, **of_responses}


def write_samples(o: Options, pieces: Pieces) -> None:
    """samples.txt: greedy responses of student/ to a few held-out (else training) prompts."""
    tokenizer, room = pieces.student_tokenizer, min(o.max_prompt_len, o.max_len - 1)
    prompts = tokenizer.fit_prompts((pieces.valid or pieces.examples)[:5], room)
    with parallel.gather_parameters(pieces.student), autocast(o, parallel.is_sharded(pieces.student)):
        if parallel.rank() > 0:
            return
        student = load_model(Path(o.out) / "student", device=o.device) if o.keep_best else pieces.student
        responses = respond(student, tokenizer, prompts, SAMPLE_TOKENS)
    shown = zip(prompts, responses, strict=True)
    text = "\n\n".join(f"### prompt\n{prompt}\n### response\n{response}" for prompt, response in shown)
    write_text(Path(o.out) / "samples.txt", text + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def main(arguments: list[str] | None = None) -> None:
    escape_what_cannot_be_printed()
    with parallel.session():
        given = parse(arguments, __doc__.partition("\nIn this file")[0])
        try:
            run(given)
        except (ValueError, OSError, FloatingPointError) as error:
            sys.exit(f"error: {error}")
        except torch.OutOfMemoryError as error:
            sys.exit(f"error: {error}\n--recompute, or a smaller --batch-size with a larger --grad-accum, needs less "
                     "memory, also with --resume; docs/guide.md, When memory is short, has more")  # fmt: skip
        except (KeyboardInterrupt, Stopped) as stopped:  # at once, or after saving
            print(f"\n{str(stopped) or 'stopped at once'}\n{say_how_to_go_on(given, arguments)}", file=sys.stderr)
            sys.exit(128 + getattr(stopped, "number", signal.SIGINT))
        except torch._dynamo.exc.TorchDynamoException as error:  # imported only here, because that takes a second
            sys.exit(f"error: torch.compile failed: {error}\nIt needs a C compiler and Python's headers (gcc, "
                     "python3-dev); --no-compile, with another --out, does without it")  # fmt: skip


def run(given: dict) -> None:
    """Do what the command line asks for."""
    given = {**stored_options(given), **given}
    if not given.keys() & {"student", "teacher", "data"}:
        from experiments import tiny  # which imports this file

        tiny.run(given)
        return
    o = check_options(Options(**settings(given)))
    say_device(given.get("device"), o.device)
    say_settings(given)
    if given.get("teacher_sft") and o.teacher != str(Path(o.out) / "teacher" / "student"):  # else it is done (--resume)
        stage, o = plan_teacher_stage(given, o)
        run_stage(stage, "teacher 1/2")
    elif o.method != "sft":
        teacher = find_model(o.teacher, "teacher")
        say_teacher(given, o, teacher, run_of(teacher))
    elif o.teacher:
        print("note: --method sft learns from the data alone; --teacher is not used", file=sys.stderr)
    if o.dry_run:
        print(json.dumps(train(o)))
    else:
        line = train(o, description="student 2/2" if given.get("teacher_sft") else "train")
        print(f"student: {Path(o.out) / 'student'}")
        say_next(given, o, line)


def run_stage(o: Options, name: str) -> None:
    """Train one stage: keep a finished one, resume an interrupted one."""
    o = check_options(o)
    if not is_finished(o):
        o.resume = (Path(o.out) / "args.json").is_file()
        train(o, description=name)
        finish_stage(o)


if __name__ == "__main__":
    main()
    parallel.leave()
