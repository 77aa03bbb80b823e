"""Residual branches that are chains of layers with activations between them: what they consist of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .activations import LipSwish, MaxMin
from .branches import Bottleneck, LipschitzMLP
from .inspection import obstacle
from .spectral_layers import SpectralConv2d, SpectralLinear

Numbers = tuple[float | Tensor, float]
NO_NUMBERS: Numbers = (0.0, 0.0)
# The name of an activation, and its two parameters.
_ACTIVATIONS: dict[type[nn.Module], tuple[str, Callable[[Any], Numbers]]] = {
    nn.ReLU: ("relu", lambda module: NO_NUMBERS),
    nn.ELU: ("elu", lambda module: (module.alpha, 0.0)),
    nn.Softplus: ("softplus", lambda module: (module.beta, module.threshold)),
    nn.Tanh: ("tanh", lambda module: NO_NUMBERS),
    LipSwish: ("lipswish", lambda module: (F.softplus(module.beta), 0.0)),
    MaxMin: ("maxmin", lambda module: NO_NUMBERS),
}
LINEAR, CONVOLUTIONS = (nn.Linear, SpectralLinear), (nn.Conv2d, SpectralConv2d)
_LAYERS = (*LINEAR, *CONVOLUTIONS)
_CHAINS = (nn.Sequential, Bottleneck, LipschitzMLP)
# Nothing where an inverse exists: check_invertible refuses active dropout.
_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class NoChainError(Exception):
    """The module is no such chain; the message says why."""


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
    if type(g) not in _CHAINS:
        yield g
        return
    if why := obstacle(g, type(g)):
        raise NoChainError(why)
    for part in g._modules.values():
        if part is not None:
            yield from _parts(part)
