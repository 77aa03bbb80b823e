"""Flows in the plane, ours and others', trained alike."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..certificate import enforce
from ..data import Density2d, density2d
from ..models import IResNetFlow
from ..optional import require
from ..report.figures import new_figure
from ..training import checkpoint as checkpoints
from ..training.stepping import DivergedError, Stepper
from .job import Job
from .record import Table

_DENSITIES = ("8gaussians", "checkerboard")
_BATCH, _RATE, _CLIP, _HIDDEN = 256, 5e-3, 1.0, (64, 64)
_CELLS, _TOGETHER = 120, 5000
OURS = "i-ResNet"
SETTINGS = {"batch_size": _BATCH, "lr": _RATE, "hidden": _HIDDEN, "clip": _CLIP}


def compare(job: Job) -> Table:
    """Held-out nats of every flow, and ``plane.png``: the data, and what each flow learned of it.

    Flows that an earlier call has trained are taken from the folder.

    Raises:
        ValueError: the folder has flows that were trained otherwise.
        ModuleNotFoundError: zuko or normflows is not installed.
    """
    flows = _flows()
    figure = new_figure(1.9 * (len(flows) + 1), 2.1 * len(_DENSITIES))
    axes = figure.subplots(len(_DENSITIES), len(flows) + 1, squeeze=False)
    rows = []
    for row, name in zip(axes, _DENSITIES, strict=True):
        density = density2d(name)
        window = [-density.extent, density.extent]
        row[0].hist2d(*density.sample(100_000).T.numpy(), bins=_CELLS, range=[window, window], cmap="magma")
        row[0].set_ylabel(name, fontsize=10)
        for axis, (label, make) in zip(row[1:], flows.items(), strict=True):
            model, state = _trained(make, density, job, f"{label}, {name}")
            log_prob = _log_prob(model)
            held_out = density.sample(job.scale.samples, seed=99)
            found = -float(torch.cat([log_prob(part) for part in held_out.split(_TOGETHER)]).mean())
            size = sum(parameter.numel() for parameter in model.parameters())
            rows.append((name, label, found, density.entropy, f"{size:,}", state["lr"], state["seconds"]))
            ticks = (torch.arange(_CELLS) + 0.5) / _CELLS * 2 * density.extent - density.extent
            grid = torch.cat([log_prob(part) for part in torch.cartesian_prod(ticks, ticks).split(_TOGETHER)])
            axis.imshow(grid.exp().view(_CELLS, _CELLS).T.numpy(), origin="lower", extent=window * 2, cmap="magma")
        for axis, label in zip(row, ("data", *flows), strict=True):
            axis.set_aspect("equal")
            axis.set_xticks([])
            axis.set_yticks([])
            if name == _DENSITIES[0]:
                axis.set_title(label, fontsize=10)
    job.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(job.out / "plane.png", dpi=130)
    columns = ("density", "flow", "nats held out", "entropy", "parameters", "highest rate", "CPU seconds")
    title = f"Negative log-likelihood after {job.scale.steps:,} steps of {_BATCH}, AdamW, one cycle"
    return Table(title, columns, tuple(rows))


def _flows() -> dict[str, Callable[[], nn.Module]]:
    """Of zuko and normflows, and ours."""
    require("the comparison of flows", "zuko", "normflows")
    import normflows  # noqa: PLC0415  (a peer, where it is installed)
    import zuko  # noqa: PLC0415

    def nice() -> Any:
        """Additive couplings and one scale for each dimension; zuko's NICE has Real NVP's couplings by default."""
        additive = zuko.flows.NICE(
            2, transforms=8, hidden_features=_HIDDEN, univariate=zuko.transforms.AdditiveTransform, shapes=[()]
        )
        scales = zuko.lazy.UnconditionalTransform(
            zuko.transforms.MonotonicAffineTransform, torch.zeros(2), torch.zeros(2)
        )
        return zuko.lazy.Flow([*additive.transform.transforms, scales], additive.base)

    def glow() -> Any:
        links: list[nn.Module] = []
        for _ in range(8):
            net = normflows.nets.MLP([1, *_HIDDEN, 2], init_zeros=True)
            links += [normflows.flows.AffineCouplingBlock(net), normflows.flows.LULinearPermute(2)]
            links.append(normflows.flows.ActNorm(2))
        return normflows.NormalizingFlow(normflows.distributions.DiagGaussian(2, trainable=False), links)

    return {
        "NICE": nice,
        "MADE": lambda: zuko.flows.MAF(2, transforms=1, hidden_features=_HIDDEN),
        "MAF": lambda: zuko.flows.MAF(2, transforms=8, hidden_features=_HIDDEN),
        "Real NVP": lambda: zuko.flows.RealNVP(2, transforms=8, hidden_features=_HIDDEN),
        "Glow": glow,
        "continuous": lambda: zuko.flows.CNF(2, hidden_features=_HIDDEN),
        OURS: lambda: IResNetFlow.from_config("density2d"),
    }


def _trained(
    make: Callable[[], nn.Module], density: Density2d, job: Job, what: str
) -> tuple[nn.Module, dict[str, Any]]:
    """Train a flow, or take what was trained from the folder; with the rate and the CPU seconds that it took.

    Where steps diverge it starts again at half the rate.

    Raises:
        DivergedError: small rates do not help.
    """
    name = what.replace(", ", "-").replace(" ", "-")
    path = job.out / f"runs-{job.scale.name}" / "plane" / f"{name}.safetensors"
    settings = json.loads(json.dumps({**SETTINGS, "steps": job.scale.steps, "seed": job.seed}))
    if path.is_file():
        found = checkpoints.read(path)
        if found.state["settings"] != settings:
            raise ValueError(
                f"{path} was trained with {found.state['settings']}, not {settings}. Remedy: another folder, or "
                "without that file"
            )
        model = make()
        checkpoints.load_into(model, found.model)
    else:
        started, rate = time.process_time(), _RATE
        while True:
            try:
                model = _train(make, density, job, what, rate)
                break
            except DivergedError:
                rate /= 2
                if rate < _RATE / 50:
                    raise
        state = {"settings": settings, "seconds": time.process_time() - started, "lr": rate}
        found = checkpoints.Checkpoint(model.state_dict(), {}, {}, state)
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoints.save(found, path)
    model.eval()
    if isinstance(model, IResNetFlow):
        enforce(model)
    return model, found.state


def _train(make: Callable[[], nn.Module], density: Density2d, job: Job, what: str, rate: float) -> nn.Module:
    """The same steps for every flow."""
    torch.manual_seed(job.seed)
    model = make()
    steps = job.scale.steps
    generator = torch.Generator().manual_seed(job.seed + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps)
    stepper = Stepper(model, optimizer, clip=_CLIP, schedule=schedule)
    log_prob = _differentiable_log_prob(model.train())
    for step in range(1, steps + 1):
        stepper.step(-log_prob(density.draw(_BATCH, generator)).mean())
        job.report(what, step, steps)
    stepper.conclude()
    return model


def _differentiable_log_prob(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Zuko's flows return a distribution; the others have a method."""
    method: Callable[[Tensor], Tensor] | None = getattr(model, "log_prob", None)
    return method if method is not None else lambda x: model().log_prob(x)


def _log_prob(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.no_grad()(_differentiable_log_prob(model))
