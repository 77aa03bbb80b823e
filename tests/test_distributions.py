"""Flows in torch.distributions, zuko and normflows: the installed packages are the judges."""

import pytest
import torch
from torch.distributions import Independent, Normal, TransformedDistribution

import iresnet_fast as irf
from iresnet_fast.distributions import FlowTransform
from tests.helpers import saturated


@pytest.fixture
def flow():
    model = irf.models.IResNetFlow.from_config({"in_shape": (2,), "fc_blocks": 3, "fc_hidden": (8,)})
    model.train()(torch.randn(32, 2))
    return saturated(model).eval()


@pytest.fixture
def images():
    config = {"in_shape": (1, 4, 4), "blocks": (1,), "hidden": (4,), "preprocessing": "logit", "estimator": "exact"}
    model = irf.models.IResNetFlow.from_config(config)
    model.train()(torch.rand(32, 1, 4, 4))
    return model.eval()


def base(size=2):
    return Independent(Normal(torch.zeros(size), 1.0), 1)


def test_log_prob_needs_no_fixed_point(flow, monkeypatch):
    density = TransformedDistribution(base(), [FlowTransform(flow).inv])
    x = torch.randn(7, 2)
    runs = []
    flow.trunk[1].g.register_forward_hook(lambda *args: runs.append(1))
    monkeypatch.setattr(irf.nn.InvertibleSequential, "inverse", None)
    torch.testing.assert_close(density.log_prob(x), flow.log_prob(x))
    assert len(runs) == 2  # one for each of the two densities
    assert density.log_prob(x.view(7, 1, 2).expand(7, 3, 2)).shape == (7, 3)


def test_sampling_inverts(flow):
    density = TransformedDistribution(base(), [FlowTransform(flow, tol=1e-6).inv])
    assert density.sample((5, 3)).shape == (5, 3, 2)
    x = density.rsample((4,))
    assert x.requires_grad
    with torch.no_grad():
        torch.manual_seed(3)
        found = density.sample((6,))
        torch.manual_seed(3)
        torch.testing.assert_close(flow.features(found), torch.randn(6, 2), rtol=1e-4, atol=1e-5)


def test_log_det_of_both_directions(flow):
    transform = FlowTransform(flow)
    x = torch.randn(5, 2)
    z = transform(x)
    expected = flow(x).log_det.value
    for _ in range(2):  # remembered, then computed anew
        torch.testing.assert_close(transform.log_abs_det_jacobian(x, z), expected)
    torch.testing.assert_close(transform.inv.log_abs_det_jacobian(z, x), -expected)
    other = torch.randn(5, 2)
    transform(other)
    torch.testing.assert_close(transform.log_abs_det_jacobian(x, z), expected)


def test_images_have_event_shapes(images):
    density = TransformedDistribution(base(16), [FlowTransform(images).inv], validate_args=True)
    assert density.event_shape == (1, 4, 4)
    x = torch.rand(3, 1, 4, 4)
    torch.testing.assert_close(density.log_prob(x), images.log_prob(x))
    assert density.sample((2,)).shape == (2, 1, 4, 4)
    with pytest.raises(ValueError, match="to be within the support"):
        density.log_prob(x + 2)


def test_any_bijection():
    block = irf.nn.InvertibleResidualBlock(irf.nn.LipschitzMLP(3))
    transform = FlowTransform(block)
    x = torch.randn(4, 3)
    torch.testing.assert_close(transform.inv(transform(x)), x, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="must be an IResNetFlow or a Bijection, got Linear"):
        FlowTransform(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"a sample has 1 axes, got a tensor of shape \(\)"):
        transform(torch.tensor(1.0))


def test_zuko(flow, images):
    zuko = pytest.importorskip("zuko")
    for model, x, size in ((flow, torch.randn(6, 2), 2), (images, torch.rand(3, 1, 4, 4), 16)):
        density = zuko.distributions.NormalizingFlow(FlowTransform(model), base(size))
        torch.testing.assert_close(density.log_prob(x), model.log_prob(x))
        sample, log_prob = density.rsample_and_log_prob((4,))
        torch.testing.assert_close(log_prob, model.log_prob(sample), rtol=1e-3, atol=1e-3)


def test_normflows(flow):
    normflows = pytest.importorskip("normflows")
    NormFlow = irf.compat.normflows.NormFlow
    links = [NormFlow(link, tol=1e-6) for link in flow.trunk]
    # There the last of the list is next to the data.
    model = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(2, trainable=False), links[::-1])
    x = torch.randn(8, 2)
    torch.testing.assert_close(model.log_prob(x), flow.log_prob(x), rtol=1e-4, atol=1e-5)
    sample, log_prob = model.sample(5)
    torch.testing.assert_close(log_prob, flow.log_prob(sample), rtol=1e-3, atol=1e-3)
    model.forward_kld(x).backward()
    assert all(p.grad is not None for p in flow.trunk.parameters())
    with pytest.raises(TypeError, match=r"must be an irf.nn.Bijection, got Linear"):
        NormFlow(torch.nn.Linear(2, 2))
