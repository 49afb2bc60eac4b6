"""The command line, from options to a run directory: every combination, resuming, determinism, the embedded task."""

import json
import math
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import arguments, load_run, log_of, same, stopped_by_ctrl_c, weights_of
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from torch.utils.checkpoint import checkpoint

import model
import train
from data import Row, Side
from losses import DIVERGENCES, predict_tokens
from runtime.load import Pieces
from runtime.tokenizer import read_tokenizer

KINDS = [("kd", "v2", "none", "twin"), ("dskd", "v1", "none", "twin"), ("dskd", "v2", "none", "twin"),
         ("dskd", "v1", "cma", "teacher"), ("dskd", "v2", "eta", "teacher")]  # fmt: skip
EVERY_KIND = [("sft", "v2", "none", "student", 0), ("seqkd", "v2", "auto", "teacher", 0)]
EVERY_KIND += [(method, "v2", "auto", teacher, 0) for method in ("uld", "mined") for teacher in ("teacher", "twin")]
EVERY_KIND += [(*kind, on_policy) for kind in KINDS for on_policy in ((0,) if kind[1] == "v1" else (0, 1))]
# every kind and every divergence: each divergence is an option of every kind, so that they need not meet all
COMBINATIONS = [(kind, "fkl" if kind[0] not in ("kd", "dskd") else list(DIVERGENCES)[n % 6])
                for n, kind in enumerate(EVERY_KIND)]  # fmt: skip


@pytest.mark.parametrize("kind, divergence", COMBINATIONS, ids=str)
def test_every_combination_runs_two_updates(tiny_task, tmp_path, kind, divergence):
    method, recipe, align, teacher, on_policy = kind
    options = {"method": method, "recipe": recipe, "align": align, "divergence": divergence}
    if on_policy:
        options |= {"on_policy": 1, "max_len": 60}
    train.main(arguments(tiny_task, tmp_path / "run", teacher=tiny_task / teacher, **options))
    first, last = log_of(tmp_path / "run")
    assert (first["step"], last["step"]) == (1, 2)
    assert all(torch.tensor(value).isfinite() for value in last.values())
    assert ("kd" in last) == (method not in ("sft", "seqkd")) and ("t2s_kd" in last) == (method == "dskd")
    assert ("align_ratio" in last) == (align == "eta" or method == "mined")
    assert ("on_policy" in last) == bool(on_policy)
    if on_policy:
        assert last["on_policy"] == 1 and last["sampled_length"] >= last["student_tokens"] / 4  # cut for the teacher
        assert align != "none" or last["sampled_length"] == last["student_tokens"] / 4 == last["teacher_tokens"] / 4
        assert 0 < last["generation_share"] < 1 and last["generation_tokens_per_second"] > 0
    before, after = load_file(tiny_task / "student" / "model.safetensors"), weights_of(tmp_path / "run")
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.skipif(os.name != "posix", reason="modes are Unix's")
def test_others_may_read_what_they_may_read_of_new_files(tiny_task, tmp_path):
    before = os.umask(0o027)
    try:
        train.main(arguments(tiny_task, tmp_path / "run", max_steps=1))
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {"model.safetensors", "projectors.safetensors", "state.safetensors", "args.json"} < set(modes)
    assert set(modes.values()) == {0o640}, modes


def test_resume_wants_the_same_examples(tiny_task, tmp_path):
    data = tmp_path / "train.jsonl"
    lines = (tiny_task / "train.jsonl").read_text().splitlines(keepends=True)
    data.write_text("".join(lines))
    options = {"data": data, "max_steps": 5, "checkpoint_every": 2}
    with stopped_by_ctrl_c():
        train.main(arguments(tiny_task, tmp_path / "run", **options))
    before = (tmp_path / "run" / "resume" / "state.safetensors").read_bytes()
    for changed in (lines[1:] + lines[:1], [*lines[:-1], lines[0]], lines[1:]):
        data.write_text("".join(changed))
        with pytest.raises(SystemExit, match="--resume: the examples of .*train.jsonl.* restore the original ones"):
            train.main(arguments(tiny_task, tmp_path / "run", **options, resume=True))
    assert (tmp_path / "run" / "resume" / "state.safetensors").read_bytes() == before
    data.write_text("".join(lines))
    train.main(arguments(tiny_task, tmp_path / "run", **options, resume=True))
    assert log_of(tmp_path / "run")[-1]["step"] == 5


