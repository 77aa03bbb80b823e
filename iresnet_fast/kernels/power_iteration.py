"""Power iteration and soft normalisation of all layers of a model in 2n + 1 launches, their gradient in two.

A half step multiplies every layer's operator with its vector. A layer falls into tiles of output channels and pixels,
and a table of tiles makes one launch of all layers; a convolution is an implicit matrix product, a matrix one of a
single pixel. Norms are deferred: a tile writes its sum of squares to a slot of its own, and whoever reads the vector
adds the layer's slots in their order and scales the result, so that nothing waits between launches and nothing depends
on scheduling. The floor is the arithmetic, 2·c_out·c_in·∏k·pixels a half step, or the bytes of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

# Entries of a layer's row in the table.
_C_IN, _C_OUT, _H_IN, _W_IN, _H_OUT, _W_OUT, _KH, _KW, _PAD_H, _PAD_W = range(10)
_U, _V, _W, _U_SLOT, _U_SLOTS, _V_SLOT, _V_SLOTS = range(10, 17)
_ROW = 17
# What a chunk of the last launch writes.
_OF_WEIGHT, _OF_U, _OF_V = range(3)
CHUNK = 4096


@dataclass(frozen=True)
class Tile:
    """A tile's channels, its pixels (or input channels), how many products it sums at a time, and its launch.

    Left alone, ptxas takes fewer registers than it needs and spills a few bytes: ``maxnreg`` allows more.
    """

    m: int
    n: int
    k: int
    maxnreg: int
    num_warps: int = 4

    @property
    def constants(self) -> dict[str, int]:
        """As the kernels name them."""
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k}

    @property
    def options(self) -> dict[str, int]:
        """Of the launch."""
        return {"num_warps": self.num_warps, "maxnreg": self.maxnreg}


TILE = Tile(32, 32, 16, maxnreg=128)
MAX_SLOTS = 2048


@triton.jit
def _sum_of_slots(slots, first, count, SLOTS: tl.constexpr):
    index = tl.arange(0, SLOTS)
    return tl.sum(tl.load(slots + first + index, mask=index < count, other=0.0), axis=0)


@triton.jit
def _usable(squares):
    """A sum of squares whose vector can be normalised, else 0."""
    return tl.where(squares < float("inf"), squares, 0.0)


@triton.jit
def half_step_kernel(
    addresses,
    table,
    tiles,
    given,
    raw,
    out,
    read_slots,
    slots,
    ADJOINT: tl.constexpr,
    FIRST: tl.constexpr,
    DOT: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROW: tl.constexpr,
):
    """One tile of W v (or Wᵀ u), and its sum of squares.

    ``given`` has the unit vectors that the call started from, ``raw`` the ones of the half step before, not yet scaled,
    whose sums of squares are in ``read_slots``. With DOT the slot gets the tile's part of ⟨u, W v⟩, u in ``raw``.
    """
    tile = tiles + tl.program_id(0) * 4
    layer = tl.load(tile)
    m = tl.load(tile + 1) + tl.arange(0, BLOCK_M)
    pixel = tl.load(tile + 2) + tl.arange(0, BLOCK_N)
    row = table + layer * ROW
    weight = tl.load(addresses + layer).to(tl.pointer_type(tl.float32))
    c_in, c_out = tl.load(row), tl.load(row + 1)
    h_in, w_in, h_out, w_out = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)
    kh, kw, pad_h, pad_w = tl.load(row + 6), tl.load(row + 7), tl.load(row + 8), tl.load(row + 9)
    u_start, v_start = tl.load(row + 10), tl.load(row + 11)
    taps = kh * kw
    if ADJOINT:
        rows, inner, height, width, h_src, w_src = c_in, c_out, h_in, w_in, h_out, w_out
        source_start, out_start, stride_m, stride_k = u_start, v_start, taps, c_in * taps
        first_slot, n_slots = tl.load(row + 13), tl.load(row + 14)
    else:
        rows, inner, height, width, h_src, w_src = c_out, c_in, h_out, w_out, h_in, w_in
        source_start, out_start, stride_m, stride_k = v_start, u_start, c_in * taps, taps
        first_slot, n_slots = tl.load(row + 15), tl.load(row + 16)
    source = given
    inverse = tl.full([], 1.0, tl.float32)
    if not FIRST:
        # A zero or non-finite vector is not taken: the one that the call started from stays.
        squares = _usable(_sum_of_slots(read_slots, first_slot, n_slots, SLOTS))
        if squares > 0:
            source = raw
            inverse = 1.0 / tl.sqrt(squares)
    y, x = pixel // width, pixel % width
    inside_m, inside_n = m < rows, pixel < height * width
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    k0 = 0
    while k0 < inner:
        k = k0 + tl.arange(0, BLOCK_K)
        inside_k = k < inner
        tap = 0
        while tap < taps:
            ty, tx = tap // kw, tap % kw
            if ADJOINT:
                sy, sx = y + pad_h - ty, x + pad_w - tx
            else:
                sy, sx = y + ty - pad_h, x + tx - pad_w
            a = tl.load(
                weight + m[:, None] * stride_m + k[None, :] * stride_k + tap,
                mask=inside_m[:, None] & inside_k[None, :],
                other=0.0,
            )
            inside = inside_n & (sy >= 0) & (sy < h_src) & (sx >= 0) & (sx < w_src)
            offset = source_start + k[:, None] * (h_src * w_src) + (sy * w_src + sx)[None, :]
            mask = inside_k[:, None] & inside[None, :]
            b = tl.load(source + offset, mask=mask, other=0.0)
            total += tl.dot(a, b, input_precision="ieee")
            tap += 1
        k0 += BLOCK_K
    total *= inverse
    offset = out_start + m[:, None] * (height * width) + pixel[None, :]
    mask = inside_m[:, None] & inside_n[None, :]
    if DOT:
        along = tl.load(raw + offset, mask=mask, other=0.0)
        tl.store(slots + tl.load(tile + 3), tl.sum(tl.sum(total * along, axis=1), axis=0))
    else:
        tl.store(out + offset, total, mask=mask)
        tl.store(slots + tl.load(tile + 3), tl.sum(tl.sum(total * total, axis=1), axis=0))


@triton.jit
def _scale(sigma, coeff):
    """max(1, σ/c), NaN where σ is not finite: neither an unconstrained weight nor zeros would show what happened."""
    ratio = sigma / coeff
    return tl.where(ratio <= 1.0, 1.0, tl.where(ratio < float("inf"), ratio, float("nan")))


@triton.jit
def finish_kernel(
    addresses,
    table,
    chunks,
    coeffs,
    given,
    raw,
    u_slots,
    v_slots,
    normalized,
    u,
    v,
    sigma,
    n_u,
    ITERATED: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROW: tl.constexpr,
):
    """One chunk of a normalised weight, or of a unit vector; the first chunk of a weight also writes σ."""
    chunk = chunks + tl.program_id(0) * 4
    layer, kind, start, end = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2), tl.load(chunk + 3)
    row = table + layer * ROW
    element = start + tl.arange(0, CHUNK)
    inside = element < end
    if kind == 0:
        squares = _sum_of_slots(v_slots, tl.load(row + 15), tl.load(row + 16), SLOTS)
        if ITERATED:
            estimate = tl.sqrt(squares)
        else:  # the slots are those of ⟨u, W v⟩, by u's tiles
            estimate = _sum_of_slots(u_slots, tl.load(row + 13), tl.load(row + 14), SLOTS)
        if start == 0:
            tl.store(sigma + layer, estimate)
        weight = tl.load(addresses + layer).to(tl.pointer_type(tl.float32))
        value = tl.load(weight + element, mask=inside) / _scale(estimate, tl.load(coeffs + layer))
        tl.store(normalized + tl.load(row + 12) + element, value, mask=inside)
    else:
        if kind == 1:
            first = tl.load(row + 10)
            squares = _sum_of_slots(u_slots, tl.load(row + 13), tl.load(row + 14), SLOTS)
        else:
            first = tl.load(row + 11)
            squares = _sum_of_slots(v_slots, tl.load(row + 15), tl.load(row + 16), SLOTS)
        source = given
        norm = tl.full([], 1.0, tl.float32)
        squares = _usable(squares)
        if ITERATED:
            if squares > 0:
                source = raw
                norm = tl.sqrt(squares)
        value = tl.load(source + first + element, mask=inside, other=0.0) / norm
        # u stands before v in the vectors.
        if kind == 1:
            tl.store(u + first + element, value, mask=inside)
        else:
            tl.store(v + first - n_u + element, value, mask=inside)


@triton.jit
def dots_kernel(grads, normalized, table, chunks, slots, CHUNK: tl.constexpr, ROW: tl.constexpr):
    """One chunk of ⟨G, W̄⟩."""
    chunk = chunks + tl.program_id(0) * 4
    layer, slot, start, end = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2), tl.load(chunk + 3)
    element = start + tl.arange(0, CHUNK)
    inside = element < end
    first = tl.load(table + layer * ROW + 12)
    g = tl.load(grads + first + element, mask=inside, other=0.0)
    w = tl.load(normalized + first + element, mask=inside, other=0.0)
    tl.store(slots + slot, tl.sum(g * w, axis=0))


@triton.jit
def gradient_kernel(
    grads,
    table,
    tiles,
    coeffs,
    sigma,
    u,
    v,
    slots,
    out,
    n_u,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROW: tl.constexpr,
):
    """(G − 1{σ>c}·(⟨G, W̄⟩/c)·∇σ)/max(1, σ/c) for a tile of output and input channels at one tap."""
    tile = tiles + tl.program_id(0) * 6
    layer, tap = tl.load(tile), tl.load(tile + 3)
    m = tl.load(tile + 1) + tl.arange(0, BLOCK_M)
    n = tl.load(tile + 2) + tl.arange(0, BLOCK_N)
    row = table + layer * ROW
    c_in, c_out = tl.load(row), tl.load(row + 1)
    h_in, w_in, h_out, w_out = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)
    kh, kw, pad_h, pad_w = tl.load(row + 6), tl.load(row + 7), tl.load(row + 8), tl.load(row + 9)
    u_start, v_start, w_start = tl.load(row + 10), tl.load(row + 11) - n_u, tl.load(row + 12)
    coeff, estimate = tl.load(coeffs + layer), tl.load(sigma + layer)
    inside_m, inside_n = m < c_out, n < c_in
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    pixels = h_out * w_out
    if estimate <= coeff:
        pixels = pixels * 0
    ty, tx = tap // kw, tap % kw
    p0 = 0
    while p0 < pixels:
        p = p0 + tl.arange(0, BLOCK_K)
        inside_p = p < pixels
        sy, sx = p // w_out + ty - pad_h, p % w_out + tx - pad_w
        inside = inside_p & (sy >= 0) & (sy < h_in) & (sx >= 0) & (sx < w_in)
        a = tl.load(
            u + u_start + m[:, None] * pixels + p[None, :], mask=inside_m[:, None] & inside_p[None, :], other=0.0
        )
        b = tl.load(
            v + v_start + n[None, :] * (h_in * w_in) + (sy * w_in + sx)[:, None],
            mask=inside[:, None] & inside_n[None, :],
            other=0.0,
        )
        total += tl.dot(a, b, input_precision="ieee")
        p0 += BLOCK_K
    along = _sum_of_slots(slots, tl.load(tile + 4), tl.load(tile + 5), SLOTS)
    along = tl.where(estimate <= coeff, 0.0, along / coeff)
    offset = w_start + (m[:, None] * c_in + n[None, :]) * (kh * kw) + tap
    mask = inside_m[:, None] & inside_n[None, :]
    g = tl.load(grads + offset, mask=mask, other=0.0)
    tl.store(out + offset, (g - along * total) / _scale(estimate, coeff), mask=mask)


# Of a layer: channels in and out, height and width in and out, height and width of the kernel and of the padding.
Sizes = tuple[int, ...]


def serves(layers: Sequence[Sizes]) -> bool:
    """Whether layers of these sizes are within the kernels' limits."""
    return _plan(tuple(layers)) is not None


