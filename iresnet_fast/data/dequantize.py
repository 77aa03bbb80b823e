"""From integers to continuous data."""

from __future__ import annotations

import torch
from torch import Tensor


def dequantize(images: Tensor, n_bits: int = 8, *, generator: torch.Generator | None = None) -> Tensor:
    """(x + u)/2^n_bits with u uniform in [0, 1): integers in [0, 2^n_bits) as continuous data in [0, 1].

    A density of the result bounds the integers' probability: log P(x) ≥ E[log p((x + u)/2^n)] − D·n·log 2 (Theis et
    al. 2016).

    Args:
        images: (B, ...) of an integer dtype.
        n_bits: of the integers.
        generator: of the noise, on the images' device.

    Returns:
        float32 of the same shape.

    Raises:
        TypeError: data of floating point.
        ValueError: values outside of [0, 2^n_bits).
    """
    if images.is_floating_point() or images.is_complex() or images.dtype == torch.bool:
        raise TypeError(f"dequantize takes integers, got {images.dtype}")
    if images.numel():
        low, high = (int(end) for end in torch.aminmax(images))
        if low < 0 or high >= 2**n_bits:
            raise ValueError(f"integers of {n_bits} bits are in [0, {2**n_bits - 1}], got {low} to {high}")
    noise = torch.rand(images.shape, generator=generator, device=images.device)
    # Rounded up to the next integer, the largest of all would leave the range of its image.
    return ((images + noise) / 2**n_bits).clamp_max(1.0)
