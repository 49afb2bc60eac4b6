"""The analyses: what the simulation converges to, what the structure distance ignores, and what the pictures show."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import model
import train
from data import collate, tokenise
from experiments import analyse, tiny
from losses import DIVERGENCES
from runtime.formats import read_examples
from runtime.tokenizer import read_tokenizer

SMALL = {"states": 4, "repetitions": 3}


def gap(run, setting):
    """Largest difference between a student's and the teacher's probability, per setting."""
    student = (run["student"][setting] @ run["heads"][setting].mT).softmax(-1)
    return float((student - (run["teacher"] @ run["heads"][1].mT).softmax(-1)).abs().max())


# ---------------------------------------------------------------------------------------------------------------------
# The simulation


def test_a_shared_head_brings_the_states_to_the_teachers():
    run = analyse.simulate("fkl", vocabulary=16, steps=3000, **SMALL)
    assert gap(run, 1) < 0.01
    # a confident teacher leaves the KL divergences flat around its state: close, from 4 away on average, but slowly
    assert (run["student"][1] - run["teacher"]).abs().max() < 0.2
    assert analyse.structure_distance(run["teacher"], run["student"][1]).max() < 0.02
    # a head of rank 2 of its own cannot produce the teacher's distribution over 16 tokens, so neither converges
    assert gap(run, 0) > 0.1 and run["losses"][-1, 0].min() > 100 * run["losses"][-1, 1].max()


# ---------------------------------------------------------------------------------------------------------------------
# The structure distance


def test_structure_by_hand():
    cosine, product = analyse.structure(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]]))
    half = 0.5**0.5
    torch.testing.assert_close(cosine, torch.tensor([[1, 0, half], [0, 1, half], [half, half, 1]]))
    expected = torch.tensor([[1, 0, 3.0], [0, 4, 6], [3, 6, 18]])
    torch.testing.assert_close(product, 3 * expected / expected.sum(1, keepdim=True))


def test_structure_distance_ignores_rotation_scale_and_width_and_nothing_else():
    torch.manual_seed(0)
    hidden = torch.randn(7, 5)
    rotation = torch.linalg.qr(torch.randn(5, 5))[0]
    wider = torch.cat([hidden @ rotation * 3, torch.zeros(7, 4)], 1) @ torch.linalg.qr(torch.randn(9, 9))[0]
    for copy in (hidden, hidden @ rotation, 3 * hidden, wider):
        assert analyse.structure_distance(hidden, copy).max() < 1e-5
    for other in (hidden + 1, hidden.flip(0), hidden * torch.tensor([9.0, 1, 1, 1, 1])):
        assert analyse.structure_distance(hidden, other).min() > 0.05
    longer = hidden * torch.arange(1.0, 8)[:, None]  # lengths alone: the cosines do not see them
    assert analyse.structure_distance(hidden, longer)[0] < 1e-5 < 0.05 < analyse.structure_distance(hidden, longer)[1]


@pytest.fixture(scope="module")
def pair(tiny_task):
    """Both models, and the tokenised test examples, aligned."""
    models = [model.load_model(tiny_task / name).eval() for name in ("teacher", "student")]
    tokenizers = [read_tokenizer(tiny_task / name) for name in ("student", "teacher")]
    rows, _ = tokenise(read_examples(tiny_task / "test.jsonl"), *tokenizers, align="eta")
    return analyse.Pair(*models, rows, tuple(tokenizer.eos_id for tokenizer in tokenizers))


@torch.no_grad()
def states_alone(pair, row):
    """The states that predict an example's response, of the teacher and of the student."""
    sides = (pair.teacher, row.teacher), (pair.student, row.student)
    return [m(torch.tensor([side.prompt + side.response[:-1]]))[0, len(side.prompt) - 1 :] for m, side in sides]


def test_example_distances_are_those_of_each_example_alone(pair):
    together = analyse.example_distances(pair, size=4)
    for row, found in zip(pair.rows, together, strict=True):
        hidden = [states[index] for states, index in zip(states_alone(pair, row), row.pairs, strict=True)]
        torch.testing.assert_close(found, analyse.structure_distance(*hidden), rtol=1e-4, atol=1e-5)


def test_knowledge_is_that_of_single_distributions(pair):
    """Against torch's own entropy and cross-entropy, a token at a time."""
    teacher, student = pair.teacher, pair.student
    torch.manual_seed(0)
    t2s = torch.nn.Linear(teacher.head_weight.shape[1], student.head_weight.shape[1])
    expected = {"teacher": [], "student": [], "projected teacher": []}
    with torch.no_grad():
        for row in pair.rows:
            theirs, ours = states_alone(pair, row)
            for i, j in zip(*row.pairs, strict=True):
                at = {"teacher": (teacher.logits(theirs[i]), row.teacher.response[i]),
                      "student": (student.logits(ours[j]), row.student.response[j]),
                      "projected teacher": (student.logits(t2s(theirs[i])), row.student.response[j])}  # fmt: skip
                for who, (logits, gold) in at.items():
                    entropy = torch.distributions.Categorical(logits=logits).entropy()
                    nats = torch.nn.functional.cross_entropy(logits, torch.tensor(gold))
                    expected[who].append(torch.stack([entropy, nats, (logits.argmax() == gold).float()]))
    found = analyse.knowledge(pair, {"t2s.weight": t2s.weight, "t2s.bias": t2s.bias}, size=4)
    assert found.keys() == expected.keys()
    for who, values in expected.items():
        torch.testing.assert_close(found[who], torch.stack(values).double().mean(0), rtol=1e-4, atol=1e-6)
    without_bias = analyse.knowledge(pair, {"t2s.weight": t2s.weight})
    assert without_bias["projected teacher"][0] != found["projected teacher"][0]
    assert analyse.knowledge(pair, {}).keys() == {"teacher", "student"}


