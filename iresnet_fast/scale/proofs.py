"""What a job has proven of its results: counts, and quantiles of error bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_COUNTED = ("certified", "block_certified")
_MEASURED = ("error_bound", "residual")
_QUANTILES = {"median": 0.5, "99 %": 0.99, "all": 1.0}
# Quantiles are upper edges of classes, a hundred in every decade: a job of any size is counted in little memory.
_CLASSES = 100
_EDGES = np.arange(-40 * _CLASSES, 40 * _CLASSES + 1)


class Proofs:
    """Counts over the shards of a job."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(_COUNTED, 0)
        self._classes = {name: np.zeros(len(_EDGES) + 1, np.int64) for name in _MEASURED}
        self._known = dict.fromkeys(_MEASURED, 0)
        self._found = False

    def add(self, path: Path) -> None:
        """Count the rows of a shard; one of data that were only encoded has nothing to count."""
        names = [name for name in pq.read_schema(path).names if name in (*_COUNTED, *_MEASURED)]
        if "certified" not in names:
            return
        self._found = True
        table: pa.Table = pq.read_table(path, columns=names)
        for name in names:
            values = table.column(name).to_numpy()
            if name in _COUNTED:
                self._counts[name] += int(np.count_nonzero(values))
            else:
                values = np.abs(values[~np.isnan(values)])
                with np.errstate(divide="ignore"):
                    places = np.searchsorted(_EDGES, np.log10(values) * _CLASSES)
                self._classes[name] += np.bincount(places, minlength=len(_EDGES) + 1)
                self._known[name] += len(values)

    def to_dict(self) -> dict[str, Any] | None:
        """Counts and quantiles, ready for JSON; None where nothing was inverted."""
        if not self._found:
            return None
        return {**self._counts, **{name: self._quantiles(name) for name in _MEASURED}}

    def _quantiles(self, name: str) -> dict[str, float]:
        total = self._known[name]
        if not total:
            return {}
        below = np.cumsum(self._classes[name])
        places = [int(np.searchsorted(below, np.ceil(share * total))) for share in _QUANTILES.values()]
        edges = [10.0 ** (float(_EDGES[min(place, len(_EDGES) - 1)]) / _CLASSES) for place in places]
        # A little more, so that no digit that is cut makes it less.
        found = dict(zip(_QUANTILES, (float(f"{1.005 * edge:.3g}") for edge in edges), strict=True))
        return {"samples": total, **found}


def describe(found: dict[str, Any] | None, rows: int) -> list[str]:
    """Sentences on what is proven of a job's results, for a terminal."""
    if not found:
        return []
    text = [
        f"certified end to end: {found['certified']:,} of {rows:,}; every block's own solve: "
        f"{found['block_certified']:,}"
    ]
    for name, what in (("error_bound", "proven error"), ("residual", "measured residual")):
        if quantiles := found[name]:
            parts = ", ".join(f"{share} at most {quantiles[share]:.3g}" for share in _QUANTILES)
            text.append(f"{what} of {quantiles['samples']:,} samples: {parts}")
    return text
