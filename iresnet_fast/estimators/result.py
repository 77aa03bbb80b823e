"""What an estimator of a log-determinant returns, and what it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogDet:
    """A log-determinant with what is known of it, sample by sample.

    Attributes:
        value: (B,) log|det J|; differentiable where gradients are recorded.
        standard_error: (B,) of ``value``, measured over the probes: 0 where it is exact, NaN with a single probe.
        bias_bound: proven bound of ``|E[value] − log|det J||``: 0 where it is exact. Of a series it is a number only
            where a Lipschitz constant below 1 is proven, and 0 there if the series is unbiased; else NaN, since the
            series may diverge.
        finite_variance: true where the variance is proven to be finite. Of a series of random length it is None without
            a proven Lipschitz constant, and false where the constant is too large for a proof.
        n_vjps: vector–Jacobian products that it took.
    """

    value: Tensor
    standard_error: Tensor
    bias_bound: float = math.nan
    finite_variance: bool | None = None
    n_vjps: int = 0

    @classmethod
    def exactly(cls, value: Tensor, n_vjps: int = 0) -> LogDet:
        """A value without an error."""
        return cls(value, torch.zeros_like(value.detach()), 0.0, True, n_vjps)

    def plus(self, other: LogDet) -> LogDet:
        """The log-determinant of two maps one after the other, estimated independently."""
        known = (self.finite_variance, other.finite_variance)
        return LogDet(
            self.value + other.value,
            torch.hypot(self.standard_error, other.standard_error),
            self.bias_bound + other.bias_bound,
            False if False in known else None if None in known else True,
            self.n_vjps + other.n_vjps,
        )


class Estimator(Protocol):
    """Estimates log|det(I + J_g)| at x while it evaluates g there.

    A call takes the branch g, which treats samples independently, and x (B, ...), and returns g(x) with the
    :class:`LogDet`. ``lipschitz`` is a proven Lipschitz constant of g, None without one (NaN proves nothing either);
    ``assumed`` is one that nothing proves, which may steer the effort and supports no claim.
    """

    def __call__(
        self,
        g: Callable[[Tensor], Tensor],
        x: Tensor,
        *,
        lipschitz: float | None = None,
        assumed: float | None = None,
    ) -> tuple[Tensor, LogDet]:
        """g(x) and the log-determinant there."""
