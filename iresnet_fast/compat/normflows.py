"""A bijection of this package as a flow of normflows (Stimper et al. 2023), which need not be installed for it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..nn import Bijection
from .residual_flows import iResBlock


class NormFlow(nn.Module):
    """In normflows ``forward`` goes from latents to data, and ``inverse`` from data to latents; both return log-dets.

    Args:
        bijection: whose forward maps data to latents.
        **options: of its inverse.

    Example:
        >>> block = irf.nn.InvertibleResidualBlock(irf.nn.LipschitzMLP(2))
        >>> flow = irf.compat.normflows.NormFlow(block)  # normflows.NormalizingFlow(base, [flow, ...]) takes it
        >>> z, log_det = flow.inverse(torch.randn(5, 2))
        >>> log_det.shape
        torch.Size([5])
    """

    def __init__(self, bijection: Bijection, **options: Any) -> None:
        super().__init__()
        if not isinstance(bijection, Bijection):
            raise TypeError(f"bijection must be an irf.nn.Bijection, got {type(bijection).__name__}")
        self.bijection = bijection
        self.options = options

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Data of latents (B, ...), and the log-determinant (B,) of that map."""
        return self.bijection.inverse_and_log_det(z, **self.options)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of data (B, ...), and the log-determinant (B,) of that map."""
        return self.bijection.forward_and_log_det(x)


class Residual(NormFlow):
    """``normflows.flows.Residual`` under its name and arguments, on this package's block, estimators and inverse.

    Args:
        net: the branch.
        reverse: whether x + net(x) is the way from data to latents, as usual; else from latents to data.
        reduce_memory: memory that does not grow with the number of terms.
        geom_p: this and the others as for :class:`iresnet_fast.compat.residual_flows.iResBlock`.
        lamb: as there.
        n_power_series: as there.
        exact_trace: as there.
        brute_force: as there.
        n_samples: as there.
        n_exact_terms: as there.
        n_dist: as there.

    Example:
        >>> branch = irf.nn.LipschitzMLP(2)
        >>> flows = [irf.compat.normflows.Residual(branch)]  # normflows.NormalizingFlow(base, flows) takes them
    """

    def __init__(
        self,
        net: nn.Module,
        reverse: bool = True,
        reduce_memory: bool = True,
        geom_p: float | None = None,
        lamb: float | None = None,
        n_power_series: int | None = None,
        exact_trace: bool = False,
        brute_force: bool = False,
        n_samples: int = 1,
        n_exact_terms: int = 2,
        n_dist: str = "geometric",
    ) -> None:
        block = iResBlock(
            net, geom_p, lamb, n_power_series, exact_trace, brute_force, n_samples, n_exact_terms, n_dist, reduce_memory
        )
        super().__init__(block.block)
        self.reverse = reverse

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Data of latents (B, ...), and the log-determinant (B,) of that map."""
        return super().forward(z) if self.reverse else super().inverse(z)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of data (B, ...), and the log-determinant (B,) of that map."""
        return super().inverse(x) if self.reverse else super().forward(x)
