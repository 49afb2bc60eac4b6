"""Generation on a CUDA card: all kernels of a token are launched together.

A token of a small model needs a few hundred kernels of some microseconds each. Launching them one by one takes the CPU
several times as long as the card takes to run them. A CUDA graph launches them all at once.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor, nn


@contextmanager
def graphed(model: nn.Module) -> Iterator[None]:
    """Inside this context, `Decoder.decode` is replayed as a CUDA graph. The weights must neither change nor move. Does
    nothing on other devices, or for a sharded model, whose blocks wait for other processes."""
    if not model.embed.weight.is_cuda or model._forward_pre_hooks:
        yield
        return
    model.decode = DecodingGraph(model.decode)
    try:
        yield
    finally:
        del model.decode


class DecodingGraph:
    """`decode(tokens, cache) -> logits` as a graph on the cache's buffers; captured again when other buffers are used.
    The logits are valid until the next call."""

    def __init__(self, decode: Callable):
        self.decode, self.of = decode, None

    def __call__(self, tokens: Tensor, cache) -> Tensor:
        buffers = weakref.ref(cache), len(tokens), cache.slots
        if buffers != self.of:  # the first call runs uncaptured, because the libraries choose their kernels in it
            self.of, self.replay = buffers, None
            return self.decode(tokens, cache)
        if self.replay is None:
            self.tokens = tokens.clone()
            self.replay = capture(partial(self.decode, self.tokens, cache), tokens.device)
        self.tokens.copy_(tokens)
        return self.replay()


def capture(run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """Capture the kernels of `run` as a graph: each call of the result launches them again, on the same memory, and
    returns the same tensor. Does not use `torch.cuda.graph`, which first returns all free memory to the system."""
    graph, (stream, keeper) = torch.cuda.CUDAGraph(), shared(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        graph.capture_begin(keeper.pool(), "thread_local")  # another thread may be copying the next batch
        output = run()
        graph.capture_end()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


@cache
def shared(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.CUDAGraph]:
    """What all graphs of a device share: a stream, since cuBLAS keeps memory for each; and the pool of a graph that is
    never replayed. A pool of its own would stay reserved after a graph is gone, so thousands of graphs would fill the
    device; and during a capture, PyTorch returns none of it. Only one graph may be in use at a time."""
    stream, keeper = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        keeper.capture_begin(capture_error_mode="thread_local")
        torch.zeros((), device=device)  # PyTorch warns of empty graphs
        keeper.capture_end()
    return stream, keeper
