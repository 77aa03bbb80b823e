"""A chain of invertible modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..solvers import InverseResult, sample_norms
from .actnorm import ActNorm
from .injective_pad import InjectivePad
from .residual_block import InvertibleResidualBlock
from .spectral_norm import frozen_state
from .squeeze import Squeeze

_KNOWN_LINKS = (InvertibleResidualBlock, ActNorm, Squeeze, InjectivePad)


@dataclass(frozen=True)
class ChainInverseResult:
    """Inverse of a chain, with what was measured.

    Attributes:
        x: (B, ...) the solution.
        residual: (B,) measured ‖F(x) − y‖/max(1, ‖y‖).
        converged: (B,) bool, whether every block's solve met its stopping rule.
        certified: (B,) bool, whether every one did so by a proven bound, and nothing but ActNorm, Squeeze and
            InjectivePad stands between them.
        blocks: the :class:`InverseResult` of every residual block, in the order of the forward.
    """

    x: Tensor
    residual: Tensor
    converged: Tensor
    certified: Tensor
    blocks: tuple[InverseResult, ...]


class InvertibleSequential(nn.Sequential):
    """Invertible modules one after the other; ``inverse`` runs them backwards.

    Args:
        *modules: each with ``forward`` and ``inverse``.

    Raises:
        TypeError: a module without an ``inverse``.
    """

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        for module in modules:
            self.append(module)

    def append(self, module: nn.Module) -> InvertibleSequential:
        """Add a module at the end.

        Raises:
            TypeError: it has no ``inverse``.
        """
        return self.insert(len(self), module)

    def insert(self, index: int, module: nn.Module) -> InvertibleSequential:
        """Insert a module before the one at this index.

        Raises:
            TypeError: it has no ``inverse``.
        """
        if not callable(getattr(module, "inverse", None)):
            raise TypeError(f"module {index} ({type(module).__name__}) has no inverse method")
        super().insert(index, module)
        return self

    def __getitem__(self, index: int | slice) -> Any:
        """One module, or a chain of those in a slice."""
        modules = list(self)[index]
        return InvertibleSequential(*modules) if isinstance(modules, list) else modules

    def inverse(self, y: Tensor, **options: Any) -> Tensor:
        """The x that is mapped to y; options as for :meth:`InvertibleResidualBlock.inverse`.

        Raises:
            NotConvergedError: a block did not converge.
        """
        return self._run_back(y, options)[0]

    def solve_inverse(self, y: Tensor, **options: Any) -> ChainInverseResult:
        """Invert, run forward again, and report the measured residual and every block's result."""
        with frozen_state(self):
            x, blocks = self._run_back(y, options)
            with torch.no_grad():
                residual = sample_norms(self(x) - y) / sample_norms(y).clamp_min(1.0)
        converged = torch.ones(len(y), dtype=torch.bool, device=y.device)
        certified = converged & self._has_known_links()
        for block in blocks:
            converged, certified = converged & block.converged, certified & block.certified
        return ChainInverseResult(x, residual, converged, certified, tuple(blocks))

    def _has_known_links(self) -> bool:
        """Whether all that is not a residual block has an inverse that is exact by construction."""
        return all(
            part._has_known_links() if isinstance(part, InvertibleSequential) else type(part) in _KNOWN_LINKS
            for part in self
        )

    def _run_back(self, y: Tensor, options: dict[str, Any]) -> tuple[Tensor, list[InverseResult]]:
        results: list[InverseResult] = []
        x = y
        for module in reversed(self):
            if isinstance(module, InvertibleResidualBlock):
                results.append(module.solve_inverse(x, **options))
                x = results[-1].x
            elif isinstance(module, InvertibleSequential):
                x, inner = module._run_back(x, options)
                results += reversed(inner)
            else:
                with torch.no_grad():
                    x = module.inverse(x)
        return x, results[::-1]
