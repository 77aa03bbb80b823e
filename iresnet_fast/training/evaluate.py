"""What a trained network is worth on test images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..certificate import certify
from ..data import ImageSplit, centered, midpoints
from ..finite import finite_or_none
from ..models import IResNetClassifier, IResNetFlow, Model
from ..solvers import NotConvergedError, relative_errors

_TOGETHER, _RECONSTRUCTED = 250, 100
# Of the inverse: what float32 resolves for layers of coefficients up to 0.9, and up to 0.99.
_TOLERANCE, _FLOW_TOLERANCE = 1e-6, 1e-5


@dataclass(frozen=True)
class Evaluation:
    """What was measured; None where the network has no such thing.

    Attributes:
        test_error: share of wrong classes.
        bits_per_dim: mean over the test images.
        bits_standard_error: of it.
        reconstruction_error: largest ‖x̂ − x‖/‖x‖ of the first hundred test images; None where the inverse does not
            converge.
        n_images: test images.
    """

    test_error: float | None
    bits_per_dim: float | None
    bits_standard_error: float | None
    reconstruction_error: float | None
    n_images: int

    @classmethod
    def from_dict(cls, known: Mapping[str, Any]) -> Evaluation:
        """What :meth:`to_dict` gave."""
        found = cls(**known)
        single = found.bits_per_dim is not None and found.bits_standard_error is None
        return replace(found, bits_standard_error=math.inf) if single else found

    @property
    def score(self) -> float:
        """What is smaller for a better network: bits per dimension where it has a density, else the error."""
        value = self.test_error if self.bits_per_dim is None else self.bits_per_dim
        assert value is not None
        return value

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON: None for what is not finite."""
        return finite_or_none(asdict(self))


def as_input(model: Model, images: Tensor, n_levels: int) -> Tensor:
    """Integers (B, C, H, W) in [0, n_levels) as the network takes them, without noise: centred, or midpoints."""
    return midpoints(images, n_levels) if isinstance(model, IResNetFlow) else centered(images, n_levels)


@torch.no_grad()
def evaluate(model: Model, data: ImageSplit) -> Evaluation:
    """Evaluate a network in evaluation mode on all test images; draws from torch's generator where a flow estimates.

    A flow with truncated series is certified for it: ``bits_per_dim`` refuses them without a proof.
    """
    device = next(model.parameters()).device
    images, labels = data.test_images, data.test_labels
    floats = as_input(model, images, data.n_levels)
    if isinstance(model, IResNetClassifier):
        wrong = _wrong(model, floats, labels, device)
        error = _reconstruction_error(model, floats[:_RECONSTRUCTED].to(device))
        return Evaluation(wrong / len(labels), None, None, error, len(labels))
    if model.config.estimator == "series":
        certify(model)
    bits = model.bits_per_dim(part.to(device) for part in images.split(_TOGETHER))
    share = None if model.head is None else _wrong(model.logits, floats, labels, device) / len(labels)
    error = _reconstruction_error(model, floats[:_RECONSTRUCTED].to(device))
    return Evaluation(share, bits.mean, bits.standard_error, error, len(labels))


def _wrong(classify: Any, images: Tensor, labels: Tensor, device: torch.device) -> int:
    pairs = zip(images.split(_TOGETHER), labels.split(_TOGETHER), strict=True)
    return sum(int((classify(x.to(device)).argmax(1).cpu() != y).sum()) for x, y in pairs)


def _reconstruction_error(model: IResNetClassifier | IResNetFlow, x: Tensor) -> float | None:
    tol = _FLOW_TOLERANCE if isinstance(model, IResNetFlow) else _TOLERANCE
    try:
        back = model.inverse(model.features(x), tol=tol)
    except NotConvergedError:
        return None
    error = float(relative_errors(back, x).max())
    return error if math.isfinite(error) else None
