"""Triton device code and its launch functions. Only ``ops`` loads them, where Triton can run."""

from __future__ import annotations

import importlib.util

import torch

MINIMUM_TRITON = (3, 6)


def missing_reason() -> str | None:
    """Why no Triton kernel can be launched here, with the remedy; None where they can."""
    if not torch.cuda.is_available():
        return "Triton kernels need a CUDA GPU, and torch sees none"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed. Remedy: pip install 'triton>=3.6'"
    import triton  # noqa: PLC0415  (an optional package)

    found = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if found < MINIMUM_TRITON:
        return f"Triton {triton.__version__} is too old. Remedy: pip install 'triton>=3.6'"
    return None
