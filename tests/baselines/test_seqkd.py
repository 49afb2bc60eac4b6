"""seqkd.py and `--method seqkd`: the teacher's answers are generated once, written whole, reused, and trained on."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import arguments, log_of, make_model, same, weights_of
from safetensors.torch import load_file, save_file

import model
import train
from baselines import seqkd
from data import Example
from runtime.formats import read_examples
from runtime.load import load_answers
from runtime.options import Options
from runtime.tokenizer import read_tokenizer


def words(task, out, **options):
    """A command line for the ten held-out examples."""
    return arguments(task, out, **{"method": "seqkd", "data": task / "valid.jsonl", **options})


@pytest.fixture(scope="module")
def finished(tiny_task, tmp_path_factory):
    """A run of two updates."""
    out = tmp_path_factory.mktemp("seqkd") / "run"
    train.main(words(tiny_task, out))
    return out


def test_the_file_holds_the_teachers_greedy_answers(tiny_task, finished):
    teacher, tokenizer = model.load_model(tiny_task / "teacher"), read_tokenizer(tiny_task / "teacher")
    gold, answers = read_examples(tiny_task / "valid.jsonl"), read_examples(finished / "seqkd.jsonl")
    assert [example.prompt for example in answers] == [example.prompt for example in gold]
    assert not (finished / "seqkd.jsonl.new").exists()
    for answer in answers[:5]:
        ids = tokenizer.encode(answer.prompt)
        new = model.generate(teacher, [ids], 96 - len(ids), tokenizer.eos_id, temperature=0)[0]
        assert answer.outputs[0] == tokenizer.decode(new).rstrip("\ufffd")  # cut, perhaps in the middle of a character
        assert len(answer.outputs[0]) > 10
        assert answer.ends == (new[-1] == tokenizer.eos_id)


def test_training_is_supervised_fine_tuning_on_the_answers(tiny_task, finished, tmp_path):
    assert log_of(finished)[-1].keys() & {"kd", "teacher_tokens"} == set()
    train.main(words(tiny_task, tmp_path / "sft", method="sft", data=finished / "seqkd.jsonl"))
    assert same(weights_of(finished), weights_of(tmp_path / "sft"))
    train.main(words(tiny_task, tmp_path / "gold", method="sft"))
    assert not same(weights_of(finished), weights_of(tmp_path / "gold"))


def test_answers_are_reused(tiny_task, finished, tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "seqkd.jsonl").write_bytes((finished / "seqkd.jsonl").read_bytes())
    monkeypatch.setattr(seqkd, "generate", lambda *options: pytest.fail("generated again"))
    train.main(words(tiny_task, tmp_path / "run"))
    assert "using the teacher's answers in" in capsys.readouterr().err
    assert same(weights_of(tmp_path / "run"), weights_of(finished))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "seqkd.jsonl").write_bytes((finished / "seqkd.jsonl").read_bytes())
    with pytest.raises(SystemExit, match="was made with other settings .temperature and seed.: give another --out"):
        train.main(words(tiny_task, tmp_path / "other", seqkd_temperature=0.5))
    assert list((tmp_path / "other").iterdir()) == [tmp_path / "other" / "seqkd.jsonl"]


def test_answers_to_something_else_are_not_reused(tiny_task, tmp_path):
    """Also of other weights in the same place; or from before an option, if that is not what it was then."""
    teacher = read_tokenizer(tiny_task / "teacher")
    how = {"examples": read_examples(tiny_task / "test.jsonl"), "model": tmp_path / "teacher", "teacher": teacher,
           "student": SimpleNamespace(chat=None), "max_len": 96, "temperature": 0.0, "seed": 0}  # fmt: skip
    shutil.copytree(tiny_task / "teacher", tmp_path / "teacher")
    recipe = seqkd.make_recipe(**how)
    other = {"prompt_text": teacher.prompt_text, "prefix": [], "end_ids": [2]}
    for changed, named in [
        ({"model": tiny_task / "twin"}, ["teacher", "weights"]),
        ({"model": tiny_task / "teacher"}, ["teacher"]),
        ({"examples": how["examples"][1:]}, ["prompts"]),
        ({"max_len": 95}, ["max_len"]),
        ({"model": Path(os.path.relpath(tmp_path / "teacher"))}, []),
        ({"seed": 1}, []),  # greedy ones do not depend on it
        ({"temperature": 0.5, "seed": 1}, ["temperature", "seed"]),
        ({"student": SimpleNamespace(chat=SimpleNamespace(name="smollm2"))}, ["student_chat"]),
        ({"teacher": SimpleNamespace(**{**other, "prefix": [1]})}, ["bos"]),
        ({"teacher": SimpleNamespace(**{**other, "end_ids": [2, 3]})}, ["ends"]),
    ]:
        assert seqkd.compare_recipes(recipe, seqkd.make_recipe(**how | changed)) == named, changed
        assert seqkd.compare_recipes(seqkd.make_recipe(**how | changed), recipe) == named, changed
    before = {name: value for name, value in recipe.items() if name not in ("weights", "student_chat")}
    assert seqkd.compare_recipes(before, recipe) == [] and "prompts" in seqkd.compare_recipes(None, recipe)
    weights = load_file(tmp_path / "teacher" / "model.safetensors")
    save_file({name: weight + 2**-10 for name, weight in weights.items()}, tmp_path / "teacher" / "model.safetensors")
    assert seqkd.compare_recipes(recipe, seqkd.make_recipe(**how)) == ["weights"]


@pytest.mark.parametrize("line", ["", "[", "[]", "{}", '{"seqkd": 3}', "[" * 100_000], ids=lambda line: line[:20])
def test_other_files_have_no_recipe(tmp_path, line):
    (tmp_path / "some.jsonl").write_text(line)
    assert seqkd.read_recipe(tmp_path / "some.jsonl") is None
    (tmp_path / "some.jsonl").write_text('\ufeff{"seqkd": {"seed": 1}}')  # as an editor may save it
    assert seqkd.read_recipe(tmp_path / "some.jsonl") == {"seed": 1}


def test_a_dry_run_generates_for_its_lines_and_writes_nothing(tiny_task, finished, tmp_path, capsys):
    train.main(words(tiny_task, tmp_path / "run", dry_run=True))
    out, err = capsys.readouterr()
    fresh = json.loads(out)
    assert "seqkd: 4 answers by the teacher" in err
    assert list(fresh) == ["loss", "ce", "student_tokens", "grad_norm"] and not (tmp_path / "run").exists()
    train.main(words(tiny_task, finished, dry_run=True))
    stored = json.loads(capsys.readouterr().out)
    train.main(words(tiny_task, None, method="sft", data=finished / "seqkd.jsonl", dry_run=True))
    assert stored == json.loads(capsys.readouterr().out)
    assert fresh == pytest.approx(stored, rel=1e-5)  # an answer does not depend on what else is in its batch


def answers(tiny_task, tmp_path, monkeypatch, texts, **options):
    """What `load_answers` makes of a teacher with these words."""
    student, teacher = (read_tokenizer(tiny_task / name) for name in ("student", "teacher"))
    examples = read_examples(tiny_task / "train.jsonl")[: len(texts)]
    words = {tuple(teacher.encode(e.prompt)): text for e, text in zip(examples, texts, strict=True)}

    def generate(model, prompts, rooms, *rest):
        whole = [[*teacher.encode(words.get(tuple(prompt), "an owl")), teacher.eos_id] for prompt in prompts]
        return [new[:room] for new, room in zip(whole, rooms, strict=True)]

    monkeypatch.setattr(seqkd, "generate", generate)
    options = {"device": "cpu", "dtype": "fp32", "max_len": 96, "max_prompt_len": 48, **options}
    o = Options(out=str(tmp_path / "run"), **options)
    return load_answers(o, examples, tiny_task / "teacher", teacher, student)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_empty_answers_are_dropped_and_long_ones_do_not_end(tiny_task, tmp_path, monkeypatch, capsys, batch_size):
    texts = ["a fox", "", "the owl the owl" + "🦊" * 100, " \n", "naïve \u2028 line"]
    found = answers(tiny_task, tmp_path, monkeypatch, texts, batch_size=batch_size)
    assert [example.outputs[0] for example in found][::2] == ["a fox", "naïve \u2028 line"]
    assert found[1].outputs[0].removeprefix("the owl the owl").strip("🦊") == "" and len(found[1].outputs[0]) < 100
    assert [example.ends for example in found] == [True, False, True]
    message = "5 answers by the teacher; 1 stopped at --max-len 96, and 2 empty ones were dropped"
    assert message in capsys.readouterr().err
    again = answers(tiny_task, tmp_path, monkeypatch, texts)
    assert [(e.prompt, e.outputs, e.ends) for e in again] == [(e.prompt, e.outputs, e.ends) for e in found]
    lines = [json.loads(line) for line in (tmp_path / "run" / "seqkd.jsonl").read_text().split("\n") if line]
    assert [line.get("end_of_text", True) for line in lines] == [True, False, True]
    assert [line.keys() - {"prompt", "output", "end_of_text"} for line in lines] == [{"seqkd"}, set(), set()]
    assert "cut to fit" not in capsys.readouterr().err
    short = answers(tiny_task, tmp_path / "short", monkeypatch, texts, max_prompt_len=3)
    assert [e.outputs for e in short] == [["an owl"]] * 5
    assert "seqkd: 5 of 5 prompts are cut to fit" in capsys.readouterr().err
    with pytest.raises(ValueError, match="all of the teacher's answers are empty"):
        answers(tiny_task, tmp_path / "other", monkeypatch, ["", ""])


@pytest.mark.parametrize("lengths", [{"max_prompt_len": 9}, {"max_len": 10}], ids=str)
def test_prompts_are_cut_for_both_models(tiny_task, tmp_path, monkeypatch, lengths):
    """So the student is trained on the prompts that the teacher answered, with room for a token of the answer."""
    found = answers(tiny_task, tmp_path, monkeypatch, ["an owl"] * 20, **lengths)
    for name in ("student", "teacher"):
        tokenizer = read_tokenizer(tiny_task / name)
        assert max(len(tokenizer.encode_prompt(example.prompt)) for example in found) <= 9, name


def test_an_interrupted_generation_leaves_no_file(tiny_task, tmp_path, monkeypatch):
    calls = []

    def generate(*options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return model.generate(*options)

    monkeypatch.setattr(seqkd, "generate", generate)
    with pytest.raises(SystemExit, match="130"):
        train.main(words(tiny_task, tmp_path / "run"))
    assert len(calls) == 2 and not (tmp_path / "run").exists()


def test_sampled_answers_depend_on_the_seed(tiny_task, tmp_path):
    texts = {}
    for name, options in {"a": {}, "b": {}, "c": {"seed": 1}}.items():
        options |= {"seqkd_temperature": 1.0, "max_steps": 1}
        train.main(words(tiny_task, tmp_path / name, **options))
        texts[name] = [example.outputs[0] for example in read_examples(tmp_path / name / "seqkd.jsonl")]
    assert texts["a"] == texts["b"] != texts["c"]


def test_the_same_prompt_in_two_batches_is_sampled_anew(tiny_task):
    teacher, student = (read_tokenizer(tiny_task / name) for name in ("teacher", "student"))
    how = {"max_len": 20, "temperature": 1.0, "seed": 1, "batch_size": 1}
    lines = seqkd.answer_prompts(
        [Example("", [""], prompt="Who?")] * 2, model.load_model(tiny_task / "teacher"), teacher, student, **how
    )
    assert len({line["output"] for line in lines}) == 2


def test_answers_are_no_prompts_for_more_answers(tiny_task, finished, tmp_path):
    with pytest.raises(SystemExit, match="line 1: these are a teacher's answers; train on them with --method sft"):
        train.main(words(tiny_task, tmp_path / "run", data=finished / "seqkd.jsonl"))


def test_room_in_the_teacher_is_checked_before_it_answers(tiny_task, tmp_path):
    with pytest.raises(SystemExit, match="--max-len 129: the student has only 128 positions"):
        train.main(words(tiny_task, tmp_path / "run", max_len=129))
    roomy = make_model(tiny_task / "student", tmp_path / "student", n_positions=200)
    with pytest.raises(SystemExit, match="--max-len 129: the teacher has only 128 positions"):
        train.main(words(tiny_task, tmp_path / "run", max_len=129, student=roomy))
    assert not (tmp_path / "run").exists()
