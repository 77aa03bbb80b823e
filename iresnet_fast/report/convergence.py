"""How fast each block's fixed-point iteration converges, beside its proven bound."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from ..certificate import certify
from ..models import IResNetClassifier
from ..nn import InvertibleResidualBlock, frozen_state
from ..solvers import sample_norms


@dataclass(frozen=True)
class BlockConvergence:
    """Convergence of one block's inverse, in float64.

    Attributes:
        name: of the block.
        lipschitz: its proven bound L, or None.
        errors: for n = 0, 1, …, the largest ‖xₙ − x‖/‖x‖ over the images.
        bounds: the largest Lⁿ/(1−L)·‖x¹ − x⁰‖/‖x‖ over the images; empty without L < 1.
    """

    name: str
    lipschitz: float | None
    errors: tuple[float, ...]
    bounds: tuple[float, ...]


@torch.no_grad()
def block_convergence(model: IResNetClassifier, images: Tensor, n_iterations: int = 40) -> tuple[BlockConvergence, ...]:
    """Iterate every block's inverse from the block's own output on these images; the model is not changed."""
    exact = copy.deepcopy(model).double().eval()
    certificate = certify(exact)
    bounds = {block.name: block.lipschitz for block in certificate.blocks}
    curves = []
    x = images.double()
    with frozen_state(exact):
        for name, module in exact.trunk.named_children():
            y = module(x)
            if isinstance(module, InvertibleResidualBlock):
                path = f"trunk.{name}"
                curves.append(_curve(path, module, x, y, bounds[path], n_iterations))
            x = y
    return tuple(curves)


def _curve(
    name: str,
    block: InvertibleResidualBlock,
    x: Tensor,
    y: Tensor,
    lipschitz: float | None,
    n_iterations: int,
) -> BlockConvergence:
    scale = sample_norms(x)
    iterate = y
    first_step = sample_norms(block.g(y))
    errors = []
    for _ in range(n_iterations + 1):
        errors.append(float((sample_norms(iterate - x) / scale).max()))
        iterate = y - block.g(iterate)
    bounds: list[float] = []
    if lipschitz is not None and lipschitz < 1:
        start = float((first_step / scale).max()) / (1 - lipschitz)
        bounds = [start * lipschitz**n for n in range(n_iterations + 1)]
    return BlockConvergence(name, lipschitz, tuple(errors), tuple(bounds))
