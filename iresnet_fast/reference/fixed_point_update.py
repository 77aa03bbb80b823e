"""One step of the fixed-point inverse and the residual it measures."""

from __future__ import annotations

import torch
from torch import Tensor


def fixed_point_update(y: Tensor, image: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The next iterate y − g(x), and ‖y − g(x) − x‖ per sample (Behrmann et al. 2019, Algorithm 1).

    Args:
        y: (B, ...) outputs of the block.
        image: (B, ...) g(x).
        x: (B, ...) the iterate.

    Returns:
        The next iterate, of y's shape and dtype, and the residuals (B,), in float32 for low precision, else in y's
        dtype.
    """
    following = y - image
    dtype = torch.promote_types(y.dtype, torch.float32)
    step = following.to(dtype) - x.to(dtype)
    return following, torch.linalg.vector_norm(step, dim=tuple(range(1, step.dim())))
