"""Data files of any format that is understood, and what can be wrong with them.

Whoever opens a file that others wrote asks `read_examples`; `data.read_jsonl` reads one of ours.
"""

import json
from pathlib import Path

from data import CodeTask, Example, make_example

# The prompt of MBPP's paper, without its three worked examples (Austin et al., arXiv 2108.07732)
MBPP_PROMPT = (
    "You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:\n\n"
    "{tests}\n[BEGIN]\n"
)


def read_examples(path: str | Path, first: int = 0, last: int | None = None) -> list[Example]:
    """The examples on lines [first, last) of a UTF-8 JSONL file; blank lines are skipped.

    A line is one of ours (`data.make_example`) or, without an `output`, as these sets publish it: GSM8K {"question",
    "answer"}, HumanEval {"task_id", "prompt", "entry_point", "canonical_solution", "test"}, MBPP {"text", "code",
    "test_list", "test_setup_code" (optional)}. Raises ValueError naming file, line and key of what is wrong.
    """
    try:
        # split on "\n" alone: str.splitlines also cuts at U+2028 and U+0085, which may stand inside a JSON string
        lines = Path(path).read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason})") from error
    examples, empty = [], []
    for number, line in enumerate(lines[first:last], start=first + 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line, object_pairs_hook=refuse_repeated_keys)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected a JSON object, found {type(record).__name__}")
        examples.append(read_record(record, where))
        if not all(examples[-1].outputs):
            empty.append(str(number))
    if empty:
        lines = f"line {empty[0]}" if len(empty) == 1 else f"lines {', '.join(empty[:10])}"
        more = " and others" if len(empty) > 10 else ""
        raise ValueError(
            f"{path}: the output is empty on {lines}{more}; drop these lines, there is no response to learn from"
        )
    if not examples:
        raise ValueError(f"{path}: no examples")
    return examples


def refuse_repeated_keys(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object's keys and values; of a key that comes twice json would take the last value without a word."""
    record: dict = {}
    for key, value in pairs:
        if key in record:
            raise ValueError(f"the key {key!r} comes twice")
        record[key] = value
    return record


def read_record(record: dict, where: str) -> Example:
    """A line's example; the keys that only one of the formats has tell which it is."""
    if "output" not in record:
        if "question" in record:
            return read_gsm8k(record, where)
        if "entry_point" in record or "canonical_solution" in record:
            return read_humaneval(record, where)
        if "test_list" in record:
            return read_mbpp(record, where)
        raise ValueError(f"{where}: 'output' is missing")
    outputs = [record["output"]] if isinstance(record["output"], str) else record["output"]
    if not is_list_of_strings(outputs):
        raise ValueError(f"{where}: 'output' must be a string or a list of strings")
    for output in outputs:
        check_characters(output, "output", where)
    if not isinstance(record.get("end_of_text", True), bool):
        found = type(record["end_of_text"]).__name__
        raise ValueError(f"{where}: 'end_of_text' must be true or false, found {found}")
    if "prompt" in record:
        if not get_string(record, "prompt", where):
            raise ValueError(f"{where}: 'prompt' is empty, so that nothing could predict the first response token")
    elif "instruction" in record:
        get_string(record, "instruction", where)
        get_string(record, "input", where, default="")
    else:
        raise ValueError(f"{where}: neither 'prompt' nor 'instruction'")
    return make_example(record, where)


def read_gsm8k(record: dict, where: str) -> Example:
    return Example(where, [get_string(record, "answer", where)], instruction=get_string(record, "question", where))


def read_humaneval(record: dict, where: str) -> Example:
    keys = "entry_point", "prompt", "test", "canonical_solution"
    name, prompt, test, solution = (get_string(record, key, where) for key in keys)
    if not name.isidentifier() or f"def {name}(" not in prompt:
        raise ValueError(f"{where}: 'prompt' does not define the 'entry_point' {name!r}")
    return Example(where, [solution], prompt=prompt, code=CodeTask(f"{test}\ncheck({name})\n", name))


def read_mbpp(record: dict, where: str) -> Example:
    if not is_list_of_strings(record["test_list"]):
        raise ValueError(f"{where}: 'test_list' must be a list of strings, with at least one")
    for test in record["test_list"]:
        check_characters(test, "test_list", where)
    tests = "\n".join(record["test_list"])
    prompt = MBPP_PROMPT.format(text=get_string(record, "text", where), tests=tests)
    setup = get_string(
        record, "test_setup_code", where, default=""
    )  # it uses the program's classes, so it comes after it
    return Example(where, [get_string(record, "code", where)], prompt=prompt, code=CodeTask(f"{setup}\n{tests}\n"))


def get_string(record: dict, key: str, where: str, default: str | None = None) -> str:
    """The string under that key. Raises ValueError if it is none, or if it is missing and has no default."""
    value = record.get(key, default)
    if not isinstance(value, str):
        wrong = "is missing" if key not in record else f"must be a string, found {type(value).__name__}"
        raise ValueError(f"{where}: {key!r} {wrong}")
    check_characters(value, key, where)
    return value


def is_list_of_strings(value: object) -> bool:
    """With at least one."""
    return isinstance(value, list) and len(value) > 0 and all(isinstance(item, str) for item in value)


def check_characters(text: str, key: str, where: str) -> None:
    """JSON can spell half of a surrogate pair (a lone \\ud83d), which is no character of any text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {key!r} has half a surrogate pair at character {error.start}") from error
