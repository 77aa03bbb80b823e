"""Invertible modules whose volume change is known, and their base class."""

from .actnorm import ActNorm
from .base import Bijection
from .injective_pad import InjectivePad
from .preprocessing import Center, Logit
from .split import Flatten, Split
from .squeeze import Squeeze

__all__ = ["ActNorm", "Bijection", "Center", "Flatten", "InjectivePad", "Logit", "Split", "Squeeze"]
