"""Soft spectral normalisation: the true operator, the state rules, and the known faults."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import iresnet_fast as irf
from iresnet_fast.nn import frozen_state
from tests.helpers import dense_norm, same_state, state_of
from tests.tolerances import FLOAT64, POWER_ITERATION


def converge(layer, x=None):
    """Run the power iteration to convergence by evaluating a weight that was just written."""
    layer.train()
    for _ in range(500):
        _ = layer.weight
    return layer.eval()


LAYERS = {
    "conv": lambda: irf.nn.SpectralConv2d(3, 4, 3, padding=1, input_size=(5, 6)),
    "conv-strided": lambda: irf.nn.SpectralConv2d(4, 4, 3, padding=1, stride=2, groups=2, input_size=(6, 6)),
    "conv-circular": lambda: irf.nn.SpectralConv2d(2, 3, 3, padding=1, padding_mode="circular", input_size=(4, 5)),
    "conv-1d": lambda: irf.nn.spectral_norm(nn.Conv1d(2, 3, 4), input_size=9),
    "conv-3d": lambda: irf.nn.spectral_norm(nn.Conv3d(1, 2, 2), input_size=(3, 4, 3)),
    "transposed": lambda: irf.nn.spectral_norm(
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), input_size=(3, 4)
    ),
    "transposed-1d": lambda: irf.nn.spectral_norm(nn.ConvTranspose1d(2, 3, 4, dilation=2), input_size=5),
    "pointwise": lambda: irf.nn.SpectralConv2d(5, 4, 1),
    "pointwise-grouped": lambda: irf.nn.SpectralConv2d(4, 4, 1, groups=2),
    "linear": lambda: irf.nn.SpectralLinear(6, 5),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    made = LAYERS[request.param]().double()
    with torch.no_grad():
        # Positive, so that the largest singular value stands apart and the iteration converges fast.
        made.parametrizations.weight.original.copy_(torch.rand_like(made.weight) + 0.1)
    return made


def test_norm_reaches_coeff_when_it_exceeds_it(layer):
    assert dense_norm(converge(layer)) == pytest.approx(0.9, rel=POWER_ITERATION)


def test_small_weights_are_left_alone(layer):
    original = layer.parametrizations.weight.original
    with torch.no_grad():
        original.mul_(1e-3)
    torch.testing.assert_close(layer.weight, original, rtol=0, atol=0)


def test_gradient_with_frozen_vectors(layer):
    norm = irf.nn.find_spectral_norm(layer)
    weight = layer.parametrizations.weight.original.detach().clone().requires_grad_()
    converge(layer).eval()
    assert torch.autograd.gradcheck(norm, weight)
    assert torch.autograd.gradgradcheck(norm, weight)


def test_gradient_formula():
    """dW = (1/s)·[G − (⟨G, W̄⟩/c)·u⊗v] (Gouk et al. 2018)."""
    layer = converge(irf.nn.SpectralLinear(4, 3, coeff=0.5).double())
    grad = torch.randn(3, 4, dtype=torch.float64)
    (layer.weight * grad).sum().backward()
    original = layer.parametrizations.weight.original
    norm = irf.nn.find_spectral_norm(layer)
    effective, scale = layer.weight.detach(), original.detach().norm(2) / layer.weight.detach().norm(2)
    expected = (grad - (grad * effective).sum() / 0.5 * torch.outer(norm._u, norm._v)) / scale
    torch.testing.assert_close(original.grad, expected, rtol=1e-6, atol=1e-9)


def test_the_operator_not_the_reshaped_kernel():
    """Normalising the reshaped kernel leaves the operator well above coeff."""
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False).double()
    nn.init.ones_(conv.weight)
    reshaped = float(torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2))
    irf.nn.spectral_norm(conv, 0.9, input_size=(16, 16))
    operator = 0.9 / float(converge(conv).weight.detach().mean())
    assert reshaped < 0.4 * operator
    assert dense_norm(conv) == pytest.approx(0.9, rel=POWER_ITERATION)


def test_state_dict_names_are_torchs():
    ours = irf.nn.spectral_norm(nn.Linear(4, 3))
    torchs = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    ours.load_state_dict(torchs.state_dict())


def test_modes():
    """Training iterates, evaluation does not, an inverse changes nothing in either."""
    layer = irf.nn.SpectralLinear(32, 32)
    before = state_of(layer)
    _ = layer.weight
    assert not same_state(layer, before)
    for mode in (True, False):
        layer.train(mode)
        _ = layer.weight
        before = state_of(layer)
        with frozen_state(layer):
            first = layer.weight
            assert layer.weight is first
        assert same_state(layer, before)
    _ = layer.weight
    assert same_state(layer, before)


def test_fault_3_inverse_sees_the_forwards_weights_in_training_mode():
    branch = irf.nn.LipschitzMLP(4, (16,), coeff=0.9)
    block = irf.nn.InvertibleResidualBlock(branch).double().train()
    with torch.no_grad():
        for linear in (branch[0], branch[2]):
            linear.parametrizations.weight.original.mul_(5)
    x = torch.randn(8, 4, dtype=torch.float64)
    y = block(x).detach()
    before = state_of(block)
    torch.testing.assert_close(block.inverse(y, tol=1e-12), x, rtol=0, atol=1e-10)
    assert same_state(block, before)


@pytest.mark.parametrize("how", ["optimizer", "in place", "average"])
def test_faults_11_and_17_evaluation_fits_a_changed_weight(how):
    """After a last step, or after averaging, u and v are not those of the weight; σ must not be read off them."""
    layer = irf.nn.SpectralLinear(20, 20, coeff=0.9).train()
    layer(torch.randn(4, 20)).square().sum().backward()
    new = 3 * torch.rand(20, 20)
    if how == "average":
        average = torch.optim.swa_utils.AveragedModel(
            layer, avg_fn=lambda old, value, n: new.view_as(old) if old.dim() > 1 else old
        )
        average.update_parameters(layer)
        average.update_parameters(layer)
        layer = average.module
    elif how == "optimizer":
        layer.parametrizations.weight.original.grad = layer.parametrizations.weight.original.detach() - new
        torch.optim.SGD(layer.parameters(), lr=1.0).step()
    else:
        with torch.no_grad():
            layer.parametrizations.weight.original.copy_(new)
    layer.eval()
    _ = layer(torch.randn(1, 20))
    assert dense_norm(layer) == pytest.approx(0.9, rel=1e-4)


@pytest.mark.parametrize("tol", [None, 1e-3])
def test_orthogonal_weights_are_normalised(tol):
    """All singular values are equal, so ‖W v‖ is σ from the start: σ must be read off the vectors that are kept."""
    layer = irf.nn.SpectralLinear(16, 16, coeff=0.5, tol=tol, n_power_iterations=50)
    with torch.no_grad():
        nn.init.orthogonal_(layer.parametrizations.weight.original, gain=3)
    _ = layer.train().weight if tol else layer.eval().weight
    assert dense_norm(layer) == pytest.approx(0.5, rel=1e-4)


def test_fault_12_first_forward_is_already_normalised():
    layer = irf.nn.spectral_norm(nn.Linear(16, 16), coeff=0.9).eval()
    norm = irf.nn.find_spectral_norm(layer)
    assert abs(norm._u.norm() - 1) < 1e-5
    assert dense_norm(layer) < 1.0
    fresh = nn.Linear(16, 16)
    with torch.no_grad():
        fresh.weight.copy_(4 * torch.rand(16, 16))
    assert dense_norm(irf.nn.spectral_norm(fresh, coeff=0.9).eval()) == pytest.approx(0.9, rel=1e-3)


def test_loading_weights_without_vectors_fits_them():
    layer = irf.nn.SpectralLinear(16, 16, coeff=0.9).eval()
    weight = 4 * torch.rand(16, 16)
    layer.load_state_dict({"parametrizations.weight.original": weight}, strict=False)
    assert dense_norm(layer) == pytest.approx(0.9, rel=1e-3)


def test_fault_10_vectors_of_another_size_are_refused():
    small = irf.nn.SpectralConv2d(2, 2, 3, padding=1, input_size=(4, 4))
    large = irf.nn.SpectralConv2d(2, 2, 3, padding=1, input_size=(8, 8))
    with torch.no_grad():
        small.parametrizations.weight.original.mul_(10)
    with pytest.raises(RuntimeError, match="size mismatch for parametrizations.weight.0._u"):
        large.load_state_dict(small.state_dict())
    weights = {name: value for name, value in small.state_dict().items() if not name.endswith(("._u", "._v"))}
    large.load_state_dict(weights, strict=False)
    assert dense_norm(large) == pytest.approx(0.9, rel=1e-3)


def test_transposed_convolutions_are_certified():
    """Against the layer's own dense matrix, column by column."""
    layer = irf.nn.spectral_norm(nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1, output_padding=1), input_size=(4, 3))
    layer = layer.double()
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(5)
        layer.bias.zero_()
    layer.eval()
    basis = torch.eye(3 * 4 * 3, dtype=torch.float64).view(-1, 3, 4, 3)
    exact = float(torch.linalg.matrix_norm(layer(basis).detach().flatten(1), 2))
    assert exact == pytest.approx(0.9, rel=1e-3)
    bound = irf.certificate.lipschitz.layer_bound(layer, layer.weight.detach())
    assert exact * (1 - FLOAT64) <= bound <= 1.2 * exact
    with pytest.raises(ValueError, match=r"normalised for input_size=\(4, 3\)"):
        layer(torch.randn(1, 3, 5, 3, dtype=torch.float64))


