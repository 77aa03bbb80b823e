"""Products of rows with a layer's weights, by tiles: what the whole-block inverses are made of."""

from __future__ import annotations

import triton
import triton.language as tl

# Rows and outputs that a program computes together, and the products that it adds at a time. Larger tiles spill.
TILE = {"ROWS": 32, "OUTPUTS": 32, "PRODUCTS": 16}
# Programs that fill a large GPU: they bound the workspace.
PROGRAMS = 264
# Left alone, ptxas takes fewer registers than it needs and spills: two programs share an SM.
LAUNCH = {"num_warps": 4, "maxnreg": 255}


@triton.jit
def add_products(
    total,
    source,
    row,
    inside,
    weight,
    output,
    inputs,
    outputs,
    PRODUCTS: tl.constexpr,
    LOW: tl.constexpr,
):
    """Total plus rows (starting at the offsets ``row`` in ``source``; zeros unless ``inside``) times Wᵀ.

    ``weight`` is (inputs, outputs), dense; ``output`` are its columns that the tile has. With LOW factors are rounded
    to float16, and sums are of float32.
    """
    k0 = 0
    while k0 < inputs:
        k = k0 + tl.arange(0, PRODUCTS)
        known = k < inputs
        a = tl.load(source + row[:, None] + k[None, :], mask=inside[:, None] & known[None, :], other=0.0)
        b = tl.load(
            weight + k[:, None] * outputs + output[None, :],
            mask=known[:, None] & (output < outputs)[None, :],
            other=0.0,
        )
        if LOW:
            total += tl.dot(a.to(tl.float16), b.to(tl.float16))
        else:  # as PyTorch computes it where TF32 is off
            total += tl.dot(a, b, input_precision="ieee")
        k0 += PRODUCTS
    return total
