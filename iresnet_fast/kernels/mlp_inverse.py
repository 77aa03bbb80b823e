"""The whole inverse of a perceptron's residual block in one launch: a program solves its rows, loop and all.

A program takes a block of rows at a time. Its iterates and hidden layers are in a workspace of its own, which stays in
the SM's cache as the weights do; tiles of a layer's products are summed in registers, with the activation, and the last
layer's with y − g(x) and the residuals. Rows that have stopped are frozen; the block ends with its last row. The floor
is the arithmetic of the evaluations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate
from .fixed_point_rule import DONE, FLAGS, IS_MIXED, NUMBERS, STOPS, TAKEN, THETA, begin, constants, decide
from .layers import ENTRY, Results, pack
from .tiles import LAUNCH, PROGRAMS, TILE, add_products

MAX_WIDTH = 1024


@triton.jit
def mlp_inverse_kernel(
    y,
    x0,
    weights,
    biases,
    parameters,
    table,
    workspace,
    flags,
    x_out,
    residual_out,
    iterations_out,
    evaluations_out,
    converged_out,
    batch,
    features,
    widest,
    layers,
    tol,
    lipschitz,
    factor,
    gap,
    log_lipschitz,
    rounding,
    max_iterations,
    patience,
    PROVEN: tl.constexpr,
    MIXING: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PRODUCTS: tl.constexpr,
    LOW: tl.constexpr,
):
    """Blocks of ROWS rows, every num_programs-th.

    ``table`` is that of ``layers.pack``.
    """
    lane = tl.arange(0, ROWS)
    everywhere = lane >= 0
    # x, following = y − g(x), the last accepted following and residual vector, y, two hidden layers, and numbers.
    x = workspace + tl.program_id(0).to(tl.int64) * ROWS * (5 * features + 2 * widest + NUMBERS)
    following, target, before = x + ROWS * features, x + 2 * ROWS * features, x + 3 * ROWS * features
    right, one = x + 4 * ROWS * features, x + 5 * ROWS * features
    other = one + ROWS * widest
    numbers = other + ROWS * widest
    flags += tl.program_id(0) * ROWS * FLAGS
    block = tl.program_id(0)
    while block * ROWS < batch:
        row, here = block.to(tl.int64) * ROWS, lane < batch - block * ROWS
        squares = tl.zeros([ROWS], dtype=tl.float32)
        d0 = 0
        while d0 < features:
            d = d0 + tl.arange(0, OUTPUTS)
            at = lane[:, None] * features + d[None, :]
            kept = (d < features)[None, :]
            inside = (d < features)[None, :] & here[:, None]
            start = tl.load(x0 + row * features + at, mask=inside, other=0.0)
            tl.store(x + at, start, mask=kept)
            tl.store(target + at, start, mask=kept)
            tl.store(before + at, start * 0.0, mask=kept)
            value = tl.load(y + row * features + at, mask=inside, other=0.0)
            tl.store(right + at, value, mask=kept)
            squares += tl.sum(value * value, axis=1)
            d0 += OUTPUTS
        tl.debug_barrier()  # all have left the block before
        begin(numbers, flags, lane, squares, tl.where(here, 0, 1), tol, ROWS)
        tl.debug_barrier()
        count = 0
        while tl.sum(tl.load(flags + DONE * ROWS + lane)) < ROWS:
            # Before the first layer x itself is activated, where it is at all.
            kind, source, stride = tl.load(table), x, features
            if kind != 0:
                d0 = 0
                while d0 < features:
                    d = d0 + tl.arange(0, OUTPUTS)
                    kept = (d < features)[None, :]
                    value = tl.load(x + lane[:, None] * features + d[None, :], mask=kept, other=0.0)
                    tl.store(other + lane[:, None] * widest + d[None, :], activate(value, kind, parameters), mask=kept)
                    d0 += OUTPUTS
                source, stride = other, widest
                tl.debug_barrier()
            squared = tl.zeros([ROWS], dtype=tl.float32)
            along = tl.zeros([ROWS], dtype=tl.float32)
            to, layer = one, 0
            while layer < layers:
                entry = table + 1 + ENTRY * layer
                inputs, outputs, kind = tl.load(entry), tl.load(entry + 1), tl.load(entry + 4)
                weight, bias = weights + tl.load(entry + 2), biases + tl.load(entry + 3)
                n0 = 0
                while n0 < outputs:
                    n = n0 + tl.arange(0, OUTPUTS)
                    total = tl.zeros([ROWS, OUTPUTS], dtype=tl.float32)
                    total += tl.load(bias + n, mask=n < outputs, other=0.0)[None, :]
                    total = add_products(
                        total, source, lane * stride, everywhere, weight, n, inputs, outputs, PRODUCTS, LOW
                    )
                    total = activate(total, kind, parameters + 2 * layer + 2)
                    kept = (n < outputs)[None, :]
                    if layer < layers - 1:
                        tl.store(to + lane[:, None] * widest + n[None, :], total, mask=kept)
                    else:
                        at = lane[:, None] * features + n[None, :]
                        step = tl.load(right + at, mask=kept, other=0.0) - total
                        f = tl.where(kept, step - tl.load(x + at, mask=kept, other=0.0), 0.0)
                        squared += tl.sum(f * f, axis=1)
                        if MIXING:
                            along += tl.sum(f * tl.load(before + at, mask=kept, other=0.0), axis=1)
                        tl.store(following + at, step, mask=kept)
                    n0 += OUTPUTS
                tl.debug_barrier()
                source, stride = to, widest
                layer += 1
                to = one + (layer % 2) * ROWS * widest
            count += 1
            decide(
                numbers,
                flags,
                lane,
                squared,
                along,
                count,
                lipschitz,
                factor,
                gap,
                log_lipschitz,
                rounding,
                max_iterations,
                patience,
                residual_out + row,
                iterations_out + row,
                evaluations_out + row,
                converged_out + row,
                ROWS,
                PROVEN,
                MIXING,
            )
            tl.debug_barrier()
            d0 = 0
            while d0 < features:
                d = d0 + tl.arange(0, OUTPUTS)
                at = lane[:, None] * features + d[None, :]
                kept = (d < features)[None, :]
                step = tl.load(following + at, mask=kept, other=0.0)
                old = tl.load(x + at, mask=kept, other=0.0)
                stops = tl.load(flags + STOPS * ROWS + lane) == 1
                tl.store(x_out + row * features + at, step if PROVEN else old, mask=kept & stops[:, None])
                if MIXING:
                    taken = (tl.load(flags + TAKEN * ROWS + lane) == 1)[:, None]
                    is_mixed = (tl.load(flags + IS_MIXED * ROWS + lane) == 1)[:, None]
                    theta = tl.load(numbers + THETA * ROWS + lane)[:, None]
                    aim = tl.load(target + at, mask=kept, other=0.0)
                    new = tl.where(is_mixed, step + theta * (aim - step), step)
                    tl.store(x + at, tl.where(taken, new, aim), mask=kept)
                    tl.store(target + at, step, mask=kept & taken)
                    tl.store(before + at, step - old, mask=kept & taken)
                else:
                    tl.store(x + at, step, mask=kept)
                d0 += OUTPUTS
            tl.debug_barrier()
        block += tl.num_programs(0)


def obstacle(widths: Sequence[int], dtype: torch.dtype) -> str | None:
    """Why the kernel does not serve layers of these widths; None where it does."""
    if dtype != torch.float32:
        return f"the Triton kernel computes in float32, not {dtype}"
    if max(widths) > MAX_WIDTH:
        return f"the Triton kernel takes layers of up to {MAX_WIDTH} features, not {max(widths)}"
    return None


def launch_mlp_inverse(
    y: Tensor,
    x0: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[int],
    parameters: Tensor,
    tol: float,
    lipschitz: float,
    max_iterations: int,
    patience: int,
    mixing: bool,
    low: bool = False,
) -> tuple[Tensor, ...]:
    """Launch on the op's arguments, float32; returns x, residuals, iterations, evaluations, converged.

    With ``low`` products are of float16.
    """
    batch, features = y.shape
    layers = pack([weight[..., None, None] for weight in weights], biases, activations)
    programs = max(1, min(PROGRAMS, -(-batch // TILE["ROWS"])))
    widest = max(features, *(len(weight) for weight in weights))
    numbers = programs * TILE["ROWS"] * (5 * features + 2 * widest + NUMBERS.value)
    results = Results.empty(y)
    if batch:
        mlp_inverse_kernel[(programs,)](
            layers.reordered(y),
            layers.reordered(x0),
            *layers.tensors(parameters),
            y.new_empty(numbers),
            torch.empty(programs * TILE["ROWS"] * FLAGS.value, dtype=torch.int32, device=y.device),
            *results.arguments(),
            batch,
            features,
            widest,
            len(weights),
            tol,
            *constants(None if lipschitz < 0 else lipschitz, tol, torch.finfo(y.dtype).eps),
            max_iterations,
            patience,
            PROVEN=lipschitz >= 0,
            MIXING=mixing,
            LOW=low,
            **TILE,
            **LAUNCH,
        )
    return results.in_order(layers)
