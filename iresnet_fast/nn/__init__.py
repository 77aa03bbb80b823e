"""Drop-in layers and invertible modules."""

from .activations import ACTIVATIONS, LipSwish, MaxMin
from .actnorm import ActNorm
from .branches import Bottleneck, LipschitzMLP
from .frozen import frozen_state
from .fuse import fuse, fused_weights, is_fused, unfuse
from .injective_pad import InjectivePad
from .log_det import Bijection
from .preprocessing import Center, Logit
from .residual_block import InvertibleResidualBlock
from .sequential import ChainInverseResult, InvertibleSequential
from .spectral_layers import SpectralConv2d, SpectralLinear
from .spectral_norm import SpectralNorm, find_spectral_norm, spectral_norm
from .split import Flatten, Split
from .squeeze import Squeeze

__all__ = [
    "ACTIVATIONS",
    "ActNorm",
    "Bijection",
    "Bottleneck",
    "Center",
    "ChainInverseResult",
    "Flatten",
    "InjectivePad",
    "InvertibleResidualBlock",
    "InvertibleSequential",
    "LipSwish",
    "LipschitzMLP",
    "Logit",
    "MaxMin",
    "SpectralConv2d",
    "SpectralLinear",
    "SpectralNorm",
    "Split",
    "Squeeze",
    "find_spectral_norm",
    "frozen_state",
    "fuse",
    "fused_weights",
    "is_fused",
    "spectral_norm",
    "unfuse",
]
