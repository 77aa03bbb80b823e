"""The inverse of a residual block with a bottleneck of convolutions, whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference.bottleneck_inverse import bottleneck_inverse as reference
from ..reference.branches import chain
from ._backend import Op, register
from ._fixed_point import FixedPoint, check_fixed_point
from ._whole_block import check_branch, define, kernel_obstacle, run


def bottleneck_inverse(
    y: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    activations: Sequence[str],
    *,
    circular: bool = False,
    parameters: Tensor | None = None,
    tol: float = 1e-6,
    lipschitz: float | None = None,
    max_iterations: int | None = None,
    x0: Tensor | None = None,
    method: str = "anderson",
    patience: int = 20,
    low_precision: bool = False,
) -> FixedPoint:
    """Solve x + g(x) = y for x, where g is a 3×3, a 1×1 and a 3×3 convolution: the whole iteration is one call.

    The rule is that of :func:`iresnet_fast.solvers.invert_residual`, image by image, and nothing is raised where one
    does not converge: ``converged`` says so. On CUDA (float32) one Triton launch does all, a program per image.
    Elsewhere the reference takes Picard's steps, 1000 by default. Most users want
    :meth:`iresnet_fast.nn.InvertibleResidualBlock.inverse`, which calls this where it can.

    Args:
        y: (B, C, H, W) outputs of the block, of floating point.
        weights: (hidden, C, 3, 3), (hidden', hidden, 1, 1) and (C, hidden', 3, 3); stride and dilation 1, padding that
            keeps the size of the image.
        biases: (c_out,) or None for each convolution; None for no bias at all.
        activations: before, between and after the convolutions, so four: names as for
            :func:`iresnet_fast.ops.mlp_inverse`.
        circular: whether the convolutions pad circularly rather than with zeros.
        parameters: (4, 2) numbers of the activations, as for :func:`iresnet_fast.ops.mlp_inverse`.
        tol: relative tolerance, at least 4·eps of y's dtype.
        lipschitz: proven Lipschitz constant L of g, 0 ≤ L < 1; None where there is no proof.
        max_iterations: limit of steps per image. Default: the a-priori bound that L gives, 1000 without L.
        x0: (B, C, H, W) start; default y.
        method: ``"anderson"`` or ``"picard"``.
        patience: evaluations without a smaller residual after which an image has stalled.
        low_precision: on CUDA, round the factors of all products to float16: g is then another function, 1e-3 away.

    Returns:
        A :class:`FixedPoint`, per image, without gradients.

    Raises:
        TypeError: y is not a tensor of floating point.
        ValueError: convolutions that do not fit y or each other, an unknown activation or method, a tolerance below
            the floor of the dtype, a Lipschitz constant outside [0, 1).

    Example:
        >>> weights = [torch.full((1, 1, k, k), 0.05) for k in (3, 1, 3)]
        >>> found = bottleneck_inverse(torch.ones(1, 1, 4, 4), weights, None, ["identity"] * 4)
        >>> found.converged
        tensor([True])
    """
    check_fixed_point(y, tol, max_iterations, lipschitz, x0, method, patience)
    if y.dim() != 4:
        raise ValueError(f"y must have shape (B, C, H, W), got {tuple(y.shape)}")
    if [tuple(weight.shape[2:]) for weight in weights] != [(3, 3), (1, 1), (3, 3)]:
        shapes = [tuple(weight.shape) for weight in weights]
        raise ValueError(f"weights must be those of a 3×3, a 1×1 and a 3×3 convolution, got shapes {shapes}")
    offsets, numbers = check_branch(y, weights, biases, activations, parameters)
    op: Callable[..., Any] = torch.ops.iresnet_fast.bottleneck_inverse
    if bottleneck_inverse_obstacle(y, weights) is not None:
        OP.choose(y.device)  # raises where what was asked for cannot be served
        if low_precision:
            raise ValueError("low_precision=True needs the CUDA kernel, which does not serve this call")
        op = torch.ops.iresnet_fast.bottleneck_inverse_reference
    return run(
        op,
        y,
        x0,
        weights,
        offsets,
        activations,
        numbers,
        circular,
        tol=tol,
        lipschitz=lipschitz,
        max_iterations=max_iterations,
        patience=patience,
        method=method,
        low_precision=low_precision,
    )


def bottleneck_inverse_obstacle(y: Tensor, weights: Sequence[Tensor]) -> str | None:
    """Why no kernel inverts a block of these convolutions for this y; None where one does."""
    if reason := kernel_obstacle(OP, y.device):
        return reason
    if len(y) and not y.numel():
        return "the images are empty"
    from ..kernels.bottleneck_inverse import obstacle  # noqa: PLC0415  (needs Triton)

    return obstacle([y.shape[1], *(weight.shape[0] for weight in weights)], tuple(y.shape[2:]), y.dtype)


def _launch(y: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    from ..kernels.bottleneck_inverse import launch_bottleneck_inverse  # noqa: PLC0415  (needs Triton)

    with torch.cuda.device(y.device):
        return launch_bottleneck_inverse(y, *arguments)


define("bottleneck_inverse", reference, _launch, "bool circular, ")


def _self_test(device: torch.device) -> float:
    generator = torch.Generator().manual_seed(0)
    shapes = ((16, 4, 3, 3), (16, 16, 1, 1), (4, 16, 3, 3))
    weights = [torch.randn(shape, generator=generator, device="cpu", dtype=torch.float64) for shape in shapes]
    # The sum of the taps' norms bounds that of the convolution.
    weights = [0.9 * weight / torch.linalg.matrix_norm(weight, 2, dim=(0, 1)).sum() for weight in weights]
    x = torch.randn(3, 4, 8, 8, generator=generator, device="cpu", dtype=torch.float64)
    activations = ("elu", "elu", "elu", "identity")
    parameters = torch.ones(4, 2, dtype=torch.float64, device="cpu")
    y = x + chain(x, weights, [None] * 3, activations, parameters)
    found = bottleneck_inverse(
        y.to(device, torch.float32),
        [weight.to(device, torch.float32) for weight in weights],
        None,
        activations,
        lipschitz=0.73,
    )
    return float((found.x.cpu().double() - x).abs().max() / x.abs().max())


OP = register(Op("bottleneck_inverse", {"cpu": ("reference",), "cuda": ("triton", "reference")}, _self_test, 1e-5))
