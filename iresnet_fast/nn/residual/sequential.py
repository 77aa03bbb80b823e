"""A chain of invertible modules."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...estimators import Estimator, LogDet
from ...ops.arguments import can_look
from ...solvers import InverseResult, NotConvergedError, StoppingRule, report_failure, sample_norms
from ..bijections.base import Bijection, apply_with_log_det, no_volume_change, options_of
from ..bijections.injective_pad import InjectivePad
from ..bijections.split import Split
from ..inspection import foreign_hooks, has_own, obstacle, stated_by
from ..sharding import unsharded
from ..weights import frozen_state
from .block import InvertibleResidualBlock, convolution_layout
from .proof import ChainProof, Step, prove_chain
from .recompute import apply_recomputing

Progress = Callable[[int, int, InverseResult], None]


@dataclass(frozen=True)
class ChainInverseResult:
    """Inverse of a chain, with what was measured and what is proven.

    Attributes:
        x: (B, ...) the solution.
        residual: (B,) measured ‖F(x) − y‖/max(1, ‖y‖); NaN where F is not defined at x.
        error_bound: (B,) float64, proven bound of the distance to the exact x, end to end and with rounding: the bound
            of every block, grown by 1/(1 − L) in each block before it (Behrmann et al. 2019, Lemma 2), and by what
            stands between them. NaN where nothing is proven.
        converged: (B,) bool, whether every block's solve met its stopping rule and x is in the domain and y in the
            range of the chain, or the sample is certified.
        certified: (B,) bool, whether error_bound is at most tol·max(1, ‖x‖) for every x within it.
        block_certified: (B,) bool, whether every block's own solve is certified, for the values that it was given.
        growth: how much the inverse can stretch an error of y: ∏ 1/(1 − L), with the factors of what stands between
            the blocks; None where it is not proven.
        unproven: why samples are not certified; None where all are.
        blocks: the :class:`InverseResult` of every residual block, in the order of the forward: its solve in y's dtype,
            and what was proven of that. Where the chain was solved again in float64, x differs a little from theirs.
    """

    x: Tensor
    residual: Tensor
    error_bound: Tensor
    converged: Tensor
    certified: Tensor
    block_certified: Tensor
    growth: float | None
    unproven: str | None
    blocks: tuple[InverseResult, ...]


class InvertibleSequential(nn.Sequential, Bijection):
    """Invertible modules one after the other; ``inverse`` runs them backwards.

    Args:
        *modules: each with ``forward`` and ``inverse``.
        recompute: ``"inverse"`` stores nothing but the output for the backward, and four numbers for each sample and
            module, and recomputes every module's input by its inverse: a step takes longer. Every module
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
        _check_invertible(index, module)
        super().insert(index, module)
        return self

    def __setitem__(self, index: int, module: nn.Module) -> None:
        """Replace a module; it must have an ``inverse``."""
        _check_invertible(index, module)
        super().__setitem__(index, module)

    def __add__(self, other: Iterable[nn.Module]) -> InvertibleSequential:
        """A chain of these modules and those of another one."""
        return InvertibleSequential(*self, *other, recompute=self.recompute)

    def __iadd__(self, other: Iterable[nn.Module]) -> InvertibleSequential:
        """Add the modules of another chain at the end."""
        for module in list(other):
            self.append(module)
        return self

    def __mul__(self, times: int) -> InvertibleSequential:
        """A chain of these modules so many times: the same modules, with the same parameters."""
        return InvertibleSequential(*(list(self) * operator.index(times)), recompute=self.recompute)

    def __getitem__(self, index: int | slice) -> Any:
        """One module, or a chain of those in a slice."""
        modules = list(self)[index]
        return InvertibleSequential(*modules, recompute=self.recompute) if isinstance(modules, list) else modules

    def inverse(
        self,
        y: Tensor,
        *,
        tol: float | None = None,
        max_iterations: int | None = None,
        method: str = "anderson",
        patience: int = 20,
        on_failure: str = "raise",
        path: str = "auto",
        iterate_in: torch.dtype | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """The x that is mapped to y, with a gradient in y and the parameters; nothing is proven of it.

        Args:
            y: (B, ...) outputs of the chain.
            tol: of every block; this and the next six as for :meth:`InvertibleResidualBlock.inverse`.
            max_iterations: limit of steps in each block.
            method: ``"anderson"`` or ``"picard"``.
            patience: evaluations until a stall.
            on_failure: ``"raise"``, ``"warn"`` or ``"return"``.
            path: ``"auto"``, ``"general"`` or ``"fused"``.
            iterate_in: low precision to begin with.
            progress: called after each residual block as ``progress(blocks done, blocks in all, its result)``. What
                it raises (as does Ctrl-C) ends the inverse, and leaves the modules as they were.

        Raises:
            NotConvergedError: a block did not converge; it is named.
        """
        options = _given(tol, max_iterations, method, patience, on_failure, path, iterate_in)
        with unsharded(self):
            return _ReverseRun(self, options, progress, keeps=False).run(y)

    def solve_inverse(
        self,
        y: Tensor,
        *,
        tol: float | None = None,
        max_iterations: int | None = None,
        method: str = "anderson",
        patience: int = 20,
        on_failure: str = "raise",
        path: str = "auto",
        iterate_in: torch.dtype | None = None,
        progress: Progress | None = None,
        certify: bool = True,
    ) -> ChainInverseResult:
        """Invert, run forward again, and report the measured residual and the proven error bound of every sample.

        Where every block's constant is proven, one evaluation of each block in float64 bounds the error end to end.
        Where that is above the tolerance, and float64 can do better, the blocks are solved again in float64 from there.
        A missing proof raises nothing: the result says why. Deep networks cannot have one: errors can grow by
        ∏ 1/(1 − L). ``block_certified`` and the residual then say how good the inverse is.

        Args:
            y: (B, ...) outputs of the chain; the other arguments, too, are those of :meth:`inverse`.
            tol: of every block, and of the error that is certified, relative to max(1, ‖x‖).
            max_iterations: limit of steps in each block.
            method: ``"anderson"`` or ``"picard"``.
            patience: evaluations until a stall.
            on_failure: ``"raise"``, ``"warn"`` or ``"return"``.
            path: ``"auto"``, ``"general"`` or ``"fused"``.
            iterate_in: low precision to begin with.
            progress: as for :meth:`inverse`.
            certify: False for no proof.

        Raises:
            NotConvergedError: a sample is neither converged nor certified.
        """
        options = _given(tol, max_iterations, method, patience, "return", path, iterate_in)
        rule = StoppingRule(tol, max_iterations, None, method, patience, on_failure).for_(y)
        certify = certify and can_look(y)
        run = _ReverseRun(self, options, progress, keeps=True)
        with unsharded(self):
            x = run.run(y)
        with unsharded(self):  # anew: a block shards its own parameters again
            nothing = torch.full((len(y),), math.nan, dtype=torch.float64, device=y.device)
            none = torch.zeros(len(y), dtype=torch.bool, device=y.device)
            proof = ChainProof(x.detach(), nothing, none, none, None, "no proof was asked for")
            if certify:
                proof = prove_chain(run.steps, y, rule.tolerance, max_iterations)
                x = _MovedTo.apply(proof.x, x) if x.requires_grad else proof.x
            residual = self._residual(x.detach(), y.detach())
        blocks = tuple(step.result for step in _flat(run.steps) if step.result is not None)[::-1]
        converged = ~run.outside & ~torch.isnan(residual)
        for block in blocks:
            converged = converged & block.converged
        certified = proof.certified & ~run.outside
        result = ChainInverseResult(
            x=x,
            residual=residual,
            error_bound=torch.where(run.outside, math.nan, proof.error_bound),
            converged=converged | certified,
            certified=certified,
            block_certified=proof.block_certified,
            growth=proof.growth,
            unproven=proof.unproven or ("outside of the chain's range" if bool(run.outside.any()) else None),
            blocks=blocks,
        )
        self._report_failure(result, run, y, rule)
        return result

    @torch.no_grad()
    def _residual(self, x: Tensor, y: Tensor) -> Tensor:
        """‖F(x) − y‖/max(1, ‖y‖) of each sample (B,); NaN of those that are outside of a module's domain."""
        rows = torch.arange(len(x), device=x.device)
        image = x
        with frozen_state(self):
            for link in self._leaves():
                outside = link.outside_domain(image) if isinstance(link, Bijection) and can_look(image) else None
                if outside is not None and bool(outside.any()):
                    image, rows = image[~outside], rows[~outside]
                image = link(image)
        residual = torch.full_like(sample_norms(y), math.nan)
        residual[rows] = sample_norms(image - y[rows]) / sample_norms(y[rows]).clamp_min(1.0)
        return residual

    def _report_failure(self, result: ChainInverseResult, run: _ReverseRun, y: Tensor, rule: StoppingRule) -> None:
        """Raise or warn, as the rule says, where a sample is neither converged nor certified."""
        if rule.on_failure == "return" or bool(result.converged.all()):
            return
        for step in _flat(run.steps):
            if step.result is not None and not bool((step.result.converged | result.certified).all()):
                try:
                    settled = step.result.converged | result.certified
                    report_failure(replace(step.result, converged=settled), step.y, rule)
                except NotConvergedError as error:
                    raise NotConvergedError(f"block {step.name}: {error}", error.result) from error
                return
        outside = run.outside if bool(run.outside.any()) else torch.isnan(result.residual)
        which = "range of the padded network" if outside is run.outside else "domain of the chain"
        samples = outside.nonzero().flatten().tolist()
        message = f"{len(samples)} of {len(y)} samples are outside the {which} (samples {str(samples[:5])[1:-1]})"
        if rule.on_failure == "raise":
            raise ValueError(message)
        warnings.warn(message, stacklevel=3)

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


def _check_invertible(index: int, module: nn.Module) -> None:
    if not callable(getattr(module, "inverse", None)):
        raise TypeError(f"module {index} ({type(module).__name__}) has no inverse method")


def _given(*values: Any) -> dict[str, Any]:
    """The options of an inverse that are not what they are by default."""
    return {name: value for (name, default), value in zip(_DEFAULTS.items(), values, strict=True) if value != default}


_DEFAULTS: dict[str, Any] = {"tol": None, "max_iterations": None, "method": "anderson", "patience": 20}
_DEFAULTS |= {"on_failure": "raise", "path": "auto", "iterate_in": None}


class _MovedTo(torch.autograd.Function):
    """Give x other values, bit for bit, and keep its gradient: that of the inverse at the x before."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, x: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def _flat(steps: list[Step]) -> Iterator[Step]:
    for step in steps:
        yield step
        yield from _flat(step.rest)


class _ReverseRun:
    """One pass through a chain from its end to its start.

    Attributes:
        steps: what has been inverted, the last module first, where they are kept.
        outside: (B,) bool, which samples no x maps to.
    """

    def __init__(
        self, chain: InvertibleSequential, options: dict[str, Any], progress: Progress | None, *, keeps: bool
    ) -> None:
        self._keeps = keeps
        self._chain, self._options, self._progress = chain, options, progress
        self._total = sum(_count_blocks(part) for part in chain)
        self._done = 0
        self.steps: list[Step] = []
        self.outside = torch.empty(0, dtype=torch.bool)

    def run(self, y: Tensor) -> Tensor:
        """Invert all modules; return x."""
        if not isinstance(y, Tensor) or y.dim() == 0:
            kind = "a tensor without axes" if isinstance(y, Tensor) else type(y).__name__
            raise TypeError(f"y must be a tensor (B, ...), got {kind}")
        self.outside = torch.zeros(len(y), dtype=torch.bool, device=y.device)
        x = self._module_inverse(self._chain, convolution_layout(self._chain, y), "")
        return x.contiguous() if y.is_contiguous() else x

    def _module_inverse(self, module: nn.Module, y: Tensor, path: str) -> Tensor:
        kind = next((kind for kind in _OPENED if isinstance(module, kind)), None)
        if kind is None or (module is not self._chain and has_own(module, "inverse", kind)):
            return self._link_inverse(module, y, path)
        first = len(self.steps)
        x: Tensor = _OPENED[kind](self, module, y, path)
        if reason := obstacle(module, kind):  # then its forward is not what it seems
            for step in self.steps[first:]:
                step.obstacle = step.obstacle or reason
        return x

    def _chain_inverse(self, chain: InvertibleSequential, y: Tensor, path: str) -> Tensor:
        for name, part in reversed(chain._modules.items()):
            if part is not None:
                y = self._module_inverse(part, y, f"{path}.{name}" if path else name)
        return y

    def _split_inverse(self, split: Split, z: Tensor, path: str) -> Tensor:
        latents, factored = split.parts_of_latents(z)
        outer, self.steps = self.steps, []
        kept = self._module_inverse(split.rest, latents, f"{path}.rest" if path else "rest")
        x = split.join(kept, factored)
        inner, self.steps = self.steps, outer
        self._keep(Step(split, path, z, x, rest=inner))
        return x

    def _link_inverse(self, link: nn.Module, y: Tensor, path: str) -> Tensor:
        if isinstance(link, InjectivePad) and can_look(y):
            self.outside = self.outside | link.outside(y)
        x = link.inverse(y, **options_of(link, self._options))  # type: ignore[operator]  # torch types attributes of modules as Tensor | Module
        why = "it is not an irf.nn.Bijection"
        if isinstance(link, Bijection):
            why = obstacle(link, stated_by(link)) or ""
        self._keep(Step(link, path, y, x, obstacle=why or None))
        return x

    def _keep(self, step: Step) -> None:
        if self._keeps:
            self.steps.append(step)

    def _block_inverse(self, block: InvertibleResidualBlock, y: Tensor, path: str) -> Tensor:
        try:
            result = block.solve_inverse(y, **self._options, certify=False)
        except NotConvergedError as error:
            raise NotConvergedError(f"block {path}: {error}", error.result) from error
        except (TypeError, ValueError, RuntimeError) as error:
            error.add_note(f"in block {path}")
            raise
        self._keep(Step(block, path, y, result.x, result))
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total, result)
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
