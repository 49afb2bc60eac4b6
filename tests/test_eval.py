"""Scores: generation in batches, held-out cross-entropy, the table and the JSON file."""

import json
import math
from pathlib import Path

import pytest
import torch

import eval as evaluation
import model
from data import CodeTask, Example, TextTokenizer, read_jsonl, tokenise


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


REFERENCES = ["2 + 1 = <<2+1=3>>3\n#### 3", "so\n#### 1,200"]
CODE = [
    Example("h", ["    return 1\n"], prompt="def one():\n    'one'\n", code=CodeTask("assert one() == 1", "one")),
    Example("m", ["def two():\r\n  return 2"], prompt="Write two.\n", code=CodeTask("assert two() == 2")),
]


def test_score_math_on_references_and_corrupted_ones():
    examples = [Example("", [reference], instruction="?") for reference in REFERENCES]
    scores, details = evaluation.score_math(REFERENCES, examples)
    assert scores == {"accuracy": 100.0} and [detail["answer"] for detail in details] == ["3", "1,200"]
    assert evaluation.score_math(["#### 4", "#### 1,201"], examples)[0] == {"accuracy": 0.0}
    assert evaluation.score_math(["It is $3.00.", ""], examples)[0] == {"accuracy": 50.0}


@pytest.fixture
def working_sandbox():
    sandbox = pytest.importorskip("sandbox")
    try:
        sandbox.check()
    except RuntimeError as error:
        pytest.skip(str(error))


def test_score_code_on_references_and_corrupted_ones(working_sandbox):
    scores, details = evaluation.score_code([example.outputs[0] for example in CODE], CODE)
    assert scores == {"pass_at_1": 100.0} and [detail["status"] for detail in details] == ["passed", "passed"]
    scores, details = evaluation.score_code(["    return None\n", "def two(): return 3"], CODE)
    assert scores == {"pass_at_1": 0.0} and details[1]["reason"] == "AssertionError in tests, line 1: assert two() == 2"
    scores, details = evaluation.score_code(["    exit()", "```python\ndef two(): return 2\n```"], CODE)
    assert scores == {"pass_at_1": 50.0} and details[1]["program"] == "def two(): return 2\n"


