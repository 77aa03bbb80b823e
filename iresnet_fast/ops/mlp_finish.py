"""The float64 finish of a perceptron's residual block in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _extension
from ..reference.branches import ACTIVATIONS


class ProvenRows(NamedTuple):
    """Where the finish has left each row.

    Attributes:
        x: (B, D) float64.
        residual: (B,) ‖y − g(x) − x‖.
        rounding: (B,) bound of the residual's rounding.
        error_bound: (B,) proven bound of the distance to the exact x.
        evaluations: (B,) int64, evaluations of g.
    """

    x: Tensor
    residual: Tensor
    rounding: Tensor
    error_bound: Tensor
    evaluations: Tensor


def finishes(device: torch.device) -> bool:
    """Return true if the compiled library has this op for a device."""
    return _extension.serves("mlp_finish", device.type)


def mlp_finish(
    y: Tensor,
    x0: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[str],
    parameters: Tensor,
    *,
    norms: Sequence[float],
    sums: Sequence[float],
    lipschitz: float,
    goal: Tensor,
    steps: Tensor | None = None,
    patience: int,
) -> ProvenRows:
    """Solve x + g(x) = y in float64 until the proven error bound of each row is at most its goal.

    Every evaluation is bounded by a running error analysis, as :class:`iresnet_fast.solvers.WatchedFunction` does
    operation by operation. Where :func:`finishes` is false there is no such op, and that is used instead.

    Args:
        y: (B, D) float64 outputs of the block.
        x0: (B, D) float64, near the solution.
        weights: (out, in) float64 of each linear layer.
        biases: (out,) float64, or None.
        activations: before, between and after the layers, as for :func:`mlp_inverse`.
        parameters: (number of activations, 2) float64.
        norms: proven norms of the weights.
        sums: norms of the weights' absolute values.
        lipschitz: proven constant of g, 0 ≤ L < 1.
        goal: (B,) float64; infinite to evaluate g once.
        steps: (B,) int64, limit of steps. Default: the a-priori bound that L gives.
        patience: evaluations without a smaller residual after which a row has stalled.

    Raises:
        RuntimeError: arguments that do not fit each other; there is no such op here.
    """
    codes = [ACTIVATIONS.index(name) for name in activations]
    return ProvenRows(
        *torch.ops.iresnet_fast.mlp_finish(
            y, x0, weights, biases, codes, parameters, list(norms), list(sums), lipschitz, goal, steps, patience
        )
    )


def _fake(y: Tensor, *_: object) -> tuple[Tensor, ...]:
    numbers = [y.new_empty(y.shape[0]) for _ in range(3)]
    return y.new_empty(y.shape), *numbers, y.new_empty(y.shape[0], dtype=torch.int64)


if _extension.defines("mlp_finish"):
    torch.library.register_fake("iresnet_fast::mlp_finish")(_fake)
