"""From text to batches: examples → rows (the token ids that both models read) → batches (tensors).

Both models see the same text. A text that is too long is cut once, before it is tokenised, until it fits both models:
the oldest turns, then the context (`input`), then the instruction, never a template's marks. A cut response has no
end-of-text.

A label at position i is token i+1: the last prompt token predicts the first response token, and the last response token
predicts end-of-text. The shift happens once, in `collate_side`; everything after it works on response positions.

A tokenizer is a TextTokenizer of runtime/tokenizer.py: `prompt_text(example)` is the prompt as its model reads it,
`encode_prompt(text)` and `encode(text)` give the ids of a prompt and of a response, `spell(ids)` their bytes. `eos_id`
ends each response in training; any of `end_ids` ends one that the model writes. runtime/formats.py reads data files.
Errors raised here are about a single example that does not fit.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from align import exact_token_alignment

# ---------------------------------------------------------------------------------------------------------------------
# Examples

# The Alpaca template, in the form that the Dolly-based KD papers use (MiniLLM, arXiv 2306.08543)
TASK = "Below is an instruction that describes a task"
PROMPT = TASK + (
    ". Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
PROMPT_WITH_INPUT = TASK + (
    ", paired with an input that provides further context. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
MARKS = {"user": "\n\n### Instruction:\n", "assistant": "\n\n### Response:\n", "system": "\n\n"}  # before each turn


@dataclass
class CodeTask:
    """The tests of a programming exercise."""

    tests: str  # Python, to be run after the program
    entry_point: str = ""  # HumanEval: the function that the prompt begins and the response completes; MBPP: ""


@dataclass
class Example:
    """One line of a data set. The prompt is either `prompt` as it is, or is made from `instruction` and `input`."""

    where: str  # "file, line 7", for messages
    outputs: list[str]  # responses; training uses the first, evaluation compares with all
    prompt: str | None = None
    instruction: str = ""
    input: str = ""
    ends: bool = True  # False: a length limit cut the response, so no end-of-text follows
    code: CodeTask | None = None  # if given, the outputs are programs
    history: list[dict[str, str]] = field(default_factory=list)  # earlier turns {"role", "content"}; a system's first

    def prompt_text(self) -> str:
        """What a base model reads before the response."""
        if self.prompt is not None:
            return "\n\n".join([*(turn["content"] for turn in self.history), self.prompt])
        template = PROMPT_WITH_INPUT if self.input else PROMPT
        task, mark, ask = template.format(instruction=self.instruction, input=self.input).partition(MARKS["user"])
        return task + "".join(MARKS[turn["role"]] + turn["content"] for turn in self.history) + mark + ask


# ---------------------------------------------------------------------------------------------------------------------
# Rows


@dataclass
class Side:
    """One example as one model reads it: prompt and response ids; end-of-text is part of an uncut response."""

    prompt: list[int]
    response: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass
class Row:
    """One example, tokenised: for the student and, if there is a teacher, for the teacher, with the aligned pairs."""

    student: Side
    teacher: Side | None = None
    pairs: tuple[np.ndarray, np.ndarray] | None = None  # aligned (teacher, student) indices into the two responses
    states: np.ndarray | None = None  # (M, D) int16, the bits of bfloat16: the teacher's states (fast/cache.py)
    predictions: np.ndarray | None = None  # (M,) the teacher's arg-max tokens, also from fast/cache.py


@dataclass
class CutReport:
    """How much of the text did not fit."""

    examples: int = 0
    prompts_cut: int = 0
    responses_cut: int = 0
    prompt_characters: int = 0
    response_characters: int = 0

    def __str__(self) -> str:
        if not self.prompts_cut and not self.responses_cut:
            return f"{self.examples} examples, none cut"
        return (
            f"{self.examples} examples; cut to fit: {self.prompts_cut} prompts ({self.prompt_characters} characters), "
            f"{self.responses_cut} responses ({self.response_characters} characters)"
        )


def tokenise(
    examples: list[Example],
    student,
    teacher=None,
    max_len: int = 512,
    max_prompt_len: int = 256,
    align: str | None = None,
) -> tuple[list[Row], CutReport]:
    """Rows of at most `max_len` tokens (prompt, response and end-of-text together) for each model.

    align: "eta" also aligns the tokens of each response; "none" requires both models to have the same tokens. Raises
    ValueError, naming the example, if one cannot fit or differs.
    """
    tokenizers = [student] if teacher is None else [student, teacher]
    rows, report, limit = [], CutReport(len(examples)), min(max_prompt_len, max_len - 1)
    for example, *sides in zip(examples, *(t.encode_examples(examples) for t in tokenizers), strict=True):
        if any(len(side.prompt) > limit or len(side) > max_len for side in sides):
            shorter = cut_to_fit(example, tokenizers, limit, max_len, report)
            sides = [next(tokenizer.encode_examples([shorter])) for tokenizer in tokenizers]
        if not all(side.prompt for side in sides):
            raise ValueError(f"{example.where}: the prompt has no tokens, so nothing could predict the response")
        if not all(side.response for side in sides):
            raise ValueError(f"{example.where}: the response has no tokens")
        if align == "none" and sides[0].response != sides[-1].response:
            raise ValueError(
                f"{example.where}: the tokenizers split this response differently, or one lacks a token of it that the "
                "other has; use --align eta (recipe v2) or cma (recipe v1)"
            )
        rows.append(Row(*sides))
        if align == "eta":
            rows[-1].pairs = align_responses(rows[-1], student, teacher)
    return rows, report


def align_responses(row: Row, student, teacher) -> tuple[np.ndarray, np.ndarray]:
    """(teacher, student) indices of the response tokens that are equal and have equal histories."""
    return exact_token_alignment(teacher.spell(row.teacher.response), student.spell(row.student.response))


def cut_to_fit(example: Example, tokenizers: list, limit: int, max_len: int, report: CutReport) -> Example:
    """The example with its prompt and its response cut if they do not fit into one of the models."""
    shorter = cut_prompt(example, tokenizers, limit)
    if shorter is not example:
        before, after = (len(tokenizers[0].prompt_text(either)) for either in (example, shorter))
        report.prompts_cut += 1
        report.prompt_characters += max(0, before - after)
    fitting = cut_response(shorter, tokenizers, max_len)
    if fitting is not shorter:
        report.responses_cut += 1
        report.response_characters += len(shorter.outputs[0]) - len(fitting.outputs[0])
    return fitting


def cut_prompt(example: Example, tokenizers: list, limit: int) -> Example:
    """The example, cut so that its prompt has at most `limit` tokens with each tokenizer, in that tokenizer's format.
    The remaining text is the same for all. Raises ValueError if this is impossible."""

    def fits(example: Example) -> bool:
        return all(len(tokenizer.encode_prompt(tokenizer.prompt_text(example))) <= limit for tokenizer in tokenizers)

    def shorten(example: Example, part: str) -> tuple[int, Example]:
        length = find_longest(len(getattr(example, part)), lambda n: fits(keep(example, part, n)))
        return length, keep(example, part, max(length, 0))

    system = list(takewhile(lambda turn: turn["role"] == "system", example.history))
    while len(example.history) > len(system) and not fits(example):  # drop the oldest question with its answer
        later = [i for i, turn in enumerate(example.history) if i > len(system) and turn["role"] == "user"]
        example = replace(example, history=system + example.history[later[0] :] if later else system)
    if fits(example):
        return example
    for part in ["prompt"] if example.prompt is not None else ["input", "instruction"]:
        length, example = shorten(example, part)  # too long even without context: next, the instruction
        if length > 0 or length == 0 and part != "prompt":
            return example
    raise ValueError(f"{example.where}: the prompt does not fit into --max-prompt-len {limit}")


def keep(example: Example, part: str, length: int) -> Example:
    """The example with the first `length` characters of its input or instruction, or with the last ones of its prompt,
    because a whole prompt has its answer marker at the end."""
    text = getattr(example, part)
    return replace(example, **{part: text[len(text) - length :] if part == "prompt" else text[:length]})


def cut_response(example: Example, tokenizers: list, max_len: int) -> Example:
    """The example with as much of its first response as fits after the prompt. A cut response has no end, and is cut
    between two tokens of each tokenizer if there is such a place nearby. Raises ValueError if nothing fits."""
    text = example.outputs[0]
    rooms = [max_len - len(tokenizer.encode_prompt(tokenizer.prompt_text(example))) for tokenizer in tokenizers]

    def fits(length: int, end_of_text: int = 0) -> bool:
        lengths = [len(tokenizer.encode(text[:length])) + end_of_text for tokenizer in tokenizers]
        return all(length <= room for length, room in zip(lengths, rooms, strict=True))

    if fits(len(text), example.ends):
        return example
    length = find_longest(len(text), fits)
    if length < 1:
        raise ValueError(f"{example.where}: no room for a response within --max-len {max_len}")

    wholes = [tokenizer.encode(text) for tokenizer in tokenizers]

    def is_between_tokens(length: int) -> bool:  # tokens of the whole text: part of one would be a wrong last label
        if not fits(length):  # a shorter text may have more tokens (`find_longest`)
            return False
        parts = [tokenizer.encode(text[:length]) for tokenizer in tokenizers]
        return all(whole[: len(part)] == part for part, whole in zip(parts, wholes, strict=True))

    length = next(filter(is_between_tokens, range(length, max(0, length - 32), -1)), length)
    return replace(example, outputs=[text[:length]], ends=False)


def find_longest(length: int, fits: Callable[[int], bool]) -> int:
    """The largest n in [0, length] that fits, -1 if not even 0 does; by bisection, since longer texts have more tokens.

    (A merge may make a longer text one token shorter. Then n fits and n + 1 does not, but a larger number might.)
    """
    if fits(length):
        return length
    return length - 1 - bisect_left(range(length), True, key=lambda dropped: fits(length - 1 - dropped))


def replace_response(row: Row, response: list[int], student, teacher, max_len: int, align: str) -> Row:
    """The row with a response that the student sampled in place of the gold one (v2, eq. 18).

    The student keeps the sampled ids, even if its tokenizer would split their text differently. With `align` "none" the
    teacher reads the same ids, otherwise their text:

    - bytes that are not UTF-8 become U+FFFD in the text, and such tokens have no exact counterpart; if the length limit
      cut a character in two, the teacher's text ends before it;
    - end-of-text is on both sides or on neither; it replaces any other end that the student wrote;
    - what does not fit into the teacher's `max_len` is cut off on both sides.

    Returns `row` itself if a side has no token left (only special tokens before the cut, or no room) and, with `align`
    "none", if the teacher lacks one of the tokens.
    """
    if response and response[-1] in student.end_ids:
        response = [*response[:-1], student.eos_id]

    def for_teacher(length: int) -> list[int]:
        """The teacher's tokens of the first `length` of the student's."""
        if align == "none":
            return response[:length]
        if length == len(response) and response[-1] == student.eos_id:
            return [*teacher.encode(student.decode(response[:-1])), teacher.eos_id]
        return teacher.encode(student.decode(response[:length]).rstrip("\ufffd"))

    room = max_len - len(row.teacher.prompt)
    length = find_longest(len(response), lambda n: len(for_teacher(n)) <= room) if response else 0
    if length < 1 or not for_teacher(length):
        return row
    if align == "none" and student.names(response) != teacher.names(response):
        return row
    sampled = Row(Side(row.student.prompt, response[:length]), Side(row.teacher.prompt, for_teacher(length)))
    if align == "eta":
        sampled.pairs = align_responses(sampled, student, teacher)
    return sampled


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def move_to(batch, device):
    """A copy of a batch with its tensors on `device`. Copies to CUDA do not block the CPU; that needs pinned memory."""
    pin, moved = torch.device(device).type == "cuda", {}
    for name, value in vars(batch).items():
        if isinstance(value, Tensor):
            value = value.pin_memory().to(device, non_blocking=True) if pin else value.to(device)
        moved[name] = value.to(device) if isinstance(value, ModelBatch) else value
    return type(batch)(**moved)


@dataclass
class ModelBatch:
    """What one model reads, and its R response positions, flattened. There is no attention mask: padding is on the
    right, where causality hides it from every position that is used."""

    input_ids: Tensor  # (B, T), padded to the longest example
    real: Tensor  # (P,) the positions that are computed, in the flattened (B·T): all but padding (and see `collate`)
    positions: Tensor  # (R,) of the response positions in the flattened (B·T)
    labels: Tensor  # (R,) the token that each of them predicts
    lengths: list[int]  # (B,) how many of the R belong to each example

    to = move_to

    @property
    def inputs(self) -> Tensor:
        """(R,) the token that is read at each response position."""
        return self.input_ids.flatten()[self.positions]


@dataclass
class Batch:
    """B examples: N student and M teacher response positions, and which of them are aligned."""

    student: ModelBatch
    teacher: ModelBatch | None = None
    teacher_index: Tensor | None = None  # (A,) into the M teacher positions
    student_index: Tensor | None = None  # (A,) into the N student positions
    align_ratios: list[float] = field(default_factory=list)  # aligned pairs over student tokens, per example
    teacher_hidden: Tensor | None = None  # (M, D) bfloat16, where the rows have states
    teacher_predictions: Tensor | None = None  # (M,)

    to = move_to


STEP = 128  # tokens: with a width, the length of ModelBatch.real is a multiple of it


def collate_side(sides: list[Side], pad_id: int, width: int = 0) -> ModelBatch:
    """Pad on the right and shift once: position i reads token i and predicts token i+1. width: as in `collate`."""
    read = [torch.tensor((side.prompt + side.response)[:-1]) for side in sides]  # nothing follows the last token
    input_ids = pad_sequence(read, batch_first=True, padding_value=pad_id)  # (B, T)
    input_ids = pad(input_ids, (0, max(0, width - input_ids.shape[1])), value=pad_id)
    column = torch.arange(input_ids.shape[1])
    real = column < torch.tensor([[len(ids)] for ids in read])  # (B, T)
    # the last prompt token predicts the first response token
    predicting = real & (column >= torch.tensor([[len(side.prompt) - 1] for side in sides]))  # (B, T)
    labels = torch.tensor([token for side in sides for token in side.response])  # (R,)
    if width:  # every sequence keeps its tokens at the front
        more = (~real).flatten().nonzero()[: -int(real.sum()) % STEP, 0]
        real.view(-1)[more] = True
    places = (mask.flatten().nonzero()[:, 0] for mask in (real, predicting))
    return ModelBatch(input_ids, *places, labels, [len(side.response) for side in sides])


def collate(rows: list[Row], student_pad: int, teacher_pad: int = 0, width: int = 0) -> Batch:
    """One batch of rows. No response position reads the padding ids, so any valid id will do.

    width: pad to (B, width), and count padding as real up to a multiple of STEP tokens, so that batches have few
    shapes, and a CUDA graph can be kept for each.
    """
    batch = Batch(collate_side([row.student for row in rows], student_pad, width))
    if rows[0].teacher is not None:
        batch.teacher = collate_side([row.teacher for row in rows], teacher_pad, width)
    if rows[0].pairs is not None:
        batch.teacher_index = shift([row.pairs[0] for row in rows], batch.teacher.lengths)  # (A,)
        batch.student_index = shift([row.pairs[1] for row in rows], batch.student.lengths)  # (A,)
        batch.align_ratios = [len(row.pairs[1]) / len(row.student.response) for row in rows]
    if rows[0].states is not None:
        batch.teacher_hidden = torch.from_numpy(np.concatenate([row.states for row in rows])).view(torch.bfloat16)
    if rows[0].predictions is not None:
        batch.teacher_predictions = torch.from_numpy(np.concatenate([row.predictions for row in rows])).long()
    return batch


def shift(indices: list[np.ndarray], lengths: list[int]) -> Tensor:
    """Turn indices into each example's response into indices into all responses, concatenated."""
    starts = np.cumsum([0, *lengths[:-1]])
    return torch.from_numpy(np.concatenate([index + start for index, start in zip(indices, starts, strict=True)]))
