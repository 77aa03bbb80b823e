"""Injective padding: more channels, filled with zeros."""

from __future__ import annotations

import warnings

import torch.nn.functional as F
from torch import Tensor

from ...estimators import Estimator, LogDet
from ...ops.arguments import can_look, check_choice
from ...solvers import ON_FAILURE, sample_norms
from .base import Bijection


class InjectivePad(Bijection):
    """Appends channels of zeros (injective i-RevNet, Jacobsen et al. 2018): an isometry onto its range.

    It is injective, not onto: ``inverse`` exists for points of its range only, and no density does.

    Args:
        channels: how many channels of zeros to append.
        tolerance: largest relative norm of the appended channels that ``inverse`` takes for zero.

    Shape: (B, C, ...) to (B, C + channels, ...), floating dtypes.
    """

    def __init__(self, channels: int, *, tolerance: float = 1e-3) -> None:
        super().__init__()
        if isinstance(channels, bool) or not isinstance(channels, int) or channels < 0:
            raise ValueError(f"channels must be an int that is not negative, got {channels!r}")
        self.channels = channels
        self.tolerance = tolerance

    def forward(self, x: Tensor) -> Tensor:
        """Append the zeros."""
        if x.dim() < 2:
            raise ValueError(f"InjectivePad needs an input (B, C, ...), got shape {tuple(x.shape)}")
        return F.pad(x, [0, 0] * (x.dim() - 2) + [0, self.channels])

    def inverse(self, y: Tensor, *, on_failure: str = "raise") -> Tensor:
        """Drop the appended channels.

        Args:
            y: (B, C + channels, ...).
            on_failure: ``"raise"``, ``"warn"`` or ``"return"``, for samples that are :meth:`outside`.

        Raises:
            ValueError: fewer channels than were appended; samples outside the range of the map, unless ``on_failure``
                says otherwise.
        """
        check_choice("on_failure", on_failure, ON_FAILURE)
        if on_failure != "return" and can_look(y) and bool((outside := self.outside(y)).any()):
            samples = outside.nonzero().flatten().tolist()
            excess = float(sample_norms(y.detach()[samples[:1], self._kept(y) :]))
            message = (
                f"{len(samples)} of {len(y)} samples are outside the range of the padded network: the appended "
                f"channels of sample {samples[0]} have norm {excess:.3g}, not 0. Invert latents that the "
                "network produced, or use a network without injective padding"
            )
            if on_failure == "raise":
                raise ValueError(message)
            warnings.warn(message, stacklevel=2)
        return y[:, : self._kept(y)]

    def outside(self, y: Tensor) -> Tensor:
        """Which samples no x maps to: (B,) bool, whether the appended channels are not zero within ``tolerance``.

        Raises:
            ValueError: fewer channels than were appended.
        """
        excess = sample_norms(y.detach()[:, self._kept(y) :])
        # Written so that NaN is outside, too.
        return ~(excess <= self.tolerance * sample_norms(y.detach()).clamp_min(1.0))

    def _kept(self, y: Tensor) -> int:
        kept = y.shape[1] - self.channels
        if kept < 1:
            raise ValueError(f"InjectivePad.inverse needs more than {self.channels} channels, got {y.shape[1]}")
        return kept

    def lipschitz(self) -> tuple[float, float]:
        """An isometry."""
        return 1.0, 1.0

    def estimate_log_det(self, x: Tensor, estimator: Estimator | None = None) -> tuple[Tensor, LogDet]:
        """There is none.

        Raises:
            ValueError: always: the image fills no volume of the padded space, so no density exists on it.
        """
        raise ValueError(
            "InjectivePad has no log-determinant: its image fills no volume of the padded space, so no density exists "
            "there. Remedy: a flow without injective padding (inject=0)"
        )

    def extra_repr(self) -> str:
        """Shown by repr."""
        return f"channels={self.channels}"
