"""Figures of images, convergence and norms, and the colours of all figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ..certificate import Certificate, LayerSpectrum
from .convergence import BlockConvergence

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#2563a8", "#d9662b", "#8a8f98"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, drawn without a display."""
    from matplotlib.figure import Figure  # noqa: PLC0415  (an optional package)

    return Figure(figsize=(width, height), layout="constrained")


def draw_reconstructions(
    images: Tensor, rows: Sequence[tuple[str, Tensor, Sequence[float]]], path: Path, count: int = 12
) -> None:
    """Original images in [−½, ½], grey or colour, above what each network makes of their latents, with the error."""
    figure = new_figure(1.0 * count + 1.6, 1.25 * (len(rows) + 1))
    axes = figure.subplots(len(rows) + 1, count, squeeze=False)
    everything = [("original", images, [math.nan] * len(images)), *rows]
    for row, (name, pictures, errors) in zip(axes, everything, strict=True):
        for column, axis in enumerate(row[:count]):
            _show(axis, pictures[column].nan_to_num(0.0) + 0.5)
            axis.set_xticks([])
            axis.set_yticks([])
            if not math.isnan(errors[column]):
                axis.set_xlabel(f"{errors[column]:.0e}", fontsize=8)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
    figure.suptitle("Held-out images reconstructed from the latents (below each: relative error)", fontsize=11)
    figure.savefig(path, dpi=130)


def draw_samples(images: Tensor, path: Path) -> None:
    """Images (n, C, H, W) in [0, 1], grey or colour, in rows of twelve."""
    columns = 12
    rows = math.ceil(len(images) / columns)
    figure = new_figure(0.8 * columns, 0.8 * rows + 0.4)
    for axis, image in zip(figure.subplots(rows, columns, squeeze=False).flat, images, strict=False):
        _show(axis, image)
        axis.set_axis_off()
    figure.suptitle("Samples: latents of the prior, inverted", fontsize=11)
    figure.savefig(path, dpi=130)


def _show(axis: Axes, image: Tensor) -> None:
    """One image (C, H, W), clamped to [0, 1]; grey ones as ink on paper."""
    pixels = image.clamp(0, 1).permute(1, 2, 0).numpy()
    axis.imshow(pixels if len(image) == 3 else pixels[..., 0], cmap="gray_r", vmin=0, vmax=1)


def draw_convergence(curves: Sequence[BlockConvergence], path: Path) -> None:
    """Error of each block's inverse against iterations, and the proven bound of the slowest block."""
    figure = new_figure(7.0, 4.4)
    axis = figure.subplots()
    for index, curve in enumerate(curves):
        axis.semilogy(
            range(len(curve.errors)),
            [max(error, 1e-17) for error in curve.errors],
            color=BLUE,
            alpha=0.55,
            lw=1.3,
            label="measured error, one line per block" if index == 0 else None,
        )
    bounded = [curve for curve in curves if curve.bounds]
    if bounded:
        worst = max(bounded, key=lambda curve: curve.bounds[-1])
        axis.semilogy(
            range(len(worst.bounds)),
            worst.bounds,
            color=ORANGE,
            ls="--",
            lw=1.8,
            label=f"proven bound $L^n/(1-L)\\,\\|x_1-x_0\\|$, L = {worst.lipschitz:.3f}",
        )
    axis.axhline(1.2e-7, color=GREY, lw=1, ls=":")
    axis.text(
        len(curves[0].errors) - 1,
        1.4e-7,
        "float32 resolution",
        color=GREY,
        ha="right",
        va="bottom",
        fontsize=8,
    )
    axis.set_xlabel("fixed-point iterations n (evaluations of g)")
    axis.set_ylabel("largest relative error ‖xₙ − x‖ / ‖x‖")
    axis.set_title("Inverting each block: measured error, and the bound that is proven", fontsize=11)
    axis.set_ylim(1e-16, None)
    axis.legend(frameon=False, fontsize=9)
    axis.grid(alpha=0.25)
    figure.savefig(path, dpi=130)


def draw_spectra(spectra: Sequence[LayerSpectrum], path: Path) -> None:
    """Singular values of every layer, each curve from its largest to its smallest, against the coefficient."""
    figure = new_figure(7.0, 4.0)
    axis = figure.subplots()
    for index, layer in enumerate(spectra):
        values = layer.values.clamp_min(1e-12).numpy()
        share = [100 * i / max(1, len(values) - 1) for i in range(len(values))]
        label = "one line per layer" if index == 0 else None
        axis.plot(share, values, color=BLUE, alpha=0.5, lw=1.1, label=label)
    for coeff in sorted({layer.coeff for layer in spectra}):
        axis.axhline(coeff, color=ORANGE, lw=1.3, ls="--", label=f"coeff = {coeff:g}")
    axis.set_yscale("log")
    axis.set_ylim(1e-3, None)
    axis.set_xlabel("singular values of the layer, largest first (% of them)")
    axis.set_ylabel("singular value (circular padding)")
    axis.set_title("Spectra of the normalised layers", fontsize=11)
    axis.legend(frameon=False, fontsize=9)
    axis.grid(alpha=0.25)
    figure.savefig(path, dpi=130)


def draw_norms(networks: Sequence[tuple[str, Certificate]], coeff: float, path: Path) -> None:
    """Proven largest singular value of every layer of each network, against 1 and the coefficient."""
    figure = new_figure(7.0, 4.0)
    axis = figure.subplots()
    for (name, certificate), color, marker in zip(networks, (BLUE, ORANGE), ("o", "s"), strict=False):
        norms = [layer.bound for block in certificate.blocks for layer in block.layers]
        axis.plot(range(1, len(norms) + 1), norms, marker, color=color, ms=4.5, label=name)
    axis.axhline(1.0, color="black", lw=1)
    axis.axhline(coeff, color=BLUE, lw=1, ls="--", label=f"coeff = {coeff}")
    axis.set_yscale("log")
    axis.set_yticks([0.3, 0.5, 0.9, 2, 5], ["0.3", "0.5", "0.9", "2", "5"])
    axis.minorticks_off()
    axis.set_xlabel("convolution, from input to output")
    axis.set_ylabel("largest singular value (proven bound)")
    axis.set_title("Layers above 1 can make a block fold space; layers below 1 cannot", fontsize=11)
    axis.legend(frameon=False, fontsize=9)
    axis.grid(alpha=0.25)
    figure.savefig(path, dpi=130)
