"""Activation normalization with data-dependent initialization."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...estimators import Estimator, LogDet
from ...ops.arguments import can_look
from ..weights import is_frozen
from .base import Bijection, sum_over_positions

# A channel whose standard deviation is below this share of its size carries nothing to normalize: it keeps scale 1.
_CONSTANT = 1e-3
_UP = 1 + 8 * torch.finfo(torch.float64).eps


class ActNorm(Bijection):
    """Per-channel affine map y = (x + bias)·exp(log_scale) (Kingma & Dhariwal 2018).

    The first batch seen in training mode sets bias and log_scale so that y has mean 0 and variance 1 per channel
    (channels that hardly vary are only centered); under ``DistributedDataParallel`` it is the batch of all ranks. The
    state dict records that this has happened, so a loaded layer keeps what it learned. Before that, evaluation mode is
    the identity.

    Args:
        num_features: channels C.

    Shape: (B, C) or (B, C, ...), kept.

    Raises:
        ValueError: an input with another number of channels; a first batch that is empty, not finite, out of range,
            or has a single value per channel.
    """

    initialized: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        if isinstance(num_features, bool) or not isinstance(num_features, int) or num_features < 1:
            raise ValueError(f"num_features must be a positive int, got {num_features!r}")
        self.num_features = num_features
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.log_scale = nn.Parameter(torch.zeros(num_features))
        # An integer, as BatchNorm's counter: tools that average buffers cannot subtract booleans.
        self.register_buffer("initialized", torch.tensor(0))
        # The buffer that was seen to be set: later forwards need not wait for a device to tell.
        self._seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize; the first training batch sets bias and scale."""
        self._check(x)
        if self.training and self._seen is not self.initialized and not is_frozen(self):
            self._initialize(x)
        shape = self._broadcast(x)
        return (x + self.bias.view(shape)) * self.log_scale.exp().view(shape)

    def inverse(self, y: Tensor) -> Tensor:
        """Return the exact inverse; sets nothing."""
        self._check(y)
        shape = self._broadcast(y)
        return y * (-self.log_scale).exp().view(shape) - self.bias.view(shape)

    @torch.no_grad()
    def lipschitz(self) -> tuple[float | None, float | None]:
        """The largest scale, and the inverse of the smallest, in float64 and rounded up."""
        scale = self.log_scale.double()
        bounds = _UP * float(scale.exp().max()), _UP * float((-scale).exp().max())
        # In the dtype that it computes in, too, where scales overflow earlier.
        values = torch.cat([self.log_scale.exp(), (-self.log_scale).exp(), self.bias])
        finite = all(map(math.isfinite, bounds)) and bool(torch.isfinite(values).all())
        return bounds if finite else (None, None)

    def estimate_log_det(self, x: Tensor, estimator: Estimator | None = None) -> tuple[Tensor, LogDet]:
        """H·W·Σ log_scale, exactly."""
        y = self(x)
        return y, LogDet.exactly(sum_over_positions(self.log_scale, x))

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        if torch._C._are_functorch_transforms_active():
            if _is_set(self.initialized):
                return
            raise RuntimeError(
                "ActNorm cannot initialize inside a transform of torch.func. Call the model once before, in training "
                "mode, or load a state dict"
            )
        arguments = x, self.bias, self.log_scale, self.initialized
        if can_look(*arguments):
            _initialize(*arguments)
        else:  # as an op, for a graph cannot ask for values
            torch.ops.iresnet_fast.actnorm_initialize(*arguments)
        if can_look(*arguments) or torch.compiler.is_compiling():  # others have no values, and were not set
            self._seen = self.initialized

    def mark_initialized(self) -> None:
        """Keep bias and log_scale as they are, whatever the first batch."""
        self.initialized.fill_(1)
        self._seen = self.initialized

    def _broadcast(self, x: Tensor) -> tuple[int, ...]:
        return (1, self.num_features) + (1,) * (x.dim() - 2)

    def _check(self, x: Tensor) -> None:
        if not x.is_floating_point():
            raise TypeError(f"ActNorm needs an input of floating point, got {x.dtype}")
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ValueError(f"ActNorm({self.num_features}) needs (B, {self.num_features}, ...), got {tuple(x.shape)}")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._seen = self.initialized if can_look(self.initialized) and bool(self.initialized) else None

    def extra_repr(self) -> str:
        """Shown by repr."""
        return f"{self.num_features}"


