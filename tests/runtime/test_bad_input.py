"""Whatever is wrong with the input of `train.py` is one clear line, before any update and before --out exists."""

import json
import os
import shutil

import pytest
import torch
from helpers import arguments, make_model
from safetensors.torch import save_file

import train
from experiments import tiny
from runtime import load as loading


@pytest.fixture
def command(tiny_task, tmp_path, capsys, monkeypatch):
    """command(option=value, ...): what that run is refused with. None removes an option, True is a flag."""
    monkeypatch.chdir(tmp_path)

    def run(**changes):
        usual = {"log_every": None, "max_steps": 1, "batch_size": 2}
        train.main(arguments(tiny_task, tmp_path / "run", **{**usual, **changes}))

    def refused(**changes):
        before = sorted(tmp_path.rglob("*"))
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
            patch.setattr(train, "distil", lambda *arguments: pytest.fail("an update was begun"))
            run(**changes)
        assert sorted(tmp_path.rglob("*")) == before  # nothing made, not even an empty --out
        if caught.value.code == 2:  # argparse
            return capsys.readouterr().err.strip().splitlines()[-1]
        message = caught.value.code
        assert message.startswith("error: ") and "\n" not in message and len(message) < 600
        return message

    refused.run = run
    return refused


@pytest.fixture
def copy(tiny_task, tmp_path):
    """copy(name): a directory of the tiny task, to be spoilt."""
    return lambda name: shutil.copytree(tiny_task / name, tmp_path / f"spoilt-{name}")


def contains(message, *parts):
    for part in parts:
        assert part in message, message
    return True


@pytest.fixture
def nothing_loaded(monkeypatch):
    """Fails the test if a model is loaded: what options and tokenizers tell is told before that."""
    monkeypatch.setattr(loading, "load_model", lambda *arguments, **options: pytest.fail("a model was loaded"))


# ---------------------------------------------------------------------------------------------------------------------
# Models, tokenizers and data. What else can be wrong: test_hub.py, test_strict.py, test_tokenizer.py, test_formats.py


@pytest.mark.parametrize("role, rows, expected", [
    ("student", 500, "ids up to 899, the model has 500 embeddings"),
    ("teacher", 32000, "the model has 32000 embeddings"),
])  # fmt: skip
def test_tokenizer_of_another_model(command, tiny_task, tmp_path, role, rows, expected):
    directory = make_model(tiny_task / role, tmp_path / role, vocab_size=rows)
    assert contains(command(**{role: directory}), str(directory), expected, "do not belong together")


@pytest.mark.parametrize("damage", [("}", ""), ('"special_tokens":{', '"special_tokens":{}, "other":{')])
def test_malformed_tokenizer(command, copy, nothing_loaded, damage):
    """At the second the library panics, in Rust."""
    directory = copy("teacher")
    content = json.dumps(json.loads((directory / "tokenizer.json").read_text()), separators=(",", ":"))
    assert damage[0] in content
    (directory / "tokenizer.json").write_text(content.replace(*damage, 1))
    assert contains(command(teacher=directory), f"{directory / 'tokenizer.json'}: cannot be read as a tokenizer")


def test_a_student_beyond_the_memory(command, tiny_task, monkeypatch):
    def load_model(*arguments, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(loading, "load_model", load_model)
    assert contains(command(), f"{tiny_task / 'student'}: the model does not fit into memory (DefaultCPUAllocator")


@pytest.mark.parametrize("option", ["data", "valid"])
def test_malformed_data(command, tmp_path, nothing_loaded, option):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "Which fox?", "output": "This fox."}\n{"prompt": "p"}\n')
    assert contains(command(**{option: path}), f"{path}, line 2: the response is missing")


# ---------------------------------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize(
    "option, value",
    [("temperature", 0), ("temperature", -1), ("temperature", "nan"), ("temperature", "inf"), ("kd_rate", 2),
     ("kd_rate", -0.1), ("kd_rate", "nan"), ("batch_size", 0), ("grad_accum", 0), ("epochs", 0), ("max_steps", -1),
     ("lr", 0), ("lr", "nan"), ("lr", "inf"), ("clip", 0), ("weight_decay", -1), ("weight_decay", "nan"),
     ("weight_decay", "inf"), ("projector_lr", "nan"), ("projector_lr", -1), ("warmup", -1), ("max_len", 1),
     ("max_prompt_len", 0), ("chunk", -1), ("seed", -1), ("seed", 2**32), ("log_every", 0), ("checkpoint_every", -1),
     ("lora", -1), ("lora", 2**16), ("epochs", 2**31), ("batch_size", 10**30), ("seqkd_temperature", 9e-4),
     ("tokens_per_batch", -1),
     ("on_policy_after", -1), ("on_policy_after", 2**31), ("on_policy", -0.1), ("on_policy", 50), ("on_policy", "nan"),
     ("on_policy", "inf")],
)  # fmt: skip
def test_values_out_of_range(command, nothing_loaded, option, value):
    flag = "--" + option.replace("_", "-")
    assert contains(command(**{option: value}), f"error: {flag} ", "must be")


