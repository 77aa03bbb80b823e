"""``iresnet-fast train``, and what can be done with what it trained."""

from __future__ import annotations

import json
import math
import os
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor

from ..certificate import certify as certify_model
from ..data import ImageSplit, load
from ..data.load import NAMED
from ..models import IResNetFlow, Model, read_config
from ..models.configuration import nearest
from ..solvers import relative_errors
from ..training import InterruptedRunError, TrainingConfig
from ..training import train as train_network
from ..training.evaluate import Evaluation, as_input
from ..training.evaluate import evaluate as evaluate_model
from ..training.folder import BEST, LAST, load_run, read_settings
from .application import app, err, make_progress
from .application import out as standard

_Run = Annotated[Path, typer.Argument(help="Folder of a training run.")]
_Data = Annotated[
    str | None,
    typer.Option(help="Folder or file of the images. Default: the run's set, in $IRESNET_FAST_DATA or data."),
]
_Best = Annotated[bool, typer.Option("--best", help="Take the best checkpoint in place of the last.")]
_Picture = Annotated[Path, typer.Option("--out", help="Picture to write (.png), or images as an array (.npy).")]
_Json = Annotated[bool, typer.Option("--json", help="Print the results as JSON on standard output.")]


@app.command(
    epilog="**Examples:**\n\n`iresnet-fast train mnist-small --data path/to/mnist --out run`\n\n"
    "`iresnet-fast train iresnet-64:vanilla --data path/to/cifar --out plain --set epochs=20 --set lr=0.05`\n\n"
    "`torchrun --nproc-per-node 2 -m iresnet_fast train mnist-small --data path/to/mnist --out run --resume`"
)
def train(
    config: Annotated[
        str, typer.Argument(help="Name of a configuration, with :vanilla or :batchnorm for its twins; or a .toml file.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run; new, or empty, or with --resume.")],
    data: _Data = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="key=value: a setting of the network or its training; repeatable.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint, if there is one.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Log for TensorBoard, too.")] = False,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 for torch's default.")] = 0,
    as_json: _Json = False,
) -> None:
    """Train a network on images, evaluate and certify it; it can be stopped at any moment and resumed."""
    if threads:
        torch.set_num_threads(threads)
    model, training = split_settings(read_config(config), changes or [])
    images = _load(training.data, data)
    console = err if as_json else standard
    console.quiet = int(os.environ.get("RANK", "0")) > 0  # of several processes one speaks
    progress = make_progress(console)
    with progress:
        task = progress.add_task("training", total=None)

        def on_step(step: int, total: int, loss: float) -> None:
            progress.update(task, completed=step, total=total, description=f"training (loss {loss:.3f})")

        def on_evaluation(step: int, evaluation: Evaluation) -> None:
            console.print(f"step {step}: {_summary(evaluation)}", highlight=False)

        try:
            result = train_network(
                model,
                training,
                images,
                out,
                resume=resume,
                tensorboard=tensorboard,
                on_step=on_step,
                on_evaluation=on_evaluation,
            )
        except InterruptedRunError as error:
            err.print(f"iresnet-fast: {error}", highlight=False, markup=False, soft_wrap=True)
            raise typer.Exit(130) from None
    if as_json and not console.quiet:
        typer.echo((out / "result.json").read_text(encoding="utf-8"))
    verdict = "proven" if result.certificate.guaranteed else "not proven"
    console.print(
        f"{result.steps} steps ({result.skipped} skipped) in {result.seconds:.0f} s; {_summary(result.evaluation)}; "
        f"invertible: {verdict}. Run: {out}",
        highlight=False,
        soft_wrap=True,
    )


@app.command(epilog="**Examples:**\n\n`iresnet-fast evaluate run --data path/to/mnist`")
def evaluate(run: _Run, data: _Data = None, best: _Best = False, as_json: _Json = False) -> None:
    """Measure a trained network on all test images: error, bits per dimension, reconstruction."""
    evaluation = evaluate_model(_network(run, best), _images(run, data))
    if as_json:
        typer.echo(json.dumps(evaluation.to_dict()))
    else:
        standard.print(_summary(evaluation), highlight=False)


@app.command(epilog="**Examples:**\n\n`iresnet-fast certify run`\n\n`iresnet-fast certify run --json | jq .guaranteed`")
def certify(run: _Run, best: _Best = False, as_json: _Json = False) -> None:
    """Prove the Lipschitz constants of a trained network; exit status 1 where its inverse is not proven."""
    certificate = certify_model(_network(run, best))
    typer.echo(json.dumps(certificate.to_dict()) if as_json else certificate.to_markdown())
    if not certificate.guaranteed:
        raise typer.Exit(1)


@app.command(epilog="**Examples:**\n\n`iresnet-fast reconstruct run --data path/to/mnist --out reconstructions.png`")
@torch.no_grad()
def reconstruct(
    run: _Run,
    out: _Picture = Path("reconstructions.png"),
    data: _Data = None,
    count: Annotated[int, typer.Option(min=1, help="How many test images.")] = 8,
    best: _Best = False,
) -> None:
    """Map test images to latents and back; prints the errors, draws both rows."""
    model, images = _network(run, best), _images(run, data)
    x = as_input(model, images.test_images[:count], images.n_levels)
    back = model.inverse(model.features(x), tol=1e-5)
    table = Table("image", "relative error")
    for index, error in enumerate(relative_errors(back, x).tolist()):
        table.add_row(str(index), f"{error:.1e}")
    standard.print(table)
    _write(_shown(model, torch.stack([x, back])), out)


