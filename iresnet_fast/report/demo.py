"""The demonstration: train a certified network and a plain one on real images, prove, invert, compare, report."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..certificate import Certificate, certify, enforce
from ..data import ImageSplit, load_digits
from ..finite import finite_or_none
from ..models import IResNetClassifier
from ..nn import frozen_state
from ..solvers import relative_errors
from ..training import classification_error, fit_classifier
from .convergence import BlockConvergence, block_convergence
from .hybrid import BATCH_SIZE, HybridResult, run_hybrid
from .inversion import PAPER_ITERATIONS, fewest_iterations, papers_inverse

# As many images as the papers time, and runs of each method.
_TIMED_IMAGES, _TIMED_RUNS = 100, 3


@dataclass(frozen=True)
class NetworkResult:
    """What was measured on the held-out images of one network.

    Attributes:
        name: "i-ResNet" or "plain ResNet".
        coeff: its Lipschitz coefficient, or None.
        test_error: share of wrong classes.
        guaranteed: the certificate's verdict.
        largest_lipschitz: the largest proven Lip(g) of a block, or None.
        reconstruction_error: median over images of ‖x̂ − x‖/‖x‖.
        worst_reconstruction_error: the largest.
        converged: share of images whose inverse met its stopping rule in every block.
        certified: share for which that is proven.
        iterations: fewest and most iterations that an image took in a block.
        train_seconds: wall time of training.
    """

    name: str
    coeff: float | None
    test_error: float
    guaranteed: bool
    largest_lipschitz: float | None
    reconstruction_error: float
    worst_reconstruction_error: float
    converged: float
    certified: float
    iterations: tuple[int, int]
    train_seconds: float


@dataclass(frozen=True)
class InverseTiming:
    """Seconds to invert 100 held-out images (median of interleaved runs) and the error reached.

    Attributes:
        method: how.
        seconds: median wall time.
        reconstruction_error: median over images of ‖x̂ − x‖/‖x‖.
    """

    method: str
    seconds: float
    reconstruction_error: float


@dataclass(frozen=True)
class DemoResult:
    """Everything the demonstration measured; images and models are for the figures."""

    networks: tuple[NetworkResult, ...]
    timings: tuple[InverseTiming, ...]
    certificates: tuple[Certificate, ...]
    convergence: tuple[BlockConvergence, ...]
    hybrid: HybridResult
    images: Tensor
    reconstructions: tuple[Tensor, ...]
    samples: Tensor
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The measured figures as plain types, ready for JSON."""
        return {
            "settings": self.settings,
            "networks": [finite_or_none(asdict(network)) for network in self.networks],
            "inverse": [finite_or_none(asdict(timing)) for timing in self.timings],
            "hybrid": finite_or_none(asdict(self.hybrid)),
            "certificates": [certificate.to_dict() for certificate in self.certificates],
        }


