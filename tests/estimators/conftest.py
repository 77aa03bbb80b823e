"""These tests run on every device."""

from tests.numerics import default_device

__all__ = ["default_device"]
