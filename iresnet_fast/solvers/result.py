"""What an inverse returns, and the error it raises rather than return a wrong x."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class InverseResult:
    """Solution of x + g(x) = y with what is known of it, sample by sample.

    Attributes:
        x: (B, ...) the solution; of y's shape, dtype and device.
        residual: (B,) ‖y − g(x̂) − x̂‖ of the last evaluated iterate x̂, in y's dtype. Without a proven Lipschitz
            constant x is x̂; with one, x is the closer y − g(x̂).
        error_bound: (B,) bound (L·residual + δ)/(1−L) of the distance to the true x; NaN without a proven Lipschitz
            constant. With δ = 0 it is proven in exact arithmetic. δ = 4·eps·max(‖x‖, ‖y‖) allows for the rounding of
            one evaluation of y − g(x); a branch whose values inside are much larger than x rounds more.
        iterations: (B,) int64, steps taken until the sample was frozen.
        evaluations: how often g was called (on the samples still active).
        converged: (B,) bool, whether the stopping rule was met.
        certified: (B,) bool, converged by the bound that is proven in exact arithmetic. The stopping rule leaves δ
            out: where L is close to 1, error_bound can exceed the tolerance, and says so.
        path: which implementation solved it.
    """

    x: Tensor
    residual: Tensor
    error_bound: Tensor
    iterations: Tensor
    evaluations: int
    converged: Tensor
    certified: Tensor
    path: str


class NotConvergedError(RuntimeError):
    """The inverse did not reach its tolerance.

    Attributes:
        result: the :class:`InverseResult` with the iterates as they were left.
    """

    def __init__(self, message: str, result: InverseResult) -> None:
        super().__init__(message)
        self.result = result

    def __reduce__(self) -> tuple[type[NotConvergedError], tuple[str, InverseResult]]:
        return type(self), (str(self), self.result)
