"""Result files of the benchmarks: read, checked, and put in the order in which they are shown."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_META = frozenset({"device", "machine", "torch", "threads", "commit", "date", "quick", "ceilings"})
_ROW = frozenset({"case", "problem", "provider", "status", "error", "wall", "speedup", "floor_ratio", "promises"})
# What older files leave out.
_DEFAULTS = {"peer": False, "counts": {}, "reason": None, "work": None, "study": None, "threads": None}
# Points at the upper end of a study that its slope is fitted to: below them, what each call costs by itself shows.
_FITTED = 3

Row = dict[str, Any]


@dataclass(frozen=True)
class Curve:
    """How the cost of one provider grows in a study.

    Attributes:
        provider: whose cost.
        values: of what grows, increasing.
        costs: seconds, or counts.
        slope: of the logarithm of the cost against that of the value, least squares over the last three points; None
            with fewer than two.
    """

    provider: str
    values: tuple[float, ...]
    costs: tuple[float, ...]
    slope: float | None


@dataclass(frozen=True)
class Study:
    """A study of scaling: the curves of all providers, beside the slope that theory states.

    Attributes:
        name: of the study.
        axis: what grows, with its unit.
        of: what it costs: "wall" (seconds), or the name of a count.
        slope: stated by theory.
        curves: one for each provider that was measured, at least one.
    """

    name: str
    axis: str
    of: str
    slope: float
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class Results:
    """What was measured on one machine.

    Attributes:
        meta: device, versions, date and ceilings of each result file, newest last.
        rows: of all files, one for each provider of each problem, with the ``date`` of its file.
    """

    meta: tuple[dict[str, Any], ...]
    rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        """Device and number of threads."""
        return f"{self.meta[-1]['device']}, {self.meta[-1]['threads']} threads"

    @property
    def cases(self) -> dict[str, dict[str, list[Row]]]:
        """Rows that are no points of a study, by case and problem."""
        cases: dict[str, dict[str, list[Row]]] = {}
        for row in self.rows:
            if not row["study"]:
                cases.setdefault(row["case"], {}).setdefault(row["problem"], []).append(row)
        return cases

    @property
    def promises(self) -> list[tuple[Row, dict[str, Any]]]:
        """Every promise, with the row it belongs to."""
        return [(row, promise) for row in self.rows for promise in row["promises"]]

    @property
    def studies(self) -> list[Study]:
        """The studies of scaling in which something was measured."""
        studies: dict[str, list[Row]] = {}
        for row in self.rows:
            if row["study"]:
                studies.setdefault(row["study"]["name"], []).append(row)
        return [study for study in map(_study, studies.values()) if study.curves]

    @property
    def unmeasured(self) -> list[Row]:
        """Points of studies that have no time."""
        return [row for row in self.rows if row["study"] and row["wall"] is None]


def read(paths: Sequence[Path]) -> list[Results]:
    """Read result files, or all those in folders and the folders below; one result for each machine.

    Args:
        paths: JSON files as ``python -m benchmarks --json FILE`` or ``--save`` writes them, or folders of them.

    Raises:
        FileNotFoundError: a path does not exist, or a folder has no JSON file.
        ValueError: a file is no result file, or two files have the same row of the same machine.
    """
    machines: dict[str, list[dict[str, Any]]] = {}
    for path in _files(paths):
        document = _document(path)
        machines.setdefault(str(document["meta"]["machine"]), []).append(document)
    return [_merged(name, documents) for name, documents in machines.items()]


def _files(paths: Sequence[Path]) -> list[Path]:
    files = []
    for path in paths:
        found = sorted(path.rglob("*.json")) if path.is_dir() else [path] if path.is_file() else []
        if not found:
            what = "has no result file (*.json)" if path.is_dir() else "does not exist"
            raise FileNotFoundError(f"{path} {what}. Remedy: python -m benchmarks --json results.json")
        files += found
    return files


def _document(path: Path) -> dict[str, Any]:
    remedy = f"Remedy: python -m benchmarks --json {path}"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}. {remedy}") from error
    content = document if isinstance(document, dict) else {}
    meta, rows = content.get("meta"), content.get("rows")
    meta = meta if isinstance(meta, dict) else {}
    rows = rows if isinstance(rows, list) and all(isinstance(row, dict) for row in rows) else [{}]
    missing = (_META - meta.keys()).union(*(_ROW - row.keys() for row in rows))
    if missing:
        raise ValueError(f"{path} is no result file of the benchmarks: {', '.join(sorted(missing))} missing. {remedy}")
    return {"meta": meta, "rows": [{**_DEFAULTS, **row, "date": meta["date"]} for row in rows]}


def _merged(machine: str, documents: list[dict[str, Any]]) -> Results:
    rows = [row for document in documents for row in document["rows"]]
    seen: set[tuple[str, str, str]] = set()
    for row in rows:
        key = row["case"], row["problem"], row["provider"]
        if key in seen:
            raise ValueError(
                f"{machine}: {' / '.join(key)} is in the result files twice. Remedy: one report for each run"
            )
        seen.add(key)
    meta = sorted((document["meta"] for document in documents), key=lambda meta: str(meta["date"]))
    return Results(tuple(meta), tuple(rows))


def _study(rows: list[Row]) -> Study:
    points: dict[str, list[tuple[float, float]]] = {}
    study = rows[0]["study"]
    for row in rows:
        cost = row["wall"] if study["of"] == "wall" else row["counts"].get(study["of"])
        if row["wall"] is not None and cost:
            points.setdefault(row["provider"], []).append((row["study"]["value"], cost))
    curves = []
    for provider, found in points.items():
        values, costs = zip(*sorted(found), strict=True)
        curves.append(Curve(provider, values, costs, _slope(values[-_FITTED:], costs[-_FITTED:])))
    return Study(study["name"], study["axis"], study["of"], study["slope"], tuple(curves))


def _slope(values: Sequence[float], costs: Sequence[float]) -> float | None:
    x, y = ([math.log(entry) for entry in entries] for entries in (values, costs))
    center, middle = sum(x) / len(x), sum(y) / len(y)
    spread = sum((entry - center) ** 2 for entry in x)
    return sum((a - center) * (b - middle) for a, b in zip(x, y, strict=True)) / spread if spread else None
