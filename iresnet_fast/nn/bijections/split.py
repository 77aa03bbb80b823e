"""Factoring out: half of the channels are latents already, the rest goes on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...estimators import Estimator, LogDet
from .base import Bijection, apply_with_log_det, no_volume_change, options_of

KEPT_HALVES = ("first", "last")


class Flatten(Bijection):
    """(B, *in_shape) to (B, D) and back: the latents of a flow as vectors.

    Args:
        in_shape: of a sample.

    Raises:
        ValueError: an input of another shape.
    """

    def __init__(self, in_shape: Sequence[int]) -> None:
        super().__init__()
        self.in_shape = tuple(in_shape)
        if not self.in_shape or min(self.in_shape) < 1:
            raise ValueError(f"in_shape must be the positive sizes of a sample, got {in_shape!r}")

    def forward(self, x: Tensor) -> Tensor:
        """(B, *in_shape) to (B, D)."""
        if tuple(x.shape[1:]) != self.in_shape:
            raise ValueError(f"Flatten needs (B, {', '.join(map(str, self.in_shape))}), got {tuple(x.shape)}")
        return x.flatten(1)

    def inverse(self, y: Tensor) -> Tensor:
        """(B, D) to (B, *in_shape)."""
        _check_vectors(y, math.prod(self.in_shape))
        return y.reshape(len(y), *self.in_shape)

    def lipschitz(self) -> tuple[float, float]:
        """An isometry."""
        return 1.0, 1.0

    def estimate_log_det(self, x: Tensor, estimator: Estimator | None = None) -> tuple[Tensor, LogDet]:
        """A change of shape has log-determinant 0."""
        return self(x), LogDet.exactly(no_volume_change(x))

    def extra_repr(self) -> str:
        """Shown by repr."""
        return f"{self.in_shape}"


class Split(Bijection):
    """Factor-out of multi-scale flows (Dinh et al. 2017): half of the channels pass through ``rest``.

    The others are latents as they are. All latents are one vector, in the order of the channels.

    Args:
        rest: maps (B, C − C//2, H, W) to vectors of as many values, as a chain with a :class:`Flatten` does.
        in_shape: (C, ...) of a sample, C ≥ 2.
        keep: the half of the channels that goes on, ``"first"`` or ``"last"`` (as in the official code of i-ResNets).

    Shape: (B, C, ...) to (B, D).

    Raises:
        ValueError: a single channel; an input of another shape; another ``keep``.
        TypeError: ``rest`` has no ``inverse``.
    """

    def __init__(self, rest: nn.Module, in_shape: Sequence[int], keep: str = KEPT_HALVES[0]) -> None:
        super().__init__()
        self.in_shape = tuple(in_shape)
        if keep not in KEPT_HALVES:
            raise ValueError(f"keep must be one of {', '.join(map(repr, KEPT_HALVES))}, got {keep!r}")
        self.keep = keep
        if not self.in_shape or self.in_shape[0] < 2:
            raise ValueError(f"a split needs at least two channels, got in_shape={in_shape!r}")
        if not callable(getattr(rest, "inverse", None)):
            raise TypeError(f"rest ({type(rest).__name__}) has no inverse method")
        self.rest = rest
        self.n_kept = self.in_shape[0] - self.in_shape[0] // 2

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What goes on (B, C − C//2, ...), and what is factored out, as vectors."""
        if tuple(x.shape[1:]) != self.in_shape:
            raise ValueError(f"Split needs (B, {', '.join(map(str, self.in_shape))}), got {tuple(x.shape)}")
        kept, factored = self._parted(x, self.n_kept)
        return kept, factored.flatten(1)

    def parts_of_latents(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """What ``rest`` returned, and what was factored out (B, C//2, ...)."""
        size = math.prod(self.in_shape)
        _check_vectors(z, size)
        kept, factored = self._parted(z, size // self.in_shape[0] * self.n_kept)
        return kept, factored.reshape(len(z), self.in_shape[0] - self.n_kept, *self.in_shape[1:])

    def _parted(self, x: Tensor, n_kept: int) -> tuple[Tensor, Tensor]:
        if self.keep == "first":
            return x[:, :n_kept], x[:, n_kept:]
        return x[:, x.shape[1] - n_kept :], x[:, : x.shape[1] - n_kept]

    def join(self, kept: Tensor, factored: Tensor) -> Tensor:
        """The two parts, of channels or of latents, in the order of the channels."""
        return torch.cat([kept, factored] if self.keep == "first" else [factored, kept], 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) to latents (B, D)."""
        kept, factored = self.parts(x)
        return self.join(self.rest(kept), factored)

    def inverse(self, y: Tensor, *, tol: float | None = None, on_failure: str = "raise") -> Tensor:
        """Latents (B, D) to (B, C, ...).

        Args:
            y: the latents.
            tol: of the inverse of ``rest``, where that iterates.
            on_failure: of the inverse of ``rest``, where that can fail.
        """
        kept, factored = self.parts_of_latents(y)
        options = options_of(self.rest, {"tol": tol, "on_failure": on_failure})
        return self.join(self.rest.inverse(kept, **options), factored)  # type: ignore[operator]  # torch types attributes of modules as Tensor | Module

    def estimate_log_det(self, x: Tensor, estimator: Estimator | None = None) -> tuple[Tensor, LogDet]:
        """That of ``rest``: what is factored out does not change."""
        kept, factored = self.parts(x)
        latents, log_det = apply_with_log_det("rest", self.rest, kept, estimator)
        return self.join(latents, factored), log_det

    def extra_repr(self) -> str:
        """Shown by repr."""
        return f"in_shape={self.in_shape}, keep={self.keep!r}"


def _check_vectors(z: Tensor, size: int) -> None:
    if z.dim() != 2 or z.shape[1] != size:
        raise ValueError(f"latents must be (B, {size}), got {tuple(z.shape)}")
