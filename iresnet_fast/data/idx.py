"""The IDX files that MNIST comes in."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# The third byte of a file says what follows: numbers with their most significant byte first.
_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: str | Path) -> Tensor:
    """The array of an IDX file, compressed by gzip or not (format: LeCun, Cortes & Burges, MNIST database).

    Args:
        path: of the file; one that ends in .gz is decompressed.

    Returns:
        A tensor of the file's shape and type.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no IDX file, or not complete.
    """
    path = Path(path)
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be decompressed: {error}. Remedy: fetch it again") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _TYPES:
        raise ValueError(f"{path} is no IDX file: it starts with {content[:4].hex(' ') or 'nothing'}")
    kind, start = np.dtype(_TYPES[content[2]]), 4 + 4 * content[3]
    shape = tuple(int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4))
    expected = start + kind.itemsize * math.prod(shape)
    if len(content) != expected:
        raise ValueError(f"{path} is not complete: {len(content)} bytes of {expected}. Remedy: fetch it again")
    array = np.frombuffer(content[start:], kind).reshape(shape)
    return torch.from_numpy(array.astype(kind.newbyteorder("=")))
