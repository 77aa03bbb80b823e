"""Names and weights of other implementations."""

from . import official

__all__ = ["official"]
