"""Names and weights of other implementations."""

from . import normflows, official

__all__ = ["normflows", "official"]
