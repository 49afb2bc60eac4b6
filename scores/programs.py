r"""Extract the program from a response, to be run with its task's tests (in sandbox.py; nothing here runs any code).

A program consists of all code blocks of a response that are Python, in their order: the last complete definition of a
function wins, and its helpers are kept. For HumanEval, the response continues the prompt or has the whole function; for
MBPP, it is a complete program.

>>> humaneval_program("def one():\n    '''1'''\n", "one", "    return 1\n\nprint(one())")
"def one():\n    '''1'''\n    return 1\n"
>>> mbpp_program("Sure:\n```python\nx = 1\n```\nDone.")
'x = 1\n'
"""

import ast
import os
import re
import sys
import textwrap
import warnings
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from scores.answers import answer_part

FENCE = re.compile(  # up to its end, the next fence, or the end of the text; indented in a list or a quotation
    r"^(?P<margin>[ \t>]*(?:(?:[-*+]|\d+[.)])[ \t]+)?)(?P<mark>`{3,}|~{3,})[^`\n]*\n(?P<code>.*?)"
    r"(?:(?P=mark)[ \t]*$|(?=^[ \t>]*(?P=mark))|\Z)",
    re.M | re.S,
)
LONG_STRING = re.compile(  # not quotation marks in prose
    r"(?:^|[=([{,:+]|\breturn\b)[ \t]*[bfruBFRU]{0,2}(\"\"\"|''').*?\1", re.M | re.S
)
# A line without indentation ends the function before it, unless it only closes a bracket
END_OF_BODY = re.compile(r"^(?=[^\s)\]}])", re.M)
# Where a body without indentation ends and its demonstration begins
END_OF_PROGRAM = re.compile(r"^(?:print\b|if\s+__name__\b|assert\b|```|>>>)", re.M)
FUTURE = re.compile(r"^from __future__ import .*$", re.M)
NAME = r"[A-Za-z_]\w*"
STATEMENT = re.compile(  # what looks like code at the left margin; some prose, like "For example, this:", also matches
    rf"(?:(?:async )?def {NAME}\s*\(.*"
    rf"|class {NAME}\s*[:(].*|@{NAME}.*|#.*|[)\]}}'\"].*"
    rf"|import {NAME}(?:\.{NAME})*(?:,.*| as .*|\s*(?:#.*)?)|from [\w.]+ import .*"
    r"|(?:for|while|if|elif|else|try|except|finally|with)\b.*:\s*(?:#.*)?"
    rf"|{NAME}(?:\.{NAME})*(?:\[.*\])?(?:\s*,\s*{NAME})*(?:\s*:\s*[\w\[\], .]+)?\s*(?:[-+*/%|&]|//|\*\*)?=(?!=).*"
    rf"|{NAME}(?:\.{NAME})*\(.*\)\s*(?:#.*)?)$"
)
TRY = "try:\n{}\nexcept BaseException:\n    pass"
DEFINITION = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
SETTING = (ast.Import, ast.ImportFrom, ast.Assign)  # for these, a block without a definition may be needed later
SHOWING = (ast.Expr, ast.If, ast.For, ast.While, ast.With, ast.Try)  # may be demonstrations: their names decide


def run_programs(programs: list[str], tests: list[str], ended: list[bool]) -> list[dict]:
    """The result of each program with its tests, run in the sandbox."""
    from scores.sandbox import run_python  # here, because it needs Unix

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        done = pool.map(run_python, programs, tests)
        done = list(tqdm(done, desc="run tests", total=len(tests), disable=len(tests) < 20, leave=False))
    return [
        {"passed": out.passed, "status": out.status, "reason": out.reason, "program": program, "ended": end}
        for out, program, end in zip(done, programs, ended, strict=True)
    ]


def program_of(response: str, prompt: str, entry_point: str, ended: bool = True) -> str:
    """The program to be tested: HumanEval's, or without an entry point MBPP's; with its imports from __future__, which
    Python accepts only there, at the beginning."""
    program = humaneval_program(prompt, entry_point, response, ended) if entry_point else mbpp_program(response, ended)
    return "".join(f"{line}\n" for line in FUTURE.findall(program)) + FUTURE.sub("", program)


