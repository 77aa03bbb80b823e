"""Certifying inverses of blocks that were trained to contract: how many samples, and none beyond its bound."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import iresnet_fast as irf
from iresnet_fast.nn import InvertibleResidualBlock, LipschitzMLP
from iresnet_fast.nn.residual.exact import exact_copy
from iresnet_fast.solvers import ExactBranch, InverseResult, sample_norms

from ..case import Case, Problem, Promise, Provider

_CERTIFIED, _UNPROVEN = "iresnet_fast, certified to 1e-6", "iresnet_fast, to 1e-6"
_SAMPLES, _TOLERANCE = 4000, 1e-5
_BEYOND, _SHARE = "beyond bound", "not certified %"


def contracting(
    activation: str, features: int, coeff: float, steps: int, device: torch.device
) -> InvertibleResidualBlock:
    """A block trained towards 0.1·x on wide data, so that its slope is near −L, where the inverse is hardest."""
    block = InvertibleResidualBlock(LipschitzMLP(features, (64, 64), activation=activation, coeff=coeff)).to(device)
    optimizer = torch.optim.Adam(block.parameters(), lr=1e-2)
    for _ in range(steps):
        x = 3 * torch.randn(256, features, device=device)
        loss = (block(x) - 0.1 * x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return block.eval()


@torch.no_grad()
def _problem(block: InvertibleResidualBlock, name: str, device: torch.device) -> Problem:
    lipschitz = irf.enforce(block).blocks[0].lipschitz
    assert lipschitz is not None
    y = 0.3 * torch.randn(_SAMPLES, block.g[0].in_features, device=device)  # type: ignore[index,union-attr]  # torch types attributes of modules as Tensor | Module
    exact = ExactBranch(exact_copy(block.g))
    near = block.solve_inverse(y, certify=False, on_failure="return").x.double()
    truth = exact.finish(y.double(), near, lipschitz, torch.full_like(near[:, 0], 1e-13))

    def counts(result: InverseResult) -> dict[str, float]:
        error = sample_norms(result.x.double() - truth.x)
        beyond = result.certified & (error > result.error_bound + truth.error_bound)
        return {_SHARE: 100 * float((~result.certified).double().mean()), _BEYOND: float(beyond.sum())}

    def solve(certify: bool) -> Provider:
        def run(y: Tensor) -> InverseResult:
            with torch.no_grad():
                return block.solve_inverse(y, certify=certify, on_failure="return")

        name = _CERTIFIED if certify else _UNPROVEN
        shown = {"counts": counts} if certify else {}
        return Provider(name, run, _TOLERANCE, lambda result: result.x, **shown)  # type: ignore[arg-type]  # mypy reads no dict as keywords

    return Problem(
        name=f"{name}, L = {lipschitz:.3f}, {_SAMPLES:,} samples",
        inputs=[y],
        oracle=lambda y: truth.x,
        providers=[solve(certify=False), solve(certify=True)],
        promises=[
            Promise(_CERTIFIED, None, 0, 0, quantity="value", of=_BEYOND),
            Promise(_CERTIFIED, None, 1, 0, quantity="value", of=_SHARE),
        ],
    )


def _problems(device: torch.device, quick: bool) -> Iterator[Problem]:
    torch.manual_seed(0)
    trained = [(name, 1, 0.97) for name in ("relu", "elu", "softplus", "lipswish")]
    trained += [("maxmin", 2, 0.97), ("tanh", 1, 0.97), ("softplus", 2, 0.97), ("relu", 2, 0.99)]
    for activation, features, coeff in trained[:1] if quick else trained:
        block = contracting(activation, features, coeff, 50 if quick else 500, device)
        yield _problem(block, f"trained MLP, {activation}, D={features}, hidden 64-64, coeff {coeff}", device)


CASE = Case("Certified samples of trained blocks", _problems)
