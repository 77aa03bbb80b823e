"""All singular values of a model's layers, beside what is proven of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import find_spectral_norm, frozen_state
from ..ops import conv_singular_values
from .lipschitz import layer_bound


@dataclass(frozen=True)
class LayerSpectrum:
    """The singular values of a layer with a normalised weight.

    Attributes:
        name: in the model.
        kind: type of the layer.
        values: (count,) float64, descending: of the matrix, or of the convolution with circular padding at the layer's
            input size (Sedghi, Gupta, Long 2018).
        bound: proven upper bound of the layer's norm at its own padding.
        coeff: the coefficient its parametrization aims at.
    """

    name: str
    kind: str
    values: Tensor
    bound: float
    coeff: float

    @property
    def norm(self) -> float:
        """The largest value: the norm with circular "same" padding, and no bound with any other.

        Where the stride does not divide the input size, that of the convolution with stride 1.
        """
        return float(self.values[0])

    @property
    def within(self) -> bool:
        """Whether the norm is proven to be at most coeff."""
        return self.bound <= self.coeff


@torch.no_grad()
def layer_spectra(model: nn.Module) -> tuple[LayerSpectrum, ...]:
    """Singular values and proven bounds of every spectrally normalised layer, in order; changes nothing.

    Args:
        model: any module.

    Raises:
        TypeError: model is not an ``nn.Module``.
        ValueError: it has no spectrally normalised layer.

    Example:
        >>> [spectrum] = layer_spectra(SpectralConv2d(3, 8, 3, padding=1, coeff=0.9, input_size=(8, 8)))
        >>> spectrum.values.shape
        torch.Size([192])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    spectra = []
    with frozen_state(model):
        for name, module in model.named_modules():
            norm = find_spectral_norm(module)
            if norm is None:
                continue
            layer: Any = module
            kind = type(module).__name__.removeprefix("Parametrized")
            values = _values(layer, norm.geometry)
            bound = layer_bound(module, layer.weight)
            spectra.append(LayerSpectrum(name or kind, kind, values, bound, norm.coeff))
    if not spectra:
        raise ValueError(f"{type(model).__name__} has no spectrally normalised layer. Remedy: irf.nn.spectral_norm")
    return tuple(spectra)


def spectra_to_markdown(spectra: tuple[LayerSpectrum, ...]) -> str:
    """A table of the layers: exact circular norm, proven bound, coeff, and whether the bound keeps to it."""
    lines = ["| layer | kind | circular norm | proven bound | coeff | at most coeff |", "|---|---|---|---|---|---|"]
    for layer in spectra:
        cells = (layer.name, layer.kind, f"{layer.norm:.6g}", f"{layer.bound:.6g}", f"{layer.coeff:.6g}")
        lines.append(f"| {' | '.join(cells)} | {'proven' if layer.within else 'no'} |")
    return "\n".join(lines) + "\n"


def _values(layer: Any, geometry: Any) -> Tensor:
    weight = layer.weight.detach()
    if geometry is None:
        return torch.linalg.svdvals(weight.double().flatten(1))
    # A stride that does not divide the size takes some of the outputs of a stride that does: 1.
    divides = all(n % s == 0 for n, s in zip(geometry.input_size, geometry.stride, strict=True))
    stride = geometry.stride if divides else (1,) * len(geometry.stride)
    values = conv_singular_values(
        weight, geometry.input_size, stride=stride, dilation=geometry.dilation, groups=geometry.groups
    )
    return values.flatten().sort(descending=True).values
