"""Graders: final answers, numbers, and the program in a response, on cases made by hand."""

import runpy
import textwrap
from fractions import Fraction

import pytest

from scores.answers import (
    answer_part,
    answers_equal,
    boxed,
    code_runs,
    final_answer,
    humaneval_program,
    is_correct,
    last_number,
    mbpp_program,
    number,
)

# ---------------------------------------------------------------------------------------------------------------------
# Where a response ends

NEXT_TURNS = [
    "\n\n### Instruction:\nNext\n\n### Response:\n", "### Input:\n", "\n### Response:\n", "\n### Human: Next",
    "\n### User\n", "\nBelow is an instruction that describes a task.", "<|im_end|>\n<|im_start|>user\n",
    "<|endoftext|>", "<|eot_id|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "</s>", "<end_of_turn>\n",
    " [INST] Next [/INST] ", "\nHuman: Next\n", "\nUSER: Next\nASSISTANT: ", "\nuser\nNext\nassistant\n", "\n[DONE]\n",
    "\nYou are an expert Python programmer, and", "\nInstruction: Next\n", "\n## Response:\n",
]  # fmt: skip


@pytest.mark.parametrize("mark", NEXT_TURNS)
def test_an_answer_ends_where_the_next_turn_begins(mark):
    text, ended = answer_part("It is 18." + mark + "It is 3.", ended=False)
    assert (text.rstrip(), ended) == ("It is 18.", True)
    assert final_answer("It is 18." + mark + "It is 3.", ended=False) == "18"  # for this answer has ended
    assert final_answer("Hm." + mark + "#### 18") is None  # nothing was answered before
    program = "def f():\n    return 18\n"
    assert mbpp_program(program + mark + program.replace("18", "3")) == program


NEXT_QUESTIONS = [
    "\nQuestion: How many are 2 and 1?\nAnswer: ", " Question: How many?\n", "\n\nQ: How many?\nA: ",
    "\nProblem 2:\n", "\n\n**Question 2:** How many?\n", "\n## Next Question\nHow many?\n", "assistant\n\n",
    "user\n\nHow many?assistant\n\n", "\n###\nHow many?\n",
]  # fmt: skip


@pytest.mark.parametrize("mark", NEXT_QUESTIONS)
def test_an_answer_ends_where_the_next_question_begins(mark):
    assert final_answer("It is 18." + mark + "It is 3.") == "18"
    assert final_answer(r"\boxed{18}" + mark + r"\boxed{3}") == "18"
    assert final_answer("Hm." + mark + "#### 18") is None


def test_the_prompt_said_again_is_not_a_next_turn():
    for begin in ("### Response:\n", "assistant\n", "<|im_start|>assistant\n", "[/INST] ", "Question: 9 * 2?\nA: "):
        assert final_answer(begin + "It is 18.") == "18", begin
    assert mbpp_program("[BEGIN]\nx = 1\n[DONE]\nx = 2\n") == "x = 1\n"
    for text in ("#### Input\n18", "He asked: Question 18", "as a user\n18", "a <| b |> c: 18\n"):  # these only look so
        assert final_answer(text) == "18", text


def test_thoughts_are_not_looked_at():
    thought = "\\boxed{17}\n#### 17\nThe answer is 17.\n"
    for text in ("<think>\n{}</think>\n\nIt is 18.", "{}</think>It is 18.", "<think>{}</think>It is 18.<think>{}",
                 "It <THINKING>{}</THINKING> is <reasoning>3</reasoning>18."):  # fmt: skip
        assert final_answer(text.format(thought, thought)) == "18", text
    assert final_answer("<think>It is 18.\n#### 18") is None  # it never came to an answer
    assert final_answer("<think>It is 18.</think>\n#### 17") == "17"
    program = 'def f(text):\n    return text.split("</think>")[-1], "<think>"\n'
    assert mbpp_program(f"```python\n{program}```") == program


# ---------------------------------------------------------------------------------------------------------------------
# Mathematics


