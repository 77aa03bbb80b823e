"""Names of other implementations, against those implementations where they are installed."""

import pytest
import torch

import iresnet_fast as irf
from benchmarks.blocks import saturated
from iresnet_fast.compat import normflows as adapters
from iresnet_fast.compat.official import spectral_norm_conv, spectral_norm_fc
from iresnet_fast.compat.residual_flows import iResBlock
from iresnet_fast.estimators import Exact, NeumannGradient, PowerSeries, RussianRoulette
from tests.helpers import dense_norm

# Where their fixed-point iteration stops.
THEIR_INVERSE = {"rtol": 1e-2, "atol": 5e-3}


def branch():
    return saturated(irf.nn.LipschitzMLP(2, (8,)))


def test_residual_flows_block_counts_as_the_original():
    """Signs, shapes and directions against normflows' copy of it, exact on both sides."""
    original = pytest.importorskip("normflows").flows.residual.iResBlock
    g = branch()
    theirs, ours = original(g, brute_force=True), iResBlock(g, brute_force=True)
    x, logpx = torch.randn(5, 2), torch.randn(5, 1)
    for found, expected in zip(ours(x, logpx), theirs(x, logpx), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    y = ours(x).detach()
    torch.testing.assert_close(y, theirs(x).detach())
    for found, expected in zip(ours.inverse(y, logpx), theirs.inverse(y, logpx), strict=True):
        torch.testing.assert_close(found, expected, **THEIR_INVERSE)
    torch.testing.assert_close(ours.inverse(y), x, rtol=1e-4, atol=1e-4)
    assert ours.nnet is g


@pytest.mark.parametrize("reverse", [True, False])
def test_residual_counts_as_normflows(reverse):
    normflows = pytest.importorskip("normflows")
    g = branch()
    theirs = normflows.flows.Residual(g, reverse=reverse, brute_force=True)
    ours = adapters.Residual(g, reverse=reverse, brute_force=True)
    z = torch.randn(6, 2)
    for name in ("forward", "inverse"):
        for found, expected in zip(getattr(ours, name)(z), getattr(theirs, name)(z), strict=True):
            torch.testing.assert_close(found, expected, **THEIR_INVERSE)
    model = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(2, trainable=False), [ours])
    assert model.log_prob(z).shape == (6,)


def test_settings_become_estimators():
    g = branch()
    for options, expected in (
        ({}, NeumannGradient(RussianRoulette())),
        ({"geom_p": 0.1, "n_exact_terms": 4}, NeumannGradient(RussianRoulette(4, 0.9))),
        ({"n_power_series": 7, "neumann_grad": False, "n_samples": 3}, PowerSeries(7, n_probes=3)),
        ({"exact_trace": True}, Exact()),
    ):
        assert iResBlock(g, **options).block.estimator == expected
    assert adapters.Residual(g, True, True, 0.1).bijection.estimator == NeumannGradient(RussianRoulette(2, 0.9))
    assert iResBlock(g, lamb=2.0).block.estimator == NeumannGradient(RussianRoulette())
    with pytest.raises(ValueError, match="no finite variance for every branch .* Remedy: n_dist='geometric'"):
        iResBlock(g, n_dist="poisson")


def test_spectral_norms_of_the_official_names():
    conv = spectral_norm_conv(torch.nn.Conv2d(3, 6, 3, padding=1), 0.5, (3, 5, 5), n_power_iterations=3)
    linear = spectral_norm_fc(torch.nn.Linear(7, 4), 0.5)
    for layer in (conv, linear):
        saturated(layer)
        layer.eval()
        _ = layer.weight
        assert dense_norm(layer) == pytest.approx(0.5, rel=1e-2)
    with pytest.raises(ValueError, match=r"with the convolution's 3 channels, got \(4, 5, 5\)"):
        spectral_norm_conv(torch.nn.Conv2d(3, 6, 3, padding=1), 0.5, (4, 5, 5))
