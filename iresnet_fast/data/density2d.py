"""Densities in the plane that flows are tried on, with their true log-density where it has a formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_NOISE = 0.1


@dataclass(frozen=True)
class Density2d:
    """A distribution in the plane.

    Attributes:
        draw: (n, generator) to samples (n, 2) float32.
        log_prob: (B, 2) to the true log-density (B,) in nats; None where there is no formula.
        entropy: −E[log p] in nats; None where there is no formula.
        extent: half the side of a square around the origin that holds practically everything.
    """

    draw: Callable[[int, torch.Generator], Tensor]
    log_prob: Callable[[Tensor], Tensor] | None = None
    entropy: float | None = None
    extent: float = 4.0

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Samples (n, 2), the same for the same seed."""
        return self.draw(n, torch.Generator().manual_seed(seed))


def _uniform(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator, device="cpu")


def _normal(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 2, generator=generator, device="cpu")


def _polar(radius: Tensor | float, angle: Tensor) -> Tensor:
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


# Eight Gaussians on a circle of radius 2√2, of standard deviation √2/4 (Grathwohl et al. 2019).
_RADIUS, _DEVIATION = 2 * math.sqrt(2), math.sqrt(2) / 4


def _eight_gaussians(n: int, generator: torch.Generator) -> Tensor:
    index = torch.randint(8, (n,), generator=generator, device="cpu")
    return _polar(_RADIUS, index * (math.pi / 4)) + _DEVIATION * _normal(n, generator)


def _eight_gaussians_log_prob(x: Tensor) -> Tensor:
    centers = _polar(_RADIUS, torch.arange(8, dtype=x.dtype, device=x.device) * (math.pi / 4))
    each = -torch.cdist(x, centers).square() / (2 * _DEVIATION**2)
    return each.logsumexp(1) - math.log(8 * 2 * math.pi * _DEVIATION**2)


def _eight_gaussians_entropy() -> float:
    """By the midpoint rule on a grid; for so smooth a function its error is far below a millionth."""
    ticks = torch.linspace(-6, 6, 601, dtype=torch.float64, device="cpu")
    log_prob = _eight_gaussians_log_prob(torch.cartesian_prod(ticks, ticks))
    return float(-(log_prob.exp() * log_prob).sum() * (ticks[1] - ticks[0]) ** 2)


def _checkerboard(n: int, generator: torch.Generator) -> Tensor:
    """Eight squares of side 2 of a four by four board."""
    x = 8 * _uniform(n, generator) - 4
    column = ((x + 4) / 2).floor()
    row = 2 * torch.randint(2, (n,), generator=generator, device="cpu") + column % 2
    return torch.stack([x, 2 * (row + _uniform(n, generator)) - 4], 1)


def _checkerboard_log_prob(x: Tensor) -> Tensor:
    cells = ((x + 4) / 2).floor()
    inside = ((x >= -4) & (x < 4)).all(1) & ((cells[:, 0] + cells[:, 1]) % 2 == 0)
    return torch.where(inside, -math.log(32), -math.inf).to(x.dtype)


def _two_moons(n: int, generator: torch.Generator) -> Tensor:
    angle = math.pi * _uniform(n, generator)
    upper = torch.randint(2, (n,), generator=generator, device="cpu").bool().unsqueeze(1)
    moons = torch.where(upper, _polar(1.0, angle), torch.tensor([1.0, 0.5], device="cpu") - _polar(1.0, angle))
    return 2 * (moons - torch.tensor([0.5, 0.25], device="cpu")) + _NOISE * 2 * _normal(n, generator)


def _rings(n: int, generator: torch.Generator) -> Tensor:
    radius = 0.75 * (1 + torch.randint(4, (n,), generator=generator, device="cpu"))
    return _polar(radius, 2 * math.pi * _uniform(n, generator)) + 0.08 * _normal(n, generator)


def _spirals(n: int, generator: torch.Generator) -> Tensor:
    turn = 3 * math.pi * _uniform(n, generator).sqrt()
    arm = 2.0 * torch.randint(2, (n,), generator=generator, device="cpu") - 1
    return arm.unsqueeze(1) * _polar(turn / math.pi, turn) + _NOISE * _normal(n, generator)


DENSITIES_2D = {
    "8gaussians": Density2d(_eight_gaussians, _eight_gaussians_log_prob, _eight_gaussians_entropy()),
    "checkerboard": Density2d(_checkerboard, _checkerboard_log_prob, math.log(32), extent=4.5),
    "moons": Density2d(_two_moons),
    "rings": Density2d(_rings),
    "spirals": Density2d(_spirals),
}


def density2d(name: str) -> Density2d:
    """A density of :data:`DENSITIES_2D` by its name.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in DENSITIES_2D:
        raise ValueError(f"there is no density {name!r}; there are {', '.join(DENSITIES_2D)}")
    return DENSITIES_2D[name]
