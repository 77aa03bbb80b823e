"""A flow as a transform of ``torch.distributions``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import Transform

from .models import IResNetFlow
from .nn import Bijection, Logit


class FlowTransform(Transform):
    """The map from data to latents: its direction is that of densities, which then need no fixed point.

    ``TransformedDistribution(base, [transform.inv])`` is the flow's distribution: ``log_prob`` runs the flow forward,
    ``sample`` and ``rsample`` invert it. zuko's ``NormalizingFlow(transform, base)`` takes the transform itself.

    Args:
        flow: an :class:`~iresnet_fast.models.IResNetFlow`, or any :class:`~iresnet_fast.nn.Bijection`.
        event_dim: axes of a sample, for a bijection that keeps their number; a flow knows its own.
        **options: of the inverse: ``tol`` and others of
            :meth:`~iresnet_fast.nn.InvertibleResidualBlock.solve_inverse`.

    Raises:
        TypeError: flow is neither.

    Example:
        >>> flow = irf.models.IResNetFlow.from_config({"in_shape": (2,), "fc_blocks": 2}).eval()
        >>> base = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2), 1.0), 1)
        >>> transform = irf.distributions.FlowTransform(flow)
        >>> density = torch.distributions.TransformedDistribution(base, [transform.inv])
        >>> density.log_prob(torch.randn(7, 2)).shape
        torch.Size([7])
    """

    bijective = True

    def __init__(self, flow: IResNetFlow | Bijection, *, event_dim: int = 1, **options: Any) -> None:
        super().__init__()
        if not isinstance(flow, IResNetFlow | Bijection):
            raise TypeError(f"flow must be an IResNetFlow or a Bijection, got {type(flow).__name__}")
        self._bijection: Bijection = flow.trunk if isinstance(flow, IResNetFlow) else flow
        self._in_shape = flow.config.in_shape if isinstance(flow, IResNetFlow) else None
        self._options = options
        axes = event_dim if self._in_shape is None else len(self._in_shape)
        ends = next((part.interval for part in self._bijection.modules() if isinstance(part, Logit)), None)
        self.domain = constraints.independent(constraints.interval(*ends) if ends else constraints.real, axes)
        self.codomain = constraints.independent(constraints.real, axes if self._in_shape is None else 1)
        # Of the last call, for the log-determinant that is asked for next.
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of data (*batch, *event), and log|det J| (*batch), in one run."""
        rows, batch = _as_rows(x, self.domain.event_dim)
        z, log_det = self._bijection.forward_and_log_det(rows)
        return z.view(*batch, *z.shape[1:]), log_det.view(batch)

    def _call(self, x: Tensor) -> Tensor:
        z, log_det = self.call_and_ladj(x)
        self._last = x, z, log_det
        return z

    def _inverse(self, y: Tensor) -> Tensor:
        rows, batch = _as_rows(y, self.codomain.event_dim)
        x = self._bijection.inverse(rows, **self._options)
        return x.view(*batch, *x.shape[1:])

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log|det J| at x (*batch)."""
        last, self._last = self._last, None
        if last is not None and last[0] is x and last[1] is y:
            return last[2]
        return self.call_and_ladj(x)[1]

    def forward_shape(self, shape: Any) -> torch.Size:
        """Of the latents of data of this shape."""
        return _swap_event(shape, self._in_shape, (math.prod(self._in_shape),)) if self._in_shape else shape

    def inverse_shape(self, shape: Any) -> torch.Size:
        """Of data whose latents have this shape."""
        return _swap_event(shape, (math.prod(self._in_shape),), self._in_shape) if self._in_shape else shape


def _as_rows(x: Tensor, event_dim: int) -> tuple[Tensor, torch.Size]:
    if x.dim() < event_dim:
        raise ValueError(f"a sample has {event_dim} axes, got a tensor of shape {tuple(x.shape)}")
    batch, event = x.shape[: x.dim() - event_dim], x.shape[x.dim() - event_dim :]
    return x.reshape(-1, *event), batch


def _swap_event(shape: Any, before: tuple[int, ...], after: tuple[int, ...]) -> torch.Size:
    start = len(shape) - len(before)
    if start < 0 or tuple(shape[start:]) != before:
        raise ValueError(f"a shape that ends with {before} is needed, got {tuple(shape)}")
    return torch.Size((*shape[:start], *after))
