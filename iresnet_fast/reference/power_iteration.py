"""Power iteration for the norm of a layer's own linear operator (Gouk et al. 2018; Miyato et al. 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

from .conv_operator import ConvGeometry, conv_adjoint, conv_apply


def layer_apply(weight: Tensor, v: Tensor, geometry: ConvGeometry | None) -> Tensor:
    """W v for one input vector; ``geometry=None`` means that the weight is a matrix once flattened to (out, in)."""
    if geometry is None:
        return weight.flatten(1) @ v
    return conv_apply(weight, v.unsqueeze(0), geometry).squeeze(0)


def layer_adjoint(weight: Tensor, u: Tensor, geometry: ConvGeometry | None) -> Tensor:
    """Wᵀ u for one output vector; the adjoint of :func:`layer_apply`."""
    if geometry is None:
        return weight.flatten(1).mT @ u
    return conv_adjoint(weight, u.unsqueeze(0), geometry).squeeze(0)


def _normalized(vector: Tensor, otherwise: Tensor) -> Tensor:
    """The unit vector, or ``otherwise`` where the vector is zero or not finite: a bad weight must not poison u, v."""
    norm = torch.linalg.vector_norm(vector)
    return torch.where((norm > 0) & torch.isfinite(norm), vector / norm, otherwise)


@torch.no_grad()
def power_iteration(
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    n_iterations: int,
    geometry: ConvGeometry | None = None,
    tol: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Iterate u ← W v/‖W v‖, v ← Wᵀ u/‖Wᵀ u‖.

    Both half steps are normalised, so that nothing overflows; σ = ⟨u, W v⟩ approaches ‖W‖ from below.

    Args:
        weight: (out, in) or a convolution's (c_out, c_in/groups, *kernel); float32 or float64.
        u: output vector: (out,), or (c_out, *output_size).
        v: input vector: (in,), or (c_in, *input_size).
        n_iterations: how many pairs of half steps; with ``tol``, at most this many.
        geometry: of a convolution; None for a matrix.
        tol: stop at the first iteration that changes σ by at most tol·σ, and drop it, so that vectors which have
            converged are returned as they are.

    Returns:
        (u, v); the arguments are not written to.
    """
    sigma = None if tol is None else (u * layer_apply(weight, v, geometry)).sum().abs()
    for _ in range(n_iterations):
        next_u = _normalized(layer_apply(weight, v, geometry), otherwise=u)
        back = layer_adjoint(weight, next_u, geometry)
        next_v = _normalized(back, otherwise=v)
        if sigma is not None and tol is not None:
            previous, sigma = sigma, torch.linalg.vector_norm(back)  # = ⟨u, W v⟩ of the new vectors
            if bool((sigma - previous).abs() <= tol * sigma):
                break
        u, v = next_u, next_v
    return u, v


def estimate(weight: Tensor, u: Tensor, v: Tensor, geometry: ConvGeometry | None = None) -> Tensor:
    """σ = ⟨u, W v⟩, differentiable by the weight; arguments as for :func:`power_iteration`."""
    return (u * layer_apply(weight, v, geometry)).sum()


def normalized(weight: Tensor, sigma: Tensor, coeff: float) -> Tensor:
    """W̄ = W/max(1, σ/c) (Gouk et al. 2018), differentiable by both."""
    return weight / torch.clamp_min(sigma / coeff, 1.0).to(weight.dtype)
