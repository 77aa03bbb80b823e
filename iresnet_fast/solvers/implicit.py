"""The gradient of an inverse by the implicit function theorem, without storing any iterate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .fixed_point import invert_residual
from .precision import autocast_settings
from .result import NotConvergedError, sample_norms


def attach_gradient(
    g: Callable[[Tensor], Tensor], y: Tensor, x: Tensor, tensors: Sequence[Tensor], **options: Any
) -> Tensor:
    """The solution x of x + g(x) = y as a differentiable function of y and of the tensors in g.

    With w = v − J_gᵀ w for an incoming gradient v, dy = w and the gradient of the tensors is −(∂g)ᵀ w (implicit
    function theorem; Bai et al. 2019, Theorem 1). w is found by the solver and stopping rule of the inverse itself,
    with v scaled to norm 1 per sample, for ‖J_gᵀ‖ ≤ L as ‖J_g‖ is. Nothing is stored but x and references.

    Args:
        g: the branch; evaluated once in every backward, with gradients.
        y: (B, ...) right-hand sides.
        x: (B, ...) their solutions, found without gradients.
        tensors: what g depends on, of which gradients are wanted.
        **options: ``tol``, ``max_iterations``, ``lipschitz`` and ``method`` of :func:`invert_residual`.

    Returns:
        x, with a gradient; it can be differentiated once, any number of times over a retained graph.

    Raises:
        NotConvergedError: in the backward, where its own iteration does not converge.
    """
    solution: Tensor = _Implicit.apply(g, options, y, x, *tensors)
    return solution


class _Implicit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, g: Callable[[Tensor], Tensor], options: dict[str, Any], y: Tensor, x: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.g, ctx.options = g, options
        ctx.autocast = autocast_settings(y.device)
        solution = x.view_as(x)
        ctx.save_for_backward(solution, *tensors)
        return solution

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        with ctx.autocast():
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                image = ctx.g(x)
            w = _solve_adjoint(image, x, grad, ctx.options)
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[4:]) if needed]
        grads: list[Tensor | None] = [None] * len(tensors)
        if wanted and image.requires_grad:
            inputs = [tensors[i] for i in wanted]
            found = torch.autograd.grad(image, inputs, -w.to(image.dtype), allow_unused=True)
            for i, part in zip(wanted, found, strict=True):
                grads[i] = part
        return None, None, w, None, *grads


def _solve_adjoint(image: Tensor, x: Tensor, grad: Tensor, options: dict[str, Any]) -> Tensor:
    """W = grad − Jᵀ w, relative to the size of each sample's gradient; samples without a finite one stay without."""
    if not image.requires_grad:
        return grad
    size = sample_norms(grad)
    finite = torch.isfinite(size)
    wide = (-1,) + (1,) * (grad.dim() - 1)
    scale = torch.where(finite & (size > 0), size, 1.0).view(wide)
    unit = torch.where(finite.view(wide), grad / scale, 0.0).to(grad.dtype)

    def transposed(w: Tensor) -> Tensor:
        # A branch that does not depend on x has no Jacobian.
        (product,) = torch.autograd.grad(image, x, w.to(image.dtype), retain_graph=True, allow_unused=True)
        return torch.zeros_like(w) if product is None else product

    try:
        w = invert_residual(transposed, unit, **options, compact=False).x
    except NotConvergedError as error:
        raise NotConvergedError(f"gradient of the inverse: {error}", error.result) from error
    return torch.where(finite.view(wide), w * scale, torch.nan).to(grad.dtype)