# ---------------------------------------------------------------------------------------------------------------------
# Attention and pictures


def test_attention_is_what_training_computes(pair, tiny_task, monkeypatch):
    """With these weights on the values, the projected teacher states are those that the loss is taken on."""
    tokenizers = read_tokenizer(tiny_task / "student"), read_tokenizer(tiny_task / "teacher")
    o = train.check_options(train.Options("-", "-", "-", recipe="v1", align="cma", device="cpu"))
    method = train.Method(o, pair.student, tokenizers[0], pair.teacher, tokenizers[1])
    batch, seen = collate(pair.rows[:1], *pair.ends), []
    attend = train.cross_model_attention
    monkeypatch.setattr(train, "cross_model_attention", lambda *a: seen.append(attend(*a)) or seen[-1])
    with torch.no_grad():
        answer = method.ask_teacher(batch)
        totals = method.count(pair.student, [batch], [answer], [batch])
        method.loss(pair.student, batch, answer, totals)
        weights = analyse.attention(pair.teacher, pair.student, batch, method.projectors.query)
        label_embeddings = pair.teacher.embed.weight[batch.teacher.labels]
        values = method.projectors.t2s(answer.hidden / totals.std.hidden + label_embeddings / totals.std.label)
    torch.testing.assert_close(weights @ values, seen[0][0])
    torch.testing.assert_close(weights.sum(1), torch.ones(len(pair.rows[0].student.response)))


def test_tokens_are_shown_as_text_where_they_are_text():
    labels = {b" a\n": "␣a↵", b"\xc3\xa9": "é", b"\xc3": "C3", b"\x00": "U+0", "北".encode(): "U+5317", None: "end"}
    assert {token: analyse.show_token(token) for token in labels} == labels


def test_the_heat_map_frames_the_aligned_pairs():
    pytest.importorskip("matplotlib")
    weights, pairs = torch.eye(3)[:2], (np.array([0, 2]), np.array([0, 1]))
    figure = analyse.draw_attention(weights, [b"a", b"$x$", None], [b"ab", None], pairs)
    assert [box.get_xy() for box in figure.axes[0].patches] == [(-0.5, -0.5), (1.5, 0.5)]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["a", "$x$", "end"]
    figure.canvas.draw()


# ---------------------------------------------------------------------------------------------------------------------
# The commands


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_simulate_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    analyse.main(["simulate", "--repetitions", "3", "--steps", "4", "--out", str(tmp_path / "new" / "folder")])
    printed = capsys.readouterr().out
    rows = [line.split("|")[1].strip() for line in printed.splitlines()[2 : 2 + len(DIVERGENCES)]]
    assert rows == list(DIVERGENCES) and printed.count("±") == 6 * len(DIVERGENCES)
    assert is_png(tmp_path / "new" / "folder" / "simulation.png")


