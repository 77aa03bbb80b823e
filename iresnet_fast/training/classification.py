"""Training a classifier on images that fit in memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .stepping import Stepper


def fit_classifier(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    batch_size: int = 64,
    lr: float = 1e-2,
    weight_decay: float = 1e-2,
    seed: int = 0,
    on_epoch: Callable[[int, float], None] | None = None,
) -> None:
    """Train by AdamW with a one-cycle learning rate and gradient clipping; changes model in place.

    A step whose loss or gradient is not finite is skipped; ten in a row end the training.

    Args:
        model: images (B, C, H, W) to logits (B, n_classes).
        images: (N, C, H, W), of floating point.
        labels: (N,) int64.
        epochs: passes over the images.
        batch_size: images per step; a last smaller batch is kept.
        lr: highest learning rate.
        weight_decay: of AdamW.
        seed: of the order.
        on_epoch: called with the epoch (from 1) and the mean loss of the steps taken.

    Raises:
        ValueError: no images, labels of another number, or fewer than one epoch.
        DivergedError: ten steps in a row were skipped, or all of them.
    """
    if len(images) == 0 or len(images) != len(labels):
        raise ValueError(f"need as many labels as images, and some: got {len(images)} images, {len(labels)} labels")
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    steps = epochs * math.ceil(len(images) / batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    stepper = Stepper(model, optimizer, clip=1.0, schedule=schedule)
    model.train()
    for epoch in range(1, epochs + 1):
        total, seen = 0.0, 0
        for batch in torch.randperm(len(images), generator=generator, device="cpu").split(batch_size):
            before = stepper.taken
            loss = stepper.step(F.cross_entropy(model(images[batch]), labels[batch]))
            if stepper.taken > before:
                total, seen = total + len(batch) * loss, seen + len(batch)
        if on_epoch is not None:
            on_epoch(epoch, total / seen if seen else math.nan)
    stepper.conclude()


@torch.no_grad()
def classification_error(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images whose most likely class is not their label, by a model in evaluation mode."""
    model.eval()
    wrong = sum(int((model(x).argmax(1) != y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True))
    return wrong / len(images)
