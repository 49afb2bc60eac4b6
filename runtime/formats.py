"""Read data files in the common formats, and say what is wrong with a file or a record."""

import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from data import CodeTask, Example

# The prompt of MBPP's paper, without its three worked examples (Austin et al., arXiv 2108.07732)
MBPP_PROMPT = (
    "You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:\n\n"
    "{tests}\n[BEGIN]\n"
)
ASKS = "prompt", "instruction", "question", "problem", "query"  # the keys of a pair; the first one present counts
ANSWERS = "output", "completion", "response", "solution", "answer"
CONTEXTS, SYSTEMS = ("input", "context"), ("system", "system_prompt", "system_message")
UNREAD = set(  # keys of a record or a turn that would change the text in a way that this file does not know
    "tools functions tool_calls function_call document documents passage contexts image images video videos audio "
    "audios choices options chat_history conversation_history reasoning_content chat_template "
    "chat_template_kwargs".split()
)
ROLES = {"user": "user", "human": "user", "prompter": "user", "system": "system", "developer": "system"}
ROLES |= dict.fromkeys("assistant gpt chatgpt bot model ai bing bard".split(), "assistant")


def read_examples(path: str | Path, first: int = 0, last: int | None = None) -> list[Example]:
    """The examples [first, last): lines of a JSONL file, items of a JSON array, or rows of a parquet file. Those with
    an empty output are left out, with a note. Raises ValueError with the file, the place and the key of an error, and
    the format that the record seems to have."""
    examples = [read_record(record, where) for where, record in read_records(path, first, last)]
    empty = [example.where.removeprefix(f"{path}, ") for example in examples if not all(example.outputs)]
    if empty:
        places = ", ".join(empty[:10]) + " and others" * (len(empty) > 10)
        print(f"note: {path}: examples with an empty output are left out: {places}", file=sys.stderr)
    if len(examples) == len(empty):
        raise ValueError(f"{path}: no examples")
    return [example for example in examples if all(example.outputs)]


def read_records(path: str | Path, first: int, last: int | None) -> Iterator[tuple[str, object]]:
    """Each record and its place. The kind of file is recognised by its content, not its name."""
    content = Path(path).read_bytes()
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: looks like a gzip file, but is damaged: {error}") from error
    try:
        text = "" if content.startswith(b"PAR1") else content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason}), gzip or parquet") from error
    if content.startswith(b"PAR1"):
        place, records = "row", read_parquet(path, content)
    elif text.lstrip()[:1] == "[":
        place, records = "item", parse(text, f"{path}, which begins as a JSON array")
    else:  # split at "\n" only: str.splitlines also cuts at U+2028 and U+0085, which may occur inside a JSON string
        place, records = "line", text.split("\n")
    for number, record in enumerate(records[first:last], first + 1):
        where = f"{path}, {place} {number}"
        if place != "line" or record.strip():
            yield where, parse(record, where) if place == "line" else record


def parse(text: str, where: str):
    try:
        return json.loads(text, object_pairs_hook=refuse_repeated_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}; expected one object per line, or an array of objects") from error


