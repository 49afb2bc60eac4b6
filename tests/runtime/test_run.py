"""A run may end at any moment: by kill -9, by Ctrl-C, by a full disk, by a number that is not finite."""

import dataclasses
import errno
import fcntl
import gc
import itertools
import json
import math
import os
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import arguments, load_run, log_of, same, stopped_by_ctrl_c, weights_of
from safetensors import safe_open
from safetensors.torch import load_file

import eval as evaluation
import lora
import model
import train
from data import tokenise
from runtime import load as loading
from runtime import parallel
from runtime import run as checkpoint
from runtime.formats import read_examples
from runtime.peft import load_adapter
from runtime.tokenizer import read_tokenizer

TIMES = {"tokens_per_second", "generation_share", "generation_tokens_per_second"}
METHODS = {
    "eta": {"on_policy": 0.3, "max_len": 60},
    "cma": {"recipe": "v1"},
    "kd": {"method": "kd", "teacher": "twin", "grad_accum": 2},
    "lora": {"lora": 4, "lora_dropout": 0.2},
    "seqkd": {"method": "seqkd", "seqkd_temperature": 1.0},
    "best": {"keep_best": "ce", "lr": 0.1, "warmup": 15},  # the learning rate rises until the student is spoilt
}


def command(tiny_task, out, **options):
    """Lines of the log and checkpoints that fall on different updates, held-out scores, and dropout, so that random
    states matter."""
    if "teacher" in options:
        options["teacher"] = tiny_task / options["teacher"]
    usual = {"student": tiny_task / "dropout", "log_every": 3, "checkpoint_every": 2}
    return arguments(tiny_task, out, valid=tiny_task / "valid.jsonl", **{**usual, **options})


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit, every file, but for the times in the log."""
    names = [sorted(str(file.relative_to(run)) for file in run.rglob("*") if file.is_file()) for run in (one, other)]
    assert names[0] == names[1] and "resume/state.safetensors" in names[0]
    for name in names[0]:
        if name.endswith(".safetensors"):
            assert same(load_file(one / name), load_file(other / name)), name
        elif name not in ("args.json", "log.jsonl", "resume/lock", "student/README.md"):
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
    logs = [[{k: v for k, v in line.items() if k not in TIMES} for line in log_of(run)] for run in (one, other)]
    assert logs[0] == logs[1]
    assert best_of(one) == best_of(other)
    assert step_of(one) == step_of(other)


def best_of(out) -> dict | None:
    return json.loads((out / "args.json").read_text()).get("best")


def step_of(out) -> int:
    with safe_open(out / "resume" / "state.safetensors", "pt") as file:
        return int(file.metadata()["step"])


def kill_again_and_again(tiny_task, tmp_path, kills: int, seed: int, **options) -> None:
    train.main(command(tiny_task, tmp_path / "whole", **options))
    plan = {"arguments": command(tiny_task, tmp_path / "parts", **options), "out": str(tmp_path / "parts"),
            "kills": kills, "seed": seed, "events": 36, "seconds": 0.7}  # fmt: skip
    runner = [sys.executable, str(Path(__file__).with_name("run_and_kill.py")), json.dumps(plan)]
    done = subprocess.run(runner, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum('"killed": true' in line for line in done.stdout.splitlines()) >= kills / 2, done.stdout
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_killed_run_ends_as_if_it_had_not_been(tiny_task, tmp_path):
    """And keeps its best student."""
    kill_again_and_again(tiny_task, tmp_path, 4, seed=1, max_steps=7, **METHODS["eta"] | METHODS["best"])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_again_and_again(tiny_task, tmp_path, method):
    kills = 20 if method == "eta" else 6
    kill_again_and_again(tiny_task, tmp_path, kills, seed=2, max_steps=15, **METHODS[method])


RESUMED = {
    "eta": {"on_policy": 0.5, "max_len": 60, "seed": 4},  # both kinds of update, before and after
    "cma, adapters": {"recipe": "v1", "lora": 4, "lora_dropout": 0.3, "lora_alpha": 16},
    "by length": {"bucket": True, "tokens_per_batch": 200, "on_policy": 0.5, "max_len": 60, "batch_size": 6,
                  "grad_accum": 2},
}  # the last over the end of an epoch, which is an update of four examples


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one(tiny_task, tmp_path, name):
    """Bit for bit: weights, projectors, adapters, optimiser and log, with dropout in the student."""
    options = {"max_steps": 6, "log_every": 1, **RESUMED[name]}
    train.main(command(tiny_task, tmp_path / "whole", **options))
    with stopped_by_ctrl_c():
        train.main(command(tiny_task, tmp_path / "parts", **options))
    assert step_of(tmp_path / "parts") == 2
    train.main(command(tiny_task, tmp_path / "parts", **options, resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    lines = [line for line in log_of(tmp_path / "whole") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    if name == "eta":
        kinds = [line["on_policy"] for line in lines]
        assert {0, 1} == set(kinds[2:]) and 1 in kinds[:2]


def test_a_run_is_known_by_its_directory(tiny_task, tmp_path, capsys, monkeypatch):
    """`--resume --out` alone goes on with the run that is there, not with the embedded task inside it; also if it was
    moved there, or --out is spelt in another way. --resume alone is about the embedded task, even inside a run."""
    train.main(command(tiny_task, tmp_path / "whole", max_steps=6, lr=1e-3))
    with stopped_by_ctrl_c():
        train.main(command(tiny_task, tmp_path / "parts", max_steps=6, lr=1e-3))
    with pytest.raises(SystemExit, match="parts holds another run .*: give another --out or, .* its whole command"):
        train.main(["--out", str(tmp_path / "parts")])
    for changed in ("--lr 0.1", "--temperature 3.0", "--kd-rate 0.1", "--divergence rkl", "--seed 1", "--warmup 1",
                    "--weight-decay 0.2", "--max-steps 7", "--max-len 99", "--chunk 7"):  # fmt: skip
        flag, value = changed.split()
        with pytest.raises(SystemExit, match=f"{flag} is '?{value}'?, but .* was started with .*parts/student further"):
            train.main(["--out", str(tmp_path / "parts"), "--resume", flag, value])
    record = json.loads((tmp_path / "parts" / "args.json").read_text())
    (tmp_path / "parts" / "args.json").write_text(json.dumps({**record, "shard": "both"}))  # as if by torchrun
    (tmp_path / "parts").rename(tmp_path / "moved")
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="--resume: runs/tiny holds no run"):
        patch.chdir(tmp_path / "moved")
        train.main(["--resume"])
    train.main(["--out", f"{tmp_path}/moved/", "--resume"])
    assert_same_run(tmp_path / "whole", tmp_path / "moved")
    again = train.parse(shlex.split(capsys.readouterr().err.splitlines()[-1].partition(" train.py ")[2]))
    assert (again["max_steps"], again["lr"], again["data"]) == (6, 1e-3, str(tiny_task / "train.jsonl"))


@pytest.mark.parametrize("before, free", [("cuda:0", True), ("cuda", True), ("cpu", False)])
def test_a_run_may_go_on_on_another_card(before, free):
    sizes = {"batch_size": 4, "grad_accum": 1, "processes": 1}
    found = checkpoint.free_options({**sizes, "device": "cuda:1"}, {**sizes, "device": before})
    assert ("device" in found) == free


def test_a_run_that_is_older_than_an_option_goes_on(tiny_task, tmp_path):
    """Older runs with LoRA adapted all layers."""
    options = {"on_policy": 1, "max_len": 60, "lora": 4, "max_steps": 3}
    train.main(command(tiny_task, tmp_path / "whole", **options, lora_targets="all-linear"))
    with stopped_by_ctrl_c():
        train.main(command(tiny_task, tmp_path / "run", **options, lora_targets="all-linear"))
    record = json.loads((tmp_path / "run" / "args.json").read_text())
    del record["on_policy_after"], record["lora_targets"]
    (tmp_path / "run" / "args.json").write_text(json.dumps(record))
    for changed, old in ({"on_policy_after": 1}, "0"), ({"lora_targets": "c_attn"}, r"\['all-linear'\]"):
        flag = "--" + next(iter(changed)).replace("_", "-")
        with pytest.raises(SystemExit, match=f"--resume: {flag} is .*, but .* was started with {old}"):
            train.main(command(tiny_task, tmp_path / "run", **options, **changed, resume=True))
    train.main(command(tiny_task, tmp_path / "run", **options, resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


# ---------------------------------------------------------------------------------------------------------------------
# The best checkpoint

SPOILT = {"max_steps": 6, "lr": 2.0, "warmup": 6}  # the learning rate rises until the student is spoilt


@pytest.mark.parametrize("keep_best, more", [("ce", {"dtype": "bf16"}), ("rouge", {"lora": 4})], ids=str)
def test_student_is_the_checkpoint_with_the_best_score(tiny_task, tmp_path, capsys, keep_best, more):
    """Of the three checkpoints not the last one, as scored here again, in float32; resume/ is of the last one."""
    run, name = tmp_path / "run", {"ce": "valid_ce", "rouge": "valid_rouge_l"}[keep_best]
    train.main(command(tiny_task, run, keep_best=keep_best, **{**SPOILT, **more}))
    scores = {line["step"]: line[name] for line in log_of(run) if name in line}
    step = (min if keep_best == "ce" else max)(scores, key=scores.get)
    assert step < 6 or keep_best == "rouge"  # of which the first scores are chance
    assert list(scores) == [2, 4, 6] and best_of(run) == {"step": step, name: scores[step]}
    assert f"student/ is from update {step}, which has the best {name}: {scores[step]:.4f}" in capsys.readouterr().err

    student, tokenizer = model.load_model(run / "student"), read_tokenizer(run / "student")
    examples = read_examples(tiny_task / "valid.jsonl")
    rows, _ = tokenise(examples, tokenizer, max_len=96, max_prompt_len=48)
    prompts = [example.prompt_text() for example in examples]
    if keep_best == "ce":
        again = evaluation.held_out_cross_entropy(student, rows, tokenizer.eos_id)
    else:  # sampled as eval.py does
        responses = evaluation.respond(student, tokenizer, prompts, 96 - 48, temperature=1.0, seed=42)
        again = evaluation.score(responses, examples)["rouge_l"]
    assert again == pytest.approx(scores[step], rel=1e-5)
    greedy = evaluation.respond(student, tokenizer, prompts[:5], train.SAMPLE_TOKENS)
    samples = (run / "samples.txt").read_text()
    assert all(f"{prompt}\n### response\n{reply}" in samples for prompt, reply in zip(prompts, greedy, strict=False))

    [line] = [line for line in log_of(run) if line["step"] == step and "valid_ce" in line]  # both scores are the best's
    card = (run / "student" / "README.md").read_text()
    assert all(f"held out: {key} {value:.4g}\n" in card for key, value in line.items() if key != "step")

    assert step_of(run) == 6
    projectors, last = load_file(run / "projectors.safetensors"), load_file(run / "resume" / "state.safetensors")
    assert torch.equal(projectors["t2s.weight"], last["projectors.t2s.weight"]) == (step == 6)  # they go with student/
    if "lora" in more:
        adapted = lora.merge(load_adapter(model.load_model(tiny_task / "student"), run / "adapter"))
        assert same(dict(adapted.named_parameters()), dict(student.named_parameters()))
    before = snapshot(run)
    train.main([*command(tiny_task, run, **{**SPOILT, **more}), "--resume"])  # nothing is left to do
    assert snapshot(run) == before


def test_held_out_examples_are_cut_as_those_to_train_on(tiny_task, tmp_path):
    short = {"method": "sft", "teacher": None, "valid": tiny_task / "train.jsonl", "max_len": 30, "max_prompt_len": 25}
    _, pieces = load_run(arguments(tiny_task, tmp_path, **short))
    assert [row.student for row in pieces.valid_rows] == [row.student for row in pieces.rows]
    assert max(len(row.student) for row in pieces.rows) == 30


@pytest.fixture(scope="module")
def best(tiny_task, tmp_path_factory):
    """A run of these options that nothing has stopped."""
    out = tmp_path_factory.mktemp("best") / "whole"
    train.main(command(tiny_task, out, keep_best="ce", **SPOILT))
    return out


@pytest.mark.parametrize("update, kept", [(1, None), (5, 2)])
def test_a_stopped_run_goes_on_from_its_last_state_and_keeps_the_best(
    tiny_task, best, tmp_path, at_call, monkeypatch, update, kept
):
    """Between two scores: student/ is the best one so far or, before the first score, the last one."""
    at_call("distil", update, send(signal.SIGTERM))
    with pytest.raises(SystemExit, match="143"):
        train.main(command(tiny_task, tmp_path / "run", keep_best="ce", **SPOILT))
    monkeypatch.undo()
    so_far = best_of(tmp_path / "run")
    assert step_of(tmp_path / "run") == update and (so_far and so_far["step"]) == kept
    if kept == best_of(best)["step"]:
        assert same(weights_of(tmp_path / "run"), weights_of(best))
    train.main([*command(tiny_task, tmp_path / "run", **SPOILT), "--resume"])
    assert_same_run(best, tmp_path / "run")


@pytest.mark.parametrize("keep_best, scorer", [("ce", "held_out_cross_entropy"), ("rouge", "score")])
def test_scores_that_are_no_numbers_or_no_better_are_not_the_best(tiny_task, tmp_path, monkeypatch, keep_best, scorer):
    scores = [math.nan, 6.0, math.inf, 6.0]
    found = iter([{"rouge_l": score} for score in scores] if scorer == "score" else scores)
    monkeypatch.setattr(train, scorer, lambda *arguments: next(found))
    train.main(command(tiny_task, tmp_path / "run", keep_best=keep_best, max_steps=8))
    assert best_of(tmp_path / "run") == {"step": 4, checkpoint.KEPT_BY[keep_best]: 6.0}


def test_what_is_best_may_not_change_between_two_parts_of_a_run(tiny_task, tmp_path):
    run = tmp_path / "run"
    train.main(command(tiny_task, run, keep_best="ce"))
    with pytest.raises(SystemExit, match="--resume: --keep-best is 'rouge', but .* was started with 'ce'"):
        train.main([*command(tiny_task, run, keep_best="rouge"), "--resume"])
    record = json.loads((run / "args.json").read_text())
    bests = 3, [], {"step": 2}, {"step": 2.5, "valid_ce": 1.0}, {"step": 2, "valid_ce": math.nan}
    others = ("batch_size", 0), ("processes", None), ("student_chat", "nowhere"), ("lr", "fast"), ("lr", True)
    for name, spoilt in (*(("best", best) for best in bests), *others):
        (run / "args.json").write_text(json.dumps({**record, name: spoilt}))
        with pytest.raises(SystemExit, match=f"args.json: .* is not a possible value of {name}"):
            train.main([*command(tiny_task, run), "--resume"])


# ---------------------------------------------------------------------------------------------------------------------
# Asked to stop


@pytest.fixture
def at_call(monkeypatch):
    """at_call(function, n, action): the n-th call of a function of these modules begins with action(its arguments)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests' own is ignored

    def arrange(name, call, action):
        module = next(module for module in (train, checkpoint, loading, parallel) if hasattr(module, name))
        function, count = getattr(module, name), itertools.count(1)

        def wrapper(*things, **options):
            if next(count) == call:
                action(*things)
            return function(*things, **options)

        monkeypatch.setattr(module, name, wrapper)

    yield arrange
    signal.signal(signal.SIGINT, before)


