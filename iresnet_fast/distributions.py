"""A flow as a transform of ``torch.distributions``."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.transforms import Transform

from .models import IResNetFlow
from .nn import Bijection, InvertibleSequential, Logit, frozen_state
from .nn.bijections.base import options_of


class FlowTransform(Transform):
    """The map from data to latents: its direction is that of densities, which then need no fixed point.

    ``TransformedDistribution(base, [transform.inv])`` is the flow's distribution: ``log_prob`` runs the flow forward,
    ``sample`` and ``rsample`` invert it. zuko's ``NormalizingFlow(transform, base)`` takes the transform itself.

    Args:
        flow: an :class:`~iresnet_fast.models.IResNetFlow`, or a :class:`~iresnet_fast.nn.Bijection` that keeps the
            shape of a sample.
        event_dim: axes of a sample, for a bijection; a flow knows its own.
        cache_size: 1 to remember the last pair of data and latents, as torch's own transforms do; or 0.
        tol: of the inverse, where it iterates.
        on_failure: of the inverse, where it can fail: ``"raise"``, ``"warn"`` or ``"return"``.

    Raises:
        TypeError: flow is neither.
        ValueError: from a call, a bijection that changes the shape of a sample, or a sample of too few axes.

    Example:
        >>> flow = irf.models.IResNetFlow.from_config({"in_shape": (2,), "fc_blocks": 2}).eval()
        >>> base = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2), 1.0), 1)
        >>> transform = irf.distributions.FlowTransform(flow)
        >>> density = torch.distributions.TransformedDistribution(base, [transform.inv])
        >>> density.log_prob(torch.randn(7, 2)).shape
        torch.Size([7])
    """

    bijective = True

    def __init__(
        self,
        flow: IResNetFlow | Bijection,
        *,
        event_dim: int = 1,
        cache_size: int = 0,
        tol: float | None = None,
        on_failure: str = "raise",
    ) -> None:
        super().__init__(cache_size=cache_size)
        if not isinstance(flow, IResNetFlow | Bijection):
            raise TypeError(f"flow must be an IResNetFlow or a Bijection, got {type(flow).__name__}")
        self._flow, self._event_dim = flow, event_dim
        self._bijection: Bijection = flow.trunk if isinstance(flow, IResNetFlow) else flow
        self._in_shape = flow.config.in_shape if isinstance(flow, IResNetFlow) else None
        self._options: dict[str, Any] = {"tol": tol, "on_failure": on_failure}
        axes = event_dim if self._in_shape is None else len(self._in_shape)
        first: nn.Module = self._bijection
        while isinstance(first, InvertibleSequential) and len(first):
            first = first[0]
        ends = first.interval if isinstance(first, Logit) else None
        self.domain = constraints.independent(constraints.interval(*ends) if ends else constraints.real, axes)
        self.codomain = constraints.independent(constraints.real, axes if self._in_shape is None else 1)
        self._last: _Remembered | None = None

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        """The same transform with this ``cache_size``."""
        if cache_size == self._cache_size:
            return self
        return FlowTransform(self._flow, event_dim=self._event_dim, cache_size=cache_size, **self._options)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_last": None}

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of data (*batch, *event), and log|det J| (*batch), in one run."""
        rows, batch = _as_rows(x, self.domain.event_dim)
        z, log_det = self._bijection.forward_and_log_det(rows)
        if self._in_shape is None and z.shape != rows.shape:
            raise ValueError(
                f"the bijection maps samples of shape {tuple(rows.shape[1:])} to {tuple(z.shape[1:])}, and a transform "
                "of a bijection keeps it. Remedy: an IResNetFlow, or torch.distributions.ReshapeTransform around it"
            )
        return z.view(*batch, *z.shape[1:]), log_det.view(batch)

    def _call(self, x: Tensor) -> Tensor:
        z, log_det = self.call_and_ladj(x)
        self._last = _Remembered(x, z, log_det)
        return z

    def _inverse(self, y: Tensor) -> Tensor:
        rows, batch = _as_rows(y, self.codomain.event_dim)
        x = self._bijection.inverse(rows, **options_of(self._bijection, self._options))
        return x.view(*batch, *x.shape[1:])

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log|det J| at x (*batch); right after the call that made y of x it is that call's, and costs nothing."""
        last, self._last = self._last, None
        if last is not None and last.is_of(x, y) and last.log_det is not None:
            return last.log_det
        with frozen_state(self._bijection):  # a forward of its own, which must not change what y was made with
            return self.call_and_ladj(x)[1]

    def forward_shape(self, shape: Any) -> torch.Size:
        """Of the latents of data of this shape."""
        return _swap_event(shape, self._in_shape, (math.prod(self._in_shape),)) if self._in_shape else shape

    def inverse_shape(self, shape: Any) -> torch.Size:
        """Of data whose latents have this shape."""
        return _swap_event(shape, (math.prod(self._in_shape),), self._in_shape) if self._in_shape else shape


class _Remembered:
    """The log-determinant of the last call, for as long as its latents live."""

    def __init__(self, x: Tensor, z: Tensor, log_det: Tensor) -> None:
        self.log_det: Tensor | None = log_det
        self._x, self._z = weakref.ref(x), weakref.ref(z, self._forget)
        self._made_with = self._conditions(x)

    def is_of(self, x: Tensor, z: Tensor) -> bool:
        """Whether these are the very tensors, unchanged, and gradients are wanted as they were."""
        return self._x() is x and self._z() is z and self._made_with == self._conditions(x)

    @staticmethod
    def _conditions(x: Tensor) -> tuple[int, bool]:
        return 0 if x.is_inference() else x._version, torch.is_grad_enabled()

    def _forget(self, reference: object) -> None:
        self.log_det = None


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
