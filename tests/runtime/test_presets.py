"""Presets: every named model is what was published, down to its parameters; the papers' settings; the teacher's stage.

The configurations are those of the published config.json files, written down from memory (gpt2's, qwen's, tinyllama's,
llama2's and mistral's were compared with copies of the files); the parameter counts are the published ones.
"""

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from helpers import arguments, log_of, make_model, same, stopped_by_ctrl_c, weights_of

import model
import train
from runtime import load as loading
from runtime import parallel
from runtime.hub import MODELS
from runtime.presets import teacher_stage


def gpt2(width, layers, heads):
    return {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": width, "n_layer": layers,
            "n_head": heads}  # fmt: skip


def llama(family, vocabulary, width, inner, layers, heads, kv_heads, positions, tied, **more):
    return {"model_type": family, "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": inner,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "max_position_embeddings": positions, "tie_word_embeddings": tied, **more}  # fmt: skip


LLAMA3 = {"rope_theta": 500000.0, "rope_scaling": {
    "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3"}, "rms_norm_eps": 1e-5, "attention_bias": False, "mlp_bias": False}  # fmt: skip
WINDOW = {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 21, "rope_theta": 1000000.0}
QWEN3 = {"head_dim": 128, "attention_bias": False, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
         "use_sliding_window": False, "max_window_layers": 28}  # fmt: skip
PUBLISHED = {  # preset: (config.json as far as it shapes the model, parameters, a tied head counted once)
    "gpt2": (gpt2(768, 12, 12), 124_439_808),
    "gpt2-medium": (gpt2(1024, 24, 16), 354_823_168),
    "gpt2-large": (gpt2(1280, 36, 20), 774_030_080),
    "gpt2-xl": (gpt2(1600, 48, 25), 1_557_611_200),
    "qwen": (llama("qwen2", 151936, 2048, 5504, 24, 16, 16, 32768, False, **WINDOW), 1_836_828_672),
    "tinyllama": (llama("llama", 32000, 2048, 5632, 22, 32, 4, 2048, False), 1_100_048_384),
    "llama2": (llama("llama", 32000, 4096, 11008, 32, 32, 32, 4096, False), 6_738_415_616),
    "mistral": (llama("mistral", 32000, 4096, 14336, 32, 32, 8, 32768, False, sliding_window=4096), 7_241_732_096),
    "qwen2.5-0.5b": (llama("qwen2", 151936, 896, 4864, 24, 14, 2, 32768, True, **WINDOW), 494_032_768),
    "qwen2.5-1.5b": (llama("qwen2", 151936, 1536, 8960, 28, 12, 2, 131072, True, **WINDOW), 1_543_714_304),
    "qwen2.5-7b": (llama("qwen2", 152064, 3584, 18944, 28, 28, 4, 131072, False, **WINDOW), 7_615_616_512),
    "qwen3-0.6b": (llama("qwen3", 151936, 1024, 3072, 28, 16, 8, 40960, True, **QWEN3), 596_049_920),
    "qwen3-1.7b": (llama("qwen3", 151936, 2048, 6144, 28, 16, 8, 40960, True, **QWEN3), 1_720_574_976),
    "llama3.2-1b": (llama("llama", 128256, 2048, 8192, 16, 32, 8, 131072, True, head_dim=64, **LLAMA3), 1_235_814_400),
    "llama3.2-3b": (llama("llama", 128256, 3072, 8192, 28, 24, 8, 131072, True, head_dim=128, **LLAMA3), 3_212_749_824),
    "smollm2": (llama("llama", 49152, 576, 1536, 30, 9, 3, 8192, True, rope_theta=100000), 134_515_008),
}


def test_every_preset_is_counted():
    assert PUBLISHED.keys() == MODELS.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_number(name):
    config, parameters = PUBLISHED[name]
    with torch.device("meta"):
        built = model.Decoder(config)
    assert {p.device.type for p in built.parameters()} == {"meta"}
    assert sum(p.numel() for p in built.parameters()) == parameters
    tied = config.get("tie_word_embeddings", True)
    assert (built.head_weight is built.embed.weight) == tied
    width = config.get("hidden_size") or config["n_embd"]
    assert built.head_weight.shape == built.embed.weight.shape == (config["vocab_size"], width)


# ---------------------------------------------------------------------------------------------------------------------
# Settings


def resolved(line: str) -> train.Options:
    return train.check_options(train.Options(**train.settings(train.parse(shlex.split(line)))))


