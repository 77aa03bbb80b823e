"""Everything between two evaluations of g in the general inverse, in three launches: float32, no wait for the device.

One launch takes y − g(x) and its sums per sample (:mod:`.fixed_point_update`), one decides for every sample by
:mod:`.fixed_point_rule`, one writes the solutions of those that stop and the next iterates of those that go on. What is
frozen is not touched again. The floor is eleven times the bytes of x over the memory bandwidth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fixed_point_rule import (
    BACKOFF,
    DONE,
    FLAGS,
    IS_MIXED,
    NUMBERS,
    STOPS,
    TAKEN,
    THETA,
    THRESHOLD,
    constants,
    decide,
)
from .fixed_point_update import choose_launch, fixed_point_update_kernel

# Samples of a program that decides.
_TOGETHER = 32


@triton.jit
def decide_kernel(
    partial,
    partial_along,
    numbers,
    flags,
    residual,
    iterations,
    evaluations,
    converged,
    places,
    splits,
    count,
    lipschitz,
    factor,
    gap,
    log_lipschitz,
    rounding,
    max_iterations,
    patience,
    PROVEN: tl.constexpr,
    MIXING: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Samples [TOGETHER·program, TOGETHER·(program + 1)), of which there are ``places`` with those that pad them."""
    sample = tl.program_id(0) * TOGETHER + tl.arange(0, TOGETHER)
    squared = tl.zeros([TOGETHER], dtype=tl.float32)
    along = tl.zeros([TOGETHER], dtype=tl.float32)
    split = 0
    while split < splits:
        squared += tl.load(partial + sample * splits + split)
        if MIXING:
            along += tl.load(partial_along + sample * splits + split)
        split += 1
    decide(
        numbers,
        flags,
        sample,
        squared,
        along,
        count,
        lipschitz,
        factor,
        gap,
        log_lipschitz,
        rounding,
        max_iterations,
        patience,
        residual,
        iterations,
        evaluations,
        converged,
        places,
        PROVEN,
        MIXING,
    )


