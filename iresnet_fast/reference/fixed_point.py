"""The papers' inverse of a residual block (Behrmann et al. 2018, Algorithm 1), and the same with a rule to stop by."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def fixed_iterations(g: Callable[[Tensor], Tensor], y: Tensor, n_iterations: int = 100) -> Tensor:
    """Iterate x ← y − g(x) from x = y, ``n_iterations`` times, and trust that it converged.

    Args:
        g: residual branch, of Lipschitz constant below one.
        y: (B, ...) the block's outputs.
        n_iterations: evaluations of g.

    Returns:
        x of y's shape with x + g(x) ≈ y.
    """
    x = y
    for _ in range(n_iterations):
        x = y - g(x)
    return x


# Evaluations without a smaller residual after which a sample that has converged does not try for more.
SETTLED = 2


def judge(
    residual: Tensor, threshold: Tensor, since_best: Tensor, lipschitz: float | None, patience: int
) -> tuple[Tensor, Tensor]:
    """Decide which samples have converged, and which stop: the stopping rule of all inverses.

    The solution is y − g(x) with a Lipschitz constant L, whose residual is at most L times that of x, and whose error
    is at most L/(1 − L) times that; it is x without. A sample has converged when the residual of its solution is at
    most its threshold. It stops when, with L, the error is, too; or when it has converged and its residual does not
    fall any more; or when it has stalled.

    Args:
        residual: (B,) ‖y − g(x) − x‖.
        threshold: (B,) tol·max(1, ‖y‖); an infinite one is never met.
        since_best: (B,) evaluations since the smallest residual.
        lipschitz: a constant of g below one, or None.
        patience: evaluations without a smaller residual after which a sample has stalled.

    Returns:
        Two masks (B,): converged, and stopped.
    """
    shrunk, grown = (1.0, 1.0) if lipschitz is None else (lipschitz, lipschitz / (1 - lipschitz))
    reachable = threshold < torch.inf
    converged = (shrunk * residual <= threshold) & reachable
    close = (grown * residual <= threshold) & reachable
    return converged, close | (converged & (since_best >= SETTLED)) | (since_best >= patience)


@torch.no_grad()
def iterate_to_tolerance(
    g: Callable[[Tensor], Tensor],
    y: Tensor,
    x0: Tensor,
    *,
    tol: float,
    lipschitz: float | None,
    max_iterations: int | None,
    patience: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Iterate x ← y − g(x) until every sample has met its tolerance, stalled or used up its iterations.

    :func:`judge` says when. The solution is y − g(x) with a Lipschitz constant, and x without.

    Args:
        g: residual branch.
        y: (B, ...) the block's outputs.
        x0: (B, ...) first iterates.
        tol: relative tolerance.
        lipschitz: a proven constant of g below one, or None.
        max_iterations: at most so many evaluations, by default 1000.
        patience: evaluations without a smaller residual after which a sample has stalled.

    Returns:
        Per sample the solution, its residual (float32 for low precision, else y's dtype), iterations and evaluations
        (int64), and whether it converged.
    """
    wide, axes = (-1,) + (1,) * (y.dim() - 1), tuple(range(1, y.dim()))
    dtype = torch.promote_types(y.dtype, torch.float32)
    threshold = tol * torch.linalg.vector_norm(y, dim=axes, dtype=dtype).clamp_min(1)
    x, solution, residual = x0, x0, torch.full_like(threshold, torch.inf)
    best, since_best = residual, torch.zeros(len(y), dtype=torch.int64, device=y.device)
    evaluations, done = since_best, torch.zeros_like(since_best, dtype=torch.bool)
    converged = done
    for _ in range(max_iterations or 1000):
        if bool(done.all()):
            break
        following = y - g(x)
        current = torch.linalg.vector_norm(following - x, dim=axes, dtype=dtype)
        residual = torch.where(done, residual, current)
        solution = torch.where(done.view(wide), solution, x if lipschitz is None else following)
        evaluations = evaluations + ~done
        since_best = torch.where(residual < best, 0, since_best + 1)
        best = torch.fmin(best, residual)
        met, stopped = judge(residual, threshold, since_best, lipschitz, patience)
        converged = torch.where(done, converged, met)
        done = done | stopped | ~(residual < torch.inf)
        x = following
    return solution, residual, evaluations, evaluations.clone(), converged