@pytest.mark.parametrize("last", ["construction", "step", "forward"])
def test_saving_loading_and_copying_keep_every_bit(last):
    model = irf.nn.LipschitzMLP(6, (8,), coeff=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3 * (last != "construction")):
        model(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()
    if last == "forward":  # whose one iteration settles nothing, though the weight stays what it is
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter))
        model(torch.randn(8, 6))
    x = torch.randn(4, 6)
    saved_before = copy.deepcopy(model.state_dict())
    expected = model.eval()(x)
    for state in (saved_before, model.state_dict()):
        other = irf.nn.LipschitzMLP(6, (8,), coeff=0.5).eval()
        other.load_state_dict(state)
        assert torch.equal(other(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)


def test_saving_keeps_every_bit_where_iterations_were_ended_by_their_number():
    """The largest singular values of a convolution of random weights lie close together."""
    for seed in range(6):
        torch.manual_seed(seed)
        layers = [
            irf.nn.spectral_norm(nn.Conv2d(8, 8, 3, padding=1), 0.1, input_size=(16, 16)).train() for _ in range(2)
        ]
        x = torch.randn(2, 8, 16, 16)
        layers[0](x)
        expected = layers[0].eval()(x)
        layers[1].eval().load_state_dict(layers[0].state_dict())
        assert torch.equal(layers[1](x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_keeps_every_bit_where_singular_values_lie_close(dtype):
    """Two hundred iterations, a round, do not settle these vectors."""
    layers = [irf.nn.spectral_norm(nn.Linear(8, 8, dtype=dtype), 0.1) for _ in range(2)]
    norm = irf.nn.find_spectral_norm(layers[0])
    with torch.no_grad():
        layers[0].parametrizations.weight.original.copy_(torch.diag(torch.tensor([1.0, 0.99, *[0.5] * 6])))
        for vector in (norm._u, norm._v):
            vector.copy_(torch.nn.functional.normalize(torch.tensor([0.07, 1.0, *[0.5] * 6]), dim=0))
    x = torch.randn(3, 8, dtype=dtype)
    expected = layers[0].eval()(x)
    layers[1].eval().load_state_dict(layers[0].state_dict())
    assert torch.equal(layers[1](x), expected)


def test_resuming_training_keeps_every_bit():
    def steps(model, n, seed):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(n):
            optimizer.zero_grad()
            model(
                torch.randn(8, 6, generator=generator, device="cpu").to(torch.get_default_device())
            ).square().sum().backward()
            optimizer.step()

    model = irf.nn.LipschitzMLP(6, (8,), coeff=0.5).train()
    steps(model, 3, 1)
    resumed = irf.nn.LipschitzMLP(6, (8,), coeff=0.5).train()
    resumed.load_state_dict(model.state_dict())
    steps(model, 3, 2)
    steps(resumed, 3, 2)
    assert same_state(resumed, model.state_dict())


def test_ranks_start_alike():
    first, second = (irf.nn.spectral_norm(nn.Linear(5, 4)) for _ in range(2))
    with torch.no_grad():
        second.parametrizations.weight.original.copy_(first.parametrizations.weight.original)
    norms = [irf.nn.SpectralNorm(torch.ones(4, 5), 0.9, name="weight") for _ in range(2)]
    assert torch.equal(norms[0]._u, norms[1]._u)


def test_weights_that_became_zero_recover():
    layer = irf.nn.SpectralLinear(6, 6, coeff=0.9).train()
    original = layer.parametrizations.weight.original
    with torch.no_grad():
        original.zero_()
    assert layer.weight.abs().max() == 0
    with torch.no_grad():
        original.copy_(5 * torch.rand(6, 6))
    for _ in range(50):
        _ = layer.weight
    assert dense_norm(layer.eval()) == pytest.approx(0.9, rel=1e-4)


def test_tol_stops_when_sigma_has_settled():
    layer = irf.nn.spectral_norm(nn.Linear(16, 16), 0.9, n_power_iterations=1000, tol=1e-5).train()
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(torch.rand(16, 16))
    _ = layer.weight
    assert dense_norm(layer) == pytest.approx(0.9, rel=1e-3)
    before = state_of(layer)
    _ = layer.weight
    assert same_state(layer, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_weights(dtype):
    layer = irf.nn.SpectralLinear(16, 16, coeff=0.5).to(dtype)
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(torch.rand(16, 16))
    layer.eval()
    assert layer.weight.dtype == dtype
    assert dense_norm(layer) == pytest.approx(0.5, rel=1e-2)


def test_autocast_does_not_reach_sigma():
    layer = irf.nn.SpectralConv2d(3, 3, 3, padding=1, input_size=(5, 5)).eval()
    expected = layer.weight
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        assert torch.equal(layer.weight, expected)


def test_removal_keeps_the_normalised_weight():
    layer = converge(irf.nn.SpectralLinear(5, 5, coeff=0.1))
    weight = layer.weight.detach().clone()
    parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(layer.weight.detach(), weight, rtol=FLOAT64, atol=0)


def test_builds_in_inference_mode():
    with torch.inference_mode():
        layer = irf.nn.SpectralLinear(3, 3)
        assert layer(torch.randn(2, 3)).shape == (2, 3)


def test_input_by_keyword():
    layer = irf.nn.SpectralConv2d(2, 2, 3, padding=1, input_size=(4, 4))
    assert layer(input=torch.randn(1, 2, 4, 4)).shape == (1, 2, 4, 4)


def test_torch_compile_sees_plain_aten():
    layer = irf.nn.SpectralConv2d(2, 2, 3, padding=1, input_size=(4, 4)).eval()
    x = torch.randn(2, 2, 4, 4)
    expected = layer(x)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


def test_another_spatial_size_is_an_error():
    layer = irf.nn.SpectralConv2d(2, 2, 3, padding=1, input_size=(4, 4))
    with pytest.raises(ValueError, match=r"normalised for input_size=\(4, 4\), got an input of spatial size \(8, 4\)"):
        layer(torch.randn(1, 2, 8, 4))
    irf.nn.SpectralConv2d(2, 2, 1)(torch.randn(1, 2, 8, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights(value):
    with pytest.raises(ValueError, match="must be finite"):
        irf.nn.spectral_norm(_filled(nn.Linear(3, 3), value))
    layer = irf.nn.spectral_norm(nn.Linear(3, 3))
    _filled(layer.parametrizations.weight, value, "original")
    with pytest.raises(ValueError, match="NaN, infinite or overflowing"):
        layer(torch.randn(1, 3))


def _filled(module, value, name="weight"):
    with torch.no_grad():
        getattr(module, name).fill_(value)
    return module


@pytest.mark.parametrize(
    ("module", "options", "error", "message"),
    [
        (nn.Linear(3, 3), {"coeff": 0.0}, ValueError, "coeff must be a positive number, got 0.0"),
        (nn.Linear(3, 3), {"coeff": "0.9"}, ValueError, "got '0.9'"),
        (nn.Linear(3, 3), {"n_power_iterations": 0}, ValueError, "n_power_iterations"),
        (nn.Linear(3, 3), {"tol": 2.0}, ValueError, "tol"),
        (nn.Linear(3, 3), {"name": "kernel"}, ValueError, "no weight named 'kernel'"),
        (nn.Linear(3, 3), {"name": "bias"}, ValueError, "no weight named 'bias'"),
        (nn.Conv2d(3, 3, 3), {"input_size": 4.0}, ValueError, "input_size must be an int or 2 ints, each ≥ 1, got 4.0"),
        (nn.Linear(0, 3), {}, ValueError, "must not be empty"),
        (nn.Conv2d(3, 3, 3), {}, ValueError, r"input_size is missing.*input_size=\('H', 'W'\)"),
        (nn.Conv2d(3, 3, 3), {"input_size": (2, 2)}, ValueError, "too small"),
        (nn.Conv2d(3, 3, 3), {"input_size": (8,)}, ValueError, "input_size must be an int or 2 ints"),
        (nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), {"input_size": 8}, ValueError, "'reflect'"),
        (nn.ConvTranspose2d(3, 3, 3), {}, ValueError, "input_size is missing"),
        (nn.ConvTranspose2d(3, 3, 3, padding=3), {"input_size": 1}, ValueError, "gives an output of size"),
        (nn.Bilinear(3, 3, 3), {}, TypeError, "got Bilinear"),
        (nn.Embedding(3, 3), {}, TypeError, "got Embedding"),
        (irf.nn.SpectralLinear(3, 3), {}, ValueError, "already parametrized"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_bad_input(module, options, error, message):
    with pytest.raises(error, match=message):
        irf.nn.spectral_norm(module, **options)
