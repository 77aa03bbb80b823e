"""What is said of data that is not there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


class MissingDataError(FileNotFoundError):
    """Data was not found; the message names what was looked for, and where.

    Args:
        what: was looked for.
        candidates: paths that it could have had.
    """

    def __init__(self, what: str, candidates: Iterable[Path]) -> None:
        self.candidates = list(candidates)
        looked = "\n  ".join(map(str, self.candidates))
        super().__init__(f"{what} is not there. Looked for\n  {looked}\nRemedy: the folder that holds it")
