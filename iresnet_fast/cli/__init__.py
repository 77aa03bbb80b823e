"""The command ``iresnet-fast``."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from . import __version__, _extension
from .ops._backend import BACKENDS, REGISTRY, VARIABLE
from .report.demo import DemoResult, run_demo, write_results
from .report.page import require_packages, write_report

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Fast, certified invertible residual networks.",
)
# What a person reads goes to standard error where --json owns standard output.
_out, _err = Console(), Console(stderr=True)

# Measurements of the demonstration beside the epochs: two inversions, the flow, the comparison, the drawing.
_DEMO_MEASUREMENTS = 5


@app.callback()
def _main() -> None:
    """Keep subcommands, also while there are few."""


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
    console = _err if as_json else _out
    require_packages()  # these fail now rather than after the training
    out.mkdir(parents=True, exist_ok=True)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with progress:
        task = progress.add_task("training the i-ResNet", total=3 * epochs + _DEMO_MEASUREMENTS)
        result = run_demo(
            epochs,
            seed,
            on_step=lambda description: progress.update(task, advance=1, description=description),
        )
        write_results(result, out)
        report = write_report(result, out)
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2, allow_nan=False))
    _print_demo(console, result)
    console.print(f"Report: {report}", highlight=False, soft_wrap=True)


@app.command(
    epilog="**Examples:**\n\n`iresnet-fast doctor`\n\n`IRESNET_FAST_BACKEND=reference iresnet-fast doctor --json`"
)
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say what this machine has, which backend serves each op and why not the others, and test one op of each."""
    findings = _examine()
    if as_json:
        typer.echo(json.dumps(findings, indent=2))
    else:
        _print_findings(findings)
    if any(op["self_test"] == "failed" for op in findings["ops"]):
        raise typer.Exit(1)


def main() -> None:
    """Run the command; errors that a user can act on are one line, not a traceback."""
    try:
        app()
    except ModuleNotFoundError as error:
        sys.exit(f"iresnet-fast: {error}")
    except OSError as error:
        sys.exit(f"iresnet-fast: {error.strerror}: {error.filename}")


def _print_demo(console: Console, result: DemoResult) -> None:
    table = Table(title=f"{result.settings['test_images']} held-out digits", title_justify="left")
    table.add_column("")
    for network in result.networks:
        table.add_column(network.name, justify="right")
    rows: list[tuple[str, list[str]]] = [
        ("classification error", [f"{100 * n.test_error:.2f} %" for n in result.networks]),
        ("guaranteed inverse", ["[green]yes" if n.guaranteed else "[red]no" for n in result.networks]),
        ("largest proven Lip(g) of a block", [f"{n.largest_lipschitz:.4g}" for n in result.networks]),
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


def _examine() -> dict[str, Any]:
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    devices = ["cpu"] + ["cuda"] * (cuda is not None)
    return {
        "iresnet_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cuda": cuda,
        "extension": _extension.build_info() or _extension.missing_reason,
        "ops": [_examine_op(name, device) for name in REGISTRY for device in devices],
    }


def _examine_op(name: str, device: str) -> dict[str, Any]:
    op = REGISTRY[name]
    candidates = op.backends.get(device, ("reference",))
    why_not = {backend: reason for backend in candidates if (reason := op.obstacle(backend, device))}
    finding: dict[str, Any] = {"op": name, "device": device, "why_not": why_not}
    try:
        finding["served_by"] = op.choose(torch.device(device))
        finding["error"] = op.self_test(torch.device(device))
        finding["self_test"] = "passed" if finding["error"] <= op.self_test_tolerance else "failed"
    except (RuntimeError, ValueError) as error:
        finding |= {"served_by": None, "self_test": "failed", "message": str(error)}
    return finding


def _print_findings(findings: dict[str, Any]) -> None:
    facts = Table(show_header=False, box=None)
    for key in ("iresnet_fast", "python", "torch", "threads", "cuda"):
        facts.add_row(key, str(findings[key] or "none"))
    extension = findings["extension"]
    built = extension if isinstance(extension, str) else ", ".join(f"{k} {v}" for k, v in extension.items())
    facts.add_row("extension", built)
    _out.print(facts)
    table = Table()
    for heading in ("op", "device", "served by"):
        table.add_column(heading, no_wrap=True)
    for heading in ("self-test", "why not the others"):
        table.add_column(heading, overflow="fold")
    for op in findings["ops"]:
        color = "green" if op["self_test"] == "passed" else "red"
        outcome = f"[{color}]{op['self_test']}[/]" + (f" (error {op['error']:.0e})" if "error" in op else "")
        reasons = "\n".join(f"{backend}: {reason}" for backend, reason in op["why_not"].items())
        table.add_row(op["op"], op["device"], op["served_by"] or "nothing", outcome, op.get("message") or reasons)
    _out.print(table)
    _out.print(f"{VARIABLE}={'|'.join(BACKENDS)} chooses; auto is the default.", highlight=False, markup=False)
