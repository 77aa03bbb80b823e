"""Training without stored activations: the same gradients, and bytes that do not grow with depth."""

import pytest
import torch
from torch import nn

import iresnet_fast as irf
from benchmarks.memory import kept_bytes
from tests.helpers import same_state, small_classifier, state_of
from tests.tolerances import GRADIENT


def twins(make):
    """The same network twice, one of them recomputing."""
    torch.manual_seed(1)
    plain = make(None)
    torch.manual_seed(1)
    recomputing = make("inverse")
    recomputing.load_state_dict(plain.state_dict())
    return plain, recomputing


def convolutional(recompute, n=4, activation="elu", dropout=0.0, inject=1):
    size = {"input_size": (6, 6), "activation": activation, "dropout": dropout}
    blocks = [
        part
        for _ in range(n)
        for part in (irf.nn.ActNorm(4), irf.nn.InvertibleResidualBlock(irf.nn.Bottleneck(4, 8, **size)))
    ]
    return irf.nn.InvertibleSequential(irf.nn.InjectivePad(inject), *blocks, irf.nn.Squeeze(), recompute=recompute)


def gradients(model, x, seed=0):
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    y = model(x)
    v = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    (y * v).mean().backward()
    found = {"x": x.grad, **{name: parameter.grad for name, parameter in model.named_parameters()}}
    model.zero_grad()
    return y.detach(), found


def assert_same_gradients(plain, recomputing, x, tolerance):
    y, expected = gradients(plain, x)
    z, found = gradients(recomputing, x)
    assert torch.equal(y, z)
    assert expected.keys() == found.keys()
    for name, grad in expected.items():
        error = (found[name] - grad).norm() / grad.norm().clamp_min(1e-30)
        assert error <= tolerance, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_equal_those_of_plain_backward(device, dtype, training):
    plain, recomputing = twins(lambda recompute: convolutional(recompute).to(device, dtype))
    x = torch.randn(5, 3, 6, 6, dtype=dtype, device=device)
    for model in (plain, recomputing):
        model.train()(x)
        model.train(training)
    assert_same_gradients(plain, recomputing, x, GRADIENT[dtype])
    assert same_state(recomputing, state_of(plain))


@pytest.mark.parametrize("activation", ["relu", "lipswish", "maxmin"])
def test_other_activations(activation):
    # No padding: its zeros lie on the kink of ReLU, where rounding chooses the side of the derivative.
    plain, recomputing = twins(lambda recompute: convolutional(recompute, activation=activation, inject=0).double())
    assert_same_gradients(plain, recomputing, torch.randn(3, 4, 6, 6).double(), GRADIENT[torch.float64])


def random_states():
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if torch.get_default_device().type == "cuda" else states


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dropout_is_replayed(layout):
    plain, recomputing = twins(lambda recompute: convolutional(recompute, dropout=0.2).double().train())
    x = torch.randn(6, 3, 6, 6).double().contiguous(memory_format=layout)
    assert_same_gradients(plain, recomputing, x, GRADIENT[torch.float64])
    # The backward draws nothing from the generators.
    y = recomputing(x)
    before = random_states()
    y.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(random_states(), before, strict=True))


def test_gradcheck():
    chain = irf.nn.InvertibleSequential(
        irf.nn.ActNorm(3),
        irf.nn.InvertibleResidualBlock(irf.nn.LipschitzMLP(3, (5,))),
        irf.nn.InvertibleSequential(irf.nn.InvertibleResidualBlock(irf.nn.LipschitzMLP(3, (5,)))),
        recompute="inverse",
    ).double()
    chain.train()(torch.randn(8, 3).double())
    chain.eval()

    def forward(x, *parameters):
        return chain(x)

    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(forward, (x, *chain.parameters()), nondet_tol=1e-10)


def test_nested_chains_shared_blocks_and_foreign_links():
    class Double(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            return self.scale * x

        def inverse(self, y):
            return y / self.scale

    def make(recompute):
        shared = irf.nn.InvertibleResidualBlock(irf.nn.LipschitzMLP(3, (5,)))
        inner = irf.nn.InvertibleSequential(shared, Double())
        return irf.nn.InvertibleSequential(inner, shared, recompute=recompute).double().eval()

    plain, recomputing = twins(make)
    assert_same_gradients(plain, recomputing, torch.randn(4, 3).double(), GRADIENT[torch.float64])


def test_power_iteration_in_between_does_not_matter():
    """Two forwards before the first backward, as in gradient accumulation."""
    plain, recomputing = twins(lambda recompute: convolutional(recompute).double().train())
    first, second = torch.randn(2, 4, 3, 6, 6).double()
    grads = []
    for model in (plain, recomputing):
        a, b = model(first), model(second)
        a.square().mean().backward()
        b.square().mean().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("activation", ["relu", "elu", "lipswish", "maxmin"])
@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-4, 1e-6, 0.0])
def test_small_inputs_have_right_gradients_or_an_error(activation, scale):
    branches = [irf.nn.LipschitzMLP(8, (32,), activation=activation) for _ in range(3)]
    for branch in branches:
        for layer in branch:
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.bias)
    chain = irf.nn.InvertibleSequential(*map(irf.nn.InvertibleResidualBlock, branches)).eval()
    x = scale * torch.randn(32, 8)
    chain(x).sum().backward()
    expected = [parameter.grad.clone() for parameter in chain.parameters()]
    chain.zero_grad()
    chain.recompute = "inverse"
    try:
        chain(x).sum().backward()
    except RuntimeError as error:
        assert scale < 1e-2
        assert "Scale the data" in str(error)  # noqa: PT017
        return
    for parameter, gradient in zip(chain.parameters(), expected, strict=True):
        assert (parameter.grad - gradient).norm() <= 1e-3 * gradient.norm()


