"""Backward through a chain of invertible modules that stores the chain's output only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..solvers import NotConvergedError, evaluation_precision, invert_residual, sample_norms
from .frozen import Snapshot, frozen_state
from .injective_pad import InjectivePad
from .residual_block import InvertibleResidualBlock

# Inputs are recomputed to this many eps of their dtype, or as near as rounding allows: at most so many eps of the
# precision that the branch is evaluated in.
_TARGET, _ACCEPTED = 16, 256


def apply_recomputing(chain: nn.Module, links: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Run the links of a chain one after the other; their inputs are recomputed from the output in the backward.

    Each link is inverted with the weights, the autocast settings and the random state of its forward (Gomez et al.
    2017, for residual blocks by fixed point). Stored are the output and references to the weights.

    Args:
        chain: the module that the links belong to.
        links: invertible modules, in the order of the forward.
        x: (B, ...) input.

    Returns:
        The output; it can be differentiated once, any number of times over a retained graph.

    Raises:
        RuntimeError: a branch has no inverse (batch normalisation in training mode).
        NotConvergedError: in the backward, where an input cannot be recomputed.
    """
    snapshot = Snapshot(chain)
    if not snapshot.needs_gradient(x):
        with snapshot.held():
            for link in links:
                x = link(x)
            return x
    for link in links:
        if isinstance(link, InvertibleResidualBlock):
            link.check_invertible(dropout_replayed=True)
    output: Tensor = _Recompute.apply(snapshot, tuple(links), x, *snapshot.tensors)
    return output


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, snapshot: Snapshot, links: tuple[nn.Module, ...], x: Tensor, *tensors: Tensor) -> Tensor:
        ctx.snapshot, ctx.links = snapshot, links
        ctx.autocast = _autocast_settings(x.device)
        ctx.random_states = []
        y = x.view_as(x)
        with snapshot.held():
            for link in links:
                before = _random_state(x.device)
                y = link(y)
                drawn = any(not torch.equal(a, b) for a, b in zip(before, _random_state(x.device), strict=True))
                ctx.random_states.append(before if drawn else None)
        ctx.save_for_backward(y, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, *tensors = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * len(tensors)
        with ctx.autocast(), frozen_state(ctx.snapshot.module), ctx.snapshot.held():
            for link, state in zip(reversed(ctx.links), reversed(ctx.random_states), strict=True):
                replay = _replaying(state, y.device)
                x = _undo(link, y, replay if state is not None else None)
                wanted = [i for i in ctx.snapshot.of(link) if ctx.needs_input_grad[3 + i]]
                with torch.enable_grad(), replay():
                    x.requires_grad_()
                    image = link(x)
                inputs = [x, *(tensors[i] for i in wanted)]
                grad, *found = torch.autograd.grad(image, inputs, grad, allow_unused=True)
                for i, part in zip(wanted, found, strict=True):
                    if part is not None:
                        grads[i] = part if grads[i] is None else grads[i] + part
                y = x.detach()
        return None, None, grad if ctx.needs_input_grad[2] else None, *grads


def _undo(link: nn.Module, y: Tensor, replay: Callable[[], Any] | None) -> Tensor:
    """The input of a link, from its output."""
    if isinstance(link, InjectivePad):  # the appended channels were zero; they are now up to rounding
        return y[:, : y.shape[1] - link.channels].detach()
    if not isinstance(link, InvertibleResidualBlock):
        x: Tensor = link.inverse(y)  # type: ignore[operator]
        return x.detach()

    def branch(x: Tensor) -> Tensor:
        with (replay or nullcontext)():
            image: Tensor = link.g(x)
            return image

    # A branch that draws random numbers draws them for the whole batch.
    compact = None if replay is None else False
    tol = _TARGET * torch.finfo(y.dtype).eps
    result = invert_residual(branch, y, tol=tol, on_failure="return", compact=compact)
    accepted = max(tol, _ACCEPTED * evaluation_precision(y).eps)
    relative = result.residual / sample_norms(y).clamp_min(1.0)
    if not bool((relative <= accepted).all()):
        raise NotConvergedError(
            f"recompute='inverse': the input of a block could not be recomputed; largest relative residual "
            f"{float(relative.max()):.3g}, needed {accepted:.2g}. Remedy: a smaller coeff so that the branch "
            "contracts, or recompute=None",
            result,
        )
    return result.x


def _autocast_settings(device: torch.device) -> Callable[[], torch.autocast]:
    kind = device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype=dtype, enabled=enabled)


def _random_state(device: torch.device) -> tuple[Tensor, ...]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return tuple(states)


def _replaying(state: tuple[Tensor, ...] | None, device: torch.device) -> Callable[[], Any]:
    """A context in which random numbers are drawn as from this state on, and none are used up."""
    if state is None:
        return nullcontext

    @contextmanager
    def replay() -> Iterator[None]:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.set_rng_state(state[0])
            if device.type == "cuda":
                torch.cuda.set_rng_state(state[1], device)
            yield

    return replay
