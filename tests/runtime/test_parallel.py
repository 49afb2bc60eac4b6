"""Two processes on the CPU against one: the same losses and gradients, whole or sharded; runs that change their number
of processes; what a failing process leaves for the user to read."""

import faulthandler
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import arguments, log_of, make_model, same, stopped_by_ctrl_c
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

import eval as evaluation
import lora
import train
from baselines import seqkd
from experiments import memory
from fast import cache
from model import hidden_at, load_model, read_json
from runtime import parallel, strict
from runtime import run as checkpoint
from runtime.formats import read_examples
from runtime.peft import load_adapter
from runtime.tokenizer import read_tokenizer

ROOT = Path(__file__).parents[2]

# name: options. 7 examples in batches of 2: shares of 4 and 3. In batches of 1 the second process has one fewer forward
# pass to make, and takes part in it without an example.
CASES = {
    "sft": {"method": "sft"},
    "kd": {"method": "kd", "teacher": "twin", "batch_size": 1},
    "eta": {"align": "eta"},
    "cma": {"align": "cma", "recipe": "v1"},
    "cma, one by one": {"align": "cma", "recipe": "v1", "batch_size": 1},
    "uld": {"method": "uld", "batch_size": 1},
    "cma, sharded teacher": {"align": "cma", "recipe": "v1", "shard": "teacher"},
    "sft, sharded": {"method": "sft", "shard": "student", "batch_size": 1},
    "eta, both sharded": {"align": "eta", "shard": "both", "batch_size": 1},
    "v2, both sharded, sampled": {"teacher": "twin", "on_policy": 1.0, "shard": "both", "batch_size": 1},
    "v2 that agrees": {"teacher": "student"},  # in most of its predictions, see one_update
    "v2 that agrees, sharded, one by one": {"teacher": "student", "batch_size": 1, "shard": "both"},
    "eta, by tokens": {"align": "eta", "tokens_per_batch": 100, "shard": "teacher"},
    "eta, both sharded, bf16": {"align": "eta", "shard": "both", "dtype": "bf16", "batch_size": 4},  # a pass each
    "eta, adapters of one row sharded": {"align": "eta", "shard": "both", "lora": 1, "lora_dropout": 0.0},
}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def one_update(task: Path, case: str, sharded: bool = True) -> tuple[dict, dict]:
    """Terms and whole gradients of an update over the first 7 examples, of as many processes as there are."""
    options = {"student": str(task / "student"), "data": str(task / "train.jsonl"), "device": "cpu", "max_len": 96,
               "max_prompt_len": 48, "batch_size": 2, **CASES[case]}  # fmt: skip
    if options.get("method") != "sft":
        options["teacher"] = str(task / options.get("teacher", "teacher"))
    o = train.check_options(train.Options(**options if sharded else options | {"shard": None}))
    pieces = train.load(o)
    train.add_method(o, pieces)
    indices = list(range(7))
    count = max(map(len, pieces.split(o, list(range(7)))))
    own = parallel.share(indices, parallel.rank())
    rows, sampled = [pieces.rows[i] for i in own], [pieces.rows[i + 7] for i in own]  # the latter as if sampled
    # The second matrix of an adapter starts at 0, and the first has no gradient then. One near its teacher agrees.
    generator = torch.Generator().manual_seed(0)
    for name, p in pieces.student.named_parameters():
        if name.endswith("lora_B") or "agrees" in case:
            with torch.no_grad():
                noise = torch.randn(p.shape, generator=generator)
                parallel.copy_into(p, whole(p) + (0.1 if o.lora else 0.01) * noise)
    batches = pieces.batches(rows, o, count), pieces.batches(sampled, o, count) if o.on_policy else None
    terms = train.distil(o, pieces, pieces.student, *batches)
    named = {**dict(pieces.student.named_parameters()), **dict(pieces.method.named_parameters())}
    trained = [p for p in named.values() if p.requires_grad]
    gradients = {name: whole(p.grad).clone() for name, p in named.items() if p.grad is not None}
    assert len(gradients) == len(trained)
    terms["norm"] = parallel.clip_gradients(trained, 0.01)
    terms["clipped norm"] = parallel.clip_gradients(trained, math.inf)
    return terms, gradients


