"""What an inverse returns, and the error it raises rather than return a wrong x."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops._fixed_point import FixedPoint
from .precision import evaluation_precision

# Rounding of one evaluation of y − g(x), in eps of the larger of ‖x‖ and ‖y‖; part of every reported bound.
ROUNDING = 4


def sample_norms(x: Tensor) -> Tensor:
    """Euclidean norm of each sample: (B, ...) to (B,), in float32 for low precision, else in x's dtype."""
    axes = tuple(range(1, x.dim()))
    return torch.linalg.vector_norm(x, dim=axes, dtype=torch.promote_types(x.dtype, torch.float32))


def relative_errors(found: Tensor, exact: Tensor) -> Tensor:
    """‖x̂ − x‖/‖x‖ of each sample: (B, ...) and (B, ...) to (B,); the papers' normalised error, infinite for NaN."""
    return (sample_norms(found - exact) / sample_norms(exact)).nan_to_num(nan=math.inf, posinf=math.inf)


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
        method: ``"anderson"`` or ``"picard"``.
        path: what ran the iteration: ``"general"``, or the op that inverted the whole block in one call,
            ``"mlp_inverse"`` or ``"bottleneck_inverse"``.
        reason: why that path.
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
    method: str
    path: str
    reason: str


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


def conclude(
    solution: FixedPoint,
    y: Tensor,
    *,
    tol: float,
    lipschitz: float | None,
    max_iterations: int | None,
    method: str,
    on_failure: str,
    path: str,
    reason: str,
) -> InverseResult:
    """What is known of a solution of x + g(x) = y; raises or warns, as ``on_failure`` says, if it did not converge."""
    precision = evaluation_precision(y)
    proven = lipschitz is not None and precision.eps <= torch.finfo(y.dtype).eps
    if lipschitz is None:
        bound = torch.full_like(solution.residual, math.nan)
    else:
        rounding = ROUNDING * precision.eps * torch.maximum(sample_norms(solution.x), sample_norms(y))
        bound = (lipschitz * solution.residual + rounding) / (1 - lipschitz)
    result = InverseResult(
        *solution[:2],
        error_bound=bound,
        iterations=solution.iterations,
        evaluations=solution.evaluations,
        converged=solution.converged,
        certified=solution.converged.clone() if proven else torch.zeros_like(solution.converged),
        lipschitz=lipschitz,
        precision=precision.name,
        method=method,
        path=path,
        reason=reason,
    )
    if on_failure != "return" and not bool(result.converged.all()):
        message = _explain_failure(result, y, tol, lipschitz, max_iterations)
        if on_failure == "raise":
            raise NotConvergedError(message, result)
        warnings.warn(message, stacklevel=4)
    return result


def _explain_failure(
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
