"""``iresnet-fast demo``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..optional import require
from ..report.demo import DemoResult, run_demo, write_results
from ..report.numbers import number
from ..report.page import DRAWN_WITH, write_demo_page
from .application import app, err, make_progress
from .application import out as standard

# Measurements of the demonstration beside the epochs: two inversions, the flow, the comparison, the drawing.
_DEMO_MEASUREMENTS = 5


@app.command(
    epilog="**Examples:**\n\n`iresnet-fast demo`\n\n`iresnet-fast demo --out results --epochs 5`\n\n"
    "`iresnet-fast demo --json | jq .networks`"
)
def demo(
    out: Annotated[Path, typer.Option(help="Folder for report.html, figures, results.json and certificate.md.")] = Path(
        "demo"
    ),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images, per network.")] = 25,
    seed: Annotated[int, typer.Option(help="Seed of weights, split and order.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON on standard output.")] = False,
) -> None:
    """Train certified invertible networks on real digits: classify, prove, invert, give likelihoods, and sample."""
    console = err if as_json else standard
    require("the demonstration", *DRAWN_WITH, "sklearn")  # these fail now rather than after the training
    out.mkdir(parents=True, exist_ok=True)
    progress = make_progress(console)
    with progress:
        task = progress.add_task("training the i-ResNet", total=3 * epochs + _DEMO_MEASUREMENTS)
        result = run_demo(
            epochs,
            seed,
            on_step=lambda description: progress.update(task, advance=1, description=description),
        )
        write_results(result, out)
        report = write_demo_page(result, out)
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2, allow_nan=False))
    _print_demo(console, result)
    console.print(f"Report: {report}", highlight=False, soft_wrap=True)


def _print_demo(console: Console, result: DemoResult) -> None:
    table = Table(title=f"{result.settings['test_images']} held-out digits", title_justify="left")
    table.add_column("")
    for network in result.networks:
        table.add_column(network.name, justify="right")
    rows: list[tuple[str, list[str]]] = [
        ("classification error", [f"{100 * n.test_error:.2f} %" for n in result.networks]),
        ("guaranteed inverse", ["[green]yes" if n.guaranteed else "[red]no" for n in result.networks]),
        ("largest proven Lip(g) of a block", [number(n.largest_lipschitz) for n in result.networks]),
        ("reconstruction error, median", [f"{n.reconstruction_error:.1e}" for n in result.networks]),
        ("reconstruction error, worst", [f"{n.worst_reconstruction_error:.1e}" for n in result.networks]),
        ("inverse converged", [f"{100 * n.converged:.1f} %" for n in result.networks]),
        ("inverse certified", [f"{100 * n.certified:.1f} %" for n in result.networks]),
        ("iterations per block", [f"{n.iterations[0]} – {n.iterations[1]}" for n in result.networks]),
        ("training time", [f"{n.train_seconds:.0f} s" for n in result.networks]),
    ]
    for label, cells in rows:
        table.add_row(label, *cells)
    console.print(table)
    timings = Table(title=f"Inverse of {result.settings['timed_images']} of them", title_justify="left")
    for heading in ("method", "time", "error", "times ours"):
        timings.add_column(heading, justify="left" if heading == "method" else "right")
    for timing in result.timings:
        ratio = timing.seconds / result.timings[0].seconds
        timings.add_row(timing.method, f"{timing.seconds:.3f} s", f"{timing.reconstruction_error:.1e}", f"{ratio:.1f}×")
    console.print(timings)
    hybrid = result.hybrid
    flow = Table(title="One flow for class, likelihood and samples", title_justify="left", show_header=False)
    flow.add_row("classification error", f"{100 * hybrid.test_error:.2f} %")
    bits = f"{hybrid.bits_per_dim:.3f} ± {hybrid.standard_error:.3f}"
    flow.add_row(f"bits per dimension (knowing nothing: {hybrid.uniform_bits:.2f})", bits)
    flow.add_row("guaranteed inverse", "[green]yes" if hybrid.guaranteed else "[red]no")
    flow.add_row("reconstruction error, worst", f"{hybrid.worst_reconstruction_error:.1e}")
    flow.add_row("training time", f"{hybrid.train_seconds:.0f} s")
    console.print(flow)
