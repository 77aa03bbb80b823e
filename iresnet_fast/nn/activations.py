"""Activations of Lipschitz constant one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LipSwish(nn.Module):
    r"""LipSwish, :math:`x\,\sigma(\mathrm{softplus}(\beta)\,x)/1.1` (Chen et al. 2019), of Lipschitz constant 1.

    Swish rises by at most 1.0998 for every :math:`\beta > 0`, and its derivative does not saturate where the
    Jacobian is largest, unlike ELU's.

    Shape: any, kept. Floating dtypes.
    """

    def __init__(self) -> None:
        super().__init__()
        # Of one axis: fully_shard (FSDP2) takes no scalars.
        self.beta = nn.Parameter(torch.tensor([0.5]))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation elementwise."""
        return x * torch.sigmoid(F.softplus(self.beta) * x) / 1.1

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = f"{prefix}beta"
        if key in state_dict and state_dict[key].dim() == 0:  # as version 0.1 kept it
            state_dict[key] = state_dict[key].reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args)


class MaxMin(nn.Module):
    """MaxMin (Anil et al. 2019): sorts channel pairs, (a, b) to (max, min); keeps gradient norms, Lipschitz constant 1.

    Shape: (B, C, ...) with an even C, kept; channel i is paired with channel i + C/2.

    Raises:
        ValueError: an odd number of channels.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Sort each pair of channels."""
        if x.dim() < 2 or x.shape[1] % 2:
            raise ValueError(
                f"MaxMin pairs channels and needs (B, C, ...) with an even number of them, got {tuple(x.shape)}"
            )
        a, b = x.chunk(2, dim=1)
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], dim=1)


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "elu": nn.ELU,
    "lipswish": LipSwish,
    "maxmin": MaxMin,
    "relu": nn.ReLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}
"""Activations by name; all are 1-Lipschitz."""


def make_activation(name: str) -> nn.Module:
    """A new activation module by its name.

    Raises:
        ValueError: an unknown name; the message lists those there are.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(sorted(ACTIVATIONS))}, got {name!r}")
    return ACTIVATIONS[name]()
