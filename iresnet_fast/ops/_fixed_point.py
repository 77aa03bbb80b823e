"""What the ops and solvers that invert have in common: the result, and the checks of their arguments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import check_choice

METHODS = ("anderson", "picard")


class FixedPoint(NamedTuple):
    """Where each sample of a fixed-point iteration stopped.

    Attributes:
        x: (B, ...) the solution: y − g(x̂) of the last evaluated x̂ with a Lipschitz constant, x̂ without.
        residual: (B,) ‖y − g(x̂) − x̂‖.
        iterations: (B,) int64, accepted steps.
        evaluations: (B,) int64, evaluations of g.
        converged: (B,) bool, whether the stopping rule was met.
    """

    x: Tensor
    residual: Tensor
    iterations: Tensor
    evaluations: Tensor
    converged: Tensor


def tolerance_floor(dtype: torch.dtype) -> float:
    """The smallest tolerance that a dtype can resolve: 4·eps."""
    return 4 * torch.finfo(dtype).eps


def check_fixed_point(
    y: Tensor,
    tol: float,
    max_iterations: int | None,
    lipschitz: float | None,
    x0: Tensor | None,
    method: str,
    patience: int,
) -> None:
    """Raise where an argument cannot be served, naming its value and the remedy."""
    if not isinstance(y, Tensor) or not y.is_floating_point():
        kind = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"y must be a tensor of floating point, got {kind}")
    if y.dim() < 2:
        raise ValueError(f"y must have shape (B, ...) with at least one axis per sample, got {tuple(y.shape)}")
    counts = {"max_iterations": max_iterations, "patience": patience}
    for name, number in {"tol": tol, "lipschitz": lipschitz, **counts}.items():
        kinds = (int,) if name in counts else (int, float)
        if number is not None and (isinstance(number, bool) or not isinstance(number, kinds)):
            raise TypeError(f"{name} must be {'an int' if len(kinds) == 1 else 'a number'}, got {number!r}")
    floor = tolerance_floor(y.dtype)
    if not tol >= floor:
        raise ValueError(
            f"tol={tol!r} is below what {y.dtype} can resolve; the floor is 4·eps = {floor:.2g}. Remedy: a larger "
            "tol, or float64"
        )
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if lipschitz is not None and not 0 <= lipschitz < 1:
        raise ValueError(
            f"lipschitz must be a proven constant in [0, 1), got {lipschitz!r}: a branch that does not contract has "
            "no certified inverse. Remedy: enforce(model), a smaller coeff, or lipschitz=None for an uncertified solve"
        )
    _check_start(x0, y)
    check_choice("method", method, METHODS)


def _check_start(x0: Tensor | None, y: Tensor) -> None:
    if x0 is None:
        return
    if not isinstance(x0, Tensor):
        raise TypeError(f"x0 must be a tensor, got {type(x0).__name__}")
    if x0.shape != y.shape or x0.dtype != y.dtype or x0.device != y.device:
        raise ValueError(
            f"x0 must match y: {tuple(y.shape)}, {y.dtype} on {y.device}; got {tuple(x0.shape)}, {x0.dtype} on "
            f"{x0.device}"
        )
