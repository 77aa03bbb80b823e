"""Writes the README's results tables from the result files: ``python -m benchmarks.readme``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from iresnet_fast.report.numbers import counts, error, factor, promised, seconds

from . import results

README = Path(__file__).parent.parent / "README.md"
_BEGIN, _END = "<!-- results: written by python -m benchmarks.readme -->", "<!-- end of results -->"


def render(documents: list[dict[str, Any]]) -> str:
    """Markdown of the documents: a table per machine, and what is promised."""
    parts = []
    machines = {document["meta"]["machine"]: document["meta"] for document in documents}
    for name, meta in machines.items():
        rows = [row for document in documents if document["meta"]["machine"] == name for row in document["rows"]]
        parts.append(
            f"**{meta['device']}**, {meta['threads']} threads, torch {meta['torch']}, {meta['date']}; medians of "
            "interleaved runs with cold caches, error against float64:\n"
        )
        parts.append(_heading("case", "problem", "provider", "time", "speed-up", "error", "of floor", "counts"))
        parts += [_row(row) for row in rows if row["wall"] is not None]
        promises = [(row, promise) for row in rows for promise in row["promises"]]
        if promises:
            parts.append("\n" + _heading("promise", "against", "of", "must", "aim", "achieved", "verdict"))
            parts += [_promise(row, promise) for row, promise in promises]
        parts.append("")
    return "\n".join(parts)


def update(text: str, documents: list[dict[str, Any]]) -> str:
    """The README's text with its results section renewed."""
    pattern = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"README.md has no section between {_BEGIN!r} and {_END!r}")
    return pattern.sub(lambda _: f"{_BEGIN}\n\n{render(documents)}\n{_END}", text)


def _heading(*names: str) -> str:
    return f"| {' | '.join(names)} |\n{'|---' * len(names)}|"


def _row(row: dict[str, Any]) -> str:
    cells = (row["case"], row["problem"], row["provider"], seconds(row["wall"]), factor(row["speedup"]))
    last = (factor(row["floor_ratio"]), counts(row.get("counts", {})))
    return f"| {' | '.join(cells)} | {error(row['error'])} | {' | '.join(last)} |"


def _promise(row: dict[str, Any], promise: dict[str, Any]) -> str:
    cells = (f"{row['provider']}, {row['problem']}", promise["against"] or "–", promise["of"])
    return f"| {' | '.join((*cells, *promised(promise)))} | {promise['verdict']} |"


if __name__ == "__main__":
    README.write_text(update(README.read_text(encoding="utf-8"), results.read_all()), encoding="utf-8")
