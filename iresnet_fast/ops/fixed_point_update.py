"""One fused step of the fixed-point inverse."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _extension
from ..reference.fixed_point_update import fixed_point_update as reference
from ._backend import Op, register

if TYPE_CHECKING:
    from ..kernels.fixed_point_steps import FusedSteps


def fixed_point_update(y: Tensor, image: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The next iterate y − g(x), and the residual ‖y − g(x) − x‖ of each sample, in one pass over memory.

    The epilogue of every fixed-point iteration (Behrmann et al. 2019, Algorithm 1). On CUDA a Triton kernel, on a
    CPU C++ (float32 and float64); sums are taken in a fixed order.

    Args:
        y: (B, ...) outputs of the block, of floating point.
        image: (B, ...) g(x).
        x: (B, ...) the iterate.

    Returns:
        The next iterate, of y's shape, dtype and layout, and the residuals (B,): float32 for low precision, else y's
        dtype. Differentiable; the gradient of a zero residual is zero.

    Raises:
        TypeError: y is not of floating point.
        ValueError: the three differ in shape, dtype or device, or have no axis besides the batch.

    Example:
        >>> fixed_point_update(torch.tensor([[3.0]]), torch.tensor([[1.0]]), torch.tensor([[1.5]]))
        (tensor([[2.]]), tensor([0.5000]))
    """
    if not y.is_floating_point():
        raise TypeError(f"y must be of floating point, got {y.dtype}")
    if y.dim() < 2:
        raise ValueError(f"y must have shape (B, ...) with at least one axis per sample, got {tuple(y.shape)}")
    for name, other in (("image", image), ("x", x)):
        if other.shape != y.shape or other.dtype != y.dtype or other.device != y.device:
            raise ValueError(
                f"{name} must match y: {tuple(y.shape)}, {y.dtype} on {y.device}; got {tuple(other.shape)}, "
                f"{other.dtype} on {other.device}"
            )
    backend = OP.choose(y.device)
    if y.numel() > 0 and (backend == "triton" or (backend == "extension" and y.dtype in _COMPILED_DTYPES)):
        following, residual = torch.ops.iresnet_fast.fixed_point_update(y, image, x)
        return following, residual
    return reference(y, image, x)


def fused_steps(
    y: Tensor,
    x: Tensor,
    *,
    tol: float,
    lipschitz: float | None,
    max_iterations: int | None,
    patience: int,
    mixing: bool,
) -> FusedSteps | None:
    """An iteration whose whole step after g(x) is three launches; None where no kernel serves y.

    y − g(x), its residuals, who has converged or stalled, freezing, and the next iterates by Picard or Anderson
    (:class:`iresnet_fast.kernels.fixed_point_steps.FusedSteps`); on CUDA, in float32.

    Args:
        y: (B, ...) right-hand sides.
        x: (B, ...) first iterates, which become the iteration's own.
        tol: as for :func:`iresnet_fast.solvers.invert_residual`, and so are the others.
        lipschitz: proven constant of g, or None.
        max_iterations: limit of accepted steps.
        patience: until a stall.
        mixing: Anderson instead of Picard.
    """
    if y.device.type != "cuda" or y.dtype != torch.float32 or not y.numel() or OP.choose(y.device) != "triton":
        return None
    from ..kernels.fixed_point_steps import FusedSteps  # noqa: PLC0415  (needs Triton)

    layout = _layout(y)
    rule: dict[str, Any] = {"tol": tol, "lipschitz": lipschitz, "max_iterations": max_iterations}
    rule |= {"patience": patience, "mixing": mixing}
    return FusedSteps(y.contiguous(memory_format=layout), x.contiguous(memory_format=layout), **rule)


_NAME = "iresnet_fast::fixed_point_update"
_COMPILED_DTYPES = (torch.float32, torch.float64)

if not _extension.defines("fixed_point_update"):
    torch.library.define(_NAME, "(Tensor y, Tensor image, Tensor x) -> (Tensor, Tensor)")

    @torch.library.impl(_NAME, "cpu")
    def _eager(y: Tensor, image: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        following, residual = reference(y, image, x)
        return following.contiguous(memory_format=_layout(y)), residual


@torch.library.impl(_NAME, "cuda")
def _launch(y: Tensor, image: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    from ..kernels.fixed_point_update import launch_fixed_point_update  # noqa: PLC0415  (needs Triton)

    layout = _layout(y)
    with torch.cuda.device(y.device):
        return launch_fixed_point_update(*(part.contiguous(memory_format=layout) for part in (y, image, x)))


@torch.library.register_fake(_NAME)
def _fake(y: Tensor, image: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    residual = y.new_empty((y.shape[0],), dtype=torch.promote_types(y.dtype, torch.float32))
    return torch.empty_like(y, memory_format=_layout(y)), residual


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    following, residual = output
    ctx.save_for_backward(following, inputs[2], residual)


def _backward(ctx: Any, grad_following: Tensor, grad_residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    following, x, residual = ctx.saved_tensors
    shape = (-1,) + (1,) * (following.dim() - 1)
    slope = torch.where(residual > 0, grad_residual / residual, 0.0).view(shape).to(following.dtype)
    along = slope * (following - x)
    total = grad_following + along
    return total, -total, -along


torch.library.register_autograd(_NAME, _backward, setup_context=_setup_context)


def _layout(y: Tensor) -> torch.memory_format:
    """channels_last where y has it, else contiguous: within a sample all values are then dense."""
    if y.dim() == 4 and y.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _self_test(device: torch.device) -> float:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(3, 5, 7, generator=generator, device="cpu") for _ in range(3)]
    found = fixed_point_update(*(part.to(device) for part in tensors))
    exact = reference(*(part.double() for part in tensors))
    return max(float((a.cpu().double() - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True))


OP = register(
    Op(
        "fixed_point_update",
        {"cpu": ("extension", "reference"), "cuda": ("triton", "reference")},
        _self_test,
        self_test_tolerance=1e-6,
    )
)