@dataclass(frozen=True)
class Plan:
    """How layers fall into programs; nested lists are the rows of tables, offsets in elements.

    Attributes:
        table: a row per layer.
        forward: tiles of W v: layer, first channel, first pixel, slot.
        adjoint: tiles of Wᵀ u.
        finish: chunks of weights, u and v: layer, what, first element, end.
        dots: chunks of weights: layer, slot, first element, end.
        gradient: tiles of weights: layer, first output and input channel, tap, first slot and slots of ⟨G, W̄⟩.
        tile: of the half steps and the gradient.
        slots: power of two that no layer's slots exceed.
        sizes: elements of all weights, u and v.
    """

    table: list[list[int]]
    forward: list[list[int]]
    adjoint: list[list[int]]
    finish: list[list[int]]
    dots: list[list[int]]
    gradient: list[list[int]]
    tile: Tile
    slots: int
    sizes: tuple[int, int, int]


@lru_cache(maxsize=64)
def _plan(layers: tuple[Sizes, ...]) -> Plan | None:
    """The plan, or None where a layer has more slots than a program adds up."""
    table = [[*sizes, *[0] * (_ROW - len(sizes))] for sizes in layers]
    tile = TILE
    forward: list[list[int]] = []
    adjoint: list[list[int]] = []
    finish: list[list[int]] = []
    dots: list[list[int]] = []
    gradient: list[list[int]] = []
    n_u = sum(row[_C_OUT] * row[_H_OUT] * row[_W_OUT] for row in table)
    at_u, at_v, at_w, most = 0, n_u, 0, 1
    for layer, row in enumerate(table):
        c_in, c_out, taps = row[_C_IN], row[_C_OUT], row[_KH] * row[_KW]
        pixels_in, pixels_out = row[_H_IN] * row[_W_IN], row[_H_OUT] * row[_W_OUT]
        row[_U], row[_V], row[_W] = at_u, at_v, at_w
        sizes = {_OF_WEIGHT: c_out * c_in * taps, _OF_U: c_out * pixels_out, _OF_V: c_in * pixels_in}
        at_w, at_u, at_v = at_w + sizes[_OF_WEIGHT], at_u + sizes[_OF_U], at_v + sizes[_OF_V]
        halves = ((forward, _U_SLOT, c_out, pixels_out), (adjoint, _V_SLOT, c_in, pixels_in))
        for tiles, slot, channels, pixels in halves:
            row[slot] = len(tiles)
            corners = [(m, p) for m in range(0, channels, tile.m) for p in range(0, pixels, tile.n)]
            tiles += [[layer, m, p, row[slot] + i] for i, (m, p) in enumerate(corners)]
            row[slot + 1] = len(corners)
        for kind, size in sizes.items():
            finish += [[layer, kind, start, min(start + CHUNK, size)] for start in range(0, size, CHUNK)]
        first, weights = len(dots), range(0, sizes[_OF_WEIGHT], CHUNK)
        dots += [[layer, first + i, start, min(start + CHUNK, sizes[_OF_WEIGHT])] for i, start in enumerate(weights)]
        gradient += [
            [layer, m, n, tap, first, len(weights)]
            for m in range(0, c_out, tile.m)
            for n in range(0, c_in, tile.n)
            for tap in range(taps)
        ]
        most = max(most, row[_U_SLOTS], row[_V_SLOTS], len(weights))
    if most > MAX_SLOTS:
        return None
    slots = triton.next_power_of_2(most)
    sizes_all = (at_w, n_u, at_v - n_u)
    return Plan(table, forward, adjoint, finish, dots, gradient, tile, slots, sizes_all)


