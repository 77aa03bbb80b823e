"""The flow: densities, samples, bits per dimension, one trunk for everything."""

import copy
import io
import math

import pytest
import torch

import iresnet_fast as irf
from benchmarks.blocks import saturated
from iresnet_fast.data import dequantize
from iresnet_fast.estimators import Exact, NeumannGradient, PowerSeries, RussianRoulette
from iresnet_fast.models import FlowConfig, IResNetFlow
from tests.helpers import jacobians, same_state, state_of

IMAGES = {
    "in_shape": (1, 8, 8),
    "blocks": (1, 1),
    "hidden": (6, 6),
    "fc_blocks": 1,
    "fc_hidden": (12,),
    "squeeze_input": True,
    "preprocessing": "logit",
}


def planar(**options):
    """A flow of the plane that has seen data."""
    flow = IResNetFlow.from_config({"in_shape": (2,), "fc_blocks": 4, "fc_hidden": (16, 16), **options})
    flow.train()(torch.randn(64, 2) * torch.tensor([1.0, 0.3]) + 0.5)
    return saturated(flow).eval()


def of_images(**options):
    flow = IResNetFlow.from_config({**IMAGES, **options})
    flow.train()(torch.rand(16, 1, 8, 8))
    return saturated(flow, 2.0).eval()


