r"""Graders of generated text: the final answer of a calculation, and the code in a response.

    response -> final_answer -> number -> equal to the reference's?         mathematics: accuracy
    response -> HumanEval or MBPP extraction -> a program, run with tests    code: pass@1 (sandbox.py runs it)

A final answer is looked for in three places, in this order: after GSM8K's `####`, in the last `\boxed{...}`, and else
the last number of the text. Two answers that are numbers are compared exactly, as fractions: 1,200.50 = \frac{2401}{2};
what is no number is compared as text. Currency, units and the per cent sign are ignored, as GSM8K's own answers omit
them. Nothing here runs or parses the code of a response.

>>> [final_answer(text) for text in ("She has 5 - 2 = 3.\n#### 3", r"Thus \boxed{\frac{1}{2}}.", "It is 7.")]
['3', '\\frac{1}{2}', '7']
>>> number("$1,200.50"), number(r"1\frac{1}{2}"), number("25%"), number("12 apples"), number("many")
(Fraction(2401, 2), Fraction(3, 2), Fraction(25, 1), Fraction(12, 1), None)
>>> answers_equal("0.50", r"\dfrac12"), answers_equal(r"\text{Even}", "even"), answers_equal("3", "4")
(True, True, False)
>>> humaneval_program("def one():\n    '''1'''\n", "one", "    return 1\n\nprint(one())")
"def one():\n    '''1'''\n    return 1\n"
>>> mbpp_program("Sure:\n```python\nx = 1\n```\nDone.")
'x = 1\n'
"""

import re
from fractions import Fraction

# ---------------------------------------------------------------------------------------------------------------------
# Mathematics

PLAIN = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"  # 1,200.50  12  .5
SCIENTIFIC = rf"(?:{PLAIN})(?:[eE][+-]?\d{{1,3}})?"
UNIT = r"\s*(?:%|[^\W\d_]+\.?(?:[ /-]{1,2}[^\W\d_]+){0,3}(?:\s?\^\s?\d)?)?"  # %, or words: square feet, km/h, m^2
FRACTION = r"\\frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))"


def final_answer(text: str) -> str | None:
    """The answer that a response or a reference ends with, as written; None if there is none.

    The last line `#### x` counts if x is a number, or if it is the last line of the text: elsewhere it is a heading.
    """
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    for line in reversed(lines):
        mark, answer = line.rpartition("####")[1:]
        if mark and answer.strip() and (number(answer) is not None or line == lines[-1]):
            return answer.strip()
    return boxed(text) or last_number(text)


def boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...} with balanced braces, or in \fbox{...}; None without one."""
    boxes = {match.end() for match in re.finditer(r"\\f?boxed\s*\{", text)}
    opened: list[int] = []  # one pass with a stack: a model that got stuck writes \boxed{\boxed{\boxed{...
    last: tuple[int, int] | None = None
    for brace in re.finditer(r"(?<!\\)[{}]", text):  # \{ and \} are signs, not groups
        if brace[0] == "{":
            opened.append(brace.end())
        elif opened:
            start = opened.pop()
            if start in boxes and (last is None or start > last[0]):
                last = start, brace.start()
    return text[last[0] : last[1]].strip() if last else None


def last_number(text: str) -> str | None:
    """The last number, with its sign and its denominator if it has them; None if there is none.

    A minus right behind a digit, a letter or a bracket is a subtraction: "10-3" ends in 3, "x = -3" in -3.
    """
    sign = r"(?:(?<![\w)\]}.])[-\u2212])?(?:\\?[$€£][-\u2212]?)?"
    found = list(re.finditer(rf"{sign}(?:{FRACTION}|(?:{SCIENTIFIC})(?:/\d+)?)", text))
    return found[-1].group() if found else None


def number(text: str) -> Fraction | None:
    """The value of a text that is one number with or without currency and unit, exactly; None for any other text.

    Reads 1,234.50, .5, 1e3, 1.5 \\times 10^{3}, 3/4, 1 3/4, \\frac{3}{4}, \\frac34, -$5, 25%, 12 apples, x = 3. A unit
    may be stripped, for the answers to be compared have none or the same; a per cent sign does not divide by 100.
    """
    text = _plain(text)
    text = re.sub(r"^[^\W\d_]\w?\s*=\s*", "", text)  # x = 3
    match = re.fullmatch(r"([+-]?)\s*[$€£]?\s*([+-]?)\s*(.*)", text, re.S)
    signs, text = match[1] + match[2], match[3]
    if len(text) > 400 or len(signs) > 1:
        return None
    sign = -1 if signs == "-" else 1
    power = re.fullmatch(rf"({PLAIN})\s*(?:\\times|\\cdot|\*|x|×)\s*10\s*\^\s*\{{?(-?\d{{1,3}})\}}?{UNIT}", text)
    if power:
        return sign * _decimal(power[1]) * Fraction(10) ** int(power[2])
    fraction = re.fullmatch(rf"(\d+)?\s*{FRACTION}{UNIT}", text)
    if fraction:
        whole, top, bottom = fraction[1] or "0", fraction[2] or fraction[3], fraction[4] or fraction[5]
        top, bottom = number(top), number(bottom)
        return sign * (int(whole) + top / bottom) if top is not None and bottom else None
    ratio = re.fullmatch(rf"(?:(\d+)\s+)?({PLAIN})\s*/\s*({PLAIN}){UNIT}", text)
    if ratio:
        bottom = _decimal(ratio[3])
        return sign * (int(ratio[1] or 0) + _decimal(ratio[2]) / bottom) if bottom else None
    single = re.fullmatch(rf"({SCIENTIFIC}){UNIT}", text)
    return sign * _decimal(single[1]) if single else None


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def _plain(text: str) -> str:
    """Without the marks of LaTeX and Markdown that carry no value."""
    text = text.strip().replace("\u2212", "-").replace("−", "-")
    text = re.sub(r"\\left|\\right|\\[!,;: ]|\\[()\[\]]|\*\*|~", " ", text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|°", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r" \1", text)
    text = text.replace("\\%", "%").replace("\\$", "$").replace("{,}", ",")
    if len(text) > 1 and text.startswith("$") and text.endswith("$"):
        text = text.strip("$")
    text = text.strip().rstrip(".").strip()
    while text.startswith("{") and text.endswith("}") and text.count("{") == 1:
        text = text[1:-1].strip()
    return text


def answers_equal(answer: str, reference: str) -> bool:
    """Equal as numbers if either is one, else as texts but for case, white space and LaTeX's marks."""
    value, wanted = number(answer), number(reference)
    if value is not None or wanted is not None:
        return value == wanted

    def normalise(text: str) -> str:
        return re.sub(r"\s+", "", _plain(text)).casefold()

    return normalise(answer) == normalise(reference)


def is_correct(response: str, references: list[str]) -> bool:
    """Whether the response's final answer equals that of any reference. Raises ValueError for one without an answer."""
    wanted = [final_answer(reference) or reference.strip() for reference in references]
    if not all(wanted):
        raise ValueError("a reference has no final answer")
    answer = final_answer(response)
    return answer is not None and any(answers_equal(answer, reference) for reference in wanted)


# ---------------------------------------------------------------------------------------------------------------------
# Code

FENCE = re.compile(r"^[ \t]*```[ \t]*[\w+.-]*[ \t]*\r?\n(.*?)(?:^[ \t]*```|\Z)", re.M | re.S)
# A line that is not indented and does not only close a bracket or a string ends the function before it
END_OF_BODY = re.compile(r"^(?=[^\s)\]}'\"])", re.M)
# Where a program ends and its demonstration, its tests, or the next task begin
END_OF_PROGRAM = re.compile(
    r"^(?:print\b|if\s+__name__\b|assert\b|\[DONE\]|\[BEGIN\]|```|>>>|### (?:Instruction|Input|Response)"
    r"|You are an expert)",
    re.M,
)
NAME = r"[A-Za-z_]\w*"
STATEMENT = re.compile(  # a line of code at the left margin, by its looks; prose like "For example, this:" may pass
    rf"(?:(?:async )?def {NAME}\s*\(.*"
    rf"|class {NAME}\s*[:(].*|@{NAME}.*|#.*|[)\]}}'\"].*"
    rf"|import {NAME}(?:\.{NAME})*(?:,.*| as .*|\s*(?:#.*)?)|from [\w.]+ import .*"
    r"|(?:for|while|if|elif|else|try|except|finally|with)\b.*:\s*(?:#.*)?"
    rf"|{NAME}(?:\.{NAME})*(?:\[.*\])?(?:\s*,\s*{NAME})*(?:\s*:\s*[\w\[\], .]+)?\s*(?:[-+*/%|&]|//|\*\*)?=(?!=).*"
    rf"|{NAME}(?:\.{NAME})*\(.*\)\s*(?:#.*)?)$"
)


