r"""Grading of calculations: the final answer of a response, and whether it equals the reference's.

A response ends where the model's turn ends. What follows (the next turn of a chat, the template's next instruction, a
question that the model made up) is ignored, and so is the text in <think>...</think>.

A final answer is sought in four places, in this order: after the first `####`, as in GSM8K's own grader; in the last
`\boxed{...}`, as in MATH's; after "the answer is"; otherwise it is the last number of the text, but not of a response
that was cut at its length limit. Two numbers are compared exactly, as fractions: 1,200.50 = 1\,200.5 = \frac{2401}{2};
other answers are compared as text. Currency, units and the per cent sign are ignored, because GSM8K's own answers omit
them.

>>> [final_answer(text) for text in ("She has 5 - 2 = 3.\n#### 3", r"Thus \boxed{\frac{1}{2}}.", "It is 7.")]
['3', '\\frac{1}{2}', '7']
>>> final_answer("It is 3.\n\nQuestion: How many are 2 and 4?\nIt is 6."), final_answer("5 - 2 = 3, but", ended=False)
('3', None)
>>> number("$1,200.50"), number(r"1\frac{1}{2}"), number("25%"), number("12 apples"), number("many")
(Fraction(2401, 2), Fraction(3, 2), Fraction(25, 1), Fraction(12, 1), None)
>>> answers_equal("0.50", r"\dfrac12"), answers_equal(r"\text{Even}", "even"), answers_equal("3", "4")
(True, True, False)
"""

import re
from fractions import Fraction

TAG = r"(?<![\"'`])<{}(?:think(?:ing)?|thought|reasoning)>(?![\"'`])"  # in quotes it is a string in a program
# Also as written in OpenThoughts and by Magistral
THINK = rf"(?:{TAG.format('')}|<\|begin_of_thought\|>|\[THINK\])"
THOUGHT = rf"(?:{TAG.format('/')}|<\|end_of_thought\|>|\[/THINK\])"
THINKING = re.compile(  # up to its end tag, or the text's end; if the first tag is an end tag, all before it is thought
    rf"(?:{THINK}|\A(?=(?:(?!{THINK}).)*{THOUGHT})).*?(?:{THOUGHT}|\Z)|{THOUGHT}", re.I | re.S
)
OWN_TURN = re.compile(  # a repetition of the mark that the prompt ended with
    r"(?:\s*(?:(?:#{2,3} ?)?(?:Response|Assistant|assistant)[ \t]*(?::|\n)|\[BEGIN\]|\[/INST\]|<s>"
    r"|<\|(?:im_start|start_header_id|end_header_id|assistant|begin_of_solution)\|>))+"
)
NEXT_TURN = re.compile(
    r"(?<![\"'`])(?:<[|｜][^<>|｜\s]{1,40}[|｜]>|</s>|<eos>|<(?:start|end)_of_turn>|\[/?INST\])"  # special tokens
    r"|(?<!#)#{2,3} ?(?:(?:Instruction|Response|Human|User|Assistant)[ \t]*(?::|$)|Input:)"
    r"|^(?:Below is an instruction that|You are an expert Python programmer|\[DONE\]|\[BEGIN\])"
    r"|^(?:Instruction|Human|User|Assistant|USER|ASSISTANT) ?:"
    r"|^(?:user|assistant|system)$",  # was between special tokens, which have been removed
    re.M,
)
NEXT_QUESTION = re.compile(
    r"^[#*> \t]*(?:(?i:(?:Next |New |Another |Follow-up )?(?:Question|Problem|Exercise)\**[ \t]*(?::|$))|Q\** ?:"
    r"|(?:Question|QUESTION|Problem|PROBLEM|Exercise|Example|Q) ?#?\d+\**(?:[ \t]*[:.)]|$))"
    r"|(?<=\s)Question:|^###$|(?<=[\d.!?)}$*])(?:user|assistant)$",
    re.M,
)


