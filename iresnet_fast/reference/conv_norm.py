"""Proof by Cholesky factorisation that a convolution's norm stays below a bound."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .conv_spectrum import smaller_gram
from .conv_symbol import conv_symbol


def conv_norm_below(
    weight: Tensor,
    grid: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bound: float,
    margin: float,
) -> Tensor:
    """Whether (bound² − margin)·I − G(ω) has a Cholesky factorisation at every frequency of a circular convolution.

    G is FᴴF or FFᴴ, whichever is smaller, of the symbol F of :func:`conv_symbol`.

    Args:
        weight: as for :func:`conv_symbol`.
        grid: as for :func:`conv_symbol`.
        stride: as for :func:`conv_symbol`.
        dilation: as for :func:`conv_symbol`.
        groups: as for :func:`conv_symbol`.
        bound: of the norm.
        margin: for rounding, below bound².

    Returns:
        Boolean tensor of no dimensions.
    """
    gram = smaller_gram(conv_symbol(weight, grid, stride, dilation, groups))
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, info = torch.linalg.cholesky_ex((bound**2 - margin) * identity - gram)
    # A solver need not report a NaN as a failure.
    return (info == 0).all() & factor.diagonal(dim1=-2, dim2=-1).real.isfinite().all()
