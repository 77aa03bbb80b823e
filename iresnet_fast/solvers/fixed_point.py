"""The inverse of x + g(x) by fixed-point iteration, certified sample by sample."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.fixed_point_update import fixed_point_update
from .result import InverseResult, NotConvergedError

# Evaluations without a smaller residual after which a sample has stalled. Branches that are not normal matrices can
# let the residual rise for a while before it falls.
_PATIENCE = 20
# Iterations allowed where no Lipschitz constant is known to bound them.
_MAX_ITERATIONS = 1000
# Rounding of one evaluation of y − g(x), in eps of the larger of ‖x‖ and ‖y‖; part of every reported bound.
_ROUNDING = 4
_ON_FAILURE = ("raise", "warn", "return")


def sample_norms(x: Tensor) -> Tensor:
    """Euclidean norm of each sample: (B, ...) to (B,), in float32 for low precision, else in x's dtype."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def invert_residual(
    g: Callable[[Tensor], Tensor],
    y: Tensor,
    *,
    tol: float = 1e-6,
    max_iterations: int | None = None,
    lipschitz: float | None = None,
    x0: Tensor | None = None,
    on_failure: str = "raise",
) -> InverseResult:
    """Solve x + g(x) = y for x by Picard iteration x ← y − g(x) (Behrmann et al. 2019, Algorithm 1).

    Every sample stops by its own rule, and then leaves the batch, so a result does not depend on what else is in the
    batch. For any x, ‖x* − x‖ ≤ ‖y − g(x) − x‖/(1 − L) (Banach). With a proven ``lipschitz`` L a sample converges,
    certified, when that bound for the iterate y − g(x), L/(1−L)·‖y − g(x) − x‖, is at most tol·max(1, ‖y‖).
    Without one it converges, uncertified, when the residual is. A residual that stops falling above the tolerance
    (rounding, or a g that does not contract) is *not converged*.

    Args:
        g: residual branch, (B', ...) to (B', ...) for any number of samples B'; evaluated without gradients. It must
            treat samples independently (no batch normalisation in training mode).
        y: (B, ...) outputs of the block, of floating point.
        tol: relative tolerance, at least 4·eps of y's dtype.
        max_iterations: limit of steps per sample. Default: the a-priori bound that L gives, 1000 without L.
        lipschitz: proven Lipschitz constant L of g, 0 ≤ L < 1; None where there is no proof.
        x0: (B, ...) start of the iteration; default y.
        on_failure: ``"raise"`` a :class:`NotConvergedError`, ``"warn"``, or ``"return"`` silently, where a sample does
            not converge.

    Returns:
        The :class:`InverseResult`; its fields are per sample. It is detached from the autograd graph.

    Raises:
        TypeError: y is not a floating-point tensor, or g returns another shape or dtype.
        ValueError: a tolerance below the floor of the dtype, a Lipschitz constant outside [0, 1), a wrong x0.
        NotConvergedError: samples did not converge and ``on_failure="raise"``.

    Example:
        >>> y = torch.tensor([[3.0], [1.5]])
        >>> invert_residual(lambda x: 0.5 * x, y, lipschitz=0.5).x
        tensor([[2.0000],
                [1.0000]])
    """
    if not callable(g):
        raise TypeError(f"g must be callable, got {type(g).__name__}")
    _check_arguments(y, tol, max_iterations, lipschitz, x0, on_failure)
    result = _iterate(g, y, y if x0 is None else x0, tol, lipschitz, max_iterations)
    if on_failure != "return" and not bool(result.converged.all()):
        message = _explain(result, y, tol, lipschitz, max_iterations)
        if on_failure == "raise":
            raise NotConvergedError(message, result)
        warnings.warn(message, stacklevel=3)
    return result


def _iterate(
    g: Callable[[Tensor], Tensor],
    y: Tensor,
    x: Tensor,
    tol: float,
    lipschitz: float | None,
    max_iterations: int | None,
) -> InverseResult:
    """Run the iteration on the samples that are still active, and record each one's state when it stops."""
    x = x.clone()  # a branch that works in place must not reach the caller's tensor before it is found out
    solution, target = x.clone(), y
    final_residual = sample_norms(y).fill_(math.inf)
    iterations = torch.zeros(len(y), dtype=torch.int64, device=y.device)
    converged = torch.zeros(len(y), dtype=torch.bool, device=y.device)

    threshold = tol * sample_norms(y).clamp_min(1.0)
    active = torch.arange(len(y), device=y.device)
    best, since_best = final_residual.clone(), torch.zeros_like(iterations)
    factor = 1.0 if lipschitz is None else lipschitz / (1 - lipschitz)
    limit = torch.empty_like(iterations)
    step = 0
    while len(active):
        version = None if x.is_inference() else x._version
        image = g(x)
        _check_image(image, x, version)
        following, residual = fixed_point_update(y, image, x)
        if step == 0:
            limit = _iteration_limit(lipschitz, max_iterations, residual, threshold)
        step += 1
        proven = (factor * residual <= threshold) & torch.isfinite(threshold)
        since_best = torch.where(residual < best, 0, since_best + 1)
        best = torch.minimum(best, residual)
        done = proven | (since_best >= _PATIENCE) | ~torch.isfinite(residual) | (step >= limit)
        if bool(done.any()):
            stopped = active[done]
            solution[stopped] = (x if lipschitz is None else following)[done]
            final_residual[stopped] = residual[done]
            iterations[stopped] = step
            converged[stopped] = proven[done]
            state = (active, y, following, threshold, best, since_best, limit)
            active, y, following, threshold, best, since_best, limit = (part[~done] for part in state)
        x = following
    known = lipschitz is not None
    return InverseResult(
        x=solution,
        residual=final_residual,
        error_bound=_error_bound(final_residual, solution, target, lipschitz),
        iterations=iterations,
        evaluations=step,
        converged=converged,
        certified=converged.clone() if known else torch.zeros_like(converged),
        path="picard",
    )


