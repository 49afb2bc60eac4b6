"""Which examples are in which update, and in which of its forward passes."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from data import Batch, ModelBatch, Row


def order_updates(
    examples: int, per_update: int, seed: int, start: int = 0, lengths: list[int] | None = None
) -> Iterator[list[int]]:
    """Lists of example indices, one per update from the `start`-th on, without end. The shuffle of an epoch depends
    only on (seed, epoch), so a run can be resumed at any update. The last update of an epoch may be smaller. With
    `lengths` the examples of an update have similar lengths: each window of 50 shuffled updates is sorted and cut
    again, then the updates of the epoch are shuffled."""
    while True:
        epoch, first = divmod(start, -(-examples // per_update))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(examples, generator=generator)
        updates = order.split(per_update)
        if lengths is not None:
            windows = [sorted(window.tolist(), key=lengths.__getitem__) for window in order.split(50 * per_update)]
            updates = torch.tensor(sum(windows, [])).split(per_update)
            updates = [updates[place] for place in torch.randperm(len(updates), generator=generator)]
        for update in updates[first:]:
            yield update.tolist()
        start = (epoch + 1) * len(updates)


def count_tokens(row: Row) -> list[int]:
    """How many tokens of the row each model reads: all but the last, which predicts nothing."""
    return [len(side) - 1 for side in (row.student, row.teacher) if side is not None]


def split_update(rows: list[Row], batch_size: int, tokens: int = 0) -> list[list[Row]]:
    """The rows of one update as forward passes: in their order, `batch_size` each; or, with a budget of `tokens`, the
    longest first, as many as fit: rows × longest ≤ tokens for each model, padding included. One row always fits."""
    if not tokens:
        return [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    parts: list[list[Row]] = []
    longest = 0
    for row in sorted(rows, key=lambda row: sum(count_tokens(row)), reverse=True):
        width = max(count_tokens(row))
        longest = max(longest, width)
        if not parts or longest * (len(parts[-1]) + 1) > tokens:
            parts.append([])
            longest = width
        parts[-1].append(row)
    return parts


def measure_padding(batches: list[list[Row]]) -> float:
    """Share of padding among all positions of the batches, of both models."""
    real = padded = 0
    for rows in batches:
        for lengths in zip(*map(count_tokens, rows), strict=True):  # of one model
            real += sum(lengths)
            padded += len(lengths) * max(lengths)
    return 1 - real / padded


def drop_responses(batch: Batch) -> Batch:
    """A batch of one padding token per model and no response position, for a process that has no example left."""

    def empty(side: ModelBatch) -> ModelBatch:
        nothing = side.positions[:0]
        return ModelBatch(side.input_ids[:1, :1], side.real[:1], nothing, nothing, lengths=[0])

    tensors = {name: value[:0] for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    sides = {name: empty(value) for name, value in vars(batch).items() if isinstance(value, ModelBatch)}
    return replace(batch, align_ratios=[], **tensors, **sides)


def prefetch(items: Iterator) -> Iterator:
    """The same items, each prepared by a thread while the previous one is in use."""
    with ThreadPoolExecutor(1) as worker:
        coming = worker.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = worker.submit(next, items, None)
            yield item
