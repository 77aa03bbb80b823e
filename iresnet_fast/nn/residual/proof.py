"""Prove how far the inverse of a chain is from the exact one, end to end."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...solvers import Evaluated, ExactBranch, InverseResult, WatchedFunction, sample_norms
from ...solvers.finish import (
    is_certified,
    reduced_precision,
    rounded_up,
    rounding_to,
    steps_left,
    why_unproven,
)
from ...solvers.rounding import TINY, UNIT
from ..bijections.base import Bijection, proven_constants
from ..bijections.injective_pad import InjectivePad
from ..bijections.split import Split
from .block import InvertibleResidualBlock
from .exact import exact_copy

# Share of the tolerance that the residuals of all blocks may use up together.
_SHARE = 0.5
# In place of the constant 0 of a map that forgets its input: what comes before it may be as inexact as it likes.
_LEAST_GROWTH = 1e-300


@dataclass
class Step:
    """One module of a chain as its inverse has run.

    Attributes:
        module: a residual block, a bijection between blocks, or a :class:`Split`.
        name: in the chain.
        y: (B, ...) what its inverse was given.
        x: (B, ...) what its inverse returned.
        result: of a block.
        rest: of a split, the steps of what is inside.
        obstacle: why nothing is proven of it.
    """

    module: nn.Module
    name: str
    y: Tensor
    x: Tensor
    result: InverseResult | None = None
    rest: list[Step] = field(default_factory=list)
    obstacle: str | None = None
    # In float64: of a block its constant, branch, and that at x; of a link its copy, and its inverse's constant.
    lipschitz: float = math.nan
    exact: WatchedFunction | None = None
    link: Any = None
    at: Evaluated | None = None

    @property
    def growth(self) -> float:
        """How much the inverse can stretch the error of what goes into it."""
        if isinstance(self.module, Split):
            return max(1.0, math.prod(step.growth for step in self.rest))
        return 1 / (1 - self.lipschitz) if self.result is not None else self.lipschitz


class ChainProof(NamedTuple):
    """What is proven of a chain's inverse.

    Attributes:
        x: (B, ...) the solution in the dtype of y; that of float64, rounded, where it was needed.
        error_bound: (B,) float64, of the distance to the exact x; NaN where nothing is proven.
        certified: (B,) whether it is at most tol·max(1, ‖x‖).
        block_certified: (B,) whether each block's own solve is, for the y that it was given.
        growth: how much the inverse can stretch an error of y; None where it is not proven.
        unproven: why samples are not certified; None where all are.
    """

    x: Tensor
    error_bound: Tensor
    certified: Tensor
    block_certified: Tensor
    growth: float | None
    unproven: str | None


@torch.no_grad()
def prove_chain(steps: list[Step], y: Tensor, tol: float, max_iterations: int | None = None) -> ChainProof:
    """Bound the error of a chain's inverse end to end.

    The distance of each module's input to the exact one is at most (E + ‖r‖ + ρ) times the constant of its inverse: E
    bounds the distance of its output, r is the residual of the module in float64, and ρ bounds the rounding of r. One
    evaluation of each block in float64 gives r and ρ. Where that is not enough, and rounding alone lets the bound
    reach the tolerance, the blocks are solved again in float64, the last one first.

    Args:
        steps: of the inverse that has run, the last module first.
        y: (B, ...) what was inverted.
        tol: relative tolerance.
        max_iterations: limit of steps in each block, those in float64 among them.
    """
    x = steps[-1].x.detach() if steps else y
    size = sample_norms(x.to(torch.float64)).clamp_min(1.0)
    nothing, none = torch.full_like(size, math.nan), torch.zeros_like(size, dtype=torch.bool)
    if why := reduced_precision(y):
        return ChainProof(x, nothing, none, none, None, why)
    _prepare(steps)
    found = _obstacles(steps)
    growth = math.prod(step.growth for step in steps)
    # Where one unit of rounding grows beyond the tolerance, what is evaluated serves no second pass.
    run = _Bounds(tol, len(y), y.device, keeps_images=growth * UNIT <= tol)
    run.pass_at_found(steps, y.detach().to(torch.float64))
    block_certified = run.block_certified
    if run.obstacle is not None:
        found.append(run.obstacle)
    if found:
        return ChainProof(x, nothing, none, block_certified, None, found[0])
    bound = rounded_up(run.error, x, 2 * len(steps))
    certified = is_certified(bound, size, tol)
    reachable = is_certified(run.floor + rounding_to(y.dtype) * size, size, tol) & ~certified
    why = None
    if bool(reachable.any()):
        rows = reachable.nonzero().flatten()
        sweep = _Sweep(rows, tol, size[rows], max(1, _count(steps)), max_iterations)
        try:
            finer, far = sweep.run(steps, y[rows].detach().to(torch.float64), 1.0, torch.zeros_like(size[rows]))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of a module: a missing proof never raises
            why = why_unproven(error)
        else:
            near = finer.to(y.dtype)
            far = rounded_up(far + sample_norms(finer - near.to(torch.float64)), x, 2 * len(steps))
            better = far < bound[rows]
            x, bound = x.clone(), bound.clone()
            x[rows[better]], bound[rows[better]] = near[better], far[better]
            certified = is_certified(bound, sample_norms(x.to(torch.float64)), tol)
    bound = torch.where(torch.isfinite(bound), bound, math.nan)
    why = why or _why(certified, reachable, run.floor / size, growth, tol)
    return ChainProof(x, bound, certified, block_certified, growth, why)


def _why(certified: Tensor, reachable: Tensor, floor: Tensor, growth: float, tol: float) -> str | None:
    if bool(certified.all()):
        return None
    known = floor[~certified & torch.isfinite(floor)]
    if not len(known):
        return "values are not finite, or outside of the chain's range"
    if bool(reachable[~certified].all()):
        return f"the float64 solution did not reach tol={tol:.3g} with errors that grow up to {growth:.3g} times"
    return (
        f"errors can grow {growth:.3g} times on the way through the chain's inverse (the product of 1/(1 - L) of its "
        f"blocks): float64 rounding alone then reaches {float(known.max()):.3g}, relative, above tol={tol:.3g}"
    )


def _prepare(steps: list[Step]) -> None:
    """Find constants and float64 functions of all modules, or what is in the way."""
    for step in steps:
        module = step.module
        if step.obstacle is not None:
            continue
        if isinstance(module, Split):
            _prepare(step.rest)
        elif isinstance(module, InvertibleResidualBlock):
            constant, exact = module.exact_branch(step.y)
            if constant is None:
                step.obstacle = "its branch has no proven Lipschitz constant below 1"
            elif isinstance(exact, str):
                step.obstacle = exact
            else:
                step.lipschitz, step.exact = constant, exact
        else:
            _prepare_link(step)


def _prepare_link(step: Step) -> None:
    assert isinstance(step.module, Bijection)
    try:
        constant = proven_constants(step.module)[1]
        step.link = exact_copy(step.module)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of a user's class: a missing proof never raises
        step.obstacle = f"{type(error).__name__}: {error}"
        return
    if constant is None:
        step.obstacle = "its inverse has no proven Lipschitz constant"
    else:
        # Ours ask whether values are in their domain, and raise; here that has been asked before.
        ours = type(step.module).__module__.startswith("iresnet_fast.")
        step.lipschitz, step.exact = constant, WatchedFunction(step.link, checks=ours)


def _obstacles(steps: list[Step]) -> list[str]:
    found = []
    for step in steps:
        if step.obstacle is not None:
            found.append(f"{step.name} ({type(step.module).__name__}): {step.obstacle}")
        found += _obstacles(step.rest)
    return found


class _Bounds:
    """The pass over the activations that were found.

    Attributes:
        error: (B,) bound of the distance to the exact activation.
        floor: (B,) what rounding in float64 alone makes of it.
        block_certified: (B,) so far.
        obstacle: what has no error model.
    """

    def __init__(self, tol: float, samples: int, device: torch.device, *, keeps_images: bool) -> None:
        self._tol, self._keeps_images = tol, keeps_images
        self.error = torch.zeros(samples, dtype=torch.float64, device=device)
        self.floor = self.error
        self.block_certified = torch.ones(samples, dtype=torch.bool, device=device)
        self.obstacle: str | None = None

    def pass_at_found(self, steps: list[Step], y: Tensor) -> None:
        """Go through the steps, the last module first, from y (B, ...) in float64."""
        for step in steps:
            x = step.x.detach().to(torch.float64)
            try:
                self._pass(step, x, y)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of the module: a missing proof never raises
                why = f"{step.name} ({type(step.module).__name__}): {why_unproven(error)}"
                self.obstacle = self.obstacle or why
                if step.result is not None:
                    self.block_certified = torch.zeros_like(self.block_certified)
            y = x

    def _pass(self, step: Step, x: Tensor, y: Tensor) -> None:
        if isinstance(step.module, Split):
            latents, _ = step.module.parts_of_latents(y)
            before, floor = self.error, self.floor
            self.pass_at_found(step.rest, latents)
            self.error, self.floor = torch.hypot(before, self.error), torch.hypot(floor, self.floor)
            return
        if step.exact is None:
            if step.result is not None:
                step.result = replace(step.result, unproven=step.obstacle)
                self.block_certified = torch.zeros_like(self.block_certified)
            return
        if isinstance(step.module, InjectivePad):
            self.error = _error_of_pad(step.module, y, self.error, self._tol)
            return
        if step.result is None:
            residual, rounding = _link_residual(step, x, y)
            self.error = (self.error + residual + rounding) * step.lipschitz
            self.floor = (self.floor + rounding) * step.lipschitz
            return
        assert isinstance(step.exact, ExactBranch)
        residual, rounding, bound, at = step.exact.measure(y, x, step.lipschitz)
        step.at = at if self._keeps_images else None
        self.error = self.error * step.growth + bound
        self.floor = (self.floor + rounding) * step.growth
        certified = is_certified(bound, sample_norms(x), self._tol)
        self.block_certified = self.block_certified & certified
        ones = torch.ones_like(step.result.evaluations)
        step.result = replace(
            step.result,
            residual=residual.to(step.result.residual.dtype),
            error_bound=bound,
            certified=certified,
            converged=step.result.converged | certified,
            proof_evaluations=ones,
            unproven=None,
        )


def _error_of_pad(pad: InjectivePad, y: Tensor, error: Tensor, tol: float) -> Tensor:
    """Dropping channels rounds nothing; where they are not zero within the tolerance, no x maps to y: NaN."""
    excess = sample_norms(y[:, y.shape[1] - pad.channels :])
    return torch.where(excess <= tol * sample_norms(y).clamp_min(1.0), error, math.nan)


def _link_residual(step: Step, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Residual y − link(x) (B,) in float64, and the bound of its rounding; NaN where the link is not defined at x."""
    assert step.exact is not None
    outside = step.link.outside_domain(x)
    inside = slice(None) if outside is None or not bool(outside.any()) else ~outside
    image, rounding = step.exact(x[inside])
    residual = sample_norms(y[inside] - image)
    found = torch.full((2, len(x)), math.nan, dtype=x.dtype, device=x.device)
    found[:, inside] = torch.stack([residual, rounding + UNIT * residual + TINY])
    return found[0], found[1]