def _error_bound(residual: Tensor, x: Tensor, y: Tensor, lipschitz: float | None) -> Tensor:
    """(L·residual + rounding)/(1 − L): the a-posteriori bound, with a term for the rounding of one evaluation."""
    if lipschitz is None:
        return torch.full_like(residual, math.nan)
    rounding = _ROUNDING * torch.finfo(y.dtype).eps * torch.maximum(sample_norms(x), sample_norms(y))
    return (lipschitz * residual + rounding) / (1 - lipschitz)


def _iteration_limit(
    lipschitz: float | None, max_iterations: int | None, first_step: Tensor, threshold: Tensor
) -> Tensor:
    """Steps allowed per sample: a-priori Lⁿ/(1−L)·‖x¹ − x⁰‖ ≤ threshold where L is known, plus room for rounding."""
    if max_iterations is not None or lipschitz is None:
        limit = _MAX_ITERATIONS if max_iterations is None else max_iterations
        return torch.full_like(first_step, limit, dtype=torch.int64)
    base = math.log(max(lipschitz, torch.finfo(torch.float64).tiny))
    needed = torch.log(threshold * (1 - lipschitz) / first_step) / base
    return needed.nan_to_num(0.0, posinf=0.0, neginf=0.0).clamp_min(0).ceil().to(torch.int64) + _PATIENCE


def _check_arguments(
    y: Tensor,
    tol: float,
    max_iterations: int | None,
    lipschitz: float | None,
    x0: Tensor | None,
    on_failure: str,
) -> None:
    if not isinstance(y, Tensor) or not y.is_floating_point():
        kind = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"y must be a tensor of floating point, got {kind}")
    if y.dim() < 2:
        raise ValueError(f"y must have shape (B, ...) with at least one axis per sample, got {tuple(y.shape)}")
    for name, number in (("tol", tol), ("lipschitz", lipschitz), ("max_iterations", max_iterations)):
        kinds = (int,) if name == "max_iterations" else (int, float)
        if number is not None and (isinstance(number, bool) or not isinstance(number, kinds)):
            raise TypeError(f"{name} must be {'an int' if len(kinds) == 1 else 'a number'}, got {number!r}")
    if x0 is not None and not isinstance(x0, Tensor):
        raise TypeError(f"x0 must be a tensor, got {type(x0).__name__}")
    floor = 4 * torch.finfo(y.dtype).eps
    if not tol >= floor:
        raise ValueError(
            f"tol={tol!r} is below what {y.dtype} can resolve; the floor is 4·eps = {floor:.2g}. Remedy: a larger "
            "tol, or float64"
        )
    if max_iterations is not None and max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")
    if lipschitz is not None and not 0 <= lipschitz < 1:
        raise ValueError(
            f"lipschitz must be a proven constant in [0, 1), got {lipschitz!r}: a branch that does not contract has "
            "no certified inverse. Remedy: enforce(model), a smaller coeff, or lipschitz=None for an uncertified solve"
        )
    if x0 is not None and (x0.shape != y.shape or x0.dtype != y.dtype or x0.device != y.device):
        raise ValueError(
            f"x0 must match y: {tuple(y.shape)}, {y.dtype} on {y.device}; got {tuple(x0.shape)}, {x0.dtype} on "
            f"{x0.device}"
        )
    if on_failure not in _ON_FAILURE:
        raise ValueError(f"on_failure must be one of {', '.join(map(repr, _ON_FAILURE))}, got {on_failure!r}")


def _check_image(image: Tensor, x: Tensor, version: int | None) -> None:
    if version is not None and x._version != version:
        raise ValueError("g changes its input in place, so x + g(x) is not what it seems. Remedy: inplace=False")
    if not isinstance(image, Tensor):
        raise TypeError(f"g must return a tensor, got {type(image).__name__}")
    if image.shape != x.shape:
        raise TypeError(
            f"g must keep the shape of its input, but maps {tuple(x.shape)} to {tuple(image.shape)}; a residual "
            "branch with an inverse has as many outputs as inputs"
        )
    if image.dtype != x.dtype:
        raise TypeError(f"g must keep the dtype of its input, but maps {x.dtype} to {image.dtype}")


def _explain(result: InverseResult, y: Tensor, tol: float, lipschitz: float | None, max_iterations: int | None) -> str:
    """What did not converge, how far it came, and what to do about it."""
    failed = (~result.converged).nonzero().flatten().tolist()
    named = ", ".join(map(str, failed[:5])) + (", …" if len(failed) > 5 else "")
    relative = (result.residual / sample_norms(y).clamp_min(1.0))[failed]
    remedies = []
    if max_iterations is not None and int(result.iterations.max()) >= max_iterations:
        remedies.append("a larger max_iterations")
    if lipschitz is None:
        remedies.append("a branch that contracts: certify(model) shows its Lipschitz bound, enforce(model) lowers it")
    if not bool(torch.isfinite(relative).all() & torch.isfinite(sample_norms(y)).all()):
        remedies.append("inputs and weights without NaN, infinite or overflowing values")
    remedies.append(f"a larger tol, or float64 if rounding in {y.dtype} is the limit")
    known = "none" if lipschitz is None else f"{lipschitz:.6g}"
    return (
        f"{len(failed)} of {len(y)} samples did not converge (samples {named}): largest relative residual "
        f"{float(relative.max()):.3g} after {int(result.iterations.max())} iterations, tol={tol:.3g}, proven "
        f"Lipschitz constant {known}. Remedy: {'; or '.join(remedies)}. The iterates are in the error's .result."
    )
