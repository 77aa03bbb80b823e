"""The inverse of a network whose invertible part is its trunk."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..nn import ChainInverseResult, InvertibleSequential
from ..nn.residual.sequential import Progress


class InvertibleModel(nn.Module):
    """A network with a ``trunk`` that is a chain of invertible modules."""

    trunk: InvertibleSequential

    def inverse(
        self,
        z: Tensor,
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
        """Data (B, *in_shape) whose latents are z; nothing is proven of it.

        Args:
            z: latents, of the shape that ``features`` returns.
            tol: of every block's residual; this and the others as for
                :meth:`iresnet_fast.nn.InvertibleSequential.inverse`.
            max_iterations: limit of steps in each block.
            method: ``"anderson"`` or ``"picard"``.
            patience: evaluations until a stall.
            on_failure: ``"raise"``, ``"warn"`` or ``"return"``.
            path: ``"auto"``, ``"general"`` or ``"fused"``.
            iterate_in: low precision to begin with.
            progress: called after each residual block.

        Raises:
            ValueError: z has another shape than the latents.
            NotConvergedError: a block did not converge.
        """
        self._check_latents(z)
        return self.trunk.inverse(
            z,
            tol=tol,
            max_iterations=max_iterations,
            method=method,
            patience=patience,
            on_failure=on_failure,
            path=path,
            iterate_in=iterate_in,
            progress=progress,
        )

    def solve_inverse(
        self,
        z: Tensor,
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
        """Invert, with the measured residual, the proven error bound and every block's result.

        Args:
            z: latents; the others as for :meth:`iresnet_fast.nn.InvertibleSequential.solve_inverse`.
            tol: of every block, and of the error that is certified.
            max_iterations: limit of steps in each block.
            method: ``"anderson"`` or ``"picard"``.
            patience: evaluations until a stall.
            on_failure: ``"raise"``, ``"warn"`` or ``"return"``.
            path: ``"auto"``, ``"general"`` or ``"fused"``.
            iterate_in: low precision to begin with.
            progress: called after each residual block.
            certify: False for no proof.

        Raises:
            ValueError: z has another shape than the latents.
            NotConvergedError: a sample is neither converged nor certified.
        """
        self._check_latents(z)
        return self.trunk.solve_inverse(
            z,
            tol=tol,
            max_iterations=max_iterations,
            method=method,
            patience=patience,
            on_failure=on_failure,
            path=path,
            iterate_in=iterate_in,
            progress=progress,
            certify=certify,
        )

    def _check_latents(self, z: Tensor) -> None:
        """Raise where z cannot be latents of this network."""
