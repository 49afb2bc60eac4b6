"""runtime/formats.py: the forms of data files as people have them, and what can be wrong with one."""

import gzip
import json
import sys

import pytest

from data import Example
from runtime.formats import read_examples
from scores.tasks import task_of


def write(tmp_path, content):
    path = tmp_path / "some.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read_one(tmp_path, record):
    [example] = read_examples(write(tmp_path, json.dumps(record)))
    return example


GSM8K = {"question": "How many?", "answer": "2 + 1 = <<2+1=3>>3\n#### 3"}
MATH = {"problem": "How many?", "solution": "It is $\\boxed{3}$.", "answer": "3", "level": 5}
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def one():\n    """1"""\n',
    "entry_point": "one",
    "canonical_solution": "    return 1\n",
    "test": "\n\ndef check(candidate):\n    assert candidate() == 1\n",
}
MBPP = {
    "text": "Write a function to give {one}.",
    "code": "def one():\r\n  return 1",
    "task_id": 1,
    "test_setup_code": "",
    "test_list": ["assert one() == 1", "assert one() != 2"],
    "challenge_test_list": [],
}
SANITISED = {**{key: MBPP[key] for key in ("code", "test_list")}, "prompt": MBPP["text"]}
SANITISED["test_imports"] = ["import math"]


def test_published_forms(tmp_path):
    lines = [GSM8K, HUMANEVAL, MBPP, {**MBPP, "test_setup_code": "x = one()"}, SANITISED]
    path = write(tmp_path, "\n".join(map(json.dumps, lines)))
    mathematics, completion, program, setup, sanitised = read_examples(path)
    assert (mathematics.instruction, mathematics.outputs) == (GSM8K["question"], [GSM8K["answer"]])
    assert mathematics.code is None and "### Instruction:\nHow many?" in mathematics.prompt_text()
    assert (completion.prompt, completion.outputs) == (HUMANEVAL["prompt"], [HUMANEVAL["canonical_solution"]])
    assert completion.code.entry_point == "one" and completion.code.tests == HUMANEVAL["test"] + "\ncheck(one)\n"
    assert program.prompt == sanitised.prompt == (
        "You are an expert Python programmer, and here is your task: Write a function to give {one}. Your code should "
        "pass these tests:\n\nassert one() == 1\nassert one() != 2\n[BEGIN]\n"
    )
    assert program.outputs == [MBPP["code"]] and program.code.entry_point == ""
    assert program.code.tests == "\nassert one() == 1\nassert one() != 2\n"
    assert setup.code.tests == "x = one()" + program.code.tests and "x = one()" not in setup.prompt
    assert sanitised.code.tests.startswith("import math\n") and sanitised.outputs == program.outputs
    assert read_one(tmp_path, {**SANITISED, "test_imports": []}).code.tests == program.code.tests  # most of its lines
    plus = read_one(tmp_path, {**SANITISED, "test": "for n in range(9):\n    assert one() == 1"})
    assert plus.prompt == program.prompt and plus.code.tests.endswith("\nfor n in range(9):\n    assert one() == 1\n")


@pytest.mark.parametrize(
    "record, output",
    [
        (MATH, MATH["solution"]), ({**MATH, "solution": "It is 3."}, "It is 3.\n#### 3"),
        ({"problem": "How many?", "answer": 204}, "#### 204"), ({**MATH, "solution": None}, "#### 3"),
        ({"question": "How many?", "solution": "3 left of 20.", "answer": "3"}, "3 left of 20.\n#### 3"),  # GSM-Plus
        ({"question": "How many?", "answer": "70"}, "70"), ({"question": "How many?", "answer": 27.0}, "27.0"),  # AIME
    ],
)  # fmt: skip
def test_sets_of_mathematics_are_graded_by_their_answer(tmp_path, record, output):
    example = read_one(tmp_path, record)
    assert (example.instruction, example.outputs) == ("How many?", [output])
    assert task_of([example], "some") == "math"


@pytest.mark.parametrize("answer", ["proof", "notfound", ""])
def test_numina_has_no_final_answer_in_some(tmp_path, answer):
    example = read_one(tmp_path, {"problem": "Prove it.", "solution": "So it is.", "answer": answer})
    assert example.outputs == ["So it is."] and task_of([example], "some") == "rouge"


