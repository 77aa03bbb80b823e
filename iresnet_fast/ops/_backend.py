"""Which backend serves an op on a device, and why not the others."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .. import _extension, kernels

VARIABLE = "IRESNET_FAST_BACKEND"
BACKENDS = ("auto", "reference", "stacked", "triton", "extension")


def _extension_obstacle(op: str, device_type: str) -> str | None:
    if not _extension.loaded:
        return _extension.missing_reason
    if not _extension.serves(op, device_type):
        if device_type == "cpu":
            return (
                f"the compiled extension is of other sources, without a cpu kernel of it. Remedy: {_extension.REBUILD}"
            )
        return (
            f"the compiled extension of this installation has no {device_type} kernel of it. Remedy: a CUDA build of "
            f"torch and nvcc (FORCE_CUDA=1 where no GPU is visible), then {_extension.REBUILD}"
        )
    return None


_OBSTACLES: dict[str, Callable[[str, str], str | None]] = {
    "reference": lambda op, device_type: None,
    "stacked": lambda op, device_type: None,
    "extension": _extension_obstacle,
    "triton": lambda op, device_type: kernels.missing_reason(),
}


@dataclass(frozen=True)
class Op:
    """An op of the package and the backends it was written for, best first.

    Attributes:
        name: of the public function, and of ``torch.ops.iresnet_fast``.
        backends: for each kind of device, the backends in order of preference, ``"reference"`` last.
        self_test: runs the op on the given device through whatever serves it, and returns its largest error
            relative to a float64 oracle; for ``iresnet-fast doctor``.
        self_test_tolerance: the largest such error that passes.
        compiled: the extension's op that serves it, where that has another name.
    """

    name: str
    backends: dict[str, tuple[str, ...]]
    self_test: Callable[[torch.device], float]
    self_test_tolerance: float
    compiled: str | None = None
    _warned: set[str] = field(default_factory=set, compare=False)

    def obstacle(self, backend: str, device_type: str) -> str | None:
        """Why this backend cannot serve the op on this kind of device; None where it can."""
        if backend not in self.backends.get(device_type, ("reference",)):
            return f"{self.name} has no {backend} implementation for {device_type} tensors"
        return _OBSTACLES[backend](self.compiled or self.name, device_type)

    def choose(self, device: torch.device) -> str:
        """The backend that serves the op on this device, as ``IRESNET_FAST_BACKEND`` asks.

        Raises:
            ValueError: the variable names no backend.
            RuntimeError: it names one that cannot serve this op here.
        """
        candidates = self.backends.get(device.type, ("reference",))
        wanted = os.environ.get(VARIABLE, "auto")
        if wanted not in BACKENDS:
            raise ValueError(f"{VARIABLE} is {wanted!r}; it must be one of {', '.join(BACKENDS)}")
        if wanted != "auto":
            if reason := self.obstacle(wanted, device.type):
                raise RuntimeError(f"{VARIABLE}={wanted}, but {reason}")
            return wanted
        for backend in candidates:
            reason = self.obstacle(backend, device.type)
            if reason is None:
                return backend
            if device.type not in self._warned:
                self._warned.add(device.type)
                warnings.warn(f"{self.name} falls back to a slower path: {reason}", stacklevel=3)
        raise AssertionError(f"{self.name} lists no reference backend")


REGISTRY: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Add the op to the list that ``iresnet-fast doctor`` and the tests walk through."""
    REGISTRY[op.name] = op
    return op
