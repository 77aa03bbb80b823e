"""Figure 2 of the workshop paper: the largest singular value of every layer."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..models import IResNetClassifier
from ..nn import frozen_state
from ..ops import conv_singular_values
from ..report.figures import new_figure
from .classification import held_out
from .job import CONSTRAINED, Job
from .record import Record, Table


def fig2(job: Job) -> Record:
    """Largest singular values with circular padding: the unconstrained networks left, those of each c right."""
    networks = job.networks()
    image = held_out(job, 1)
    norms = {network.label: largest_singular_values(network.model, image) for network in networks}
    bounds = {
        network.label: max(layer.bound for block in network.certificate.blocks for layer in block.layers)
        for network in networks
    }
    figure = new_figure(10.5, 4.0)
    left, right = figure.subplots(1, 2)
    for label, values in norms.items():
        axis = right if label in CONSTRAINED else left
        axis.plot(range(1, len(values) + 1), values, "o-", ms=3, lw=1, label=label)
    for axis in (left, right):
        axis.axhline(1.0, color="black", lw=1)
        axis.set_xlabel("convolution, from input to output")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_ylabel("largest singular value")
        axis.set_ylim(0, None)
        axis.legend(frameon=False, fontsize=9)
        axis.grid(alpha=0.25)
    left.set_title("without constraint", fontsize=11)
    right.set_title("normalised", fontsize=11)
    job.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(job.out / "fig2.png", dpi=130)
    rows = tuple(
        (label, min(values), max(values), sum(value > 1 for value in values), len(values), bounds[label])
        for label, values in norms.items()
    )
    columns = ("network", "smallest", "largest", "layers above 1", "layers", "largest proven bound")
    return Record(
        "fig2",
        "Largest singular value of every layer",
        job.command("fig2"),
        job.scale.name,
        {**job.settings(), "values": norms},
        (Table("Largest singular values over the layers", columns, rows),),
        (("fig2.png", "Largest singular value of every convolution"),),
        (
            "Published (CIFAR-10, Figure 2): roughly two thirds of the layers of the vanilla and BN networks are above "
            "1, and none of the normalised ones.",
            "As in the paper, values are those of the convolution with circular padding at the layer's input size "
            "(Sedghi et al. 2018), computed exactly. The networks pad with zeros: what is proven of that, and held to "
            "c, is the last column; with circular padding the same weights can exceed c.",
            "Of BN the convolutions alone, without the scales of the normalisation behind them.",
            job.about_networks(),
        ),
    )


@torch.no_grad()
def largest_singular_values(model: IResNetClassifier, image: Tensor) -> list[float]:
    """Of every convolution of the trunk in order, at the size of its input for this image (1, C, H, W)."""
    sizes: dict[str, tuple[int, int]] = {}

    def note(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        sizes[name] = (args[0].shape[2], args[0].shape[3])

    layers = {name: part for name, part in model.trunk.named_modules() if isinstance(part, nn.Conv2d)}
    hooks = [part.register_forward_pre_hook(partial(note, name)) for name, part in layers.items()]
    try:
        with frozen_state(model):
            model.trunk(image.to(next(model.parameters()).device))
            return [float(conv_singular_values(layers[name].weight, size).max()) for name, size in sizes.items()]
    finally:
        for hook in hooks:
            hook.remove()
