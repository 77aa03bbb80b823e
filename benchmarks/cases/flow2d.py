"""Flows in the plane, ours and normflows': a training step, what equal time of training reaches, and sampling."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import iresnet_fast as irf
from iresnet_fast.data import Density2d, density2d
from iresnet_fast.models import IResNetFlow
from iresnet_fast.training import hybrid_loss

from ..case import Case, Problem, Promise, Provider

_OURS, _COMPILED, _PEER = "iresnet_fast", "iresnet_fast, torch.compile", "normflows residual flow"
_BLOCKS, _HIDDEN, _COEFF, _PEER_COEFF = 10, (64, 64), 0.99, 0.97
_BATCH, _HELD_OUT, _SAMPLES = 256, 20_000, 10_000
# Highest rates of a one-cycle schedule: each the best of those tried (0.003, 0.01, 0.03 for the peer).
_RATE, _PEER_RATE = 1e-2, 3e-2
_AVERAGE = 0.998
_GAP, _STEPS = "nats above the entropy", "steps"
# Of samples, in their latents; the peer's iteration stops within it.
_SAMPLE_ERROR = 1e-2
# Relative error of a mean log-likelihood that is no wrong answer.
_ANY = 1e6
# nats above the entropy that are promised, and that we are after.
_TARGETS = {"8gaussians": (0.15, 0.05), "checkerboard": (0.30, 0.15)}


def _flow() -> IResNetFlow:
    return IResNetFlow.from_config("density2d", fc_blocks=_BLOCKS, fc_hidden=_HIDDEN, coeff=_COEFF)


def _peer_flow() -> Any:
    """Of equal size, with its default estimator."""
    import normflows  # noqa: PLC0415  (a peer, where it is installed)

    links: list[nn.Module] = []
    for _ in range(_BLOCKS):
        net = normflows.nets.LipschitzMLP([2, *_HIDDEN, 2], init_zeros=True, lipschitz_const=_PEER_COEFF)
        links += [normflows.flows.Residual(net), normflows.flows.ActNorm(2)]
    return normflows.NormalizingFlow(normflows.distributions.DiagGaussian(2, trainable=False), links)


def _loss_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Negative log-likelihood in nats per sample."""
    if isinstance(model, IResNetFlow):
        return lambda x: 2 * hybrid_loss(model(x))
    return model.forward_kld


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, loss_of: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """One step of training, with what each library needs to keep its Lipschitz constants."""
    optimizer.zero_grad()
    loss = loss_of(x)
    if torch.isfinite(loss):
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    if not isinstance(model, IResNetFlow):
        import normflows  # noqa: PLC0415

        normflows.utils.update_lipschitz(model, 5)
    return loss.detach()


