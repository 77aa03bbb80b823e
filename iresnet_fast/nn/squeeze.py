"""Invertible downsampling."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Squeeze(nn.Module):
    """Invertible downsampling: every 2×2 patch becomes four channels (Dinh et al. 2017; Jacobsen et al. 2018).

    A permutation of the values: an isometry, with log-determinant 0.

    Shape: (B, C, H, W) to (B, 4C, H/2, W/2), any dtype.

    Raises:
        ValueError: an input that is not (B, C, H, W) with even H and W.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, 4C, H/2, W/2)."""
        if x.dim() != 4 or x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(f"Squeeze needs an input (B, C, H, W) with even H and W, got shape {tuple(x.shape)}")
        return F.pixel_unshuffle(x, 2)

    def inverse(self, y: Tensor) -> Tensor:
        """(B, 4C, H/2, W/2) to (B, C, H, W)."""
        if y.dim() != 4 or y.shape[1] % 4:
            raise ValueError(f"Squeeze.inverse needs (B, 4C, H, W), got shape {tuple(y.shape)}")
        return F.pixel_shuffle(y, 2)
