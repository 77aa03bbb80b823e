"""The papers' tables and figures, made again."""

from collections.abc import Callable

from .classification import table1
from .dynamics import fig1
from .job import SCALES, Job
from .reconstructions import fig3, fig4
from .record import Record, Table
from .singular_values import fig2
from .slides import slides

TARGETS: dict[str, Callable[[Job], Record]] = {
    "fig1": fig1,
    "fig2": fig2,
    "fig3": fig3,
    "fig4": fig4,
    "table1": table1,
    "slides": slides,
}
# Those that need no images.
WITHOUT_IMAGES = ("fig1",)

__all__ = ["SCALES", "TARGETS", "WITHOUT_IMAGES", "Job", "Record", "Table"]
