"""Weights of the official code of invertible residual networks (github.com/jhjacobsen/invertible-resnet)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from ..models import ClassifierConfig, IResNetClassifier
from ..nn import ActNorm, Bottleneck, InvertibleResidualBlock, find_spectral_norm, spectral_norm
from ..ops import conv_norm_bound

# The official normalisation divides by max(1, σ/c), and in convolutions of more than one tap by this much more.
_ADDED = 1e-5
_SETTINGS = tuple(
    "in_shape nBlocks nStrides nChannels nClasses init_ds inj_pad coeff nonlin actnorm n_power_iter".split()  # noqa: SIM905
)
# Activations that are the same function here.
_ACTIVATIONS = ("elu", "relu")


def load(state_dict: Mapping[str, Tensor], config: Mapping[str, Any], *, exact: bool = True) -> IResNetClassifier:
    """The classifier ``conv_iResNet`` of the official code, with its weights.

    The official code normalises by a power iteration that has not converged, and stage by stage at the input size of
    the stage before, so its layers may exceed ``coeff``. Loaded exactly, such a layer keeps its weight, and the proven
    bound of its norm becomes its coefficient: the numbers agree with the official code's, and ``irf.certify`` shows
    what holds of them. Those coefficients are not in the state dict, nor in the network's ``config``: to keep such a
    network, keep the official state dict.

    Args:
        state_dict: as the official code saves it, with or without the prefix of ``DataParallel``.
        config: the arguments that the network was constructed with, by their official names: ``in_shape``,
            ``nBlocks``, ``nStrides``, ``nChannels``, ``nClasses``, ``init_ds``, ``inj_pad``, ``coeff``, ``nonlin``,
            ``actnorm``, ``n_power_iter``. Others are ignored.
        exact: keep the weights as the official code uses them. False: let our normalisation hold every layer to
            ``coeff``, which changes the function a little.

    Returns:
        The network, in evaluation mode.

    Raises:
        ValueError: settings that this network has no counterpart of, or a state dict that does not belong to them;
            the message names what is missing, left over or of another shape.

    Example::

        state = safetensors.torch.load_file("iresnet37_mnist.safetensors")
        model = irf.compat.official.load(state, json.loads(Path("iresnet37_mnist.json").read_text()))
    """
    state = {name.removeprefix("module."): value for name, value in state_dict.items()}
    model = IResNetClassifier(_classifier_config(config, constrained=any("weight_orig" in name for name in state)))
    unused = {name for name in state if not name.startswith("prior_") and not name.endswith("num_batches_tracked")}
    with torch.no_grad():
        blocks = [part for part in model.trunk if isinstance(part, InvertibleResidualBlock)]
        actnorms = [part for part in model.trunk if isinstance(part, ActNorm)]
        for index, block in enumerate(blocks):
            source = _Source(state, f"stack.{index}", unused)
            if actnorms:
                _load_actnorm(actnorms[index], source)
            _load_branch(block, source, model.config.coeff, exact)
        head = _Source(state, "", unused)
        norm, linear = model.head[0], model.head[-1]
        for name in ("weight", "bias", "running_mean", "running_var"):
            head.copy(f"bn1.{name}", getattr(norm, name))
        for name in ("weight", "bias"):
            head.copy(f"logits.{name}", getattr(linear, name))
    if unused:
        raise ValueError(
            f"the state dict has {len(unused)} tensors that a network of this config has no place for, as "
            f"{sorted(unused)[0]!r}. Remedy: pass the arguments that the network was constructed with"
        )
    return model.eval()


def _classifier_config(config: Mapping[str, Any], *, constrained: bool) -> ClassifierConfig:
    missing = [name for name in _SETTINGS if name not in config]
    if missing:
        raise ValueError(f"config lacks {', '.join(missing)}: the arguments that the network was constructed with")
    strides, init_ds = list(config["nStrides"]), config["init_ds"]
    if strides != [1] + [2] * (len(strides) - 1):
        raise ValueError(
            f"nStrides={strides} has no counterpart here: the first stage keeps the size, the others halve"
        )
    if config["in_shape"][-1] != config["in_shape"][-2]:
        raise ValueError(f"in_shape={config['in_shape']} has no counterpart here: images must be square")
    if init_ds not in (1, 2):
        raise ValueError(f"init_ds={init_ds} has no counterpart here: 1 or 2")
    if config["nonlin"] not in _ACTIVATIONS:
        raise ValueError(f"nonlin={config['nonlin']!r} has no counterpart here: {' or '.join(_ACTIVATIONS)}")
    if config.get("density_estimation", False):
        raise ValueError("density_estimation=True has no counterpart here: it drops the head of the classifier")
    return ClassifierConfig(
        in_shape=config["in_shape"],
        n_classes=config["nClasses"],
        blocks=config["nBlocks"],
        hidden=config["nChannels"],
        squeeze_input=init_ds == 2,
        squeeze_order="position",
        inject=config["inj_pad"],
        coeff=config["coeff"] if constrained else None,
        activation=config["nonlin"],
        actnorm=config["actnorm"],
        head="pooled",
        n_power_iterations=config["n_power_iter"],
    )


class _Source:
    """The part of a state dict under a prefix; what is read of it is no longer unused."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str, unused: set[str]) -> None:
        self._state, self._prefix, self._unused = state, prefix, unused

    def read(self, name: str) -> Tensor:
        full = f"{self._prefix}.{name}".removeprefix(".")
        if full not in self._state:
            raise ValueError(
                f"the state dict has no {full!r}. Remedy: pass the arguments that the network was constructed with"
            )
        self._unused.discard(full)
        return self._state[full]

    def copy(self, name: str, target: Tensor) -> None:
        value = self.read(name)
        if value.dim() > target.dim() == 1:
            value = value.flatten()  # per channel, with axes to broadcast over
        if value.shape != target.shape:
            raise ValueError(
                f"{self._prefix}.{name}".removeprefix(".")
                + f" has shape {tuple(value.shape)}, a network of this config needs {tuple(target.shape)}"
            )
        target.copy_(value)