def test_the_digest_knows_every_token_and_where_a_response_begins():
    sides = [[Side([1], [2, 3])], [Side([1, 2], [3])], [Side([1], [2, 4])]]
    sides += [[*sides[0], Side([1], [last])] for last in (5, 6)]  # the teacher's
    assert len({Pieces(None, None, None, None, [Row(*both)]).digest for both in sides}) == 5


@pytest.mark.parametrize(
    "changed, options", [("teacher", {}), ("student", {"method": "sft", "teacher": None, "lora": 2}),
                         ("teacher", {"lora": 2}), (None, {})]
)  # fmt: skip
def test_resume_wants_the_same_frozen_models(tiny_task, tmp_path, changed, options):
    """What is read again from where it was must be what it was; a student that is trained itself is not read again."""
    for name in ("teacher", "student"):
        shutil.copytree(tiny_task / name, tmp_path / name)
    options = {"teacher": tmp_path / "teacher", "student": tmp_path / "student", "checkpoint_every": 1, **options}
    with stopped_by_ctrl_c():
        train.main(arguments(tiny_task, tmp_path / "run", **options))
    file = tmp_path / (changed or "student") / "model.safetensors"
    written, weights = file.read_bytes(), load_file(file)
    save_file({name: weight + 2**-10 for name, weight in weights.items()}, file)
    if changed:
        with pytest.raises(SystemExit, match=f"--resume: the weights of --{changed} .*are not .* restore the original"):
            train.main(arguments(tiny_task, tmp_path / "run", **options, resume=True))
        file.write_bytes(written)
    train.main(arguments(tiny_task, tmp_path / "run", **options, resume=True))
    assert log_of(tmp_path / "run")[-1]["step"] == 2


@pytest.mark.parametrize("options", [{}, {"lora": 4, "dtype": "bf16"}])
def test_recompute_changes_no_bit(tiny_task, tmp_path, monkeypatch, options):
    calls = []
    monkeypatch.setattr(model, "checkpoint", lambda *args, **kwargs: calls.append(1) or checkpoint(*args, **kwargs))
    options = {"student": tiny_task / "dropout", **options}
    train.main(arguments(tiny_task, tmp_path / "whole", **options))
    assert not calls
    train.main(arguments(tiny_task, tmp_path / "recomputed", **options, recompute=True))
    assert same(*(load_file(tmp_path / name / "resume" / "state.safetensors") for name in ("whole", "recomputed")))
    assert calls


def test_on_policy_begins_after_so_many_epochs(tiny_task, tmp_path):
    """Also where the run was interrupted before, and in other batches."""
    data = tmp_path / "seven.jsonl"
    data.write_text("".join((tiny_task / "train.jsonl").read_text().splitlines(keepends=True)[:7]))
    options = {"data": data, "epochs": 3, "max_steps": 0, "checkpoint_every": 1, "max_len": 60}
    after = {"on_policy": 1, "on_policy_after": 1}
    with stopped_by_ctrl_c():
        train.main(arguments(tiny_task, tmp_path / "run", **options, **after))
    train.main(arguments(tiny_task, tmp_path / "run", **options, **after, batch_size=2, grad_accum=2, resume=True))
    assert [(line["epoch"], line["on_policy"]) for line in log_of(tmp_path / "run")] == [
        (0.5, 0), (1.0, 0), (1.5, 1), (2.0, 1), (2.5, 1), (3.0, 1)
    ]  # fmt: skip


def test_the_log_sums_up_the_updates_since_the_last_line():
    meter = train.Meter()
    for tokens in (20, 40):
        meter.count_generation(1e-9, tokens, 4)
    meter.tokens += 100
    line = meter.read(on_policy=True)
    assert line["sampled_length"] == 60 / 8 and 0 <= line["generation_share"] < 1
    assert line["tokens_per_second"] > 0 and line["generation_tokens_per_second"] > 0
    assert meter.read(on_policy=True).keys() == {"tokens_per_second", "generation_share"}
    assert meter.read(on_policy=False).keys() == {"tokens_per_second"}


