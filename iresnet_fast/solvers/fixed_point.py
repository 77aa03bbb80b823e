"""The inverse of x + g(x) by fixed-point iteration, certified sample by sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops._fixed_point import FixedPoint
from ..ops.fixed_point_update import fused_steps
from .arguments import check_image
from .finish import ExactBranch, prove
from .iteration import Iteration
from .result import InverseResult, conclude, report_failure, sample_norms
from .rule import StoppingRule

if TYPE_CHECKING:
    from ..kernels.fixed_point_steps import FusedSteps

# The batch is made smaller once this share of it has converged: moving the others costs a few passes over them.
_WORTH_COMPACTING = 0.25


def invert_residual(
    g: Callable[[Tensor], Tensor],
    y: Tensor,
    *,
    tol: float | None = None,
    max_iterations: int | None = None,
    lipschitz: float | None = None,
    x0: Tensor | None = None,
    method: str = "anderson",
    on_failure: str = "raise",
    patience: int = 20,
    compact: bool | None = None,
) -> InverseResult:
    """Solve x + g(x) = y for x by fixed-point iteration on x = y − g(x) (Behrmann et al. 2019, Algorithm 1).

    Every sample stops by its own rule, so a result does not depend on what else is in the batch. A sample converges
    when its residual is at most tol·max(1, ‖y‖). With a Lipschitz constant L it goes on until its error is, too, by
    ‖x* − x‖ ≤ ‖y − g(x) − x‖/(1 − L) (Banach), or until the precision of g lets the residual fall no further. A
    residual that stops falling above the tolerance (rounding, or a g that does not contract) is *not converged*.

    In float64 a sample is certified where that bound, with the rounding of y − g(x), is at most tol·max(1, ‖x‖).
    In other dtypes nothing is proven of a callable, which cannot be evaluated in float64:
    :meth:`iresnet_fast.nn.InvertibleResidualBlock.solve_inverse` can.

    g is evaluated in the precision that PyTorch is set to: inside ``torch.autocast`` or with TF32 it is another
    function, and its inverse is that of a forward under the same settings. The result names the precision.

    On a GPU the host does not wait for the device between iterations: it reads whether all have converged late, by one
    iteration at first and by at most a quarter of them in long solves.

    Args:
        g: residual branch, (B', ...) to (B', ...) for any number of samples B'; evaluated without gradients. It must
            treat samples independently (no batch normalization in training mode).
        y: (B, ...) outputs of the block, of floating point.
        tol: relative tolerance, at least 4·eps of y's dtype. Default: as in :class:`StoppingRule`.
        max_iterations: limit of steps per sample. Default: the a-priori bound that L gives, 1000 without L.
        lipschitz: proven Lipschitz constant L of g, 0 ≤ L < 1; None where there is no proof.
        x0: (B, ...) start of the iteration, for instance the solution of a similar problem; default y.
        method: ``"anderson"`` mixes each step with the one before it where that provably does no harm; ``"picard"``
            is the papers' iteration.
        on_failure: ``"raise"`` a :class:`NotConvergedError`, ``"warn"``, or ``"return"`` silently, where a sample does
            not converge.
        patience: evaluations without a smaller residual after which a sample has stalled. (Branches that are not
            normal matrices can let the residual rise for a while before it falls.)
        compact: whether samples that converged leave the batch that g is given. Default: on a CPU. False for a g
            that is made for the whole batch.

    Returns:
        The :class:`InverseResult`; its fields are per sample. It is detached from the autograd graph.

    Raises:
        TypeError: y is not a floating-point tensor, or g returns another shape or dtype.
        ValueError: a tolerance below the floor of the dtype, a Lipschitz constant outside [0, 1), a wrong x0.
        NotConvergedError: samples did not converge and ``on_failure="raise"``.

    Example:
        >>> y = torch.tensor([[3.0], [1.5]])
        >>> invert_residual(lambda x: 0.5 * x, y, lipschitz=0.5).x
        tensor([[2.],
                [1.]])
    """
    if not callable(g):
        raise TypeError(f"g must be callable, got {type(g).__name__}")
    rule = StoppingRule(tol, max_iterations, lipschitz, method, patience, on_failure).for_(y, x0)
    result = iterate(g, y, rule, x0=x0, compact=compact)
    if lipschitz is not None and y.dtype == torch.float64:
        result = prove(result, y, ExactBranch(g), rule)
    elif lipschitz is not None:
        why = f"g is a callable, which is not evaluated in float64, and y is {y.dtype}"
        result = replace(result, unproven=why)
    report_failure(result, y, rule)
    return result


@torch.no_grad()
def iterate(
    g: Callable[[Tensor], Tensor],
    y: Tensor,
    rule: StoppingRule,
    *,
    x0: Tensor | None = None,
    compact: bool | None = None,
) -> InverseResult:
    """Iterate by a rule that was made for y, without a proof; whether all converged is for the caller to see."""
    compact = y.device.type == "cpu" if compact is None else compact
    # A copy: a branch that works in place must not reach the caller's tensor before it is found out.
    x = (y if x0 is None else x0).clone()
    options: dict[str, Any] = {"lipschitz": rule.lipschitz, "max_iterations": rule.max_iterations}
    options |= {"patience": rule.patience, "mixing": rule.method == "anderson"}
    if not compact and (steps := fused_steps(y, x, tol=rule.tolerance, **options)) is not None:
        solution = _run_fused(g, steps)
    else:
        # Infinite where ‖y‖ overflows, which no residual shows to be reached.
        threshold = rule.tolerance * sample_norms(y).clamp_min(1.0)
        record = _Record(y, takes_following=rule.lipschitz is not None)
        solution = _run(g, Iteration(y, x, threshold=threshold, **options), record, compact)
    return conclude(solution, y, rule, path="general", reason="g may be any callable")


def _run(g: Callable[[Tensor], Tensor], iteration: Iteration, record: _Record, compact: bool) -> FixedPoint:
    if compact:
        _run_compacting(g, iteration, record)
    else:
        _run_whole(g, iteration, record)
    return record.solution()


def _run_fused(g: Callable[[Tensor], Tensor], steps: FusedSteps) -> FixedPoint:
    """Iterate the whole batch by kernels that also freeze what is done."""
    late = _LateCheck(steps.x.device)
    while True:
        steps.advance(_image(g, steps.x))
        if late.says(steps.evaluations, steps.all_done):
            return FixedPoint(*steps.results())


def _run_compacting(g: Callable[[Tensor], Tensor], iteration: Iteration, record: _Record) -> None:
    """Iterate; samples that are done leave the batch, once there are enough of them."""
    positions = torch.arange(len(iteration.y), device=iteration.y.device)
    while len(iteration.y):
        iteration.advance(_image(g, iteration.x))
        if bool(iteration.newly_done.any()):
            record.write(iteration, iteration.newly_done, positions[iteration.newly_done])
            share = float(iteration.done.float().mean())
            if share > _WORTH_COMPACTING:
                remaining = ~iteration.done
                positions = positions[remaining]
                iteration.keep(remaining)


def _run_whole(g: Callable[[Tensor], Tensor], iteration: Iteration, record: _Record) -> None:
    """Iterate the whole batch until all of it is done, without waiting for the device."""
    late = _LateCheck(iteration.y.device)
    while len(iteration.y):
        iteration.advance(_image(g, iteration.x))
        record.merge(iteration)
        if late.says(iteration.evaluations, iteration.done.all):
            return


def _image(g: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    version = None if x.is_inference() else x._version
    return check_image(g(x), x, version)


class _LateCheck:
    """Whether all is done, asked one time late on a GPU so that the host need not wait for it."""

    def __init__(self, device: torch.device) -> None:
        self._is_late = device.type != "cpu"
        self._pending: _Flag | None = None

    def says(self, evaluations: int, all_done: Callable[[], Tensor]) -> bool:
        """Every evaluation at first, then after each eighth of those before."""
        if evaluations % max(1, evaluations // 8):
            return False
        now = _Flag(all_done())
        asked, self._pending = (self._pending if self._is_late else now), now
        return asked is not None and asked.read()


class _Flag:
    """A boolean of the device, copied to the host while the device goes on."""

    def __init__(self, value: Tensor) -> None:
        self._value, self._copied = value, None
        if value.device.type == "cuda":
            self._value = torch.empty((), dtype=torch.bool, pin_memory=True, device="cpu")
            self._value.copy_(value, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(value.device))

    def read(self) -> bool:
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._value)


class _Record:
    """The state in which each sample stopped."""

    def __init__(self, y: Tensor, takes_following: bool) -> None:
        self._y = y
        self._takes_following = takes_following
        norms = sample_norms(y)
        self._x = y
        self._residual = torch.full_like(norms, math.inf)
        self._iterations = torch.zeros(len(y), dtype=torch.int64, device=y.device)
        self._evaluations = torch.zeros_like(self._iterations)
        self._converged = torch.zeros(len(y), dtype=torch.bool, device=y.device)

    def write(self, iteration: Iteration, stopped: Tensor, positions: Tensor) -> None:
        """Keep the samples of the iteration in the mask at these positions of the batch."""
        if len(positions) == len(self._y):  # all at once: nothing to move
            self._x = self._solution_of(iteration)
        else:
            if self._x is self._y:
                self._x = self._y.clone()
            self._x[positions] = self._solution_of(iteration)[stopped]
        self._residual[positions] = iteration.residual[stopped]
        self._iterations[positions] = iteration.iterations[stopped]
        self._evaluations[positions] = iteration.evaluations
        self._converged[positions] = iteration.converged[stopped]

    def merge(self, iteration: Iteration) -> None:
        """Keep those that have just stopped, of an iteration that still has the whole batch."""
        new = iteration.newly_done
        wide = new.view((-1,) + (1,) * (self._y.dim() - 1))
        self._x = torch.where(wide, self._solution_of(iteration), self._x)
        self._residual = torch.where(new, iteration.residual, self._residual)
        self._iterations = torch.where(new, iteration.iterations, self._iterations)
        self._evaluations = torch.where(new, iteration.evaluations, self._evaluations)
        self._converged = iteration.converged

    def _solution_of(self, iteration: Iteration) -> Tensor:
        return iteration.following if self._takes_following else iteration.evaluated

    def solution(self) -> FixedPoint:
        x = self._x if self._x is not self._y else self._y.clone()
        return FixedPoint(x, self._residual, self._iterations, self._evaluations, self._converged)