def send(*signals):
    """To this very process."""
    return lambda *_: [os.kill(os.getpid(), number) for number in signals]


STOPPED = {"max_steps": 5, "on_policy": 0.5, "max_len": 60, "batch_size": 10}


@pytest.fixture(scope="module")
def whole(tiny_task, tmp_path_factory):
    """A run of these options that nothing has stopped."""
    out = tmp_path_factory.mktemp("stopped") / "whole"
    train.main(command(tiny_task, out, **STOPPED))
    return out


@pytest.mark.parametrize(
    "name, call, numbers, step, words",
    [
        ("distil", 3, [signal.SIGTERM], 3, "stopped after update 3 of 5; the state is saved in"),
        ("held_out_cross_entropy", 1, [signal.SIGINT], 2, "stopped after update 2 of 5"),
        ("save_checkpoint", 2, [signal.SIGINT], 4, "stopped after update 4 of 5"),
        ("write_samples", 1, [signal.SIGTERM], 5, "stopped after the last update"),
        ("distil", 4, [signal.SIGINT] * 2, 2, "stopped at once\ncontinue with: python"),  # asked twice
        ("distil", 1, [signal.SIGINT] * 2, None, "stopped at once\ncontinue with: python"),
    ],
)
def test_asked_to_stop_a_run_saves_first(
    tiny_task, whole, tmp_path, at_call, monkeypatch, capsys, name, call, numbers, step, words
):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    at_call(name, call, send(*numbers))
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as caught:
        train.main(command(tiny_task, run, **STOPPED))
    monkeypatch.undo()
    assert caught.value.code == {signal.SIGINT: 130, signal.SIGTERM: 143}[numbers[0]]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    error = capsys.readouterr().err
    [line] = [line for line in error.splitlines() if line.startswith("continue with: python ")]
    assert words in error and line.endswith(" --resume") and str(run) in line
    assert (step_of(run) if (run / "resume" / "state.safetensors").is_file() else None) == step
    train.main(command(tiny_task, run, **STOPPED, resume=True))
    assert_same_run(whole, run)


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup
    try:
        with checkpoint.note_signals() as noted:
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert noted == []


