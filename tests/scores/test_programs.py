"""The program in a response, on cases made by hand."""

import doctest
import runpy
import textwrap

import pytest

from scores import programs
from scores.programs import code_runs, humaneval_program, mbpp_program

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
    "a long string follows": BODY + '\n"""\nOutput: 3\n"""\n\narea(undefined)\n',
    "a long string that was cut follows": BODY + '\n"""\nOutput: 3\nIt',
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
    "fenced body, twice indented": "```python\n" + textwrap.indent(BODY, "    ") + "```",
    "two fenced bodies": f"```python\ntotal = r\nreturn total\n```\nNo:\n```python\n{BODY}```",
    "fenced body, unindented": "```python\nif r < 0:\n    return 0\nreturn math.pi * helper(r) ** 2\n```",
    "fenced, CRLF": f"```python\n{WHOLE}```".replace("\n", "\r\n"),
    "plain function": WHOLE,
    "plain function, a fence with a margin": f"{WHOLE}\n  ```python\n  print(area(undefined))\n",
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
    "decorated dots after": f"```python\n{WHOLE}```\nthat is\n```python\n@cache\ndef area(r):\n    ...\n```\n",
    "a demonstration after": f"```python\n{WHOLE}```\n```python\nx = area(undefined)\nprint(x)\n```\n```\nthree\n```\n",
    "a demonstration before": f"```python\n{DRAFT}```\n```python\nx = area(undefined)\n```\n```python\n{WHOLE}```\n",
    "an import after": f"```python\n{WHOLE}```\nTo plot it:\n```python\nimport a_library_of_nobody\n```\n",
    "tests after": f"```python\n{WHOLE}```\n```python\nimport unittest\nassert area(1) == 7\nunittest.main()\n```\n",
    "another library after": f"```python\n{WHOLE}```\nor\n```python\nimport a_library_of_nobody as a\n\n"
    "def area_by_it(r):\n    return a.area(r)\n```\n",
    "tests of a module after": f"```python\n{WHOLE}```\nTests:\n```python\nfrom your_module import area\n\n"
    "def test_area():\n    assert area(1) == 7\n```\n",
    "input in the same block": f"```python\n{WHOLE}\nr = float(undefined)\nresult = area(r)\nprint(result)\n```",
    "a helper before": f"```python\nPI = 3.14\n```\n```python\n{SQUARE}```\nand\n```python\n{BY_SQUARE}```\n",
    "a helper after": f"```python\n{BY_SQUARE}```\nwith\n```python\nPI = 3.14\n{SQUARE}```\n",
    "a helper in the draft's block": f"```python\nPI = 3.14\n{SQUARE}{DRAFT}```\nNo:\n```python\n{BY_SQUARE}```\n",
    "a helper for a fenced body": f"```python\nPI = 3.14\n{SQUARE}```\n```python\n    return PI * square(r)\n```\n",
    "a fence with a margin": "1. So:\n\n" + textwrap.indent(f"```python\n{WHOLE}```", "   ") + "\n\n2. Done.\n",
    "a fence in a list": "- ```python\n" + textwrap.indent(f"{WHOLE}```", "  ") + "\n",
    "a fence in a numbered list": "1. ```python\n" + textwrap.indent(f"{WHOLE}```", "   ") + "\n",
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
        ([1, -1], mark + DRAFT.rstrip(), False),  # there is no other
    ]:
        assert area(humaneval_program(PROMPT, "area", text, ended)) == values
        assert area(mbpp_program(text, ended)) == values


def test_what_may_fail_is_only_tried_and_the_rest_stays_as_it_is():
    program = f"```python\nimport math, nothing\n{SQUARE}PI = 3\nTABLE = [square(1)]\nx = 1; y = square(1)\n```"
    assert mbpp_program(program) == (
        f"try:\n    import math, nothing\nexcept BaseException:\n    pass\n{SQUARE}PI = 3\n"
        "try:\n    TABLE = [square(1)]\nexcept BaseException:\n    pass\n"
        "try:\n    x = 1; y = square(1)\nexcept BaseException:\n    pass\n"
    )


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
    "long strings around": f'"""\nWrite a function.\n"""\n{PROGRAM}\n"""\nIt takes O(1).\n"""\nDone.',
    "a docstring at the margin": PROGRAM.replace("    # circle", '    """A circle.\n\nArgs:\n r: radius\n"""'),
    "quotation marks in prose": "Use ''' or \"\"\":\n\n" + PROGRAM.replace("# circle", '"""Circle."""'),
    "an exit": PROGRAM + "\nimport sys\nsys.exit(0)\n",
    "CRLF": PROGRAM.replace("\n", "\r\n"),
    "fence ends only": PROGRAM + "```",
    "a draft before": f"```python\n{DRAFT}```\nNo:\n```python\n{PROGRAM}```\nUse:\n```python\narea(undefined)\n```\n",
    "a draft before, not fenced": f"{DRAFT}\nNo:\n\n{PROGRAM}",
    "not fenced, a fenced use after": f"{PROGRAM}\nUse it so:\n\n```python\nx = area(undefined)\n```\n",
    "a draft in a thought": f"<think>\n{PROGRAM}\nNo:\n{DRAFT}</think>\n{PROGRAM}",
    "a helper before": f"```python\nPI = 3.14\n```\n```python\n{SQUARE}```\n```python\n{BY_SQUARE}```\n",
    "a helper after": f"```python\nPI = 3.14\n{BY_SQUARE}```\n```python\n{SQUARE}```\n",
    "a beginning after": f"```python\n{PROGRAM}```\nor\n```python\ndef area(r):\n    for x in",
    "a fence with a margin": textwrap.indent(f"```python\n{PROGRAM}```\n", "   "),
    "a table filled before": "```python\nTABLE = []\ndef fill():\n    TABLE.append(3.14)\nfill()\n"
    "def area(r):\n    return TABLE[0] * (r > 0)\nfill(undefined)\n```",
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


def test_the_docstring_example_runs():
    result = doctest.testmod(programs)
    assert result.attempted == 2 and result.failed == 0
