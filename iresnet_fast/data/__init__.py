"""Loading and preparing data."""

from .cifar import load_cifar
from .continuous import centered, dequantize, midpoints
from .density2d import DENSITIES_2D, Density2d, density2d
from .digits import load_digits
from .files import load_arrays, load_image_folders, load_parquet
from .idx import read_idx
from .images import ImageSplit
from .load import load
from .missing import MissingDataError
from .mnist import load_mnist

__all__ = [
    "DENSITIES_2D",
    "Density2d",
    "ImageSplit",
    "MissingDataError",
    "centered",
    "density2d",
    "dequantize",
    "load",
    "load_arrays",
    "load_cifar",
    "load_digits",
    "load_image_folders",
    "load_mnist",
    "load_parquet",
    "midpoints",
    "read_idx",
]
