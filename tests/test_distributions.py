"""Flows in torch.distributions, zuko and normflows: the installed packages are the judges."""

import copy
import weakref

import pytest
import torch
from torch.distributions import Independent, Normal, TransformedDistribution

import iresnet_fast as irf
from benchmarks.blocks import saturated
from iresnet_fast.distributions import FlowTransform
from tests.helpers import same_state, state_of


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


def test_asking_for_a_log_det_changes_no_state(flow):
    """In training mode, where a forward of its own would move on from the weights that made y."""
    transform = FlowTransform(flow.train())
    z = transform(torch.randn(5, 2))
    before = state_of(flow)
    x = transform.inv(z.detach())
    transform.log_abs_det_jacobian(x, z.detach())
    assert same_state(flow, before)


def test_what_is_remembered_is_of_this_very_call(flow):
    transform = FlowTransform(flow)
    x = torch.randn(5, 2)
    with torch.no_grad():
        z = transform(x)
    assert transform.log_abs_det_jacobian(x, z).requires_grad  # which the remembered one does not
    z = transform(x)
    x.mul_(0.5)
    torch.testing.assert_close(transform.log_abs_det_jacobian(x, z), flow(x).log_det.value)
    z = transform(x)
    kept = weakref.ref(transform._last.log_det)
    del z
    assert kept() is None  # with its graph
    transform(x)
    assert copy.deepcopy(transform)._last is None


def test_with_cache(flow, monkeypatch):
    """A sample's density needs no second inverse, and gives back the very latents."""
    density = TransformedDistribution(base(), [FlowTransform(flow, tol=1e-6).with_cache().inv])
    with torch.no_grad():
        x = density.sample((5,))
        monkeypatch.setattr(irf.nn.InvertibleSequential, "inverse", None)
        torch.testing.assert_close(density.log_prob(x), flow.log_prob(x), rtol=1e-4, atol=1e-4)
    transform = FlowTransform(flow, cache_size=1)
    assert transform.with_cache(1) is transform


def test_domain_is_that_of_the_first_module():
    block = irf.nn.InvertibleResidualBlock(irf.nn.LipschitzMLP(3))
    first = FlowTransform(irf.nn.InvertibleSequential(irf.nn.InvertibleSequential(irf.nn.Logit(0)), block))
    assert not bool(first.domain.check(torch.tensor([0.5, 0.5, 1.5])))
    later = FlowTransform(irf.nn.InvertibleSequential(irf.nn.Center(), irf.nn.Logit(0.3)))
    assert bool(later.domain.check(torch.tensor([0.5, 0.5, 1.5])))
    with pytest.raises(ValueError, match=r"maps samples of shape \(1, 4, 4\) to \(4, 2, 2\)"):
        FlowTransform(irf.nn.Squeeze(), event_dim=3)(torch.randn(2, 1, 4, 4))


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