TIMES = ("tokens_per_second", "generation_share", "generation_tokens_per_second")
RUN = {"max_steps": 4, "checkpoint_every": 2}  # updates over 4 examples, the last of every ten over 4 too
DROPOUT = {"student": "dropout", "shard": "both", "batch_size": 2}
DROPOUT |= {"on_policy": 0.5, "seed": 5, "max_len": 60}  # updates 1, 2 and 4 are on-policy; it is resumed after 2
DROPOUT |= {"log_every": 3, "checkpoint_every": 4}


def options_of(task: Path, out: Path, **changed) -> train.Options:
    words = arguments(task, out, **{**RUN, **changed, "student": task / changed.get("student", "student")})
    return train.Options(**train.parse(words))


def bytes_held(task: Path, out: Path) -> dict[str, int]:
    """What this process keeps of both models between two updates."""
    o = train.check_options(options_of(task, out, shard="both", method="kd", teacher=task / "twin"))
    pieces = train.load(o)
    train.add_method(o, pieces)
    optimizer = train.make_optimizer(o, pieces)
    batches = pieces.batches(pieces.rows[:4], o)
    train.distil(o, pieces, pieces.student, batches)
    optimizer.step()
    with parallel.gather_parameters(pieces.student):  # as to sample: it is split again behind it, and by a forward pass
        assert not any(isinstance(p, DTensor) for p in pieces.student.parameters())
    assert all(isinstance(p, DTensor) for p in pieces.student.blocks.parameters() if p.dim() >= 2)
    with torch.no_grad():
        hidden_at(pieces.student, batches[0].student)
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    of_student = [*pieces.student.parameters(), *(p.grad for p in pieces.student.parameters()), *moments]
    tensors = {"student": of_student, "teacher": pieces.method.teacher.parameters()}
    return {name: sum(parallel.local_part(x).nbytes for x in part) for name, part in tensors.items()}


def cached(out: Path) -> dict:
    """Options. The second process has no held-out example."""
    held_out = {"valid": out / "one.jsonl", "keep_best": "rouge"}
    return {"cache_teacher": out / "cache", "bucket": True, "tokens_per_batch": 100, **held_out}


def runs_of_two(task: Path, out: Path) -> None:
    elsewhere = out / ("two" if parallel.rank() == 0 else "not mine")
    student = "student" if parallel.rank() == 0 else out / "other"  # all start with the weights of the first process
    train.train(options_of(task, elsewhere, batch_size=2, valid=task / "valid.jsonl", student=student))
    train.train(options_of(task, out / "one, two", batch_size=2, resume=True, shard="both"))
    with stopped_by_ctrl_c():
        train.train(options_of(task, out / "two, one", batch_size=1, grad_accum=2, shard="both"))
    train.train(options_of(task, out / "whole", **DROPOUT))
    log = checkpoint.RunDirectory.log

    def log_and_signal(run, done: int, *rest) -> None:
        log(run, done, *rest)
        if done == 2 and parallel.rank() == 1:  # alone
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(checkpoint.Stopped, match="after update 2 of 4"):
        patch.setattr(checkpoint.RunDirectory, "log", log_and_signal)
        train.train(options_of(task, out / "parts", **DROPOUT))
    train.train(options_of(task, out / "parts", **DROPOUT, resume=True, recompute=True))
    adapters = {"method": "sft", "lora": 3, "lora_targets": "mlp.c_proj,c_attn", "lr": 1, "shard": "student"}
    adapters |= {"keep_best": "rouge", "checkpoint_every": 1, "valid": task / "valid.jsonl"}
    train.train(options_of(task, out / "adapters", **adapters, batch_size=2))
    sampled = {"on_policy": 1, "max_len": 60, "teacher": task / "twin", "valid": task / "valid.jsonl"}
    # every second update is over one example, and none for the second process
    sampled |= {"data": out / "five.jsonl", "student": out / "two layers"}
    train.train(options_of(task, out / "bf16", **sampled, shard="both", batch_size=2, dtype="bf16"))
    train.train(options_of(task, out / "seqkd", method="seqkd", batch_size=2))
    (out / f"held {parallel.rank()}.json").write_text(json.dumps(bytes_held(task, out / "held")))
    train.train(options_of(task, out / "cached", **cached(out), batch_size=2, shard="student"))


