"""Loading and preparing data."""

from .density2d import DENSITIES_2D, Density2d, density2d
from .dequantize import dequantize
from .digits import ImageSplit, load_digits

__all__ = ["DENSITIES_2D", "Density2d", "ImageSplit", "density2d", "dequantize", "load_digits"]
