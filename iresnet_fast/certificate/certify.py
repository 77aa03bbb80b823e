"""Proving, and enforcing, that residual blocks and networks are invertible.

A power-iteration estimate approaches a norm from below and guarantees nothing. The bounds here come from exact
singular values (:func:`iresnet_fast.conv_norm_bound`) of the weights in use, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..nn import (
    Bijection,
    InvertibleResidualBlock,
    InvertibleSequential,
    Split,
    find_spectral_norm,
    frozen_state,
)
from ..nn.bijections.base import proven_constants
from ..nn.inspection import obstacle, stated_by
from ..nn.residual.structure import CHAINS
from ..nn.sharding import sharded_parts, unsharded
from ..nn.weights import holds_other_weights, normalized_weights, settle
from .lipschitz import REGISTRY, WEIGHTED, NotProvenError, layer_bound, unproven_reason
from .result import BlockBound, Certificate, LayerBound

# enforce aims at least this far below coeff, so that rounding the weights to their dtype does not lift the norm above.
_MARGIN = 1e-6
_ENFORCE_ROUNDS = 4

Progress = Callable[[int, int, str], None]


@torch.no_grad()
def certify(model: nn.Module, *, progress: Progress | None = None) -> Certificate:
    """Prove, where possible, that a model's residual blocks are invertible; changes no weight.

    Every proven bound of a block is attached to it, so that its inverse is certified per sample until a weight
    changes. The bound of a branch is the product of its modules' proven bounds; a module whose type states none (see
    :func:`register_lipschitz`) makes its block "not proven", never a guess.

    Args:
        model: an invertible module, or any module that contains some; what lies outside of them (a classification
            head) is not judged.
        progress: called after each residual block or link between them as ``progress(done, in all, its name)``.

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
    if parametrize._cache_enabled:
        raise RuntimeError(
            "certify would prove what parametrize.cached() holds, not the weights. Remedy: leave that context"
        )
    if holds_other_weights(model):
        raise RuntimeError(
            "certify would prove what frozen_state() holds, which are no longer the weights. Leave that context"
        )
    scope = _scope(model)
    for weight in normalized_weights(model):
        if not weight.training:
            weight.settle()
    with unsharded(model), frozen_state(model):
        parts = [part for chain in scope for part in _links(*chain)]
        links = []
        for name, module in parts:
            links.append(_link(name, module))
            if progress is not None:
                progress(len(links), len(parts), name)
    blocks = tuple(block for link in links for block in link.blocks)
    obstacles = tuple(reason for link in links for reason in link.obstacles)
    guaranteed = all(link.inverse_lipschitz is not None for link in links)
    return Certificate(
        guaranteed=guaranteed,
        scope=tuple(name for name, _ in scope),
        blocks=blocks,
        # Of several chains it is not known how the model composes them.
        lipschitz=_product([link.lipschitz for link in links]) if len(scope) == 1 else None,
        inverse_lipschitz=_product([link.inverse_lipschitz for link in links]) if len(scope) == 1 else None,
        obstacles=obstacles,
    )


@torch.no_grad()
def enforce(model: nn.Module, *, progress: Progress | None = None) -> Certificate:
    """Rescale every spectrally normalised weight whose proven norm exceeds its coeff, and certify again.

    Afterwards the stored weights themselves have norms of at most coeff. The new certificate can still say no: for
    activations steeper than 1, or modules without a proven constant.

    Args:
        model: as for :func:`certify`.
        progress: as for :func:`certify`, which comes last.

    Returns:
        The certificate of the rescaled model.

    Raises:
        TypeError: model is not an ``nn.Module``, or is under ``fully_shard`` (FSDP2).
        ValueError: there is no invertible module in it, or a weight is not finite.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    _scope(model)
    if sharded_parts(model):
        raise TypeError(
            "enforce: fully_shard (FSDP2) keeps a part of each weight on each rank, and a rescaled whole would be "
            "lost. Call enforce before fully_shard, or on a model that has loaded the full state dict"
        )
    settle(model)
    for module in model.modules():
        norm = find_spectral_norm(module)
        if norm is None:
            continue
        parametrizations = module.parametrizations.weight  # type: ignore[union-attr]  # torch types attributes of modules as Tensor | Module
        if len(parametrizations) != 1:  # type: ignore[arg-type]  # torch types attributes of modules as Tensor | Module
            raise ValueError(
                f"{type(module).__name__} has other parametrizations of its weight beside spectral_norm, which enforce "
                "cannot rescale through. Remedy: remove them first"
            )
        with frozen_state(module):
            effective = module.weight.detach().clone()  # type: ignore[operator]  # torch types attributes of modules as Tensor | Module
        original = parametrizations.original  # type: ignore[union-attr]  # torch types attributes of modules as Tensor | Module
        margin = max(_MARGIN, 4 * torch.finfo(effective.dtype).eps)
        for _ in range(_ENFORCE_ROUNDS):
            bound = layer_bound(module, effective)
            if bound <= norm.coeff:
                break
            effective = effective * ((norm.coeff / bound) * (1 - margin))
            original.copy_(effective)  # type: ignore[operator]  # torch types attributes of modules as Tensor | Module
    return certify(model, progress=progress)


@dataclass(frozen=True)
class _Link:
    """An element of the invertible chain; ``inverse_lipschitz`` is None where no inverse is proven."""

    lipschitz: float | None
    inverse_lipschitz: float | None
    obstacles: tuple[str, ...] = ()
    blocks: tuple[BlockBound, ...] = ()


def _scope(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The outermost invertible chains and links in a model.

    Raises:
        ValueError: there are none.
    """
    scope = _chains(model)
    if not scope:
        raise ValueError(
            f"{type(model).__name__} contains no invertible module. Build it from irf.nn.InvertibleSequential and "
            "irf.nn.InvertibleResidualBlock"
        )
    return scope


