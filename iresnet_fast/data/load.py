"""One function for every data set."""

from __future__ import annotations

import os
from collections.abc import Callable
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
# Tried in turn with a folder; the first whose files are there reads it.
_LAYOUTS: tuple[Callable[[Path], ImageSplit], ...] = (*NAMED.values(), load_parquet, load_image_folders)


def load(source: str | Path, folder: str | Path | None = None) -> ImageSplit:
    """Labelled images by the name of their set, or from wherever they are.

    Args:
        source: ``"digits"``, which scikit-learn carries; ``"mnist"``, ``"cifar10"`` or ``"cifar100"``; or a path: an
            ``.npz`` file (:func:`load_arrays`), or a folder in any of the layouts of :func:`load_mnist`,
            :func:`load_cifar`, :func:`load_parquet` and :func:`load_image_folders`.
        folder: that holds a named set. Default: the environment variable ``IRESNET_FAST_DATA``, or ``data``. Nothing
            is ever downloaded.

    Raises:
        MissingDataError: nothing of the kind is there; the message names where it was looked for.
        ValueError: files are damaged, or not what they should be.
        ModuleNotFoundError: the layout needs a package that is not installed.
    """
    if source == "digits":
        return load_digits()
    if source in NAMED:
        return NAMED[str(source)](Path(folder if folder is not None else os.environ.get(VARIABLE) or "data"))
    path = Path(source)
    if path.suffix == ".npz":
        return load_arrays(path)
    if not path.is_dir():
        raise MissingDataError(f"{str(source)!r}, which is none of digits, {', '.join(NAMED)},", [path.absolute()])
    looked = []
    for layout in _LAYOUTS:
        try:
            return layout(path)
        except MissingDataError as error:
            looked += error.candidates
    raise MissingDataError(f"a set of images in {path}", looked)
