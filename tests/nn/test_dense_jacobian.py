"""Jacobians layer by layer, against those of autograd."""

import pytest
import torch
from torch import nn

import iresnet_fast as irf
from benchmarks.blocks import saturated
from iresnet_fast.estimators import Exact
from iresnet_fast.nn.residual.structure import image_and_jacobian
from tests.helpers import jacobians
from tests.tolerances import FLOAT64

ACTIVATIONS = {
    "relu": nn.ReLU,
    "elu": lambda: nn.ELU(0.7),
    "softplus": lambda: nn.Softplus(2.0, 20.0),
    "jumping softplus": lambda: nn.Softplus(2.0, 1.0),
    "tanh": nn.Tanh,
    "lipswish": irf.nn.LipSwish,
    "identity": nn.Identity,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("around", [False, True], ids=["", "activations at both ends"])
def test_images_and_jacobians(activation, around):
    make = ACTIVATIONS[activation]
    inner = [nn.Linear(3, 7), make(), irf.nn.SpectralLinear(7, 5, bias=False), make(), nn.Linear(5, 3)]
    g = nn.Sequential(make(), nn.Sequential(*inner), make()) if around else nn.Sequential(*inner)
    g = g.double().eval()
    x = torch.randn(6, 3, dtype=torch.float64)
    image, jacobian = image_and_jacobian(g, x)
    torch.testing.assert_close(image, g(x), rtol=FLOAT64, atol=FLOAT64)
    torch.testing.assert_close(jacobian, jacobians(g, x), rtol=FLOAT64, atol=FLOAT64)


@pytest.mark.parametrize("activation", ["elu", "lipswish", "softplus", "tanh"])
def test_gradients(activation):
    """First and second, in x and the parameters, at zero too: of what a recorded graph gives."""
    g = nn.Sequential(nn.Linear(2, 4), ACTIVATIONS[activation](), nn.Linear(4, 2)).double()
    parameters = list(g.parameters())
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)

    def function(x, *_):
        return image_and_jacobian(g, x)

    torch.autograd.gradcheck(function, (x, *parameters))
    torch.autograd.gradgradcheck(function, (x, *parameters))


def test_exact_takes_it_where_it_can():
    """With the same values and gradients; and the branch as it is where something else may be computed."""
    block = irf.nn.InvertibleResidualBlock(saturated(irf.nn.LipschitzMLP(3, (8, 8)))).double().train()
    x = torch.randn(5, 3, dtype=torch.float64)
    block(x)
    found = []
    for hooked in (False, True):
        handle = block.g[1].register_forward_hook(lambda module, args, output: output) if hooked else None
        with irf.nn.frozen_state(block):
            assert (image_and_jacobian(block.g, x) is None) is hooked
            value = block.estimate_log_det(x, Exact())[1].value
        found.append((value, torch.autograd.grad(value.sum(), list(block.parameters()), allow_unused=True)))
        if handle:
            handle.remove()
    torch.testing.assert_close(found[0][0], found[1][0], rtol=FLOAT64, atol=FLOAT64)
    for first, second in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(
            torch.zeros(()) if first is None else first, torch.zeros(()) if second is None else second
        )


def test_iterates_once_as_a_forward_does():
    """In training mode the power iterations go on by one forward."""
    torch.manual_seed(0)
    blocks = [irf.nn.InvertibleResidualBlock(irf.nn.LipschitzMLP(2, (8,))).train() for _ in range(2)]
    blocks[1].load_state_dict(blocks[0].state_dict())
    x = torch.randn(4, 2)
    for block in blocks:
        with torch.no_grad():
            block.g[0].parametrizations.weight.original.mul_(3).add_(0.1)
    blocks[0](x)
    blocks[1].estimate_log_det(x)
    for first, second in zip(blocks[0].buffers(), blocks[1].buffers(), strict=True):
        assert torch.equal(first, second)


def test_others_are_left_to_products():
    x = torch.randn(4, 2)
    for g in (irf.nn.MaxMin(), nn.Sequential(nn.Linear(2, 2), irf.nn.MaxMin()), nn.GELU(), nn.LayerNorm(2)):
        assert image_and_jacobian(g, x) is None
    assert image_and_jacobian(nn.Linear(2, 2), torch.randn(4, 3, 2)) is None
    assert image_and_jacobian(nn.Conv2d(2, 2, 1), torch.randn(4, 2, 3, 3)) is None
    with pytest.raises(ValueError, match=r"maps shape \(4, 2\) to \(4, 3\)"):
        irf.nn.InvertibleResidualBlock(nn.Linear(2, 3)).estimate_log_det(x, Exact())
