"""Files of samples, read a range of rows at a time: Parquet, NumPy arrays and safetensors."""

from __future__ import annotations

import glob
import hashlib
import math
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .columns import array_column, sample_type, to_column
from .operation import ID

Range = tuple[int, int]
# Rows, and bytes, that are read together.
_READ_TOGETHER, _BUFFER = 1024, 1 << 20
# Blocks of a file, and bytes of each, by which it is recognised.
_SAMPLES, _SAMPLE = 16, 4096


class InputError(ValueError):
    """A file of samples cannot be read."""


@dataclass(frozen=True)
class InputFile:
    """A file of samples.

    Attributes:
        path: of the file, absolute.
        n_rows: samples in it.
        n_bytes: its size.
        has_ids: whether it has a column or array ``id``; where it has none, samples are numbered.
        group_rows: rows of its largest group that can only be read from its start; 1 where any row can.
        fingerprint: SHA-256 of a sample of its bytes.
    """

    path: str
    n_rows: int
    n_bytes: int
    has_ids: bool
    group_rows: int
    fingerprint: str


def find(patterns: Sequence[str]) -> list[str]:
    """The absolute paths of the files that patterns such as ``latents/*.parquet`` name, each once, in order.

    Raises:
        InputError: a pattern names none, or a file of a kind that is not read.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        paths = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
        if not paths:
            raise InputError(f"there is no file {pattern}")
        found |= dict.fromkeys(str(Path(path).absolute()) for path in paths)
    for path in found:
        if Path(path).suffix not in _KINDS:
            raise InputError(f"{path} is none of the kinds that are read: {', '.join(_KINDS)}")
    return list(found)


def describe(path: str, column: str, shape: tuple[int, ...] | None = None) -> InputFile:
    """What a file has, without reading its samples.

    Args:
        path: of the file.
        column: name of its samples.
        shape: of a sample; None for any.

    Raises:
        InputError: it cannot be read, or has no samples of that name, shape or type; the message names what it has.
    """
    with _readable(path):
        found = _KINDS[Path(path).suffix][0](path, column)
        if column not in found.types:
            names = ", ".join(found.types) or "nothing"
            raise InputError(f"{path} has {names}, and none is {column!r}. Remedy: --column NAME")
        if shape is not None:
            sample_type(found.types[column], column, shape)
        size, has_ids = Path(path).stat().st_size, ID in found.types
        return InputFile(path, found.n_rows, size, has_ids, found.group_rows, _sample(path))


def _sample(path: str) -> str:
    """Blocks that are spread over the file: another file of the same size is seen to be one."""
    size, digest = Path(path).stat().st_size, hashlib.sha256()
    with Path(path).open("rb") as file:
        for index in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE) * index // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def numbered(table: pa.Table, first: int) -> pa.Table:
    """The table with ids: its own, or numbers from the first."""
    if ID in table.column_names:
        return table
    return table.append_column(ID, pa.array(range(first, first + table.num_rows), pa.int64()))


def read(file: InputFile, column: str, ranges: Sequence[Range]) -> Iterator[pa.Table]:
    """Tables with the rows of each range, in turn: the column, and ``id`` where the file has it.

    Args:
        file: as it was described.
        column: of samples; or ``"id"`` alone.
        ranges: (start, stop), ascending and apart.

    Raises:
        InputError: the file cannot be read, or has fewer rows than when it was described.
    """
    columns = list(dict.fromkeys([*([ID] if file.has_ids else []), column]))
    with _readable(file.path):
        for wanted, table in zip(ranges, _KINDS[Path(file.path).suffix][1](file, columns, ranges), strict=True):
            if table.num_rows != wanted[1] - wanted[0]:
                raise ValueError(f"rows {wanted[0]} to {wanted[1]} are not all there; it had {file.n_rows}")
            yield table


@contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, TypeError, EOFError, KeyError, zipfile.BadZipFile, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # of an optional package
            raise
        raise InputError(f"{path} cannot be read: {error}") from error


@dataclass(frozen=True)
class _Contents:
    """Columns and their types; how many rows, and how many in the largest group."""

    types: dict[str, pa.DataType]
    n_rows: int
    group_rows: int


def _parquet_contents(path: str, column: str) -> _Contents:
    with pq.ParquetFile(path) as file:
        types = {field.name: field.type for field in file.schema_arrow}
        return _Contents(types, file.metadata.num_rows, max(_group_sizes(file), default=1))


def _group_sizes(file: pq.ParquetFile) -> list[int]:
    return [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]


def _read_parquet(file: InputFile, columns: list[str], ranges: Sequence[Range]) -> Iterator[pa.Table]:
    if not ranges:
        return
    with pq.ParquetFile(file.path, pre_buffer=False, buffer_size=_BUFFER) as source:
        starts = list(accumulate(_group_sizes(source), initial=0))
        chosen = [
            index for index, (start, end) in enumerate(pairwise(starts)) if end > ranges[0][0] and start < ranges[-1][1]
        ]
        schema = pa.schema([source.schema_arrow.field(name) for name in columns])
        batches = source.iter_batches(_READ_TOGETHER, row_groups=chosen, columns=columns, use_threads=False)
        cursor = _Cursor(batches, schema, starts[chosen[0]] if chosen else 0)
        for start, stop in ranges:
            yield cursor.take(start, stop)


class _Cursor:
    """Ranges of rows of a stream of batches."""

    def __init__(self, batches: Iterator[pa.RecordBatch], schema: pa.Schema, position: int) -> None:
        self._batches, self._schema, self._position = batches, schema, position
        self._rest: pa.RecordBatch | None = None

    def take(self, start: int, stop: int) -> pa.Table:
        parts = []
        while self._position < stop:
            batch = self._rest if self._rest is not None else next(self._batches, None)
            if batch is None:
                break
            skipped = min(max(start - self._position, 0), len(batch))
            taken = min(len(batch), stop - self._position) - skipped
            if taken > 0:
                parts.append(batch.slice(skipped, taken))
            used = skipped + max(taken, 0)
            self._position += used
            self._rest = batch.slice(used) if used < len(batch) else None
        return pa.Table.from_batches(parts, self._schema)


def _array_contents(arrays: dict[str, tuple[tuple[int, ...], pa.DataType]], group_rows: int | None = 1) -> _Contents:
    """Of arrays by name: their shapes, and the types of their numbers."""
    rows = {name: shape[0] if shape else 0 for name, (shape, _) in arrays.items()}
    for name, (shape, _) in arrays.items():
        if not shape:
            raise ValueError(f"{name} is one number, not an array of samples")
        if ID in rows and rows[name] != rows[ID]:
            raise ValueError(f"it has {rows[name]} of {name}, and {rows[ID]} ids")
    types = {
        name: pa.fixed_shape_tensor(kind, shape[1:]) if len(shape) > 1 else kind
        for name, (shape, kind) in arrays.items()
    }
    n_rows = max(rows.values(), default=0)
    return _Contents(types, n_rows, n_rows if group_rows is None else group_rows)


def _tables(
    columns: list[str], ranges: Sequence[Range], take: Callable[[str, int, int], np.ndarray]
) -> Iterator[pa.Table]:
    for start, stop in ranges:
        yield pa.table({name: array_column(take(name, start, stop)) for name in columns})


def _npy_contents(path: str, column: str) -> _Contents:
    with Path(path).open("rb") as file:
        shape, dtype = _header(file)
        if file.tell() + dtype.itemsize * math.prod(shape) > Path(path).stat().st_size:
            raise EOFError("it ends too early")
    return _array_contents({column: (shape, _arrow_type(dtype))})


def _read_npy(file: InputFile, columns: list[str], ranges: Sequence[Range]) -> Iterator[pa.Table]:
    array = np.load(file.path, mmap_mode="r", allow_pickle=False)
    return _tables(columns, ranges, lambda name, start, stop: np.asarray(array[start:stop]))


def _npz_contents(path: str, column: str) -> _Contents:
    with zipfile.ZipFile(path) as archive:
        arrays = {}
        for name in archive.namelist():
            with archive.open(name) as member:
                shape, dtype = _header(member)
                arrays[name.removesuffix(".npy")] = shape, _arrow_type(dtype)
    return _array_contents(arrays, None)


def _arrow_type(dtype: np.dtype) -> pa.DataType:
    return pa.from_numpy_dtype(dtype.newbyteorder("="))


def _read_npz(file: InputFile, columns: list[str], ranges: Sequence[Range]) -> Iterator[pa.Table]:
    """Read as streams: an archive need not fit into memory."""
    with zipfile.ZipFile(file.path) as archive:
        streams = {name: _Stream(archive.open(f"{name}.npy")) for name in columns}
        yield from _tables(columns, ranges, lambda name, start, stop: streams[name].take(start, stop))


def _header(member: Any) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(member)
    if fortran and len(shape) > 1:
        raise ValueError("an array in Fortran order. Remedy: numpy.ascontiguousarray before it is saved")
    if dtype.hasobject:
        raise ValueError("an array of Python objects, which are not loaded")
    return shape, dtype


class _Stream:
    """Ranges of rows of an array in an archive."""

    def __init__(self, member: Any) -> None:
        self._member, self._position = member, 0
        self._shape, self._dtype = _header(member)

    def take(self, start: int, stop: int) -> np.ndarray:
        row = self._dtype.itemsize * math.prod(self._shape[1:])
        while self._position < start:
            rows = min(start - self._position, _READ_TOGETHER)
            self._read(rows * row)
            self._position += rows
        data = self._read((stop - start) * row)
        self._position = stop
        return np.frombuffer(data, self._dtype).reshape(-1, *self._shape[1:])

    def _read(self, n: int) -> bytes:
        data: bytes = self._member.read(n)
        if len(data) != n:
            raise EOFError("it ends too early")
        return data


def _safetensors_contents(path: str, column: str) -> _Contents:
    from safetensors import safe_open  # noqa: PLC0415  (an optional package)

    arrays = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  (it is no dict)
            shape = tuple(file.get_slice(name).get_shape())
            arrays[name] = shape, to_column(file.get_slice(name)[:0].flatten()).type if shape else pa.null()
    return _array_contents(arrays)


def _read_safetensors(file: InputFile, columns: list[str], ranges: Sequence[Range]) -> Iterator[pa.Table]:
    from safetensors import safe_open  # noqa: PLC0415

    with safe_open(file.path, "pt") as source:
        slices = {name: source.get_slice(name) for name in columns}
        for start, stop in ranges:
            yield pa.table({name: to_column(slices[name][start:stop]) for name in columns})


_Read = Callable[[InputFile, list[str], Sequence[Range]], Iterator[pa.Table]]
_KINDS: dict[str, tuple[Callable[[str, str], _Contents], _Read]] = {
    ".parquet": (_parquet_contents, _read_parquet),
    ".npy": (_npy_contents, _read_npy),
    ".npz": (_npz_contents, _read_npz),
    ".safetensors": (_safetensors_contents, _read_safetensors),
}
