"""Graders: final answers, numbers, and the program in a response, on cases made by hand."""

import runpy
from fractions import Fraction

import pytest

from scores.answers import (
    answers_equal,
    boxed,
    final_answer,
    humaneval_program,
    is_correct,
    last_number,
    mbpp_program,
    number,
    program_lines,
)

# ---------------------------------------------------------------------------------------------------------------------
# Mathematics


@pytest.mark.parametrize(
    "text, answer",
    [
        ("She has <<5-2=3>>3 left.\n#### 3", "3"),
        ("#### 1,234", "1,234"),
        ("####72", "72"),
        ("so #### $18.00 \n\n", "$18.00"),
        ("#### 5\nNo, wait.\n#### 6\n", "6"),
        ("#### 5\nI hope that helps, ask me 2 more.", "5"),
        ("#### 18 dollars", "18 dollars"),
        ("#### Step 1: add\n2 + 2 = 4", "4"),  # a heading of Markdown
        ("#### 1. Add\n2 + 2 = 4\n#### 2. Answer\nIt is 4.", "4"),
        ("#### Answer\nThus \\boxed{9}", "9"),
        ("#### Tuesday", "Tuesday"),
        ("####\n7", "7"),
        (r"First \boxed{3}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{x^{2}+\{1\}} and 7 more", r"x^{2}+\{1\}"),
        (r"$\boxed{ \text{even} }$ for 4", r"\text{even}"),
        (r"\boxed{12} but \boxed{unclosed 5", "12"),
        (r"\fbox{3}", "3"),
        (r"\boxed{1 + \boxed{2}} or \boxed{{4}", "2"),
        ("The answer is 42.", "42"),
        ("It costs $1,200.50.", "$1,200.50"),
        ("10-3", "3"),
        ("10 - 3", "3"),
        ("x = -3", "-3"),
        ("x = \u22123", "\u22123"),
        ("a loss of -$5", "-$5"),
        ("- 3 apples\n- 4 pears", "4"),
        ("half, that is 1/2.", "1/2"),
        (r"\frac{3}{4} of it", r"\frac{3}{4}"),
        ("1, 2, 3", "3"),
        ("1,2,3", "3"),
        ("about .5", ".5"),
        ("1e3 of them", "1e3"),
        ("**18**", "18"),
        ("no idea", None),
        ("", None),
        (" \n", None),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


def test_last_number_and_boxed_alone():
    assert boxed("nothing") is None and boxed(r"\boxed{}") == "" and last_number("nothing") is None
    assert final_answer(r"\boxed{} 5") == "5"  # an empty box is no answer


@pytest.mark.parametrize(
    "text, value",
    [
        ("18", 18), ("-18", -18), ("+18", 18), ("\u221218", -18), ("018", 18), ("18.", 18), ("18.0", 18),
        ("18.50", "37/2"),
        (".5", "1/2"), ("1,234", 1234), ("1,234,567.25", "4938269/4"), ("109,200,000", 109200000), ("1{,}234", 1234),
        ("$18", 18), ("$ 18.00", 18), ("-$5", -5), ("$-5", -5), (r"\$1,000", 1000), ("€7", 7), ("$18$", 18),
        (r"\(18\)", 18),
        ("25%", 25), (r"25\%", 25), ("12 apples", 12), ("5 square feet", 5), ("60 km/h", 60), ("3 m^2", 3),
        ("18 dollars.", 18),
        (r"5\text{ cm}", 5), (r"90^\circ", 90), ("90°", 90), ("1e3", 1000), ("1.5E-2", "3/200"),
        (r"1.5 \times 10^{3}", 1500), ("2 x 10^-2", "1/50"), ("3/4", "3/4"), ("6/8", "3/4"), ("1 3/4", "7/4"),
        ("-3/4", "-3/4"),
        (r"\frac{3}{4}", "3/4"), (r"\dfrac{3}{4}", "3/4"), (r"\frac34", "3/4"), (r"-\frac{1}{2}", "-1/2"),
        ("0.1", "1/10"),
        (r"1\frac{1}{2}", "3/2"), (r"\frac{1,000}{3}", "1000/3"), ("x = 3", 3), ("x=-3", -3), ("**7**", 7), ("{7}", 7),
    ],
)  # fmt: skip
def test_number(text, value):
    assert number(text) == Fraction(value)


@pytest.mark.parametrize(
    "text",
    ["", "many", "1,2", "12,34", "1.2.3", "10:30", "1/0", r"\frac{1}{0}", r"\frac{a}{b}", "x^2", "3x = 4y", "--3",
     "+-3",
     "3 apples and 4 pears", "Step 1", "1. Add them", "(1, 2)", "1e9999", "9" * 5000, "2.e2", "$", "-", "2 + 2",
     "nan", "inf"],
)  # fmt: skip
def test_no_number(text):
    assert number(text) is None


@pytest.mark.parametrize(
    "answer, reference, same",
    [
        ("0.5", "1/2", True), ("0.333", "1/3", False), ("$1,000.00", "1000", True), ("18", "18.0001", False),
        ("50%", "50", True), ("18 apples", "18", True), ("-18", "18", False), ("1e3", "1000", True),
        ("18", "eighteen", False),
        ("even", r"\text{Even}", True), ("x + 1", "x+1", True), ("x+1", "x+2", False), ("Tuesday.", "tuesday", True),
        (r"\left( 1, 2 \right)", "(1,2)", True), ("10:30", "10:3", False), ("0.1", "0.10000000000000001", False),
    ],
)  # fmt: skip
def test_answers_equal(answer, reference, same):
    assert answers_equal(answer, reference) is same and answers_equal(reference, answer) is same


def test_is_correct():
    reference = "She makes 9 * 2 = $<<9*2=18>>18 a day.\n#### 18"
    for right in ("#### 18", "#### $18.00", r"\boxed{18}", "So it is 18 dollars.", "36/2", reference):
        assert is_correct(right, [reference])
    for wrong in ("#### 19", "18 minus 1 is 17", r"18, so \boxed{17}", "", "eighteen", "-18", "#### 1.8", "#### 180"):
        assert not is_correct(wrong, [reference])
    assert is_correct("It is 4.", ["#### 3", "4"]) and is_correct(r"\boxed{Even}", ["even"])
    with pytest.raises(ValueError, match="no final answer"):
        is_correct("3", [" "])


# ---------------------------------------------------------------------------------------------------------------------
# Code

PROMPT = 'import math\n\n\ndef helper(x):\n    return x\n\n\ndef area(r):\n    """Of a circle.\n    """\n'
BODY = "    if r < 0:\n        return 0\n    return math.pi * helper(r) ** 2\n"


@pytest.fixture
def area(tmp_path):
    """What the function of a program, one of those below, gives for 1 and for -1, rounded."""

    def values(program):
        (tmp_path / "program.py").write_text(program)
        function = runpy.run_path(str(tmp_path / "program.py"))["area"]
        return [round(function(r), 2) for r in (1, -1)]

    return values


WHOLE = "def area(r):\n" + BODY
HUMANEVAL = {
    "continuation": BODY,
    "without its last line end": BODY.rstrip(),
    "first line stripped": BODY.lstrip(),
    "first space lost": BODY[1:],
    "all unindented": "if r < 0:\n    return 0\nreturn math.pi * helper(r) ** 2\n",
    "all unindented, demonstration": "if r < 0:\n    return 0\nreturn math.pi * helper(r) ** 2\n\nprint(area(q))\n",
    "blank lines before": "\n\n" + BODY,
    "another function follows": BODY + "\ndef area2(r):\n    return 1\n",
    "a class follows": BODY + "\n\nclass Circle:\n    pass\n",
    "a demonstration follows": BODY + "\nprint(area(undefined))\n",
    "a main part follows": BODY + '\nif __name__ == "__main__":\n    area(undefined)\n',
    "a comment follows": BODY + "# Tests\nassert area(1) == 7\n",
    "prose follows": BODY + "\nThis function returns the area.\n",
    "the end of a fence follows": BODY + "```\nThis returns the area.",
    "the next prompt follows": BODY + "\n### Instruction:\nWrite",
    "fenced function": f"Sure!\n\n```python\n{WHOLE}```\nIt works for all r >= 0:\n",
    "fenced, unnamed language": f"```\n{WHOLE}```",
    "fenced, unclosed": f"Here:\n```python\n{WHOLE}",
    "fenced, demonstration inside": f"```python\n{WHOLE}\nprint(area(undefined))\n```",
    "fenced, second block": f"Install it:\n```sh\npip install circle\n```\nthen\n```py\n{WHOLE}```\n",
    "fenced, with its own imports": f"```python\nimport math\nfrom typing import List\n\n{WHOLE}```",
    "fenced, helper below": "```python\ndef area(r):\n    return square(r)\n\ndef square(r):\n"
    "    return 3.14 if r > 0 else 0\n```",
    "fenced body": f"```python\n{BODY}```",
    "fenced body, unindented": "```python\nif r < 0:\n    return 0\nreturn math.pi * helper(r) ** 2\n```",
    "fenced, CRLF": f"```python\n{WHOLE}```".replace("\n", "\r\n"),
    "plain function": WHOLE,
    "plain function between prose": f"Here is the function:\n\n{WHOLE}\nI hope that helps.",
    "plain function with imports": f"import math\n\n{WHOLE}\nprint(area(undefined))",
    "the prompt repeated": PROMPT + BODY + "\nprint(area(undefined))",
    "the prompt repeated, fenced": f"```python\n{PROMPT}{BODY}```",
}  # fmt: skip


@pytest.mark.parametrize("case", HUMANEVAL)
def test_humaneval_program(area, case):
    assert area(humaneval_program(PROMPT, "area", HUMANEVAL[case])) == [3.14, 0]


@pytest.mark.parametrize("response", ["", "\n", "I cannot do that.", "```python\n```", "```", "    pass\n"])
def test_humaneval_without_a_body(response):
    program = humaneval_program(PROMPT, "area", response)
    assert program.startswith(PROMPT) and "math.pi" not in program


def test_a_string_or_bracket_closed_at_the_margin_does_not_end_the_body(area):
    body = '    text = """\n"""\n    table = [\n        3.14,\n]\n    return table[0] if r > 0 else len(text) - 1\n'
    assert area(humaneval_program(PROMPT, "area", body)) == [3.14, 0]


PROGRAM = "import math\nPI = math.pi\n\n@staticmethod\ndef area(r):\n    # circle\n    return PI * r * r * (r > 0)\n"
MBPP = {
    "plain": PROGRAM,
    "done": PROGRAM + "[DONE]\n\nYou are an expert Python programmer, and here is your task",
    "begun again": "\n" + PROGRAM + "[BEGIN]\n",
    "fenced": f"Here is it:\n```python\n{PROGRAM}```\nEnjoy, it is = good.",
    "fenced, asserts inside": f"```python\n{PROGRAM}\nassert area(1) == 9\n```",
    "fenced, unclosed": f"```python\n{PROGRAM}",
    "prose around": f"Sure, here is the code:\n{PROGRAM}\nThis code returns the area of a circle.",
    "demonstration": PROGRAM + "\nprint(area(undefined))",
    "main": PROGRAM + "\nif __name__ == '__main__':\n    area(undefined)",
    "CRLF": PROGRAM.replace("\n", "\r\n"),
    "fence ends only": PROGRAM + "```",
}  # fmt: skip


@pytest.mark.parametrize("case", MBPP)
def test_mbpp_program(area, case):
    assert area(mbpp_program(MBPP[case])) == [3.14, 0]


def test_statements_and_prose():
    code = "x = 1\ny: int = 2\na, b = 1, 2\nd['k'] = [\n    3,\n]\nx += 1\nfor i in []:\n    pass\nelse:\n    pass\n"
    code += "f.g(1)  # no\nimport os, sys\nimport a.b as c\n@f(x)\n"
    assert program_lines(code) == code
    for prose in ("This is x.", "The result = 3", "from the list we take", "import it first", "if so, do", "Note: x"):
        assert program_lines(prose + "\n") == "", prose
        assert program_lines("x = 1\n" + prose + "\ny = 2\n") == "x = 1\n", prose
