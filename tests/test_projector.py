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


@pytest.mark.parametrize("name", ["well-conditioned", "common direction"])
def test_weight_equals_least_squares(name):
    source, target = random_head(120, 24, seed=9), HEADS[name]
    weight = logit_preserving_weight(source, target)
    assert weight.shape == (16, 24)
    expected = torch.linalg.lstsq(target.double(), source.double()).solution
    assert relative(weight, expected) < 1e-5
    assert relative(logit_preserving_weight(source, target, pseudo_inverse(target)), expected) < 1e-5
    half = pseudo_inverse(target) / 2  # an inverse that is given is taken as it is
    assert relative(logit_preserving_weight(source, target, half), expected / 2) < 1e-5


@pytest.mark.parametrize("name", HEADS)
def test_nothing_can_be_gained_around_the_solution(name):
    """Stationarity: targetᵀ (source − target W) = 0."""
    source, target = random_head(len(HEADS[name]), 24, seed=9).double(), HEADS[name].double()
    weight = logit_preserving_weight(source, target)
    slope = target.T @ (source - target @ weight)
    assert slope.norm() < 2e-6 * target.norm() * source.norm()
    # and where many solutions are equally good, it is the smallest: no part of it in target's null space
    nothing = weight - pseudo_inverse(target) @ target @ weight
    assert nothing.norm() < 1e-6 * weight.norm()


def test_logits_are_preserved_where_the_wider_head_contains_the_other():
    """W_out @ W = W_in exactly, if W_in's columns lie in the span of W_out's: then every state keeps its logits."""
    target = random_head(90, 12)
    source = target @ random_head(12, 8, seed=3)
    weight = logit_preserving_weight(source, target)
    states = random_head(20, 8, seed=4)
    torch.testing.assert_close(states @ weight.T @ target.T, states @ source.T, rtol=1e-4, atol=1e-3)
    assert relative(states @ weight.T @ target.T, states @ source.T) < 1e-6
    # a head outside of the span cannot be preserved, only approached
    outside = logit_preserving_weight(random_head(90, 8, seed=6), target)
    assert relative(states @ outside.T @ target.T, states @ random_head(90, 8, seed=6).T) > 0.5


def test_equal_heads_give_the_identity():
    head = random_head(90, 12)
    torch.testing.assert_close(logit_preserving_weight(head, head), torch.eye(12), rtol=0, atol=1e-6)


def test_mismatched_rows_are_refused():
    with pytest.raises(ValueError, match="source_head has 90 rows, target_head 91"):
        logit_preserving_weight(random_head(90, 4), random_head(91, 4))
    with pytest.raises(ValueError, match="source_head has 90 rows, target_head 1"):
        logit_preserving_weight(random_head(90, 4), random_head(1, 4), pseudo_inverse(random_head(90, 4)))


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


def test_shapes_and_biases():
    v1 = Projectors(6, 10, bias=True, query=True)
    assert {name: list(p.shape) for name, p in v1.named_parameters()} == {
        "t2s.weight": [6, 10], "t2s.bias": [6], "s2t.weight": [10, 6], "s2t.bias": [10],
        "query.weight": [20, 12], "query.bias": [20],
    }  # fmt: skip
    v2 = Projectors(6, 10, bias=False)
    assert {name: list(p.shape) for name, p in v2.named_parameters()} == {"t2s.weight": [6, 10], "s2t.weight": [10, 6]}
    assert v2.query is None
    assert all(parameter.requires_grad for parameter in [*v1.parameters(), *v2.parameters()])


def test_start_t2s_keeps_it_trainable():
    student_head, teacher_head = random_head(40, 6), random_head(40, 10, seed=1)
    projectors = Projectors(6, 10, bias=False)
    before = projectors.s2t.weight.clone()
    projectors.start_t2s(student_head, teacher_head)
    torch.testing.assert_close(projectors.t2s.weight, torch.linalg.lstsq(student_head, teacher_head).solution)
    assert projectors.t2s.weight.requires_grad and projectors.t2s.weight.is_leaf
    assert torch.equal(projectors.s2t.weight, before) and projectors.s2t.weight.requires_grad


def test_solved_s2t_follows_the_student_head_without_gradient():
    head, teacher_head = torch.nn.Parameter(random_head(40, 6)), random_head(40, 10, seed=1)
    projectors = Projectors(6, 10, bias=False)
    before = projectors.t2s.weight.clone()
    projectors.solve_s2t(head, teacher_head)
    assert not projectors.s2t.weight.requires_grad
    assert torch.equal(projectors.t2s.weight, before) and projectors.t2s.weight.requires_grad
    torch.testing.assert_close(projectors.s2t.weight, torch.linalg.lstsq(teacher_head, head.detach()).solution)
    with torch.no_grad():
        head += random_head(40, 6, seed=2)
    old = projectors.s2t.weight.clone()
    projectors.refresh_s2t(head)
    torch.testing.assert_close(projectors.s2t.weight, torch.linalg.lstsq(teacher_head, head.detach()).solution)
    assert (projectors.s2t.weight - old).abs().max() > 0.01
    projectors.refresh_s2t(head.bfloat16())
    solution = torch.linalg.lstsq(teacher_head, head.detach().bfloat16().float()).solution
    torch.testing.assert_close(projectors.s2t.weight, solution)
    projectors.s2t(torch.randn(3, 6, requires_grad=True)).sum().backward()
    assert head.grad is None and projectors.s2t.weight.grad is None
    assert "teacher_inverse" not in projectors.state_dict()  # it comes from the teacher again


def test_refresh_leaves_a_trained_s2t_alone():
    projectors = Projectors(6, 10, bias=True)
    before = projectors.s2t.weight.clone()
    projectors.refresh_s2t(random_head(40, 6))
    assert torch.equal(projectors.s2t.weight, before) and projectors.s2t.weight.requires_grad
