"""The methods on real text: the split, the weaker student, and the whole sequence of commands on small models."""

import json
import math
import os
import shutil
import signal
import subprocess
import threading
from unittest.mock import patch

import pytest
import torch

import eval
import train
from experiments import paper, realtext
from model import load_model, save_model
from runtime.formats import read_examples


@pytest.fixture
def arguments(tiny_task, tmp_path, monkeypatch):
    """The experiment's, on models of the tests: the same sequence, in seconds. There are paths with a space."""
    for name, value in {
        "VALID": 2, "TEST": 3, "TRAIN": 4, "LENGTH": 96, "NEW_TOKENS": 4, "LEFT_OUT": (), "TEACHER": "--max-steps 1",
        "STUDENT": "--max-steps 2", "FITTED": "--max-steps 2 --lr 1e-10",
        "COMMON": "--max-len 96 --max-prompt-len 48 --batch-size 2 --device cpu",
        "FILES": {"dolly": ["train.jsonl"], "self_instruct": ["valid.jsonl"], "gsm8k": ["test.jsonl"]},
    }.items():  # fmt: skip
        monkeypatch.setattr(realtext, name, value)
    monkeypatch.setitem(realtext.PAIRS, "other", realtext.Pair("small", "large", "dolly", ("self_instruct",)))
    shutil.copytree(tiny_task / "teacher", tmp_path / "a judge")
    models = {"small": tiny_task / "twin", "large": tiny_task / "teacher", "judge": tmp_path / "a judge"}
    words = {**models, "data": tiny_task, "out": tmp_path / "my runs"}
    return [*(str(word) for name, value in words.items() for word in (f"--{name}", value)), "--pairs", "other"]


def test_ctrl_c_waits_until_the_command_has_saved(tmp_path, monkeypatch):
    """It reaches both; a command that is killed a quarter of a second later would lose its updates."""
    command = "import os, signal, time; time.sleep(1); open('saved', 'w').close()"
    monkeypatch.setattr(paper, "__file__", str(tmp_path / "experiments" / "paper.py"))  # the commands' directory
    timer = threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    with pytest.raises(SystemExit):
        paper.follow([f'-c "{command}"', '-c "raise SystemExit(9)"'], run=True)
    assert (tmp_path / "saved").is_file()


def in_process(words, **options):
    """subprocess.run of a command of ours, without a process."""
    words = words[1:]
    if words[0] == "-m":
        realtext.main(words[2:])
    else:
        {"train.py": train.main, "eval.py": eval.main}[words[0]](words[1:])
    return subprocess.CompletedProcess(words, 0)


def test_all_of_it_on_small_models(arguments, tiny_task, tmp_path, capsys):
    rows = ["sft", "uld", "v2", "v2-random", "v2-fitted", "sft-as-v2"]
    realtext.main([*arguments, "--seeds", "0", "--rows", *rows])
    printed = capsys.readouterr().out.splitlines()
    assert not (tmp_path / "my runs").exists()
    assert len(printed) == 3 + 2 * len(rows)  # one more for v2-fitted, one less for sft-as-v2
    realtext.main([*arguments, "--seeds", "0", "--rows", "v2", "--out", str(tmp_path / "fitted/runs")])
    assert len(capsys.readouterr().out.splitlines()) == 3 + 2  # the name of the directory is not that of the row
    with patch.object(subprocess, "run", in_process):
        realtext.main([*arguments, "--seeds", "0", "1", "--rows", *rows, "--run"])
        capsys.readouterr()
        realtext.main([*arguments, "--seeds", "0", "1", "--rows", *rows, "--run"])  # all of it is there
    again = capsys.readouterr().out.splitlines()
    with pytest.raises(SystemExit, match="sft-0: not trained with --epochs 4; give another --out"):
        realtext.main([*arguments, "--epochs", "4", "--rows", *rows])
    with pytest.raises(SystemExit, match="other was made with .* give another --out"):  # nothing scored is left to run
        realtext.main([*arguments, "--rows", *rows, "--judge", str(tiny_task / "teacher")])
    assert [line for line in again if "--score" in line] == [] and len(again) <= 1
    fitted, before = (load_model(path) for path in (tmp_path / "my runs/other/fitted/student", tiny_task / "twin"))
    torch.testing.assert_close(fitted.state_dict(), before.state_dict(), rtol=0, atol=1e-8)  # only the projectors moved
    parts = {}
    for part in ("train", "valid", "test", "more"):
        parts[part] = {example.prompt for example in read_examples(tmp_path / "my runs/data" / f"dolly-{part}.jsonl")}
    assert parts["more"] and sum(map(len, parts.values())) == len(set.union(*parts.values()))  # each is in one file

    realtext.main(["--out", str(tmp_path / "my runs"), "--tables"])
    shown = [line.split("|")[1:3] for line in capsys.readouterr().out.splitlines() if "(" in line]
    both = [f"{part}, {row}" for part in ("dolly", "self_instruct") for row in rows[1:]]
    assert [(row.strip(), int(seeds)) for row, seeds in shown] == [(row, 2) for row in both]
    pytest.importorskip("matplotlib")
    realtext.main(["--out", str(tmp_path / "my runs"), "--tables", "--picture", str(tmp_path / "picture.png")])
    assert capsys.readouterr().out.endswith("picture.png\n") and (tmp_path / "picture.png").stat().st_size > 5000


