"""The invertible ResNet as a classifier."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from ..nn import (
    ActNorm,
    Bottleneck,
    InjectivePad,
    InvertibleResidualBlock,
    InvertibleSequential,
    Squeeze,
    fuse,
)
from ..nn.bijections.squeeze import SQUEEZE_ORDERS
from .configuration import (
    Source,
    build_config,
    check_choices,
    check_counts,
    check_flags,
    check_numbers,
    check_stages,
    freeze_sequences,
)
from .inversion import InvertibleModel
from .pretrained import Pretrained

_HEADS = ("linear", "pooled")


@dataclass(frozen=True)
class ClassifierConfig:
    """Everything that determines an :class:`IResNetClassifier`.

    Attributes:
        in_shape: (C, H, W) of the images.
        n_classes: number of classes.
        blocks: residual blocks of each stage; every stage but the first starts with a :class:`Squeeze`.
        hidden: hidden channels of each stage's branches.
        inject: channels of zeros appended to the input (squeezed, if it is); 0 keeps the network a bijection.
        coeff: Lipschitz coefficient of every convolution; None for the plain ResNet of the papers' comparison.
        activation: a name of :data:`iresnet_fast.nn.ACTIVATIONS`.
        actnorm: whether an :class:`ActNorm` stands before every block.
        batch_norm: whether batch normalisation stands before every activation of the branches, as in the papers'
            unconstrained comparison.
        dropout: probability of dropout in the branches.
        n_power_iterations: per training forward.
        recompute: ``"inverse"`` trains without stored activations; see :class:`InvertibleSequential`.
        squeeze_input: whether a :class:`Squeeze` stands before everything.
        squeeze_order: of the channels that a :class:`Squeeze` makes.
        head: ``"linear"`` classifies all latents; ``"pooled"``, the official code's, their means per channel after
            batch normalisation and ReLU.
    """

    kind: ClassVar[str] = "classifier"

    in_shape: tuple[int, int, int]
    n_classes: int
    blocks: tuple[int, ...]
    hidden: tuple[int, ...]
    inject: int = 0
    coeff: float | None = 0.9
    activation: str = "elu"
    actnorm: bool = True
    batch_norm: bool = False
    dropout: float = 0.0
    n_power_iterations: int = 1
    recompute: str | None = None
    squeeze_input: bool = False
    squeeze_order: str = "channel"
    head: str = "linear"

    def __post_init__(self) -> None:
        freeze_sequences(self, "in_shape", "blocks", "hidden")
        if self.recompute is not None and self.coeff is None:
            raise ValueError("recompute='inverse' needs branches that contract; coeff=None leaves them unconstrained")
        if len(self.in_shape) != 3 or min(self.in_shape) < 1:
            raise ValueError(f"in_shape must be (C, H, W), got {self.in_shape}")
        if not self.blocks:
            raise ValueError("blocks needs one entry per stage, got none")
        check_counts(self, n_classes=2, n_power_iterations=1)
        check_numbers(self, "coeff", "dropout")
        check_flags(self, "actnorm", "batch_norm", "squeeze_input")
        check_choices(self, {"head": _HEADS, "squeeze_order": SQUEEZE_ORDERS})
        check_stages(self, halvings=len(self.blocks) - 1 + self.squeeze_input)


class IResNetClassifier(InvertibleModel, Pretrained):
    """Invertible trunk and a head (Behrmann et al. 2019, classification).

    The trunk is a bijection (with ``inject`` > 0 an injection): ``features`` maps images to latents of the same
    number of values, ``inverse`` maps latents back, and the head classifies the latents.

    Args:
        config: see :class:`ClassifierConfig`.

    Shape: (B, C, H, W) to logits (B, n_classes).

    Example:
        >>> model = irf.models.IResNetClassifier.from_config("digits").eval()
        >>> model(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        if not isinstance(config, ClassifierConfig):
            raise TypeError(
                f"config must be a ClassifierConfig, got {type(config).__name__}; from_config takes the others"
            )
        self.config = config
        channels, height, width = config.in_shape
        trunk: list[nn.Module] = []
        if config.squeeze_input:
            trunk.append(Squeeze(config.squeeze_order))
            channels, height, width = 4 * channels, height // 2, width // 2
        if config.inject:
            trunk.append(InjectivePad(config.inject))
            channels += config.inject
        for stage, (n_blocks, hidden) in enumerate(zip(config.blocks, config.hidden, strict=True)):
            if stage:
                trunk.append(Squeeze(config.squeeze_order))
                channels, height, width = 4 * channels, height // 2, width // 2
            for _ in range(n_blocks):
                first = not any(isinstance(part, InvertibleResidualBlock) for part in trunk)
                branch = Bottleneck(
                    channels,
                    hidden,
                    coeff=config.coeff,
                    input_size=(height, width),
                    activation=config.activation,
                    preactivation=not first,
                    batch_norm=config.batch_norm,
                    dropout=config.dropout,
                    n_power_iterations=config.n_power_iterations,
                )
                trunk += [ActNorm(channels)] if config.actnorm else []
                trunk.append(InvertibleResidualBlock(branch))
        self.trunk = fuse(InvertibleSequential(*trunk, recompute=config.recompute))
        self.latent_shape = (channels, height, width)
        if config.head == "linear":
            self.head = nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, config.n_classes))
        else:
            pooling = [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
            self.head = nn.Sequential(*pooling, nn.Linear(channels, config.n_classes))

    @classmethod
    def from_config(cls, config: Source, **overrides: Any) -> Self:
        """Build a network from a named configuration, a TOML file or a mapping.

        Args:
            config: a name (``"digits"``, ``"iresnet-64:vanilla"``, ...), the path of a TOML file, or the settings.
            **overrides: settings of :class:`ClassifierConfig` to change.

        Raises:
            ValueError: an unknown name or setting; the message suggests the nearest one.
        """
        return cls(build_config(ClassifierConfig, config, overrides))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, n_classes)."""
        logits: Tensor = self.head(self.features(x))
        return logits

    def features(self, x: Tensor) -> Tensor:
        """Latents (B, *latent_shape) of images (B, *in_shape)."""
        if x.dim() != 4 or tuple(x.shape[1:]) != self.config.in_shape:
            raise ValueError(
                f"this network takes (B, {', '.join(map(str, self.config.in_shape))}), got {tuple(x.shape)}"
            )
        if not x.is_floating_point():
            raise TypeError(f"images must be of floating point, got {x.dtype}; scale them, as in x.float() / 255")
        z: Tensor = self.trunk(x)
        return z

    def _check_latents(self, z: Tensor) -> None:
        if z.dim() != 4 or tuple(z.shape[1:]) != self.latent_shape:
            raise ValueError(f"latents have shape (B, {', '.join(map(str, self.latent_shape))}), got {tuple(z.shape)}")

    def extra_repr(self) -> str:
        """Shown by repr."""
        return ", ".join(f"{key}={value}" for key, value in asdict(self.config).items())
