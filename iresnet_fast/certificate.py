"""Proven Lipschitz bounds of layers, residual blocks and networks.

A power-iteration estimate approaches a norm from below and guarantees nothing. The bounds here come from exact
singular values (:func:`iresnet_fast.conv_norm_bound`) of the weights in use, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .nn import (
    ActNorm,
    Bottleneck,
    InjectivePad,
    InvertibleResidualBlock,
    InvertibleSequential,
    LipschitzMLP,
    LipSwish,
    MaxMin,
    SpectralConv2d,
    SpectralLinear,
    SpectralNorm,
    Squeeze,
    find_spectral_norm,
    frozen_state,
)
from .nn.spectral_norm import check_input_size
from .ops.conv_norm import conv_norm_bound, rounding_factor

LipschitzFn = Callable[[Any], float]

_REGISTRY: dict[type[nn.Module], LipschitzFn] = {}
# Slope of SiLU at its steepest is 1.09984, of GELU 1.12890.
_SILU, _GELU = 1.1, 1.13
# enforce aims this far below coeff, so that rounding the weights to their dtype cannot lift the norm above it.
_MARGIN = 1e-6
_ENFORCE_ROUNDS = 4


def register_lipschitz(module_type: type[nn.Module], fn: LipschitzFn) -> None:
    """State how a module type's Lipschitz constant is bounded, so that ``certify`` can prove branches that use it.

    Args:
        module_type: the exact type; subclasses can compute something else and are not covered.
        fn: takes a module of that type and returns a proven upper bound of its Lipschitz constant, in its present
            mode, in the Euclidean norm.

    Raises:
        TypeError: ``module_type`` is not a subclass of ``nn.Module``, or ``fn`` is not callable.

    Example:
        >>> register_lipschitz(torch.nn.Hardtanh, lambda module: 1.0)
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"module_type must be a subclass of torch.nn.Module, got {module_type!r}")
    if not callable(fn):
        raise TypeError(f"fn must be callable, got {type(fn).__name__}")
    _REGISTRY[module_type] = fn


@dataclass(frozen=True)
class LayerBound:
    """One layer with a weight.

    Attributes:
        name: in the model.
        kind: type of the layer.
        bound: proven upper bound of its norm, or None.
        coeff: the coefficient its parametrization aims at, or None.
    """

    name: str
    kind: str
    bound: float | None
    coeff: float | None


@dataclass(frozen=True)
class BlockBound:
    """One residual block x + g(x).

    Attributes:
        name: in the model.
        lipschitz: proven upper bound of Lip(g), or None.
        layers: its layers with a weight.
        obstacles: why there is no bound, each with its remedy.
    """

    name: str
    lipschitz: float | None
    layers: tuple[LayerBound, ...]
    obstacles: tuple[str, ...]

    @property
    def guaranteed(self) -> bool:
        """Whether Lip(g) < 1 is proven, and so the block's inverse."""
        return self.lipschitz is not None and self.lipschitz < 1