def process(number: int, task: Path, port: int, out: Path) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(600, exit=True)  # where they wait for each other
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2",
                   "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}  # fmt: skip
    with parallel.session():
        with parallel.main_first():
            time.sleep(1 - number)
            (out / f"{number} came").touch()
            assert (out / "0 came").exists()
        if number > 0:  # neither the teacher's answers nor its states are computed twice
            seqkd.answer_prompts = cache.load_model = None
        for case in CASES:
            terms, gradients = one_update(task, case)
            (out / f"{case} {number}.json").write_text(json.dumps(terms))
            save_file({name: value.contiguous() for name, value in gradients.items()}, out / f"{case} {number}.st")
        runs_of_two(task, out)
    parallel.leave()  # as the command line does


@pytest.fixture(scope="module")
def out(tiny_task, tmp_path_factory):
    """A directory with what two processes made: the terms and gradients of every case, and all runs."""
    out = tmp_path_factory.mktemp("two")
    with stopped_by_ctrl_c():
        train.train(options_of(tiny_task, out / "one, two", batch_size=4))
    make_model(tiny_task / "student", out / "two layers", n_layer=2)
    make_model(tiny_task / "student", out / "other", seed=9)
    (out / "five.jsonl").write_text("".join((tiny_task / "train.jsonl").read_text().splitlines(keepends=True)[:5]))
    (out / "one.jsonl").write_text((tiny_task / "valid.jsonl").read_text().splitlines(keepends=True)[0])
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, (tiny_task, port, out), nprocs=2)
    return out


@pytest.fixture(scope="module")
def one(tiny_task, tmp_path_factory):
    """The same run as "two", by one process."""
    one = tmp_path_factory.mktemp("one") / "run"
    train.train(options_of(tiny_task, one, batch_size=4, valid=tiny_task / "valid.jsonl"))
    return one


