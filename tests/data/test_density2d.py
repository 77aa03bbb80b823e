"""Densities in the plane, and dequantisation."""

import math

import pytest
import torch

from iresnet_fast.data import DENSITIES_2D, density2d


@pytest.mark.parametrize("name", DENSITIES_2D)
def test_samples_are_finite_inside_and_reproducible(name):
    density = density2d(name)
    x = density.sample(5000, seed=1)
    assert x.shape == (5000, 2)
    assert x.dtype == torch.float32
    assert torch.equal(x, density.sample(5000, seed=1))
    assert not torch.equal(x, density.sample(5000, seed=2))
    assert float((x.abs() <= density.extent).all(1).float().mean()) > 0.99


@pytest.mark.parametrize("name", [name for name, density in DENSITIES_2D.items() if density.log_prob])
def test_log_density_and_entropy(name):
    density = density2d(name)
    ticks = torch.arange(-8, 8, 0.02, dtype=torch.float64) + 0.01
    log_prob = density.log_prob(torch.cartesian_prod(ticks, ticks))
    mass = log_prob.exp() * 0.02**2
    assert float(mass.sum()) == pytest.approx(1, abs=1e-6)
    x = density.sample(100_000).double()
    found = -density.log_prob(x)
    assert torch.isfinite(found).all()
    error = float(found.std()) / math.sqrt(len(x))
    assert float(found.mean()) == pytest.approx(density.entropy, abs=4 * error + 1e-7)


def test_unknown_density():
    with pytest.raises(ValueError, match="no density 'moon'; there are 8gaussians, checkerboard"):
        density2d("moon")
