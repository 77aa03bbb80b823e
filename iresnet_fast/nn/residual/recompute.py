"""Backward through a chain of invertible modules that stores the chain's ends only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ...solvers import (
    NotConvergedError,
    autocast_settings,
    differentiable_once,
    evaluation_precision,
    invert_residual,
    sample_norms,
)
from ..weights import Snapshot, frozen_state
from .block import InvertibleResidualBlock, convolution_layout
from .inverse import invert_branch

# A block's input is recomputed to this many eps of its dtype, or as near as rounding allows: at most so many eps of the
# precision that the branch is evaluated in.
_TARGET, _ACCEPTED = 16, 4
_ONCE = "recompute='inverse' can be differentiated once. Use recompute=None for second derivatives"
# Evaluations without a smaller residual after which rounding allows no more.
_PATIENCE = 3


def apply_recomputing(chain: nn.Module, links: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Run the links of a chain one after the other; their inputs are recomputed from the output in the backward.

    Each link is inverted with the weights, the autocast settings and the random state of its forward (Gomez et al.
    2017, for residual blocks by fixed point). Stored are input and output of the chain, and the normalised weights. At
    the end the recomputed input is compared with the stored one: inputs that were not recovered are an error.

    Args:
        chain: the module that the links belong to.
        links: invertible modules, in the order of the forward.
        x: (B, ...) input, float32 or float64.

    Returns:
        The output; it can be differentiated once, any number of times over a retained graph.

    Raises:
        TypeError: x is of low precision: its rounding would be lost.
        RuntimeError: a branch has no inverse (batch normalisation in training mode).
        NotConvergedError: in the backward, where an input cannot be recomputed.
    """
    snapshot = Snapshot(chain)
    if not snapshot.needs_gradient(x):
        with snapshot.held():
            for link in links:
                x = link(x)
            return x
    if torch.finfo(x.dtype).bits < 32:
        raise TypeError(
            f"recompute='inverse' needs float32 or float64 inputs, got {x.dtype}: outputs rounded so coarsely do not "
            "determine their inputs. Remedy: float32, with torch.autocast for speed"
        )
    for link in links:
        if isinstance(link, InvertibleResidualBlock):
            link.check_invertible(dropout_replayed=True)
    output: Tensor = _Recompute.apply(snapshot, tuple(links), x, *snapshot.tensors)
    return output


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, snapshot: Snapshot, links: tuple[nn.Module, ...], x: Tensor, *tensors: Tensor) -> Tensor:
        ctx.snapshot, ctx.links = snapshot, links
        ctx.autocast = autocast_settings(x.device)
        ctx.draws = []
        y = x.view_as(x)
        with snapshot.held():
            for link in links:
                before, stride = _random_state(x.device), y.stride()
                y = link(y)
                drawn = any(not torch.equal(a, b) for a, b in zip(before, _random_state(x.device), strict=True))
                ctx.draws.append(_Draw(before, stride) if drawn else None)
        ctx.save_for_backward(x, y, *tensors)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            grads = _Recompute._backward(ctx, grad)
        return None, None, *differentiable_once(grads, ctx.saved_tensors[1], _ONCE)

    @staticmethod
    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        first, y, *tensors = ctx.saved_tensors
        tensors = ctx.snapshot.apart(tensors)
        grads: list[Tensor | None] = [None] * len(tensors)
        with ctx.autocast(), ctx.snapshot.held(tensors), frozen_state(ctx.snapshot.module):
            for link, draw in zip(reversed(ctx.links), reversed(ctx.draws), strict=True):
                x = _undo(link, y, draw)
                wanted = [i for i in ctx.snapshot.of(link) if ctx.needs_input_grad[3 + i]]
                with torch.enable_grad(), draw.replay(y.device) if draw else nullcontext():
                    x.requires_grad_()
                    image = link(x)
                inputs = [x, *(tensors[i] for i in wanted)]
                grad, *found = torch.autograd.grad(image, inputs, grad, allow_unused=True)
                for i, part in zip(wanted, found, strict=True):
                    if part is not None:
                        grads[i] = part if grads[i] is None else grads[i] + part
                y = x.detach()
            _check_recovered(y, first)
        return grad if ctx.needs_input_grad[2] else None, *grads