@dataclass(frozen=True)
class Certificate:
    """What is proven of a model's invertible part.

    "Proven" means: in exact arithmetic for the weights as stored, with a stated factor for the rounding of the
    computation. It holds until a weight, a buffer or the mode changes.

    Attributes:
        guaranteed: whether every block has a proven Lip(g) < 1 and everything between the blocks is invertible.
        blocks: every residual block.
        lipschitz: proven bound of Lip(F) ≤ ∏(1 + L_i) (Behrmann et al. 2019, Lemma 2), with the factors of what
            stands between the blocks; None if some part has none.
        inverse_lipschitz: the same of Lip(F⁻¹) ≤ ∏ 1/(1 − L_i); None if not guaranteed.
        obstacles: every reason why it is not guaranteed, with its remedy.
    """

    guaranteed: bool
    blocks: tuple[BlockBound, ...]
    lipschitz: float | None
    inverse_lipschitz: float | None
    obstacles: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The certificate as plain types, ready for JSON."""
        return asdict(self)

    def to_markdown(self) -> str:
        """The certificate as a Markdown text: the verdict, a table of blocks and one of layers."""
        lines = [f"**Guaranteed inverse: {'yes' if self.guaranteed else 'no'}**", ""]
        if self.lipschitz is not None and self.inverse_lipschitz is not None:
            lines += [f"Lip(F) ≤ {self.lipschitz:.4g}, Lip(F⁻¹) ≤ {self.inverse_lipschitz:.4g}", ""]
        lines += [f"- {obstacle}" for obstacle in self.obstacles] + [""] * bool(self.obstacles)
        lines += ["| block | proven Lip(g) | invertible |", "|---|---|---|"]
        for block in self.blocks:
            verdict = "proven" if block.guaranteed else "not proven"
            lines.append(f"| {block.name} | {_number(block.lipschitz)} | {verdict} |")
        lines += ["", "| layer | kind | proven norm | coeff |", "|---|---|---|---|"]
        for block in self.blocks:
            for layer in block.layers:
                lines.append(f"| {layer.name} | {layer.kind} | {_number(layer.bound)} | {_number(layer.coeff)} |")
        return "\n".join(lines) + "\n"


@torch.no_grad()
def certify(model: nn.Module) -> Certificate:
    """Prove, where possible, that a model's residual blocks are invertible; changes no weight.

    Every proven bound of a block is attached to it, so that its inverse is certified per sample until a weight
    changes. The bound of a branch is the product of its modules' proven bounds; a module whose type states none (see
    :func:`register_lipschitz`) makes its block "not proven", never a guess.

    Args:
        model: an invertible module, or any module that contains some; what lies outside of them (a classification
            head) is not judged.

    Returns:
        The :class:`Certificate`; ``guaranteed`` is the verdict.

    Raises:
        TypeError: model is not an ``nn.Module``.
        ValueError: there is no invertible module in it, or a weight is not finite.

    Example:
        >>> block = irf.nn.InvertibleResidualBlock(irf.nn.LipschitzMLP(2, coeff=0.8))
        >>> irf.certify(block).blocks[0].lipschitz < 1
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    chain = list(_invertible_parts(model))
    if not chain:
        raise ValueError(
            f"{type(model).__name__} contains no invertible module. Remedy: build it from irf.nn.InvertibleSequential "
            "and irf.nn.InvertibleResidualBlock"
        )
    for module in model.modules():
        if not module.training and find_spectral_norm(module):
            _ = module.weight  # u and v are fitted to a changed weight here rather than at its next use
    with frozen_state(model):
        links = [_link(name, module) for name, module in chain]
    blocks = tuple(link.block for link in links if link.block is not None)
    obstacles = tuple(obstacle for link in links for obstacle in link.obstacles)
    guaranteed = all(link.inverse_lipschitz is not None for link in links)
    return Certificate(
        guaranteed=guaranteed,
        blocks=blocks,
        lipschitz=_product([link.lipschitz for link in links]),
        inverse_lipschitz=_product([link.inverse_lipschitz for link in links]),
        obstacles=obstacles,
    )


