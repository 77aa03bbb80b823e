"""Anderson mixing: what it gains, and that it never costs the guarantee."""

import math

import pytest
import torch

from iresnet_fast.solvers import invert_residual, sample_norms

TOL = 1e-6


def reflection(d, lipschitz):
    """L·(I − 2vvᵀ)-like: one eigenvalue −L, the others a tenth of it; Picard crawls along one mode."""
    v = torch.nn.functional.normalize(torch.randn(d, dtype=torch.float64), dim=0)
    matrix = 0.1 * lipschitz * torch.eye(d, dtype=torch.float64) - 1.1 * lipschitz * torch.outer(v, v)
    return lambda x: x @ matrix.T


def orthogonal(d, lipschitz):
    q, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))
    return lambda x: lipschitz * x @ q.T


def evaluations(g, lipschitz, method, d=64):
    y = torch.randn(20, d, dtype=torch.float64)
    result = invert_residual(g, y, tol=TOL, lipschitz=lipschitz, method=method)
    assert result.certified.all()
    assert (sample_norms(result.x + g(result.x) - y) <= 2 * TOL * sample_norms(y)).all()
    return float(result.evaluations.double().mean())


def test_one_dominant_mode_takes_a_twentieth_of_the_evaluations():
    g = reflection(64, 0.97)
    assert 20 * evaluations(g, 0.97, "anderson") <= evaluations(g, 0.97, "picard")


def test_a_spectrum_that_fills_a_circle_costs_no_more():
    g = orthogonal(64, 0.97)
    assert evaluations(g, 0.97, "anderson") <= 1.05 * evaluations(g, 0.97, "picard")


@pytest.mark.parametrize("lipschitz", [0.9, None])
def test_refused_steps_fall_back_to_picard(lipschitz):
    """Kinks mislead the mixing: some evaluations are refused, they are counted, and the result is as good."""
    first, second = (torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0] for _ in range(2))

    def g(x):
        return 0.9 * torch.abs(x @ first.T) @ second.T

    y = 5 * torch.randn(200, 8, dtype=torch.float64)
    result = invert_residual(g, y, tol=1e-10, lipschitz=lipschitz)
    plain = invert_residual(g, y, tol=1e-10, lipschitz=lipschitz, method="picard")
    refused = result.evaluations - result.iterations
    assert (refused >= 0).all()
    assert refused.max() >= 1
    assert (result.evaluations <= 1.2 * plain.evaluations).all()
    assert (plain.evaluations == plain.iterations).all()
    assert (sample_norms(result.x + g(result.x) - y) <= 2e-10 * sample_norms(y).clamp_min(1)).all()


def test_accepted_steps_stay_below_the_a_priori_bound():
    for seed in range(5):
        torch.manual_seed(seed)
        first, second = (torch.randn(12, 12, dtype=torch.float64) for _ in range(2))
        first, second = (w / torch.linalg.matrix_norm(w, 2) for w in (first, second))

        def g(x, first=first, second=second):
            return 0.95 * torch.relu(x @ first.T) @ second.T

        y = torch.randn(30, 12, dtype=torch.float64)
        result = invert_residual(g, y, tol=1e-9, lipschitz=0.95)
        start = sample_norms(g(y))
        bound = torch.log(1e-9 * sample_norms(y).clamp_min(1) * 0.05 / start) / math.log(0.95)
        assert (result.iterations <= bound.clamp_min(0).ceil() + 1).all()


def test_a_mixed_step_out_of_the_domain_is_only_refused():
    """The third evaluation is the first of a mixed iterate; NaN there sends the sample back, and no other."""
    calls = []
    matrix = torch.diag(torch.tensor([0.9, 0.1], dtype=torch.float64))

    def g(x):
        calls.append(x)
        image = x @ matrix.T
        image[0] += torch.nan if len(calls) == 3 else 0.0
        return image

    x = torch.randn(5, 2, dtype=torch.float64)
    result = invert_residual(g, x + x @ matrix.T, tol=1e-10, lipschitz=0.9)
    assert result.converged.all()
    torch.testing.assert_close(result.x, x, rtol=0, atol=1e-9)
    assert (result.evaluations - result.iterations).tolist() == [1, 0, 0, 0, 0]


def test_a_refused_nan_does_not_stall_a_slow_sample():
    calls = []
    linear = orthogonal(64, 0.97)

    def g(x):
        calls.append(x)
        image = linear(x)
        image[0] += torch.nan if len(calls) == 3 else 0.0
        return image

    y = torch.randn(2, 64, dtype=torch.float64)
    assert invert_residual(g, y, tol=TOL, lipschitz=0.97).converged.all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    g = orthogonal(16, 0.5)
    x = torch.randn(8, 16, dtype=torch.float64)
    tol = 0.05
    result = invert_residual(lambda x: g(x.double()).to(dtype), (x + g(x)).to(dtype), tol=tol, lipschitz=0.5)
    assert result.x.dtype == dtype
    assert result.residual.dtype == torch.float32
    assert result.converged.all()
    assert (sample_norms(result.x.double() - x) <= 2 * tol * sample_norms(x).clamp_min(1)).all()
    assert not result.certified.any()
    assert "not evaluated in float64" in result.unproven


def test_squares_beyond_float16_do_not_spoil_the_mixing():
    y = torch.full((1, 4), 5000.0, dtype=torch.float16)
    for method in ("anderson", "picard"):
        result = invert_residual(lambda x: 0.9 * x, y, tol=1e-2, lipschitz=0.9, method=method)
        assert result.converged.all()
        assert (result.x.double() * 1.9 - 5000).abs().max() <= 0.02 * 5000
