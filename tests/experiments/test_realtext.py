"""The methods on real text: the split, and the whole sequence of commands on small models."""

import json
import shlex
import subprocess
from unittest.mock import patch

import pytest

import eval
import train
from data import PROMPT, read_jsonl
from experiments import realtext
from model import read_json


@pytest.fixture
def arguments(tiny_task, tmp_path, monkeypatch):
    for name, value in {
        "VALID": 3, "TEST": 4, "READING": "--max-steps 1 --batch-size 4", "TEACHER": "--max-steps 1 --batch-size 2",
        "STUDENTS": "--max-steps 2 --batch-size 2", "COMMON": "--max-len 96 --max-prompt-len 48 --device cpu",
    }.items():  # fmt: skip
        monkeypatch.setattr(realtext, name, value)
    small = {**realtext.STUDENT, "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 96}
    monkeypatch.setattr(realtext, "STUDENT", small)
    task = tiny_task
    words = {"teacher": task / "teacher", "tokenizer": task / "student", "data": task / "train.jsonl",
             "reading": task / "valid.jsonl", "test": task / "test.jsonl", "out": tmp_path / "out"}  # fmt: skip
    return [str(word) for name, value in words.items() for word in (f"--{name}", value)]


def in_process(words, **options):
    """subprocess.run of a command of ours, without a process."""
    {"train.py": train.main, "eval.py": eval.main}[words[1]](words[2:])
    return subprocess.CompletedProcess(words, 0)


@pytest.mark.parametrize("instructions", [False, True], ids=["prompts", "instructions"])
def test_the_split_keeps_prompts_apart(instructions, tiny_task, tmp_path, monkeypatch):
    monkeypatch.setattr(realtext, "VALID", 3)
    monkeypatch.setattr(realtext, "TEST", 4)
    lines = (tiny_task / "train.jsonl").read_text().splitlines()
    again = {**json.loads(lines[5]), "output": "another"}
    if instructions:
        lines = [json.dumps({"instruction": f"question {i}", "input": "", "output": "yes"}) for i in range(12)]
        again = {"instruction": "question 5", "output": "another"}
    (tmp_path / "all.jsonl").write_text("\n".join([*lines, json.dumps(again)]) + "\n")
    realtext.split(tmp_path / "all.jsonl", tmp_path)
    parts = {name: read_jsonl(tmp_path / f"{name}.jsonl") for name in ("train", "valid", "test")}
    prompts = {name: {example.prompt_text() for example in part} for name, part in parts.items()}
    assert len(prompts["valid"]) == 3 and len(prompts["test"]) == 4
    assert sum(map(len, parts.values())) == len(lines) + 1
    assert not prompts["train"] & prompts["valid"] and not (prompts["train"] | prompts["valid"]) & prompts["test"]
    before = (tmp_path / "test.jsonl").read_bytes()
    realtext.split(tmp_path / "all.jsonl", tmp_path)
    assert (tmp_path / "test.jsonl").read_bytes() == before
    (tmp_path / "few.jsonl").write_text("\n".join(lines[:7]))
    with pytest.raises(ValueError, match="few.jsonl: 7 prompts"):
        realtext.split(tmp_path / "few.jsonl", tmp_path)


def test_what_is_read_has_answers_and_no_test_prompt(tmp_path):
    lines = [{"prompt": "a", "output": "1"}, {"prompt": "b", "output": ""}, {"prompt": "c", "output": "\u2028"}]
    lines += [{"instruction": what, "input": "", "output": "yes"} for what in "de"]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    realtext.readable(tmp_path / "all.jsonl", tmp_path, {"a", PROMPT.format(instruction="d")})
    kept = [example.prompt or example.instruction for example in read_jsonl(tmp_path / "reading.jsonl")]
    assert kept == ["c", "e"]


def test_all_of_it_on_small_models(arguments, tmp_path, capsys):
    realtext.main([*arguments, "--methods", *realtext.METHODS])
    printed = capsys.readouterr().out.splitlines()
    assert not (tmp_path / "out").exists() and len(printed) == 2 + len(realtext.METHODS) + 2
    assert all(train.parse(shlex.split(line)[2:]) for line in printed if line.startswith("python train.py "))
    methods = ["--methods", "sft", "v2"]
    realtext.main([*arguments, *methods])
    printed = capsys.readouterr().out.splitlines()
    with patch.object(subprocess, "run", in_process):
        realtext.main([*arguments, *methods, "--run"])
        shown = capsys.readouterr().out
        realtext.main([*arguments, *methods, "--run"])  # all of it is there: nothing is trained again
    assert [line for line in shown.splitlines() if line.startswith("python ")] == printed
    tables = [line for line in shown.splitlines() if line.startswith("| ") and "/v2" in line]
    assert tables
    for name in ("start", "sft", "v2"):
        steps = [json.loads(line)["step"] for line in (tmp_path / "out" / name / "log.jsonl").read_text().splitlines()]
        assert max(steps) == (1 if name == "start" else 2) and steps == sorted(steps)
        given = read_json(tmp_path / "out" / name / "args.json")
        expected = dict(zip(*[iter(shlex.split(realtext.METHODS.get(name, "--method sft")))] * 2, strict=True))
        assert given["method"] == expected["--method"] and given["data"].endswith(
            "reading.jsonl" if name == "start" else "train.jsonl"
        )


def test_what_is_missing_is_named(arguments, tmp_path):
    arguments[arguments.index("--test") + 1] = str(tmp_path / "nowhere.jsonl")
    with pytest.raises(SystemExit, match="nowhere.jsonl"):
        realtext.main([*arguments, "--run"])
    assert not (tmp_path / "out").exists()
