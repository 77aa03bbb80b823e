"""Whether a module is still what it was: what was proven, or read, of it lapses with any change."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import _extension

Fingerprint = tuple[Any, ...]
# What torch keeps in every module besides its settings, and what an evaluation writes without changing the result.
_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
_BOOKKEEPING = _INTERNAL | {"frozen", "_fitted_to", "_lent_for"}
_SETTINGS = (int, float, str, tuple)


@torch.no_grad()
def fingerprint(module: nn.Module) -> Fingerprint:
    """Changes when a value, a setting, a hook, the mode or the structure of a module does.

    The checksums see what ``.data`` hides from a tensor's version.
    """
    parts = list(module.modules())
    tensors = [
        tensor
        for part in parts
        for group in (part._parameters, part._buffers)
        for tensor in group.values()
        if tensor is not None
    ]
    identities = tuple((id(tensor), tensor.shape, tensor.dtype, tensor.device) for tensor in tensors)
    return identities, _checksum(tensors), tuple(map(_settings, parts))


def _checksum(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    devices: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        devices.setdefault(tensor.device, []).append(tensor)
    return tuple(
        torch.ops.iresnet_fast.checksum(parts) if _extension.serves("checksum", device.type) else _sum_of_bytes(parts)
        for device, parts in devices.items()
    )


def _sum_of_bytes(tensors: list[Tensor]) -> int:
    """A weighted sum of all bytes, eight at a time, taken on their device: one wait for it."""
    parts = [tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in tensors]
    length = sum(part.numel() for part in parts)
    together = torch.cat([*parts, parts[0].new_zeros(-length % 8)]).view(torch.int64)
    weights = torch.arange(1, 2 * len(together), 2, device=together.device)
    return int((together * weights).sum())


def _settings(part: nn.Module) -> tuple[Any, ...]:
    """The numbers, words and hooks that determine what a module computes besides its tensors."""
    values = [item for item in vars(part).items() if item[0] not in _BOOKKEEPING and isinstance(item[1], _SETTINGS)]
    functions = (vars(part).get("forward"), *part._forward_pre_hooks.values(), *part._forward_hooks.values())
    return id(part), type(part), *values, *map(id, functions)
