"""Generation on a CUDA card, a token's kernels launched together.

A token of a small model is a few hundred kernels of some microseconds each, which the processor launches one by one in
several times the time that the card needs for them. As a CUDA graph it launches them at once.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor, nn


@contextmanager
def graphed(model: nn.Module) -> Iterator[None]:
    """Meanwhile `Decoder.decode` is replayed as a CUDA graph. The weights must not change, nor where they lie. On other
    devices nothing changes, nor for a sharded model, whose blocks wait for other processes."""
    if not model.embed.weight.is_cuda or model._forward_pre_hooks:
        yield
        return
    model.decode = DecodingGraph(model.decode)
    try:
        yield
    finally:
        del model.decode


class DecodingGraph:
    """`decode(tokens, cache) -> logits` as a graph of the cache's buffers, which is captured anew when they are others.
    The logits are valid until the next call."""

    def __init__(self, decode: Callable):
        self.decode, self.of = decode, None

    def __call__(self, tokens: Tensor, cache) -> Tensor:
        buffers = weakref.ref(cache), len(tokens), cache.slots
        if buffers != self.of:  # what is captured must have run before: the libraries choose their kernels then
            self.of, self.replay = buffers, None
            return self.decode(tokens, cache)
        if self.replay is None:
            self.tokens = tokens.clone()
            self.replay = capture(partial(self.decode, self.tokens, cache), tokens.device)
        self.tokens.copy_(tokens)
        return self.replay()


def capture(run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """What `run` would launch on the device, as a graph: each call launches it again, on the same memory, and returns
    the same tensor. Not by `torch.cuda.graph`, which first gives all free memory back to the system."""
    graph, stream = torch.cuda.CUDAGraph(), side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")  # another thread may be copying the next batch
        output = run()
        graph.capture_end()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs of a device, which so share what cuBLAS keeps for every stream."""
    return torch.cuda.Stream(device)
