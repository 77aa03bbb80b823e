"""Proven Lipschitz bounds of layers, residual blocks and networks."""

from .certify import certify, enforce
from .lipschitz import register_lipschitz
from .result import BlockBound, Certificate, LayerBound
from .spectra import LayerSpectrum, layer_spectra, spectra_to_markdown

__all__ = [
    "BlockBound",
    "Certificate",
    "LayerBound",
    "LayerSpectrum",
    "certify",
    "enforce",
    "layer_spectra",
    "register_lipschitz",
    "spectra_to_markdown",
]
