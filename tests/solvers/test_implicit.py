"""The implicit gradient of the solver: against finite differences and a solve in closed form."""

import pytest
import torch

from iresnet_fast.solvers import NotConvergedError, attach_gradient, invert_residual


def solve(y, weight, tol=1e-13):
    def g(x):
        return torch.tanh(x @ weight.T)

    with torch.no_grad():
        x = invert_residual(g, y, tol=tol).x
    return attach_gradient(g, y, x, [weight], tol=tol)


@pytest.fixture
def problem():
    weight = torch.randn(4, 4, dtype=torch.float64)
    weight = (0.8 * weight / torch.linalg.matrix_norm(weight, 2)).requires_grad_()
    return torch.randn(3, 4, dtype=torch.float64, requires_grad=True), weight


def test_gradcheck(problem):
    assert torch.autograd.gradcheck(solve, problem)


def test_linear_branch_in_closed_form():
    """fault 8: the sign, and the Jacobian at x: for g = Wx, dx/dy = (I + W)⁻¹."""
    weight = torch.randn(5, 5, dtype=torch.float64)
    weight = 0.7 * weight / torch.linalg.matrix_norm(weight, 2)
    y = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        x = invert_residual(lambda x: x @ weight.T, y, tol=1e-14).x
    x = attach_gradient(lambda x: x @ weight.T, y, x, [], tol=1e-14)
    v = torch.randn_like(x)
    (grad,) = torch.autograd.grad(x, y, v)
    expected = torch.linalg.solve((torch.eye(5, dtype=torch.float64) + weight).T, v.T).T
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)


def test_small_gradients_are_as_accurate_as_large_ones(problem):
    """The tolerance is relative to each sample's own gradient: a mean over a million makes them small."""
    y, weight = problem
    x = solve(y, weight, tol=1e-10)
    v = torch.randn_like(x)
    (large,) = torch.autograd.grad(x, y, v, retain_graph=True)
    (small,) = torch.autograd.grad(x, y, 1e-12 * v)
    torch.testing.assert_close(small * 1e12, large, rtol=1e-9, atol=0)


def test_second_use_and_retained_graphs(problem):
    y, weight = problem
    x = solve(y, weight)
    first = torch.autograd.grad(x.square().sum() + x.sum(), (y, weight), retain_graph=True)
    again = torch.autograd.grad(x.square().sum() + x.sum(), (y, weight), retain_graph=True)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    other = torch.autograd.grad(x.sum(), (y, weight), retain_graph=True)
    assert not torch.allclose(other[0], first[0])
    (grad,) = torch.autograd.grad(x.square().sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        grad.sum().backward()


def test_a_weight_changed_in_place_is_found_out(problem):
    y, weight = problem
    x = solve(y, weight)
    with torch.no_grad():
        weight.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


def test_branch_that_ignores_its_input():
    shift = torch.randn(4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    x = attach_gradient(shift.expand_as, y, (y - shift).detach(), [shift])
    x.sum().backward()
    assert torch.equal(y.grad, torch.ones_like(y))
    torch.testing.assert_close(shift.grad, torch.full_like(shift, -3.0))


def test_adjoint_that_does_not_converge_raises():
    y = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    matrix = 2 * torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    x = attach_gradient(lambda x: x @ matrix, y, torch.randn_like(y).detach(), [])
    with pytest.raises(NotConvergedError, match="gradient of the inverse: 3 of 3 samples"):
        x.sum().backward()


def test_a_gradient_that_is_not_finite_stays_with_its_sample(problem):
    y, weight = problem
    v = torch.randn_like(y)
    (expected,) = torch.autograd.grad(solve(y, weight), y, v)
    v[1, 2] = float("inf")
    (found,) = torch.autograd.grad(solve(y, weight), y, v)
    assert found[1].isnan().all()
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]])


def test_empty_batch():
    y = torch.zeros(0, 4, requires_grad=True)
    attach_gradient(lambda x: 0.5 * x, y, y.detach(), []).sum().backward()
    assert y.grad.shape == (0, 4)