def same_log(a: list[dict], b: list[dict], rel: float = 1e-4) -> bool:
    for lines in (a, b):
        for line in lines:
            for name in ("tokens_per_second", "compilations"):
                line.pop(name, None)
    return len(a) == len(b) and all(x == pytest.approx(y, rel=rel) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one_with_the_same_examples(tiny_task, out, case):
    expected, expected_gradients = one_update(tiny_task, case, sharded=False)
    rel = 2e-2 if "bf16" in case else 1e-5
    for number in (0, 1):
        terms = json.loads((out / f"{case} {number}.json").read_text())
        gradients = load_file(out / f"{case} {number}.st")
        assert terms.keys() == expected.keys() and gradients.keys() == expected_gradients.keys()
        assert terms == pytest.approx(expected, rel=rel, abs=1e-7)
        for name, gradient in expected_gradients.items():
            if gradient.abs().max() > 1e-5 or rel == 1e-5:  # in bf16 a gradient that is 0 is noise
                atol = rel * float(gradient.abs().max())
                torch.testing.assert_close(gradients[name], gradient, rtol=rel, atol=atol)
        if "bf16" in case:  # the sum of both parts is in float32
            matrix = gradients["blocks.0.mlp.c_fc.weight"]
            assert not torch.equal(matrix, matrix.bfloat16().float())
        assert "agrees" not in case or 0.1 < terms["t2s_agreement"] < 1 and terms["t2s_kd"] > 0
        assert terms["clipped norm"] == pytest.approx(0.01, rel=1e-4)


def test_a_run_of_two_processes_is_that_of_one(out, one):
    assert same_log(log_of(out / "two"), log_of(one)) and "valid_ce" in log_of(one)[-1]
    assert {path.name for path in (out / "two").iterdir()} == {path.name for path in one.iterdir()}
    states = [load_file(path / "resume" / "state.safetensors") for path in (out / "two", one)]
    shapes = [{name: value.shape for name, value in state.items() if name != "random.cpu"} for state in states]
    assert shapes[0] == shapes[1]
    assert [len(state["random.cpu"]) for state in states] == [2, 1]
    assert not torch.equal(*states[0]["random.cpu"])
    assert not (out / "not mine").exists()  # only the first process writes
    card = (out / "two" / "student" / "README.md").read_text()
    assert "batch_size 2, grad_accum 1, processes 2," in card and "    torchrun --nproc_per_node=2 train.py " in card


def test_one_process_then_two_sharded_ones(out, one):
    assert same_log(log_of(out / "one, two"), [line for line in log_of(one) if "loss" in line])
    state = load_file(out / "one, two" / "resume" / "state.safetensors")
    whole = load_file(one / "resume" / "state.safetensors")
    assert {name: value.shape for name, value in state.items() if name != "random.cpu"} == {
        name: value.shape for name, value in whole.items() if name != "random.cpu"
    }


def test_two_sharded_processes_then_one(tiny_task, out, one):
    options = options_of(tiny_task, out / "two, one", resume=True, batch_size=2)
    with pytest.raises(ValueError, match="covers 4 examples, .* makes 2: use --batch-size 1 --grad-accum 4"):
        train.train(options)
    train.train(options_of(tiny_task, out / "two, one", resume=True, batch_size=2, grad_accum=2))
    assert same_log(log_of(out / "two, one"), [line for line in log_of(one) if "loss" in line])


def test_a_resumed_run_of_as_many_processes_is_bit_exact(out):
    """Dropout and samples of every process included, and sharded, with activations kept or recomputed. A signal to one
    process stops all."""
    for file in ("resume/state", "student/model", "projectors"):
        assert same(*(load_file(out / name / f"{file}.safetensors") for name in ("whole", "parts")))
    random = load_file(out / "parts" / "resume" / "state.safetensors")["random.cpu"]
    assert not torch.equal(*random)
    logs = [log_of(out / name) for name in ("whole", "parts")]
    assert [line["on_policy"] for line in logs[0]] == [1, 0, 1] and logs[0][1]["sampled_length"] > 1
    without_times = [[{**line, **dict.fromkeys(TIMES)} for line in log] for log in logs]
    assert without_times[0] == without_times[1]


def test_sharded_adapters_are_saved_whole(tiny_task, out):
    adapted = load_adapter(load_model(tiny_task / "student"), out / "adapters" / "adapter")
    assert {name.split(".", 2)[2] for name in lora.adapted_layers(adapted)} == {"attn.c_attn", "mlp.c_proj"}
    merged = dict(lora.merge(adapted).named_parameters())
    saved = dict(load_model(out / "adapters" / "student").named_parameters())
    assert same(merged, saved) and not same(saved, dict(load_model(tiny_task / "student").named_parameters()))


def test_the_best_checkpoint_is_by_the_answers_of_all_processes(tiny_task, out):
    """Each process answers every other held-out prompt."""
    run = out / "adapters"
    scores = {line["step"]: line["valid_rouge_l"] for line in log_of(run) if "valid_rouge_l" in line}
    step = max(scores, key=scores.get)
    assert len(scores) == 4 and read_json(run / "args.json")["best"] == {"step": step, "valid_rouge_l": scores[step]}
    student, tokenizer = load_model(run / "student"), read_tokenizer(run / "student")
    examples, total = read_examples(tiny_task / "valid.jsonl"), 0.0
    for share in (examples[::2], examples[1::2]):
        prompts = [example.prompt_text() for example in share]
        responses = evaluation.respond(student, tokenizer, prompts, 96 - 48, temperature=1.0, seed=42)
        total += len(share) * evaluation.score(responses, share)["rouge_l"]
    assert total / len(examples) == pytest.approx(scores[step])


def test_sharded_processes_sample_at_their_own_pace_and_save_float32(out):
    log = log_of(out / "bf16")
    lines = [line for line in log if "loss" in line]
    assert len(lines) == 4 and all(math.isfinite(line["valid_ce"]) for line in log if "valid_ce" in line)
    for line, examples in zip(lines, (4, 1, 4, 1), strict=True):
        assert line["on_policy"] == 1 and line["sampled_length"] * examples == line["student_tokens"]
    saved, trained = load_file(out / "bf16/student/model.safetensors"), load_file(out / "bf16/resume/state.safetensors")
    assert torch.equal(saved["transformer.ln_f.weight"], trained["student.norm.weight"])
    weight = saved["transformer.h.0.mlp.c_fc.weight"]
    assert torch.equal(weight.T, trained["student.blocks.0.mlp.c_fc.weight"])
    assert not torch.equal(weight, weight.bfloat16().float())


def test_seqkd_waits_for_the_answers_of_the_first_process(out):
    assert len((out / "seqkd" / "seqkd.jsonl").read_text().splitlines()) > 30 and len(log_of(out / "seqkd")) == 4


def test_cached_states_and_batches_by_length(tiny_task, out, tmp_path):
    train.train(options_of(tiny_task, tmp_path / "one", **cached(out), batch_size=4))
    assert same_log(log_of(out / "cached"), log_of(tmp_path / "one"))


def test_memory_py_knows_what_a_device_holds(tiny_task, out):
    student, teacher = (memory.counts(read_json(tiny_task / name / "config.json")) for name in ("student", "twin"))
    for number in (0, 1):
        held = json.loads((out / f"held {number}.json").read_text())
        assert held["student"] == memory.student_bytes(student, 2) - 2 * 2 * student.block  # but the copies in bf16
        assert held["teacher"] == 2 * (memory.teacher_bytes(teacher, 2) - 2 * 2 * teacher.block)  # here in float32


@pytest.mark.slow
def test_the_docs_have_the_table_of_memory_py(capsys):
    memory.main([])
    assert capsys.readouterr().out.strip() in (ROOT / "docs" / "multi_gpu.md").read_text(encoding="utf-8")


def torchrun(*words) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)


