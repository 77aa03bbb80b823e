"""Measured numbers as they are read, to three digits."""

from __future__ import annotations

from typing import Any


def number(value: float | None) -> str:
    """A number: digits rather than exponents from a thousand on."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def seconds(value: float | None) -> str:
    """A time of so many seconds, in s, ms or µs."""
    if value is None:
        return "–"
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if value * scale >= 0.9995:
            return f"{number(value * scale)} {unit}"
    return f"{number(value * 1e6)} µs"


def memory(value: int | None) -> str:
    """Bytes in MiB."""
    return "–" if value is None else f"{value / 2**20:,.1f} MiB"


def factor(value: float | None) -> str:
    """A ratio."""
    return "–" if value is None else f"{number(value)}×"


def share(value: float | None) -> str:
    """A share in percent."""
    return "–" if value is None else f"{number(100 * value)} %"


def error(value: float | None) -> str:
    """A relative error."""
    return "–" if value is None else f"{value:.1e}"


def counts(values: dict[str, float]) -> str:
    """What was counted, as "12 evaluations"."""
    return ", ".join(f"{number(value)} {name}" for name, value in values.items())


def promised(promise: dict[str, Any]) -> tuple[str, ...]:
    """What must be reached, what is aimed at and what was achieved, of a promise in a result file."""
    of_values = {"wall": seconds, "cpu": seconds, "error": error}.get(promise["of"], number)
    show = {"speedup": factor, "share": share, "value": of_values}[promise["quantity"]]
    return tuple(show(promise[key]) for key in ("must", "aim", "achieved"))
