"""Writes what the documents show of the result files: ``python -m benchmarks.readme``.

README.md has the headlines, and the promises that are not met among its limits; docs/benchmarks.md has everything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iresnet_fast.report.benchmarks import Curve, Results, Row, Study, read
from iresnet_fast.report.numbers import counts, error, factor, number, promised, seconds

from . import results

ROOT = Path(__file__).parent.parent
README, PAGE = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
_SECTION = "<!-- {}: written by python -m benchmarks.readme -->", "<!-- end of {} -->"


@dataclass(frozen=True)
class Headline:
    """A line of the README: what of ours, against what, on the problems of a case.

    Attributes:
        task: what is computed.
        case: its name.
        ours: our provider.
        others: the first words of the other provider's name.
        shown: how the other is called.
        problems: a part of the names of the problems.
        ending: the last words of the other provider's name.
    """

    task: str
    case: str
    ours: str
    others: str
    shown: str
    problems: str = ""
    ending: str = ""


_GRAM, _PROOF = "iresnet_fast, gram", "iresnet_fast, proof of the norm"
_INVERSE, _CERTIFIED = "iresnet_fast, to 1e-6", "iresnet_fast, certified to 1e-6"
_COMPILED = "iresnet_fast, torch.compile"
HEADLINES = (
    Headline("all singular values of a convolution", "conv_spectrum", _GRAM, "NumPy", "NumPy, fft2 and svd"),
    Headline("", "conv_spectrum", _GRAM, "torch svdvals", "torch, rfft2 and svdvals"),
    Headline("proof that its norm is below a bound", "conv_spectrum", _PROOF, "NumPy", "NumPy, all values"),
    Headline(
        "spectral normalisation of the 7-7-7 network, forward and backward",
        "spectral_norm",
        "iresnet_fast, fused normalisation",
        "eager normalisation",
        "eager, layer by layer",
    ),
    Headline(
        "inverse of a block or a network to 1e-6", "inverse", _INVERSE, "eager, 100", "the papers' 100 iterations"
    ),
    Headline(
        "the same, certified",
        "inverse",
        _CERTIFIED,
        "eager, 100",
        "the papers' 100 iterations, of which nothing is proven",
    ),
    Headline("without a proof", "inverse", _INVERSE, "torch.compile", "torch.compile of these"),
    Headline("", "inverse", _INVERSE, "eager, fewest", "the fewest iterations for our error, known beforehand"),
    Headline("", "inverse", _INVERSE, "eager, fewest", "the same, weights normalised once", ending="once"),
    Headline("", "inverse", _INVERSE, "normflows", "normflows"),
    Headline("", "inverse", _INVERSE, "FrEIA", "FrEIA"),
    Headline("", "inverse", _INVERSE, "torchflows", "torchflows"),
    Headline("log-determinant and its gradient", "log_det", "iresnet_fast, NeumannGradient", "normflows", "normflows"),
    Headline("training step of a flow", "flow2d", "iresnet_fast", "normflows", "normflows", "training step"),
    Headline("the same, ours by torch.compile", "flow2d", _COMPILED, "normflows", "normflows", "training step"),
    Headline("10,000 samples of a flow", "flow2d", "iresnet_fast", "normflows", "normflows", "samples"),
    Headline(
        "a file of latents inverted, with bounds", "scale", "iresnet_fast, job on files", "bare loop", "a bare loop"
    ),
)


def headlines(machines: list[Results]) -> str:
    """Markdown: a line per comparison, over all problems that have both."""
    parts = []
    for machine in machines:
        first, last = machine.meta[0], machine.meta[-1]
        when = " to ".join(dict.fromkeys((first["date"], last["date"])))
        parts.append(f"**{machine.name}**, torch {last['torch']}, {when}:\n")
        parts.append(_heading("what", "against", "problems", "speed-up", "largest error of ours, of theirs"))
        for headline in HEADLINES:
            pairs = list(_pairs(headline, machine.rows))
            if pairs:
                ratios = sorted(other["wall"] / ours["wall"] for ours, other in pairs)
                speedup = " to ".join(dict.fromkeys((factor(ratios[0]), factor(ratios[-1]))))
                errors = (error(max(row["error"] for row in side)) for side in zip(*pairs, strict=True))
                cells = (headline.task, headline.shown, str(len(pairs)), speedup, ", ".join(errors))
                parts.append(f"| {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def not_met(machines: list[Results]) -> str:
    """Markdown: the promises that are not met, or were not measured."""
    lines = [
        f"  - {_promise(row, promise)}{f' on {machine.name}' if len(machines) > 1 else ''};\n"
        for machine in machines
        for row, promise in machine.promises
        if promise["verdict"] in ("not met", "not measured")
    ]
    if not lines:
        return "- Every promise of the benchmarks is met on the machines measured.\n"
    return "- Of what the benchmarks [promise](docs/benchmarks.md#promises) is not met:\n" + "".join(lines)


def page(machines: list[Results]) -> str:
    """The whole page of results: a table per machine and case, the slopes of studies, and what is promised."""
    parts = [_HEAD]
    for machine in machines:
        parts.append(f"\n## {machine.name}\n\ntorch {machine.meta[-1]['torch']}.")
        for case, problems in machine.cases.items():
            rows = [row for inside in problems.values() for row in inside]
            parts.append(f"\n### {case}\n\nMeasured {', '.join(sorted({row['date'] for row in rows}))}.\n")
            parts.append(_heading("problem", "provider", "time", "speed-up", "error", "of floor", "counts"))
            parts += [_row(row) for row in rows]
        if machine.studies:
            parts.append("\n### Scaling\n\nSlopes are those of the last three points, both sides logarithmic.\n")
            parts.append(_heading("study", "from, to", "provider", "cost from, to", "slope", "of the work, by theory"))
            parts += [_curve(study, curve) for study in machine.studies for curve in study.curves]
            parts += [f"\n{row['problem']}, {row['provider']}: {row['reason']}." for row in machine.unmeasured]
        parts.append("\n### Promises\n")
        parts.append(_heading("promise", "against", "of", "must", "aim", "achieved", "verdict"))
        parts += [_promise_row(row, promise) for row, promise in machine.promises]
    return "\n".join(parts) + "\n"


_HEAD = """# Benchmarks

