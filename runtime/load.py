"""Load everything a run needs and check that it fits together: models, tokenizers, data, the order of updates."""

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn

import lora
from baselines import mined, seqkd, uld
from data import Batch, Example, Row, collate, cut_prompt, tokenise
from fast.cache import TeacherCache, model_digest
from fast.cpu import put_on
from model import Decoder, build_model, load_model, read_json
from runtime import parallel
from runtime.formats import read_examples, read_record
from runtime.hub import data_file, model_directory
from runtime.options import Options
from runtime.order import count_tokens, drop_responses, measure_padding, order_updates, split_update
from runtime.peft import base_of, is_adapter, merge_into
from runtime.presets import flags, teacher_stage
from runtime.report import base_model, prompt_form
from runtime.run import chat_of, check_directory, run_of, tokenizer_of, write_text
from runtime.show import describe_alignment, measure_alignment
from runtime.strict import check_model, choose_alignment, fit_lengths
from runtime.tokenizer import TextTokenizer, say_if_forgotten, say_once

PAIRINGS = {"uld": uld.pair_by_position, "mined": mined.pair_by_edit_distance}  # methods that pair tokens themselves


@dataclass
class Pieces:
    """A run's models, tokenizers and data, loaded and checked against each other."""

    student: nn.Module
    student_tokenizer: TextTokenizer
    teacher: nn.Module | None
    teacher_tokenizer: TextTokenizer | None
    rows: list[Row]  # to train on
    examples: list[Example] = field(default_factory=list)  # what the rows are made from
    valid_rows: list[Row] = field(default_factory=list)  # held out
    valid: list[Example] = field(default_factory=list)
    frozen: str = ""  # sha256 of the models that are not trained, for --resume; only in process 0
    cache: TeacherCache | None = None
    aligned: dict = field(default_factory=dict)  # the share of training tokens that ETA aligns, by kind (show.py)
    method: nn.Module | None = None  # train.Method, once it exists

    @cached_property
    def digest(self) -> str:
        """sha256 of all training examples' tokens, in order; --resume compares it."""
        hasher = hashlib.sha256()
        for side in (side for row in self.rows for side in (row.student, row.teacher) if side):
            for ids in (side.prompt, side.response):
                hasher.update(np.array([len(ids), *ids], np.int64).tobytes())
        return hasher.hexdigest()

    def facts(self, o: Options) -> dict:
        """What args.json holds besides the options: where the student comes from, the form of its prompts (with {} for
        the user's text), and the share that aligns."""
        facts = {"base_model": base_model(o), "prompts": prompt_form(self.examples[0])}
        return facts | ({"aligned": self.aligned} if self.aligned else {})

    def collate(self, rows: list[Row], device, width: int = 0) -> Batch:
        pad = self.teacher_tokenizer.eos_id if self.teacher_tokenizer else 0
        return collate(rows, self.student_tokenizer.eos_id, pad, width).to(device)

    def batches(self, rows: list[Row], o: Options, count: int = 0) -> list[Batch]:
        """The rows of one update as batches of --batch-size or --tokens-per-batch. There are at least `count` batches,
        the last ones empty, because processes that share a model's weights must run it equally often."""
        parts = split_update(rows, o.batch_size, o.tokens_per_batch)
        parts += [[]] * (count - len(parts))
        width = o.max_len if parallel.uses_graphs(o) else 0
        batches = [(part, self.collate(part or self.rows[:1], o.device, width)) for part in parts]
        return [batch if part else drop_responses(batch) for part, batch in batches]

    def updates_per_epoch(self, o: Options) -> int:
        return -(-len(self.rows) // (o.batch_size * o.grad_accum * parallel.world()))

    def order(self, o: Options, start: int = 0) -> Iterator[list[int]]:
        """The examples of each update from the `start`-th on, as indices."""
        lengths = [sum(count_tokens(row)) for row in self.rows] if o.bucket else None
        return order_updates(len(self.rows), o.batch_size * o.grad_accum * parallel.world(), o.seed, start, lengths)

    def split(self, o: Options, indices: list[int]) -> list[list[list[Row]]]:
        """The forward passes of every process in an update over these examples."""
        rows = [self.rows[i] for i in indices]
        shares = [parallel.share(rows, process) for process in range(parallel.world())]
        return [split_update(share, o.batch_size, o.tokens_per_batch) for share in shares]

    def updates(self, o: Options, start: int, total: int) -> Iterator[tuple]:
        """Each update's indices, and this process's rows and batches of it: everything known before the update."""
        for indices in islice(self.order(o, start), total - start):
            count = max(map(len, self.split(o, indices)))
            rows = parallel.share([self.rows[i] for i in indices], parallel.rank())
            yield indices, rows, self.batches(rows, o, count)

    def say_padding(self, o: Options) -> None:
        updates = list(islice(self.order(o), self.updates_per_epoch(o)))
        parts = [part for indices in updates for share in self.split(o, indices) for part in share]
        padding = f"{measure_padding(parts):.0%} of their positions are padding"
        padding += "" if o.bucket else " (--bucket reduces that)"
        print(f"an epoch: {len(updates)} updates in {len(parts)} forward passes; {padding}", file=sys.stderr)


def find_model(name: str, role: str, weights: bool = True) -> Path:
    """The directory of a model, checked. "tiny" is the embedded task's model, a run stands for its student, an adapter
    for the merged model."""
    if name == "tiny":
        from experiments import tiny  # which imports this file

        directory = tiny.find(role)
    elif is_adapter(Path(name)) and run_of(Path(name).parent / "student"):
        directory = Path(name).parent / "student"  # already merged
    elif is_adapter(Path(name)):
        directory = find_model(base_of(Path(name)), role, weights)
        with parallel.main_first():
            directory = merge_into(directory, Path(name)) if weights else directory
    else:
        check_model(model_directory(name, weights=False), weights=False)  # before gigabytes of weights are downloaded
        directory = model_directory(name, weights)
    if (directory / "adapter_config.json").is_file():
        say_once(f"{directory} holds a whole model, so the adapter beside it is not used; if it is not merged into the "
                 "weights, move its files into another directory, write this one into base_model_name_or_path there, "
                 "and give that directory")  # fmt: skip
    check_model(directory, weights)
    return directory


def plan_teacher_stage(given: dict, o: Options) -> tuple[Options, Options]:
    """For --teacher-sft: the options of the stage that fine-tunes the teacher, and of the run after it, which has that
    teacher. Raises ValueError or OSError if one of them could not start."""
    if o.method == "sft" or o.dry_run:
        raise ValueError("--teacher-sft is for training with a teacher, not for --method sft or --dry-run")
    stage = teacher_stage(given, o.out)
    after = replace(o, teacher=str(Path(stage["out"]) / "student"), teacher_chat=None)
    check_directory(after)
    base, student = find_model(o.teacher, "teacher"), find_model(o.student, "student", weights=not o.from_scratch)
    tokenizers = tokenizer_of(base, o.teacher_chat), tokenizer_of(student, o.student_chat)
    if o.method != "seqkd":
        choose_alignment(o.align, o.method, o.recipe, *tokenizers)
    # what would stop the run after the stage; on copies, because both fill in options that were left open
    fit_lengths(replace(after), {"student": student, "teacher": base})
    if o.lora:
        with torch.device("meta"):
            attach_adapters(replace(after), Decoder(read_json(student / "config.json")))
    print(f"teacher: {base}, fine-tuned first:\n    {parallel.launcher()} train.py {flags(stage)}", file=sys.stderr)
    return Options(**stage), after


def find_data(name: str, split: str) -> list[Example]:
    if name == "tiny":
        from experiments import tiny

        name = str(tiny.find("data"))
    return read_examples(*data_file(name, split))


def load(o: Options) -> Pieces:
    """Load everything a run needs. Any error in the input is found here, before the first update."""
    student_directory, teacher_directory, tokenizer, teacher_tokenizer = open_tokenizers(o)
    align = "none"
    if o.method not in ("sft", "seqkd"):
        align = choose_alignment(o.align, o.method, o.recipe, teacher_tokenizer, tokenizer)
    examples = find_data(o.data, "train")
    valid = find_data(o.valid, "valid") if o.valid and not o.dry_run else []
    torch.manual_seed(o.seed)
    student = load_student(o, student_directory)

    dtype = torch.bfloat16 if o.dtype == "bf16" else torch.float32
    if o.method == "seqkd":  # from here on it is supervised fine-tuning
        with parallel.main_first():
            examples = load_answers(o, examples, teacher_directory, teacher_tokenizer, tokenizer)
        teacher_tokenizer = None
    examples = examples[: o.batch_size] if o.dry_run else examples
    rows, report = tokenise(examples, tokenizer, teacher_tokenizer, o.max_len, o.max_prompt_len, align)
    print(f"train: {report}", file=sys.stderr)
    aligned = {}
    if align == "eta":
        aligned = measure_alignment(([tokenizer.bytes[i] for i in row.student.response], row.pairs[1]) for row in rows)
        print(describe_alignment(aligned), file=sys.stderr)
    if o.method in PAIRINGS:
        for row in rows:
            row.pairs = PAIRINGS[o.method](row, tokenizer, teacher_tokenizer)
    valid_rows, report = tokenise(valid, tokenizer, None, o.max_len, o.max_prompt_len)
    if valid:
        print(f"valid: {report}", file=sys.stderr)

    teacher, cache = load_teacher(o, teacher_directory, dtype) if teacher_tokenizer else None, None
    if o.cache_teacher is not None:  # filled now if need be, while the student is not on the device yet
        cache = TeacherCache(o.cache_teacher, teacher_directory, rows, dtype, o.device, o.batch_size)
        with parallel.main_first():
            cache.attach_states(o.compile)
    if o.shard in ("student", "both"):
        parallel.shard(student, o.device, dtype if o.dtype == "bf16" else None)
    student.to(o.device)
    untrained = [teacher_directory] if teacher is not None else []
    untrained += [student_directory] if o.lora else []
    frozen = "" if o.dry_run or parallel.rank() > 0 else model_digest(*untrained)
    models = student, tokenizer, teacher, teacher_tokenizer
    return Pieces(*models, rows, examples, valid_rows, valid, frozen, cache, aligned)


def open_tokenizers(o: Options) -> tuple[Path, Path | None, TextTokenizer, TextTokenizer | None]:
    """Both models' directories and tokenizers; fills in the options that follow from them. Loads no weights yet."""
    student_directory, teacher_directory = find_model(o.student, "student", weights=not o.from_scratch), None
    o.student_chat = o.student_chat or chat_of(student_directory) or "none"
    tokenizer, teacher_tokenizer = tokenizer_of(student_directory, o.student_chat, o.bos), None
    bos_is_open = o.bos is None and not o.from_scratch
    say_if_forgotten(tokenizer, "--student-chat", chat_of(student_directory) == "none", bos_is_open)
    if o.method != "sft":
        teacher_directory = find_model(o.teacher, "teacher")
        o.teacher_chat = o.teacher_chat or chat_of(teacher_directory) or "none"
        teacher_tokenizer = tokenizer_of(teacher_directory, o.teacher_chat, o.bos)
        say_if_forgotten(teacher_tokenizer, "--teacher-chat", chat_of(teacher_directory) == "none", o.bos is None)
    fit_lengths(o, {"student": student_directory} | ({"teacher": teacher_directory} if teacher_directory else {}))
    return student_directory, teacher_directory, tokenizer, teacher_tokenizer


def load_student(o: Options, directory: Path) -> nn.Module:
    """The student on the CPU, in float32, with its adapters."""
    try:
        student = build_model(read_json(directory / "config.json")) if o.from_scratch else load_model(directory)
    except RuntimeError as error:  # from the memory allocator
        raise ValueError(f"{directory}: the model does not fit into memory ({error!s:.200})") from error
    if o.lora:
        attach_adapters(o, student)
        trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
        print(f"LoRA on {', '.join(o.lora_targets)}: {trained:,} parameters are trained", file=sys.stderr)
    student.recompute = o.recompute
    if torch.device(o.device).type == "cpu":
        put_on(student)
    return student


def attach_adapters(o: Options, student: nn.Module) -> None:
    """Put the adapters on the student and fill in --lora-targets, both in place. Raises ValueError for unknown ones."""
    o.lora_targets = lora.default_targets(student) if o.lora_targets is None else o.lora_targets
    try:
        lora.attach(student, o.lora, o.lora_alpha, o.lora_dropout, o.lora_targets)
    except ValueError as error:  # the other arguments have been checked: only the targets can be wrong
        raise ValueError(f"--lora-targets: {error}") from None


def load_teacher(o: Options, directory: Path, dtype: torch.dtype) -> nn.Module:
    """The frozen teacher: in half precision where the arithmetic is bf16 anyway; with a cache, without its layers."""
    if o.shard in ("teacher", "both"):
        teacher = parallel.load_sharded(directory, dtype, o.device)
    else:
        teacher = load_model(directory, dtype, o.device, body=o.cache_teacher is None)
    teacher.requires_grad_(False)
    return parallel.compile_model(teacher, parallel.uses_graphs(o)) if o.compile else teacher


def load_answers(
    o: Options, examples: list[Example], directory: Path, teacher: TextTokenizer, student: TextTokenizer
) -> list[Example]:
    """The examples with the responses of the teacher in `directory`, read from --out or generated and written there. A
    dry run generates only for the first examples, and writes nothing. Raises ValueError if the file in --out was made
    in another way, or if the examples already are a teacher's answers."""
    file, given = Path(o.out) / "seqkd.jsonl", Path(examples[0].where.rpartition(", line ")[0])
    if given.is_file() and seqkd.read_recipe(given) is not None:
        raise ValueError(f"{examples[0].where}: these are a teacher's answers; train on them with --method sft")
    limit = min(o.max_prompt_len, o.max_len - 1)
    asked = [cut_prompt(example, [student, teacher], limit) for example in examples]
    if cut := sum(shorter is not whole for shorter, whole in zip(asked, examples, strict=True)):
        print(f"seqkd: {cut} of {len(asked)} prompts are cut to fit", file=sys.stderr)
    how = o.max_len, o.seqkd_temperature, o.seed
    recipe = seqkd.make_recipe(asked, directory, teacher, student, *how)
    if file.is_file():
        changed = " and ".join(seqkd.compare_recipes(seqkd.read_recipe(file), recipe))
        if changed:
            raise ValueError(f"{file} was made with other settings ({changed}): give another --out, or remove the file")
        print(f"seqkd: using the teacher's answers in {file}", file=sys.stderr)
        return read_examples(file)
    model = load_model(directory, torch.bfloat16 if o.dtype == "bf16" else torch.float32, o.device)
    asked = asked[: o.batch_size] if o.dry_run else asked
    lines = seqkd.answer_prompts(asked, model, teacher, student, *how, o.batch_size)
    if o.dry_run:
        return [read_record(line, f"{directory}'s answer") for line in lines]
    lines[0]["seqkd"] = recipe
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return read_examples(file)
