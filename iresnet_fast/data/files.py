"""Images from folders of files, from Parquet tables in the Hugging Face layout, and from NumPy arrays."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..optional import require
from .images import ImageSplit
from .missing import MissingDataError

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm"})
# What the parts are called.
_PARTS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}
_IMAGE_COLUMNS, _LABEL_COLUMNS = ("image", "img"), ("label", "labels", "fine_label")
_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


def load_image_folders(folder: str | Path) -> ImageSplit:
    """Images in ``train/<class>/`` and ``test/<class>/`` (or ``val``); classes are numbered in their names' order.

    Args:
        folder: holds the two folders. Images of one size; in colour where any of them is.

    Raises:
        MissingDataError: a folder is missing.
        ValueError: no images, images of several sizes, a file that is none, other classes to test than to train.
        ModuleNotFoundError: Pillow is not installed.
    """
    folder = Path(folder)
    parts: dict[str, dict[str, list[Path]]] = {}
    for part, names in _PARTS.items():
        found = next((folder / name for name in names if (folder / name).is_dir()), None)
        if found is None:
            raise MissingDataError(f"the folder of {part} images", [folder / name for name in names])
        classes = sorted(entry for entry in found.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        parts[part] = {
            entry.name: sorted(path for path in entry.iterdir() if path.suffix.lower() in _SUFFIXES)
            for entry in classes
        }
        if not any(parts[part].values()):
            raise ValueError(f"{found} has no images in folders of their classes, as {found}/cat/1.png")
    names = tuple(parts["train"])
    if empty := [name for name in names if not parts["train"][name]]:
        raise ValueError(f"the training images have classes without an image: {', '.join(empty)}")
    if unknown := sorted(set(parts["test"]) - set(names)):
        raise ValueError(f"the test images have classes that the training images have not: {', '.join(unknown)}")
    both = []
    for files in parts.values():
        pairs = [(path, names.index(name)) for name, paths in files.items() for path in paths]
        both.append((_decode([path for path, _ in pairs]), torch.tensor([label for _, label in pairs])))
    return _split(both[0], both[1], names)


def load_parquet(folder: str | Path) -> ImageSplit:
    """Images from ``train*.parquet`` and ``test*.parquet`` files, as the Hugging Face hub stores them.

    Args:
        folder: holds the files, or ``data`` with them. Columns ``image`` or ``img`` with the bytes of an image file,
            and ``label``, ``labels`` or ``fine_label``.

    Raises:
        MissingDataError: files are missing.
        ValueError: other columns, images of several sizes, or a damaged file.
        ModuleNotFoundError: pyarrow or Pillow is not installed.
    """
    folder = Path(folder)
    both = []
    for part, names in _PARTS.items():
        patterns = [f"{below}{name}*.parquet" for below in ("", "data/") for name in names]
        files = next((found for pattern in patterns if (found := sorted(folder.glob(pattern)))), None)
        if files is None:
            raise MissingDataError(f"the table of {part} images", [folder / pattern for pattern in patterns])
        both.append(_read_tables(files))
    return _split(both[0], both[1], None)


def load_arrays(path: str | Path) -> ImageSplit:
    """Images from one ``.npz`` file with the arrays train_images, train_labels, test_images and test_labels.

    Args:
        path: of the file. Images are uint8, (N, H, W), (N, C, H, W) or, with one or three channels, (N, H, W, C).

    Raises:
        MissingDataError: there is no such file.
        ValueError: arrays are missing, of other types or shapes, or the file is damaged or holds Python objects, which
            are not loaded.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingDataError("the file of arrays", [path])
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in _ARRAYS if name in file}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if missing := [name for name in _ARRAYS if name not in arrays]:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    for part in ("train", "test"):
        if arrays[f"{part}_labels"].dtype.kind not in "iu":
            raise ValueError(f"{path} has {part} labels of {arrays[f'{part}_labels'].dtype}; integers are needed")
    both = [
        (_to_images(arrays[f"{part}_images"], path), torch.as_tensor(arrays[f"{part}_labels"].astype(np.int64)))
        for part in ("train", "test")
    ]
    return _split(both[0], both[1], None)


def _split(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], names: tuple[str, ...] | None) -> ImageSplit:
    return ImageSplit(*train, *test, class_names=names)


def _to_images(array: np.ndarray, path: Path) -> Tensor:
    if array.dtype != np.uint8 or array.ndim not in (3, 4):
        raise ValueError(
            f"{path} has images of shape {array.shape} and type {array.dtype}; uint8 in 3 or 4 axes needed"
        )
    images = torch.from_numpy(np.ascontiguousarray(array))
    if images.dim() == 3:
        return images.unsqueeze(1)
    last = images.shape[3] in (1, 3) and images.shape[1] not in (1, 3)
    return images.permute(0, 3, 1, 2).contiguous() if last else images


def _read_tables(files: Sequence[Path]) -> tuple[Tensor, Tensor]:
    require("reading Parquet", "pyarrow")
    from pyarrow import parquet  # noqa: PLC0415  (an optional package)

    images: list[bytes] = []
    labels: list[int] = []
    for path in files:
        try:
            table = parquet.read_table(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}. Remedy: fetch it again") from error
        columns = table.column_names
        image, label = (next((c for c in known if c in columns), None) for known in (_IMAGE_COLUMNS, _LABEL_COLUMNS))
        if image is None or label is None:
            raise ValueError(
                f"{path} has the columns {', '.join(columns)}; one of {', '.join(_IMAGE_COLUMNS)} and one of "
                f"{', '.join(_LABEL_COLUMNS)} are needed"
            )
        for entry in table.column(image).to_pylist():
            if not isinstance(entry, dict) or not isinstance(entry.get("bytes"), bytes):
                raise ValueError(f"{path} has images that are no structs with the bytes of an image file")
            images.append(entry["bytes"])
        found = table.column(label).to_pylist()
        if not all(isinstance(value, int) and not isinstance(value, bool) for value in found):
            raise ValueError(f"{path} has labels that are no integers in its column {label}")
        labels += found
    return _decode(images), torch.tensor(labels, dtype=torch.int64)


def _decode(sources: Sequence[Path | bytes]) -> Tensor:
    """(N, C, H, W) uint8; in colour where any image is."""
    require("reading images", "PIL")
    from PIL import Image  # noqa: PLC0415  (an optional package)

    decoded = []
    for source in sources:
        try:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                mode, gray = image.mode, image.mode in ("L", "1")
                decoded.append(np.asarray(image.convert("L" if gray else "RGB")))
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{_named(source)} cannot be read: {error}") from error
        if mode in ("I", "F") or mode.startswith("I;16"):
            raise ValueError(
                f"{_named(source)} has pixels of more than 8 bits (mode {mode}). Remedy: convert it to 8 bits"
            )
    color = any(array.ndim == 3 for array in decoded)
    arrays = [np.stack([array] * 3, -1) if color and array.ndim == 2 else array for array in decoded]
    sizes = sorted({array.shape[:2] for array in arrays})
    if len(sizes) > 1:
        raise ValueError(f"images have {len(sizes)} sizes, from {sizes[0]} to {sizes[-1]}. Remedy: scale them to one")
    images = torch.from_numpy(np.stack(arrays))
    return images.permute(0, 3, 1, 2).contiguous() if color else images.unsqueeze(1)


def _named(source: Path | bytes) -> str:
    return "an image" if isinstance(source, bytes) else str(source)