def _undo(link: nn.Module, y: Tensor, draw: _Draw | None) -> Tensor:
    """The input of a link, from its output."""
    if not isinstance(link, InvertibleResidualBlock):
        x: Tensor = link.inverse(y)  # type: ignore[operator]  # torch types attributes of modules as Tensor | Module
        return x.detach()

    tol = _TARGET * torch.finfo(y.dtype).eps
    options: dict[str, Any] = {"tol": tol, "on_failure": "return", "patience": _PATIENCE}
    if draw is None:
        result = invert_branch(link.g, convolution_layout(link.g, y), **options)
    else:
        y = draw.as_then(y)

        def branch(x: Tensor) -> Tensor:
            with draw.replay(y.device):
                image: Tensor = link.g(draw.as_then(x))
                return image

        result = invert_residual(branch, y, compact=False, **options)
    accepted = max(tol, _ACCEPTED * evaluation_precision(y).eps)
    relative = result.residual / sample_norms(y).clamp_min(1.0)
    if not bool((relative <= accepted).all()):
        raise NotConvergedError(
            f"recompute='inverse': the input of a block could not be recomputed; largest relative residual "
            f"{float(relative.max()):.3g}, needed {accepted:.2g}. Remedy: a smaller coeff so that the branch "
            "contracts, or recompute=None",
            result,
        )
    _check_size(result.residual, y)
    return result.x if draw is None else draw.as_then(result.x)


def _check_size(error: Tensor, y: Tensor) -> None:
    """Raise where errors that the tolerance allows are large beside the values themselves, over the batch.

    A tolerance has a floor at norm 1, and a gradient is a sum over samples: few small ones among others do no harm.
    """
    allowed = evaluation_precision(y).eps ** 0.5
    size = sample_norms(y).square().mean().sqrt()
    if not bool((error <= allowed * size).all()):
        raise RuntimeError(
            f"recompute='inverse': values of norm {float(size):.3g} are recovered to {float(error.max()):.3g} only, so "
            "gradients would be wrong. Scale the data to norms near 1, use float64, or recompute=None"
        )


def _check_recovered(found: Tensor, x: Tensor) -> None:
    """Raise where the chain's input was not recovered: a block that is not injective, or rounding that grew."""
    allowed = evaluation_precision(x).eps ** 0.5
    error = sample_norms(found - x)
    drift = error / sample_norms(x).clamp_min(1.0)
    if not bool((drift <= allowed).all()):
        raise RuntimeError(
            f"recompute='inverse': the recomputed input of the chain is {float(drift.max()):.3g} away from the true "
            f"one (relative; allowed {allowed:.2g}), so its gradients would be wrong: some block is not invertible, or "
            "rounding grew too much. Remedy: certify(model) and a smaller coeff, float64, or recompute=None"
        )
    _check_size(error, x)


class _Draw:
    """The random numbers of one forward: the state that they were drawn from, and the layout of the input.

    They are drawn for the whole batch, in the order of memory.
    """

    def __init__(self, state: tuple[Tensor, ...], stride: tuple[int, ...]) -> None:
        self._state, self._stride = state, stride

    @contextmanager
    def replay(self, device: torch.device) -> Iterator[None]:
        """Within it the same random numbers are drawn again, and none are used up."""
        cuda = device.type == "cuda"
        with torch.random.fork_rng([device] if cuda else []):
            torch.set_rng_state(self._state[0])
            if cuda:
                torch.cuda.set_rng_state(self._state[1], device)
            yield

    def as_then(self, x: Tensor) -> Tensor:
        """X in the layout of the forward's input."""
        return (
            x
            if x.stride() == self._stride
            else torch.empty_strided(x.shape, self._stride, dtype=x.dtype, device=x.device).copy_(x)
        )


def _random_state(device: torch.device) -> tuple[Tensor, ...]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return tuple(states)