def _load_actnorm(actnorm: ActNorm, source: _Source) -> None:
    """Theirs is x·exp(s) + b, ours (x + b)·exp(s)."""
    shift = torch.empty_like(actnorm.bias)
    source.copy("actnorm._log_scale", actnorm.log_scale)
    source.copy("actnorm._shift", shift)
    actnorm.bias.copy_(shift * (-actnorm.log_scale).exp())
    actnorm.mark_initialized()


def _load_branch(block: InvertibleResidualBlock, source: _Source, coeff: float | None, exact: bool) -> None:
    branch = block.g
    assert isinstance(branch, Bottleneck)
    layers = list(branch)
    for position, layer in enumerate(layers):
        if not isinstance(layer, nn.Conv2d):
            continue
        name = f"bottleneck_block.{position}"
        assert layer.bias is not None
        source.copy(f"{name}.bias", layer.bias)
        norm = find_spectral_norm(layer)
        if norm is None:
            source.copy(f"{name}.weight", layer.weight)
            continue
        assert coeff is not None
        original: Any = layer.parametrizations.weight.original  # type: ignore[union-attr]
        source.copy(f"{name}.weight_orig", original)
        u, v, _ = (source.read(f"{name}.weight_{part}") for part in ("u", "v", "sigma"))  # σ: of the last step
        added = 0.0 if original[0, 0].numel() == 1 else _ADDED
        original.div_(max(1.0, _official_sigma(original, u, v) / coeff) + added)
        if exact:
            size = (1, 1) if norm.geometry is None else norm.geometry.input_size
            norm.coeff = max(coeff, float(conv_norm_bound(original, size, padding=original.shape[-1] // 2)))


def _official_sigma(weight: Tensor, u: Tensor, v: Tensor) -> float:
    """⟨u, W v⟩ in float64, at the input size that u and v tell."""
    u, v, weight = u.to(weight.device, torch.float64), v.to(weight.device, torch.float64), weight.double()
    if weight[0, 0].numel() == 1:
        return float(u @ weight.flatten(1) @ v)
    side = round((v.numel() / weight.shape[1]) ** 0.5)
    if v.numel() != weight.shape[1] * side**2 or u.numel() != weight.shape[0] * side**2:
        raise ValueError(
            f"weight_u and weight_v of {u.numel()} and {v.numel()} values do not fit a weight of {tuple(weight.shape)}"
        )
    image = v.view(1, weight.shape[1], side, side)
    return float(u @ conv2d(image, weight, padding=weight.shape[-1] // 2).flatten())


def spectral_norm_conv(
    module: nn.Module,
    coeff: float,
    input_dim: Sequence[int],
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
) -> nn.Module:
    """The official code's function of this name, by :func:`iresnet_fast.nn.spectral_norm`.

    Args:
        module: a convolution.
        coeff: the Lipschitz coefficient.
        input_dim: (C, H, W) of its input.
        name: of the parameter.
        n_power_iterations: per training forward.
        eps: accepted, and without effect: vectors of length 0 are handled without it.

    Raises:
        ValueError: ``input_dim`` does not have the convolution's channels; otherwise as ``spectral_norm``.
    """
    channels = getattr(module, "in_channels", None)
    if len(input_dim) != 3 or input_dim[0] != channels:
        raise ValueError(f"input_dim must be (C, H, W) with the convolution's {channels} channels, got {input_dim}")
    size = tuple(input_dim[1:])
    return spectral_norm(module, coeff, n_power_iterations=n_power_iterations, input_size=size, name=name)


def spectral_norm_fc(
    module: nn.Module, coeff: float, n_power_iterations: int = 1, name: str = "weight", eps: float = 1e-12
) -> nn.Module:
    """The official code's function of this name, by :func:`iresnet_fast.nn.spectral_norm`.

    Args:
        module: a linear layer, or a 1×1 convolution.
        coeff: the Lipschitz coefficient.
        n_power_iterations: per training forward.
        name: of the parameter.
        eps: accepted, and without effect.
    """
    return spectral_norm(module, coeff, n_power_iterations=n_power_iterations, name=name)
