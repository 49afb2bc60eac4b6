"""Products on a CPU by oneDNN, which PyTorch is built with, where that is faster than what PyTorch does by itself.

MKL has no fast kernels for AMD's processors: a float32 product takes twice as long there as oneDNN's, which PyTorch
uses for bf16 only. Values are the same up to the order of summation. There is no public switch, so `by_onednn` puts
PyTorch's own internal function in the place of `torch.mm` and `torch.addmm`, below autograd.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

# What is compiled for a shape is kept, twice: by oneDNN, and by the layer between it and PyTorch, 1,024 of each. Where
# batches are of many lengths that is most of a gigabyte, and no faster than this. Both look here when first used.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
os.environ.setdefault("LRU_CACHE_CAPACITY", "16")
SMALLEST = 2**20  # multiplications below which the way through Python costs more than it saves


@contextmanager
def by_onednn(device: str) -> Iterator[None]:
    """Meanwhile float32 products on the CPU, of SMALLEST multiplications or more, are oneDNN's; shapes, errors and
    gradients are PyTorch's. On other devices, and where PyTorch is built without oneDNN, nothing changes."""
    if torch.device(device).type != "cpu" or not torch.backends.mkldnn.is_available():
        yield
        return
    mm_before, addmm_before = (torch.library.get_kernel(f"aten::{name}", "CPU") for name in ("mm", "addmm"))

    def suits(a: Tensor, b: Tensor) -> bool:
        fit = a.dtype == b.dtype == torch.float32 and a.shape[1] == len(b)  # else the error is PyTorch's to give
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
            warnings.simplefilter("ignore")  # that they are overridden
            library.impl("mm", mm, "CPU", with_keyset=True)
            library.impl("addmm", addmm, "CPU", with_keyset=True)
        yield
    finally:
        library._destroy()


LARGEST = 2**31  # bytes of weights that are worth holding twice


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Meanwhile a decoder's linear layers and head have their weights laid out as oneDNN reads them: for generation on
    a CPU. A few rows meet all weights at every token there, and laying them out takes longer than the product.

    Holds the weights once more, in autocast's dtype if that is on; they must not change, and get no gradient. On other
    devices, in other dtypes than float32 and bfloat16, and above LARGEST nothing changes.
    """
    layers = [(m, "forward", m.weight, m.bias) for m in model.blocks.modules() if type(m) is nn.Linear]
    layers.append((model, "logits", model.head_weight, None))
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else model.head_weight.dtype
    known = torch.backends.mkldnn.is_available() and dtype in (torch.float32, torch.bfloat16)
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
    """F.linear with a weight that is laid out already: x (..., in) -> (..., out), in the weight's dtype."""
    return torch.ops.mkldnn._linear_pointwise(x.detach().to(dtype), weight, bias, "none", [], "")
