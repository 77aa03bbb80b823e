"""Activations, ActNorm, Squeeze, InjectivePad, blocks and chains."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import iresnet_fast as irf
from iresnet_fast.nn import ACTIVATIONS
from tests.helpers import same_state, small_classifier, state_of
from tests.tolerances import FLOAT64, ROUND_TRIP


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_do_not_expand(device, name):
    activation = ACTIVATIONS[name]().to(device, torch.float64)
    x, y = (4 * torch.randn(1000, 6, dtype=torch.float64, device=device) for _ in range(2))
    y = x + 0.01 * y
    ratio = (activation(x) - activation(y)).norm(dim=1) / (x - y).norm(dim=1)
    assert ratio.max() <= 1 + FLOAT64


@pytest.mark.parametrize("beta", [-5.0, 0.5, 5.0])
def test_lipswish_slope_for_every_beta(beta):
    activation = irf.nn.LipSwish().double()
    with torch.no_grad():
        activation.beta.fill_(beta)
    x = torch.linspace(-300, 300, 200_001, dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(activation(x).sum(), x)[0]
    assert 0.99 < slope.abs().max() <= 1


def test_maxmin():
    x = torch.randn(5, 4, 3)
    y = irf.nn.MaxMin()(x)
    torch.testing.assert_close(y.norm(dim=(1, 2)), x.norm(dim=(1, 2)))
    assert (y[:, :2] >= y[:, 2:]).all()
    with pytest.raises(ValueError, match=r"even number of them, got \(2, 3\)"):
        irf.nn.MaxMin()(torch.randn(2, 3))


def test_unknown_activation():
    with pytest.raises(ValueError, match="activation must be one of elu, lipswish"):
        irf.nn.LipschitzMLP(2, activation="swish")


@pytest.mark.parametrize("shape", [(32, 3), (32, 3, 4, 5)])
def test_actnorm_initialises_and_inverts(device, shape):
    layer = irf.nn.ActNorm(3).to(device, torch.float64)
    x = 3 * torch.randn(shape, dtype=torch.float64, device=device) + 5
    y = layer(x)
    axes = [axis for axis in range(x.dim()) if axis != 1]
    torch.testing.assert_close(y.mean(axes), torch.zeros(3, dtype=torch.float64, device=device), rtol=0, atol=1e-10)
    torch.testing.assert_close(y.var(axes, unbiased=False), torch.ones_like(y.mean(axes)), rtol=1e-10, atol=0)
    torch.testing.assert_close(layer.inverse(y), x, rtol=FLOAT64, atol=FLOAT64)


def test_fault_4_actnorm_keeps_what_it_learned():
    layer = irf.nn.ActNorm(3).train()
    layer(torch.randn(8, 3))
    with torch.no_grad():
        layer.log_scale.fill_(0.7)
    loaded = irf.nn.ActNorm(3)
    loaded.load_state_dict(layer.state_dict())
    for other in (loaded, copy.deepcopy(layer)):
        other.train()(100 * torch.randn(8, 3) + 50)
        assert same_state(other, layer.state_dict())


def test_actnorm_initialises_in_training_only():
    layer = irf.nn.ActNorm(3).eval()
    x = torch.randn(8, 3)
    assert torch.equal(layer(x), x)
    layer.inverse(x)
    assert not layer.initialized
    layer.train()
    layer.inverse(x)
    assert not layer.initialized


def test_actnorm_leaves_constant_channels_alone():
    x = torch.randn(8, 2, 4, 4)
    x[:, 1] = 3.0
    y = irf.nn.ActNorm(2)(x)
    assert y[:, 1].abs().max() < 1e-5
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("x", [torch.empty(0, 3), torch.full((2, 3), float("nan"))])
def test_actnorm_refuses_a_bad_first_batch(x):
    with pytest.raises(ValueError, match="empty or not finite"):
        irf.nn.ActNorm(3)(x)
    with pytest.raises(ValueError, match=r"needs \(B, 3, ...\), got \(2, 4\)"):
        irf.nn.ActNorm(3)(torch.ones(2, 4))


@given(
    st.sampled_from(["channel", "position"]), st.integers(0, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)
)
def test_squeeze_is_a_permutation(order, batch, channels, height, width):
    x = torch.randn(batch, channels, 2 * height, 2 * width)
    y = irf.nn.Squeeze(order)(x)
    assert y.shape == (batch, 4 * channels, height, width)
    assert torch.equal(irf.nn.Squeeze(order).inverse(y), x)
    # torch's own op has the first order, but keeps the shape of an empty batch.
    if batch and order == "channel":
        assert torch.equal(y, nn.functional.pixel_unshuffle(x, 2))
    elif batch:
        assert torch.equal(y[:, :channels], x[:, :, ::2, ::2])
        assert torch.equal(y[:, channels : 2 * channels], x[:, :, ::2, 1::2])
    assert torch.equal(y.flatten().sort().values, x.flatten().sort().values)


def test_squeeze_bad_input():
    with pytest.raises(ValueError, match="'channel', 'position', got 'depth'"):
        irf.nn.Squeeze("depth")
    with pytest.raises(ValueError, match=r"even H and W, got shape \(1, 1, 3, 4\)"):
        irf.nn.Squeeze()(torch.ones(1, 1, 3, 4))
    with pytest.raises(ValueError, match="4C"):
        irf.nn.Squeeze().inverse(torch.ones(1, 3, 3, 4))


def test_injective_pad():
    pad = irf.nn.InjectivePad(5)
    x = torch.randn(2, 3, 4, 4)
    y = pad(x)
    assert y.shape == (2, 8, 4, 4)
    assert torch.equal(pad.inverse(y), x)
    y[1, 7] = 0.1
    with pytest.raises(ValueError, match="1 of 2 samples are outside the range .* of sample 1 have norm 0.4, not 0"):
        pad.inverse(y)
    with pytest.raises(ValueError, match="more than 5 channels, got 5"):
        pad.inverse(torch.ones(1, 5, 2, 2))
    with pytest.raises(ValueError, match="outside the range"):
        irf.nn.InjectivePad(1).inverse(torch.tensor([[1.0, float("nan")]]))
    for channels in (-1, 1.5):
        with pytest.raises(ValueError, match="not negative"):
            irf.nn.InjectivePad(channels)


def branches(dtype):
    size = {"input_size": (4, 4)}
    return {
        "bottleneck": (irf.nn.Bottleneck(4, 8, **size).to(dtype), (4, 4, 4)),
        "bottleneck-maxmin": (irf.nn.Bottleneck(4, 8, activation="maxmin", **size).to(dtype), (4, 4, 4)),
        "bottleneck-dropout": (irf.nn.Bottleneck(2, 4, dropout=0.3, preactivation=False, **size).to(dtype), (2, 4, 4)),
        "mlp": (irf.nn.LipschitzMLP(5, (16, 16)).to(dtype), (5,)),
        "any module": (nn.Sequential(irf.nn.SpectralLinear(3, 3, coeff=0.5), nn.Tanh()).to(dtype), (3,)),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", branches(torch.float32))
def test_block_round_trip(device, dtype, name):
    branch, shape = branches(dtype)[name]
    block = irf.nn.InvertibleResidualBlock(branch).to(device).eval()
    assert irf.enforce(block).guaranteed
    x = torch.randn(6, *shape, dtype=dtype, device=device)
    with torch.no_grad():
        y = block(x)
    before = state_of(block)
    result = block.solve_inverse(y, tol=1e-11 if dtype == torch.float64 else 1e-6)
    assert result.certified.all()
    error = (result.x - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
    assert (error <= ROUND_TRIP[dtype]).all()
    assert same_state(block, before)


@pytest.mark.parametrize("name", branches(torch.float64))
def test_torch_func_sees_through_the_branch(name):
    """No custom op stands inside x → g(x): torch.func would silently give zeros through one."""
    branch, shape = branches(torch.float64)[name]
    block = irf.nn.InvertibleResidualBlock(branch).eval()
    x, v = (torch.randn(2, *shape, dtype=torch.float64) for _ in range(2))
    step = 1e-6
    with torch.no_grad():
        expected = (block(x + step * v) - block(x - step * v)) / (2 * step)
    _, forward = torch.func.jvp(block, (x,), (v,))
    torch.testing.assert_close(forward.detach(), expected, rtol=1e-6, atol=1e-7)

    def single(sample):
        return block(sample.unsqueeze(0)).squeeze(0)

    jacobians = torch.func.vmap(torch.func.jacrev(single))(x).reshape(2, v[0].numel(), v[0].numel())
    backward = (jacobians @ v.flatten(1).unsqueeze(-1)).reshape(x.shape)
    torch.testing.assert_close(backward.detach(), expected, rtol=1e-6, atol=1e-7)


def test_block_with_an_empty_batch():
    block = irf.nn.InvertibleResidualBlock(irf.nn.LipschitzMLP(3)).eval()
    assert block.inverse(block(torch.empty(0, 3))).shape == (0, 3)


def test_active_dropout_and_batch_norm_have_no_inverse():
    for extra in (nn.Dropout(0.1), nn.BatchNorm1d(3)):
        block = irf.nn.InvertibleResidualBlock(nn.Sequential(irf.nn.SpectralLinear(3, 3, coeff=0.4), extra)).train()
        with pytest.raises(RuntimeError, match=rf"1 \({type(extra).__name__}\) is in training mode.*model.eval"):
            block.inverse(torch.randn(2, 3))
        block.eval().inverse(torch.randn(2, 3))


@pytest.mark.parametrize("coeff", [0.0, 1.0, -0.5])
def test_branches_must_contract(coeff):
    for make in (
        lambda: irf.nn.LipschitzMLP(2, coeff=coeff),
        lambda: irf.nn.Bottleneck(2, 2, coeff=coeff, input_size=(4, 4)),
    ):
        with pytest.raises(ValueError, match=rf"coeff must be in \(0, 1\) .* got {coeff}"):
            make()


def test_batch_statistics_have_no_inverse_in_any_mode():
    norm = nn.BatchNorm1d(3, track_running_stats=False)
    block = irf.nn.InvertibleResidualBlock(nn.Sequential(irf.nn.SpectralLinear(3, 3), norm)).eval()
    with pytest.raises(RuntimeError, match="statistics from the batch in every mode"):
        block.inverse(torch.randn(4, 3))


def test_slices_and_growth():
    chain = irf.nn.InvertibleSequential(*(irf.nn.InvertibleResidualBlock(irf.nn.LipschitzMLP(2)) for _ in range(3)))
    assert isinstance(chain[:2], irf.nn.InvertibleSequential)
    assert len(chain[:2]) == 2
    assert chain[-1] is list(chain)[2]
    assert type(irf.nn.LipschitzMLP(3)[:2]) is nn.Sequential
    with pytest.raises(TypeError, match="has no inverse"):
        chain.append(nn.ReLU())
    chain.insert(0, irf.nn.ActNorm(2))
    assert len(chain) == 4
    assert isinstance(chain[0], irf.nn.ActNorm)


def test_branch_of_the_wrong_shape():
    with pytest.raises(ValueError, match=r"maps shape \(2, 3\) to \(2, 4\)"):
        irf.nn.InvertibleResidualBlock(nn.Linear(3, 4))(torch.randn(2, 3))
    with pytest.raises(TypeError, match="nn.Module, got function"):
        irf.nn.InvertibleResidualBlock(lambda x: x)


def test_not_contractive_branch_raises():
    linear = nn.Linear(4, 4)
    nn.init.orthogonal_(linear.weight).data.mul_(3)
    block = irf.nn.InvertibleResidualBlock(linear)
    assert not irf.certify(block).guaranteed
    with pytest.raises(irf.NotConvergedError):
        block.inverse(torch.randn(2, 4))


@pytest.mark.parametrize("mode", [True, False])
def test_chain_round_trip_changes_no_state(mode):
    model = small_classifier().double().train(mode)
    x = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        z = model.features(x)
    before = state_of(model)
    result = model.solve_inverse(z, tol=1e-12)
    assert same_state(model, before)
    torch.testing.assert_close(result.x, x, rtol=0, atol=1e-9)
    assert result.residual.max() < 1e-10
    assert len(result.blocks) == 3
    assert torch.equal(model.inverse(z, tol=1e-12), result.x)


def test_inverse_of_an_uninitialised_chain_does_not_initialise_it():
    chain = irf.nn.InvertibleSequential(
        irf.nn.ActNorm(4), irf.nn.InvertibleResidualBlock(irf.nn.LipschitzMLP(4))
    ).train()
    before = state_of(chain)
    chain.solve_inverse(torch.randn(3, 4) + 7)
    assert same_state(chain, before)


def test_nested_chains_report_blocks_in_forward_order():
    def block(coeff):
        return irf.nn.InvertibleResidualBlock(irf.nn.LipschitzMLP(2, (4,), coeff=coeff))

    inner = irf.nn.InvertibleSequential(block(0.2), block(0.9))
    chain = irf.nn.InvertibleSequential(block(0.5), inner, block(0.3)).eval().double()
    x = torch.randn(4, 2, dtype=torch.float64)
    result = chain.solve_inverse(chain(x).detach(), tol=1e-12)
    torch.testing.assert_close(result.x, x, rtol=0, atol=1e-10)
    counts = [int(part.iterations.max()) for part in result.blocks]
    assert len(counts) == 4
    assert counts[2] == max(counts)


def test_chain_needs_inverses():
    with pytest.raises(TypeError, match=r"module 1 \(Linear\) has no inverse"):
        irf.nn.InvertibleSequential(irf.nn.Squeeze(), nn.Linear(2, 2))
