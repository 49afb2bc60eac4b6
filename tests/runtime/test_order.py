"""Which examples are in which update and pass (--bucket, --tokens-per-batch), what is prepared ahead, and that
torch.compile compiles once."""

import itertools
import random
import re
import threading

import pytest
import torch
from helpers import arguments, load_run, log_of, same, weights_of

import train
from data import Row, Side
from runtime import load as loading
from runtime.order import count_tokens, measure_padding, order_updates, prefetch, split_update


def random_rows(count, seed=0, teacher=True):
    draw = random.Random(seed)

    def side():
        return Side([1] * draw.randint(1, 30), [2] * draw.choice([1, 5, 20, 70]))

    return [Row(side(), side() if teacher else None) for _ in range(count)]


def length(row):
    return max(len(side.prompt) + len(side.response) - 1 for side in (row.student, row.teacher) if side)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("examples, per_update", [(1, 4), (7, 3), (12, 4), (40, 8), (1003, 8)])
def test_updates_are_a_permutation_that_can_be_taken_up_anywhere(examples, per_update, grouped):
    draw = random.Random(1)
    lengths = [draw.randint(1, 500) for _ in range(examples)] if grouped else None
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
    other = list(itertools.islice(order_updates(examples, per_update, 4, 0, lengths), updates))
    assert whole[:updates] != whole[updates:] and other != whole[:updates]
    if not grouped:
        return
    spread = [max(lengths[i] for i in update) - min(lengths[i] for i in update) for update in whole]
    assert sum(spread) / len(spread) < 500 / 4  # of random ones, 390
    if updates > 50:  # more than one window: each epoch puts other examples together
        assert len({frozenset(update) for update in whole}) > 1.9 * updates
    first, second = ([sum(lengths[i] for i in u) / len(u) for u in part] for part in (whole[:updates], whole[updates:]))
    assert first != second and first != sorted(first) and first != sorted(first, reverse=True)


def test_the_seed_decides_order_and_first_weights(tiny_task, tmp_path):
    options = {"method": "sft", "teacher": None, "from_scratch": True}
    found = [load_run(arguments(tiny_task, tmp_path, **options, seed=seed)) for seed in (1, 1, 2)]
    orders = [next(pieces.order(o)) for o, pieces in found]
    weights = [pieces.student.head_weight for _, pieces in found]
    assert orders[0] == orders[1] != orders[2]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_without_lengths_the_order_is_what_it_was():
    """Runs of earlier versions can be resumed."""
    order = torch.randperm(10, generator=torch.Generator().manual_seed(5 * 1_000_003 + 1)).tolist()
    assert list(itertools.islice(order_updates(10, 4, 5, 3), 3)) == [order[:4], order[4:8], order[8:]]


def test_with_lengths_windows_of_50_updates_are_sorted():
    """And the order is what it was."""
    generator, lengths = torch.Generator().manual_seed(5 * 1_000_003), [n * 7 % 300 for n in range(300)]
    order = torch.randperm(300, generator=generator).tolist()
    whole = sum((sorted(order[i : i + 100], key=lengths.__getitem__) for i in (0, 100, 200)), [])
    expected = [whole[2 * n : 2 * n + 2] for n in torch.randperm(150, generator=generator).tolist()]
    assert list(itertools.islice(order_updates(300, 2, 5, 0, lengths), 150)) == expected


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


def read_padding(said: str) -> list[tuple[int, int, int]]:
    """Of each run: the updates and the forward passes of an epoch, and the share of padding in per cent."""
    found = re.findall(r"an epoch: (\d+) updates in (\d+) forward passes; (\d+)% of their positions are padding", said)
    return [tuple(map(int, numbers)) for numbers in found]


def test_how_an_update_is_split_changes_no_number(tiny_task, tmp_path, capsys):
    """By a budget of tokens, or by gradient accumulation; test_method.py has this for all methods."""
    ways = {"one": {"batch_size": 8}, "budget": {"batch_size": 8, "tokens_per_batch": 130},
            "accumulated": {"batch_size": 2, "grad_accum": 4}}  # fmt: skip
    for name, options in ways.items():
        train.main(arguments(tiny_task, tmp_path / name, **options))
    reports = read_padding(capsys.readouterr().err)
    assert [updates for updates, _, _ in reports] == [5, 5, 5]
    assert reports[0][1] == 5 and reports[1][1] > 10 and reports[2][1] == 20
    assert reports[1][2] < reports[0][2]
    one, *others = (log_of(tmp_path / name) for name in ways)
    for other in others:
        for line, again in zip(one, other, strict=True):
            assert again.keys() == line.keys()
            for name in line.keys() - {"tokens_per_second"}:
                assert again[name] == pytest.approx(line[name], rel=1e-3), name


def test_bucketed_runs_see_less_padding(tiny_task, tmp_path, capsys):
    for bucket in (None, True):
        train.main(arguments(tiny_task, tmp_path / str(bucket), method="sft", max_steps=1, bucket=bucket))
    said = capsys.readouterr().err
    (_, _, plain), (_, _, bucketed) = read_padding(said)
    assert bucketed < plain / 2
    assert said.count("--bucket reduces that") == 1  # not where it is given


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