def fenced(response: str, wanted: str = "") -> str | None:
    """The first fenced block that contains `wanted`, else the first of all; it may lack its end. None without one."""
    marks = re.findall(r"^[ \t]*```.*$", response, re.M)
    if len(marks) == 1 and marks[0].strip() == "```":
        before, _, after = response.partition("```")
        if before.strip() and (wanted in before or wanted not in after):
            return None  # the end of a fence that the prompt had opened
    blocks = FENCE.findall(response)
    return next((block for block in blocks if wanted in block), blocks[0] if blocks else None)


def humaneval_program(prompt: str, entry_point: str, response: str) -> str:
    """The program that a response to a HumanEval prompt makes: prompt and continuation, or a whole function.

    A continuation ends at the first line that is not indented (as with the stop words of Chen et al., arXiv 2107.03374:
    class, def, #, if, print). A whole function, fenced or not, follows the prompt, which brings imports and helpers and
    whose own function, docstring only, it replaces.
    """
    define = f"def {entry_point}"
    block = fenced(response, define)
    code = (response if block is None else block).replace("\r\n", "\n")
    if prompt.strip() in code:  # repeated word for word
        code, block = code.partition(prompt.strip())[2].lstrip("\n"), None
    start = re.search(rf"^{define}\b", code, re.M)
    if start:  # a whole function; what stands above it belongs to it in a block, and in plain text if it is code
        if block is not None:
            return prompt + "\n" + _cut(code, END_OF_PROGRAM, start.end())
        above = program_lines(code[: start.start()])
        return prompt + "\n" + above + _cut(code[start.start() :], END_OF_BODY, len(define))
    if block is None and (fence := re.search(r"^\s*```", code, re.M)):
        code = code[: fence.start()]
    return prompt + _cut(_indented(code), END_OF_BODY, 0)


def _indented(body: str) -> str:
    """A function's body four columns from the margin, where a response left out that indentation.

    Of the first line alone (decoding a SentencePiece text drops its first space, stripping a text all of them), or of
    all lines. After a line that opens a block, the next one tells which.
    """
    lines = [line for line in body.split("\n") if line.strip()]
    if not lines:
        return body
    margins = [len(line) - len(line.lstrip(" ")) for line in lines]
    if margins[0] >= 4 or lines[0].startswith("\t"):
        return body
    least = 5 if lines[0].rstrip().endswith(":") else 4  # of the second line, if the first belongs at 4
    if margins[0] == 0 and (len(lines) == 1 or margins[1] < least):
        return "".join("    " + line + "\n" for line in _cut(body, END_OF_PROGRAM, 0).split("\n"))
    return "    " + body.lstrip()


def mbpp_program(response: str) -> str:
    """The program in a response to an MBPP prompt: a fenced block, else the code from its first line to its end."""
    block = fenced(response, "def ")
    if block is not None:
        return _cut(block.replace("\r\n", "\n"), END_OF_PROGRAM, 0)
    code = _cut(response.replace("\r\n", "\n"), END_OF_PROGRAM, 0)
    return program_lines(code)


def program_lines(text: str) -> str:
    """From the first line that looks like a statement to the last before prose goes on; "" if there is none."""
    lines = text.split("\n")
    first = next((i for i, line in enumerate(lines) if STATEMENT.match(line)), len(lines))
    last = first
    while last < len(lines) and (not lines[last] or lines[last][0].isspace() or STATEMENT.match(lines[last])):
        last += 1
    kept = "\n".join(lines[first:last]).rstrip()
    return kept + "\n" if kept else ""


def _cut(code: str, end: re.Pattern, start: int) -> str:
    """`code` up to the first match of `end` at or after `start`."""
    found = end.search(code, start)
    kept = (code[: found.start()] if found else code).rstrip()
    return kept + "\n" if kept else ""