def test_a_finished_stage_may_be_moved_and_name_what_it_left_open(tiny_task, tmp_path):
    options = {"method": "sft", "teacher": None, "max_steps": 1, "max_len": None, "max_prompt_len": None}
    o = train.Options(**train.parse(arguments(tiny_task, tmp_path / "one", **options)))
    train.run_stage(o, "teacher")
    o = dataclasses.replace(train.check_options(o), out=str((tmp_path / "one").rename(tmp_path / "two")))
    for same_updates in ({}, {"max_len": 128}, {"batch_size": 2, "grad_accum": 2}):
        assert checkpoint.is_finished(dataclasses.replace(o, **same_updates))
    for changed, was in (({"max_len": 100}, "max-len 128"), ({"batch_size": 2}, "batch-size 4")):
        with pytest.raises(ValueError, match=f"was trained with --{was}; give another --out"):
            checkpoint.is_finished(dataclasses.replace(o, **changed))


def test_stopped_while_loading_there_is_nothing_to_go_on_with(tiny_task, tmp_path, at_call, capsys):
    at_call("tokenise", 1, send(signal.SIGINT))
    with pytest.raises(SystemExit, match="130"):
        train.main(command(tiny_task, tmp_path / "run"))
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("there is nothing to resume yet; start again with: python")
    assert "--resume" not in message and not (tmp_path / "run").exists()
    assert checkpoint.say_how_to_go_on({"seed": 1}, ["--seed", "1"]).endswith(" --seed 1")  # the embedded task