def test_a_response_that_cannot_be_used_leaves_the_gold_one(tiny_task, tmp_path, monkeypatch):
    """Every second one is half a character and cut; `on_policy` says how many were sampled."""
    tokenizer = read_tokenizer(tiny_task / "student")
    half, word = [tokenizer.bytes.index(b"\xf0")], [*tokenizer.encode("The fox"), tokenizer.eos_id]
    asked = []
    monkeypatch.setattr(train, "generate", lambda *words, **_: asked.append(words) or [half, word] * 2)
    train.main(arguments(tiny_task, tmp_path / "run", on_policy=1, max_steps=1))
    [(_, prompts, rooms, _)] = asked
    assert [len(prompt) + room for prompt, room in zip(prompts, rooms, strict=True)] == [96] * 4
    line = log_of(tmp_path / "run")[0]
    assert line["on_policy"] == 0.5 and line["student_tokens"] > 2 * len(word)


@pytest.fixture
def dry_run(tiny_task, capsys):
    """dry_run(option=value, ...): its terms, and the notes beside them."""

    def run(**options) -> tuple[dict, str]:
        train.main(arguments(tiny_task, None, dry_run=True, **options))
        output, notes = capsys.readouterr()
        return json.loads(output.splitlines()[-1]), notes

    return run


def test_a_dry_run_is_over_the_first_batch(tiny_task, tmp_path, dry_run):
    data = tmp_path / "four.jsonl"
    data.write_text("".join((tiny_task / "train.jsonl").read_text().splitlines(keepends=True)[:4]))
    train.main(arguments(tiny_task, tmp_path / "run", data=data, max_steps=1))
    [line] = log_of(tmp_path / "run")
    terms, _ = dry_run()
    for name in ("ce", "student_tokens", "teacher_tokens"):
        assert terms[name] == pytest.approx(line[name], rel=1e-5)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_term_that_is_not_finite_is_named(dry_run, monkeypatch, value):
    loss = train.Method.loss
    monkeypatch.setattr(train.Method, "loss", lambda *x: {**(terms := loss(*x)), "t2s_kd": value + terms["t2s_kd"]})
    with pytest.raises(SystemExit, match=f"^error: t2s_kd is {value}$"):
        dry_run()


def test_equal_vocabularies_with_other_ends_or_other_cuts(tiny_task, tmp_path, dry_run):
    """Another end-of-text makes two vocabularies different; other merges under the same vocabulary are an error."""
    twin = tmp_path / "twin"
    shutil.copytree(tiny_task / "twin", twin)
    tokenizer = json.loads((twin / "tokenizer.json").read_text())
    merges = tokenizer["model"]["merges"]
    fewer = {**tokenizer["model"], "merges": merges[:9]}
    (twin / "tokenizer.json").write_text(json.dumps({**tokenizer, "model": fewer}))
    with pytest.raises(SystemExit, match="train.jsonl, line 1: the tokenizers split this response differently"):
        dry_run(teacher=twin)
    assert dry_run(teacher=twin, align="eta")[0]["align_ratio"] < 1

    (twin / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((twin / "tokenizer_config.json").read_text())
    (twin / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "!"}))
    assert "align_ratio" in dry_run(teacher=twin)[0]


def with_more_tokens(source, directory, *names, special=True, padding=0):
    """A fine-tune of the model: more tokens behind its vocabulary, and padding behind them, with embeddings that are
    larger than all others."""
    shutil.copytree(source, directory)
    tokenizer, before = Tokenizer.from_file(str(source / "tokenizer.json")), model.load_model(source)
    tokenizer.add_tokens([AddedToken(name, special=special) for name in names])
    tokenizer.save(str(directory / "tokenizer.json"))
    rows = len(before.embed.weight)
    after = model.build_model({**before.config, "vocab_size": rows + len(names) + padding})
    after.load_state_dict({**before.state_dict(), "embed.weight": after.embed.weight}, strict=False)
    with torch.no_grad():
        after.embed.weight.normal_()[:rows] = before.embed.weight
    model.save_model(after, directory)
    return directory


@pytest.mark.parametrize("options", [{"method": "kd"}, {"method": "kd", "divergence": "js", "chunk": 0}, {},
                                     {"recipe": "v1"}], ids=str)  # fmt: skip
