"""Inverting residual blocks and a network, to 1e-6 in float32."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

import iresnet_fast as irf
from iresnet_fast.nn import Bottleneck, InvertibleResidualBlock, LipschitzMLP, find_spectral_norm, frozen_state
from iresnet_fast.reference.fixed_point import fixed_iterations
from iresnet_fast.solvers import sample_norms

from ..case import Case, Problem, Promise, Provider, Work, compiled
from ..peers import INVERSES

_ITERATIONS = 100
_TOLERANCE = 1e-5
_PAPERS, _OURS = f"eager, {_ITERATIONS} iterations", "iresnet_fast, certified to 1e-6"


def _saturated(block: nn.Module) -> nn.Module:
    """A block whose layers reach their coeff, as trained ones do."""
    for module in block.modules():
        if find_spectral_norm(module):
            with torch.no_grad():
                module.parametrizations.weight.original.mul_(4)  # type: ignore[union-attr]
    return block


def _papers_inverse(model: nn.Module, y: Tensor, n: int) -> Tensor:
    """The papers' loop over a block or a chain of them."""
    chain = model if isinstance(model, irf.nn.InvertibleSequential) else [model]
    for module in reversed(list(chain)):
        if isinstance(module, InvertibleResidualBlock):
            y = fixed_iterations(module.g, y, n)
        elif isinstance(module, irf.nn.InjectivePad):
            y = y[:, : y.shape[1] - module.channels]  # unchecked: with few iterations the channels are not zero yet
        else:
            y = module.inverse(y)
    return y


def _fewest(model: nn.Module, y: Tensor, exact: Tensor, error: float) -> int:
    """The fewest fixed iterations that reach an error, found with weights normalised once."""
    with frozen_state(model):
        for n in range(1, _ITERATIONS):
            if float(sample_norms(_papers_inverse(model, y, n).double() - exact).max()) <= error:
                return n
    return _ITERATIONS


@torch.no_grad()
def _problem(
    name: str, model: nn.Module, shape: tuple[int, ...], flops: float, device: torch.device, promises: bool = False
) -> Problem:
    model = model.to(device).eval()
    irf.enforce(model)
    exact_model = copy.deepcopy(model).double()
    inputs = [model(torch.randn(shape, device=device)) for _ in range(2)]
    exact = {id(y): exact_model.inverse(y.double(), tol=1e-13) for y in inputs}
    ours = max(float(sample_norms(model.inverse(y).double() - exact[id(y)]).max()) for y in inputs)
    fewest = _fewest(model, inputs[0], exact[id(inputs[0])], ours)
    least = f"eager, fewest iterations for our error ({fewest})"
    evaluations = 2 * shape[0] * flops  # at least two per block: one to step, one to measure
    return Problem(
        name=f"{name}, batch {shape[0]}",
        inputs=inputs,
        oracle=lambda y: exact[id(y)],
        providers=[
            replace(provider, run=torch.no_grad()(provider.run))
            for provider in (
                Provider(_PAPERS, lambda y: _papers_inverse(model, y, _ITERATIONS), _TOLERANCE),
                Provider(f"torch.compile, {_ITERATIONS} iterations", _compiled_inverse(model), _TOLERANCE),
                Provider(least, lambda y: _papers_inverse(model, y, fewest), _TOLERANCE),
                *_peers(model, shape[1:]),
                Provider(_OURS, model.inverse, _TOLERANCE),
            )
        ],
        work=Work(evaluations, torch.float32, 8 * inputs[0].numel()),
        promises=[Promise(_OURS, _PAPERS, 15, 25), Promise(_OURS, least, 1.2, 2)] if promises else [],
    )


def _compiled_inverse(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The papers' loop with every branch compiled."""
    chain = model if isinstance(model, irf.nn.InvertibleSequential) else [model]
    branches = {id(part): compiled(part.g) for part in chain if isinstance(part, InvertibleResidualBlock)}

    def invert(y: Tensor) -> Tensor:
        for module in reversed(list(chain)):
            branch = branches.get(id(module))
            y = module.inverse(y) if branch is None else fixed_iterations(branch, y, _ITERATIONS)
        return y

    return invert


def _peers(model: nn.Module, shape: tuple[int, ...]) -> list[Provider]:
    """Other libraries' inverses of the same branch."""
    if not isinstance(model, InvertibleResidualBlock):
        return []
    providers = []
    for name, make in INVERSES.items():
        try:
            providers.append(Provider(name, make(model.g, shape), _TOLERANCE, peer=True))
        except ImportError as error:
            reason = f"{error}: pip install '.[peers]'"
            providers.append(Provider(name, lambda y: y, _TOLERANCE, missing=reason, peer=True))
    return providers


def _bottleneck(channels: int, size: int, hidden: int) -> tuple[nn.Module, float]:
    """A block and the operations of one evaluation per sample."""
    branch = Bottleneck(channels, hidden, input_size=(size, size))
    return InvertibleResidualBlock(branch), 2 * size**2 * hidden * (18 * channels + hidden)


def _problems(device: torch.device, quick: bool) -> Iterator[Problem]:
    torch.manual_seed(0)
    # The papers' 100 images where there is a GPU; a hundred iterations of them take minutes on a CPU.
    images = 100 if device.type == "cuda" else 8
    for channels, size, hidden in [(16, 16, 32)] if quick else [(16, 32, 32), (64, 16, 64), (256, 8, 128)]:
        block, flops = _bottleneck(channels, size, hidden)
        name = f"block {channels} ch {size}², hidden {hidden}"
        yield _problem(name, _saturated(block), (images, channels, size, size), flops, device)
    branch = LipschitzMLP(64, (128, 128))
    for batch in [100] if quick else [100, 10_000]:
        mlp = _saturated(InvertibleResidualBlock(copy.deepcopy(branch)))
        yield _problem("MLP D=64, hidden 128", mlp, (batch, 64), 2 * 128 * (64 + 128 + 64), device)
    if not quick:
        network = irf.models.IResNetClassifier.from_config("iresnet-64").trunk
        flops = 7 * sum(_bottleneck(*block)[1] for block in ((16, 32, 32), (64, 16, 64), (256, 8, 128)))
        network.train()(torch.randn(images, 3, 32, 32))
        yield _problem("7-7-7 network", network, (images, 3, 32, 32), flops, device, promises=True)


CASE = Case("inverse", "Inverse to 1e-6 (float32)", _problems)
