"""Power iteration: from below, without overflow, and not poisoned by a bad weight."""

import pytest
import torch

from iresnet_fast.reference.conv_operator import ConvGeometry, conv_matrix
from iresnet_fast.reference.power_iteration import layer_adjoint, layer_apply, power_iteration
from tests.tolerances import POWER_ITERATION


def unit(*shape, dtype=torch.float64):
    vector = torch.randn(shape, dtype=dtype)
    return vector / vector.norm()


def sigma(weight, u, v, geometry=None):
    return float((u * layer_apply(weight, v, geometry)).sum())


@pytest.mark.parametrize("geometry", [None, ConvGeometry((5, 6), (1, 1), (1, 1), ((1, 1), (1, 1)))])
def test_approaches_the_norm_from_below(geometry):
    # Positive, so that the largest singular value stands apart (Perron) and 200 iterations reach it.
    weight = torch.rand((4, 3) if geometry is None else (4, 3, 3, 3), dtype=torch.float64)
    matrix = weight if geometry is None else conv_matrix(weight, geometry)
    exact = float(torch.linalg.matrix_norm(matrix, 2))
    v = unit(3) if geometry is None else unit(3, 5, 6)
    u = unit(4) if geometry is None else unit(4, 5, 6)
    estimates = []
    for _ in range(200):
        u, v = power_iteration(weight, u, v, 1, geometry)
        estimates.append(sigma(weight, u, v, geometry))
    assert all(a <= b * (1 + 1e-12) for a, b in zip(estimates, estimates[1:], strict=False))
    assert estimates[-1] <= exact * (1 + 1e-12)
    assert estimates[-1] >= exact * (1 - POWER_ITERATION)


def test_fault_1_stops_by_sigma_not_by_the_vectors():
    """Two equal singular values: the vectors may keep turning, σ is what must have settled."""
    weight = torch.diag(torch.tensor([2.0, 2.0, 0.5], dtype=torch.float64))
    u, v = power_iteration(weight, unit(3), unit(3), 1000, tol=1e-10)
    assert sigma(weight, u, v) == pytest.approx(2.0, rel=1e-9)


def test_converged_vectors_are_returned_as_they_are():
    weight = torch.randn(6, 5, dtype=torch.float64)
    u, v = power_iteration(weight, unit(6), unit(5), 2000, tol=1e-9)
    again = power_iteration(weight, u, v, 2000, tol=1e-9)
    assert torch.equal(u, again[0])
    assert torch.equal(v, again[1])


def test_fault_7_no_overflow():
    """Iterating unnormalised would reach 1e12 to the power 100; float32 ends at 3e38."""
    weight = 1e12 * torch.randn(5, 5)
    u, v = power_iteration(weight, unit(5, dtype=torch.float32), unit(5, dtype=torch.float32), 100)
    exact = float(torch.linalg.matrix_norm(weight.double(), 2))
    assert sigma(weight, u, v) == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_bad_weight_leaves_the_vectors(value):
    u, v = unit(3), unit(3)
    after = power_iteration(torch.full((3, 3), value, dtype=torch.float64), u, v, 3)
    assert torch.equal(after[0], u)
    assert torch.equal(after[1], v)


def test_adjoint_of_a_matrix():
    weight = torch.randn(4, 3, dtype=torch.float64)
    u = torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close(layer_adjoint(weight, u, None), weight.T @ u)
