"""Float32 products by oneDNN: equal to PyTorch's own, in place only meanwhile, never in the place of anything else."""

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

import lora
from fast import cpu as onednn
from fast.cpu import by_onednn, packed
from model import build_model, generate

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


# -- weights laid out for generation -----------------------------------------------------------------------------------

GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "vocab_size": 70}
LLAMA = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64, "vocab_size": 70,
         "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "attention_bias": True}  # fmt: skip


@pytest.fixture(params=[GPT2, LLAMA], ids=["gpt2", "llama"])
def decoder(request):
    torch.manual_seed(0)
    return build_model({**request.param, "initializer_range": 0.2}).eval()


def states(decoder):
    with torch.no_grad():
        hidden = decoder(torch.arange(40).view(4, 10))
        return hidden, decoder.logits(hidden)


@pytest.mark.parametrize("dtype, autocast", [("float32", False), ("bfloat16", False), ("float32", True)])
def test_packed_weights_give_the_same(calls, decoder, dtype, autocast):
    decoder.to(getattr(torch, dtype))
    linear_layers = sum(type(m) is torch.nn.Linear for m in decoder.blocks.modules())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = states(decoder)
        with packed(decoder):
            found = states(decoder)
            assert len(calls) == linear_layers + 1
            again = generate(decoder, [[1, 2, 3], [4]], 20, None, temperature=0)
            assert len(calls) == 21 * (linear_layers + 1)
        assert all(torch.equal(a, b) for a, b in zip(states(decoder), expected, strict=True))
    assert len(calls) == 21 * (linear_layers + 1) and not any("forward" in vars(m) for m in decoder.modules())
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        exact = a.dtype == torch.float32 and not autocast
        torch.testing.assert_close(a, b, rtol=1e-4 if exact else 0.1, atol=1e-5 if exact else 0.1)
    if not autocast and dtype == "float32":
        assert again == generate(decoder, [[1, 2, 3], [4]], 20, None, temperature=0)


def test_packed_ends_with_an_error_too(decoder):
    with pytest.raises(KeyError):
        with packed(decoder):
            raise KeyError
    assert not any("forward" in vars(m) for m in decoder.modules()) and "logits" not in vars(decoder)
    with torch.no_grad():
        decoder.head_weight.zero_()
    assert not states(decoder)[1].any()


def test_what_cannot_be_packed_is_left_as_it_is(calls, decoder, monkeypatch):
    with packed(decoder.double()):
        states(decoder)
    decoder.float()
    with packed(decoder.to("meta")):
        assert not any("forward" in vars(m) for m in decoder.modules())
    decoder.to_empty(device="cpu")
    monkeypatch.setattr(onednn, "LARGEST", 1000)
    with packed(decoder):
        states(decoder)
    assert not calls


def test_adapted_layers_keep_their_adapters(calls, decoder):
    lora.attach(decoder, rank=2, alpha=4.0)
    for name, parameter in decoder.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter)
    expected = states(decoder)
    with packed(decoder):
        found = states(decoder)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert calls  # of the head at least
