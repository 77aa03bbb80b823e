"""Invertible downsampling."""

from __future__ import annotations

from torch import Tensor

from ...estimators import Estimator, LogDet
from .base import Bijection, no_volume_change

SQUEEZE_ORDERS = ("channel", "position")


class Squeeze(Bijection):
    """Invertible downsampling: every 2×2 patch becomes four channels (Dinh et al. 2017; Jacobsen et al. 2018).

    A permutation of the values: an isometry, with log-determinant 0.

    Args:
        order: of the new channels. ``"channel"``: the four of one old channel stand together, as in
            ``torch.pixel_unshuffle``; ``"position"``: one position of every old channel stand together, as in the
            official code of i-ResNets.

    Shape: (B, C, H, W) to (B, 4C, H/2, W/2), any dtype.

    Raises:
        ValueError: another order, or an input that is not (B, C, H, W) with even H and W.
    """

    def __init__(self, order: str = "channel") -> None:
        super().__init__()
        if order not in SQUEEZE_ORDERS:
            raise ValueError(f"order must be one of {', '.join(map(repr, SQUEEZE_ORDERS))}, got {order!r}")
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, 4C, H/2, W/2)."""
        if x.dim() != 4 or x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(f"Squeeze needs an input (B, C, H, W) with even H and W, got shape {tuple(x.shape)}")
        batch, channels, height, width = x.shape
        patches = x.reshape(batch, channels, height // 2, 2, width // 2, 2)
        patches = patches.permute((0, 1, 3, 5, 2, 4) if self.order == "channel" else (0, 3, 5, 1, 2, 4))
        return patches.reshape(batch, 4 * channels, height // 2, width // 2)

    def inverse(self, y: Tensor) -> Tensor:
        """(B, 4C, H/2, W/2) to (B, C, H, W)."""
        if y.dim() != 4 or y.shape[1] % 4:
            raise ValueError(f"Squeeze.inverse needs (B, 4C, H, W), got shape {tuple(y.shape)}")
        batch, channels, height, width = y.shape
        if self.order == "channel":
            patches = y.reshape(batch, channels // 4, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3)
        else:
            patches = y.reshape(batch, 2, 2, channels // 4, height, width).permute(0, 3, 4, 1, 5, 2)
        return patches.reshape(batch, channels // 4, 2 * height, 2 * width)

    def lipschitz(self) -> tuple[float, float]:
        """An isometry."""
        return 1.0, 1.0

    def estimate_log_det(self, x: Tensor, estimator: Estimator | None = None) -> tuple[Tensor, LogDet]:
        """A permutation has log-determinant 0."""
        return self(x), LogDet.exactly(no_volume_change(x))

    def extra_repr(self) -> str:
        """Shown by repr."""
        return f"order={self.order!r}"
