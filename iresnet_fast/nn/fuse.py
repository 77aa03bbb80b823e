"""One grouped power iteration for all spectral norms of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..ops.power_iteration import power_iteration
from .recomputation import is_recomputing
from .sharding import sharded_parts
from .weights import (
    check_sigma,
    is_frozen,
    lend,
    normalized_weights,
    take_back,
    version_of,
    weight_in_place,
)

if TYPE_CHECKING:
    from .spectral_norm import SpectralNorm

_Module = TypeVar("_Module", bound=nn.Module)


def fuse(module: _Module) -> _Module:
    """Update all spectral norms of a model together, once per training forward; changes the module in place.

    Before each forward in training mode the power iterations of all layers under :func:`spectral_norm` run as one
    grouped op (:func:`iresnet_fast.ops.power_iteration`), and the layers use its weights for the length of that
    forward. Parameters, buffers, state dict and numbers are those of the unfused model, with two exceptions: a layer
    that one forward uses several times, or not at all, is iterated once for it. Layers that need more than a fixed
    number of iterations (``tol=``) or that are of low precision update themselves, as does a submodule that is called
    on its own, and everything in evaluation mode.

    Layers may be added and removed later; copies and moves to another device keep the fusion. With
    :class:`torch.nn.parallel.DistributedDataParallel` fuse the module inside, before or after wrapping it. Parts under
    ``torch.utils.checkpoint`` are recomputed with the weights of their forward.

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
            if isinstance(getattr(hook, "__self__", None), _Fusion):
                del hooks[key]
                if hooks is module._forward_hooks:
                    module._forward_hooks_always_called.pop(key, None)
    return module


def is_fused(module: nn.Module) -> bool:
    """Return true if :func:`fuse` was called on this very module."""
    return any(isinstance(getattr(hook, "__self__", None), _Fusion) for hook in module._forward_pre_hooks.values())


@contextmanager
def fused_weights(module: nn.Module) -> Iterator[None]:
    """Within it the layers of a module in training mode have the weights of one grouped update, made on entry."""
    fusion = _Fusion()
    fusion.update(module, ())
    try:
        yield
    finally:
        fusion.release(module, (), None)


class _Fusion:
    """The hooks of one fused module: its layers have the weights of the grouped update for the length of a forward."""

    def update(self, module: nn.Module, args: Any) -> None:
        """Before a forward: iterate, and put the weights in place."""
        # Under torch's caching the caller wants one weight for many forwards. Transforms see plain ATen only.
        if not module.training or parametrize._cache_enabled or torch._C._are_functorch_transforms_active():
            return
        take_back(self)  # what a forward left that was interrupted
        lend(_update_together(module), self)

    def release(self, module: nn.Module, args: Any, output: Any) -> None:
        """After a forward, or an error in it: the layers are on their own again."""
        take_back(self)


def _update_together(module: nn.Module) -> dict[nn.Module, tuple[Tensor, int | None]]:
    """Iterate the norms of a module by one op for each group, and return their weights as frames lend them."""
    _check_not_sharded(module)
    found: dict[nn.Module, tuple[Tensor, int | None]] = {}
    again = is_recomputing()
    for members in _groups(module):
        norms, weights = zip(*members, strict=True)
        result = power_iteration(
            weights,
            [norm._u for norm in norms],
            [norm._v for norm in norms],
            coeff=[norm.coeff for norm in norms],
            geometries=[norm.geometry for norm in norms],
            n_iterations=0 if again else norms[0].n_power_iterations,
            layers_per_node=_stages(norms),
            in_backward=False,
        )
        check_sigma(result.sigma, weights)
        if not again:
            with torch.no_grad():
                vectors = [*(norm._u for norm in norms), *(norm._v for norm in norms)]
                torch._foreach_copy_(vectors, [*result.u, *result.v])
        for norm in norms:
            if again:
                norm.writes.check(inside=True, on_cpu=weights[0].device.type == "cpu")
            else:
                norm.writes.note(grouped=True)
        found.update(zip(norms, zip(result.weights, map(version_of, weights), strict=True), strict=True))
    return found


def _groups(module: nn.Module) -> Iterator[list[tuple[SpectralNorm, Tensor]]]:
    """The norms that can be updated together, with their weights: of one device, dtype and number of iterations."""
    found: dict[tuple[Any, ...], list[tuple[SpectralNorm, Tensor]]] = {}
    for part in normalized_weights(module):
        norm, weight = part.norm, part.original
        in_place = is_frozen(norm) or weight_in_place(norm, weight) is not None
        if norm.can_be_updated(weight) and not in_place:
            found.setdefault((weight.device, weight.dtype, norm.n_power_iterations), []).append((norm, weight))
    yield from found.values()


def _check_not_sharded(module: nn.Module) -> None:
    if sharded_parts(module):
        raise TypeError(
            "fuse: fully_shard (FSDP2) keeps a part of each weight on each rank and frees the whole after use, while a "
            "grouped update needs all weights at once, as its gradient does. Use DistributedDataParallel, or call "
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