FULL = {"lora": 0, "weight_decay": 1e-2, "clip": 1.0, "warmup": 0, "temperature": 2.0, "kd_rate": 0.5, "grad_accum": 1}
LORA = {"lora": 256, "lora_alpha": 8.0, "lora_dropout": 0.1, "lr": 1e-3, "epochs": 10, "batch_size": 32}
SMALL = {**FULL, "lr": 5e-4, "epochs": 20, "batch_size": 32}
MATHS = {**FULL, "lr": 1e-5, "batch_size": 128, "temperature": 1.0, "projector_lr": 1e-3, "epochs": 3}


@pytest.mark.parametrize(
    "line, expected",
    [
        ("--teacher qwen --student gpt2", {**SMALL, "projector_lr": 5e-4}),
        ("--teacher gpt2-xl --student gpt2 --recipe v1", {**SMALL, "projector_lr": 1e-3}),
        ("--teacher gpt2-xl --student openai-community/gpt2 --lr 1e-4", {**SMALL, "lr": 1e-4}),
        ("--teacher llama2 --student tinyllama", LORA),
        ("--teacher mistral --student tinyllama --epochs 2", {**LORA, "epochs": 2}),
        ("--teacher runs/a/student --student tinyllama --lora-alpha 16", {**LORA, "lora_alpha": 16.0}),
        ("--teacher llama2 --student tinyllama --lora 0", {**SMALL, "lora_alpha": None}),  # a LoRA recipe without LoRA
        ("--teacher llama2 --student tinyllama --from-scratch", SMALL),
        ("--method sft --student tinyllama", LORA),
        ("--method sft --student qwen", {**FULL, "lr": 2e-5, "epochs": 10, "batch_size": 32}),
        ("--method sft --student llama2", LORA),
        ("--method sft --student mistralai/Mistral-7B-v0.1", LORA),
        ("--teacher qwen2.5-7b --student qwen2.5-0.5b --task math", MATHS),
        ("--teacher qwen2.5-7b --student tinyllama --task code", {**MATHS, "epochs": 1}),
        ("--teacher qwen --student gpt2 --task math --batch-size 8 --grad-accum 16 --temperature 2",
         {**MATHS, "batch_size": 8, "grad_accum": 16, "temperature": 2.0}),
        ("--teacher qwen --student gpt2-medium", SMALL),  # nothing published: the defaults
        ("--teacher qwen --student qwen3-0.6b", SMALL),
    ],
)  # fmt: skip
def test_settings_of_a_pair(line, expected):
    found = vars(resolved(line + " --data x"))
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("line, each", [("", 8), ("--task math", 32), ("--batch-size 32", 32), ("--grad-accum 2", 8)])
def test_processes_share_the_batch_of_the_papers(monkeypatch, line, each):
    monkeypatch.setattr(parallel, "world", lambda: 4)
    given = train.parse(shlex.split(f"--teacher qwen --student gpt2 {line}"))
    assert train.settings(given)["batch_size"] == each
    monkeypatch.setattr(parallel, "world", lambda: 1000)
    assert train.settings(train.parse(["--student", "gpt2"]))["batch_size"] == 1


@pytest.mark.parametrize("student", ["gpt2", "tinyllama", "openai-community/gpt2"])
def test_the_papers_models_are_trained_on_dolly(student):
    line = f"--teacher qwen --student {student}"
    assert resolved(line).data == "dolly" and resolved(line + " --data x").data == "x"
    for teacher in ("qwen", "a/directory"):  # also in the teacher's stage
        assert teacher_stage(train.parse(["--teacher", teacher, "--student", student]), "runs/a")["data"] == "dolly"


@pytest.mark.parametrize("line", ["qwen3-0.6b", "gpt2 --task math", "gpt2 --from-scratch", "a/directory"])
def test_other_runs_have_to_name_their_data(line):
    with pytest.raises(ValueError, match="--data is missing"):
        resolved("--teacher qwen --student " + line)


def test_a_directory_of_a_presets_name_is_no_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tinyllama").mkdir()
    assert resolved("--teacher llama2 --student tinyllama --data x").lora == 0


def test_where_the_settings_come_from_is_said(capsys):
    def said(line):
        train.say_settings(train.parse(shlex.split(line)))
        return capsys.readouterr().err.strip()

    whole = "settings: --data dolly --epochs 20 --batch-size 32 --lr 0.0005 from the papers' for gpt2;"
    assert whole in said("--student gpt2") and whole in said("--student gpt2 --data dolly --epochs 20")
    assert "from the papers' for gpt2, replaced by the command line: --data x;" in said("--student gpt2 --data x")
    line = said("--student tinyllama --lr 0.5 --lora 8")
    assert "--epochs 10 --batch-size 32 --lora-alpha 8.0 --lora-dropout 0.1 from the papers' for tinyllama" in line
    assert "replaced by the command line: --lr 0.5 --lora 8;" in line
    assert "--temperature 1.0 from the papers' for math" in said("--student gpt2 --task math")
    assert said("--student some/model").startswith("settings: none are published for some/model; all as given, else")


