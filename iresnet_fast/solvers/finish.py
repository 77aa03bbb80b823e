"""The float64 finish: prove how far an inverse is from the exact one, and go on in float64 where it is too far."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .iteration import Iteration
from .precision import evaluation_precision
from .result import InverseResult, sample_norms
from .rounding import TINY, UNIT, NoErrorModelError, WatchedFunction
from .rule import StoppingRule

# Evaluations in float64 without a smaller residual after which a sample has stalled.
PATIENCE = 6
# Of the constant by which steps are accepted: a branch that is constant is solved by one step, which must be taken.
_LEAST = 1e-3
# Bytes of x that a CPU evaluates together: more take 1.2 times as long (7-7-7 network, 40 images).
_SLICE = 2 << 20
# A residual below this share of the bound of its rounding has nothing to gain.
_NEGLIGIBLE = 0.125


class Evaluated(NamedTuple):
    """A branch g at x (B, ...), in float64.

    Attributes:
        image: (B, ...) g(x).
        rounding: (B,) bound of its error.
    """

    image: Tensor
    rounding: Tensor


class Finished(NamedTuple):
    """Where the finish has left each sample.

    Attributes:
        x: (B, ...) float64.
        residual: (B,) ‖y − g(x) − x‖.
        error_bound: (B,) proven bound of the distance to the exact inverse of y.
        evaluations: (B,) int64, evaluations of g in float64.
    """

    x: Tensor
    residual: Tensor
    error_bound: Tensor
    evaluations: Tensor


@torch.no_grad()
def prove(result: InverseResult, y: Tensor, g: ExactBranch | str, rule: StoppingRule) -> InverseResult:
    """Certify what an inverse has found, sample by sample; go on in float64 where it is not near enough.

    Args:
        result: of the iteration in y's dtype.
        y: (B, ...) outputs of the block.
        g: its branch in float64, or why there is none.
        rule: of the iteration; its Lipschitz constant is proven.

    Returns:
        The result with error bounds. Where float64 came nearer, x is its solution, rounded to y's dtype.
    """
    lipschitz = rule.lipschitz
    if lipschitz is None:
        return replace(result, unproven="no Lipschitz constant of the branch below 1 is proven")
    if why := reduced_precision(y):
        return replace(result, unproven=why)
    if isinstance(g, str):
        return replace(result, unproven=g)
    start, target = result.x.to(torch.float64), y.to(torch.float64)
    # What is_certified accepts of an x of this norm, less the rounding to y's dtype.
    share = rule.tolerance / (1 + rule.tolerance) - rounding_to(y.dtype)
    allowed = share * sample_norms(start).clamp_min(1.0)
    try:
        done = g.finish(target, start, lipschitz, allowed, steps=steps_left(result, rule.max_iterations))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of the branch: a missing proof never raises
        return replace(result, unproven=why_unproven(error))
    x = done.x.to(y.dtype)
    moved = sample_norms(done.x - x.to(torch.float64))
    bound = rounded_up(done.error_bound + moved, x)
    usable = torch.isfinite(bound)
    x = torch.where(usable.view(-1, *(1,) * (y.dim() - 1)), x, result.x)
    certified = is_certified(bound, sample_norms(done.x), rule.tolerance)
    return replace(
        result,
        x=x,
        residual=torch.where(usable, done.residual.to(result.residual.dtype), result.residual),
        error_bound=torch.where(usable, bound, math.nan),
        converged=result.converged | certified,
        certified=certified,
        proof_evaluations=done.evaluations,
        unproven=None,
    )


def why_unproven(error: Exception) -> str:
    """Say why a function has no value in float64 with a bound of its error."""
    if isinstance(error, NoErrorModelError):
        return str(error)
    return f"not evaluated in float64: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def steps_left(result: InverseResult, max_iterations: int | None) -> Tensor | None:
    """Return how many steps (B,) a limit leaves after an inverse; None without a limit."""
    return None if max_iterations is None else (max_iterations - result.iterations).clamp_min(0)


def is_certified(bound: Tensor, size: Tensor, tol: float) -> Tensor:
    """Return where a bound of the error is at most tol·max(1, ‖x‖) for every x within it; size (B,) is that of x̂."""
    # A billionth covers the rounding of the norm and of these products.
    return bound * (1 + 1e-9) <= tol * (size * (1 - 1e-9) - bound).clamp_min(1.0)


def rounded_up(bound: Tensor, x: Tensor, steps: int = 1) -> Tensor:
    """Return a bound (B,) with the rounding of what it was computed by: norms of samples of x, and a few operations."""
    return bound * (1 + steps * (x[:1].numel() + 16) * UNIT)


def reduced_precision(y: Tensor) -> str | None:
    """Say why an inverse of y is that of another function than the one in its dtype; None where it is not."""
    precision = evaluation_precision(y).name
    own = str(y.dtype).removeprefix("torch.")
    return None if precision == own else f"g is evaluated as PyTorch does in {precision}"


def rounding_to(dtype: torch.dtype) -> float:
    """Return how far rounding from float64 moves a sample, relative to its norm."""
    return 0.0 if dtype == torch.float64 else torch.finfo(dtype).eps / 2


class Measured(NamedTuple):
    """A branch at x, and how far x is from the exact inverse of y.

    Attributes:
        residual: (B,) ‖y − g(x) − x‖.
        rounding: (B,) bound of its rounding.
        error_bound: (B,) proven bound of the distance to the exact inverse: ‖x* − x‖ ≤ ‖y − g(x) − x‖/(1 − L).
        at: the branch at x, where it is known.
    """

    residual: Tensor
    rounding: Tensor
    error_bound: Tensor
    at: Evaluated | None


class ExactBranch(WatchedFunction):
    """A residual branch g in float64, and what it takes to prove an inverse of x + g(x)."""

    def evaluate(self, x: Tensor) -> Evaluated:
        """Evaluate g at x (B, ...), outside of autocast; on a CPU in slices that stay in its cache."""
        size = x[:1].numel() * x.element_size()
        slices = x.split(max(1, _SLICE // size)) if x.device.type == "cpu" and size else (x,)
        with torch.autocast(x.device.type, enabled=False):
            parts = [Evaluated(*self(part)) for part in slices]
        return parts[0] if len(parts) == 1 else Evaluated(*(torch.cat(values) for values in zip(*parts, strict=True)))

    @torch.no_grad()
    def measure(self, y: Tensor, x: Tensor, lipschitz: float) -> Measured:
        """Bound the distance of x to the exact inverse of y by one evaluation of g.

        Args:
            y: (B, ...) float64.
            x: (B, ...) float64.
            lipschitz: proven constant of g below one.

        Raises:
            NoErrorModelError: nothing bounds the rounding of g.
        """
        return _measure(y, x, self.evaluate(x), lipschitz)

    @torch.no_grad()
    def finish(
        self,
        y: Tensor,
        x: Tensor,
        lipschitz: float,
        goal: Tensor,
        at: Evaluated | None = None,
        steps: Tensor | None = None,
    ) -> Finished:
        """Iterate in float64 until the proven bound is at most the goal, or rounding lets it fall no further.

        Args:
            y: (B, ...) float64, taken as exact.
            x: (B, ...) float64, near the solution.
            lipschitz: proven constant of g below one.
            goal: (B,) what error bounds are to reach.
            at: the branch at x, where it is known.
            steps: (B,) int64, limit of steps. Default: the a-priori bound that L gives.

        Raises:
            NoErrorModelError: nothing bounds the rounding of g.
        """
        unknown = torch.full_like(goal, math.inf)
        contraction = max(lipschitz, _LEAST)
        best = Finished(x.clone(), unknown, unknown.clone(), torch.zeros_like(goal, dtype=torch.int64))
        iteration = Iteration(
            y,
            x,
            threshold=contraction * (1 - contraction) / 2 * goal,
            lipschitz=contraction,
            max_iterations=None if steps is None else steps + 1,  # the first evaluation counts as one
            patience=PATIENCE,
            mixing=True,
        )
        positions = torch.arange(len(y), device=y.device)
        while len(positions):
            x = iteration.x
            if at is None:
                at = self.evaluate(x)
                best.evaluations[positions] += 1
            found = _measure(iteration.y, x, at, lipschitz)
            better = found.error_bound < best.error_bound[positions]
            _write(best.x, positions, x, better)
            _write(best.residual, positions, found.residual, better)
            _write(best.error_bound, positions, found.error_bound, better)
            iteration.advance(at.image)
            at = None
            stopped = iteration.done | (found.error_bound <= goal[positions])
            stopped = stopped | (found.residual <= _NEGLIGIBLE * found.rounding)
            if bool(stopped.any()):
                positions = positions[~stopped]
                iteration.keep(~stopped)
        return best


def _measure(y: Tensor, x: Tensor, at: Evaluated, lipschitz: float) -> Measured:
    step = y - x
    residual = sample_norms(step - at.image)
    rounding = at.rounding + UNIT * (sample_norms(step) + residual) + TINY
    bound = rounded_up((residual + rounding) / (1 - lipschitz), x)
    return Measured(residual, rounding, bound, at)


def _write(target: Tensor, positions: Tensor, values: Tensor, mask: Tensor) -> None:
    if len(positions) == len(target) and bool(mask.all()):
        target.copy_(values)
    else:
        target[positions[mask]] = values[mask]
