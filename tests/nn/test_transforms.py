"""Models under the transforms of torch.func: forward, density and inverse are functions of parameters and input."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap

import iresnet_fast as irf
from tests.tolerances import CLOSE_TO_EAGER


def chain(dtype=torch.float64):
    blocks = [irf.nn.InvertibleResidualBlock(irf.nn.LipschitzMLP(3, (8,), coeff=0.8)) for _ in range(2)]
    model = irf.nn.InvertibleSequential(irf.nn.ActNorm(3), *blocks).to(dtype).train()
    model(torch.randn(16, 3, dtype=dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model.eval()


def parts_of(model):
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    return parameters, dict(model.named_buffers())


def close(a, b):
    torch.testing.assert_close(a, b, rtol=CLOSE_TO_EAGER, atol=CLOSE_TO_EAGER)


@pytest.mark.parametrize("training", [False, True])
def test_gradients_by_parameters_and_of_each_sample(training):
    model = chain().train(training)
    x = torch.randn(4, 3, dtype=torch.float64)
    parameters, buffers = parts_of(model)

    def loss(parameters, sample):
        own = {name: value.clone() for name, value in buffers.items()}
        return functional_call(model, (parameters, own), (sample[None],)).square().sum()

    by_hand = []
    for sample in x:
        state = {name: value.clone() for name, value in model.state_dict().items()}
        found = torch.autograd.grad(model(sample[None]).square().sum(), list(model.parameters()))
        by_hand.append(dict(zip(parameters, found, strict=True)))
        model.load_state_dict(state)
    one = grad(loss)(parameters, x[0])
    each = vmap(grad(loss), (None, 0))(parameters, x)
    for name in parameters:
        close(one[name], by_hand[0][name])
        close(each[name], torch.stack([row[name] for row in by_hand]))


def test_ensemble():
    models = [chain() for _ in range(3)]
    x = torch.randn(4, 3, dtype=torch.float64)
    parameters, buffers = stack_module_state(models)
    outputs = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)
    close(outputs, torch.stack([model(x) for model in models]))
    inverses = vmap(lambda p, b, y: functional_call(Inverse(models[0]), (prefixed(p), prefixed(b)), (y,)))(
        parameters, buffers, outputs
    )
    close(inverses, x.expand(3, -1, -1))


class Inverse(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, y):
        return self.model.inverse(y, tol=1e-12)


def prefixed(state):
    return {f"model.{name}": value for name, value in state.items()}


def test_a_model_that_was_never_evaluated():
    x = torch.randn(3, dtype=torch.float64)
    model = chain()
    close(jacrev(lambda a: model(a[None])[0])(x), torch.autograd.functional.jacobian(lambda a: model(a[None])[0], x))


def test_density_of_each_sample_and_its_gradient():
    flow = irf.models.IResNetFlow.from_config({"in_shape": (2,), "fc_blocks": 2}).double().train()
    flow(torch.randn(16, 2, dtype=torch.float64))
    irf.certify(flow.eval())
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    exact = irf.estimators.Exact()
    (score,) = torch.autograd.grad(flow.log_prob(x, exact).sum(), x)
    close(vmap(grad(lambda a: flow.log_prob(a[None], exact)[0]))(x), score)


def test_jacobian_of_an_inverse():
    model = chain()
    x = torch.randn(4, 3, dtype=torch.float64)
    y = model(x).detach()

    def inverse(y):
        return model.inverse(y, tol=1e-12)

    expected = torch.linalg.inv(torch.stack([jacrev(lambda a: model(a[None])[0])(sample) for sample in x])).detach()
    close(vmap(lambda a: inverse(a[None])[0])(y), x)
    close(vmap(jacrev(lambda a: inverse(a[None])[0]))(y), expected)
    whole = jacrev(inverse)(y)
    vectorized = torch.autograd.functional.jacobian(inverse, y, vectorize=True)
    for i in range(4):
        close(whole[i, :, i], expected[i])
        close(vectorized[i, :, i], expected[i])
    assert not whole[0, :, 1].any()


def test_gradient_of_an_inverse_by_parameters():
    model = Inverse(chain())
    y = torch.randn(4, 3, dtype=torch.float64)
    parameters, buffers = parts_of(model)

    def loss(parameters, y):
        return functional_call(model, (parameters, buffers), (y,)).square().sum()

    expected = torch.autograd.grad(model(y).square().sum(), list(model.parameters()))
    for found, value in zip(grad(loss)(parameters, y).values(), expected, strict=True):
        close(found, value)
    each = vmap(grad(loss), (None, 0))(parameters, y[:, None])
    for found, value in zip(each.values(), expected, strict=True):
        close(found.sum(0), value)


def test_a_transformed_inverse_claims_no_proof():
    model = chain()
    irf.certify(model)
    result = vmap(lambda y: model[1].solve_inverse(y[None]).certified[0])(torch.randn(4, 3, dtype=torch.float64))
    assert not result.any()


def test_bottleneck_branches():
    block = irf.nn.InvertibleResidualBlock(irf.nn.Bottleneck(2, 4, input_size=(4, 4))).double().eval()
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    y = block(x).detach()
    close(vmap(lambda a: block.inverse(a[None], tol=1e-12)[0])(y), x)


def test_an_uninitialized_actnorm_says_what_to_do():
    model = irf.nn.ActNorm(3).train()
    with pytest.raises(RuntimeError, match="Call the model once before"):
        vmap(model)(torch.randn(4, 2, 3))


def test_gradients_of_an_inverse_with_other_parameters_outside_of_the_call():
    """The backward runs when functional_call has put the module's own parameters back."""
    model = Inverse(chain())
    y = torch.randn(4, 3, dtype=torch.float64)
    given = {name: (0.9 * value.detach() + 0.01).requires_grad_() for name, value in model.named_parameters()}
    functional_call(model, given, (y,)).square().sum().backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(given[name])
    model(y).square().sum().backward()
    for name, parameter in model.named_parameters():
        close(given[name].grad, parameter.grad)


