"""The README's commands parse, its names exist, and each concept file works when copied alone."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"python ((?:train|eval|bench)\.py[^`\n&]*)", README.replace("\n--epochs", " --epochs"))


def test_commands_were_found():
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("train.py") and "..." not in c])
def test_train_commands_parse(command):
    train.Options(**train.parse(shlex.split(command)[1:]))


@pytest.mark.parametrize("line", re.findall(r"^\|.*`\w+\.py`: .*\|$", README, re.M))
def test_every_function_the_readme_names_exists(line):
    for file, names in re.findall(r"`(\w+\.py)`: ((?:`\w+`(?:, | \.\.\. )?)+)", line):
        source = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"(def|class) {name}\b", source), f"{name} is not in {file}"


def test_every_logged_key_is_explained():
    terms = "loss ce kd t2s_ce t2s_kd s2t_kd t2s_agreement align_ratio accuracy"
    terms += " on_policy generation_share generation_tokens_per_second sampled_length"
    for key in f"step epoch {terms} student_tokens teacher_tokens grad_norm lr tokens_per_second valid_ce".split():
        assert re.search(rf"^\|.*`{key}`", README, re.M), key


@pytest.mark.parametrize("name", ["model", "lora", "projector", "align", "losses", "rouge", "grade"])
def test_concept_files_work_alone(tmp_path, name):
    """Copied into an empty folder, each imports nothing of the project and its docstring's example runs."""
    (tmp_path / f"{name}.py").write_bytes((ROOT / f"{name}.py").read_bytes())
    code = (
        f"import doctest, sys, {name}\n"
        f"result = doctest.testmod({name})\n"
        "sys.exit(0 if result.attempted and not result.failed else 'no example, or it failed')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
