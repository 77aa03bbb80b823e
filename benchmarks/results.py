"""Result files: one schema, ``{"meta": …, "rows": […]}``, for --json and for ``results/<machine>/<case>.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from .harness import Row

FOLDER = Path(__file__).parent / "results"


def to_document(meta: dict[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """The document of some rows."""
    return {"meta": meta, "rows": [asdict(row) for row in rows]}


def dump(stream: TextIO, meta: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write the document of some rows to an open stream."""
    json.dump(to_document(meta, rows), stream, indent=1, allow_nan=False)
    stream.write("\n")


def write(path: Path, meta: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write a result file, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as stream:
        dump(stream, meta, rows)
