"""Checks of the arguments that the ops share; each error names the argument, what it got and what would be right."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def can_look(*tensors: Tensor) -> bool:
    """Return true if Python may act on values: not in compiled code, transforms of torch.func, or without memory."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return not any(isinstance(tensor, FakeTensor) or tensor.is_meta for tensor in tensors)


def check_conv_weight(weight: Tensor, groups: int = 1) -> int:
    """Check a convolution weight (c_out, c_in/groups, *kernel); return its number of spatial axes."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a torch.Tensor, got {type(weight).__name__}")
    if weight.dim() not in (3, 4, 5):
        raise ValueError(
            "weight must have shape (c_out, c_in/groups, *kernel) with 1 to 3 spatial axes, got shape "
            f"{tuple(weight.shape)}"
        )
    check_values("weight", weight)
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups must be a positive int, got {groups!r}")
    if weight.shape[0] % groups:
        raise ValueError(f"groups={groups} must divide c_out={weight.shape[0]} (weight.shape[0])")
    return weight.dim() - 2


def check_values(name: str, tensor: Tensor) -> None:
    """Check that a weight is of floating point, not empty and finite."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be of floating point, got {tensor.dtype}; convert it with .float() or .double()")
    if tensor.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(tensor.shape)}")
    if can_look(tensor) and not bool(torch.isfinite(tensor).all()):
        count = int((~torch.isfinite(tensor)).sum())
        raise ValueError(f"{name} must be finite, got {count} NaN or infinite of {tensor.numel()} values")


def per_axis(name: str, value: int | Sequence[int], axes: int, minimum: int = 1) -> tuple[int, ...]:
    """One int per spatial axis from an int or a sequence of them, each at least ``minimum``."""
    try:
        entries = tuple(operator.index(entry) for entry in (value if isinstance(value, Iterable) else (value,) * axes))
    except TypeError:
        entries = ()
    if len(entries) != axes or min(entries) < minimum:
        raise ValueError(f"{name} must be an int or {axes} ints, each ≥ {minimum}, got {value!r}")
    return entries


def check_circular(
    weight: Tensor,
    input_size: Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Check the arguments of a circular convolution; return (input size, stride, dilation), one int per axis each."""
    axes = check_conv_weight(weight, groups)
    grid = per_axis("input_size", input_size, axes)
    steps = per_axis("stride", stride, axes)
    if any(n % s for n, s in zip(grid, steps, strict=True)):
        raise ValueError(f"stride={steps} must divide input_size={grid}: otherwise the operator is not circular")
    return grid, steps, per_axis("dilation", dilation, axes)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Check that a named option is one of those there are."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