def test_a_table_by_hand(tmp_path):
    """The mean over the seeds, and the differences with the same seed: of `v2` from `sft` 0.25 and 0.75."""
    values = {"teacher": 0.5, "sft-0": 1, "sft-10": 2, "v1-10": 1, "v2-0": 1.25, "v2-10": 2.75}
    for run, value in values.items():
        scores = {part: dict.fromkeys(realtext.MEASURES, value) for part in ("dolly", "self_instruct", "gsm8k")}
        (tmp_path / "other" / run).mkdir(parents=True)
        (tmp_path / "other" / run / "scores.json").write_text(json.dumps(scores))

    def cells(**options) -> list:
        lines = realtext.tables(tmp_path, **options).splitlines()
        return [[cell.strip() for cell in line.split("|")[1:5]] for line in lines[2:]]

    assert len(cells()) == 12 and cells()[:4] == [
        ["dolly, teacher", "1", "0.500", "0.5"], ["dolly, sft", "2", "1.500", "1.5"],
        ["dolly, v1", "1", "1.000 (-1.000)", "1.0 (-1.0)"],
        ["dolly, v2", "2", "2.000 (+0.500 ± 0.354)", "2.0 (+0.5 ± 0.4)"],
    ]  # fmt: skip
    (tmp_path / "other/kd-0").mkdir()  # scored on one set alone
    (tmp_path / "other/kd-0/scores.json").write_text(json.dumps({"dolly": dict.fromkeys(realtext.MEASURES, 2)}))
    assert len(cells()) == 13 and ["dolly, kd", "1", "2.000 (+1.000)", "2.0 (+1.0)"] in cells()
    shutil.rmtree(tmp_path / "other/kd-0")
    assert [line[2] for line in cells(against="v1")[1:3]] == ["1.500 (+1.000; 1 of 2 seeds)", "1.000"]
    mute = {part: {"gold": 3, "greedy": 0, "sampled": 0} for part in ("dolly", "self_instruct", "gsm8k")}
    (tmp_path / "other/uld-0").mkdir()
    (tmp_path / "other/uld-0/scores.json").write_text(json.dumps(mute))  # nothing to judge: all answers are blank
    line = next(line for line in realtext.tables(tmp_path).splitlines() if "dolly, uld" in line)
    assert [cell.strip() for cell in line.split("|")[3:-1]] == ["3.000 (+2.000)", "0.0 (-1.0)", "0.0 (-1.0)", "-"]
    shutil.rmtree(tmp_path / "other/uld-0")
    assert [line[2] for line in cells(against="v2")[1:4]] == ["1.500 (-0.500 ± 0.354)", "1.000 (-1.750)", "2.000"]


def test_the_weaker_student_lacks_the_layers(tiny_task, tmp_path):
    whole = load_model(tiny_task / "teacher")
    whole.blocks.extend(load_model(tiny_task / "teacher").blocks)
    with torch.no_grad():
        whole.blocks[0].self_attn.q_proj.weight.mul_(2)
    whole.config["num_hidden_layers"] = 2
    save_model(whole, tmp_path / "whole")
    realtext.leave_out_layers(tmp_path / "whole", tmp_path / "weak", [0])
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(load_model(tmp_path / "weak")(ids), load_model(tiny_task / "teacher")(ids))


