"""Writes what the documents show of the result files: ``python -m benchmarks.readme``.

README.md has the headlines, and the promises that are not met among its limits; docs/benchmarks.md has everything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iresnet_fast.report.numbers import counts, error, factor, promised, seconds

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
_INVERSE, _COMPILED = "iresnet_fast, certified to 1e-6", "iresnet_fast, torch.compile"
HEADLINES = (
    Headline("all singular values of a convolution", "conv_spectrum", _GRAM, "NumPy", "NumPy, fft2 and svd"),
    Headline("", "conv_spectrum", _GRAM, "torch svdvals", "torch, rfft2 and svdvals"),
    Headline("proof that its norm is below a bound", "conv_spectrum", _PROOF, "NumPy", "NumPy, all values"),
    Headline(
        "spectral normalisation of the 7-7-7 network, forward and backward",
        "spectral_norm",
        "normalisation in it, fused, forward and backward",
        "torch.compile",
        "torch.compile, layer by layer",
    ),
    Headline(
        "inverse of a block or a network to 1e-6", "inverse", _INVERSE, "eager, 100", "the papers' 100 iterations"
    ),
    Headline("", "inverse", _INVERSE, "torch.compile", "torch.compile of these"),
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


def headlines(documents: list[dict[str, Any]]) -> str:
    """Markdown: a line per comparison, over all problems that have both."""
    parts = []
    for name, meta, rows in _machines(documents):
        dates = sorted({document["meta"]["date"] for document in documents if document["meta"]["machine"] == name})
        when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
        parts.append(f"**{meta['device']}**, {meta['threads']} threads, torch {meta['torch']}, {when}:\n")
        parts.append(_heading("what", "against", "problems", "speed-up", "largest error of ours, of theirs"))
        for headline in HEADLINES:
            pairs = list(_pairs(headline, rows))
            if pairs:
                ratios = sorted(other["wall"] / ours["wall"] for ours, other in pairs)
                speedup = " to ".join(dict.fromkeys((factor(ratios[0]), factor(ratios[-1]))))
                errors = (error(max(row["error"] for row in side)) for side in zip(*pairs, strict=True))
                cells = (headline.task, headline.shown, str(len(pairs)), speedup, ", ".join(errors))
                parts.append(f"| {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def not_met(documents: list[dict[str, Any]]) -> str:
    """Markdown: the promises that are not met."""
    lines = [
        f"{_promise(row, promise)} ({meta['device']})"
        for _, meta, rows in _machines(documents)
        for row in rows
        for promise in row["promises"]
        if promise["verdict"] == "not met"
    ]
    if not lines:
        return "- Every promise of the benchmarks is met on the machines measured.\n"
    return "- Of what the benchmarks promise is not met ([all promises](docs/benchmarks.md#promises)):\n" + "".join(
        f"  - {line};\n" for line in lines
    )


def page(documents: list[dict[str, Any]]) -> str:
    """The whole page of results: a table per machine, and what is promised."""
    parts = [_HEAD]
    for _, meta, rows in _machines(documents):
        parts.append(f"\n## {meta['device']}, {meta['threads']} threads\n")
        parts.append(f"torch {meta['torch']}. Medians of interleaved runs with cold caches, error against float64.\n")
        for case in dict.fromkeys(row["case"] for row in rows):
            dates = {document["meta"]["date"] for document in documents if document["rows"][0]["case"] == case}
            parts.append(f"\n### {case}\n\nMeasured {', '.join(sorted(dates))}.\n")
            parts.append(_heading("problem", "provider", "time", "speed-up", "error", "of floor", "counts"))
            parts += [_row(row) for row in rows if row["case"] == case and row["wall"] is not None]
        parts.append("\n### Promises\n")
        parts.append(_heading("promise", "against", "of", "must", "aim", "achieved", "verdict"))
        parts += [_promise_row(row, promise) for row in rows for promise in row["promises"]]
    return "\n".join(parts) + "\n"


_HEAD = """# Benchmarks

Written by `python -m benchmarks.readme` from the files in `benchmarks/results`, which have every setting; `iresnet-fast
report benchmarks/results` shows them with bars and plots. To measure your own machine:

```sh
python -m benchmarks --quick --json results.json    # small problems, minutes; without --quick about an hour
iresnet-fast report results.json
```

Every provider is compared with a float64 oracle first: one that is not exact enough is not timed. Providers then run in
turn on fresh inputs, with cold caches. A speed-up is over the first line of its problem. "Of floor" is the time over the least that the stated work can take at the
machine's own ceilings, measured in the same run. Of a promise, *must* is what we hold ourselves to and *aim* what we are
after: least values where they end in ×, largest ones otherwise.
"""


def update(text: str, documents: list[dict[str, Any]]) -> str:
    """The README's text with its sections renewed."""
    for name, written in (("results", headlines(documents)), ("promises", not_met(documents))):
        begin, end = (marker.format(name) for marker in _SECTION)
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"README.md has no section between {begin!r} and {end!r}")
        text = pattern.sub(lambda _, new=f"{begin}\n\n{written}\n{end}": new, text)
    return text


def _machines(documents: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    machines = {document["meta"]["machine"]: document["meta"] for document in documents}
    for name, meta in machines.items():
        yield (
            name,
            meta,
            [row for document in documents if document["meta"]["machine"] == name for row in document["rows"]],
        )


def _pairs(headline: Headline, rows: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
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


def _row(row: dict[str, Any]) -> str:
    cells = (row["problem"], row["provider"], seconds(row["wall"]), factor(row["speedup"]), error(row["error"]))
    return f"| {' | '.join((*cells, factor(row['floor_ratio']), counts(row.get('counts') or {})))} |"


def _promise_row(row: dict[str, Any], promise: dict[str, Any]) -> str:
    cells = (f"{row['case']}: {row['provider']}, {row['problem']}", promise["against"] or "–", promise["of"])
    return f"| {' | '.join((*cells, *promised(promise)))} | {promise['verdict']} |"


def _promise(row: dict[str, Any], promise: dict[str, Any]) -> str:
    must, _, achieved = promised(promise)
    against = f" against {promise['against']}" if promise["against"] else ""
    return f"{row['case']}, {row['problem']}: {row['provider']}{against}, {promise['of']} {achieved} (must {must})"


if __name__ == "__main__":
    found = results.read_all()
    README.write_text(update(README.read_text(encoding="utf-8"), found), encoding="utf-8")
    PAGE.write_text(page(found), encoding="utf-8")
