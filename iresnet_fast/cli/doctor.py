"""``iresnet-fast doctor``."""

from __future__ import annotations

import json
import platform
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from .. import __version__, _extension
from ..ops._backend import BACKENDS, REGISTRY, VARIABLE
from .application import app, out


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
    out.print(facts)
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
    out.print(table)
    out.print(f"{VARIABLE}={'|'.join(BACKENDS)} chooses; auto is the default.", highlight=False, markup=False)
