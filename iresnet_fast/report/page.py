"""Pages: one HTML file each, that needs no other."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from ..optional import require
from ..solvers import relative_errors
from . import numbers
from .benchmark_figures import error_against_time, is_ours, roofline, scaling
from .benchmarks import Results, Row
from .demo import DemoResult
from .figures import draw_convergence, draw_norms, draw_reconstructions, draw_samples

DRAWN_WITH = ("matplotlib", "jinja2")


def write_demo_page(result: DemoResult, out: Path) -> Path:
    """Draw the demonstration's figures as PNGs and write ``report.html`` with them inside; returns its path.

    Raises:
        ModuleNotFoundError: matplotlib or jinja2 is not installed.
    """
    require("the demonstration's page", *DRAWN_WITH)
    names = [network.name for network in result.networks]
    rows = [
        (name, found, relative_errors(found, result.images).tolist())
        for name, found in zip(names, result.reconstructions, strict=True)
    ]
    draw_reconstructions(result.images, rows, out / "reconstructions.png")
    draw_convergence(result.convergence, out / "convergence.png")
    coeff = result.networks[0].coeff
    draw_norms(list(zip(names, result.certificates, strict=True)), 1.0 if coeff is None else coeff, out / "norms.png")
    draw_samples(result.samples, out / "samples.png")
    figures = {
        name: base64.b64encode((out / f"{name}.png").read_bytes()).decode()
        for name in ("reconstructions", "convergence", "norms", "samples")
    }
    return _write(out / "report.html", "demo.html", result=result, figures=figures)


def write_benchmark_page(machines: list[Results], path: Path) -> Path:
    """Write the benchmarks' results of some machines as one HTML file, figures inside; returns its path.

    Raises:
        ModuleNotFoundError: matplotlib or jinja2 is not installed.
    """
    require("the report", *DRAWN_WITH)
    context = [
        {
            "results": results,
            "bars": {case: _bars(problems) for case, problems in results.cases.items()},
            "errors": {case: error_against_time(problems) for case, problems in results.cases.items()},
            "scaling": scaling(results.studies) if results.studies else "",
            "roofline": roofline(results.rows),
        }
        for results in machines
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    return _write(path, "benchmarks.html", machines=context, is_ours=is_ours)


def _bars(problems: dict[str, list[Row]]) -> dict[str, list[tuple[Row, float]]]:
    """Each row with the length of its bar: its speed-up as a share of the problem's largest."""
    largest = {name: max((row["speedup"] or 0.0 for row in rows), default=0.0) for name, rows in problems.items()}
    return {
        name: [(row, (row["speedup"] or 0.0) / (largest[name] or 1.0)) for row in rows]
        for name, rows in problems.items()
    }


def _write(path: Path, template: str, **context: Any) -> Path:
    import jinja2  # noqa: PLC0415  (an optional package)

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("iresnet_fast.report"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.globals["numbers"] = numbers
    path.write_text(environment.get_template(template).render(**context), encoding="utf-8")
    return path