def test_tokens_that_one_vocabulary_has_more_are_left_out(tiny_task, tmp_path, dry_run, options):
    """The terms that compare the models are those without these tokens; labels alone are among all of the student's."""
    teacher, student = tiny_task / "twin", tiny_task / "student"
    pad = with_more_tokens(teacher, tmp_path / "teacher", "<think>", "[PAD]")
    other = with_more_tokens(student, tmp_path / "student", "<pad>")
    expected, notes = dry_run(teacher=teacher, student=student, **options)
    assert "left out" not in notes and "kd" in expected and "align_ratio" not in expected
    found, notes = dry_run(teacher=pad, student=student, **options)
    assert f"{student}: compared on their 900 common ids; left out: the teacher's <think>, the teacher's" in notes
    same = expected.keys() - ({"loss", "kd", "s2t_kd", "grad_norm"} if "method" not in options else set())
    for name in same:  # DSKD has the teacher's whole head in the teacher's space
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name
    found, notes = dry_run(teacher=teacher, student=other, **options)
    assert "left out: the student's <pad>" in notes and found["ce"] > expected["ce"] + 1e-4
    if "method" in options:
        assert found["kd"] == pytest.approx(expected["kd"], rel=1e-5)
    found, notes = dry_run(teacher=pad, student=other, **options)
    assert "left out: the teacher's <think>, the teacher's [PAD], the student's <pad>" in notes
    if "method" in options:
        assert found["kd"] == pytest.approx(expected["kd"], rel=1e-5)
        padded = with_more_tokens(student, tmp_path / "padded", padding=3)  # as many rows as the teacher has, and more
        assert dry_run(teacher=pad, student=padded, **options)[0]["kd"] == pytest.approx(expected["kd"], rel=1e-5)
    elif not options:  # v2 asks for the teacher's predictions, which are among these ids
        _, pieces = load_run(arguments(tiny_task, None, dry_run=True, teacher=pad, student=other))
        batch = pieces.collate(pieces.rows, "cpu")
        said = pieces.method.ask_teacher(batch)
        assert said.label.max() < 900 <= predict_tokens(said.hidden, pieces.teacher.head_weight).max()


def test_a_response_with_a_token_that_the_teacher_lacks(tiny_task, tmp_path, monkeypatch, dry_run):
    """A gold one is refused without --align eta; one that the student sampled leaves the gold one. A label that both
    have, but behind the first that differs, is one among all of the student's."""
    student = with_more_tokens(tiny_task / "student", tmp_path / "student", "the", special=False)
    with pytest.raises(SystemExit, match="or one lacks a token of it that the other has; use --align eta"):
        dry_run(teacher=tiny_task / "twin", student=student)
    both = [with_more_tokens(tiny_task / name, tmp_path / f"more-{name}", f"<{name}>") for name in ("twin", "student")]
    both = [with_more_tokens(source, tmp_path / f"both-{source.name}", "the", special=False) for source in both]
    terms, notes = dry_run(teacher=both[0], student=both[1], method="kd")
    assert "left out: the teacher's <twin>, the teacher's the, the student's <student>" in notes
    outputs = [json.loads(line)["output"] for line in (tiny_task / "train.jsonl").read_text().splitlines()[:4]]
    assert 901 in read_tokenizer(both[1]).encode(" ".join(outputs)) and terms["ce"] > 0

    tokenizer = read_tokenizer(student)
    word, more = [*tokenizer.encode("fox"), tokenizer.eos_id], [900, tokenizer.eos_id]
    monkeypatch.setattr(train, "generate", lambda *arguments, **_: [word, more] * 2)
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "Who?", "output": "A fox."}\n' * 4)
    options = {"data": data, "teacher": tiny_task / "twin", "student": student, "method": "kd", "on_policy": 1}
    train.main(arguments(tiny_task, tmp_path / "run", **options, max_steps=1))
    assert log_of(tmp_path / "run")[0]["on_policy"] == 0.5


