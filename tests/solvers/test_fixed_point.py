"""The contract of the inverse: certified per sample, or an error; never a wrong x."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iresnet_fast.reference.fixed_point import fixed_iterations
from iresnet_fast.solvers import NotConvergedError, invert_residual, sample_norms
from tests.tolerances import ROUND_TRIP


def contraction(d, lipschitz, dtype=torch.float64, device=None):
    """x ↦ W₂ tanh(W₁ x) with a Lipschitz constant of at most ``lipschitz``, attained at 0."""
    device = device or torch.get_default_device()
    first, second = (torch.randn(d, d, dtype=torch.float64) for _ in range(2))
    first, second = (w / torch.linalg.matrix_norm(w, 2) for w in (first, second))
    first, second = first.to(device, dtype), (lipschitz * second).to(device, dtype)
    return lambda x: torch.tanh(x @ first.T) @ second.T


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lipschitz", [0.3, 0.9])
def test_round_trip(device, dtype, lipschitz):
    g = contraction(8, lipschitz, dtype, device)
    x = torch.randn(32, 8, dtype=dtype, device=device)
    tol = 1e-12 if dtype == torch.float64 else 1e-6
    result = invert_residual(g, x + g(x), tol=tol, lipschitz=lipschitz)
    assert (sample_norms(result.x - x) <= ROUND_TRIP[dtype] * sample_norms(x)).all()
    assert result.converged.all()
    assert result.certified.all()
    assert (result.iterations <= result.evaluations).all()
    assert result.x.dtype == dtype
    assert result.path == "anderson"
    assert result.precision == str(dtype).removeprefix("torch.")
    assert result.lipschitz == lipschitz


@given(st.floats(0.0, 0.95), st.integers(1, 6), st.integers(0, 1000), st.sampled_from(["anderson", "picard"]))
def test_error_never_exceeds_the_bound(lipschitz, d, seed, method):
    torch.manual_seed(seed)
    g = contraction(d, lipschitz)
    x = torch.randn(5, d, dtype=torch.float64)
    y = x + g(x)
    for tol in (1e-2, 1e-6):
        result = invert_residual(g, y, tol=tol, lipschitz=lipschitz, method=method)
        error = sample_norms(result.x - x)
        assert (error <= result.error_bound).all()
        assert (result.error_bound <= 1.001 * tol * sample_norms(y).clamp_min(1)).all()


def test_uncertified_without_a_proof():
    g = contraction(4, 0.8)
    y = torch.randn(6, 4, dtype=torch.float64)
    result = invert_residual(g, y, tol=1e-8)
    assert result.converged.all()
    assert not result.certified.any()
    assert result.error_bound.isnan().all()
    torch.testing.assert_close(sample_norms(y - g(result.x) - result.x), result.residual, rtol=1e-6, atol=1e-14)


def test_fault_2_tolerance_is_a_norm_not_its_square():
    g = contraction(16, 0.9)
    y = torch.randn(8, 16, dtype=torch.float64)
    result = invert_residual(g, y, tol=1e-5)
    assert (result.residual <= 1e-5 * sample_norms(y).clamp_min(1)).all()


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("method", ["anderson", "picard"])
@pytest.mark.parametrize("lipschitz", [0.9, None])
def test_does_not_depend_on_the_batch(method, compact, lipschitz):
    """Shuffled, split and padded batches give the same x, within the tolerance, after as many iterations."""
    g = contraction(8, 0.9)
    y = torch.randn(16, 8, dtype=torch.float64) * torch.logspace(-3, 3, 16, dtype=torch.float64).unsqueeze(1)
    options = {"lipschitz": lipschitz, "method": method, "compact": compact}
    together = invert_residual(g, y, **options)
    order = torch.randperm(16)
    shuffled = invert_residual(g, y[order], **options)
    padded = invert_residual(g, torch.cat([torch.zeros(9, 8).double(), y, 1e6 * torch.randn(9, 8).double()]), **options)
    halves = [invert_residual(g, half, **options) for half in y.split(8)]
    for i in range(16):
        alone = invert_residual(g, y[i : i + 1], **options)
        position = int((order == i).nonzero())
        for other, index in ((alone, 0), (shuffled, position), (padded, 9 + i), (halves[i // 8], i % 8)):
            assert (other.x[index] - together.x[i]).norm() <= 2e-6 * y[i].norm().clamp_min(1)
            assert abs(int(other.iterations[index]) - int(together.iterations[i])) <= 1
    assert together.iterations.unique().numel() > 1


@pytest.mark.parametrize("method", ["anderson", "picard"])
def test_whole_and_compacted_batches_agree(method):
    """Leaving the batch changes nothing; g sees whole batches only where it must."""
    sizes = []
    g = contraction(8, 0.9)

    def counted(x):
        sizes.append(len(x))
        return g(x)

    y = torch.randn(16, 8, dtype=torch.float64) * torch.logspace(-6, 3, 16, dtype=torch.float64).unsqueeze(1)
    whole = invert_residual(counted, y, tol=1e-8, lipschitz=0.9, method=method, compact=False)
    assert set(sizes) == {16}
    sizes.clear()
    small = invert_residual(counted, y, tol=1e-8, lipschitz=0.9, method=method, compact=True)
    assert min(sizes) < 16
    for name in ("x", "residual", "error_bound"):
        torch.testing.assert_close(getattr(small, name), getattr(whole, name), rtol=1e-6, atol=1e-14)
    for name in ("iterations", "evaluations", "converged", "certified"):
        assert torch.equal(getattr(small, name), getattr(whole, name))


def test_nan_fails_its_own_sample_only():
    g = contraction(4, 0.5)
    x = torch.randn(5, 4, dtype=torch.float64)
    y = x + g(x)
    y[2, 1] = float("nan")
    with pytest.raises(NotConvergedError, match=r"1 of 5 samples did not converge \(samples 2\)") as caught:
        invert_residual(g, y, lipschitz=0.5, tol=1e-10)
    result = caught.value.result
    good = [0, 1, 3, 4]
    assert result.converged.tolist() == [True, True, False, True, True]
    torch.testing.assert_close(result.x[good], x[good], rtol=0, atol=1e-8)


def test_expansive_branch_is_an_error_not_a_wrong_x():
    y = torch.randn(3, 4, dtype=torch.float64)
    matrix = 3 * torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    with pytest.raises(NotConvergedError, match="certify"):
        invert_residual(lambda x: x @ matrix, y)


def test_anderson_inverts_some_branches_that_expand():
    """A secant finds the zero of a scalar map whatever its slope; it converges by the residual, uncertified."""
    y = torch.randn(3, 4, dtype=torch.float64)
    result = invert_residual(lambda x: 3 * x, y)
    torch.testing.assert_close(result.x, y / 4)
    assert not result.certified.any()


def test_oscillating_branch_stalls():
    """g(x) = x has the inverse y/2, but the iteration swings between 0 and y for ever."""
    y = torch.ones(2, 3)
    with pytest.raises(NotConvergedError) as caught:
        invert_residual(lambda x: x, y, method="picard")
    assert caught.value.result.evaluations.max() < 50


def test_stall_at_the_floor_of_the_branch_is_not_converged():
    """A branch that is only accurate to 1e-4 cannot be inverted to 1e-6, and says so soon."""
    y = torch.randn(4, 8)
    with pytest.raises(NotConvergedError, match="float64") as caught:
        invert_residual(lambda x: 0.5 * x + 1e-4 * torch.rand_like(x), y, lipschitz=0.5)
    assert caught.value.result.evaluations.max() < 100


def test_bound_holds_where_rounding_dominates():
    """In float32 with L = 0.999 the iteration nearly stands still, far from x = 1000 y."""
    y = torch.randn(50, 4)
    result = invert_residual(lambda x: -0.999 * x, y, lipschitz=0.999, on_failure="return")
    coefficient = 1 - float(torch.tensor(0.999))
    error = sample_norms(result.x.double() - y.double() / coefficient)
    assert error.max() > 1e-3
    assert (error <= result.error_bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_overflowing_norms_are_not_converged(dtype, scale):
    y = torch.full((1, 3), 1e20 if dtype == torch.float32 else 6e4, dtype=dtype)
    result = invert_residual(
        lambda x: scale * x, y, tol=1e-2, lipschitz=0.5 if scale < 1 else None, on_failure="return"
    )
    finite = (result.x.double() * (1 + scale) - y.double()).norm() <= 1e-2 * y.double().norm()
    assert not result.converged.any() or finite


def test_a_priori_cap():
    g = contraction(8, 0.9)
    y = torch.randn(4, 8, dtype=torch.float64)
    result = invert_residual(g, y, tol=1e-10, lipschitz=0.9)
    n = torch.log(1e-10 * 0.1 / (sample_norms(g(y)) / sample_norms(y).clamp_min(1))) / torch.log(torch.tensor(0.9))
    assert (result.iterations <= n.ceil() + 1).all()


@pytest.mark.parametrize("on_failure", ["raise", "warn", "return"])
def test_on_failure(on_failure):
    arguments = {"max_iterations": 2, "on_failure": on_failure, "tol": 1e-12, "lipschitz": 0.9}
    g, y = contraction(4, 0.9), torch.randn(3, 4, dtype=torch.float64)
    if on_failure == "raise":
        with pytest.raises(NotConvergedError, match="larger max_iterations") as caught:
            invert_residual(g, y, **arguments)
        result = caught.value.result
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    elif on_failure == "warn":
        with pytest.warns(UserWarning, match="did not converge"):
            result = invert_residual(g, y, **arguments)
    else:
        result = invert_residual(g, y, **arguments)
    assert not result.converged.any()
    assert not result.certified.any()
    assert (result.error_bound > 1e-12).all()


def test_warm_start():
    g = contraction(8, 0.9)
    x = torch.randn(4, 8, dtype=torch.float64)
    result = invert_residual(g, x + g(x), lipschitz=0.9, x0=x)
    assert (result.iterations == 1).all()


def test_zero_branch_and_zero_lipschitz():
    y = torch.randn(3, 4)
    result = invert_residual(torch.zeros_like, y, lipschitz=0.0)
    assert torch.equal(result.x, y)
    assert result.certified.all()


@pytest.mark.parametrize("shape", [(0, 4), (0, 3, 2, 2)])
def test_empty_batch(device, shape):
    result = invert_residual(lambda x: 0.5 * x, torch.zeros(shape, device=device), lipschitz=0.5)
    assert result.x.shape == shape
    assert result.evaluations.shape == (0,)


def test_layouts(device):
    g = torch.nn.Conv2d(3, 3, 3, padding=1).to(device, torch.float64)
    with torch.no_grad():
        g.weight.mul_(0.05)
    y = torch.randn(2, 3, 5, 6, dtype=torch.float64, device=device)
    expected = invert_residual(g, y, tol=1e-12).x
    for variant in (y.contiguous(memory_format=torch.channels_last), y.transpose(2, 3).contiguous().transpose(2, 3)):
        torch.testing.assert_close(invert_residual(g, variant, tol=1e-12).x, expected, rtol=1e-9, atol=1e-9)


def test_reference_agrees():
    g = contraction(6, 0.7)
    y = torch.randn(4, 6, dtype=torch.float64)
    ours = invert_residual(g, y, tol=1e-13, lipschitz=0.7).x
    torch.testing.assert_close(fixed_iterations(g, y, 200), ours, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("y", "options", "error", "message"),
    [
        (torch.ones(2, 3, dtype=torch.int64), {}, TypeError, "floating point, got torch.int64"),
        ([1.0], {}, TypeError, "got list"),
        (torch.ones(3), {}, ValueError, r"shape \(B, ...\)"),
        (torch.ones(2, 3), {"tol": 1e-8}, ValueError, r"4·eps = 4.8e-07"),
        (torch.ones(2, 3), {"tol": float("nan")}, ValueError, "tol"),
        (torch.ones(2, 3), {"lipschitz": 1.0}, ValueError, r"\[0, 1\), got 1.0"),
        (torch.ones(2, 3), {"max_iterations": 0}, ValueError, "max_iterations"),
        (torch.ones(2, 3), {"x0": torch.ones(2, 4)}, ValueError, "x0 must match"),
        (torch.ones(2, 3), {"on_failure": "ignore"}, ValueError, "'raise', 'warn', 'return'"),
        (torch.ones(2, 3), {"method": "newton"}, ValueError, "'anderson', 'picard', got 'newton'"),
    ],
)
def test_bad_input(y, options, error, message):
    with pytest.raises(error, match=message):
        invert_residual(lambda x: 0.5 * x, y, **options)


@pytest.mark.parametrize("options", [{"tol": "a"}, {"lipschitz": "a"}, {"max_iterations": 2.5}, {"x0": [1]}])
def test_arguments_of_the_wrong_type(options):
    with pytest.raises(TypeError, match=next(iter(options))):
        invert_residual(lambda x: 0.5 * x, torch.ones(2, 3), **options)
    with pytest.raises(TypeError, match="g must be callable, got int"):
        invert_residual(3, torch.ones(2, 3))
    with pytest.raises(TypeError, match="g must return a tensor, got list"):
        invert_residual(lambda x: [x], torch.ones(2, 3))


def test_branch_that_changes_shape_or_dtype():
    with pytest.raises(TypeError, match="keep the shape"):
        invert_residual(lambda x: x[:, :2], torch.ones(2, 3))
    with pytest.raises(TypeError, match="keep the dtype"):
        invert_residual(lambda x: x.double(), torch.ones(2, 3))
