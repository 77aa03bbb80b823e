"""What an inverse returns, and the error it raises rather than return a wrong x."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Rounding of one evaluation of y − g(x), in eps of the larger of ‖x‖ and ‖y‖; part of every reported bound.
ROUNDING = 4


def sample_norms(x: Tensor) -> Tensor:
    """Euclidean norm of each sample: (B, ...) to (B,), in float32 for low precision, else in x's dtype."""
    axes = tuple(range(1, x.dim()))
    return torch.linalg.vector_norm(x, dim=axes, dtype=torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class InverseResult:
    """Solution of x + g(x) = y with what is known of it, sample by sample.

    Attributes:
        x: (B, ...) the solution; of y's shape, dtype and device.
        residual: (B,) ‖y − g(x̂) − x̂‖ of the last evaluated iterate x̂, in y's dtype. Without a proven Lipschitz
            constant x is x̂; with one, x is the closer y − g(x̂).
        error_bound: (B,) bound (L·residual + δ)/(1−L) of the distance to the true x; NaN without a proven Lipschitz
            constant. With δ = 0 it is proven in exact arithmetic. δ = 4·eps·max(‖x‖, ‖y‖), with the eps of
            ``precision``, allows for the rounding of one evaluation of y − g(x); a branch whose values inside are
            much larger than x rounds more.
        iterations: (B,) int64, steps taken until the sample was frozen.
        evaluations: (B,) int64, evaluations of g for the sample; more than ``iterations`` where Anderson's mixed
            steps were tried and not accepted.
        converged: (B,) bool, whether the stopping rule was met.
        certified: (B,) bool, converged by the bound that is proven in exact arithmetic, with g evaluated in the
            precision of y. The stopping rule leaves δ out: where L is close to 1, error_bound can exceed the
            tolerance, and says so.
        lipschitz: the constant that the bound is made of, None without one.
        precision: in which g was evaluated: the dtype of y, or less under autocast or TF32.
        path: which method solved it.
    """

    x: Tensor
    residual: Tensor
    error_bound: Tensor
    iterations: Tensor
    evaluations: Tensor
    converged: Tensor
    certified: Tensor
    lipschitz: float | None
    precision: str
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


def explain_failure(
    result: InverseResult, y: Tensor, tol: float, lipschitz: float | None, max_iterations: int | None
) -> str:
    """What did not converge, how far it came, and what to do about it."""
    failed = (~result.converged).nonzero().flatten().tolist()
    named = ", ".join(map(str, failed[:5])) + (", …" if len(failed) > 5 else "")
    relative = (result.residual / sample_norms(y).clamp_min(1.0))[failed]
    remedies = []
    if max_iterations is not None and int(result.iterations.max()) >= max_iterations:
        remedies.append("a larger max_iterations")
    if lipschitz is None:
        remedies.append(
            "a branch that contracts: certify(model) shows its Lipschitz bound, enforce(model) or a smaller coeff "
            "lowers it"
        )
    if not bool(torch.isfinite(relative).all() & torch.isfinite(sample_norms(y)).all()):
        remedies.append("inputs and weights without NaN, infinite or overflowing values")
    remedies.append(f"a larger tol, or float64 if rounding in {result.precision} is the limit")
    known = "none" if lipschitz is None else f"{lipschitz:.6g}"
    return (
        f"{len(failed)} of {len(y)} samples did not converge (samples {named}): largest relative residual "
        f"{float(relative.max()):.3g} after {int(result.iterations.max())} iterations, tol={tol:.3g}, proven "
        f"Lipschitz constant {known}. Remedy: {'; or '.join(remedies)}. The iterates are in the error's .result."
    )
