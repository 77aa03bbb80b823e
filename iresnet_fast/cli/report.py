"""``iresnet-fast report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..report.benchmarks import read
from ..report.page import write_benchmark_page
from .application import app, out


@app.command(
    epilog="**Examples:**\n\n`python -m benchmarks --json results.json`\n\n`iresnet-fast report results.json`\n\n"
    "`iresnet-fast report benchmarks/results --out report.html`"
)
def report(
    results: Annotated[list[Path], typer.Argument(help="Result files of the benchmarks, or folders of them.")],
    path: Annotated[Path, typer.Option("--out", help="The page to write.")] = Path("report.html"),
) -> None:
    """Show benchmark results as one HTML page: speed-ups, error against time, scaling, roofline."""
    written = write_benchmark_page(read(results), path)
    out.print(f"Report: {written}", highlight=False, soft_wrap=True)
