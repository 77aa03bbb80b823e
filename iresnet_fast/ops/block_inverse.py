"""Fused inverses of residual blocks: one call runs the whole fixed-point iteration."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _extension
from ..reference.branches import ACTIVATIONS, chain
from ..reference.fixed_point import iterate_to_tolerance
from ._backend import VARIABLE, Op, register
from ._fixed_point import FixedPoint, check_fixed_point
from .arguments import check_choice

_SCHEMA = (
    "(Tensor y, Tensor x0, Tensor[] weights, Tensor?[] biases, int[] activations, Tensor parameters, {options}"
    "float tol, float lipschitz, int max_iterations, int patience, bool mixing, bool low) -> (Tensor, Tensor, Tensor, "
    "Tensor, Tensor)"
)
_INT32_MAX = 2**31 - 1
# Alpha of ELU; beta and threshold of softplus; the slope softplus(0.5) of LipSwish.
_DEFAULTS = {"elu": (1.0, 0.0), "softplus": (1.0, 20.0), "lipswish": (0.9740769841801067, 0.0)}
# A CPU thread keeps up to 48 rows and seven times their width in its lanes: 22 MB.
_MAX_WIDTH = 1 << 14
BOTTLENECK_KERNELS = [(3, 3), (1, 1), (3, 3)]


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
    """Solve x + g(x) = y for x, where g is a multilayer perceptron, in one call.

    Each row stops by the rule of :func:`iresnet_fast.solvers.invert_residual`. Rows that do not converge are reported
    in ``converged``; nothing is raised. A C++ kernel serves CPUs (float32, float64) and a Triton kernel serves CUDA
    (float32); elsewhere the reference runs plain Picard iteration. Most users want
    :meth:`iresnet_fast.nn.InvertibleResidualBlock.inverse`, which calls this where it can.

    Args:
        y: (B, D) outputs of the block, floating point.
        weights: (out, in) of each linear layer, from D features back to D.
        biases: (out,) or None for each layer; None for no biases.
        activations: before, between and after the layers, one more than there are layers: ``"identity"``, ``"relu"``,
            ``"elu"``, ``"softplus"``, ``"tanh"``, ``"lipswish"`` or ``"maxmin"``.
        parameters: (number of activations, 2): alpha of ELU; beta and threshold of softplus; the slope softplus(beta)
            of LipSwish. Default: those of freshly constructed modules.
        tol: relative tolerance, at least 4·eps of y's dtype.
        lipschitz: proven Lipschitz constant L of g, 0 ≤ L < 1, or None.
        max_iterations: limit per row. Default: the a-priori bound that L gives, or 1000 without L.
        x0: (B, D) initial guess; default y.
        method: ``"anderson"`` or ``"picard"``.
        patience: evaluations without a smaller residual after which a row has stalled.
        low_precision: on CUDA, round the factors of all products to float16, which changes g by about 1e-3.

    Returns:
        A :class:`FixedPoint` per row, without gradients.

    Raises:
        TypeError: y is not a floating-point tensor.
        ValueError: layers that do not fit y or each other, an unknown activation or method, a tolerance below the
            floor of the dtype, or a Lipschitz constant outside [0, 1).

    Example:
        >>> y = torch.tensor([[3.0], [1.5]])
        >>> mlp_inverse(y, [torch.tensor([[0.5]])], None, ["identity", "identity"], lipschitz=0.5).x
        tensor([[2.],
                [1.]])
    """
    return _solve(
        MLP,
        mlp_inverse_obstacle,
        y,
        weights,
        biases,
        activations,
        parameters,
        options=(),
        tol=tol,
        lipschitz=lipschitz,
        max_iterations=max_iterations,
        x0=x0,
        method=method,
        patience=patience,
        low_precision=low_precision,
    )


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
    """Solve x + g(x) = y for x, where g is a 3×3, a 1×1 and a 3×3 convolution, in one call.

    As :func:`mlp_inverse`, image by image. A Triton kernel serves CUDA (float32), one program per image; there is no
    CPU kernel.

    Args:
        y: (B, C, H, W) outputs of the block, floating point.
        weights: (hidden, C, 3, 3), (hidden', hidden, 1, 1) and (C, hidden', 3, 3); stride and dilation 1, padding that
            keeps the size of the image.
        biases: (c_out,) or None for each convolution; None for no biases.
        activations: four names, as for :func:`mlp_inverse`.
        circular: pad circularly instead of with zeros.
        parameters: as for :func:`mlp_inverse`, and so are all arguments below.
        tol: relative tolerance.
        lipschitz: proven Lipschitz constant of g, or None.
        max_iterations: limit per image.
        x0: (B, C, H, W) initial guess.
        method: ``"anderson"`` or ``"picard"``.
        patience: evaluations until a stall.
        low_precision: float16 products on CUDA.

    Returns:
        A :class:`FixedPoint` per image, without gradients.

    Raises:
        TypeError: y is not a floating-point tensor.
        ValueError: as for :func:`mlp_inverse`.

    Example:
        >>> weights = [torch.full((1, 1, k, k), 0.05) for k in (3, 1, 3)]
        >>> bottleneck_inverse(torch.ones(1, 1, 4, 4), weights, None, ["identity"] * 4).converged
        tensor([True])
    """
    return _solve(
        BOTTLENECK,
        bottleneck_inverse_obstacle,
        y,
        weights,
        biases,
        activations,
        parameters,
        options=(circular,),
        tol=tol,
        lipschitz=lipschitz,
        max_iterations=max_iterations,
        x0=x0,
        method=method,
        patience=patience,
        low_precision=low_precision,
    )


def mlp_inverse_obstacle(y: Tensor, weights: Sequence[Tensor]) -> str | None:
    """Why no kernel inverts a block of these layers for this y; None if one does."""
    if reason := kernel_obstacle(MLP, y.device):
        return reason
    widths = [y.shape[1], *(weight.shape[0] for weight in weights)]
    if y.device.type == "cpu":
        if max(widths) > _MAX_WIDTH:
            return f"the C++ kernel takes layers of up to {_MAX_WIDTH} features, not {max(widths)}"
        compiled = y.dtype in (torch.float32, torch.float64)
        return None if compiled else f"the C++ kernel computes in float32 or float64, not {y.dtype}"
    if len(y) and not y.numel():
        return "the samples are empty"
    from ..kernels.mlp_inverse import obstacle  # noqa: PLC0415  (needs Triton)

    return obstacle(widths, y.dtype)


def bottleneck_inverse_obstacle(y: Tensor, weights: Sequence[Tensor]) -> str | None:
    """Why no kernel inverts a block of these convolutions for this y; None if one does."""
    if reason := kernel_obstacle(BOTTLENECK, y.device):
        return reason
    if len(y) and not y.numel():
        return "the images are empty"
    from ..kernels.bottleneck_inverse import obstacle  # noqa: PLC0415  (needs Triton)

    return obstacle([y.shape[1], *(weight.shape[0] for weight in weights)], tuple(y.shape[2:]), y.dtype)


def missing_kernel(op: Op, device: torch.device) -> str | None:
    """Whether an op has nothing but its reference for this kind of device, as a reason; None if it has a kernel."""
    best = op.backends.get(device.type, ("reference",))[0]
    return f"{op.name} has no kernel for {device.type} tensors" if best == "reference" else None


def kernel_obstacle(op: Op, device: torch.device) -> str | None:
    """Why no kernel serves an op on this device, only its reference; None if one does."""
    if reason := missing_kernel(op, device):
        return reason
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted != "auto" and (reason := op.obstacle(wanted, device.type)):
        return f"{VARIABLE}={wanted}, and {reason}"
    if op.choose(device) != "reference":
        return None
    return op.obstacle(op.backends[device.type][0], device.type) or f"{VARIABLE}=reference"


def _solve(
    op: Op,
    obstacle: Callable[[Tensor, Sequence[Tensor]], str | None],
    y: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    activations: Sequence[str],
    parameters: Tensor | None,
    *,
    options: tuple[bool, ...],
    tol: float,
    lipschitz: float | None,
    max_iterations: int | None,
    x0: Tensor | None,
    method: str,
    patience: int,
    low_precision: bool,
) -> FixedPoint:
    """Check, choose the kernel or the reference, and call the registered op in its own terms."""
    check_fixed_point(y, tol, max_iterations, lipschitz, x0, method, patience)
    offsets, numbers = _check_branch(op, y, weights, biases, activations, parameters)
    name = op.name
    if obstacle(y, weights) is not None or (low_precision and y.device.type == "cpu"):
        op.choose(y.device)  # raises if the backend that was asked for cannot serve
        if low_precision:
            raise ValueError("low_precision=True needs the CUDA kernel, which does not serve this call")
        name += "_reference"
    unproven, unlimited = -1.0, 0
    found = getattr(torch.ops.iresnet_fast, name)(
        y.detach(),
        (y if x0 is None else x0).detach(),
        [weight.detach() for weight in weights],
        [None if bias is None else bias.detach() for bias in offsets],
        [ACTIVATIONS.index(activation) for activation in activations],
        numbers.detach(),
        *options,
        float(tol),
        unproven if lipschitz is None else float(lipschitz),
        unlimited if max_iterations is None else min(max_iterations, _INT32_MAX),
        min(patience, _INT32_MAX),
        method == "anderson",
        low_precision,
    )
    return FixedPoint(*found)


def _check_branch(
    op: Op,
    y: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    activations: Sequence[str],
    parameters: Tensor | None,
) -> tuple[list[Tensor | None], Tensor]:
    """Check that layers and activations make a branch for y; return all biases and parameters."""
    _check_shapes(op, y, weights)
    offsets: list[Tensor | None] = [None] * len(weights) if biases is None else list(biases)
    if not weights or len(offsets) != len(weights):
        raise ValueError(f"a branch has layers, and a bias or None for each, got {len(weights)} and {len(offsets)}")
    if len(activations) != len(weights) + 1:
        raise ValueError(
            f"{len(weights)} layers need {len(weights) + 1} activations, before, between and after them ('identity' "
            f"for none), got {len(activations)}"
        )
    widths = [y.shape[1], *(weight.shape[0] for weight in weights)]
    for i, (name, width) in enumerate(zip(activations, widths, strict=True)):
        check_choice("activations", name, ACTIVATIONS)
        if name == "maxmin" and width % 2:
            raise ValueError(f"MaxMin pairs channels and needs an even number of them, got {width} in activation {i}")
    for i, (weight, bias) in enumerate(zip(weights, offsets, strict=True)):
        if weight.shape[1] != widths[i] or weight.dtype != y.dtype or weight.device != y.device:
            raise ValueError(
                f"weight {i} must take {widths[i]} channels, in {y.dtype} on {y.device}; got {tuple(weight.shape)}, "
                f"{weight.dtype} on {weight.device}"
            )
        width = widths[i + 1]
        if bias is not None and (tuple(bias.shape), bias.dtype, bias.device) != ((width,), y.dtype, y.device):
            raise ValueError(
                f"bias {i} must be ({width},), {y.dtype} on {y.device}; got {tuple(bias.shape)}, {bias.dtype} on "
                f"{bias.device}"
            )
    if widths[-1] != y.shape[1]:
        raise ValueError(f"a residual branch keeps its channels, but maps {y.shape[1]} to {widths[-1]}")
    if parameters is None:
        parameters = torch.tensor([_DEFAULTS.get(name, (0.0, 0.0)) for name in activations]).to(y)
    if parameters.shape != (len(activations), 2):
        raise ValueError(f"parameters must be ({len(activations)}, 2), two of each activation, got {parameters.shape}")
    return offsets, parameters.to(y)


def _check_shapes(op: Op, y: Tensor, weights: Sequence[Tensor]) -> None:
    """Check the numbers of axes, and the sizes of kernels."""
    expected = "(B, D)" if op is MLP else "(B, C, H, W)"
    if y.dim() != (2 if op is MLP else 4):
        raise ValueError(f"y must have shape {expected}, got {tuple(y.shape)}")
    if op is BOTTLENECK and [tuple(weight.shape[2:]) for weight in weights] != BOTTLENECK_KERNELS:
        shapes = [tuple(weight.shape) for weight in weights]
        raise ValueError(f"weights must be those of a 3×3, a 1×1 and a 3×3 convolution, got shapes {shapes}")
    for i, weight in enumerate(weights if op is MLP else ()):
        if weight.dim() != 2:
            raise ValueError(f"weight {i} must have shape (out, in), got {tuple(weight.shape)}")


def _eager(
    y: Tensor,
    x0: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[int],
    parameters: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *options, tol, lipschitz, max_iterations, patience, _, _ = rest
    names = [ACTIVATIONS[code] for code in activations]
    return iterate_to_tolerance(
        lambda x: chain(x, weights, biases, names, parameters, *options),
        y,
        x0,
        tol=tol,
        lipschitz=lipschitz if lipschitz >= 0 else None,
        max_iterations=max_iterations or None,
        patience=patience,
    )


def _fake(y: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    rows = y.shape[0]
    counts = [y.new_empty(rows, dtype=torch.int64) for _ in range(2)]
    residual = y.new_empty(rows, dtype=torch.promote_types(y.dtype, torch.float32))
    return y.new_empty(y.shape), residual, *counts, y.new_empty(rows, dtype=torch.bool)


def _launch_mlp(y: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    from ..kernels.mlp_inverse import launch_mlp_inverse  # noqa: PLC0415  (needs Triton)

    with torch.cuda.device(y.device):
        return launch_mlp_inverse(y, *arguments)


def _launch_bottleneck(y: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    from ..kernels.bottleneck_inverse import launch_bottleneck_inverse  # noqa: PLC0415  (needs Triton)

    with torch.cuda.device(y.device):
        return launch_bottleneck_inverse(y, *arguments)


for _name, _kernel, _options in (
    ("mlp_inverse", _launch_mlp, ""),
    ("bottleneck_inverse", _launch_bottleneck, "bool circular, "),
):
    _qualified, _schema = f"iresnet_fast::{_name}", _SCHEMA.format(options=_options)
    if not _extension.defines(_name):
        torch.library.define(_qualified, _schema)
        torch.library.impl(_qualified, "cpu")(_eager)
    torch.library.impl(_qualified, "cuda")(_kernel)
    torch.library.define(f"{_qualified}_reference", _schema)
    torch.library.impl(f"{_qualified}_reference", ("cpu", "cuda"))(_eager)
    for _one in (_qualified, f"{_qualified}_reference"):
        torch.library.register_fake(_one)(_fake)


def _self_test(
    solve: Callable[..., FixedPoint], kernels: Sequence[int], shape: tuple[int, ...]
) -> Callable[..., float]:
    """The error of a solve with a known solution: three layers of these kernel sizes (0: linear) and norm 0.9."""

    def run(device: torch.device) -> float:
        generator = torch.Generator().manual_seed(0)
        options: dict[str, Any] = {"generator": generator, "device": "cpu", "dtype": torch.float64}
        sizes = zip((16, 16, shape[1]), (shape[1], 16, 16), kernels, strict=True)
        weights = [torch.randn(b, a, *(k,) * (2 * (k > 0)), **options) for b, a, k in sizes]
        # The sum of the taps' norms bounds that of a convolution.
        weights = [0.9 * w / torch.linalg.matrix_norm(w, 2, dim=(0, 1)).sum() for w in weights]
        x, activations = torch.randn(shape, **options), ("elu", "elu", "lipswish", "identity")
        parameters = torch.tensor([[1.0, 0], [1, 0], [0.97, 0], [0, 0]], dtype=torch.float64, device="cpu")
        y = x + chain(x, weights, [None] * 3, activations, parameters)
        single = [tensor.to(device, torch.float32) for tensor in (y, parameters, *weights)]
        found = solve(single[0], single[2:], None, activations, parameters=single[1], lipschitz=0.73)
        return float((found.x.cpu().double() - x).abs().max() / x.abs().max())

    return run


MLP = register(
    Op(
        "mlp_inverse",
        {"cpu": ("extension", "reference"), "cuda": ("triton", "reference")},
        _self_test(mlp_inverse, (0, 0, 0), (7, 5)),
        1e-5,
    )
)
BOTTLENECK = register(
    Op(
        "bottleneck_inverse",
        {"cpu": ("reference",), "cuda": ("triton", "reference")},
        _self_test(bottleneck_inverse, (3, 1, 3), (3, 4, 8, 8)),
        1e-5,
    )
)
