"""The epilogue of a fixed-point iteration: next iterate and per-sample residual."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

import iresnet_fast as irf
from iresnet_fast.reference.fixed_point_update import fixed_point_update as reference

from ..case import Case, Problem, Provider, Work, compiled


def _both(output: tuple[Tensor, Tensor]) -> Tensor:
    """Next iterate and residuals, each relative to its own size."""
    following, residual = output
    return torch.cat([following.flatten(), residual / residual.max()])


def _problem(shape: tuple[int, ...], device: torch.device) -> Problem:
    inputs = [tuple(torch.randn(shape, device=device) for _ in range(3)) for _ in range(3)]
    return Problem(
        name="×".join(map(str, shape)),
        inputs=inputs,
        oracle=lambda tensors: _both(reference(*(part.double() for part in tensors))),
        providers=[
            Provider("eager reference", lambda tensors: reference(*tensors), 1e-5, _both),
            Provider("torch.compile of it", _unpacked(compiled(reference)), 1e-5, _both),
            Provider("iresnet_fast", lambda tensors: irf.ops.fixed_point_update(*tensors), 1e-5, _both),
        ],
        work=Work(4 * math.prod(shape), torch.float32, 16 * math.prod(shape)),
    )


def _unpacked(function):
    return lambda tensors: function(*tensors)


def _problems(device: torch.device, quick: bool) -> Iterator[Problem]:
    shapes = [(100, 16, 32, 32), (4096, 64)] if quick else [(100, 16, 32, 32), (100, 256, 8, 8), (65536, 64)]
    for shape in shapes:
        yield _problem(shape, device)


CASE = Case("One step y − g(x) with its residual per sample (float32)", _problems)
