"""The inverse of a residual block whose branch is a multilayer perceptron."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .branches import chain
from .fixed_point import iterate_to_tolerance


def mlp_inverse(
    y: Tensor,
    x0: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[str],
    parameters: Tensor,
    *,
    tol: float,
    lipschitz: float | None,
    max_iterations: int | None,
    patience: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Solve x + g(x) = y for x by Picard's iteration (Behrmann et al. 2019, Algorithm 1).

    Args:
        y: (B, D) the block's outputs.
        x0: (B, D) first iterates.
        weights: of linear layers, as for :func:`iresnet_fast.reference.branches.chain`.
        biases: of the layers.
        activations: before, between and after them.
        parameters: of the activations.
        tol: as for :func:`iresnet_fast.reference.fixed_point.iterate_to_tolerance`, and so are the others.
        lipschitz: a proven constant of g, or None.
        max_iterations: limit.
        patience: until a stall.

    Returns:
        x (B, D), and per row residual, iterations, evaluations and whether it converged.
    """

    def g(x: Tensor) -> Tensor:
        return chain(x, weights, biases, activations, parameters)

    return iterate_to_tolerance(
        g, y, x0, tol=tol, lipschitz=lipschitz, max_iterations=max_iterations, patience=patience
    )
