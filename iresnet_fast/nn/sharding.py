"""Models whose parameters are spread over ranks by ``fully_shard`` (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def sharded_parts(module: nn.Module) -> list[Any]:
    """The parts of a module under ``fully_shard`` (FSDP2)."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule  # noqa: PLC0415  (slow to import, and rarely needed)

    return [part for part in module.modules() if isinstance(part, FSDPModule)]


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Within it the parameters of a module under ``fully_shard`` (FSDP2) are whole, and no gradient is recorded.

    All ranks must enter it. Other modules are left alone.
    """
    parts = sharded_parts(module)
    if not parts:
        yield
        return
    try:
        for part in parts:
            part.unshard()
        with torch.no_grad():  # FSDP reduces the gradients of a forward only
            yield
    finally:
        for part in parts:
            part.reshard()


def whole(weight: Tensor) -> Tensor:
    """The whole of a weight that is spread over ranks (``fully_shard``); any other as it is."""
    full: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return full
