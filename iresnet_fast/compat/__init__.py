"""Names and weights of other implementations."""

from . import normflows, official, residual_flows

__all__ = ["normflows", "official", "residual_flows"]
