"""The contract of the inverse over every path: certified per sample, or an error; never a wrong x."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iresnet_fast.solvers import NotConvergedError, sample_norms
from tests.tolerances import ROUND_TRIP


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lipschitz", [0.3, 0.9])
def test_round_trip(solver, dtype, lipschitz):
    if dtype == torch.float64 != solver.dtype:
        pytest.skip("a kernel of float32")
    g = solver.contraction(8, lipschitz).to(dtype)
    x = solver.randn(32, 8).to(dtype)
    tol = 1e-12 if dtype == torch.float64 else 1e-6
    result = solver.solve(g, x + g(x), tol=tol, lipschitz=lipschitz)
    assert (sample_norms(result.x - x) <= ROUND_TRIP[dtype] * sample_norms(x)).all()
    assert result.converged.all()
    # A callable of float32 is not evaluated in float64; a block is.
    assert result.certified.all() or (solver.path, dtype) == ("general", torch.float32)
    assert (result.iterations <= result.evaluations).all()
    assert result.x.dtype == dtype
    assert (result.path, result.method) == (solver.path, "anderson")
    assert result.precision == str(dtype).removeprefix("torch.")
    assert result.lipschitz == lipschitz


@given(st.floats(0.0, 0.95), st.integers(1, 6), st.integers(0, 1000), st.sampled_from(["anderson", "picard"]))
def test_error_never_exceeds_the_bound(solver, lipschitz, d, seed, method):
    torch.manual_seed(seed)
    g = solver.contraction(d, lipschitz)
    x = solver.randn(5, d)
    y = x + g(x)
    for tol in (1e-2, 1e-6):
        result = solver.solve(g, y, tol=tol, lipschitz=lipschitz, method=method)
        error = sample_norms(result.x - x)
        assert (error <= result.error_bound).all()
        if solver.dtype == torch.float64:
            assert (result.error_bound <= 1.001 * tol * sample_norms(y).clamp_min(1)).all()


def test_uncertified_without_a_proof(solver):
    g = solver.contraction(4, 0.8)
    y = solver.randn(6, 4)
    result = solver.solve(g, y, tol=1e-6)
    assert result.converged.all()
    assert not result.certified.any()
    assert result.error_bound.isnan().all()
    residual = sample_norms(y - g(result.x) - result.x)
    rounding = 8 * torch.finfo(solver.dtype).eps
    torch.testing.assert_close(residual, result.residual, rtol=1e-6, atol=rounding * float(sample_norms(y).max()))


def test_fault_2_tolerance_is_a_norm_not_its_square(solver):
    g = solver.contraction(16, 0.9)
    y = solver.randn(8, 16)
    result = solver.solve(g, y, tol=1e-5)
    assert (result.residual <= 1e-5 * sample_norms(y).clamp_min(1)).all()


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("method", ["anderson", "picard"])
@pytest.mark.parametrize("lipschitz", [0.9, None])
def test_does_not_depend_on_the_batch(solver, method, compact, lipschitz):
    """Shuffled, split and padded batches give the same x, within the tolerance, after as many iterations."""
    g = solver.contraction(8, 0.9)
    y = solver.randn(16, 8) * torch.logspace(-3, 3, 16).to(solver.device, solver.dtype).unsqueeze(1)
    options = {"lipschitz": lipschitz, "method": method, "compact": compact}
    together = solver.solve(g, y, **options)
    order = torch.randperm(16, device=solver.device)
    shuffled = solver.solve(g, y[order], **options)
    padding = 1e6 * solver.randn(9, 8)
    padded = solver.solve(g, torch.cat([torch.zeros_like(padding), y, padding]), **options)
    halves = [solver.solve(g, half, **options) for half in y.split(8)]
    for i in range(16):
        alone = solver.solve(g, y[i : i + 1], **options)
        position = int((order == i).nonzero())
        for other, index in ((alone, 0), (shuffled, position), (padded, 9 + i), (halves[i // 8], i % 8)):
            assert (other.x[index] - together.x[i]).norm() <= 2e-6 * y[i].norm().clamp_min(1)
            assert abs(int(other.iterations[index]) - int(together.iterations[i])) <= 1
            if solver.path != "general":  # a lane's arithmetic is its own
                assert torch.equal(other.x[index], together.x[i])
    assert together.iterations.unique().numel() > 1


def test_nan_fails_its_own_sample_only(solver):
    g = solver.contraction(4, 0.5)
    x = solver.randn(5, 4)
    y = x + g(x)
    y[2, 1] = float("nan")
    with pytest.raises(NotConvergedError, match=r"1 of 5 samples did not converge \(samples 2\)") as caught:
        solver.solve(g, y, lipschitz=0.5, tol=10 * solver.fine)
    result = caught.value.result
    good = [0, 1, 3, 4]
    assert result.converged.tolist() == [True, True, False, True, True]
    torch.testing.assert_close(result.x[good], x[good], rtol=0, atol=1e-8 if solver.dtype == torch.float64 else 1e-5)


def test_expansive_branch_is_an_error_not_a_wrong_x(solver):
    g = solver.branch([3 * torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]])
    with pytest.raises(NotConvergedError, match="certify"):
        solver.solve(g, solver.randn(3, 4))


def test_anderson_inverts_some_branches_that_expand(solver):
    """A secant finds the zero of a scalar map whatever its slope; it converges by the residual, uncertified."""
    y = solver.randn(3, 4)
    result = solver.solve(solver.branch([3 * torch.eye(4)]), y)
    torch.testing.assert_close(result.x, y / 4, rtol=1e-5, atol=1e-6)
    assert not result.certified.any()


def test_oscillating_branch_stalls(solver):
    """g(x) = x has the inverse y/2, but the iteration swings between 0 and y for ever."""
    y = torch.ones(2, 3, device=solver.device, dtype=solver.dtype)
    with pytest.raises(NotConvergedError) as caught:
        solver.solve(solver.branch([torch.eye(3)]), y, method="picard")
    assert caught.value.result.evaluations.max() < 50


def test_bound_holds_where_rounding_dominates(solver):
    """In float32 with L = 0.999 the iteration nearly stands still, far from x = 1000 y."""
    y = solver.randn(50, 4).float()
    lipschitz = float(torch.tensor(0.999))
    g = solver.branch([-lipschitz * torch.eye(4)]).float()
    result = solver.solve(g, y, lipschitz=lipschitz, on_failure="return")
    error = sample_norms(result.x.double() - y.double() / (1 - lipschitz))
    if solver.path == "general":
        assert result.error_bound.isnan().all()
    else:
        assert (error <= result.error_bound).all()
        assert (result.certified == (result.error_bound <= 1e-6 * (sample_norms(result.x) - result.error_bound))).all()


def test_overflowing_values_are_not_converged(solver):
    y = torch.full((1, 3), 1e38, dtype=torch.float32, device=solver.device)
    for scale in (0.5, 3.0):
        g = solver.branch([scale * torch.eye(3)]).float()
        result = solver.solve(g, y, tol=1e-2, lipschitz=0.5 if scale < 1 else None, on_failure="return")
        finite = (result.x.double() * (1 + scale) - y.double()).norm() <= 1e-2 * y.double().norm()
        assert not result.converged.any() or finite


def test_a_priori_cap(solver):
    g = solver.contraction(8, 0.9)
    y = solver.randn(4, 8)
    tol = 100 * solver.fine
    result = solver.solve(g, y, tol=tol, lipschitz=0.9)
    n = torch.log(tol * 0.1 / (sample_norms(g(y)) / sample_norms(y).clamp_min(1))) / torch.log(torch.tensor(0.9))
    assert (result.iterations <= n.ceil() + 1).all()


@pytest.mark.parametrize("on_failure", ["raise", "warn", "return"])
def test_on_failure(solver, on_failure):
    arguments = {"max_iterations": 2, "on_failure": on_failure, "tol": solver.fine, "lipschitz": 0.9}
    g, y = solver.contraction(4, 0.9), solver.randn(3, 4)
    if on_failure == "raise":
        with pytest.raises(NotConvergedError, match="larger max_iterations") as caught:
            solver.solve(g, y, **arguments)
        result = caught.value.result
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    elif on_failure == "warn":
        with pytest.warns(UserWarning, match="did not converge"):
            result = solver.solve(g, y, **arguments)
    else:
        result = solver.solve(g, y, **arguments)
    assert (result.iterations == 2).all()
    assert not result.converged.any()
    assert not result.certified.any()
    assert (result.error_bound > solver.fine).all()


def test_warm_start(solver):
    g = solver.contraction(8, 0.9)
    x = solver.randn(4, 8)
    result = solver.solve(g, x + g(x), lipschitz=0.9, x0=x)
    assert (result.iterations == 1).all()


def test_zero_branch_and_zero_lipschitz(solver):
    y = solver.randn(3, 4)
    result = solver.solve(solver.branch([torch.zeros(4, 4)]), y, lipschitz=0.0)
    assert torch.equal(result.x, y)
    assert result.certified.all()


def test_empty_batch(solver):
    result = solver.solve(solver.contraction(4, 0.5), solver.randn(0, 4), lipschitz=0.5)
    assert result.x.shape == (0, 4)
    assert result.evaluations.shape == (0,)


def test_arguments_are_not_written_to(solver):
    g, y, x0 = solver.contraction(8, 0.9), solver.randn(5, 8), solver.randn(5, 8)
    before = [tensor.clone() for tensor in (y, x0, *g.parameters())]
    result = solver.solve(g, y, x0=x0, lipschitz=0.9)
    assert all(torch.equal(a, b) for a, b in zip(before, (y, x0, *g.parameters()), strict=True))
    assert result.x.data_ptr() not in (y.data_ptr(), x0.data_ptr())


def test_one_dominant_mode_takes_a_twentieth_of_the_evaluations(solver):
    """Where one mode dominates, Anderson's mixing finds it."""
    v = torch.nn.functional.normalize(torch.randn(64, dtype=torch.float64), dim=0)
    g = solver.branch([0.97 * (0.1 * torch.eye(64, dtype=torch.float64) - 1.1 * torch.outer(v, v))])
    y = solver.randn(20, 64)
    mixed, plain = (solver.solve(g, y, lipschitz=0.97, method=method) for method in ("anderson", "picard"))
    assert mixed.certified.all()
    assert 20 * mixed.evaluations.sum() <= plain.evaluations.sum()


def test_paths_agree_step_by_step(solver):
    """The same rule: accepted and refused steps are those of the general solver, up to rounding."""
    if solver.dtype != torch.float64:
        pytest.skip("rounding of float32 changes which steps are accepted")
    from iresnet_fast.solvers import invert_residual

    first, second = (torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0] for _ in range(2))
    kinks = solver.branch([first, 0.9 * second], torch.nn.ReLU())
    y = 5 * solver.randn(200, 8)
    for g in (kinks, solver.contraction(8, 0.95)):
        for lipschitz in (0.95, None):
            for method in ("anderson", "picard"):
                options = {"lipschitz": lipschitz, "method": method, "tol": 1e-8}
                found, expected = solver.solve(g, y, **options), invert_residual(g, y, **options)
                for name in ("iterations", "evaluations"):
                    same = getattr(found, name) == getattr(expected, name)
                    assert same.double().mean() >= 0.99, (name, lipschitz, method)
                torch.testing.assert_close(found.x, expected.x, rtol=0, atol=1e-7)
    assert (expected.evaluations >= expected.iterations).all()
