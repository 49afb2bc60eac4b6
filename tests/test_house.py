"""The house: who may import whom, how long a function may be, and how much of it one update enters: the figures of
README's table, which `python -m pytest tests/test_house.py -s` prints."""

import ast
import inspect
import runpy
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import arguments, load_run

import train

ROOT = Path(train.__file__).parent
TOP = ["align", "data", "eval", "lora", "losses", "model", "projector", "train"]
ROOMS = ["baselines", "examples", "experiments", "fast", "runtime", "scores"]
FILES = sorted(file.relative_to(ROOT) for place in (".", *ROOMS, "tests") for file in (ROOT / place).glob("*.py"))
FILES += sorted(file.relative_to(ROOT) for file in (ROOT / "tests").glob("*/*.py"))

# file or room: what of ours it may import, by top file or room; a room may import itself
EVERYTHING = [*TOP, "baselines", "fast", "runtime", "scores"]
MAY_IMPORT = {
    "model": [], "lora": [], "projector": [], "align": [], "losses": [],
    "data": ["align"],
    "fast/losses": ["losses"], "fast/cpu": [], "fast/cuda": [], "fast/cache": ["data", "model", "losses"],
    "baselines": ["losses", "align", "data", "fast", "model"],
    "scores": [],
    "runtime/load": ["model", "data", "lora", "baselines", "fast"],  # it opens everything
    "runtime": ["model", "data", "lora", "align", "losses"],
    "train": EVERYTHING, "eval": EVERYTHING,
    "examples": ["losses", "projector", "align"],  # with which they are copied
    "experiments": EVERYTHING,
}  # fmt: skip

def sources(*, tests: bool) -> list[Path]:
    return [file for file in FILES if tests or file.parts[0] != "tests"]


def read(file: Path) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


def imported(file: Path) -> set[str]:
    """The top files and rooms that a file imports anywhere; but the embedded task is fetched by its name in
    the functions that need it, and the command line of align.py is in runtime/show.py."""
    tree = ast.parse(read(file))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    lazy = file.as_posix() in ("train.py", "runtime/load.py")
    late = {node for function in functions for node in ast.walk(function)} if lazy else set()
    if file.as_posix() == "align.py":
        late = set(ast.walk(tree.body[-1])) if ast.unparse(tree.body[-1]).startswith("if __name__ ==") else set()
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not (node in late and node.module in ("experiments", "runtime.show")):
            names.add(node.module or "")
    return {name.split(".")[0] for name in names} & {*TOP, *ROOMS}


def test_the_top_has_these_files():
    assert sorted(file.stem for file in FILES if file.parent == Path(".")) == TOP


def test_nobody_imports_what_is_not_below_him():
    found = set()
    for file in sources(tests=False):
        allowed = MAY_IMPORT.get(file.with_suffix("").as_posix()) or MAY_IMPORT.get(file.parts[0], [])
        found |= {(file.as_posix(), name) for name in imported(file) - {*allowed, file.parts[0]}}
    assert not found


def test_eval_starts_without_unix():
    at_the_top = [file for file in sources(tests=False) if "\nimport fcntl\n" in read(file)]
    assert {file.parts[0] for file in at_the_top} <= {"experiments"}


def test_no_function_is_longer_than_a_screen():
    long = set()
    for file in sources(tests=True):
        for node in ast.walk(ast.parse(read(file))):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                long.add((file.as_posix(), node.name))
    assert not long


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # another test has imported it
@pytest.mark.parametrize("name", [file.stem for file in FILES if file.parts[0] == "experiments"])
def test_every_experiment_starts(name, monkeypatch, capsys):
    """As `python -m experiments.NAME --help` does."""
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    has_command_line = "__main__" in read(Path("experiments", f"{name}.py"))
    try:
        runpy.run_module(f"experiments.{name}", run_name="__main__")
    except SystemExit as end:
        assert not end.code
    assert capsys.readouterr().out.startswith("usage:") == has_command_line


@contextmanager
def entered_functions():
    """The code of all functions of the repository that are entered meanwhile, in any thread."""
    codes = set()

    def note(frame, event, _):
        if event == "call":
            codes.add(frame.f_code)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield codes
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
        named = {code for code in codes if not code.co_name.startswith("<")}  # no lambda, comprehension or module
        here = {code for code in named if Path(code.co_filename).is_relative_to(ROOT)}
        codes &= {code for code in here if Path(code.co_filename).relative_to(ROOT) in sources(tests=False)}


@pytest.mark.parametrize("chunk", [512, 0])
def test_what_one_step_enters(tiny_task, tmp_path, chunk):
    """Forward and backward pass of one update, from tokenised rows to gradients; with the fast and the plain losses."""
    words = arguments(tiny_task, tmp_path / "run", recipe="v2", align="eta", max_steps=1, chunk=chunk)
    o, pieces = load_run(words)
    with entered_functions() as codes:
        train.distil(o, pieces, pieces.student.train(), pieces.batches(pieces.rows[:4], o))
    assert "dskd_loss" in {code.co_name for code in codes}
    lines = sum(len(inspect.getsourcelines(code)[0]) for code in codes)
    print(f"--chunk {chunk}: {len(codes)} functions, {lines} lines")
