"""Blocks as training leaves them, and what they cost."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from iresnet_fast.nn import find_spectral_norm

_M = TypeVar("_M", bound=nn.Module)


def saturated(module: _M, factor: float = 4.0) -> _M:
    """The module with weights above their coeff, so that all layers are at it, as trained ones are; changes it."""
    with torch.no_grad():
        for part in module.modules():
            if find_spectral_norm(part):
                part.parametrizations.weight.original.mul_(factor)
    return module


def bottleneck_flops(channels: int, size: int, hidden: int) -> float:
    """Operations of one evaluation of a bottleneck branch per sample."""
    return 2 * size**2 * hidden * (18 * channels + hidden)
