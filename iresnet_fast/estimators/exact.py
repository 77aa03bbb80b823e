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
    """log|det(I + J_g)| by one vector–Jacobian product per dimension, all in one batch, and an LU decomposition.

    For samples of few values: time and memory grow with the number of values D as D evaluations of g, and with D³.

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
        evaluation = Evaluation(g, torch.cat([x] * size))
        unit = torch.eye(size, dtype=x.dtype, device=x.device)
        rows = evaluation.vjp(
            unit.repeat_interleave(batch, 0).view(size * batch, *x.shape[1:]), differentiable=evaluation.differentiable
        )
        # Row i of a sample's Jacobian is the product with the i-th unit vector.
        jacobian = rows.to(torch.promote_types(x.dtype, torch.float32)).view(size, batch, size).transpose(0, 1)
        value = torch.linalg.slogdet(torch.eye(size).to(jacobian) + jacobian).logabsdet
        return evaluation.image[:batch], LogDet.exactly(value, evaluation.n_vjps * size)
