"""Which residual branches one op inverts whole; the others are inverted by the general solver."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...ops import FixedPoint
from ...ops.arguments import check_choice
from ...ops.block_inverse import (
    BOTTLENECK,
    BOTTLENECK_KERNELS,
    MLP,
    bottleneck_inverse,
    bottleneck_inverse_obstacle,
    missing_kernel,
    mlp_inverse,
    mlp_inverse_obstacle,
)
from ...solvers import InverseResult, StoppingRule, conclude, evaluation_precision, iterate
from ..inspection import parts_of
from ..spectral_norm import find_spectral_norm
from ..weights import NormalizedWeight, frozen_state
from .structure import CONVOLUTIONS, LINEAR, NoChainError, read_chain

# What iterates in low precision resolve, relative, a few times their floor; evaluations without progress at that floor.
_RESOLVED = {torch.float16: 1e-4, torch.bfloat16: 1e-3}
_LOW_PATIENCE = 2
PATHS = ("auto", "general", "fused")


class _NotWholeError(Exception):
    """No op inverts this branch whole; the message says why."""


class Branch(NamedTuple):
    """A branch as the ops know it: an activation, a layer, an activation, ..., an activation.

    Attributes:
        weights: of the layers, linear or convolutions.
        biases: of each, or None.
        activations: their names, one more than layers.
        parameters: (number of activations, 2), in the weights' dtype.
        circular: how convolutions pad; None of linear layers.
        input_sizes: (H, W) of the convolutions whose norms were fitted to one.
        may_be_kept: whether a fingerprint of the module sees everything that it depends on: parametrizations other
            than spectral norms may depend on anything.
    """

    weights: list[Tensor]
    biases: list[Tensor | None]
    activations: list[str]
    parameters: Tensor
    circular: bool | None
    input_sizes: set[tuple[int, ...]]
    may_be_kept: bool


def invert_branch(
    g: nn.Module,
    y: Tensor,
    rule: StoppingRule,
    branch: Branch | str | None = None,
    *,
    x0: Tensor | None = None,
    path: str = "auto",
    iterate_in: torch.dtype | None = None,
) -> InverseResult:
    """Solve x + g(x) = y: by one op where there is one for this branch, device and dtype, else by the general solver.

    Nothing is proven, and nothing raised where a sample does not converge.

    Args:
        g: the branch; its state does not change.
        y: (B, ...) outputs of the block.
        rule: made for y.
        branch: what :func:`read_branch` says of g; None to read it here.
        x0: (B, ...) start of the iteration; default y.
        path: ``"auto"``; ``"general"`` for the solver that takes any branch; ``"fused"`` for the op, or an error.
        iterate_in: float16 or bfloat16: evaluate g so until that dtype resolves no more, then in y's own. Nothing is
            lost: the last evaluations decide. None, or a ``tol`` that low precision would reach: in y's own only.

    Raises:
        ValueError: another path, or ``"fused"`` where there is no such op; the message says why.
    """
    check_choice("path", path, PATHS)
    if iterate_in is not None:
        return _invert_in_stages(g, y, rule, branch, x0, path, iterate_in)
    if path == "general":
        return _invert_in_general(g, y, rule, x0, "it was asked for")
    try:
        solve, reason = _choose_op(read_branch(g) if branch is None else branch, y)
    except _NotWholeError as why:
        if path == "fused":
            raise ValueError(f"path='fused', but no op inverts this block whole: {why}. Use path='auto'") from None
        return _invert_in_general(g, y, rule, x0, str(why))
    return _conclude(solve, reason, y, rule, x0)


def _invert_in_stages(
    g: nn.Module,
    y: Tensor,
    rule: StoppingRule,
    branch: Branch | str | None,
    x0: Tensor | None,
    path: str,
    low: torch.dtype,
) -> InverseResult:
    """From the solution of g in low precision, which is near, to that of g."""
    if low not in _RESOLVED:
        raise ValueError(f"iterate_in must be torch.float16, torch.bfloat16 or None, got {low!r}")
    if rule.tolerance >= _RESOLVED[low]:
        return invert_branch(g, y, rule, branch, x0=x0, path=path)
    # Without the constant, which is proven of g: here is another function.
    coarse = replace(rule, tol=_RESOLVED[low], patience=_LOW_PATIENCE, lipschitz=None)
    if parametrize._cache_enabled:  # torch keeps the first value of a weight, which must not be one of low precision
        for part in parts_of(g):
            for name in getattr(part, "parametrizations", ()):
                getattr(part, name)
    first = None
    if path != "general" and low == torch.float16 and y.device.type == "cuda":
        with suppress(_NotWholeError):
            solve, reason = _choose_op(read_branch(g) if branch is None else branch, y)
            first = _conclude(partial(solve, low_precision=True), reason, y, coarse, x0)
    if first is None:
        with torch.autocast(y.device.type, dtype=low):
            first = _invert_in_general(g, y, coarse, x0, "")
    usable = first.converged.view(-1, *(1,) * (y.dim() - 1))
    near = torch.where(usable, first.x, y if x0 is None else x0)
    last = invert_branch(g, y, rule, branch, x0=near, path=path)
    return replace(
        last,
        iterations=first.iterations + last.iterations,
        evaluations=first.evaluations + last.evaluations,
        precision=f"{last.precision}, after {str(low).removeprefix('torch.')}",
    )


def _invert_in_general(g: nn.Module, y: Tensor, rule: StoppingRule, x0: Tensor | None, reason: str) -> InverseResult:
    with frozen_state(g):
        return replace(iterate(g, y, rule, x0=x0), reason=reason)


@torch.no_grad()
def _conclude(
    solve: partial[FixedPoint], reason: str, y: Tensor, rule: StoppingRule, x0: Tensor | None
) -> InverseResult:
    solution = solve(
        tol=rule.tolerance,
        max_iterations=rule.max_iterations,
        lipschitz=rule.lipschitz,
        method=rule.method,
        patience=rule.patience,
        x0=x0,
    )
    return conclude(solution, y, rule, path=solve.func.__name__, reason=reason)


def _choose_op(branch: Branch | str, y: Tensor) -> tuple[partial[FixedPoint], str]:
    """The op that inverts a block whole, given all but its options, and the reason; raises where there is none."""
    if isinstance(branch, str):
        raise _NotWholeError(branch)
    for tensor in (*branch.weights, *branch.biases):
        if tensor is not None and (tensor.dtype != y.dtype or tensor.device != y.device):
            raise _NotWholeError(f"the weights are {tensor.dtype} on {tensor.device}, y is {y.dtype} on {y.device}")
    precision = evaluation_precision(y)
    if precision.name != str(y.dtype).removeprefix("torch."):
        raise _NotWholeError(f"g is evaluated as PyTorch does in {precision.name}")
    widths = [branch.weights[0].shape[1], *(weight.shape[0] for weight in branch.weights)]
    axes = 2 if branch.circular is None else 4
    if y.dim() != axes or y.shape[1] != widths[0]:
        raise _NotWholeError(f"y has shape {tuple(y.shape)}, not (B, {widths[0]}{', H, W' if axes == 4 else ''})")
    if branch.input_sizes - {tuple(y.shape[2:])}:
        raise _NotWholeError(f"its norms are those of inputs of {sorted(branch.input_sizes)}")
    given: dict[str, Any] = {"parameters": branch.parameters}
    if branch.circular is None:
        op, why = mlp_inverse, mlp_inverse_obstacle(y, branch.weights)
    else:
        op, why = bottleneck_inverse, bottleneck_inverse_obstacle(y, branch.weights)
        given["circular"] = branch.circular
    if why:
        raise _NotWholeError(why)
    reason = f"a chain of {', '.join(map(str, widths))} channels in {precision.name}"
    return partial(op, y, branch.weights, branch.biases, branch.activations, **given), reason


def read_branch(g: nn.Module) -> Branch | str:
    """A branch in the ops' terms, with the weights that it has now, or why no op inverts it."""
    try:
        with frozen_state(g):
            layers, activations, numbers = read_chain(g)
        circular = _read_padding(layers)
    except (NoChainError, _NotWholeError) as error:
        return str(error)
    # Without a kernel there is no need to keep its weights.
    known = next(g.parameters(), None)
    if known is not None and (why := missing_kernel(MLP if circular is None else BOTTLENECK, known.device)):
        return why
    with frozen_state(g):
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    # In float64 from the start: as_tensor(0.3) alone is 0.3 of float32.
    values = [torch.as_tensor(number, dtype=torch.float64) for pair in numbers for number in pair]
    parameters = torch.stack(values).to(weights[0]).view(-1, 2)
    norms = [norm for layer in layers if (norm := find_spectral_norm(layer)) is not None]
    sizes = {norm.geometry.input_size for norm in norms if norm.geometry is not None}
    return Branch(weights, biases, activations, parameters, circular, sizes, all(map(_is_known, g.modules())))