def _count(steps: list[Step]) -> int:
    """Residual blocks, those inside of splits among them."""
    return sum(_count(step.rest) + (step.result is not None) for step in steps)


class _Sweep:
    """Solve again in float64, from the last module to the first."""

    def __init__(self, rows: Tensor, tol: float, size: Tensor, blocks: int, max_iterations: int | None) -> None:
        self._rows, self._tol, self._max_iterations = rows, tol, max_iterations
        self._share = _SHARE * tol * size / blocks

    def run(self, steps: list[Step], y: Tensor, after: float, error: Tensor) -> tuple[Tensor, Tensor]:
        """Sweep a part of a chain.

        Args:
            steps: of the part.
            y: (b, ...) what it is to be inverted at, of these rows.
            after: how much what follows, towards the chain's input, stretches errors.
            error: (b,) bound of y's.

        Returns:
            The part's input (b, ...) in float64, and the bound of its error.
        """
        growths = [after]
        for step in reversed(steps):
            growths.append(growths[-1] * max(step.growth, _LEAST_GROWTH))
        for step, later in zip(steps, reversed(growths[:-1]), strict=True):
            y, error = self._module(step, y, later, error)
        return y, error

    def _module(self, step: Step, y: Tensor, after: float, error: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(step.module, Split):
            latents, factored = step.module.parts_of_latents(y)
            kept, inside = self.run(step.rest, latents, after, error)
            return step.module.join(kept, factored), torch.hypot(error, inside)
        assert step.exact is not None
        if step.result is None:
            if isinstance(step.module, InjectivePad):
                kept = step.module.inverse(y, on_failure="return")
                return kept, _error_of_pad(step.module, y, error, self._tol)
            x = step.link.inverse(y)
            residual, rounding = _link_residual(step, x, y)
            return x, (error + residual + rounding) * step.lipschitz
        assert isinstance(step.exact, ExactBranch)
        start = step.x[self._rows].detach().to(torch.float64)
        at = None if step.at is None else Evaluated(step.at.image[self._rows], step.at.rounding[self._rows])
        left = steps_left(step.result, self._max_iterations)
        left = None if left is None else left[self._rows]
        done = step.exact.finish(y, start, step.lipschitz, self._share / after, at, left)
        spent = step.result.proof_evaluations.clone()
        spent[self._rows] += done.evaluations
        step.result = replace(step.result, proof_evaluations=spent)
        return done.x, error * step.growth + done.error_bound