def _initialize(x: Tensor, bias: Tensor, log_scale: Tensor, initialized: Tensor) -> None:
    """Write bias, log_scale (C,) and the flag from a first batch, unless the flag is set."""
    if bool(initialized):  # it was loaded, or copied, as an average of models is made
        return
    if x.numel() == 0 or not bool(torch.isfinite(x).all()):
        raise ValueError(
            f"ActNorm cannot initialize from this batch (shape {tuple(x.shape)}): it is empty or not finite"
        )
    if x.numel() == len(bias):
        raise ValueError(
            f"ActNorm cannot initialize from this batch (shape {tuple(x.shape)}): a single value per channel has no "
            "variance. Use a first training batch of several samples"
        )
    mean, deviation, size = _moments(x.to(torch.promote_types(x.dtype, torch.float32)))
    varies = deviation > _CONSTANT * size
    found = -mean, torch.where(varies, -deviation.clamp_min(torch.finfo(mean.dtype).tiny).log(), 0.0)
    if not bool(torch.isfinite(torch.cat(found).to(bias.dtype)).all()):
        raise ValueError(
            f"ActNorm cannot initialize from this batch: its values, up to {float(x.abs().max()):.4g}, leave the range "
            f"of {bias.dtype}. Scale the data"
        )
    bias.copy_(found[0])
    log_scale.copy_(found[1])
    initialized.fill_(1)


def _is_set(flag: Tensor) -> bool:
    """Return true if a flag is set behind all transforms of ``torch.func``; of an ensemble, in all its members."""
    while torch._C._functorch.is_functorch_wrapped_tensor(flag):
        flag = torch._C._functorch.get_unwrapped(flag)
    return bool(flag.all())


_LIBRARY = torch.library.Library("iresnet_fast", "FRAGMENT")
_LIBRARY.define("actnorm_initialize(Tensor x, Tensor(a!) bias, Tensor(b!) log_scale, Tensor(c!) initialized) -> ()")
_LIBRARY.impl("actnorm_initialize", _initialize, "CompositeExplicitAutograd")
torch.library.register_fake("iresnet_fast::actnorm_initialize", lambda *tensors: None, lib=_LIBRARY)


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, standard deviation and root mean square of each channel (C,); of all ranks' samples inside of DDP."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    unit = x.abs().amax(axes, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    unit = _over_ranks(unit, "max")  # of which squares are taken, so that they neither overflow nor vanish
    x = x / unit
    count = _over_ranks(torch.full_like(unit, x.numel() / x.shape[1]), "sum")
    mean = _over_ranks(x.sum(axes, keepdim=True), "sum") / count
    deviation = (_over_ranks((x - mean).square().sum(axes, keepdim=True), "sum") / count).sqrt()
    size = (_over_ranks(x.square().sum(axes, keepdim=True), "sum") / count).sqrt()
    mean, deviation, size = ((part * unit).flatten() for part in (mean, deviation, size))
    return mean, deviation, size


def _over_ranks(x: Tensor, operation: str) -> Tensor:
    """Sum or maximum over the ranks of the data-parallel forward that this is part of; x itself outside of one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return x
    parallel = torch.nn.parallel.DistributedDataParallel._get_active_ddp_module()
    if parallel is not None:
        reduction = {"sum": torch.distributed.ReduceOp.SUM, "max": torch.distributed.ReduceOp.MAX}[operation]
        torch.distributed.all_reduce(x, reduction, group=parallel.process_group)
    return x