@pytest.mark.parametrize(
    "text, answer",
    [
        ("She has <<5-2=3>>3 left.\n#### 3", "3"),
        ("#### 1,234", "1,234"),
        ("####72", "72"),
        ("so #### $18.00 \n\n", "$18.00"),
        ("#### 5\nNo, wait.\n#### 6\n", "6"),  # taken back
        ("#### 5\nI hope that helps, ask me 2 more.", "5"),
        ("#### 5\n\nA robe takes 2 and 1 bolts. How many?\n#### 3", "5"),  # the first, as GSM8K's own grader takes
        ("#### 5 #### 5 #### 7", "5"),
        ("#### 5\nWait, that is wrong: it is 6.", "6"),
        ("#### 12 (twelve)", "12"),
        ("#### 12(twelve).", "12"),
        ("#### 12 (3 * 4)\nDone.", "12"),
        ("#### 12, since 3 * 4 = 12", "12"),
        ("#### 12. I hope that helps.", "12"),
        ("#### The answer is 18", "18"),
        ("#### So, the final answer is $18.", "$18."),
        ("#### Answer: 18 dollars", "18 dollars"),
        ("#### 2(x+1)", "2(x+1)"),
        ("#### 12 + 6", "12 + 6"),
        ("#### 12-18", "12-18"),
        ("#### 12 million", "12 million"),
        ("#### 12:30", "12:30"),
        ("#### x = 3/2 (or 1.5)", "x = 3/2"),
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
        ("The answer is 42. I checked it 2 times.", "42"),
        ("**Final Answer:** $42$, in 3 steps", "$42"),
        ("The answer is:\n\n\\(42\\)\n\nafter 2 steps", "42"),
        ("The answer is 41. No, the answer is 42. 3 steps.", "42"),
        ("The answer is 6 * 7 = 42.", "42"),
        ("The answer is 41 or 42.", "42"),
        ("Answer: She has 16 - 7 = 9. 9 * 2 = 18.", "18"),
        ("If the answer is 18, 1 is lost, so it is 17.", "17"),
        ("Some say the answer is 18. But it is 17.", "17"),
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
        ("She has 1 000 eggs.", "1 000"),
        ("It is $1{,}000$.", "$1{,}000"),
        (r"so $12\,345.5$ kg", r"$12\,345.5"),
        ("in 2020 there were 500", "500"),
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


@pytest.mark.parametrize(
    "text, answer",
    [
        ("16 - 7 = 9, 9 * 2 = 18", None),
        ("16 - 7 = 9\n#### 18", "18"),
        ("so \\boxed{18}. To check, 16 - 7 =", "18"),
        ("9 * 2 = 18, so the answer is 18. To check, 16 - 7 = 9", "18"),
        ("The answer is not 18", None),
        ("The answer is 9 * 2 = 1", None),
        ("<think>\n16 - 7 = 9 eggs. The answer is 18? Let me check", None),
        ("#### Step 18", None),
    ],
)
def test_of_an_answer_that_was_cut_the_last_number_is_none(text, answer):
    assert final_answer(text, ended=False) == answer
    assert is_correct(text, ["#### 18"], ended=False) is (answer == "18")


def test_last_number_and_boxed_alone():
    assert boxed("nothing") is None and boxed(r"\boxed{}") == "" and last_number("nothing") is None
    assert final_answer(r"\boxed{} 5") == "5"  # an empty box is no answer


@pytest.mark.parametrize(
    "text, value",
    [
        ("18", 18), ("-18", -18), ("+18", 18), ("\u221218", -18), ("018", 18), ("18.", 18), ("18.0", 18),
        ("18.50", "37/2"),
        (".5", "1/2"), ("1,234", 1234), ("1,234,567.25", "4938269/4"), ("109,200,000", 109200000), ("1{,}234", 1234),
        ("1,000", 1000), (r"1\,000", 1000), ("1 000", 1000), (r"1,\!000", 1000), (r"1\ 000", 1000), ("1~000", 1000),
        ("1\u202f000", 1000), ("1\u00a0000", 1000), (r"1\text{,}000", 1000), (r"1{\,}000", 1000),
        (r"12\,345\,678", 12345678), (r"\$1\;000.50\text{ each}", "2001/2"), ("-1 000 m", -1000),
        (r"\frac{1{,}000}{3}", "1000/3"), ("1 300/400", "7/4"), ("1.000", 1), ("5cm", 5), ("5cm^2", 5), ("18元", 18),
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
    ["5x", "3ab", "2π", "3x^2", r"\frac{1}{2}x", "18 million", "18 and a half", "3(x+1)", "3 (x+1)",
     "1,00", "1{,}00", r"1\,00", "1 00", "1,0000", "0,500", "1,000,00", "1, 000", "1000 000", r"1,000\,000",
     "", "many", "1,2", "12,34", "1.2.3", "10:30", "1/0", r"\frac{1}{0}", r"\frac{a}{b}", "x^2", "3x = 4y", "--3",
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
        ("1,00", "100", False), (r"1\,00", "100", False), ("1.000", "1000", False), (r"1\,000", "1{,}000", True),
        ("5x", "5", False), ("5x", "5y", False), ("(1{,}000, 2)", "(1000, 2)", True),
        ("x^2+1", "x^{2}+1", True), (r"\sqrt2", r"\sqrt{2}", True), (r"3\sqrt x", r"3\sqrt{x}", True),
        (r"\sqrt[3]2", r"\sqrt[3]{2}", True), (r"\frac\pi2", r"\frac{\pi}{2}", True), ("x_1", "x_{1}", True),
        (r"\frac{x}2", r"\tfrac x2", True), (r"e^\pi", r"e^{\pi}", True), ("x^{-1}", "x^-1", True),
        ("x^10", "x^{10}", True),
        ("x^{2y}", "x^2y", False), ("x^{2+1}", "x^2+1", False), (r"\sqrt{23}", r"\sqrt23", False), ("x^2", "x2", False),
        (r"\sqrt{2}", "2", False), (r"\sqrt{2}", r"\sqrt{3}", False),
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
    for wrong in ("#### 19", "18 minus 1 is 17", r"18, so \boxed{17}", "", "eighteen", "-18", "#### 1.8", "#### 180",
                  "#### 17\n\n### Instruction:\nNext\n\n### Response:\n#### 18", "#### 17\n\nWhat is 9 * 2?\n#### 18",
                  "The answer is 17. (It would be 18 without the loss.)", "#### 18\nWait, no. It is 17.", "#### 18/2",
                  "#### 18 million", "#### 18-20", r"\boxed{18x}", "<think>#### 18</think>"):  # fmt: skip
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
PROGRAM = "import math\nPI = math.pi\n\n@staticmethod\ndef area(r):\n    # circle\n    return PI * r * r * (r > 0)\n"
DRAFT = "def area(r):\n    return r\n"
SQUARE = "def square(r):\n    return r * r * (r > 0)\n"
BY_SQUARE = "def area(r):\n    return PI * square(r)\n"
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
    "a draft before": f"My first try:\n```python\n{DRAFT}```\nThat is wrong. Corrected:\n```python\n{WHOLE}```\n",
    "a draft in the same block": f"```python\n{DRAFT}\nassert area(1) == 0\n\n{WHOLE}```\n",
    "a draft before, not fenced": f"{DRAFT}\nNo, that is wrong:\n\n{WHOLE}",
    "a draft that is not Python": f"```python\ndef area(r) -> the area:\n    ...?\n```\n```python\n{WHOLE}```\n",
    "a draft in a thought": f"<think>\n```python\n{DRAFT}```\nNo.\n</think>\n\n```python\n{WHOLE}```\n",
    "a draft in a thought that the prompt began": f"```python\n{DRAFT}```\nNo.\n</think>\n{WHOLE}",
    "a draft after, in a thought": f"```python\n{WHOLE}```\n<think>\nor\n```python\n{DRAFT}```\n",
    "a draft after, in a next turn": f"```python\n{WHOLE}```<|im_end|>\n<|im_start|>user\n```\n{DRAFT}```\n",
    "a beginning after": f"```python\n{WHOLE}```\nor\n```python\ndef area(r):\n    for x in",
    "a beginning after, not fenced": f"{WHOLE}\ndef area(r):\n    if r",
    "a signature after": f"```python\n{WHOLE}```\nfor\n```python\n{PROMPT}```\n",
    "dots after": f"```python\n{WHOLE}```\nthat is\n```python\ndef area(r):\n    import math\n    ...\n```\n",
    "a demonstration after": f"```python\n{WHOLE}```\n```python\nx = area(undefined)\nprint(x)\n```\n```\nthree\n```\n",
    "a demonstration before": f"```python\n{DRAFT}```\n```python\nx = area(undefined)\n```\n```python\n{WHOLE}```\n",
    "tests after": f"```python\n{WHOLE}```\n```python\nimport unittest\nassert area(1) == 7\nunittest.main()\n```\n",
    "a helper before": f"```python\nPI = 3.14\n```\n```python\n{SQUARE}```\nand\n```python\n{BY_SQUARE}```\n",
    "a helper after": f"```python\n{BY_SQUARE}```\nwith\n```python\nPI = 3.14\n{SQUARE}```\n",
    "a helper in the draft's block": f"```python\nPI = 3.14\n{SQUARE}{DRAFT}```\nNo:\n```python\n{BY_SQUARE}```\n",
    "a helper for a fenced body": f"```python\nPI = 3.14\n{SQUARE}```\n```python\n    return PI * square(r)\n```\n",
    "a fence with a margin": "1. So:\n\n" + textwrap.indent(f"```python\n{WHOLE}```", "   ") + "\n\n2. Done.\n",
    "a fence in a list": "- ```python\n" + textwrap.indent(f"{WHOLE}```", "  ") + "\n",
    "a fence in a quotation": textwrap.indent(f"```python\n{WHOLE}```", "> ", lambda line: True) + "\n",
    "a block with a margin": "```python\n" + textwrap.indent(WHOLE, "    ") + "```\n",
    "a fence of tildes": f"~~~python\n{WHOLE}~~~\n",
    "a fence that ends in the last line": f"```python\n{WHOLE.rstrip()}```\nDone.",
    "the prompt repeated": PROMPT + BODY + "\nprint(area(undefined))",
    "the prompt repeated, fenced": f"```python\n{PROMPT}{BODY}```",
}  # fmt: skip


@pytest.mark.parametrize("case", HUMANEVAL)
def test_humaneval_program(area, case):
    assert area(humaneval_program(PROMPT, "area", HUMANEVAL[case])) == [3.14, 0]


@pytest.mark.parametrize(
    "response",
    ["", "\n", "I cannot do that.", "```python\n```", "```", "    pass\n", f"<think>\n```python\n{WHOLE}```\n",
     f"### Instruction:\nNext\n\n### Response:\n{WHOLE}"],
)  # fmt: skip
def test_humaneval_without_a_body(response):
    program = humaneval_program(PROMPT, "area", response)
    assert program.startswith(PROMPT) and "math.pi" not in program


WRONG = {
    "the last definition": f"```python\n{WHOLE}```\nBetter:\n```python\n{DRAFT}```\n",
    "the last definition, not fenced": f"{WHOLE}\nBetter:\n\n{DRAFT}",
    "right in a thought only": f"<think>\n```python\n{WHOLE}```\n</think>\n```python\n{DRAFT}```\n",
    "right in a next turn only": f"```python\n{DRAFT}```\n\n### Response:\n```python\n{WHOLE}```\n",
    "a continuation, then the right function": f"    return r\n\n\n{WHOLE}",
    "cut in the midst of the only one": "```python\ndef area(r):\n    return r",
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_program_stays_wrong(area, case):
    assert area(humaneval_program(PROMPT, "area", WRONG[case])) == [1, -1]


@pytest.mark.parametrize("mark, between", [("```python\n", "```\nor\n```python\n"), ("", "\n")])
def test_a_definition_in_whose_midst_the_budget_ended_is_not_complete(area, mark, between):
    response = mark + PROGRAM + between + "def area(r):\n    total = r\n    return total"  # complete by its looks
    for values, text, ended in [
        ([3.14, 0], response, False),
        ([1, -1], response, True),
        ([1, -1], response + ("\n```\n" if mark else "\n") + "This is simpler, for it", False),  # cut in the prose
    ]:
        assert area(humaneval_program(PROMPT, "area", text, ended)) == values
        assert area(mbpp_program(text, ended)) == values


def test_a_string_or_bracket_closed_at_the_margin_does_not_end_the_body(area):
    body = '    text = """\n"""\n    table = [\n        3.14,\n]\n    return table[0] if r > 0 else len(text) - 1\n'
    assert area(humaneval_program(PROMPT, "area", body)) == [3.14, 0]


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
    "a draft before": f"```python\n{DRAFT}```\nNo:\n```python\n{PROGRAM}```\nUse:\n```python\narea(undefined)\n```\n",
    "a draft before, not fenced": f"{DRAFT}\nNo:\n\n{PROGRAM}",
    "a draft in a thought": f"<think>\n{PROGRAM}\nNo:\n{DRAFT}</think>\n{PROGRAM}",
    "a helper before": f"```python\nPI = 3.14\n```\n```python\n{SQUARE}```\n```python\n{BY_SQUARE}```\n",
    "a helper after": f"```python\nPI = 3.14\n{BY_SQUARE}```\n```python\n{SQUARE}```\n",
    "a beginning after": f"```python\n{PROGRAM}```\nor\n```python\ndef area(r):\n    for x in",
    "a fence with a margin": textwrap.indent(f"```python\n{PROGRAM}```\n", "   "),
}  # fmt: skip


@pytest.mark.parametrize("case", MBPP)
def test_mbpp_program(area, case):
    assert area(mbpp_program(MBPP[case])) == [3.14, 0]


def test_statements_and_prose():
    code = "x = 1\ny: int = 2\na, b = 1, 2\nd['k'] = [\n    3,\n]\nx += 1\nfor i in []:\n    pass\nelse:\n    pass\n"
    code += "f.g(1)  # no\nimport os, sys\nimport a.b as c\n@f(x)\n"
    assert code_runs(code) == [code]
    for prose in ("This is x.", "The result = 3", "from the list we take", "import it first", "if so, do", "Note: x"):
        assert code_runs(prose + "\n") == [], prose
        assert code_runs("x = 1\n" + prose + "\ny = 2\n") == ["x = 1\n", "y = 2\n"], prose
