"""Float32 products by oneDNN: equal to PyTorch's own, in place only meanwhile, never in the place of anything else."""

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from helpers import GPT2, LLAMA, arguments, log_of

import lora
from fast import cpu
from fast.cpu import by_onednn, packed, put_on
from model import build_model, generate

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


class Calls(list):
    """The shapes that oneDNN has multiplied."""

    def __call__(self, a, b, bias, *rest):
        self.append((*a.shape, len(b)))
        return self.inner(a, b, bias, *rest)


@pytest.fixture
def calls(monkeypatch):
    """As on a processor on which oneDNN is faster."""
    calls = Calls()
    calls.inner = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(cpu, "onednn_is_faster", lambda: True)
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


@pytest.mark.parametrize("slow, faster", [("mm", True), ("_linear_pointwise", False)])
def test_the_faster_product_is_found_by_measuring(monkeypatch, slow, faster):
    owner = torch if slow == "mm" else torch.ops.mkldnn
    multiply, measured = getattr(owner, slow), cpu.onednn_is_faster.__wrapped__

    def multiply_slowly(*factors):  # by work: waiting is not counted
        for _ in range(5):
            multiply(*factors)
        return multiply(*factors)

    monkeypatch.setattr(owner, slow, multiply_slowly)
    threads = torch.get_num_threads()
    assert measured() == faster and torch.get_num_threads() == threads
    calls = Calls()
    calls.inner = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(cpu, "onednn_is_faster", measured)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", calls)
    with by_onednn("cpu"):
        before = len(calls)  # of the measurement
        torch.ones(1024, 1024) @ torch.ones(1024, 1024)
    assert len(calls) - before == faster


# -- weights laid out for generation -----------------------------------------------------------------------------------


@pytest.fixture(params=[GPT2, {**LLAMA, "attention_bias": True}], ids=["gpt2", "llama"])
def decoder(request):
    torch.manual_seed(0)
    return build_model({**request.param, "initializer_range": 0.2}).eval()


def states(decoder):
    with torch.no_grad():
        hidden = decoder(torch.arange(40).view(4, 10))
        return hidden, decoder.logits(hidden)


@pytest.mark.parametrize("dtype, autocast", [("float32", False), ("bfloat16", False), ("float32", True)])
def test_packed_weights_give_the_same(calls, decoder, dtype, autocast):
    if (autocast or dtype == "bfloat16") and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("a processor without instructions for bf16, where it is not packed")
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


@pytest.mark.slow
def test_bf16_generates_on_a_processor_without_instructions_for_it(tiny_task, tmp_path):
    """oneDNN is told that there is AVX2 alone, which it reads when first used; on processors other than x86 that says
    nothing."""
    common = {"dtype": "bf16", "max_steps": 1, "max_len": 60, "data": tiny_task / "test.jsonl"}
    seqkd = arguments(tiny_task, tmp_path / "seqkd", method="seqkd", **common)
    sampled = arguments(tiny_task, tmp_path / "sampled", on_policy=1, **common)
    scored = [str(tmp_path / "sampled"), "--data", str(tiny_task / "test.jsonl"), "--dtype", "bf16", "--max-len", "64",
              "--greedy", "--limit", "4", "--device", "cpu"]  # fmt: skip
    code = (
        "import platform, torch, eval, train\n"
        "assert 'x86' not in platform.machine() or not torch.ops.mkldnn._is_mkldnn_bf16_supported()\n"
        f"train.main({seqkd})\ntrain.main({sampled})\neval.main({scored})\n"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    folder = Path(cpu.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert log_of(tmp_path / "sampled")[-1]["sampled_length"] > 0
    assert (tmp_path / "seqkd" / "seqkd.jsonl").is_file()
    assert (tmp_path / "sampled" / "eval-test-first-4-greedy.json").is_file()


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
    monkeypatch.setattr(cpu, "LARGEST", 1000)
    with packed(decoder):
        states(decoder)
    assert not calls


def test_on_other_devices_nothing_changes(decoder):
    """Not even the attention: with that, a model that is compiled there would be compiled again."""
    decoder.to("meta")
    before = [sorted(vars(m)) for m in decoder.modules()]
    with packed(decoder):
        assert [sorted(vars(m)) for m in decoder.modules()] == before
    assert [sorted(vars(m)) for m in decoder.modules()] == before


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


# -- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 3e-2)]
)
@pytest.mark.parametrize(("length", "rows"), [(7, 128), (8, 4), (11, 4), (1, 3)])
def test_attention_with_dropout_by_blocks_equals_the_whole_matrix(length, rows, dtype, tolerance):
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(2, 3, length, 4, dtype=dtype).requires_grad_() for _ in range(4))
    y = cpu.DropoutAttention.apply(q, k, v, 0.3, rows)
    kept = y.grad_fn.saved_tensors[4::2]
    gradients = torch.autograd.grad(y, (q, k, v), g)
    keep = torch.zeros(2, 3, length, length, dtype=dtype)
    for start, part in zip(range(0, length, rows), kept, strict=True):
        keep[:, :, start : start + part.shape[2], : part.shape[3]] = part
    causal = torch.ones(length, length).tril().bool()
    assert length < 5 or not keep.bool()[causal.expand_as(keep)].all()
    scores = (torch.einsum("bhnd,bhmd->bhnm", q, k) / 2).masked_fill(~causal, -torch.inf)
    expected = torch.einsum("bhnm,bhmd->bhnd", scores.softmax(-1) * keep / 0.7, v)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    for ours, plain in zip(gradients, torch.autograd.grad(expected, (q, k, v), g), strict=True):
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=4 * tolerance)


def test_a_model_with_that_attention_is_the_same_model():
    """Where hardly anything is dropped: states and gradients in training, packed and under autocast too; generation."""
    dropout = {"attn_pdrop": 1e-5, "resid_pdrop": 1e-5, "embd_pdrop": 1e-5}
    torch.manual_seed(0)
    m = build_model({**GPT2, **dropout})
    ids, real = torch.randint(61, (2, 9)), torch.tensor([*range(9), *range(9, 13)])
    expected, text = m.eval()(ids, real=real), generate(m, [[1, 2, 3], [4]], 9, None, seed=0)
    expected.sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in m.named_parameters()}
    m.zero_grad()
    put_on(m)
    assert all(block.attn.scaled_dot_product_attention is cpu.scaled_dot_product_attention for block in m.blocks)
    assert generate(m, [[1, 2, 3], [4]], 9, None, seed=0) == text
    found = m.train()(ids, real=real)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found.sum().backward()
    for name, parameter in m.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = m(ids, real=real)
    hidden.sum().backward()  # outside of autocast, as in training
    torch.testing.assert_close(hidden.float(), expected, rtol=0.1, atol=0.1)
