"""cache.py: the same numbers as with the teacher beside the student, never its body, and never a file half-trusted."""

import dataclasses
import errno
import fcntl
import hashlib
import json
import math
import os
import resource
import shutil
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import CHAT_TEMPLATES, arguments, log_of, make_model, same, weights_of
from safetensors.torch import load_file, save_file

import model
import train
from data import tokenise
from experiments import tiny
from fast import cache, losses
from runtime import load as loading
from runtime.formats import read_examples
from runtime.tokenizer import read_tokenizer

METHODS = [
    ({"method": "kd"}, "twin"),
    ({"method": "mined"}, "teacher"),
    ({"recipe": "v1"}, "teacher"),
    ({"recipe": "v2"}, "teacher"),
]
every_method = pytest.mark.parametrize("options, teacher", METHODS)


def terms_of(out) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in log_of(out)]


def round_states(monkeypatch):
    """From here on a teacher that is beside the student has its states rounded to bfloat16."""
    ask_teacher = train.Method.ask_teacher

    @torch.no_grad()
    def rounded(self, batch):
        batch.teacher_hidden = model.hidden_at(self.teacher, batch.teacher).bfloat16()
        return ask_teacher(self, batch)

    monkeypatch.setattr(train.Method, "ask_teacher", rounded)


@every_method
def test_a_run_equals_one_with_rounded_states_bit_for_bit(tiny_task, tmp_path, monkeypatch, options, teacher):
    """And one with exact states to bfloat16's 8 bits. One example per batch, so that no sum has another order."""
    options = {**options, "teacher": tiny_task / teacher, "batch_size": 1, "grad_accum": 4, "max_steps": 3}
    train.main(arguments(tiny_task, tmp_path / "cached", cache_teacher=tmp_path / "states", **options))
    train.main(arguments(tiny_task, tmp_path / "exact", **options))
    round_states(monkeypatch)
    train.main(arguments(tiny_task, tmp_path / "rounded", **options))
    cached, rounded, exact = (terms_of(tmp_path / name) for name in ("cached", "rounded", "exact"))
    assert cached == rounded
    assert same(*(load_file(tmp_path / name / "resume" / "state.safetensors") for name in ("cached", "rounded")))
    assert cached != exact and cached[0] == pytest.approx(exact[0], rel=2e-2)
    assert cached[0]["ce"] == exact[0]["ce"] and cached[0]["kd"] == pytest.approx(exact[0]["kd"], rel=2e-3)


def test_in_a_bf16_run_nothing_is_rounded(tiny_task, tmp_path):
    options = {"dtype": "bf16", "recipe": "v2", "batch_size": 1, "grad_accum": 4}
    train.main(arguments(tiny_task, tmp_path / "cached", cache_teacher=tmp_path / "states", **options))
    train.main(arguments(tiny_task, tmp_path / "exact", **options))
    assert terms_of(tmp_path / "cached") == terms_of(tmp_path / "exact")
    assert same(weights_of(tmp_path / "cached"), weights_of(tmp_path / "exact"))


@every_method
def test_a_later_run_never_runs_or_loads_the_body(tiny_task, tmp_path, monkeypatch, capsys, options, teacher):
    options = {**options, "teacher": tiny_task / teacher, "cache_teacher": tmp_path / "states"}
    train.main(arguments(tiny_task, tmp_path / "first", **options))
    assert "states.bin: " in capsys.readouterr().err  # the size, before it is written

    def refuse(*things, **_):
        raise AssertionError("computed again")

    for name in ("load_model", "hidden_at", "predict_tokens"):
        monkeypatch.setattr(cache, name, refuse)
    predict = losses.predict_tokens  # asked under the student's head, not frozen, whether the projected teacher agrees
    monkeypatch.setattr(losses, "predict_tokens", lambda *x: predict(*x) if x[1].requires_grad else refuse())
    loaded, load_model = [], loading.load_model

    def load_and_note(path, *things, **options):
        loaded.append((path, load_model(path, *things, **options)))
        return loaded[-1][1]

    monkeypatch.setattr(loading, "load_model", load_and_note)
    train.main(arguments(tiny_task, tmp_path / "second", **options))
    assert "states.bin: " not in capsys.readouterr().err
    assert same(weights_of(tmp_path / "first"), weights_of(tmp_path / "second"))
    [ends] = [loaded_model for path, loaded_model in loaded if path == tiny_task / teacher]
    assert {name for name, _ in ends.named_parameters()} <= {"embed.weight", "lm_head.weight"}


