"""The invertible trunk of a flow, from its settings."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from ..estimators import Estimator, Exact, NeumannGradient, PowerSeries, RussianRoulette
from ..nn import (
    ActNorm,
    Bijection,
    Bottleneck,
    Center,
    Flatten,
    InvertibleResidualBlock,
    InvertibleSequential,
    LipschitzMLP,
    Logit,
    Split,
    Squeeze,
)
from .flow_config import FlowConfig

_PREPROCESSING: dict[str, Callable[[FlowConfig], list[nn.Module]]] = {
    "none": lambda config: [],
    "center": lambda config: [Center()],
    "logit": lambda config: [Logit(config.alpha)],
}
_ESTIMATORS: dict[str, Callable[[FlowConfig], Estimator | None]] = {
    "auto": lambda config: None,
    "exact": lambda config: Exact(),
    "series": lambda config: PowerSeries(config.n_terms),
    "roulette": lambda config: RussianRoulette(config.n_exact),
    "neumann": lambda config: NeumannGradient(RussianRoulette(config.n_exact)),
}


def build_trunk(config: FlowConfig) -> InvertibleSequential:
    """Preprocessing and all scales: maps (B, *in_shape) to latents (B, D)."""
    return InvertibleSequential(
        *_PREPROCESSING[config.preprocessing](config), *_build_scale(config, 0, config.in_shape)
    )


def _build_scale(config: FlowConfig, scale: int, shape: tuple[int, ...]) -> list[Bijection]:
    """The modules from a scale on, to the latents as vectors."""
    if scale == len(config.blocks):
        return _build_end(config, shape)
    parts: list[Bijection] = []
    if scale or config.squeeze_input:
        parts.append(Squeeze(config.squeeze_order))
        shape = (4 * shape[0], shape[1] // 2, shape[2] // 2)
    for index in range(config.blocks[scale]):
        branch = Bottleneck(
            shape[0],
            config.hidden[scale],
            coeff=config.coeff,
            input_size=shape[1:],
            activation=config.activation,
            preactivation=scale + index > 0,
            n_power_iterations=config.n_power_iterations,
        )
        parts += _block(config, branch, shape[0])
    if config.factor_out and scale + 1 < len(config.blocks):
        kept = shape[0] - shape[0] // 2
        rest = InvertibleSequential(*_build_scale(config, scale + 1, (kept, *shape[1:])))
        return [*parts, Split(rest, shape, config.keep)]
    return parts + _build_scale(config, scale + 1, shape)


def _build_end(config: FlowConfig, shape: tuple[int, ...]) -> list[Bijection]:
    size = math.prod(shape)
    parts: list[Bijection] = [Flatten(shape)] if len(shape) > 1 else []
    for _ in range(config.fc_blocks):
        branch = LipschitzMLP(
            size,
            config.fc_hidden,
            coeff=config.coeff,
            activation=config.activation,
            n_power_iterations=config.n_power_iterations,
        )
        parts += _block(config, branch, size)
    return parts


def _block(config: FlowConfig, branch: nn.Module, channels: int) -> list[Bijection]:
    block = InvertibleResidualBlock(branch, estimator=_ESTIMATORS[config.estimator](config))
    return [ActNorm(channels), block] if config.actnorm else [block]
