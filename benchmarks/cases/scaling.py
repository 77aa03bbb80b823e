"""How costs grow with batch, depth, width, resolution and Lipschitz constant, beside what theory states."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch

import iresnet_fast as irf
from iresnet_fast.nn import Bottleneck
from iresnet_fast.reference import conv_spectrum as reference

from ..blocks import bottleneck_flops, saturated
from ..case import Case, Problem, Provider, StudyPoint, Work
from ..inverses import OURS, PAPERS, counted_inverse, linear, orthogonal, papers_provider
from .conv_spectrum import values_work

_CHANNELS, _SIZE, _BATCH = 16, 16, 16
_LIPSCHITZ = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)


@torch.no_grad()
def _inverse(
    study: StudyPoint,
    device: torch.device,
    batch: int = _BATCH,
    depth: int = 1,
    channels: int = _CHANNELS,
    size: int = _SIZE,
) -> Problem:
    """The inverse of a chain of blocks, twice as wide inside."""
    hidden = 2 * channels
    branches = [saturated(Bottleneck(channels, hidden, input_size=(size, size))) for _ in range(depth)]
    chain = irf.nn.InvertibleSequential(*map(irf.nn.InvertibleResidualBlock, branches)).to(device).eval()
    irf.enforce(chain)
    exact = copy.deepcopy(chain).double()
    outputs = [chain(torch.randn(batch, channels, size, size, device=device)) for _ in range(2)]
    answers = {id(y): exact.inverse(y.double(), tol=1e-13) for y in outputs}
    return Problem(
        name=f"{study.name}: {study.value:g}",
        inputs=outputs,
        oracle=lambda y: answers[id(y)],
        providers=[
            papers_provider(PAPERS, chain),
            counted_inverse(chain, OURS),
        ],
        # At least two evaluations per block: one to step, one to measure.
        work=Work(
            2 * depth * batch * bottleneck_flops(channels, size, hidden), torch.float32, 8 * outputs[0].numel() * depth
        ),
        study=study,
    )


def _spectrum(study: StudyPoint, device: torch.device, c: int, n: int) -> Problem:
    weight = torch.randn(c, c, 3, 3, dtype=torch.float64, device=device)
    exact = reference.conv_singular_values(weight, (n, n), (1, 1), (1, 1), 1, "svd")
    return Problem(
        name=f"{study.name}: {study.value:g}",
        inputs=[weight],
        oracle=lambda _: exact,
        providers=[
            Provider(
                "eager reference (fft + eigvalsh)",
                lambda weight: reference.conv_singular_values(weight, (n, n), (1, 1), (1, 1), 1, "gram"),
                1e-9,
            ),
            Provider("iresnet_fast, gram", lambda weight: irf.conv_singular_values(weight, (n, n)), 1e-9),
        ],
        work=values_work(c, n),
        threads=1,
        study=study,
    )


def _problems(device: torch.device, quick: bool) -> Iterator[Problem]:
    torch.manual_seed(0)
    most = 1024 if device.type == "cuda" else 256

    points = slice(2 if quick else None)
    for batch in [4**power for power in range(6) if 4**power <= most][points]:
        yield _inverse(StudyPoint("inverse against batch", "samples", batch, 1), device, batch=batch)
    for depth in [1, 2, 4, 8, 16][points]:
        yield _inverse(StudyPoint("inverse against depth", "blocks", depth, 1), device, depth=depth)
    for channels in [4, 8, 16, 32, 64, 128][points]:
        study = StudyPoint("inverse against width", "channels (twice as many inside)", channels, 2)
        yield _inverse(study, device, channels=channels)
    for size in [4, 8, 16, 32, 64][points]:
        yield _inverse(StudyPoint("inverse against resolution", "pixels on a side", size, 2), device, size=size)
    for c in [16, 32, 64, 128, 256][points]:
        yield _spectrum(StudyPoint("singular values against width, 8 × 8", "channels", c, 3), device, c, 8)
    for n in [4, 8, 16, 32, 64][points]:
        study = StudyPoint("singular values against resolution, 32 channels", "pixels on a side", n, 2)
        yield _spectrum(study, device, 32, n)
    for lipschitz in _LIPSCHITZ[points]:
        # Picard's error falls by L with each evaluation: the number for an error is proportional to 1/ln(1/L).
        study = StudyPoint(
            "inverse against L, slowest g", "1 / ln(1/L)", 1 / math.log(1 / lipschitz), 1, of="evaluations"
        )
        yield linear(f"{study.name}: {lipschitz}", lipschitz * orthogonal(64, device), lipschitz, study=study)


CASE = Case("Costs against batch, depth, width, resolution and L", _problems)
