"""Invertible downsampling."""

from __future__ import annotations

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
        batch, channels, height, width = x.shape
        patches = x.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
        return patches.reshape(batch, 4 * channels, height // 2, width // 2)

    def inverse(self, y: Tensor) -> Tensor:
        """(B, 4C, H/2, W/2) to (B, C, H, W)."""
        if y.dim() != 4 or y.shape[1] % 4:
            raise ValueError(f"Squeeze.inverse needs (B, 4C, H, W), got shape {tuple(y.shape)}")
        batch, channels, height, width = y.shape
        patches = y.reshape(batch, channels // 4, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3)
        return patches.reshape(batch, channels // 4, 2 * height, 2 * width)
