"""Exact singular values of a circular convolution, at every frequency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _extension
from ..reference import conv_spectrum as reference
from ._backend import Op, register
from .arguments import check_choice, check_circular

_DRIVERS = ("gram", "svd")


def conv_singular_values(
    weight: Tensor,
    input_size: Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    driver: str = "gram",
) -> Tensor:
    r"""All singular values of a convolution with circular padding, per frequency (Sedghi, Gupta, Long 2018).

    The operator of a circular convolution is block-diagonal in the Fourier basis: its singular values are those of
    the matrices :math:`F(\omega) = \sum_t K_t e^{-i \omega \cdot t}`, :math:`\omega = 2\pi j/n`. Computed in float64
    whatever the weight's dtype; differentiable once by the weight where the values are distinct.

    Args:
        weight: (c_out, c_in/groups, \*kernel), 1 to 3 spatial axes, any floating dtype. Odd or even kernels, also
            larger than the input.
        input_size: spatial size of the operator's input, in pixels, one entry per axis.
        stride: step between outputs; divides the input size.
        dilation: step between taps.
        groups: blocks that the channels fall into.
        driver: ``"gram"`` (eigenvalues of :math:`F^H F`; error up to 3e-8 of the largest value on rank-deficient
            kernels) or ``"svd"`` (error 1e-12; slower).

    Returns:
        float64 tensor (\*input_size/stride, groups·min(c_out/groups, ∏stride·c_in/groups)): for each frequency its
        singular values, descending. For stride 1 the last axis is groups·min(c_out, c_in)/groups long.

    Raises:
        TypeError: weight is not a floating-point tensor.
        ValueError: a wrong rank, an empty or non-finite weight, a size that is not positive, a stride that does not
            divide the input size, groups that do not divide c_out, an unknown driver.

    Example:
        >>> weight = torch.tensor([[[[0.0, -1.0], [1.0, 0.0]]]])
        >>> conv_singular_values(weight, (4, 4)).amax()
        tensor(2., dtype=torch.float64)
    """
    grid, stride, dilation = check_circular(weight, input_size, stride, dilation, groups)
    check_choice("driver", driver, _DRIVERS)
    scale = unit_scale(weight)
    arguments = (weight.double() / scale, grid, stride, dilation, groups, driver)
    if OP.choose(weight.device) == "extension":
        values: Tensor = torch.ops.iresnet_fast.conv_singular_values(*arguments)
    else:
        values = reference.conv_singular_values(*arguments)
    return values * scale


def unit_scale(weight: Tensor) -> Tensor:
    """The power of two that brings the largest entry into [1/2, 1): squares then neither overflow nor underflow."""
    exponent = torch.frexp(weight.detach().double().abs().amax()).exponent.clamp(-1021, 1023)
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent)


def _self_test(device: torch.device) -> float:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, 3, 3, generator=generator, dtype=torch.float64, device="cpu")
    found = conv_singular_values(weight.to(device), (6, 5)).cpu()
    exact = reference.conv_singular_values(weight, (6, 5), (1, 1), (1, 1), 1, "svd")
    return float((found - exact).abs().max() / exact.max())


OP = register(
    Op(
        "conv_singular_values",
        {"cpu": ("extension", "reference"), "cuda": ("extension", "reference")},
        _self_test,
        self_test_tolerance=1e-7,
    )
)

if _extension.defines("conv_singular_values"):

    @torch.library.register_fake("iresnet_fast::conv_singular_values")
    def _fake(
        weight: Tensor, grid: list[int], stride: list[int], dilation: list[int], groups: int, driver: str
    ) -> Tensor:
        rank = min(weight.shape[0] // groups, weight.shape[1] * math.prod(stride))
        coarse = [n // s for n, s in zip(grid, stride, strict=True)]
        return weight.new_empty([*coarse, groups * rank])

    def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, *ctx.geometry, _ = inputs
        ctx.save_for_backward(weight)

    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return reference.conv_singular_values_vjp(weight, grad, *ctx.geometry), None, None, None, None, None

    torch.library.register_autograd("iresnet_fast::conv_singular_values", _backward, setup_context=_setup_context)
