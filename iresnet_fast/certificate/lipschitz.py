"""How a module type bounds its Lipschitz constant: the registry, and what is known of torch's types and ours."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ..nn import LipSwish, MaxMin, SpectralConv2d, SpectralLinear, SpectralNorm, find_spectral_norm
from ..nn.inspection import know_forward
from ..ops.arguments import check_values
from ..ops.conv_norm import conv_norm_bound, rounding_term

LipschitzFn = Callable[[Any], float]

REGISTRY: dict[type[nn.Module], LipschitzFn] = {}
# Parametrizations that are functions of the stored weight: others may draw numbers, or depend on anything.
_FUNCTIONS = (SpectralNorm, nn.Identity, parametrizations._WeightNorm, parametrizations._Orthogonal)
# Slope of SiLU at its steepest is 1.09984, of GELU 1.12890.
_SILU, _GELU = 1.1, 1.13


def register_lipschitz(module_type: type[nn.Module], fn: LipschitzFn) -> None:
    """State how a module type's Lipschitz constant is bounded, so that ``certify`` can prove branches that use it.

    Args:
        module_type: the exact type; subclasses can compute something else and are not covered.
        fn: takes a module of that type and returns a proven upper bound of its Lipschitz constant, in its present
            mode, in the Euclidean norm.

    Raises:
        TypeError: ``module_type`` is not a subclass of ``nn.Module``, or ``fn`` is not callable.

    Example:
        >>> register_lipschitz(torch.nn.Hardtanh, lambda module: 1.0)
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"module_type must be a subclass of torch.nn.Module, got {module_type!r}")
    if not callable(fn):
        raise TypeError(f"fn must be callable, got {type(fn).__name__}")
    REGISTRY[module_type] = fn
    know_forward(module_type)


def unproven_reason(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Return why a module of a type may compute something else than its constant was stated for; None if it cannot."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and type(tensor) not in (Tensor, nn.Parameter):
            return f"its {name} is a {type(tensor).__name__}, which may compute products in its own way"
        if tensor is not None and kind not in WEIGHTED and not bool(torch.isfinite(tensor).all()):
            return f"its {name} has NaN or infinite values"
    for name, value in vars(module).items():
        if isinstance(value, float) and math.isnan(value):
            return f"its {name} is NaN"
    for name, parts in getattr(module, "parametrizations", {}).items():
        for part in parts:
            if type(part) is parametrizations._SpectralNorm and not part.training:
                continue
            if type(part) not in _FUNCTIONS:
                return f"its {name} has the parametrization {type(part).__name__}, which may not be a function of it"
    return None


class NotProvenError(Exception):
    """A registered type whose present settings have no proven constant; the message says why."""


def layer_bound(module: nn.Module, weight: Tensor) -> float:
    """Proven norm of a linear or convolution layer with this weight; a transposed one has its convolution's."""
    layer: Any = module
    check_values("weight", weight)
    if layer.bias is not None:
        check_values("bias", layer.bias)
    if isinstance(module, nn.Linear):
        return float(torch.linalg.matrix_norm(weight.double(), 2)) + rounding_term(weight)
    norm = find_spectral_norm(module)
    geometry = norm.geometry if norm else None
    bound = conv_norm_bound(
        weight,
        geometry.input_size if geometry else None,
        padding=layer.padding,
        padding_mode=layer.padding_mode,
        stride=layer.stride,
        dilation=layer.dilation,
        groups=layer.groups,
    )
    return float(bound)


def _batch_norm(module: nn.modules.batchnorm._BatchNorm) -> float:
    if module.training or module.running_var is None:
        raise NotProvenError("batch normalisation with batch statistics has no Lipschitz constant; model.eval() first")
    scale = torch.rsqrt(module.running_var.double() + module.eps)
    if module.weight is not None:
        scale = scale * module.weight.double().abs()
    return float(scale.max())


def _softplus(module: nn.Softplus) -> float:
    # Beyond its threshold it is the identity, with a jump that is below the resolution of float32 from 20 on.
    if module.beta <= 0 or module.threshold < 20:
        raise NotProvenError(
            f"Softplus with beta={module.beta}, threshold={module.threshold} jumps. Remedy: threshold=20"
        )
    return 1.0


def _dropout(module: nn.modules.dropout._DropoutNd) -> float:
    if not module.training:
        return 1.0
    if module.p >= 1:
        return 0.0
    return 1 / (1 - module.p)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHTED = (nn.Linear, *_CONVOLUTIONS, SpectralLinear, SpectralConv2d)
_ONE = (nn.Identity, nn.ReLU, nn.ReLU6, nn.Tanh, nn.Softsign, nn.Hardtanh, nn.Flatten, LipSwish, MaxMin)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

_BUILT_IN: tuple[tuple[tuple[type[nn.Module], ...], LipschitzFn], ...] = (
    (WEIGHTED, lambda module: layer_bound(module, module.weight)),
    (_ONE, lambda module: 1.0),
    (_DROPOUTS, _dropout),
    (_BATCH_NORMS, _batch_norm),
    ((nn.Softplus,), _softplus),
    ((nn.ELU,), lambda module: max(1.0, abs(module.alpha))),
    ((nn.LeakyReLU,), lambda module: max(1.0, abs(module.negative_slope))),
    ((nn.Sigmoid,), lambda module: 0.25),
    ((nn.SiLU,), lambda module: _SILU),
    ((nn.GELU,), lambda module: _GELU),
)
for _types, _fn in _BUILT_IN:
    for _type in _types:
        register_lipschitz(_type, _fn)
