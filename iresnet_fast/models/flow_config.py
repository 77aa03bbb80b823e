"""The settings of a flow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..nn.bijections.split import KEPT_HALVES
from ..nn.bijections.squeeze import SQUEEZE_ORDERS
from .configuration import check_choices, check_counts, check_flags, check_numbers, check_stages, freeze_sequences

_CHOICES = {
    "estimator": ("auto", "exact", "series", "roulette", "neumann"),
    "keep": KEPT_HALVES,
    "preprocessing": ("none", "center", "logit"),
    "prior": ("standard", "learned"),
    "squeeze_order": SQUEEZE_ORDERS,
}


@dataclass(frozen=True)
class FlowConfig:
    """Everything that determines an :class:`IResNetFlow`.

    Attributes:
        in_shape: (C, H, W) of images, or (D,) of vectors.
        blocks: convolutional residual blocks of each scale; every scale but the first starts with a
            :class:`~iresnet_fast.nn.Squeeze`. Empty for vectors.
        hidden: hidden channels of each scale's branches.
        fc_blocks: fully connected residual blocks, on the latents that are left at the end; all there is for vectors.
        fc_hidden: widths of the hidden layers of their branches.
        coeff: Lipschitz coefficient of every layer.
        activation: a name of :data:`iresnet_fast.nn.ACTIVATIONS`.
        actnorm: whether an :class:`~iresnet_fast.nn.ActNorm` stands before every block.
        factor_out: whether half of the channels are latents after each scale but the last.
        keep: the half that goes on then, ``"first"`` or ``"last"``.
        squeeze_input: whether a squeeze stands before everything.
        squeeze_order: of the channels that a squeeze makes.
        preprocessing: of data in [0, 1]: ``"logit"`` (data far outside is an error) or ``"center"``; or ``"none"``.
        alpha: of :class:`~iresnet_fast.nn.Logit`.
        n_levels: how many values the integers that images are made of can have; 256 for 8 bits.
        prior: ``"standard"`` normal, or ``"learned"``: with a learned mean and scale for each latent.
        estimator: of the blocks' log-determinants: ``"exact"``, ``"series"`` (truncated, biased), ``"roulette"``,
            ``"neumann"``, or ``"auto"``: exact for up to 16 values per sample, else neumann.
        n_terms: of ``"series"``.
        n_exact: terms that ``"roulette"`` and ``"neumann"`` always take.
        n_classes: of a linear head on the latents; 0 for none.
        n_power_iterations: per training forward.
    """

    kind: ClassVar[str] = "flow"

    in_shape: tuple[int, ...]
    blocks: tuple[int, ...] = ()
    hidden: tuple[int, ...] = ()
    fc_blocks: int = 0
    fc_hidden: tuple[int, ...] = (128, 128)
    coeff: float = 0.9
    activation: str = "lipswish"
    actnorm: bool = True
    factor_out: bool = True
    keep: str = "first"
    squeeze_input: bool = False
    squeeze_order: str = "channel"
    preprocessing: str = "none"
    alpha: float = 0.05
    n_levels: int = 256
    prior: str = "standard"
    estimator: str = "auto"
    n_terms: int = 10
    n_exact: int = 2
    n_classes: int = 0
    n_power_iterations: int = 1

    def __post_init__(self) -> None:
        freeze_sequences(self, "in_shape", "blocks", "hidden", "fc_hidden")
        if len(self.in_shape) not in (1, 3) or min(self.in_shape) < 1:
            raise ValueError(f"in_shape must be (C, H, W) of images or (D,) of vectors, got {self.in_shape}")
        if self.coeff is None:
            raise ValueError("a flow needs branches that contract; coeff=None leaves them unconstrained")
        if len(self.in_shape) == 1 and self.blocks:
            raise ValueError(
                f"blocks={self.blocks} are convolutional, and in_shape={self.in_shape} is that of vectors. Remedy: "
                "blocks=() and fc_blocks"
            )
        check_counts(self, fc_blocks=0, n_classes=0, n_terms=1, n_exact=0, n_levels=2, n_power_iterations=1)
        check_numbers(self, "coeff", "alpha")
        check_flags(self, "actnorm", "factor_out", "squeeze_input")
        if not (self.blocks or self.fc_blocks):
            raise ValueError(f"a flow needs blocks or fc_blocks, got {self.blocks} and {self.fc_blocks}")
        if self.n_classes == 1:
            raise ValueError("n_classes must be 0 or at least 2, got 1")
        check_choices(self, _CHOICES)
        if self.factor_out and len(self.blocks) > 1 and self.in_shape[0] == 1 and not self.squeeze_input:
            raise ValueError(
                "factor_out needs at least two channels to split, and in_shape has one. Remedy: squeeze_input=True or "
                "factor_out=False"
            )
        check_stages(self, halvings=max(0, len(self.blocks) - 1) + self.squeeze_input)
