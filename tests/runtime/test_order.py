"""Which examples are in which update and pass (--bucket, --tokens-per-batch), what is prepared ahead, and that
torch.compile compiles once."""

import itertools
import json
import random
import shutil
import threading

import pytest
import torch
from helpers import arguments, log_of, same, weights_of
from safetensors.torch import load_file

import train
from data import Row, Side
from runtime import load as loading
from runtime.order import count_tokens, measure_padding, order_updates, prefetch, split_update

SPEEDS = {"tokens_per_second", "generation_share", "generation_tokens_per_second"}


def random_rows(count, seed=0, teacher=True):
    draw = random.Random(seed)

    def side():
        return Side([1] * draw.randint(1, 30), [2] * draw.choice([1, 5, 20, 70]))

    return [Row(side(), side() if teacher else None) for _ in range(count)]


def length(row):
    return max(len(side.prompt) + len(side.response) - 1 for side in (row.student, row.teacher) if side)


@pytest.mark.parametrize("examples, per_update", [(1, 4), (7, 3), (40, 8), (1000, 8), (1003, 8)])
def test_grouped_updates_are_a_permutation_that_can_be_taken_up_anywhere(examples, per_update):
    draw = random.Random(1)
    lengths = [draw.randint(1, 500) for _ in range(examples)]
    updates = -(-examples // per_update)
    whole = list(itertools.islice(order_updates(examples, per_update, 3, 0, lengths), 2 * updates))
    for epoch in (whole[:updates], whole[updates:]):
        assert sorted(index for update in epoch for index in update) == list(range(examples))
        assert sorted(map(len, epoch))[1:] == [per_update] * (updates - 1)
    for start in range(0, 2 * updates, max(1, updates // 5)):
        rest = order_updates(examples, per_update, 3, start, lengths)
        assert list(itertools.islice(rest, 2 * updates - start)) == whole[start:]
    if examples < 40:
        return
    spread = [max(lengths[i] for i in update) - min(lengths[i] for i in update) for update in whole]
    assert sum(spread) / len(spread) < 500 / 4  # of random ones, 390
    first, second = ([sum(lengths[i] for i in u) / len(u) for u in part] for part in (whole[:updates], whole[updates:]))
    assert first != second and first != sorted(first) and first != sorted(first, reverse=True)
    other = list(itertools.islice(order_updates(examples, per_update, 4, 0, lengths), updates))
    assert other != whole[:updates]


@pytest.mark.parametrize("examples, per_update", [(10, 3), (12, 4), (5, 8), (1, 1)])
def test_update_order(examples, per_update):
    updates = -(-examples // per_update)

    def take(start=0, seed=0, count=4 * updates):
        order = order_updates(examples, per_update, seed, start)
        return [next(order) for _ in range(count)]

    order = take()
    epochs = [sum(order[e * updates : (e + 1) * updates], []) for e in range(4)]
    assert all(sorted(epoch) == list(range(examples)) for epoch in epochs)  # a permutation each
    assert all(len(update) <= per_update for update in order)
    assert all(len(update) == per_update for update in order if update not in order[updates - 1 :: updates])
    assert take() == order
    for start in range(2 * updates + 1):
        assert take(start, count=updates) == order[start : start + updates]
    if examples > 4:
        assert len({tuple(epoch) for epoch in epochs}) == 4
        assert take(seed=1) != order and sum(take(seed=1)[:updates], []) not in epochs


def test_without_lengths_the_order_is_what_it_was():
    """Runs of earlier versions can be resumed."""
    order = torch.randperm(10, generator=torch.Generator().manual_seed(5 * 1_000_003 + 1)).tolist()
    assert list(itertools.islice(order_updates(10, 4, 5, 3), 3)) == [order[:4], order[4:8], order[8:]]


@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize("tokens", [99, 100, 250, 5000])
def test_a_budget_is_kept_and_nothing_is_lost(teacher, tokens):
    rows = random_rows(60, teacher=teacher)
    parts = split_update(rows, 8, tokens)
    assert sorted(map(id, itertools.chain(*parts))) == sorted(map(id, rows))
    totals = [sum(count_tokens(row)) for part in parts for row in part]
    assert totals == sorted(totals, reverse=True)
    assert all(len(part) * max(map(length, part)) <= tokens for part in parts)
    for part, following in zip(parts, parts[1:], strict=False):  # as many as fit
        assert (len(part) + 1) * max(map(length, [*part, following[0]])) > tokens
    if tokens < 5000:  # which is more than all have
        assert measure_padding(parts) < measure_padding([rows[i : i + 8] for i in range(0, 60, 8)])
    assert split_update([], 8, tokens) == split_update([], 8) == []
    assert split_update(rows, 8) == [rows[i : i + 8] for i in range(0, 60, 8)]


def test_padding_share_by_hand():
    rows = [Row(Side([1], [2] * 4), Side([1], [2] * 2)), Row(Side([1], [2] * 2), Side([1], [2] * 2))]
    assert measure_padding([rows]) == pytest.approx(2 / 12)  # 4 and 2 of 4 positions, 2 and 2 of 2
    assert measure_padding([rows[:1], rows[1:]]) == 0


@pytest.mark.parametrize(
    "method, recipe, align, teacher, on_policy",
    [
        ("dskd", "v2", "eta", "teacher", 0),
        ("dskd", "v1", "cma", "teacher", 0),
        ("dskd", "v2", "none", "twin", 0),
        ("kd", "v2", "none", "twin", 0),
        ("sft", "v2", "auto", "teacher", 0),
        ("uld", "v2", "auto", "teacher", 0),
        ("mined", "v2", "auto", "teacher", 0),
    ],
)
def test_a_budget_changes_no_number(tiny_task, tmp_path, capsys, method, recipe, align, teacher, on_policy):
    options = {"method": method, "recipe": recipe, "align": align, "teacher": tiny_task / teacher, "batch_size": 8}
    train.main(arguments(tiny_task, tmp_path / "one", **options))
    train.main(arguments(tiny_task, tmp_path / "many", tokens_per_batch=130, **options))
    reports = [line for line in capsys.readouterr().err.splitlines() if "batches per epoch" in line]
    assert reports[0].startswith("5 batches") and int(reports[1].split()[0]) > 10
    shares = [float(report.split(", ")[1].split("%")[0]) for report in reports]
    assert shares[1] < shares[0]
    for one, many in zip(log_of(tmp_path / "one"), log_of(tmp_path / "many"), strict=True):
        for name in one.keys() - SPEEDS:
            assert many[name] == pytest.approx(one[name], rel=1e-3), name


@pytest.mark.parametrize("bucket", [True, None])
@pytest.mark.parametrize("on_policy", [0, 0.5])
def test_a_resumed_run_with_batches_by_length_equals_an_uninterrupted_one(
    tiny_task, tmp_path, stopped_by_ctrl_c, bucket, on_policy
):
    """Over the end of an epoch, which is an update of four examples, with dropout."""
    student = tmp_path / "student"
    shutil.copytree(tiny_task / "student", student)
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps({**config, "embd_pdrop": 0.1, "resid_pdrop": 0.1}))
    options = {"student": student, "bucket": bucket, "tokens_per_batch": 200, "on_policy": on_policy, "batch_size": 6,
               "grad_accum": 2, "max_steps": 6, "checkpoint_every": 2}  # fmt: skip
    train.main(arguments(tiny_task, tmp_path / "whole", **options))
    with stopped_by_ctrl_c():
        train.main(arguments(tiny_task, tmp_path / "parts", **options))
    train.main(arguments(tiny_task, tmp_path / "parts", resume=True, **options))
    assert same(*(load_file(tmp_path / name / "resume" / "state.safetensors") for name in ("whole", "parts")))
    logs = [[{k: v for k, v in line.items() if k not in SPEEDS} for line in log_of(tmp_path / name)]
            for name in ("whole", "parts")]  # fmt: skip
    assert logs[0] == logs[1] and [line["step"] for line in logs[0]] == [1, 2, 3, 4, 5, 6]


def test_bucketed_runs_see_less_padding_and_learn(tiny_task, tmp_path, capsys):
    for bucket in (None, True):
        options = {"method": "sft", "max_steps": 20, "lr": 1e-2, "bucket": bucket}
        train.main(arguments(tiny_task, tmp_path / str(bucket), **options))
        assert log_of(tmp_path / str(bucket))[-1]["ce"] < log_of(tmp_path / str(bucket))[0]["ce"] - 1
    reports = [line for line in capsys.readouterr().err.splitlines() if "batches per epoch" in line]
    plain, bucketed = (float(report.split(", ")[1].split("%")[0]) for report in reports)
    assert bucketed < plain / 2


def test_a_budget_below_one_example_is_an_error(tiny_task, tmp_path):
    with pytest.raises(SystemExit, match="--tokens-per-batch 95: one example may have --max-len 96"):
        train.main(arguments(tiny_task, tmp_path / "run", tokens_per_batch=95))


# -- ahead of the loop -------------------------------------------------------------------------------------------------


def test_items_are_made_by_a_thread_one_ahead():
    made, second = [], threading.Event()

    def items():
        for number in range(4):
            made.append(threading.current_thread())
            if number == 1:
                second.set()
            yield number
        raise ValueError("the fifth")

    stream = prefetch(items())
    assert next(stream) == 0 and second.wait(30)  # the second is made while the first is in use
    assert len(made) == 2
    assert [next(stream) for _ in range(3)] == [1, 2, 3]
    assert threading.current_thread() not in made
    with pytest.raises(ValueError, match="the fifth"):
        next(stream)
    assert list(prefetch(iter([]))) == [] and list(prefetch(iter("abc"))) == ["a", "b", "c"]


def test_batches_are_made_outside_the_loops_thread(tiny_task, tmp_path, monkeypatch):
    threads, collate = [], loading.collate

    def noted(*arguments):
        threads.append(threading.current_thread())
        return collate(*arguments)

    monkeypatch.setattr(loading, "collate", noted)
    train.main(arguments(tiny_task, tmp_path / "run"))
    assert len(threads) >= 2 and threading.current_thread() not in threads


# -- torch.compile -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["teacher", "twin"])
def test_one_compilation_serves_batches_of_all_lengths(tiny_task, tmp_path, teacher):
    options = {"teacher": tiny_task / teacher, "max_steps": 30, "batch_size": 6}  # also an update of four, per epoch
    torch.compiler.reset()
    train.main(arguments(tiny_task, tmp_path / "run", compile=True, **options))
    counts = [line["compilations"] for line in log_of(tmp_path / "run")]
    assert 0 < counts[0] <= counts[-1] <= 4 and counts[2] == counts[-1], counts
    train.main(arguments(tiny_task, tmp_path / "eager", **options))
    assert "compilations" not in log_of(tmp_path / "eager")[0]
    last = [log_of(tmp_path / name)[-1]["loss"] for name in ("run", "eager")]
    assert last[0] == pytest.approx(last[1], rel=1e-3)
    assert not same(weights_of(tmp_path / "run"), {})
