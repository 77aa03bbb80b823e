"""CIFAR-10 and CIFAR-100 from the Python files that torchvision stores (Krizhevsky 2009)."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .images import ImageSplit
from .missing import MissingDataError


class _Layout(NamedTuple):
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str
    labels_key: bytes
    names_key: bytes


_LAYOUTS = {
    "cifar10": _Layout(
        "cifar-10-batches-py",
        tuple(f"data_batch_{number}" for number in range(1, 6)),
        ("test_batch",),
        "batches.meta",
        b"labels",
        b"label_names",
    ),
    "cifar100": _Layout("cifar-100-python", ("train",), ("test",), "meta", b"fine_labels", b"fine_label_names"),
}
_SHAPE = (3, 32, 32)


def load_cifar(name: str, folder: str | Path) -> ImageSplit:
    """50,000 training and 10,000 test images of 32×32 pixels; nothing in the files is executed.

    Args:
        name: ``"cifar10"`` or ``"cifar100"``, with its hundred fine classes.
        folder: holds ``cifar-10-batches-py`` or ``cifar-100-python``, or is that folder itself. Nothing is downloaded.

    Raises:
        MissingDataError: files are missing; the message names where they were looked for.
        ValueError: a file is damaged, or holds anything but arrays and plain values.
    """
    if name not in _LAYOUTS:
        raise ValueError(f"name must be one of {', '.join(map(repr, _LAYOUTS))}, got {name!r}")
    layout = _LAYOUTS[name]
    places = [Path(folder) / layout.folder, Path(folder)]
    found = next((place for place in places if (place / layout.train[0]).is_file()), None)
    if found is None:
        raise MissingDataError(f"{name}'s {layout.train[0]}", (place / layout.train[0] for place in places))
    (train, train_labels), (test, test_labels) = (_read(found, part, layout) for part in (layout.train, layout.test))
    names = None
    if (found / layout.names).is_file():
        names = tuple(entry.decode() for entry in _unpickle(found / layout.names)[layout.names_key])
    return ImageSplit(train, train_labels, test, test_labels, class_names=names)


def _read(folder: Path, files: tuple[str, ...], layout: _Layout) -> tuple[Tensor, Tensor]:
    images, labels = [], []
    for name in files:
        path = folder / name
        if not path.is_file():
            raise MissingDataError(f"{layout.folder}'s {name}", [path])
        content = _unpickle(path)
        pixels, numbers = content.get(b"data"), content.get(layout.labels_key)
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 2 or numbers is None:
            raise ValueError(f"{path} has no images and labels of CIFAR's kind. Remedy: fetch it again")
        if pixels.shape != (len(numbers), 3 * 32 * 32):
            raise ValueError(f"{path} has images of shape {pixels.shape} and {len(numbers)} labels")
        images.append(torch.from_numpy(pixels.reshape(-1, *_SHAPE).copy()))
        labels.append(torch.as_tensor(numbers, dtype=torch.int64))
    return torch.cat(images), torch.cat(labels)


def _unpickle(path: Path) -> dict[bytes, Any]:
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="bytes").load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, ValueError, ImportError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Remedy: fetch it again, from where you trust it") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict")
    return content


class _ArraysOnly(pickle.Unpickler):
    """Refuses every object but NumPy arrays: a pickle can otherwise run any code."""

    _ALLOWED = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        """A type by its name, where it is harmless."""
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a set of images does not need")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)
