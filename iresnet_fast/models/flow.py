"""The invertible ResNet as a density model, and as one network that classifies, too."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from ..data import dequantize
from ..estimators import Estimator, LogDet
from ..nn import ActNorm, frozen_state, fuse
from ..nn.bijections.base import apply_with_log_det
from ..nn.residual.sequential import Progress
from ..ops.arguments import can_look
from .configuration import Source, build_config
from .flow_config import FlowConfig
from .flow_trunk import build_trunk
from .inversion import InvertibleModel
from .pretrained import Pretrained
from .prior import NormalPrior

# Of samples and reconstructions: float32 reaches it for Lipschitz constants up to 0.99, unlike the solver's own 1e-6.
_TOLERANCE = 1e-4
# Of types with a coarser grid, so many of its steps.
_STEPS_OF_GRID = 4


class FlowOutput(NamedTuple):
    """What a flow says of its data.

    Attributes:
        log_prob: (B,) log p(x) in nats.
        latents: (B, D).
        log_det: of the map from data to latents.
        logits: (B, n_classes), or None without a head.
    """

    log_prob: Tensor
    latents: Tensor
    log_det: LogDet
    logits: Tensor | None


class BitsPerDim(NamedTuple):
    """Bits per dimension of a data set.

    Attributes:
        mean: over the samples.
        standard_error: of the mean, from the spread between batches: of the samples, of the noise that dequantises
            them and of the log-determinants' estimates together.
        bias_bound: proven bound of the bias of the log-determinants' estimates: 0 where they are exact, or unbiased
            with a proof; NaN where an estimated block has no proven Lipschitz constant below 1.
        n_samples: how many there were.
    """

    mean: float
    standard_error: float
    bias_bound: float
    n_samples: int


class IResNetFlow(InvertibleModel, Pretrained):
    """Multi-scale normalizing flow of invertible residual blocks (Behrmann et al. 2019; Chen et al. 2019).

    log p(x) = log p(z) + log|det J_F(x)| with z = F(x). ``forward`` is the map from data to latents, so that training
    and densities need no inverse; sampling and reconstruction do.

    Args:
        config: see :class:`FlowConfig`.

    Shape: (B, *in_shape), floating dtypes, to latents (B, D).

    Example:
        >>> flow = irf.models.IResNetFlow.from_config({"in_shape": (2,), "fc_blocks": 4})
        >>> flow(torch.randn(5, 2)).log_prob.shape
        torch.Size([5])
    """

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        if not isinstance(config, FlowConfig):
            raise TypeError(f"config must be a FlowConfig, got {type(config).__name__}; from_config takes the others")
        self.config = config
        self.n_latents = math.prod(config.in_shape)
        self.latent_shape = (self.n_latents,)
        self.trunk = build_trunk(config)
        self.prior = NormalPrior(self.n_latents, learned=config.prior == "learned")
        self.head = nn.Linear(self.n_latents, config.n_classes) if config.n_classes else None
        fuse(self)

    @classmethod
    def from_config(cls, config: Source, **overrides: Any) -> Self:
        """Build a flow from a named configuration, a TOML file or a mapping.

        Args:
            config: a name (``"density2d"``, ``"mnist-flow"``, ...), the path of a TOML file, or the settings.
            **overrides: settings of :class:`FlowConfig` to change.

        Raises:
            ValueError: an unknown name or setting; the message suggests the nearest one.
        """
        return cls(build_config(FlowConfig, config, overrides))

    def forward(self, x: Tensor, estimator: Estimator | None = None) -> FlowOutput:
        """Latents, log-density and, with a head, the class of data (B, *in_shape).

        Args:
            x: data in the range of the preprocessing; images are dequantised.
            estimator: of the log-determinants, in place of the blocks' own.

        Raises:
            ValueError: another shape, NaN or infinite values, values outside the preprocessing's range.
            TypeError: integers, which have no density.
        """
        self._check_data(x)
        z, log_det = apply_with_log_det("trunk", self.trunk, x, estimator)
        log_prob = self.prior.log_prob(z) + log_det.value
        return FlowOutput(log_prob, z, log_det, None if self.head is None else self.head(z))

    def log_prob(self, x: Tensor, estimator: Estimator | None = None) -> Tensor:
        """Log p(x) (B,) in nats; arguments and errors are those of :meth:`forward`."""
        output: FlowOutput = self(x, estimator)
        return output.log_prob

    def features(self, x: Tensor) -> Tensor:
        """Latents (B, D) of data, without a log-determinant."""
        self._check_data(x)
        z: Tensor = self.trunk(x)
        return z

    def logits(self, x: Tensor) -> Tensor:
        """Logits (B, n_classes) of data.

        Raises:
            ValueError: the flow has no head.
        """
        if self.head is None:
            raise ValueError("this flow has no classes. Remedy: n_classes in its configuration")
        logits: Tensor = self.head(self.features(x))
        return logits

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        temperature: float = 1.0,
        batch_size: int = 4096,
        generator: torch.Generator | None = None,
        tol: float | None = None,
        on_failure: str = "raise",
        progress: Progress | None = None,
    ) -> Tensor:
        """Draw data (n, *in_shape): latents of the prior, inverted.

        Args:
            n: how many.
            temperature: factor of the prior's standard deviation.
            batch_size: how many are inverted together.
            generator: of the latents, on their device.
            tol: of every block's inverse. Default: 1e-4, or what the dtype resolves.
            on_failure: of the inverse.
            progress: called after each residual block, of each batch.

        Raises:
            RuntimeError: an :class:`ActNorm` has not seen data yet.
            NotConvergedError: a block did not converge.
        """
        for name, part in self.named_modules():
            if isinstance(part, ActNorm) and not bool(part.initialized):
                raise RuntimeError(
                    f"{name} (ActNorm) has not been initialised: the flow has seen no data, and its samples would mean "
                    "nothing. Remedy: train it, or load a state dict"
                )
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        latents = self.prior.sample(n, temperature, generator)
        return torch.cat(
            [
                self.inverse(z, tol=_tolerance(tol, z), on_failure=on_failure, progress=progress)
                for z in latents.split(batch_size)
            ]
        )

    @torch.no_grad()
    def reconstruct(
        self, x: Tensor, *, tol: float | None = None, on_failure: str = "raise", certify: bool = True
    ) -> Tensor:
        """Data (B, *in_shape) through the latents and back.

        Args:
            x: (B, *in_shape).
            tol: as in :meth:`sample`.
            on_failure: of the inverse.
            certify: whether the inverse is solved as :meth:`solve_inverse` does, which goes on in float64 where a proof
                needs it. False for the cost of :meth:`inverse`.
        """
        with frozen_state(self):
            z = self.features(x)
        return self.solve_inverse(z, tol=_tolerance(tol, z), on_failure=on_failure, certify=certify).x

    @torch.no_grad()
    def interpolate(
        self, start: Tensor, end: Tensor, n_steps: int = 8, *, tol: float | None = None, on_failure: str = "raise"
    ) -> Tensor:
        """Data on the straight lines between the latents of start and end, both of them included.

        Args:
            start: (B, *in_shape).
            end: (B, *in_shape).
            n_steps: points of each line, at least 2.
            tol: as in :meth:`sample`.
            on_failure: of the inverse.

        Returns:
            (n_steps, B, *in_shape).
        """
        if n_steps < 2 or start.shape != end.shape:
            raise ValueError(
                f"interpolate needs n_steps ≥ 2 and equal shapes, got {n_steps}, {tuple(start.shape)} and "
                f"{tuple(end.shape)}"
            )
        with frozen_state(self):
            z0, z1 = self.features(start), self.features(end)
        weights = torch.linspace(0, 1, n_steps, dtype=z0.dtype, device=z0.device).view(-1, 1, 1)
        x = self.inverse(torch.lerp(z0, z1, weights).flatten(0, 1), tol=_tolerance(tol, z0), on_failure=on_failure)
        return x.view(n_steps, *start.shape)

    @torch.no_grad()
    def bits_per_dim(self, batches: Iterable[Any], estimator: Estimator | None = None) -> BitsPerDim:
        """Bits per dimension, −log₂ p of an integer image per value, averaged over all batches.

        Integers in [0, n_levels) are dequantised by uniform noise, which bounds their probability from below (Theis
        et al. 2016); data of floating point is taken as dequantised already, in [0, 1].

        Args:
            batches: tensors (B, *in_shape), or tuples that start with one, as data loaders give.
            estimator: of the log-determinants, in place of the blocks' own.

        Raises:
            ValueError: no data; the flow is in training mode; integers that were only scaled to [0, 1], of which a
                density says nothing; a truncated series without a proven bound of its bias.
        """
        if self.training:
            raise ValueError("bits_per_dim of a flow in training mode. Remedy: flow.eval() first")
        totals, sizes, bounds = [], [], []
        device = next(self.parameters()).device
        for batch in batches:
            images = batch if isinstance(batch, Tensor) else batch[0]
            if not len(images):
                continue
            x = self._continuous(images.to(device))
            output: FlowOutput = self(x, estimator)
            totals.append(float(output.log_prob.double().sum()))
            sizes.append(len(x))
            bounds.append(output.log_det.bias_bound)
            # Without a proof only finitely many terms have a finite variance: they are biased for sure.
            if math.isnan(bounds[-1]) and output.log_det.finite_variance:
                raise ValueError(
                    "a truncated series without a proven Lipschitz constant has a bias of unknown size. Remedy: "
                    "certify(flow) first, or the exact estimator irf.estimators.Exact()"
                )
        if not sum(sizes):
            raise ValueError("bits_per_dim of no data")
        unit = self.n_latents * math.log(2)
        nats = -sum(totals) / sum(sizes)
        bias = math.nan if any(map(math.isnan, bounds)) else max(bounds)
        # Batches are the units: the number of terms of a series is drawn for all samples of one together.
        deviations = [(-total - size * nats) ** 2 for total, size in zip(totals, sizes, strict=True)]
        spread = math.inf if len(sizes) < 2 else math.sqrt(math.fsum(deviations) * len(sizes) / (len(sizes) - 1))
        return BitsPerDim(
            nats / unit + math.log2(self.config.n_levels), spread / sum(sizes) / unit, bias / unit, sum(sizes)
        )

    def _continuous(self, x: Tensor) -> Tensor:
        """Integers dequantised; data of floating point as it is, where it can have been."""
        levels = self.config.n_levels
        if not x.is_floating_point():
            return dequantize(x, levels).to(next(self.parameters()).dtype)
        if not bool(((x >= 0) & (x <= 1)).all()):
            raise ValueError(
                f"bits_per_dim takes integers, or dequantised data in [0, 1]; got values from {float(x.min()):.6g} to "
                f"{float(x.max()):.6g}"
            )
        for unit in (levels, levels - 1):
            scaled = x.double() * unit
            if bool(((scaled - scaled.round()).abs() <= unit * 2 * torch.finfo(x.dtype).eps).all()):
                raise ValueError(
                    f"bits_per_dim takes integers, or dequantised data; all of these values are multiples of 1/{unit}, "
                    "as of integers that were scaled. Remedy: the integers themselves"
                )
        return x

    def _check_data(self, x: Tensor) -> None:

        if tuple(x.shape[1:]) != self.config.in_shape:
            raise ValueError(f"this flow takes (B, {', '.join(map(str, self.config.in_shape))}), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(
                f"a density is one of continuous data, got {x.dtype}: integers have none. Remedy: "
                "irf.data.dequantize(images)"
            )
        dtype = next(self.parameters()).dtype
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"the flow has parameters of {dtype}, got data of {x.dtype}. Remedy: x.to({dtype})")
        if self.config.preprocessing == "none" and can_look(x):  # the others look themselves
            bad = ~torch.isfinite(x).flatten(1).all(1)
            if bool(bad.any()):
                raise ValueError(f"{int(bad.sum())} of {len(x)} samples have NaN or infinite values")

    def extra_repr(self) -> str:
        """Shown by repr."""
        return ", ".join(f"{key}={value}" for key, value in asdict(self.config).items())


def _tolerance(tol: float | None, z: Tensor) -> float:
    return max(_TOLERANCE, _STEPS_OF_GRID * torch.finfo(z.dtype).eps) if tol is None else tol
