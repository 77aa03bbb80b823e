"""How other libraries invert a residual block, run on our branch; as ever in eager use, each evaluation normalises.

zuko, the fourth library of the ``peers`` extra, has no residual block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Inverse = Callable[[Tensor], Tensor]


def normflows(branch: nn.Module, shape: tuple[int, ...]) -> Inverse:
    """It stops when the squared step of every entry in the batch is below 1e-5·(1 + |y|)."""
    from normflows.flows.residual import iResBlock  # noqa: PLC0415  (a peer, where it is installed)

    peer = iResBlock(branch)
    return lambda y: peer._inverse_fixed_point(y).detach()


def freia(branch: nn.Module, shape: tuple[int, ...]) -> Inverse:
    """Fifty iterations by default."""
    from FrEIA.modules import IResNetLayer  # noqa: PLC0415

    peer = IResNetLayer([shape])
    peer.residual = branch

    def invert(y: Tensor) -> Tensor:
        x: Tensor = peer([y], rev=True, jac=False)[0][0]
        return x.detach()

    return invert


def torchflows(branch: nn.Module, shape: tuple[int, ...]) -> Inverse:
    """Twenty-five iterations by default."""
    from torchflows.bijections.finite.residual.base import IterativeResidualBijection  # noqa: PLC0415

    peer: Any = IterativeResidualBijection(shape)
    peer.g = branch
    return lambda y: peer.inverse(y, skip_log_det=True)[0].detach()


INVERSES = {"normflows iResBlock": normflows, "FrEIA IResNetLayer": freia, "torchflows": torchflows}
