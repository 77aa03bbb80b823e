"""A chain of invertible modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...estimators import Estimator, LogDet
from ...ops.arguments import can_look
from ...solvers import ROUNDING, InverseResult, NotConvergedError, sample_norms
from ..bijections.base import Bijection, apply_with_log_det, no_volume_change
from ..bijections.injective_pad import InjectivePad
from ..bijections.split import Split
from ..inspection import foreign_hooks, has_own, obstacle, stated_by
from ..sharding import unsharded
from ..weights import frozen_state
from .block import InvertibleResidualBlock, convolution_layout
from .recompute import apply_recomputing

Progress = Callable[[int, int, InverseResult], None]


@dataclass(frozen=True)
class ChainInverseResult:
    """Inverse of a chain, with what was measured and what is proven.

    Attributes:
        x: (B, ...) the solution.
        residual: (B,) measured ‖F(x) − y‖/max(1, ‖y‖).
        error_bound: (B,) bound of the distance to the true x: every block's own bound, grown by 1/(1 − L) in each
            block before it and by the scales of ActNorm (Behrmann et al. 2019, Lemma 2). It is honest and may be
            huge; NaN where a block or link has no proof.
        converged: (B,) bool, whether every block's solve met its stopping rule, and no :class:`InjectivePad` found its
            y outside of its range.
        certified: (B,) bool, whether every one did so by a proven bound, and nothing stands between them but modules
            of :mod:`iresnet_fast.nn` as they are: without hooks or methods of their own.
        blocks: the :class:`InverseResult` of every residual block, in the order of the forward.
    """

    x: Tensor
    residual: Tensor
    error_bound: Tensor
    converged: Tensor
    certified: Tensor
    blocks: tuple[InverseResult, ...]


class InvertibleSequential(nn.Sequential, Bijection):
    """Invertible modules one after the other; ``inverse`` runs them backwards.

    Args:
        *modules: each with ``forward`` and ``inverse``.
        recompute: ``"inverse"`` stores nothing but input and output for the backward and recomputes every module's
            input by its inverse: the activations kept do not grow with depth, and a step takes longer. Every module
            must then be invertible while training; dropout is replayed, batch normalisation in training mode is an
            error. None stores activations, as PyTorch does.

    Raises:
        TypeError: a module without an ``inverse``.
        ValueError: another ``recompute``.
    """

    def __init__(self, *modules: nn.Module, recompute: str | None = None) -> None:
        super().__init__()
        if recompute not in (None, "inverse"):
            raise ValueError(f"recompute must be None or 'inverse', got {recompute!r}")
        self.recompute = recompute
        for module in modules:
            self.append(module)

    def forward(self, x: Tensor) -> Tensor:
        """Run all modules in order."""
        transformed = torch._C._are_functorch_transforms_active()  # which keep activations
        if self.recompute and torch.is_grad_enabled() and not transformed and len(self):
            return apply_recomputing(self, list(self._leaves()), x)
        y: Tensor = super().forward(x)
        return y

    def _leaves(self) -> Iterator[nn.Module]:
        """All modules in order; those of chains within in place of the chains."""
        for module in self:
            if type(module) is InvertibleSequential and not foreign_hooks(module):
                yield from module._leaves()
            else:
                yield module

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
        return InvertibleSequential(*modules, recompute=self.recompute) if isinstance(modules, list) else modules

    def inverse(self, y: Tensor, *, progress: Progress | None = None, **options: Any) -> Tensor:
        """The x that is mapped to y, with a gradient in y and the parameters.

        Args:
            y: (B, ...) outputs of the chain.
            progress: called after each residual block as ``progress(blocks done, blocks in all, its result)``. What
                it raises (as does Ctrl-C) ends the inverse, and leaves the modules as they were.
            **options: as for :meth:`InvertibleResidualBlock.solve_inverse`.

        Raises:
            NotConvergedError: a block did not converge; it is named.
        """
        with unsharded(self):
            return _ReverseRun(self, options, progress, bounds=False).run(y)

    def estimate_log_det(self, x: Tensor, estimator: Estimator | None = None) -> tuple[Tensor, LogDet]:
        """Run all modules in order, and sum their log-determinants; activations are stored, whatever ``recompute``.

        Args:
            x: (B, ...) inputs.
            estimator: of every residual block, in place of its own.

        Raises:
            TypeError: a module has no log-determinant.
            RuntimeError: a module has hooks, which may change what it computes.
        """
        total = LogDet.exactly(no_volume_change(x))
        for name, module in self._modules.items():  # a module may stand in it twice
            x, log_det = apply_with_log_det(name, module, x, estimator)
            total = total.plus(log_det)
        return x, total

    def solve_inverse(self, y: Tensor, *, progress: Progress | None = None, **options: Any) -> ChainInverseResult:
        """Invert, run forward again, and report the measured residual, the proven error bound and each block's result.

        Arguments and errors are those of :meth:`inverse`.
        """
        run = _ReverseRun(self, options, progress, bounds=True)
        with unsharded(self):
            x = run.run(y)
        with frozen_state(self), torch.no_grad():
            residual = sample_norms(self(x) - y) / sample_norms(y).clamp_min(1.0)
        converged = ~run.outside
        certified = converged & torch.isfinite(run.error_bound)
        for block in run.results:
            converged, certified = converged & block.converged, certified & block.certified
        return ChainInverseResult(x, residual, run.error_bound, converged, certified, tuple(run.results[::-1]))


class _ReverseRun:
    """One pass through a chain from its end to its start.

    Attributes:
        results: of the residual blocks, the last first.
        error_bound: (B,) of the distance from the true x, where bounds are wanted.
        outside: (B,) bool, which samples no x maps to; the same.
    """

    def __init__(
        self, chain: InvertibleSequential, options: dict[str, Any], progress: Progress | None, *, bounds: bool
    ) -> None:
        self._chain, self._options, self._progress, self._bounds = chain, options, progress, bounds
        self._total = sum(_count_blocks(part) for part in chain)
        self.results: list[InverseResult] = []
        self.error_bound = torch.empty(0)
        self.outside = torch.empty(0, dtype=torch.bool)

    def run(self, y: Tensor) -> Tensor:
        if "x0" in self._options:
            raise TypeError("x0 starts the iteration of one block; a chain of blocks takes none")
        if self._bounds:
            self.error_bound = torch.zeros_like(sample_norms(y.detach()))
            self.outside = torch.zeros(len(y), dtype=torch.bool, device=y.device)
        x = self._module_inverse(self._chain, convolution_layout(self._chain, y), "")
        return x.contiguous() if y.is_contiguous() else x

    def _module_inverse(self, module: nn.Module, y: Tensor, path: str) -> Tensor:
        kind = next((kind for kind in _OPENED if isinstance(module, kind)), None)
        if kind is None or (module is not self._chain and has_own(module, "inverse", kind)):
            return self._link_inverse(module, y)
        x: Tensor = _OPENED[kind](self, module, y, path)
        if self._bounds and obstacle(module, kind):  # then its forward is not what it seems
            self.error_bound = torch.full_like(self.error_bound, math.nan)
        return x

    def _chain_inverse(self, chain: InvertibleSequential, y: Tensor, path: str) -> Tensor:
        for name, part in reversed(chain._modules.items()):
            if part is not None:
                y = self._module_inverse(part, y, f"{path}.{name}" if path else name)
        return y

    def _split_inverse(self, split: Split, z: Tensor, path: str) -> Tensor:
        latents, factored = split.parts_of_latents(z)
        before = self.error_bound
        kept = self._module_inverse(split.rest, latents, f"{path}.rest")
        if self._bounds:
            self.error_bound = torch.hypot(before, self.error_bound)
        return split.join(kept, factored)

    def _link_inverse(self, link: nn.Module, y: Tensor) -> Tensor:
        # Modules of ours take the options of an inverse; of others nothing is known.
        x: Tensor = link.inverse(y, **(self._options if isinstance(link, Bijection) else {}))  # type: ignore[operator]  # torch types attributes of modules as Tensor | Module
        if self._bounds:
            self._bound_link(link, x.detach(), y.detach())
        return x

    def _bound_link(self, link: nn.Module, x: Tensor, y: Tensor) -> None:
        growth = math.nan
        if can_look(y) and isinstance(link, Bijection) and not obstacle(link, stated_by(link)):
            constant = link.lipschitz()[1]
            growth = math.nan if constant is None else constant
        if isinstance(link, InjectivePad):
            self.outside = self.outside | link.outside(y)
            # The true y has zeros in the appended channels: where these are farther off than y can be, there is none.
            outside = sample_norms(y[:, x.shape[1] :]) > self.error_bound
            self.error_bound = torch.where(outside, math.nan, self.error_bound)
        size = torch.maximum(sample_norms(x), sample_norms(y) * growth)
        self.error_bound = self.error_bound * growth + ROUNDING * torch.finfo(y.dtype).eps * size

    def _block_inverse(self, block: InvertibleResidualBlock, y: Tensor, path: str) -> Tensor:
        try:
            result = block.solve_inverse(y, **self._options)
        except NotConvergedError as error:
            raise NotConvergedError(f"block {path}: {error}", error.result) from error
        except (TypeError, ValueError, RuntimeError) as error:
            error.add_note(f"in block {path}")
            raise
        self.results.append(result)
        if self._bounds:
            growth = math.nan if result.lipschitz is None else 1 / (1 - result.lipschitz)
            self.error_bound = self.error_bound * growth + result.error_bound
        if self._progress is not None:
            self._progress(len(self.results), self._total, result)
        return result.x


# What is inverted part by part, and how.
_OPENED: dict[type[nn.Module], Callable[[_ReverseRun, Any, Tensor, str], Tensor]] = {
    InvertibleSequential: _ReverseRun._chain_inverse,
    InvertibleResidualBlock: _ReverseRun._block_inverse,
    Split: _ReverseRun._split_inverse,
}


def _count_blocks(module: nn.Module) -> int:
    """Residual blocks of a chain and of the chains within, as often as they stand there."""
    kind = next((kind for kind in _OPENED if isinstance(module, kind)), None)
    if kind is None or has_own(module, "inverse", kind):
        return 0
    if isinstance(module, InvertibleSequential):
        return sum(_count_blocks(part) for part in module)
    return _count_blocks(module.rest) if isinstance(module, Split) else 1
