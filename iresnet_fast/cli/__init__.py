"""The command ``iresnet-fast``."""

from __future__ import annotations

import sys

from ..solvers import NotConvergedError
from ..training import DivergedError
from . import demo, doctor, report, reproduce, runs, scale  # noqa: F401  (they register their commands)
from .application import app


def main() -> None:
    """Run the command; errors that a user can act on are one line, not a traceback."""
    try:
        app()
    except ModuleNotFoundError as error:
        sys.exit(f"iresnet-fast: {error}")
    except OSError as error:
        sys.exit(f"iresnet-fast: {error.strerror}: {error.filename}" if error.strerror else f"iresnet-fast: {error}")
    except (ValueError, DivergedError, NotConvergedError) as error:
        sys.exit(f"iresnet-fast: {error}")
