"""Estimators of log|det(I + J_g)|: exact, truncated, unbiased, and a gradient of constant memory."""

from .exact import Exact
from .neumann import NeumannGradient
from .products import check_same_shape
from .result import Estimator, LogDet
from .series import PowerSeries, RussianRoulette, Series

__all__ = [
    "Estimator",
    "Exact",
    "LogDet",
    "NeumannGradient",
    "PowerSeries",
    "RussianRoulette",
    "Series",
    "check_same_shape",
    "default_estimator",
]

# Up to so many values per sample the whole Jacobian is cheaper than a series of products with it.
_EXACT_UP_TO = 16
_SMALL, _LARGE = Exact(), NeumannGradient()


def default_estimator(size: int) -> Estimator:
    """What estimates where nobody chose: exact for samples of up to 16 values, else a roulette with Neumann gradients.

    The roulette is unbiased where Lip(g) < 1.

    Args:
        size: values per sample.
    """
    return _SMALL if size <= _EXACT_UP_TO else _LARGE