@pytest.fixture
def presets(tiny_task, monkeypatch):
    """The tiny task's models under the names of presets."""
    models = {"qwen": tiny_task / "teacher", "gpt2": tiny_task / "student"}
    monkeypatch.setattr(loading, "model_directory", lambda name, weights=True: models.get(name, Path(name)))


def test_settings_are_stored_and_a_resumed_run_has_the_same(tiny_task, tmp_path, presets, capsys):
    options = {"student": "gpt2", "teacher": "qwen", "max_steps": None, "epochs": 1, "batch_size": None}
    train.main(arguments(tiny_task, tmp_path / "run", **options))
    assert "settings: --batch-size 32 --lr 0.0005 from the papers' for gpt2" in capsys.readouterr().err
    record = json.loads((tmp_path / "run" / "args.json").read_text())
    assert (record["student"], record["lr"], record["batch_size"], record["epochs"]) == ("gpt2", 5e-4, 32, 1)
    train.main(arguments(tiny_task, tmp_path / "run", **options, lr=5e-4, resume=True))  # the recipe's, given
    with pytest.raises(SystemExit, match="--resume: --lr is 0.1, but .* was started with 0.0005"):
        train.main(arguments(tiny_task, tmp_path / "run", **options, lr=0.1, resume=True))
    with pytest.raises(SystemExit, match="covers 32 examples, but --batch-size 128"):
        train.main([*arguments(tiny_task, tmp_path / "run", **options, resume=True), "--task", "math"])


def test_a_resumed_run_keeps_the_lengths_it_was_started_with(tiny_task, tmp_path):
    train.main(arguments(tiny_task, tmp_path / "run", max_len=90, max_prompt_len=45))
    train.main(arguments(tiny_task, tmp_path / "run", max_len=None, max_prompt_len=None, resume=True))
    record = json.loads((tmp_path / "run" / "args.json").read_text())
    assert (record["max_len"], record["max_prompt_len"]) == (90, 45)


# ---------------------------------------------------------------------------------------------------------------------
# The teacher's stage


def test_which_teacher_it_is_is_said(tiny_task, tmp_path, presets, capsys):
    def said(out, **options):
        train.main(arguments(tiny_task, out, **options))
        lines = capsys.readouterr().err.splitlines()
        return [line for line in lines if "teacher" in line and ":  " not in line]  # not the next commands

    unknown = said(tmp_path / "a")
    path = tiny_task / "teacher"
    assert unknown[0].startswith(f"teacher: {path}, not trained here (no args.json); it may not have been")
    published = said(tmp_path / "b", teacher="qwen")
    assert published[0].startswith(f"teacher: {path}, as published in Qwen/Qwen1.5-1.8B; it has not been")
    assert published[2] == f"and then --teacher {tmp_path}/b/teacher/student; --teacher-sft does both"

    words = shlex.split(unknown[1])  # the command that is offered is run, but for its length
    assert words[:2] == ["python", "train.py"]
    stage = train.settings(train.parse(words[2:]))
    assert (stage["lr"], stage["method"], stage["student"]) == (2e-5, "sft", str(path)) and "teacher" not in stage
    train.main([*words[2:], "--lr", "1e-2"])
    capsys.readouterr()
    tuned = tmp_path / "a" / "teacher" / "student"
    ran = said(tmp_path / "c", teacher=tuned, data=os.path.relpath(tiny_task / "train.jsonl"))  # the same file
    assert ran == [f"teacher: {tuned}, trained here: --method sft on --data {tiny_task}/train.jsonl"]
    other = said(tmp_path / "d", teacher=tuned, data=tiny_task / "valid.jsonl")
    assert other[0].endswith(f"train.jsonl; this run is on --data {tiny_task}/valid.jsonl")
    assert said(None, teacher=None, method="sft", dry_run=True) == []
    [unused] = said(None, method="sft", dry_run=True)
    assert unused.endswith("--teacher is not used")


