"""The residual branches whose inverse is one op: chains of layers with activations before, between and after."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Compiled kernels know an activation by its place in this tuple.
ACTIVATIONS = ("identity", "relu", "elu", "softplus", "tanh", "lipswish", "maxmin")


def activate(name: str, x: Tensor, parameters: Tensor) -> Tensor:
    """One activation by name.

    Args:
        name: one of :data:`ACTIVATIONS`.
        x: (B, C, ...).
        parameters: (2,) alpha of ELU; beta and threshold of softplus; the slope softplus(beta) of LipSwish; unused by
            the others.

    Returns:
        Of x's shape.
    """
    a, b = parameters[0], parameters[1]
    if name == "relu":
        return F.relu(x)
    if name == "elu":
        return torch.where(x > 0, x, a * torch.expm1(x.clamp_max(0)))
    if name == "softplus":
        z = a * x
        return torch.where(z > b, x, torch.logaddexp(z, torch.zeros_like(z)) / a)
    if name == "tanh":
        return torch.tanh(x)
    if name == "lipswish":
        return x * torch.sigmoid(a * x) / 1.1
    if name == "maxmin":
        one, other = x.chunk(2, dim=1)
        return torch.cat([torch.maximum(one, other), torch.minimum(one, other)], dim=1)
    return x


def chain(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[str],
    parameters: Tensor,
    circular: bool = False,
) -> Tensor:
    """Activation, layer, activation, layer, ..., activation.

    Args:
        x: (B, D) for linear layers, (B, C, H, W) for convolutions.
        weights: (out, in), or (c_out, c_in, k, k) with odd k: convolutions that keep the size of the image.
        biases: (out,) or None of each.
        activations: names of :data:`ACTIVATIONS`, one more than weights.
        parameters: (number of activations, 2), see :func:`activate`.
        circular: whether convolutions pad circularly rather than with zeros.

    Returns:
        (B, out) or (B, c_out, H, W).
    """
    x = activate(activations[0], x, parameters[0])
    for weight, bias, name, numbers in zip(weights, biases, activations[1:], parameters[1:], strict=True):
        if weight.dim() == 2:
            x = F.linear(x, weight, bias)
        else:
            around = weight.shape[-1] // 2
            padded = F.pad(x, (around,) * 4, mode="circular" if circular and around else "constant")
            x = F.conv2d(padded, weight, bias)
        x = activate(name, x, numbers)
    return x
