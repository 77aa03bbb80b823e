"""The papers' inverse of a residual block: a fixed number of iterations (Behrmann et al. 2018, Algorithm 1)."""

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
