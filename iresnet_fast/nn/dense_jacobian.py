"""Images and whole Jacobians of chains of linear layers, layer by layer: no graph is recorded to be run backwards."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .chain import LINEAR, NoChainError, Numbers, read_chain

# An activation's value and its derivative, elementwise.
_ValueAndSlope = Callable[[Tensor, float | Tensor, float], tuple[Tensor, Tensor]]


def image_and_jacobian(g: nn.Module, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """g(x) (B, D) and its Jacobians (B, D, D), differentiable, of a branch of linear layers and activations.

    Args:
        g: the branch; it is evaluated once, as its forward would be.
        x: (B, D).

    Returns:
        None where g is no such chain, has hooks or methods of its own, or an activation that is not elementwise.
    """
    try:
        layers, activations, numbers = read_chain(g)
    except NoChainError:
        return None
    linear = all(parametrize.type_before_parametrizations(layer) in LINEAR for layer in layers)
    if x.dim() != 2 or not linear or not _VALUE_AND_SLOPE.keys() >= set(activations):
        return None
    # Rows are the derivatives of all values by one entry of x, so that a layer acts on them as on samples.
    tangents: Tensor | None = None
    for layer, name, pair in zip(layers, activations, numbers, strict=False):
        x, tangents = _activate(name, pair, x, tangents)
        weight = layer.weight
        x = F.linear(x, weight, layer.bias)
        tangents = weight.T[None] if tangents is None else _as_one_product(tangents, weight)
    x, tangents = _activate(activations[-1], numbers[-1], x, tangents)
    assert tangents is not None
    return x, tangents.expand(len(x), -1, -1).transpose(1, 2)


def _as_one_product(tangents: Tensor, weight: Tensor) -> Tensor:
    """(B, D, N) times weight.T: as one product, where matmul without a graph makes one of each sample."""
    return F.linear(tangents.flatten(0, 1), weight).unflatten(0, tangents.shape[:2])


def _activate(name: str, numbers: Numbers, x: Tensor, tangents: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if name == "identity":
        return x, tangents
    x, slope = _VALUE_AND_SLOPE[name](x, *numbers)
    return x, torch.diag_embed(slope) if tangents is None else tangents * slope[:, None]


def _relu(x: Tensor, _: float | Tensor, __: float) -> tuple[Tensor, Tensor]:
    return F.relu(x), (x > 0).to(x.dtype)


def _elu(x: Tensor, alpha: float | Tensor, _: float) -> tuple[Tensor, Tensor]:
    return F.elu(x, float(alpha)), torch.where(x > 0, 1.0, alpha * x.clamp_max(0).exp())


def _softplus(x: Tensor, beta: float | Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    return F.softplus(x, float(beta), threshold), torch.where(beta * x > threshold, 1.0, torch.sigmoid(beta * x))


def _tanh(x: Tensor, _: float | Tensor, __: float) -> tuple[Tensor, Tensor]:
    value = torch.tanh(x)
    return value, 1 - value.square()


def _lipswish(x: Tensor, beta: float | Tensor, _: float) -> tuple[Tensor, Tensor]:
    share = torch.sigmoid(beta * x)
    value = x * share / 1.1
    return value, torch.addcmul(share / 1.1, value, beta * (1 - share))


_VALUE_AND_SLOPE: dict[str, _ValueAndSlope] = {
    "identity": lambda x, _, __: (x, torch.ones_like(x)),
    "relu": _relu,
    "elu": _elu,
    "softplus": _softplus,
    "tanh": _tanh,
    "lipswish": _lipswish,
}
