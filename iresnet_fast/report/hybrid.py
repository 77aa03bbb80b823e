"""The demonstration's second half: one network that gives class, likelihood and samples."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..certificate import enforce
from ..data import ImageSplit, midpoints
from ..models import IResNetFlow
from ..solvers import relative_errors
from ..training import fit_flow

BATCH_SIZE, _RATE = 64, 1e-2
_SAMPLES, _EVALUATED_TOGETHER = 36, 50


@dataclass(frozen=True)
class HybridResult:
    """What was measured of a flow with a head on the held-out images.

    Attributes:
        test_error: share of wrong classes.
        bits_per_dim: mean over the held-out images.
        standard_error: of it.
        uniform_bits: bits per dimension of knowing nothing, log₂ of the number of grey levels.
        guaranteed: the certificate's verdict.
        worst_reconstruction_error: largest ‖x̂ − x‖/‖x‖ of an image.
        skipped: training steps without a finite loss and gradient.
        train_seconds: wall time of training.
    """

    test_error: float
    bits_per_dim: float
    standard_error: float
    uniform_bits: float
    guaranteed: bool
    worst_reconstruction_error: float
    skipped: int
    train_seconds: float


def run_hybrid(
    data: ImageSplit, epochs: int, seed: int, on_step: Callable[[int, float], None]
) -> tuple[HybridResult, Tensor]:
    """Train the flow on classes and likelihood together, and measure it; returns samples (n, 1, 8, 8), too.

    Args:
        data: images of 17 grey levels.
        epochs: passes over the training images.
        seed: of weights, order and samples.
        on_step: called after every step with its number and loss.
    """
    torch.manual_seed(seed)
    flow = IResNetFlow.from_config("digits-flow")
    train, test = data.train_images, data.test_images
    steps = epochs * math.ceil(len(train) / BATCH_SIZE)
    started = time.perf_counter()
    report = fit_flow(
        flow, train, data.train_labels, steps=steps, batch_size=BATCH_SIZE, lr=_RATE, seed=seed, on_step=on_step
    )
    seconds = time.perf_counter() - started
    certificate = enforce(flow.eval())
    bits = flow.bits_per_dim(test.split(_EVALUATED_TOGETHER))
    x = midpoints(test, data.n_levels)
    with torch.no_grad():
        wrong = flow.logits(x).argmax(1) != data.test_labels
    error = relative_errors(flow.reconstruct(x, tol=1e-6), x)
    result = HybridResult(
        test_error=float(wrong.float().mean()),
        bits_per_dim=bits.mean,
        standard_error=bits.standard_error,
        uniform_bits=math.log2(data.n_levels),
        guaranteed=certificate.guaranteed,
        worst_reconstruction_error=float(error.max()),
        skipped=report.skipped,
        train_seconds=seconds,
    )
    return result, flow.sample(_SAMPLES, generator=torch.Generator().manual_seed(seed))
