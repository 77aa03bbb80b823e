"""One function for every data set."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from .cifar import load_cifar
from .digits import load_digits
from .files import load_arrays, load_image_folders, load_parquet
from .images import ImageSplit
from .missing import MissingDataError
from .mnist import load_mnist

# Where named sets are looked for when nobody says where they are.
VARIABLE = "IRESNET_FAST_DATA"

NAMED: dict[str, Callable[[Path], ImageSplit]] = {
    "mnist": load_mnist,
    "cifar10": lambda folder: load_cifar("cifar10", folder),
    "cifar100": lambda folder: load_cifar("cifar100", folder),
}
# Any set can come so. Tried in turn with a folder; the first whose files are there reads it.
_UNNAMED: tuple[Callable[[Path], ImageSplit], ...] = (load_parquet, load_image_folders)
_LAYOUTS = (*NAMED.values(), *_UNNAMED)


def load(source: str | Path, folder: str | Path | None = None) -> ImageSplit:
    """Labelled images by the name of their set, or from wherever they are.

    Args:
        source: ``"digits"``, which scikit-learn carries; ``"mnist"``, ``"cifar10"`` or ``"cifar100"``; or a path: an
            ``.npz`` file (:func:`load_arrays`), or a folder in any of the layouts of :func:`load_mnist`,
            :func:`load_cifar`, :func:`load_parquet` and :func:`load_image_folders`.
        folder: that holds a named set, in its own files or in one of the last two layouts. Default: the environment
            variable ``IRESNET_FAST_DATA``, or ``data``. Nothing is ever downloaded.

    Raises:
        MissingDataError: nothing of the kind is there; the message names where it was looked for.
        ValueError: files are damaged, or not what they should be.
        ModuleNotFoundError: the layout needs a package that is not installed.
    """
    if source == "digits":
        return load_digits()
    if source in NAMED:
        place = Path(folder if folder is not None else os.environ.get(VARIABLE) or "data")
        return _first_of((NAMED[str(source)], *_UNNAMED), place)
    path = Path(source)
    if path.suffix == ".npz":
        return load_arrays(path)
    if not path.is_dir():
        raise MissingDataError(f"{str(source)!r}, which is none of digits, {', '.join(NAMED)},", [path.absolute()])
    return _first_of(_LAYOUTS, path)


def _first_of(layouts: Sequence[Callable[[Path], ImageSplit]], folder: Path) -> ImageSplit:
    missing = []
    for layout in layouts:
        try:
            return layout(folder)
        except MissingDataError as error:
            missing.append(error)
    begun = [error for error in missing if any(_is_begun(path, folder) for path in error.candidates)]
    if len(begun) == 1:  # a folder of that layout is there, and not all of its files
        raise begun[0]
    raise MissingDataError(f"a set of images in {folder}", [path for error in missing for path in error.candidates])


def _is_begun(path: Path, folder: Path) -> bool:
    return path.parent != folder and path.parent.exists()