def test_log_prob_is_the_change_of_variables():
    learned = planar(prior="learned").double()
    with torch.no_grad():
        learned.prior.mean.normal_()
        learned.prior.log_scale.normal_()
    options = {"dtype": torch.float64}
    cases = ((learned, torch.randn(3, 2, **options)), (of_images().double(), torch.rand(2, 1, 8, 8, **options)))
    for flow, x in cases:
        output = flow(x, Exact())
        dense = torch.linalg.slogdet(jacobians(flow.features, x)).logabsdet
        normal = torch.distributions.Normal(flow.prior.mean, flow.prior.log_scale.exp())
        expected = normal.log_prob(flow.features(x)).sum(1) + dense
        torch.testing.assert_close(output.log_prob, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(flow.log_prob(x, Exact()), output.log_prob)


def test_density_integrates_to_one():
    flow = planar()
    ticks = torch.linspace(-8, 8, 801)
    with torch.no_grad():
        log_prob = flow.log_prob(torch.cartesian_prod(ticks, ticks))
    assert float(log_prob.double().exp().sum() * 0.02**2) == pytest.approx(1, abs=0.01)


def test_samples_follow_the_density():
    """The share of samples in each quarter against the integral of the density over it."""
    flow = planar()
    samples = flow.sample(40_000)
    assert samples.shape == (40_000, 2)
    ticks = torch.linspace(-8, 8, 801) + 0.01
    grid = torch.cartesian_prod(ticks, ticks)
    with torch.no_grad():
        mass = flow.log_prob(grid).exp() * 0.02**2
    center = samples.median(0).values
    for signs in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        sign = torch.tensor(signs)
        expected = float(mass[((grid - center) * sign > 0).all(1)].sum())
        found = float(((samples - center) * sign > 0).all(1).float().mean())
        assert found == pytest.approx(expected, abs=4 * math.sqrt(expected / 40_000))


def test_sampling_is_reproducible_and_has_a_temperature():
    flow = planar()
    first, second = (
        flow.sample(100, tol=1e-6, generator=torch.Generator().manual_seed(3), batch_size=b) for b in (100, 7)
    )
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    cold = flow.sample(500, temperature=0.0)
    assert float(cold.std(0).max()) < 1e-5
    assert flow.sample(0).shape == (0, 2)


def test_reconstruct_and_interpolate():
    flow = of_images()
    x = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(flow.reconstruct(x, tol=1e-6), x, rtol=0, atol=1e-5)
    path = flow.interpolate(x, x.flip(0), 5, tol=1e-6)
    assert path.shape == (5, 4, 1, 8, 8)
    torch.testing.assert_close(path[0], x, rtol=0, atol=1e-5)
    torch.testing.assert_close(path[-1], x.flip(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(flow.features(path[2]), flow.features(path[2].flip(0)), rtol=1e-3, atol=1e-3)


def test_samples_of_blocks_close_to_one():
    """In float32 the solver's own tolerance is out of reach there; the sampler's is not."""
    flow = planar(coeff=0.99)
    assert irf.enforce(flow).guaranteed
    assert max(bound.lipschitz for bound in irf.certify(flow).blocks) > 0.96
    x = flow.sample(500)
    torch.testing.assert_close(flow.reconstruct(x), x, rtol=1e-3, atol=1e-3)


def test_certified_and_reported_through_scales():
    flow = of_images()
    assert irf.enforce(flow).guaranteed
    x = torch.rand(5, 1, 8, 8)
    result = flow.solve_inverse(flow.features(x).detach())
    assert result.certified.all()
    assert ((result.x - x).flatten(1).norm(dim=1) <= result.error_bound).all()
    assert len(result.blocks) == 3


def test_sampling_and_the_way_back_change_no_state():
    """In training mode either."""
    flow = of_images().train()
    before = state_of(flow)
    x = torch.rand(3, 1, 8, 8)
    flow.sample(3)
    flow.reconstruct(x)
    flow.interpolate(x, x.flip(0), 3)
    assert same_state(flow, before)


def test_temperature_and_a_learned_prior():
    """The standard deviations are scaled, and the means are not."""
    flow = planar(prior="learned")
    with torch.no_grad():
        flow.prior.mean.copy_(torch.tensor([2.0, -1.0]))
        flow.prior.log_scale.copy_(torch.tensor([-1.0, 0.5]))
    z = flow.features(flow.sample(20_000, temperature=0.5)).detach()
    torch.testing.assert_close(z.mean(0), flow.prior.mean.detach(), rtol=0, atol=0.02)
    torch.testing.assert_close(z.std(0), 0.5 * flow.prior.log_scale.exp().detach(), rtol=0.02, atol=0)


def test_low_precision_samples_within_what_it_resolves():
    flow = planar(coeff=0.7).bfloat16()
    x = flow.sample(50)
    assert x.dtype == torch.bfloat16
    assert x.isfinite().all()


def test_inference_mode():
    for flow, x in ((planar(), torch.randn(5, 2)), (of_images(estimator="exact"), torch.rand(5, 1, 8, 8))):
        expected = flow.log_prob(x)
        with torch.inference_mode():
            torch.testing.assert_close(flow.log_prob(x), expected)
        torch.testing.assert_close(flow.log_prob(x), expected)


def test_bits_per_dim_counts_exactly():
    """A flow that is the identity on [0, 1], against the standard normal's own density of the dequantised data."""
    flow = IResNetFlow.from_config({"in_shape": (5,), "fc_blocks": 1, "actnorm": False}).eval()
    with torch.no_grad():
        for part in flow.trunk[0].g:
            if hasattr(part, "parametrizations"):
                part.parametrizations.weight.original.zero_()
                part.bias.zero_()
    images = torch.randint(256, (40, 5), dtype=torch.uint8)
    batches = [(part, None) for part in images.split(16)]
    torch.manual_seed(1)
    found = flow.bits_per_dim(batches)
    torch.manual_seed(1)
    continuous = torch.cat([dequantize(part) for part, _ in batches]).double()
    nats = -torch.distributions.Normal(0, 1).log_prob(continuous).mean()
    assert found.mean == pytest.approx(float(nats) / math.log(2) + 8, rel=1e-6)
    assert found.n_samples == 40
    assert found.bias_bound == 0


def test_standard_error_of_bits_per_dim():
    """Repeated on new data, the means scatter as the error says."""
    flow = of_images()
    batches = [[torch.randint(256, (5, 1, 8, 8)) for _ in range(12)] for _ in range(25)]
    found = [flow.bits_per_dim(part, RussianRoulette()) for part in batches]
    assert all(math.isnan(each.bias_bound) for each in found)  # nothing is certified
    scatter = torch.tensor([each.mean for each in found]).std()
    reported = torch.tensor([each.standard_error for each in found]).square().mean().sqrt()
    assert float(reported / scatter) == pytest.approx(1, abs=0.5)


def test_bits_per_dim_of_a_truncated_series_has_its_bound():
    flow = of_images()
    batches = [torch.randint(256, (5, 1, 8, 8))]
    with pytest.raises(ValueError, match="a bias of unknown size. Remedy: certify"):
        flow.bits_per_dim(batches, PowerSeries(5))
    irf.certify(flow)
    assert 0 < flow.bits_per_dim(batches, PowerSeries(5)).bias_bound < 1
    assert flow.bits_per_dim(batches, RussianRoulette()).bias_bound == 0
    assert flow.bits_per_dim(batches).standard_error == math.inf
    with pytest.raises(ValueError, match=r"dequantised data in \[0, 1\]; got values from 0 to 1.04"):
        flow.bits_per_dim([torch.tensor([0, 1.04] * 32).view(1, 1, 8, 8)])
    for levels in (255, 256):
        with pytest.raises(ValueError, match=f"multiples of 1/{levels}, .* Remedy: the integers themselves"):
            flow.bits_per_dim([batches[0].float() / levels])
    full, with_empty = (
        [torch.randint(256, (3, 1, 8, 8), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
        for _ in range(2)
    )
    with_empty.insert(1, torch.randint(256, (0, 1, 8, 8)))
    found = []
    for images in (full, with_empty):
        torch.manual_seed(0)
        found.append(flow.bits_per_dim(images, Exact()))
    assert found[0] == found[1]
    with pytest.raises(ValueError, match="no data"):
        flow.bits_per_dim(with_empty[1:2])
    with pytest.raises(ValueError, match=r"Remedy: flow.eval\(\) first"):
        flow.train().bits_per_dim(batches)


def test_fault_4_a_loaded_flow_keeps_what_it_learned():
    flow = planar()
    stored = io.BytesIO()
    torch.save(flow.state_dict(), stored)
    stored.seek(0)
    loaded = IResNetFlow(flow.config)
    loaded.load_state_dict(torch.load(stored, weights_only=True))
    loaded.train()
    before = {name: value for name, value in state_of(loaded).items() if "_u" not in name and "_v" not in name}
    loaded(100 + torch.randn(8, 2))
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in before.items())
    x = torch.randn(8, 2)
    fresh = IResNetFlow(flow.config)
    fresh.load_state_dict(flow.state_dict())
    torch.testing.assert_close(fresh.eval().log_prob(x), flow.log_prob(x))
    torch.testing.assert_close(copy.deepcopy(flow).log_prob(x), flow.log_prob(x))


def test_one_trunk_classifies_too():
    flow = of_images(n_classes=3)
    x = torch.rand(4, 1, 8, 8)
    output = flow(x)
    assert output.logits.shape == (4, 3)
    torch.testing.assert_close(flow.logits(x), output.logits)
    with pytest.raises(ValueError, match="no classes. Remedy: n_classes"):
        planar().logits(torch.randn(2, 2))


def test_autocast_keeps_log_det_in_float32():
    flow = of_images()
    x = torch.rand(4, 1, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = flow(x, PowerSeries(5))
    assert output.log_prob.dtype == output.log_det.value.dtype == torch.float32
    torch.manual_seed(0)
    torch.testing.assert_close(output.log_prob, flow(x, Exact()).log_prob, rtol=0.05, atol=5)


def test_hooks_on_the_trunk_are_not_passed_over():
    flow = planar()
    flow.trunk.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(RuntimeError, match=r"module trunk \(InvertibleSequential\) has forward hooks"):
        flow(torch.randn(2, 2))


def test_parameters_are_all_used():
    flow = of_images(n_classes=2, prior="learned").train()
    output = flow(torch.rand(4, 1, 8, 8))
    (output.log_prob.sum() + output.logits.square().sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())


@pytest.mark.full
@pytest.mark.parametrize("estimator", [Exact(), NeumannGradient(PowerSeries(2))], ids=repr)
def test_compiles_whole(estimator):
    """The loss of a training step in one graph: the gradients are those of eager code, in evaluation mode and after."""
    flow = planar(fc_blocks=1).double()
    x = torch.randn(16, 2, dtype=torch.float64)
    flow(x)  # fits the power iterations to the changed weights: compiled code does not

    def loss(x):
        return -flow(x, estimator).log_prob.mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    if estimator == Exact():  # what the others draw differs in compiled code
        gradients = [torch.autograd.grad(function(x), list(flow.parameters())) for function in (compiled, loss)]
        for found, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(found, expected)
    flow.train()
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    before = float(loss(x).detach())
    for _ in range(30):
        optimizer.zero_grad()
        compiled(x).backward()
        optimizer.step()
    assert float(loss(x).detach()) < before


@pytest.mark.full
def test_a_drawn_number_of_terms_runs_in_eager_code():
    """A graph has a fixed number: the roulette is left out of it, and an error where nothing may be."""
    flow = planar(fc_blocks=1, estimator="neumann").double()
    x = torch.randn(16, 2, dtype=torch.float64)
    compiled = torch.compile(lambda x: flow(x).log_prob, backend="aot_eager")
    values = []
    for function in (compiled, lambda x: flow(x).log_prob):
        torch.manual_seed(0)
        value = function(x)
        values.append((value, torch.autograd.grad(value.sum(), flow.trunk[1].g[0].bias)[0]))
    torch.testing.assert_close(values[0], values[1])
    with pytest.raises(torch._dynamo.exc.Unsupported, match="PowerSeries or Exact can be compiled"):
        torch.compile(lambda x: flow(x).log_prob, backend="aot_eager", fullgraph=True)(x)


@pytest.mark.full
def test_a_block_of_its_own_compiles_in_training():
    """Its power iterations run before the transforms that take the products."""
    block = irf.nn.InvertibleResidualBlock(irf.nn.LipschitzMLP(2, (8,))).train()
    norm = irf.nn.find_spectral_norm(block.g[0])
    before = norm._u.clone()
    with torch.no_grad():
        block.g[0].parametrizations.weight.original.normal_()
    _, log_det = torch.compile(block.forward_and_log_det, fullgraph=True)(torch.randn(5, 2))
    log_det.sum().backward()
    assert not torch.equal(norm._u, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"in_shape": (2, 3)}, r"in_shape must be \(C, H, W\) of images or \(D,\) of vectors, got \(2, 3\)"),
        ({"in_shape": (2,), "blocks": (1,), "hidden": (8,)}, r"Remedy: blocks=\(\) and fc_blocks"),
        ({"in_shape": (2,)}, "a flow needs blocks or fc_blocks"),
        ({**IMAGES, "in_shape": (1, 6, 6)}, r"must be divisible by 4"),
        ({**IMAGES, "squeeze_input": False}, "Remedy: squeeze_input=True or factor_out=False"),
        ({**IMAGES, "hidden": (6,)}, "one entry per stage, got 2 and 1"),
        ({**IMAGES, "coeff": 1.0}, r"coeff must be in \(0, 1\)"),
        ({**IMAGES, "coeff": None}, "a flow needs branches that contract"),
        ({**IMAGES, "estimator": "newton"}, "estimator must be one of 'auto', 'exact'"),
        ({**IMAGES, "n_levels": 1}, "n_levels must be an int of at least 2, got 1"),
        ({**IMAGES, "n_terms": 2.5}, "n_terms must be an int of at least 1, got 2.5"),
        ({**IMAGES, "n_classes": "10"}, "n_classes must be an int of at least 0, got '10'"),
        ({**IMAGES, "n_classes": 1}, "n_classes must be 0 or at least 2, got 1"),
        ({**IMAGES, "fc_blocks": True}, "fc_blocks must be an int of at least 0, got True"),
        ({**IMAGES, "coeff": "0.9"}, "coeff must be a number, got '0.9'"),
        ({**IMAGES, "alpha": "0.05"}, "alpha must be a number, got '0.05'"),
        ({**IMAGES, "n_clases": 3}, "unknown setting 'n_clases': did you mean 'n_classes'"),
    ],
)
def test_bad_configurations(settings, message):
    with pytest.raises(ValueError, match=message):
        IResNetFlow.from_config(settings)


def test_bad_data():
    flow = of_images()
    with pytest.raises(ValueError, match=r"takes \(B, 1, 8, 8\), got \(2, 1, 4, 4\)"):
        flow.log_prob(torch.rand(2, 1, 4, 4))
    with pytest.raises(TypeError, match=r"got torch.uint8: integers have none. Remedy: irf.data.dequantize"):
        flow.log_prob(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"got values from 0 to 2. Remedy: scale it to \[0, 1\]"):
        flow.log_prob(torch.arange(128).view(2, 1, 8, 8).clamp_max(2).float())
    with pytest.raises(TypeError, match=r"parameters of torch.float32, got data of torch.float64. Remedy: x.to\(torch"):
        planar().log_prob(torch.randn(2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="1 of 3 samples have NaN or infinite values"):
        planar().log_prob(torch.tensor([[0.0, 1], [math.nan, 0], [0, 0]]))
    with pytest.raises(ValueError, match="a single value per channel has no variance"):
        IResNetFlow.from_config({"in_shape": (2,), "fc_blocks": 1}).train()(torch.randn(1, 2))
    fresh = IResNetFlow.from_config({"in_shape": (2,), "fc_blocks": 1}).eval()
    with pytest.raises(RuntimeError, match=r"trunk.0 \(ActNorm\) has not been initialised"):
        fresh.sample(2)
    with pytest.raises(ValueError, match="need n ≥ 0 samples at a temperature ≥ 0"):
        planar().sample(-1)
    with pytest.raises(ValueError, match="n_steps ≥ 2"):
        planar().interpolate(torch.zeros(1, 2), torch.zeros(1, 2), 1)
    with pytest.raises(TypeError, match="config must be a FlowConfig, got dict"):
        IResNetFlow({"in_shape": (2,)})


def test_settings_are_frozen():
    assert FlowConfig(in_shape=[2], fc_blocks=1).in_shape == (2,)
