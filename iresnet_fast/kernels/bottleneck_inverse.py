"""The whole inverse of a bottleneck's residual block in one launch: a program solves an image at a time, loop and all.

With a whole image in one program a convolution has no halo to wait for. Images are channels-last: a pixel is a row, a
convolution the sum of its taps' products with shifted rows. Iterates and hidden maps are in a workspace of the
program's own, in the L2 cache where it fits; tiles of pixels by channels are summed in registers, with the activation,
and the last convolution's with y − g(x) and the residual. The floor is the arithmetic of the evaluations.
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

# Numbers of the widest map: a program has six of them in its workspace.
MAX_VALUES = 1 << 17


@triton.jit
def bottleneck_inverse_kernel(
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
    channels,
    height,
    width,
    widest,
    layers,
    circular,
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
    """Images program, program + num_programs, ...; ``table`` is that of ``layers.pack``."""
    pixels = height * width
    size = pixels * channels
    # x, following = y − g(x), the last accepted following and residual vector, two hidden maps, numbers of the image.
    x = workspace + tl.program_id(0).to(tl.int64) * (4 * size + 2 * pixels * widest + NUMBERS)
    following, target, before, one = x + size, x + 2 * size, x + 3 * size, x + 4 * size
    other = one + pixels * widest
    numbers = other + pixels * widest
    flags += tl.program_id(0) * FLAGS
    alone = tl.program_id(0) * 0
    image = tl.program_id(0).to(tl.int64)
    while image < batch:
        right, solution = y + image * size, x_out + image * size
        squares = tl.sum(tl.zeros([ROWS], dtype=tl.float32), axis=0)
        e0 = 0
        while e0 < size:
            e = e0 + tl.arange(0, ROWS * OUTPUTS)
            inside = e < size
            start = tl.load(x0 + image * size + e, mask=inside, other=0.0)
            tl.store(x + e, start, mask=inside)
            tl.store(target + e, start, mask=inside)
            tl.store(before + e, start * 0.0, mask=inside)
            value = tl.load(right + e, mask=inside, other=0.0)
            squares += tl.sum(value * value, axis=0)
            e0 += ROWS * OUTPUTS
        tl.debug_barrier()  # all have left the image before
        begin(numbers, flags, alone, squares, alone, tol, 1)
        tl.debug_barrier()
        count = 0
        while tl.load(flags + DONE) == 0:
            # Before the first convolution x itself is activated, where it is at all.
            kind, source, stride = tl.load(table), x, channels
            if kind != 0:
                p0 = 0
                while p0 < pixels:
                    pixel = p0 + tl.arange(0, ROWS)
                    c0 = 0
                    while c0 < channels:
                        c = c0 + tl.arange(0, OUTPUTS)
                        kept = (pixel < pixels)[:, None] & (c < channels)[None, :]
                        value = tl.load(x + pixel[:, None] * channels + c[None, :], mask=kept, other=0.0)
                        value = activate(value, kind, parameters)
                        tl.store(other + pixel[:, None] * widest + c[None, :], value, mask=kept)
                        c0 += OUTPUTS
                    p0 += ROWS
                source, stride = other, widest
                tl.debug_barrier()
            squared = squares * 0.0
            along = squares * 0.0
            to, layer = one, 0
            while layer < layers:
                entry = table + 1 + ENTRY * layer
                inputs, outputs, kind = tl.load(entry), tl.load(entry + 1), tl.load(entry + 4)
                weight, bias, taps = weights + tl.load(entry + 2), biases + tl.load(entry + 3), tl.load(entry + 5)
                p0 = 0
                while p0 < pixels:
                    pixel = p0 + tl.arange(0, ROWS)
                    n0 = 0
                    while n0 < outputs:
                        n = n0 + tl.arange(0, OUTPUTS)
                        total = tl.zeros([ROWS, OUTPUTS], dtype=tl.float32)
                        total += tl.load(bias + n, mask=n < outputs, other=0.0)[None, :]
                        tap = 0
                        while tap < taps:
                            # Of one tap the shift is none, of nine -1, 0 and 1 along each axis.
                            row = pixel // width + (tap // 3 - 1) * (taps // 9)
                            column = pixel % width + (tap % 3 - 1) * (taps // 9)
                            inside = pixel < pixels
                            if circular:
                                row, column = (row + height) % height, (column + width) % width
                            else:
                                inside = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
                            total = add_products(
                                total,
                                source,
                                (row * width + column) * stride,
                                inside,
                                weight + tap * inputs * outputs,
                                n,
                                inputs,
                                outputs,
                                PRODUCTS,
                                LOW,
                            )
                            tap += 1
                        total = activate(total, kind, parameters + 2 * layer + 2)
                        kept = (pixel < pixels)[:, None] & (n < outputs)[None, :]
                        if layer < layers - 1:
                            tl.store(to + pixel[:, None] * widest + n[None, :], total, mask=kept)
                        else:
                            at = pixel[:, None] * channels + n[None, :]
                            step = tl.load(right + at, mask=kept, other=0.0) - total
                            f = tl.where(kept, step - tl.load(x + at, mask=kept, other=0.0), 0.0)
                            squared += tl.sum(tl.sum(f * f, axis=1), axis=0)
                            if MIXING:
                                old = tl.load(before + at, mask=kept, other=0.0)
                                along += tl.sum(tl.sum(f * old, axis=1), axis=0)
                            tl.store(following + at, step, mask=kept)
                        n0 += OUTPUTS
                    p0 += ROWS
                tl.debug_barrier()
                source, stride = to, widest
                layer += 1
                to = one if layer % 2 == 0 else other
            count += 1
            decide(
                numbers,
                flags,
                alone,
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
                residual_out + image,
                iterations_out + image,
                evaluations_out + image,
                converged_out + image,
                1,
                PROVEN,
                MIXING,
            )
            tl.debug_barrier()
            # Where the elements end that are written: at once, where none is.
            end_solved = tl.where(tl.load(flags + STOPS) == 1, size, 0)
            end_taken = tl.where(tl.load(flags + TAKEN) == 1, size, 0) if MIXING else 0
            e0 = 0
            while e0 < size:
                e = e0 + tl.arange(0, ROWS * OUTPUTS)
                inside = e < size
                step = tl.load(following + e, mask=inside, other=0.0)
                old = tl.load(x + e, mask=inside, other=0.0)
                tl.store(solution + e, step if PROVEN else old, mask=e < end_solved)
                if MIXING:
                    taken, is_mixed = tl.load(flags + TAKEN) == 1, tl.load(flags + IS_MIXED) == 1
                    aim = tl.load(target + e, mask=inside, other=0.0)
                    new = tl.where(is_mixed, step + tl.load(numbers + THETA) * (aim - step), step)
                    tl.store(x + e, tl.where(taken, new, aim), mask=inside)
                    tl.store(target + e, step, mask=e < end_taken)
                    tl.store(before + e, step - old, mask=e < end_taken)
                else:
                    tl.store(x + e, step, mask=inside)
                e0 += ROWS * OUTPUTS
            tl.debug_barrier()
        image += tl.num_programs(0)


def obstacle(channels: Sequence[int], size: tuple[int, ...], dtype: torch.dtype) -> str | None:
    """Why the kernel does not serve convolutions of these channels for images of this size; None where it does."""
    if dtype != torch.float32:
        return f"the Triton kernel computes in float32, not {dtype}"
    values = max(channels) * size[0] * size[1]
    if values > MAX_VALUES:
        return f"the Triton kernel takes maps of up to {MAX_VALUES} numbers (channels times pixels), not {values}"
    return None


def launch_bottleneck_inverse(
    y: Tensor,
    x0: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[int],
    parameters: Tensor,
    circular: bool,
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
    batch, channels, height, width = y.shape
    layers = pack(weights, biases, activations)
    programs = max(1, min(PROGRAMS, batch))
    widest = max(channels, *(len(weight) for weight in weights))
    results = Results.empty(y)
    if y.numel():
        bottleneck_inverse_kernel[(programs,)](
            layers.reordered(y),
            layers.reordered(x0),
            *layers.tensors(parameters),
            y.new_empty(programs * (height * width * (4 * channels + 2 * widest) + NUMBERS.value)),
            torch.empty(programs * FLAGS.value, dtype=torch.int32, device=y.device),
            *results.arguments(),
            batch,
            channels,
            height,
            width,
            widest,
            len(weights),
            int(circular),
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
