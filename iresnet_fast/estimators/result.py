"""What an estimator of a log-determinant returns, and what it is."""

from __future__ import annotations

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
        bias_bound: proven bound of ``|E[value] − log|det J||``: 0 where it is exact or unbiased; NaN for a truncated
            series without a proven Lipschitz constant.
        finite_variance: whether the variance is proven to be finite; None without a proven Lipschitz constant.
        n_vjps: vector–Jacobian products that it took.
    """

    value: Tensor
    standard_error: Tensor
    bias_bound: float = 0.0
    finite_variance: bool | None = True
    n_vjps: int = 0

    @classmethod
    def exactly(cls, value: Tensor, n_vjps: int = 0) -> LogDet:
        """A value without an error."""
        return cls(value, torch.zeros_like(value.detach()), n_vjps=n_vjps)

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
    :class:`LogDet`. ``lipschitz`` is a proven Lipschitz constant of g, None without one; ``assumed`` one that nothing
    proves, which may steer the effort and supports no claim.
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
