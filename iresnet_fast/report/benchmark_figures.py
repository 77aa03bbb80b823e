"""The figures of the benchmarks' report, as SVG."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .benchmarks import Row, Study
from .figures import BLUE, GREY, ORANGE, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 3
# Errors of zero are drawn here, on the lower edge.
_LEAST_ERROR = 1e-17
_MARKERS = "os^Dv<>Ph*X"


def is_ours(provider: str) -> bool:
    """Whether a provider is this package as its users get it."""
    return provider.startswith("iresnet_fast")


def color(row: Row) -> str:
    """Ours, another library's, or what both are compared with."""
    return BLUE if is_ours(row["provider"]) else ORANGE if row["peer"] else GREY


def error_against_time(problems: dict[str, list[Row]]) -> str:
    """A panel for each problem of a case: the error that each provider reached, against its time."""
    timed = {name: [row for row in rows if row["wall"] is not None] for name, rows in problems.items()}
    shown = {name: rows for name, rows in timed.items() if len(rows) > 1}
    if not shown:
        return ""
    figure, panels = _panels(len(shown))
    for axis, (name, rows) in zip(panels, shown.items(), strict=True):
        for row, marker in zip(rows, itertools.cycle(_MARKERS), strict=False):
            error = max(row["error"], _LEAST_ERROR)
            axis.loglog(row["wall"], error, marker, color=color(row), ms=6.5, mec="white", label=row["provider"])
        axis.set_title(_folded(name), fontsize=9)
        axis.set_xlabel("seconds")
        axis.set_ylabel("error against float64")
        axis.margins(0.15)
        _show_decades(axis)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=6, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.24))
    return _svg(figure)


def scaling(studies: Sequence[Study]) -> str:
    """A panel for each study: measured cost against what grows, with the fitted slopes and the stated one."""
    figure, panels = _panels(len(studies))
    for axis, study in zip(panels, studies, strict=True):
        for curve, marker in zip(study.curves, itertools.cycle(_MARKERS), strict=False):
            shade = BLUE if is_ours(curve.provider) else GREY
            slope = "" if curve.slope is None else f", slope {curve.slope:.2f}"
            axis.loglog(
                curve.values, curve.costs, f"{marker}-", color=shade, ms=5, lw=1.3, label=curve.provider + slope
            )
        values = sorted({value for curve in study.curves for value in curve.values})
        last = max(curve.costs[-1] for curve in study.curves if curve.values[-1] == values[-1])
        line = [2 * last * (value / values[-1]) ** study.slope for value in values]
        axis.loglog(values, line, "--", color=ORANGE, lw=1.2, label=f"theory, slope {study.slope:g}")
        axis.set_title(_folded(study.name), fontsize=9)
        axis.set_xticks(values, [f"{value:.3g}" for value in values])
        axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axis.set_xlabel(study.axis)
        axis.set_ylabel("seconds" if study.of == "wall" else study.of)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=6.5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.24))
    return _svg(figure)


def roofline(rows: Sequence[Row]) -> str:
    """Rate of the stated work against its operations per byte, under the ceilings; a panel for dtype and threads.

    Every measuring process has its own ceilings: the thick roof is the highest, the thin one the lowest.
    """
    roofs: dict[str, list[Row]] = {}
    for row in rows:
        work: dict[str, Any] | None = row["work"]
        if work and row["wall"] is not None and work["flops"] > 0:
            threads = f", {row['threads']} thread{'s' * (row['threads'] > 1)}" if row["threads"] else ""
            roofs.setdefault(work["dtype"] + threads, []).append(row)
    if not roofs:
        return ""
    figure, panels = _panels(len(roofs))
    for axis, (title, inside) in zip(panels, roofs.items(), strict=True):
        intensities = [row["work"]["flops"] / row["work"]["bytes"] for row in inside]
        for choose, width in ((max, 1.6), (min, 0.6)):
            flops, bandwidth = (choose(row["work"][rate] for row in inside) for rate in ("flops_per_s", "bytes_per_s"))
            ridge = flops / bandwidth
            ends = (min(*intensities, ridge) / 4, ridge, max(*intensities, ridge) * 4)
            axis.loglog(ends, [min(flops, bandwidth * end) / 1e9 for end in ends], color="black", lw=width)
        labelled = set()
        for row, intensity in zip(inside, intensities, strict=True):
            kind = (
                "iresnet_fast" if is_ours(row["provider"]) else "other libraries" if row["peer"] else "PyTorch, NumPy"
            )
            label = None if kind in labelled else kind
            labelled.add(kind)
            rate = row["work"]["flops"] / row["wall"] / 1e9
            axis.loglog(intensity, rate, "o", color=color(row), ms=5, mec="white", label=label)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("operations per byte of the least work")
        axis.set_ylabel("10⁹ operations per second")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7, frameon=False)
    return _svg(figure)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(_COLUMNS, count)
    lines = math.ceil(count / columns)
    figure = new_figure(4.2 * columns, 3.9 * lines)
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def _show_decades(axis: Axes) -> None:
    """At least two on each side, so that two powers of ten are labelled, and nothing between them."""
    from matplotlib.ticker import NullFormatter  # noqa: PLC0415  (an optional package)

    for (low, high), widen in ((axis.get_xlim(), axis.set_xlim), (axis.get_ylim(), axis.set_ylim)):
        missing = max(1.0, 100 * low / high) ** 0.5
        widen(low / missing, high * missing)
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_minor_formatter(NullFormatter())


def _folded(name: str) -> str:
    return name if len(name) < 48 else name.replace(", ", ",\n", 1)


def _svg(figure: Figure) -> str:
    """The figure as an element of a page."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
