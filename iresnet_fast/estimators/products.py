"""Vector–Jacobian products of a branch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_NO_GRAPH = (
    "the residual branch's image has no gradient in x, so its log-determinant cannot be told. Remedy: no torch.no_grad "
    "or detach inside the branch; one that is constant needs no residual block"
)


class Evaluation:
    """A branch evaluated once, and the products of vectors with its Jacobian there.

    Under ``torch.inference_mode`` it leaves that mode, which would record no graph, and returns what needs none.

    Raises:
        ValueError: the branch does not keep its input's shape, or its image has no graph that leads back to x: it does
            not depend on x, or is evaluated under ``torch.no_grad`` inside. Its products would be 0 without a word.

    Attributes:
        image: g(x); with gradients where they are recorded outside.
        differentiable: whether gradients are recorded outside.
        n_vjps: products taken so far.
    """

    def __init__(self, g: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self.differentiable = torch.is_grad_enabled()
        self.n_vjps = 0
        self._pullback: Callable[[Tensor], tuple[Tensor]] | None = None
        # The compiler traces torch.func, and not torch.autograd.grad; transforms nest.
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            self.image, self._pullback = torch.func.vjp(g, x)  # type: ignore[misc]  # a pair where has_aux is false
            check_same_shape(x, self.image)
            return
        with torch.inference_mode(False), torch.enable_grad():
            # Samples that need no gradient themselves are the start of a graph of their own.
            plain = x.clone() if x.is_inference() else x
            self._x = plain if self.differentiable and x.requires_grad else plain.detach().requires_grad_()
            self._image = g(self._x)
        check_same_shape(x, self._image)
        if not self._image.requires_grad:
            raise ValueError(_NO_GRAPH)
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
        with torch.inference_mode(False):
            v = v.clone() if v.is_inference() else v
            found: tuple[Tensor | None, ...] = torch.autograd.grad(
                self._image,
                self._x,
                v.to(self._image.dtype),
                retain_graph=True,
                create_graph=differentiable,
                is_grads_batched=batched,
                allow_unused=True,
            )
        if found[0] is None:
            raise ValueError(_NO_GRAPH)
        return found[0]


def check_same_shape(x: Tensor, image: Tensor) -> None:
    """Raise where x + g(x) makes no sense."""
    if image.shape != x.shape:
        raise ValueError(
            f"the residual branch maps shape {tuple(x.shape)} to {tuple(image.shape)}; x + g(x) needs a branch that "
            "keeps it"
        )


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each sample, (B, ...) and (B, ...) to (B,), in float32 for low precision."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    return (a.to(dtype) * b.to(dtype)).flatten(1).sum(1)
