"""The registry: one line per case."""

from ..case import Case
from . import conv_spectrum, conv_symbol, fixed_point_update, inverse, recompute, spectral_norm

CASES: dict[str, Case] = {
    module.CASE.name: module.CASE
    for module in (conv_spectrum, conv_symbol, fixed_point_update, inverse, recompute, spectral_norm)
}
