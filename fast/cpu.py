"""What is for CPUs alone: faster matrix products and attention, and freed memory that is kept.

Matrix products use oneDNN, which PyTorch contains, where it is faster than MKL, PyTorch's default. MKL has no fast
kernels for some AMD processors: there a float32 product takes twice as long as with oneDNN, which PyTorch uses only for
bf16. On Intel processors the two are equal. Values are the same up to the order of summation. There is no public
switch, so `by_onednn` replaces `torch.mm` and `torch.addmm`, below autograd, by PyTorch's own internal function, if
`onednn_is_faster` has measured that this pays.
"""

import ctypes
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Kernels compiled for a shape are cached twice, by oneDNN and by the layer between it and PyTorch, 1,024 each. If
# batches have many lengths that takes most of a gigabyte, and is no faster than this. Both read these when first used.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
os.environ.setdefault("LRU_CACHE_CAPACITY", "16")
SMALLEST = 2**20  # multiplications; for smaller products the detour through Python costs more than it saves


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN needs less than 0.65 of the time of PyTorch's default for a float32 product. Takes the best of six
    each, in turns: a thirtieth of a second, once per process. A busy machine must not change the answer, and so the
    order of summation. Hence the CPU time of one thread is measured, and 0.65 lies between the ratios seen: 1/2 on some
    AMD processors, 0.93 on others (at least 0.79 in 600 measurements), 1 on Intel's."""
    a, b = torch.ones(256, 768), torch.ones(768, 768)
    ways = partial(torch.mm, a, b.T), partial(torch.ops.mkldnn._linear_pointwise, a, b, None, "none", [], "")
    least, threads = [math.inf, math.inf], torch.get_num_threads()
    torch.set_num_threads(1)
    for turn in range(12):
        began = time.thread_time()
        ways[turn % 2]()
        least[turn % 2] = min(least[turn % 2], time.thread_time() - began)
    torch.set_num_threads(threads)
    return least[1] < 0.65 * least[0]


@contextmanager
def by_onednn(device: str) -> Iterator[None]:
    """Inside this context, oneDNN computes float32 products on the CPU that have SMALLEST multiplications or more;
    shapes, errors and gradients remain PyTorch's. Does nothing on other devices, if PyTorch is built without oneDNN, or
    if oneDNN is hardly faster on this processor."""
    if torch.device(device).type != "cpu" or not torch.backends.mkldnn.is_available() or not onednn_is_faster():
        yield
        return
    mm_before, addmm_before = (torch.library.get_kernel(f"aten::{name}", "CPU") for name in ("mm", "addmm"))

    def suits(a: Tensor, b: Tensor) -> bool:
        fit = a.dtype == b.dtype == torch.float32 and a.shape[1] == len(b)  # if shapes differ, PyTorch raises the error
        return fit and a.shape[0] * b.shape[0] * b.shape[1] >= SMALLEST

    def mm(keys, a, b):
        if suits(a, b):
            return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
        return mm_before.call_boxed(keys, a, b)

    def addmm(keys, bias, a, b, *, beta=1, alpha=1):
        if suits(a, b) and bias.dtype == a.dtype and bias.shape == b.shape[1:] and beta == alpha == 1:
            return torch.ops.mkldnn._linear_pointwise(a, b.T, bias, "none", [], "")
        return addmm_before.call_boxed(keys, bias, a, b, beta=beta, alpha=alpha)

    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the warning that kernels are overridden
            for name, function in {"mm": mm, "addmm": addmm}.items():  # PyTorch 2.11 has to be told to override
                library.impl(name, function, "CPU", with_keyset=True, allow_override=True)
        yield
    finally:
        library._destroy()