@app.command(epilog="**Examples:**\n\n`iresnet-fast sample run --count 64 --temperature 0.8 --out samples.png`")
def sample(
    run: _Run,
    out: _Picture = Path("samples.png"),
    count: Annotated[int, typer.Option(min=1, help="How many.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="Factor of the prior's standard deviation.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the latents.")] = 0,
    best: _Best = False,
) -> None:
    """Draw images from a trained flow."""
    flow = _flow(run, best)
    generator = torch.Generator().manual_seed(seed)
    x = flow.sample(count, temperature=temperature, generator=generator)
    columns = math.ceil(count**0.5)
    rows = math.ceil(count / columns) if out.suffix != ".npy" else 1
    missing = rows * columns - count if out.suffix != ".npy" else 0
    x = torch.cat([_shown(flow, x), torch.ones(missing, *x.shape[1:])])  # the last row of a picture ends in white
    _write(x.view(rows, -1, *x.shape[1:]), out)


@app.command(epilog="**Examples:**\n\n`iresnet-fast interpolate run --data path/to/mnist --out between.png`")
def interpolate(
    run: _Run,
    out: _Picture = Path("interpolation.png"),
    data: _Data = None,
    rows: Annotated[int, typer.Option(min=1, help="Pairs of test images.")] = 4,
    steps: Annotated[int, typer.Option(min=2, help="Images of each row.")] = 8,
    best: _Best = False,
) -> None:
    """Walk on straight lines between the latents of test images, by a trained flow."""
    flow, images = _flow(run, best), _images(run, data)
    found = len(images.test_images)
    if found < 2 * rows:
        raise ValueError(f"--rows {rows} takes {2 * rows} test images, and there are {found}. Remedy: fewer rows")
    x = as_input(flow, images.test_images[: 2 * rows], images.n_levels)
    _write(_shown(flow, flow.interpolate(x[:rows], x[rows:], steps).transpose(0, 1)), out)


def split_settings(settings: dict[str, Any], changes: list[str]) -> tuple[dict[str, Any], TrainingConfig]:
    """The settings of a network and those of its training, changed by ``key=value``.

    Raises:
        ValueError: a change without ``=``, or of a setting that there is not; the message suggests the nearest one.
    """
    training = dict(settings.pop("training", {}))
    known = {item.name for item in fields(TrainingConfig)}
    network = set(settings) | {item.name for item in fields(_config_type(settings))}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"--set takes key=value, got {change!r}")
        if key in known:
            training[key] = _value(value)
        elif key in network:
            settings[key] = _value(value)
        else:
            raise ValueError(f"unknown setting {key!r}{nearest(key, sorted(known | network))}")
    unknown = sorted(set(training) - known)
    if unknown:
        raise ValueError(f"unknown setting {unknown[0]!r}{nearest(unknown[0], sorted(known))} of training")
    return settings, TrainingConfig(**training)


def _config_type(settings: dict[str, Any]) -> Any:
    from ..models import ClassifierConfig, FlowConfig  # noqa: PLC0415

    return FlowConfig if settings.get("kind") == "flow" else ClassifierConfig


def _value(text: str) -> Any:
    """As TOML reads it; what it cannot read is text."""
    words = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


def _load(name: str, place: str | None) -> ImageSplit:
    """A set by its name, in the place that was given, if any; or whatever is in that place."""
    if place is None:
        return load(name)
    return load(name, place) if name in NAMED and Path(place).is_dir() else load(Path(place))


def _images(run: Path, place: str | None) -> ImageSplit:
    return _load(read_settings(run)["training"]["data"], place)


def _network(run: Path, best: bool) -> Model:
    return load_run(run, BEST if best else LAST)


def _flow(run: Path, best: bool) -> IResNetFlow:
    model = _network(run, best)
    if not isinstance(model, IResNetFlow):
        raise ValueError(f"{run} has a classifier, which has no density to draw from. Remedy: a run of a flow")
    return model


def _shown(model: Model, x: Tensor) -> Tensor:
    """In [0, 1]."""
    return (x if isinstance(model, IResNetFlow) else x + 0.5).clamp(0, 1)


def _write(grid: Tensor, path: Path) -> None:
    """Images (rows, columns, C, H, W) in [0, 1] side by side, with a line between them; or as they are, into .npy."""
    import numpy as np  # noqa: PLC0415

    if path.suffix == ".npy":
        np.save(path, grid.flatten(0, 1).numpy())
    else:
        from matplotlib.image import imsave  # noqa: PLC0415

        framed = torch.nn.functional.pad(grid, (0, 1, 0, 1), value=1.0)
        rows, columns, channels, height, width = framed.shape
        page = framed.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, channels)
        imsave(path, page.expand(-1, -1, 3).numpy())
    standard.print(f"wrote {path}", highlight=False, soft_wrap=True)


def _summary(evaluation: Evaluation) -> str:
    parts = []
    if evaluation.test_error is not None:
        parts.append(f"test error {100 * evaluation.test_error:.2f} %")
    if evaluation.bits_per_dim is not None:
        parts.append(f"{evaluation.bits_per_dim:.3f} ± {evaluation.bits_standard_error:.3f} bits/dim")
    error = evaluation.reconstruction_error
    parts.append("no reconstruction" if error is None else f"worst reconstruction error {error:.1e}")
    return ", ".join(parts)
