"""The demonstration's report: one HTML file that needs no other."""

from __future__ import annotations

import base64
import importlib.util
from pathlib import Path

from .demo import DemoResult
from .figures import draw_convergence, draw_norms, draw_reconstructions, draw_samples
from .inversion import relative_errors


def require_packages() -> None:
    """Check for what the report is made with, before the work of measuring.

    Raises:
        ModuleNotFoundError: matplotlib, jinja2 or scikit-learn is not installed.
    """
    for package in ("matplotlib", "jinja2", "sklearn"):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(
                f"the demonstration needs {package}, which is not installed. Remedy: pip install 'iresnet_fast[demo]'"
            )


def write_report(result: DemoResult, out: Path) -> Path:
    """Draw the figures as PNGs and write ``report.html`` with them inside; returns its path.

    Raises:
        ModuleNotFoundError: matplotlib or jinja2 is not installed.
    """
    require_packages()
    import jinja2  # noqa: PLC0415  (an optional package)

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

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("iresnet_fast.report"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    figures = {
        name: base64.b64encode((out / f"{name}.png").read_bytes()).decode()
        for name in ("reconstructions", "convergence", "norms", "samples")
    }
    path = out / "report.html"
    page = environment.get_template("report.html").render(result=result, figures=figures)
    path.write_text(page, encoding="utf-8")
    return path
