"""Samples as columns of Arrow tables, and as tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor


def to_tensor(column: pa.ChunkedArray, name: str, shape: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """A column's values, and which rows have one.

    Args:
        column: of n fixed-shape tensors, or of lists of numbers of floating point.
        name: of the column, for messages.
        shape: of a sample, or of what lists of so many numbers are. Default: as the column's type says.

    Returns:
        (n, *shape), zeros where there is no value, and (n,) bool: whether the row has a value of that size.

    Raises:
        ValueError: the column's type says another shape than ``shape``, or lists are of any length and it is not given.
        TypeError: no numbers of floating point.
    """
    wanted, values = sample_type(column.type, name, shape)
    found = [_of_chunk(chunk, math.prod(wanted), values) for chunk in column.chunks]
    dtype = values.to_pandas_dtype()
    array = np.concatenate([values for values, _ in found]) if found else np.zeros((0, math.prod(wanted)), dtype)
    present = np.concatenate([rows for _, rows in found]) if found else np.zeros(0, bool)
    return torch.from_numpy(array.reshape(-1, *wanted)), torch.from_numpy(present)


def sample_type(
    kind: pa.DataType, name: str, shape: Sequence[int] | None = None
) -> tuple[tuple[int, ...], pa.DataType]:
    """Shape and type of the numbers of a column's samples; arguments and errors are those of :func:`to_tensor`."""
    own: tuple[int, ...] | None = None
    if isinstance(kind, pa.FixedShapeTensorType):
        if kind.permutation is not None and list(kind.permutation) != sorted(kind.permutation):
            raise ValueError(f"column {name} stores its tensors with permuted axes, {list(kind.permutation)}")
        own, values = tuple(kind.shape), kind.value_type
    elif pa.types.is_fixed_size_list(kind):
        own, values = (kind.list_size,), kind.value_type
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        values = kind.value_type
    else:
        raise TypeError(
            f"column {name} is of type {kind}; fixed-shape tensors or lists of numbers are needed. Remedy: "
            "pa.FixedShapeTensorArray.from_numpy_ndarray(array)"
        )
    if not pa.types.is_floating(values):
        raise TypeError(
            f"column {name} has {values}, and a network takes numbers of floating point. Remedy: scale them as it was "
            "trained, as in images / 255 - 0.5"
        )
    wanted = own if shape is None else tuple(shape)
    if wanted is None:
        raise ValueError(f"column {name} has lists of any length. Remedy: fixed-shape tensors")
    if own is not None and own != wanted and own != (math.prod(wanted),):
        raise ValueError(f"column {name} has samples of shape {own}, {wanted} is needed")
    return wanted, values


def _of_chunk(chunk: pa.Array, size: int, kind: pa.DataType) -> tuple[np.ndarray, np.ndarray]:
    lists = chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk
    present = np.array(lists.is_valid())
    if not pa.types.is_fixed_size_list(lists.type):
        present &= np.array(lists.value_lengths().fill_null(-1)) == size
    array = np.zeros((len(lists), size), kind.to_pandas_dtype())
    kept = lists.filter(pa.array(present))
    array[present] = kept.flatten().to_numpy(zero_copy_only=False).reshape(-1, size)  # a null in a sample is NaN
    return array, present


def to_column(values: Tensor) -> pa.Array:
    """(n,) as plain numbers, (n, *shape) as fixed-shape tensors; bfloat16, which Arrow has not, as float32."""
    values = values.detach().cpu()
    return array_column((values.float() if values.dtype == torch.bfloat16 else values).numpy())


def array_column(array: np.ndarray) -> pa.Array:
    """(n,) as plain values, (n, *shape) as fixed-shape tensors."""
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    if array.ndim == 1:
        return pa.array(array)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), math.prod(array.shape[1:]))
    kind = pa.fixed_shape_tensor(pa.from_numpy_dtype(array.dtype), array.shape[1:])
    return pa.ExtensionArray.from_storage(kind, flat)