def humaneval_program(prompt: str, entry_point: str, response: str, ended: bool = True) -> str:
    """The program from a response to a HumanEval prompt: the prompt with a continuation, or with a whole function.

    A continuation ends at the first line without indentation (as with the stop words of Chen et al., arXiv 2107.03374:
    class, def, #, if, print). A whole function, fenced or not, is put after the prompt, which has imports and helpers,
    and replaces the prompt's function without a body. ended: False for a response that was cut at its length limit.
    """
    text = complete_part(response, ended)
    before = re.split(r"^[ \t]*(?:```|~~~)", text, maxsplit=1, flags=re.M)[0]
    if re.match(rf"\s*(?:(?<=   )|(?<=\t))(?!(?:async )?def {entry_point}\b)\S", before):
        return continue_prompt(prompt, before)
    blocks = code_blocks(text)
    for parts in (blocks, code_runs(text)):
        program, defined = combine(parts)
        if entry_point in defined:
            return prompt + "\n" + program
    # No part defines it: take the last one that is Python only as a function's body, and blocks that may be helpers
    parts = [before, *blocks]
    bodies = [part for part in parts if not parse(textwrap.dedent(part)) and parse(continue_prompt(prompt, part))]
    body = bodies[-1] if bodies else parts[:2][-1]
    helpers = combine([block for block in blocks if block not in (body, *bodies)])[0]
    return continue_prompt(prompt, body) + ("\n" + helpers if helpers else "")


def mbpp_program(response: str, ended: bool = True) -> str:
    """The program in a response to an MBPP prompt: its fenced blocks, or else what looks like code; "" without any."""
    text = complete_part(response, ended)
    blocks, runs = code_blocks(text), code_runs(text)
    programs = sorted([combine(blocks), combine(runs)], key=lambda program: not program[1])  # first what defines
    return next(filter(None, [*(program for program, _ in programs), *blocks, *runs]), "")


def complete_part(response: str, ended: bool) -> str:
    """`answer_part` without a last definition that was cut off, if an earlier definition has the same name."""
    text, ended = answer_part(response, ended)
    names = set()
    for match in re.finditer(rf"^([ \t]*)(?:async )?def ({NAME})", text, re.M) if not ended else ():
        if not re.search(rf"\n[ \t]{{0,{len(match[1])}}}[^\s)\]}}'\"]", text[match.end() :]):  # no line after its body
            return text[: match.start()] if match[2] in names else text
        names.add(match[2])
    return text


def continue_prompt(prompt: str, body: str) -> str:
    """The prompt with a function's body, which is indented by four columns if the response left out the indentation.

    It may be missing in the first line (decoding a SentencePiece text drops the first space, stripping a text drops all
    of them) or in all lines: whichever gives valid Python.
    """
    all_lines = textwrap.indent(textwrap.dedent(cut(body, END_OF_PROGRAM)), "    ")
    first_line = re.sub(r"\A(?:\s*\n)? {0,3}(?=\S)", "    ", body)
    for text in (body, all_lines, first_line):
        kept = cut(text, END_OF_BODY)
        if kept and parse(prompt + kept):
            break
    return prompt + kept


def cut(code: str, end: re.Pattern) -> str:
    """`code` up to the first match of `end` outside of strings of several lines."""
    found = end.search(without_strings(code))
    kept = (code[: found.start()] if found else code).rstrip()
    return kept + "\n" if kept else ""


def without_strings(code: str) -> str:
    """As long as `code`, but a string in triple quotes is on one line, so that its lines do not look like code."""
    return LONG_STRING.sub(lambda match: match[0].replace("\n", " "), code)


def code_blocks(text: str) -> list[str]:
    """The fenced blocks of a text, each without its fence's indentation; the end of the last may be missing."""
    return [re.sub(rf"^[ \t>]{{0,{len(m['margin'])}}}", "", m["code"], flags=re.M) for m in FENCE.finditer(text)]


