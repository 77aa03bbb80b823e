"""The inverse of a residual block with a multilayer perceptron, whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference.branches import chain
from ..reference.mlp_inverse import mlp_inverse as reference
from ._backend import Op, register
from ._fixed_point import FixedPoint, check_fixed_point
from ._whole_block import check_branch, define, kernel_obstacle, run


def mlp_inverse(
    y: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    activations: Sequence[str],
    *,
    parameters: Tensor | None = None,
    tol: float = 1e-6,
    lipschitz: float | None = None,
    max_iterations: int | None = None,
    x0: Tensor | None = None,
    method: str = "anderson",
    patience: int = 20,
    low_precision: bool = False,
) -> FixedPoint:
    """Solve x + g(x) = y for x, where g is a multilayer perceptron: the whole iteration is one call.

    The rule is that of :func:`iresnet_fast.solvers.invert_residual`, row by row, and nothing is raised where a row
    does not converge: ``converged`` says so. On a CPU (float32, float64) C++ solves the rows side by side in the lanes
    of vectors, and a row's result is the same bit for bit whatever else is in the batch. On CUDA (float32) one Triton
    launch does all. Elsewhere the reference takes Picard's steps, 1000 by default. Most users want
    :meth:`iresnet_fast.nn.InvertibleResidualBlock.inverse`, which calls this where it can.

    Args:
        y: (B, D) outputs of the block, of floating point.
        weights: of the linear layers, (out, in) each, from D features to D.
        biases: (out,) or None for each layer; None for no bias at all.
        activations: before, between and after the layers, so one more than those: ``"identity"``, ``"relu"``,
            ``"elu"``, ``"softplus"``, ``"tanh"``, ``"lipswish"`` or ``"maxmin"``.
        parameters: (number of activations, 2): alpha of ELU; beta and threshold of softplus; the slope softplus(beta)
            of LipSwish. Default: those of the modules as they are made.
        tol: relative tolerance, at least 4·eps of y's dtype.
        lipschitz: proven Lipschitz constant L of g, 0 ≤ L < 1; None where there is no proof.
        max_iterations: limit of steps per row. Default: the a-priori bound that L gives, 1000 without L.
        x0: (B, D) start; default y.
        method: ``"anderson"`` or ``"picard"``.
        patience: evaluations without a smaller residual after which a row has stalled.
        low_precision: on CUDA, round the factors of all products to float16: g is then another function, 1e-3 away.

    Returns:
        A :class:`FixedPoint`, per row, without gradients.

    Raises:
        TypeError: y is not a tensor of floating point.
        ValueError: layers that do not fit y or each other, an unknown activation or method, a tolerance below the
            floor of the dtype, a Lipschitz constant outside [0, 1).

    Example:
        >>> y = torch.tensor([[3.0], [1.5]])
        >>> mlp_inverse(y, [torch.tensor([[0.5]])], None, ["identity", "identity"], lipschitz=0.5).x
        tensor([[2.],
                [1.]])
    """
    check_fixed_point(y, tol, max_iterations, lipschitz, x0, method, patience)
    if y.dim() != 2:
        raise ValueError(f"y must have shape (B, D), got {tuple(y.shape)}")
    for i, weight in enumerate(weights):
        if weight.dim() != 2:
            raise ValueError(f"weight {i} must have shape (out, in), got {tuple(weight.shape)}")
    offsets, numbers = check_branch(y, weights, biases, activations, parameters)
    op: Callable[..., Any] = torch.ops.iresnet_fast.mlp_inverse
    if mlp_inverse_obstacle(y, weights) is not None or (low_precision and y.device.type == "cpu"):
        OP.choose(y.device)  # raises where what was asked for cannot be served
        if low_precision:
            raise ValueError("low_precision=True needs the CUDA kernel, which does not serve this call")
        op = torch.ops.iresnet_fast.mlp_inverse_reference
    return run(
        op,
        y,
        x0,
        weights,
        offsets,
        activations,
        numbers,
        tol=tol,
        lipschitz=lipschitz,
        max_iterations=max_iterations,
        patience=patience,
        method=method,
        low_precision=low_precision,
    )


def mlp_inverse_obstacle(y: Tensor, weights: Sequence[Tensor]) -> str | None:
    """Why no kernel inverts a block of these layers for this y; None where one does."""
    if reason := kernel_obstacle(OP, y.device):
        return reason
    widths = [y.shape[1], *(weight.shape[0] for weight in weights)]
    if y.device.type == "cpu":
        if max(widths) > _MAX_WIDTH:
            return f"the C++ kernel takes layers of up to {_MAX_WIDTH} features, not {max(widths)}"
        return None if y.dtype in _COMPILED_DTYPES else f"the C++ kernel computes in float32 or float64, not {y.dtype}"
    if len(y) and not y.numel():
        return "the samples are empty"
    from ..kernels.mlp_inverse import obstacle  # noqa: PLC0415  (needs Triton)

    return obstacle(widths, y.dtype)


# Each thread has up to 48 rows in its lanes, and seven times the width of them: 22 MB.
_MAX_WIDTH = 1 << 14
_COMPILED_DTYPES = (torch.float32, torch.float64)


def _launch(y: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    from ..kernels.mlp_inverse import launch_mlp_inverse  # noqa: PLC0415  (needs Triton)

    with torch.cuda.device(y.device):
        return launch_mlp_inverse(y, *arguments)


define("mlp_inverse", reference, _launch)


def _self_test(device: torch.device) -> float:
    generator = torch.Generator().manual_seed(0)
    shapes = ((16, 5), (16, 16), (5, 16))
    weights = [torch.randn(shape, generator=generator, device="cpu", dtype=torch.float64) for shape in shapes]
    weights = [0.9 * weight / torch.linalg.matrix_norm(weight, 2) for weight in weights]
    x = torch.randn(7, 5, generator=generator, device="cpu", dtype=torch.float64)
    activations = ("identity", "elu", "lipswish", "identity")
    parameters = torch.tensor([[0.0, 0], [1, 0], [0.97, 0], [0, 0]], dtype=torch.float64, device="cpu")
    y = x + chain(x, weights, [None] * 3, activations, parameters)
    found = mlp_inverse(
        y.to(device, torch.float32),
        [weight.to(device, torch.float32) for weight in weights],
        None,
        activations,
        parameters=parameters.to(device, torch.float32),
        lipschitz=0.73,
    )
    return float((found.x.cpu().double() - x).abs().max() / x.abs().max())


OP = register(
    Op(
        "mlp_inverse",
        {"cpu": ("extension", "reference"), "cuda": ("triton", "reference")},
        _self_test,
        self_test_tolerance=1e-5,
    )
)
