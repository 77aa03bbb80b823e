"""The symbol of a convolution at its distinct frequencies."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import iresnet_fast as irf
from iresnet_fast.reference import conv_symbol as reference

from ..case import Case, Problem, Provider, Work, compiled


def _problem(c: int, n: int, device: torch.device) -> Problem:
    inputs = [torch.randn(c, c, 3, 3, dtype=torch.float64, device=device) for _ in range(3)]
    index = reference.distinct_frequencies((n, n))[0].to(device)

    def eager(weight: Tensor) -> Tensor:
        return reference.conv_symbol(weight, (n, n), (1, 1), (1, 1), 1).flatten(0, 1)[index]

    def direct(weight: Tensor) -> Tensor:
        """The defining sum over the taps."""
        turns = torch.arange(n, dtype=torch.float64, device=device) / n
        phases = torch.exp(-2j * torch.pi * torch.arange(3, dtype=torch.float64, device=device).unsqueeze(1) * turns)
        symbol = torch.einsum("oiab,ay,bx->yxoi", weight.to(phases.dtype), phases, phases)
        return symbol.flatten(0, 1)[index].unsqueeze(1)

    count = len(index)
    return Problem(
        name=f"c={c} n={n} k=3",
        inputs=inputs,
        oracle=direct,
        providers=[
            Provider("eager reference (fft)", eager, 1e-12),
            Provider("torch.compile of it", compiled(eager), 1e-12),
            Provider("iresnet_fast", lambda weight: irf.ops.conv_symbol(weight, (n, n)), 1e-12),
        ],
        work=Work(count * c * c * 9 * 4, torch.float64, 16 * count * c * c + 8 * 9 * c * c),
    )


def _problems(device: torch.device, quick: bool) -> Iterator[Problem]:
    for c, n in [(32, 16)] if quick else [(64, 32), (128, 16), (256, 8)]:
        yield _problem(c, n, device)


CASE = Case("The symbol at the distinct frequencies (float64)", _problems)
