"""The handwritten digits that scikit-learn carries: 1,797 real scans of 8×8 pixels (UCI, Alpaydin & Kaynak 1998)."""

from __future__ import annotations

import torch

from ..optional import require
from .images import ImageSplit

_LEVELS = 17


def load_digits(test_share: float = 0.25, seed: int = 0) -> ImageSplit:
    """The digits, split with equal shares of every class; 17 grey levels.

    Args:
        test_share: share of the images that is held out.
        seed: of the split.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    require("reading the digits", "sklearn")
    from sklearn.datasets import load_digits as load  # noqa: PLC0415  (an optional package)
    from sklearn.model_selection import train_test_split  # noqa: PLC0415

    pixels, labels = load(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.uint8).view(-1, 1, 8, 8)
    classes = torch.as_tensor(labels, dtype=torch.int64)
    train, test = train_test_split(range(len(classes)), test_size=test_share, random_state=seed, stratify=labels)
    return ImageSplit(images[train], classes[train], images[test], classes[test], _LEVELS)