def test_a_few_small_samples_do_no_harm():
    chain = irf.nn.InvertibleSequential(irf.nn.InvertibleResidualBlock(irf.nn.LipschitzMLP(4)), recompute="inverse")
    x = torch.randn(16, 4)
    x[:3] *= 1e-7
    chain(x).sum().backward()


def test_second_use_of_a_retained_graph():
    _, model = twins(lambda recompute: convolutional(recompute).double().eval())
    x = torch.randn(2, 3, 6, 6).double().requires_grad_()
    y = model(x)
    first, again = (torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)


def test_saved_bytes_do_not_grow_with_depth():
    """What grows with the batch is the output alone; the rest are the normalized weights."""
    per_sample = {}
    for recompute in (None, "inverse"):
        for depth in (2, 8):
            model = convolutional(recompute, n=depth).train()
            small, large = (torch.randn(n, 3, 6, 6) for n in (8, 24))
            model(small)
            kept = [kept_bytes(lambda x=x, model=model: model(x)) for x in (small, large)]
            per_sample[recompute, depth] = (kept[1] - kept[0]) / 16
    values_out = 4 * 6 * 6
    assert per_sample["inverse", 2] == per_sample["inverse", 8] == 4 * values_out
    assert per_sample[None, 8] > 3 * per_sample[None, 2]


def test_without_gradients_nothing_is_stored():
    _, model = twins(convolutional)
    with torch.no_grad():
        assert not model(torch.randn(2, 3, 6, 6)).requires_grad
    assert not model.requires_grad_(False)(torch.randn(2, 3, 6, 6)).requires_grad


def test_autocast_is_replayed():
    _, model = twins(lambda recompute: convolutional(recompute, n=2).eval())
    plain, _ = twins(lambda recompute: convolutional(recompute, n=2).eval())
    x = torch.randn(4, 3, 6, 6)
    grads = []
    for network in (plain, model):
        with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
            y = network(x)
        y.float().square().mean().backward()
        grads.append(torch.cat([parameter.grad.flatten() for parameter in network.parameters()]))
    # Recomputed inputs differ in rounding, which bfloat16 turns into its own resolution.
    assert (grads[1] - grads[0]).norm() <= 0.02 * grads[0].norm()


def test_batch_normalisation_is_refused_in_training():
    branch = nn.Sequential(irf.nn.SpectralLinear(3, 3, coeff=0.4), nn.BatchNorm1d(3))
    chain = irf.nn.InvertibleSequential(irf.nn.InvertibleResidualBlock(branch), recompute="inverse")
    with pytest.raises(RuntimeError, match="BatchNorm1d"):
        chain.train()(torch.randn(4, 3))
    chain.eval()(torch.randn(4, 3)).sum().backward()


def test_what_cannot_be_recomputed_raises():
    linear = nn.Linear(6, 6)
    nn.init.orthogonal_(linear.weight).data.mul_(3)
    chain = irf.nn.InvertibleSequential(irf.nn.InvertibleResidualBlock(linear), recompute="inverse")
    y = chain(torch.randn(4, 6))
    with pytest.raises(irf.NotConvergedError, match="recompute='inverse'.*coeff"):
        y.sum().backward()


def test_an_input_that_is_not_recovered_raises():
    """x − 2 tanh x is not injective: the solver finds another preimage, whose gradient would be wrong."""
    linear = nn.Linear(1, 1, bias=False)
    nn.init.constant_(linear.weight, -2.0)
    branch = nn.Sequential(nn.Tanh(), linear)
    chain = irf.nn.InvertibleSequential(irf.nn.InvertibleResidualBlock(branch), recompute="inverse").double()
    y = chain(torch.tensor([[0.5]]).double())
    with pytest.raises(RuntimeError, match="away from the true one|could not be recomputed"):
        y.sum().backward()
    with pytest.raises(ValueError, match="needs branches that contract"):
        small_classifier(coeff=None, recompute="inverse")


def test_low_precision_inputs_are_refused():
    with pytest.raises(TypeError, match=r"float32 or float64 inputs, got torch.bfloat16"):
        convolutional("inverse").bfloat16()(torch.randn(2, 3, 6, 6).bfloat16())


@pytest.mark.parametrize("training", [True, False])
def test_inside_a_surrounding_cache_of_parametrizations(training):
    plain, recomputing = twins(lambda recompute: convolutional(recompute, n=2).double().train(training))
    x = torch.randn(4, 3, 6, 6).double()
    grads = []
    for model in (plain, recomputing):
        model(x)
        with nn.utils.parametrize.cached():
            (model(x).square().mean() + model(2 * x).square().mean()).backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-8, atol=1e-12)


def test_an_output_changed_in_place_is_found_out():
    _, model = twins(convolutional)
    y = model(torch.randn(2, 3, 6, 6))
    y.detach().mul_(2)
    with pytest.raises(RuntimeError, match="inplace operation"):
        y.sum().backward()


def test_settings():
    with pytest.raises(ValueError, match="None or 'inverse', got 'checkpoint'"):
        irf.nn.InvertibleSequential(recompute="checkpoint")
    chain = convolutional("inverse")
    assert chain[1:].recompute == "inverse"
    x = torch.randn(2, 3)
    assert irf.nn.InvertibleSequential(recompute="inverse")(x) is x


def test_classifier_trains_as_without():
    plain, recomputing = twins(lambda recompute: small_classifier(recompute=recompute).double().train())
    assert_same_gradients(plain, recomputing, torch.rand(4, 1, 8, 8).double(), GRADIENT[torch.float64])
