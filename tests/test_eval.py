"""Scores: generation in batches, held-out cross-entropy, the table and the JSON file."""

import io
import json
import math
from pathlib import Path

import pytest
import torch
from helpers import arguments, report_of, speaker

import eval as evaluation
import model
import train
from data import CodeTask, Example, tokenise
from runtime import show
from runtime.formats import read_examples
from runtime.tokenizer import read_tokenizer

pytestmark = pytest.mark.usefixtures("own_folder")  # eval.py writes reports into it


@pytest.fixture(scope="module")
def student(tiny_task):
    return model.load_model(tiny_task / "student"), read_tokenizer(tiny_task / "student")


def test_responses_come_back_in_order_in_any_batch_and_are_sampled_by_the_seed(tiny_task, student):
    m, tokenizer = student
    prompts = [example.prompt_text() for example in read_examples(tiny_task / "test.jsonl")]
    together = evaluation.respond(m, tokenizer, prompts, max_new_tokens=6, batch_size=4)
    alone = [evaluation.respond(m, tokenizer, [prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert together == alone and len(set(together)) > 1
    sampled = [evaluation.respond(m, tokenizer, prompts, 6, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert len(set(evaluation.respond(m, tokenizer, prompts[:1] * 4, 6, temperature=1.0, seed=1, batch_size=2))) == 4


def test_held_out_cross_entropy_is_the_token_mean(tiny_task, student):
    m, tokenizer = model.load_model(tiny_task / "dropout"), student[1]
    rows, _ = tokenise(read_examples(tiny_task / "valid.jsonl"), tokenizer)
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in rows:  # one by one, no padding, from the definition
            ids = torch.tensor([row.student.prompt + row.student.response])
            log_probabilities = m.logits(m(ids[:, :-1])).log_softmax(-1)[0]
            for position in range(len(row.student.prompt) - 1, ids.shape[1] - 1):
                total -= float(log_probabilities[position, ids[0, position + 1]])
                tokens += 1
    m.train()  # whose dropout is not to count
    for batch_size, times in ((1, 1), (3, 1), (16, 1), (1000, 2000 // tokens + 1)):  # also over 1,024 tokens at once
        found = evaluation.held_out_cross_entropy(m, rows * times, tokenizer.eos_id, batch_size=batch_size)
        assert found == pytest.approx(total / tokens, rel=1e-5)
    assert m.training and math.log(900) * 0.9 < total / tokens


def test_score_is_the_mean_of_the_best_reference_in_per_cent():
    examples = [Example("a", ["the red fox", "a blue owl"]), Example("b", ["yes"])]
    scores = evaluation.score(["A blue owl!", "no"], examples)
    assert scores == {"rouge_l": 50.0, "exact_match": 50.0, "each": [100.0, 0.0]}


REFERENCES = ["2 + 1 = <<2+1=3>>3\n#### 3", "so\n#### 1,200"]
CODE = [
    Example("h", ["    return 1\n"], prompt="def one():\n    'one'\n", code=CodeTask("assert one() == 1", "one")),
    Example("m", ["def two():\r\n  return 2"], prompt="Write two.\n", code=CodeTask("assert two() == 2")),
]


def test_score_of_answers_on_references_and_corrupted_ones():
    examples = [Example("", [reference], instruction="?") for reference in REFERENCES]
    scores = evaluation.score(REFERENCES, examples, "math")
    assert scores["accuracy"] == 100.0 and [detail["answer"] for detail in scores["details"]] == ["3", "1,200"]
    assert evaluation.score(["#### 4", "#### 1,201"], examples, "math")["accuracy"] == 0.0
    scores = evaluation.score(["It is $3.00.", ""], examples, "math")
    assert scores["accuracy"] == 50.0 and scores["each"] == [100.0, 0.0]


@pytest.fixture
def working_sandbox():
    sandbox = pytest.importorskip("scores.sandbox")
    try:
        sandbox.check()
    except RuntimeError as error:
        pytest.skip(str(error))


def test_score_of_programs_on_references_and_corrupted_ones(working_sandbox):
    def score(responses, unfinished=()):
        scores = evaluation.score(responses, CODE, "code", unfinished)
        return scores["pass_at_1"], scores["details"]

    assert score([example.outputs[0] for example in CODE])[0] == 100.0
    passed, details = score(["    exit()", "```python\ndef two(): return 2\n```"])
    assert passed == 50.0 and details[1]["program"] == "def two(): return 2\n"
    responses = ["    return 1\n", "def two():\n    return 2\n\ndef two():\n    return 1"]  # cut, perhaps from "1 + 1"
    passed, details = score(responses, unfinished={1})
    assert passed == 100.0 and [detail["ended"] for detail in details] == [True, False]
    assert score(responses)[0] == 50.0
    future = "```python\nfrom __future__ import annotations\n{}```\n"
    one, two = future.format("def one() -> Later:\n    return 1\n"), future.format("def two(): return 2\n")
    assert score([one, "```python\ndef half(): return 1\n```\n" + two])[0] == 100.0


def test_command_line_compares_models_and_writes_json(tiny_task, tmp_path, capsys):
    for name in ("one", "two"):
        run_directory(tiny_task, tmp_path, name)
    data = str(tiny_task / "test.jsonl")
    short = ["--max-len", "40", "--device", "cpu"]
    evaluation.main(["one", "two", "--data", data, "--seeds", "1", "2", "--limit", "3", *short])
    out, err = capsys.readouterr()
    lines, differences = map(str.splitlines, out.split("\n\n"))
    assert "device: cpu (" in err
    assert [line.split("|")[1].strip() for line in lines] == ["model", "-------", "one", "two"]
    assert differences[2].split("|")[1:3] == [" two                 ", " +0.00 ± 0.00         "]
    assert lines[2].split("|")[2:] == lines[3].split("|")[2:] and "±" in lines[2]  # the same model, the same seeds
    report = json.loads((tmp_path / "one" / "eval-test-first-3.json").read_text())
    assert report["examples"] == 3 and len(report["rouge_l"]) == 2 and len(report["responses"][1]) == 3
    assert [sum(each) / 3 for each in report["each"]] == pytest.approx(report["rouge_l"])
    evaluation.main(["one", "--data", data, "--greedy", "--limit", "3", *short])
    assert "±" not in capsys.readouterr().out
    assert json.loads((tmp_path / "one" / "eval-test-first-3.json").read_text()) == report  # is still there
    both = [report, json.loads((tmp_path / "one" / "eval-test-first-3-greedy.json").read_text())]
    assert [report["seeds"] for report in both] == [[1, 2], None]


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


def run_directory(tiny_task, path, name="run"):
    (path / name).mkdir()
    (path / name / "student").symlink_to(tiny_task / "student")
    return str(path / name)


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
    assert head == ["model", "test-first-2 Rouge-L", "sums accuracy", "exercises pass@1", "not ended"]
    assert row[2:] == ["100.00 ± 0.00", "100.00 ± 0.00", "0 of 10"] and "sandbox: " in err and "2 passed" in err
    report = json.loads((tmp_path / "run" / "eval-exercises.json").read_text())
    assert report["task"] == "code" and report["pass_at_1"] == [100.0, 100.0] and report["seeds"] == [1, 2]
    assert report["responses"] == [["    return 1\n"]] * 2 and report["details"][0][0]["status"] == "passed"
    assert json.loads((tmp_path / "run" / "eval-sums.json").read_text())["details"][1][0]["answer"] == "3"


def replies_of(run, name):
    """(report, the responses) of eval-<name>-greedy.json"""
    report = json.loads((Path(run) / f"eval-{name}-greedy.json").read_text())
    return report, report["responses"][0]


def test_new_tokens_do_not_depend_on_the_prompts(tiny_task, tmp_path, capsys, student):
    """--max-len minus --max-prompt-len, for short prompts and for one that is cut, and with any --limit. What is cut is
    told, references too, which count whole in Rouge-L."""
    run, (m, tokenizer) = run_directory(tiny_task, tmp_path), student
    prompts = ["The fox\n", "Where is the owl?\n", "Where in the garden can I find the fox? " * 9]
    lines = ({"prompt": prompt, "output": "x" + " of the owl" * (len(prompt) // 10)} for prompt in prompts)
    data = write_lines(tmp_path / "set.jsonl", *lines)
    for limit, cut in (("1", 0), ("2", 0), ("3", 1)):
        evaluation.main([run, "--data", data, "--greedy", "--limit", limit, "--max-len", "60", "--max-prompt-len", "50",
                         "--device", "cpu"])  # fmt: skip
        report, replies = replies_of(run, "set" if limit == "3" else f"set-first-{limit}")
        assert report["new_tokens"] == 10 and report["prompts_cut"] == report["references_cut"] == cut
        assert ("1 prompts cut to fit, 1 references cut to fit" in capsys.readouterr().err) == cut
        assert replies[:2] == evaluation.respond(m, tokenizer, prompts[:2], max_new_tokens=10)[: int(limit)]
    evaluation.main([run, "--data", data, "--greedy", "--limit", "1", "--max-len", "60", "--device", "cpu"])
    assert replies_of(run, "set-first-1")[0]["new_tokens"] == 30
    assert replies_of(run, "set")[0]["examples"] == 3  # of the whole set: still there


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
    note = f"the model has 128 positions: {128 - new_tokens} tokens for the prompt and {new_tokens} for the response"
    assert (note in capsys.readouterr().err) == ("100" not in options)


def test_prompts_must_leave_room_for_responses(tiny_task, tmp_path, monkeypatch):
    run, data = run_directory(tiny_task, tmp_path), write_lines(tmp_path / "set.jsonl", SUMS)
    monkeypatch.setattr(evaluation, "load_model", lambda *arguments: pytest.fail("a model was loaded"))
    for options in (["--max-len", "60", "--max-prompt-len", "60"], ["--max-prompt-len", "512", "--task", "rouge"]):
        with pytest.raises(SystemExit, match="--max-prompt-len .* leaves no token of --max-len .* for the response"):
            evaluation.main([run, "--data", data, "--device", "cpu", *options])


@pytest.mark.parametrize("trained", ["{}\n", "Say {}!"])
def test_a_prompt_is_answered_as_in_training(tiny_task, tmp_path, capsys, monkeypatch, student, trained):
    run, (m, tokenizer) = run_directory(tiny_task, tmp_path), student
    (tmp_path / "run" / "args.json").write_text(json.dumps({"prompts": trained, "bos": None}))
    words = [run, "--device", "cpu", "--max-len", "30", "--prompt"]
    expected = [evaluation.respond(m, tokenizer, [trained.replace("{}", text)], 15)[0] for text in ("A fox", "An owl")]
    evaluation.main([*words, "A fox"])
    assert capsys.readouterr().out == expected[0] + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("A fox\n\nAn owl\n"))  # no terminal: a line each
    evaluation.main(words)
    assert capsys.readouterr().out == "".join(f"{response}\n" for response in expected)
    evaluation.main([*words, "A fox " * 30])
    assert "note: the prompt is cut to 15 tokens (--max-prompt-len)\n" in capsys.readouterr().err
    both = ["--teacher", str(tiny_task / "teacher"), "--student", str(run)]
    for main in (lambda text: evaluation.main([*words, text]), lambda text: show.main("", [text, *both])):
        with pytest.raises(SystemExit, match="error: 'utf-8' codec can't encode"):
            main("caf\udce9")  # a byte of Latin-1, as Python hands it on
    evaluation.main([*words, "A fox", "--seeds", "1", "2", "1"])
    sampled = capsys.readouterr().out.splitlines()
    assert sampled != [expected[0]] * len(sampled)
    (tmp_path / "chat.jinja").write_text("{% for turn in messages %}[{{ turn.content }}]{% endfor %}")
    monkeypatch.setattr(evaluation, "respond", lambda model, tokenizer, prompts, *rest, **how: prompts)
    evaluation.main([*words, "A fox", "--chat", str(tmp_path / "chat.jinja")])
    assert capsys.readouterr().out == "[A fox]\n"  # which takes the place of that form
    evaluation.main([str(tiny_task / "twin"), *words, "{}", "--seeds", "1", "2"])  # a line for each model and seed
    lines = [f"{tiny_task / 'twin'}: {{}}\n"] * 2 + [f"{run}: {trained}\n"] * 2
    assert capsys.readouterr().out == "".join(lines)


@pytest.mark.parametrize(
    "encoding, written",
    [("utf-8", ("東京", "±", "␣", "café")), ("ascii", (r"\u6771\u4eac", r"\xb1", r"\u2423", r"caf\xe9"))],
)
def test_what_the_terminal_lacks_is_escaped_and_nothing_lost(tiny_task, tmp_path, monkeypatch, encoding, written):
    directory = str(says(tiny_task, tmp_path / "model", "東京"))
    data = write_lines(tmp_path / "set.jsonl", {"prompt": "Capital?", "output": "東京"})
    both = ["--teacher", str(tiny_task / "teacher"), "--student", str(tiny_task / "student")]
    commands = [
        lambda: evaluation.main([directory, "--device", "cpu", "--prompt", "Capital?"]),
        lambda: evaluation.main([directory, "--data", data, "--seeds", "1", "2", *SHORT]),
        lambda: show.main("", ["A fox", *both]),
        lambda: train.main(arguments(tiny_task, tmp_path / "café", max_steps=1)),
    ]
    monkeypatch.setattr("sys.stdout", io.StringIO())  # as in a notebook: nothing to set
    show.escape_what_cannot_be_printed()
    for command, text in zip(commands, written, strict=True):
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        command()
        evaluation.sys.stdout.seek(0)
        assert text in evaluation.sys.stdout.read()


def test_prompts_and_sets_are_either_or_and_so_are_seeds_and_greedy(tiny_task, capsys):
    for words in ([], ["--data", "x", "--prompt", "y"], ["--data", "x", "--greedy", "--seeds", "1"]):
        with pytest.raises(SystemExit, match="2"):
            evaluation.main([str(tiny_task / "student"), *words])


@pytest.mark.parametrize(
    "option, value",
    [("--limit", "0"), ("--batch-size", "0"), ("--max-len", "1"), ("--max-prompt-len", "0"), ("--seeds", "-1"),
     ("--seeds", str(2**32))],
)  # fmt: skip
def test_values_out_of_range_are_named(tiny_task, monkeypatch, option, value):
    monkeypatch.setattr(evaluation, "find_model", lambda *arguments: pytest.fail("a model was looked for"))
    most = 2**32 if option == "--seeds" else 2**31
    with pytest.raises(SystemExit, match=f"error: {option} {value}: must be at least . and below {most}"):
        evaluation.main([str(tiny_task / "student"), "--data", "x", option, value])


def test_dolly_is_scored_on_its_own_test_set(tiny_task, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda **where: str(tmp_path))
    run = run_directory(tiny_task, tmp_path)
    write_lines(tmp_path / "raw.jsonl", *({"prompt": f"{n}?", "output": "dev"} for n in range(1003)))
    write_lines(tmp_path / "valid.jsonl", {"prompt": "a", "output": "test"}, {"prompt": "b", "output": "test"})
    evaluation.main([run, "--data", "dolly", "--greedy", *SHORT])
    assert replies_of(run, "dolly")[0]["examples"] == 2
    (tmp_path / "valid.jsonl").unlink()
    with pytest.raises(SystemExit, match="'dolly': .* MiniLLM/dolly has valid.jsonl"):
        evaluation.main([run, "--data", "dolly", "--greedy", *SHORT])


def test_logits_that_are_not_finite_are_an_error_not_a_traceback(tiny_task, tmp_path):
    directory = says(tiny_task, tmp_path / "model", "you")
    m = model.load_model(directory)
    torch.nn.init.constant_(m.norm.weight, 1e38)  # finite, but its products are not
    model.save_model(m, directory)
    data = write_lines(tmp_path / "set.jsonl", {"prompt": "Hello", "output": "you"})
    with pytest.raises(SystemExit, match="error: .*the logits are not finite"):
        evaluation.main([str(directory), "--data", data, *SHORT])


@pytest.mark.parametrize("error, code", [(RuntimeError("out of memory"), "out of memory"), (KeyboardInterrupt, "130")])
def test_finished_sets_are_kept_if_a_later_one_fails(tiny_task, tmp_path, capsys, monkeypatch, error, code):
    run = run_directory(tiny_task, tmp_path)
    sets = [write_lines(tmp_path / f"{name}.jsonl", {"prompt": "Hello", "output": "you"}) for name in ("one", "two")]
    evaluate, calls = evaluation.evaluate, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise error
        return evaluate(*arguments)

    monkeypatch.setattr(evaluation, "evaluate", failing)
    with pytest.raises(SystemExit, match=code):
        evaluation.main([run, "--data", *sets, "--seeds", "1", *SHORT])
    assert json.loads((tmp_path / "run" / "eval-one.json").read_text())["responses"]
    assert not (tmp_path / "run" / "eval-two.json").exists()
    assert [cell.strip() for cell in capsys.readouterr().out.splitlines()[2].split("|")[3:5]] == ["-", "-"]


def test_code_is_not_run_unasked(tiny_task, tmp_path, monkeypatch):
    exercises = write_lines(tmp_path / "exercises.jsonl", EXERCISE)
    monkeypatch.setattr(evaluation, "load_model", lambda *arguments: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit, match="exercises: scoring code means running a model's programs.*add --run-code"):
        evaluation.main([run_directory(tiny_task, tmp_path), "--data", exercises, *SHORT])


def test_sets_that_would_write_the_same_file_are_refused(tiny_task, tmp_path):
    (tmp_path / "other").mkdir()
    sets = [write_lines(path / "same.jsonl", SUMS) for path in (tmp_path, tmp_path / "other")]
    with pytest.raises(SystemExit, match="two sets are named 'same'"):
        evaluation.main([run_directory(tiny_task, tmp_path), "--data", *sets, *SHORT])


def test_models_that_would_write_the_same_file_are_refused(tiny_task, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "load_model", lambda *arguments: pytest.fail("a model was loaded"))
    (tmp_path / "a").mkdir()
    for path in ("a-b", "a/b"):
        (tmp_path / path).symlink_to(tiny_task / "student")
    sums = write_lines(tmp_path / "sums.jsonl", SUMS)
    with pytest.raises(SystemExit, match="two of the models would write the same file eval-a-b-sums.json"):
        evaluation.main(["a-b", "a/b", "--data", sums, *SHORT])


def says(task, directory, text, ends=True):
    """A model that continues anything with this text: once, or forever."""
    return speaker(task, directory, says=(900, 0 if ends else 900), text=text)


def scores_of(directory, data, capsys, *options):
    """What eval.py prints about it (a dictionary, its table's only row by the head), and its report."""
    evaluation.main([str(directory), "--data", data, "--device", "cpu", *options])
    out = capsys.readouterr().out
    head, _, row, *notes = out.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (head, row)]
    name = Path(data).stem + "-greedy" * ("--greedy" in options)
    return {**dict(zip(*cells, strict=True)), "notes": " ".join(notes)}, report_of(directory, name)


HENS = {"question": "A hen lays 16 eggs. 7 are eaten, the rest are sold for $2 each. How much is earned?",
        "answer": "16 - 7 = 9 eggs are sold. 9 * 2 = 18 dollars.\n#### 18"}  # fmt: skip


@pytest.mark.parametrize(
    "response, ends, accuracy",
    [
        ("9 * 2 = 18.\n#### 18\n\n### Instruction:\nA robe takes 2 + 1.\n\n### Response:\n#### 3", True, "100.00"),
        ("16 - 7 = 9, 9 * 2 = 18. Let me check that. ", False, "0.00"),  # the last number is not said to be final
        ("It is 18.\n\nQuestion: How many are 2 and 1?\nAnswer: 3", False, "100.00"),
    ],
)
def test_a_final_answer_is_looked_for_where_the_response_ended(tiny_task, tmp_path, capsys, response, ends, accuracy):
    data, directory = write_lines(tmp_path / "hens.jsonl", HENS), tmp_path / "model"
    row, report = scores_of(says(tiny_task, directory, response, ends), data, capsys, "--greedy")
    assert (row["accuracy"], row["not ended"]) == (accuracy, f"{1 - ends} of 1")
    assert report["not_ended"] == [1 - ends] and report["details"][0][0]["ended"] is ends
    assert report["responses"][0][0].startswith(response) and report["accuracy"] == [float(accuracy)]


def test_without_options_responses_are_sampled_as_in_the_papers(tiny_task, tmp_path, monkeypatch):
    """Five seeds at temperature 1, in batches of 32, on which the draws depend; and --dtype is that of the weights."""
    asked = []

    def respond(model, tokenizer, prompts, max_new_tokens, temperature, seed, **options):
        asked.append((str(model.embed.weight.dtype), temperature, seed, options["batch_size"]))
        return [""]

    monkeypatch.setattr(evaluation, "respond", respond)
    data = write_lines(tmp_path / "set.jsonl", SUMS)
    for dtype, options in (("float32", []), ("bfloat16", ["--dtype", "bf16"])):
        evaluation.main([str(tiny_task / "student"), "--data", data, "--device", "cpu", *options])
        assert asked == [(f"torch.{dtype}", 1.0, seed, 32) for seed in (10, 20, 30, 40, 50)]
        asked.clear()


def test_how_many_responses_did_not_end_is_counted_over_the_seeds(tiny_task, tmp_path, capsys):
    data = write_lines(tmp_path / "talk.jsonl", *[{"prompt": "Hello", "output": "you"}] * 3)
    options = "--seeds 1 2 --batch-size 2 --max-len 20 --max-prompt-len 18".split()  # two tokens: the text and its end
    for name, ends, counts in (("ends", True, [0, 0]), ("goes-on", False, [3, 3])):
        directory = says(tiny_task, tmp_path / name, "you", ends)
        row, report = scores_of(directory, data, capsys, *options)
        assert row["not ended"] == f"{sum(counts)} of 6" and report["not_ended"] == counts


def test_a_note_stands_by_a_rouge_l_that_counts_no_token(tiny_task, tmp_path, capsys):
    outputs = ("東京", ["القاهرة", "東京"], "Paris", ["東京", "Tokyo"])
    lines = [{"prompt": "Capital?", "output": output} for output in outputs]
    data = write_lines(tmp_path / "capitals.jsonl", *lines)
    directory = says(tiny_task, tmp_path / "model", "東京")
    row, report = scores_of(directory, data, capsys, "--greedy")
    assert (row["Rouge-L"], row["exact match"], report["no_reference_tokens"]) == ("0.00*", "75.00", 2)
    assert "capitals: the references of 2 of 4 examples have no token that Rouge-L counts" in row["notes"]
    row, report = scores_of(directory, write_lines(tmp_path / "english.jsonl", lines[2]), capsys, "--greedy")
    assert (row["Rouge-L"], row["notes"], report["no_reference_tokens"]) == ("0.00", "", 0)
    evaluation.main([str(directory), "--data", data, str(tmp_path / "english.jsonl"), "--greedy", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert "| 0.00*" in lines[2] and "| 0.00 " in lines[2] and lines[3].startswith("* capitals: ") and len(lines) == 4
