"""Tables of scores, and which task a set is."""

import pytest

from data import CodeTask, Example
from scores.tables import compare, describe, spread, table
from scores.tasks import DataSet, check_sets, share_tokens, task_of

SUMS = [Example("s", [answer], prompt="p") for answer in ("2 + 1 = <<2+1=3>>3\n#### 3", "so\n#### 1,200")]
CODE = [Example("h", ["x = 1"], prompt="p", code=CodeTask("assert x"))] * 2


def test_spread_and_table():
    assert spread([1.0, 3.0]) == "2.00 ± 1.41" and spread([1.0]) == "1.00"
    assert table([["a", "long"], ["bcd", "e"]]).splitlines()[1:] == ["|-----|------|", "| bcd | e    |"]


def test_the_task_follows_from_the_data():
    text = [Example("t", ["a"], prompt="p")]
    assert [task_of(e, "x") for e in (text, SUMS, CODE)] == ["rouge", "math", "code"]
    assert task_of([Example("s", ["it is \\boxed{3}"], prompt="p")], "x") == "math"
    assert task_of([Example("s", [t], prompt="p") for t in (r"$\boxed 3$", r"\fbox{3}")], "x") == "math"
    assert task_of(text + SUMS, "x") == "rouge"  # not all are marked
    assert task_of([Example("s", ["#### Title\ntext"], prompt="p")], "x") == "rouge"
    assert [task_of(e, "x", "rouge") for e in (text, SUMS, CODE, CODE + text)] == ["rouge"] * 4
    assert task_of(text, "x", "math") == "math"
    for examples, asked, message in [
        (text, "code", "--task code needs tests"), (CODE, "math", "h: --task math needs an answer"),
        (CODE + text, None, "x: 2 of 3 examples have tests"),
        ([Example("e", [" "], prompt="p")], "math", "^e: the output"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            task_of(examples, "x", asked)


@pytest.mark.parametrize("task, tokens", [("rouge", (512, 256)), ("math", (1024, 512)), ("code", (1024, 512))])
def test_room_for_prompt_and_response(task, tokens):
    assert share_tokens(task, None, None) == tokens and share_tokens(task, 300, None) == (300, 150)


def cells_of(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_differences_are_taken_prompt_by_prompt():
    """Two seeds, three prompts: the models differ by 2, 4 and 9, so 5 ± 3.606/√3; their own scores vary far more."""
    sets, others = [DataSet("a", "rouge", [])], {"not_ended": [0] * 2, "responses": [["x"] * 3] * 2, "cross_entropy": 1}
    first = {"rouge_l": [40.0, 46.0], "each": [[0.0, 20.0, 100.0], [2.0, 40.0, 96.0]], **others}
    second = {"rouge_l": [45.0, 51.0], "each": [[3.0, 24.0, 108.0], [3.0, 44.0, 106.0]], **others}
    text = compare(sets, {("m", "a"): first, ("n", "a"): second, ("o", "a"): first})
    head, _, *rows, note = cells_of(text.split("\n\n")[1])
    assert head == ["difference from m", "a Rouge-L"] and rows == [["n", "+5.00 ± 2.08"], ["o", "+0.00 ± 0.00"]]
    assert note[0].startswith("± standard error over the prompts")
    assert "difference" not in compare(sets, {("m", "a"): first})


def test_of_a_single_set_there_are_all_measures():
    others = {"not_ended": [0, 2], "responses": [["x"] * 3] * 2, "each": [[1.0]] * 2}
    scores = [{"rouge_l": [n, n + 2.0], "exact_match": [n] * 2, "cross_entropy": n, **others} for n in (2.0, 3.0)]
    data = DataSet("a", "rouge", [Example("", ["x"], prompt="p")] * 3)
    text = compare([data], {("m", "a"): scores[0], ("n", "a"): scores[1]})
    head, _, *rows = cells_of(text.split("\n\n")[0])
    assert head == ["model", "Rouge-L", "exact match", "cross-entropy", "not ended"]
    assert rows == [["m", "3.00 ± 1.41", "2.00 ± 0.00", "2.0000", "2 of 6"],
                    ["n", "4.00 ± 1.41", "3.00 ± 0.00", "3.0000", "2 of 6"]]  # fmt: skip
    line = describe({**scores[0], "prompts_cut": 0, "references_cut": 0, "new_tokens": 8}, data, None, "file")
    assert line == "3 examples, 2 of 6 responses did not end within 8 tokens; file"  # all with the second seed


def test_compare_averages_over_sets_for_each_seed():
    sets = [DataSet(name, "rouge", []) for name in ("a", "b")]
    results = {
        ("m", "a"): {"rouge_l": [10.0, 20.0], "not_ended": [0, 1], "responses": [["x", "y"]] * 2, "each": [[1.0]] * 2},
        ("m", "b"): {"rouge_l": [40.0, 30.0], "not_ended": [1, 1], "responses": [["x"]] * 2, "each": [[1.0]] * 2},
        ("n", "a"): {"rouge_l": [5.0] * 2, "not_ended": [0, 0], "responses": [["x"]] * 2, "each": [[3.0], [4.0]]},
    }
    head, _, whole, part, *_, difference, _ = cells_of(compare(sets, results))
    assert head == ["model", "a Rouge-L", "b Rouge-L", "average", "not ended"]
    assert whole == ["m", "15.00 ± 7.07", "35.00 ± 7.07", "25.00 ± 0.00", "3 of 6"]  # 25 with either seed
    assert part == ["n", "5.00 ± 0.00", "-", "-", "0 of 2"]  # the run ended before b
    assert difference == ["n", "+2.50", "-"]  # one prompt: no standard error
    results["m", "b"]["no_reference_tokens"] = 1
    text = compare(sets, results)
    assert text.count("*") == 2 and "\n* b: the references of 1 of 0 examples" in text
    sets[1].task, results["m", "b"]["pass_at_1"] = "code", [1.0, 2.0]
    assert "average" not in compare(sets, results) and "b pass@1" in compare(sets, results)


@pytest.mark.parametrize("tests, message", [("import numpy as np\nassert one() == 1", "import numpy, but"),
                                            ("from numpy.linalg import norm", "import numpy, but"),
                                            ("assert one( == 1", "not valid Python")])  # fmt: skip
def test_tests_that_no_program_could_pass_are_an_error(tests, message):
    example = Example("set.jsonl, line 3", ["x"], prompt="p", code=CodeTask(tests))
    with pytest.raises(ValueError, match=f"set.jsonl, line 3: the tests.*{message}"):
        check_sets([DataSet("set", "code", [example])], run_code=True)


def test_tests_may_import_the_program_and_what_they_can_do_without():
    tests = "from solution import one\ntry:\n    import numpy\nexcept ImportError:\n    numpy = None\nassert one()"
    example = Example("set.jsonl, line 3", ["x"], prompt="p", code=CodeTask(tests))
    check_sets([DataSet("set", "code", [example])], run_code=True)
