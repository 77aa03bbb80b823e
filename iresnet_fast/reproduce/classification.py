"""Table 1 of the workshop paper: error, reconstruction and guarantee of every network."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models import IResNetClassifier
from ..nn import frozen_state
from ..report.inversion import PAPER_ITERATIONS, papers_inverse
from ..solvers import relative_errors
from . import published
from .job import Job, Trained
from .record import Record, Table

# Images that are inverted together.
_TOGETHER = 100


def table1(job: Job) -> Record:
    """Error on all test images, mean reconstruction error after the papers' iterations, guarantee by certificate."""
    networks = job.networks()
    x = held_out(job, job.scale.reconstructed)
    theirs = published.TABLE1.get(job.published_set or "", {})
    rows = tuple(_row(network, x, theirs, job) for network in networks)
    name = job.published_heading
    columns = ("network", "error %", name, "reconstruction", name, "guaranteed inverse", "largest Lip(g)")
    of = f"{len(x)} of {len(job.images.test_images)} test images"
    return Record(
        "table1",
        "Classification error, reconstruction error and guarantee",
        job.command("table1"),
        job.scale.name,
        job.settings(),
        (Table(f"Mean ‖x̂ − x‖/‖x‖ of {of} after {PAPER_ITERATIONS} iterations a block", columns, rows),),
        notes=(
            job.about_networks(),
            "The guarantee is the certificate's: proven bounds of all layers at their own padding.",
        ),
    )


def _row(network: Trained, x: Tensor, theirs: dict[str, tuple[float, float]], job: Job) -> tuple[object, ...]:
    job.report(f"inverting {network.label}", 0, 1)
    error = float(relative_errors(reconstructions(network.model, x), x).mean())
    their_error, their_reconstruction = theirs.get(network.label, (None, None))
    certificate = network.certificate
    verdict = "yes" if certificate.guaranteed else "no"
    return (
        network.label,
        f"{100 * network.test_error:.2f}",
        None if their_error is None else f"{their_error:.2f}",
        error,
        their_reconstruction,
        verdict,
        certificate.largest_lipschitz,
    )


def held_out(job: Job, count: int) -> Tensor:
    """The first of the test images, as the networks take them."""
    return job.images.centered().test_images[:count]


@torch.no_grad()
def reconstructions(model: IResNetClassifier, x: Tensor, iterations: int = PAPER_ITERATIONS) -> Tensor:
    """Images through the latents and back by so many fixed-point iterations in every block."""
    with frozen_state(model):  # weights are normalised once
        parts = x.to(next(model.parameters()).device).split(_TOGETHER)
        return torch.cat([papers_inverse(model.trunk, model.features(part), iterations).cpu() for part in parts])
