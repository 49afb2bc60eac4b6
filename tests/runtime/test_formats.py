"""runtime/formats.py: the published forms of data files, and what can be wrong with one."""

import json

import pytest

from runtime.formats import read_examples


def write(tmp_path, content):
    path = tmp_path / "some.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


GSM8K = {"question": "How many?", "answer": "2 + 1 = <<2+1=3>>3\n#### 3"}
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


def test_published_forms(tmp_path):
    lines = [GSM8K, HUMANEVAL, MBPP, {**MBPP, "test_setup_code": "x = one()"}]
    mathematics, completion, program, setup = read_examples(write(tmp_path, "\n".join(map(json.dumps, lines))))
    assert (mathematics.instruction, mathematics.outputs) == (GSM8K["question"], [GSM8K["answer"]])
    assert mathematics.code is None and "### Instruction:\nHow many?" in mathematics.prompt_text()
    assert (completion.prompt, completion.outputs) == (HUMANEVAL["prompt"], [HUMANEVAL["canonical_solution"]])
    assert completion.code.entry_point == "one" and completion.code.tests == HUMANEVAL["test"] + "\ncheck(one)\n"
    assert program.prompt == (
        "You are an expert Python programmer, and here is your task: Write a function to give {one}. Your code should "
        "pass these tests:\n\nassert one() == 1\nassert one() != 2\n[BEGIN]\n"
    )
    assert program.outputs == [MBPP["code"]] and program.code.entry_point == ""
    assert program.code.tests == "\nassert one() == 1\nassert one() != 2\n"
    assert setup.code.tests == "x = one()" + program.code.tests and "x = one()" not in setup.prompt


@pytest.mark.parametrize(
    "record, key, value, message",
    [
        (GSM8K, "answer", None, "'answer' is missing"), (GSM8K, "answer", 3, "'answer' must be a string, found int"),
        (GSM8K, "question", [], "'question' must be a string"), (HUMANEVAL, "test", None, "'test' is missing"),
        (HUMANEVAL, "canonical_solution", None, "'canonical_solution' is missing"),
        (HUMANEVAL, "prompt", None, "'prompt' is missing"),
        (HUMANEVAL, "entry_point", None, "'entry_point' is missing"),
        (HUMANEVAL, "entry_point", "two", "'prompt' does not define the 'entry_point' 'two'"),
        (HUMANEVAL, "entry_point", "one(); two", "'prompt' does not define the 'entry_point'"),
        (MBPP, "text", None, "'text' is missing"), (MBPP, "code", None, "'code' is missing"),
        (MBPP, "test_list", [], "'test_list' must be a list of strings"),
        (MBPP, "test_list", [3], "'test_list' must be a list of strings"),
        (MBPP, "test_list", "assert", "'test_list' must be a list of strings"),
        (MBPP, "test_setup_code", None, None), (MBPP, "test_setup_code", 3, "'test_setup_code' must be a string"),
    ],
)  # fmt: skip
def test_published_forms_name_the_key_that_is_wrong(tmp_path, record, key, value, message):
    record = {**record, key: value} if value is not None else {k: v for k, v in record.items() if k != key}
    path = write(tmp_path, json.dumps(record))
    if message is None:
        assert read_examples(path)[0].code.tests.startswith("\nassert")
        return
    with pytest.raises(ValueError) as caught:
        read_examples(path)
    assert str(caught.value).startswith(f"{path}, line 1: {message}")


GOOD = b'{"prompt": "p", "output": "o"}\n'
MALFORMED = {
    "not JSON": (GOOD + b"{'prompt': 1}\n", ["line 2", "not JSON"]),
    "cut off": (GOOD + GOOD + b'{"prompt": "p", "outp', ["line 3", "not JSON"]),
    "two objects on a line": (GOOD.strip() + b" " + GOOD, ["line 1", "not JSON"]),
    "a raw control character": (b'{"prompt": "a\tb", "output": "o"}\n', ["line 1", "not JSON"]),
    "an endless number": (b'{"prompt": "p", "output": "o", "id": ' + b"1" * 5000 + b"}\n", ["line 1", "not JSON"]),
    "an array": (GOOD + b'\n["prompt", "output"]\n', ["line 3", "object", "list"]),
    "a JSON file, not lines": (b"[\n" + GOOD.strip() + b"\n]\n", ["line 1", "not JSON"]),
    "null": (b"null\n", ["line 1", "object", "NoneType"]),
    "no output": (GOOD + b'{"prompt": "p"}\n', ["line 2", "'output' is missing"]),
    "output null": (b'{"prompt": "p", "output": null}\n', ["line 1", "'output' must be a string or a list of strings"]),
    "output a number": (b'{"prompt": "p", "output": 3}\n', ["line 1", "'output' must be"]),
    "output an empty list": (b'{"prompt": "p", "output": []}\n', ["line 1", "'output' must be"]),
    "output a list of numbers": (b'{"prompt": "p", "output": ["a", 3]}\n', ["line 1", "'output' must be"]),
    "no prompt": (b'{"output": "o"}\n', ["line 1", "neither 'prompt' nor 'instruction'"]),
    "prompt a list": (b'{"prompt": ["p"], "output": "o"}\n', ["line 1", "'prompt' must be a string, found list"]),
    "prompt empty": (GOOD + b'{"prompt": "", "output": "o"}\n', ["line 2", "'prompt' is empty"]),
    "instruction null": (b'{"instruction": null, "output": "o"}\n', ["line 1", "'instruction' must", "NoneType"]),
    "input a number": (b'{"instruction": "i", "input": 3, "output": "o"}\n', ["line 1", "'input' must", "int"]),
    "output empty": (GOOD + b'{"prompt": "p", "output": ""}\n' + GOOD, ["output is empty on line 2;"]),
    "outputs empty": (
        b'{"prompt": "p", "output": ""}\n' + GOOD + b'{"prompt": "p", "output": ["a", ""]}\n',
        ["output is empty on lines 1, 3;"],
    ),
    "many outputs empty": (b'{"prompt": "p", "output": ""}\n' * 12, ["lines 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and others"]),
    "end_of_text a word": (b'{"prompt": "p", "output": "o", "end_of_text": "no"}', ["line 1", "true or false, found"]),
    "a key twice": (GOOD + b'{"output": "a", "output": "b"}', ["line 2", "not JSON: the key 'output' comes twice"]),
    "half a surrogate pair": (b'{"prompt": "ab\\ud83d", "output": "o"}\n', ["line 1", "'prompt'", "surrogate", "2"]),
    "half a pair, output": (GOOD + b'{"prompt": "p", "output": ["o", "\\udc00"]}', ["line 2", "'output'", "surrogate"]),
    "not UTF-8": (GOOD + b"\n" + '{"prompt": "é", "output": "o"}\n'.encode("latin-1"), ["line 3", "not UTF-8"]),
    "not UTF-8 behind a BOM": (b"\xef\xbb\xbf{}\n\xff\n", ["line 2", "not UTF-8"]),
    "UTF-16": ('{"prompt": "p", "output": "o"}\n'.encode("utf-16"), ["line 1", "not UTF-8"]),
    "empty": (b"", ["no examples"]),
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
