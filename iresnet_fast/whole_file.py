"""Files that are there whole, or as they were before."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path beside ``path`` to write to; when that ends well, what was written is put in ``path``'s place.

    A process that is killed meanwhile leaves the file beside it, which :func:`sweep` finds.

    Args:
        path: of the file. Its folder exists.

    Raises:
        OSError: it cannot be written; ``path`` is then as it was.
    """
    beside = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.part")
    try:
        beside.touch()
        mode = beside.stat().st_mode
        yield beside
        beside.chmod(mode)  # safetensors makes files that none but their owner reads
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a file of text by :func:`replacing`."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def sweep(folder: Path) -> None:
    """Remove what processes that were killed left in a folder that none is writing to now."""
    for leftover in folder.glob(".*.part"):
        leftover.unlink(missing_ok=True)