def _is_known(part: nn.Module) -> bool:
    return not isinstance(part, parametrize.ParametrizationList) or (
        isinstance(part, NormalizedWeight) and len(part) == 1
    )


def _read_padding(layers: list[Any]) -> bool | None:
    """Whether the convolutions of a bottleneck pad circularly, None for linear layers; raises for others."""
    kinds = {parametrize.type_before_parametrizations(layer) for layer in layers}
    if kinds <= set(LINEAR):
        return None
    if not kinds <= set(CONVOLUTIONS):
        raise _NotWholeError("it has linear layers and convolutions")
    sizes = [layer.kernel_size for layer in layers]
    if sizes != BOTTLENECK_KERNELS:
        raise _NotWholeError(f"its kernels are {sizes}, not {BOTTLENECK_KERNELS}")
    modes = set()
    for layer in layers:
        around = tuple(size // 2 for size in layer.kernel_size)
        options = (layer.stride, layer.dilation, layer.groups, around if layer.padding == "same" else layer.padding)
        if options != ((1, 1), (1, 1), 1, around):
            raise _NotWholeError(f"a convolution has (stride, dilation, groups, padding) {options}")
        if any(around):
            modes.add(layer.padding_mode)
    if modes not in ({"zeros"}, {"circular"}):
        raise _NotWholeError(f"it pads by {', '.join(sorted(modes))}")
    return modes == {"circular"}
