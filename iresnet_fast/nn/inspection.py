"""List the parts of a module, and tell whether it is what its type says and whether it has changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _torch_module

from .. import _extension

Fingerprint = tuple[Any, ...]
# What torch keeps in every module besides its settings, and what an evaluation writes without changing the result.
_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
_BOOKKEEPING = _INTERNAL | {"writes", "_seen", "_is_torch_compile"}
_SETTINGS = (int, float, str, tuple)
_FORWARDS: dict[type[nn.Module], Any] = {}
# Where hooks are defined that change no result.
_HARMLESS = (f"{__package__}.", "torch.distributed.fsdp.")
# Odd numbers without a pattern, as 64-bit integers with a sign.
_FACTORS = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)


def parts_of(module: nn.Module) -> list[nn.Module]:
    """Every module within once, itself first: what ``modules()`` gives, in its order, without generators in generators.

    For what runs in every step or solve, where the walk of ``modules()`` shows.
    """
    found: dict[int, nn.Module] = {}
    stack: list[nn.Module | None] = [module]
    while stack:
        part = stack.pop()
        if part is not None and id(part) not in found:
            found[id(part)] = part
            stack.extend(reversed(part._modules.values()))
    return list(found.values())


def foreign_hooks(module: nn.Module) -> list[Any]:
    """Return the forward hooks of a module that may change what it computes: all but ours and those of FSDP2."""
    if not module._forward_pre_hooks and not module._forward_hooks:
        return []
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return [hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith(_HARMLESS)]


def know_forward(kind: type[nn.Module]) -> None:
    """Remember what a type computes: its forward may be replaced, for all its modules at once."""
    _FORWARDS[kind] = kind.forward


def has_own(module: nn.Module, method: str, known: type[nn.Module]) -> bool:
    """Return true if a module of a known type has this method from a subclass, or of its own."""
    return getattr(type(module), method, None) is not getattr(known, method, None) or method in vars(module)


def obstacle(module: nn.Module, known: type[nn.Module]) -> str | None:
    """Return why a module cannot be taken for one of a known type; None if it can."""
    kind = type(module)
    if known in _FORWARDS and known.forward is not _FORWARDS[known]:
        return f"{known.__name__}.forward has been replaced"
    if any(getattr(kind, method, None) is not getattr(known, method, None) for method in ("forward", "inverse")):
        return f"{kind.__name__} has a forward or inverse of its own"
    own = [name for name, value in vars(module).items() if hasattr(kind, name) and callable(value)]
    if own:
        names = "forward or inverse" if {"forward", "inverse"} & set(own) else own[0]
        return f"this {kind.__name__} has a {names} of its own"
    if foreign_hooks(module) or _torch_module._global_forward_hooks or _torch_module._global_forward_pre_hooks:
        return "a forward hook may change what it computes. Remedy: remove the hook"
    return None


def stated_by(module: nn.Module) -> type[nn.Module]:
    """Return the class whose ``lipschitz`` a bijection has: a subclass with another forward is not covered by it."""
    return next(kind for kind in type(module).__mro__ if "lipschitz" in vars(kind))


@torch.no_grad()
def fingerprint(module: nn.Module) -> Fingerprint:
    """Changes when a value, a setting, a hook, the mode or the structure of a module does.

    The checksums see what ``.data`` hides from a tensor's version. What a module keeps inside of other objects than
    tensors, numbers, words and tuples is seen only when the object is another one.
    """
    tensors: list[Tensor] = []
    settings = [_read(part, tensors) for part in parts_of(module)]
    identities = [(id(tensor), tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
    everywhere = (*_torch_module._global_forward_pre_hooks.values(), *_torch_module._global_forward_hooks.values())
    return tuple(identities), _checksum(tensors), tuple(settings), tuple(map(id, everywhere))


def _checksum(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    devices: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        devices.setdefault(tensor.device, []).append(tensor)
    return tuple(
        torch.ops.iresnet_fast.checksum(parts) if _extension.serves("checksum", device.type) else _sum_of_bytes(parts)
        for device, parts in devices.items()
    )


def _sum_of_bytes(tensors: list[Tensor]) -> int:
    """A sum over all bytes, eight at a time and each mixed with its place, taken on their device: one wait for it."""
    parts = [tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in tensors]
    length = sum(part.numel() for part in parts)
    words = torch.cat([*parts, parts[0].new_zeros(-length % 8)]).view(torch.int64)
    words = words ^ (torch.arange(1, len(words) + 1, device=words.device) * _FACTORS[0])
    for shift, factor in zip((32, 29), _FACTORS[1:], strict=True):
        words = words * factor
        words = words ^ ((words >> shift) & ((1 << (64 - shift)) - 1))  # a shift that brings in zeros
    return int(words.sum())


def _read(part: nn.Module, tensors: list[Tensor]) -> tuple[Any, ...]:
    """The numbers, words, parts and functions that determine what a module computes; its tensors go to the list."""
    own = part.__dict__
    found: list[Any] = [id(part), type(part), type(part).forward]
    for group in (part._parameters, part._buffers):
        tensors += [tensor for tensor in group.values() if tensor is not None]
    for name, value in own.items():
        if name in _BOOKKEEPING:
            continue
        if isinstance(value, Tensor):
            tensors.append(value)
        found += (name, value if isinstance(value, _SETTINGS) else id(value))
    for hooks in (part._forward_pre_hooks, part._forward_hooks):
        found += map(id, hooks.values())
    for name, child in part._modules.items():
        found += (name, id(child))
    return tuple(found)