def _chains(module: nn.Module, name: str = "") -> list[tuple[str, nn.Module]]:
    """The outermost invertible chains and links in a model; what stands outside of them is not judged."""
    if isinstance(module, Bijection):
        return [(name or type(module).__name__, module)]
    children = [(key, child) for key, child in module._modules.items() if child is not None]
    return [found for key, child in children for found in _chains(child, f"{name}.{key}" if name else key)]


def _links(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The links of a chain in order, as often as they stand in it; a chain that is no plain one is its own link."""
    if not isinstance(module, InvertibleSequential) or obstacle(module, InvertibleSequential):
        return [(name, module)]
    # named_children would leave out a module that is used twice.
    prefix = "" if name == type(module).__name__ else f"{name}."
    parts = [(key, child) for key, child in module._modules.items() if child is not None]
    return [link for key, child in parts for link in _links(f"{prefix}{key}", child)]


def _link(name: str, module: nn.Module) -> _Link:
    if not isinstance(module, Bijection):
        return _Link(None, None, (f"{name}: not proven: {type(module).__name__} is not an irf.nn.Bijection",))
    if isinstance(module, InvertibleResidualBlock):
        module.attach_proof(None)  # what was proven before, until it is proven again
    known = next((kind for kind in (InvertibleResidualBlock, Split) if isinstance(module, kind)), stated_by(module))
    if known is Bijection:
        undefined = f"{type(module).__name__} does not define lipschitz(). Define it to return its constants"
        return _Link(None, None, (f"{name}: not proven: {obstacle(module, type(module)) or undefined}",))
    if reason := obstacle(module, known):
        return _Link(None, None, (f"{name}: not proven: {reason}",))
    if isinstance(module, InvertibleResidualBlock):
        block = _block(name, module)
        module.attach_proof(
            block.lipschitz, {layer.name.removeprefix(f"{name}.g").lstrip("."): layer.bound for layer in block.layers}
        )
        bound = block.lipschitz
        if bound is None:
            return _Link(None, None, block.obstacles, (block,))
        if bound >= 1:
            too_large = (
                f"{name}: proven Lip(g) ≤ {bound:.4g} is not below 1. Remedy: spectral_norm with a smaller coeff, or "
                "enforce(model)"
            )
            return _Link(1 + bound, None, (too_large,), (block,))
        return _Link(1 + bound, 1 / (1 - bound), (), (block,))
    if isinstance(module, Split):
        return _split(name, module)
    lipschitz, inverse_lipschitz = proven_constants(module)
    if inverse_lipschitz is None:
        none = f"{type(module).__name__}.lipschitz() gives no finite constant of its inverse"
        return _Link(None, None, (f"{name}: not proven: {none}",))
    return _Link(lipschitz, inverse_lipschitz)


def _split(name: str, split: Split) -> _Link:
    """A part of the channels passes through ``rest``, the others through the identity."""
    links = [_link(*part) for part in _links(f"{name}.rest", split.rest)]
    bounds = (_product([link.lipschitz for link in links]), _product([link.inverse_lipschitz for link in links]))
    lipschitz, inverse_lipschitz = (None if bound is None else max(1.0, bound) for bound in bounds)
    return _Link(
        lipschitz,
        inverse_lipschitz,
        tuple(reason for link in links for reason in link.obstacles),
        tuple(block for link in links for block in link.blocks),
    )


def _block(name: str, block: InvertibleResidualBlock) -> BlockBound:
    layers: list[LayerBound] = []
    obstacles: list[str] = []
    bound = _branch(f"{name}.g", block.g, layers, obstacles)
    return BlockBound(name, bound, tuple(layers), tuple(obstacles))


def _branch(name: str, module: nn.Module, layers: list[LayerBound], obstacles: list[str]) -> float | None:
    """Proven Lipschitz bound of one module of a branch, noting layers and obstacles on the way."""
    kind = parametrize.type_before_parametrizations(module)
    reason = obstacle(module, kind) or unproven_reason(module, kind)
    if getattr(module, "inplace", False):
        reason = "it works in place, which overwrites the x of x + g(x). Remedy: inplace=False"
    if reason:
        obstacles.append(f"{name}: not proven: {reason}")
        return None
    if kind in CHAINS and kind not in REGISTRY:
        parts = [(key, part) for key, part in module._modules.items() if part is not None]
        return _product([_branch(f"{name}.{key}", part, layers, obstacles) for key, part in parts])
    if kind not in REGISTRY:
        obstacles.append(
            f"{name}: not proven: {kind.__name__} states no Lipschitz constant. Remedy: "
            f"irf.register_lipschitz({kind.__name__}, fn)"
        )
        return None
    try:
        bound = float(REGISTRY[kind](module))
    except NotProvenError as error:
        obstacles.append(f"{name}: not proven: {error}")
        return None
    if not (math.isfinite(bound) and bound >= 0):
        obstacles.append(f"{name}: not proven: the function registered for {kind.__name__} returned {bound}")
        return None
    if kind in WEIGHTED:
        norm = find_spectral_norm(module)
        layers.append(LayerBound(name, kind.__name__, bound, norm.coeff if norm else None))
    return bound


def _product(factors: list[float | None]) -> float | None:
    known = [factor for factor in factors if factor is not None]
    return math.prod(known) if len(known) == len(factors) else None
