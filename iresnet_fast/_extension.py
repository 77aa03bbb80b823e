"""Loads the compiled library, and says plainly what is missing and how to get it."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall . (in a checkout of iresnet_fast)"


def _load() -> tuple[Any, str | None]:
    """The module ``iresnet_fast._C`` or None, and the reason it is missing or None."""
    name = f"{__package__}._C"
    if importlib.util.find_spec(name) is None:
        return None, (
            "iresnet_fast was installed without its compiled extension (there was no C++20 compiler, or no Python.h). "
            f"Remedy: install g++, then {REBUILD}"
        )
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        return None, (
            f"the compiled extension does not load beside torch {torch.__version__} ({error}). Remedy: {REBUILD}"
        )
    return module, None


_module, missing_reason = _load()
loaded = _module is not None


def build_info() -> dict[str, str]:
    """Compiler, torch and CUDA versions the library was built with, its kind of vectors here; empty without one."""
    return dict(_module.build_info()) if loaded else {}


def defines(op: str) -> bool:
    """Whether the compiled library knows this op; one that was built from older sources may not."""
    return loaded and hasattr(torch.ops.iresnet_fast, op)


def serves(op: str, device_type: str) -> bool:
    """Return true if the compiled library has a kernel of this op for this kind of device (``"cpu"``, ``"cuda"``)."""
    return (op, device_type) in _kernels


def _list_kernels() -> frozenset[tuple[str, str]]:
    """List the pairs of op and device that have a compiled kernel; runs before kernels of Python are registered."""
    found = set()
    for qualified in torch._C._dispatch_get_all_op_names() if loaded else ():
        name = qualified.partition(".")[0]
        for device_type in ("cpu", "cuda"):
            if name.startswith("iresnet_fast::") and torch._C._dispatch_has_kernel_for_dispatch_key(
                name, device_type.upper()
            ):
                found.add((name.removeprefix("iresnet_fast::"), device_type))
    return frozenset(found)


_kernels = _list_kernels()
