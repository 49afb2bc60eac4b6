r"""Graders of generated text: the final answer of a calculation, and the program in a response.

    response -> answer_part -> final_answer -> number -> equal to the reference's?          mathematics: accuracy
    response -> answer_part -> HumanEval or MBPP extraction -> a program, run with tests    code: pass@1 (sandbox.py)

A response ends where the model's turn ends. What follows (the next turn of a chat, the template's next instruction, a
question that the model made up) is not looked at, and neither is what stands in <think>...</think>.

A final answer is looked for in four places, in this order: after the first `####`, as GSM8K's own grader does; in the
last `\boxed{...}`, as MATH's does; after "the answer is"; and else the last number of the text, but not of a response
that was cut at its budget. Two answers that are numbers are compared exactly, as fractions: 1,200.50 = 1\,200.5 =
\frac{2401}{2}; what is no number is compared as text. Currency, units and the per cent sign are ignored, as GSM8K's own
answers omit them.

A program is made of all the code blocks of a response that are Python, in their order: the last complete definition of
a function wins, and its helpers stay with it. Nothing here runs the code of a response.

>>> [final_answer(text) for text in ("She has 5 - 2 = 3.\n#### 3", r"Thus \boxed{\frac{1}{2}}.", "It is 7.")]
['3', '\\frac{1}{2}', '7']
>>> final_answer("It is 3.\n\nQuestion: How many are 2 and 4?\nIt is 6."), final_answer("5 - 2 = 3, but", ended=False)
('3', None)
>>> number("$1,200.50"), number(r"1\frac{1}{2}"), number("25%"), number("12 apples"), number("many")
(Fraction(2401, 2), Fraction(3, 2), Fraction(25, 1), Fraction(12, 1), None)
>>> answers_equal("0.50", r"\dfrac12"), answers_equal(r"\text{Even}", "even"), answers_equal("3", "4")
(True, True, False)
>>> humaneval_program("def one():\n    '''1'''\n", "one", "    return 1\n\nprint(one())")
"def one():\n    '''1'''\n    return 1\n"
>>> mbpp_program("Sure:\n```python\nx = 1\n```\nDone.")
'x = 1\n'
"""

import ast
import re
import textwrap
import warnings
from fractions import Fraction

# ---------------------------------------------------------------------------------------------------------------------
# Where a response ends

# A tag; in quotes it would be a string of a program
THINK = re.compile(r"(?<![\"'`])(</?(?:think(?:ing)?|thought|reasoning)>)(?![\"'`])", re.I)
OWN_TURN = re.compile(  # the mark that the prompt ended with, once more
    r"(?:\s*(?:(?:#{2,3} ?)?(?:Response|Assistant|assistant)[ \t]*(?::|\n)|\[BEGIN\]|\[/INST\]|<s>"
    r"|<\|(?:im_start|start_header_id|end_header_id|assistant)\|>))+"
)
NEXT_TURN = re.compile(
    r"(?<![\"'`])(?:<[|｜][^<>|｜\s]{1,40}[|｜]>|</s>|<eos>|<(?:start|end)_of_turn>|\[/?INST\])"  # special tokens
    r"|(?<!#)#{2,3} ?(?:(?:Instruction|Response|Human|User|Assistant)[ \t]*(?::|$)|Input:)"
    r"|^(?:Below is an instruction that|You are an expert Python programmer|\[DONE\]|\[BEGIN\])"
    r"|^(?:Instruction|Human|User|Assistant|USER|ASSISTANT) ?:"
    r"|^(?:user|assistant|system)$",  # between special tokens, which were dropped
    re.M,
)
NEXT_QUESTION = re.compile(
    r"^[#*> \t]*(?:(?:Next |New )?(?:Question|Problem|Exercise)(?: ?#?\d+)?\**[ \t]*(?::|$)|Q(?: ?\d+)?\** ?:)"
    r"|(?<=\s)Question:|^###$|(?<=[\d.!?)}$*])(?:user|assistant)$",
    re.M,
)


def answer_part(response: str, ended: bool = True, to_question: bool = False) -> tuple[str, bool]:
    """The part of a response that answers, and whether that has an end: a next turn, or the response's own (`ended`).

    An answer `to_question` ends at a next question too; one with which it begins is the prompt's, said again.
    """
    kept: list[str] = []
    thinking = False
    for i, piece in enumerate(THINK.split(response)):  # text, tag, text, tag, ..., text
        if i % 2:
            thinking = piece[1] != "/"
            if i == 1 and not thinking:
                kept.clear()  # the prompt had begun the thought
        elif not thinking:
            kept.append(piece)
    text = "".join(kept)
    own = OWN_TURN.match(text)
    text = text[own.end() :] if own else text
    ends = [match.start() for match in NEXT_TURN.finditer(text)]
    if to_question:
        begin = len(text) - len(text.lstrip())
        ends += [match.start() for match in NEXT_QUESTION.finditer(text) if match.start() > begin]
    return text[: min(ends, default=None)], ended or bool(ends)