Written by `python -m benchmarks.readme` from the files in `benchmarks/results`, which have every setting; `iresnet-fast
report benchmarks/results` shows them with bars and plots. To measure your own machine, in the project's folder:

```sh
python -m benchmarks fixed_point_update --quick --json results.json
iresnet-fast report results.json
```

Without a name every case is measured: with `--quick` small problems in minutes, without it all in an hour. Every
provider is compared with a float64 oracle first: one that is not exact enough is not timed. Providers then run in turn
on fresh inputs, with cold caches; times are medians. A speed-up is over the first line of its problem that has a time.
"Of floor" is the time over the least that the stated work can take at the machine's own ceilings, measured in the same
run: copies of memory, and matrix products or, on a CPU, multiply-adds in registers, whichever are faster.
Of a promise, *must* is what we hold ourselves to and *aim* what we are after: least values where they end in ×,
largest ones otherwise.
"""


def update(text: str, machines: list[Results]) -> str:
    """The README's text with its sections renewed."""
    for name, written in (("results", headlines(machines)), ("promises", not_met(machines))):
        begin, end = (marker.format(name) for marker in _SECTION)
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"README.md has no section between {begin!r} and {end!r}")
        text = pattern.sub(lambda _, new=f"{begin}\n\n{written}\n{end}": new, text)
    return text


def _pairs(headline: Headline, rows: Sequence[Row]) -> Iterator[tuple[Row, Row]]:
    inside = [
        row for row in rows if row["case"] == headline.case and headline.problems in row["problem"] and row["wall"]
    ]
    for ours in (row for row in inside if row["provider"] == headline.ours):
        for other in inside:
            name = other["provider"]
            is_asked_for = name.startswith(headline.others) and name.endswith(headline.ending)
            if other["problem"] == ours["problem"] and is_asked_for:
                yield ours, other
                break


def _heading(*names: str) -> str:
    return f"| {' | '.join(names)} |\n{'|---' * len(names)}|"


def _row(row: Row) -> str:
    if row["wall"] is None:
        return (
            f"| {row['problem']} | {row['provider']} | {row['status']}: {row['reason']} | | {error(row['error'])} | | |"
        )
    took = seconds(row["wall"]).replace(" ", "\u00a0")
    cells = (row["problem"], row["provider"], took, factor(row["speedup"]), error(row["error"]))
    return f"| {' | '.join((*cells, factor(row['floor_ratio']), counts(row['counts'])))} |"


def _curve(study: Study, curve: Curve) -> str:
    show = seconds if study.of == "wall" else number
    ends = ", ".join(map(number, (curve.values[0], curve.values[-1])))
    costs = ", ".join(map(show, (curve.costs[0], curve.costs[-1])))
    what = study.axis if study.of == "wall" else f"{study.axis}; {study.of}"
    cells = (f"{study.name} ({what})", ends, curve.provider, costs, number(curve.slope), number(study.slope))
    return f"| {' | '.join(cells)} |"


def _promise_row(row: Row, promise: dict[str, Any]) -> str:
    cells = (f"{row['case']}: {row['provider']}, {row['problem']}", promise["against"] or "–", promise["of"])
    return f"| {' | '.join((*cells, *promised(promise)))} | {promise['verdict']} |"


def _promise(row: Row, promise: dict[str, Any]) -> str:
    must, _, achieved = promised(promise)
    against = f" against {promise['against']}" if promise["against"] else ""
    return f"{row['case']}, {row['problem']}: {row['provider']}{against}, {promise['of']} {achieved} (must {must})"


if __name__ == "__main__":
    found = read([results.FOLDER])
    README.write_text(update(README.read_text(encoding="utf-8"), found), encoding="utf-8")
    PAGE.write_text(page(found), encoding="utf-8")