SAID = [("user", "Hi"), ("assistant", "Hello"), ("user", "Name a color."), ("assistant", "Blue")]
MESSAGES = [{"role": role, "content": text} for role, text in SAID]
SYSTEM = {"role": "system", "content": "Be brief."}
PARTS = [{"type": "text", "text": "Name a "}, {"type": "text", "text": "color."}]
SAME = [  # records that say: "Be brief.", the turns before, "Name a color.", "Blue"
    {"instruction": "Name a color.", "output": "Blue", "system": "Be brief.", "history": [["Hi", "Hello"]]},
    {"instruction": "Name a color.", "context": "", "response": "Blue", "system_prompt": "Be brief.",
     "history": MESSAGES[:2], "category": "open_qa"},
    {"question": "Name a color.", "answer": "Blue", "input": None, "system": "Be brief.", "history": [["Hi", "Hello"]]},
    {"messages": [{"role": "developer", "content": "Be brief."}, *MESSAGES]},
    {"messages": [SYSTEM, *MESSAGES]}, {"messages": MESSAGES[2:], "system": "Be brief.", "history": [["Hi", "Hello"]]},
    {"messages": MESSAGES, "system": "Be brief.", "tools": [], "functions": {}, "image": "", "images": "[]",
     "choices": False, "prompt": "Hi"},
    {"messages": [SYSTEM, *MESSAGES[:2], {"role": "User", "content": PARTS, "tool_calls": None}, MESSAGES[3]]},
    {"conversations": [{"from": who, "value": text} for who, text in [("system", "Be brief."), ("human", "Hi"),
                       ("gpt", "Hello"), ("human", "Name a color."), ("chatgpt", "Blue")]], "id": "x_0"},
    {"prompt": [SYSTEM, *MESSAGES[:3]], "completion": MESSAGES[3:], "label": True},
    {"messages": [SYSTEM, *MESSAGES[:3]], "reasoning": "Hm.", "answer": "Blue"},  # Dolphin-R1
    {"messages": [SYSTEM, *MESSAGES], "system": "Be brief."},  # which they say already
    {"messages": [{"role": "prompter", "content": "Hi"}, {"role": "bot", "content": "Hello"}, MESSAGES[2],
                  {"role": "model", "content": "Blue"}], "system_message": "Be brief."},  # OASST, Gemma
]  # fmt: skip


@pytest.mark.parametrize("record", SAME)
def test_system_and_history_are_used(tmp_path, record):
    example = read_one(tmp_path, record)
    where, history = f"{tmp_path / 'some.jsonl'}, line 1", [SYSTEM, *MESSAGES[:2]]
    assert example == Example(where, ["Blue"], instruction="Name a color.", history=history)
    assert example.prompt_text() == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello\n\n### Instruction:\nName a color.\n\n"
        "### Response:\n"
    )


def test_pairs(tmp_path):
    def pair(**record):
        example = read_one(tmp_path, record)
        return example.prompt, example.instruction, example.input, example.outputs

    assert pair(prompt="p", completion="c") == pair(prompt="p", response="c", input="") == ("p", "", "", ["c"])
    assert pair(instruction="i", context="n", response=["a", "b"]) == (None, "i", "n", ["a", "b"])
    assert pair(instruction="i", input=None, output="o", context="n", response="r") == (None, "i", "n", ["o"])
    assert pair(question="q", context="c", answer="a") == (None, "q", "c", ["a"])
    assert pair(query="q", input="", context="c", answer="a", history="") == (None, "q", "c", ["a"])
    assert pair(prompt="p", completion="c", label=0) == ("p", "", "", ["c"])  # a class, not a verdict
    # a prompt is whole, and what it was made of may stand beside it
    assert pair(prompt="p i n", instruction="i", input="n", output="o") == ("p i n", "", "", ["o"])
    example = read_one(tmp_path, {"prompt": "p", "completion": "c", "system": "s", "history": [["a", "b"]]})
    assert example.prompt_text() == "s\n\na\n\nb\n\np"
    example = read_one(tmp_path, {"messages": [{**SYSTEM, "content": "t"}, *MESSAGES[2:]], "system": "s"})
    assert [turn["content"] for turn in example.history] == ["s", "t"]


