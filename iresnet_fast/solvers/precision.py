"""In which precision a branch is evaluated, as PyTorch is set at this moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Significant bits of the formats that float32 may silently be rounded to inside a matrix product.
_REDUCED = {"tf32": 2.0**-10, "bf16": torch.finfo(torch.bfloat16).eps}


class Precision(NamedTuple):
    """How a branch is evaluated.

    Attributes:
        name: for the user.
        eps: unit rounding of its least precise step.
    """

    name: str
    eps: float


def evaluation_precision(x: Tensor) -> Precision:
    """The precision of a branch evaluated at x under the current autocast and TF32 settings."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        return Precision(f"autocast to {_name(dtype)}", max(torch.finfo(dtype).eps, torch.finfo(x.dtype).eps))
    if x.dtype == torch.float32:
        backends: Any = torch.backends
        convolutions, products = (
            (backends.cudnn, backends.cuda) if kind == "cuda" else (backends.mkldnn, backends.mkldnn)
        )
        settings = (products.matmul.fp32_precision, convolutions.conv.fp32_precision)
        reduced = [setting for setting in settings if setting in _REDUCED]
        if reduced:
            coarsest = max(reduced, key=_REDUCED.__getitem__)
            return Precision(f"float32 with {coarsest.upper()} products", _REDUCED[coarsest])
    return Precision(_name(x.dtype), torch.finfo(x.dtype).eps)


def autocast_settings(device: torch.device) -> Callable[[], torch.autocast]:
    """A context that restores the autocast settings of this moment."""
    kind = device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype=dtype, enabled=enabled)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