@torch.no_grad()
def enforce(model: nn.Module) -> Certificate:
    """Rescale every spectrally normalised weight whose proven norm exceeds its coeff, and certify again.

    Afterwards the stored weights themselves have norms of at most coeff. The new certificate can still say no: for
    activations steeper than 1, or modules without a proven constant.

    Args:
        model: as for :func:`certify`.

    Returns:
        The certificate of the rescaled model.

    Raises:
        TypeError: model is not an ``nn.Module``.
        ValueError: there is no invertible module in it, or a weight is not finite.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    for module in model.modules():
        norm = find_spectral_norm(module)
        if norm is None:
            continue
        with frozen_state(module):
            effective = module.weight.detach().clone()  # type: ignore[operator]
        original = module.parametrizations.weight.original  # type: ignore[union-attr]
        for _ in range(_ENFORCE_ROUNDS):
            bound = _layer_bound(module, effective)
            if bound <= norm.coeff:
                break
            effective = effective * ((norm.coeff / bound) * (1 - _MARGIN))
            original.copy_(effective)  # type: ignore[operator]
    return certify(model)


@dataclass(frozen=True)
class _Link:
    """An element of the invertible chain; ``inverse_lipschitz`` is None where no inverse is proven."""

    lipschitz: float | None
    inverse_lipschitz: float | None
    obstacles: tuple[str, ...] = ()
    block: BlockBound | None = None


def _invertible_parts(module: nn.Module, name: str = "") -> list[tuple[str, nn.Module]]:
    """The elements of the invertible chains in a model, in order; what stands outside of them is left out."""
    if isinstance(module, _LINKS):
        return [(name or type(module).__name__, module)]
    parts: list[tuple[str, nn.Module]] = []
    for key, child in module.named_children():
        path = f"{name}.{key}" if name else key
        if isinstance(module, InvertibleSequential) and not isinstance(child, (*_LINKS, InvertibleSequential)):
            parts.append((path, child))
        else:
            parts += _invertible_parts(child, path)
    return parts


def _link(name: str, module: nn.Module) -> _Link:
    if isinstance(module, InvertibleResidualBlock):
        block = _block(name, module)
        module.attach_proof(block.lipschitz)
        bound = block.lipschitz
        if bound is None:
            return _Link(None, None, block.obstacles, block)
        if bound >= 1:
            obstacle = (
                f"{name}: proven Lip(g) ≤ {bound:.4g} is not below 1. Remedy: spectral_norm with a smaller coeff, or "
                "enforce(model)"
            )
            return _Link(1 + bound, None, (obstacle,), block)
        return _Link(1 + bound, 1 / (1 - bound), (), block)
    if isinstance(module, ActNorm):
        low, high = float(module.log_scale.min()), float(module.log_scale.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            return _Link(None, None, (f"{name}: ActNorm has a log_scale that is not finite",))
        return _Link(math.exp(high), math.exp(-low))
    if type(module) in (Squeeze, InjectivePad):
        return _Link(1.0, 1.0)
    return _Link(None, None, (f"{name}: {type(module).__name__} has an inverse of its own that is not proven here",))


def _block(name: str, block: InvertibleResidualBlock) -> BlockBound:
    layers: list[LayerBound] = []
    obstacles: list[str] = []
    bound = _branch(f"{name}.g", block.g, layers, obstacles)
    return BlockBound(name, bound, tuple(layers), tuple(obstacles))


def _branch(name: str, module: nn.Module, layers: list[LayerBound], obstacles: list[str]) -> float | None:
    """Proven Lipschitz bound of one module of a branch, noting layers and obstacles on the way."""
    kind = parametrize.type_before_parametrizations(module)
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    if any(hook is not check_input_size for hook in hooks):
        obstacles.append(f"{name}: not proven: a forward hook may change what it computes. Remedy: remove the hook")
        return None
    if kind in _CHAINS:
        return _product([_branch(f"{name}.{key}", part, layers, obstacles) for key, part in module.named_children()])
    if kind not in _REGISTRY:
        obstacles.append(
            f"{name}: not proven: {kind.__name__} states no Lipschitz constant. Remedy: "
            f"irf.register_lipschitz({kind.__name__}, fn)"
        )
        return None
    try:
        bound = float(_REGISTRY[kind](module))
    except _NotProvenError as reason:
        obstacles.append(f"{name}: not proven: {reason}")
        return None
    if not (math.isfinite(bound) and bound >= 0):
        obstacles.append(f"{name}: not proven: the function registered for {kind.__name__} returned {bound}")
        return None
    if isinstance(getattr(module, "weight", None), Tensor) and kind in _WEIGHTED:
        norm = find_spectral_norm(module)
        layers.append(LayerBound(name, kind.__name__, bound, norm.coeff if norm else None))
    return bound


class _NotProvenError(Exception):
    """A registered type whose present settings have no proven constant; the message says why."""


def _layer_bound(module: nn.Module, weight: Tensor) -> float:
    """Proven norm of a linear or convolution layer with this weight."""
    layer: Any = module
    if isinstance(module, nn.Linear):
        exact = torch.linalg.matrix_norm(weight.double(), 2)
        return float(exact) * rounding_factor(weight)
    norm: SpectralNorm | None = find_spectral_norm(module)
    geometry = norm.geometry if norm else None
    try:
        bound = conv_norm_bound(
            weight,
            geometry.input_size if geometry else None,
            padding=layer.padding,
            padding_mode=layer.padding_mode,
            stride=layer.stride,
            dilation=layer.dilation,
            groups=layer.groups,
        )
    except ValueError as error:
        if "padding_mode" in str(error):
            raise _NotProvenError(str(error)) from error
        raise
    return float(bound)


def _batch_norm(module: nn.modules.batchnorm._BatchNorm) -> float:
    if module.training or module.running_var is None:
        raise _NotProvenError("batch normalisation with batch statistics has no Lipschitz constant; model.eval() first")
    scale = torch.rsqrt(module.running_var.double() + module.eps)
    if module.weight is not None:
        scale = scale * module.weight.double().abs()
    return float(scale.max())


def _dropout(module: nn.modules.dropout._DropoutNd) -> float:
    if not module.training:
        return 1.0
    if module.p >= 1:
        return 0.0
    return 1 / (1 - module.p)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.6g}"


def _product(factors: list[float | None]) -> float | None:
    known = [factor for factor in factors if factor is not None]
    return math.prod(known) if len(known) == len(factors) else None


_LINKS = (InvertibleResidualBlock, ActNorm, Squeeze, InjectivePad)
_CHAINS = (nn.Sequential, Bottleneck, LipschitzMLP)
_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, SpectralLinear, SpectralConv2d)

_ONE = (nn.Identity, nn.ReLU, nn.ReLU6, nn.Tanh, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Flatten, LipSwish, MaxMin)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

_BUILT_IN: tuple[tuple[tuple[type[nn.Module], ...], LipschitzFn], ...] = (
    (_WEIGHTED, lambda module: _layer_bound(module, module.weight)),
    (_ONE, lambda module: 1.0),
    (_DROPOUTS, _dropout),
    (_BATCH_NORMS, _batch_norm),
    ((nn.ELU,), lambda module: max(1.0, abs(module.alpha))),
    ((nn.LeakyReLU,), lambda module: max(1.0, abs(module.negative_slope))),
    ((nn.Sigmoid,), lambda module: 0.25),
    ((nn.SiLU,), lambda module: _SILU),
    ((nn.GELU,), lambda module: _GELU),
)
for _types, _fn in _BUILT_IN:
    for _type in _types:
        register_lipschitz(_type, _fn)
