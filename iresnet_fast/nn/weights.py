"""Where a normalized weight comes from.

In evaluation mode it is a pure function of its layer's parameter and of the vectors u and v that are kept beside it.
Events that change the parameter settle the vectors: :meth:`NormalizedWeight.settle` says which. In training mode a
forward iterates once. Whoever needs other weights for a while puts them in place with :func:`override`, for its own
thread and for the length of one call: a solve, a recomputation, the grouped update of :func:`fuse`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .inspection import parts_of

if TYPE_CHECKING:
    from .spectral_norm import SpectralNorm

_Module = TypeVar("_Module", bound=nn.Module)


class _Frame(NamedTuple):
    """What is in force in a thread.

    Attributes:
        frozen: modules whose forward writes no state; of a spectral norm, the weight that it gives out.
        lent: the weights of grouped updates, and the version of the parameter that each was made of.
        owner: the grouped update that put it in place; None of context managers.
        outer: what was in force before.
    """

    frozen: Mapping[nn.Module, Tensor | None]
    lent: Mapping[nn.Module, tuple[Tensor, int | None]]
    owner: object
    outer: _Frame | None


# Exactly this type: torch.compile reads neither context variables nor subclasses of threading.local.
_thread = threading.local()
_thread.frame = None  # in the thread that imports this: compiled code would be compiled again once it is there


def _frame() -> _Frame | None:
    return getattr(_thread, "frame", None)


def is_frozen(module: nn.Module) -> bool:
    """Return true if the module's forward must not write to its state in this thread."""
    frame = _frame()
    return frame is not None and module in frame.frozen


def weight_in_place(norm: nn.Module, weight: Tensor) -> Tensor | None:
    """Return what a spectral norm gives out in this thread for this parameter, if that was put in place."""
    frame = _frame()
    if frame is None:
        return None
    given = frame.frozen.get(norm)
    if given is None and norm.training and norm in frame.lent:
        # After Ctrl-C torch calls no hook that would end the update: a parameter that has changed since is not served.
        lent, version = frame.lent[norm]
        given = lent if version is None or version == version_of(weight) else None
    return given


@contextmanager
def override(frozen: Mapping[nn.Module, Tensor | None]) -> Iterator[None]:
    """Within it, in this thread, spectral norms give out these weights, and none of these modules writes its state."""
    outer = _frame()
    if outer is None:
        _thread.frame = _Frame(frozen, {}, None, None)
    else:
        _thread.frame = outer._replace(frozen={**outer.frozen, **frozen}, owner=None, outer=outer)
    try:
        yield
    finally:
        _thread.frame = outer


def lend(lent: Mapping[nn.Module, tuple[Tensor, int | None]], owner: object) -> None:
    """Let spectral norms in training mode give out these weights in this thread, until the owner takes them back.

    Args:
        lent: the weights, and the version of the parameter that each was made of.
        owner: whose they are.
    """
    outer = _frame()
    if outer is None:
        _thread.frame = _Frame({}, lent, owner, None)
    else:
        _thread.frame = outer._replace(lent={**outer.lent, **lent}, owner=owner, outer=outer)


def take_back(owner: object) -> None:
    """End what this owner has lent last in this thread, if nothing was put in place after it."""
    frame = _frame()
    if frame is not None and frame.owner is owner:
        _thread.frame = frame.outer


def version_of(weight: Tensor) -> int | None:
    """How often a tensor was written to; None where nobody counts."""
    return None if torch.compiler.is_compiling() or weight.is_inference() else weight._version


@contextmanager
def frozen_state(module: nn.Module) -> Iterator[None]:
    """Within it, in this thread, normalized weights stay as they are now and the module's forward changes no state.

    Weights are computed once, on entry, with their gradients if those are recorded there.
    """
    outer = _frame()
    frozen: dict[nn.Module, Tensor | None] = {} if outer is None else dict(outer.frozen)
    for part in parts_of(module):
        if isinstance(part, NormalizedWeight):
            if frozen.get(part.norm) is None:
                frozen[part.norm] = part.norm.evaluate(part.original)
        else:
            frozen.setdefault(part, None)
    with override(frozen):
        yield


