"""A branch's layers as the whole-block kernels read them, and what they write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from .activations import MAXMIN

# Of each layer in the table: inputs, outputs, weights and biases before it, the activation after it, and its taps.
ENTRY = tl.constexpr(6)


@dataclass(frozen=True)
class Layers:
    """Layers in the kernels' terms.

    Attributes:
        weights: of all layers, (taps, inputs, outputs) each, flat.
        biases: of all layers, flat; zeros where there is none.
        table: int32: the activation before the first layer, then an entry for each.
        order: of the channels of x, None for their own.
    """

    weights: Tensor
    biases: Tensor
    table: Tensor
    order: Tensor | None

    def tensors(self, parameters: Tensor) -> tuple[Tensor, ...]:
        """As the kernels take them."""
        return self.weights, self.biases, parameters.contiguous(), self.table

    def reordered(self, x: Tensor) -> Tensor:
        """X (B, C, ...), its channels in this order and last in memory."""
        x = _in_order(x, 1, self.order)
        return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)


@dataclass(frozen=True)
class Results:
    """What a kernel writes: x, and per sample residual, iterations, evaluations and whether it converged."""

    x: Tensor
    residual: Tensor
    iterations: Tensor
    evaluations: Tensor
    converged: Tensor

    @classmethod
    def empty(cls, y: Tensor) -> Results:
        """Memory for the results of y (B, C, ...)."""
        layout = torch.channels_last if y.dim() == 4 else torch.contiguous_format
        return cls(
            x=torch.empty_like(y, memory_format=layout),
            residual=y.new_empty(len(y)),
            iterations=y.new_empty(len(y), dtype=torch.int64),
            evaluations=y.new_empty(len(y), dtype=torch.int64),
            converged=y.new_empty(len(y), dtype=torch.bool),
        )

    def arguments(self) -> tuple[Tensor, ...]:
        """As the kernels take them: Triton stores no booleans."""
        return self.x, self.residual, self.iterations, self.evaluations, self.converged.view(torch.int8)

    def in_order(self, layers: Layers) -> tuple[Tensor, ...]:
        """As the op returns them: the channels of x in their own order, dense."""
        x = self.x if layers.order is None else _in_order(self.x, 1, layers.order.argsort())
        return x.contiguous(), self.residual, self.iterations, self.evaluations, self.converged


def pack(weights: Sequence[Tensor], biases: Sequence[Tensor | None], activations: Sequence[int]) -> Layers:
    """Put layers (c_out, c_in, *kernel) into the kernels' terms.

    Where MaxMin acts on channels, their pairs (i, i + C/2) are made neighbours, in the weights around it.
    """
    channels = [weights[0].shape[1], *(len(weight) for weight in weights)]
    kinds = [(activations[0], activations[-1]), *((kind,) for kind in activations[1:-1])]
    orders = [_pairs(count, MAXMIN.value in kind) for count, kind in zip(channels, kinds, strict=False)]
    orders.append(orders[0])
    table, flat, offsets, at, bias_at = [activations[0]], [], [], 0, 0
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        outputs, inputs, *kernel = weight.shape
        taps = kernel[0] * kernel[1]
        table += [inputs, outputs, at, bias_at, activations[i + 1], taps]
        at, bias_at = at + weight.numel(), bias_at + outputs
        flat.append(_in_order(_in_order(weight, 0, orders[i + 1]), 1, orders[i]).permute(2, 3, 1, 0).reshape(-1))
        offsets.append(weight.new_zeros(outputs) if bias is None else _in_order(bias, 0, orders[i + 1]))
    table_there = torch.tensor(table, dtype=torch.int32, device="cpu").to(weights[0].device, non_blocking=True)
    return Layers(torch.cat(flat), torch.cat(offsets), table_there, orders[0])


def _pairs(channels: int, are_sorted: bool) -> Tensor | None:
    return torch.arange(channels, device="cpu").view(2, channels // 2).T.flatten() if are_sorted else None


def _in_order(tensor: Tensor, axis: int, order: Tensor | None) -> Tensor:
    return tensor if order is None else tensor.index_select(axis, order.to(tensor.device))
