"""What spectral normalisation costs a training step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import iresnet_fast as irf
from iresnet_fast.nn import find_spectral_norm, fused_weights

from ..case import Case, Problem, Promise, Provider, Work, compiled

_STEP, _OURS = "training step", "iresnet_fast, fused normalisation"
_EAGER = "eager normalisation, layer by layer"


class _Layers:
    """The normalised layers of a model, with the state of u and v that every run starts from."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers: list[Any] = [module for module in model.modules() if find_spectral_norm(module)]
        self.norms: list[Any] = [find_spectral_norm(layer) for layer in self.layers]
        self.start = [(norm._u.clone(), norm._v.clone()) for norm in self.norms]
        self.grads = [torch.randn_like(layer.weight) for layer in self.layers]

    def rewind(self) -> None:
        for norm, (u, v) in zip(self.norms, self.start, strict=True):
            norm._u.copy_(u)
            norm._v.copy_(v)

    def normalise(self) -> list[Tensor]:
        """All W̄ in training mode and the gradients through them, layer by layer."""
        self.rewind()
        weights = [layer.weight for layer in self.layers]
        torch.autograd.backward(weights, self.grads)
        return weights

    def normalise_fused(self) -> list[Tensor]:
        """The same by the grouped op, as a fused model does it."""
        self.rewind()
        with fused_weights(self.model):
            weights = [layer.weight for layer in self.layers]
        torch.autograd.backward(weights, self.grads)
        return weights

    def work(self, iterations: int) -> Work:
        """Two half steps an iteration and the gradient of σ; every weight is read twice and written twice."""
        half_step = sum(
            2 * grad[0, 0].numel() * len(grad) * norm._v.numel()
            for grad, norm in zip(self.grads, self.norms, strict=True)
        )
        return Work((2 * iterations + 1) * half_step, torch.float32, 16 * sum(grad.numel() for grad in self.grads))


def _flat(weights: list[Tensor]) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in weights])


def _step(layers: _Layers, images: Tensor, labels: Tensor) -> Tensor:
    """Forward, backward and an update of size 0, so that every run starts from the same weights."""
    layers.rewind()
    layers.model.zero_grad()
    loss = F.cross_entropy(layers.model(images), labels)
    loss.backward()
    with torch.no_grad():
        torch._foreach_add_(list(layers.model.parameters()), 0.0)
    return loss.detach()


def _torch_spectral_norm(model: nn.Module) -> list[nn.Module]:
    """The same convolutions under torch's parametrization, which normalises the reshaped kernel."""
    plain = []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            conv = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, device=layer.weight.device)
            plain.append(nn.utils.parametrizations.spectral_norm(conv).train())
    return plain


def _problem(
    config: str, batch: int, iterations: int, must_aim: tuple[float, float] | None, device: torch.device
) -> Problem:
    torch.manual_seed(0)
    model = irf.models.IResNetClassifier.from_config(config, n_power_iterations=iterations).to(device)
    images = torch.randn(batch, *model.config.in_shape, device=device)
    labels = torch.randint(0, model.config.n_classes, (batch,), device=device)
    model.train()(images)
    layers = _Layers(model)
    exact = _Layers(copy.deepcopy(model).double())
    exact.grads = [grad.double() for grad in layers.grads]
    exact.start = [(u.double(), v.double()) for u, v in layers.start]
    # A copy of its own: eager runs of the same modules would make torch.compile trace it again.
    twin = _Layers(copy.deepcopy(model))
    twin.start, twin.grads = layers.start, layers.grads
    torchs = _torch_spectral_norm(model)

    def torch_normalise(_: Any) -> list[Tensor]:
        weights = [conv.weight for conv in torchs]
        torch.autograd.backward(weights, layers.grads)
        return weights

    def unit_norms(weights: list[Tensor]) -> Tensor:
        """The largest singular value of each reshaped kernel, which torch's version brings to 1."""
        return torch.stack([torch.linalg.matrix_norm(weight.detach().double().flatten(1), 2) for weight in weights])

    work = layers.work(iterations)
    device_time = "cpu" if device.type == "cpu" else "wall"
    exact_weights = _flat(exact.normalise())
    return Problem(
        name=f"{config}, batch {batch}, {iterations} power iteration{'s' * (iterations > 1)}",
        inputs=[(images, labels)],
        oracle=lambda _: exact_weights,
        providers=[
            Provider(
                _STEP,
                lambda data: _step(layers, *data),
                1e-4,
                oracle=lambda data: _step(exact, data[0].double(), data[1]),
            ),
            Provider(_OURS, lambda _: layers.normalise_fused(), 1e-5, _flat, work=work),
            Provider(_EAGER, lambda _: layers.normalise(), 1e-5, _flat, work=work),
            Provider(
                "iresnet_fast, unfused, torch.compile",
                _ignoring_input(compiled(twin.normalise)),
                1e-5,
                _flat,
                work=work,
            ),
            # Its one iteration a forward is an estimate: within 10 % of 1 it has done what it promises.
            Provider(
                "torch's spectral_norm (reshaped kernels)",
                torch_normalise,
                0.1,
                unit_norms,
                oracle=lambda _: torch.ones(len(torchs), dtype=torch.float64, device=device),
            ),
        ],
        promises=[Promise(_OURS, _STEP, *must_aim, quantity="share", of=device_time)] if must_aim else [],
    )


def _ignoring_input(function):
    return lambda _: function()


def _problems(device: torch.device, quick: bool) -> Iterator[Problem]:
    config = "digits" if quick else "iresnet-64"
    for iterations, must_aim in ((1, (0.06, 0.04)), (5, (0.16, 0.10))):
        yield _problem(config, 32, iterations, None if quick else must_aim, device)
        if quick:
            return


CASE = Case("Spectral normalisation in a training step", _problems)
