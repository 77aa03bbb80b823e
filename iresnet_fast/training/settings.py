"""How a network is trained: settings, the learning rate at each step, the optimiser."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.configuration import check_choices, check_counts, check_flags, check_numbers, freeze_sequences

OPTIMIZERS = ("sgd", "adamax", "adamw")
SCHEDULES = ("onecycle", "cosine", "milestones", "constant")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that determines a training run, beside the network and the data.

    Attributes:
        data: what :func:`iresnet_fast.data.load` is given where nobody says otherwise.
        epochs: passes over the training images.
        batch_size: images per step, over all processes together.
        optimizer: ``"sgd"`` with Nesterov's momentum, ``"adamax"`` or ``"adamw"``.
        lr: highest learning rate.
        momentum: of SGD; first β of the others.
        weight_decay: of the optimiser.
        schedule: ``"onecycle"`` rises for 30 % of the steps and falls; ``"cosine"`` falls; ``"milestones"`` falls by
            ``factor`` at each of ``milestones``; or ``"constant"``.
        milestones: epochs.
        factor: of the rate at each milestone.
        warmup: steps over which the rate rises from 0, before its schedule.
        clip: largest norm of the gradient; 0 for any.
        average: decay of an exponential moving average of the parameters, which is what is evaluated; 0 for none.
        shift: largest random shift of an image, in pixels.
        flip: whether images are mirrored at random.
        precision: ``"bfloat16"`` runs forward and loss under autocast.
        compile: whether the network is compiled.
        channels_last: memory layout of network and images.
        density_weight: of the likelihood in a flow's loss.
        class_weight: of the classes in a flow's loss.
        evaluate_every: epochs between evaluations on the test images; the last epoch always has one.
        certify_every: steps between certificates; 0 for one at the end.
        enforce: whether weights are rescaled at each certificate, so that it holds.
        checkpoint_every: steps between checkpoints; each epoch ends with one.
        seed: of weights, order, augmentation and whatever else is drawn.
    """

    data: str = "mnist"
    epochs: int = 10
    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "onecycle"
    milestones: tuple[int, ...] = ()
    factor: float = 0.2
    warmup: int = 0
    clip: float = 0.0
    average: float = 0.0
    shift: int = 0
    flip: bool = False
    precision: str = "float32"
    compile: bool = False
    channels_last: bool = False
    density_weight: float = 1.0
    class_weight: float = 1.0
    evaluate_every: int = 1
    certify_every: int = 0
    enforce: bool = True
    checkpoint_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        freeze_sequences(self, "milestones")
        counts = {"epochs": 1, "batch_size": 1, "warmup": 0, "shift": 0, "evaluate_every": 1, "certify_every": 0}
        check_counts(self, **counts, checkpoint_every=1, seed=0)
        numbers = ("lr", "momentum", "weight_decay", "factor", "clip", "average", "density_weight", "class_weight")
        check_numbers(self, *numbers)
        check_choices(self, {"optimizer": OPTIMIZERS, "schedule": SCHEDULES, "precision": PRECISIONS})
        for name in numbers:
            value = getattr(self, name)
            if value is None or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
        if not self.lr:
            raise ValueError("lr must be positive, got 0")
        for name in ("momentum", "average"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} must be below 1, got {getattr(self, name)}")
        check_flags(self, "flip", "compile", "channels_last", "enforce")
        if self.schedule == "milestones" and not self.milestones:
            raise ValueError("schedule='milestones' needs milestones, the epochs at which the rate falls")


def rate_at(config: TrainingConfig, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step, from 0: a function of the step alone, so that a resumed run goes on as it was."""
    total = config.epochs * steps_per_epoch
    if step < config.warmup:
        return config.lr * (step + 1) / (config.warmup + 1)
    share = (step - config.warmup) / max(1, total - 1 - config.warmup)
    if config.schedule == "onecycle":
        start, end, peak = 0.04, 4e-6, 0.3
        if share < peak:
            return config.lr * (start + (1 - start) * (1 - math.cos(math.pi * share / peak)) / 2)
        return config.lr * (end + (1 - end) * (1 + math.cos(math.pi * (share - peak) / (1 - peak))) / 2)
    if config.schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * share)) / 2
    passed = sum(step >= milestone * steps_per_epoch for milestone in config.milestones)
    return config.lr * config.factor**passed if config.schedule == "milestones" else config.lr


def make_optimizer(config: TrainingConfig, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """The optimiser that the settings name."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            weight_decay=config.weight_decay,
        )
    kind = {"adamax": torch.optim.Adamax, "adamw": torch.optim.AdamW}[config.optimizer]
    return kind(parameters, lr=config.lr, betas=(config.momentum, 0.999), weight_decay=config.weight_decay)
