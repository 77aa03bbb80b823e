"""Loading and preparing data."""

from .density2d import DENSITIES_2D, Density2d, density2d
from .dequantize import dequantize
from .digits import load_digits
from .idx import read_idx
from .images import ImageSplit
from .mnist import load_mnist

__all__ = [
    "DENSITIES_2D",
    "Density2d",
    "ImageSplit",
    "density2d",
    "dequantize",
    "load_digits",
    "load_mnist",
    "read_idx",
]
