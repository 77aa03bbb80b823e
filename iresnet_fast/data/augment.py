"""The papers' augmentation, for whole batches on their device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def augment(images: Tensor, *, shift: int = 0, flip: bool = False, generator: torch.Generator | None = None) -> Tensor:
    """Each image shifted by up to so many pixels, zeros coming in, and mirrored left to right or not.

    Args:
        images: (B, C, H, W) of any dtype.
        shift: largest shift in each direction, in pixels; drawn uniformly.
        flip: whether half of them are mirrored.
        generator: of what is drawn, on the CPU, so that every device draws the same.

    Returns:
        The same shape and dtype.

    Raises:
        ValueError: a negative shift, or one as large as the image.
    """
    if not 0 <= shift < min(images.shape[2:]):
        raise ValueError(f"shift must be from 0 to less than the image's {tuple(images.shape[2:])}, got {shift}")
    batch, _, height, width = images.shape
    if shift:
        start = torch.randint(2 * shift + 1, (2, batch, 1), generator=generator).to(images.device)
        rows = start[0] + torch.arange(height, device=images.device)
        columns = start[1] + torch.arange(width, device=images.device)
        samples = torch.arange(batch, device=images.device)[:, None, None]
        padded = F.pad(images, (shift,) * 4)
        images = padded[samples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
    if flip:
        mirrored = torch.randint(2, (batch, 1, 1, 1), generator=generator).to(images.device, torch.bool)
        images = torch.where(mirrored, images.flip(3), images)
    return images
