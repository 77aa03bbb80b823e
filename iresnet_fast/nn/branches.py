"""The residual branches of the papers: a bottleneck of convolutions, and a multilayer perceptron."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import nn

from .activations import make_activation
from .spectral_norm import spectral_norm


def _check_contraction(coeff: float | None) -> None:
    if coeff is not None and not (isinstance(coeff, int | float) and 0 < coeff < 1):
        raise ValueError(
            f"coeff must be in (0, 1) for a residual branch to contract, got {coeff!r}; None leaves it unconstrained"
        )


class _Branch(nn.Sequential):
    """A chain of layers whose slices are plain chains."""

    def __getitem__(self, index: int | slice) -> Any:
        modules = list(self)[index]
        return nn.Sequential(*modules) if isinstance(modules, list) else modules


class Bottleneck(_Branch):
    """Bottleneck branch: activation, 3×3, activation, 1×1, activation, 3×3 convolution (Behrmann et al. 2018, App. A).

    Args:
        channels: of input and output.
        hidden: channels between the convolutions.
        coeff: Lipschitz coefficient of each convolution, so that Lip(g) is about coeff³; None leaves them
            unconstrained (the plain ResNet of the papers' comparison).
        input_size: (H, W) of the input in pixels.
        activation: a name of :data:`iresnet_fast.nn.ACTIVATIONS`.
        preactivation: whether an activation comes first; not in the first block of a network, which would otherwise
            start by discarding what it is given.
        batch_norm: whether batch normalisation stands before every activation.
        dropout: probability of dropping an activation before the last convolution, in training mode.
        n_power_iterations: per training forward.

    Shape: (B, channels, H, W), kept.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        *,
        coeff: float | None = 0.9,
        input_size: Sequence[int],
        activation: str = "elu",
        preactivation: bool = True,
        batch_norm: bool = False,
        dropout: float = 0.0,
        n_power_iterations: int = 1,
    ) -> None:
        _check_contraction(coeff)
        convolutions = [
            nn.Conv2d(channels, hidden, 3, padding=1),
            nn.Conv2d(hidden, hidden, 1),
            nn.Conv2d(hidden, channels, 3, padding=1),
        ]
        if coeff is not None:
            for conv in convolutions:
                spectral_norm(conv, coeff, input_size=input_size, n_power_iterations=n_power_iterations)

        def activate(width: int) -> list[nn.Module]:
            return [nn.BatchNorm2d(width)] * batch_norm + [make_activation(activation)]

        layers: list[nn.Module] = activate(channels) if preactivation else []
        layers += [convolutions[0], *activate(hidden), convolutions[1], *activate(hidden)]
        layers += [nn.Dropout(dropout)] if dropout else []
        super().__init__(*layers, convolutions[2])


class LipschitzMLP(_Branch):
    """Multilayer perceptron branch: linear layers with activations between them (Chen et al. 2019).

    Args:
        features: of input and output.
        hidden: width of each hidden layer.
        coeff: Lipschitz coefficient of each linear layer, so that Lip(g) is about coeff to their number; None leaves
            them unconstrained.
        activation: a name of :data:`iresnet_fast.nn.ACTIVATIONS`.
        n_power_iterations: per training forward.

    Shape: (B, features), kept.
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int] = (64, 64),
        *,
        coeff: float | None = 0.9,
        activation: str = "lipswish",
        n_power_iterations: int = 1,
    ) -> None:
        _check_contraction(coeff)
        if isinstance(hidden, int) or not hidden:
            raise ValueError(f"hidden must list the width of each hidden layer, as in (64, 64), got {hidden!r}")
        widths = [features, *hidden, features]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            linear = nn.Linear(before, after)
            if coeff is not None:
                spectral_norm(linear, coeff, n_power_iterations=n_power_iterations)
            layers += [linear, make_activation(activation)]
        super().__init__(*layers[:-1])