@pytest.mark.parametrize("packed", [False, True])
def test_a_files_content_says_what_it_is(tmp_path, packed):
    records = [{"instruction": f"é {n}", "output": "o"} for n in range(4)]
    texts = [json.dumps(records), "\n " + json.dumps(records, indent=1), "\n".join(map(json.dumps, records))]
    for text in texts:
        content = b"\xef\xbb\xbf" + text.encode()
        path = write(tmp_path, gzip.compress(content) if packed else content)
        assert [example.instruction for example in read_examples(path)] == [f"é {n}" for n in range(4)]
        examples = read_examples(path, 1, 3)
        assert [example.instruction for example in examples] == ["é 1", "é 2"]
    assert examples[0].where == f"{path}, line 2"


def test_parquet_is_read_where_pyarrow_is(tmp_path, monkeypatch):
    path = write(tmp_path, b"PAR1 and more PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="some.jsonl: reading parquet needs pyarrow .*pyarrow"):
        read_examples(path)
    monkeypatch.undo()
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    with pytest.raises(ValueError, match="some.jsonl: reading parquet needs pyarrow .or convert it to JSONL.: "):
        read_examples(path)
    table = pyarrow.Table.from_pylist([{"messages": MESSAGES, "tools": None}, {"messages": MESSAGES, "tools": "[]"}])
    parquet.write_table(table, path)
    examples = read_examples(path)
    assert examples[1].history == MESSAGES[:2] and examples[1].where == f"{path}, row 2"


def without(record, key):
    return {name: value for name, value in record.items() if name != key}


DOLLY = {"instruction": "i", "context": "", "response": "r"}


@pytest.mark.parametrize(
    "record, message, form",
    [
        (without(GSM8K, "answer"), "the response is missing", "GSM8K's"),
        ({**GSM8K, "answer": True}, "'answer' must be a string, found bool", "GSM8K's"),
        ({**GSM8K, "question": []}, "'question' must be a string, found list", "GSM8K's"),
        ({**MATH, "solution": "", "answer": {"a": 1}}, "'answer' must be a string, found dict", "MATH's"),
        ({"problem": "p"}, "the response is missing", "MATH's"),
        (without(HUMANEVAL, "test"), "'test' is missing", "HumanEval's"),
        (without(HUMANEVAL, "canonical_solution"), "'canonical_solution' is missing", "HumanEval's"),
        (without(HUMANEVAL, "prompt"), "'prompt' is missing", "HumanEval's"),
        ({**HUMANEVAL, "entry_point": "two"}, "'prompt' does not define the 'entry_point' 'two'", "HumanEval's"),
        ({**HUMANEVAL, "entry_point": "one(); two"}, "'prompt' does not define the 'entry_point'", "HumanEval's"),
        (without(MBPP, "text"), "'prompt' is missing", "MBPP's"),
        (without(MBPP, "code"), "'code' is missing", "MBPP's"),
        ({**MBPP, "test_list": []}, "'test_list' must be a string, found list", "MBPP's"),
        ({**MBPP, "test_setup_code": 3}, "'test_setup_code' must be a string, found int", "MBPP's"),
        ({**SANITISED, "test_imports": [3]}, "'test_imports' must be a string, found int", "MBPP's"),
        (without(DOLLY, "response"), "the response is missing", "Dolly's format (instruction, context, response)"),
        ({**DOLLY, "tools": [{"name": "f"}]}, "'tools' would change the text, but is not supported", "Dolly's"),
        ({"prompt": "p", "completion": "c", "label": False}, "'label' is false: a response that should not", "a pair"),
        ({"messages": MESSAGES, "kto_tag": False}, "'kto_tag' is false: a response that should not", "chat messages"),
        ({**GSM8K, "contexts": ["a"]}, "'contexts' would change the text", "GSM8K's"),
        *[({**GSM8K, key: ["a"]}, f"'{key}' would change the text", "GSM8K's") for key in (
            "choices options documents passage functions images videos chat_history reasoning_content "
            "chat_template_kwargs".split())],
        ({**DOLLY, "system": "a", "system_prompt": "b"}, "system and system_prompt differ", "Dolly's"),
        ({**DOLLY, "context": "a", "input": "b"}, "input and context differ", "Dolly's"),
        ({**DOLLY, "question": "q"}, "instruction and question differ", "Dolly's"),
        ({"prompt": "p", "output": "o", "context": "c"}, "input or context is given beside a whole prompt", "Dolly's"),
        ({"messages": MESSAGES, "context": "c"}, "input or context is given beside a whole prompt", "chat messages"),
        ({**DOLLY, "history": "a"}, "expected a list of turns, found str", "Dolly's"),
        ({**DOLLY, "history": [["a"]]}, "a turn must be an object with role and content, or a pair", "Dolly's"),
        ({**DOLLY, "history": [["a", None]]}, "'content' must be a string, found NoneType", "Dolly's"),
        ({"messages": MESSAGES[3:]}, "the last two turns must be", "chat messages"),
        ({"messages": 3}, "expected a list of turns, found int", "chat messages"),
        ({"messages": [{**MESSAGES[2], "role": "tool"}, MESSAGES[3]]}, "a turn has the role 'tool'", "chat"),
        ({"messages": [MESSAGES[2], {**MESSAGES[3], "tool_calls": [1]}]}, "'tool_calls' would change", "chat messages"),
        *[({"messages": [MESSAGES[2], {**MESSAGES[3], key: "Hm."}]}, f"'{key}' would change", "chat messages")
          for key in ("thinking", "reasoning")],
        ({"messages": [{"content": "a"}, MESSAGES[3]]}, "a turn has the role 'None'", "chat messages"),
        ({"messages": [MESSAGES[2], {**MESSAGES[3], "content": None}]}, "'content' must be a string, found", "chat"),
        ({"messages": [{**MESSAGES[2], "content": [{"type": "image"}]}, MESSAGES[3]]}, "'content' must be a", "chat"),
        ({"conversations": [{"from": "human", "value": 3}]}, "'content' must be a string, found int", "ShareGPT's"),
        ({"text": "t"}, "neither 'prompt' nor 'instruction'", "known formats: chat messages"),
    ],
)  # fmt: skip
def test_what_a_record_lacks_is_named_with_what_it_looks_like(tmp_path, record, message, form):
    path = write(tmp_path, json.dumps(record))
    with pytest.raises(ValueError) as caught:
        read_examples(path)
    assert str(caught.value).startswith(f"{path}, line 1: {message}")
    assert form in str(caught.value).partition(message)[2]


GOOD = b'{"prompt": "p", "output": "o"}\n'
MALFORMED = {
    "not JSON": (GOOD + b"{'prompt': 1}\n", ["line 2", "not JSON", "expected one object per line, or an array"]),
    "cut off": (GOOD + GOOD + b'{"prompt": "p", "outp', ["line 3", "not JSON"]),
    "two objects on a line": (GOOD.strip() + b" " + GOOD, ["line 1", "not JSON"]),
    "a raw control character": (b'{"prompt": "a\tb", "output": "o"}\n', ["line 1", "not JSON"]),
    "an endless number": (b'{"prompt": "p", "output": "o", "id": ' + b"1" * 5000 + b"}\n", ["line 1", "not JSON"]),
    "an array": (GOOD + b'\n["prompt", "output"]\n', ["line 3", "object", "list"]),
    "an array of arrays": (b'[["prompt", "output"]]', ["item 1", "object", "list"]),
    "an array cut off": (b"[\n" + GOOD + b",", ["begins as a JSON array", "not JSON", "line 3"]),
    "an item of an array": (b"[" + GOOD + b', {"prompt": "p"}]', ["item 2", "the response is missing", "like a pair"]),
    "gzip cut off": (gzip.compress(GOOD)[:-9], ["looks like a gzip file, but is damaged"]),
    "gzip spoilt": (gzip.compress(GOOD)[:10] + b"\xff" * 9, ["looks like a gzip file, but is damaged"]),
    "null": (b"null\n", ["line 1", "object", "NoneType"]),
    "no output": (GOOD + b'{"prompt": "p"}\n', ["line 2", "the response is missing"]),
    "output null": (b'{"prompt": "p", "output": null}\n', ["line 1", "the response is missing"]),
    "output a number": (b'{"prompt": "p", "output": 3}\n', ["line 1", "'output' must be a string, found int"]),
    "output an empty list": (b'{"prompt": "p", "output": []}\n', ["line 1", "'output' must be"]),
    "output a list of numbers": (b'{"prompt": "p", "output": ["a", 3]}\n', ["line 1", "'output' must be"]),
    "no prompt": (b'{"output": "o"}\n', ["line 1", "neither 'prompt' nor 'instruction'"]),
    "prompt a list": (b'{"prompt": ["p"], "output": "o"}\n', ["line 1", "'prompt' must be a string, found list"]),
    "prompt empty": (GOOD + b'{"prompt": "", "output": "o"}\n', ["line 2", "'prompt' is empty"]),
    "instruction null": (b'{"instruction": null, "output": "o"}\n', ["line 1", "neither 'prompt' nor 'instruction'"]),
    "instruction a list": (b'{"instruction": [], "output": "o"}\n', ["line 1", "'instruction' must", "list"]),
    "input a number": (b'{"instruction": "i", "input": 3, "output": "o"}\n', ["line 1", "'input' must", "int"]),
    "outputs empty": (b'{"prompt": "p", "output": ""}\n' * 12, ["no examples"]),
    "end_of_text a word": (b'{"prompt": "p", "output": "o", "end_of_text": "no"}', ["line 1", "true or false, found"]),
    "an array without an end": (b"[" * 100_000, ["begins as a JSON array", "not JSON"]),
    "a key twice": (GOOD + b'{"prompt": "p", "output": "a", "output": "b"}',
                    ["line 2", "not JSON: the key 'output' appears twice"]),
    "half a surrogate pair": (b'{"prompt": "ab\\ud83d", "output": "o"}\n', ["line 1", "'prompt'", "surrogate", "2"]),
    "half a pair, output": (GOOD + b'{"prompt": "p", "output": ["o", "\\udc00"]}', ["line 2", "'output'", "surrogate"]),
    "not UTF-8": (GOOD + b"\n" + '{"prompt": "é", "output": "o"}\n'.encode("latin-1"), ["line 3", "not UTF-8"]),
    "not UTF-8 behind a BOM": (b"\xef\xbb\xbf{}\n\xff\n", ["line 2", "not UTF-8"]),
    "zstd": (b"\x28\xb5\x2f\xfd\x04", ["line 1", "not UTF-8 (invalid start byte), gzip or parquet"]),
    "UTF-16": ('{"prompt": "p", "output": "o"}\n'.encode("utf-16"), ["line 1", "not UTF-8"]),
    "empty": (b"", ["no examples"]),
    "an empty array": (b" [] ", ["no examples"]),
    "blank lines only": (b"\n \r\n\n", ["no examples"]),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_what_is_wrong_is_named_with_file_line_and_key(tmp_path, case):
    content, expected = MALFORMED[case]
    path = write(tmp_path, content)
    with pytest.raises(ValueError) as caught:
        read_examples(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and all(part in message for part in expected), message
    assert "\n" not in message


def test_an_empty_output_is_left_out_with_a_note(tmp_path, capsys):
    """As real files have them: nothing could be learned from it."""
    empty = b'{"prompt": "p", "output": ""}\n'
    path = write(tmp_path, empty + GOOD + b'{"prompt": "p", "output": ["a", ""]}\n' + empty * 10)
    assert [example.where for example in read_examples(path)] == [f"{path}, line 2"]
    note, said = f"note: {path}: examples with an empty output are left out: line 1, line 3, ", capsys.readouterr().err
    assert said.startswith(note) and said.endswith(", line 11 and others\n") and read_examples(write(tmp_path, GOOD))
    assert capsys.readouterr().err == ""
    unanswered = json.dumps({"messages": MESSAGES[:3]}).encode() + b'\n{"conversations": []}\n'
    assert [example.where for example in read_examples(write(tmp_path, GOOD + unanswered))] == [f"{path}, line 1"]
    assert "examples with an empty output are left out: line 2, line 3" in capsys.readouterr().err
