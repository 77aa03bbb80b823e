"""Inverses as providers: ours with the evaluations that they take, and the papers'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from iresnet_fast.nn import InvertibleResidualBlock, InvertibleSequential
from iresnet_fast.report.inversion import PAPER_ITERATIONS, papers_inverse
from iresnet_fast.solvers import InverseResult, invert_residual

from .case import Problem, Promise, Provider, StudyPoint

TOLERANCE = 1e-5
PAPERS = f"eager, {PAPER_ITERATIONS} iterations"
PICARD, OURS, CERTIFIED = "iresnet_fast, Picard, to 1e-6", "iresnet_fast, to 1e-6", "iresnet_fast, certified to 1e-6"
GENERAL, MIXED = "iresnet_fast, general path, to 1e-6", "iresnet_fast, float16 first, to 1e-6"
MEASURED = "iresnet_fast, to 1e-6, residual measured"
# How each of ours is asked for.
_OPTIONS: dict[str, dict[str, Any]] = {
    PICARD: {"method": "picard"},
    GENERAL: {"path": "general"},
    MIXED: {"iterate_in": torch.float16},
    OURS: {},
}


class _Solved(NamedTuple):
    """An inverse, the results of its blocks, and the shares of its samples that are certified."""

    x: Tensor
    blocks: Sequence[InverseResult]
    certified: dict[str, float]


def papers_provider(name: str, model: nn.Module, n_iterations: int = PAPER_ITERATIONS) -> Provider:
    """The papers' loop over a block or a chain."""
    chain = chain_of(model)
    return Provider(name, lambda y: papers_inverse(chain, y, n_iterations), TOLERANCE)


def counted_inverse(model: nn.Module, name: str) -> Provider:
    """One of ours for a block or a chain, with the evaluations that it takes."""
    options = _OPTIONS[name]

    def invert(y: Tensor) -> _Solved:
        if isinstance(model, InvertibleResidualBlock):
            result = model.solve_inverse(y, certify=False, **options)
            return _Solved(result.x, [result], {})
        blocks: list[InverseResult] = []
        x = model.inverse(y, progress=lambda done, total, block: blocks.append(block), **options)
        return _Solved(x, blocks, {})

    return Provider(name, torch.no_grad()(invert), TOLERANCE, lambda solved: solved.x, counts=_counts)


def proven_inverse(model: nn.Module, name: str) -> Provider:
    """``solve_inverse``, with a proof of every sample where there can be one, or without any."""

    def invert(y: Tensor) -> _Solved:
        result = model.solve_inverse(y, certify=name == CERTIFIED)  # type: ignore[operator]  # torch types attributes of modules as Tensor | Module
        blocks = [result] if isinstance(model, InvertibleResidualBlock) else result.blocks
        if name != CERTIFIED:
            return _Solved(result.x, blocks, {})
        shares = {"certified": 100 * float(result.certified.double().mean())}
        if not isinstance(model, InvertibleResidualBlock):
            shares["blocks certified"] = 100 * float(result.block_certified.double().mean())
        return _Solved(result.x, blocks, shares)

    return Provider(name, torch.no_grad()(invert), TOLERANCE, lambda solved: solved.x, counts=_counts)


def _counts(solved: _Solved) -> dict[str, float]:
    """Mean evaluations of g per sample and block, and percentages of samples that are certified."""
    return {
        "evaluations": float(torch.stack([block.evaluations for block in solved.blocks]).double().mean()),
        **{f"{name} %": share for name, share in solved.certified.items()},
    }


def chain_of(model: nn.Module) -> Sequence[nn.Module]:
    """The modules of a chain, or a block alone."""
    return model if isinstance(model, InvertibleSequential) else [model]


def linear(
    name: str, matrix: Tensor, lipschitz: float, promises: Sequence[Promise] = (), study: StudyPoint | None = None
) -> Problem:
    """The inverse of x + Wx in float64, with ‖W‖ = L: only the evaluations count."""
    y = torch.randn(20, len(matrix), dtype=torch.float64, device=matrix.device)
    exact = torch.linalg.solve(torch.eye(len(matrix)).to(matrix) + matrix, y.T).T

    def provider(name: str, method: str) -> Provider:
        def solve(y: Tensor) -> _Solved:
            result = invert_residual(lambda x: x @ matrix.T, y, lipschitz=lipschitz, method=method)
            return _Solved(result.x, [result], {})

        return Provider(name, solve, TOLERANCE, lambda solved: solved.x, counts=_counts)

    return Problem(
        name=name,
        inputs=[y],
        oracle=lambda y: exact,
        providers=[provider(PICARD, "picard"), provider(OURS, "anderson")],
        promises=promises,
        study=study,
    )


def orthogonal(features: int, device: torch.device) -> Tensor:
    """A random orthogonal matrix in float64: times L, no g of that Lipschitz constant is inverted more slowly."""
    return torch.linalg.qr(torch.randn(features, features, dtype=torch.float64, device=device))[0]
