"""Solvers: they take callables and know no module."""

from .finish import Evaluated, ExactBranch, Finished, Measured, prove
from .fixed_point import invert_residual, iterate
from .implicit import attach_branch_gradient, attach_gradient, differentiable_once, solve_values
from .precision import Precision, autocast_settings, evaluation_precision
from .result import (
    InverseResult,
    NotConvergedError,
    conclude,
    relative_errors,
    report_failure,
    sample_norms,
)
from .rounding import NoErrorModelError, WatchedFunction, key_of
from .rule import ON_FAILURE, StoppingRule

__all__ = [
    "ON_FAILURE",
    "Evaluated",
    "ExactBranch",
    "Finished",
    "InverseResult",
    "Measured",
    "NoErrorModelError",
    "NotConvergedError",
    "Precision",
    "StoppingRule",
    "WatchedFunction",
    "attach_branch_gradient",
    "attach_gradient",
    "autocast_settings",
    "conclude",
    "differentiable_once",
    "evaluation_precision",
    "invert_residual",
    "iterate",
    "key_of",
    "prove",
    "relative_errors",
    "report_failure",
    "sample_norms",
    "solve_values",
]
