"""The invertible residual block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..solvers import InverseResult, invert_residual
from .spectral_norm import frozen_state


class InvertibleResidualBlock(nn.Module):
    """y = x + g(x), invertible where Lip(g) < 1 (Behrmann et al. 2019, Theorem 1).

    Args:
        g: any module that keeps the shape of its input and treats samples independently.

    Shape: (B, ...), kept.

    Example:
        >>> block = InvertibleResidualBlock(LipschitzMLP(2))
        >>> x = torch.randn(5, 2)
        >>> torch.allclose(block.inverse(block(x)), x, atol=1e-5)
        True
    """

    def __init__(self, g: nn.Module) -> None:
        super().__init__()
        if not isinstance(g, nn.Module):
            raise TypeError(f"g must be an nn.Module, got {type(g).__name__}")
        self.g = g
        self._proof: tuple[float, tuple[Any, ...]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map x to x + g(x)."""
        image: Tensor = self.g(x)
        if image.shape != x.shape:
            raise ValueError(
                f"the residual branch maps shape {tuple(x.shape)} to {tuple(image.shape)}; x + g(x) needs a branch "
                "that keeps it"
            )
        return x + image

    def inverse(self, y: Tensor, **options: Any) -> Tensor:
        """The x with x + g(x) = y; see :meth:`solve_inverse` for options, errors and guarantees.

        Raises:
            NotConvergedError: rather than return a wrong x, unless ``on_failure`` says otherwise.
        """
        return self.solve_inverse(y, **options).x

    def solve_inverse(self, y: Tensor, **options: Any) -> InverseResult:
        """Invert, and report residual, error bound and convergence per sample.

        The normalised weights are computed once, and no state changes, in training mode either. Where ``certify`` or
        ``enforce`` has proven Lip(g) and the weights have not changed since, the result is certified.

        Args:
            y: (B, ...) outputs of the block.
            **options: ``tol``, ``max_iterations``, ``x0``, ``on_failure`` of :func:`invert_residual`; ``lipschitz``
                overrides the proven constant.

        Raises:
            NotConvergedError: samples that did not converge.
            RuntimeError: dropout or batch normalisation in training mode: such a branch has no inverse.
        """
        self._check_deterministic()
        options.setdefault("lipschitz", self.proven_lipschitz())
        with torch.no_grad(), frozen_state(self.g):
            return invert_residual(self.g, y, **options)

    def attach_proof(self, lipschitz: float | None) -> None:
        """Record a proven Lipschitz bound of g, valid for its parameters, buffers and mode as they are now."""
        self._proof = None if lipschitz is None else (lipschitz, self._fingerprint())

    def proven_lipschitz(self) -> float | None:
        """The proven bound of Lip(g) where it is below 1 and still valid; None once a weight has changed."""
        if self._proof is None or self._proof[0] >= 1 or self._proof[1] != self._fingerprint():
            return None
        return self._proof[0]

    @torch.no_grad()
    def _fingerprint(self) -> tuple[Any, ...]:
        """Changes when g's structure, mode or any value does; sums see what ``.data`` hides from ``_version``."""
        tensors = [*self.g.parameters(), *self.g.buffers()]
        versions = tuple((t.data_ptr(), t._version) for t in tensors)
        modes = tuple((type(module), module.training) for module in self.g.modules())
        sums = tuple(float(t.double().square().sum()) for t in tensors)
        return versions, modes, sums

    def _check_deterministic(self) -> None:
        for name, module in self.g.named_modules():
            random = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
            if module.training and (random or isinstance(module, nn.modules.batchnorm._BatchNorm)):
                raise RuntimeError(
                    f"the branch has no inverse while {name or 'it'} ({type(module).__name__}) is in training mode. "
                    "Remedy: model.eval() first"
                )
