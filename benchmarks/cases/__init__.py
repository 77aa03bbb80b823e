"""The registry: one line per case."""

from ..case import Case
from . import (
    conv_spectrum,
    conv_symbol,
    fixed_point_update,
    flow2d,
    inverse,
    log_det,
    recompute,
    scale,
    scaling,
    spectral_norm,
)

_MODULES = (
    conv_spectrum,
    conv_symbol,
    fixed_point_update,
    flow2d,
    inverse,
    log_det,
    recompute,
    scale,
    scaling,
    spectral_norm,
)
CASES: dict[str, Case] = {module.CASE.name: module.CASE for module in _MODULES}
