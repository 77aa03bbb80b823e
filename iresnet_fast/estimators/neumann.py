"""The gradient of a log-determinant by a Neumann series, whose memory does not grow with the number of terms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .products import Evaluation, inner
from .result import LogDet
from .series import RussianRoulette, Series


@dataclass(frozen=True)
class NeumannGradient:
    """A series' value, with its gradient as one differentiable product (Chen et al. 2019, Theorem 2).

    The gradient of log det(I + J) is tr((I + J)⁻¹ ∂J) = E[wᵀ ∂J v] with w = Σ_k (−Jᵀ)^k v. w is summed without a graph,
    so that memory is that of one product however many terms there are. The weights of the terms are those of the
    series, so that with :class:`RussianRoulette` value and gradient are unbiased where Lip(g) < 1. The gradient is not
    that of the value that was drawn, but has the same expectation. Each sample's part is its own: any loss may follow.
    It cannot be differentiated again, which is an error: for second derivatives there are the series themselves, and
    ``Exact``. Inside a transform of ``torch.func`` it is the series itself.

    Args:
        series: gives the value, and the weights of the terms.

    Raises:
        TypeError: ``series`` is none.
    """

    series: Series = field(default_factory=RussianRoulette)

    def __post_init__(self) -> None:
        if not isinstance(self.series, Series):
            raise TypeError(f"series must be a PowerSeries or a RussianRoulette, got {self.series!r}")

    def __call__(
        self,
        g: Callable[[Tensor], Tensor],
        x: Tensor,
        *,
        lipschitz: float | None = None,
        assumed: float | None = None,
    ) -> tuple[Tensor, LogDet]:
        """g(x) (B, ...) and the estimated :class:`LogDet`; the arguments are those of :class:`Estimator`."""
        if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            # A transform may differentiate again, which only the series themselves allow.
            return self.series(g, x, lipschitz=lipschitz, assumed=assumed)
        return self.series.estimate(g, x, _sum_of_terms, lipschitz, assumed)


def _sum_of_terms(evaluation: Evaluation, v: Tensor, weights: list[float]) -> Tensor:
    """The series' sum Σ_k (−1)^{k+1} c_k t_k/k with t_k = vᵀ(Jᵀ)^k v, carrying the gradient of wᵀJv.

    The last t_n is not computed by itself: the differentiable product wᵀJv is the sum of all (−1)^{k+1} c_k t_k.
    """
    n = len(weights)
    value = torch.zeros_like(inner(v[:, :0], v[:, :0]))
    if not n:
        return value
    product, w = v, weights[0] * v
    for k in range(1, n):
        product = evaluation.vjp(product)
        value = value + (-1) ** (k + 1) * weights[k - 1] * (1 / k - 1 / n) * inner(product, v)
        w = w + (-1) ** k * weights[k] * product
    surrogate = inner(evaluation.vjp(w, differentiable=True), v)
    if not torch.compiler.is_compiling():  # whose gradients cannot be differentiated again either
        surrogate = _Once.apply(surrogate)
    value = value + surrogate.detach() / n
    return value + surrogate - surrogate.detach()


class _Once(torch.autograd.Function):
    """The identity with a gradient that cannot be differentiated: w's is not recorded, so the second would be wrong."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: the gradient of NeumannGradient cannot be differentiated again without bias. "
                "Remedy: PowerSeries, RussianRoulette or Exact"
            )
        return gradient