class NormalizedWeight(parametrize.ParametrizationList):
    """The parametrizations of a weight under spectral norm: its own first, then whatever was registered later."""

    @property
    def norm(self) -> SpectralNorm:
        """The spectral norm."""
        return cast("SpectralNorm", self._modules["0"])

    def settle(self) -> None:
        """Iterate u and v until the norm changes by less than rounding; vectors that are settled keep every bit.

        This runs at construction, at ``eval()``, in ``certify``, ``enforce`` and ``settle``, where the weight is
        assigned or initialized anew, and at ``load_state_dict`` into a module in evaluation mode. In training mode
        loaded vectors are kept as they are, unless the state dict has the weight without them.
        """
        self.norm.settle(self.original)

    def train(self, mode: bool = True) -> NormalizedWeight:
        """Set the mode; evaluation mode settles the vectors."""
        super().train(mode)
        if not mode:
            self.settle()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}original" in state_dict and not {f"{prefix}0._u", f"{prefix}0._v"} <= state_dict.keys():
            self.settle()


def _settle_loaded(weight: NormalizedWeight, incompatible_keys: Any) -> None:
    """After ``load_state_dict``, when the vectors are loaded, too."""
    if not weight.training:
        weight.settle()


def normalized_weights(module: nn.Module) -> Iterator[NormalizedWeight]:
    """All weights under spectral norm in a module, once each."""
    return (part for part in parts_of(module) if isinstance(part, NormalizedWeight))


def settle(module: _Module) -> _Module:
    """Let u and v of every spectral norm in a module settle, in any mode; changes nothing where they are settled.

    Needed only where a weight was written in evaluation mode behind the module's back: by ``.data``, in place, or
    through NumPy. ``module.eval()`` does the same.

    Args:
        module: any module.

    Returns:
        The module itself.

    Raises:
        TypeError: not a module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"settle takes a module, got {type(module).__name__}")
    for weight in normalized_weights(module):
        weight.settle()
    return module


def adopt(module: nn.Module, name: str) -> NormalizedWeight:
    """Take over a weight of which torch has just registered the parametrization."""
    parametrizations: Any = module.parametrizations
    weight: Any = parametrizations[name]
    weight.__class__ = NormalizedWeight
    weight.register_load_state_dict_post_hook(_settle_loaded)
    kind: Any = type(module)  # made by torch for this module
    get, put = vars(kind)[name].fget, vars(kind)[name].fset

    def read(self: Any) -> Tensor:
        # What is in place in this thread must neither come from torch's cache, which all threads share, nor enter it.
        if _frame() is None:
            return get(self)
        value: Tensor = self.parametrizations[name]()
        return value

    def assign(self: Any, value: Tensor) -> None:
        put(self, value)
        self.parametrizations[name].settle()

    setattr(kind, name, property(read, assign))
    kind.__reduce_ex__ = _reduce
    if hasattr(kind, "reset_parameters"):
        kind.reset_parameters = _reset_parameters
    return cast(NormalizedWeight, weight)


def _reset_parameters(self: Any) -> None:
    """Initialize the stored weight anew, as the layer's own type does, and settle the vectors."""
    weights = [part for part in self.parametrizations.values() if isinstance(part, NormalizedWeight)]
    if len(weights) != len(self.parametrizations) or any(len(weight) > 1 for weight in weights):
        raise RuntimeError(
            f"reset_parameters: {type(self).__name__} has other parametrizations beside spectral_norm. Remove them "
            "first with torch.nn.utils.parametrize.remove_parametrizations"
        )
    with override({weight.norm: weight.original for weight in weights}):
        cast(Any, parametrize.type_before_parametrizations(self)).reset_parameters(self)
    for weight in weights:
        weight.settle()