# ---------------------------------------------------------------------------------------------------------------------
# Disks, files, other processes


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def test_a_full_disk_leaves_the_last_checkpoint(tiny_task, whole, tmp_path, at_call, monkeypatch):
    """A limit on the size of files, between the student's and the state's, stands for it; then writing really fails."""
    student = (whole / "student" / "model.safetensors").stat().st_size
    run, before, limits = tmp_path / "run", {}, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk(*_):
        before.update(snapshot(run))
        resource.setrlimit(resource.RLIMIT_FSIZE, (student + 1000, limits[1]))

    at_call("save_checkpoint", 2, fill_the_disk)
    try:
        with pytest.raises(SystemExit) as caught:
            train.main(command(tiny_task, run, **STOPPED))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    message = caught.value.code
    assert message.startswith(f"error: {run}") and "File too large" in message and "with --resume" in message
    assert snapshot(run) == before and step_of(run) == 2
    (run / "checkpoint.new" / "resume").mkdir(parents=True)  # as a run leaves it that is killed while it saves
    train.main([*command(tiny_task, run, **STOPPED), "--resume"])
    assert_same_run(whole, run)


def test_a_full_disk_leaves_the_text_that_was_there(tmp_path, monkeypatch):
    file = tmp_path / "args.json"
    checkpoint.write_text(file, "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "resume").mkdir()
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match=f"{file} could not be written .*File too large.* make room"):
            checkpoint.write_text(file, "new")
        with pytest.raises(OSError, match="resume/lock could not be written"), checkpoint.lock_directory(tmp_path):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert snapshot(tmp_path) == {"args.json": b"old", "resume/lock": b""}
    checkpoint.write_text(file, "new")
    assert file.read_text() == "new"