@pytest.mark.parametrize(
    "option, value",
    [("method", "magic"), ("recipe", "v3"), ("align", "dtw"), ("divergence", "kl"), ("dtype", "fp8"),
     ("batch_size", 1.5), ("lr", "fast"), ("no_such_option", 1)],
)  # fmt: skip
def test_values_of_the_wrong_kind(command, nothing_loaded, option, value):
    assert contains(command(**{option: value}), "error: ", "--" + option.replace("_", "-"), str(value))


@pytest.mark.parametrize("missing", ["teacher", "student", "data"])
def test_missing_options(command, nothing_loaded, missing):
    assert contains(command(**{missing: None}), f"--{missing} is missing: --method dskd needs it")
    resumed = command(**{missing: None}, resume=True)
    assert contains(resumed, f"--{missing} is missing", "--out and --resume alone") and "tiny" not in resumed


SAMPLES = "--on-policy works only with --method kd and dskd; --method"
TOGETHER = [
    ({"method": "kd"}, "--method kd needs vocabularies of one family", "--method dskd"),
    ({"align": "none"}, "--align none needs vocabularies of one family", "--align eta"),
    ({"recipe": "v1", "align": "eta"}, "--align eta needs --recipe v2"),
    ({"recipe": "v2", "align": "cma"}, "--align cma needs --recipe v1"),
    ({"method": "kd", "align": "eta"}, "leave out --align eta, or use --method dskd", "--method kd"),
    ({"method": "uld", "align": "eta"}, "leave out --align eta, or use --method dskd", "position by position"),
    ({"method": "mined", "align": "none"}, "--align none", "--method mined pairs tokens itself", "by edit distance"),
    ({"method": "uld", "divergence": "js"}, "--divergence js: --method uld compares sorted"),
    ({"method": "mined", "divergence": "rkl"}, "--divergence rkl: --method mined", "only the forward KL"),
    ({"method": "seqkd", "teacher": None}, "--teacher is missing"),
    ({"seqkd_temperature": 1.0}, "--seqkd-temperature works only with --method seqkd"),
    *[({"method": name, "projectors": "p"}, "--projectors works only with --method dskd") for name in ("sft", "seqkd")],
    *[({"method": name, "on_policy": 0.5}, f"{SAMPLES} {name} ") for name in ("sft", "uld", "mined", "seqkd")],
    ({"recipe": "v1", "on_policy": 1}, "--on-policy needs --recipe v2: v1 uses the response as the label"),
    ({"dry_run": True, "on_policy": 1}, "--dry-run uses the gold responses"),
    ({"dry_run": True, "resume": True}, "--dry-run does not read a run's state", "leave out --resume"),
    ({"on_policy_after": 3}, "--on-policy-after 3 needs --on-policy, which is not given"),
    ({"on_policy": 1, "on_policy_after": 4, "epochs": 4, "max_steps": 0}, "--epochs 4, so no update would be"),
    ({"tokens_per_batch": 95}, "--tokens-per-batch 95: an example may have 96 tokens (--max-len)"),
    ({"keep_best": "rouge"}, "--keep-best rouge needs scores on held-out examples: give them with --valid"),
    ({"keep_best": "rouge", "valid": __file__, "max_prompt_len": 96},
     "--max-prompt-len 96 leaves no token of --max-len 96 for the responses that are scored"),
    ({"teacher_sft": True, "method": "sft"}, "--teacher-sft is for training with a teacher"),
    ({"teacher_sft": True, "dry_run": True}, "--teacher-sft is for training with a teacher"),
    ({"teacher_sft": True, "method": "kd"}, "vocabularies of one family"),
    ({"teacher_sft": True, "student": "nowhere"}, "nowhere"),
    ({"teacher_sft": True, "student_chat": "own"}, "no chat template in chat_template.jinja or"),
    ({"lora": 4, "lora_alpha": 0}, "--lora-alpha 0.0: must be positive"),
    ({"lora": 4, "lora_alpha": "nan"}, "--lora-alpha nan: must be positive"),
    ({"lora": 4, "lora_dropout": 1}, "--lora-dropout 1.0: must be"),
    ({"lora": 4, "from_scratch": True}, "--lora 4 adapts a trained student"),
    ({"lora": 4, "lora_targets": ","}, "--lora-targets"),
    ({"lora_alpha": 8}, "need --lora RANK"),
    ({"lora_dropout": 0}, "need --lora RANK"),
    ({"lora_targets": "all-linear"}, "--lora-targets", "need --lora RANK"),
]  # fmt: skip
CACHE = [({"method": "sft"}, "--method sft has no teacher"),
         ({"method": "seqkd"}, "keeps the teacher's text, in seqkd.jsonl"),
         ({"on_policy": 0.5}, "new responses in every update"), ({"dry_run": True}, "rounded to bfloat16"),
         ({"cache_teacher": __file__}, "not a directory")]  # fmt: skip
