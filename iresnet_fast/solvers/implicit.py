"""The gradient of an inverse by the implicit function theorem, without storing any iterate."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .fixed_point import iterate
from .precision import autocast_settings
from .result import InverseResult, NotConvergedError, report_failure, sample_norms
from .rule import StoppingRule

# A branch as a function of x and of all tensors that it depends on.
Branch = Callable[[Tensor, Sequence[Tensor]], Tensor]
_ONCE = "an inverse can be differentiated once: its gradient comes from a solve, which has no gradient of its own"
# What an InverseResult has of each sample.
_COUNTS = ("iterations", "evaluations", "proof_evaluations")
_PER_SAMPLE = ("x", "residual", "error_bound", *_COUNTS, "converged", "certified")


def attach_gradient(
    g: Callable[[Tensor], Tensor],
    y: Tensor,
    x: Tensor,
    tensors: Sequence[Tensor],
    *,
    tol: float | None = None,
    max_iterations: int | None = None,
    lipschitz: float | None = None,
    method: str = "anderson",
) -> Tensor:
    """The solution x of x + g(x) = y as a differentiable function of y and of the tensors in g.

    With w = v − J_gᵀ w for an incoming gradient v, dy = w and the gradient of the tensors is −(∂g)ᵀ w (implicit
    function theorem; Bai et al. 2019, Theorem 1). w is found by the solver and stopping rule of the inverse itself,
    with v scaled to norm 1 per sample, for ‖J_gᵀ‖ ≤ L as ‖J_g‖ is. Nothing is stored but x and references.

    Args:
        g: the branch; evaluated once in every backward, with gradients.
        y: (B, ...) right-hand sides.
        x: (B, ...) their solutions, found without gradients.
        tensors: what g depends on, of which gradients are wanted.
        tol: of the backward's iteration, relative to the norm of each sample's gradient.
        max_iterations: as for :func:`invert_residual`.
        lipschitz: proven constant of g, or None.
        method: ``"anderson"`` or ``"picard"``.

    Returns:
        x, with a gradient; it can be differentiated once, any number of times over a retained graph.

    Raises:
        NotConvergedError: in the backward, where its own iteration does not converge.
    """
    rule = StoppingRule(tol, max_iterations, lipschitz, method).for_(y)
    return attach_branch_gradient(lambda x, _: g(x), y, x, tensors, rule)


def attach_branch_gradient(g: Branch, y: Tensor, x: Tensor, tensors: Sequence[Tensor], rule: StoppingRule) -> Tensor:
    """As :func:`attach_gradient`, of a branch g(x, tensors); inside transforms of ``torch.func``, too."""
    # What stalls or does not converge is an error here, whatever it was in the inverse.
    adjoint = replace(rule, patience=StoppingRule.patience, on_failure="raise")
    solution: Tensor = _Implicit.apply(g, adjoint, y, x, *tensors)
    return solution


def solve_values(
    solve: Callable[[Tensor, Tensor, Sequence[Tensor]], InverseResult], y: Tensor, x0: Tensor, tensors: Sequence[Tensor]
) -> InverseResult:
    """Solve inside a transform of ``torch.func``, without gradients: for the values behind y, x0 and the tensors.

    Under ``vmap`` over y all samples are solved together; over the tensors (an ensemble), one solve for each.

    Args:
        solve: takes y, x0 (B, ...) and the tensors as plain ones.
        y: (B, ...) right-hand sides.
        x0: (B, ...) first iterates.
        tensors: what the branch depends on.
    """
    found: list[InverseResult] = []

    def run(y: Tensor, x0: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        found.append(solve(y, x0, tensors))
        return tuple(getattr(found[-1], name) for name in _PER_SAMPLE)

    outputs = _Values.apply(run, True, y, x0, *tensors)
    return replace(found[-1], **dict(zip(_PER_SAMPLE, outputs, strict=True)))


def _over_samples(
    info: Any,
    run: Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, ...]],
    samples: Sequence[tuple[Tensor, int | None]],
    tensors: Sequence[tuple[Tensor, int | None]],
) -> tuple[Tensor, ...]:
    """``vmap`` over axis 0 of a computation that treats samples independently, of pairs (tensor, mapped axis)."""
    size: int = info.batch_size
    if all(axis is None for _, axis in tensors):
        folded = [part.expand(size, *part.shape) if axis is None else part.movedim(axis, 0) for part, axis in samples]
        outputs = run([part.flatten(0, 1) for part in folded], [part for part, _ in tensors])
        return tuple(part.unflatten(0, folded[0].shape[:2]) for part in outputs)

    def taken(pairs: Sequence[tuple[Tensor, int | None]], index: int) -> list[Tensor]:
        return [part if axis is None else part.select(axis, index) for part, axis in pairs]

    rows = [run(taken(samples, index), taken(tensors, index)) for index in range(size)]
    return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))


class _Values(torch.autograd.Function):
    """Run a computation on the values behind two tensors of samples, and the tensors that it depends on.

    It is not differentiated: the outputs are constants, or an error to differentiate.
    """

    @staticmethod
    def forward(
        run: Callable[..., tuple[Tensor, ...]], constant: bool, a: Tensor, b: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        return run(a, b, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        if inputs[1]:
            ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError(_ONCE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], run: Any, constant: bool, *tensors: Tensor) -> Any:
        pairs = list(zip(tensors, in_dims[2:], strict=True))
        outputs = _over_samples(
            info, lambda parts, rest: _Values.apply(run, constant, *parts, *rest), pairs[:2], pairs[2:]
        )
        return outputs, (0,) * len(outputs)


class _Implicit(torch.autograd.Function):
    @staticmethod
    def forward(g: Branch, rule: StoppingRule, y: Tensor, x: Tensor, *tensors: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        g, rule, y, _, *tensors = inputs
        ctx.g, ctx.rule = g, rule
        ctx.autocast = autocast_settings(y.device)
        ctx.save_for_backward(output, *tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[4:]) if needed]
        with ctx.autocast():
            if torch._C._are_functorch_transforms_active():
                w, *found = _transformed_gradients(ctx.g, ctx.rule, x, grad, tensors, wanted)
            else:
                w, *found = differentiable_once(_gradients(ctx.g, ctx.rule, x, grad, tensors, wanted), x, _ONCE)
        grads: list[Tensor | None] = [None] * len(tensors)
        for i, part in zip(wanted, found, strict=True):
            grads[i] = part
        return None, None, w, None, *grads

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], g: Branch, rule: StoppingRule, *tensors: Tensor) -> Any:
        pairs = list(zip(tensors, in_dims[2:], strict=True))
        run = _Implicit.apply
        (x,) = _over_samples(info, lambda parts, rest: (run(g, rule, *parts, *rest),), pairs[:2], pairs[2:])
        return x, 0


def differentiable_once(grads: Sequence[Tensor | None], source: Tensor, message: str) -> list[Tensor | None]:
    """Make it an error to differentiate gradients again, where a graph of them is being recorded.

    As torch's ``once_differentiable``, which lets a constant incoming gradient through: what is built on it would then
    have no gradient, silently.

    Args:
        grads: gradients, computed without a graph.
        source: what they depend on, with a graph.
        message: of the error.
    """
    if not (torch.is_grad_enabled() and source.requires_grad):
        return list(grads)
    found = iter(_Final.apply(message, source, *(part for part in grads if part is not None)))
    return [None if part is None else next(found) for part in grads]


class _Final(torch.autograd.Function):
    """The identity on gradients that have no gradient of their own."""

    @staticmethod
    def forward(ctx: Any, message: str, source: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        ctx.message = message
        return tuple(part.view_as(part) for part in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError(ctx.message)


@torch.no_grad()
def _gradients(
    g: Branch, rule: StoppingRule, x: Tensor, grad: Tensor, tensors: Sequence[Tensor], wanted: Sequence[int]
) -> tuple[Tensor | None, ...]:
    """The gradients of y, and of the tensors at these places."""
    # Apart from each other: a weight may depend on another one of them.
    tensors = [part if part.is_leaf else part.detach().requires_grad_(part.requires_grad) for part in tensors]
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        image = g(x, tensors)
    if torch._C._functorch.is_legacy_batchedtensor(grad):  # of autograd.grad(is_grads_batched=True)
        w = _one_by_one(lambda part: _solve_adjoint(image, x, part, rule), grad)
    else:
        w = _solve_adjoint(image, x, grad, rule)
    if not (wanted and image.requires_grad):
        return w, *(None,) * len(wanted)
    return w, *torch.autograd.grad(image, [tensors[i] for i in wanted], -w.to(image.dtype), allow_unused=True)


def _one_by_one(function: Callable[[Tensor], Tensor], batched: Tensor) -> Tensor:
    """Call a function for each tensor of a batch that autograd hides: torch takes it apart for ops only."""
    key = next(_KEYS)
    _FUNCTIONS[key] = function
    try:
        outputs: Tensor = torch.ops.iresnet_fast.call_one_by_one(batched, key)
        return outputs
    finally:
        del _FUNCTIONS[key]


_KEYS = itertools.count()
_FUNCTIONS: dict[int, Callable[[Tensor], Tensor]] = {}
_LIBRARY = torch.library.Library("iresnet_fast", "FRAGMENT")
_LIBRARY.define("call_one_by_one(Tensor x, int key) -> Tensor")
_LIBRARY.impl("call_one_by_one", lambda x, key: _FUNCTIONS[key](x), "CompositeExplicitAutograd")


def _transformed_gradients(
    g: Branch, rule: StoppingRule, x: Tensor, grad: Tensor, tensors: Sequence[Tensor], wanted: Sequence[int]
) -> tuple[Tensor | None, ...]:
    """The same inside a transform of ``torch.func``, where the tensors may be those of a transform."""

    def solve(x: Tensor, grad: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        return _gradients(g, rule, x, grad, tensors, ())

    (w,) = _Values.apply(solve, False, x, grad, *tensors)
    if not wanted:
        return (w,)

    def image(*chosen: Tensor) -> Tensor:
        given = list(tensors)
        for i, part in zip(wanted, chosen, strict=True):
            given[i] = part
        return g(x, given)

    pullback: Any = torch.func.vjp(image, *(tensors[i] for i in wanted))[1]
    return w, *pullback(-w)


def _solve_adjoint(image: Tensor, x: Tensor, grad: Tensor, rule: StoppingRule) -> Tensor:
    """W = grad − Jᵀ w, relative to the size of each sample's gradient; samples without a finite one stay without."""
    if not image.requires_grad:
        return grad
    size = sample_norms(grad)
    finite = torch.isfinite(size)
    wide = (-1,) + (1,) * (grad.dim() - 1)
    scale = torch.where(finite & (size > 0), size, 1.0).view(wide)
    unit = torch.where(finite.view(wide), grad / scale, 0.0).to(grad.dtype)

    def transposed(w: Tensor) -> Tensor:
        # A branch that does not depend on x has no Jacobian.
        (product,) = torch.autograd.grad(image, x, w.to(image.dtype), retain_graph=True, allow_unused=True)
        return torch.zeros_like(w) if product is None else product

    result = iterate(transposed, unit, rule, compact=False)
    try:
        report_failure(result, unit, rule)
    except NotConvergedError as error:
        raise NotConvergedError(f"gradient of the inverse: {error}", error.result) from error
    return torch.where(finite.view(wide), result.x * scale, torch.nan).to(grad.dtype)
