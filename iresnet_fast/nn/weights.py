"""Where a normalized weight comes from.

In evaluation mode it is a pure function of its layer's parameter and of the vectors u and v that are kept beside it.
Events that change the parameter settle the vectors: :meth:`NormalizedWeight.settle` lists them. In training mode a
forward iterates once. A solve or a recomputation puts other weights in place with :func:`override`, and a grouped
update with :func:`lend` until :func:`take_back`: for its own thread and the length of one call.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..ops.arguments import can_look
from .inspection import parts_of

if TYPE_CHECKING:
    from .spectral_norm import SpectralNorm

_Module = TypeVar("_Module", bound=nn.Module)


class _Frame(NamedTuple):
    """Record which weights a thread gives out, and which modules it must not change.

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


@torch.no_grad()
def holds_other_weights(module: nn.Module) -> bool:
    """Return true if weights are in place in this thread that are not those of the module's parameters now."""
    frame = _frame()
    if frame is None:
        return False
    for part in normalized_weights(module):
        held = frame.frozen.get(part.norm)
        if held is not None and not torch.equal(held, part.norm.evaluate(part.original)):
            return True
    return False


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
    """Remove the frame that this owner added to this thread, and whatever an interrupted call has left inside of it."""
    frame = _frame()
    while frame is not None:
        if frame.owner is owner:
            _thread.frame = frame.outer
            return
        frame = frame.outer


def version_of(weight: Tensor) -> int | None:
    """Return a tensor's version counter; None if torch keeps none (compiled code, inference tensors)."""
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
        """Iterate u and v until one iteration changes σ by less than 1e-6 of it; settled vectors keep every bit.

        In low precision the limit is eps of u's dtype. This runs at ``eval()``, in ``irf.settle`` and ``enforce``, in
        ``certify`` and ``load_state_dict`` of a module in evaluation mode, in ``spectral_norm`` of such a module, and
        where the weight is assigned or initialized anew. In training mode loaded vectors are kept as they are, unless
        the state dict has the weight without them.
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


class _AnyTensor(type(Tensor)):  # type: ignore[misc]  # mypy takes no computed base
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, Tensor)  # so that torch.testing.assert_close compares it with any other tensor


class ComputedWeight(Tensor, metaclass=_AnyTensor):
    """A normalized weight as its layer's attribute gives it out: what is written to it in place raises.

    The weight is computed from the stored one at every use, so that such a write would be lost. What torch computes
    from it (``clone()``, ``detach()``) is an ordinary tensor.
    """

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @property
    def data(self) -> Tensor:
        """The values, protected likewise: ``weight.data.normal_()`` is how many models initialize."""
        return _protected(_values(self))

    @data.setter
    def data(self, value: Tensor) -> None:
        raise _lost_write("data =")

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Save it as an ordinary tensor."""
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


_values: Any = vars(torch._C.TensorBase)["data"].__get__


def _protected(weight: Tensor) -> Tensor:
    weight.__class__ = ComputedWeight
    return weight


def _lost_write(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name} on a weight under spectral_norm, which is computed at every use, so that the write would be lost. "
        "Write to layer.parametrizations.weight.original and call irf.settle(layer), assign a tensor to layer.weight, "
        "or change a copy: layer.weight.clone()"
    )


def _refuse(name: str) -> Any:
    def refuse(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise _lost_write(name)

    return refuse


_HARMLESS = ("detach_", "requires_grad_", "share_memory_")
for _name in dir(Tensor):
    _in_place = _name.endswith("_") and not _name.startswith("_") and _name not in _HARMLESS
    _augmented = _name.startswith("__i") and hasattr(Tensor, f"__{_name[3:]}")  # __iadd__ beside __add__
    if _in_place or _augmented or _name == "__setitem__":
        setattr(ComputedWeight, _name, _refuse(_name))


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
            value = get(self)
            return _protected(value) if type(value) is Tensor and can_look(value) else value
        return cast(Tensor, self.parametrizations[name]())

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
        # A parameter that a plain layer shares is one of the module's, too.
        plain = (part for part in parts_of(module) if not isinstance(part, NormalizedWeight))
        replaced -= {id(value) for part in plain for value in part._parameters.values()}
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
    def held(self, tensors: Sequence[Tensor] | None = None) -> Iterator[None]:
        """Within it the module uses these weights, or those of the tensors given.

        Raises:
            RuntimeError: its parameters have been replaced since, as ``torch.func.functional_call`` does.
        """
        current = {id(parameter) for parameter in self.module.parameters()}
        if not all(id(parameter) in current for parameter in self._parameters):
            raise RuntimeError(
                "the module's parameters have been replaced since its forward, so gradients would go to others. Run "
                "the backward where the forward ran, inside the same functional_call"
            )
        weights = self._weights if tensors is None else tensors[: len(self._norms)]
        with override(dict(zip(self._norms, weights, strict=True))):
            yield

    def apart(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Cut the weights among the tensors from their parameters, which the module may depend on besides."""
        count = len(self._norms)
        weights = [weight.detach().requires_grad_(weight.requires_grad) for weight in tensors[:count]]
        return [*weights, *tensors[count:]]

    def call(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Evaluate the module at x with these tensors in place of its own, changing no state."""
        count = len(self._norms)
        own = dict(self.module.named_parameters())
        others = zip(self._names, tensors[count:], strict=True)
        changed = {name: new for name, new in others if own.get(name) is not new}
        with override(dict(zip(self._norms, tensors[:count], strict=True))), frozen_state(self.module):
            y: Tensor = torch.func.functional_call(self.module, changed, (x,)) if changed else self.module(x)
        check_captured(y, (x, *tensors))
        return y

    def needs_gradient(self, x: Tensor) -> bool:
        """Return true if anything that depends on x and the tensors is differentiated."""
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *self.tensors))


def check_captured(image: Tensor, known: Iterable[Tensor]) -> None:
    """Raise where a module's image depends on a tensor that is no parameter of it: its gradient would be lost.

    Args:
        image: with a graph; nothing is checked without one, or inside a transform of ``torch.func``.
        known: tensors whose gradients are taken.

    Raises:
        RuntimeError: the tensor requires a gradient.
    """
    if image.grad_fn is None or not can_look(image):
        return
    leaves, seen = {id(tensor) for tensor in known}, set()
    ends = {tensor.grad_fn for tensor in known if tensor.grad_fn is not None}
    stack: list[Any] = [image.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen or node in ends:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in leaves:
            raise RuntimeError(
                f"the branch depends on a tensor of shape {tuple(variable.shape)} that requires a gradient and is no "
                "parameter of it: its gradient would be lost. Register it as an nn.Parameter of a module of the "
                "branch, or use tensor.detach()"
            )
        stack.extend(parent for parent, _ in node.next_functions)


def check_sigma(sigma: Tensor, weights: Sequence[Tensor]) -> None:
    """Raise where a norm is not finite.

    Not on a GPU, where the host would wait for the device: a NaN weight shows in every output.

    Raises:
        ValueError: the norm of a weight is NaN or infinite.
    """
    if sigma.device.type != "cpu" or not can_look(sigma) or bool(torch.isfinite(sigma).all()):
        return
    index = int((~torch.isfinite(sigma.view(-1))).nonzero()[0])
    raise ValueError(
        f"spectral_norm: the norm of the weight of shape {tuple(weights[index].shape)} is "
        f"{sigma.view(-1)[index].item()}: it has NaN, infinite or overflowing values. Use a smaller learning rate, or "
        "load finite weights"
    )
