"""Modules as functions in float64, which proofs evaluate."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...ops.mlp_finish import ProvenRows, finishes, mlp_finish
from ...solvers import Evaluated, ExactBranch, Finished, Measured, key_of
from ...solvers.finish import PATIENCE
from ...solvers.rounding import root_of_sums
from ..inspection import parts_of
from ..weights import frozen_state
from .structure import LINEAR, Chain, NoChainError, read_chain


@torch.inference_mode(False)
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
        for name, value in vars(part).items():  # tensors that are neither parameters nor buffers
            if isinstance(value, Tensor) and value.is_floating_point():
                vars(part)[name] = value.double()
    return exact.double().requires_grad_(False)


class ExactPerceptron(ExactBranch):
    """A multilayer perceptron in float64, which one op finishes.

    Args:
        function: the branch in float64.
        chain: what it consists of.
        norms: proven norms of its weights.
    """

    def __init__(self, function: nn.Module, chain: Chain, norms: Mapping[tuple[Any, ...], float]) -> None:
        super().__init__(function, norms)
        self._weights = [layer.weight for layer in chain.layers]
        self._biases = [layer.bias for layer in chain.layers]
        self._activations = chain.activations
        # In float64 from the start: as_tensor(0.3) alone is 0.3 of float32.
        numbers = [torch.as_tensor(number, dtype=torch.float64) for pair in chain.numbers for number in pair]
        self._parameters = torch.stack(numbers).to(self._weights[0]).view(-1, 2)
        sizes = [weight.abs() for weight in self._weights]
        self._layer_sums = [root_of_sums(size.sum(1), size.sum(0)) for size in sizes]
        of = (norms.get(key_of(weight), math.inf) for weight in self._weights)
        self._layer_norms = [min(pair) for pair in zip(of, self._layer_sums, strict=True)]

    def measure(self, y: Tensor, x: Tensor, lipschitz: float) -> Measured:
        """By one evaluation."""
        found = self._run(y, x, lipschitz, y.new_full((len(y),), math.inf), None)
        return Measured(found.residual, found.rounding, found.error_bound, None)

    def finish(
        self,
        y: Tensor,
        x: Tensor,
        lipschitz: float,
        goal: Tensor,
        at: Evaluated | None = None,
        steps: Tensor | None = None,
    ) -> Finished:
        """By one op; what is known of the branch at x is found again."""
        found = self._run(y, x, lipschitz, goal, steps)
        return Finished(found.x, found.residual, found.error_bound, found.evaluations)

    def _run(self, y: Tensor, x: Tensor, lipschitz: float, goal: Tensor, steps: Tensor | None) -> ProvenRows:
        return mlp_finish(
            y,
            x,
            self._weights,
            self._biases,
            self._activations,
            self._parameters,
            norms=self._layer_norms,
            sums=self._layer_sums,
            lipschitz=lipschitz,
            goal=goal,
            steps=steps,
            patience=PATIENCE,
        )


def exact_branch(g: nn.Module, bounds: Mapping[str, float], features: int | None) -> ExactBranch | str:
    """A branch in float64, or why it has none.

    Args:
        g: the branch.
        bounds: proven norms of its layers, by name.
        features: D of inputs (B, D); None of others.
    """
    try:
        exact = exact_copy(g)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a missing proof never raises
        return f"the branch cannot be copied: {type(error).__name__}: {error}"
    norms = {}
    for name, bound in bounds.items():
        weight = exact.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        norms[key_of(weight)] = bound
    chain = None if features is None else _perceptron(exact, features)
    return ExactBranch(exact, norms) if chain is None else ExactPerceptron(exact, chain, norms)


def _perceptron(g: nn.Module, features: int) -> Chain | None:
    """What a branch of linear layers consists of; None of others, and where no op finishes it."""
    try:
        chain = read_chain(g)
    except NoChainError:
        return None
    first = chain.layers[0]
    if not all(type(layer) in LINEAR for layer in chain.layers) or not finishes(first.weight.device):
        return None
    if not all(layer.weight.numel() for layer in chain.layers):
        return None
    return chain if first.in_features == features == chain.layers[-1].out_features else None
