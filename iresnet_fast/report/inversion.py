"""The papers' inverse."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..nn import InjectivePad, InvertibleResidualBlock
from ..reference.fixed_point import fixed_iterations

PAPER_ITERATIONS = 100


@torch.no_grad()
def papers_inverse(chain: Iterable[nn.Module], z: Tensor, n_iterations: int = PAPER_ITERATIONS) -> Tensor:
    """Invert modules as the papers' code does: a fixed number of iterations per block, weights normalised in each.

    Channels that were appended as zeros are dropped, whatever has become of them.

    Args:
        chain: invertible modules, in the order of the forward.
        z: (B, ...) their output.
        n_iterations: of each block.
    """
    x = z
    for module in reversed(list(chain)):
        if isinstance(module, InvertibleResidualBlock):
            x = fixed_iterations(module.g, x, n_iterations)
        elif isinstance(module, InjectivePad):
            x = x[:, : x.shape[1] - module.channels]
        else:
            x = module.inverse(x)  # type: ignore[operator]  # torch types attributes of modules as Tensor | Module
    return x


def fewest_iterations(chain: Iterable[nn.Module], z: Tensor, error_of: Callable[[Tensor], float], error: float) -> int:
    """The fewest iterations per block that come within a tenth of an error, or the most accurate number if none do.

    Args:
        chain: invertible modules, in the order of the forward; with frozen weights it takes far less time.
        z: (B, ...) their output.
        error_of: the error of an inverse.
        error: to come near to.
    """
    chain, errors = list(chain), list[float]()
    for n in range(1, PAPER_ITERATIONS + 1):
        errors.append(error_of(papers_inverse(chain, z, n)))
        if errors[-1] <= 1.1 * error:
            return n
    return 1 + min(range(PAPER_ITERATIONS), key=lambda index: math.inf if math.isnan(errors[index]) else errors[index])
