"""CIFAR-10 and CIFAR-100 from the Python files that torchvision stores (Krizhevsky 2009)."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

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
        stored, numbers = content.get(b"data"), content.get(layout.labels_key)
        pixels = stored.array if isinstance(stored, _Array) else None
        if pixels is None or pixels.ndim != 2 or not isinstance(numbers, list):
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
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{path} cannot be read: {error}. Remedy: fetch it again, from where you trust it") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict")
    return content


class _Array:
    """What stands for a NumPy array in a pickle: bytes and a shape. NumPy's own types trust what they are given."""

    def __init__(self, *_: Any) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, content = state
        if not isinstance(kind, _Bytes) or not isinstance(content, bytes) or fortran:
            raise pickle.UnpicklingError("its arrays are not plain arrays of bytes")
        self.array = np.frombuffer(content, np.uint8).reshape([int(size) for size in shape])


class _Bytes:
    """What stands for the type uint8."""

    def __init__(self, code: str | bytes, *_: Any) -> None:
        if code not in ("u1", b"u1", "|u1", b"|u1"):
            raise pickle.UnpicklingError(f"its arrays are of type {code!r}, not of bytes")

    def __setstate__(self, state: Any) -> None:
        """Its byte order and the like, which bytes have not."""


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 pickles bytes for Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"its bytes are encoded as {encoding!r}")
    return text.encode("latin1")


class _ArraysOnly(pickle.Unpickler):
    """Makes arrays of bytes, and refuses every other object: a pickle can otherwise run any code."""

    _KNOWN: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Bytes,
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a type or function of that name here, where it is harmless."""
        if (module, name) not in self._KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a set of images does not need")
        return self._KNOWN[module, name]
