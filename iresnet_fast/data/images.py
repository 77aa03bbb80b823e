"""Labelled images in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageSplit:
    """Images and labels to train on, and others held out.

    Attributes:
        train_images: (N, C, H, W) uint8 in [0, n_levels), as the files have them.
        train_labels: (N,) int64.
        test_images: (M, C, H, W) uint8 in [0, n_levels).
        test_labels: (M,) int64.
        n_levels: how many values a pixel can have.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    n_levels: int

    def centered(self) -> ImageSplit:
        """The same with images of float32 in [−½, ½], as classifiers take them."""
        train, test = (
            images.to(torch.float32) / (self.n_levels - 1) - 0.5 for images in (self.train_images, self.test_images)
        )
        return replace(self, train_images=train, test_images=test)