def test_the_first_checkpoint_appears_with_all_its_files(tiny_task, tmp_path, monkeypatch):
    """And the state after all the others: when it is moved, they are in their places, on the disk."""
    run, order = tmp_path / "run", []
    for name in ("replace", "fsync"):
        real = getattr(os, name)

        def noted(*paths, name=name, real=real):
            target = paths[1] if name == "replace" else os.readlink(f"/proc/self/fd/{paths[0]}")
            order.append((name, os.path.relpath(target, run)))
            return real(*paths)

        monkeypatch.setattr(os, name, noted)
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc")
    train.main(command(tiny_task, run, lora=2, keep_best="ce"))
    moved = order.index(("replace", "resume/state.safetensors"))
    named = [at for at, what in enumerate(order) if what == ("replace", "args.json")][-1]  # the best student
    places = "student", "adapter", "projectors.safetensors"
    assert max(order.index(("replace", place)) for place in places) < named < moved
    for place in places:
        assert order.index(("replace", place)) < order.index(("fsync", "."), order.index(("replace", place))) < moved
    for file in ("student/model", "adapter/adapter_model", "projectors", "resume/state"):
        synced = order.index(("fsync", f"checkpoint.new/{file}.safetensors"))
        assert synced < order.index(("replace", "adapter"))
    assert order.index(("fsync", "log.jsonl")) < moved < order.index(("fsync", "resume"), moved)


