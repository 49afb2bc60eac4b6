"""Scores: generation in batches, held-out cross-entropy, the table and the JSON file."""

import json
import math

import pytest
import torch

import eval as evaluation
import model
from data import Example, TextTokenizer, read_jsonl, tokenise


@pytest.fixture(scope="module")
def student(tiny_task):
    return model.load_model(tiny_task / "student"), TextTokenizer(tiny_task / "student")


def test_responses_come_back_in_order_and_do_not_depend_on_the_batch(tiny_task, student):
    m, tokenizer = student
    prompts = [example.prompt_text() for example in read_jsonl(tiny_task / "test.jsonl")]
    together = evaluation.respond(m, tokenizer, prompts, max_new_tokens=6, batch_size=4)
    alone = [evaluation.respond(m, tokenizer, [prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert together == alone and len(set(together)) > 1


def test_sampling_is_seeded(tiny_task, student):
    m, tokenizer = student
    prompts = [example.prompt_text() for example in read_jsonl(tiny_task / "test.jsonl")]
    runs = [evaluation.respond(m, tokenizer, prompts, 6, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_held_out_cross_entropy_is_the_token_mean(tiny_task, student):
    m, tokenizer = student
    m.train()
    rows, _ = tokenise(read_jsonl(tiny_task / "valid.jsonl"), tokenizer)
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in rows:  # one by one, no padding, from the definition
            ids = torch.tensor([row.student.prompt + row.student.response])
            log_probabilities = m.logits(m(ids[:, :-1])).log_softmax(-1)[0]
            for position in range(len(row.student.prompt) - 1, ids.shape[1] - 1):
                total -= float(log_probabilities[position, ids[0, position + 1]])
                tokens += 1
    for batch_size in (1, 3, 16):
        found = evaluation.held_out_cross_entropy(m, rows, tokenizer.eos_id, batch_size=batch_size)
        assert found == pytest.approx(total / tokens, rel=1e-5)
    assert m.training and math.log(900) * 0.9 < total / tokens


def test_score_is_the_mean_of_the_best_reference_in_per_cent():
    examples = [Example("a", ["the red fox", "a blue owl"]), Example("b", ["yes"])]
    assert evaluation.score(["A blue owl!", "no"], examples) == {"rouge_l": 50.0, "exact_match": 50.0}


def test_spread_and_table():
    assert evaluation.spread([1.0, 3.0]) == "2.00 ± 1.41" and evaluation.spread([1.0]) == "1.00"
    assert evaluation.table([["a", "long"], ["bcd", "e"]]).splitlines()[1:] == ["|-----|------|", "| bcd | e    |"]


def test_command_line_compares_models_and_writes_json(tiny_task, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        model.save_model(model.load_model(tiny_task / "student"), tmp_path / name / "student")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name / "student" / file).write_bytes((tiny_task / "student" / file).read_bytes())
    data = str(tiny_task / "test.jsonl")
    short = ["--max-len", "40", "--device", "cpu"]
    evaluation.main(["one", "two", "--data", data, "--seeds", "1", "2", "--limit", "3", *short])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines] == ["model", "-------", "one", "two"]
    assert lines[2].split("|")[2:] == lines[3].split("|")[2:] and "±" in lines[2]  # the same model, the same seeds
    report = json.loads((tmp_path / "one" / "eval-test.json").read_text())
    assert report["examples"] == 3 and len(report["rouge_l"]) == 2 and len(report["responses"][1]) == 3
    evaluation.main(["one", "--data", data, "--greedy", "--limit", "2", *short])
    assert "±" not in capsys.readouterr().out


def test_a_missing_directory_is_named_before_anything_is_loaded(tiny_task, tmp_path):
    with pytest.raises(SystemExit, match="nowhere"):
        evaluation.main([str(tiny_task / "student"), str(tmp_path / "nowhere"), "--data", "any"])
