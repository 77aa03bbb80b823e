"""``iresnet-fast reproduce``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.markdown import Markdown

from ..data import load
from ..optional import require
from ..reproduce import SCALES, TARGETS, WITHOUT_IMAGES, Job
from ..training import InterruptedRunError
from .application import app, err, make_progress
from .application import out as standard

Target = Enum("Target", {name: name for name in TARGETS})  # type: ignore[misc]  # names of tables
ScaleName = Enum("ScaleName", {name: name for name in SCALES})  # type: ignore[misc]  # names of tables


@app.command(
    epilog="**Examples:**\n\n`iresnet-fast reproduce fig1 --scale cpu --out results`\n\n"
    "`iresnet-fast reproduce table1 --data path/to/mnist --scale cpu --out results`\n\n"
    "Networks are trained once and kept in the folder: other targets take them, and their training goes on where it "
    "was stopped."
)
def reproduce(
    target: Annotated[Target, typer.Argument(help="The figure or table.")],
    data: Annotated[str | None, typer.Option(help="Folder or file of the images; fig1 needs none.")] = None,
    scale: Annotated[ScaleName, typer.Option(help="How much is spent.")] = ScaleName["cpu"],
    out: Annotated[Path, typer.Option(help="Folder for Markdown, JSON, pictures and the trained networks.")] = Path(
        "reproduced"
    ),
    seed: Annotated[int, typer.Option(help="Of everything.")] = 0,
) -> None:
    """Make a table or figure of the papers again, with the published figures beside ours."""
    name = str(target.value)
    require(name, "matplotlib", "safetensors", *(("zuko", "normflows") if name == "slides" else ()))
    images = None if name in WITHOUT_IMAGES else load(data if data is not None else "mnist")
    progress = make_progress(standard)
    with progress:
        task = progress.add_task(name, total=None)

        def report(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)

        try:
            record = TARGETS[name](Job(SCALES[str(scale.value)], images, out, report, seed))
        except InterruptedRunError:
            err.print(f"iresnet-fast: stopped, and {out} keeps what was trained. Remedy: the same command goes on")
            raise typer.Exit(130) from None
    path = record.write(out)
    standard.print(Markdown(record.to_markdown()))
    standard.print(f"wrote {path}", highlight=False, soft_wrap=True)
