"""From data in its own range to data that a flow can map to a normal distribution."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...estimators import Estimator, LogDet
from ...ops.arguments import can_look
from .base import Bijection, no_volume_change


class Logit(Bijection):
    """y = logit(α + (1 − 2α)x) (Dinh et al. 2017): an interval around [0, 1] becomes all real numbers.

    Args:
        alpha: in [0, ½); how far the interval reaches beyond [0, 1], so that y is finite there: α/(1 − 2α) on both
            sides. With 0 it is the open interval (0, 1).

    Shape: (B, ...), kept.

    Raises:
        ValueError: alpha outside its range; data outside of the interval, or NaN.
        TypeError: integers, which have no density.
    """

    def __init__(self, alpha: float = 0.05) -> None:
        super().__init__()
        if not 0 <= alpha < 0.5:
            raise ValueError(f"alpha must be in [0, 0.5), got {alpha!r}")
        self.alpha = alpha

    @property
    def interval(self) -> tuple[float, float]:
        """The open interval on which the map is defined."""
        margin = self.alpha / (1 - 2 * self.alpha)
        return 0 - margin, 1 + margin

    def forward(self, x: Tensor) -> Tensor:
        """The interval to the real numbers."""
        if not x.is_floating_point():
            raise TypeError(
                f"a density is one of continuous data, got {x.dtype}: integers have none. Remedy: "
                "irf.data.dequantize(images)"
            )
        p = self.alpha + (1 - 2 * self.alpha) * x
        if x.numel() and can_look(x) and bool(self.outside_domain(x).any()):
            ends = f"({self.interval[0]:.6g}, {self.interval[1]:.6g})"
            raise ValueError(
                f"data must be in {ends}, got {_extent(x)}. Remedy: scale it to [0, 1], as irf.data.dequantize(images) "
                "does" + ("" if self.alpha else "; alpha > 0 takes the ends, too")
            )
        return torch.logit(p)

    def outside_domain(self, x: Tensor) -> Tensor:
        """Samples (B,) with values outside of the interval, or NaN."""
        p = self.alpha + (1 - 2 * self.alpha) * x
        return ~((p > 0) & (p < 1)).flatten(1).all(1)

    def inverse(self, y: Tensor) -> Tensor:
        """The real numbers to the interval, whose ends it does not reach by rounding."""
        p = torch.sigmoid(y)
        limits = torch.finfo(p.dtype)
        p = p.clamp(4 * limits.eps if self.alpha else limits.tiny, 1 - 4 * limits.eps)
        return (p - self.alpha) / (1 - 2 * self.alpha)

    def lipschitz(self) -> tuple[None, float]:
        """Towards the ends of its interval the map is arbitrarily steep."""
        return None, 0.25 / (1 - 2 * self.alpha)

    def estimate_log_det(self, x: Tensor, estimator: Estimator | None = None) -> tuple[Tensor, LogDet]:
        """Σ log((1 − 2α)/(p(1 − p))) with p = α + (1 − 2α)x, from y = logit(p), so that it does not cancel."""
        y = self(x)
        each = math.log1p(-2 * self.alpha) + F.softplus(y) + F.softplus(-y)
        return y, LogDet.exactly(each.flatten(1).sum(1, dtype=torch.promote_types(x.dtype, torch.float32)))

    def extra_repr(self) -> str:
        """Shown by repr."""
        return f"alpha={self.alpha}"


class Center(Bijection):
    """y = x − ½, which centers images in [0, 1] as the papers' networks take them.

    Shape: (B, ...), kept.

    Raises:
        ValueError: data that is not in [0, 1] nor near it, as images of 8 bits: beyond (−1, 2), or NaN.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[0, 1] to [−½, ½]."""
        if x.numel() and can_look(x) and bool(self.outside_domain(x).any()):
            raise ValueError(
                f"data must be in [0, 1] or near it, got {_extent(x)}. Remedy: scale it to [0, 1], as "
                "irf.data.dequantize(images) does"
            )
        return x - 0.5

    def outside_domain(self, x: Tensor) -> Tensor:
        """Samples (B,) with values that are not near [0, 1], or NaN."""
        return ~((x > -1) & (x < 2)).flatten(1).all(1)

    def inverse(self, y: Tensor) -> Tensor:
        """[−½, ½] to [0, 1]."""
        return y + 0.5

    def lipschitz(self) -> tuple[float, float]:
        """An isometry."""
        return 1.0, 1.0

    def estimate_log_det(self, x: Tensor, estimator: Estimator | None = None) -> tuple[Tensor, LogDet]:
        """A shift has log-determinant 0."""
        return self(x), LogDet.exactly(no_volume_change(x))


def _extent(x: Tensor) -> str:
    return "NaN" if bool(x.isnan().any()) else f"values from {float(x.min()):.6g} to {float(x.max()):.6g}"
