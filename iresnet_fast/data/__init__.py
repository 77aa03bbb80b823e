"""Loading images."""

from .digits import ImageSplit, load_digits

__all__ = ["ImageSplit", "load_digits"]
