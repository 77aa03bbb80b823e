"""What the whole-block inverses have in common: how a branch is described, checked and handed to a kernel."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _extension
from ..reference.branches import ACTIVATIONS
from ._arguments import check_choice
from ._backend import VARIABLE, Op
from ._fixed_point import FixedPoint

_SCHEMA = (
    "(Tensor y, Tensor x0, Tensor[] weights, Tensor?[] biases, int[] activations, Tensor parameters, {options}"
    "float tol, float lipschitz, int max_iterations, int patience, bool mixing, bool low) -> (Tensor, Tensor, Tensor, "
    "Tensor, Tensor)"
)
# What kernels count with.
_LARGEST = 2**31 - 1
# Alpha of ELU; beta and threshold of softplus; the slope softplus(0.5) of LipSwish.
_DEFAULTS = {"elu": (1.0, 0.0), "softplus": (1.0, 20.0), "lipswish": (0.9740769841801067, 0.0)}


def check_branch(
    y: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    activations: Sequence[str],
    parameters: Tensor | None,
) -> tuple[list[Tensor | None], Tensor]:
    """Check that layers and activations make a branch for y (B, C, ...); return all biases and parameters."""
    offsets: list[Tensor | None] = [None] * len(weights) if biases is None else list(biases)
    if not weights or len(offsets) != len(weights):
        raise ValueError(f"a branch has layers, and a bias or None for each, got {len(weights)} and {len(offsets)}")
    if len(activations) != len(weights) + 1:
        raise ValueError(
            f"{len(weights)} layers need {len(weights) + 1} activations, before, between and after them ('identity' "
            f"for none), got {len(activations)}"
        )
    width = y.shape[1]
    for i, (weight, bias, name) in enumerate(zip(weights, offsets, activations, strict=False)):
        check_choice("activations", name, ACTIVATIONS)
        if name == "maxmin" and width % 2:
            raise ValueError(f"MaxMin pairs channels and needs an even number of them, got {width} before layer {i}")
        if weight.shape[1] != width or weight.dtype != y.dtype or weight.device != y.device:
            raise ValueError(
                f"weight {i} must take {width} channels, in {y.dtype} on {y.device}; got {tuple(weight.shape)}, "
                f"{weight.dtype} on {weight.device}"
            )
        width = weight.shape[0]
        if bias is not None and (bias.shape != (width,) or bias.dtype != y.dtype or bias.device != y.device):
            raise ValueError(
                f"bias {i} must be ({width},), {y.dtype} on {y.device}; got {tuple(bias.shape)}, {bias.dtype} on "
                f"{bias.device}"
            )
    check_choice("activations", activations[-1], ACTIVATIONS)
    if width != y.shape[1]:
        raise ValueError(f"a residual branch keeps its channels, but maps {y.shape[1]} to {width}")
    if activations[-1] == "maxmin" and width % 2:
        raise ValueError(f"MaxMin pairs channels and needs an even number of them, got {width} after the last layer")
    if parameters is None:
        parameters = torch.tensor([_DEFAULTS.get(name, (0.0, 0.0)) for name in activations]).to(y)
    if parameters.shape != (len(activations), 2):
        raise ValueError(f"parameters must be ({len(activations)}, 2), two of each activation, got {parameters.shape}")
    return offsets, parameters.to(y)


def missing_kernel(op: Op, device: torch.device) -> str | None:
    """That an op was written for this kind of device as a reference only; None where it has a kernel."""
    best = op.backends.get(device.type, ("reference",))[0]
    return f"{op.name} has no kernel for {device.type} tensors" if best == "reference" else None


def kernel_obstacle(op: Op, device: torch.device) -> str | None:
    """Why no kernel serves an op on this device, only its reference; None where one does."""
    if reason := missing_kernel(op, device):
        return reason
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted != "auto" and (reason := op.obstacle(wanted, device.type)):
        return f"{VARIABLE}={wanted}, and {reason}"
    if op.choose(device) != "reference":
        return None
    return op.obstacle(op.backends[device.type][0], device.type) or f"{VARIABLE}=reference"


def run(
    op: Any,
    y: Tensor,
    x0: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[str],
    parameters: Tensor,
    *options: bool,
    tol: float,
    lipschitz: float | None,
    max_iterations: int | None,
    patience: int,
    method: str,
    low_precision: bool,
) -> FixedPoint:
    """Call the registered op, in its terms."""
    codes = [ACTIVATIONS.index(name) for name in activations]
    unproven, unlimited = -1.0, 0
    return FixedPoint(
        *op(
            y.detach(),
            (y if x0 is None else x0).detach(),
            [weight.detach() for weight in weights],
            [None if bias is None else bias.detach() for bias in biases],
            codes,
            parameters.detach(),
            *options,
            float(tol),
            unproven if lipschitz is None else float(lipschitz),
            unlimited if max_iterations is None else min(max_iterations, _LARGEST),
            min(patience, _LARGEST),
            method == "anderson",
            low_precision,
        )
    )


def define(
    name: str,
    reference: Callable[..., tuple[Tensor, ...]],
    launch: Callable[..., tuple[Tensor, ...]],
    options: str = "",
) -> None:
    """Register an op that inverts whole blocks, and ``<name>_reference``, which serves where no kernel does.

    Args:
        name: of the op.
        reference: its definition, on names of activations.
        launch: its CUDA kernel, on the op's own arguments.
        options: what its schema has besides.
    """
    qualified = f"iresnet_fast::{name}"

    def eager(
        y: Tensor,
        x0: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        activations: Sequence[int],
        *rest: Any,
    ) -> tuple[Tensor, ...]:
        *others, tol, lipschitz, max_iterations, patience, _, _ = rest
        return reference(
            y,
            x0,
            weights,
            biases,
            [ACTIVATIONS[code] for code in activations],
            *others,
            tol=tol,
            lipschitz=lipschitz if lipschitz >= 0 else None,
            max_iterations=max_iterations or None,
            patience=patience,
        )

    def fake(y: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        rows = y.shape[0]
        counts = [y.new_empty(rows, dtype=torch.int64) for _ in range(2)]
        residual = y.new_empty(rows, dtype=torch.promote_types(y.dtype, torch.float32))
        return y.new_empty(y.shape), residual, *counts, y.new_empty(rows, dtype=torch.bool)

    schema = _SCHEMA.format(options=options)
    if not _extension.defines(name):
        torch.library.define(qualified, schema)
        torch.library.impl(qualified, "cpu")(eager)
    torch.library.impl(qualified, "cuda")(launch)
    torch.library.define(f"{qualified}_reference", schema)
    torch.library.impl(f"{qualified}_reference", ("cpu", "cuda"))(eager)
    for one in (qualified, f"{qualified}_reference"):
        torch.library.register_fake(one)(fake)
