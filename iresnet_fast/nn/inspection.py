"""Whether a module is what its type says."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as _torch_module

from .fuse import foreign_hooks


def has_own(module: nn.Module, method: str, known: type[nn.Module]) -> bool:
    """Whether a module of a known type has this method from a subclass, or of its own."""
    return getattr(type(module), method, None) is not getattr(known, method, None) or method in vars(module)


def obstacle(module: nn.Module, known: type[nn.Module]) -> str | None:
    """Why a module cannot be taken for one of a known type; None where it can."""
    kind = type(module)
    if any(getattr(kind, method, None) is not getattr(known, method, None) for method in ("forward", "inverse")):
        return f"{kind.__name__} has a forward or inverse of its own"
    own = [name for name, value in vars(module).items() if hasattr(kind, name) and callable(value)]
    if own:
        names = "forward or inverse" if {"forward", "inverse"} & set(own) else own[0]
        return f"this {kind.__name__} has a {names} of its own"
    if foreign_hooks(module) or _torch_module._global_forward_hooks or _torch_module._global_forward_pre_hooks:
        return "a forward hook may change what it computes. Remedy: remove the hook"
    return None


def stated_by(module: nn.Module) -> type[nn.Module]:
    """Return the class whose ``lipschitz`` a bijection has: a subclass with another forward is not covered by it."""
    return next(kind for kind in type(module).__mro__ if "lipschitz" in vars(kind))
