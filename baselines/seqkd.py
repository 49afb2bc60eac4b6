"""Sequence-level distillation (SeqKD, arXiv 1606.07947): the teacher answers the training prompts, once, and the
student is fine-tuned on these answers as if they were gold.

Answers are greedy by default, the cheapest way near the mode of the teacher's distribution (the paper uses a beam).
They are a data set as any other, with the prompts of the original but for what was cut, so that each model may have a
format of its own; an answer that stopped at the length limit has
"end_of_text": false, so that the student does not learn to stop there.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from data import Example, TextTokenizer, cut_example, read_jsonl
from fast.cache import model_digest
from fast.cpu import packed
from model import generate, load_model
from runtime.run import write_text


def teacher_answers(
    file: Path,
    examples: list[Example],
    teacher_directory: Path,
    teacher: TextTokenizer,
    student: TextTokenizer,
    max_len: int,
    max_prompt_len: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 32,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    first: int | None = None,
) -> list[Example]:
    """The examples with the teacher's responses: read from `file` if it is there, otherwise generated and written.

    The file appears when it is complete. `first`: only that many examples, and nothing is written. Prompts are cut so
    that they fit both models; empty responses are dropped and counted. Raises ValueError if the file there was made in
    another way, or if the examples are such answers already.
    """
    if _recipe(Path(examples[0].where.rpartition(", line ")[0])) is not None:
        raise ValueError(f"{examples[0].where}: these are a teacher's answers; train on them with --method sft")
    limit = min(max_prompt_len, max_len - 1)
    asked = [cut_example(example, [student, teacher], limit) for example in examples]
    prompts = [teacher.prompt_text(example) for example in asked]
    recipe = {
        "teacher": str(teacher_directory.resolve()), "weights": model_digest(teacher_directory), "max_len": max_len,
        "temperature": temperature, "seed": seed if temperature else None,
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "student_chat": None if student.chat == "none" else student.chat,  # in which the prompts are written down
    }  # fmt: skip
    if teacher.prefix:
        recipe["bos"] = teacher.prefix
    if len(teacher.end_ids) > 1:
        recipe["ends"] = sorted(teacher.end_ids)
    if file.is_file():
        unsaid = {"weights": recipe["weights"], "student_chat": None}  # by older files
        before = unsaid | (_recipe(file) or {})
        changed = [name for name in {**recipe, **before} if before.get(name) != recipe.get(name)]
        if changed:
            raise ValueError(
                f"{file} was made with other {' and '.join(changed)}: give another --out, or remove the file"
            )
        print(f"seqkd: the teacher's answers are those in {file}", file=sys.stderr)
        return read_jsonl(file)[:first]

    prompts = prompts[:first]
    model = load_model(teacher_directory, dtype, device)
    teacher.check_model(model.embed.weight.shape[0])
    if max_len > model.limit:
        raise ValueError(f"--max-len {max_len}: the teacher has only {model.limit} positions")
    ids = [teacher.encode_prompt(prompt) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))  # equal lengths together; the most memory first
    lines: list[dict | None] = [None] * len(ids)
    every = 0.1 if sys.stderr.isatty() else 30  # seconds; a log file needs no animation
    with packed(model):
        for start in tqdm(range(0, len(order), batch_size), desc="teacher's answers", unit="batch", mininterval=every):
            chosen = order[start : start + batch_size]
            room = max_len - len(ids[chosen[0]])  # of the longest prompt
            options = teacher.end_ids, temperature, 0, 1.0, seed * 1_000_003 + start, teacher.size
            for i, new in zip(chosen, generate(model, [ids[i] for i in chosen], room, *options), strict=True):
                ended = new[-1] in teacher.end_ids
                text = teacher.decode(new) if ended else teacher.decode(new).rstrip("\ufffd")  # half a character
                if text.strip():
                    x = asked[i]  # the prompt as the student's format takes it
                    prompt = {"prompt": x.prompt if student.chat == "none" else x.message()}
                    prompt = {"instruction": x.instruction, "input": x.input} if x.prompt is None else prompt
                    lines[i] = prompt | {"output": text} | ({} if ended else {"end_of_text": False})
    written = [line for line in lines if line is not None]
    unended = sum("end_of_text" in line for line in written)
    print(
        f"seqkd: {len(lines)} answers by the teacher, of which {unended} stopped at --max-len {max_len}, and "
        f"{len(lines) - len(written)} empty ones were dropped",
        file=sys.stderr,
    )
    if not written:
        raise ValueError(f"{teacher_directory}: all of the teacher's answers are empty")
    if first is not None:
        where = f"{teacher_directory}'s answer"
        fields = ({key: x[key] for key in x.keys() & {"prompt", "instruction", "input"}} for x in written)
        ends = ("end_of_text" not in x for x in written)
        return [Example(where, [x["output"]], **f, ends=e) for x, f, e in zip(written, fields, ends, strict=True)]
    written[0] = {**written[0], "seqkd": recipe}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in written))
    return read_jsonl(file)


def _recipe(file: Path) -> dict | None:
    """How a file of answers was made, from its first line; None if it is no such file."""
    if not file.is_file():
        return None
    with open(file, encoding="utf-8-sig") as stream:
        try:
            recipe = json.loads(stream.readline())["seqkd"]
        except (ValueError, RecursionError, TypeError, KeyError):  # a blank first line, for instance
            return None
    return recipe if isinstance(recipe, dict) else None
