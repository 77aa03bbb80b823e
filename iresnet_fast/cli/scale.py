"""``iresnet-fast invert``, ``encode`` and ``round-trip``: folders of samples through a trained network; ``verify``."""

from __future__ import annotations

import inspect
import json
from datetime import timedelta
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.table import Table

from ..models import Model, load_pretrained
from ..models.pretrained import WEIGHTS
from ..optional import require
from ..training.folder import BEST, LAST, load_run
from .application import app, err, make_progress
from .application import out as standard

if TYPE_CHECKING:
    from ..scale import Estimate, Lost, Outcome, ShardRecord


class Engine(Enum):
    """What runs a job."""

    local = "local"
    torchrun = "torchrun"
    ray = "ray"


class Dtype(Enum):
    """In which a network works."""

    float32 = "float32"
    float64 = "float64"


_Network = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a training run, or of save_pretrained.")]
_Input = Annotated[
    list[str],
    typer.Option("--input", help="Files, as latents/data/*.parquet; also .npy, .npz and .safetensors. Repeatable."),
]
_Output = Annotated[Path, typer.Option("--output", help="Folder of the results; new, or empty, or with --resume.")]
_Engine = Annotated[Engine, typer.Option(help="What runs it: this process, those of torchrun, or Ray.")]
_Resume = Annotated[bool, typer.Option("--resume", help="Go on with the job in the folder of the results.")]
_Strict = Annotated[bool, typer.Option("--strict", help="Exit status 1 where samples did not converge.")]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Measure one batch, say what all will take, write nothing.")]
_Column = Annotated[str | None, typer.Option(help="Name of the samples in the files. Default: z to invert, else x.")]
_Shard = Annotated[
    int | None, typer.Option(min=1, help="Samples of one file of results. Default: 8192, or 256 MiB of them.")
]
_Batch = Annotated[
    int | None, typer.Option(min=1, help="Samples that are evaluated together. Default: 1024, or 64 MiB of them.")
]
_Dtype = Annotated[Dtype, typer.Option(help="In which the network works.")]
_Best = Annotated[bool, typer.Option("--best", help="Take the best checkpoint of the run in place of the last.")]
_Threads = Annotated[int, typer.Option(min=0, help="CPU threads of each worker; 0 for torch's default, with Ray 1.")]
_Workers = Annotated[int, typer.Option(min=0, help="Ray's actors; 0 for one a GPU, or one for --threads processors.")]
_Address = Annotated[str | None, typer.Option(help="Of a Ray cluster, as auto. Default: this machine.")]
_Tol = Annotated[float, typer.Option(help="Tolerance of every block's inverse.")]


_LogDet = Annotated[bool, typer.Option("--log-det", help="Give log-determinants, too, and of a flow log-densities.")]
# Options that some commands have not.
_OWN = {"invert": {"tol"}, "encode": {"log_det"}, "round-trip": {"tol"}}
_ABOUT = {
    "invert": "Invert files of latents: x, its measured residual and its proven error bound, for every sample.",
    "encode": "Map files of data to latents, with log-determinants and log-densities where they are asked for.",
    "round-trip": "Map files of data to latents and back: how far every sample comes back from where it was.",
}


