"""The distribution of a flow's latents."""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor, nn


class NormalPrior(nn.Module):
    """Independent normal distributions.

    Args:
        size: latents D.
        learned: whether mean and scale of each are parameters; else it is the standard normal.
    """

    mean: Tensor
    log_scale: Tensor

    def __init__(self, size: int, *, learned: bool = False) -> None:
        super().__init__()
        for name in ("mean", "log_scale"):
            if learned:
                self.register_parameter(name, nn.Parameter(torch.zeros(size)))
            else:  # moves with the module, and is no part of its state
                self.register_buffer(name, torch.zeros(size), persistent=False)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density (B,) of latents (B, D) in nats, in float32 or better."""
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        standard = (z - self.mean) * (-self.log_scale).exp()
        return -0.5 * standard.square().sum(1) - self.log_scale.sum() - 0.5 * math.log(2 * math.pi) * z.shape[1]

    def sample(self, n: int, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Latents (n, D), the standard deviation times ``temperature``.

        Raises:
            ValueError: a negative number of samples or temperature.
        """
        count = -1 if isinstance(n, bool) or not hasattr(n, "__index__") else operator.index(n)
        if count < 0 or not 0 <= temperature < math.inf:
            raise ValueError(f"need n ≥ 0 samples at a temperature ≥ 0, got {n!r} and {temperature!r}")
        shape = (count, len(self.mean))
        noise = torch.randn(shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        return self.mean + temperature * self.log_scale.exp() * noise
