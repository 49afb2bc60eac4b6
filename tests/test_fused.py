"""fused.py against the plain terms of losses.py: every value, every gradient, for every divergence."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fast import losses as fused
from losses import DIVERGENCES, PLAIN

N, D_STUDENT, D_TEACHER, V_STUDENT, V_TEACHER = 7, 5, 6, 11, 13


def inputs(dtype=torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x = {
        "hidden": normal(N, D_STUDENT), "head": normal(V_STUDENT, D_STUDENT), "t2s": normal(N, D_STUDENT),
        "s2t": normal(N, D_TEACHER), "teacher": normal(N, D_TEACHER), "teacher_head": normal(V_TEACHER, D_TEACHER),
        "gold": torch.randint(V_STUDENT, (N,), generator=generator),
    }  # fmt: skip
    best = (x["t2s"] @ x["head"].T).argmax(-1)
    x["label"] = torch.where(torch.arange(N) % 2 == 0, best, (best + 1) % V_STUDENT)  # every second one agrees
    return x


WEIGHTS = {"gold": (0.3,), "kd": (0.3, 0.7), "student_space": (0.3, 0.7, -1.1), "teacher_space": (0.7,)}
CALLS = {  # name: (function of Terms, its arguments by name of input)
    "gold": ("gold", ["hidden", "gold", "head"]),
    "kd, padded vocabularies": ("kd", ["hidden", "gold", "teacher", "head", "teacher_head"]),
    "student space": ("student_space", ["hidden", "gold", "t2s", "label", "head"]),
    "agreeing": ("student_space", ["hidden", "gold", "t2s", "label", "head"]),
    "fewer pairs than tokens": ("student_space", ["hidden", "gold", "some t2s", "some label", "head"]),
    "no gold": ("student_space", ["hidden", "none", "t2s", "label", "head"]),
    "teacher space": ("teacher_space", ["s2t", "teacher", "teacher_head"]),
}


def values_and_gradients(terms, call, divergence, dtype=torch.float64, frozen=("teacher", "teacher_head")):
    """Outputs of one term function, and the gradient of its loss for every input that learns."""
    function, names = CALLS[call]
    x = {name: value.requires_grad_(value.is_floating_point() and name not in frozen)
         for name, value in inputs(dtype).items()}  # fmt: skip
    rest = {"some t2s": x["t2s"][:4], "some label": x["label"][:4], "none": None}
    options = () if function == "gold" else (divergence, 2.0)
    options += (True,) * (call in ("agreeing", "fewer pairs than tokens"))
    outputs = getattr(terms, function)(*[{**x, **rest}[name] for name in names], *options, weights=WEIGHTS[function])
    (3 * outputs[0]).backward()
    return [output.detach() for output in outputs], {name: value.grad for name, value in x.items()}


@pytest.mark.parametrize("chunk, cached, head_rows", [(1, 1, 100), (3, 20, 5), (N, 2**20, 3), (100, 30, 8192)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("call", CALLS)
def test_values_and_gradients_equal_the_plain_ones(monkeypatch, call, divergence, chunk, cached, head_rows):
    monkeypatch.setattr(fused, "CACHED_LOGITS", cached)
    monkeypatch.setattr(fused, "HEAD_ROWS", head_rows)
    plain_values, plain_gradients = values_and_gradients(PLAIN, call, divergence)
    values, gradients = values_and_gradients(fused.fused_terms(chunk), call, divergence)
    assert len(values) == len(plain_values)
    for value, plain in zip(values, plain_values, strict=True):
        torch.testing.assert_close(value, plain, rtol=1e-10, atol=1e-12)
    for name in gradients:
        assert (gradients[name] is None) == (plain_gradients[name] is None), name
        if gradients[name] is not None:
            torch.testing.assert_close(gradients[name], plain_gradients[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("chunk", [3, N])
@pytest.mark.parametrize("larger", ["teacher", "student"])
def test_uld_whichever_vocabulary_is_larger(larger, chunk):
    def run(terms):
        x = inputs()
        own, others = ("hidden", "head"), ("teacher", "teacher_head")
        own, others = (own, others) if larger == "teacher" else (others, own)
        (hidden, head), (teacher, teacher_head) = ((x[name] for name in names) for names in (own, others))
        hidden.requires_grad_(), head.requires_grad_()
        loss, *terms = terms.uld(hidden, x["gold"], teacher, head, teacher_head, weights=(0.3, 0.7))
        (3 * loss).backward()
        return [loss.detach(), *terms, hidden.grad, head.grad]

    for found, plain in zip(run(fused.fused_terms(chunk)), run(PLAIN), strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-10, atol=1e-12)
    assert found.abs().sum() > 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("call", CALLS)
def test_under_bf16_autocast(call, divergence):
    """Products in bf16, the rest in float32: as close to the plain terms under autocast as bf16 is (3 digits)."""
    with torch.autocast("cpu", torch.bfloat16):
        plain_values, plain_gradients = values_and_gradients(PLAIN, call, divergence, torch.float32)
        values, gradients = values_and_gradients(fused.fused_terms(3), call, divergence, torch.float32)
    for value, plain in zip(values, plain_values, strict=True):
        assert value.dtype == plain.dtype
        torch.testing.assert_close(value, plain, rtol=1e-5, atol=1e-6)
    for name, plain in plain_gradients.items():
        if plain is not None:
            assert gradients[name].dtype == plain.dtype
            assert (gradients[name] - plain).norm() <= 2e-2 * plain.norm(), name


class Largest(TorchDispatchMode):
    """Elements of the largest storage that an operation made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        given, made = ({x.untyped_storage().data_ptr(): x for x in tree_leaves(tree) if torch.is_tensor(x)}
                       for tree in ((args, kwargs), outputs))  # fmt: skip
        new = (x for storage, x in made.items() if storage not in given)
        self.elements = max([self.elements, *(x.untyped_storage().nbytes() // x.element_size() for x in new)])
        return outputs


@pytest.mark.parametrize("learns", [True, False])
def test_no_tensor_of_all_logits_and_none_like_a_head_that_does_not_learn(learns):
    n, width, vocabulary, chunk = 64, 16, 1000, 8
    hidden, target = torch.randn(2, n, width)
    head, label = torch.randn(vocabulary, width), torch.randint(vocabulary, (n,))
    hidden.requires_grad_(), head.requires_grad_(learns)
    with Largest() as largest:
        if learns:
            target.requires_grad_()
            arguments = hidden, label, target, label, head, "fkl", 2.0
            loss, *_ = fused.fused_terms(chunk).student_space(*arguments, weights=(1.0, 1.0, 1.0))
        else:
            loss, *_ = fused.fused_terms(chunk).teacher_space(hidden, target, head, "fkl", 2.0, weights=(1.0,))
        loss.backward()
    assert largest.elements == (vocabulary * width if learns else vocabulary * chunk)


def test_the_gradient_is_there_once():
    x = inputs()
    x["hidden"].requires_grad_()
    loss, *_ = fused.fused_terms(4).gold(x["hidden"], x["gold"], x["head"], weights=(1.0,))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up"):
        loss.backward()


def test_no_tokens_at_all():
    """A batch without a pair: empty terms, zero gradients."""
    x = inputs()
    hidden, head = x["hidden"][:0].requires_grad_(), x["head"].requires_grad_()
    states = hidden, x["gold"][:0], x["t2s"][:0], x["label"][:0], head
    loss, *outputs = fused.fused_terms(4).student_space(*states, "fkl", 2.0, weights=(1.0, 1.0, 1.0))
    assert loss == 0 and all(output.shape == (0,) for output in outputs)
    loss.backward()
    assert hidden.grad.shape == hidden.shape and not head.grad.any()


def test_terms_are_on_the_device_of_their_input():
    """On the meta device, where mixing in a tensor of another device shows."""
    from losses import dskd_loss

    x = {name: value.to("meta") for name, value in inputs(torch.float32).items()}
    terms = dskd_loss(
        x["hidden"], x["gold"], x["t2s"], x["label"], x["s2t"], x["teacher"], x["head"], x["teacher_head"], tokens=N,
        agreeing=2,
    )  # fmt: skip
    assert {term.device.type for term in terms.values()} == {"meta"}
    torch.stack([term.float() for term in terms.values()])
