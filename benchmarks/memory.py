"""What a forward keeps for its backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def kept_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes of distinct memory that the graph of a result keeps, weights included."""
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # held, so that no later one takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    if not result.requires_grad:
        raise ValueError("the result has no graph, so nothing was kept")
    return sum(storage.nbytes() for storage in kept.values())


def kept_bytes_per_sample(forward: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Of each sample beyond the first: weights are kept once, however many samples there are."""
    return (kept_bytes(lambda: forward(x)) - kept_bytes(lambda: forward(x[:1]))) / (len(x) - 1)
