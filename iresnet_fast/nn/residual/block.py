"""The invertible residual block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from ...estimators import Estimator, LogDet, check_same_shape, default_estimator
from ...ops.arguments import can_look, check_choice
from ...solvers import InverseResult, NotConvergedError, attach_branch_gradient, invert_residual, solve_values
from ..bijections.base import Bijection
from ..fuse import fused_weights
from ..inspection import Fingerprint, fingerprint, foreign_hooks, parts_of
from ..sharding import sharded_parts, unsharded
from ..spectral_norm import SpectralNorm
from ..weights import Snapshot, frozen_state, is_frozen
from .inverse import PATHS, Branch, invert_branch, read_branch
from .structure import image_and_jacobian


class InvertibleResidualBlock(Bijection):
    """y = x + g(x), invertible where Lip(g) < 1 (Behrmann et al. 2019, Theorem 1).

    Args:
        g: any module that keeps the shape of its input and treats samples independently.
        estimator: of the log-determinant, from :mod:`iresnet_fast.estimators`. None: exact for samples of up to 16
            values, else :class:`~iresnet_fast.estimators.NeumannGradient`, which is unbiased.

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
        self._proof: tuple[float, Fingerprint] | None = None
        self._known: tuple[Fingerprint, Branch | str] | None = None

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

    def inverse(self, y: Tensor, **options: Any) -> Tensor:
        """The x with x + g(x) = y; see :meth:`solve_inverse` for options, errors and guarantees.

        Raises:
            NotConvergedError: rather than return a wrong x, unless ``on_failure`` says otherwise.
        """
        return self.solve_inverse(y, **options).x

    def solve_inverse(self, y: Tensor, **options: Any) -> InverseResult:
        """Invert, and report residual, error bound and convergence per sample.

        The normalised weights are computed once, and no state changes, in training mode either. Where ``certify`` or
        ``enforce`` has proven Lip(g) and the weights have not changed since, the result is certified. The result's x
        has a gradient in y and the parameters, by the implicit function theorem: no iterate is stored.

        Args:
            y: (B, ...) outputs of the block. The branch is evaluated as a forward would be here: under
                ``torch.autocast`` or with TF32 it is another function, and x is its inverse.
            **options: ``tol``, ``max_iterations``, ``x0``, ``method``, ``on_failure``, ``patience`` and ``compact`` of
                :func:`invert_residual`; ``lipschitz`` overrides the proven constant. ``path``: ``"auto"`` inverts the
                whole block by one op where there is one for the branch, device and dtype
                (:func:`iresnet_fast.ops.mlp_inverse`, :func:`iresnet_fast.ops.bottleneck_inverse`); ``"general"`` by
                the solver that takes any branch; ``"fused"`` is an error where there is no such op. The result says
                which, and why. ``iterate_in``: ``torch.float16`` or ``torch.bfloat16`` to evaluate the branch in low
                precision first and in y's own at the end, which decides; the result's ``precision`` says so. Inside a
                transform of ``torch.func`` the solve takes the general path in y's own precision, without a proof.

        Raises:
            NotConvergedError: samples that did not converge; in the backward, too.
            ValueError: ``path="fused"`` for a branch that no op inverts; arguments out of their range.
            RuntimeError: dropout or batch normalisation in training mode: such a branch has no inverse.
        """
        if sharded_parts(self):
            with unsharded(self):
                return self._solve_inverse(y, options)
        return self._solve_inverse(y, options)

    def _solve_inverse(self, y: Tensor, options: dict[str, Any]) -> InverseResult:
        if unpack_dual(y).tangent is not None:
            raise RuntimeError("an inverse has no forward-mode derivative. Use jacrev or backward in place of jvp")
        if torch._C._are_functorch_transforms_active():
            return self._solve_transformed(y, options)
        now, known = fingerprint(self.g), self._known
        if known is None or known[0] != now:
            self.check_invertible()
        options.setdefault("lipschitz", self._still_proven(now))
        if not torch.is_grad_enabled():
            return self._solve(y, self._read(now), options)
        with frozen_state(self.g):
            snapshot = Snapshot(self.g)
            with snapshot.held():
                result = self._solve(y, None, options)
        return self._attach_gradient(y, result, snapshot, options) if snapshot.needs_gradient(y) else result

    def _solve_transformed(self, y: Tensor, options: dict[str, Any]) -> InverseResult:
        """Inside a transform of ``torch.func``: by the general path, and without a proof, which needs values."""
        check_choice("path", options.get("path", "auto"), PATHS)
        if options.get("path") == "fused":
            raise ValueError("path='fused' does not work inside a transform of torch.func. Use path='auto'")
        self.check_invertible()
        with frozen_state(self.g):
            snapshot = Snapshot(self.g)
        rest = {key: value for key, value in options.items() if key not in ("x0", "path", "iterate_in")}

        def solve(y: Tensor, x0: Tensor, tensors: Sequence[Tensor]) -> InverseResult:
            reason = "inside a transform of torch.func"
            result = invert_residual(lambda x: snapshot.call(x, tensors), y, x0=x0, **rest)
            return replace(result, reason=reason)

        x0 = options.get("x0")
        result = solve_values(solve, y, y if x0 is None else x0, snapshot.tensors)
        return self._attach_gradient(y, result, snapshot, options)

    def _attach_gradient(
        self, y: Tensor, result: InverseResult, snapshot: Snapshot, options: dict[str, Any]
    ) -> InverseResult:
        adjoint = {key: options[key] for key in ("tol", "max_iterations", "lipschitz", "method") if key in options}
        x = attach_branch_gradient(snapshot.call, y, result.x, snapshot.tensors, **adjoint)
        return replace(result, x=x)

    def _solve(self, y: Tensor, branch: Branch | str | None, options: dict[str, Any]) -> InverseResult:
        try:
            result = invert_branch(self.g, convolution_layout(self.g, y), branch, **options)
            return replace(result, x=result.x.contiguous()) if y.is_contiguous() else result
        except (NotConvergedError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:
            # The branch refuses y: say what does not fit, where that can be seen.
            weight = next(self.g.parameters(), None)
            if weight is not None and (weight.dtype != y.dtype or weight.device != y.device):
                raise ValueError(
                    f"the block has weights of {weight.dtype} on {weight.device}, but y is {y.dtype} on {y.device}. "
                    f"Remedy: y.to({str(weight.device)!r}, {weight.dtype})"
                ) from error
            error.add_note(f"while inverting y of shape {tuple(y.shape)}, which this branch may not take")
            raise

    def attach_proof(self, lipschitz: float | None) -> None:
        """Record a proven Lipschitz bound of g, valid for its parameters, buffers and mode as they are now."""
        self._proof = None if lipschitz is None else (lipschitz, fingerprint(self.g))

    def proven_lipschitz(self) -> float | None:
        """The proven bound of Lip(g) where it is below 1 and still valid; None once a weight has changed."""
        return None if self._proof is None else self._still_proven(fingerprint(self.g))

    def _still_proven(self, now: Fingerprint) -> float | None:
        if self._proof is None or self._proof[0] >= 1 or self._proof[1] != now:
            return None
        if not self._is_plain():
            return None
        return self._proof[0]

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
        return {**self.__dict__, "_known": None}

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
