"""Whether a module is still what it was: what was proven, or read, of it lapses with any change."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _torch_module

from .. import _extension
from .walk import parts_of

Fingerprint = tuple[Any, ...]
# What torch keeps in every module besides its settings, and what an evaluation writes without changing the result.
_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
_BOOKKEEPING = _INTERNAL | {"frozen", "held", "_fitted_to", "_lent", "_lent_for", "_lender"}
_SETTINGS = (int, float, str, tuple)
# Odd numbers without a pattern, as 64-bit integers with a sign.
_FACTORS = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)


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
    found: list[Any] = [id(part), type(part)]
    for group in (part._parameters, part._buffers):
        tensors += [tensor for tensor in group.values() if tensor is not None]
    for name in sorted(own.keys() - _BOOKKEEPING):
        value = own[name]
        if isinstance(value, Tensor):
            tensors.append(value)
        found += (name, value if isinstance(value, _SETTINGS) else id(value))
    for hooks in (part._forward_pre_hooks, part._forward_hooks):
        found += map(id, hooks.values())
    for name, child in part._modules.items():
        found += (name, id(child))
    return tuple(found)
