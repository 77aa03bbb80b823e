"""Fused y − g(x) and per-sample residual: every value is read once and written once.

A sample is walked by ``splits`` programs, each of which writes its partial sum of squares to a slot of its own; the
slots are added in a fixed order, so the residual does not depend on scheduling. The floor is four times the bytes of x
over the memory bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs that fill a large GPU a few times over.
_PROGRAMS = 512


@triton.jit
def fixed_point_update_kernel(
    y,
    image,
    x,
    before,
    following,
    partial,
    partial_along,
    numel,
    chunk,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ALONG: tl.constexpr,
):
    """Program (sample, split): elements [split·chunk, (split+1)·chunk) of one sample.

    With ALONG it also takes the product of the difference with ``before``.
    """
    sample = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    base = sample * numel
    start = split * chunk
    end = tl.minimum(start + chunk, numel)
    squares = tl.zeros([BLOCK], dtype=ACCUMULATE)
    along = tl.zeros([BLOCK], dtype=ACCUMULATE)
    block = start
    while block < end:  # not range(): the interpreter of Triton 3.6 cannot take its bounds from tensors with NumPy 2.4
        offsets = block + tl.arange(0, BLOCK)
        inside = offsets < end
        target = tl.load(y + base + offsets, mask=inside, other=0.0).to(ACCUMULATE)
        step = tl.load(image + base + offsets, mask=inside, other=0.0).to(ACCUMULATE)
        old = tl.load(x + base + offsets, mask=inside, other=0.0).to(ACCUMULATE)
        # Rounded to the stored dtype first: the residual is that of the iterate which is returned.
        new = (target - step).to(following.dtype.element_ty)
        tl.store(following + base + offsets, new, mask=inside)
        difference = tl.where(inside, new.to(ACCUMULATE) - old, 0.0)
        squares += difference * difference
        if ALONG:
            along += difference * tl.load(before + base + offsets, mask=inside, other=0.0).to(ACCUMULATE)
        block += BLOCK
    tl.store(partial + sample * SPLITS + split, tl.sum(squares, axis=0))
    if ALONG:
        tl.store(partial_along + sample * SPLITS + split, tl.sum(along, axis=0))


@dataclass(frozen=True)
class Launch:
    """How a shape is cut into programs."""

    splits: int
    chunk: int
    block: int
    num_warps: int


BLOCKS = (256, 1024)


def choose_launch(batch: int, numel: int) -> Launch:
    """Blocks by the size of a sample; splits so that few large samples still fill the GPU."""
    block = BLOCKS[0] if numel <= 4 * BLOCKS[0] else BLOCKS[1]
    blocks = -(-numel // block)
    splits = max(1, min(blocks, -(-_PROGRAMS // max(1, batch)), 64))
    chunk = -(-blocks // splits) * block
    return Launch(splits=-(-numel // chunk), chunk=chunk, block=block, num_warps=block // 256 * 2 if block > 256 else 2)


def launch_fixed_point_update(y: Tensor, image: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Launch on dense tensors of one memory layout, (B, ...) each; see the op for what it computes."""
    batch, numel = len(y), y[0].numel()
    following = torch.empty_like(y)
    low = y.dtype in (torch.float16, torch.bfloat16)
    partial_dtype = torch.float32 if low else y.dtype
    plan = choose_launch(batch, numel)
    partial = torch.empty((batch, plan.splits), dtype=partial_dtype, device=y.device)
    accumulate = tl.float64 if y.dtype == torch.float64 else tl.float32
    fixed_point_update_kernel[(batch, plan.splits)](
        y,
        image,
        x,
        x,
        following,
        partial,
        partial,
        numel,
        plan.chunk,
        SPLITS=plan.splits,
        BLOCK=plan.block,
        ACCUMULATE=accumulate,
        ALONG=False,
        num_warps=plan.num_warps,
    )
    return following, partial.sum(dim=1).sqrt()
