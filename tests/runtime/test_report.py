"""What a run tells people: the device, its result, the next commands, the model card, TensorBoard's files."""

import json
import os
import shlex
from dataclasses import asdict

import huggingface_hub
import pytest
import torch
from helpers import arguments, stopped_by_ctrl_c

import eval as evaluation
import train
from data import Example
from runtime import device, hub, parallel, report

# ---------------------------------------------------------------------------------------------------------------------
# The device


def pretend_card(monkeypatch, capability, built, cards=1):
    for name, value in {"is_available": True, "device_count": cards, "get_device_name": "Some Card",
                        "get_device_capability": capability, "get_arch_list": built}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)


@pytest.mark.parametrize(
    "capability, built, usable",
    [((8, 6), ["sm_80"], True), ((8, 0), ["sm_86"], False), ((9, 0), ["sm_80", "compute_80"], True),
     ((5, 2), ["sm_75", "sm_100a", "compute_120"], False), ((10, 0), ["sm_75", "sm_100a"], True), ((7, 5), [], False)],
)  # fmt: skip
def test_a_card_is_used_if_this_torch_is_built_for_it(monkeypatch, capability, built, usable):
    pretend_card(monkeypatch, capability, built)
    kind, why = device.choose_device()
    assert kind == ("cuda" if usable else "cpu") and "Some Card" in why
    assert usable or "not built for the Some Card here, of compute capability" in why


