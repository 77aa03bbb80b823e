"""Invertible residual blocks and chains of them."""

from .block import InvertibleResidualBlock
from .sequential import ChainInverseResult, InvertibleSequential

__all__ = ["ChainInverseResult", "InvertibleResidualBlock", "InvertibleSequential"]