def test_the_task_follows_from_the_data():
    text, sums = [Example("t", ["a"], prompt="p")], [Example("s", [r], prompt="p") for r in REFERENCES]
    assert [evaluation.task_of(e, "x") for e in (text, sums, CODE)] == ["rouge", "math", "code"]
    assert evaluation.task_of([Example("s", ["it is \\boxed{3}"], prompt="p")], "x") == "math"
    assert evaluation.task_of(text + sums, "x") == "rouge"  # not all are marked
    assert evaluation.task_of([Example("s", ["#### Title\ntext"], prompt="p")], "x") == "rouge"
    assert [evaluation.task_of(e, "x", "rouge") for e in (text, sums, CODE, CODE + text)] == ["rouge"] * 4
    assert evaluation.task_of(text, "x", "math") == "math"
    for examples, asked, message in [
        (text, "code", "--task code needs tests"), (CODE, "math", "h: --task math needs an answer"),
        (CODE + text, None, "x: 2 of 3 examples have tests"),
        ([Example("e", [" "], prompt="p")], "math", "^e: the output"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            evaluation.task_of(examples, "x", asked)


def test_compare_averages_over_sets_for_each_seed():
    sets = [evaluation.DataSet(name, "rouge", []) for name in ("a", "b")]
    results = {
        ("m", "a"): {"rouge_l": [10.0, 20.0]},
        ("m", "b"): {"rouge_l": [40.0, 30.0]},
        ("n", "a"): {"rouge_l": [5.0]},
    }
    head, _, whole, part = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in evaluation.compare(sets, results).splitlines()
    ]
    assert head == ["model", "a Rouge-L", "b Rouge-L", "average"]
    assert whole == ["m", "15.00 ± 7.07", "35.00 ± 7.07", "25.00 ± 0.00"]  # 25 with either seed
    assert part == ["n", "5.00", "-", "-"]  # the run ended before b
    sets[1].task, results["m", "b"] = "code", {"pass_at_1": [1.0, 2.0]}
    assert "average" not in evaluation.compare(sets, results) and "b pass@1" in evaluation.compare(sets, results)


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


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


SHORT = ["--device", "cpu", "--max-len", "60", "--max-prompt-len", "50"]
SUMS = {"prompt": "What is 1 + 2?", "output": "#### 3"}
EXERCISE = {"task_id": "0", "prompt": "def one():\n    'one'\n", "entry_point": "one",
            "canonical_solution": "    return 1", "test": "def check(f):\n    assert f() == 1"}  # fmt: skip


def run_directory(tiny_task, path):
    (path / "run").mkdir()
    (path / "run" / "student").symlink_to(tiny_task / "student")
    return str(path / "run")


def test_command_line_with_several_sets_and_tasks(tiny_task, tmp_path, capsys, monkeypatch, working_sandbox):
    run = run_directory(tiny_task, tmp_path)
    text, sums = str(tiny_task / "test.jsonl"), write_lines(tmp_path / "sums.jsonl", SUMS, SUMS)
    exercises = write_lines(tmp_path / "exercises.jsonl", EXERCISE)
    # what the untrained student would write is of no use: answers in its place
    replies = {"What": "It is 3.", "def ": "    return 1\n"}

    def respond(model, tokenizer, prompts, *arguments, **options):
        return [next((reply for start, reply in replies.items() if p.startswith(start)), "") for p in prompts]

    monkeypatch.setattr(evaluation, "respond", respond)
    options = ["--limit", "2", "--seeds", "1", "2", "--run-code", *SHORT]
    evaluation.main([run, "--data", text, sums, exercises, *options])
    out, err = capsys.readouterr()
    head, _, row = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()]
    assert head == ["model", "test Rouge-L", "sums accuracy", "exercises pass@1"]
    assert row[2:] == ["100.00 ± 0.00", "100.00 ± 0.00"] and "sandbox: " in err and "2 passed" in err
    report = json.loads((tmp_path / "run" / "eval-exercises.json").read_text())
    assert report["task"] == "code" and report["pass_at_1"] == [100.0, 100.0] and report["seeds"] == [1, 2]
    assert report["responses"] == [["    return 1\n"]] * 2 and report["details"][0][0]["status"] == "passed"
    assert json.loads((tmp_path / "run" / "eval-sums.json").read_text())["details"][1][0]["answer"] == "3"


def replies_of(run, name):
    """(report, the greedy responses) of eval-<name>.json"""
    report = json.loads((Path(run) / f"eval-{name}.json").read_text())
    return report, report["responses"][0]


def test_new_tokens_do_not_depend_on_the_prompts(tiny_task, tmp_path, student):
    """--max-len minus --max-prompt-len, for short prompts and for one that is cut, and with any --limit."""
    run, (m, tokenizer) = run_directory(tiny_task, tmp_path), student
    prompts = ["The fox\n", "Where is the owl?\n", "Where in the garden can I find the fox? " * 9]
    data = write_lines(tmp_path / "set.jsonl", *({"prompt": prompt, "output": "x"} for prompt in prompts))
    for limit, cut in (("1", 0), ("2", 0), ("3", 1)):
        evaluation.main([run, "--data", data, "--greedy", "--limit", limit, "--max-len", "60", "--max-prompt-len", "50",
                         "--device", "cpu"])  # fmt: skip
        report, replies = replies_of(run, "set")
        assert report["new_tokens"] == 10 and report["prompts_cut"] == cut
        assert replies[:2] == evaluation.respond(m, tokenizer, prompts[:2], max_new_tokens=10)[: int(limit)]
    evaluation.main([run, "--data", data, "--greedy", "--limit", "1", "--max-len", "60", "--device", "cpu"])
    assert replies_of(run, "set")[0]["new_tokens"] == 30


