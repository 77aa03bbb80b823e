"""Run in eager code what a graph cannot hold. Importing this imports torch._dynamo: only compiled code does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .result import LogDet


@torch.compiler.disable(
    reason="the number of terms is drawn anew in each call, and a graph has a fixed number. Without fullgraph=True it "
    "runs in eager code; PowerSeries or Exact can be compiled"
)
def estimate(series: Any, *arguments: Any) -> tuple[Tensor, LogDet]:
    """Run a series that draws the number of its terms."""
    found: tuple[Tensor, LogDet] = series.estimate(*arguments)
    return found