def answer_part(response: str, ended: bool = True, to_question: bool = False) -> tuple[str, bool]:
    """The part of a response that answers, and whether it has an end: a next turn, or the response's own (`ended`).
    With `to_question` the answer also ends at the next question; one before any number or box repeats the prompt's."""
    text = THINKING.sub("", response)
    own = OWN_TURN.match(text)
    text = text[own.end() :] if own else text
    ends = [match.start() for match in NEXT_TURN.finditer(text)]
    if to_question:
        answered = re.search(r"\d|\\boxed", text)
        begins = [match.start() for match in NEXT_QUESTION.finditer(text)]
        ends += [begin for begin in begins if answered and begin > answered.start()]
    return text[: min(ends, default=None)], ended or bool(ends)


# Separators of thousands, all of one kind: commas, LaTeX and typographic spaces, blanks; 1 234/567 is a mixed number
COMMA, BLANK = r",(?:\\! ?)?|(?:\\[a-z]+)?\{,\}", r" (?!\d+\s*/)"
SPACE = r"\{?\\[,;:! ]\}?|\\thinspace\s*|[~\u00a0\u2007\u2009\u202f]"
GROUPS = "|".join(rf"(?:(?:{mark})\d{{3}})+" for mark in (COMMA, SPACE, BLANK))
GROUPED = rf"(?<![\d.,])[1-9]\d{{0,2}}(?:{GROUPS})(?!,?\d)"  # 1,234  1{,}234  1\,234  1 234; not 1,23
PLAIN = r"(?:\d+(?:\.\d+)?|\.\d+)"  # 1200.50  12  .5
EXPONENT = r"(?:[eE][+-]?\d{1,3})?"
FRACTION = r"\\[dt]?frac\s*(\{[^{}]*\}|\d)\s*(\{[^{}]*\}|\d)"
# A minus right after a digit, a letter or a bracket is a subtraction: "10-3" ends in 3, "x = -3" in -3
SIGN = r"(?:(?<![\w)\]}.])[-\u2212])?(?:\\?[$€£][-\u2212]?)?"
NUMBER = (
    rf"({SIGN}(?:(?:\d+ ?)?{FRACTION}|\d{{1,3}} \d+/\d+(?![\d/])|(?:{GROUPED}(?:\.\d+)?|{PLAIN}){EXPONENT}(?:/\d+)?))"
)
# A per cent sign, or words: square feet, km/h, m^2. 5x and 3ab are products, 18 million and 5 and a half other numbers.
OTHER_NUMBER = r"(?:hundred|thousand|[mb]illion|trillion|dozen|and|or|to|plus|minus|times|over)\b"
UNIT = (
    rf"(?:\s*[%$€£¢]|(?:\s+(?!{OTHER_NUMBER})(?:[^\W\d_]{{2,}}|[mgslhLCFKW]\b)|(?:[ckmn]m|[km]g|[cm][lL]|hrs?|ft|lbs?|[ap]m)\b"
    r"|[^\W\d_]{4,}|[\u3000-\uffff]+)\.?(?:[ /-]{1,2}[^\W\d_]+){0,3}(?:\s?\^\s?\{?\d\}?)?)?"
)
VALUE = re.compile(  # 3/4  1 3/4  1\frac{3}{4}, or 12  .5  1e3  1.5 \times 10^{3}
    rf"([+-]?)\s*(?:(?:(\d+)(?:\s+|(?=\\)))?(?:{FRACTION}|({PLAIN})\s*/\s*({PLAIN}))"
    rf"|({PLAIN}{EXPONENT})(?:\s*(?:\\times|\\cdot|\*|x|×)\s*10\s*\^\s*\{{?(-?\d{{1,3}})\}}?)?){UNIT}"
)


def number(text: str) -> Fraction | None:
    """The exact value of a text that is one number with or without currency and unit; None for any other text.

    Reads 1,234.50, 1\\,234.50, 1 234.50, .5, 1e3, 1.5 \\times 10^{3}, 3/4, 1 3/4, \\frac{3}{4}, \\frac34, -$5, 25%,
    12 apples, x = 3. Units are dropped, because the answers that are compared have none or the same one; a per cent
    sign does not divide by 100.
    """
    text = without_marks(re.sub(GROUPED, lambda match: re.sub(r"\D", "", match[0]), text))
    text = re.sub(rf"^(?:[\d\s.+\-*/×÷()$]|\\(?:times|cdot|div)\b|{FRACTION})*=\s*", "", text)  # 9 * 2 = 18
    text = re.sub(r"^([+-]?)\s*[$€£]\s*", r"\1", text)
    match = VALUE.fullmatch(text) if len(text) <= 400 else None
    if not match:
        return None
    sign, whole, *fraction, single, power = match.groups()
    if single:
        value = Fraction(single) * Fraction(10) ** int(power or 0)
    else:
        top, bottom = (number(part.strip("{}")) for part in fraction if part is not None)
        if top is None or not bottom:
            return None
        value = int(whole or 0) + top / bottom
    return -value if sign == "-" else value


