"""Measured numbers as they are read."""

from __future__ import annotations

from typing import Any


def seconds(value: float | None) -> str:
    """A time with a fitting unit."""
    if value is None:
        return "–"
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * scale >= 1 or unit == "µs":
            return f"{value * scale:.3g} {unit}"
    raise AssertionError(value)


def memory(value: int | None) -> str:
    """Bytes in MiB."""
    return "–" if value is None else f"{value / 2**20:.1f} MiB"


def factor(value: float | None) -> str:
    """A ratio."""
    return "–" if value is None else f"{value:.3g}×"


def number(value: float | None) -> str:
    """A number to three digits."""
    return "–" if value is None else f"{value:.3g}"


def share(value: float | None) -> str:
    """A share in percent."""
    return "–" if value is None else f"{100 * value:.3g} %"


def error(value: float | None) -> str:
    """A relative error."""
    return "–" if value is None else f"{value:.1e}"


def counts(values: dict[str, float]) -> str:
    """What was counted, as "12 evaluations"."""
    return ", ".join(f"{number(value)} {name}" for name, value in values.items())


def promised(promise: dict[str, Any]) -> tuple[str, ...]:
    """What must be reached, what is aimed at and what was achieved, of a promise in a result file."""
    show = {"speedup": factor, "share": share, "value": number}[promise["quantity"]]
    return tuple(show(promise[key]) for key in ("must", "aim", "achieved"))