# ---------------------------------------------------------------------------------------------------------------------
# Mathematics

SPACE = r"\{?\\[,;:! ]\}?|\\thinspace\s*|~|[\u00a0\u2007\u2009\u202f]"  # LaTeX's and typography's, between thousands
COMMA = r",\\!|,|(?:\\[a-z]+)?\{,\}"
BLANK = r" (?=\d{3}(?!\s*/))"  # 1 234/567 is a mixed number
GROUPS = "|".join(rf"(?:(?:{mark})\d{{3}})+" for mark in (COMMA, SPACE, BLANK))
GROUPED = rf"(?<![\d.,])[1-9]\d{{0,2}}(?:{GROUPS})(?!,?\d)"  # 1,234  1{,}234  1\,234  1 234; not 1,23
PLAIN = r"\d+(?:\.\d+)?|\.\d+"  # 1200.50  12  .5
EXPONENT = r"(?:[eE][+-]?\d{1,3})?"
FRACTION = r"\\[dt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))"
# A minus right behind a digit, a letter or a bracket is a subtraction: "10-3" ends in 3, "x = -3" in -3
SIGN = r"(?:(?<![\w)\]}.])[-\u2212])?(?:\\?[$€£][-\u2212]?)?"
NUMBER = rf"({SIGN}(?:{FRACTION}|(?:(?:{GROUPED}|\d+)(?:\.\d+)?|\.\d+){EXPONENT}(?:/\d+)?))"
# A per cent sign, or words: square feet, km/h, m^2. 5x and 3ab are products, 18 million and 5 and a half other numbers.
OTHER_NUMBER = r"(?:hundred|thousand|[mb]illion|trillion|dozen|and|or|to|plus|minus|times|over)\b"
UNIT = (
    rf"(?:\s*%|(?:\s+(?!{OTHER_NUMBER})(?:[^\W\d_]{{2,}}|[mgslhLCFKW]\b)|(?:[ckmn]m|[km]g|[cm][lL]|hrs?|ft|lbs?|[ap]m)\b"
    r"|[^\W\d_]{4,}|[\u3000-\uffff]+)\.?(?:[ /-]{1,2}[^\W\d_]+){0,3}(?:\s?\^\s?\{?\d\}?)?)?"
)
ANSWER_IS = re.compile(
    r"(?:\b(\w+),? )?(?:that )?(?:the |my |our )?(?:final |correct )?\banswer(?: to [\w' ]{1,40}?)?\**"
    r"(?: (?:is|was|would be|should be|must be)\b| ?[:=])[:\s*]*",
    re.I,
)
NOT_SAID = {"if", "whether", "unless", "think", "thought", "say", "says", "said", "suppose", "assume", "guess"}
# A number at the beginning, unless it is only the beginning of another number or of a calculation
LEADING = re.compile(
    rf"[\s*]*(?:\\[(\[]\s*)?{NUMBER}"
    rf"(?![\w^?(]|[.,:]\d|\s*(?:[-+/=^×÷<>]|\*(?!\*)|\\(?!text|[)\]%,;! ]))|\s+{OTHER_NUMBER})"
)
REMARK = re.compile(r"(?:\s\(|\((?=[^\W\d_]{3}))[^()]*\)[\s.]*$")  # 12 (twelve)
TAKEN_BACK = re.compile(r"\W*(?:(?:but|oh|hmm)\W+)?(?:no[,.!:]|(?:wait|sorry|oops|actually|correction)\b)", re.I)


def final_answer(text: str, ended: bool = True) -> str | None:
    """The answer that a response or a reference ends with, as written; None if there is none.

    The first `#### x` counts whose x is a number and that is not taken back, and in the last line whatever x is:
    elsewhere it is a heading. ended: False for a response that was cut at its budget; its last number says nothing.
    """
    text, ended = answer_part(text, ended, to_question=True)
    for match in re.finditer(r"####[ \t]*([^#\n]*[^#\s])", text):
        answer = ANSWER_IS.sub("", match[1])
        short = REMARK.sub("", answer)
        if number(short) is not None and not TAKEN_BACK.match(text, match.end()):
            return short
        if ended and answer and not text[match.end() :].strip():
            leading = LEADING.match(answer)
            return leading[1] if leading else answer
    return boxed(text) or said(text) or (last_number(text) if ended else None)


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


