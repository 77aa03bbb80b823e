"""Proven Lipschitz bounds of layers, residual blocks and networks."""

from .certify import certify, enforce
from .lipschitz import register_lipschitz
from .result import BlockBound, Certificate, LayerBound

__all__ = ["BlockBound", "Certificate", "LayerBound", "certify", "enforce", "register_lipschitz"]