def test_vocabularies_that_are_not_of_one_family(tiny_task, tmp_path, dry_run):
    """Two ordinary tokens have changed places, or end-of-text itself is among those that differ: aligned."""
    twin = shutil.copytree(tiny_task / "twin", tmp_path / "twin")
    tokenizer = json.loads((twin / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["y"], vocabulary["z"] = vocabulary["z"], vocabulary["y"]
    (twin / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "align_ratio" in dry_run(teacher=twin)[0]
    ends = [with_more_tokens(tiny_task / name, tmp_path / f"{name}-ends", "<end>") for name in ("twin", "student")]
    assert "align_ratio" not in dry_run(teacher=ends[0], student=ends[1])[0]
    (ends[0] / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    assert "align_ratio" in dry_run(teacher=ends[0], student=ends[1])[0]


def test_sampling_under_autocast_leaves_the_gradient_alone(tiny_task, tmp_path):
    """Weights cast while sampling, without gradient, must not be the ones that training reads."""
    train.main(arguments(tiny_task, tmp_path / "run", dtype="bf16", on_policy=1, max_len=60))
    before, after = load_file(tiny_task / "student" / "model.safetensors"), weights_of(tmp_path / "run")
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert all(math.isfinite(value) for line in log_of(tmp_path / "run") for value in line.values())


def test_the_norm_of_many_numbers(monkeypatch):
    """Four million: added one by one in float32, as a CPU does, 0.2% of the sum would be lost."""
    student = torch.nn.Linear(2000, 2000)
    student.weight.grad = torch.full((2000, 2000), 0.1)
    monkeypatch.setattr(train, "distil", lambda *_: {})
    pieces = SimpleNamespace(student=student, rows=[], collate=lambda *_: None)
    found = train.dry_run(SimpleNamespace(device="cpu"), pieces, student)
    assert found == {"grad_norm": pytest.approx(200, rel=1e-6)}
    assert train.parallel.clip_gradients([student.weight], 1.0) == found["grad_norm"]
    assert student.weight.grad.double().norm().item() == pytest.approx(1, rel=1e-5)


def test_projectors_can_be_given_and_solved_ones_are_not_trained(tiny_task, tmp_path, dry_run):
    train.main(arguments(tiny_task, tmp_path / "run"))
    state = load_file(tmp_path / "run" / "resume" / "state.safetensors")
    projectors = {name for name in state if name.startswith("projectors.")}
    assert projectors == {"projectors.t2s.weight", "projectors.s2t.weight"}
    moments = [name for name in state if name.endswith("exp_avg")]
    assert len(moments) == len(weights_of(tmp_path / "run")) + 1  # the student and t2s
    saved = load_file(tmp_path / "run" / "projectors.safetensors")
    assert saved.keys() == {"t2s.weight"} and torch.equal(saved["t2s.weight"], state["projectors.t2s.weight"])

    # what one run saved, another starts from
    given, own = dry_run(projectors=tmp_path / "run" / "projectors.safetensors")[0], dry_run()[0]
    assert given["t2s_ce"] != own["t2s_ce"] and given["s2t_kd"] == pytest.approx(own["s2t_kd"], rel=1e-6)


def test_schedule_warms_up_and_decays():
    assert [train.schedule(step, 10, 2) for step in (0, 1, 2)] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert train.schedule(6, 10, 2) == pytest.approx(0.5) and train.schedule(9, 10, 2) < 0.05
    assert train.schedule(0, 10, 0) == 1.0


def test_an_update_is_adamw_written_out(tiny_task, tmp_path):
    """From the gradient of each update alone: it is clipped over student and projectors, each has its rate."""
    options = {"recipe": "v1", "warmup": 1, "lr": 0.01, "projector_lr": 0.04, "weight_decay": 0.1, "clip": 0.3}
    train.main(arguments(tiny_task, tmp_path / "run", max_steps=3, **options))
    o, pieces = load_run(arguments(tiny_task, tmp_path / "again", max_steps=3, **options))
    kinds = ("student", pieces.student), ("projectors", pieces.method.projectors)
    named = {f"{kind}.{name}": p for kind, module in kinds for name, p in module.named_parameters()}
    start = {name: p.detach().clone() for name, p in named.items()}
    mean, square = ({name: torch.zeros_like(p) for name, p in named.items()} for _ in range(2))
    updates = zip(log_of(tmp_path / "run"), pieces.updates(o, 0, 3), strict=True)
    for t, (line, (_, _, batches)) in enumerate(updates, start=1):
        for p in named.values():
            p.grad = None
        train.distil(o, pieces, pieces.student, batches)
        norm = torch.cat([p.grad.flatten() for p in named.values()]).norm()
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-3) and norm > 0.3
        with torch.no_grad():
            for name, p in named.items():
                gradient = p.grad * 0.3 / norm
                mean[name].mul_(0.9).add_(0.1 * gradient)
                square[name].mul_(0.999).add_(0.001 * gradient**2)
                is_projectors = name.startswith("projectors")
                rate = (0.5, 1.0, 0.5)[t - 1] * (0.04 if is_projectors else 0.01)  # warm-up, peak, half-way down
                decay = 0.1 if is_projectors or p.dim() == 2 else 0.0
                step = mean[name] / (1 - 0.9**t) / ((square[name] / (1 - 0.999**t)).sqrt() + 1e-8)
                p.sub_(rate * (decay * p + step))
    found = load_file(tmp_path / "run" / "resume" / "state.safetensors")
    for name, p in named.items():
        if "c_attn.bias" not in name:  # the keys' has no gradient, only what rounding leaves
            assert (found[name] - p).norm() < 0.01 * (p - start[name]).norm(), name


def test_dropout_is_for_training_alone(tiny_task, tmp_path, dry_run):
    """Also that of a student that begins at random, which no file puts into evaluation mode."""
    without, dropout = ({"method": "sft", "student": tiny_task / name} for name in ("student", "dropout"))
    assert dry_run(**dropout, from_scratch=True)[0] == dry_run(**without, from_scratch=True)[0]
    for name, options in (("without", without), ("dropout", dropout)):
        train.main(arguments(tiny_task, tmp_path / name, max_steps=1, **options))
    first = [log_of(tmp_path / name)[0]["ce"] for name in ("without", "dropout")]
    assert first[0] != pytest.approx(first[1], rel=1e-4)


def test_training_learns(tiny_task, tmp_path):
    """The loss on 40 examples, seen many times, falls far below that of guessing (log 900 = 6.8)."""
    options = {"method": "sft", "max_steps": 60, "lr": 2e-2, "batch_size": 20, "log_every": 20}
    train.main(arguments(tiny_task, tmp_path / "run", **options))
    assert log_of(tmp_path / "run")[-1]["ce"] < 2.0


def test_the_embedded_task_runs_to_its_table_and_keeps_finished_stages(small_task, tmp_path, capsys):
    out = tmp_path / "tiny"
    train.main(["--max-steps", "2", "--out", str(out), "--device", "cpu"])
    printed, progress = capsys.readouterr()
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("|")]
    assert rows[2:] == ["teacher", "pretrained", "sft", "sft-early", "dskd-v2", "dskd-v2 − sft", "dskd-v2 − sft-early"]
    assert all(stage in progress for stage in ("teacher 1/5:", "pretrained 2/5:", "sft 3/5:", "dskd-v2 5/5:"))
    assert "device: cpu" in progress
    logs = {name: (out / name / "log.jsonl").read_bytes() for name in rows[2:7]}
    scores = json.loads((out / "dskd-v2" / "scores.json").read_text())
    assert all(0 <= scores[name] <= 100 for name in ("valid", "rouge_l", "valid_unseen", "rouge_l_unseen"))

    # the twins start from the same weights and see the same batches: equal cross-entropy before the first update
    first = {name: log_of(out / name)[0] for name in ("sft", "dskd-v2")}
    assert first["sft"]["ce"] == pytest.approx(first["dskd-v2"]["ce"], rel=1e-6)
    assert first["sft"]["student_tokens"] == first["dskd-v2"]["student_tokens"]

    sampled = ["--divergence", "srkl", "--on-policy", "1"], "dskd-v2-srkl-on-policy"
    for words, name in sampled, (["--method", "seqkd"], "seqkd"):
        train.main(["--max-steps", "2", "--out", str(out), "--device", "cpu", *words])
        rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        assert rows[2:7] == ["teacher", "pretrained", "sft", "sft-early", name] and "dskd-v2" in rows[7:]
    assert all((out / name / "log.jsonl").read_bytes() == log for name, log in logs.items())
    with pytest.raises(SystemExit, match="--seed 1"):
        train.main(["--seed", "1", "--out", str(out)])
    with pytest.raises(SystemExit, match="trained with --max-steps 2"):
        train.main(["--max-steps", "3", "--out", str(out), "--device", "cpu"])


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"lora": 4}], ids=str)
def test_compiled_equals_eager(dry_run, more):
    expected, _ = dry_run(**more)
    for options in ({"compile": True}, {"compile": True, "recompute": True}):
        assert dry_run(**more, **options)[0] == pytest.approx(expected, rel=1e-4)