TOGETHER += [({"cache_teacher": "states", **options}, message) for options, message in CACHE]


@pytest.mark.parametrize("options, words", [(options, words) for options, *words in TOGETHER], ids=str)
def test_options_that_do_not_go_together(command, nothing_loaded, options, words):
    assert contains(command(**options), *words)


def test_layers_that_the_student_does_not_have(command):
    message = command(lora=4, lora_targets="c_attn q_proj")
    assert contains(message, "--lora-targets: ", "no linear layer called 'q_proj'; give some of c_attn")


@pytest.mark.parametrize("words, message", [
    (["--lora", "4"], "--lora 4 adapts a trained student"),
    (["--keep-best", "ce"], "--keep-best ce needs scores on held-out examples"),
    (["--task", "math"], "the embedded task has its own settings and trains its own teacher"),
    (["--teacher-sft"], "the embedded task has its own settings and trains its own teacher"),
    (["--dry-run"], "--dry-run needs --teacher, --student and --data"),
])  # fmt: skip
def test_what_the_embedded_task_does_not_know(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        train.main(words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_more_tokens_than_positions(command, tiny_task, tmp_path, role):
    field = {"student": "n_positions", "teacher": "max_position_embeddings"}[role]
    directory = make_model(tiny_task / role, tmp_path / role, **{field: 80})
    assert contains(command(**{role: directory}), f"--max-len 96: the {role} has only 80 positions")


@pytest.mark.parametrize("device, expected", [("cuda", "cannot be used here"), ("cuda:3", "cannot be used here"),
                                              ("gpu", "not a device"), ("cpu:x", "not a device")])  # fmt: skip
def test_device(command, monkeypatch, nothing_loaded, device, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert contains(command(device=device), f"--device {device}: ", expected)


# ---------------------------------------------------------------------------------------------------------------------
# Projectors


@pytest.mark.parametrize("content", [None, b"", b"no safetensors at all"])
def test_projectors_file_missing_or_unreadable(command, tmp_path, nothing_loaded, content):
    path = tmp_path / "projectors.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert contains(command(projectors=path), f"--projectors {path}: not a readable safetensors file")


@pytest.mark.parametrize("name, shape", [("t2s.weight", (32, 49)), ("s2t.weight", (32, 48)), ("t2s.bias", (48,)),
                                         ("t2s", (32, 48)), ("same.t2s.weight", (32, 48))])  # fmt: skip
def test_projectors_that_do_not_fit(command, tmp_path, name, shape):
    path = tmp_path / "projectors.safetensors"
    save_file({name: torch.zeros(shape)}, path)
    message = command(projectors=path)
    assert contains(message, f"{path}: {name} {list(shape)} does not fit; expected", "t2s.weight [32, 48]")


def test_query_projector_without_cma_is_told(command, tmp_path, capsys):
    path = tmp_path / "projectors.safetensors"
    save_file({"query.weight": torch.zeros(96, 64)}, path)
    command.run(projectors=path)
    assert "query.weight not used, because only --align cma needs a query" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# The run directory


def test_existing_run_is_not_overwritten(command, tiny_task, tmp_path, nothing_loaded, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    (run / "args.json").write_text("{}")
    assert contains(command(), f"{run} already holds a run", "--out", "--resume")
    (run / "args.json").rename(run / "student")
    assert contains(command(), f"{run} already holds a run")
    shutil.rmtree(run)
    run.write_text("a file")
    assert contains(command(), f"--out {run} is a file")
    with pytest.raises(SystemExit, match=f"--out {run / 'below'}: {run} is not a writable directory"):
        train.main(arguments(tiny_task, run / "below"))
    run.unlink()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as of somebody else
    assert contains(command(), f"--out {run}: {tmp_path} is not a writable directory")


def test_resume_without_a_run(command, tmp_path, monkeypatch, nothing_loaded):
    monkeypatch.setattr("experiments.tiny.make_data", lambda seed: pytest.fail("the embedded task was started"))
    assert contains(command(resume=True), f"--resume: {tmp_path / 'run'} holds no run", "without --resume")
    with pytest.raises(SystemExit, match=f"--resume: {tmp_path / 'run'} holds no run; start without --resume"):
        train.main(["--out", str(tmp_path / "run"), "--resume"])
    assert not (tmp_path / "run").exists()


def test_refused_input_can_be_mended_with_the_same_out(command, tmp_path, copy):
    directory = copy("student")
    weights = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(weights[:100])
    assert contains(command(student=directory), f"{directory / 'model.safetensors'}: not a readable safetensors file")
    (directory / "model.safetensors").write_bytes(weights)
    command.run(student=directory)
    assert json.loads((tmp_path / "run" / "args.json").read_text())["student"] == str(directory)


def test_tiny_names_before_the_tiny_task_was_made(command, nothing_loaded):
    for role in ("student", "teacher", "data"):
        assert contains(command(**{role: "tiny"}), f"{role} 'tiny': {tiny.ROOT}", "`python train.py` creates it")
