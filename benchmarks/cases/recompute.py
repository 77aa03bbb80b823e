"""Backward that recomputes activations by inversion, against one that stores them."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

import iresnet_fast as irf
from iresnet_fast.nn import InvertibleSequential, frozen_state

from ..case import Case, Problem, Promise, Provider
from ..memory import kept_bytes_per_sample

_CHANNELS, _SIZE, _HIDDEN = 16, 16, 32
_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
_BYTES = "bytes per sample"


def _name(depth: int, recompute: str | None) -> str:
    return f"{'recomputing' if recompute else 'plain backward'}, {depth} blocks"


def _chain(depth: int, x: Tensor) -> InvertibleSequential:
    """A chain with ActNorm initialised by x, in training mode."""
    parts: list[torch.nn.Module] = []
    for _ in range(depth):
        branch = irf.nn.Bottleneck(_CHANNELS, _HIDDEN, input_size=(_SIZE, _SIZE))
        parts += [irf.nn.ActNorm(_CHANNELS), irf.nn.InvertibleResidualBlock(branch)]
    chain = InvertibleSequential(*parts).to(x).train()
    chain(x)
    return chain


def _gradients(chain: InvertibleSequential, x: Tensor) -> Tensor:
    """Those of all parameters, each scaled to norm 1; power iteration stands still, so that runs can be compared."""
    with frozen_state(chain):
        loss = chain(x).square().mean()
    grads = torch.autograd.grad(loss, list(chain.parameters()))
    return torch.cat([(grad / torch.linalg.vector_norm(grad)).flatten() for grad in grads])


def _provider(chain: InvertibleSequential, depth: int, recompute: str | None, x: Tensor, exact: Tensor) -> Provider:
    chain = copy.deepcopy(chain)
    chain.recompute = recompute
    with frozen_state(chain):
        per_sample = kept_bytes_per_sample(chain, x)
    return Provider(
        _name(depth, recompute),
        lambda x: _gradients(chain, x),
        _TOLERANCES[x.dtype],
        oracle=lambda _: exact,
        counts=lambda _: {_BYTES: per_sample},
    )


def _problem(depths: tuple[int, int], batch: int, dtype: torch.dtype, device: torch.device) -> Problem:
    x = torch.randn(batch, _CHANNELS, _SIZE, _SIZE, dtype=dtype, device=device)
    providers = []
    for depth in depths:
        chain = _chain(depth, x)
        exact = _gradients(copy.deepcopy(chain).double(), x.double())
        providers += [_provider(chain, depth, recompute, x, exact) for recompute in (None, "inverse")]
    shallow, deep = (_name(depth, "inverse") for depth in depths)
    return Problem(
        name=f"{_CHANNELS} ch {_SIZE}², batch {batch}, {str(dtype).removeprefix('torch.')}",
        inputs=[x],
        oracle=lambda _: torch.empty(0),
        providers=providers,
        promises=[
            Promise(deep, shallow, 1, 1, quantity="share", of=_BYTES),
            Promise(deep, None, _TOLERANCES[dtype], _TOLERANCES[dtype], quantity="value", of="error"),
        ],
    )


def _problems(device: torch.device, quick: bool) -> Iterator[Problem]:
    torch.manual_seed(0)
    for dtype in _TOLERANCES:
        yield _problem((2, 4) if quick else (8, 64), 4 if quick else 16, dtype, device)


CASE = Case("Gradients of all parameters, with activations stored or recomputed", _problems)
