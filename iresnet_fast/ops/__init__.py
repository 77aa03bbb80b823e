"""Public ops: each validates its arguments, then runs on the best backend there is for the device."""

from .conv_norm import conv_norm_bound
from .conv_spectrum import conv_singular_values

__all__ = ["conv_norm_bound", "conv_singular_values"]
