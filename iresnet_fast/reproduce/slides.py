"""The tables of the talk on the ICML paper, and its comparison of flows in the plane."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict

import torch

from ..models import IResNetFlow
from ..report.figures import draw_samples
from ..solvers import sample_norms
from ..training import load_run, train
from . import published
from .classification import held_out
from .job import CONSTRAINED, Job, Trained
from .plane_flows import SETTINGS, compare
from .record import Record, Table

_INVERTED, _ROUNDS, _DRAWN = 100, 3, 36


def slides(job: Job) -> Record:
    """Classification, bits per dimension, the cost of the inverse against c, and flows in the plane."""
    networks = {network.label: network for network in job.networks()}
    tables = (_classification(job, networks), _bits_per_dim(job), _inversion(job, networks), compare(job))
    return Record(
        "slides",
        "The talk's tables and its flows in the plane",
        job.command("slides"),
        job.scale.name,
        {**job.settings(), "flow": job.flow()[0], "flow_training": asdict(job.flow()[1]), "plane": SETTINGS},
        tables,
        (
            ("samples.png", "Samples of the flow whose bits per dimension are above"),
            ("plane.png", "Data, and the densities that flows learned of it"),
        ),
        (
            job.about_networks(),
            "Published: the cost of the inverse is 5 to 10 forward passes.",
            "Flows in the plane have 64×64 hidden units in each network and the same steps; their sizes differ.",
        ),
    )


def _classification(job: Job, networks: dict[str, Trained]) -> Table:
    theirs = published.CLASSIFICATION.get(job.published_set or "", (None, None, None))
    rows = tuple(
        (
            label,
            f"{100 * networks[label].test_error:.2f}",
            error,
            "yes" if networks[label].certificate.guaranteed else "no",
        )
        for label, error in zip(("BN", "vanilla", "c = 0.9"), theirs, strict=True)
    )
    rows = (("BN (published: ResNet-164)", *rows[0][1:]), *rows[1:])
    return Table("Classification error %", ("network", "ours", job.published_heading, "guaranteed inverse"), rows)


def _bits_per_dim(job: Job) -> Table:
    """Of published flows and ours, of which ``samples.png`` shows samples."""
    settings, training = job.flow()
    folder = job.out / f"runs-{job.scale.name}" / "flow"
    result = train(
        settings,
        training,
        job.images,
        folder,
        resume=True,
        on_step=lambda step, total, loss: job.report("training the flow", step, total),
    )
    flow = load_run(folder)
    assert isinstance(flow, IResNetFlow)
    job.out.mkdir(parents=True, exist_ok=True)
    draw_samples(flow.sample(_DRAWN, generator=torch.Generator().manual_seed(job.seed)), job.out / "samples.png")
    evaluation = result.evaluation
    ours = f"{evaluation.bits_per_dim:.3f} ± {evaluation.bits_standard_error:.3f}"
    index = {"mnist": 0, "cifar10": 1}.get(job.published_set or "")
    rows: list[tuple[str, str | None, float | None]] = [
        (name, None, None if index is None else figures[index]) for name, figures in published.BITS_PER_DIM.items()
    ]
    config = job.scale.flows[job.images.train_images.shape[1]]
    rows.append((f"`{config}` here, {result.steps:,} steps", ours, None))
    return Table("Bits per dimension of the test images", ("method", "ours", job.published_heading), tuple(rows))


@torch.no_grad()
def _inversion(job: Job, networks: dict[str, Trained]) -> Table:
    """Evaluations of each branch, and the time of an inverse in forward passes."""
    x = held_out(job, _INVERTED).to(job.device)
    rows = []
    for label in CONSTRAINED:
        model = networks[label].model
        z = model.features(x)
        result = model.solve_inverse(z, on_failure="return")
        evaluations = statistics.mean(float(block.evaluations.float().mean()) for block in result.blocks)
        forward = _seconds(lambda model=model: model.features(x))  # type: ignore[misc]  # mypy infers no lambda with a default
        inverse = _seconds(lambda model=model, z=z: model.inverse(z, on_failure="return"))  # type: ignore[misc]  # mypy infers no lambda with a default
        share = float(result.certified.float().mean())
        errors = (float(sample_norms(result.x - x).max()), float(result.error_bound.max()))
        rows.append((label, evaluations, inverse / forward, f"{100 * share:.0f} %", *errors))
    columns = ("network", "evaluations a block", "time / forward", "certified", "largest error", "largest proven bound")
    return Table(f"Inverse of {len(x)} test images", columns, tuple(rows))


def _seconds(function: Callable[[], object]) -> float:
    times = []
    for _ in range(_ROUNDS + 1):
        started = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])  # the first warms up
