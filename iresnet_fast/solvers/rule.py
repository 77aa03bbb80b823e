"""When an inverse stops, and what happens where it does not converge."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ops._fixed_point import check_fixed_point
from ..ops.arguments import check_choice
from .precision import evaluation_precision

ON_FAILURE = ("raise", "warn", "return")
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class StoppingRule:
    """Options of an inverse.

    Attributes:
        tol: tolerance of the residual, and of the error that is certified, relative to max(1, ‖·‖). None: 1e-6, or
            what the precision in force resolves: 8·eps of y's dtype, eps/8 of what g is rounded to under autocast or
            TF32.
        max_iterations: limit of steps per sample, those in float64 that a proof may take among them. None: the a-priori
            bound that a Lipschitz constant gives, 1000 without one.
        lipschitz: a proven Lipschitz constant of the branch, 0 ≤ L < 1, or None.
        method: ``"anderson"`` or ``"picard"``.
        patience: evaluations without a smaller residual after which a sample has stalled.
        on_failure: ``"raise"``, ``"warn"`` or ``"return"``, where a sample does not converge.
    """

    tol: float | None = None
    max_iterations: int | None = None
    lipschitz: float | None = None
    method: str = "anderson"
    patience: int = 20
    on_failure: str = "raise"

    def for_(self, y: Tensor, x0: Tensor | None = None) -> StoppingRule:
        """Return the rule with the tolerance that holds for y, checked.

        Raises:
            TypeError: y is not a tensor of floating point, or an option is of another type.
            ValueError: a tolerance below the floor of the dtype, a Lipschitz constant outside [0, 1), a wrong x0.
        """
        check_choice("on_failure", self.on_failure, ON_FAILURE)
        tol = self.tol
        if tol is None:
            tol = _default_tolerance(y) if isinstance(y, Tensor) and y.is_floating_point() else _TOLERANCE
        check_fixed_point(y, tol, self.max_iterations, self.lipschitz, x0, self.method, self.patience)
        return replace(self, tol=tol)

    @property
    def tolerance(self) -> float:
        """The tolerance of a rule that was made for a y."""
        assert self.tol is not None
        return self.tol


def _default_tolerance(y: Tensor) -> float:
    own, used = torch.finfo(y.dtype).eps, evaluation_precision(y).eps
    return max(_TOLERANCE, used / 8 if used > own else 8 * own)
