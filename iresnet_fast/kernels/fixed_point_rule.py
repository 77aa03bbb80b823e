"""When a sample of a fixed-point inverse stops, and where it goes on: ``reference/fixed_point.py`` in Triton.

What is known of a sample is in memory between two decisions, not in registers, of which the products need all: arrays
of floats and of ints, each with ``places`` for samples. ``sample`` is a block of places, or a single one.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

# Floats: ‖y‖'s threshold, ‖f'‖ of the last accepted iterate, the smallest residual, θ of the next step.
THRESHOLD, ACCEPTED, BEST, THETA = (tl.constexpr(place) for place in range(4))
NUMBERS = tl.constexpr(4)
# Ints; masks are 0 or 1.
DONE, STOPS, TAKEN, IS_MIXED, ITERATIONS, SINCE_BEST, LIMIT, WAIT, BACKOFF = (tl.constexpr(i) for i in range(9))
FLAGS = tl.constexpr(9)
# A Picard step that shrinks the residual to less than this share is left alone; the longest run of Picard steps after
# refusals; room for rounding above the a-priori bound; the iterations allowed where there is none; and the evaluations
# without a smaller residual after which a sample that has converged stops.
_FAST = tl.constexpr(0.1)
_LONGEST_BACKOFF = tl.constexpr(64)
_SPARE_ITERATIONS = tl.constexpr(20)
_MAX_ITERATIONS = tl.constexpr(1000)
_SETTLED = tl.constexpr(2)


def constants(lipschitz: float | None, tol: float, eps: float) -> tuple[float, ...]:
    """L, L/(1−L), 1−L, log L and the rounding of a step over tol, computed in float64: kernels take float32.

    The factor of the error's bound is rounded up. Without L they are unused zeros.
    """
    rounding = 4 * eps / tol
    if lipschitz is None:
        return 0.0, 0.0, 0.0, 0.0, rounding
    nearest = torch.tensor(lipschitz / (1 - lipschitz), dtype=torch.float32, device="cpu")
    factor = float(nearest.nextafter(torch.full_like(nearest, torch.inf)))
    return lipschitz, factor, 1 - lipschitz, math.log(max(lipschitz, 1e-37)), rounding


@triton.jit
def begin(numbers, flags, sample, squares, done, tol, places):
    """Set what is known before the first evaluation; ``squares`` is ‖y‖², ``done`` 1 for places without a sample."""
    threshold = tol * tl.maximum(tl.sqrt(squares), 1.0)
    infinite = tl.where(done < 2, float("inf"), 0.0)
    # Infinite where ‖y‖ overflows or is NaN, which no residual shows to be reached.
    tl.store(numbers + THRESHOLD * places + sample, tl.where(threshold < float("inf"), threshold, float("inf")))
    tl.store(numbers + ACCEPTED * places + sample, infinite)
    tl.store(numbers + BEST * places + sample, infinite)
    zero = done * 0
    tl.store(flags + DONE * places + sample, done)
    tl.store(flags + IS_MIXED * places + sample, zero)
    tl.store(flags + ITERATIONS * places + sample, zero)
    tl.store(flags + SINCE_BEST * places + sample, zero)
    tl.store(flags + LIMIT * places + sample, zero)
    tl.store(flags + WAIT * places + sample, zero)
    tl.store(flags + BACKOFF * places + sample, zero + 1)


@triton.jit
def decide(
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
    residual_out,
    iterations_out,
    evaluations_out,
    converged_out,
    places,
    PROVEN: tl.constexpr,
    MIXING: tl.constexpr,
):
    """After evaluation number ``count``, with residual² and ⟨f, f'⟩: who stops, and how the others go on.

    Samples that stop have their results written at their place; STOPS, TAKEN, IS_MIXED and THETA say what to do next.
    """
    residual = tl.sqrt(squared)
    threshold = tl.load(numbers + THRESHOLD * places + sample)
    accepted = tl.load(numbers + ACCEPTED * places + sample)
    best = tl.load(numbers + BEST * places + sample)
    was_done = tl.load(flags + DONE * places + sample)
    is_mixed = tl.load(flags + IS_MIXED * places + sample)
    iterations = tl.load(flags + ITERATIONS * places + sample)
    since_best = tl.load(flags + SINCE_BEST * places + sample)
    limit = tl.load(flags + LIMIT * places + sample)
    wait, backoff = tl.load(flags + WAIT * places + sample), tl.load(flags + BACKOFF * places + sample)
    tl.debug_barrier()  # several threads have the same sample: all must have read before one writes
    if count == 1:
        limit = _iteration_limit(residual, threshold, gap, log_lipschitz, max_iterations, PROVEN)
    if PROVEN:
        shrunk = residual <= lipschitz * accepted + rounding * threshold
        met = (lipschitz * residual <= threshold) & (threshold < float("inf"))
        close = (factor * residual <= threshold) & (threshold < float("inf"))
    else:
        shrunk = residual < accepted
        met = (residual <= threshold) & (threshold < float("inf"))
        close = met
    taken = tl.where(shrunk | (is_mixed == 0), 1, 0)
    iterations += taken
    since_best = tl.where(residual < best, 0, since_best + 1)
    # A mixed iterate that left the domain of g is only refused.
    lost = (taken == 1) & ((residual < float("inf")) == 0)
    settled = met & (since_best >= _SETTLED)
    stopped = close | settled | lost | (since_best >= patience) | (iterations >= limit)
    stops = stopped & (was_done == 0)
    done = tl.where(stopped, 1, was_done)
    tl.store(residual_out + sample, residual, mask=stops)
    tl.store(iterations_out + sample, iterations.to(tl.int64), mask=stops)
    tl.store(evaluations_out + sample, (iterations * 0 + count).to(tl.int64), mask=stops)
    tl.store(converged_out + sample, tl.where(met, 1, 0).to(tl.int8), mask=stops)
    if MIXING:
        may_mix = (taken == 1) & ((is_mixed == 1) | (residual > _FAST * accepted)) & (done == 0)
        wait = tl.where(taken == 1, tl.maximum(wait - 1, 0), backoff)
        # A refusal doubles the run of Picard steps that follows, success halves it.
        longer, shorter = tl.minimum(2 * backoff, _LONGEST_BACKOFF), tl.maximum(backoff // 2, 1)
        backoff = tl.where(taken == 0, longer, tl.where(is_mixed == 1, shorter, backoff))
        change = squared - 2.0 * along + accepted * accepted
        # Where squares overflow or vanish there is nothing to go by.
        may_mix = may_mix & (wait == 0) & (change > 0.0) & (change < float("inf"))
        tl.store(numbers + THETA * places + sample, tl.where(may_mix, (squared - along) / change, 0.0))
        is_mixed = tl.where(may_mix, 1, 0)
        tl.store(flags + WAIT * places + sample, wait)
        tl.store(flags + BACKOFF * places + sample, backoff)
        tl.store(flags + IS_MIXED * places + sample, is_mixed)
        tl.store(numbers + ACCEPTED * places + sample, tl.where(taken == 1, residual, accepted))
    tl.store(numbers + BEST * places + sample, tl.where(residual < best, residual, best))
    tl.store(flags + DONE * places + sample, done)
    tl.store(flags + STOPS * places + sample, tl.where(stops, 1, 0))
    tl.store(flags + TAKEN * places + sample, taken)
    tl.store(flags + LIMIT * places + sample, limit)
    tl.store(flags + ITERATIONS * places + sample, iterations)
    tl.store(flags + SINCE_BEST * places + sample, since_best)


@triton.jit
def _iteration_limit(residual, threshold, gap, log_lipschitz, max_iterations, PROVEN: tl.constexpr):
    """Steps allowed, from the first residual: a-priori Lⁿ/(1−L)·‖x¹ − x⁰‖ ≤ threshold with L."""
    if PROVEN:
        needed = tl.ceil(tl.log(threshold * gap / residual) / log_lipschitz)
        usable = (needed > 0.0) & (needed < 1e9)
        limit = tl.where(usable, needed, 0.0).to(tl.int32) + _SPARE_ITERATIONS
    else:
        limit = tl.where(residual < threshold, _MAX_ITERATIONS, _MAX_ITERATIONS)  # in the shape of the residual
    return tl.where(max_iterations > 0, max_iterations, limit)
