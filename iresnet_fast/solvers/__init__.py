"""Solvers: they take callables and know no module."""

from .fixed_point import invert_residual
from .implicit import attach_gradient
from .precision import autocast_settings, evaluation_precision
from .result import ROUNDING, InverseResult, NotConvergedError, sample_norms

__all__ = [
    "ROUNDING",
    "InverseResult",
    "NotConvergedError",
    "attach_gradient",
    "autocast_settings",
    "evaluation_precision",
    "invert_residual",
    "sample_norms",
]
