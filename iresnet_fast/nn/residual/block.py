"""The invertible residual block."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from ...estimators import Estimator, LogDet, check_same_shape, default_estimator
from ...ops.arguments import can_look, check_choice
from ...solvers import (
    ExactBranch,
    InverseResult,
    StoppingRule,
    attach_branch_gradient,
    iterate,
    prove,
    report_failure,
    solve_values,
)
from ..bijections.base import Bijection
from ..fuse import fused_weights
from ..inspection import Fingerprint, fingerprint, foreign_hooks, parts_of
from ..sharding import sharded_parts, unsharded
from ..spectral_norm import SpectralNorm
from ..weights import Snapshot, frozen_state, holds_other_weights, is_frozen
from .exact import exact_branch
from .inverse import PATHS, Branch, invert_branch, read_branch
from .structure import image_and_jacobian


class _Proof(NamedTuple):
    """What is proven of a branch, and of which: its constant, the norms of its layers, its fingerprint."""

    lipschitz: float
    norms: Mapping[str, float]
    of: Fingerprint


class InvertibleResidualBlock(Bijection):
    """y = x + g(x), invertible where Lip(g) < 1 (Behrmann et al. 2019, Theorem 1).

    Args:
        g: any module that keeps the shape of its input and treats samples independently.
        estimator: of the log-determinant, from :mod:`iresnet_fast.estimators`. None: exact for samples of up to 16
            values, else :class:`~iresnet_fast.estimators.NeumannGradient`, which is unbiased where Lip(g) < 1.

    Shape: (B, ...), kept.

    Example:
        >>> block = InvertibleResidualBlock(LipschitzMLP(2))
        >>> x = torch.randn(5, 2)
        >>> torch.allclose(block.inverse(block(x)), x, atol=1e-5)
        True
    """

    def __init__(self, g: nn.Module, *, estimator: Estimator | None = None) -> None:
        super().__init__()
        if not isinstance(g, nn.Module):
            raise TypeError(f"g must be an nn.Module, got {type(g).__name__}")
        self.g = g
        self.estimator = estimator
        self._proof: _Proof | None = None
        self._known: tuple[Fingerprint, Branch | str] | None = None
        self._exact: tuple[tuple[Fingerprint, int | None], ExactBranch | str] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map x to x + g(x)."""
        if not x.is_floating_point():
            raise TypeError(f"x must be of floating point, got {x.dtype}")
        return x + self._branch(x)

    def _branch(self, x: Tensor) -> Tensor:
        """The residual branch, held to what the block needs of it."""
        tracked = not (torch.compiler.is_compiling() or x.is_inference())
        version = x._version if tracked else None
        image: Tensor = self.g(x)
        if version is not None and x._version != version:
            raise ValueError("the branch changes its input in place, so x + g(x) is lost. Remedy: inplace=False")
        check_same_shape(x, image)
        return image

    def estimate_log_det(self, x: Tensor, estimator: Estimator | None = None) -> tuple[Tensor, LogDet]:
        """Map x to x + g(x), and estimate log|det(I + J_g(x))|.

        g is evaluated once, with the weights that a forward would use now. Where ``certify`` or ``enforce`` has proven
        Lip(g) and the weights have not changed since, the result carries what that proves.

        Args:
            x: (B, ...) inputs.
            estimator: in place of the block's own.

        Returns:
            y (B, ...), and a :class:`LogDet` with values (B,) in float32 or better.

        Raises:
            RuntimeError: dropout or batch normalisation in training mode: x + g(x) is no bijection then.
        """
        if not x.is_floating_point():
            raise TypeError(f"x must be of floating point, got {x.dtype}")
        self.check_invertible()
        self._check_hooks()
        estimator = estimator or self.estimator or default_estimator(x[:1].numel())
        lipschitz = None if self.training or not can_look(x) else self.proven_lipschitz()
        known = {"lipschitz": lipschitz, "assumed": self._assumed_lipschitz()}
        branch = _DifferentiableBranch(self)
        if torch.compiler.is_compiling():
            # Power iterations write to their buffers, which the transforms that are traced there do not allow inside.
            with fused_weights(self.g):
                image, log_det = estimator(branch, x, **known)
        else:
            image, log_det = estimator(branch, x, **known)
        return x + image, log_det

    def _is_plain(self) -> bool:
        """Return true if the block computes x + g(x), and no hook or other forward makes something else of it."""
        return type(self).forward is _FORWARD and "forward" not in self.__dict__ and not foreign_hooks(self)

    def _check_hooks(self) -> None:
        """Raise where something changes what a log-determinant is made of: the image, or products with gradients."""
        if not self._is_plain():
            raise RuntimeError(
                "the block has forward hooks or a forward of its own, which see no log-det. Change its branch g instead"
            )
        for part in parts_of(self):
            if part._backward_hooks or part._backward_pre_hooks:
                raise RuntimeError(
                    f"{type(part).__name__} has backward hooks, which may change the vector-Jacobian products that a "
                    "log-determinant is made of. Remove them, or hook the parameters' gradients"
                )

    def _assumed_lipschitz(self) -> float | None:
        """What the coefficients of the branch's layers aim at, without a proof; None where there are none."""
        coefficients = [part.coeff for part in parts_of(self.g) if isinstance(part, SpectralNorm)]
        return math.prod(coefficients) if coefficients else None

    def inverse(
        self,
        y: Tensor,
        *,
        tol: float | None = None,
        max_iterations: int | None = None,
        x0: Tensor | None = None,
        method: str = "anderson",
        patience: int = 20,
        on_failure: str = "raise",
        lipschitz: float | None = None,
        path: str = "auto",
        iterate_in: torch.dtype | None = None,
    ) -> Tensor:
        """The x with x + g(x) = y, without a proof of how near it is; :meth:`solve_inverse` proves.

        The normalized weights are computed once, and no state changes, in training mode either. x has a gradient in y
        and the parameters, by the implicit function theorem: no iterate is stored.

        Args:
            y: (B, ...) outputs of the block, of floating point. The branch is evaluated as a forward would be here:
                under ``torch.autocast`` or with TF32 it is another function, and x is its inverse.
            tol: a sample converges when its residual is at most tol·max(1, ‖y‖). Default: 1e-6, or what the precision
                in force resolves; see :class:`iresnet_fast.solvers.StoppingRule`.
            max_iterations: limit of steps per sample. Default: the a-priori bound that a proven Lipschitz constant
                gives, 1000 without one.
            x0: (B, ...) start of the iteration. Default: y.
            method: ``"anderson"`` or ``"picard"``.
            patience: evaluations without a smaller residual after which a sample has stalled.
            on_failure: ``"raise"``, ``"warn"`` or ``"return"``, where a sample does not converge.
            lipschitz: a constant of g that you have proven, in place of the certificate's.
            path: ``"auto"`` inverts the whole block by one op where there is one for the branch, device and dtype
                (:func:`iresnet_fast.ops.mlp_inverse`, :func:`iresnet_fast.ops.bottleneck_inverse`); ``"general"`` by
                the solver that takes any branch; ``"fused"`` is an error where there is no such op.
            iterate_in: ``torch.float16`` or ``torch.bfloat16`` to evaluate the branch in low precision first and in
                y's own at the end, which decides.

        Raises:
            NotConvergedError: samples that did not converge; in the backward, too.
            ValueError: ``path="fused"`` for a branch that no op inverts; arguments out of their range.
            RuntimeError: dropout or batch normalization in training mode: such a branch has no inverse.
        """
        rule = StoppingRule(tol, max_iterations, lipschitz, method, patience, on_failure)
        return self._solve_inverse(y, rule, x0, path, iterate_in, certify=False).x

    def solve_inverse(
        self,
        y: Tensor,
        *,
        tol: float | None = None,
        max_iterations: int | None = None,
        x0: Tensor | None = None,
        method: str = "anderson",
        patience: int = 20,
        on_failure: str = "raise",
        lipschitz: float | None = None,
        path: str = "auto",
        iterate_in: torch.dtype | None = None,
        certify: bool = True,
    ) -> InverseResult:
        """Invert, and report residual, proven error bound and convergence per sample.

        Where ``certify`` or ``enforce`` has proven Lip(g) and the weights have not changed since, one evaluation of the
        branch in float64 bounds the distance to the exact x, rounding included. Where that is above the tolerance, the
        iteration goes on in float64, and x is the rounded result. A missing proof raises nothing: the result says why.

        Args:
            y: (B, ...) outputs of the block; the other arguments, too, are those of :meth:`inverse`.
            tol: also of the error that is certified, relative to max(1, ‖x‖).
            max_iterations: limit of steps, those in float64 among them.
            x0: start of the iteration.
            method: ``"anderson"`` or ``"picard"``.
            patience: evaluations until a stall.
            on_failure: ``"raise"``, ``"warn"`` or ``"return"``.
            lipschitz: a constant of g that you have proven.
            path: ``"auto"``, ``"general"`` or ``"fused"``.
            iterate_in: low precision to begin with.
            certify: False for no proof, and the cost of :meth:`inverse`.

        Raises:
            NotConvergedError: samples that are neither converged nor certified.
            ValueError, RuntimeError: as for :meth:`inverse`.
        """
        rule = StoppingRule(tol, max_iterations, lipschitz, method, patience, on_failure)
        return self._solve_inverse(y, rule, x0, path, iterate_in, certify=certify)

    def _solve_inverse(
        self,
        y: Tensor,
        rule: StoppingRule,
        x0: Tensor | None,
        path: str,
        iterate_in: torch.dtype | None,
        *,
        certify: bool,
    ) -> InverseResult:
        if sharded_parts(self):
            with unsharded(self):
                return self._solve_whole(y, rule, x0, path, iterate_in, certify=certify)
        return self._solve_whole(y, rule, x0, path, iterate_in, certify=certify)

    def _solve_whole(
        self,
        y: Tensor,
        rule: StoppingRule,
        x0: Tensor | None,
        path: str,
        iterate_in: torch.dtype | None,
        *,
        certify: bool,
    ) -> InverseResult:
        if isinstance(y, Tensor) and unpack_dual(y).tangent is not None:
            raise RuntimeError("an inverse has no forward-mode derivative. Use jacrev or backward in place of jvp")
        if torch._C._are_functorch_transforms_active():
            return self._solve_transformed(y, rule.for_(y), x0, path)
        now, known = fingerprint(self.g), self._known
        if known is None or known[0] != now:
            self.check_invertible()
        if rule.lipschitz is None:
            rule = replace(rule, lipschitz=self._still_proven(now))
        rule = rule.for_(y, x0)
        snapshot = None
        if not torch.is_grad_enabled():
            result = self._solve(y, rule, self._read(now), x0, path, iterate_in)
        else:
            with frozen_state(self.g):
                snapshot = Snapshot(self.g)
                with snapshot.held():
                    result = self._solve(y, rule, None, x0, path, iterate_in)
        if certify:
            result = prove(result, y.detach(), self._exact_branch(now, y), rule)
        report_failure(result, y, rule)
        if snapshot is not None and snapshot.needs_gradient(y):
            return self._attach_gradient(y, result, snapshot, rule)
        return result

    def _solve_transformed(self, y: Tensor, rule: StoppingRule, x0: Tensor | None, path: str) -> InverseResult:
        """Inside a transform of ``torch.func``: by the general path, and without a proof, which needs values."""
        check_choice("path", path, PATHS)
        if path == "fused":
            raise ValueError("path='fused' does not work inside a transform of torch.func. Use path='auto'")
        self.check_invertible()
        with frozen_state(self.g):
            snapshot = Snapshot(self.g)

        def solve(y: Tensor, x0: Tensor, tensors: Sequence[Tensor]) -> InverseResult:
            with torch.no_grad():
                result = iterate(lambda x: snapshot.call(x, tensors), y, rule, x0=x0)
            report_failure(result, y, rule)
            why = "inside a transform of torch.func"
            return replace(result, reason=why, unproven=why)

        result = solve_values(solve, y, y if x0 is None else x0, snapshot.tensors)
        return self._attach_gradient(y, result, snapshot, rule)

    def _attach_gradient(
        self, y: Tensor, result: InverseResult, snapshot: Snapshot, rule: StoppingRule
    ) -> InverseResult:
        return replace(result, x=attach_branch_gradient(snapshot.call, y, result.x, snapshot.tensors, rule))

    def _solve(
        self,
        y: Tensor,
        rule: StoppingRule,
        branch: Branch | str | None,
        x0: Tensor | None,
        path: str,
        iterate_in: torch.dtype | None,
    ) -> InverseResult:
        try:
            with torch.no_grad():
                result = invert_branch(
                    self.g, convolution_layout(self.g, y), rule, branch, x0=x0, path=path, iterate_in=iterate_in
                )
            return replace(result, x=result.x.contiguous()) if y.is_contiguous() else result
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # The branch refuses y: say what does not fit, where that can be seen.
            weight = next(self.g.parameters(), None)
            if weight is not None and (weight.dtype != y.dtype or weight.device != y.device):
                raise ValueError(
                    f"the block has weights of {weight.dtype} on {weight.device}, but y is {y.dtype} on {y.device}. "
                    f"Use y.to({str(weight.device)!r}, {weight.dtype})"
                ) from error
            error.add_note(f"while inverting y of shape {tuple(y.shape)}, which this branch may not take")
            raise

    def attach_proof(self, lipschitz: float | None, norms: Mapping[str, float] | None = None) -> None:
        """Record a proven Lipschitz bound of g, valid for its parameters, buffers and mode as they are now.

        Args:
            lipschitz: the bound; None withdraws what was recorded before.
            norms: proven norms of its layers, by their names in g.
        """
        self._exact = None
        self._proof = None if lipschitz is None else _Proof(lipschitz, norms or {}, fingerprint(self.g))

    def proven_lipschitz(self) -> float | None:
        """The proven bound of Lip(g) where it is below 1 and still valid; None once a weight has changed."""
        return None if self._proof is None else self._still_proven(fingerprint(self.g))

    def _still_proven(self, now: Fingerprint) -> float | None:
        if self._proof is None or self._proof.lipschitz >= 1 or self._proof.of != now:
            return None
        if is_frozen(self.g) and holds_other_weights(self.g):
            return None
        return self._proof.lipschitz if self._is_plain() else None

    def exact_branch(self, y: Tensor) -> tuple[float | None, ExactBranch | str]:
        """Return the proven bound of Lip(g), and g in float64 for outputs like y, or why it is not evaluated there."""
        now = fingerprint(self.g)
        return self._still_proven(now), self._exact_branch(now, y)

    def _exact_branch(self, now: Fingerprint, y: Tensor) -> ExactBranch | str:
        """The branch in float64, kept until it changes."""
        norms = {} if self._proof is None or self._proof.of != now else self._proof.norms
        features = y.shape[1] if y.dim() == 2 else None
        if is_frozen(self.g):  # the weights in place may be others
            return exact_branch(self.g, norms, features)
        known, kind = self._exact, (now, features)
        if known is None or known[0] != kind:
            known = kind, exact_branch(self.g, norms, features)
            self._exact = known
        return known[1]

    def _read(self, now: Fingerprint) -> Branch | str | None:
        """The branch with its normalized weights, kept until it changes."""
        if is_frozen(self.g):  # the weights in place may be others
            return None
        known = self._known
        if known is None or known[0] != now:
            known = now, read_branch(self.g)
            self._known = known if isinstance(known[1], str) or known[1].may_be_kept else None
        return known[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None, "_exact": None}

    def check_invertible(self, *, dropout_replayed: bool = False) -> None:
        """Raise where the branch is no function of each sample alone.

        Args:
            dropout_replayed: whether the caller repeats the same random numbers at every evaluation.

        Raises:
            RuntimeError: batch normalisation with statistics of the batch, or dropout in training mode.
        """
        suspects = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
        if not any(isinstance(part, suspects) for part in parts_of(self.g)):
            return
        for name, module in self.g.named_modules():
            batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
            if batch_norm and module.running_var is None:
                raise RuntimeError(
                    f"the branch has no inverse: {name or 'it'} ({type(module).__name__}) takes its statistics from "
                    "the batch in every mode. Remedy: track_running_stats=True"
                )
            random = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 and not dropout_replayed
            if module.training and (random or batch_norm):
                raise RuntimeError(
                    f"the branch has no inverse while {name or 'it'} ({type(module).__name__}) is in training mode. "
                    "Remedy: model.eval() first"
                )


_FORWARD = InvertibleResidualBlock.forward


class _DifferentiableBranch:
    """A block's branch as estimators take it."""

    def __init__(self, block: InvertibleResidualBlock) -> None:
        self._block = block

    def __call__(self, x: Tensor) -> Tensor:
        return self._block._branch(x)

    def image_and_jacobian(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        found = image_and_jacobian(self._block.g, x)
        if found is not None:
            check_same_shape(x, found[0])
        return found


def convolution_layout(module: nn.Module, y: Tensor) -> Tensor:
    """On a CPU, where its convolutions are faster so, y in channels_last; else y."""
    if y.device.type != "cpu" or y.dim() != 4 or not can_look(y):
        return y
    if not any(isinstance(part, nn.Conv2d) for part in module.modules()):
        return y
    return y.contiguous(memory_format=torch.channels_last)
