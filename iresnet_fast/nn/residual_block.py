"""The invertible residual block."""

from __future__ import annotations

import zlib
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
        if not x.is_floating_point():
            raise TypeError(f"x must be of floating point, got {x.dtype}")
        tracked = not (torch.compiler.is_compiling() or x.is_inference())
        version = x._version if tracked else None
        image: Tensor = self.g(x)
        if version is not None and x._version != version:
            raise ValueError("the branch changes its input in place, so x + g(x) is lost. Remedy: inplace=False")
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
            y: (B, ...) outputs of the block. The branch is evaluated in y's dtype, outside any autocast.
            **options: ``tol``, ``max_iterations``, ``x0``, ``on_failure`` of :func:`invert_residual`; ``lipschitz``
                overrides the proven constant.

        Raises:
            NotConvergedError: samples that did not converge.
            RuntimeError: dropout or batch normalisation in training mode: such a branch has no inverse.
        """
        self._check_deterministic()
        options.setdefault("lipschitz", self.proven_lipschitz())
        with torch.no_grad(), torch.autocast(y.device.type, enabled=False), frozen_state(self.g):
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
        """Changes when a value, a setting, a hook, the mode or the structure of g does.

        The checksums see what ``.data`` hides from a tensor's version.
        """
        tensors = [*self.g.parameters(), *self.g.buffers()]
        return (
            tuple(_checksum(tensor) for tensor in tensors),
            tuple((id(module), type(module), _settings(module)) for module in self.g.modules()),
        )

    def _check_deterministic(self) -> None:
        for name, module in self.g.named_modules():
            batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
            if batch_norm and module.running_var is None:
                raise RuntimeError(
                    f"the branch has no inverse: {name or 'it'} ({type(module).__name__}) takes its statistics from "
                    "the batch in every mode. Remedy: track_running_stats=True"
                )
            random = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
            if module.training and (random or batch_norm):
                raise RuntimeError(
                    f"the branch has no inverse while {name or 'it'} ({type(module).__name__}) is in training mode. "
                    "Remedy: model.eval() first"
                )


def _checksum(tensor: Tensor) -> tuple[int, torch.Size, int]:
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return id(tensor), tensor.shape, zlib.crc32(content.data)


def _settings(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """The numbers, words and hooks that determine what a module computes besides its tensors."""
    # What an evaluation writes without changing the result.
    bookkeeping = {"frozen", "_fitted_to"}
    values = [(key, value) for key, value in vars(module).items() if isinstance(value, (int, float, str, tuple))]
    hooks = ("hooks", (*map(id, module._forward_pre_hooks.values()), *map(id, module._forward_hooks.values())))
    return (*((key, value) for key, value in values if key not in bookkeeping), hooks)
