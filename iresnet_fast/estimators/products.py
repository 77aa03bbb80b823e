"""Vector–Jacobian products of a branch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Evaluation:
    """A branch evaluated once, and the products of vectors with its Jacobian there.

    Attributes:
        image: g(x); with gradients where they are recorded outside.
        differentiable: whether gradients are recorded outside.
        n_vjps: products taken so far.
    """

    def __init__(self, g: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self.differentiable = torch.is_grad_enabled()
        self.n_vjps = 0
        self._pullback: Callable[[Tensor], tuple[Tensor]] | None = None
        if torch.compiler.is_compiling():  # which traces torch.func, and not torch.autograd.grad
            self.image, self._pullback = torch.func.vjp(g, x)  # type: ignore[misc]
            return
        # Samples that need no gradient themselves are the start of a graph of their own.
        self._x = x if self.differentiable and x.requires_grad else x.detach().requires_grad_()
        with torch.enable_grad():
            self._image = g(self._x)
        if self._image.shape != x.shape:
            raise ValueError(
                f"the residual branch maps shape {tuple(x.shape)} to {tuple(self._image.shape)}; x + g(x) needs a "
                "branch that keeps it"
            )
        self.image = self._image if self.differentiable else self._image.detach()

    def vjp(self, v: Tensor, *, differentiable: bool = False, batched: bool = False) -> Tensor:
        """Jᵀv for v (B, ...); differentiable in the branch's parameters and x, if that is asked for.

        ``batched``: for several v (n, B, ...) at once.
        """
        self.n_vjps += len(v) if batched else 1
        if self._pullback is not None:
            pull = torch.func.vmap(self._pullback) if batched else self._pullback
            (product,) = pull(v.to(self.image.dtype))
            return product if differentiable else product.detach()
        if not self._image.requires_grad:  # a branch that does not depend on x
            return torch.zeros_like(v)
        (product,) = torch.autograd.grad(
            self._image,
            self._x,
            v.to(self._image.dtype),
            retain_graph=True,
            create_graph=differentiable,
            is_grads_batched=batched,
            allow_unused=True,
            materialize_grads=True,
        )
        return product


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each sample, (B, ...) and (B, ...) to (B,), in float32 for low precision."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    return (a.to(dtype) * b.to(dtype)).flatten(1).sum(1)