def test_the_weaker_student_is_whole_or_not_there(arguments, tmp_path, monkeypatch):
    def interrupted(source, out, layers):
        out.mkdir(parents=True)
        raise OSError("disk full")

    monkeypatch.setattr(realtext, "leave_out_layers", interrupted)
    monkeypatch.setitem(realtext.PAIRS, "other", realtext.Pair("weak", "large", "dolly", ("self_instruct",)))
    with pytest.raises(SystemExit, match="disk full"):
        realtext.main([*arguments, "--run"])
    assert not (tmp_path / "my runs/weak").exists()


def test_bits_per_byte_do_not_depend_on_the_tokens(tiny_task):
    """Of a model that gives every token the same probability: tokens · log2(V) / bytes."""
    model = load_model(tiny_task / "student")
    with torch.no_grad():
        model.embed.weight.zero_()  # and so the head, which is tied to it
    tokenizer = realtext.tokenizer_of(tiny_task / "student")
    examples = read_examples(tiny_task / "test.jsonl")
    tokens = sum(len(tokenizer.encode(example.outputs[0])) + 1 for example in examples)
    size = sum(len(example.outputs[0].encode()) for example in examples)
    expected = tokens * torch.tensor(float(len(model.head_weight))).log2() / size
    assert realtext.bits_per_byte(model, tokenizer, examples) == pytest.approx(float(expected), rel=1e-5)


def test_the_temperature_at_which_one_is_as_confident_as_the_other(tiny_task, tmp_path):
    """Of a student whose logits are twice the other's: 2."""
    for name, factor in {"flat": 3, "sharp": 6}.items():
        model = load_model(tiny_task / "student")
        with torch.no_grad():
            model.norm.weight.mul_(factor)
        save_model(model, tmp_path / name / "student")
        for file in (tiny_task / "student").glob("*token*"):
            (tmp_path / name / "student" / file.name).write_bytes(file.read_bytes())
    file = tiny_task / "test.jsonl"
    assert realtext.matching_temperature(tmp_path / "sharp", tmp_path / "flat", file) == pytest.approx(2, abs=0.02)
    assert realtext.matching_temperature(tmp_path / "flat", tmp_path / "sharp", file) == pytest.approx(0.5, abs=0.02)
    logits = torch.tensor([[0.0, 0.0, -1e9], [0.0, -1e9, -1e9]])
    assert realtext.entropy(logits.split(1)) == pytest.approx(math.log(2) / 2)


def test_a_student_without_answers_is_scored(arguments, tiny_task, tmp_path, monkeypatch):
    monkeypatch.setattr(eval, "respond", lambda model, tokenizer, prompts, *_, **__: [""] * len(prompts))
    words = ["--tests", str(tiny_task / "test.jsonl"), "--judge", str(tiny_task / "teacher"), "--out", str(tmp_path)]
    realtext.main(["--score", str(tiny_task / "twin"), *words])
    assert json.loads((tmp_path / "scores.json").read_text())["test"].keys() == {"gold", "entropy", "greedy", "sampled"}


def test_what_is_missing_is_named(arguments, tmp_path):
    for row in ("sft", "v2"):  # interrupted: neither finished nor scored
        (tmp_path / f"my runs/other/{row}-0/student").mkdir(parents=True)
    arguments[arguments.index("--data") + 1] = str(tmp_path)
    with pytest.raises(SystemExit, match="train.jsonl"):
        realtext.main([*arguments, "--run"])
    for given, message in {
        "--rows kd": "different vocabularies", "--rows v2 sft-as-v2": "needs other/sft-0",
        "--rows sft-as-v2": "needs other/sft-0", "--epochs 0": "--epochs 0",
        "--seeds -1": "--seeds -1", "--score x": "--score needs --tests and --judge",
    }.items():  # fmt: skip
        with pytest.raises(SystemExit, match=message):
            realtext.main([*arguments, *given.split()])
    with pytest.raises(SystemExit, match="--small is missing"):
        realtext.main([])
