"""The linear operator that a convolution layer applies, its adjoint and its dense matrix.

The norm of a convolution is the norm of this operator at the layer's own input size and padding, not of the
reshaped kernel (whose norm can read 0.64 of the true one).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True)
class ConvGeometry:
    """Everything but the weight that determines a convolution's operator; one entry per spatial axis.

    Attributes:
        input_size: spatial size of the input, in pixels.
        stride: step between outputs.
        dilation: step between taps.
        padding: pixels added (before, after) each axis.
        padding_mode: ``"zeros"`` or ``"circular"``.
        groups: blocks that the channels fall into.
    """

    input_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    padding_mode: str = "zeros"
    groups: int = 1

    def output_size(self, kernel_size: tuple[int, ...]) -> tuple[int, ...]:
        """Spatial size of the output for a kernel of this size."""
        padded = (n + before + after for n, (before, after) in zip(self.input_size, self.padding, strict=True))
        return tuple(
            (n - d * (k - 1) - 1) // s + 1
            for n, k, d, s in zip(padded, kernel_size, self.dilation, self.stride, strict=True)
        )


def conv_apply(weight: Tensor, x: Tensor, geometry: ConvGeometry) -> Tensor:
    """Apply the convolution without its bias: (B, c_in, *input_size) to (B, c_out, *output_size)."""
    conv = _CONV[weight.dim() - 2]
    padding: int | tuple[int, ...] = 0
    if geometry.padding_mode == "zeros" and all(before == after for before, after in geometry.padding):
        padding = tuple(before for before, _ in geometry.padding)
    elif any(map(any, geometry.padding)):
        x = _pad(x, geometry)
    return conv(x, weight, None, geometry.stride, padding, geometry.dilation, geometry.groups)


def _pad(x: Tensor, geometry: ConvGeometry) -> Tensor:
    flat = [side for pair in reversed(geometry.padding) for side in pair]
    return F.pad(x, flat, mode="constant" if geometry.padding_mode == "zeros" else "circular")


def conv_adjoint(weight: Tensor, y: Tensor, geometry: ConvGeometry) -> Tensor:
    """Apply the adjoint of :func:`conv_apply`: (B, c_out, *output_size) to (B, c_in, *input_size)."""
    transpose = _CONV_TRANSPOSE[weight.dim() - 2]
    x = transpose(y, weight, None, geometry.stride, 0, 0, geometry.groups, geometry.dilation)
    for axis, (n, (before, after)) in enumerate(zip(geometry.input_size, geometry.padding, strict=True), start=2):
        # A stride can leave the last padded pixels unread: the adjoint is zero there.
        missing = n + before + after - x.shape[axis]
        if missing > 0:
            x = F.pad(x, [0, 0] * (x.dim() - 1 - axis) + [0, missing])
        inside = x.narrow(axis, before, n)
        if geometry.padding_mode == "circular" and (before or after):
            inside = inside.clone()
            inside.narrow(axis, n - before, before).add_(x.narrow(axis, 0, before))
            inside.narrow(axis, 0, after).add_(x.narrow(axis, before + n, after))
        x = inside
    return x


def conv_weight_gradient(weight: Tensor, v: Tensor, u: Tensor, geometry: ConvGeometry) -> Tensor:
    """Gradient of ⟨u, W v⟩ by the weight: (1, c_in, *input_size) and (1, c_out, *output_size) to the weight's shape."""
    padding: tuple[int, ...] = (0,) * len(geometry.input_size)
    if geometry.padding_mode == "zeros" and all(before == after for before, after in geometry.padding):
        padding = tuple(before for before, _ in geometry.padding)
    else:
        v = _pad(v, geometry)
    options: list[object] = [geometry.stride, padding, geometry.dilation, False, [0] * len(padding), geometry.groups]
    gradient: Tensor = torch.ops.aten.convolution_backward(u, v, weight, None, *options, [False, True, False])[1]
    return gradient


def conv_matrix(weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """Build the dense matrix of the operator by applying it, or its adjoint, to every basis vector.

    Returns:
        A tensor of shape (c_out·∏output_size, c_in·∏input_size), in the weight's dtype. For small operators.
    """
    into = (weight.shape[1] * geometry.groups, *geometry.input_size)
    out = (weight.shape[0], *geometry.output_size(tuple(weight.shape[2:])))
    if math.prod(into) <= math.prod(out):
        basis = torch.eye(math.prod(into), dtype=weight.dtype, device=weight.device)
        return conv_apply(weight, basis.view(-1, *into), geometry).flatten(1).T
    basis = torch.eye(math.prod(out), dtype=weight.dtype, device=weight.device)
    return conv_adjoint(weight, basis.view(-1, *out), geometry).flatten(1)