def refuse_repeated_keys(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object's keys and values. Raises ValueError for a repeated key, of which json would use the last value."""
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError(f"the key {max(keys, key=keys.count)!r} appears twice")
    return dict(pairs)


def read_parquet(path: str | Path, content: bytes) -> list[dict]:
    try:
        from pyarrow import parquet  # nothing else needs this package

        return parquet.read_table(io.BytesIO(content)).to_pylist()
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: reading parquet needs pyarrow (or convert it to JSONL): {error}") from error


def read_record(record: object, where: str) -> Example:
    """A record's example. A key whose value is null counts as missing. Raises ValueError for a key that would change
    the prompt or the response and is not supported."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(record).__name__}")
    record = {key: value for key, value in record.items() if value is not None}
    if type(record.get("answer")) in (int, float):
        record["answer"] = str(record["answer"])
    read, looks = next((FORMS[key] for key in FORMS if key in record), (read_pair, None))
    try:
        refuse_unread(record)
        if wrong := [key for key in ("label", "kto_tag") if record.get(key) is False]:
            raise ValueError(f"{wrong[0]!r} is false: a response that should not be learned, as in KTO's data; drop "
                             "the record, or drop the key if it means something else")  # fmt: skip
        example = read(record, where)
        if not example.input and get_only(record, CONTEXTS) and "instruction" not in record:
            raise ValueError(f"{' or '.join(CONTEXTS)} is given beside a whole prompt: put it into the prompt")
        if not isinstance(record.get("end_of_text", True), bool):
            raise ValueError(f"'end_of_text' must be true or false, found {type(record['end_of_text']).__name__}")
        system = [{"role": "system", "content": text} for text in [get_only(record, SYSTEMS)] if text]
        turns = read_turns(record.get("history") or []) + example.history
        example.history = turns if system == turns[:1] else system + turns
        example.ends = record.get("end_of_text", True)
    except ValueError as error:
        looks = f"it looks like {looks}" if looks else f"known formats: {', '.join(form for _, form in FORMS.values())}"
        raise ValueError(f"{where}: {error}; {looks}") from None
    return example


def read_pair(record: dict, where: str) -> Example:
    if isinstance(record.get("prompt"), list) and isinstance(record.get("completion"), list):
        return read_conversation({"messages": record["prompt"] + record["completion"]}, where)
    asks, answers = ([key for key in keys if key in record] for keys in (ASKS, ANSWERS))
    if not asks or not answers:
        raise ValueError("neither 'prompt' nor 'instruction'" if not asks else "the response is missing")
    outputs = get_strings(record, answers[0])
    final = record.get("answer") not in (None, "", "proof", "notfound")  # NuminaMath's words for no final answer
    if final and (asks[0], answers[0]) in (("problem", "solution"), ("question", "solution"), ("problem", "answer")):
        solution = get_string(record, "solution", "")  # MATH's solutions mark the final answer
        outputs = [solution if "\\boxed{" in solution else f"{solution}\n#### {get_string(record, 'answer')}".lstrip()]
    if asks[0] == "prompt":  # a prompt is complete: an instruction beside it is what it was made from
        if not get_string(record, "prompt"):
            raise ValueError("'prompt' is empty, so nothing could predict the first response token")
        return Example(where, outputs, prompt=record["prompt"])
    return Example(where, outputs, instruction=get_only(record, asks), input=get_only(record, CONTEXTS))


def read_humaneval(record: dict, where: str) -> Example:
    keys = "entry_point", "prompt", "test", "canonical_solution"
    name, prompt, test, solution = (get_string(record, key) for key in keys)
    if f"def {name}(" not in prompt:
        raise ValueError(f"'prompt' does not define the 'entry_point' {name!r}")
    return Example(where, [solution], prompt=prompt, code=CodeTask(f"{test}\ncheck({name})\n", name))


def read_mbpp(record: dict, where: str) -> Example:
    tests = "\n".join(get_strings(record, "test_list"))
    text = get_string(record, "text" if "text" in record else "prompt")  # "prompt" in the sanitised form
    imports = get_strings(record, "test_imports") if record.get("test_imports") else []
    # the set-up uses the program's classes, so it comes after the program
    setup = "\n".join([*imports, get_string(record, "test_setup_code", "")])
    prompt = MBPP_PROMPT.format(text=text, tests=tests)
    tests = get_string(record, "test", tests)  # MBPP+ has more of them; the prompt shows only test_list
    return Example(where, [get_string(record, "code")], prompt=prompt, code=CodeTask(f"{setup}\n{tests}\n"))


def read_conversation(record: dict, where: str) -> Example:
    """The last turn is the response and the one before it the message; earlier turns are context, not trained on."""
    turns = read_turns(record.get("messages", record.get("conversations")))
    response = next((key for key in ANSWERS if record.get(key)), None)
    if not turns and not response:
        return Example(where, [""])  # as in ShareGPT: left out
    if turns and turns[-1]["role"] == "user":  # its response stands beside it; without one it is left out too
        turns.append({"role": "assistant", "content": get_string(record, response) if response else ""})
    if [turn["role"] for turn in turns[-2:]] != ["user", "assistant"]:
        raise ValueError("the last two turns must be a user's and an assistant's; drop later turns, or this record")
    *history, ask, answer = turns
    return Example(where, [answer["content"]], instruction=ask["content"], history=history)


def read_turns(turns: object) -> list[dict[str, str]]:
    """Turns {"role", "content"}, from a list of such turns, of {"from", "value"}, or of [user, assistant] pairs."""
    if not isinstance(turns, list):
        raise ValueError(f"expected a list of turns, found {type(turns).__name__}")
    read: list[dict[str, str]] = []
    for turn in turns:
        if isinstance(turn, list) and len(turn) == 2:
            read += read_turns([{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}])
            continue
        if not isinstance(turn, dict):
            raise ValueError("a turn must be an object with role and content, or a pair of texts, user and assistant")
        refuse_unread(turn, UNREAD | {"thinking", "reasoning"})
        role, content = str(turn.get("role", turn.get("from"))), turn.get("content", turn.get("value"))
        if role.lower() not in ROLES:
            raise ValueError(f"a turn has the role {role!r}, which is neither system, user nor assistant")
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(get_string(part, "text") for part in content)
        read.append({"role": ROLES[role.lower()], "content": get_string({"content": content}, "content")})
    return read


FORMS = {  # the key that identifies a format: the function that reads it, and its name and fields
    "messages": (read_conversation, "chat messages (messages: a list of role, content)"),
    "conversations": (read_conversation, "ShareGPT's format (conversations: a list of from, value)"),
    "test_list": (read_mbpp, "MBPP's format (text or prompt, code, test_list, test_setup_code or test_imports)"),
    "entry_point": (read_humaneval, "HumanEval's format (prompt, entry_point, canonical_solution, test)"),
    "context": (read_pair, "Dolly's format (instruction, context, response)"),
    "question": (read_pair, "GSM8K's format (question, answer)"),
    "problem": (read_pair, "MATH's format (problem, solution, answer)"),
    "instruction": (read_pair, "Alpaca's format (instruction, input, output) or Dolly's (with response for output)"),
    "prompt": (read_pair, "a pair (prompt, and output or completion)"),
}

def refuse_unread(record: dict, keys: set[str] = UNREAD) -> None:
    unread = sorted(key for key in keys & record.keys() if record[key] not in (None, "", [], {}, "[]", False))
    if unread:
        raise ValueError(f"{unread[0]!r} would change the text, but is not supported; drop the record, or drop the key "
                         "if the text is right without it")  # fmt: skip


def get_only(record: dict, keys: Iterable[str]) -> str:
    """The text under one of several keys with the same meaning, "" without any. Raises ValueError if texts differ."""
    texts = {get_string(record, key): key for key in keys if record.get(key, "") != ""}
    if len(texts) > 1:
        raise ValueError(f"{' and '.join(texts.values())} differ, and either could be meant")
    return next(iter(texts), "")


def get_strings(record: dict, key: str) -> list[str]:
    """The string or strings under that key, at least one."""
    values = record[key] if isinstance(record[key], list) and record[key] else [record[key]]
    return [get_string({key: value}, key) for value in values]


def get_string(record: dict, key: str, default: str | None = None) -> str:
    """The string under that key. Raises ValueError if the value is not a string, or is missing without a default."""
    value = record.get(key, default)
    if not isinstance(value, str):
        wrong = "is missing" if key not in record else f"must be a string, found {type(value).__name__}"
        raise ValueError(f"{key!r} {wrong}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can contain half of a surrogate pair, a lone \ud83d
        raise ValueError(f"{key!r} has half a surrogate pair at character {error.start}") from error
    return value
