"""Weights of the official code of invertible residual networks (github.com/jhjacobsen/invertible-resnet)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from ..models import ClassifierConfig, FlowConfig, IResNetClassifier, IResNetFlow, Model
from ..nn import ActNorm, Bottleneck, InvertibleResidualBlock, find_spectral_norm, spectral_norm
from ..ops import conv_norm_bound

# The official normalisation divides by max(1, σ/c), and in convolutions of more than one tap by this much more.
_ADDED = 1e-5
_SETTINGS = "in_shape nBlocks nStrides nChannels inj_pad coeff nonlin actnorm n_power_iter"
_CLASSIFIER_SETTINGS = f"{_SETTINGS} init_ds nClasses".split()
_FLOW_SETTINGS = f"{_SETTINGS} init_squeeze learn_prior numSeriesTerms density_estimation".split()
# Activations that are the same function here.
_ACTIVATIONS = ("elu", "relu")


def load(state_dict: Mapping[str, Tensor], config: Mapping[str, Any], *, exact: bool = True) -> Model:
    """A network of the official code with its weights: the classifier ``conv_iResNet``, or a multi-scale flow.

    The official code normalises by a power iteration that has not converged, and in the classifier stage by stage at
    the input size of the stage before, so its layers may exceed ``coeff``. Loaded exactly, such a layer keeps its
    weight, and the proven bound of its norm becomes its coefficient: the numbers agree with the official code's, and
    ``irf.certify`` shows what holds of them. Those coefficients are not in the state dict, nor in the network's
    ``config``: to keep such a network, keep the official state dict.

    The flow, ``multiscale_conv_iResNet``, takes dequantised data in [0, 1] here, and centres it itself; its latents are
    the official ones, one after the other. A head that it may carry is left out: it takes no part in the density.

    Args:
        state_dict: as the official code saves it, with or without the prefix of ``DataParallel``.
        config: the arguments that the network was constructed with, by their official names: ``in_shape``,
            ``nBlocks``, ``nStrides``, ``nChannels``, ``inj_pad``, ``coeff``, ``nonlin``, ``actnorm``, ``n_power_iter``;
            of the classifier ``init_ds`` and ``nClasses``; of the flow ``init_squeeze``, ``learn_prior``,
            ``numSeriesTerms`` and ``density_estimation``. Others are ignored.
        exact: keep the weights as the official code uses them. False: let our normalisation hold every layer to
            ``coeff``, which changes the function a little.

    Returns:
        An :class:`IResNetClassifier` or an :class:`IResNetFlow`, in evaluation mode.

    Raises:
        ValueError: settings that this network has no counterpart of, or a state dict that does not belong to them;
            the message names what is missing, left over or of another shape.

    Example::

        state = safetensors.torch.load_file("iresnet37_mnist.safetensors")
        model = irf.compat.official.load(state, json.loads(Path("iresnet37_mnist.json").read_text()))
    """
    state = _State(state_dict)
    with torch.no_grad():
        model = _load_flow(state, config, exact) if state.is_multiscale else _load_classifier(state, config, exact)
    state.check_used_up()
    return model.eval()


def _load_classifier(state: _State, config: Mapping[str, Any], exact: bool) -> IResNetClassifier:
    _check_config(config, _CLASSIFIER_SETTINGS)
    if config["nStrides"][0] != 1:
        raise ValueError(f"nStrides={config['nStrides']} has no counterpart here: the first stage keeps the size")
    if config["init_ds"] not in (1, 2):
        raise ValueError(f"init_ds={config['init_ds']} has no counterpart here: 1 or 2")
    if config.get("density_estimation", False):
        raise ValueError("density_estimation=True has no counterpart here: it drops the head of the classifier")
    settings = ClassifierConfig(
        in_shape=config["in_shape"],
        n_classes=config["nClasses"],
        blocks=config["nBlocks"],
        hidden=config["nChannels"],
        squeeze_input=config["init_ds"] == 2,
        squeeze_order="position",
        inject=config["inj_pad"],
        coeff=config["coeff"] if state.is_constrained else None,
        activation=config["nonlin"],
        actnorm=config["actnorm"],
        head="pooled",
        n_power_iterations=config["n_power_iter"],
    )
    model = IResNetClassifier(settings)
    _load_trunk(model, state, [f"stack.{index}" for index in range(sum(settings.blocks))], exact)
    head = _Source(state, "")
    for name in ("weight", "bias", "running_mean", "running_var"):
        head.copy(f"bn1.{name}", getattr(model.head[0], name))
    for name in ("weight", "bias"):
        head.copy(f"logits.{name}", getattr(model.head[-1], name))
    state.leave_out("prior_")
    return model


def _load_flow(state: _State, config: Mapping[str, Any], exact: bool) -> IResNetFlow:
    _check_config(config, _FLOW_SETTINGS)
    squeezes = bool(config["init_squeeze"]) + (config["nStrides"][0] == 2)
    if squeezes == 2:
        raise ValueError(
            "init_squeeze=True and nStrides[0]=2 have no counterpart here: at most one squeeze at the start"
        )
    if config["inj_pad"]:
        raise ValueError(
            f"inj_pad={config['inj_pad']} has no counterpart here: data with added channels has no density"
        )
    if not config["density_estimation"]:
        raise ValueError(
            "density_estimation=False has no counterpart here: such a network classifies the latents of its last scale"
        )
    if not state.is_constrained:
        raise ValueError("the state dict has no weight_orig: a flow without Lipschitz constraint is none")
    learned = bool(config["learn_prior"])
    settings = FlowConfig(
        in_shape=config["in_shape"],
        blocks=config["nBlocks"],
        hidden=config["nChannels"],
        coeff=config["coeff"],
        activation=config["nonlin"],
        actnorm=config["actnorm"],
        keep="last",
        squeeze_input=squeezes == 1,
        squeeze_order="position",
        preprocessing="center",
        prior="learned" if learned else "standard",
        estimator="series",
        n_terms=config["numSeriesTerms"],
        n_power_iterations=config["n_power_iter"],
    )
    model = IResNetFlow(settings)
    scales = enumerate(settings.blocks)
    _load_trunk(model, state, [f"stack.{scale}.stack.{index}" for scale, n in scales for index in range(n)], exact)
    for name, target in {"prior_mu": model.prior.mean, "prior_logstd": model.prior.log_scale}.items():
        if learned:
            _Source(state, "").copy(name, target)
        elif bool(state.read(name).any()):
            raise ValueError(
                f"learn_prior=False, and {name} is not zero: the prior was learned. Remedy: learn_prior=True"
            )
    state.leave_out("prior_", "bn1.", "logits.")
    return model


def _check_config(config: Mapping[str, Any], needed: Sequence[str]) -> None:
    missing = [name for name in needed if name not in config]
    if missing:
        raise ValueError(f"config lacks {', '.join(missing)}: the arguments that the network was constructed with")
    strides = list(config["nStrides"])
    if any(stride != 2 for stride in strides[1:]) or strides[:1] not in ([1], [2]):
        raise ValueError(f"nStrides={strides} has no counterpart here: every stage but the first halves the image")
    if config["in_shape"][-1] != config["in_shape"][-2]:
        raise ValueError(f"in_shape={config['in_shape']} has no counterpart here: images must be square")
    if config["nonlin"] not in _ACTIVATIONS:
        raise ValueError(f"nonlin={config['nonlin']!r} has no counterpart here: {' or '.join(_ACTIVATIONS)}")


def _load_trunk(model: Model, state: _State, names: Sequence[str], exact: bool) -> None:
    """The blocks in the order of the forward, by their official names."""
    blocks = [part for part in model.trunk.modules() if isinstance(part, InvertibleResidualBlock)]
    actnorms = [part for part in model.trunk.modules() if isinstance(part, ActNorm)]
    for index, (block, name) in enumerate(zip(blocks, names, strict=True)):
        source = _Source(state, name)
        if actnorms:
            _load_actnorm(actnorms[index], source)
        _load_branch(block, source, model.config.coeff, exact)


class _State:
    """A state dict, of which is known what has been read."""

    def __init__(self, state_dict: Mapping[str, Tensor]) -> None:
        self._tensors = {name.removeprefix("module."): value for name, value in state_dict.items()}
        self._unused = {name for name in self._tensors if not name.endswith("num_batches_tracked")}
        self.is_constrained = any("weight_orig" in name for name in self._tensors)
        self.is_multiscale = any(name.startswith("stack.0.stack.") for name in self._tensors)

    def read(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise ValueError(
                f"the state dict has no {name!r}. Remedy: pass the arguments that the network was constructed with"
            )
        self._unused.discard(name)
        return self._tensors[name]

    def leave_out(self, *prefixes: str) -> None:
        self._unused = {name for name in self._unused if not name.startswith(prefixes)}

    def check_used_up(self) -> None:
        if self._unused:
            raise ValueError(
                f"the state dict has {len(self._unused)} tensors that a network of this config has no place for, as "
                f"{sorted(self._unused)[0]!r}. Remedy: pass the arguments that the network was constructed with"
            )


class _Source:
    """The part of a state dict under a prefix."""

    def __init__(self, state: _State, prefix: str) -> None:
        self._state, self._prefix = state, prefix

    def read(self, name: str) -> Tensor:
        return self._state.read(f"{self._prefix}.{name}".removeprefix("."))

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
        original: Any = layer.parametrizations.weight.original  # type: ignore[union-attr]  # torch types attributes of modules as Tensor | Module
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
