"""The papers' inverse, and how far an inverse is off."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models import IResNetClassifier
from ..nn import InjectivePad, InvertibleResidualBlock
from ..reference.fixed_point import fixed_iterations

PAPER_ITERATIONS = 100


def relative_errors(found: Tensor, images: Tensor) -> Tensor:
    """‖x̂ − x‖/‖x‖ per image, the papers' normalised L2 error; NaN counts as infinite."""
    difference = (found - images).flatten(1).norm(dim=1) / images.flatten(1).norm(dim=1)
    return difference.nan_to_num(nan=float("inf"), posinf=float("inf"))


@torch.no_grad()
def papers_inverse(model: IResNetClassifier, z: Tensor, n_iterations: int) -> Tensor:
    """Invert the trunk as the papers' code does: a fixed number of iterations per block, weights normalised in each.

    Channels that were appended as zeros are dropped, whatever has become of them.
    """
    x = z
    for module in reversed(model.trunk):
        if isinstance(module, InvertibleResidualBlock):
            x = fixed_iterations(module.g, x, n_iterations)
        elif isinstance(module, InjectivePad):
            x = x[:, : x.shape[1] - module.channels]
        else:
            x = module.inverse(x)
    return x
