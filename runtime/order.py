"""Which examples are in which update, and in which forward pass of it."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from data import Batch, ModelBatch, Row


def order_updates(
    examples: int, per_update: int, seed: int, start: int = 0, lengths: list[int] | None = None
) -> Iterator[list[int]]:
    """Endless lists of example indices, one per update from the `start`-th on; each epoch is shuffled anew, by (seed,
    epoch) alone, so that a run can be taken up at any update. The last update of an epoch may be smaller. With
    `lengths` the examples of an update are of similar length: windows of 50 shuffled updates are sorted and cut anew,
    and the updates of the epoch shuffled."""
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
    """How many tokens each model reads of it: nothing follows the last one."""
    return [len(side) - 1 for side in (row.student, row.teacher) if side is not None]


def split_update(rows: list[Row], batch_size: int, tokens: int = 0) -> list[list[Row]]:
    """The rows of one update as forward passes: `batch_size` at a time as they come or, with a budget of `tokens`, the
    longest first and as many as fit: rows × longest ≤ tokens for each model, padding counted. A row always fits."""
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
    """The same items, each made by a thread while the one before it is used."""
    with ThreadPoolExecutor(1) as worker:
        coming = worker.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = worker.submit(next, items, None)
            yield item
