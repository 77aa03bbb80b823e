"""What an inverse returns, and the error it raises rather than return a wrong x."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops._fixed_point import FixedPoint
from .precision import evaluation_precision
from .rule import StoppingRule


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
        residual: (B,) ‖y − g(x̂) − x̂‖ of the last evaluated iterate x̂. Without a Lipschitz constant x is x̂, with one
            the closer y − g(x̂). Where a proof was tried, that of x in float64, before it was rounded to y's dtype.
        error_bound: (B,) float64, proven bound of the distance to the exact x, rounding included: that of g in exact
            arithmetic, with the normalized weights in use. NaN where nothing is proven.
        iterations: (B,) int64, steps taken in the precision of g until the sample was frozen.
        evaluations: (B,) int64, evaluations of g for the sample; more than ``iterations`` where Anderson's mixed
            steps were tried and not accepted.
        converged: (B,) bool, whether the residual of x is at most tol·max(1, ‖y‖), or the sample is certified.
        certified: (B,) bool, whether error_bound is at most tol·max(1, ‖x‖) for every x within it.
        proof_evaluations: (B,) int64, evaluations of g in float64.
        lipschitz: the constant that the bound is made of, None without one.
        precision: in which g was evaluated: the dtype of y, or less under autocast or TF32.
        method: ``"anderson"`` or ``"picard"``.
        path: what ran the iteration: ``"general"``, or the op that inverted the whole block in one call,
            ``"mlp_inverse"`` or ``"bottleneck_inverse"``.
        reason: why that path.
        unproven: why no sample is certified; None where a proof was tried.
    """

    x: Tensor
    residual: Tensor
    error_bound: Tensor
    iterations: Tensor
    evaluations: Tensor
    converged: Tensor
    certified: Tensor
    proof_evaluations: Tensor
    lipschitz: float | None
    precision: str
    method: str
    path: str
    reason: str
    unproven: str | None


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


def conclude(solution: FixedPoint, y: Tensor, rule: StoppingRule, *, path: str, reason: str) -> InverseResult:
    """Say what is known of a solution of x + g(x) = y without a proof."""
    return InverseResult(
        *solution[:2],
        error_bound=torch.full_like(solution.residual, math.nan, dtype=torch.float64),
        iterations=solution.iterations,
        evaluations=solution.evaluations,
        converged=solution.converged,
        certified=torch.zeros_like(solution.converged),
        proof_evaluations=torch.zeros_like(solution.evaluations),
        lipschitz=rule.lipschitz,
        precision=evaluation_precision(y).name,
        method=rule.method,
        path=path,
        reason=reason,
        unproven="no proof was asked for",
    )


def report_failure(result: InverseResult, y: Tensor, rule: StoppingRule) -> None:
    """Raise or warn, as the rule says, where a sample did not converge.

    Raises:
        NotConvergedError: it holds the result.
    """
    if rule.on_failure == "return" or bool(result.converged.all()):
        return
    message = _explain_failure(result, y, rule)
    if rule.on_failure == "raise":
        raise NotConvergedError(message, result)
    warnings.warn(message, stacklevel=4)


def _explain_failure(result: InverseResult, y: Tensor, rule: StoppingRule) -> str:
    """What did not converge, how far it came, and what to do about it."""
    failed = (~result.converged).nonzero().flatten().tolist()
    named = ", ".join(map(str, failed[:5])) + (", …" if len(failed) > 5 else "")
    sizes = sample_norms(y.detach())
    relative = (result.residual / sizes.clamp_min(1.0))[failed]
    remedies = []
    if rule.max_iterations is not None and int(result.iterations.max()) >= rule.max_iterations:
        remedies.append("a larger max_iterations")
    if rule.lipschitz is None:
        remedies.append(
            "a branch that contracts: certify(model) shows its Lipschitz bound, enforce(model) or a smaller coeff "
            "lowers it"
        )
    if not bool(torch.isfinite(relative).all() & torch.isfinite(sizes).all()):
        remedies.append("inputs and weights without NaN, infinite or overflowing values")
    remedies.append(f"a larger tol, or float64 if rounding in {result.precision} is the limit")
    known = "none" if rule.lipschitz is None else f"{rule.lipschitz:.6g}"
    return (
        f"{len(failed)} of {len(y)} samples did not converge (samples {named}): largest relative residual "
        f"{float(relative.max()):.3g} after {int(result.iterations.max())} iterations, tol={rule.tolerance:.3g}, "
        f"proven Lipschitz constant {known}. Remedy: {'; or '.join(remedies)}. The iterates are in the error's .result."
    )
