"""Training a flow by maximum likelihood, alone or together with classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import dequantize
from ..estimators import Estimator
from ..models import FlowOutput, IResNetFlow
from .stepping import Stepper

UNLABELLED = -1


@dataclass
class FitReport:
    """What happened in training.

    Attributes:
        steps: optimiser steps that were taken.
        skipped: steps that were not, for a loss or gradient that was not finite.
        losses: of the steps taken.
    """

    steps: int
    skipped: int
    losses: list[float]


def hybrid_loss(
    output: FlowOutput, labels: Tensor | None = None, *, density_weight: float = 1.0, class_weight: float = 1.0
) -> Tensor:
    """class_weight·(cross-entropy) − density_weight·(log p(x) per dimension), averaged (Chen et al. 2019, Section 5.4).

    Args:
        output: of a flow.
        labels: (B,) int64, −1 where a sample has no label; it counts for the density alone. None: density alone.
        density_weight: λ of the density.
        class_weight: of the classes.

    Returns:
        A scalar in nats.

    Raises:
        ValueError: labels for a flow without a head, or weights that are negative.
    """
    if min(density_weight, class_weight) < 0:
        raise ValueError(f"weights must not be negative, got {density_weight} and {class_weight}")
    dimensions = output.latents.shape[1]
    loss = -density_weight * output.log_prob.mean() / dimensions
    if labels is None:
        return loss
    if output.logits is None:
        raise ValueError("labels need a flow with a head. Remedy: n_classes in its configuration")
    labelled = labels != UNLABELLED
    # Averaged over those that have a label; without any the sum is 0.
    entropies = F.cross_entropy(output.logits, labels, ignore_index=UNLABELLED, reduction="sum")
    return loss + class_weight * entropies / labelled.sum().clamp_min(1)


def fit_flow(
    model: IResNetFlow,
    data: Tensor | Callable[[int], Tensor] | Iterable[Any],
    labels: Tensor | None = None,
    *,
    steps: int,
    batch_size: int = 256,
    lr: float = 2e-3,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    density_weight: float = 1.0,
    class_weight: float = 1.0,
    average: float | None = None,
    estimator: Estimator | None = None,
    compile: bool = False,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> FitReport:
    """Train by Adam with a one-cycle learning rate; changes the model in place, and leaves it in training mode.

    A step whose loss or gradient is not finite is skipped and counted; ten in a row end the training. Until the first
    step is taken, a skipped one also takes back what it initialised.

    Args:
        model: the flow; batches go to its device.
        data: (N, *in_shape); or a function that draws a batch of so many; or an iterable of batches, or of pairs of a
            batch and its labels, as data loaders are. Integers are dequantised anew in every step.
        labels: (N,) int64 for :func:`hybrid_loss`, −1 where there is none.
        steps: optimiser steps.
        batch_size: samples per step; an iterable has its own.
        lr: highest learning rate.
        weight_decay: of AdamW.
        clip: largest norm of the gradient.
        density_weight: of :func:`hybrid_loss`.
        class_weight: of :func:`hybrid_loss`.
        average: decay of an exponential moving average of the parameters, which the model has in the end; None for
            the last parameters.
        estimator: of the log-determinants, in place of the blocks' own.
        compile: whether ``torch.compile`` makes code of the loss and its gradient, from the second step on: a minute
            or so that pays where there are thousands of steps, and an estimator whose number of terms is not drawn.
        seed: of the order, and of what estimators and dequantisation draw; torch's generators are afterwards what
            they were before.
        on_step: called with the step (from 1) and its loss.

    Returns:
        The :class:`FitReport`.

    Raises:
        ValueError: no data, labels of another number, no steps, an iterable that ends at once.
        DivergedError: ten steps in a row were skipped, or all of them.
    """
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps and batch_size must be at least 1, got {steps} and {batch_size}")
    if isinstance(data, Tensor) and (not len(data) or (labels is not None and len(labels) != len(data))):
        raise ValueError(
            f"need data, and as many labels: got {len(data)} samples, {None if labels is None else len(labels)}"
        )
    if not isinstance(data, Tensor) and labels is not None:
        raise ValueError("labels belong to data that is a tensor; a function draws none, an iterable has its own")
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    stepper = Stepper(model, optimizer, clip=clip, average=average or 0.0, schedule=schedule)
    losses: list[float] = []

    def loss_of(x: Tensor, y: Tensor | None) -> Tensor:
        return hybrid_loss(model(x, estimator), y, density_weight=density_weight, class_weight=class_weight)

    compiled = torch.compile(loss_of) if compile else loss_of
    model.train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        batches = _batches(data, labels, batch_size)
        for step in range(1, steps + 1):
            x, y = next(batches)
            x, y = x.to(device), None if y is None else y.to(device)
            x = x if x.is_floating_point() else dequantize(x, model.config.n_levels)
            # The first step initialises what depends on data, which is no code to compile.
            before = stepper.taken
            value = stepper.step((compiled if before else loss_of)(x, y))
            if stepper.taken > before:
                losses.append(value)
            if on_step is not None:
                on_step(step, value)
    stepper.conclude()
    if stepper.average is not None:
        with torch.no_grad():  # eval() lets the vectors of the power iterations settle on these
            for parameter, mean in zip(model.parameters(), stepper.average.module.parameters(), strict=True):
                parameter.copy_(mean)
    return FitReport(stepper.taken, stepper.skipped, losses)


def _batches(
    data: Tensor | Callable[[int], Tensor] | Iterable[Any], labels: Tensor | None, batch_size: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Batches without end; a tensor's samples in an order that is drawn anew in every pass."""
    if isinstance(data, Tensor):
        while True:
            for batch in torch.randperm(len(data), device="cpu").split(batch_size):
                if len(batch) == min(batch_size, len(data)):
                    yield data[batch], None if labels is None else labels[batch]
    if callable(data):
        while True:
            yield data(batch_size), None
    while True:
        ended = True
        for batch in data:
            ended = False
            yield (batch, None) if isinstance(batch, Tensor) else (batch[0], batch[1] if len(batch) > 1 else None)
        if ended:
            raise ValueError(
                "the iterable of batches has none, or none after its first pass. Remedy: a DataLoader or a list"
            )
