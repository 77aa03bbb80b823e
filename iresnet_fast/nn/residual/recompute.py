"""Backward through a chain of invertible modules that stores the chain's output only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ...solvers import (
    NotConvergedError,
    StoppingRule,
    autocast_settings,
    differentiable_once,
    evaluation_precision,
    iterate,
    sample_norms,
)
from ..weights import Snapshot, check_captured, frozen_state
from .block import InvertibleResidualBlock, convolution_layout
from .inverse import invert_branch

# A block's input is recomputed to this many eps of its dtype, or as near as rounding allows: at most so many eps of the
# precision that the branch is evaluated in.
_TARGET, _ACCEPTED = 16, 4
_ONCE = "recompute='inverse' can be differentiated once. Use recompute=None for second derivatives"
# Evaluations without a smaller residual after which rounding allows no more.
_PATIENCE = 3
# Weighted sums kept of each module's input, and the angle that makes their weights.
_SUMS, _TURN = 4, 2.399963229728653


def apply_recomputing(chain: nn.Module, links: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Run the links of a chain one after the other; their inputs are recomputed from the output in the backward.

    Each link is inverted with the weights, the autocast settings and the random state of its forward (Gomez et al.
    2017, for residual blocks by fixed point). Stored are the output of the chain, the normalized weights, and four
    weighted sums of each link's input, by which recomputed inputs are checked: one that was not recovered is an error.

    Args:
        chain: the module that the links belong to.
        links: invertible modules, in the order of the forward.
        x: (B, ...) input, float32 or float64.

    Returns:
        The output; it can be differentiated once, any number of times over a retained graph.

    Raises:
        TypeError: x is of low precision: its rounding would be lost.
        RuntimeError: a branch has no inverse (batch normalization in training mode).
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
        ctx.draws, ctx.sketches = [], []
        y = x.view_as(x)
        with snapshot.held():
            for link in links:
                before, stride = _random_state(x.device), y.stride()
                ctx.sketches.append(_sketch(y))
                y = link(y)
                drawn = any(not torch.equal(a, b) for a, b in zip(before, _random_state(x.device), strict=True))
                ctx.draws.append(_Draw(before, stride) if drawn else None)
        ctx.save_for_backward(y, *tensors)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            grads = _Recompute._backward(ctx, grad)
        return None, None, *differentiable_once(grads, ctx.saved_tensors[0], _ONCE)

    @staticmethod
    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, *tensors = ctx.saved_tensors
        tensors = ctx.snapshot.apart(tensors)
        grads: list[Tensor | None] = [None] * len(tensors)
        with ctx.autocast(), ctx.snapshot.held(tensors), frozen_state(ctx.snapshot.module):
            for i, link in reversed(list(enumerate(ctx.links))):
                draw = ctx.draws[i]
                x = _undo(link, y, draw)
                _check_recovered(i, x, ctx.sketches[i])
                wanted = [place for place in ctx.snapshot.of(link) if ctx.needs_input_grad[3 + place]]
                with torch.enable_grad(), draw.replay(y.device) if draw else nullcontext():
                    x.requires_grad_()
                    image = link(x)
                    check_captured(image, (x, *tensors))
                inputs = [x, *(tensors[place] for place in wanted)]
                grad, *found = torch.autograd.grad(image, inputs, grad, allow_unused=True)
                for place, part in zip(wanted, found, strict=True):
                    if part is not None:
                        grads[place] = part if grads[place] is None else grads[place] + part
                y = x.detach()
        return grad if ctx.needs_input_grad[2] else None, *grads


def _undo(link: nn.Module, y: Tensor, draw: _Draw | None) -> Tensor:
    """The input of a link, from its output."""
    if not isinstance(link, InvertibleResidualBlock):
        x: Tensor = link.inverse(y)  # type: ignore[operator]  # torch types attributes of modules as Tensor | Module
        return x.detach()

    tol = _TARGET * torch.finfo(y.dtype).eps
    rule = StoppingRule(tol, patience=_PATIENCE).for_(y)
    if draw is None:
        result = invert_branch(link.g, convolution_layout(link.g, y), rule)
    else:
        y = draw.as_then(y)

        def branch(x: Tensor) -> Tensor:
            with draw.replay(y.device):
                image: Tensor = link.g(draw.as_then(x))
                return image

        result = iterate(branch, y, rule, compact=False)
    accepted = max(tol, _ACCEPTED * evaluation_precision(y).eps)
    relative = result.residual / sample_norms(y).clamp_min(1.0)
    if not bool((relative <= accepted).all()):
        raise NotConvergedError(
            f"recompute='inverse': the input of a block could not be recomputed; largest relative residual "
            f"{float(relative.max()):.3g}, needed {accepted:.2g}. Use a smaller coeff so that the branch contracts, or "
            "recompute=None",
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


def _sketch(x: Tensor) -> Tensor:
    """A few weighted sums (B, 4) of each sample, of which the difference estimates the distance of two tensors."""
    rows = x.reshape(len(x), -1)
    positions = torch.arange(1, rows.shape[1] + 1, dtype=torch.float64, device=x.device)
    phases = positions[:, None] * torch.arange(1, _SUMS + 1, dtype=torch.float64, device=x.device).sqrt()
    return rows @ (math.sqrt(2 / _SUMS) * torch.cos(_TURN * phases)).to(x.dtype)


def _check_recovered(link: int, found: Tensor, sketch: Tensor) -> None:
    """Raise where a link's input was not recovered: it is not injective, nearly singular, or rounding grew."""
    allowed = evaluation_precision(found).eps ** 0.5
    error = sample_norms(_sketch(found) - sketch)
    drift = error / sample_norms(found).clamp_min(1.0)
    if not bool((drift <= allowed).all()):
        raise RuntimeError(
            f"recompute='inverse': the recomputed input of module {link} is about {float(drift.max()):.3g} away from "
            f"the true one (relative; allowed {allowed:.2g}), so gradients would be wrong: the module is not "
            "invertible or nearly singular, or rounding grew too much. Use certify(model) and a smaller coeff, "
            "float64, or recompute=None"
        )
    _check_size(error, found)


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
