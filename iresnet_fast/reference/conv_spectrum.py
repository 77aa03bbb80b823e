"""Singular values of a circular convolution by FFT and SVD (Sedghi, Gupta, Long 2018)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .conv_symbol import conv_symbol, conv_symbol_adjoint


def conv_singular_values(
    weight: Tensor,
    grid: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    driver: str,
) -> Tensor:
    """All singular values of the circular convolution, per frequency, descending; see :func:`conv_symbol`.

    Args:
        weight: as for :func:`conv_symbol`.
        grid: as for :func:`conv_symbol`.
        stride: as for :func:`conv_symbol`.
        dilation: as for :func:`conv_symbol`.
        groups: as for :func:`conv_symbol`.
        driver: ``"svd"``, or ``"gram"`` for the square roots of the eigenvalues of FᴴF.

    Returns:
        Real tensor (*coarse grid, groups·min(c_out/groups, ∏s·c_in/groups)).
    """
    symbol = conv_symbol(weight, grid, stride, dilation, groups)
    if driver == "svd":
        values = torch.linalg.svdvals(symbol)
    else:
        values = torch.linalg.eigvalsh(smaller_gram(symbol)).flip(-1).clamp_min(0).sqrt()
    return values.flatten(-2).sort(dim=-1, descending=True).values


def smaller_gram(symbol: Tensor) -> Tensor:
    """FFᴴ or FᴴF, whichever is smaller: (..., m, n) to (..., min(m, n), min(m, n))."""
    wide = symbol.shape[-2] <= symbol.shape[-1]
    return symbol @ symbol.mH if wide else symbol.mH @ symbol


def conv_singular_values_vjp(
    weight: Tensor,
    grad: Tensor,
    grid: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Gradient of ⟨grad, singular values⟩ by the weight: dσ = Re(uᴴ dF v) for every singular pair (u, v).

    Valid where the singular values that grad weighs differently are distinct, as for any SVD.

    Args:
        weight: as for :func:`conv_symbol`.
        grad: of the shape that :func:`conv_singular_values` returns.
        grid: as for :func:`conv_symbol`.
        stride: as for :func:`conv_symbol`.
        dilation: as for :func:`conv_symbol`.
        groups: as for :func:`conv_symbol`.

    Returns:
        A tensor of weight's shape and dtype.
    """
    symbol = conv_symbol(weight, grid, stride, dilation, groups)
    u, values, vh = torch.linalg.svd(symbol, full_matrices=False)
    # Undo the descending sort over groups.
    order = values.detach().flatten(-2).sort(dim=-1, descending=True).indices
    per_pair = torch.zeros_like(grad).scatter(-1, order, grad).view_as(values)
    cotangent = u @ (per_pair.to(u.dtype).unsqueeze(-1) * vh)
    return conv_symbol_adjoint(cotangent, weight.shape[2:], grid, stride, dilation)