def test_the_student_has_every_file_of_its_tokenizer(tiny_task, tmp_path):
    student = shutil.copytree(tiny_task / "student", tmp_path / "model")
    names = {"special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model"}
    for name in names:
        (student / name).write_text("{}")
    train.main(command(tiny_task, tmp_path / "run", student=student, max_steps=1))
    assert names <= {file.name for file in (tmp_path / "run" / "student").iterdir()}


def test_a_cut_off_last_line_is_dropped_and_other_damage_named(tiny_task, tmp_path):
    log = tmp_path / "log.jsonl"
    lines = ['{"step": 1, "loss": 0.1}\n', '{"step": 2, "loss": 1e-07}\n', '{"step": 3, "lo']
    log.write_text("".join(lines))
    assert checkpoint.read_log(log) == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 1e-07}]
    checkpoint.Log(log, 2).write({"step": 3})
    assert log.read_text() == lines[0] + lines[1] + '{"step": 3}\n'
    checkpoint.Log(log, 1)
    assert log.read_text() == lines[0]
    for damage in ('{"step": 1, "lo\n', "\n", "[1]\n", '{"loss": 1}\n', '{"step": [2]}\n', "\0\0\n"):
        log.write_text(lines[0] + damage + lines[1])
        with pytest.raises(ValueError, match=f"{log}, line 2: not a JSON object with a step"):
            checkpoint.Log(log, 2)
        assert log.read_text() == lines[0] + damage + lines[1]


