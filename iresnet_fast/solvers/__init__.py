"""Solvers: they take callables and know no module."""

from .arguments import ON_FAILURE
from .fixed_point import invert_residual
from .implicit import attach_branch_gradient, attach_gradient, differentiable_once, solve_values
from .precision import Precision, autocast_settings, evaluation_precision
from .result import ROUNDING, InverseResult, NotConvergedError, conclude, relative_errors, sample_norms

__all__ = [
    "ON_FAILURE",
    "ROUNDING",
    "InverseResult",
    "NotConvergedError",
    "Precision",
    "attach_branch_gradient",
    "attach_gradient",
    "autocast_settings",
    "conclude",
    "differentiable_once",
    "evaluation_precision",
    "invert_residual",
    "relative_errors",
    "sample_norms",
    "solve_values",
]
