"""Public ops: each validates its arguments, then runs on the best backend there is for the device."""

from ._fixed_point import FixedPoint
from .block_inverse import bottleneck_inverse, mlp_inverse
from .conv_norm import conv_norm_bound, conv_norm_certified
from .conv_spectrum import conv_singular_values
from .conv_symbol import conv_symbol
from .fixed_point_update import fixed_point_update
from .power_iteration import PowerIteration, power_iteration

__all__ = [
    "FixedPoint",
    "PowerIteration",
    "bottleneck_inverse",
    "conv_norm_bound",
    "conv_norm_certified",
    "conv_singular_values",
    "conv_symbol",
    "fixed_point_update",
    "mlp_inverse",
    "power_iteration",
]
