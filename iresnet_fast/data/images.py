"""Labelled images in memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .continuous import centered


@dataclass(frozen=True)
class ImageSplit:
    """Images and labels to train on, and others held out.

    Attributes:
        train_images: (N, C, H, W) uint8 in [0, n_levels), as the files have them.
        train_labels: (N,) int64.
        test_images: (M, C, H, W) uint8 in [0, n_levels).
        test_labels: (M,) int64.
        n_levels: how many values a pixel can have.
        class_names: of the labels, where the files tell.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    n_levels: int = 256
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            images, labels = getattr(self, f"{part}_images"), getattr(self, f"{part}_labels")
            if images.dim() != 4 or labels.shape != (len(images),) or labels.dtype != torch.int64:
                raise ValueError(
                    f"{part} images must be (N, C, H, W) and labels (N,) of int64, got {tuple(images.shape)} and "
                    f"{tuple(labels.shape)} of {labels.dtype}"
                )
            if len(labels) and int(labels.min()) < 0:
                raise ValueError(f"{part} labels must not be negative, got {int(labels.min())}, as of hidden labels")
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise ValueError(
                f"training images are {tuple(self.train_images.shape[1:])}, test images "
                f"{tuple(self.test_images.shape[1:])}"
            )

    @property
    def n_classes(self) -> int:
        """How many classes there are: the names, or one more than the largest label."""
        if self.class_names is not None:
            return len(self.class_names)
        return 1 + max(
            (int(labels.max()) for labels in (self.train_labels, self.test_labels) if len(labels)), default=0
        )

    def checksum(self) -> str:
        """Of all images, labels and the grey levels, in hexadecimal: other data has another."""
        digest = hashlib.blake2b(str(self.n_levels).encode(), digest_size=16)
        for part in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(part.contiguous().numpy().data)
        return digest.hexdigest()

    def centered(self) -> ImageSplit:
        """The same with images of float32 in [−½, ½], as classifiers take them."""
        train, test = (centered(images, self.n_levels) for images in (self.train_images, self.test_images))
        return replace(self, train_images=train, test_images=test)
