"""Drop-in layers and invertible modules."""

from .activations import ACTIVATIONS, LipSwish, MaxMin
from .actnorm import ActNorm
from .branches import Bottleneck, LipschitzMLP
from .frozen import frozen_state
from .fuse import fuse, fused_weights, is_fused, unfuse
from .injective_pad import InjectivePad
from .residual_block import InvertibleResidualBlock
from .sequential import ChainInverseResult, InvertibleSequential
from .spectral_layers import SpectralConv2d, SpectralLinear
from .spectral_norm import SpectralNorm, find_spectral_norm, spectral_norm
from .squeeze import Squeeze

__all__ = [
    "ACTIVATIONS",
    "ActNorm",
    "Bottleneck",
    "ChainInverseResult",
    "InjectivePad",
    "InvertibleResidualBlock",
    "InvertibleSequential",
    "LipSwish",
    "LipschitzMLP",
    "MaxMin",
    "SpectralConv2d",
    "SpectralLinear",
    "SpectralNorm",
    "Squeeze",
    "find_spectral_norm",
    "frozen_state",
    "fuse",
    "fused_weights",
    "is_fused",
    "spectral_norm",
    "unfuse",
]