def said(text: str) -> str | None:
    """The number after the last "the answer is" that a number follows; None without one."""
    for match in reversed(list(ANSWER_IS.finditer(text))):
        leading = LEADING.match(text, match.end())
        if leading and (match[1] or "").lower() not in NOT_SAID:
            return leading[1]
    return None


def last_number(text: str) -> str | None:
    """The last number, with its sign and its denominator if it has them; None if there is none."""
    found = list(re.finditer(NUMBER, text))
    return found[-1].group() if found else None


def number(text: str) -> Fraction | None:
    """The value of a text that is one number with or without currency and unit, exactly; None for any other text.

    Reads 1,234.50, 1\\,234.50, 1 234.50, .5, 1e3, 1.5 \\times 10^{3}, 3/4, 1 3/4, \\frac{3}{4}, \\frac34, -$5, 25%,
    12 apples, x = 3. A unit may be stripped, for the answers to be compared have none or the same; a per cent sign does
    not divide by 100.
    """
    text = _plain(re.sub(GROUPED, lambda match: re.sub(r"\D", "", match[0]), text))
    text = re.sub(r"^[^\W\d_]\w?\s*=\s*", "", text)  # x = 3
    match = re.fullmatch(r"([+-]?)\s*[$€£]?\s*([+-]?)\s*(.*)", text, re.S)
    signs, text = match[1] + match[2], match[3]
    if len(text) > 400 or len(signs) > 1:
        return None
    sign = -1 if signs == "-" else 1
    power = re.fullmatch(rf"({PLAIN})\s*(?:\\times|\\cdot|\*|x|×)\s*10\s*\^\s*\{{?(-?\d{{1,3}})\}}?{UNIT}", text)
    if power:
        return sign * Fraction(power[1]) * Fraction(10) ** int(power[2])
    fraction = re.fullmatch(rf"(\d+)?\s*{FRACTION}{UNIT}", text)
    if fraction:
        whole, top, bottom = fraction[1] or "0", fraction[2] or fraction[3], fraction[4] or fraction[5]
        top, bottom = number(top), number(bottom)
        return sign * (int(whole) + top / bottom) if top is not None and bottom else None
    ratio = re.fullmatch(rf"(?:(\d+)\s+)?({PLAIN})\s*/\s*({PLAIN}){UNIT}", text)
    if ratio:
        bottom = Fraction(ratio[3])
        return sign * (int(ratio[1] or 0) + Fraction(ratio[2]) / bottom) if bottom else None
    single = re.fullmatch(rf"((?:{PLAIN}){EXPONENT}){UNIT}", text)
    return sign * Fraction(single[1]) if single else None


