"""Whether every sample has an id of its own, in memory that does not grow with their number."""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from .inputs import InputError, InputFile, read
from .operation import ID

# Start of the name of the folder of what is kept of the ids for a while.
SCRATCH = ".ids."
_TOGETHER = 65536
# Ids that are sorted in memory together.
_BUCKET = 1_000_000
_NAMED = 5


def check_ids(files: Sequence[InputFile], scratch: Path) -> None:
    """Raise where two samples have the same id.

    Integers that only grow are seen to be distinct as they are read. Of other ids eight bytes each go to files in
    ``scratch`` for a while.

    Raises:
        InputError: duplicate ids, a sample without one, files with and without ids, ids of several types or of one
            that is not integers or text.
    """
    with_ids = [file for file in files if file.has_ids]
    if not with_ids:
        return
    if len(with_ids) < len(files):
        without = next(file.path for file in files if not file.has_ids)
        raise InputError(f"{without} has no {ID!r}, and {with_ids[0].path} has. Remedy: ids in all files, or in none")
    if not _only_grow(files):
        with tempfile.TemporaryDirectory(dir=scratch, prefix=SCRATCH) as folder:
            suspects = _equal_digests(files, Path(folder))
        if suspects and (found := _name(files, suspects)):
            named = ", ".join(f"{value!r} ({count} times)" for value, count in found[:_NAMED])
            more = ", …" if len(found) > _NAMED else ""
            raise InputError(f"duplicate ids: {named}{more}. Remedy: an id of its own for every sample")


def _ids(files: Sequence[InputFile]) -> Iterator[pa.Array]:
    kind: pa.DataType | None = None
    for file in files:
        ranges = [(start, min(start + _TOGETHER, file.n_rows)) for start in range(0, file.n_rows, _TOGETHER)]
        for (start, _), table in zip(ranges, read(file, ID, ranges), strict=True):
            ids = _plain(table.column(ID).combine_chunks())
            known = pa.types.is_integer(ids.type) or pa.types.is_string(ids.type) or pa.types.is_large_string(ids.type)
            if not known:
                raise InputError(f"{file.path} has ids of type {ids.type}. Remedy: integers or text")
            if kind is not None and ids.type != kind:
                raise InputError(f"{file.path} has ids of type {ids.type}, the files before it of {kind}")
            kind = ids.type
            if ids.null_count:
                raise InputError(f"{file.path} has samples without an id, the first in rows {start} and after")
            yield ids


def _plain(ids: pa.Array) -> pa.Array:
    """Text of every kind as plain text."""
    if pa.types.is_dictionary(ids.type):
        ids = ids.dictionary_decode()
    return ids.cast(pa.string()) if pa.types.is_string_view(ids.type) else ids


def _only_grow(files: Sequence[InputFile]) -> bool:
    last: int | None = None
    for ids in _ids(files):
        if not pa.types.is_integer(ids.type):
            return False
        values = ids.to_numpy()
        if bool((values[1:] <= values[:-1]).any()) or (last is not None and int(values[0]) <= last):
            return False
        last = int(values[-1])
    return True


def _digests(ids: pa.Array) -> np.ndarray:
    """(n,) uint64: of integers themselves, mixed; of text a hash, of which two may be equal."""
    if pa.types.is_integer(ids.type):
        values = ids.cast(pa.int64(), safe=False).to_numpy().view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return values ^ (values >> np.uint64(32))
    digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in ids.to_pylist())
    return np.frombuffer(b"".join(digests), np.uint64)


def _equal_digests(files: Sequence[InputFile], folder: Path) -> set[int]:
    """Digests that there are more than once, or the first thousand of them."""
    n_buckets = 1 + sum(file.n_rows for file in files) // _BUCKET
    for ids in _ids(files):
        digests = _digests(ids)
        buckets = digests % np.uint64(n_buckets)
        order = np.argsort(buckets, kind="stable")
        bounds = np.searchsorted(buckets[order], np.arange(n_buckets + 1, dtype=np.uint64))
        for bucket in np.flatnonzero(np.diff(bounds)):
            with (folder / str(bucket)).open("ab") as file:
                file.write(digests[order[bounds[bucket] : bounds[bucket + 1]]].tobytes())
    found: set[int] = set()
    for path in folder.iterdir():
        digests = np.sort(np.fromfile(path, np.uint64))
        found |= set(digests[1:][digests[1:] == digests[:-1]].tolist())
        if len(found) > 1000:
            break
    return found


def _name(files: Sequence[InputFile], suspects: set[int]) -> list[tuple[int | str, int]]:
    """Those of the ids with these digests that are there more than once, and how often."""
    counts: Counter[int | str] = Counter()
    wanted = np.array(sorted(suspects), np.uint64)
    for ids in _ids(files):
        counts.update(ids.filter(pa.array(np.isin(_digests(ids), wanted))).to_pylist())
    return [(value, count) for value, count in counts.items() if count > 1]