def test_one_process_at_a_time(tiny_task, tmp_path, monkeypatch):
    run = tmp_path / "run"
    train.main(command(tiny_task, run))
    held = f"{run} is in use by process {os.getpid()} on "
    with checkpoint.lock_directory(run), pytest.raises(SystemExit, match=held), monkeypatch.context() as patch:
        patch.setattr(train, "load", lambda o: pytest.fail("models were loaded first"))
        train.main([*command(tiny_task, run), "--resume"])
    words = [*command(tiny_task, run), "--resume"]
    train.main(words)
    assert checkpoint.say_how_to_go_on(train.parse(words), words).count("--resume") == 1
    assert (run / "resume" / "lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    (run / "args.json").unlink()
    shutil.rmtree(run / "student")
    with checkpoint.lock_directory(run), pytest.raises(SystemExit, match=held):
        train.main(command(tiny_task, run))


def test_a_disk_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    (tmp_path / "resume").mkdir()
    monkeypatch.setattr(fcntl, "flock", flock)
    with checkpoint.lock_directory(tmp_path):
        assert f"{tmp_path} cannot be locked (" in capsys.readouterr().err


def test_of_two_runs_that_load_at_the_same_time_one_gets_the_directory(tiny_task, tmp_path, at_call):
    run = tmp_path / "run"
    at_call("add_method", 1, lambda *_: train.main(command(tiny_task, run)))
    with pytest.raises(SystemExit, match=f"another run took {run} while"):
        train.main(command(tiny_task, run))
    assert step_of(run) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_number_that_is_not_finite_leaves_the_state_before_it(tiny_task, whole, tmp_path, at_call, monkeypatch, what):
    """On disk, exactly: without the cause, the run goes on as if there had been none (dropout's random state too)."""
    run = tmp_path / "run"

    def spoil(parameters, _):
        if what == "loss":
            raise FloatingPointError("t2s_ce is nan")
        parameters[0].grad[0] = math.inf

    at_call("clip_gradients", 4, spoil)
    with pytest.raises(SystemExit) as caught:
        train.main(command(tiny_task, run, **STOPPED))
    monkeypatch.undo()
    message, term = caught.value.code, {"loss": "t2s_ce is nan", "gradient": "the gradient's norm is"}[what]
    assert message.startswith(f"error: update 4: {term}") and f"the state before it is in {run}" in message
    assert f"({tiny_task / 'train.jsonl'}, lines " in message and message.count(",") > 8 and "--lr" in message
    assert step_of(run) == 3
    train.main([*command(tiny_task, run, **STOPPED), "--resume"])
    assert_same_run(whole, run)


def test_a_failure_in_the_first_update_leaves_nothing_of_it(tiny_task, whole, tmp_path, monkeypatch):
    """No moments either, which the optimiser has only after an update. Of a JSON array the message names the items."""
    data = tmp_path / "train.json"
    data.write_text(f"[{','.join((tiny_task / 'train.jsonl').read_text().splitlines())}]")

    def fail(*things):
        raise FloatingPointError("ce is nan")

    monkeypatch.setattr(train, "distil", fail)
    with pytest.raises(SystemExit, match=rf"update 1: ce is nan \({data}, items \d+, .*the state before it is in"):
        train.main(command(tiny_task, tmp_path / "run", **STOPPED, data=data))
    monkeypatch.undo()
    assert step_of(tmp_path / "run") == 0
    assert not any("exp_avg" in name for name in load_file(tmp_path / "run" / "resume" / "state.safetensors"))
    train.main([*command(tiny_task, tmp_path / "run", **STOPPED, data=data), "--resume"])
    assert_same_run(whole, tmp_path / "run")


def test_weights_that_are_not_finite_are_not_saved(tiny_task, tmp_path, at_call):
    run = tmp_path / "run"
    at_call("distil", 4, lambda o, pieces, *_: pieces.student.blocks[0].ln_2.weight.data[0].fill_(math.nan))
    with pytest.raises(SystemExit, match="update 4: ce is nan .*ln_2.weight was not finite before this update"):
        train.main(command(tiny_task, run, max_steps=5))
    assert step_of(run) == 2 and all(tensor.isfinite().all() for tensor in weights_of(run).values())


def test_a_gpu_without_enough_memory_is_one_error(tiny_task, tmp_path, at_call):
    """Which says what to do; and that can be done."""
    run = tmp_path / "run"

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    at_call("distil", 4, fail)
    told = "error: CUDA out of memory. Tried .* GiB\n--recompute, .* also with --resume"
    with pytest.raises(SystemExit, match=told):
        train.main(command(tiny_task, run, max_steps=5))
    assert step_of(run) == 2
    at_call("copy_into", 1, fail)  # the checkpoint is sound: nothing says to give it up
    with pytest.raises(SystemExit, match=told):
        train.main([*command(tiny_task, run, max_steps=5), "--resume"])
    train.main([*command(tiny_task, run, max_steps=5, recompute=True), "--resume"])
    assert step_of(run) == 5


# ---------------------------------------------------------------------------------------------------------------------
# Long runs


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_nothing_piles_up(tiny_task, tmp_path, monkeypatch):
    """As many tensors are alive before update 18 as before update 11, checkpoints and sampled responses included."""
    distil, counts = train.distil, []

    def counting(*things):
        counts.append(live_tensors() if len(counts) in (10, 17) else None)
        return distil(*things)

    monkeypatch.setattr(train, "distil", counting)
    monkeypatch.setattr(train, "prefetch", iter)  # no thread that is somewhere in the middle of the next batch
    options = {"max_steps": 18, "checkpoint_every": 5, "on_policy": 1, "max_len": 60}
    train.main(command(tiny_task, tmp_path / "run", **options))
    assert counts[10] == counts[17]


@pytest.mark.slow
def test_memory_does_not_grow(tiny_task, tmp_path, monkeypatch):
    """2,000 updates: over the second half the process grows by less than 10 MB. On-policy it grows by some 35 MB in the
    first 600, while sampling meets new lengths, then no more (measured to 4,000)."""
    distil, sizes = train.distil, []

    def measuring(*things):
        pages = Path("/proc/self/statm")
        sizes.append(int(pages.read_text().split()[1]) * resource.getpagesize() / 1e6 if pages.is_file() else 0)
        return distil(*things)

    monkeypatch.setattr(train, "distil", measuring)
    settings = {"max_steps": 2000, "checkpoint_every": 500, "max_len": 60, "on_policy": 1}
    train.main(arguments(tiny_task, tmp_path / "run", **settings))
    print(f"{sizes[200]:.0f} MB after 200 updates, {sizes[1000]:.0f} after 1,000, {sizes[-1]:.0f} after 2,000")
    assert sizes[-1] - sizes[1000] < 10
