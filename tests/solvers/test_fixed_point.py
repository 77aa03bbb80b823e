"""The general solver: any callable, its arguments, layouts, compaction."""

import pytest
import torch

from iresnet_fast.reference.fixed_point import fixed_iterations
from iresnet_fast.solvers import NotConvergedError, invert_residual


def contraction(d, lipschitz, dtype=torch.float64, device=None):
    """x ↦ W₂ tanh(W₁ x) with a Lipschitz constant of at most ``lipschitz``, attained at 0."""
    device = device or torch.get_default_device()
    first, second = (torch.randn(d, d, dtype=torch.float64) for _ in range(2))
    first, second = (w / torch.linalg.matrix_norm(w, 2) for w in (first, second))
    first, second = first.to(device, dtype), (lipschitz * second).to(device, dtype)
    return lambda x: torch.tanh(x @ first.T) @ second.T


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


def test_stall_at_the_floor_of_the_branch_is_not_converged():
    """A branch that is only accurate to 1e-4 cannot be inverted to 1e-6, and says so soon."""
    y = torch.randn(4, 8)
    with pytest.raises(NotConvergedError, match="float64") as caught:
        invert_residual(lambda x: 0.5 * x + 1e-4 * torch.rand_like(x), y, lipschitz=0.5)
    assert caught.value.result.evaluations.max() < 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_overflowing_norms_are_not_converged(dtype, scale):
    y = torch.full((1, 3), 1e20 if dtype == torch.float32 else 6e4, dtype=dtype)
    result = invert_residual(
        lambda x: scale * x, y, tol=1e-2, lipschitz=0.5 if scale < 1 else None, on_failure="return"
    )
    finite = (result.x.double() * (1 + scale) - y.double()).norm() <= 1e-2 * y.double().norm()
    assert not result.converged.any() or finite


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
