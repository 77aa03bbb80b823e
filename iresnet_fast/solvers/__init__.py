"""Solvers: they take callables and know no module."""

from .fixed_point import invert_residual, sample_norms
from .result import InverseResult, NotConvergedError

__all__ = ["InverseResult", "NotConvergedError", "invert_residual", "sample_norms"]