def without_marks(text: str) -> str:
    """The text without the marks of LaTeX and Markdown that do not change its value."""
    text = re.sub(r"(?:\{,\}|,\\! ?)(?=\d{3}(?!\d))", "", text.strip().replace("\u2212", "-"))
    # not the space after \\, which ends a row of a matrix
    text = re.sub(r"\\(?:left|right|thinspace|displaystyle|q?quad)|(?<!\\)\\[!,;: ()\[\]]|\*\*|~", " ", text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|°", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\(?:text(?:bf|it|rm)?|math(?:bf|rm)|mbox)\s*\{([^{}]*)\}", r" \1", text)
    text = re.sub(r"\\([%$])", r"\1", text)
    text = (text.strip("$") if re.match(r"\$.*\$\Z", text, re.S) else text).strip().rstrip(".").strip()
    text = re.sub(r"^\{([^{]*)\}\Z", r"\1", text).strip()
    # x = 3, f(2) = 3, a_{1} = 3, Total cost = 3, x \in [1, 3]
    name = r"\\?[^\W\d_][\w ]*(?:\{\w+\})?(?:\([\w ]*\))?"
    return re.sub(rf"^{name}\s*(?:=|\\in\b)\s*(?=[^=]*\Z)", "", text)


ANSWER_IS = re.compile(
    r"(?:\b(\w+),? )?(?:that )?(?:the |my |our )?(?:final |correct )?\banswer(?: to [\w' ]{1,40}?)?\**"
    r"(?: (?:is|was|will be|would be|should be|must be|equals)\b| ?[:=])[:\s*]*"
    r"(?:(?:therefore|thus|then|simply|exactly|about|approximately|equal to)\b[:,\s*]*)?",
    re.I,
)
NOT_SAID = {"if", "whether", "unless", "think", "thought", "say", "says", "said", "suppose", "assume", "guess"}
# A number at the beginning, unless it is only the first part of another number or of a calculation
LEADING = re.compile(
    rf"[\s*]*(?:\\[(\[]\s*|\$\$\s*|\$(?=\\\$))?{NUMBER}"
    rf"(?![\w^?(]|[.,:]\d|\s*(?:[-+/=^×÷<>]|\*(?!\*)|\\(?!text|[)\]%,;! ]))|\s+{OTHER_NUMBER})"
)
# A formula there, between its marks: $2\sqrt{3}$, \(x^2\); not $16 \times $2, and no calculation
FORMULA = re.compile(
    r"[\s*]*(?:\${1,2}|\\[(\[])\s*(?=[^$\n]*[\\^])((?:(?!\\(?:[)\]]|approx|sim))[^$\n=])+?)\s*(?:\$+|\\[)\]])(?!\d)"
)
# Words after that number in a line `#### 12, since 3 * 4 = 12`; not in a list, `#### 1, -2`, or a term, `#### 2 x`
PROSE = re.compile(r"(?<![\\\w])(?!and\b)(?:[^\W\d_]{3,}|[\u3040-\u9fff]|(?:as|so|is|it|in|of|if)\b)|^\W*$", re.I)
REMARK = re.compile(r"(?:\s\(|\((?=[^\W\d_]{3}))[^()]*\)[\s.]*$")  # 12 (twelve)
TAKEN_BACK = re.compile(r"\W*(?:(?:but|oh|hmm)\W+)?(?:no[,.!:]|(?:wait|sorry|oops|actually|correction)\b)", re.I)


