"""The invertible ResNet as a classifier."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..nn import (
    ActNorm,
    Bottleneck,
    ChainInverseResult,
    InjectivePad,
    InvertibleResidualBlock,
    InvertibleSequential,
    Squeeze,
    fuse,
)
from ..nn.squeeze import SQUEEZE_ORDERS

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
        dropout: probability of dropout in the branches.
        n_power_iterations: per training forward.
        recompute: ``"inverse"`` trains without stored activations; see :class:`InvertibleSequential`.
        squeeze_input: whether a :class:`Squeeze` stands before everything.
        squeeze_order: of the channels that a :class:`Squeeze` makes.
        head: ``"linear"`` classifies all latents; ``"pooled"``, the official code's, their means per channel after
            batch normalisation and ReLU.
    """

    in_shape: tuple[int, int, int]
    n_classes: int
    blocks: tuple[int, ...]
    hidden: tuple[int, ...]
    inject: int = 0
    coeff: float | None = 0.9
    activation: str = "elu"
    actnorm: bool = True
    dropout: float = 0.0
    n_power_iterations: int = 1
    recompute: str | None = None
    squeeze_input: bool = False
    squeeze_order: str = "channel"
    head: str = "linear"

    def __post_init__(self) -> None:
        for name in ("in_shape", "blocks", "hidden"):
            value = getattr(self, name)
            if not isinstance(value, Sequence) or not all(isinstance(entry, int) for entry in value):
                raise ValueError(f"{name} must be a sequence of ints, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        if self.recompute is not None and self.coeff is None:
            raise ValueError("recompute='inverse' needs branches that contract; coeff=None leaves them unconstrained")
        if len(self.in_shape) != 3 or min(self.in_shape) < 1:
            raise ValueError(f"in_shape must be (C, H, W), got {self.in_shape}")
        if len(self.blocks) != len(self.hidden) or not self.blocks:
            raise ValueError(
                f"blocks and hidden need one entry per stage, got {len(self.blocks)} and {len(self.hidden)}"
            )
        if min(self.blocks) < 1 or min(self.hidden) < 1:
            raise ValueError(f"blocks and hidden must be positive, got {self.blocks} and {self.hidden}")
        if self.n_classes < 2:
            raise ValueError(f"n_classes must be at least 2, got {self.n_classes}")
        if self.coeff is not None and not 0 < self.coeff < 1:
            raise ValueError(
                f"coeff must be in (0, 1) for an invertible network, got {self.coeff}; None for a plain ResNet"
            )
        for name, choices in (("head", _HEADS), ("squeeze_order", SQUEEZE_ORDERS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {getattr(self, name)!r}")
        halvings = len(self.blocks) - 1 + self.squeeze_input
        if any(size % 2**halvings for size in self.in_shape[1:]):
            raise ValueError(
                f"{len(self.blocks)} stages{' and squeeze_input' * self.squeeze_input} halve the image {halvings} "
                f"times: H and W of in_shape={self.in_shape} must be divisible by {2**halvings}"
            )


class IResNetClassifier(nn.Module):
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
    def from_config(cls, config: str | Path | Mapping[str, Any], **overrides: Any) -> IResNetClassifier:
        """Build a network from a named configuration, a TOML file or a mapping.

        Args:
            config: a name (``"digits"``, ``"iresnet-64"``), the path of a TOML file, or the settings themselves.
            **overrides: settings of :class:`ClassifierConfig` to change.

        Raises:
            ValueError: an unknown name or setting; the message suggests the nearest one.
        """
        settings = {**(config if isinstance(config, Mapping) else _read_config(config)), **overrides}
        known = [item.name for item in fields(ClassifierConfig)]
        for key in settings:
            if key not in known:
                raise ValueError(f"unknown setting {key!r}{_nearest(key, known)}")
        return cls(ClassifierConfig(**settings))

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

    def inverse(self, z: Tensor, **options: Any) -> Tensor:
        """Images whose latents are z; options as for :meth:`InvertibleResidualBlock.solve_inverse`.

        Raises:
            ValueError: z has another shape than the latents.
            NotConvergedError: a block did not converge.
        """
        self._check_latents(z)
        return self.trunk.inverse(z, **options)

    def solve_inverse(self, z: Tensor, **options: Any) -> ChainInverseResult:
        """Invert, with the measured residual and every block's result."""
        self._check_latents(z)
        return self.trunk.solve_inverse(z, **options)

    def _check_latents(self, z: Tensor) -> None:
        if z.dim() != 4 or tuple(z.shape[1:]) != self.latent_shape:
            raise ValueError(f"latents have shape (B, {', '.join(map(str, self.latent_shape))}), got {tuple(z.shape)}")

    def extra_repr(self) -> str:
        """Shown by repr."""
        return ", ".join(f"{key}={value}" for key, value in asdict(self.config).items())


def _read_config(config: str | Path) -> dict[str, Any]:
    folder = resources.files(__package__) / "configs"
    path = Path(config)
    if path.suffix == ".toml":
        return tomllib.loads(path.read_text(encoding="utf-8"))
    names = sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))
    if str(config) not in names:
        raise ValueError(
            f"unknown configuration {str(config)!r}{_nearest(str(config), names)}; there are {', '.join(names)}, or "
            "the path of a .toml file"
        )
    return tomllib.loads((folder / f"{config}.toml").read_text(encoding="utf-8"))


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f": did you mean {close[0]!r}?" if close else ""
