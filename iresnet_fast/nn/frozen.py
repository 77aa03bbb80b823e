"""Evaluating a module without changing it: its normalised weights computed once, or held as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .inspection import parts_of
from .spectral_norm import SpectralNorm


@contextmanager
def frozen_state(module: nn.Module) -> Iterator[None]:
    """Within it normalised weights are computed once and the module's forward changes no state, in any mode.

    Modules whose forward would (power iteration, data-dependent initialisation) have an attribute ``frozen``.
    """
    thawed = [part for part in parts_of(module) if getattr(part, "frozen", None) is False]
    for part in thawed:
        part.frozen = True  # type: ignore[assignment]  # torch types attributes of modules as Tensor | Module
    try:
        with parametrize.cached():
            yield
    finally:
        for part in thawed:
            part.frozen = False  # type: ignore[assignment]  # torch types attributes of modules as Tensor | Module


@contextmanager
def own_cache() -> Iterator[None]:
    """Parametrizations computed once within, whatever a surrounding ``parametrize.cached()`` holds."""
    before = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        with parametrize.cached():
            yield
    finally:
        parametrize._cache_enabled, parametrize._cache = before


class Snapshot:
    """A module's normalised weights as they are now, with their gradients.

    Evaluated under :meth:`held`, the module is the same function of its input and of ``tensors`` later on, wherever
    power iteration has meanwhile moved u and v. Making it counts as a use of each weight: in training mode u and v are
    iterated, unless the module is frozen.

    Attributes:
        module: whose weights they are.
        tensors: the normalised weights and every other parameter; gradients with respect to them are complete.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._norms: list[SpectralNorm] = []
        self._weights: list[Tensor] = []
        replaced: set[int] = set()
        for part in module.modules():
            for name, parametrizations in getattr(part, "parametrizations", {}).items():
                norm = parametrizations[0]
                if isinstance(norm, SpectralNorm):
                    replaced.add(id(parametrizations.original))
                    self._norms.append(norm)
                    # By the module's own attribute, a surrounding ``parametrize.cached()`` is respected.
                    alone = len(parametrizations) == 1
                    self._weights.append(getattr(part, name) if alone else norm(parametrizations.original))
        self._parameters = [parameter for parameter in module.parameters() if id(parameter) not in replaced]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the module depends on."""
        return (*self._weights, *self._parameters)

    def of(self, part: nn.Module) -> list[int]:
        """Which of the tensors a part of the module depends on."""
        inside = {id(module) for module in part.modules()} | {id(parameter) for parameter in part.parameters()}
        owners = (*map(id, self._norms), *map(id, self._parameters))
        return [index for index, owner in enumerate(owners) if owner in inside]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within it the module uses these weights.

        Raises:
            RuntimeError: its parameters have been replaced since, as ``torch.func.functional_call`` does.
        """
        current = {id(parameter) for parameter in self.module.parameters()}
        if not all(id(parameter) in current for parameter in self._parameters):
            raise RuntimeError(
                "the module's parameters have been replaced since its forward, so gradients would go to others. "
                "Remedy: run the backward where the forward ran, inside the same functional_call"
            )
        before = [norm.held for norm in self._norms]
        for norm, held in zip(self._norms, self._weights, strict=True):
            norm.held = held
        try:
            with own_cache():
                yield
        finally:
            for norm, weight in zip(self._norms, before, strict=True):
                norm.held = weight

    def needs_gradient(self, x: Tensor) -> bool:
        """Whether anything that depends on x and the tensors is differentiated."""
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *self.tensors))
