"""Power iteration of many layers without kernels of our own: layers of one shape are stacked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..reference.conv_operator import ConvGeometry, conv_adjoint, conv_apply


def stacked_power_iteration(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    coeff: Sequence[float],
    layers: Sequence[ConvGeometry | None],
    n: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Flat W̄, u and v, and σ, in the order of the layers; see the op for what they are."""
    flat, flat_u, flat_v = (
        torch.empty(sum(part.numel() for part in parts), dtype=weights[0].dtype, device=weights[0].device)
        for parts in (weights, u, v)
    )
    to_weight, to_u, to_v = (
        flat_part.split([part.numel() for part in parts])
        for flat_part, parts in ((flat, weights), (flat_u, u), (flat_v, v))
    )
    sigma = torch.empty(len(weights), dtype=weights[0].dtype, device=weights[0].device)
    for members in _alike(weights, layers):
        stack = _Stack([weights[i] for i in members], layers[members[0]])
        us, vs = (torch.stack([parts[i] for i in members]) for parts in (u, v))
        estimate = None
        for _ in range(n):
            us, _ = _unit(stack.apply(vs), otherwise=us)
            vs, estimate = _unit(stack.adjoint(us), otherwise=vs)
        # ⟨u, W v⟩ = ‖Wᵀ u‖ once v is its direction.
        if estimate is None:
            estimate = (us * stack.apply(vs)).flatten(1).sum(1)
        for j, i in enumerate(members):
            to_u[i].copy_(us[j].flatten())
            to_v[i].copy_(vs[j].flatten())
            sigma[i] = estimate[j]
    scale = (sigma / sigma.new_tensor(coeff)).clamp_min(1.0)
    scale = torch.where(scale < math.inf, scale, math.nan)  # zeros would not show that σ overflowed
    for i, weight in enumerate(weights):
        torch.div(weight.flatten(), scale[i], out=to_weight[i])
    return flat, flat_u, flat_v, sigma


def _alike(weights: Sequence[Tensor], layers: Sequence[ConvGeometry | None]) -> list[list[int]]:
    """Indices of the layers of each shape and geometry."""
    found: dict[tuple[torch.Size, ConvGeometry | None], list[int]] = {}
    for index, (weight, geometry) in enumerate(zip(weights, layers, strict=True)):
        found.setdefault((weight.shape, geometry), []).append(index)
    return list(found.values())


class _Stack:
    """The operators of L layers of one shape, as one grouped convolution or one batched product."""

    def __init__(self, weights: list[Tensor], geometry: ConvGeometry | None) -> None:
        self._count = len(weights)
        stacked = torch.stack(weights)
        if geometry is None:
            self._geometry, self._weight = None, stacked.flatten(2)
        else:
            self._geometry = replace(geometry, groups=self._count * geometry.groups)
            self._weight = stacked.flatten(0, 1)

    def apply(self, v: Tensor) -> Tensor:
        """W v: (L, in) to (L, out), or (L, c_in, *size) to (L, c_out, *size)."""
        if self._geometry is None:
            return torch.bmm(self._weight, v.unsqueeze(2)).squeeze(2)
        return self._apart(conv_apply(self._weight, v.flatten(0, 1).unsqueeze(0), self._geometry))

    def adjoint(self, u: Tensor) -> Tensor:
        """Wᵀ u."""
        if self._geometry is None:
            return torch.bmm(self._weight.mT, u.unsqueeze(2)).squeeze(2)
        return self._apart(conv_adjoint(self._weight, u.flatten(0, 1).unsqueeze(0), self._geometry))

    def _apart(self, x: Tensor) -> Tensor:
        return x.squeeze(0).unflatten(0, (self._count, -1))


def _unit(vectors: Tensor, otherwise: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors and the norms; ``otherwise`` where a vector is zero or not finite."""
    norms = torch.linalg.vector_norm(vectors.flatten(1), dim=1)
    wide = norms.view((-1,) + (1,) * (vectors.dim() - 1))
    return torch.where((wide > 0) & torch.isfinite(wide), vectors / wide, otherwise), norms
