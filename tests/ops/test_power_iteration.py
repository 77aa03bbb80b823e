"""The grouped power iteration against the layer-by-layer one in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import iresnet_fast as irf
from iresnet_fast.ops._backend import VARIABLE
from iresnet_fast.ops.power_iteration import decode, encode, vector_shapes
from iresnet_fast.reference import power_iteration as reference
from iresnet_fast.reference.conv_operator import ConvGeometry
from tests.tolerances import FLOAT64, GROUPED


def geometry(size, padding=1, mode="zeros", stride=1, dilation=1, groups=1):
    axes = len(size)
    return ConvGeometry(size, (stride,) * axes, (dilation,) * axes, ((padding, padding),) * axes, mode, groups)


LAYERS = [
    ((4, 3, 3, 3), geometry((5, 6))),
    ((4, 3, 3, 3), geometry((5, 6))),
    ((5, 7), None),
    ((4, 3, 3, 3), geometry((4, 4))),
    ((6, 2, 3, 3), geometry((6, 6), stride=2, groups=3)),
    ((2, 3, 2, 2), geometry((5, 5), padding=1, mode="circular", dilation=2)),
    ((3, 2, 4), geometry((9,), padding=0)),
    ((1, 2, 2, 2, 2), geometry((3, 4, 3), padding=1)),
    ((6, 5, 1, 1), None),
    ((3, 2, 2, 2), ConvGeometry((4, 5), (1, 1), (1, 1), ((0, 1), (1, 0)))),
]


# What the kernels take: odd sizes, more and fewer channels than a tile, padding that is not "same".
PLAIN = [
    ((5, 3, 3, 3), geometry((6, 7))),
    ((34, 40, 1, 1), None),
    ((7, 9), None),
    ((3, 35, 3, 3), geometry((4, 5))),
    ((4, 4, 2, 4), ConvGeometry((6, 6), (1, 1), (1, 1), ((1, 1), (0, 0)))),
    ((2, 2, 3, 3), ConvGeometry((9, 8), (1, 1), (1, 1), ((0, 0), (2, 2)))),
    ((9, 6, 1, 1), geometry((5, 4), padding=0)),
    ((1, 1), None),
    ((6, 5, 5, 5), geometry((5, 5), padding=2)),
    # Whole tiles of the widest vectors, and what is left beside them.
    ((16, 16, 3, 3), geometry((8, 8))),
    ((26, 40, 3, 3), geometry((7, 9))),
]


def unit(shape, **options):
    x = torch.randn(shape, **options)
    return x / x.norm()


def problem(layers=LAYERS, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    weights = [torch.randn(shape, dtype=dtype) for shape, _ in layers]
    geometries = [geometry for _, geometry in layers]
    shapes = [vector_shapes(weight, geometry) for weight, geometry in zip(weights, geometries, strict=True)]
    return weights, [unit(u, dtype=dtype) for u, _ in shapes], [unit(v, dtype=dtype) for _, v in shapes], geometries


def expected(weights, u, v, geometries, coeff, n):
    """Layer by layer, in float64."""
    for weight, u_, v_, geometry in zip(weights, u, v, geometries, strict=True):
        new_u, new_v = reference.power_iteration(weight.detach().double(), u_.double(), v_.double(), n, geometry)
        sigma = reference.estimate(weight.double(), new_u, new_v, geometry)
        yield reference.normalized(weight.double(), sigma, coeff), new_u, new_v, sigma


@pytest.fixture(params=["auto", "stacked", "reference"])
def backend(request, monkeypatch):
    monkeypatch.setenv(VARIABLE, request.param)


@pytest.mark.parametrize("layers", [LAYERS, PLAIN, PLAIN + LAYERS], ids=["any", "plain", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [0, 1, 4])
def test_agrees_with_the_layer_by_layer_definition(backend, layers, dtype, n):
    weights, u, v, geometries = problem(layers, dtype)
    found = irf.ops.power_iteration(weights, u, v, coeff=0.9, geometries=geometries, n_iterations=n)
    tolerance = FLOAT64 if dtype == torch.float64 else GROUPED
    for i, exact in enumerate(expected(weights, u, v, geometries, 0.9, n)):
        for part, wanted in zip((found.weights[i], found.u[i], found.v[i], found.sigma[i]), exact, strict=True):
            assert part.dtype == dtype
            assert part.shape == wanted.shape
            assert float((part - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


@pytest.mark.parametrize("layers_per_node", [None, [3, 0, 7]])
def test_gradients(backend, layers_per_node):
    weights, u, v, geometries = problem()
    weights[2] *= 0.01  # below its coefficient
    coeff = [0.5 + 0.1 * i for i in range(len(weights))]

    def normalise(*weights):
        options = {"coeff": coeff, "geometries": geometries, "n_iterations": 0, "layers_per_node": layers_per_node}
        return irf.ops.power_iteration(list(weights), u, v, **options).weights

    inputs = [weight.requires_grad_() for weight in weights]
    assert torch.autograd.gradcheck(normalise, inputs, fast_mode=True)
    few = slice(0, 3)
    u, v, coeff, geometries, layers_per_node = u[few], v[few], coeff[few], geometries[few], None
    assert torch.autograd.gradcheck(normalise, inputs[few])
    assert torch.autograd.gradgradcheck(normalise, inputs[few], fast_mode=True)


@pytest.mark.parametrize("layers", [PLAIN, PLAIN[:3] + LAYERS], ids=["plain", "mixed"])
def test_float32_gradients(backend, layers):
    weights, u, v, geometries = problem(layers, torch.float32)
    weights[0] *= 0.01  # below its coefficient
    inputs = [weight.requires_grad_() for weight in weights]
    found = irf.ops.power_iteration(inputs, u, v, coeff=0.9, geometries=geometries, n_iterations=2)
    grads = [torch.randn_like(weight) for weight in weights]
    torch.autograd.backward(found.weights, grads)
    for i, weight in enumerate(weights):
        alone = weight.detach().double().requires_grad_()
        sigma = reference.estimate(alone, found.u[i].double(), found.v[i].double(), geometries[i])
        (reference.normalized(alone, sigma, 0.9) * grads[i]).sum().backward()
        assert float((weight.grad - alone.grad).abs().max()) <= GROUPED * float(alone.grad.abs().max())


def test_gradient_with_vectors_iterated_and_unused_layers(backend):
    """u and v are constants of the gradient; a layer that the loss does not see, or that is frozen, gets none."""
    weights, u, v, geometries = problem()
    inputs = [weight.requires_grad_(i != 1) for i, weight in enumerate(weights)]
    found = irf.ops.power_iteration(inputs, u, v, coeff=0.9, geometries=geometries, n_iterations=2)
    grads = [torch.randn_like(weight) for weight in weights]
    used = [0, 2, 4]
    sum((found.weights[i] * grads[i]).sum() for i in used).backward()
    assert not found.weights[1].requires_grad
    for i, weight in enumerate(weights):
        if i not in used:
            assert weight.grad is None
            continue
        assert found.weights[i].requires_grad
        alone = weight.detach().clone().requires_grad_()
        sigma = reference.estimate(alone, found.u[i], found.v[i], geometries[i])
        (reference.normalized(alone, sigma, 0.9) * grads[i]).sum().backward()
        torch.testing.assert_close(weight.grad, alone.grad, rtol=1e-10, atol=1e-12)


@settings(max_examples=20)
@given(st.data())
def test_random_layers(data):
    layers = []
    for _ in range(data.draw(st.integers(1, 6))):
        out, into, k = (data.draw(st.integers(1, 4)) for _ in range(3))
        size = (data.draw(st.integers(k, k + 3)), data.draw(st.integers(k, k + 3)))
        matrix = data.draw(st.booleans())
        layers.append(
            ((out, into), None) if matrix else ((out, into, k, k), geometry(size, data.draw(st.integers(0, 2))))
        )
    weights, u, v, geometries = problem(layers, seed=data.draw(st.integers(0, 99)))
    found = irf.ops.power_iteration(weights, u, v, coeff=1.0, geometries=geometries, n_iterations=2)
    for i, exact in enumerate(expected(weights, u, v, geometries, 1.0, 2)):
        torch.testing.assert_close(found.weights[i], exact[0], rtol=1e-10, atol=1e-12)


def test_one_backward_after_another():
    """A node serves several layers; their gradients may be asked for apart, with a step in between."""
    weights, u, v, geometries = problem(LAYERS[:3])
    inputs = [weight.requires_grad_() for weight in weights]
    found = irf.ops.power_iteration(inputs, u, v, coeff=0.9, geometries=geometries)
    found.weights[0].sum().backward()
    with torch.no_grad():
        inputs[0] -= 0.1 * inputs[0].grad
    found.weights[2].sum().backward()
    assert inputs[2].grad is not None
    with pytest.raises(RuntimeError, match="changed in place since its forward: its second gradient"):
        torch.autograd.grad(found.weights[1].sum(), inputs[1], create_graph=True)


def test_numbers_whose_squares_overflow():
    weights, u, v, geometries = problem(PLAIN, torch.float32)
    for scale in (1e25, 1e-25):
        found = irf.ops.power_iteration([scale * w for w in weights], u, v, coeff=scale, geometries=geometries)
        plain = irf.ops.power_iteration(weights, u, v, coeff=1.0, geometries=geometries)
        torch.testing.assert_close(found.sigma / scale, plain.sigma, rtol=1e-4, atol=0)


def test_layouts_and_empty_lists():
    weights, u, v, geometries = problem(LAYERS[:2])
    options = {"coeff": 0.9, "geometries": geometries}
    plain = irf.ops.power_iteration(weights, u, v, **options)
    last = [weight.to(memory_format=torch.channels_last) for weight in weights]
    strided = [weight.mT.contiguous().mT for weight in weights]
    for other in (last, strided):
        found = irf.ops.power_iteration(other, u, v, **options)
        for a, b in zip(found.weights, plain.weights, strict=True):
            torch.testing.assert_close(a, b)
    nothing = irf.ops.power_iteration([], [], [], coeff=0.9)
    assert nothing.weights == ()
    assert len(nothing.sigma) == 0


@pytest.mark.parametrize("layers", [LAYERS, PLAIN], ids=["any", "plain"])
def test_weights_that_cannot_be_normalised(backend, layers):
    """Zero: vectors stay. Not finite: σ shows it, and no other layer is touched."""
    weights, u, v, geometries = problem(layers, torch.float32)
    weights[0].zero_()
    weights[1].view(-1)[0] = float("nan")
    found = irf.ops.power_iteration(weights, u, v, coeff=0.9, geometries=geometries, n_iterations=2)
    assert torch.equal(found.u[0], u[0])
    assert torch.equal(found.v[0], v[0])
    assert found.weights[0].abs().max() == 0
    assert found.sigma[1].isnan()
    assert found.weights[1].isnan().all()
    assert found.u[1].isfinite().all()
    assert found.sigma[2:].isfinite().all()


def test_opcheck():
    weights, u, v, geometries = problem(LAYERS[:3])
    code = encode(geometries)
    coeff = [0.9] * 3
    forward = (weights, u, v, coeff, code, 1)
    torch.library.opcheck(torch.ops.iresnet_fast.power_iteration.default, forward)
    flat, new_u, new_v, sigma = torch.ops.iresnet_fast.power_iteration(*forward)
    backward = (weights, flat, new_u, new_v, sigma, coeff, code)
    torch.library.opcheck(torch.ops.iresnet_fast.power_iteration_backward.default, backward)


def test_geometries_survive_the_schema():
    geometries = [geometry for _, geometry in LAYERS]
    assert decode(encode(geometries)) == geometries


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weights": [torch.ones(2, 2).half()]}, TypeError, "weight 0 must be float32 or float64"),
        ({"u": []}, ValueError, "u needs one entry for each of the 1 weights, got 0"),
        ({"u": [torch.ones(3)]}, ValueError, r"u 0 must have shape \(2,\), got \(3,\)"),
        ({"v": [torch.ones(2, dtype=torch.float64)]}, TypeError, "v 0 is torch.float64"),
        ({"weights": [torch.ones(2, 0)]}, ValueError, r"weight 0 of shape \(2, 0\) is empty"),
        ({"coeff": 0.0}, ValueError, "coeff must be a positive number, got 0.0"),
        ({"coeff": [0.9, 0.9]}, ValueError, "coeff needs one entry"),
        ({"n_iterations": -1}, ValueError, "n_iterations must be an int that is not negative, got -1"),
        ({"layers_per_node": [2]}, ValueError, r"layers_per_node must add up to the 1 weights, got \[2\]"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"weights": [torch.eye(2)], "u": [torch.ones(2)], "v": [torch.ones(2)], "coeff": 0.9}
    with pytest.raises(error, match=message):
        irf.ops.power_iteration(**{**arguments, **change})
