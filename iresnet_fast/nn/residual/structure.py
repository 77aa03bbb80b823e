"""Branches that are chains of layers with activations between them: what they consist of, and their Jacobians."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..activations import LipSwish, MaxMin
from ..branches import Bottleneck, LipschitzMLP
from ..inspection import know_forward, obstacle
from ..spectral_layers import SpectralConv2d, SpectralLinear

Numbers = tuple[float | Tensor, float]
NO_NUMBERS: Numbers = (0.0, 0.0)
# The name of an activation, and its two parameters.
_ACTIVATIONS: dict[type[nn.Module], tuple[str, Callable[[Any], Numbers]]] = {
    nn.ReLU: ("relu", lambda module: NO_NUMBERS),
    nn.ELU: ("elu", lambda module: (module.alpha, 0.0)),
    nn.Softplus: ("softplus", lambda module: (module.beta, module.threshold)),
    nn.Tanh: ("tanh", lambda module: NO_NUMBERS),
    LipSwish: ("lipswish", lambda module: (F.softplus(module.beta).squeeze(), 0.0)),
    MaxMin: ("maxmin", lambda module: NO_NUMBERS),
}
LINEAR, CONVOLUTIONS = (nn.Linear, SpectralLinear), (nn.Conv2d, SpectralConv2d)
_LAYERS = (*LINEAR, *CONVOLUTIONS)
CHAINS = (nn.Sequential, Bottleneck, LipschitzMLP)
# Nothing where an inverse exists: check_invertible refuses active dropout.
_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
for _kind in (*_ACTIVATIONS, *_LAYERS, *CHAINS, *_IDENTITIES):
    know_forward(_kind)


class NoChainError(Exception):
    """Raised if a branch is not a chain of layers and activations; the message says why."""


class Chain(NamedTuple):
    """An activation, a layer, an activation, ..., an activation.

    Attributes:
        layers: linear layers and convolutions, of torch or of this package.
        activations: their names, one more than layers.
        numbers: two parameters of each.
    """

    layers: list[Any]
    activations: list[str]
    numbers: list[Numbers]


def read_chain(g: nn.Module) -> Chain:
    """What a branch consists of.

    Raises:
        NoChainError: something else than layers and activations, or something that is not what its type says.
    """
    layers: list[Any] = []
    names: list[str] = []
    parameters: list[Numbers] = []
    name = "identity"
    numbers = NO_NUMBERS
    for module in _parts(g):
        kind = parametrize.type_before_parametrizations(module)
        if why := obstacle(module, kind):
            raise NoChainError(why)
        if kind in _ACTIVATIONS:
            if name != "identity":
                raise NoChainError("it has two activations in a row")
            if getattr(module, "inplace", False):
                raise NoChainError("an activation works in place")
            name, read = _ACTIVATIONS[kind]
            numbers = read(module)
            if isinstance(numbers[0], Tensor) and numbers[0].numel() != 1:
                raise NoChainError(f"a {kind.__name__} has {numbers[0].numel()} parameters")
        elif kind in _LAYERS:
            for tensor in module.parameters():
                if type(tensor) not in (Tensor, nn.Parameter):
                    raise NoChainError(f"a {kind.__name__} has a {type(tensor).__name__}")
            layers.append(module)
            names.append(name)
            parameters.append(numbers)
            name, numbers = "identity", NO_NUMBERS
        elif kind not in _IDENTITIES or (module.training and getattr(module, "p", 0) > 0):
            raise NoChainError(f"it has a {kind.__name__}")
    if not layers:
        raise NoChainError("it has no layers")
    return Chain(layers, [*names, name], [*parameters, numbers])


def _parts(g: nn.Module) -> Iterator[nn.Module]:
    """The modules of a branch in order; those of chains within in place of the chains."""
    if type(g) not in CHAINS:
        yield g
        return
    if why := obstacle(g, type(g)):
        raise NoChainError(why)
    for part in g._modules.values():
        if part is not None:
            yield from _parts(part)


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
