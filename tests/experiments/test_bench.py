"""bench.py: the official rule and the made-up text are what they claim to be, and every case runs and reports."""

import gc
import importlib.util
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from align import exact_token_alignment
from data import read_jsonl, tokenise
from experiments import bench
from runtime.tokenizer import read_tokenizer

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
HOWS = ["plain"] + ["transformers"] * HAS_TRANSFORMERS
MINIATURE = {
    **bench.QUICK,
    "student": bench.gpt2(32, 2, 2, 600, 128), "teacher": bench.llama(48, 64, 1, 2, 2, 900, "qwen2", 128),
    "same_teacher": bench.gpt2(48, 1, 2, 600, 128), "overlap": 400, "batch": 2, "max_len": 64, "enough": 1e-3,
    "bodies": {"GPT-2 small": bench.gpt2(32, 2, 2, 600), "LLaMA": bench.llama(32, 64, 2, 2, 1, 600)},
    "body_shape": [2, 32], "square": 64, "generator": bench.gpt2(32, 1, 2, 600, 320), "new_tokens": 4,
    "aligned_lengths": [64, 256], "heads": [[500, 12, 8]],
    "growth": {"batch": [1], "max_len": [32], "vocabulary": [800]},
    "growth_teacher": bench.llama(48, 64, 1, 2, 2, 900, "qwen2", 128),
    "epoch": {"student": bench.gpt2(32, 1, 2, 600), "teacher": bench.gpt2(48, 1, 2, 600), "batch": 4, "updates": 2,
              "rounds": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return bench.stand_in(MINIATURE, 8, tmp_path_factory.mktemp("text") / "made up")


def test_the_official_rule_and_ours_agree_on_plain_text(text):
    """Made-up words have no accent, so that comparing strings loses nothing."""
    student, teacher = (read_tokenizer(text[side]) for side in ("student", "teacher"))
    for example in read_jsonl(text["data"]):
        ids = [t.encode(example.outputs[0]) + [t.eos_id] for t in (teacher, student)]
        names = bench.token_strings(teacher, ids[0]), bench.token_strings(student, ids[1])
        official = bench.string_alignment(*names)
        ours = exact_token_alignment(teacher.spell(ids[0]), student.spell(ids[1]))
        assert np.array_equal(official, ours)


def test_made_up_text_is_as_long_as_dolly(tmp_path):
    size = {"student": {"vocab_size": 5000}, "teacher": {"vocab_size": 8000}, "overlap": 4000}
    text = bench.stand_in(size, 300, tmp_path / "text")
    student, teacher = (read_tokenizer(text[side]) for side in ("student", "teacher"))
    assert (student.size, teacher.size) == (5000, 8000)
    rows, _ = tokenise(read_jsonl(text["data"]), student, teacher, 512, 256, "eta")
    assert statistics.median(len(row.student.prompt) for row in rows) == pytest.approx(43, abs=3)
    assert statistics.median(len(row.student.response) for row in rows) == pytest.approx(48, rel=0.2)
    assert 60 < statistics.mean(len(row.student.prompt) for row in rows) < 80
    assert 70 < statistics.mean(len(row.student.response) for row in rows) < 95
    ratios = [len(row.pairs[1]) / len(row.student.response) for row in rows]
    assert 0.86 < statistics.mean(ratios) < 0.94
    lengths = [sum(len(row.teacher.response) for row in rows), sum(len(row.student.response) for row in rows)]
    assert 0.97 < lengths[0] / lengths[1] < 1.03


@pytest.mark.parametrize("case", bench.CASES)
def test_every_case_reports(text, case, capfd, monkeypatch):
    """In this process, in miniature, with the check that all alternatives compute the same."""
    monkeypatch.setattr(gc, "collect", lambda: 0)  # half of the time, with all that tests have imported
    results = bench.run(MINIATURE, text, "cpu", ["fp32"], [case], run_step=bench.measure_step)
    assert results and all(result.ratio > 0 for result in results if not isinstance(result.other, str))
    assert all("NOT" not in result.note for result in results)
    lines = bench.report(results).splitlines()
    assert len(lines) == 2 + len(results) and len({line.count("|") for line in lines}) == 1


def test_what_does_not_fit_is_said(text, monkeypatch):
    monkeypatch.setattr(bench, "free_memory", lambda device: 2**30)
    setting = bench.Bench(MINIATURE, text, "cpu", ["fp32"], HOWS, run_step=bench.measure_step)
    job = bench.make_job(setting, "kd", "fp32")
    bench.add_step(setting, "KD", job)
    assert len(setting.results) == 2 * len(HOWS) and {result.ratio for result in setting.results} == {None}
    for result in setting.results:
        assert "does not fit: 2.0 GiB needed, 1.0 GiB free" in bench.report([result])


def test_models_grow_to_the_given_tokenizers(text):
    """The quick models with the tokenizers of real text, for instance."""
    small = {**MINIATURE, "student": bench.gpt2(32, 2, 2, 300, 128)}
    changed = bench.fitting_vocabularies(small, text)
    assert {name: config["vocab_size"] for name, config in changed.items()} == {"student": 600}
    large = {**MINIATURE, "teacher": {**MINIATURE["teacher"], "vocab_size": 2000}}
    assert bench.fitting_vocabularies(large, text)["teacher"]["vocab_size"] == 900


def test_ratios_targets_and_units():
    faster = bench.Result("KD, time", "plain", "fp32", [2.0, 1.0, 3.0], [10.0, 12.0, 14.0], "s", target=5)
    assert faster.ratio == 6 and faster.cells()[:2] == ["6", "5 met"]
    assert faster.cells()[5:7] == ["2 (1–3) s", "12 (10–14) s"]
    rate = bench.Result("generation", "transformers", "bf16", [2500.0], [1000.0], "tokens/s", target=3)
    assert rate.cells()[:2] == ["2.5", "3 missed"] and rate.cells()[5] == "2.5 k tokens/s"
    memory = bench.Result("DSKD v2, memory", "plain", "fp32", [2.0**20], [3 * 2.0**30], "B")
    assert memory.ratio == 3072 and memory.cells()[5:7] == ["1 MiB", "3 GiB"]


def test_unknown_cases_and_half_of_the_data_options(capsys):
    for arguments, message in ((["step"], "invalid choice: 'step'"), (["--data", "x.jsonl"], "belong together")):
        with pytest.raises(SystemExit):
            bench.main(arguments)
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_quick(tmp_path):
    file = tmp_path / "quick.json"
    root = Path(bench.__file__).parent.parent
    command = [sys.executable, "-m", "experiments.bench", "--quick", "--json", str(file)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| ratio | target |" in done.stdout
    assert {result["dtype"] for result in json.loads(file.read_text())["results"]} == {"fp32", ""}
