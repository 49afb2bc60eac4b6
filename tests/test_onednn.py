"""Float32 products by oneDNN: equal to PyTorch's own, in place only meanwhile, never in the place of anything else."""

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from onednn import by_onednn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


class Calls(list):
    """The shapes that oneDNN has multiplied."""

    def __call__(self, a, b, bias, *rest):
        self.append((*a.shape, len(b)))
        return self.inner(a, b, bias, *rest)


@pytest.fixture
def calls():
    calls = Calls()
    calls.inner = torch.ops.mkldnn._linear_pointwise
    with patch.object(torch.ops.mkldnn, "_linear_pointwise", calls):
        yield calls


def linear_and_gradients(n, i, o, dtype=torch.float32, bias=True):
    g = torch.Generator().manual_seed(0)
    x, w, b, dy = (torch.randn(*s, generator=g, dtype=dtype) for s in ((n, i), (o, i), (o,), (n, o)))
    inputs = [t.requires_grad_() for t in ([x, w, b] if bias else [x, w])]
    y = F.linear(*inputs)
    y.backward(dy)
    return [y.detach(), *(t.grad for t in inputs)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(300, 128, 384), (1024, 1024, 1), (1, 1024, 1024), (2**20, 1, 1)])
def test_values_and_gradients_are_equal(calls, shape, bias):
    expected = linear_and_gradients(*shape, bias=bias)
    assert not calls
    with by_onednn("cpu"):
        found = linear_and_gradients(*shape, bias=bias)
    assert len(calls) == 3 and calls[0] == shape  # the product and its two gradients
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
    assert all(torch.equal(a, b) for a, b in zip(linear_and_gradients(*shape, bias=bias), expected, strict=True))
    assert len(calls) == 3  # no more of them afterwards


def test_strides_of_all_kinds(calls):
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(260, 130, generator=g), torch.randn(130, 140, generator=g)
    kinds = {"plain": lambda t: t, "transposed": lambda t: t.T.contiguous().T,
             "part": lambda t: torch.stack([t, t], -1)[..., 0], "row": lambda t: t[:1].expand_as(t)}  # fmt: skip
    for left in kinds.values():
        for right in kinds.values():
            expected = left(a).double() @ right(b).double()
            with by_onednn("cpu"):
                torch.testing.assert_close((left(a) @ right(b)).double(), expected, rtol=1e-4, atol=1e-3)
    assert len(calls) == 16


def test_what_is_small_or_not_float32_is_as_it_was(calls):
    cases = [(4, 8, 8), (0, 1024, 2048), (2048, 0, 1024), (1024, 1024, 0)]
    with by_onednn("cpu"):
        found = [linear_and_gradients(*shape) for shape in cases]
        exact = linear_and_gradients(128, 128, 128, torch.float64)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = linear_and_gradients(128, 128, 128)
        added = torch.addmm(torch.ones(128, 128), torch.ones(128, 128), torch.ones(128, 128), beta=2, alpha=3)
    assert not calls
    for shape, tensors in zip(cases, found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors, linear_and_gradients(*shape), strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(exact, linear_and_gradients(128, 128, 128, torch.float64), strict=True)
    )
    assert rounded[0].dtype == torch.bfloat16 and (added == 2 + 3 * 128).all()


def test_an_error_is_pytorchs_own_and_ends_it(calls):
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        with by_onednn("cpu"):
            torch.ones(2048, 1024) @ torch.ones(2048, 1024)
    with pytest.raises(RuntimeError, match="expanded size"):
        with by_onednn("cpu"):
            F.linear(torch.ones(1024, 1024), torch.ones(1024, 1024), torch.ones(1023))
    torch.ones(1024, 1024) @ torch.ones(1024, 1024)
    assert not calls


def test_one_in_the_other(calls):
    a = torch.ones(1024, 1024)
    with by_onednn("cpu"):
        with by_onednn("cpu"):
            a @ a
        a @ a
        assert len(calls) == 2
    a @ a
    assert len(calls) == 2


def test_other_devices_and_builds_keep_theirs(calls, monkeypatch):
    a = torch.ones(1024, 1024)
    with by_onednn("cuda"):
        a @ a
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with by_onednn("cpu"):
        a @ a
    assert not calls