def final_answer(text: str, ended: bool = True) -> str | None:
    """The final answer of a response or a reference, as written; None if there is none. The first `#### x` counts whose
    x is a number and is not taken back; in the last line x may be anything, but elsewhere that is a heading.
    ended: False for a response that was cut at its length limit; its last number is not an answer."""
    text, ended = answer_part(text, ended, to_question=True)
    for match in re.finditer(r"####[ \t]*([^#\n]*[^#\s])", text):
        answer = ANSWER_IS.sub("", match[1])
        short = REMARK.sub("", answer)
        if number(short) is not None and not TAKEN_BACK.match(text, match.end()):
            return short
        if ended and answer and not boxed(answer) and not text[match.end() :].strip():
            leading = LEADING.match(answer)
            return leading[1] if leading and PROSE.search(answer[leading.end() :]) else answer
    numbers = [match[0] for match in re.finditer(NUMBER, text)] if ended else []
    return boxed(text) or said(text) or (numbers[-1] if numbers else None)


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} with balanced braces, or \fbox{...}; None without one."""
    boxes = {match.end() for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)}
    opened: list[int] = []  # one pass with a stack: a model that got stuck writes \boxed{\boxed{\boxed{...
    closed: list[tuple[int, int]] = []
    for brace in re.finditer(r"(?<!\\)[{}]", text):  # \{ and \} are signs, not groups
        if brace[0] == "{":
            opened.append(brace.end())
        elif opened and (start := opened.pop()) in boxes:
            closed.append((start, brace.start()))
    if not closed and (bare := re.findall(r"\\boxed\s+([^\s${][^$\n]*)", text)):  # MATH also has `$\boxed 2$`
        return bare[-1].strip()
    return text[slice(*max(closed))].strip() if closed else None


def said(text: str) -> str | None:
    """The number or formula after the last "the answer is" with one; None without one."""
    for match in reversed(list(ANSWER_IS.finditer(text))):
        leading = LEADING.match(text, match.end()) or FORMULA.match(text, match.end())
        if leading and (match[1] or "").lower() not in NOT_SAID:
            return leading[1]
    return None


def answers_equal(answer: str, reference: str) -> bool:
    """Equal as numbers if either is one, else as texts, ignoring case, white space, LaTeX's marks and spare braces."""
    value, wanted = number(answer), number(reference)
    if value is not None or wanted is not None:
        return value == wanted

    def normalise(text: str) -> str:
        unit = r"(?:\s*\\(?:text|mbox)\s*\{\s|\s*(?:\\[,;: ]|~|\\q?quad)\s*\\(?:text|mbox|mathrm)\s*\{)[^{}]*\}"
        text = re.sub(rf"(?<=\S){unit}(?:\s*\^\s*\{{?\d\}}?)?\s*\Z", "", text)
        token = r"(\\(?!frac|sqrt|text|math)[A-Za-z]+|[^\W_])"  # what TeX reads as an argument without braces
        text = re.sub(rf"([_^])\s*(?:(-?\d+)|{token})", r"\1{\2\3}", without_marks(text))
        text = re.sub(rf"(\\sqrt(?:\[\w+\])?|\\frac)\s*{token}", r"\1{\2}", text)
        text = re.sub(rf"(\\frac\{{[^{{}}]*\}})\s*{token}", r"\1{\2}", text)
        text = re.sub(r"\s+", "", text).casefold()
        return re.sub(r"\A\(([a-z])\)\Z", r"\1", text)  # the choice (A)

    return normalise(answer) == normalise(reference)


def is_correct(response: str, references: list[str], ended: bool = True) -> bool:
    """Whether the response's final answer equals that of any reference. Raises ValueError for one without an answer."""
    if not all(map(str.strip, references)):
        raise ValueError("a reference has no final answer")
    # a reference may consist of its answer alone: x^2+1
    wanted = [text for reference in references for text in (final_answer(reference), reference.strip()) if text]
    answer = final_answer(response, ended)
    return answer is not None and any(answers_equal(answer, reference) for reference in wanted)


def grade(response: str, references: list[str], ended: bool = True) -> dict:
    """What was read as the response's answer, and whether it is correct."""
    passed = is_correct(response, references, ended)
    return {"answer": final_answer(response, ended), "passed": passed, "ended": ended}
