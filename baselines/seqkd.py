"""Sequence-level distillation (SeqKD, arXiv 1606.07947): the teacher answers the training prompts once, and the student
is fine-tuned on these answers as if they were gold.

Answers are greedy by default, the cheapest approximation of the mode of the teacher's distribution (the paper uses a
beam). They form an ordinary data set with the original prompts, except for what was cut. An answer that stopped at the
length limit has "end_of_text": false, so that the student does not learn to stop there. The first line also holds the
recipe, by which a later run knows whether it would get the same answers.
"""

import hashlib
import json
import sys
from pathlib import Path

from tqdm import tqdm

from data import Example
from fast.cache import model_digest
from fast.cpu import packed
from fast.cuda import graphed
from model import generate


def answer_prompts(
    examples: list[Example], model, teacher, student, max_len: int, temperature: float, seed: int, batch_size: int
) -> list[dict]:
    """The lines of a JSONL file with `model`'s responses to the prompts of the examples, in their order.

    teacher, student: the tokenizers. The teacher gets the prompts in its format; they are written as the student's
    format needs them. Empty responses are dropped and counted on standard error. Raises ValueError if all are empty.
    """
    ids = [teacher.encode_prompt(teacher.prompt_text(example)) for example in examples]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))  # equal lengths together; the most memory first
    lines: dict[int, dict] = {}
    every = 0.1 if sys.stderr.isatty() else 30  # seconds; a log file needs no animation
    with packed(model), graphed(model):
        for start in tqdm(range(0, len(order), batch_size), desc="teacher's answers", unit="batch", mininterval=every):
            chosen = order[start : start + batch_size]
            room = [max_len - len(ids[i]) for i in chosen]
            options = teacher.end_ids, temperature, 0, 1.0, seed * 1_000_003 + start, teacher.size
            for i, new in zip(chosen, generate(model, [ids[i] for i in chosen], room, *options), strict=True):
                ended = new[-1] in teacher.end_ids
                text = teacher.decode(new) if ended else teacher.decode(new).rstrip("\ufffd")  # half a character
                if text.strip():
                    lines[i] = {**write_prompt(examples[i], student), "output": text}
                    lines[i] |= {} if ended else {"end_of_text": False}
    unended, dropped = sum("end_of_text" in line for line in lines.values()), len(ids) - len(lines)
    print(f"seqkd: {len(ids)} answers by the teacher; {unended} stopped at --max-len {max_len}, and {dropped} empty "
          "ones were dropped", file=sys.stderr)  # fmt: skip
    if not lines:
        raise ValueError(f"{teacher.directory}: all of the teacher's answers are empty")
    return [lines[i] for i in sorted(lines)]


def write_prompt(example: Example, student) -> dict:
    before = {"history": example.history} if example.history else {}
    if example.prompt is None:
        return {**before, "instruction": example.instruction, "input": example.input}
    return {**before, "prompt": student.chat.message(example) if student.chat else example.prompt}


def make_recipe(
    examples: list[Example], model: Path, teacher, student, max_len: int, temperature: float, seed: int
) -> dict:
    """Everything that the answers to these examples, which are already cut, depend on."""
    prompts = [teacher.prompt_text(example) for example in examples]
    recipe = {
        "teacher": str(model.resolve()), "weights": model_digest(model), "max_len": max_len,
        "temperature": temperature, "seed": seed if temperature else None,
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "student_chat": True if student.chat else None,  # then HumanEval's prompts are written as messages
    }  # fmt: skip
    if teacher.prefix:
        recipe["bos"] = teacher.prefix
    if len(teacher.end_ids) > 1:
        recipe["ends"] = sorted(teacher.end_ids)
    return recipe


def read_recipe(file: Path) -> dict | None:
    """How a file of answers was made, from its first line; None if it is not such a file."""
    with open(file, encoding="utf-8-sig") as stream:
        try:
            recipe = json.loads(stream.readline())["seqkd"]
        except (ValueError, RecursionError, TypeError, KeyError):  # a blank first line, for instance
            return None
    return recipe if isinstance(recipe, dict) else None


def compare_recipes(before: dict | None, recipe: dict) -> list[str]:
    """The names of the values that differ."""
    before = {"weights": recipe["weights"], "student_chat": None} | (before or {})  # older files lack these two
    return [name for name in {**recipe, **before} if before.get(name) != recipe.get(name)]