@pytest.mark.parametrize(
    "options, new_tokens",
    [([], 64), (["--max-len", "256"], 64), (["--max-len", "256", "--max-prompt-len", "160"], 48),
     (["--max-len", "100", "--max-prompt-len", "90"], 10), (["--max-len", "100000", "--max-prompt-len", "1"], 127)],
)  # fmt: skip
def test_lengths_shrink_for_a_model_with_fewer_positions(tiny_task, tmp_path, capsys, options, new_tokens):
    """Of 128 positions: to the same share of them, whatever the prompts."""
    run, data = run_directory(tiny_task, tmp_path), write_lines(tmp_path / "set.jsonl", {"prompt": "x", "output": "y"})
    evaluation.main([run, "--data", data, "--greedy", "--device", "cpu", *options])
    assert replies_of(run, "set")[0]["new_tokens"] == new_tokens
    note = f"the model's 128 positions are {128 - new_tokens} tokens of a prompt, and the response's {new_tokens}"
    assert (note in capsys.readouterr().err) == ("100" not in options)


def test_prompts_must_leave_room_for_responses(tiny_task, tmp_path, monkeypatch):
    run, data = run_directory(tiny_task, tmp_path), write_lines(tmp_path / "set.jsonl", SUMS)
    monkeypatch.setattr(evaluation, "load_model", lambda *arguments: pytest.fail("a model was loaded"))
    for options in (["--max-len", "60", "--max-prompt-len", "60"], ["--max-prompt-len", "512", "--task", "rouge"]):
        with pytest.raises(SystemExit, match="--max-prompt-len .* leaves no token of --max-len .* for the response"):
            evaluation.main([run, "--data", data, "--device", "cpu", *options])


def test_dolly_is_scored_on_its_own_test_set(tiny_task, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda **where: str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run = run_directory(tiny_task, tmp_path)
    write_lines(tmp_path / "raw.jsonl", *({"prompt": f"{n}?", "output": "dev"} for n in range(1003)))
    write_lines(tmp_path / "valid.jsonl", {"prompt": "a", "output": "test"}, {"prompt": "b", "output": "test"})
    evaluation.main([run, "--data", "dolly", "--greedy", *SHORT])
    assert replies_of(run, "dolly")[0]["examples"] == 2
    (tmp_path / "valid.jsonl").unlink()
    with pytest.raises(SystemExit, match="'dolly': .* MiniLLM/dolly has valid.jsonl"):
        evaluation.main([run, "--data", "dolly", "--greedy", *SHORT])


def test_finished_sets_are_kept_if_a_later_one_fails(tiny_task, tmp_path, capsys, monkeypatch):
    run = run_directory(tiny_task, tmp_path)
    sets = [write_lines(tmp_path / f"{name}.jsonl", {"prompt": "Hello", "output": "you"}) for name in ("one", "two")]
    evaluate, calls = evaluation.evaluate, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return evaluate(*arguments)

    monkeypatch.setattr(evaluation, "evaluate", failing)
    with pytest.raises(SystemExit, match="out of memory"):
        evaluation.main([run, "--data", *sets, "--seeds", "1", *SHORT])
    assert json.loads((tmp_path / "run" / "eval-one.json").read_text())["responses"]
    assert not (tmp_path / "run" / "eval-two.json").exists()
    assert [cell.strip() for cell in capsys.readouterr().out.splitlines()[2].split("|")[3:5]] == ["-", "-"]


def test_code_is_not_run_unasked(tiny_task, tmp_path, monkeypatch):
    exercises = write_lines(tmp_path / "exercises.jsonl", EXERCISE)
    monkeypatch.setattr(evaluation, "load_model", lambda *arguments: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit, match="exercises: scoring code means running what a model wrote.*add --run-code"):
        evaluation.main([run_directory(tiny_task, tmp_path), "--data", exercises, *SHORT])


def test_sets_that_would_write_the_same_file_are_refused(tiny_task, tmp_path):
    (tmp_path / "other").mkdir()
    sets = [write_lines(path / "same.jsonl", SUMS) for path in (tmp_path, tmp_path / "other")]
    with pytest.raises(SystemExit, match="two sets are named 'same'"):
        evaluation.main([run_directory(tiny_task, tmp_path), "--data", *sets, *SHORT])
