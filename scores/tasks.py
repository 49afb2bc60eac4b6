"""What is scored in a set of examples: the text (`rouge`), the final answers (`math`) or the programs (`code`)."""

import ast
import sys
from collections import Counter
from dataclasses import dataclass

from scores.answers import boxed, final_answer, number
from scores.programs import parse

MEASURES = {"rouge": "rouge_l", "math": "accuracy", "code": "pass_at_1"}  # task: the score that its table shows
MAX_LEN = {"rouge": 512, "math": 1024, "code": 1024}  # tokens of prompt and response together; half for the prompt


@dataclass
class DataSet:
    """Examples have `where` (for messages), `outputs` (the references) and `code` (the tests; None: not a program)."""

    name: str
    task: str
    examples: list


def task_of(examples: list, name: str, asked: str | None = None) -> str:
    """rouge, math or code: as asked, or as all the examples require. Raises ValueError if the examples do not fit."""
    with_tests = sum(example.code is not None for example in examples)
    if 0 < with_tests < len(examples) and asked != "rouge":
        raise ValueError(f"{name}: {with_tests} of {len(examples)} examples have tests; split them into two files")
    if asked == "code" and not with_tests:
        raise ValueError(f"{name}: --task code needs tests (as in HumanEval or MBPP), but these examples have none")
    for example in examples if asked == "math" else ():
        if example.code is not None:
            raise ValueError(f"{example.where}: --task math needs an answer, but this example has tests")
        if not all(final_answer(output) or output.strip() for output in example.outputs):
            raise ValueError(f"{example.where}: the output has no final answer, which --task math needs")
    if asked or with_tests:
        return asked or "code"
    return "math" if all(is_marked(output) for example in examples for output in example.outputs) else "rouge"


def is_marked(output: str) -> bool:
    """Whether a reference says where its final answer is: a last line `#### x`, or \\boxed{x}; or is just a number."""
    last = output.rstrip().rpartition("\n")[2].lstrip()
    return last.startswith("#### ") or boxed(output) is not None or number(output) is not None


def share_tokens(task: str, max_len: int | None, max_prompt_len: int | None, positions=2**31) -> tuple[int, int]:
    """(tokens of prompt and response together, tokens of the prompt); both shrink in proportion for a model with fewer
    positions. Raises ValueError if there is no room for a response."""
    max_len = max_len or MAX_LEN[task]
    max_prompt_len = max_prompt_len or max_len // 2
    if max_prompt_len >= max_len:
        raise ValueError(
            f"--max-prompt-len {max_prompt_len} leaves no token of --max-len {max_len} for the response; lower "
            "--max-prompt-len or raise --max-len"
        )
    if positions < max_len:
        max_len, max_prompt_len = positions, max(1, max_prompt_len * positions // max_len)
        print(f"note: the model has {max_len} positions: {max_prompt_len} tokens for the prompt and "
              f"{max_len - max_prompt_len} for the response", file=sys.stderr)  # fmt: skip
    return max_len, max_prompt_len


def check_tests(tests: str, where: str) -> None:
    """Raises ValueError for tests that no program could pass in the sandbox."""
    tree = parse(tests)
    if tree is None:
        raise ValueError(f"{where}: the tests are not valid Python")
    nodes = list(ast.walk(tree))
    guarded = {part for node in nodes if isinstance(node, ast.Try) for part in ast.walk(node)}
    needed = [node for node in nodes if node not in guarded]
    modules = [alias.name for node in needed if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module or "" for node in needed if isinstance(node, ast.ImportFrom)]
    here = {"", "solution", *sys.stdlib_module_names}  # solution: the program itself
    for name in sorted({module.partition(".")[0] for module in modules} - here):
        raise ValueError(f"{where}: the tests import {name}, but programs have only the standard library, so none "
                         "would pass; use tests without it, or --task rouge")  # fmt: skip


def check_sets(sets: list[DataSet], run_code: bool) -> None:
    """Raises ValueError for two sets with the same name, and for programs without --run-code or with unusable tests."""
    repeated = [name for name, count in Counter(data.name for data in sets).items() if count > 1]
    if repeated:
        raise ValueError(f"two sets are named {repeated[0]!r} and would write the same file; rename one of them")
    programs = [data.name for data in sets if data.task == "code"]
    if programs and not run_code:
        raise ValueError(
            f"{programs[0]}: scoring code means running a model's programs on this machine, in a sandbox that is not a "
            "perfect jail (scores/sandbox.py lists what it lacks); add --run-code, or score the text with --task rouge"
        )
    for example in (example for data in sets if data.task == "code" for example in data.examples):
        check_tests(example.code.tests, example.where)
    if programs:
        from scores.sandbox import check, describe_guards  # here, because it needs Unix

        print(describe_guards(check()), file=sys.stderr)
