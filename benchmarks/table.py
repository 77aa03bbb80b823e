"""Results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .harness import Row

_VERDICT_STYLE = {"aim met": "bold green", "met": "green", "not met": "bold red", "not measured": "yellow"}


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


def print_rows(console: Console, title: str, rows: Sequence[Row]) -> None:
    """One case: a row per provider, grouped by problem."""
    table = Table(title=title, title_justify="left")
    table.add_column("problem")
    table.add_column("provider")
    for heading in ("wall", "IQR", "CPU", "memory", "error", "speed-up", "of floor", "counts"):
        table.add_column(heading, justify="right", no_wrap=True)
    previous = None
    for row in rows:
        if previous not in (None, row.problem):
            table.add_section()
        name = row.problem if row.problem != previous else ""
        previous = row.problem
        error = "–" if row.error is None else f"{row.error:.1e}"
        if row.wall is None:
            table.add_row(name, row.provider, f"[yellow]{row.status}[/]", "", "", "", error, "", "", "", style="dim")
            table.add_row("", f"  [dim]{escape(str(row.reason))}[/]")
            continue
        times = (seconds(row.wall), seconds(row.wall_iqr), seconds(row.cpu))
        table.add_row(
            name,
            row.provider,
            *times,
            memory(row.peak_bytes),
            error,
            factor(row.speedup),
            factor(row.floor_ratio),
            counts(row.counts),
        )
    console.print(table)


def print_promises(console: Console, rows: Sequence[Row]) -> None:
    """What the cases promise, and whether it is met on this machine."""
    table = Table(title="Promises", title_justify="left")
    for heading in ("case", "problem", "provider", "against", "quantity", "must", "aim", "achieved", "verdict"):
        table.add_column(heading)
    for row in rows:
        for promise in row.promises:
            numbers = promised_numbers(promise)
            style = _VERDICT_STYLE[promise["verdict"]]
            quantity = f"{promise['quantity']} ({promise['of']})"
            verdict = f"[{style}]{promise['verdict']}[/]"
            table.add_row(row.case, row.problem, row.provider, promise["against"] or "–", quantity, *numbers, verdict)
    console.print(table)


def promised_numbers(promise: dict[str, Any]) -> tuple[str, ...]:
    """What must be reached, what is aimed at and what was achieved, as they are read."""
    show = {"speedup": factor, "share": share, "value": number}[promise["quantity"]]
    return tuple(show(promise[key]) for key in ("must", "aim", "achieved"))


def counts(values: dict[str, float]) -> str:
    """What was counted, as "12 evaluations"."""
    return ", ".join(f"{number(value)} {name}" for name, value in values.items())


def number(value: float | None) -> str:
    """A number to three digits."""
    return "–" if value is None else f"{value:.3g}"


def share(value: float | None) -> str:
    """A share in percent."""
    return "–" if value is None else f"{100 * value:.3g} %"
