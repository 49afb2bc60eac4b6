"""bench.py: the official rule and the made-up text are what they claim to be, and every case runs and reports."""

import importlib.util
import json
import statistics
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from align import exact_token_alignment
from experiments import bench
from fast.cpu import scaled_dot_product_attention
from runtime.formats import read_examples
from runtime.tokenizer import read_tokenizer

OTHERS = ["plain"] + ["transformers"] * (importlib.util.find_spec("transformers") is not None)
ON_CPU = {**bench.TINY, "card": False, "batches": [2]}  # what runs where there is no card


def make_bench(text, size=ON_CPU, **options) -> bench.Bench:
    return bench.Bench(size, text, "cpu", ["fp32"], OTHERS, in_this_process=True, **options)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return bench.stand_in(bench.TINY, 20, tmp_path_factory.mktemp("text") / "made up")


def test_the_official_rule_and_ours_agree_on_plain_text(text):
    """Made-up words have no accent, so that comparing strings loses nothing."""
    student, teacher = (read_tokenizer(text[side]) for side in ("student", "teacher"))
    for example in read_examples(text["data"]):
        ids = [t.encode(example.outputs[0]) + [t.eos_id] for t in (teacher, student)]
        names = bench.token_strings(teacher, ids[0]), bench.token_strings(student, ids[1])
        official = bench.string_alignment(*names)
        ours = exact_token_alignment(teacher.spell(ids[0]), student.spell(ids[1]))
        assert np.array_equal(official, ours)


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory):
    """200 rows of made-up text of two larger vocabularies, and both tokenizers."""
    size = {"student": {"vocab_size": 5000}, "teacher": {"vocab_size": 8000}, "overlap": 4000}
    text = bench.stand_in(size, 200, tmp_path_factory.mktemp("text"))
    return bench.read_rows(text["data"], text["student"], text["teacher"], 512, "eta")


def test_made_up_text_is_as_long_as_dolly(long_rows):
    rows, student, teacher = long_rows
    assert (student.size, teacher.size) == (5000, 8000)
    assert statistics.median(len(row.student.prompt) for row in rows) == pytest.approx(43, abs=3)
    assert statistics.median(len(row.student.response) for row in rows) == pytest.approx(48, rel=0.2)
    assert 60 < statistics.mean(len(row.student.prompt) for row in rows) < 80
    assert 70 < statistics.mean(len(row.student.response) for row in rows) < 95
    ratios = [len(row.pairs[1]) / len(row.student.response) for row in rows]
    assert 0.86 < statistics.mean(ratios) < 0.94
    lengths = [sum(len(row.teacher.response) for row in rows), sum(len(row.student.response) for row in rows)]
    assert 0.97 < lengths[0] / lengths[1] < 1.03


@pytest.mark.parametrize("count", [2, 4, 8, 32])
def test_a_batch_is_as_large_as_the_average_one(long_rows, count):
    """In response tokens too: they take ours most of its time, and a padded step none."""
    rows, *_ = long_rows
    batch = bench.representative(rows, count)
    for length in (lambda row: len(row.student), lambda row: len(row.student.response)):
        assert statistics.mean(map(length, batch)) == pytest.approx(statistics.mean(map(length, rows)), rel=0.1)
    assert len(bench.representative(rows[:3], count)) == count


@pytest.mark.parametrize("case", sorted(set(bench.CASES) - {"lora_pair"}))
def test_every_case_reports(text, case):
    """In this process, with the check that all alternatives compute the same."""
    setting = make_bench(text)
    bench.CASES[case](setting)
    assert setting.results and all(result.ratio > 0 for result in setting.results)
    assert all("NOT" not in result.note for result in setting.results)
    lines = bench.report(setting.results).splitlines()
    assert len(lines) == 2 + len(setting.results) and len({line.count("|") for line in lines}) == 1


def test_what_runs_on_a_gpu(tmp_path, capsys):
    """The command line in miniature: every way on every batch, memory beside its forecast, and a file of it all."""
    file = tmp_path / "results.json"
    bench.main(["--tiny", "--device", "cpu", "--methods", "eta", "--profile", "--json", str(file)])
    results = [bench.Result(**{key: value for key, value in result.items() if key != "ratio"})
               for result in json.loads(file.read_text())["results"]]  # fmt: skip
    printed = capsys.readouterr().out
    assert printed.endswith(bench.report(results) + "\n") and "DSKD v2 + ETA, 4 examples, ours, fp32:" in printed
    assert printed.count("aten::addmm") >= 2
    names = {(result.what, result.against) for result in results}
    assert names >= {(f"DSKD v2 + ETA, {batch} examples, time", how) for batch in (2, 4) for how in ("", *OTHERS)}
    assert all("NOT" not in result.note for result in results)
    seen = sys.platform == "linux"
    assert sum(result.against == "forecast" for result in results) == 3 * seen  # two steps and LoRA's
    assert any(result.what.startswith("LoRA") and result.ours[0] > 0 for result in results)


