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
STARTED = r"(?:python|torchrun(?: --\S+)+) ((?:train|eval|bench)\.py[^`\n&]*)"
COMMANDS = re.findall(STARTED, README.replace("\n--epochs", " --epochs"))


def test_commands_were_found():
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("train.py") and "..." not in c])
def test_train_commands_parse(command):
    train.Options(**train.settings(train.parse(shlex.split(command)[1:])))


@pytest.mark.parametrize("line", re.findall(r"^\|.*`\w+\.py`: .*\|$", README, re.M))
def test_every_function_the_readme_names_exists(line):
    for file, names in re.findall(r"`(\w+\.py)`: ((?:`\w+`(?:, | \.\.\. )?)+)", line):
        source = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"(def|class) {name}\b", source), f"{name} is not in {file}"


def test_every_logged_key_is_explained():
    terms = "loss ce kd t2s_ce t2s_kd s2t_kd t2s_agreement align_ratio accuracy"
    terms += " on_policy generation_share generation_tokens_per_second sampled_length compilations"
    for key in f"step epoch {terms} student_tokens teacher_tokens grad_norm lr tokens_per_second valid_ce".split():
        assert re.search(rf"^\|.*`{key}`", README, re.M), key


ALONE = {name: [] for name in ("model", "lora", "projector", "align", "losses", "scores.rouge", "scores.answers")}
ALONE |= {"fast.losses": ["losses"], "baselines.uld": ["losses", "fast/losses", "data", "align"],
          "baselines.mined": ["losses", "data", "align"]}  # fmt: skip


@pytest.mark.parametrize("name", ALONE)
def test_concept_files_work_alone(tmp_path, name):
    """Copied into an empty folder, each imports nothing of the project, or only these, and its example runs."""
    for file in [name.replace(".", "/"), *ALONE[name]]:
        copy = tmp_path / f"{file}.py"
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes((ROOT / f"{file}.py").read_bytes())
    code = (
        f"import doctest, importlib, sys; module = importlib.import_module({name!r})\n"
        "result = doctest.testmod(module)\n"
        "sys.exit(0 if result.attempted and not result.failed else 'no example, or it failed')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_snippet_about_losses_runs(tmp_path):
    """The README's lines to copy, on random tensors, in a folder that has nothing of the repository but losses.py."""
    [snippet] = [code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "dskd_loss" in code]
    setting = """
import torch
N, d, D, V = 6, 4, 5, 11
student_hidden, teacher_hidden = torch.randn(N, d, requires_grad=True), torch.randn(N, D)
student_head, teacher_head = torch.randn(V, d, requires_grad=True), torch.randn(V, D)
student_logits, teacher_logits = student_hidden @ student_head.T, teacher_hidden @ teacher_head.T
gold, teacher_argmax = torch.randint(V, (N,)), teacher_logits.argmax(-1)
t2s, s2t = torch.nn.Linear(D, d), torch.nn.Linear(d, D)
"""
    check = """
loss.backward()
assert per_token.shape == (N,) and all(x.grad.isfinite().all() for x in (student_hidden, student_head, t2s.weight))
"""
    (tmp_path / "losses.py").write_bytes((ROOT / "losses.py").read_bytes())
    (tmp_path / "snippet.py").write_text(setting + snippet + check)
    done = subprocess.run([sys.executable, "snippet.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
