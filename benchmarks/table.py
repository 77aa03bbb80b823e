"""Results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from iresnet_fast.report.numbers import counts, error, factor, memory, promised, seconds

from .harness import Row

_VERDICT_STYLE = {"aim met": "bold green", "met": "green", "not met": "bold red", "not measured": "yellow"}


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
        if row.wall is None:
            status = f"[yellow]{row.status}[/]"
            table.add_row(name, row.provider, status, "", "", "", error(row.error), "", "", "", style="dim")
            table.add_row("", f"  [dim]{escape(str(row.reason))}[/]")
            continue
        times = (seconds(row.wall), seconds(row.wall_iqr), seconds(row.cpu))
        table.add_row(
            name,
            row.provider,
            *times,
            memory(row.peak_bytes),
            error(row.error),
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
            numbers = promised(promise)
            style = _VERDICT_STYLE[promise["verdict"]]
            quantity = f"{promise['quantity']} ({promise['of']})"
            verdict = f"[{style}]{promise['verdict']}[/]"
            table.add_row(row.case, row.problem, row.provider, promise["against"] or "–", quantity, *numbers, verdict)
    console.print(table)