@lru_cache(maxsize=64)
def _device_tables(layers: tuple[Sizes, ...], device: torch.device) -> dict[str, Tensor]:
    """The plan's tables on a device."""
    plan = _plan(layers)
    assert plan is not None
    tables = {name: getattr(plan, name) for name in ("table", "forward", "adjoint", "finish", "dots", "gradient")}
    return {name: torch.tensor(rows, dtype=torch.int64, device=device) for name, rows in tables.items()}


@lru_cache(maxsize=64)
def _coeffs(coeff: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(coeff, dtype=torch.float32, device=device)


@lru_cache(maxsize=64)
def _addresses(pointers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(pointers, dtype=torch.int64, device=device)


def launch_power_iteration(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    coeff: Sequence[float],
    layers: Sequence[Sizes],
    n: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Flat W̄, u and v, and σ; see the op for what they are, float32, and :func:`serves` for which layers."""
    key, device = tuple(layers), weights[0].device
    plan = _plan(key)
    assert plan is not None
    tables = _device_tables(key, device)
    weights = [weight.contiguous() for weight in weights]
    addresses = _addresses(tuple(weight.data_ptr() for weight in weights), device)
    given = torch.cat([part.reshape(-1) for part in (*u, *v)])
    raw = torch.empty_like(given)
    u_slots = given.new_empty(len(plan.forward))
    v_slots = given.new_empty(len(plan.adjoint))
    for half in range(2 * n if n else 1):
        adjoint = half % 2 == 1
        tiles = tables["adjoint" if adjoint else "forward"]
        half_step_kernel[(len(tiles),)](
            addresses,
            tables["table"],
            tiles,
            given,
            raw if n else given,
            raw,
            u_slots if adjoint else v_slots,
            v_slots if adjoint else u_slots,
            ADJOINT=adjoint,
            FIRST=half == 0,
            DOT=n == 0,
            SLOTS=plan.slots,
            ROW=_ROW,
            **plan.tile.constants,
            **plan.tile.options,
        )
    total, n_u, n_v = plan.sizes
    normalized, new_u, new_v, sigma = (given.new_empty(size) for size in (total, n_u, n_v, len(weights)))
    finish_kernel[(len(tables["finish"]),)](
        addresses,
        tables["table"],
        tables["finish"],
        _coeffs(tuple(coeff), device),
        given,
        raw,
        u_slots,
        v_slots,
        normalized,
        new_u,
        new_v,
        sigma,
        n_u,
        ITERATED=n > 0,
        SLOTS=plan.slots,
        CHUNK=CHUNK,
        ROW=_ROW,
        num_warps=4,
    )
    return normalized, new_u, new_v, sigma


def launch_gradient(
    grads: Sequence[Tensor],
    normalized: Tensor,
    u: Tensor,
    v: Tensor,
    sigma: Tensor,
    coeff: Sequence[float],
    layers: Sequence[Sizes],
) -> Tensor:
    """The flat gradient by the weights; ``normalized``, u and v are flat as well."""
    key, device = tuple(layers), sigma.device
    plan = _plan(key)
    assert plan is not None
    tables = _device_tables(key, device)
    given = torch.cat([grad.reshape(-1) for grad in grads])
    slots = given.new_empty(len(plan.dots))
    dots_kernel[(len(plan.dots),)](
        given, normalized, tables["table"], tables["dots"], slots, CHUNK=CHUNK, ROW=_ROW, num_warps=4
    )
    out = torch.empty_like(given)
    gradient_kernel[(len(plan.gradient),)](
        given,
        tables["table"],
        tables["gradient"],
        _coeffs(tuple(coeff), device),
        sigma,
        u,
        v,
        slots,
        out,
        plan.sizes[1],
        SLOTS=plan.slots,
        ROW=_ROW,
        **plan.tile.constants,
        **plan.tile.options,
    )
    return out
