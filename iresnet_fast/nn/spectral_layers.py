"""Layers that are normalized from the start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .spectral_norm import spectral_norm


class SpectralLinear(nn.Linear):
    """``nn.Linear`` whose norm is held at about coeff by :func:`spectral_norm`.

    Args:
        in_features: as for ``nn.Linear``.
        out_features: as for ``nn.Linear``.
        coeff: the Lipschitz coefficient c > 0.
        n_power_iterations: per training forward.
        tol: stop iterating once σ's relative change is below it.
        **kwargs: ``bias``, ``device``, ``dtype``, as for ``nn.Linear``.

    Shape: (..., in_features) to (..., out_features).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        coeff: float = 0.9,
        n_power_iterations: int = 1,
        tol: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_features, out_features, **kwargs)
        spectral_norm(self, coeff, n_power_iterations=n_power_iterations, tol=tol)


class SpectralConv2d(nn.Conv2d):
    """``nn.Conv2d`` whose operator norm at ``input_size`` is held at about coeff by :func:`spectral_norm`.

    Args:
        in_channels: as for ``nn.Conv2d``.
        out_channels: as for ``nn.Conv2d``.
        kernel_size: as for ``nn.Conv2d``.
        coeff: the Lipschitz coefficient c > 0.
        input_size: (H, W) of the input in pixels; not needed for a 1×1 kernel.
        n_power_iterations: per training forward.
        tol: stop iterating once σ's relative change is below it.
        **kwargs: the other arguments of ``nn.Conv2d`` by name: stride, padding, dilation, groups, bias, padding_mode.

    Shape: (B, in_channels, H, W) to (B, out_channels, H', W').

    Raises:
        ValueError: from ``forward``, an input of another spatial size than ``input_size``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        coeff: float = 0.9,
        input_size: int | Sequence[int] | None = None,
        n_power_iterations: int = 1,
        tol: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, **kwargs)
        spectral_norm(self, coeff, n_power_iterations=n_power_iterations, tol=tol, input_size=input_size)