def _plain(text: str) -> str:
    """Without the marks of LaTeX and Markdown that carry no value."""
    text = re.sub(r"(?:\{,\}|,\\!)(?=\d{3}(?!\d))", "", text.strip().replace("\u2212", "-"))
    text = re.sub(r"\\left|\\right|\\thinspace|\\[!,;: ]|\\[()\[\]]|\*\*|~", " ", text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|°", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r" \1", text)
    text = text.replace("\\%", "%").replace("\\$", "$")
    if len(text) > 1 and text.startswith("$") and text.endswith("$"):
        text = text.strip("$")
    text = text.strip().rstrip(".").strip()
    while text.startswith("{") and text.endswith("}") and text.count("{") == 1:
        text = text[1:-1].strip()
    return text


def answers_equal(answer: str, reference: str) -> bool:
    """Equal as numbers if either is one, else as texts but for case, white space, LaTeX's marks and spare braces."""
    value, wanted = number(answer), number(reference)
    if value is not None or wanted is not None:
        return value == wanted

    def normalise(text: str) -> str:
        token = r"(\\(?!frac|sqrt|text|math)[A-Za-z]+|[^\W_])"  # what TeX takes for an argument without braces
        text = re.sub(rf"([_^])\s*(?:(-?\d+)|{token})", r"\1{\2\3}", _plain(text))
        text = re.sub(rf"(\\sqrt(?:\[\w+\])?|\\frac)\s*{token}", r"\1{\2}", text)
        text = re.sub(rf"(\\frac\{{[^{{}}]*\}})\s*{token}", r"\1{\2}", text)
        return re.sub(r"\s+", "", text).casefold()

    return normalise(answer) == normalise(reference)


def is_correct(response: str, references: list[str], ended: bool = True) -> bool:
    """Whether the response's final answer equals that of any reference. Raises ValueError for one without an answer.

    ended: as of `final_answer`.
    """
    wanted = [final_answer(reference) or reference.strip() for reference in references]
    if not all(wanted):
        raise ValueError("a reference has no final answer")
    answer = final_answer(response, ended)
    return answer is not None and any(answers_equal(answer, reference) for reference in wanted)


# ---------------------------------------------------------------------------------------------------------------------
# Code

FENCE = re.compile(  # up to its end, the next fence, or the end of the text; in a list or a quotation it has a margin
    r"^(?P<margin>[ \t>]*(?:(?:[-*+]|\d+[.)])[ \t]+)?)(?P<mark>`{3,}|~{3,})[^`\n]*\n(?P<code>.*?)"
    r"(?:(?P=mark)[ \t]*$|(?=^[ \t>]*(?P=mark))|\Z)",
    re.M | re.S,
)
# A line that is not indented and does not only close a bracket or a string ends the function before it
END_OF_BODY = re.compile(r"^(?=[^\s)\]}'\"])", re.M)
# Where a body without its margin ends and its demonstration begins
END_OF_PROGRAM = re.compile(r"^(?:print\b|if\s+__name__\b|assert\b|```|>>>)", re.M)
NAME = r"[A-Za-z_]\w*"
STATEMENT = re.compile(  # a line of code at the left margin, by its looks; prose like "For example, this:" may pass
    rf"(?:(?:async )?def {NAME}\s*\(.*"
    rf"|class {NAME}\s*[:(].*|@{NAME}.*|#.*|[)\]}}'\"].*"
    rf"|import {NAME}(?:\.{NAME})*(?:,.*| as .*|\s*(?:#.*)?)|from [\w.]+ import .*"
    r"|(?:for|while|if|elif|else|try|except|finally|with)\b.*:\s*(?:#.*)?"
    rf"|{NAME}(?:\.{NAME})*(?:\[.*\])?(?:\s*,\s*{NAME})*(?:\s*:\s*[\w\[\], .]+)?\s*(?:[-+*/%|&]|//|\*\*)?=(?!=).*"
    rf"|{NAME}(?:\.{NAME})*\(.*\)\s*(?:#.*)?)$"
)
DEFINITION = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
SETTING = (ast.Import, ast.ImportFrom, ast.Assign)  # what a block without a definition may bring for a later one
SHOWING = (ast.Expr, ast.If, ast.For, ast.While, ast.With, ast.Try)  # what may be a demonstration, by its names


def code_blocks(text: str) -> list[str]:
    """The fenced blocks of a text, each without its fence's margin; the last may lack its end."""
    return [re.sub(rf"^[ \t>]{{0,{len(m['margin'])}}}", "", m["code"], flags=re.M) for m in FENCE.finditer(text)]


def code_runs(text: str) -> list[str]:
    """The stretches of a text whose lines look like code: statements, and whatever is indented under them."""
    runs: list[list[str]] = [[]]
    for line in text.split("\n"):
        if STATEMENT.match(line) or (runs[-1] and (not line or line[0].isspace())):
            runs[-1].append(line)
        elif runs[-1]:
            runs.append([])
    return ["\n".join(run).rstrip() + "\n" for run in runs if run]


def parsed(code: str) -> ast.Module | None:
    """The program's syntax tree; None if Python does not take it, for one as it is the body of a function."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in strings
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    functions = [node for node in ast.walk(tree) if isinstance(node, DEFINITION)]
    inside = {id(part) for function in functions for part in ast.walk(function)}
    returns = {id(part) for part in ast.walk(tree) if isinstance(part, ast.Return)}
    return tree if returns <= inside else None


def combined(blocks: list[str]) -> tuple[str, set[str]]:
    """One program of all blocks that are Python, in their order and without demonstrations; the names it defines.

    A function without a body (a docstring, `pass` or `...`) gives way to one of its name that has it.
    """
    codes = [textwrap.dedent(block) for block in blocks]
    if codes and not parsed(codes[-1]):  # cut off, perhaps: without its last statement
        codes[-1] = codes[-1][: max((match.start() for match in END_OF_BODY.finditer(codes[-1])), default=0)]
    trees = [(code, tree) for code in codes if (tree := parsed(code))]
    definitions = [node for _, tree in trees for node in tree.body if isinstance(node, DEFINITION)]
    defined = {node.name for node in definitions if not _is_stub(node)}
    kept: list[str] = []
    waiting: list[str] = []
    for code, tree in trees:
        lines: list[str | None] = [*code.rstrip().split("\n")]
        for node in tree.body:
            if (
                isinstance(node, ast.Assert)
                or (isinstance(node, SHOWING) and _uses(node, defined | {"print", "__name__", "unittest", "doctest"}))
                or (isinstance(node, DEFINITION) and _is_stub(node) and node.name in defined)
            ):
                first = min(part.lineno for part in (node, *getattr(node, "decorator_list", ())))
                lines[first - 1 : node.end_lineno] = [None] * (node.end_lineno - first + 1)
        code = "\n".join(line for line in lines if line is not None).rstrip() + "\n"
        if any(node in definitions for node in tree.body):
            kept += [*waiting, code]
            waiting = []
        elif any(isinstance(node, SETTING) for node in tree.body) and not _uses(tree, defined):
            waiting.append(code)
    return "\n".join(kept or waiting), defined


def _uses(node: ast.AST, names: set[str]) -> bool:
    return any(isinstance(part, ast.Name) and part.id in names for part in ast.walk(node))


def _is_stub(node: ast.stmt) -> bool:
    empty = (ast.Pass, ast.Import, ast.ImportFrom)
    return not isinstance(node, ast.ClassDef) and all(
        isinstance(part, empty) or isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)
        for part in node.body
    )


def _code_part(response: str, ended: bool) -> str:
    """`answer_part`, less a last definition in whose midst the budget ended, if an earlier one has the same name."""
    text, ended = answer_part(response, ended)
    names = set()
    for match in re.finditer(rf"^([ \t]*)(?:async )?def ({NAME})", text, re.M) if not ended else ():
        if not re.search(rf"\n[ \t]{{0,{len(match[1])}}}[^\s)\]}}'\"]", text[match.end() :]):  # no line after its body
            return text[: match.start()] if match[2] in names else text
        names.add(match[2])
    return text


def humaneval_program(prompt: str, entry_point: str, response: str, ended: bool = True) -> str:
    """The program that a response to a HumanEval prompt makes: prompt and continuation, or a whole function.

    A continuation ends at the first line that is not indented (as with the stop words of Chen et al., arXiv 2107.03374:
    class, def, #, if, print). A whole function, fenced or not, follows the prompt, which brings imports and helpers and
    whose own function, docstring only, it replaces. ended: False for a response that was cut at its budget.
    """
    text = _code_part(response, ended)
    before = re.split(r"^[ \t]*(?:```|~~~)", text, maxsplit=1, flags=re.M)[0]
    define = rf"(?:async )?def {entry_point}\b"

    def continued(body: str) -> str:
        return prompt + _cut(_indented(body), END_OF_BODY)

    if re.match(rf"\s*(?:(?<=   )|(?<=\t))(?!{define})\S", before):
        return continued(before)
    blocks = code_blocks(text)
    for parts in (blocks, code_runs(text)):
        program, defined = combined(parts)
        if entry_point in defined:
            return prompt + "\n" + program
    parts = [before, *blocks]
    whole = [part for part in parts if re.search(rf"^[ \t]*{define}", part, re.M)]
    if whole:  # Python does not take it, or it has no body
        return prompt + "\n" + whole[-1]
    bodies = [part for part in parts if not parsed(textwrap.dedent(part)) and parsed(continued(part))]
    body = bodies[-1] if bodies else parts[:2][-1]
    helpers = combined([block for block in blocks if block is not body])[0]
    return continued(body) + ("\n" + helpers if helpers else "")


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
        return "".join("    " + line + "\n" for line in _cut(body, END_OF_PROGRAM).split("\n"))
    return "    " + body.lstrip()


def mbpp_program(response: str, ended: bool = True) -> str:
    """The program in a response to an MBPP prompt: its fenced blocks, else what looks like code; "" without any."""
    text = _code_part(response, ended)
    blocks, runs = code_blocks(text), code_runs(text)
    programs = [combined(blocks), combined(runs)]
    found = [program for program, defined in programs if defined] + [program for program, _ in programs if program]
    return (found + [block for block in blocks if "def " in block][-1:] + blocks + runs + [""])[0]


def _cut(code: str, end: re.Pattern) -> str:
    """`code` up to the first match of `end`."""
    found = end.search(code)
    kept = (code[: found.start()] if found else code).rstrip()
    return kept + "\n" if kept else ""