def test_teacher_sft_runs_the_stage_and_learns_from_it(tiny_task, tmp_path, presets, capsys):
    """As the two commands do one after the other; a finished stage is kept, an interrupted one goes on."""
    out = tmp_path / "run"
    options = {"teacher": "qwen", "student": "gpt2", "checkpoint_every": 1}
    train.main(arguments(tiny_task, out, **options, lr=1e-2, teacher_sft=True))
    err = capsys.readouterr().err
    assert f"teacher: {tiny_task}/teacher, fine-tuned first:" in err and "--method sft --student qwen" in err
    record, stage = (json.loads((path / "args.json").read_text()) for path in (out, out / "teacher"))
    assert record["teacher"] == f"{out}/teacher/student" and record["lr"] == 1e-2
    assert (stage["method"], stage["student"], stage["lr"], stage["max_steps"]) == ("sft", "qwen", 2e-5, 2)
    train.main(arguments(tiny_task, tmp_path / "sft", method="sft", student="qwen", teacher=None, checkpoint_every=1))
    assert same(weights_of(tmp_path / "sft"), weights_of(out / "teacher"))
    train.main(arguments(tiny_task, tmp_path / "two", **{**options, "teacher": tmp_path / "sft" / "student"}, lr=1e-2))
    assert same(weights_of(tmp_path / "two"), weights_of(out))

    log = (out / "teacher" / "log.jsonl").read_bytes()
    out = out.rename(tmp_path / "moved")
    # What a resumed run may change, and a default that is given now; all is done.
    other = {"batch_size": 2, "grad_accum": 2, "recompute": True, "device": "cpu:0", "dtype": "fp32"}
    train.main(arguments(tiny_task, out, **options, lr=1e-2, teacher_sft=True, resume=True, **other))
    out = out.rename(tmp_path / "moved again")
    train.main(["--out", str(out), "--resume"])
    train.main(["--out", str(out), "--resume", "--teacher-sft"])
    assert json.loads((out / "args.json").read_text())["teacher"] == f"{out}/teacher/student"
    assert (out / "teacher" / "log.jsonl").read_bytes() == log
    again = tmp_path / "again"
    shutil.move(out / "teacher", again / "teacher")
    with pytest.raises(SystemExit, match="already holds a run"):
        train.main(arguments(tiny_task, out, **options, lr=1e-2, teacher_sft=True))
    assert not (out / "teacher").exists()  # told before the stage
    with pytest.raises(SystemExit, match="teacher was trained with --seed 42"):
        train.main(arguments(tiny_task, again, **options, seed=1, teacher_sft=True))


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "--max-len 96: the student has only 64 positions"),
        ({"max_len": 60, "lora": 2, "lora_targets": "q_prj"}, "--lora-targets: .* no linear layer called 'q_prj'"),
    ],
)
def test_what_stops_the_student_is_found_before_the_teachers_stage(tiny_task, tmp_path, options, message):
    options["student"] = make_model(tiny_task / "student", tmp_path / "short", n_positions=64)
    with pytest.raises(SystemExit, match=message):
        train.main(arguments(tiny_task, tmp_path / "run", **options, teacher_sft=True))
    assert not (tmp_path / "run").exists()


def test_a_student_from_scratch_needs_no_weights(tiny_task, tmp_path):
    """Also where the teacher is fine-tuned first."""
    bare = shutil.copytree(tiny_task / "student", tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    options = {"student": bare, "from_scratch": True, "teacher_sft": True, "max_steps": 1}
    train.main(arguments(tiny_task, tmp_path / "run", **options))
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()


def test_the_teachers_stage_has_every_option_that_is_not_about_the_student():
    both = ("--valid dolly --keep-best rouge --bos --max-steps 7 --batch-size 4 --grad-accum 2 --bucket "
            "--tokens-per-batch 900 --max-len 300 --max-prompt-len 100 --chunk 64 --recompute --seed 3 --dtype bf16 "
            "--device cpu --compile --checkpoint-every 5 --log-every 6 --tensorboard").split()  # fmt: skip
    given = train.parse("--teacher qwen --student gpt2 --method kd --lr 1 --epochs 3 --lora 4".split() + both)
    alone = "--method sft --student qwen --data dolly --lr 2e-5 --epochs 10 --out runs/a/teacher".split()
    assert teacher_stage(given, "runs/a") == train.parse(alone + both)


def test_an_interrupted_teacher_stage_goes_on(tiny_task, tmp_path, presets, capsys):
    options = {"teacher": "qwen", "student": "gpt2", "checkpoint_every": 1, "teacher_sft": True}
    train.main(arguments(tiny_task, tmp_path / "whole", **options))

    with stopped_by_ctrl_c():
        train.main(arguments(tiny_task, tmp_path / "parts", **options))
    assert not (tmp_path / "parts" / "args.json").exists() and len(log_of(tmp_path / "parts" / "teacher")) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("continue with: ") and last.endswith("--teacher-sft")
    (tmp_path / "parts").rename(tmp_path / "moved")
    train.main(arguments(tiny_task, tmp_path / "moved", **options))
    assert same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "moved"))