@pytest.mark.parametrize("cuda, why", [(None, "is built without CUDA"), ("13.0", "hides it, or the driver is too old")])
def test_a_card_that_torch_does_not_see_is_named(monkeypatch, tmp_path, capsys, cuda, why):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "information").write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   24\n")
    monkeypatch.setattr(device, "CARDS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    device.say_device(None, "cpu")
    told = capsys.readouterr().err
    assert told.startswith("device: cpu (there is an NVIDIA H100 80GB HBM3 here, but") and why in told
    with pytest.raises(SystemExit, match=f"error: --device cuda: .*H100.*{why}.*use --device cpu"):
        evaluation.main(["x", "--data", "y", "--device", "cuda"])


def test_these_tests_compute_on_the_cpu_where_there_is_a_card_too():
    assert device.choose_device()[0] == "cpu" and os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_devices_that_are_not_there(monkeypatch):
    with pytest.raises(SystemExit, match="error: --device mps: .*no float64"):
        evaluation.main(["x", "--data", "y", "--device", "mps"])
    pretend_card(monkeypatch, (9, 0), ["sm_90"], cards=2)
    with pytest.raises(SystemExit, match="error: --device cuda:2: .*torch sees only 2 CUDA card"):
        evaluation.main(["x", "--data", "y", "--device", "cuda:2"])


# ---------------------------------------------------------------------------------------------------------------------
# The result


@pytest.fixture(scope="module")
def run(tiny_task, tmp_path_factory):
    """A finished run with held-out scores."""
    out = tmp_path_factory.mktemp("run") / "mine"
    train.main(arguments(tiny_task, out, valid=tiny_task / "valid.jsonl"))
    return out


def test_the_next_commands_are_said_and_work(tiny_task, tmp_path, capsys):
    """Also if the directory was given with a slash behind it, as a shell completes it."""
    train.main(arguments(tiny_task, f"{tmp_path}/run/", valid=tiny_task / "valid.jsonl", resume=None))
    out, err = capsys.readouterr()
    assert out == f"student: {tmp_path / 'run' / 'student'}\n" and "device: cpu (" in err
    assert "an epoch: 10 updates in 10 forward passes; " in err
    assert "after 2 updates: loss " in err and ", valid_ce " in err
    said = dict(line.split(":", 1) for line in err.splitlines() if ":  " in line)
    commands = {name: shlex.split(command)[1:] for name, command in said.items() if " python " in command}
    assert list(commands) == ["score it", "talk to it", "train further"]
    evaluation.main([*commands["talk to it"][1:], "--max-len", "20", "--device", "cpu"])
    assert capsys.readouterr().out.strip()
    assert f"--projectors {tmp_path}/run/projectors.safetensors" in " ".join(commands["train further"])
    train.main(commands["train further"][1:])
    assert capsys.readouterr().out == f"student: {tmp_path}/run-2/student\n"


@pytest.mark.parametrize(
    "machines, start",
    [("1", "torchrun"), ("2", "torchrun --nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500")],
)
def test_commands_under_torchrun_begin_with_it(tiny_task, monkeypatch, capsys, machines, start):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("GROUP_WORLD_SIZE", machines)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    given = {"student": "s", "teacher": str(tiny_task / "teacher"), "data": "d", "out": "runs/4", "shard": "both"}
    report.say_next(given, train.Options(**given), {})
    train.say_teacher(given, train.Options(**given), tiny_task / "teacher", None)
    lines = [line for line in capsys.readouterr().err.splitlines() if " train.py " in line]
    assert len(lines) == 2 and all(f"  {start} --nproc_per_node=4 train.py " in line for line in lines)


def test_a_further_run_starts_from_the_student_and_has_the_same_teacher(capsys):
    """Not with new weights, nor with the teacher from before --teacher-sft."""
    given = {"student": "gpt2", "teacher": "qwen", "out": "runs/a", "resume": True, "from_scratch": True}
    report.say_next(given, train.Options(**{**given, "teacher": "runs/a/teacher/student"}), {})
    further = capsys.readouterr().err.split("train further:")[1]
    assert "--student runs/a/student" in further and "--teacher runs/a/teacher/student" in further
    assert "--from-scratch" not in further and "--resume" not in further


@pytest.mark.parametrize("processes", [1, 4])
@pytest.mark.parametrize("words", [
    "--student qwen --method sft --epochs 20", "--student tinyllama --teacher llama2",
    "--student tinyllama --teacher llama2 --lora 0", "--student gpt2 --teacher qwen --lr 5e-4 --task math",
])  # fmt: skip
def test_commands_that_are_printed_have_the_same_settings(tmp_path, capsys, monkeypatch, words, processes):
    """Of "train further" and of the card: a recipe of the papers' belongs to a preset's name or a task, and its batch
    size is divided among the processes."""
    monkeypatch.setattr(parallel, "world", lambda: processes)
    given = train.parse([*words.split(), "--data", "dolly", "--out", str(tmp_path / "a run")])
    settings = train.settings(given)
    report.say_next(given, train.Options(**settings), {})
    said = capsys.readouterr().err.splitlines()
    [scored], [further] = ([line for line in said if line.startswith(name)] for name in ("score it", "train further"))
    assert shlex.split(scored.split("eval.py ")[1]) == [str(tmp_path / "a run"), "--data", "dolly"]
    again = train.settings(train.parse(shlex.split(further.split("train.py ")[1])))
    assert again == {**settings, "student": f"{tmp_path}/a run/student", "out": f"{tmp_path}/a run-2"}

    (tmp_path / "a run" / "student").mkdir(parents=True)
    record = asdict(train.Options(**settings))
    (tmp_path / "a run" / "args.json").write_text(json.dumps(record))
    (tmp_path / "a run" / "log.jsonl").touch()
    report.write_card(tmp_path / "a run")
    card = (tmp_path / "a run" / "student" / "README.md").read_text()
    [command] = [line for line in card.splitlines() if line.startswith("    python train.py ")]
    assert asdict(train.Options(**train.settings(train.parse(shlex.split(command)[2:])))) == record


def test_the_model_card(tiny_task, run, monkeypatch, capsys):
    card = huggingface_hub.ModelCard.load(run / "student" / "README.md")
    assert card.data.library_name == "transformers" and "dskd-v2" in card.data.tags and card.data.base_model is None
    assert f"teacher `{tiny_task / 'teacher'}`" in card.text and "valid_ce" in card.text and "icence" in card.text
    assert "\nSettings: max_steps 2, batch_size 4, " in card.text
    [command] = [line.strip() for line in card.text.splitlines() if line.startswith("    python train.py ")]
    record, again = (json.loads((run / "args.json").read_text()), train.parse(shlex.split(command)[2:]))
    assert all(record[name] == value for name, value in again.items()) and again["max_steps"] == 2
    assert "device" not in again  # which is that of one machine
    evaluation.main([str(run), "--data", str(tiny_task / "test.jsonl"), "--greedy", "--max-len", "20", "--limit", "1",
                     "--device", "cpu"])  # fmt: skip
    file = run / "student" / "README.md"
    assert "- test-first-1, 1 examples, greedy: rouge_l " in file.read_text()
    file.write_text("mine")  # edited: left alone
    report.write_card(run)
    assert file.read_text() == "mine"


def test_the_card_has_no_score_of_an_earlier_checkpoint(tiny_task, tmp_path):
    command = arguments(tiny_task, tmp_path / "run", max_steps=3, checkpoint_every=1)
    card, words = tmp_path / "run" / "student" / "README.md", ["--greedy", "--max-len=20", "--limit=1", "--device=cpu"]
    with stopped_by_ctrl_c():
        train.main(command)
    evaluation.main([str(tmp_path / "run"), "--data", str(tiny_task / "test.jsonl"), *words])
    assert "- test-first-1, 1 examples" in card.read_text()
    train.main([*command, "--resume"])
    assert "None yet" in card.read_text()
    (tmp_path / "run" / "eval-harness.json").write_text('{"results": {}}')  # of another tool
    evaluation.main([str(tmp_path / "run"), "--data", str(tiny_task / "valid.jsonl"), *words])
    assert "- valid-first-1, 1 examples" in card.read_text() and "test-first-1" not in card.read_text()


def test_the_card_names_what_the_hub_knows(run, tmp_path):
    hubs = {"data": "dolly", "base_model": hub.MODELS["gpt2"], "teacher": "qwen"}
    record = json.loads((run / "args.json").read_text()) | hubs
    (tmp_path / "student").mkdir()
    (tmp_path / "args.json").write_text(json.dumps(record))
    (tmp_path / "log.jsonl").write_text("")
    report.write_card(tmp_path)
    card = huggingface_hub.ModelCard.load(tmp_path / "student" / "README.md")
    data = card.data
    assert "teacher `Qwen/Qwen1.5-1.8B`" in card.text
    assert data.base_model == "openai-community/gpt2" and data.datasets == ["MiniLLM/dolly"]
    scratch = {"base_model": None, "student": "gpt2", "from_scratch": True}
    (tmp_path / "args.json").write_text(json.dumps(record | scratch))
    report.write_card(tmp_path)
    assert "\n`gpt2` (its config.json alone), trained with" in (tmp_path / "student" / "README.md").read_text()


def test_the_scores_on_the_card_are_those_of_the_best_checkpoint_and_of_all_seeds(run, tmp_path):
    record = json.loads((run / "args.json").read_text()) | {"method": "sft", "teacher": None, "best": {"step": 1}}
    (tmp_path / "student").mkdir()
    (tmp_path / "args.json").write_text(json.dumps(record))
    (tmp_path / "log.jsonl").write_text('{"step": 1, "valid_ce": 2.5}\n{"step": 2, "valid_ce": 3.5}\n')
    scores = {"data": "sums", "examples": 3, "greedy": False, "seeds": [1, 2], "accuracy": [10.0, 20.0]}
    (tmp_path / "eval-sums.json").write_text(json.dumps(scores))
    report.write_card(tmp_path)
    card = (tmp_path / "student" / "README.md").read_text()
    assert "held out: valid_ce 2.5\n- sums, 3 examples, sampled with seeds [1, 2]: accuracy 15\n" in card
    assert ", trained with `sft`, on " in card  # and with no teacher


def test_the_form_of_the_prompts_is_kept():
    """For eval.py --prompt, which puts the user's text into it."""
    assert report.prompt_form(Example("", ["x"], prompt="Who?\n\n")) == "{}\n\n"
    form = report.prompt_form(Example("", ["x"], instruction="Sum up.", input="A fox."))
    assert form.replace("{}", "Sum up.") == Example("", ["x"], instruction="Sum up.").prompt_text()


@pytest.mark.parametrize(
    "student, scratch, base",
    [("gpt2", False, "openai-community/gpt2"), ("gpt2", True, None), ("Qwen/Qwen2.5-72B", False, "Qwen/Qwen2.5-72B"),
     ("run/student", False, "some/base"), ("tiny", False, None)],
)  # fmt: skip
def test_the_base_model_is_found_through_runs(tmp_path, monkeypatch, student, scratch, base):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "student").mkdir(parents=True)
    (tmp_path / "run" / "args.json").write_text('{"base_model": "some/base"}')
    assert report.base_model(train.Options(student=student, from_scratch=scratch)) == base


def test_tensorboard(tiny_task, tmp_path, monkeypatch):
    words = arguments(tiny_task, tmp_path / "run", tensorboard=True, valid=tiny_task / "valid.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr("runtime.strict.has_tensorboard", lambda: False)
        with pytest.raises(SystemExit, match="error: --tensorboard needs .* pip install tensorboard"):
            train.main(words)
    assert not (tmp_path / "run").exists()
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train.main(words)
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    for name in ("loss", "lr", "valid_ce"):
        written = [(line["step"], pytest.approx(line[name])) for line in log if name in line]
        assert [(event.step, event.value) for event in events.Scalars(name)] == written and written
