"""Proven upper bounds of a convolution's norm at its own padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _extension
from ..reference import conv_norm as reference
from ..reference.conv_operator import ConvGeometry, conv_matrix
from ..reference.conv_symbol import conv_symbol_at
from ._backend import Op, register
from .arguments import check_choice, check_conv_weight, per_axis
from .conv_spectrum import conv_singular_values, unit_scale

PADDING_MODES = ("zeros", "circular", "reflect", "replicate")
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
    return _relative_rounding(weight) * _sum_of_tap_norms(weight)


def _relative_rounding(weight: Tensor) -> float:
    return 16 * _EPS * (weight[0].numel() + weight.shape[0])


def _sum_of_tap_norms(weight: Tensor) -> float:
    """Σ‖K_t‖, which no norm of the symbol exceeds."""
    values = weight.detach().double().reshape(*weight.shape[:2], -1)
    largest = values.abs().amax().clamp_min(torch.finfo(torch.float64).tiny)  # keeps the squares in range
    return float(((values / largest).square().sum(dim=(0, 1)).sqrt() * largest).sum())


def _rounded_up(largest: Tensor, weight: Tensor) -> Tensor:
    """A computed largest singular value, raised by what rounding may have taken from it.

    Values come from Gram matrices, whose entries are rounded relative to (Σ‖K_t‖)², and from symbols.
    """
    relative, taps = _relative_rounding(weight), _sum_of_tap_norms(weight)
    return torch.hypot(largest, torch.full_like(largest, math.sqrt(relative) * taps)) + relative * taps


@dataclass(frozen=True)
class _Embedding:
    """A circular convolution whose largest singular value, times a factor, bounds a convolution layer's norm."""

    grid: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    factor: float = 1.0

    @property
    def geometry(self) -> dict[str, Any]:
        """The arguments of :func:`conv_singular_values` beside the weight."""
        return {"input_size": self.grid, "stride": self.stride, "dilation": self.dilation, "groups": self.groups}


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
    transform at the input's own size, times the square root of how often an input row is repeated in the output.
    Reflect and replicate padding: the convolution of the padded input, times the square root of how often padding
    repeats a pixel at most. With zero or circular padding an operator of at most 256 × 4096 entries is formed instead
    and its own norm returned, which no embedding loosens.

    Args:
        weight: (c_out, c_in/groups, \*kernel), any floating dtype; computed in float64.
        input_size: spatial size of the input in pixels, one entry per axis; None for a bound that holds for any.
        padding: as for ``torch.nn.Conv2d``: an int, one per axis, ``"same"`` or ``"valid"``.
        padding_mode: ``"zeros"``, ``"circular"``, ``"reflect"`` or ``"replicate"``.
        stride: step between outputs.
        dilation: step between taps.
        groups: blocks that the channels fall into.

    Returns:
        float64 tensor of no dimensions, on weight's device; differentiable by the weight, at the cost of one singular
        pair. In exact arithmetic it is a bound; for the rounding of the computation it includes
        √ε·Σ‖K_t‖ added in squares and ε·Σ‖K_t‖, ε = 16·eps·(c_in·∏k + c_out), or a factor
        1 + 16·eps·(rows + columns) where formed.

    Raises:
        TypeError: weight is not a floating-point tensor.
        ValueError: a wrong rank, an empty or non-finite weight, an unknown padding, an input too small for the
            kernel or the padding.

    Example:
        >>> checkerboard = torch.tensor([[[[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0], [1.0, -1.0, 1.0]]]])
        >>> conv_norm_bound(checkerboard, (3, 3), padding=1) > 5.82
        tensor(True)
    """
    embedding = _embed(weight, input_size, padding, padding_mode, stride, dilation, groups)
    if isinstance(embedding, ConvGeometry):
        matrix = conv_matrix(weight.double(), embedding)
        return torch.linalg.matrix_norm(matrix, 2) * (1 + 16 * _EPS * sum(matrix.shape))
    return _rounded_up(_largest_value(weight, embedding), weight) * embedding.factor


def conv_norm_certified(
    weight: Tensor,
    tau: float,
    input_size: Sequence[int] | None,
    *,
    padding: int | str | Sequence[int] = 0,
    padding_mode: str = "zeros",
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> bool:
    r"""Whether the norm of a convolution layer's linear operator is proven to be at most ``tau``.

    The embedding of :func:`conv_norm_bound` lies below τ exactly when τ²I − G(ω) is positive definite at every
    frequency: one batched Cholesky factorisation in float64, a third to a half of the cost of all singular values. τ²
    is lowered by a margin for the rounding of the matrices and of the factorisation. False says that there is no
    proof, not that the norm is larger.

    Args:
        weight: as for :func:`conv_norm_bound`.
        tau: the bound to be proven.
        input_size: as for :func:`conv_norm_bound`.
        padding: as for :func:`conv_norm_bound`.
        padding_mode: as for :func:`conv_norm_bound`.
        stride: as for :func:`conv_norm_bound`.
        dilation: as for :func:`conv_norm_bound`.
        groups: as for :func:`conv_norm_bound`.

    Raises:
        TypeError: as for :func:`conv_norm_bound`.
        ValueError: the same, or a τ that is not a positive number.

    Example:
        >>> conv_norm_certified(torch.ones(1, 1, 3, 3), 9.1, (32, 32), padding=1)
        True
    """
    if isinstance(tau, bool) or not isinstance(tau, int | float) or not 0 < tau < math.inf:
        raise ValueError(f"tau must be a positive number, got {tau!r}")
    arguments: dict[str, Any] = {"padding": padding, "padding_mode": padding_mode, "stride": stride}
    arguments |= {"dilation": dilation, "groups": groups}
    embedding = _embed(weight, input_size, **arguments)
    weight = weight.detach()
    if isinstance(embedding, ConvGeometry):
        return bool(conv_norm_bound(weight, input_size, **arguments) <= tau)
    scale = unit_scale(weight)
    unit = weight.double() / scale
    # No norm exceeds Σ‖K_t‖: a larger τ need not be squared.
    bound = min(tau / embedding.factor / float(scale), 2 * _sum_of_tap_norms(unit) + 1)
    margin = _cholesky_margin(unit, bound, embedding)
    if bound**2 <= margin:
        return False
    problem = (unit, embedding.grid, embedding.stride, embedding.dilation, groups, bound, margin)
    if OP.choose(weight.device) == "extension":
        return bool(torch.ops.iresnet_fast.conv_norm_below(*problem))
    return bool(reference.conv_norm_below(*problem))


def _cholesky_margin(weight: Tensor, bound: float, embedding: _Embedding) -> float:
    """By how much τ²I − G must be more than positive definite for a factorisation in float64 to prove it.

    A factorisation that succeeds is exact for a matrix that differs by at most a small multiple of eps·n² times the
    largest diagonal entry, here τ² (Higham 2002, Theorem 10.3); an entry of G is a sum over channels and pairs of taps.
    """
    rows, columns = weight.shape[0] // embedding.groups, weight.shape[1] * math.prod(embedding.stride)
    order = min(rows, columns)
    terms = max(rows, columns) * weight[0, 0].numel()
    return 8 * _EPS * (order * (order + 2) * bound**2 + (terms + 64) * _sum_of_tap_norms(weight) ** 2)


def _largest_value(weight: Tensor, embedding: _Embedding) -> Tensor:
    """The largest singular value, with the gradient of one frequency's."""
    values = conv_singular_values(weight.detach(), **embedding.geometry)
    largest = values.amax()
    if not (weight.requires_grad and torch.is_grad_enabled()):
        return largest
    frequency = [int(j) for j in torch.unravel_index(values[..., 0].argmax(), values.shape[:-1])]
    symbol = conv_symbol_at(
        weight.double(), frequency, embedding.grid, embedding.stride, embedding.dilation, embedding.groups
    )
    norm = torch.linalg.matrix_norm(symbol, 2).amax()
    return largest + (norm - norm.detach())