def _do(
    operation: str,
    run: _Network,
    inputs: _Input,
    output: _Output,
    engine: _Engine = Engine.local,
    tol: _Tol = 1e-6,
    log_det: _LogDet = False,
    resume: _Resume = False,
    strict: _Strict = False,
    dry_run: _DryRun = False,
    column: _Column = None,
    shard_rows: _Shard = None,
    batch_size: _Batch = None,
    dtype: _Dtype = Dtype.float32,
    best: _Best = False,
    threads: _Threads = 0,
    workers: _Workers = 0,
    address: _Address = None,
) -> None:
    require(operation, "pyarrow")
    from .. import scale  # noqa: PLC0415  (its packages are optional)

    if threads:
        torch.set_num_threads(threads)
    place = scale.Place()
    if engine is Engine.torchrun:
        place = scale.Place.of_torchrun()
        scale.end_with_parent()
    standard.quiet = place.rank > 0  # of several processes one speaks
    load = partial(load_network, run.absolute(), best, str(dtype.value))
    gpus = 0 if engine is Engine.ray else torch.cuda.device_count()  # Ray's actors have the GPUs
    model = load().to(f"cuda:{place.local % gpus}" if gpus else "cpu")
    chosen = scale.Operation(operation, tol, log_det)
    plan = scale.make_plan(model, chosen, inputs, column=column, shard_rows=shard_rows, batch_size=batch_size)
    if not plan.certificate["guaranteed"] and operation != "encode":
        err.print("iresnet-fast: the network's inverse is not proven, and no result is certified", soft_wrap=True)
    if dry_run:
        _show(scale.estimate(model, plan))
        return
    ray = {"address": address, "workers": workers or None, "threads": threads or 1} if engine is Engine.ray else None
    progress = make_progress(standard)
    with progress:
        task = progress.add_task(operation, total=plan.n_rows // place.count)
        failed = 0

        def report(found: ShardRecord | Lost) -> None:
            nonlocal failed
            failed += getattr(found, "failed", 0)
            progress.advance(task, getattr(found, "rows", 0))
            progress.update(task, description=f"{operation} ({failed} failed)" if failed else operation)

        try:
            if ray is not None:
                outcome = scale.run_with_ray(load, plan, output, resume=resume, report=report, **ray)  # type: ignore[arg-type]  # values of several types
            else:
                outcome = scale.run(model, plan, output, resume=resume, place=place, report=report)
        except KeyboardInterrupt:
            err.print(
                f"iresnet-fast: stopped, and {output} keeps what is done. Remedy: --resume goes on", soft_wrap=True
            )
            raise typer.Exit(130) from None
    standard.quiet = place.rank > 0 and outcome.counts is None
    _conclude(outcome, output, strict)


def _register(operation: str) -> None:
    """The command of an operation: the options that all have, and its own."""
    others = set().union(*_OWN.values()) - _OWN[operation] | {"operation"}
    signature = inspect.signature(_do, eval_str=True)
    parameters = [value for name, value in signature.parameters.items() if name not in others]

    def command(**settings: Any) -> None:
        _do(operation, **settings)

    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # what typer reads
    command.__annotations__ = {value.name: value.annotation for value in parameters}
    files = (
        "'latents/data/*.parquet' --output images" if operation == "invert" else "'images/*.parquet' --output latents"
    )
    examples = (
        f"iresnet-fast {operation} run --input {files}",
        f"torchrun --nproc-per-node 8 -m iresnet_fast {operation} run --input {files} --engine torchrun",
        f"iresnet-fast {operation} run --input {files} --engine ray --address auto --resume",
    )
    app.command(
        operation, help=_ABOUT[operation], epilog="**Examples:**\n\n" + "\n\n".join(f"`{each}`" for each in examples)
    )(command)


for _operation in _OWN:
    _register(_operation)


@app.command(epilog="**Examples:**\n\n`iresnet-fast verify images`")
def verify(
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder of results.")],
) -> None:
    """Read results and inputs again: nothing is missing, damaged, or there twice; exit status 1 where something is."""
    require("verify", "pyarrow")
    from .. import scale  # noqa: PLC0415

    progress = make_progress(standard)
    with progress:
        task = progress.add_task("verifying", total=None)
        wrong = scale.verify(output, lambda done, total: progress.update(task, completed=done, total=total))
    for sentence in wrong:
        err.print(f"iresnet-fast: {sentence}", highlight=False, markup=False, soft_wrap=True)
    if wrong:
        raise typer.Exit(1)
    standard.print(f"{output} is whole", highlight=False, soft_wrap=True)
    _print_proof(json.loads((output / "manifest.json").read_text(encoding="utf-8")))


def load_network(folder: Path, best: bool, dtype: str) -> Model:
    """The network of a training run, or of ``save_pretrained``, in evaluation mode."""
    model = load_pretrained(folder) if (folder / WEIGHTS).is_file() else load_run(folder, BEST if best else LAST)
    return model.to(getattr(torch, dtype))


def _show(found: Estimate) -> None:
    table = Table("what one worker would take", "")
    table.add_row("samples", f"{found.n_rows:,}")
    table.add_row("samples/s", f"{found.samples_per_second:,.1f}")
    table.add_row("time", str(timedelta(seconds=round(found.seconds))))
    table.add_row("results", f"{found.output_bytes / 2**20:,.1f} MiB")
    table.add_row("memory", f"{found.peak_bytes / 2**20:,.0f} MiB")
    standard.print(table)
    text = f"measured on {found.device}, on {found.n_measured} samples, of which {found.failed} did not converge"
    standard.print(text, highlight=False)


def _print_proof(counts: dict[str, Any]) -> None:
    from ..scale.proofs import describe  # noqa: PLC0415

    for sentence in describe(counts.get("proof"), counts["rows"]):
        standard.print(sentence, highlight=False, soft_wrap=True)


def _conclude(outcome: Outcome, output: Path, strict: bool) -> None:
    for shard in outcome.lost:
        err.print(f"iresnet-fast: {shard.name}: {shard.reason}", highlight=False, markup=False, soft_wrap=True)
    if outcome.lost:
        err.print(
            "iresnet-fast: some samples could not be read. Remedy: repair the files, and --resume", soft_wrap=True
        )
        raise typer.Exit(1)
    counts = outcome.counts
    if counts is None:
        standard.print("this process is done; others are still at work", soft_wrap=True)
        return
    text = f"{counts['rows']:,} samples: {counts['converged']:,} converged, {counts['failed']:,} failed"
    more = f" ({output / 'failures.parquet'} has the reasons)" if counts["failed"] else ""
    standard.print(f"{text}{more}. Results: {output / 'data'}", highlight=False, soft_wrap=True)
    _print_proof(counts)
    if strict and counts["failed"]:
        raise typer.Exit(1)
