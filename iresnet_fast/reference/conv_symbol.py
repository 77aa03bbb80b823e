"""The symbol F(ω) = Σ_t K_t exp(−iω·t) of a circular convolution, and its adjoint (Sedghi, Gupta, Long 2018)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def conv_symbol(
    weight: Tensor, grid: Sequence[int], stride: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    """Evaluate F(ω) = Σ_t K_t exp(−iω·t) at every frequency of the grid.

    The taps are wrapped onto the grid first: an FFT padded to the grid would crop a kernel that is larger than it.
    With a stride s, the ∏s frequencies that alias onto one of the coarse grid n/s stand side by side, divided by
    √∏s.

    Args:
        weight: (c_out, c_in/groups, *kernel), real.
        grid: spatial size n of the input, one entry per axis.
        stride: step s between outputs, dividing n.
        dilation: step between taps.
        groups: blocks that the channels fall into.

    Returns:
        Complex tensor (*coarse grid, groups, c_out/groups, ∏s·c_in/groups).
    """
    axes = len(grid)
    positions = [
        torch.arange(k, device=weight.device) * d % n for k, d, n in zip(weight.shape[2:], dilation, grid, strict=True)
    ]
    wrapped = weight
    for axis, (index, n) in enumerate(zip(positions, grid, strict=True), start=2):
        shape = [*wrapped.shape[:axis], n, *wrapped.shape[axis + 1 :]]
        wrapped = wrapped.new_zeros(shape).index_add(axis, index, wrapped)
    symbol = torch.fft.fftn(wrapped, dim=tuple(range(2, 2 + axes)))
    symbol = symbol.permute(*range(2, 2 + axes), 0, 1)
    coarse = [n // s for n, s in zip(grid, stride, strict=True)]
    aliases = [
        symbol[tuple(slice(a * m, (a + 1) * m) for a, m in zip(alias, coarse, strict=True))]
        for alias in itertools.product(*map(range, stride))
    ]
    c_out, c_in = weight.shape[:2]
    grouped = [part.reshape(*coarse, groups, c_out // groups, c_in) for part in aliases]
    return torch.cat(grouped, dim=-1) / math.sqrt(math.prod(stride))


def conv_symbol_at(
    weight: Tensor,
    frequency: Sequence[int],
    grid: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """F at one frequency of the coarse grid: :func:`conv_symbol` without the others.

    Args:
        weight: as for :func:`conv_symbol`.
        frequency: index on the coarse grid, one entry per axis.
        grid: as for :func:`conv_symbol`.
        stride: as for :func:`conv_symbol`.
        dilation: as for :func:`conv_symbol`.
        groups: as for :func:`conv_symbol`.

    Returns:
        Complex tensor (groups, c_out/groups, ∏s·c_in/groups).
    """
    c_out, c_in, *kernel = weight.shape
    aliases = []
    for alias in itertools.product(*map(range, stride)):
        turns = torch.zeros(kernel, dtype=torch.float64, device=weight.device)
        for axis, (j, a, n, s, d) in enumerate(zip(frequency, alias, grid, stride, dilation, strict=True)):
            taps = torch.arange(kernel[axis], device=weight.device) * d * (j + a * (n // s)) % n
            turns = turns + (taps / n).view([-1 if other == axis else 1 for other in range(len(kernel))])
        phases = torch.polar(torch.ones_like(turns), -2 * math.pi * turns)
        aliases.append((weight * phases).flatten(2).sum(-1).view(groups, c_out // groups, c_in))
    return torch.cat(aliases, dim=-1) / math.sqrt(math.prod(stride))


def conv_symbol_adjoint(
    symbol: Tensor,
    kernel_size: Sequence[int],
    grid: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Adjoint of :func:`conv_symbol` for the inner product Re⟨·,·⟩: a real tensor of the weight's shape.

    Args:
        symbol: of the shape that :func:`conv_symbol` returns.
        kernel_size: spatial shape of the weight.
        grid: as for :func:`conv_symbol`.
        stride: as for :func:`conv_symbol`.
        dilation: as for :func:`conv_symbol`.
    """
    axes = tuple(range(len(grid)))
    aliases = list(symbol.chunk(math.prod(stride), dim=-1))
    for axis in reversed(axes):
        # Innermost aliases first: the last axis counts fastest.
        s = stride[axis]
        aliases = [torch.cat(aliases[i : i + s], dim=axis) for i in range(0, len(aliases), s)]
    full = aliases[0].flatten(-3, -2) / math.sqrt(math.prod(stride))
    weight = torch.fft.ifftn(full, dim=axes, norm="forward").real
    for axis, (k, d, n) in enumerate(zip(kernel_size, dilation, grid, strict=True)):
        weight = weight.index_select(axis, torch.arange(k, device=symbol.device) * d % n)
    return weight.permute(-2, -1, *axes)


def distinct_frequencies(grid: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The frequencies of a grid up to F(−ω) = conj F(ω), which a real kernel's symbol satisfies.

    Args:
        grid: points per axis.

    Returns:
        On the CPU, int64: (count,) row-major indices, ascending, of the frequencies that do not come after their
        mirror image; and (count,) the indices of those mirror images.
    """
    flat = torch.arange(math.prod(grid), device="cpu")
    axes = torch.unravel_index(flat, tuple(grid))
    mirror, place = torch.zeros_like(flat), 1
    for index, n in zip(reversed(axes), reversed(grid), strict=True):
        mirror += place * (-index % n)
        place *= n
    first = flat <= mirror
    return flat[first], mirror[first]
