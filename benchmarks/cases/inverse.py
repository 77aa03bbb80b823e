"""Inverting residual blocks and networks, to 1e-6, with the evaluations of g that it takes."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import iresnet_fast as irf
from iresnet_fast.data import load_digits
from iresnet_fast.nn import Bottleneck, InvertibleResidualBlock, LipschitzMLP, frozen_state
from iresnet_fast.reference.fixed_point import fixed_iterations
from iresnet_fast.report.inversion import PAPER_ITERATIONS, fewest_iterations, papers_inverse
from iresnet_fast.solvers import sample_norms
from iresnet_fast.training import fit_classifier

from ..blocks import bottleneck_flops, saturated
from ..case import Case, Problem, Promise, Provider, Work, compiled
from ..inverses import (
    CERTIFIED,
    GENERAL,
    MEASURED,
    MIXED,
    OURS,
    PAPERS,
    PICARD,
    TOLERANCE,
    chain_of,
    counted_inverse,
    linear,
    orthogonal,
    papers_provider,
    proven_inverse,
)
from ..peers import INVERSES

_COMPILED = f"torch.compile, {PAPER_ITERATIONS} iterations"
# The official code's network, kept beside the checkout, not in it.
_OFFICIAL, _NETWORK = Path(__file__).parents[3] / "shared" / "data" / "official", "iresnet37_mnist"


def _once_normalised(model: nn.Module, y: Tensor, n: int) -> Tensor:
    with frozen_state(model):
        return papers_inverse(chain_of(model), y, n)


def _compiled_inverse(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The papers' loop with every branch compiled."""
    chain = chain_of(model)
    branches = {id(part): compiled(part.g) for part in chain if isinstance(part, InvertibleResidualBlock)}

    def invert(y: Tensor) -> Tensor:
        for module in reversed(list(chain)):
            branch = branches.get(id(module))
            y = module.inverse(y) if branch is None else fixed_iterations(branch, y, PAPER_ITERATIONS)
        return y

    return invert


def _peers(model: nn.Module, shape: tuple[int, ...]) -> list[Provider]:
    """Other libraries' inverses of the same branch."""
    if not isinstance(model, InvertibleResidualBlock):
        return []
    providers = []
    for name, make in INVERSES.items():
        try:
            providers.append(Provider(name, make(model.g, shape), TOLERANCE, peer=True))
        except ImportError as error:
            reason = f"{error}: pip install '.[peers]'"
            providers.append(Provider(name, lambda y: y, TOLERANCE, missing=reason, peer=True))
    return providers


def _few_evaluations(_: str) -> list[Promise]:
    """The cost of a block of a trained network."""
    return [Promise(OURS, None, 6, 4, quantity="value", of="evaluations")]


def _few_and_proven(least: str) -> list[Promise]:
    """That, and the cost of a proof end to end."""
    return [*_few_evaluations(least), Promise(CERTIFIED, MEASURED, 3.5, 2, quantity="share", of="cpu")]


@torch.no_grad()
def _problem(
    name: str,
    model: nn.Module,
    inputs: list[Tensor],
    flops: float | None = None,
    *,
    compiling: bool = True,
    peers: bool = True,
    promises: Callable[[str], list[Promise]] = lambda least: [],
) -> Problem:
    """Inverses of a model's outputs for these inputs; ``flops`` of one evaluation per sample."""
    model = model.to(inputs[0].device).eval()
    irf.enforce(model)
    exact_model: Any = copy.deepcopy(model).double()
    outputs = [model(x) for x in inputs]
    exact = {id(y): exact_model.inverse(y.double(), tol=1e-13) for y in outputs}
    ours = counted_inverse(model, OURS)
    is_whole = any(block.path != "general" for block in ours.run(outputs[0]).blocks)
    error = max(float(sample_norms(ours.run(y).x.double() - exact[id(y)]).max()) for y in outputs)
    target = exact[id(outputs[0])]
    with frozen_state(model):
        fewest = fewest_iterations(
            chain_of(model), outputs[0], lambda x: float(sample_norms(x.double() - target).max()), error
        )
    least = f"eager, fewest iterations for our error ({fewest})"
    providers = [
        papers_provider(PAPERS, model),
        papers_provider(least, model, fewest),
        Provider(f"{least}, weights normalised once", lambda y: _once_normalised(model, y, fewest), TOLERANCE),
        *([Provider(_COMPILED, _compiled_inverse(model), TOLERANCE)] if compiling else []),
        *(_peers(model, tuple(inputs[0].shape[1:])) if peers else []),
        counted_inverse(model, PICARD),
        *([counted_inverse(model, GENERAL)] if is_whole else []),
        *([counted_inverse(model, MIXED)] if inputs[0].is_cuda else []),
        ours,
        *([] if isinstance(model, InvertibleResidualBlock) else [proven_inverse(model, MEASURED)]),
        proven_inverse(model, CERTIFIED),
    ]
    batch = len(inputs[0])
    return Problem(
        name=f"{name}, batch {batch}",
        inputs=outputs,
        oracle=lambda y: exact[id(y)],
        providers=[replace(provider, run=torch.no_grad()(provider.run)) for provider in providers],
        # At least two evaluations per block: one to step, one to measure.
        work=Work(2 * batch * flops, torch.float32, 8 * inputs[0].numel()) if flops else None,
        promises=promises(least),
    )


