"""The modules inside of a module."""

from __future__ import annotations

from torch import nn


def parts_of(module: nn.Module) -> list[nn.Module]:
    """Every module within once, itself first: what ``modules()`` gives, in its order, without generators in generators.

    For what runs in every step or solve, where the walk of ``modules()`` shows.
    """
    found: dict[int, nn.Module] = {}
    stack: list[nn.Module | None] = [module]
    while stack:
        part = stack.pop()
        if part is not None and id(part) not in found:
            found[id(part)] = part
            stack.extend(reversed(part._modules.values()))
    return list(found.values())
