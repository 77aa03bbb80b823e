"""Figure 1 of the papers: paths of a plain and of an invertible network through their depth, in one dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from ..certificate import certify, enforce
from ..nn import InvertibleResidualBlock, InvertibleSequential, LipschitzMLP, fuse
from ..report.figures import new_figure
from ..training.stepping import Stepper
from .job import Job
from .record import Record, Table

_BLOCKS, _HIDDEN, _COEFF = 20, (32, 32), 0.95
# As many noisy points of the cubic, and the standard deviation of the noise.
_POINTS, _NOISE = 60, 1.0
_LINES, _RATE, _CLIP = 81, 3e-3, 1.0


def fig1(job: Job) -> Record:
    """Both networks learn a noisy cubic at half of their depth, and the identity at the end of it."""
    from matplotlib import colormaps  # noqa: PLC0415  (an optional package)

    networks = {"plain ResNet": None, "i-ResNet": _COEFF}
    figure = new_figure(9.0, 4.6)
    rows = []
    for axis, (name, coeff) in zip(figure.subplots(1, 2, sharey=True), networks.items(), strict=True):
        chain = _train(name, coeff, job)
        certificate = certify(chain.eval()) if coeff is None else enforce(chain.eval())
        paths = _paths(chain, torch.linspace(-2, 2, _LINES).unsqueeze(1))
        axis.set_prop_cycle("color", colormaps["viridis"](torch.linspace(0, 0.9, _LINES).numpy()))
        axis.plot(paths.numpy(), range(_BLOCKS + 1), lw=0.8)
        axis.axhline(_BLOCKS / 2, color="#8a8f98", lw=0.8, ls=":")
        axis.set_title(name, fontsize=11)
        axis.set_xlabel("value (input at the bottom, its colour kept)")
        gaps = paths.diff(dim=1)
        verdict = "yes" if certificate.guaranteed else "no"
        x = paths[0]
        errors = (
            float((found - of).square().mean().sqrt()) for found, of in ((paths[_BLOCKS // 2], x**3), (paths[-1], x))
        )
        rows.append((name, *errors, int((gaps <= 0).any(0).sum()), float(gaps.min()), verdict))
    figure.axes[0].set_ylabel("depth (residual blocks)")
    figure.axes[0].set_yticks([0, _BLOCKS // 2, _BLOCKS])
    job.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(job.out / "fig1.png", dpi=130)
    columns = (
        "network",
        "error of x³",
        "error of x",
        f"of {_LINES - 1} neighbours cross",
        "smallest gap",
        "guaranteed inverse",
    )
    settings = {
        "blocks": _BLOCKS,
        "hidden": _HIDDEN,
        "coeff": _COEFF,
        "points": _POINTS,
        "noise": _NOISE,
        "lr": _RATE,
        "clip": _CLIP,
    }
    return Record(
        "fig1",
        "Dynamics in one dimension",
        job.command("fig1"),
        job.scale.name,
        {**job.settings(), **settings, "steps": job.scale.steps},
        (Table("Root mean square errors, and paths of neighbouring inputs", columns, tuple(rows)),),
        (("fig1.png", "Paths through a plain and an invertible residual network"),),
        (
            f"Half depth (dotted) learns x³ with normal noise (σ = {_NOISE:g}) at {_POINTS} points of [−2, 2], full "
            "depth x itself.",
            "Published: paths of the plain network cross and collapse, those of the invertible one do not.",
        ),
    )


def _train(name: str, coeff: float | None, job: Job) -> InvertibleSequential:
    steps = job.scale.steps
    torch.manual_seed(job.seed)
    branches = [LipschitzMLP(1, _HIDDEN, coeff=coeff, activation="elu") for _ in range(_BLOCKS)]
    chain = InvertibleSequential(*map(InvertibleResidualBlock, branches)).train()
    first, second = fuse(chain[: _BLOCKS // 2]), fuse(chain[_BLOCKS // 2 :])
    x = torch.linspace(-2, 2, _POINTS).unsqueeze(1)
    cubic = x**3 + _NOISE * torch.randn(_POINTS, 1)
    optimizer = torch.optim.AdamW(chain.parameters(), lr=_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=_RATE, total_steps=steps)
    stepper = Stepper(chain, optimizer, clip=_CLIP, schedule=schedule)
    for step in range(1, steps + 1):
        half = first(x)
        stepper.step((half - cubic).square().mean() + (second(half) - x).square().mean())
        job.report(f"training the {name}", step, steps)
    stepper.conclude()
    return chain


@torch.no_grad()
def _paths(chain: InvertibleSequential, x: Tensor) -> Tensor:
    """(blocks + 1, n) values of n inputs after every block."""
    values = [x]
    for block in chain:
        values.append(block(values[-1]))
    return torch.cat(values, 1).T
