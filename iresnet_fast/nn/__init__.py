"""Drop-in layers and invertible modules."""

from .activations import ACTIVATIONS, LipSwish, MaxMin
from .bijections.actnorm import ActNorm
from .bijections.base import Bijection
from .bijections.injective_pad import InjectivePad
from .bijections.preprocessing import Center, Logit
from .bijections.split import Flatten, Split
from .bijections.squeeze import Squeeze
from .branches import Bottleneck, LipschitzMLP
from .fuse import fuse, fused_weights, is_fused, unfuse
from .residual.block import InvertibleResidualBlock
from .residual.sequential import ChainInverseResult, InvertibleSequential
from .spectral_layers import SpectralConv2d, SpectralLinear
from .spectral_norm import SpectralNorm, find_spectral_norm, spectral_norm
from .weights import frozen_state, settle

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
    "settle",
    "spectral_norm",
    "unfuse",
]