def test_curves_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    logs = {"a": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "valid_ce": 3.0}], "b": [{"step": 1, "loss": 4.0}]}
    for name, lines in logs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = [str(tmp_path / name) for name in logs]
    analyse.main(["curves", *runs, "--out", str(tmp_path)])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[:4]]
    assert rows[0] == ["", "loss", "valid_ce"] and rows[2:] == [[runs[0], "1.0000", "3.0000"], [runs[1], "4.0000", "-"]]
    assert is_png(tmp_path / "curves.png")
    panels = analyse.draw_curves(logs, ["loss", "valid_ce"]).axes
    drawn = [[line.get_xydata().tolist() for line in panel.lines] for panel in panels]
    assert drawn == [[[[1, 2], [2, 1]], [[1, 4]]], [[[2, 3]], []], [[], []]]
    with pytest.raises(SystemExit, match="error: .*nowhere"):
        analyse.main(["curves", "nowhere", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="error: .*curves.png"):
        analyse.main(["curves", *runs, "--out", str(tmp_path / "curves.png")])  # a file


def test_structure_command(tiny_task, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    where = {name: str(tiny_task / name) for name in ("teacher", "student")}
    data = ["--data", str(tiny_task / "test.jsonl"), "--limit", "4", "--out", str(tmp_path)]
    analyse.main(["structure", "--teacher", where["teacher"], "--student", where["student"], where["teacher"], *data])
    student, teacher = capsys.readouterr().out.splitlines()[2:4]
    assert "4 of 4" in student and "0.0000" not in student
    assert [cell.strip() for cell in teacher.split("|")[2:5]] == ["4 of 4", "0.0000", "0.0000"]
    assert is_png(tmp_path / "structure.png")
    for name, place in {"teacher": "teacher/student", "student": "pretrained/student"}.items():
        shutil.copytree(where[name], tmp_path / place)
    monkeypatch.setattr(tiny, "ROOT", str(tmp_path))
    analyse.main(["structure", "--teacher", "tiny", "--student", "tiny", *data])  # the embedded task's two models
    assert capsys.readouterr().out.splitlines()[2].split("|")[2:] == student.split("|")[2:]


def test_knowledge_command(tiny_task, tmp_path, capsys, monkeypatch):
    """Needs no matplotlib. A run without projectors, or with CMA's, has no projected teacher."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run, file = tmp_path / "run", tmp_path / "run" / "projectors.safetensors"
    shutil.copytree(tiny_task / "student", run / "student")
    teacher, student = (model.load_model(tiny_task / name) for name in ("teacher", "student"))
    shape = student.head_weight.shape[1], teacher.head_weight.shape[1]
    command = ["knowledge", "--teacher", str(tiny_task / "teacher"), "--student", str(run)]
    command += ["--data", str(tiny_task / "test.jsonl"), "--limit", "4"]

    def who() -> list[str]:
        analyse.main(command)
        lines = capsys.readouterr().out.splitlines()
        assert all(len(line.split("|")) == 6 for line in lines)
        return [line.split("|")[1].strip().removeprefix(f"{run}: ") for line in lines[2:]]

    with pytest.raises(SystemExit, match="error: --limit 0: must be at least 1"):
        analyse.main([*command[:-1], "0"])
    assert who() == ["teacher", "student"]
    save_file({"t2s.weight": torch.zeros(shape)}, file)
    assert who() == ["teacher", "student", "projected teacher"]
    query = torch.zeros(2 * shape[1], 2 * shape[0])
    save_file({"t2s.weight": torch.zeros(shape), "query.weight": query}, file)
    assert who() == ["teacher", "student"]
    save_file({"t2s.weight": torch.zeros(3, 4)}, file)
    with pytest.raises(SystemExit, match=r"t2s.weight \[3, 4\] does not fit; expected t2s.weight"):
        analyse.main(command)
    with pytest.raises(SystemExit, match="--device foo: not a device"):
        analyse.main([*command, "--device", "foo"])
    file.write_bytes(b"no")
    with pytest.raises(SystemExit, match=f"{file}: not a readable"):
        analyse.main(command)


def test_alignment_command(tiny_task, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    teacher, student = (model.load_model(tiny_task / name) for name in ("teacher", "student"))
    rows, columns = 2 * teacher.head_weight.shape[1], 2 * student.head_weight.shape[1]
    save_file({"query.weight": torch.zeros(rows, columns)}, tmp_path / "projectors.safetensors")
    common = ["alignment", "--teacher", str(tiny_task / "teacher"), "--student", str(tiny_task / "student")]
    example = (tiny_task / "test.jsonl").read_text().splitlines()[0]
    (tmp_path / "gaps.jsonl").write_text(f'\n{example}\n{{"prompt": "a", "output": "b"}}')  # lines count, not examples
    common += ["--data", str(tmp_path / "gaps.jsonl"), "--out", str(tmp_path)]
    analyse.main([*common, "--line", "2"])
    said = capsys.readouterr().out.splitlines()[-3]
    assert said.startswith("teacher ␣") and len(said.split()) > 5 and not (tmp_path / "attention.png").exists()
    analyse.main([*common, "--line", "2", "--projectors", str(tmp_path / "projectors.safetensors")])
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[4].split("|")[1:-1]]
    assert cells[3] == cells[4] == f"{1 / int(cells[0]):.3f}"  # a query of zeros attends to everything alike
    assert is_png(tmp_path / "attention.png")
    with pytest.raises(SystemExit, match="--line 1: .* has no example on that line"):
        analyse.main([*common, "--line", "1"])
    with pytest.raises(SystemExit, match="not a readable safetensors file"):
        analyse.main([*common, "--line", "2", "--projectors", str(tmp_path / "attention.png")])
    with pytest.raises(SystemExit, match="not a readable safetensors file"):  # a run, not its file
        analyse.main([*common, "--line", "2", "--projectors", str(tmp_path)])
    long = {"prompt": "What?", "output": 99 * "The fox sleeps. "}  # cut to 128 positions, as in training
    (tmp_path / "long.jsonl").write_text(json.dumps(long))
    projectors = ["--projectors", str(tmp_path / "projectors.safetensors"), "--line", "1"]
    analyse.main([*common, "--data", str(tmp_path / "long.jsonl"), *projectors])
    save_file({"t2s.weight": torch.zeros(columns // 2, rows // 2)}, tmp_path / "projectors.safetensors")
    with pytest.raises(SystemExit, match="no query.weight.*cma"):
        analyse.main([*common, "--line", "2", "--projectors", str(tmp_path / "projectors.safetensors")])


def test_a_missing_matplotlib_is_told(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="requirements-dev.txt"):
        analyse.main(["simulate", "--out", str(tmp_path)])