@triton.jit
def advance_kernel(
    x,
    following,
    target,
    before,
    solution,
    numbers,
    flags,
    places,
    numel,
    chunk,
    PROVEN: tl.constexpr,
    MIXING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (sample, split): elements [split·chunk, (split+1)·chunk) of one sample."""
    sample = tl.program_id(0)
    stops = tl.load(flags + STOPS * places + sample) == 1
    goes_on = tl.load(flags + DONE * places + sample) == 0
    taken = tl.load(flags + TAKEN * places + sample) == 1
    is_mixed = tl.load(flags + IS_MIXED * places + sample) == 1
    theta = tl.load(numbers + THETA * places + sample)
    base = sample.to(tl.int64) * numel
    block = tl.program_id(1) * chunk
    end = tl.minimum(block + chunk, numel)
    # Where the elements end that are written: at once, where none is.
    end_solved = tl.where(stops, end, 0)
    end_next = tl.where(goes_on, end, 0)
    end_taken = tl.where(goes_on & taken, end, 0)
    while block < end:
        element = block + tl.arange(0, BLOCK)
        inside, at = element < end, base + element
        step = tl.load(following + at, mask=inside, other=0.0)
        old = tl.load(x + at, mask=inside, other=0.0)
        tl.store(solution + at, step if PROVEN else old, mask=element < end_solved)
        if MIXING:
            aim = tl.load(target + at, mask=inside, other=0.0)
            new = tl.where(is_mixed, step + theta * (aim - step), step)
            tl.store(x + at, tl.where(taken, new, aim), mask=element < end_next)
            tl.store(target + at, step, mask=element < end_taken)
            tl.store(before + at, step - old, mask=element < end_taken)
        else:
            tl.store(x + at, step, mask=element < end_next)
        block += BLOCK


class FusedSteps:
    """The state of an iteration, sample by sample; of ``solvers.iteration.Iteration`` and its record.

    Args:
        y: (B, ...) float32, dense, B > 0.
        x: (B, ...) first iterates in y's layout; overwritten.
        tol: relative tolerance.
        lipschitz: proven constant of g, or None.
        max_iterations: limit of accepted steps, or None for the a-priori one.
        patience: evaluations without a smaller residual after which a sample has stalled.
        mixing: Anderson instead of Picard.

    Attributes:
        x: where g is to be evaluated next.
        solution: (B, ...) of the samples that are done.
        evaluations: so far.
    """

    def __init__(
        self,
        y: Tensor,
        x: Tensor,
        *,
        tol: float,
        lipschitz: float | None,
        max_iterations: int | None,
        patience: int,
        mixing: bool,
    ) -> None:
        batch, self._numel = len(y), y[0].numel()
        is_last = y.dim() == 4 and y.is_contiguous(memory_format=torch.channels_last)
        self._layout = torch.channels_last if is_last else torch.contiguous_format
        self._y, self.x, self._batch = y, x, batch
        self._plan = choose_launch(batch, self._numel)
        self._following, self.solution = torch.empty_like(y), torch.empty_like(y)
        self._target, self._before = (x.clone(), torch.zeros_like(y)) if mixing else (x, x)
        self._places = places = triton.cdiv(batch, _TOGETHER) * _TOGETHER
        self._partial = y.new_zeros(2, places, self._plan.splits)
        self._numbers = y.new_full((NUMBERS.value, places), torch.inf)
        norms = torch.linalg.vector_norm(y.flatten(1), dim=1)
        self._numbers[THRESHOLD.value, :batch] = tol * norms.clamp_min(1.0).nan_to_num(nan=torch.inf, posinf=torch.inf)
        self._flags = torch.zeros(FLAGS.value, places, dtype=torch.int32, device=y.device)
        self._flags[DONE.value, batch:] = 1
        self._flags[BACKOFF.value] = 1
        self._residual = y.new_empty(places)
        self._counts = torch.zeros(2, places, dtype=torch.int64, device=y.device)
        self._converged = torch.zeros(places, dtype=torch.bool, device=y.device)
        self._rule = (
            *constants(lipschitz, tol, torch.finfo(y.dtype).eps),
            max_iterations or 0,
            patience,
        )
        self._mode = {"PROVEN": lipschitz is not None, "MIXING": mixing}
        self.evaluations = 0

    def advance(self, image: Tensor) -> None:
        """Take g(x): samples stop, and the others get their next iterate."""
        self.evaluations += 1
        image = image.contiguous(memory_format=self._layout)
        plan, (squares, along) = self._plan, self._partial
        fixed_point_update_kernel[(self._batch, plan.splits)](
            self._y,
            image,
            self.x,
            self._before,
            self._following,
            squares,
            along,
            self._numel,
            plan.chunk,
            SPLITS=plan.splits,
            BLOCK=plan.block,
            ACCUMULATE=tl.float32,
            ALONG=self._mode["MIXING"],
            num_warps=plan.num_warps,
        )
        decide_kernel[(self._places // _TOGETHER,)](
            squares,
            along,
            self._numbers,
            self._flags,
            self._residual,
            *self._counts,
            self._converged.view(torch.int8),
            self._places,
            plan.splits,
            self.evaluations,
            *self._rule,
            **self._mode,
            TOGETHER=_TOGETHER,
            num_warps=1,
        )
        advance_kernel[(self._batch, plan.splits)](
            self.x,
            self._following,
            self._target,
            self._before,
            self.solution,
            self._numbers,
            self._flags,
            self._places,
            self._numel,
            plan.chunk,
            **self._mode,
            BLOCK=plan.block,
            num_warps=plan.num_warps,
        )

    def all_done(self) -> Tensor:
        """Whether every sample has stopped, a 0-d bool on the device."""
        return self._flags[DONE.value].all()

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Solutions, and per sample residual, iterations, evaluations and whether it converged."""
        per_sample = (self._residual, *self._counts, self._converged)
        residual, iterations, evaluations, converged = (part[: self._batch] for part in per_sample)
        return self.solution, residual, iterations, evaluations, converged
