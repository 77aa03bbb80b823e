"""Solvers: they take callables and know no module."""

from .fixed_point import invert_residual
from .implicit import attach_gradient
from .precision import evaluation_precision
from .result import InverseResult, NotConvergedError, sample_norms

__all__ = [
    "InverseResult",
    "NotConvergedError",
    "attach_gradient",
    "evaluation_precision",
    "invert_residual",
    "sample_norms",
]