def code_runs(text: str) -> list[str]:
    """The parts of a text whose lines look like code: statements, and everything indented under them."""
    runs: list[list[str]] = [[]]
    begin = 0
    for line in without_strings(text).split("\n"):
        begin += len(line) + 1
        if STATEMENT.match(line) or (runs[-1] and re.match(r"$|\s(?!\s*(?:```|~~~))", line)):
            runs[-1].append(text[begin - len(line) - 1 : begin - 1])
        elif runs[-1]:
            runs.append([])
    return ["\n".join(run).rstrip() + "\n" for run in runs if run]


def combine(blocks: list[str]) -> tuple[str, set[str]]:
    """One program from all blocks that are Python, in their order and without demonstrations; and the names it defines.

    An import of a library that the sandbox lacks may be another function's, so its failure does not count, and neither
    does that of a statement after the last definition, such as n = int(input()).
    A function without a body (only a docstring, `pass` or `...`) is replaced by one of the same name with a body. A
    block that defines nothing is kept if it imports or assigns something before a later one.
    """
    codes = [textwrap.dedent(block) for block in blocks]
    if codes and not parse(codes[-1]):  # perhaps cut off: try it without its last statement
        ends = END_OF_BODY.finditer(without_strings(codes[-1]))
        codes[-1] = codes[-1][: max((match.start() for match in ends), default=0)]
    trees = [(code, tree) for code in codes if (tree := parse(code))]
    defining = [any(isinstance(node, DEFINITION) for node in tree.body) for _, tree in trees]
    last = max((i for i, defines in enumerate(defining) if defines), default=len(trees))
    definitions = [node for _, tree in trees for node in tree.body if isinstance(node, DEFINITION)]
    defined = {node.name for node in definitions if not is_stub(node)}
    kept = []
    for i, (code, tree) in enumerate(trees):
        setting = any(isinstance(node, SETTING) for node in tree.body) and not uses(tree, defined)
        if defining[i] or (setting and i < last):
            end = max((node.lineno for node in tree.body if isinstance(node, DEFINITION)), default=0)
            lines = dict(enumerate(code.rstrip().split("\n"), start=1))
            instead = {}
            for node in tree.body:
                here, idle = lines_of(node), is_idle(node, defined, node.lineno > end)
                if idle or may_fail(node, 0 < end < node.lineno):
                    tried = TRY.format(textwrap.indent("\n".join(lines.get(number, "") for number in here), "    "))
                    instead |= dict.fromkeys(here, "") | {here[0]: "" if idle else tried}
            kept.append("\n".join((lines | instead)[n] for n in lines if instead.get(n, "-")).rstrip() + "\n")
    return "\n".join(kept), defined


def parse(code: str) -> ast.Module | None:
    """The program's syntax tree; None if it is not valid Python, for instance because it is a function's body."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about escapes in strings
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    inside = {part for node in ast.walk(tree) if isinstance(node, DEFINITION) for part in ast.walk(node)}
    returns = {part for part in ast.walk(tree) if isinstance(part, ast.Return)}
    return tree if returns <= inside else None


def is_idle(node: ast.stmt, defined: set[str], last: bool) -> bool:
    """Whether a program works without this statement: a test, a demonstration, or a function without a body.
    last: no definition follows. Before a definition, a call may fill a table that the next function needs."""
    if isinstance(node, SHOWING):
        return uses(node, (defined if last else set()) | {"print", "__name__", "unittest", "doctest"})
    return isinstance(node, ast.Assert) or (is_stub(node) and node.name in defined)


def may_fail(node: ast.stmt, last: bool) -> bool:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
        return not {module.partition(".")[0] for module in modules} <= sys.stdlib_module_names
    return last and any(isinstance(part, (ast.Call, ast.Subscript)) for part in ast.walk(node))


def is_stub(node: ast.stmt) -> bool:
    empty = (ast.Pass, ast.Import, ast.ImportFrom)
    return isinstance(node, DEFINITION[:2]) and all(
        isinstance(part, empty) or isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)
        for part in node.body
    )


def uses(node: ast.AST, names: set[str]) -> bool:
    return any(isinstance(part, ast.Name) and part.id in names for part in ast.walk(node))


def lines_of(node: ast.stmt) -> range:
    return range(min(part.lineno for part in (node, *getattr(node, "decorator_list", ()))), node.end_lineno + 1)