@pytest.mark.parametrize("name", ["teacher", "student"])  # LLaMA and GPT-2
def test_embedding_and_head_alone_are_read(tiny_task, tmp_path, name):
    """So that a body full of NaN goes unnoticed."""
    whole, spoilt = model.load_model(tiny_task / name), shutil.copytree(tiny_task / name, tmp_path / name)
    weights = load_file(spoilt / "model.safetensors")
    for ours, name in model.hugging_face_names(whole).items():
        if ours not in ("embed.weight", "lm_head.weight"):
            weights[name].fill_(math.nan)
    save_file(weights, spoilt / "model.safetensors")
    with pytest.raises(ValueError, match="NaN"):
        model.load_model(spoilt)
    ends = model.load_model(spoilt, torch.bfloat16, body=False)
    assert torch.equal(ends.embed.weight, whole.embed.weight.bfloat16())
    assert torch.equal(ends.head_weight, whole.head_weight.bfloat16())
    with pytest.raises(ValueError):
        ends(torch.zeros(1, 2, dtype=torch.long))


@pytest.fixture(scope="module")
def two_students(tiny_task, tmp_path_factory):
    """A teacher, a first student, two that read the same texts in other tokens, each of 512 positions; and data of
    three forms, whose prompts are longer by different numbers of tokens in each format."""
    root = tmp_path_factory.mktemp("students")
    lines = [json.loads(line) for line in (tiny_task / "train.jsonl").read_text().splitlines()]
    forms = [
        lambda x, y: {"prompt": " ".join(7 * [x["prompt"]]), "output": x["output"]},
        lambda x, y: {"instruction": x["prompt"], "output": x["output"]},
        lambda x, y: {"instruction": x["prompt"], "input": y["output"] * 2, "output": x["output"]},
    ]
    lines = [forms[i % 3](line, lines[i - 1]) for i, line in enumerate(lines)]
    (root / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = [text for line in lines for text in line.values()]
    tiny.train_tokenizers(texts[:10], str(root / "unused"), str(root / "other"), student_vocabulary=270)
    make_model(tiny_task / "teacher", root / "teacher", max_position_embeddings=512)
    tokens = {"student": [], "other": [], "chatting": ["<|im_start|>", "<|im_end|>"]}
    for seed, name in enumerate(tokens, start=1):
        make_model(tiny_task / "student", root / name, tokens[name], seed, n_positions=512)
    return root


@pytest.mark.parametrize(
    "recipe, second, entries",
    [
        ("v1", {"student": "other"}, 1),
        ("v2", {"student": "chatting", "student_chat": CHAT_TEMPLATES / "smollm2.jinja"}, 1),
        # what is cut for the student is cut for the teacher
        ("v2", {"student": "chatting", "student_chat": CHAT_TEMPLATES / "smollm2.jinja", "max_len": 140}, 2),
    ],
)
def test_a_second_student_reads_what_a_cache_of_its_own_has(two_students, tmp_path, capsys, recipe, second, entries):
    """Bit for bit, however it cuts and wraps the same texts."""
    lengths = {"max_len": 500, "max_prompt_len": 400}
    options = {"data": two_students / "train.jsonl", "recipe": recipe, "max_steps": 4, **lengths}
    train.main(arguments(two_students, tmp_path / "first", cache_teacher=tmp_path / "shared", **options))
    second = {**options, **second, "student": two_students / second["student"]}
    second["max_prompt_len"] = min(400, second["max_len"] - 30)
    for directory in ("shared", "fresh"):
        train.main(arguments(two_students, tmp_path / f"{directory}-run", cache_teacher=tmp_path / directory, **second))
    assert len(list((tmp_path / "shared").iterdir())) == entries
    assert ("cut to fit" in capsys.readouterr().err) == (entries == 2)
    assert terms_of(tmp_path / "shared-run") == terms_of(tmp_path / "fresh-run")
    states = [load_file(tmp_path / f"{name}-run" / "resume" / "state.safetensors") for name in ("shared", "fresh")]
    assert same(*states)


# -- the files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def setting(tiny_task, tmp_path):
    """Rows, and a function that gives their cache."""
    tokenizers = read_tokenizer(tiny_task / "student"), read_tokenizer(tiny_task / "teacher")
    examples = read_examples(tiny_task / "train.jsonl")

    def make(teacher=tiny_task / "teacher", examples=examples, dtype=torch.float32, batch_size=4, **lengths):
        rows, _ = tokenise(examples, *tokenizers, **{"max_len": 96, "max_prompt_len": 48, **lengths})
        return cache.TeacherCache(tmp_path / "states", teacher, rows, dtype, "cpu", batch_size)

    return SimpleNamespace(make=make, examples=examples, teacher=tiny_task / "teacher")


def test_states_are_the_teachers_and_predictions_their_arg_max(setting):
    made = setting.make()
    made.attach_states()
    content = b"".join(row.states.tobytes() for row in sorted(made.rows, key=lambda row: -len(row.teacher)))
    assert (made.folder / "states.bin").read_bytes() == content  # in this order, or files of today would be misread
    teacher = model.load_model(setting.teacher)
    made.attach_predictions(teacher.head_weight[:200])
    for row in made.rows:
        ids = torch.tensor([row.teacher.prompt + row.teacher.response])
        with torch.no_grad():
            hidden = teacher(ids)[0, len(row.teacher.prompt) - 1 : -1]
        states = torch.from_numpy(row.states.copy()).view(torch.bfloat16).float()
        assert torch.allclose(states, hidden, rtol=2**-8, atol=1e-6)
        logits = states @ teacher.head_weight[:200].T
        predicted = torch.from_numpy(row.predictions.copy()).long()[:, None]
        assert torch.allclose(logits.gather(1, predicted)[:, 0], logits.max(1).values, rtol=1e-5)


@pytest.mark.parametrize("tail", [b"", b"not vouched for"])
def test_a_killed_fill_goes_on_where_it_was(setting, monkeypatch, tail):
    whole = setting.make()
    whole.attach_states()
    expected = (whole.folder / "states.bin").read_bytes()
    shutil.rmtree(whole.folder)

    calls, hidden_at = [], cache.hidden_at

    def until_the_fourth(*things):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return hidden_at(*things)

    monkeypatch.setattr(cache, "RECORD_EVERY", 0)
    monkeypatch.setattr(cache, "hidden_at", until_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        setting.make().attach_states()
    assert json.loads((whole.folder / "states.json").read_text())["rows"] == 12
    with open(whole.folder / "states.bin", "ab") as stream:
        stream.write(tail)
    again = setting.make()
    again.attach_states()
    assert len(calls) == 3 + 1 + 7  # ten batches, three of them before, and the call that was cut short
    assert (whole.folder / "states.bin").read_bytes() == expected
    assert all(np.array_equal(a.states, b.states) for a, b in zip(whole.rows, again.rows, strict=True))


@pytest.mark.parametrize("times", [100, 100_000])  # also where more is there than all rows have
def test_a_fill_that_left_no_record_starts_again(setting, times):
    made = setting.make()
    made.folder.mkdir(parents=True)
    (made.folder / "states.bin").write_bytes(b"anything" * times)
    made.attach_states()
    assert (made.folder / "states.bin").stat().st_size == sum(row.states.nbytes for row in made.rows)


def test_what_the_states_depend_on_is_in_the_key(setting, tiny_task, tmp_path):
    other, other_config = tmp_path / "other", tmp_path / "config"
    for directory in (other, other_config):
        shutil.copytree(setting.teacher, directory)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += 2**-10
    save_file(weights, other / "model.safetensors")
    config = json.loads((other_config / "config.json").read_text())
    (other_config / "config.json").write_text(json.dumps({**config, "rope_theta": 5000.0}))
    longer = [*setting.examples[:-1], dataclasses.replace(setting.examples[-1], outputs=["Another answer."])]
    cut = dict(max_len=20, max_prompt_len=10)
    made = [
        setting.make(), setting.make(other), setting.make(other_config), setting.make(examples=longer),
        setting.make(examples=setting.examples[:-1]), setting.make(dtype=torch.bfloat16), setting.make(**cut),
    ]  # fmt: skip
    assert len({entry.folder for entry in made}) == len(made)
    assert setting.make(batch_size=7).folder == made[0].folder
    rows = made[0].rows
    keys = [cache.cache_key(setting.teacher, rows, torch.float32)]
    for ids in (rows[0].teacher.prompt, rows[0].teacher.response):
        ids[-1] ^= 1  # another token, and nothing else
        keys.append(cache.cache_key(setting.teacher, rows, torch.float32))
    rows[0].teacher.response.insert(0, rows[0].teacher.prompt.pop())  # the same tokens, of which one more is predicted
    assert len({*keys, cache.cache_key(setting.teacher, rows, torch.float32)}) == 4
    shutil.copytree(setting.teacher, tmp_path / "moved")
    assert setting.make(tmp_path / "moved").folder == made[0].folder
    digests = set()
    for last in (b"0", b"1"):  # beyond the 16 MiB that are read at once
        (other / "model.safetensors").write_bytes(bytes(1 << 24) + last)
        digests.add(cache.model_digest(other))
    assert len(digests) == 2


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "altered": flip,
    "emptied": lambda file: file.write_bytes(b""),
    "gone": lambda file: file.unlink(),
    "record of fewer rows": lambda file: file.with_suffix(".json").write_text('{"rows": 4, "sha256": "0"}'),
    "record of more rows": lambda file: file.with_suffix(".json").write_text('{"rows": 400, "sha256": "0"}'),
    "record of no number of rows": lambda file: file.with_suffix(".json").write_text('{"rows": "4", "sha256": "0"}'),
    "no record": lambda file: file.with_suffix(".json").write_text("{"),
    "another record": lambda file: file.with_suffix(".json").write_text("[]"),
}


@pytest.mark.parametrize("name", ["states.bin", "predictions-200.bin"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_an_error_that_says_what_to_delete(setting, damage, name):
    head = model.load_model(setting.teacher).head_weight[:200]
    made = setting.make()
    made.attach_states()
    made.attach_predictions(head)
    DAMAGES[damage](made.folder / name)
    again = setting.make()
    with pytest.raises(ValueError, match=rf"{name} is damaged or was changed: delete {made.folder}"):
        again.attach_states()
        again.attach_predictions(head)
    shutil.rmtree(made.folder)
    again.attach_states()


def test_a_disk_without_room_is_an_error_before_the_teacher_runs(setting, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(cache, "load_model", None)
    with pytest.raises(ValueError, match=r"tokens × 96 bytes = .* GB; the disk has 1e-06 GB left"):
        setting.make().attach_states()


def test_a_disk_that_becomes_full_is_named_and_the_fill_goes_on_later(setting, monkeypatch):
    monkeypatch.setattr(cache, "RECORD_EVERY", 0)
    limits, made = resource.getrlimit(resource.RLIMIT_FSIZE), setting.make()
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))  # bytes of a file
    try:
        with pytest.raises(OSError, match=rf"^{made.folder}/states.bin could not be written \(.+\); .* make room"):
            made.attach_states()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert 0 < json.loads((made.folder / "states.json").read_text())["rows"] < len(made.rows)
    made.attach_states()
    assert (made.folder / "states.bin").stat().st_size == sum(row.states.nbytes for row in made.rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_teacher_runs_under_autocast_as_in_training(setting, monkeypatch, dtype):
    """On a GPU, LayerNorm gives other numbers without it."""
    found, hidden_at = set(), cache.hidden_at
    monkeypatch.setattr(cache, "hidden_at", lambda *x: found.add(torch.is_autocast_enabled("cpu")) or hidden_at(*x))
    setting.make(dtype=dtype).attach_states()
    assert found == {dtype == torch.bfloat16}


def test_an_error_of_the_teacher_is_not_one_of_the_disk(setting, monkeypatch):
    def gone(*things):
        raise FileNotFoundError("config.json not found")

    monkeypatch.setattr(cache, "load_model", gone)
    with pytest.raises(FileNotFoundError, match="^config.json not found$"):
        setting.make().attach_states()


def test_a_record_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    cache.write_record(tmp_path / "states.json", {"rows": 1})
    monkeypatch.setattr(cache.os, "fsync", lambda descriptor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cache.write_record(tmp_path / "states.json", {"rows": 2})
    assert json.loads((tmp_path / "states.json").read_text()) == {"rows": 1}


def test_a_finished_file_that_cannot_be_written_is_used(setting, monkeypatch):
    def open_read_only(file, mode="r"):
        assert "r" in mode and "+" not in mode
        return open(file, mode)

    def flock_as_nfs(stream, kind, flock=fcntl.flock):
        if kind & fcntl.LOCK_EX and not stream.writable():
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(stream, kind)

    made = setting.make()
    made.attach_states()
    monkeypatch.setattr(fcntl, "flock", flock_as_nfs)
    monkeypatch.setattr(cache.os, "access", lambda file, mode: False)
    monkeypatch.setattr(cache, "open", open_read_only, raising=False)
    again = setting.make()
    again.attach_states()
    assert all(np.array_equal(a.states, b.states) for a, b in zip(made.rows, again.rows, strict=True))
    (made.folder / "states.json").write_text(json.dumps({"rows": 0, "sha256": hashlib.sha256().hexdigest()}))
    with pytest.raises(ValueError, match=r"states.bin: .* GB are missing, but the file cannot be written"):
        setting.make().attach_states()


def test_two_runs_do_not_fill_one_file_at_once(setting, capsys):
    made = setting.make()
    made.folder.mkdir(parents=True)
    with open(made.folder / "states.bin", "ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_SH)  # even this one excludes who writes
        other = threading.Thread(target=made.attach_states)
        other.start()
        waited = time.monotonic()
        while "waiting" not in capsys.readouterr().err:
            assert other.is_alive() and time.monotonic() - waited < 60
            time.sleep(0.01)
        assert stream.seek(0, 2) == 0
    other.join()
    assert made.rows[0].states is not None