LARGEST = 2**31  # bytes of weights; larger models are not worth holding twice


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """For generation on a CPU: inside this context, the weights of a decoder's linear layers and head are in oneDNN's
    memory layout. A token's few rows meet all weights, and converting the layout each time takes longer than a product.

    Holds a second copy of the weights, in autocast's dtype if that is on; they must not change, and get no gradient.
    Does nothing on other devices, for dtypes other than float32 and bfloat16, above LARGEST, and in bfloat16 on a
    processor without instructions for it (AVX512 or AVX-NE-CONVERT), where oneDNN fails but PyTorch's products work.
    """
    if model.head_weight.device.type == "cpu":  # elsewhere, a compiled model would be compiled again
        put_on(model)
    layers = [(m, "forward", m.weight, m.bias) for m in model.blocks.modules() if type(m) is nn.Linear]
    layers.append((model, "logits", model.head_weight, None))
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else model.head_weight.dtype
    known = torch.backends.mkldnn.is_available() and (
        dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
    on_cpu = all(type(weight.data) is Tensor and weight.device.type == "cpu" for _, _, weight, _ in layers)
    if not known or not on_cpu or sum(weight.numel() for _, _, weight, _ in layers) * dtype.itemsize > LARGEST:
        yield
        return
    try:
        for owner, method, weight, bias in layers:
            laid_out = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype))
            bias = None if bias is None else bias.detach().to(dtype)
            setattr(owner, method, partial(product, weight=laid_out, bias=bias, dtype=dtype))
        yield
    finally:
        for owner, method, _, _ in layers:
            vars(owner).pop(method, None)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """F.linear with a weight that is already in oneDNN's layout: x (..., in) -> (..., out), in the weight's dtype."""
    return torch.ops.mkldnn._linear_pointwise(x.detach().to(dtype), weight, bias, "none", [], "")


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def put_on(model: nn.Module) -> None:
    """Give a decoder the attention below, in place. It only differs from PyTorch's on a CPU."""
    for module in model.modules():
        if hasattr(module, "scaled_dot_product_attention"):
            module.scaled_dot_product_attention = scaled_dot_product_attention


def scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, enable_gqa=False) -> Tensor:
    """F.scaled_dot_product_attention, whose CPU kernels support no dropout and are made for many queries: with the few
    queries of decoding, in bf16 on an AMD EPYC, they took four times as long as two matrix products. (On an Intel Xeon
    they take less, but that is 1 to 6% of the time of generation.)"""
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        if 0 < dropout_p < 1 and is_causal and not enable_gqa:
            return DropoutAttention.apply(q, k, v, dropout_p)
        if attn_mask is not None and q.size(2) < 8 and not enable_gqa and not dropout_p:
            scores = (q * q.size(-1) ** -0.5 @ k.mT).masked_fill(~attn_mask, -torch.inf)
            return scores.softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, enable_gqa=enable_gqa
    )


class DropoutAttention(torch.autograd.Function):
    """Causal attention with dropout: y = (P ∘ keep) v / (1 − dropout) with P = softmax(q kᵀ / √head_dim).

    PyTorch's version creates several (T, T) matrices per head and keeps them for the backward pass: half the memory of
    training GPT-2. Here `rows` queries at a time see the keys up to their own, so nothing is computed above the
    diagonal. q, k, v (B, heads, T, head_dim) -> the same.
    """

    @staticmethod
    def forward(ctx, q, k, v, dropout, rows=128):
        q = q * q.size(-1) ** -0.5
        y, blocks, saved, T = torch.empty_like(v), [], [], q.size(2)
        for start in range(0, T, rows):
            at, seen = slice(start, min(start + rows, T)), slice(0, min(start + rows, T))
            scores = q[:, :, at] @ k[:, :, seen].mT  # (B, heads, rows, seen)
            later = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1 + start)
            p = scores.masked_fill_(later, -torch.inf).softmax(-1)
            keep = torch.empty_like(p, dtype=torch.bool).bernoulli_(1 - dropout)
            y[:, :, at] = (p * keep) @ v[:, :, seen]
            blocks.append((at, seen))
            saved += p, keep
        ctx.save_for_backward(q, k, v, *saved)
        ctx.blocks, ctx.kept = blocks, 1 / (1 - dropout)
        return y.mul_(ctx.kept)

    @staticmethod
    def backward(ctx, dy):
        q, k, v, *saved = ctx.saved_tensors
        dy = dy * ctx.kept
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (at, seen), p, keep in zip(ctx.blocks, saved[::2], saved[1::2], strict=True):
            dv[:, :, seen] += (p * keep).mT @ dy[:, :, at]
            dp = (dy[:, :, at] @ v[:, :, seen].mT).mul_(keep)
            dp -= (p * dp).sum(-1, keepdim=True)
            ds = dp.mul_(p)  # through the softmax: p·(dp − Σ p dp)
            dq[:, :, at] = ds @ k[:, :, seen]
            dk[:, :, seen] += ds.mT @ q[:, :, at]
        return dq * q.size(-1) ** -0.5, dk, dv, None, None


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def keep_freed_memory() -> None:
    """With glibc: keep large freed buffers instead of returning them to the system after every use. The system hands
    them out again page by page, zeroed, which takes up to half of a training step on a CPU."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no buffer gets its own mapping
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
