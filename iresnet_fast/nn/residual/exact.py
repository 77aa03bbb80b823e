"""Modules as functions in float64, which proofs evaluate."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...solvers import WatchedFunction, key_of
from ..inspection import parts_of
from ..weights import frozen_state


@torch.no_grad()
def exact_copy(module: nn.Module) -> nn.Module:
    """Copy a module to float64, with its normalized weights as they are now in place of their parametrizations.

    The copy computes the same function without rounding to the module's dtype. It is evaluated in any thread, for
    nothing writes to it.
    """
    with frozen_state(module):
        values = [
            {name: getattr(part, name).detach().clone() for name in getattr(part, "parametrizations", ())}
            for part in parts_of(module)
        ]
    exact = copy.deepcopy(module)
    for part, weights in zip(parts_of(exact), values, strict=True):
        if weights:
            part.__class__ = parametrize.type_before_parametrizations(part)
            del part._modules["parametrizations"]
        for name, value in weights.items():
            part._parameters[name] = nn.Parameter(value, requires_grad=False)
    return exact.double().requires_grad_(False)


def exact_branch(g: nn.Module, bounds: Mapping[str, float]) -> WatchedFunction | str:
    """A branch in float64, or why it has none.

    Args:
        g: the branch.
        bounds: proven norms of its layers, by name.
    """
    try:
        exact = exact_copy(g)
    except Exception as error:
        return f"the branch cannot be copied: {type(error).__name__}: {error}"
    norms = {}
    for name, bound in bounds.items():
        weight = exact.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        norms[key_of(weight)] = bound
    return WatchedFunction(exact, norms)
