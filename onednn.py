"""Float32 products on a CPU by oneDNN, which PyTorch is built with, instead of its default, MKL.

MKL has no fast kernels for AMD's processors: a float32 product takes twice as long there as oneDNN's, which PyTorch
uses for bf16 only. Values are the same up to the order of summation. There is no public switch, so `by_onednn` puts
PyTorch's own internal function in the place of `torch.mm` and `torch.addmm`, below autograd.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

SMALLEST = 2**20  # multiplications below which the way through Python costs more than it saves


@contextmanager
def by_onednn(device: str) -> Iterator[None]:
    """Meanwhile float32 products on the CPU are oneDNN's. On other devices, and without oneDNN, nothing changes."""
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
