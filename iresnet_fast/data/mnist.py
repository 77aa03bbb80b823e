"""MNIST, and sets in the same files, as Fashion-MNIST is (LeCun, Cortes & Burges 1998)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .idx import read_idx
from .images import ImageSplit
from .missing import MissingDataError

_PARTS = ("train", "t10k")
# Where the files lie below the folder that a user names: in it, or as torchvision stores them.
_FOLDERS = ("", "raw", "MNIST/raw")


def load_mnist(folder: str | Path) -> ImageSplit:
    """MNIST's 60,000 training and 10,000 test images from its four IDX files, compressed or not.

    Args:
        folder: holds the files, or ``MNIST/raw`` with them, as torchvision stores them. Nothing is downloaded.

    Raises:
        MissingDataError: files are missing; the message names where they were looked for.
        ValueError: a file is damaged, or images and labels are not as many.
    """
    images, labels = zip(*(_read_part(Path(folder), part) for part in _PARTS), strict=True)
    return ImageSplit(images[0], labels[0], images[1], labels[1])


def _read_part(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    images = read_idx(_find(folder, f"{part}-images-idx3-ubyte"))
    labels = read_idx(_find(folder, f"{part}-labels-idx1-ubyte"))
    if images.dim() != 3 or images.dtype != torch.uint8 or len(images) != len(labels):
        raise ValueError(
            f"{folder} has {part} images of shape {tuple(images.shape)}, {images.dtype}, and labels of shape "
            f"{tuple(labels.shape)}: not a set of MNIST's kind"
        )
    return images.unsqueeze(1), labels.to(torch.int64)


def _find(folder: Path, name: str) -> Path:
    candidates = [folder / below / (name + ending) for below in _FOLDERS for ending in ("", ".gz")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise MissingDataError(f"MNIST's {name}", candidates)