def _reduce(self: Any, protocol: int) -> tuple[Any, ...]:
    """Pickle a layer by its own type: that of the parametrized one exists in this process only."""
    kind: Any = parametrize.type_before_parametrizations(self)
    for name, part in self.parametrizations.items():
        if not isinstance(part, NormalizedWeight):
            raise RuntimeError(
                f"cannot pickle {kind.__name__}: {name!r} has a parametrization other than spectral_norm. Save its "
                "state_dict instead"
            )
    return _unpickled, (kind, tuple(self.parametrizations)), kind.__getstate__(self)


def _unpickled(kind: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """An empty layer with these weights parametrized, which is given its state next."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    for name in names:
        module.register_parameter(name, nn.Parameter(torch.empty(0)))
        parametrize.register_parametrization(module, name, nn.Identity(), unsafe=True)
        adopt(module, name)
    return module


class Snapshot:
    """A module's normalized weights as they are now, with their gradients.

    Evaluated under :meth:`held`, the module is the same function of its input and of ``tensors`` later on, wherever
    power iteration has meanwhile moved u and v. Making it counts as a use of each weight: in training mode u and v are
    iterated, unless the module is frozen.

    Attributes:
        module: whose weights they are.
        tensors: the normalized weights and every other parameter; gradients with respect to them are complete.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._norms: list[nn.Module] = []
        self._weights: list[Tensor] = []
        replaced: set[int] = set()
        for part in parts_of(module):
            for name, weight in getattr(part, "parametrizations", {}).items():
                if isinstance(weight, NormalizedWeight):
                    replaced.add(id(weight.original))
                    self._norms.append(weight.norm)
                    # By the module's own attribute, a surrounding ``parametrize.cached()`` is respected.
                    value = getattr(part, name) if len(weight) == 1 else weight.norm(weight.original)
                    self._weights.append(value)
        named = [(name, value) for name, value in module.named_parameters() if id(value) not in replaced]
        self._names, self._parameters = [name for name, _ in named], [value for _, value in named]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the module depends on."""
        return (*self._weights, *self._parameters)

    def of(self, part: nn.Module) -> list[int]:
        """Return the places among the tensors of those that a part of the module depends on."""
        inside = {id(module) for module in part.modules()} | {id(parameter) for parameter in part.parameters()}
        owners = (*map(id, self._norms), *map(id, self._parameters))
        return [index for index, owner in enumerate(owners) if owner in inside]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within it the module uses these weights.

        Raises:
            RuntimeError: its parameters have been replaced since, as ``torch.func.functional_call`` does.
        """
        current = {id(parameter) for parameter in self.module.parameters()}
        if not all(id(parameter) in current for parameter in self._parameters):
            raise RuntimeError(
                "the module's parameters have been replaced since its forward, so gradients would go to others. Run "
                "the backward where the forward ran, inside the same functional_call"
            )
        with override(dict(zip(self._norms, self._weights, strict=True))):
            yield

    def call(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Evaluate the module at x with these tensors in place of its own, changing no state."""
        count = len(self._norms)
        others = zip(self._names, tensors[count:], self._parameters, strict=True)
        changed = {name: new for name, new, old in others if new is not old}
        with override(dict(zip(self._norms, tensors[:count], strict=True))), frozen_state(self.module):
            y: Tensor = torch.func.functional_call(self.module, changed, (x,)) if changed else self.module(x)
            return y

    def needs_gradient(self, x: Tensor) -> bool:
        """Return true if anything that depends on x and the tensors is differentiated."""
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *self.tensors))


def is_recomputing() -> bool:
    """Return true inside a backward: a forward there recomputes one that was (``torch.utils.checkpoint``)."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def now() -> int | None:
    """Return a number that orders this moment among the nodes of the autograd graph; None where there is none."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    with torch.inference_mode(False), torch.enable_grad():
        node = torch.empty(0, device="cpu", requires_grad=True).view(0).grad_fn
    return cast(Any, node)._sequence_nr()
