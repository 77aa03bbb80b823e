"""Checks of what the solver is given, before and while it runs."""

from __future__ import annotations

import torch
from torch import Tensor


def check_image(image: Tensor, x: Tensor, version: int | None) -> Tensor:
    """g(x) in x's dtype, checked; ``version`` is x's before the evaluation."""
    if version is not None and x._version != version:
        raise ValueError("g changes its input in place, so x + g(x) is not what it seems. Remedy: inplace=False")
    if not isinstance(image, Tensor):
        raise TypeError(f"g must return a tensor, got {type(image).__name__}")
    if image.shape != x.shape:
        raise TypeError(
            f"g must keep the shape of its input, but maps {tuple(x.shape)} to {tuple(image.shape)}; a residual "
            "branch with an inverse has as many outputs as inputs"
        )
    if image.dtype != x.dtype:
        # Under autocast x + g(x) is taken in the wider of the two, and so it is here.
        if not torch.is_autocast_enabled(x.device.type) or torch.promote_types(image.dtype, x.dtype) != x.dtype:
            raise TypeError(f"g must keep the dtype of its input, but maps {x.dtype} to {image.dtype}")
        image = image.to(x.dtype)
    return image
