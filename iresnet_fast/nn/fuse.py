"""One grouped power iteration for all spectral norms of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..ops.power_iteration import power_iteration
from .inspection import parts_of
from .spectral_norm import SpectralNorm, check_sigma

_Module = TypeVar("_Module", bound=nn.Module)


def fuse(module: _Module) -> _Module:
    """Update all spectral norms of a model together, once per training forward; changes the module in place.

    Before each forward in training mode the power iterations of all layers under :func:`spectral_norm` run as one
    grouped op (:func:`iresnet_fast.ops.power_iteration`), and the layers use its weights for the length of that
    forward. Parameters, buffers, state dict and numbers are those of the unfused model, with two exceptions: a layer
    that one forward uses several times, or not at all, is iterated once for it. Layers that need more than a fixed
    number of iterations (``tol=``, weights loaded without u and v) or that are of low precision update themselves, as
    does a submodule that is called on its own, and everything in evaluation mode.

    Layers may be added and removed later; copies and moves to another device keep the fusion. With
    :class:`torch.nn.parallel.DistributedDataParallel` fuse the module inside, before or after wrapping it. Parts under
    ``torch.utils.checkpoint`` run again in the backward, outside of the fused forward: fuse those parts, not the whole.

    Args:
        module: any module, called by ``module(...)``. The models of this package are fused already.

    Returns:
        The module itself. Fusing it again changes nothing; :func:`unfuse` undoes it.

    Raises:
        TypeError: not a module; from the forward, a module under ``fully_shard`` (FSDP2).
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"fuse takes a module, got {type(module).__name__}")
    if not is_fused(module):
        fusion = _Fusion()
        module.register_forward_pre_hook(fusion.update, prepend=True)
        module.register_forward_hook(fusion.release, always_call=True)
    return module


def unfuse(module: _Module) -> _Module:
    """Let every spectral norm update itself again; undoes :func:`fuse` on this module, and changes it in place."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(fusion := getattr(hook, "__self__", None), _Fusion):
                fusion.release(module, (), None)
                del hooks[key]
                if hooks is module._forward_hooks:
                    module._forward_hooks_always_called.pop(key, None)
    return module


@contextmanager
def fused_weights(module: nn.Module) -> Iterator[None]:
    """Within it the layers of a module in training mode have the weights of one grouped update, made on entry."""
    fusion = _Fusion()
    try:
        fusion.update(module, ())
        yield
    finally:
        fusion.release(module, (), None)


def is_fused(module: nn.Module) -> bool:
    """Whether :func:`fuse` was called on this very module."""
    return any(isinstance(getattr(hook, "__self__", None), _Fusion) for hook in module._forward_pre_hooks.values())


class _Fusion:
    """The hooks of one fused module: its layers have the weights of the grouped update for the length of a forward."""

    def update(self, module: nn.Module, args: Any) -> None:
        """Before a forward: iterate, and hand each layer its weight."""
        self.release(module, (), None)  # what an interrupted forward left
        _check_not_sharded(module)
        if parametrize._cache_enabled:  # then the caller wants one weight for several forwards
            return
        for members in _groups(module):
            norms, weights = zip(*members, strict=True)
            found = power_iteration(
                weights,
                [norm._u for norm in norms],
                [norm._v for norm in norms],
                coeff=[norm.coeff for norm in norms],
                geometries=[norm.geometry for norm in norms],
                n_iterations=norms[0].n_power_iterations,
                layers_per_node=_stages(norms),
            )
            check_sigma(found.sigma, weights)
            with torch.no_grad():
                vectors = [*(norm._u for norm in norms), *(norm._v for norm in norms)]
                torch._foreach_copy_(vectors, [*found.u, *found.v])
            for norm, weight, normalized in zip(norms, weights, found.weights, strict=True):
                norm.lend(weight, normalized, self)

    def release(self, module: nn.Module, args: Any, output: Any) -> None:
        """After a forward, or an error in it: the layers are on their own again."""
        for part in parts_of(module):
            if isinstance(part, SpectralNorm):
                part.release(self)


def _groups(module: nn.Module) -> Iterator[list[tuple[SpectralNorm, Tensor]]]:
    """The norms that can be updated together, with their weights: of one device, dtype and number of iterations."""
    found: dict[tuple[Any, ...], list[tuple[SpectralNorm, Tensor]]] = {}
    for part in parts_of(module):
        if not isinstance(part, parametrize.ParametrizationList) or not isinstance(norm := part[0], SpectralNorm):
            continue
        weight = part.original
        if not norm.can_be_updated(weight):
            continue
        found.setdefault((weight.device, weight.dtype, norm.n_power_iterations), []).append((norm, weight))
    yield from found.values()


def _check_not_sharded(module: nn.Module) -> None:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule  # noqa: PLC0415  (slow to import, and rarely needed)

    if any(isinstance(part, FSDPModule) for part in module.modules()):
        raise TypeError(
            "fuse: fully_shard (FSDP2) keeps a part of each weight on each rank and frees the whole after use, while a "
            "grouped update needs all weights at once, as its gradient does. Remedy: DistributedDataParallel, or "
            "irf.unfuse(model) before fully_shard"
        )


def _stages(norms: tuple[SpectralNorm, ...]) -> list[int]:
    """How many consecutive layers work at one spatial size: their gradients become ready together."""
    counts: list[int] = []
    size = None
    for norm in norms:
        here = size if norm.geometry is None else norm.geometry.input_size
        if not counts or (size is not None and here != size):
            counts.append(0)
        counts[-1] += 1
        size = here
    return counts
