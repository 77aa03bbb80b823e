"""A proven upper bound of a convolution's norm at its own padding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference.conv_operator import ConvGeometry, conv_matrix
from ._arguments import check_choice, check_conv_weight, per_axis
from .conv_spectrum import conv_singular_values

PADDING_MODES = ("zeros", "circular")
# Frequencies per axis and unit of (k-1)/2 that sample the supremum over all frequencies: within 1% for k = 3.
_SAMPLES = 32
# An operator of at most so many rows and columns (or the reverse) is formed and measured as it is: at small sizes the
# embedding is loose (up to 1.15 of the norm at 4×4), and the dense matrix cheap.
_DENSE = (256, 4096)
_EPS = torch.finfo(torch.float64).eps


def conv_padding(
    padding: int | str | Sequence[int], kernel_size: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Pixels added (before, after) each axis, from torch's ways to say it: an int, one per axis, "same", "valid"."""
    axes = len(kernel_size)
    if padding == "valid":
        return ((0, 0),) * axes
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    if isinstance(padding, str):
        raise ValueError(f"padding must be an int, {axes} ints, 'same' or 'valid', got {padding!r}")
    return tuple((p, p) for p in per_axis("padding", padding, axes, minimum=0))


def rounding_term(weight: Tensor) -> float:
    """Error of a float64 singular value of this weight's symbol, generously rounded up.

    The symbol is a sum of ∏k terms, which may cancel, and its solver is backward stable: both errors are within a small
    multiple of eps times the number of terms, relative to the sum of the taps' norms.
    """
    values = weight.detach().double().reshape(*weight.shape[:2], -1)
    largest = values.abs().amax().clamp_min(torch.finfo(torch.float64).tiny)  # keeps the squares in range
    taps = (values / largest).square().sum(dim=(0, 1)).sqrt() * largest
    return 16 * _EPS * (weight[0].numel() + weight.shape[0]) * float(taps.sum())


def conv_norm_bound(
    weight: Tensor,
    input_size: Sequence[int] | None,
    *,
    padding: int | str | Sequence[int] = 0,
    padding_mode: str = "zeros",
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    r"""Proven upper bound of the norm of a convolution layer's linear operator.

    Zero padding: the operator is a compression of the circular convolution on any grid N ≥ max(n + padding, output
    size) per axis, so the largest singular value on that grid bounds it (1.00 to 1.08 of the norm; the grid of the
    input's own size is *not* a bound). ``input_size=None``: a bound for every size,
    :math:`\prod_{axes} \sec(\pi d/N)` times the maximum on a grid of N points, d = (k−1)/2. Circular padding: the
    transform at the input's own size, times the square root of how often an input row is repeated in the output. An
    operator of at most 256 × 4096 entries is formed instead and its own norm returned, which no embedding loosens.

    Args:
        weight: (c_out, c_in/groups, \*kernel), any floating dtype.
        input_size: spatial size of the input in pixels, one entry per axis; None for a bound that holds for any.
        padding: as for ``torch.nn.Conv2d``: an int, one per axis, ``"same"`` or ``"valid"``.
        padding_mode: ``"zeros"`` or ``"circular"``.
        stride: step between outputs.
        dilation: step between taps.
        groups: blocks that the channels fall into.

    Returns:
        float64 tensor of no dimensions, on weight's device. In exact arithmetic it is a bound; for the rounding of the
        computation it includes 16·eps·(c_in·∏k + c_out)·Σ‖K_t‖, or a factor 1 + 16·eps·(rows + columns) where formed.

    Raises:
        TypeError: weight is not a floating-point tensor.
        ValueError: a wrong rank, an empty or non-finite weight, an unknown padding, an input too small for the
            kernel.

    Example:
        >>> checkerboard = torch.tensor([[[[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0], [1.0, -1.0, 1.0]]]])
        >>> conv_norm_bound(checkerboard, (3, 3), padding=1) > 5.82
        tensor(True)
    """
    axes = check_conv_weight(weight, groups)
    kernel = tuple(weight.shape[2:])
    stride, dilation = per_axis("stride", stride, axes), per_axis("dilation", dilation, axes)
    check_choice("padding_mode", padding_mode, PADDING_MODES)
    sides = conv_padding(padding, kernel, dilation)
    if input_size is None:
        repeats = 1
        if padding_mode == "circular":
            # torch pads at most once around, so the input is at least as large as the padding.
            extra = [sum(p) - d * (k - 1) for p, d, k in zip(sides, dilation, kernel, strict=True)]
            repeats = math.prod(1 + -(-max(e, 0) // max(1, *p)) for e, p in zip(extra, sides, strict=True))
        return _bound_for_any_size(weight, groups) * math.sqrt(repeats)
    size = per_axis("input_size", input_size, axes)
    rows = list(zip(size, kernel, stride, dilation, sides, strict=True))
    if padding_mode == "circular" and any(max(p) > n for n, p in zip(size, sides, strict=True)):
        raise ValueError(f"padding={padding!r} goes around more than once: input_size={size}. Remedy: at most its size")
    outputs = [(n + sum(p) - d * (k - 1) - 1) // s + 1 for n, k, s, d, p in rows]
    if min(outputs) < 1:
        raise ValueError(f"input_size={size} is too small for a kernel of {kernel} with padding={padding!r}")
    geometry = ConvGeometry(size, stride, dilation, sides, padding_mode, groups)
    sizes = sorted((weight.shape[1] * groups * math.prod(size), weight.shape[0] * math.prod(outputs)))
    if sizes[0] <= _DENSE[0] and sizes[1] <= _DENSE[1]:
        return torch.linalg.matrix_norm(conv_matrix(weight.double(), geometry), 2) * (1 + 16 * _EPS * sum(sizes))
    multiplicity = 1
    if padding_mode == "zeros":
        grid = tuple(s * max(-(-(n + max(p)) // s), m) for (n, _, s, _, p), m in zip(rows, outputs, strict=True))
    else:
        grid = size
        # Outputs that lie a whole input apart are equal.
        spans = ((m - 1) * s + 1 for m, s in zip(outputs, stride, strict=True))
        multiplicity = math.prod(-(-span // n) for span, n in zip(spans, size, strict=True))
        if any(n % s for n, s in zip(size, stride, strict=True)):
            stride = (1,) * axes  # the outputs are some of those of stride 1
    values = conv_singular_values(weight, grid, stride=stride, dilation=dilation, groups=groups)
    return (values.amax() + rounding_term(weight)) * math.sqrt(multiplicity)


def _bound_for_any_size(weight: Tensor, groups: int) -> Tensor:
    """Supremum of ‖F(ω)‖ over all ω, from above; dilation and stride do not raise it."""
    reach = [(k - 1) / 2 for k in weight.shape[2:]]
    grid = [max(1, math.ceil(_SAMPLES * d)) for d in reach]
    factor = math.prod(1 / math.cos(math.pi * d / n) for d, n in zip(reach, grid, strict=True))
    return (conv_singular_values(weight, grid, groups=groups).amax() + rounding_term(weight)) * factor
