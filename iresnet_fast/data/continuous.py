"""From integers to continuous data."""

from __future__ import annotations

import torch
from torch import Tensor


def dequantize(images: Tensor, n_levels: int = 256, *, generator: torch.Generator | None = None) -> Tensor:
    """(x + u)/n_levels with u uniform in [0, 1): integers in [0, n_levels) as continuous data in [0, 1].

    A density of the result bounds the integers' probability from below: log P(x) ≥ E[log p((x + u)/n)] − D·log n
    (Theis et al. 2016).

    Args:
        images: (B, ...) of an integer dtype.
        n_levels: how many values there can be; 256 for 8 bits.
        generator: of the noise, on the images' device.

    Returns:
        float32 of the same shape.

    Raises:
        TypeError: data of floating point.
        ValueError: values outside of [0, n_levels).
    """
    images = _integers(images, n_levels, "dequantize")
    noise = torch.rand(images.shape, generator=generator, device=images.device)
    # Rounded up to the next integer, the largest of all would leave the range of its image.
    return ((images + noise) / n_levels).clamp_max(1.0)


def midpoints(images: Tensor, n_levels: int = 256) -> Tensor:
    """(x + ½)/n_levels: integers in [0, n_levels) in the middle of where :func:`dequantize` puts them.

    Args:
        images: (B, ...) of an integer dtype.
        n_levels: how many values there can be.

    Returns:
        float32 of the same shape, in (0, 1), as flows take data.

    Raises:
        TypeError: data of floating point.
        ValueError: values outside of [0, n_levels).
    """
    return (_integers(images, n_levels, "midpoints").to(torch.float32) + 0.5) / n_levels


def centered(images: Tensor, n_levels: int = 256) -> Tensor:
    """x/(n_levels − 1) − ½: integers in [0, n_levels) as classifiers take images.

    Args:
        images: (B, ...) of an integer dtype.
        n_levels: how many values there can be.

    Returns:
        float32 of the same shape, in [−½, ½].

    Raises:
        TypeError: data of floating point.
        ValueError: values outside of [0, n_levels).
    """
    return _integers(images, n_levels, "centered").to(torch.float32) / (n_levels - 1) - 0.5


def _integers(images: Tensor, n_levels: int, taker: str) -> Tensor:
    """The same images, if they are integers in [0, n_levels)."""
    if images.is_floating_point() or images.is_complex() or images.dtype == torch.bool:
        raise TypeError(f"{taker} takes integers, got {images.dtype}")
    possible = torch.iinfo(images.dtype)
    if images.numel() and (possible.min < 0 or possible.max >= n_levels):  # else there is nothing to look for
        low, high = (int(end) for end in torch.aminmax(images.to(torch.int64)))  # which not every integer has
        if low < 0 or high >= n_levels:
            raise ValueError(f"integers of {n_levels} levels are in [0, {n_levels - 1}], got {low} to {high}")
    return images
