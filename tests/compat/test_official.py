"""Weights of the official code."""

import json
from pathlib import Path

import pytest
import torch

import iresnet_fast as irf
from tests.tolerances import OFFICIAL_AGREEMENT

# A network trained with the official code, its inputs and its outputs; kept beside the checkout, not in it.
OFFICIAL = Path(__file__).parents[3] / "shared" / "data" / "official"
CONFIG = {
    "in_shape": [1, 8, 8],
    "nBlocks": [1, 2],
    "nStrides": [1, 2],
    "nChannels": [6, 5],
    "nClasses": 3,
    "init_ds": 2,
    "inj_pad": 2,
    "coeff": 0.9,
    "nonlin": "elu",
    "actnorm": True,
    "n_power_iter": 1,
}


def distance(x, expected):
    """Largest relative difference of a sample."""
    return float(((x - expected).detach().flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max())


FLOW_CONFIG = {
    "in_shape": [1, 8, 8],
    "nBlocks": [1, 2],
    "nStrides": [1, 2],
    "nChannels": [6, 5],
    "init_squeeze": True,
    "inj_pad": 0,
    "coeff": 0.9,
    "nonlin": "elu",
    "actnorm": True,
    "n_power_iter": 5,
    "learn_prior": True,
    "numSeriesTerms": 5,
    "density_estimation": True,
}


def official_state(scale=3.0):
    """A state dict of random weights of the classifier, in the official names and shapes."""
    state = {"prior_mu": torch.zeros(96), "prior_logstd": torch.zeros(96), "bn1.num_batches_tracked": torch.tensor(4)}
    for block, (channels, hidden, size) in enumerate([(6, 6, 4), (24, 5, 4), (24, 5, 4)]):
        state |= block_state(f"stack.{block}", channels, hidden, size, int(block > 0), scale)
    for name, value in {"weight": 1.0, "bias": 0.0, "running_mean": 0.3, "running_var": 2.0}.items():
        state[f"bn1.{name}"] = torch.full((24,), value)
    state["logits.weight"], state["logits.bias"] = torch.randn(3, 24), torch.randn(3)
    return state


def official_flow_state():
    """The same of the multi-scale flow, whose layers here contract."""
    state = {"prior_mu": torch.randn(64), "prior_logstd": 0.2 * torch.randn(64), "logits.weight": torch.randn(10, 8)}
    state |= block_state("stack.0.stack.0", 4, 6, 4, 0, 0.3)
    for block in range(2):
        state |= block_state(f"stack.1.stack.{block}", 8, 5, 2, 1, 0.3)
    return state


def block_state(prefix, channels, hidden, size, first_layer, scale):
    """Of one block, whose first layer stands so many places behind the start."""
    state = {
        f"{prefix}.actnorm._log_scale": 0.1 * torch.randn(channels),
        f"{prefix}.actnorm._shift": torch.randn(channels),
    }
    widths = [(channels, hidden, 3), (hidden, hidden, 1), (hidden, channels, 3)]
    for layer, (c_in, c_out, k) in enumerate(widths):
        name = f"{prefix}.bottleneck_block.{2 * layer + first_layer}"
        state[f"{name}.weight_orig"] = scale * torch.randn(c_out, c_in, k, k) / (c_in * k * k) ** 0.5
        state[f"{name}.bias"] = torch.randn(c_out)
        cells = 1 if k == 1 else size * size
        u, v = torch.randn(c_out * cells), torch.randn(c_in * cells)
        state[f"{name}.weight_u"], state[f"{name}.weight_v"] = u / u.norm(), v / v.norm()
        state[f"{name}.weight_sigma"] = torch.zeros(1)
    return state


def official_weight(state, name, size):
    """The weight that the official code uses in evaluation mode."""
    weight, u, v = (state[f"{name}.weight_{part}"] for part in ("orig", "u", "v"))
    if weight.shape[-1] == 1:
        return weight / max(1.0, float(u @ weight.flatten(1) @ v) / 0.9)
    sigma = u @ torch.conv2d(v.view(1, -1, size, size), weight, padding=1).flatten()
    return weight / (max(1.0, float(sigma) / 0.9) + 1e-5)


def squeeze(x):
    batch, channels, height, width = x.shape
    patches = x.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 3, 5, 1, 2, 4)
    return patches.reshape(batch, 4 * channels, height // 2, width // 2)


def official_block(state, prefix, z, first_layer, size):
    """ActNorm and residual block by the names of the official state dict."""
    scale, shift = (state[f"{prefix}.actnorm.{part}"].view(1, -1, 1, 1) for part in ("_log_scale", "_shift"))
    z = z * scale.exp() + shift
    h = z
    for layer in range(3):
        if layer or first_layer:
            h = torch.nn.functional.elu(h)
        name = f"{prefix}.bottleneck_block.{2 * layer + first_layer}"
        h = torch.conv2d(h, official_weight(state, name, size), state[f"{name}.bias"], padding=int(layer != 1))
    return z + h


def test_forward_is_the_official_one():
    """Written out by the official state dict's names, step by step."""
    state = official_state()
    model = irf.compat.official.load({f"module.{name}": value for name, value in state.items()}, CONFIG)
    assert not model.training
    x = torch.randn(5, 1, 8, 8)
    z = torch.cat([squeeze(x), torch.zeros(5, 2, 4, 4)], 1)
    for block in range(3):
        if block == 1:
            z = squeeze(z)
        z = official_block(state, f"stack.{block}", z, int(block > 0), 4)
    assert distance(model.features(x), z) <= OFFICIAL_AGREEMENT
    pooled = torch.relu((z - 0.3) / (2.0 + 1e-5) ** 0.5).mean((2, 3))
    assert distance(model(x), pooled @ state["logits.weight"].T + state["logits.bias"]) <= OFFICIAL_AGREEMENT


def test_the_flow_is_the_official_one():
    """Latents, density and inverse, from a forward written out by the official names."""
    state = official_flow_state()
    flow = irf.compat.official.load({f"module.{name}": value for name, value in state.items()}, FLOW_CONFIG)
    assert isinstance(flow, irf.models.IResNetFlow)
    assert not flow.training
    x = torch.rand(5, 1, 8, 8)

    def latents(x):
        z = official_block(state, "stack.0.stack.0", squeeze(x - 0.5), 0, 4)
        factored, z = z[:, :2], squeeze(z[:, 2:])
        for block in range(2):
            z = official_block(state, f"stack.1.stack.{block}", z, 1, 2)
        return torch.cat([factored.flatten(1), z.flatten(1)], 1)

    z = latents(x)
    assert distance(flow.features(x), z) <= OFFICIAL_AGREEMENT
    prior = torch.distributions.Normal(state["prior_mu"], state["prior_logstd"].exp())
    jacobian = torch.autograd.functional.jacobian(lambda x: latents(x).sum(0), x).flatten(2).transpose(0, 1)
    density = prior.log_prob(z).sum(1) + torch.linalg.slogdet(jacobian).logabsdet
    found = flow.log_prob(x, irf.estimators.Exact()).detach()
    torch.testing.assert_close(found, density, atol=1e-4, rtol=1e-5)
    assert irf.certify(flow).guaranteed
    assert distance(flow.inverse(z), x) <= OFFICIAL_AGREEMENT
    assert flow.trunk[3].estimator == irf.estimators.PowerSeries(5)


def test_what_does_not_fit_in_a_flow_is_named():
    state = official_flow_state()
    for change, message in [
        ({"nStrides": [2, 2]}, "at most one squeeze"),
        ({"nStrides": [1, 1]}, r"nStrides=\[1, 1\]"),
        ({"inj_pad": 2}, "no density"),
        ({"density_estimation": False}, "classifies the latents of its last scale"),
        ({"nBlocks": [1, 1]}, "no place for"),
        ({"in_shape": [2, 8, 8]}, "has shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            irf.compat.official.load(state, {**FLOW_CONFIG, **change})
    with pytest.raises(ValueError, match="lacks density_estimation"):
        irf.compat.official.load(
            state, {name: value for name, value in FLOW_CONFIG.items() if name != "density_estimation"}
        )
    plain = {name.replace("weight_orig", "weight"): value for name, value in state.items()}
    with pytest.raises(ValueError, match="without Lipschitz constraint"):
        irf.compat.official.load(plain, FLOW_CONFIG)
    with pytest.raises(ValueError, match="learn_prior=False, and prior_mu is not zero"):
        irf.compat.official.load(state, {**FLOW_CONFIG, "learn_prior": False})
    state |= {"prior_mu": torch.zeros(64), "prior_logstd": torch.zeros(64)}
    fixed = irf.compat.official.load(state, {**FLOW_CONFIG, "learn_prior": False})
    assert not fixed.prior.mean.any()


def test_layers_above_the_coefficient_are_shown_or_held():
    """Random u and v see little of the norm, so that every layer exceeds the coefficient."""
    state = official_state()
    exact = irf.certify(irf.compat.official.load(state, CONFIG))
    assert not exact.guaranteed
    held = irf.compat.official.load(state, CONFIG, exact=False)
    assert irf.enforce(held).guaranteed


def test_a_plain_network_without_normalisation():
    state = {name.replace("weight_orig", "weight"): value for name, value in official_state().items()}
    state = {name: value for name, value in state.items() if not name.endswith(("_u", "_v", "_sigma"))}
    model = irf.compat.official.load(state, CONFIG)
    assert model.config.coeff is None
    assert torch.equal(model.trunk[3].g[0].weight, state["stack.0.bottleneck_block.0.weight"])


def test_what_does_not_fit_is_named():
    state = official_state()
    for change, message in [
        ({"nStrides": [2, 2]}, "nStrides"),
        ({"init_ds": 3}, "init_ds"),
        ({"nonlin": "sorting"}, "nonlin"),
        ({"density_estimation": True}, "density_estimation"),
        ({"nBlocks": [1, 3]}, "no 'stack.3.actnorm"),
        ({"nBlocks": [1, 1]}, "no place for"),
        ({"nChannels": [6, 6]}, "has shape"),
        ({"inj_pad": 3}, r"actnorm._log_scale has shape \(6,\)"),
        ({"in_shape": [1, 8, 16]}, "must be square"),
        ({"nClasses": 4}, r"logits.weight has shape \(3, 24\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            irf.compat.official.load(state, {**CONFIG, **change})
    with pytest.raises(ValueError, match="lacks coeff"):
        irf.compat.official.load(state, {name: value for name, value in CONFIG.items() if name != "coeff"})


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason=f"no {OFFICIAL}: the official code's network is not here")
def test_a_network_trained_with_the_official_code():
    safetensors = pytest.importorskip("safetensors.torch")
    state = safetensors.load_file(OFFICIAL / "iresnet37_mnist.safetensors")
    expected = safetensors.load_file(OFFICIAL / "iresnet37_mnist_io.safetensors")
    model = irf.compat.official.load(state, json.loads((OFFICIAL / "iresnet37_mnist.json").read_text()))
    inputs = expected["inputs"]
    with torch.no_grad():
        latents = model.features(inputs)
        torch.testing.assert_close(model.trunk[:2](inputs), expected["after_pad"])
        assert distance(model.trunk[:4](inputs), expected["after_block_0"]) <= OFFICIAL_AGREEMENT
        assert distance(latents, expected["latents"]) <= OFFICIAL_AGREEMENT
        assert distance(model(inputs), expected["logits"]) <= OFFICIAL_AGREEMENT
        assert torch.equal(model(inputs).argmax(1), expected["labels"])
        result = model.solve_inverse(latents)
    # Its coefficient is 0.9, and a block of it has a proven constant of no less than 1.018.
    assert not irf.certify(model).guaranteed
    assert not result.certified.any()
    assert distance(result.x, inputs) <= OFFICIAL_AGREEMENT
    assert distance(result.x, expected["reconstructions"]) <= OFFICIAL_AGREEMENT
