"""What a reproduced table or figure leaves behind: Markdown, JSON, and pictures."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..whole_file import write_whole


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: above it.
        columns: headings.
        rows: cells: text, numbers, or None where there is nothing.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON."""
        rows = [[_plain(cell) for cell in row] for row in self.rows]
        return {"title": self.title, "columns": self.columns, "rows": rows}

    def to_markdown(self) -> str:
        """As Markdown."""
        lines = [self.columns, ("---",) * len(self.columns), *(tuple(map(_cell, row)) for row in self.rows)]
        return f"**{self.title}**\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


@dataclass(frozen=True)
class Record:
    """A reproduced target.

    Attributes:
        target: its name, as ``fig2``.
        title: what it shows.
        command: that makes it again.
        scale: at which it was made.
        settings: everything it depends on.
        tables: ours, with the published figures beside them.
        figures: files in the same folder, and what they show.
        notes: what differs from the papers, and why.
    """

    target: str
    title: str
    command: str
    scale: str
    settings: dict[str, Any]
    tables: tuple[Table, ...] = ()
    figures: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    def to_markdown(self, folder: str = "") -> str:
        """As Markdown, without a heading of its own; ``folder`` stands before the names of figures."""
        parts = [f"`{self.command}`, scale `{self.scale}`.\n"]
        parts += [table.to_markdown() for table in self.tables]
        parts += [f"![{text}]({folder}{name})\n" for name, text in self.figures]
        parts += ["".join(f"- {note}\n" for note in self.notes)] if self.notes else []
        return "\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON."""
        return {
            "target": self.target,
            "title": self.title,
            "command": self.command,
            "scale": self.scale,
            "settings": self.settings,
            "tables": [table.to_dict() for table in self.tables],
            "figures": [list(figure) for figure in self.figures],
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Record:
        """What :meth:`to_dict` gave."""
        tables = tuple(
            Table(table["title"], tuple(table["columns"]), tuple(map(tuple, table["rows"])))
            for table in document["tables"]
        )
        figures = tuple((name, text) for name, text in document["figures"])
        return cls(**{**document, "tables": tables, "figures": figures, "notes": tuple(document["notes"])})

    def write(self, folder: Path) -> Path:
        """Write ``<target>.md`` and ``<target>.json`` beside the figures; returns the former's path."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        write_whole(folder / f"{self.target}.json", text + "\n")
        path = folder / f"{self.target}.md"
        write_whole(path, f"# {self.title}\n\n{self.to_markdown()}")
        return path


def _plain(cell: Any) -> Any:
    return repr(cell) if isinstance(cell, float) and not math.isfinite(cell) else cell


def _cell(cell: Any) -> str:
    if cell is None:
        return "–"
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)
