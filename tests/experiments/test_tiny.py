import hashlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from tokenizers import Tokenizer

from experiments import tiny

ROOT = Path(tiny.__file__).parent.parent
SMALL = dict(teacher_train=400, student_train=100, valid=60, test=80, reading=50)
HORRORS = [
    "", " ", "  two leading spaces", "trailing  ", "naïve café, Ærøskøbing ß", "漢字と仮名", "مرحبا بالعالم",
    "\U0001f642 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e8\U0001f1ed", "tabs\tand\n\nnew lines\r\n",
    "<0x41> is no byte", "e\u0301 is not é", "\x00\x7f", "if x:\n    return {'a': [1, 2]}", "The shy fox dances.",
    "Where in the barn can I find the owl?\n",
]  # fmt: skip


@pytest.fixture(scope="module")
def data():
    return tiny.make_data()


@pytest.fixture(scope="module")
def tokenizers(tiny_task):
    """The teacher's and the student's."""
    return [Tokenizer.from_file(str(tiny_task / name / "tokenizer.json")) for name in ("teacher", "student")]


def texts_of(examples):
    return [text for example in examples for text in (example["prompt"], example["output"])]


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


# -- validity ----------------------------------------------------------------------------------------------------------


def test_gold_answers_and_references_are_valid(data):
    for name in data.keys() - {"reading"}:
        for example in data[name][:1000]:
            answers = example["output"] if isinstance(example["output"], list) else [example["output"]]
            assert all(tiny.is_valid(example["prompt"], answer) for answer in answers), example


def test_a_corrupted_answer_is_invalid(data):
    generator = random.Random(1)
    foreign = 0
    for example, other in zip(data["test"], data["test"][1:] + data["test"][:1], strict=True):
        prompt, answer = example["prompt"], example["output"][0]
        words = answer.split()
        for length in range(len(words)):
            assert not tiny.is_valid(prompt, " ".join(words[:length]))  # truncated
        place = generator.randrange(len(words))
        assert not tiny.is_valid(prompt, " ".join(words[:place] + ["zebra"] + words[place + 1 :]))
        assert not tiny.is_valid(prompt, " ".join(words[:place] + words[place : place + 1] + words[place:]))
        for changed in (answer.lower(), answer[:-1], answer + " ", " " + answer, answer + answer, answer.upper()):
            assert not tiny.is_valid(prompt, changed)
        foreign += tiny.is_valid(prompt, other["output"][0])
    assert foreign <= 0.02 * len(data["test"])


@pytest.mark.parametrize(
    "prompt", ["", "Name a kind of fruit for the fox.", "Write a sentence about a tax in the garden.\n"]
)
def test_a_foreign_prompt_is_an_error(prompt):
    with pytest.raises(KeyError, match=re.escape(repr(prompt))):
        tiny.is_valid(prompt, "A plum.")


# -- the data set ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 12345])
def test_the_splits_share_no_prompt(seed):
    data = tiny.make_data(seed)
    sizes = {"teacher_train": 16000, "student_train": 500, "reading": 16000, "valid": 400, "test": 2000}
    assert {name: len(part) for name, part in data.items()} == {**sizes, "test_unseen": 1000}
    prompts = {name: {example["prompt"] for example in examples} for name, examples in data.items()}
    trained_on = prompts["teacher_train"] | prompts["student_train"] | prompts["reading"]
    held_out = [prompts[name] for name in ("valid", "test", "test_unseen")]
    assert len(set().union(trained_on, *held_out)) == sum(map(len, [trained_on, *held_out]))
    assert [len(part) for part in held_out] == [400, 2000, 1000]  # no prompt twice
    assert all(len(e["output"]) == 5 for name in ("valid", "test", "test_unseen") for e in data[name])
    families = {name: {tiny.all_prompts()[prompt][0] for prompt in part} for name, part in prompts.items()}
    assert families["teacher_train"] == families["reading"] == set(tiny.FAMILIES)
    assert families["test_unseen"] == set(tiny.UNSEEN)
    assert families["student_train"] == families["valid"] == families["test"] == set(tiny.FAMILIES) - set(tiny.UNSEEN)


def test_half_of_what_the_student_has_read_is_without_taste():
    valid = [tiny.is_valid(e["prompt"], e["output"]) for e in tiny.make_data(0, 0, 0, 0, 0, reading=1000)["reading"]]
    assert all(valid[::2]) and 0.05 < sum(valid[1::2]) / 500 < 0.2  # by chance, where few tastes are asked for


def test_a_part_depends_on_the_seed_and_not_on_the_size_of_another():
    small = tiny.make_data(3, **SMALL)
    large = tiny.make_data(3, teacher_train=500, student_train=130, valid=70, test=90)
    assert small["teacher_train"] == large["teacher_train"][:400]
    assert tiny.make_data(3, **SMALL | {"teacher_train": 0})["test"] == small["test"]
    assert tiny.make_data(3, **SMALL) == small
    other = tiny.make_data(4, **SMALL)
    assert all(other[name] != small[name] for name in small)
    # The partition itself follows the seed.
    shared = {example["prompt"] for example in small["test"]} & {example["prompt"] for example in other["test"]}
    assert len(shared) < len(small["test"]) / 2


