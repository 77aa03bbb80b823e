"""The symbol of a circular convolution at its distinct frequencies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _extension
from ..reference import conv_symbol as reference
from ._backend import Op, register
from .arguments import check_circular


def conv_symbol(
    weight: Tensor,
    input_size: Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    r"""The matrices :math:`F(\omega) = \sum_t K_t e^{-i \omega \cdot t}` that a circular convolution decomposes into.

    At the distinct frequencies only: :math:`F(-\omega)` is the conjugate of :math:`F(\omega)`, so of each such pair
    the one that comes first in row-major order is kept (Sedghi, Gupta, Long 2018). Linear in the weight, and
    differentiable.

    Args:
        weight: (c_out, c_in/groups, \*kernel), 1 to 3 spatial axes; computed in float64 whatever its dtype.
        input_size: spatial size of the operator's input, in pixels.
        stride: step between outputs; divides the input size. The frequencies that alias stand side by side.
        dilation: step between taps.
        groups: blocks that the channels fall into.

    Returns:
        complex128 tensor (count, groups, c_out/groups, ∏stride·c_in/groups).

    Raises:
        TypeError: weight is not a floating-point tensor.
        ValueError: as for :func:`conv_singular_values`.

    Example:
        >>> conv_symbol(torch.ones(1, 1, 1, 2), (2, 2)).flatten().real
        tensor([2., 0., 2., 0.], dtype=torch.float64)
    """
    grid, stride, dilation = check_circular(weight, input_size, stride, dilation, groups)
    if OP.choose(weight.device) == "extension":
        symbol: Tensor = torch.ops.iresnet_fast.conv_symbol(weight.double(), grid, stride, dilation, groups)
        return symbol
    index, _ = reference.distinct_frequencies([n // s for n, s in zip(grid, stride, strict=True)])
    full = reference.conv_symbol(weight.double(), grid, stride, dilation, groups)
    return full.flatten(0, len(grid) - 1)[index.to(weight.device)]


def _self_test(device: torch.device) -> float:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, 3, 3, generator=generator, dtype=torch.float64, device="cpu")
    found = conv_symbol(weight.to(device), (6, 5)).cpu()
    index, _ = reference.distinct_frequencies((6, 5))
    exact = reference.conv_symbol(weight, (6, 5), (1, 1), (1, 1), 1).flatten(0, 1)[index]
    return float((found - exact).abs().max() / exact.abs().max())


OP = register(
    Op(
        "conv_symbol",
        {"cpu": ("extension", "reference"), "cuda": ("extension", "reference")},
        _self_test,
        self_test_tolerance=1e-13,
    )
)

if _extension.defines("conv_symbol"):

    @torch.library.register_fake("iresnet_fast::conv_symbol")
    def _fake(weight: Tensor, grid: list[int], stride: list[int], dilation: list[int], groups: int) -> Tensor:
        coarse = [n // s for n, s in zip(grid, stride, strict=True)]
        # A frequency is its own mirror image where each of its indices is 0 or half of an even axis.
        own = math.prod(2 - n % 2 for n in coarse)
        count = (math.prod(coarse) + own) // 2
        shape = (count, groups, weight.shape[0] // groups, math.prod(stride) * weight.shape[1])
        return weight.new_empty(shape, dtype=torch.complex128)

    def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, *ctx.geometry, _ = inputs
        ctx.kernel_size = tuple(weight.shape[2:])

    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grid, stride, dilation = ctx.geometry
        coarse = [n // s for n, s in zip(grid, stride, strict=True)]
        index, _ = reference.distinct_frequencies(coarse)
        everywhere = grad.new_zeros((math.prod(coarse), *grad.shape[1:])).index_copy(0, index.to(grad.device), grad)
        full = everywhere.unflatten(0, coarse)
        weight = reference.conv_symbol_adjoint(full, ctx.kernel_size, grid, stride, dilation)
        return weight, None, None, None, None

    torch.library.register_autograd("iresnet_fast::conv_symbol", _backward, setup_context=_setup_context)