def _network(images: int, device: torch.device, *, compiling: bool) -> Problem:
    """The papers' 7-7-7 network as it is initialised; a hundred iterations of it take minutes on a CPU."""
    network = irf.models.IResNetClassifier.from_config("iresnet-64").trunk.to(device)
    x = torch.randn(images, 3, 32, 32, device=device)
    with torch.no_grad():
        network.train()(x)
    flops = 7 * sum(bottleneck_flops(*block) for block in ((16, 32, 32), (64, 16, 64), (256, 8, 128)))
    return _problem(
        "7-7-7 network",
        network,
        [x],
        flops,
        compiling=compiling,
        promises=lambda least: _network_promises(least, device),
    )


def _network_promises(least: str, device: torch.device) -> list[Promise]:
    if device.type == "cpu":
        cheap = Promise(CERTIFIED, MEASURED, 1.5, 1.35, quantity="share", of="cpu")
        return [Promise(OURS, PAPERS, 15, 25), Promise(OURS, least, 1.2, 2), cheap]
    return [Promise(MIXED, None, 15e-3, 6e-3, quantity="value"), Promise(MIXED, least, 20, 20)]


def _perceptrons(device: torch.device, quick: bool) -> Iterator[Problem]:
    """Small blocks, where what each operator costs by itself is most of the time."""
    gpu = device.type == "cuda"
    batches = (1, 100, 65_536) if gpu else (1, 100, 10_000)
    for features, hidden in [(64, 128)] if quick else [(2, 64), (64, 128)]:
        for batch in batches[1:2] if quick else batches:
            block = InvertibleResidualBlock(saturated(LipschitzMLP(features, (hidden, hidden))))
            inputs = [torch.randn(batch, features, device=device) for _ in range(2)]
            yield _problem(
                f"MLP D={features}, hidden {hidden}",
                block,
                inputs,
                2 * hidden * (features + hidden + features),
                compiling=features == 64 and batch > 1,
                peers=features == 64 and batch > 1,
                promises=lambda least: (
                    [Promise(OURS, GENERAL, 10, 30), Promise(OURS, PAPERS, 50, 200)]
                    if gpu
                    else [Promise(OURS, GENERAL, 4, 10)]
                ),
            )


def _trained(device: torch.device) -> Problem:
    """The digits network after 15 epochs: branches that have been trained invert more slowly than new ones."""
    data = load_digits().centered()
    network = irf.models.IResNetClassifier.from_config("digits").to(device)
    fit_classifier(network, data.train_images.to(device), data.train_labels.to(device), epochs=15)
    x = data.test_images[:100].to(device)
    return _problem("trained digits network", network.trunk, [x], compiling=False, promises=_few_and_proven)


def _trained_officially(device: torch.device) -> Problem | None:
    """The network that the official code trained on MNIST, c = 0.9, 12 blocks, where it lies beside the checkout."""
    if not _OFFICIAL.is_dir() or find_spec("safetensors") is None:
        warnings.warn(f"the network trained with the official code needs {_OFFICIAL} and safetensors", stacklevel=2)
        return None
    from safetensors.torch import load_file  # noqa: PLC0415  (the dependency of one row)

    state, examples = (load_file(_OFFICIAL / f"{_NETWORK}{part}.safetensors") for part in ("", "_io"))
    config = json.loads((_OFFICIAL / f"{_NETWORK}.json").read_text(encoding="utf-8"))
    network = irf.compat.official.load(state, config, exact=False)
    x = examples["inputs"].to(device)
    return _problem(
        "official code's network, trained on MNIST", network.trunk, [x], compiling=False, promises=_few_evaluations
    )


def _linear_problems(device: torch.device) -> Iterator[Problem]:
    d, lipschitz = 64, 0.97
    v = nn.functional.normalize(torch.randn(d, dtype=torch.float64, device=device), dim=0)
    reflection = 0.1 * torch.eye(d).to(v) - 1.1 * torch.outer(v, v)
    for name, matrix, promise in (
        ("one dominant mode", reflection, Promise(OURS, PICARD, 20, 30, of="evaluations")),
        (
            "random orthogonal",
            orthogonal(d, device),
            Promise(OURS, PICARD, 1.05, 1, quantity="share", of="evaluations"),
        ),
    ):
        yield linear(f"L = {lipschitz}, {name}, d = {d}, float64", lipschitz * matrix, lipschitz, [promise])


def _problems(device: torch.device, quick: bool) -> Iterator[Problem]:
    torch.manual_seed(0)
    gpu = device.type == "cuda"
    images = 100 if gpu else 8
    for channels, size, hidden in [(16, 16, 32)] if quick else [(16, 32, 32), (64, 16, 64), (256, 8, 128)]:
        block = InvertibleResidualBlock(saturated(Bottleneck(channels, hidden, input_size=(size, size))))
        inputs = [torch.randn(images, channels, size, size, device=device) for _ in range(2)]
        name = f"block {channels} ch {size}², hidden {hidden}"
        yield _problem(name, block, inputs, bottleneck_flops(channels, size, hidden))
    near_one = InvertibleResidualBlock(saturated(Bottleneck(16, 32, coeff=0.99, input_size=(16, 16))))
    inputs = [torch.randn(16, 16, 16, 16, device=device) for _ in range(2)]
    yield _problem(
        "block 16 ch 16², hidden 32, L = 0.97",
        near_one,
        inputs,
        bottleneck_flops(16, 16, 32),
        compiling=False,
        peers=False,
    )
    yield from _perceptrons(device, quick)
    yield from _linear_problems(device)
    if not quick:
        yield _trained(device)
        yield from filter(None, [_trained_officially(device)])
        yield _network(100, device, compiling=gpu)


CASE = Case("Inverse to 1e-6", _problems)