def test_the_grammar_is_the_one_that_the_published_figures_are_about():
    """Whatever the data seed is. Who changes a word changes the task: then README's and experiments' figures too."""

    def grammar():
        tables = [(prompt, tiny.answer_slots(prompt)) for prompt in tiny.all_prompts()]
        return hashlib.sha256(repr(tables).encode()).hexdigest()[:16]

    random.seed(99)
    tiny.make_data(7, **SMALL)
    for cached in (tiny.favourites, tiny.answer_slots, tiny.all_prompts, tiny.answer_pattern):
        cached.cache_clear()
    assert grammar() == "e03a54f499760c2c"


@pytest.mark.parametrize("size", [dict(valid=5000), dict(test=5000)])
def test_impossible_sizes_are_named(size):
    ((name, value),) = size.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        tiny.make_data(**{**SMALL, **size})


@pytest.mark.slow
def test_the_same_data_and_tokenizers_in_every_process(tmp_path):
    code = (
        "import json, sys, hashlib\nfrom experiments import tiny\n"
        "data = tiny.make_data(5, teacher_train=300, student_train=50, valid=30, test=30)\n"
        "texts = [text for e in data['teacher_train'] for text in (e['prompt'], e['output'])]\n"
        "tiny.train_tokenizers(texts, {0!r} + '/teacher', {0!r} + '/student')\n"
        "print(hashlib.sha256(json.dumps(data).encode()).hexdigest())\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1", "RAYON_NUM_THREADS": "2"}
    command = [sys.executable, "-c", code.format(str(tmp_path / "there"))]
    digest = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    here = tiny.make_data(5, teacher_train=300, student_train=50, valid=30, test=30)
    assert hashlib.sha256(json.dumps(here).encode()).hexdigest() == digest.strip()
    tiny.train_tokenizers(texts_of(here["teacher_train"]), str(tmp_path / "teacher"), str(tmp_path / "student"))
    files = [path.relative_to(tmp_path / "there") for path in (tmp_path / "there").rglob("*.json")]
    assert len(files) == 4
    assert all((tmp_path / file).read_bytes() == (tmp_path / "there" / file).read_bytes() for file in files)


# -- the seeds ---------------------------------------------------------------------------------------------------------


def test_seeds_are_run_tabulated_and_kept(small_task, tmp_path, monkeypatch, capsys):
    for stage in ("TEACHER_STAGE", "READING_STAGE", "STUDENT_STAGE"):
        monkeypatch.setattr(tiny, stage, {**getattr(tiny, stage), "max_steps": 1, "batch_size": 2})
    words = ["--seeds", "2", "--out", str(tmp_path / "runs"), "--scores", str(tmp_path / "scores.json")]
    tiny.main(words)
    seeds = json.loads((tmp_path / "scores.json").read_text())
    file = tmp_path / "runs" / "1" / "dskd-v2" / "scores.json"
    assert seeds[1]["dskd-v2"] == json.loads(file.read_text()) and len(seeds) == 2
    file.write_text(json.dumps({**seeds[1]["dskd-v2"], "rouge_l": seeds[1]["sft"]["rouge_l"] + 3}))
    tiny.main(words)  # nothing is trained or scored again
    seeds = json.loads((tmp_path / "scores.json").read_text())
    assert seeds[1]["dskd-v2"]["rouge_l"] == pytest.approx(seeds[1]["sft"]["rouge_l"] + 3)
    assert capsys.readouterr().out.endswith(tiny.tabulate(seeds, "dskd-v2") + "\n")
    kept, of_eight = (tmp_path / "scores.json").read_text(), tiny.SEEDS.read_text()
    monkeypatch.setattr(tiny, "SEEDS", tmp_path / "shown.json")
    tiny.SEEDS.write_text(of_eight)
    tiny.main(words[:4])  # two seeds do not replace the eight that train.py shows
    assert tiny.SEEDS.read_text() == of_eight and (tmp_path / "runs/shown.json").read_text() == kept
    with pytest.raises(SystemExit):
        tiny.main([*words, "--seeds", "0"])  # would leave no seed for train.py to show
    with pytest.raises(SystemExit, match="^error: .*scores.json"):
        tiny.main([*words, "--out", str(tmp_path / "scores.json")])
    for stopped, message in ((KeyboardInterrupt(), "stopped at once"), (tiny.Stopped("is saved", 2), "is saved")):
        monkeypatch.setattr(tiny, "run", Mock(side_effect=stopped))
        with pytest.raises(SystemExit, match=message):
            tiny.main(words)
    assert (tmp_path / "scores.json").read_text() == kept


