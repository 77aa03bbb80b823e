"""The log-determinant from the whole Jacobian."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .products import Evaluation
from .result import LogDet


@dataclass(frozen=True)
class Exact:
    """log|det(I + J_g)| by one vector–Jacobian product per dimension, all at once, and an LU decomposition.

    For samples of few values D: time and memory grow as D evaluations of g, and as D³ and D². A branch may have a
    method ``image_and_jacobian(x)`` that knows a cheaper way, or returns None: the blocks of this package have one for
    chains of linear layers.

    Example:
        >>> x = torch.randn(3, 2)
        >>> image, log_det = Exact()(lambda x: 0.5 * x, x)
        >>> log_det.value.exp()
        tensor([2.2500, 2.2500, 2.2500])
    """

    def __call__(
        self,
        g: Callable[[Tensor], Tensor],
        x: Tensor,
        *,
        lipschitz: float | None = None,
        assumed: float | None = None,
    ) -> tuple[Tensor, LogDet]:
        """g(x) (B, ...) and the exact :class:`LogDet`; the arguments are those of :class:`Estimator`."""
        batch, size = len(x), x[:1].numel() if len(x) else 0
        if not x.numel():
            return g(x), LogDet.exactly(x.new_zeros(batch))
        image, rows = _image_and_jacobian(g, x)
        jacobian = rows.to(torch.promote_types(x.dtype, torch.float32))
        value = torch.linalg.slogdet(torch.eye(size).to(jacobian) + jacobian).logabsdet
        return image, LogDet.exactly(value, size)


def _image_and_jacobian(g: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    cheaper: Callable[[Tensor], tuple[Tensor, Tensor] | None] | None = getattr(g, "image_and_jacobian", None)
    if cheaper is not None and (known := cheaper(x)) is not None:
        return known
    evaluation, size = Evaluation(g, x), x[0].numel()
    unit = torch.eye(size, dtype=x.dtype, device=x.device).view(size, 1, *x.shape[1:])
    # Row i of a sample's Jacobian is the product with the i-th unit vector.
    rows = evaluation.vjp(unit.expand(size, *x.shape), differentiable=evaluation.differentiable, batched=True)
    return evaluation.image, rows.flatten(2).transpose(0, 1)
