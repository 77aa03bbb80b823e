"""The symbol at the distinct frequencies, on every backend."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import iresnet_fast as irf
from iresnet_fast import _extension
from iresnet_fast.reference import conv_symbol as reference
from tests.tolerances import FLOAT64

CASES = [
    ((4, 3, 3, 3), (6, 6), {}),
    ((3, 5, 3, 2), (5, 8), {"dilation": (2, 1)}),
    ((4, 2, 3, 3), (6, 4), {"stride": (2, 2), "groups": 2}),
    ((2, 2, 5, 5), (3, 4), {}),
    ((3, 2, 1, 1), (4, 3), {}),
    ((2, 3, 4), (8,), {"stride": 4}),
    ((2, 2, 2, 3, 2), (2, 3, 4), {}),
    ((33, 17, 3, 3), (7, 9), {}),
]


def expected(weight, size, stride=1, dilation=1, groups=1):
    axes = len(size)
    stride, dilation = ((value,) * axes if isinstance(value, int) else value for value in (stride, dilation))
    full = reference.conv_symbol(weight, size, stride, dilation, groups).flatten(0, axes - 1)
    index, _ = reference.distinct_frequencies([n // s for n, s in zip(size, stride, strict=True)])
    return full[index.to(weight.device)]


@pytest.mark.parametrize(("shape", "size", "options"), CASES)
def test_matches_the_fft(device, shape, size, options):
    weight = torch.randn(shape, dtype=torch.float64, device=device)
    exact = expected(weight, size, **options)
    found = irf.ops.conv_symbol(weight, size, **options)
    assert found.shape == exact.shape
    assert (found - exact).abs().max() <= FLOAT64 * exact.abs().max()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_distinct_frequencies_cover_the_grid_once(grid):
    index, mirror = reference.distinct_frequencies(grid)
    covered = torch.cat([index, mirror[mirror != index]])
    assert torch.equal(covered.sort().values, torch.arange(math.prod(grid), device="cpu"))
    weight = torch.randn(1, 1, *[2] * len(grid), dtype=torch.float64, device="cpu")
    ones = [1] * len(grid)
    symbol = reference.conv_symbol(weight, grid, ones, ones, 1).flatten()
    torch.testing.assert_close(symbol[mirror], symbol[index].conj(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("shape", "size", "options"), CASES[:6])
def test_gradcheck(device, shape, size, options):
    shape = (min(shape[0], 4), min(shape[1], 2), *shape[2:])
    weight = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: irf.ops.conv_symbol(w, size, **options), weight)
    assert torch.autograd.gradgradcheck(lambda w: irf.ops.conv_symbol(w, size, **options), weight)


@pytest.mark.skipif(not _extension.loaded, reason=str(_extension.missing_reason))
@pytest.mark.parametrize("grid", [[4, 6], [5, 3], [1, 2]])
def test_opcheck(device, grid):
    weight = torch.randn(4, 2, 3, 3, dtype=torch.float64, device=device, requires_grad=True)
    op = torch.ops.iresnet_fast.conv_symbol.default
    torch.library.opcheck(op, (weight, grid, [1, 1], [1, 1], 2))


def test_large_phases_are_exact():
    """The angle is reduced in integers: a frequency of 10⁵ loses nothing."""
    weight = torch.randn(1, 1, 3, dtype=torch.float64)
    n = 100_003
    found = irf.ops.conv_symbol(weight, (n,), dilation=77_777).flatten()
    j = torch.arange(len(found))
    turns = torch.stack([(t * 77_777 % n) * j % n for t in range(3)]).double() / n
    exact = (weight.flatten().unsqueeze(1) * torch.exp(-2j * torch.pi * turns)).sum(0)
    assert (found - exact).abs().max() < 1e-14


def test_bad_input():
    with pytest.raises(ValueError, match="must divide"):
        irf.ops.conv_symbol(torch.randn(2, 2, 3), (5,), stride=2)
    with pytest.raises(TypeError, match="floating point"):
        irf.ops.conv_symbol(torch.ones(2, 2, 3, dtype=torch.int64), (4,))