FAILING = """
import os, train
inner, calls = train.distil, []
def distil(*things):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 2:
        raise RuntimeError("the fan has stopped")
    return inner(*things)
train.distil = distil
train.main()
"""


@pytest.mark.slow
def test_a_failing_process_ends_the_run_with_its_error(tiny_task, tmp_path):
    """The other process, which waits for it in the middle of an update, ends too, and says nothing of that."""
    (tmp_path / "failing.py").write_text(FAILING)
    result = torchrun(tmp_path / "failing.py", *arguments(tiny_task, tmp_path / "run", max_steps=6))
    error = result.stderr
    assert result.returncode != 0 and "RuntimeError: the fan has stopped" in error
    assert error.rstrip().splitlines()[-3].strip() == "RuntimeError: the fan has stopped"  # torchrun's last words
    assert not any(word in error.lower() for word in ("gloo", "connection closed", "timed out"))
    assert len(log_of(tmp_path / "run")) == 1


@pytest.mark.slow
def test_the_command_line_speaks_with_one_voice(tiny_task, tmp_path):
    options = {"shard": "both", "valid": tiny_task / "valid.jsonl"}
    result = torchrun(ROOT / "train.py", *arguments(tiny_task, tmp_path / "run", **options))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"student: {tmp_path / 'run' / 'student'}"]
    assert result.stderr.count("train: 40 examples") == 1 and "Warning" not in result.stderr
    result = torchrun(ROOT / "train.py", *arguments(tiny_task, tmp_path / "run"))
    # perhaps before the end of a line of the other process; torchrun repeats it after "traceback : "
    assert len(re.findall("(?<!: )error: ", result.stderr)) == 1, result.stderr
    assert "already holds a run" in result.stderr.rstrip().splitlines()[-2]  # torchrun's last words
    assert not re.search(r"(train|runtime.*)\.py\", line", result.stderr)  # no traceback but torchrun's own