def run_demo(epochs: int = 25, seed: int = 0, on_step: Callable[[str], None] | None = None) -> DemoResult:
    """Train, certify and invert an i-ResNet, its plain twin, and a flow that classifies, on scikit-learn's digits.

    Args:
        epochs: passes over the training images, for each network and for the flow.
        seed: of weights, split and order.
        on_step: called after every epoch, and every measurement, with a description of what comes next.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    report_step = on_step or (lambda _: None)
    digits = load_digits(seed=seed)
    data = digits.centered()
    networks, certificates, reconstructions, models = [], [], [], []
    for name, coeff in (("i-ResNet", 0.9), ("plain ResNet", None)):
        torch.manual_seed(seed)
        model = IResNetClassifier.from_config("digits", coeff=coeff)
        started = time.perf_counter()
        fit_classifier(
            model,
            data.train_images,
            data.train_labels,
            epochs=epochs,
            seed=seed,
            on_epoch=lambda epoch, loss, name=name: report_step(f"training the {name} (loss {loss:.3f})"),  # type: ignore[misc]  # mypy infers no lambda with a default
        )
        seconds = time.perf_counter() - started
        model.eval()
        certificate = enforce(model) if coeff is not None else certify(model)
        network, images = _measure(name, model, certificate, data, seconds)
        networks.append(network)
        certificates.append(certificate)
        reconstructions.append(images)
        models.append(model)
        report_step(f"inverting with the {name}")
    steps_per_epoch = math.ceil(len(data.train_images) / BATCH_SIZE)

    def on_flow_step(step: int, loss: float) -> None:
        if step % steps_per_epoch == 0:
            report_step(f"training the flow (loss {loss:.3f})")

    hybrid, samples = run_hybrid(digits, epochs, seed, on_flow_step)
    report_step("timing the inverses")
    timings = _time_inverses(models[0], data.test_images[:_TIMED_IMAGES])
    report_step("comparing the inverses")
    convergence = block_convergence(models[0], data.test_images[:64])
    report_step("drawing")
    return DemoResult(
        networks=tuple(networks),
        timings=timings,
        certificates=tuple(certificates),
        convergence=convergence,
        hybrid=hybrid,
        samples=samples,
        images=data.test_images,
        reconstructions=tuple(reconstructions),
        settings={
            "data": "scikit-learn digits, 8×8",
            "train_images": len(data.train_images),
            "test_images": len(data.test_images),
            "timed_images": min(_TIMED_IMAGES, len(data.test_images)),
            "epochs": epochs,
            "seed": seed,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
    )


def write_results(result: DemoResult, out: Path) -> Path:
    """Write ``results.json`` and ``certificate.md`` into an existing folder; returns the former's path."""
    (out / "certificate.md").write_text(result.certificates[0].to_markdown(), encoding="utf-8")
    path = out / "results.json"
    path.write_text(json.dumps(result.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path


def _measure(
    name: str, model: IResNetClassifier, certificate: Certificate, data: ImageSplit, seconds: float
) -> tuple[NetworkResult, Tensor]:
    with torch.no_grad():
        latents = model.features(data.test_images)
        inverse = model.solve_inverse(latents, on_failure="return", max_iterations=PAPER_ITERATIONS)
    errors = relative_errors(inverse.x, data.test_images)
    iterations = torch.stack([block.iterations for block in inverse.blocks])
    result = NetworkResult(
        name=name,
        coeff=model.config.coeff,
        test_error=classification_error(model, data.test_images, data.test_labels),
        guaranteed=certificate.guaranteed,
        largest_lipschitz=certificate.largest_lipschitz,
        reconstruction_error=float(errors.median()),
        worst_reconstruction_error=float(errors.max()),
        converged=float(inverse.converged.float().mean()),
        certified=float(inverse.certified.float().mean()),
        iterations=(int(iterations.min()), int(iterations.max())),
        train_seconds=seconds,
    )
    return result, inverse.x


@torch.no_grad()
def _time_inverses(model: IResNetClassifier, images: Tensor) -> tuple[InverseTiming, ...]:
    """Our inverse, the papers' 100 iterations, and the fewest fixed iterations that reach our error, interleaved."""
    latents = model.features(images)

    def median_error(found: Tensor) -> float:
        return float(relative_errors(found, images).median())

    with frozen_state(model):
        fewest = fewest_iterations(model.trunk, latents, median_error, median_error(model.inverse(latents)))

    def once_normalised(n_iterations: int) -> Tensor:
        with frozen_state(model):
            return papers_inverse(model.trunk, latents, n_iterations)

    methods: dict[str, Callable[[], Tensor]] = {
        "iresnet_fast, certified per sample": lambda: model.solve_inverse(latents).x,
        "iresnet_fast, without a proof": lambda: model.inverse(latents),
        f"papers' loop: {PAPER_ITERATIONS} fixed iterations": lambda: papers_inverse(
            model.trunk, latents, PAPER_ITERATIONS
        ),
        "the same, weights normalised only once": lambda: once_normalised(PAPER_ITERATIONS),
        f"the same, and the fewest iterations for this error ({fewest})": lambda: once_normalised(fewest),
    }
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    errors: dict[str, float] = {}
    for _ in range(_TIMED_RUNS):
        for method, invert in methods.items():
            started = time.perf_counter()
            found = invert()
            seconds[method].append(time.perf_counter() - started)
            errors[method] = median_error(found)
    return tuple(InverseTiming(method, statistics.median(seconds[method]), errors[method]) for method in methods)