def test_an_inverse_is_differentiated_once():
    model = chain()
    y = torch.randn(3, dtype=torch.float64)

    def energy(y):
        return model.inverse(y[None], tol=1e-12).square().sum()

    for second in (
        lambda: grad(lambda a: grad(energy)(a).sum())(y),
        lambda: jacrev(jacrev(energy))(y),
        lambda: torch.autograd.functional.hessian(energy, y),
        lambda: grad(energy)(y.clone().requires_grad_()).sum().backward(),
    ):
        with pytest.raises(RuntimeError, match="differentiated once"):
            second()
    a = y.clone().requires_grad_()
    (first,) = torch.autograd.grad(model.inverse(a[None]).sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        first.sum().backward()


def test_an_inverse_has_no_forward_mode_derivative():
    block = chain().requires_grad_(False)[1]
    y = torch.randn(2, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(block.inverse, (y,), (y,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        block.inverse(torch.autograd.forward_ad.make_dual(y, y))


@pytest.mark.parametrize("path", ["fused", "nonsense"])
def test_paths_inside_a_transform(path):
    block = chain()[1]
    with pytest.raises(ValueError, match="path"):
        vmap(lambda y: block.inverse(y[None], path=path))(torch.randn(2, 3, dtype=torch.float64))


ESTIMATORS = {
    "default": lambda: None,
    "exact": irf.estimators.Exact,
    "series": lambda: irf.estimators.PowerSeries(5),
    "neumann": irf.estimators.NeumannGradient,
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_density_of_images_and_its_gradient(name):
    flow = irf.models.IResNetFlow.from_config(
        {"in_shape": (1, 4, 4), "blocks": (1, 1), "hidden": (8, 8), "preprocessing": "logit", "squeeze_input": True}
    )
    x = torch.rand(6, 1, 4, 4, dtype=torch.float64)
    flow.double().train()(x)
    irf.certify(flow.eval())
    estimator = ESTIMATORS[name]()

    def total(x):
        torch.manual_seed(0)
        return flow.log_prob(x, estimator).sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(leaf), leaf)
    found = grad(total)(x)
    if name in ("exact", "series"):  # the others have another gradient, of the same expectation
        close(found, expected)
    each = vmap(lambda a: flow.log_prob(a[None], estimator)[0], randomness="same")(x)
    assert each.shape == (6,)
    if name == "exact":
        close(each, flow.log_prob(x, estimator))
        close(vmap(grad(lambda a: flow.log_prob(a[None], estimator)[0]))(x), expected)


def test_fused_models_in_training_mode():
    model = irf.fuse(chain()).train()
    x = torch.randn(4, 3, dtype=torch.float64)
    parameters, buffers = parts_of(model)

    def loss(parameters):
        own = {name: value.clone() for name, value in buffers.items()}
        return functional_call(model, (parameters, own), (x,)).square().sum()

    found = grad(loss)(parameters)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        close(found[name], parameter.grad)


def test_recomputing_chains_keep_activations_inside_a_transform():
    model = chain()
    x = torch.randn(3, dtype=torch.float64)
    expected = jacrev(lambda a: model(a[None])[0])(x)
    model.recompute = "inverse"
    close(jacrev(lambda a: model(a[None])[0])(x), expected)