@pytest.mark.slow
def test_ctrl_c_saves_before_it_ends(tiny_task, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py"]
    words = arguments(tiny_task, tmp_path / "run", max_steps=100_000, shard="both")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen([*map(str, command), *words], stderr=subprocess.PIPE, text=True, env=environment)
    while not (tmp_path / "run" / "log.jsonl").is_file() or len(log_of(tmp_path / "run")) < 3:
        time.sleep(0.2)
    started.send_signal(signal.SIGINT)
    error = started.communicate(timeout=200)[1]
    assert "(torchrun allows 30 seconds for that, or its --shutdown-timeout)" in error
    assert "stopped after update" in error and "continue with: torchrun --nproc_per_node=2" in error
    done = log_of(tmp_path / "run")[-1]["step"]
    with safe_open(tmp_path / "run" / "resume" / "state.safetensors", "pt") as file:
        assert int(file.metadata()["step"]) == done


SAMPLING = """
import os, signal, time, train
def respond(*things, **options):
    os.kill(os.getppid(), signal.SIGINT)  # of torchrun
    time.sleep(2)
    return [""] * 5
train.respond = respond
train.main()
train.parallel.leave()
"""


@pytest.mark.slow
def test_ctrl_c_while_the_first_process_writes_samples(tiny_task, tmp_path):
    """The others, which have nothing left to do, wait for it, and say nothing of its end."""
    (tmp_path / "sampling.py").write_text(SAMPLING)
    error = torchrun(tmp_path / "sampling.py", *arguments(tiny_task, tmp_path / "run")).stderr
    assert "stopped after the last update; the state is saved" in error
    assert not any(word in error for word in ("gloo", "KeyboardInterrupt", "rank1"))


@pytest.mark.slow
def test_compiled_blocks(tiny_task, tmp_path):
    compiled = {"compile": True}
    for name, options in {"eager": {}, "compiled": compiled, "recomputed": {**compiled, "recompute": True}}.items():
        result = torchrun(ROOT / "train.py", *arguments(tiny_task, tmp_path / name, shard="both", **options))
        assert result.returncode == 0, result.stderr
    assert same_log(log_of(tmp_path / "compiled"), log_of(tmp_path / "eager"))
    assert same_log(log_of(tmp_path / "recomputed"), log_of(tmp_path / "eager"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"shard": "both"}, "--shard both splits weights over processes: start with torchrun"),
        ({"shard": "teacher", "by_torchrun": True, "method": "sft"}, "--shard teacher: --method sft trains without"),
        ({"shard": "both", "by_torchrun": True, "method": "seqkd"}, "--shard both: --method seqkd trains without"),
        ({"by_torchrun": True, "dry_run": True}, "--dry-run runs in one process"),
        ({"by_torchrun": True, "device": "cuda:0"}, "--device cuda:0: torchrun gives each process its own device"),
        ({"by_torchrun": True, "shard": "teacher", "cache_teacher": "c"}, "only an unsharded teacher"),
        ({"by_torchrun": True, "device": None, "cards": 1}, "more processes than there are CUDA devices .1."),
    ],
)
def test_what_cannot_be_says_why(tiny_task, tmp_path, monkeypatch, options, message):
    options = dict(options)
    if options.pop("by_torchrun", False):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
        monkeypatch.setenv("LOCAL_RANK", "1")
    cards = options.pop("cards", 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    with pytest.raises(ValueError, match=message):
        train.check_options(options_of(tiny_task, tmp_path / "run", **options))


def test_each_process_has_a_card_of_its_own(tiny_task, tmp_path, monkeypatch):
    """And keeps it where the options are checked again, as a run does."""
    for name, value in (("TORCHELASTIC_RUN_ID", "test"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(strict, "choose_device", lambda index=0: ("cuda", ""))
    o = options_of(tiny_task, tmp_path / "run", device=None, dtype="fp32")
    for _ in range(2):
        o = train.check_options(o)
        assert o.device == "cuda:1"


def test_an_update_that_cannot_be_split_says_so(tiny_task, tmp_path, monkeypatch):
    with stopped_by_ctrl_c():
        train.train(options_of(tiny_task, tmp_path / "run", batch_size=4))
    monkeypatch.setattr(parallel, "world", lambda: 3)
    with pytest.raises(ValueError, match="3 process.es. makes 12, and that number of processes does not divide 4"):
        train.check_directory(train.check_options(options_of(tiny_task, tmp_path / "run", batch_size=4, resume=True)))
    monkeypatch.setattr(parallel, "world", lambda: 2)
    with pytest.raises(ValueError, match="2 process.es. makes 8: use --batch-size 2 --grad-accum 1$"):
        train.check_directory(train.check_options(options_of(tiny_task, tmp_path / "run", batch_size=4, resume=True)))


@pytest.fixture
def stopped(tiny_task, tmp_path):
    """The options of a run that one process stopped behind an update with samples, before it was logged."""
    options = {"teacher": tiny_task / "twin", "on_policy": 1, "max_len": 60, "log_every": 4}
    with stopped_by_ctrl_c():
        train.train(options_of(tiny_task, tmp_path / "run", **options))
    return options_of(tiny_task, tmp_path / "run", **options, resume=True)


def test_the_counts_of_a_checkpoint_are_taken_up_once(stopped, monkeypatch):
    """And the times by each process, since each divides by its own."""
    o = train.check_options(stopped)
    pieces = train.load(o)
    train.add_method(o, pieces)
    meters = []
    monkeypatch.setattr(parallel, "world", lambda: 2)
    for number in (0, 1):
        monkeypatch.setattr(parallel, "rank", lambda number=number: number)
        meters.append(checkpoint.restore_checkpoint(o, pieces, train.make_optimizer(o, pieces))[1])
    assert meters[0]["responses"] > 0 and not meters[1].keys() & {"tokens", "generated", "responses"}
    assert 0 < meters[0]["generating"] == meters[1]["generating"]


def test_a_directory_that_processes_do_not_share(stopped, monkeypatch):
    monkeypatch.setattr(parallel, "highest", lambda number: 2 * number)  # another process goes on elsewhere
    with pytest.raises(ValueError, match="run is not the same directory in all processes; they need a shared one"):
        train.train(stopped)


def test_processes_draw_and_sample_differently(tiny_task, tmp_path, monkeypatch):
    """And differently from another update on. If one of them cannot sample, all end."""
    o = train.check_options(options_of(tiny_task, tmp_path / "run", max_len=60))
    pieces = train.load(o)
    train.add_method(o, pieces)
    draws, samples = set(), set()
    for number in (0, 1):
        monkeypatch.setattr(parallel, "rank", lambda number=number: number)
        for step in (0, 7):
            parallel.seed_process(1, step)
            draws.add(float(torch.rand(())))
            samples.add(tuple(train.sample_rows(o, pieces, pieces.rows[:1], step)[0][0].student.response))
    assert len(draws) == len(samples) == 4
    monkeypatch.setattr(parallel, "highest", lambda number: 1)
    with pytest.raises(FloatingPointError, match="the logits of another process are not finite"):
        train.sample_rows(o, pieces, pieces.rows[:1], 0)