def test_what_does_not_run_is_said(text, monkeypatch, capsys):
    """By its forecast on a CPU, by the device on a card; when the time is up; and for any other reason, which fails."""
    monkeypatch.setattr(bench, "free_memory", lambda: 2**30)
    setting = make_bench(text)
    bench.measure_steps(setting, [bench.make_job(setting, "kd", "fp32", 2)])
    assert [result.other for result in setting.results] == ["does not fit: 2.0 GiB needed, 1.0 GiB free"] * len(OTHERS)

    def run_out_of_memory(job):
        raise torch.OutOfMemoryError("CUDA out of memory") if job["how"] == "plain" else ValueError("for a test")

    monkeypatch.setattr(bench, "measure_step", run_out_of_memory)
    setting = make_bench(text, bench.TINY)
    bench.measure_steps(setting, [bench.make_job(setting, "kd", "fp32", 2)])
    said = {result.against: (result.ours, result.other) for result in setting.results}
    failed = "failed: ValueError: for a test"
    assert said["ours"] == (failed, failed) and said["plain"] == (failed, "does not fit")
    late = make_bench(text, bench.TINY, until=0)
    bench.measure_steps(late, [bench.make_job(late, "kd", "fp32", 2)])
    assert late.results[0].ours == "no time left"
    with pytest.raises(SystemExit, match="1"):
        bench.main(["steps", "--tiny", "--device", "cpu", "--methods", "kd"])
    assert failed in capsys.readouterr().out


MEASURED = {"tokens": [9, 9, 9], "pairs": 9, "weights": 50, "kept": 20, "loss": 1.0, "gradient": 1.0}


def test_everything_has_compiled_before_anything_is_timed(text, monkeypatch):
    """What does not fit beside the other processes is measured alone; memory is that of the steps that compile."""
    order = []

    def step(job):
        compiles = job["enough"] == 0
        if job["how"] == "ours":
            order.append("compile" if compiles else "time")
        if compiles and job["name"] == "kd":
            raise torch.OutOfMemoryError("too many at once")
        return MEASURED | {"seconds": [] if compiles else [1.0], "peak": 100 if compiles else 200}

    monkeypatch.setattr(bench, "measure_step", step)
    setting = make_bench(text, bench.TINY, methods=["eta", "kd"])
    bench.steps(setting)
    assert order == ["compile"] * 4 + ["time"] * 4
    found = {result.what: result.ours for result in setting.results if result.against in ("", "forecast")}
    for what, total in (("DSKD v2 + ETA", 150), ("KD", 250)):
        assert found[f"{what}, 4 examples, time"] == [1.0] and found[f"{what}, 4 examples, memory in all"] == [total]