def test_models_are_scored_where_they_are_trained(small_task, tmp_path, monkeypatch, capsys):
    devices = []

    def score_stage(root, name, device):
        devices.append(device)
        return dict.fromkeys(tiny.COLUMNS, 0.0)

    monkeypatch.setattr("runtime.strict.choose_device", lambda index=0: ("cuda", "pretended"))
    monkeypatch.setattr("runtime.strict.computes_bf16", lambda device: True)
    monkeypatch.setattr("train.run_stage", lambda options, name: None)
    monkeypatch.setattr(tiny, "score_stage", score_stage)
    tiny.run({"out": str(tmp_path / "my runs")})
    assert devices == ["cuda"] * 5
    assert capsys.readouterr().err.endswith(f"python eval.py '{tmp_path}/my runs/NAME' --prompt \"...\"\n")


def test_the_lead_is_taken_seed_by_seed():
    def scores(*values):
        names = [*tiny.TWINS, "dskd-v2"]
        return {name: dict.fromkeys(tiny.COLUMNS, value) for name, value in zip(names, values, strict=True)}

    lines = tiny.tabulate([scores(10, 10, 11), scores(50, 51, 53)], "dskd-v2").splitlines()[-2:]
    leads = [[cell.strip() for cell in line.split("|")[1:3]] for line in lines]
    assert leads == [["dskd-v2 − sft", "+2.0 ± 1.4"], ["dskd-v2 − sft-early", "+1.5 ± 0.7"]]
    assert "dskd-v2 − sft" not in tiny.tabulate([scores(10, 11, 12)], "sft")
    further = {**scores(10, 10, 11), "dskd-v1-cma": dict.fromkeys(tiny.COLUMNS, 1)}  # one seed has another method, too
    assert tiny.tabulate([further, scores(50, 51, 53)], "dskd-v2").splitlines()[-2:] == lines


def test_the_published_table_is_that_of_the_stored_scores():
    readme = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    assert tiny.tabulate(json.loads(tiny.SEEDS.read_text()), "dskd-v2") in readme


# -- the tokenizers ----------------------------------------------------------------------------------------------------


def test_tokenizers_are_lossless(tokenizers, data):
    for text in HORRORS + texts_of(data["student_train"]):
        for tokenizer in tokenizers:
            assert tokenizer.decode(ids(tokenizer, text)) == text


def test_tokenizers_are_of_two_different_kinds(tokenizers, tiny_task, data):
    teacher, student = tokenizers
    assert teacher.get_vocab_size() == tiny.TEACHER_VOCABULARY and student.get_vocab_size() == tiny.STUDENT_VOCABULARY
    assert sorted(teacher.get_vocab().values()) == list(range(tiny.TEACHER_VOCABULARY))
    assert [teacher.id_to_token(index) for index in (0, 1, 2, 3, 258)] == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    assert teacher.encode("The fox").tokens[0] == "<s>" and ids(teacher, "</s>") == [2]
    assert "▁fox" in teacher.get_vocab() and "Ġfox" in student.get_vocab()
    assert [teacher.id_to_token(i) for i in ids(teacher, "é")] == ["▁", "<0xC3>", "<0xA9>"]
    assert student.token_to_id("<|endoftext|>") is not None and "<unk>" not in student.get_vocab()
    outputs = [example["output"] for example in data["student_train"]]

    def spans(tokenizer, text):
        return [end for _, end in tokenizer.encode(text, add_special_tokens=False).offsets]

    assert sum(spans(teacher, text) != spans(student, text) for text in outputs) > 50  # they cut the text differently
    for name, end in (("teacher", "</s>"), ("student", "<|endoftext|>")):
        config = json.loads((tiny_task / name / "tokenizer_config.json").read_text(encoding="utf-8"))
        assert config["eos_token"] == end


def test_no_teacher_token_joins_two_words(tokenizers):
    # There is no cut into words when encoding (as in Llama's file), so that only the merges can keep words apart.
    teacher, _ = tokenizers
    assert json.loads(teacher.to_str())["pre_tokenizer"] is None
    learned = [token for token in teacher.get_vocab() if not token.startswith("<")]
    assert all("▁" not in token[1:] for token in learned)
    assert all(token.strip("▁").isalpha() or len(token.strip("▁")) <= 1 for token in learned)


def test_transformers_reads_both_tokenizers_alike(tokenizers, tiny_task):
    transformers = pytest.importorskip("transformers")
    for name, end, tokenizer in zip(("teacher", "student"), ("</s>", "<|endoftext|>"), tokenizers, strict=True):
        loaded = transformers.AutoTokenizer.from_pretrained(tiny_task / name)
        for text in HORRORS:
            assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
            assert loaded.decode(ids(tokenizer, text)) == text
        assert loaded.eos_token == end
