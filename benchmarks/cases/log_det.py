"""Log-determinants of a residual block with their gradients: exact, and by each estimator."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import Tensor, nn

import iresnet_fast as irf
from iresnet_fast.estimators import Estimator, Exact, NeumannGradient, PowerSeries, RussianRoulette
from iresnet_fast.nn import InvertibleResidualBlock, frozen_state

from ..blocks import saturated
from ..case import Case, Problem, Promise, Provider
from ..memory import kept_bytes_per_sample

_EXACT, _SERIES, _NEUMANN = (
    "iresnet_fast, Exact",
    "iresnet_fast, PowerSeries(20)",
    "iresnet_fast, NeumannGradient(PowerSeries(20))",
)
_KEPT = "bytes per sample"
_EXACT_TOLERANCE = 1e-4
# An estimate's batch mean may be off by so many of its own standard deviations, which so many draws measure.
_DEVIATIONS, _DRAWS = 5, 20


def _block(branch: nn.Module, device: torch.device) -> InvertibleResidualBlock:
    """Every layer at its coefficient, as training leaves it, and certified."""
    block = InvertibleResidualBlock(saturated(branch)).to(device).eval()
    irf.enforce(block)
    return block


def _mean_log_det(block: InvertibleResidualBlock, estimator: Estimator, x: Tensor) -> Tensor:
    """The mean over the batch; its gradient is taken, and thrown away."""
    with frozen_state(block):
        value = block.estimate_log_det(x, estimator)[1].value.mean()
        torch.autograd.grad(value, list(block.parameters()), allow_unused=True)
    return value.detach()


@torch.no_grad()
def _tolerance(block: InvertibleResidualBlock, estimator: Estimator, x: Tensor, exact: float) -> float:
    """Of an estimate, relative to the exact mean: what chance allows, and the bound of its bias."""
    draws = [block.estimate_log_det(x, estimator)[1] for _ in range(_DRAWS)]
    scatter = torch.stack([draw.value.mean() for draw in draws]).std()
    return (_DEVIATIONS * float(scatter) + draws[0].bias_bound) / abs(exact)


def _provider(block: InvertibleResidualBlock, name: str, estimator: Estimator, x: Tensor, exact: float) -> Provider:
    torch.manual_seed(0)
    tolerance = _EXACT_TOLERANCE if estimator == Exact() else _tolerance(block, estimator, x, exact)
    with torch.no_grad():
        products = block.estimate_log_det(x[:1], estimator)[1].n_vjps
    with frozen_state(block):
        kept = kept_bytes_per_sample(lambda x: block.estimate_log_det(x, estimator)[1].value, x)
    return Provider(
        name,
        lambda x: _mean_log_det(block, estimator, x),
        tolerance,
        counts=lambda _: {"products": products, _KEPT: kept},
    )


def _peer(block: InvertibleResidualBlock, tolerance: float) -> Provider:
    """The same branch in normflows' block, which sums its gradient over the batch in the forward."""
    missing = None if find_spec("normflows") else "not installed"

    def run(x: Tensor) -> Tensor:
        from normflows.flows.residual import iResBlock  # noqa: PLC0415  (a peer, where it is installed)

        peer = iResBlock(block.g, neumann_grad=True, grad_in_forward=False).train()
        _, log_det = peer(x, 0)
        value = -log_det.mean()
        torch.autograd.grad(value, list(block.parameters()), allow_unused=True)
        return value.detach()

    return Provider("normflows iResBlock, Neumann", run, tolerance, missing=missing, peer=True)


def _problem(name: str, branch: nn.Module, shape: tuple[int, ...], device: torch.device) -> Problem:
    block = _block(branch, device)
    x = torch.randn(shape, device=device)

    def oracle(x: Tensor) -> Tensor:
        wide = copy.deepcopy(block).double()
        with torch.no_grad():
            return wide.estimate_log_det(x.double(), Exact())[1].value.mean()

    exact = float(oracle(x))
    ours = [
        _provider(block, name, estimator, x, exact)
        for name, estimator in {
            _SERIES: PowerSeries(20),
            _EXACT: Exact(),
            "iresnet_fast, RussianRoulette": RussianRoulette(),
            "iresnet_fast, NeumannGradient": NeumannGradient(),
            _NEUMANN: NeumannGradient(PowerSeries(20)),
        }.items()
    ]
    return Problem(
        name=f"{name}, batch {len(x)}",
        inputs=[x],
        oracle=oracle,
        providers=[*ours, _peer(block, ours[-2].tolerance)],
        promises=[
            Promise(_NEUMANN, _SERIES, 0.3, 0.15, quantity="share", of=_KEPT),
        ],
    )


def _problems(device: torch.device, quick: bool) -> Iterator[Problem]:
    torch.manual_seed(0)
    batch = 64 if quick else 1024
    yield _problem("MLP D=2, hidden 64", irf.nn.LipschitzMLP(2, (64, 64)), (batch, 2), device)
    if not quick:
        yield _problem("MLP D=64, hidden 128", irf.nn.LipschitzMLP(64, (128, 128)), (256, 64), device)
        images = irf.nn.Bottleneck(4, 32, input_size=(4, 4), activation="lipswish")
        yield _problem("block 4 ch 4², hidden 32", images, (256, 4, 4, 4), device)


CASE = Case("Mean log-determinant of a block, with its gradient", _problems)
