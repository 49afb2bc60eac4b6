"""projector.py against torch.linalg's SVD-based pinv and lstsq, which it must equal without an SVD."""

import pytest
import torch

from projector import Projectors, logit_preserving_weight, pseudo_inverse

EPSILON = torch.finfo(torch.float32).eps


def random_head(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def head_with(singular_values, rows=60, seed=0):
    """A head (rows, len(singular_values)) with exactly these singular values, in float64."""
    width = len(singular_values)
    left = torch.linalg.qr(random_head(rows, width, seed=seed).double()).Q
    right = torch.linalg.qr(random_head(width, width, seed=seed + 1).double()).Q
    return left * torch.tensor(singular_values, dtype=torch.float64) @ right.T


def exact_pinv(head):
    """pinv in float64 with the cut that float32 would have by default."""
    return torch.linalg.pinv(head.double(), rtol=max(head.shape) * EPSILON)


def relative(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


HEADS = {
    "well-conditioned": random_head(120, 16),
    "wide": random_head(7, 16),  # fewer tokens than dimensions: many exact solutions, the smallest is wanted
    "common direction": random_head(120, 16) + 50 * random_head(1, 16, seed=5),  # as in trained embeddings
    "rank-deficient": random_head(120, 6) @ random_head(6, 16, seed=5),
    "repeated column": random_head(120, 16)[:, [*range(15), 3]],
    "zero column": random_head(120, 16) * (torch.arange(16) != 4),
    "scales": random_head(120, 16) * torch.logspace(-3, 3, 16),
    "tiny values": random_head(120, 16) * 1e-12,
}


@pytest.mark.parametrize("name", HEADS)
def test_pseudo_inverse_equals_pinv(name):
    head = HEADS[name]
    found = pseudo_inverse(head)
    assert found.dtype == torch.float32 and found.shape == head.T.shape
    assert relative(found, exact_pinv(head)) < 1e-6
    # torch's own float32 answer, as near as float32's SVD gets
    assert relative(found, torch.linalg.pinv(head)) < 1e-3


@pytest.mark.parametrize("shape", [(60, 8), (6, 8)])
def test_pseudo_inverse_drops_directions_at_the_float32_cut(shape):
    """Just above the cut a direction counts, with a huge inverse; just below it is gone."""
    rows, width = shape
    cut = max(shape) * EPSILON
    for smallest, kept in ((1.1 * cut, True), (0.85 * cut, False)):
        values = [1.0, 0.7, 0.5, 0.3, 0.1, smallest] + [0.0] * (width - 6)
        head = head_with(values[:width], rows) if rows > width else head_with(values[:rows], width).T.contiguous()
        norm = torch.linalg.matrix_norm(pseudo_inverse(head), ord=2).item()
        assert norm == pytest.approx(1 / smallest if kept else 10.0, rel=1e-3)


def test_pseudo_inverse_by_parts_is_the_same():
    head = random_head(50, 8)
    for rows in (1, 7, 49, 50):
        assert relative(pseudo_inverse(head, rows), pseudo_inverse(head)) < 1e-6
    wide = random_head(700, 600)  # more columns than one block of the Gram matrix has
    assert relative(pseudo_inverse(wide), exact_pinv(wide)) < 1e-6


def test_pseudo_inverse_of_float64_keeps_its_precision():
    head = random_head(50, 8).double()
    found = pseudo_inverse(head)
    assert found.dtype == torch.float64
    assert relative(found, torch.linalg.pinv(head)) < 1e-12


def test_pseudo_inverse_has_no_gradient():
    head = torch.nn.Parameter(random_head(50, 8))
    assert not pseudo_inverse(head).requires_grad
    assert not logit_preserving_weight(torch.nn.Parameter(random_head(50, 5)), head).requires_grad


def test_mismatched_rows_are_refused():
    with pytest.raises(ValueError, match="source_head has 90 rows, target_head 91"):
        logit_preserving_weight(random_head(90, 4), random_head(91, 4))
    with pytest.raises(ValueError, match="source_head has 90 rows, target_head 1"):
        logit_preserving_weight(random_head(90, 4), random_head(1, 4))


def test_half_precision_heads_are_solved_in_float32():
    """Rounding the inverse itself to bfloat16 would cost half of the logits here, where one direction is strong."""
    target = HEADS["common direction"].bfloat16()
    source = (random_head(120, 24, seed=9) + 50 * random_head(1, 24, seed=8)).bfloat16()
    expected = torch.linalg.lstsq(target.double(), source.double()).solution
    for weight in (logit_preserving_weight(source, target), logit_preserving_weight(source.float(), target)):
        assert weight.dtype == torch.float32
        assert relative(weight, expected) < 1e-4
    assert pseudo_inverse(target).dtype == torch.float32


# -- the module --------------------------------------------------------------------------------------------------------


HEADS_OF_BOTH = random_head(40, 6), random_head(40, 10, seed=1)  # student's, teacher's


def solution(source, target):
    return torch.linalg.lstsq(target.float(), source.float()).solution


def test_v1_has_biases_and_starts_at_random():
    torch.manual_seed(0)
    one, other = (Projectors(*HEADS_OF_BOTH, recipe="v1", query=True) for _ in range(2))
    assert {name: list(p.shape) for name, p in one.named_parameters()} == {
        "t2s.weight": [6, 10], "t2s.bias": [6], "s2t.weight": [10, 6], "s2t.bias": [10],
        "query.weight": [20, 12], "query.bias": [20],
    }  # fmt: skip
    assert all(p.requires_grad and p.is_leaf for p in one.parameters())
    assert not any(torch.equal(*both) for both in zip(one.parameters(), other.parameters(), strict=True))
    before = one.s2t.weight.clone()
    one.refresh_s2t(random_head(40, 6, seed=3))  # which is not solved here, but trained
    assert torch.equal(one.s2t.weight, before)


def test_v2_starts_t2s_where_it_keeps_the_logits_and_solves_s2t_for_the_student_head_of_now():
    head, teacher_head = torch.nn.Parameter(HEADS_OF_BOTH[0].clone()), HEADS_OF_BOTH[1]
    projectors = Projectors(head, teacher_head)
    assert {name: list(p.shape) for name, p in projectors.named_parameters()} == {
        "t2s.weight": [6, 10], "s2t.weight": [10, 6],
    }  # fmt: skip
    assert projectors.query is None and projectors.t2s.weight.requires_grad and not projectors.s2t.weight.requires_grad
    torch.testing.assert_close(projectors.t2s.weight, solution(teacher_head, head))
    torch.testing.assert_close(projectors.s2t.weight, solution(head, teacher_head))
    with torch.no_grad():
        head += random_head(40, 6, seed=2)
    t2s, s2t = projectors.t2s.weight.clone(), projectors.s2t.weight.clone()
    for now in (head, head.bfloat16()):
        projectors.refresh_s2t(now)
        torch.testing.assert_close(projectors.s2t.weight, solution(now, teacher_head))
        assert (projectors.s2t.weight - s2t).abs().max() > 0.01 and torch.equal(projectors.t2s.weight, t2s)
    projectors.s2t(torch.randn(3, 6, requires_grad=True)).sum().backward()
    assert head.grad is None and projectors.s2t.weight.grad is None
    assert projectors.state_dict().keys() == {"t2s.weight", "s2t.weight"}  # the inverse comes from the teacher again


def test_autocast_does_not_round_the_solutions():
    heads = HEADS["common direction"], random_head(120, 24) + 50 * random_head(1, 24, seed=8)
    exact = Projectors(*heads)
    with torch.autocast("cpu", torch.bfloat16):
        found = Projectors(*heads)
        assert torch.equal(found.t2s.weight, exact.t2s.weight) and torch.equal(found.s2t.weight, exact.s2t.weight)
        found.refresh_s2t(2 * heads[0])
    assert torch.equal(found.s2t.weight, 2 * exact.s2t.weight)


@pytest.mark.parametrize("recipe", ["v1", "v2"])
def test_given_weights_take_the_recipes_place_and_are_trained(recipe):
    weight, bias = torch.randn(10, 6), torch.randn(10)
    for given in ({"s2t.weight": weight}, {"s2t.weight": weight, "s2t.bias": bias}):
        projectors = Projectors(*HEADS_OF_BOTH, recipe=recipe, given=given)
        projectors.refresh_s2t(random_head(40, 6, seed=3))
        named = dict(projectors.named_parameters())
        assert all(torch.equal(named[name], value) and named[name].requires_grad for name, value in given.items())
        assert ("s2t.bias" in named) == ("s2t.bias" in given) and ("t2s.bias" in named) == (recipe == "v1")
    bias = torch.randn(6)  # even without its weight
    projectors = Projectors(*HEADS_OF_BOTH, recipe=recipe, given={"t2s.bias": bias})
    assert torch.equal(projectors.t2s.bias, bias) and projectors.t2s.bias.requires_grad
    given = torch.randn(6, 10)
    projectors = Projectors(*HEADS_OF_BOTH, recipe=recipe, given={"t2s.weight": given})
    assert torch.equal(projectors.t2s.weight, given) and projectors.t2s.bias is None
    if recipe == "v2":
        torch.testing.assert_close(projectors.s2t.weight, solution(*HEADS_OF_BOTH))
