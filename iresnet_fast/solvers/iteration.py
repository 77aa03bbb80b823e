"""The iterates of a batch: safeguarded Anderson mixing with memory 1, or plain Picard steps, sample by sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops.fixed_point_update import fixed_point_update
from ..reference.fixed_point import judge
from .result import sample_norms

# Room for rounding above the a-priori bound.
_SPARE_ITERATIONS = 20
# Iterations allowed where no Lipschitz constant is known to bound them.
_MAX_ITERATIONS = 1000
# A sample whose Picard steps shrink the residual to less than this share is left to them: mixing has little to gain.
_FAST = 0.1
# Longest run of Picard steps after mixed steps that were refused.
_LONGEST_BACKOFF = 64


class Iteration:
    """Samples that are solved side by side; each has a state, a step and a stop of its own.

    A step evaluates T(x) = y − g(x) at the iterate x, whose residual is f = T(x) − x. Picard's next iterate is T(x).
    Anderson's with memory 1 is T − θ(T − T'), where T' and f' belong to the iterate before and θ minimises
    ‖f − θ(f − f')‖ (Walker & Ni 2011). Such a mixed iterate is accepted only where its residual is at most L times
    the one before it (without L: smaller), else the sample goes on from T, as Picard would: every accepted step then
    contracts by L, and the a-priori bound of Picard's iteration bounds the accepted steps as well.

    Args:
        y: (B, ...) right-hand sides.
        x: (B, ...) first iterates, not aliased.
        threshold: (B,) tol·max(1, ‖y‖), what residuals and errors are to reach.
        lipschitz: proven constant of g, or None.
        max_iterations: limit of accepted steps, for all samples or (B,), or None for the a-priori one.
        patience: evaluations without a smaller residual after which a sample has stalled.
        mixing: Anderson instead of Picard.

    Attributes:
        x: (B, ...) where g is to be evaluated next.
        following: (B, ...) y − g(x) of the evaluation before.
        evaluated: (B, ...) the x of the evaluation before.
        residual: (B,) its residual.
        done: (B,) which samples have stopped; later steps are none of theirs.
        newly_done: (B,) which of them by the last step.
        converged: (B,) which met the stopping rule.
        iterations: (B,) accepted steps.
        evaluations: evaluations of g so far.
    """

    def __init__(
        self,
        y: Tensor,
        x: Tensor,
        *,
        threshold: Tensor,
        lipschitz: float | None,
        max_iterations: int | Tensor | None,
        patience: int,
        mixing: bool,
    ) -> None:
        self.y = y
        self.x = x
        self.following = self.evaluated = x
        self._wide = (-1,) + (1,) * (y.dim() - 1)  # of a number per sample beside the samples
        self.evaluations = 0
        self._lipschitz = lipschitz
        self._max_iterations = max_iterations
        self._patience = patience
        self._mixing = mixing
        self._threshold = threshold
        # Of one evaluation of T: a step that contracts by exactly L must not be refused for it.
        self._rounding = 4 * torch.finfo(y.dtype).eps * sample_norms(y).clamp_min(1.0)
        self.residual = torch.full_like(self._threshold, math.inf)
        self._best = self.residual
        # The last accepted iterate x', T' and ‖f'‖.
        self._origin, self._target, self._accepted = x, x, self.residual
        self.iterations = torch.zeros(len(y), dtype=torch.int64, device=y.device)
        self._limit = self._since_best = self._wait = self.iterations
        self._backoff = self.iterations + 1
        self._ever_refused = False
        self.done = torch.zeros(len(y), dtype=torch.bool, device=y.device)
        self.newly_done = self.converged = self._is_mixed = self.done

    def advance(self, image: Tensor) -> None:
        """Take g(x), decide which samples stop, and set the next iterates."""
        self.evaluated = self.x
        self.following, self.residual = fixed_point_update(self.y, image, self.x)
        if self.evaluations == 0:
            self._limit = self._iteration_limit()
        self.evaluations += 1
        shrunk = self.residual < self._accepted
        if self._lipschitz is not None:
            shrunk = self.residual <= self._lipschitz * self._accepted + self._rounding
        accepted = shrunk | ~self._is_mixed
        self.iterations = self.iterations + (accepted & ~self.done)
        self._stop(accepted)
        if self._mixing:
            self._mix(accepted)
        else:
            self.x = self.following

    def _stop(self, accepted: Tensor) -> None:
        self._since_best = torch.where(self.residual < self._best, 0, self._since_best + 1)
        self._best = torch.fmin(self._best, self.residual)  # a refused NaN is not the best
        met, stopped = judge(self.residual, self._threshold, self._since_best, self._lipschitz, self._patience)
        # A mixed iterate that left the domain of g is only refused.
        lost = accepted & ~(self.residual < math.inf)
        stopped = stopped | lost | (self.iterations >= self._limit)
        self.newly_done = stopped & ~self.done
        self.converged = torch.where(self.newly_done, met, self.converged)
        self.done = self.done | stopped

    def _mix(self, accepted: Tensor) -> None:
        """The next iterates, and what to remember of this one."""
        refused = ~accepted
        any_refused = _may_be_any(refused)
        self._ever_refused |= any_refused
        # After the first evaluation there is nothing to mix with: its ‖f'‖ is infinite.
        may_mix = accepted & (self._is_mixed | (self.residual > _FAST * self._accepted)) & ~self.done
        if self._ever_refused:
            may_mix = may_mix & self._count_down(refused)
        self._is_mixed = may_mix
        self.x = self.following
        if _may_be_any(may_mix):
            self.x = self._mixed()
        if any_refused:
            keep = refused.view(self._wide)
            self.x = torch.where(keep, self._target, self.x)
            self._origin = torch.where(keep, self._origin, self.evaluated)
            self._target = torch.where(keep, self._target, self.following)
            self._accepted = torch.where(refused, self._accepted, self.residual)
        else:
            self._origin, self._target, self._accepted = self.evaluated, self.following, self.residual

    def _count_down(self, refused: Tensor) -> Tensor:
        """Take one off each run of Picard steps; whether it is over. A refusal doubles the next, success halves it."""
        self._wait = torch.where(refused, self._backoff, (self._wait - 1).clamp_min(0))
        longer, shorter = (2 * self._backoff).clamp_max(_LONGEST_BACKOFF), (self._backoff // 2).clamp_min(1)
        self._backoff = torch.where(refused, longer, torch.where(self._is_mixed, shorter, self._backoff))
        return self._wait == 0

    def _mixed(self) -> Tensor:
        """T − θ(T − T') where a sample is to be mixed, T elsewhere."""
        dtype = self.residual.dtype
        step, before = (self.following - self.evaluated).to(dtype), (self._target - self._origin).to(dtype)
        along = (step * before).sum(dim=tuple(range(1, step.dim())))
        squared = self.residual.square()
        change = squared - 2 * along + self._accepted.square()
        # Where squares overflow or vanish there is nothing to go by.
        self._is_mixed = self._is_mixed & (change > 0) & (change < math.inf)
        theta = torch.where(self._is_mixed, (squared - along) / change, 0.0)
        mixed = torch.lerp(self.following, self._target, theta.view(self._wide).to(self.y.dtype))
        return torch.where(self._is_mixed.view(self._wide), mixed, self.following)

    def keep(self, mask: Tensor) -> None:
        """Drop the samples outside of the mask; the evaluation before is no longer known."""
        self.following = self.evaluated = self.x
        kept: dict[int, Tensor] = {}  # several names may stand for one tensor
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                if id(value) not in kept:
                    kept[id(value)] = value[mask]
                setattr(self, name, kept[id(value)])

    def _iteration_limit(self) -> Tensor:
        """Steps allowed per sample: a-priori Lⁿ/(1−L)·‖x¹ − x⁰‖ ≤ threshold with L, plus room for rounding."""
        if isinstance(self._max_iterations, Tensor):
            return self._max_iterations
        if self._max_iterations is not None or self._lipschitz is None:
            limit = _MAX_ITERATIONS if self._max_iterations is None else self._max_iterations
            return torch.full_like(self.iterations, limit)
        base = math.log(max(self._lipschitz, torch.finfo(torch.float64).tiny))
        needed = torch.log(self._threshold * (1 - self._lipschitz) / self.residual) / base
        return needed.nan_to_num(0.0, posinf=0.0, neginf=0.0).clamp_min(0).ceil().to(torch.int64) + _SPARE_ITERATIONS


def _may_be_any(mask: Tensor) -> bool:
    """Whether any is set; on a GPU simply yes, for asking would wait for the device."""
    return mask.device.type != "cpu" or bool(mask.any())
