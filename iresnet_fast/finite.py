"""Figures as JSON takes them, which has no infinity and no NaN."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def finite_or_none(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The same figures, None in place of those that are not finite."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in figures.items()
    }