def test_on_a_small_card_one_process_follows_another(text, monkeypatch):
    """Those that wait would hold memory that the one being measured needs."""
    order, card = [], SimpleNamespace(total_memory=24e9)

    def step(job):
        order.append("compile" if job["enough"] == 0 else "time")
        return MEASURED | {"seconds": [1.0], "peak": 100}

    monkeypatch.setattr(bench, "measure_step", step)
    monkeypatch.setattr(bench, "machine", lambda device: "NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    setting = make_bench(text, {**bench.TINY, "against": {"eta": []}}, methods=["eta", "kd"])
    setting.device = "cuda"
    bench.steps(setting)
    assert order == (["compile"] * 2 + ["time"] * 2) * 2


def test_what_a_gpu_is_asked_for(text, monkeypatch):
    """With --quick, two batches are compared with alternatives. The forecast includes graphs where there are any."""
    monkeypatch.setattr(bench, "machine", lambda device: "NVIDIA H100 80GB HBM3")
    full = bench.Bench(bench.CARD, text, "cuda", ["bf16"], ["plain", "transformers"])
    quick = bench.Bench({**bench.CARD, **bench.QUICK}, text, "cuda", ["bf16"], ["plain", "transformers"])
    every = [(name, batch) for name in bench.METHODS for batch in (4, 8, 32)]
    compared = {one: bench.make_job(quick, one[0], "bf16", one[1])["hows"][1:] for one in every}
    assert {one for one, hows in compared.items() if hows} == {("eta", 4), ("eta", 8)}
    assert [bench.COMPILED in compared["eta", batch] for batch in (4, 8)] == [False, True]
    assert all(len(bench.make_job(full, name, "bf16", batch)["hows"]) >= 3 for name, batch in every)

    job = bench.make_job(quick, "same", "bf16", 8)
    monkeypatch.setattr(bench, "measure_one", lambda *_: MEASURED | {"seconds": [1.0], "peak": 100})
    bench.compare_step(quick, job, "ours", *[bench.measure_one()] * 2)
    bench.lora_pair(quick)
    forecasts = [result.other[0] for result in quick.results if result.against == "forecast"]
    large = bench.CARD["lora_pair"]["models"]
    pairs = (quick.size["same_teacher"], quick.size["student"], 0), (large["teacher"], large["student"], 256)
    for forecast, pair, graphs in zip(forecasts, pairs, (True, False), strict=True):
        assert forecast == sum(bench.memory.needs(*pair, 1, None, 1, max_len=9, graphs=graphs).values())


@pytest.mark.parametrize(("name", "of_heads"), [("kd", (6, 2)), ("cma", (10, 6)), ("eta", (12, 8))])
def test_the_model_flops_utilisation(text, monkeypatch, name, of_heads):
    """Six operations a weight and token of the student, two of the teacher, and the heads' at response tokens: DSKD
    reads two more states with each, v2 also counts who agrees and asks what the teacher predicts."""
    setting = make_bench(text, bench.TINY)
    job = bench.make_job(setting, name, "fp32", 2)
    student, teacher = (bench.memory.counts(job[side]) for side in ("student", "teacher"))
    work = 6 * 100 * student.matrices + 2 * 90 * teacher.matrices
    work += 50 * (of_heads[0] * student.head + of_heads[1] * teacher.head)
    monkeypatch.setattr(bench, "machine", lambda device: "NVIDIA H100 80GB HBM3")
    took = [work / 989e12 * 2] * 3
    said = bench.say_speed(job, {"seconds": took, "tokens": [100, 90, 50], "pairs": 50})
    assert said.endswith("tokens/s, MFU 50.0%")


def test_the_teacher_predicts_what_the_student_has(text):
    """Else ETA would leave most pairs out, and the step measured would be a smaller one than training's."""
    step = bench.make_step(bench.make_job(make_bench(text, bench.TINY), "eta", "fp32", 4) | {"how": "ours"})
    states = torch.randn(500, step.frozen.head_weight.shape[1])
    predicted = (states @ step.frozen.head_weight.T).argmax(-1)
    tokens = step.trained[1].student_token
    assert (tokens[predicted] >= 0).all() and (tokens < 0).float().mean() > 0.3


def test_ratios_and_units():
    faster = bench.Result("KD, time", "plain", "fp32", [2.0, 1.0, 3.0], [10.0, 12.0, 14.0], "s")
    assert faster.ratio == 6 and faster.cells()[4:6] == ["2 (1–3) s", "12 (10–14) s"]
    rate = bench.Result("generation", "transformers", "bf16", [2500.0], [1000.0], "tokens/s")
    assert rate.cells()[0] == "2.5" and rate.cells()[4] == "2.5 k tokens/s"
    memory = bench.Result("DSKD v2, memory", "plain", "fp32", [2.0**20], [3 * 2.0**30], "B")
    assert memory.ratio == 3072 and memory.cells()[4:6] == ["1 MiB", "3 GiB"]


def test_a_step_in_a_process_of_its_own(text):
    setting = make_bench(text)
    job = bench.make_job(setting, "kd", "fp32", 2)
    with bench.own_process(False) as run_step:
        result = run_step(job | {"how": "ours", "check": True}).result()
    assert result["loss"] > 0 and (result["peak"] is None) == (sys.platform != "linux")


def test_the_step_has_the_attention_of_training(text):
    step = bench.make_step(bench.make_job(make_bench(text), "kd", "fp32", 2) | {"how": "ours"})
    attentions = (getattr(m, "scaled_dot_product_attention", None) for m in step.trained.modules())
    assert scaled_dot_product_attention in attentions


def test_ctrl_c_leaves_the_table_of_what_was_measured(monkeypatch, capsys):
    def interrupted(setting):
        """Measures one thing."""
        setting.add("one thing", "plain", "fp32", [1.0], [2.0], "s")
        raise KeyboardInterrupt

    monkeypatch.setitem(bench.CASES, "body", interrupted)
    with pytest.raises(SystemExit, match="1"):
        bench.main(["body", "alignment", "--tiny", "--device", "cpu"])
    assert "| one thing | plain " in capsys.readouterr().out


def test_unknown_cases_and_half_of_the_data_options(capsys):
    for arguments, message in ((["step"], "invalid choice: 'step'"), (["--data", "x.jsonl"], "go together"),
                               (["lora_pair", "--device", "cpu"], "lora_pair needs a GPU")):  # fmt: skip
        with pytest.raises(SystemExit):
            bench.main(arguments)
        assert message in capsys.readouterr().err


def test_what_cannot_be_read_or_written_is_told_before_anything_is_measured(text, tmp_path, capsys):
    data = ["--data", text["data"], "--student-tokenizer", text["student"], "--teacher-tokenizer"]
    for arguments, message in (
        (["--json", str(tmp_path / "nowhere" / "x.json")], "No such file or directory"),
        (["--device", "foo"], "--device foo: not a device"),
        ([*data, str(tmp_path)], "cannot be read as a tokenizer"),
        (["--data", str(tmp_path / "nix.jsonl"), *data[2:], text["teacher"]], "nix.jsonl"),
    ):
        with pytest.raises(SystemExit):
            bench.main(["--tiny", "alignment", *arguments])
        said = capsys.readouterr().err
        assert message in said and "alignment:" not in said