def _train(model: nn.Module, density: Density2d, rate: float, seconds: float) -> int:
    """Train for a time, with a rate that rises and falls over it as in a one-cycle schedule; returns the steps.

    On one thread, so that a minute is a minute of CPU time.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(_AVERAGE)
    )
    loss_of = _loss_of(model)
    steps, started = 0, time.perf_counter()
    model.train()
    while (share := (time.perf_counter() - started) / seconds) < 1:
        rise, fall = min(1.0, share / 0.3), max(0.0, (share - 0.3) / 0.7)
        for group in optimizer.param_groups:
            group["lr"] = rate * (0.04 + 0.96 * (1 - math.cos(math.pi * rise)) / 2) * (1 + math.cos(math.pi * fall)) / 2
        _step(model, optimizer, loss_of, density.draw(_BATCH, generator))
        averaged.update_parameters(model)
        steps += 1
    torch.set_num_threads(threads)
    with torch.no_grad():
        for parameter, mean in zip(model.parameters(), averaged.module.parameters(), strict=True):
            parameter.copy_(mean)
    model.eval()
    if isinstance(model, IResNetFlow):
        irf.enforce(model)
    else:
        import normflows  # noqa: PLC0415

        normflows.utils.update_lipschitz(model, 200)
    return steps


def _by_parts(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([function(part).detach() for part in x.split(2000)])


def _step_provider(name: str, model: nn.Module, *, compiled: bool = False) -> Provider:
    """The rate is zero, so that every run does the same."""
    loss_of = _loss_of(model)
    if compiled:
        loss_of = torch.compile(loss_of)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    model.train()

    def exact(x: Tensor) -> Tensor:
        """From the dense Jacobian of the map to the latents, in float64."""
        model.double().eval()
        features = model.features if isinstance(model, IResNetFlow) else model.inverse
        wide = x.double()
        rows = [
            torch.autograd.functional.jacobian(lambda z: features(z).sum(0), part).permute(1, 0, 2)
            for part in wide.split(64)
        ]
        z = features(wide).detach()
        normal = 0.5 * z.square().sum(1) + math.log(2 * math.pi)
        value = (normal - torch.linalg.slogdet(torch.cat(rows)).logabsdet).mean()
        model.float().train()
        return value

    ours = isinstance(model, IResNetFlow)
    return Provider(
        name,
        lambda x: _step(model, optimizer, loss_of, x),
        # The estimates of the peer scatter by a third of the loss.
        0.05 if ours else 1.0,
        oracle=exact,
        peer=not ours,
    )


def _likelihood_provider(name: str, model: nn.Module, density: Density2d, steps: int) -> Provider:
    """What is compared is how near the truth it comes; an untrained model is no error."""
    assert density.entropy is not None
    entropy = density.entropy

    def run(x: Tensor) -> Tensor:
        with torch.set_grad_enabled(not isinstance(model, IResNetFlow)):
            return -_by_parts(model.log_prob, x).mean()

    gap = float(run(density.sample(_HELD_OUT, seed=99))) - entropy
    return Provider(
        name, run, _ANY, counts=lambda _: {_GAP: gap, _STEPS: steps}, peer=not isinstance(model, IResNetFlow)
    )


def _sample_provider(name: str, model: nn.Module) -> Provider:
    """Checked by the way back to the latents; our tolerance is such that the errors are alike."""
    if isinstance(model, IResNetFlow):
        flow = model

        def ours(z: Tensor) -> Tensor:
            with torch.no_grad():
                return flow.inverse(z, tol=_SAMPLE_ERROR)

        return Provider(name, ours, _SAMPLE_ERROR, result=lambda x: flow.features(x).detach())

    def peers(z: Tensor) -> Tensor:
        return model(z).detach()

    return Provider(name, peers, _SAMPLE_ERROR, result=lambda x: _by_parts(model.inverse, x), peer=True)


def _models(density: Density2d, seconds: float) -> Iterator[tuple[str, nn.Module, int]]:
    for name, make, rate in ((_PEER, _peer_flow, _PEER_RATE), (_OURS, _flow, _RATE)):
        if name == _OURS or find_spec("normflows"):
            torch.manual_seed(0)
            model = make()
            yield name, model, _train(model, density, rate, seconds)


def _problems(device: torch.device, quick: bool) -> Iterator[Problem]:
    if device.type == "cuda":
        return  # so small a flow is for a CPU
    seconds = 3 if quick else 280
    for name in ("8gaussians",) if quick else _TARGETS:
        density = density2d(name)
        trained = list(_models(density, seconds))
        compared = len(trained) > 1
        must, aim = _TARGETS[name]
        yield Problem(
            name=f"{name}: {_HELD_OUT:,} held-out after {seconds} s of training",
            inputs=[density.sample(_HELD_OUT, seed=99)],
            oracle=lambda x, density=density: torch.tensor(density.entropy, dtype=torch.float64),
            providers=[_likelihood_provider(label, model, density, steps) for label, model, steps in trained],
            promises=[
                Promise(_OURS, None, must, aim, quantity="value", of=_GAP),
                *([Promise(_OURS, _PEER, 1, 0.5, quantity="share", of=_GAP)] * compared),
            ],
        )
        yield Problem(
            name=f"{name}: {_SAMPLES:,} samples",
            inputs=[torch.randn(_SAMPLES, 2)],
            oracle=lambda z: z.double(),
            providers=[_sample_provider(label, model) for label, model, _ in trained],
            promises=[Promise(_OURS, _PEER, 10, 20)] * compared,
        )
        yield Problem(
            name=f"{name}: training step, batch {_BATCH}",
            inputs=[density.sample(_BATCH, seed=3)],
            oracle=lambda x: torch.empty(0),
            providers=[
                *(_step_provider(label, model) for label, model, _ in trained),
                *(
                    _step_provider(_COMPILED, copy.deepcopy(model), compiled=True)
                    for label, model, _ in trained
                    if label == _OURS and not quick
                ),
            ],
            promises=[
                *([Promise(_OURS, _PEER, 2, 4)] * compared),
                *([Promise(_COMPILED, _PEER, 2, 4)] * (compared and not quick)),
            ],
        )


CASE = Case("Densities in the plane", _problems)