def _embed(
    weight: Tensor,
    input_size: Sequence[int] | None,
    padding: int | str | Sequence[int],
    padding_mode: str,
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
) -> _Embedding | ConvGeometry:
    """What bounds the layer's operator: an embedding, or the operator itself where it is small enough to be formed."""
    axes = check_conv_weight(weight, groups)
    kernel = tuple(weight.shape[2:])
    stride, dilation = per_axis("stride", stride, axes), per_axis("dilation", dilation, axes)
    check_choice("padding_mode", padding_mode, PADDING_MODES)
    sides = conv_padding(padding, kernel, dilation)
    if input_size is None:
        repeats = _most_repeats(sides, padding_mode, kernel, dilation)
        return _embed_any_size(kernel, groups, math.sqrt(repeats))
    size = per_axis("input_size", input_size, axes)
    _check_padding(size, padding, sides, padding_mode)
    rows = list(zip(size, kernel, stride, dilation, sides, strict=True))
    outputs = [(n + sum(p) - d * (k - 1) - 1) // s + 1 for n, k, s, d, p in rows]
    if min(outputs) < 1:
        raise ValueError(f"input_size={size} is too small for a kernel of {kernel} with padding={padding!r}")
    if padding_mode in ("reflect", "replicate"):
        padded = tuple(s * -(-(n + sum(p)) // s) for n, _, s, _, p in rows)
        repeats = math.prod(_pixel_repeats(n, p, padding_mode) for n, p in zip(size, sides, strict=True))
        return _Embedding(padded, stride, dilation, groups, math.sqrt(repeats))
    sizes = sorted((weight.shape[1] * groups * math.prod(size), weight.shape[0] * math.prod(outputs)))
    if sizes[0] <= _DENSE[0] and sizes[1] <= _DENSE[1]:
        return ConvGeometry(size, stride, dilation, sides, padding_mode, groups)
    if padding_mode == "zeros":
        grid = tuple(s * max(-(-(n + max(p)) // s), m) for (n, _, s, _, p), m in zip(rows, outputs, strict=True))
        return _Embedding(grid, stride, dilation, groups)
    # Outputs that lie a whole input apart are equal.
    spans = ((m - 1) * s + 1 for m, s in zip(outputs, stride, strict=True))
    repeats = math.prod(-(-span // n) for span, n in zip(spans, size, strict=True))
    if any(n % s for n, s in zip(size, stride, strict=True)):
        stride = (1,) * axes  # the outputs are some of those of stride 1
    return _Embedding(size, stride, dilation, groups, math.sqrt(repeats))


def _embed_any_size(kernel: Sequence[int], groups: int, factor: float) -> _Embedding:
    """Supremum of ‖F(ω)‖ over all ω, from above; dilation and stride do not raise it."""
    reach = [(k - 1) / 2 for k in kernel]
    grid = tuple(max(1, math.ceil(_SAMPLES * d)) for d in reach)
    factor *= math.prod(1 / math.cos(math.pi * d / n) for d, n in zip(reach, grid, strict=True))
    ones = (1,) * len(grid)
    return _Embedding(grid, ones, ones, groups, factor)


def _check_padding(size: Sequence[int], padding: Any, sides: Sequence[tuple[int, int]], padding_mode: str) -> None:
    """Raise where torch would refuse to pad by so much."""
    most = {"circular": 0, "reflect": 1}.get(padding_mode)
    if most is not None and any(max(p) > n - most for n, p in zip(size, sides, strict=True)):
        limit = "its size" if most == 0 else "one less than its size"
        raise ValueError(
            f"padding={padding!r} is too large for {padding_mode} padding of input_size={size}. Remedy: at most {limit}"
        )


def _pixel_repeats(n: int, sides: tuple[int, int], padding_mode: str) -> int:
    """How often padding shows one pixel of an axis at most."""
    pixels = torch.arange(n, dtype=torch.float64, device="cpu").view(1, 1, n)
    return int(F.pad(pixels, sides, mode=padding_mode).flatten().long().bincount().max())


def _most_repeats(
    sides: Sequence[tuple[int, int]], padding_mode: str, kernel: Sequence[int], dilation: Sequence[int]
) -> int:
    """How often an input row shows in the padded input (circular: in the output) at most, whatever the size."""
    if padding_mode == "zeros":
        return 1
    if padding_mode == "reflect":
        return math.prod(1 + sum(1 for p in pair if p) for pair in sides)
    if padding_mode == "replicate":
        return math.prod(1 + sum(pair) for pair in sides)
    # torch pads at most once around, so the input is at least as large as the padding.
    extra = [sum(p) - d * (k - 1) for p, d, k in zip(sides, dilation, kernel, strict=True)]
    return math.prod(1 + -(-max(e, 0) // max(1, *p)) for e, p in zip(extra, sides, strict=True))


def _self_test(device: torch.device) -> float:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, 3, 3, generator=generator, dtype=torch.float64, device="cpu").to(device)
    norm = float(conv_singular_values(weight, (24, 24)).amax())
    verdicts = [
        conv_norm_certified(weight, tau * norm, (24, 24), padding=1, padding_mode="circular") for tau in (0.999, 1.001)
    ]
    return 0.0 if verdicts == [False, True] else 1.0


OP = register(
    Op(
        "conv_norm_below",
        {"cpu": ("extension", "reference"), "cuda": ("extension", "reference")},
        _self_test,
        self_test_tolerance=0.0,
    )
)

if _extension.defines("conv_norm_below"):

    @torch.library.register_fake("iresnet_fast::conv_norm_below")
    def _fake(
        weight: Tensor,
        grid: list[int],
        stride: list[int],
        dilation: list[int],
        groups: int,
        bound: float,
        margin: float,
    ) -> Tensor:
        return weight.new_empty((), dtype=torch.bool)
