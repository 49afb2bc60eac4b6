"""README and docs: excerpts equal the source, links lead somewhere, commands have the options that they use.

    python tests/test_docs.py --write      fills every excerpt from the source

The first line of a fenced block says what the block is:

    ```python losses.py dskd_loss                              an excerpt: all of a function, class or module-level name
    ```python losses.py dskd_loss: t2s_logits = ... t2s_kd =   its lines from the first that begins so to the first
                                                               after it that begins so, to the end of that statement
    ```sh test                                                 commands that need no network, GPU or data: they are run
"""

import ast
import contextlib
import doctest
import functools
import importlib
import io
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / name for name in ("experiments/README.md", "examples/README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
EXCERPT = re.compile(r"^```python (\S+\.py) ([\w.]+)(?:: (.+?) \.\.\. (.+?))?\n(.*?)^```$", re.M | re.S)
SHELL = re.compile(r"^ *```sh( test)?\n(.*?)^ *```$", re.M | re.S)

# ---------------------------------------------------------------------------------------------------------------------
# Excerpts


def source_of(file: str, name: str) -> list[str]:
    """The lines of a function, class, method (`Class.method`) or module-level assignment of one of our files."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    node = ast.parse("\n".join(lines))
    for part in name.split("."):
        node = next((child for child in node.body if part in names_of(child)), None)
        if node is None:
            raise ValueError(f"{file} has no {name}")
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    return textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno])).splitlines()


def names_of(node: ast.AST) -> list[str]:
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return [getattr(node, "name", "")] + [target.id for target in targets if isinstance(target, ast.Name)]


def excerpt(file: str, name: str, begin: str | None, end: str | None) -> str:
    """What a block with this first line has to hold."""
    lines = source_of(file, name)
    if begin is not None:
        first = line_that_begins(lines, begin, 0, file, name)
        last = statement = line_that_begins(lines, end, first, file, name)
        while open_brackets(lines[statement : last + 1]) > 0:
            last += 1
        lines = lines[first : last + 1]
    return textwrap.dedent("\n".join(lines)).strip("\n") + "\n"


def open_brackets(lines: list[str]) -> int:
    """How many are still open after these lines: then the statement goes on."""
    text = "\n".join(lines)
    return sum(text.count(c) for c in "([{") - sum(text.count(c) for c in ")]}")


def line_that_begins(lines: list[str], words: str, start: int, file: str, name: str) -> int:
    for index in range(start, len(lines)):
        if lines[index].lstrip().startswith(words):
            return index
    raise ValueError(f"{file}: no line of {name} begins with {words!r}")


def write_excerpts() -> None:
    for page in PAGES:
        page.write_text(EXCERPT.sub(filled, page.read_text(encoding="utf-8")), encoding="utf-8")


def filled(block: re.Match) -> str:
    head = block[0].partition("\n")[0]
    return f"{head}\n{excerpt(*block.groups()[:4])}```"


EXCERPTS = [(page, *found.groups()) for page, text in TEXTS.items() for found in EXCERPT.finditer(text)]


@pytest.mark.parametrize("page, file, name, begin, end, written", EXCERPTS)
def test_excerpts_equal_the_source(page, file, name, begin, end, written):
    wanted = excerpt(file, name, begin, end)
    assert written == wanted, f"{page}: run `python {Path(__file__).name} --write` in tests/"


def test_excerpts_were_found():
    assert len([page for page, *_ in EXCERPTS if page == "docs/method.md"]) >= 15
    assert [page for page, *_ in EXCERPTS if page == "README.md"]
    assert not any(re.search(r"^```python \S+\.py", EXCERPT.sub("", text), re.M) for text in TEXTS.values())


# ---------------------------------------------------------------------------------------------------------------------
# Links and names


def slugs(markdown: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    text = re.sub(r"^ *```.*?^ *```$", "", markdown, flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in slugs(file.read_text(encoding="utf-8")), f"{page}: {target} names no heading"


@pytest.mark.parametrize("page", TEXTS)
def test_names_exist(page):
    """Every name in a row like | what | `losses.py`: `forward_kl` to `adaptive_kl` | is in that file."""
    for file, names in re.findall(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?:, | to )?)+)", TEXTS[page]):
        for name in re.findall(r"`([\w.]+)`", names):
            source_of(file, name)


@pytest.mark.parametrize("page", TEXTS)
def test_imports_of_the_snippets_exist(page):
    for block in re.findall(r"^```python\n(.*?)^```$", TEXTS[page], re.M | re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                for name in node.names:
                    source_of(node.module.replace(".", "/") + ".py", name.name)


def test_the_readme_is_one_page():
    assert len(TEXTS["README.md"].encode()) < 10_000


def test_every_logged_key_is_explained():
    keys = "step epoch loss ce kd t2s_ce t2s_kd s2t_kd t2s_agreement align_ratio on_policy accuracy student_tokens"
    keys += " teacher_tokens grad_norm lr tokens_per_second compilations generation_share generation_tokens_per_second"
    for key in f"{keys} sampled_length valid_ce valid_rouge_l".split():
        assert re.search(rf"^\|.*`{key}`", TEXTS["docs/log.md"], re.M), key


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def commands(text: str) -> list[tuple[str, bool]]:
    """(command, whether the test runs it) of all shell blocks."""
    found = []
    for test, block in SHELL.findall(text):
        lines = textwrap.dedent(block).replace("\\\n", " ").splitlines()
        found += [(line.partition("  # ")[0].strip(), bool(test)) for line in lines if line.strip()]
    return found


COMMANDS = [(page, *command) for page, text in TEXTS.items() for command in commands(text)]
SCRIPT = re.compile(r"(?:python|torchrun(?: --\S+)+) ((?:-m )?[\w./]+)(.*)")


def run_here(words: list[str]) -> str:
    """What `python WORDS` prints, run in this process, where torch is imported already."""
    module, *arguments = words[1:] if words[0] == "-m" else words
    start = runpy.run_module if words[0] == "-m" else runpy.run_path
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [module, *arguments])
        patch.delitem(sys.modules, module, raising=False)  # runpy warns of a module that is imported already
        patch.chdir(ROOT)
        try:
            start(module, run_name="__main__")
        except SystemExit as end:
            assert not end.code, f"{words}: {end.code}"
    return printed.getvalue()


@functools.cache
def help_of(script: str) -> str:
    return run_here([*script.split(), "--help"])


@pytest.mark.parametrize("page, command, _", [c for c in COMMANDS if " -m venv" not in c[1] and "--" in c[1]])
def test_options_exist(page, command, _):
    """Each option of a command is in that script's help, and its value is one of the choices, if it has any."""
    match = SCRIPT.fullmatch(command)
    assert match, f"{page}: which script does {command!r} start?"
    words = shlex.split(match[2].replace("...", ""))
    for word, value in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("--"):
            option = re.compile(rf"{re.escape(word)}(?![\w-])(?: \{{([^}}]*)\}})?")
            described = option.search(help_of(match[1]))
            if not described and not words[0].startswith("--"):  # a subcommand's
                described = option.search(help_of(f"{match[1]} {words[0]}"))
            assert described, f"{page}: {match[1]} has no {word}"
            if described[1]:
                assert value in re.split(r",\s*", described[1]), f"{page}: {word} {value}"


@pytest.mark.parametrize("page, command", [(page, command) for page, command, test in COMMANDS if test])
def test_commands_run(page, command, tmp_path):
    words = shlex.split(command)
    assert words[0] == "python"
    assert run_here([word if not word.startswith("runs/") else str(tmp_path / word) for word in words[1:]])


def test_commands_were_found():
    scripts = {match[1] for _, command, _ in COMMANDS if (match := SCRIPT.fullmatch(command))}
    assert {"train.py", "eval.py", "-m experiments.reproduce", "-m experiments.bench"} <= scripts
    assert sum(test for *_, test in COMMANDS) >= 2
    installs = [command for _, command, _ in COMMANDS if command.startswith("python3 -m venv")]
    assert [command.rpartition(" && ")[2] for command in installs] == ["python train.py", "python -m pytest"]


# ---------------------------------------------------------------------------------------------------------------------
# Copying


ALONE = """
import doctest, importlib, sys
for name in sys.argv[1:]:
    sys.path[0] = name
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed, f"{name}: no example, or it failed"
    del sys.modules[name]
"""


@pytest.mark.parametrize("name", ["fast.losses", "baselines.mined", "baselines.uld", "scores.programs"])
def test_examples_of_the_other_files_run(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed


def test_concept_files_work_alone(tmp_path):
    """Each copied into an empty folder, it imports nothing of the project, and its docstring's example runs."""
    files = "model lora projector align losses scores/rouge scores/answers".split()
    for file in files:
        copy = tmp_path / Path(file).name / f"{Path(file).name}.py"
        copy.parent.mkdir()
        copy.write_bytes((ROOT / f"{file}.py").read_bytes())
    command = [sys.executable, "-c", ALONE, *(Path(file).name for file in files)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = subprocess.run([sys.executable, "align.py", "x"], cwd=tmp_path / "align", capture_output=True, text=True)
    assert shown.returncode == 1 and shown.stderr.startswith("error: ") and shown.stderr.count("\n") == 1


def test_the_snippet_to_copy_runs():
    """The README's lines, on random tensors."""
    [snippet] = re.findall(r"^```python\n(.*?)^```$", TEXTS["README.md"], re.M | re.S)
    setting = """
import torch
from losses import RECIPES, Counts, dskd_loss, predict_tokens
from projector import Projectors
N, student_width, teacher_width, V = 6, 4, 5, 11
student_hidden, teacher_hidden = torch.randn(N, student_width, requires_grad=True), torch.randn(N, teacher_width)
student_head, teacher_head = torch.randn(V, student_width, requires_grad=True), torch.randn(V, teacher_width)
gold = torch.randint(V, (N,))
"""
    check = """
trained = student_hidden, student_head, projectors.t2s.weight
assert all(x.grad.isfinite().all() and x.grad.abs().sum() > 0 for x in trained)
"""
    exec(setting + snippet + check, {})


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    write_excerpts()
