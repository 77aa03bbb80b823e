"""What is done with samples, and the pure functions that do it: an Arrow table in, an Arrow table out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from ..models import IResNetFlow
from ..nn import ChainInverseResult, frozen_state
from ..solvers import sample_norms
from .columns import to_column, to_tensor
from .isolate import Findings, evaluate_rows

ID = "id"
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Operation:
    """What is done with every sample.

    Attributes:
        name: ``"invert"``, ``"encode"`` or ``"round-trip"``.
        tol: of the inverse of every block, as in :meth:`InvertibleResidualBlock.solve_inverse`.
        log_det: whether ``encode`` gives log-determinants, too, and a flow log-densities.
    """

    name: str
    tol: float = TOLERANCE
    log_det: bool = False

    def __post_init__(self) -> None:
        if self.name not in _EVALUATE:
            raise ValueError(f"an operation is one of {', '.join(_EVALUATE)}; got {self.name!r}")
        if not self.tol > 0:
            raise ValueError(f"tol must be positive, got {self.tol!r}")
        if self.log_det and self.name != "encode":
            raise ValueError(f"log_det is of encode, not of {self.name}")

    @property
    def column(self) -> str:
        """What the column of samples is called: ``z`` for latents, ``x`` for data."""
        return "z" if self.name == "invert" else "x"


class Evaluator:
    """An operation by a network, on tables.

    Args:
        model: with ``features`` and ``solve_inverse``, in evaluation mode, on the device where it is to work.
        operation: what is done.

    Raises:
        ValueError: the model is in training mode; it has no density, and ``log_det`` is asked for.
    """

    def __init__(self, model: nn.Module, operation: Operation) -> None:
        if model.training:
            raise ValueError(f"{operation.name} of a network in training mode. Remedy: model.eval() first")
        self.operation = operation
        self._model = model
        weight = next(model.parameters(), torch.empty(0))
        self._device, self._dtype = weight.device, weight.dtype
        latents, data = getattr(model, "latent_shape", None), getattr(getattr(model, "config", None), "in_shape", None)
        self.shape: tuple[int, ...] | None = latents if operation.name == "invert" else data
        self._most: int | None = None
        self._like: dict[str, Tensor] | None = None if self.shape is None else self._of_none(self.shape)

    def __call__(
        self, table: pa.Table, *, column: str | None = None, batch_size: int | None = None, seed: int = 0
    ) -> pa.Table:
        """Do it with every row.

        Args:
            table: column ``id``, of any type, and the column of samples.
            column: name of the latter.
            batch_size: how many samples are evaluated together. Default: all.
            seed: of the estimates of log-determinants.

        Returns:
            ``id``, and the columns of the operation, in the order of the rows.

        Raises:
            ValueError: a column is missing, or has samples of another shape.
            TypeError: a column of another type.
        """
        name = column or self.operation.column
        for needed in (ID, name):
            if needed not in table.column_names:
                raise ValueError(f"the table has the columns {', '.join(table.column_names)}, and none is {needed!r}")
        x, present = to_tensor(table.column(name), name, self.shape)
        reasons = _unusable(x, present)
        like = self._like or self._of_none(tuple(x.shape[1:]))
        columns: dict[str, list[pa.Array]] = {found: [] for found in (*like, "reason")}
        with torch.random.fork_rng(range(torch.cuda.device_count())):  # manual_seed is of all devices
            torch.manual_seed(seed)
            size = batch_size or max(1, len(x))
            for start in range(0, max(1, len(x)), size):
                found, why = evaluate_rows(self._evaluate, x[start : start + size], reasons[start : start + size], like)
                for key, values in found.items():
                    columns[key].append(to_column(values))
                columns["reason"].append(pa.array(why, pa.string()))
        return pa.table({ID: table.column(ID), **{key: pa.chunked_array(parts) for key, parts in columns.items()}})

    def _evaluate(self, x: Tensor) -> Findings:
        """By batches of at most as many samples as memory had room for before."""
        while True:
            try:
                found = [self._evaluate_together(part) for part in x.split(self._most or max(1, len(x)))]
            except torch.OutOfMemoryError:
                if len(x) <= 1 or self._most == 1:
                    raise
                self._most = min(self._most or len(x), len(x)) // 2
            else:
                columns = {name: torch.cat([part[name] for part, _ in found]) for name in found[0][0]}
                return columns, [reason for _, reasons in found for reason in reasons]

    @torch.no_grad()
    def _evaluate_together(self, x: Tensor) -> Findings:
        columns, reasons = _EVALUATE[self.operation.name](self._model, x.to(self._device, self._dtype), self.operation)
        return {name: value.cpu() for name, value in columns.items()}, reasons

    def _of_none(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        return self._evaluate(torch.empty((0, *shape)))[0]


def invert_table(
    model: nn.Module,
    table: pa.Table,
    *,
    tol: float = TOLERANCE,
    column: str = "z",
    batch_size: int | None = None,
) -> pa.Table:
    """The inverse of every latent in a table.

    A latent that cannot be inverted is a row with ``converged`` false and a ``reason``; the others are what they would
    be without it, within the tolerance.

    Args:
        model: an invertible network in evaluation mode, on the device where it is to work. Call
            :func:`iresnet_fast.certify` first, so that inverses are certified.
        table: columns ``id``, of any type, and latents, as fixed-shape tensors, or as lists of so many numbers.
        tol: of the inverse of every block, as in :meth:`InvertibleResidualBlock.solve_inverse`.
        column: name of the column of latents.
        batch_size: how many are inverted together. Default: all.

    Returns:
        In the order of the rows, the columns ``id``; ``x``, fixed-shape tensors of the network's dtype, the last
        iterate where not converged; ``residual``, measured ‖F(x) − z‖/max(1, ‖z‖); ``error_bound``, proven, of the
        distance to the exact inverse of z, NaN without a proof; ``iterations``, int64, summed over the blocks;
        ``converged``, ``certified`` (end to end) and ``block_certified`` (each block's own solve), as in
        :class:`ChainInverseResult`; ``reason``, null where converged.

    Raises:
        ValueError: a column is missing or of another shape; the model is in training mode.
        TypeError: a column of another type.

    Example:
        >>> import pyarrow as pa
        >>> from iresnet_fast import scale
        >>> model = irf.nn.InvertibleSequential(irf.nn.InvertibleResidualBlock(irf.nn.LipschitzMLP(2, (8,)))).eval()
        >>> z = torch.tensor([[0.5, -1.0], [2.0, 0.0]])
        >>> table = pa.table({"id": [1, 2], "z": pa.FixedShapeTensorArray.from_numpy_ndarray(z.numpy())})
        >>> scale.invert_table(model, table).column("converged").to_pylist()
        [True, True]
    """
    return Evaluator(model, Operation("invert", tol))(table, column=column, batch_size=batch_size)


def encode(
    model: nn.Module,
    table: pa.Table,
    *,
    log_det: bool = False,
    column: str = "x",
    batch_size: int | None = None,
    seed: int = 0,
) -> pa.Table:
    """The latents of all data in a table.

    Args:
        model: as for :func:`invert_table`.
        table: columns ``id`` and data.
        log_det: whether log-determinants are given, too, and by a flow log-densities.
        column: name of the column of data.
        batch_size: how many are evaluated together. Default: all.
        seed: of the estimates of log-determinants.

    Returns:
        The columns ``id``; ``z``, fixed-shape tensors; with ``log_det`` also ``log_det``, and of a flow ``log_prob``,
        in nats; ``converged``, whether all of that is finite; ``reason``, null where it is.

    Raises:
        ValueError, TypeError: as :func:`invert_table`; a network without a density, with ``log_det``.
    """
    evaluator = Evaluator(model, Operation("encode", log_det=log_det))
    return evaluator(table, column=column, batch_size=batch_size, seed=seed)


def round_trip(
    model: nn.Module,
    table: pa.Table,
    *,
    tol: float = TOLERANCE,
    column: str = "x",
    batch_size: int | None = None,
) -> pa.Table:
    """Data to latents and back, and how far it comes back from where it was.

    Args:
        model: as for :func:`invert_table`.
        table: columns ``id`` and data.
        tol: of the inverse of every block.
        column: name of the column of data.
        batch_size: how many are evaluated together. Default: all.

    Returns:
        The columns ``id``; ``error``, measured ‖x̂ − x‖/max(1, ‖x‖); and, of the inverse, ``residual``, ``error_bound``,
        ``iterations``, ``converged``, ``certified``, ``block_certified`` and ``reason``, as :func:`invert_table` has
        them.

    Raises:
        ValueError, TypeError: as :func:`invert_table`.
    """
    return Evaluator(model, Operation("round-trip", tol))(table, column=column, batch_size=batch_size)


def _unusable(x: Tensor, present: Tensor) -> list[str | None]:
    finite = torch.isfinite(x.flatten(1)).all(1) if x.numel() else torch.ones(len(x), dtype=torch.bool)
    shape = tuple(x.shape[1:])
    return [
        None if is_finite and is_present else "NaN or infinite values" if is_present else f"no value of shape {shape}"
        for is_finite, is_present in zip(finite.tolist(), present.tolist(), strict=True)
    ]


def _invert(model: Any, z: Tensor, operation: Operation) -> Findings:
    result = model.solve_inverse(z, tol=operation.tol, on_failure="return")
    return {"x": result.x, **_of_inverse(result, z)}, _why(result, operation.tol)


def _encode(model: Any, x: Tensor, operation: Operation) -> Findings:
    columns = {}
    with frozen_state(model):
        if not operation.log_det:
            z = _latents(model, x)
        elif isinstance(model, IResNetFlow):
            output = model(x)
            z, columns = output.latents, {"log_det": output.log_det.value, "log_prob": output.log_prob}
        else:
            z, log_det = getattr(model, "trunk", model).estimate_log_det(x)
            columns = {"log_det": log_det.value}
    finite = torch.isfinite(z).flatten(1).all(1)
    for values in columns.values():
        finite = finite & torch.isfinite(values)
    why = [None if good else "its latents are not finite" for good in finite.tolist()]
    return {"z": z, **columns, "converged": finite}, why


def _round_trip(model: Any, x: Tensor, operation: Operation) -> Findings:
    with frozen_state(model):
        z = _latents(model, x)
    result = model.solve_inverse(z, tol=operation.tol, on_failure="return")
    error = sample_norms(result.x - x) / sample_norms(x).clamp_min(1.0)
    return {"error": error, **_of_inverse(result, z)}, _why(result, operation.tol)


def _latents(model: Any, x: Tensor) -> Tensor:
    latents: Tensor = getattr(model, "features", model)(x)
    return latents


def _of_inverse(result: ChainInverseResult, z: Tensor) -> dict[str, Tensor]:
    iterations = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    for block in result.blocks:
        iterations = iterations + block.iterations
    return {
        "residual": result.residual,
        "error_bound": result.error_bound,
        "iterations": iterations,
        "converged": result.converged,
        "certified": result.certified,
        "block_certified": result.block_certified,
    }


def _why(result: ChainInverseResult, tol: float) -> list[str | None]:
    """Of every sample, why it did not converge."""
    reasons: list[str | None] = [None] * len(result.converged)
    if bool(result.converged.all()):
        return reasons
    blocks = [(block.converged.tolist(), block.iterations.tolist()) for block in result.blocks]
    for row in (~result.converged).nonzero().flatten().tolist():
        # The last block is inverted first; those before it then start from a wrong value.
        failed = [index for index, (converged, _) in enumerate(blocks) if not converged[row]]
        if failed:
            taken = blocks[failed[-1]][1][row]
            reasons[row] = f"block {failed[-1] + 1} of {len(blocks)} did not reach tol={tol:.3g} in {taken} steps"
        else:
            reasons[row] = "outside the domain or the range of the network"
    return reasons


_EVALUATE: dict[str, Callable[[Any, Tensor, Operation], Findings]] = {
    "invert": _invert,
    "encode": _encode,
    "round-trip": _round_trip,
}
