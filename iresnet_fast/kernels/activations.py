"""Activations of blocks whose last axis is that of the channels, in float32.

MaxMin pairs the neighbours 2i and 2i + 1: whoever calls it has put the channels in that order.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The places of reference.branches.ACTIVATIONS.
RELU, ELU, SOFTPLUS, TANH, LIPSWISH, MAXMIN = (tl.constexpr(code) for code in range(1, 7))


@triton.jit
def exponential_below_zero(x):
    """e^x and e^x − 1 of x ≤ 0; the second loses nothing near 0."""
    e = tl.exp(x)
    r = tl.where(x > -0.35, x, 0.0)
    series = 1.0 / 720.0 + r * (1.0 / 5040.0)
    series = 1.0 / 120.0 + r * series
    series = 1.0 / 24.0 + r * series
    series = 1.0 / 6.0 + r * series
    series = 0.5 + r * series
    return e, tl.where(x > -0.35, r + r * r * series, e - 1.0)


@triton.jit
def log_one_plus(z):
    """log(1 + z) of 0 ≤ z ≤ 1, by 2 artanh(z/(2 + z))."""
    s = z / (z + 2.0)
    q = s * s
    series = 1.0 / 13.0 + q * (1.0 / 15.0)
    series = 1.0 / 11.0 + q * series
    series = 1.0 / 9.0 + q * series
    series = 1.0 / 7.0 + q * series
    series = 1.0 / 5.0 + q * series
    series = 1.0 / 3.0 + q * series
    return 2.0 * s * (1.0 + q * series)


@triton.jit
def activate(x, kind, parameters):
    """The activation of this code, a scalar known at run time, with its two parameters: one kernel serves all."""
    a, b = tl.load(parameters), tl.load(parameters + 1)
    if kind == RELU:
        x = tl.where(x < 0.0, 0.0, x)
    elif kind == ELU:
        _, below = exponential_below_zero(tl.where(x < 0.0, x, 0.0))
        x = tl.where(x > 0.0, x, tl.where(x <= 0.0, a * below, x))
    elif kind == SOFTPLUS:
        z = x * a
        e, _ = exponential_below_zero(-tl.abs(z))
        x = tl.where(z > b, x, (tl.where(z < 0.0, 0.0, z) + log_one_plus(e)) / a)
    elif kind == TANH:
        _, below = exponential_below_zero(-2.0 * tl.abs(x))
        size = -below / (below + 2.0)
        x = tl.where(x < 0.0, -size, size)
    elif kind == LIPSWISH:
        z = x * a
        e, _ = exponential_below_zero(-tl.abs(z))
        swish = x * (1.0 / 1.1) / (e + 1.0)
        x = tl.where(z < 0.0, swish * e, swish)
    elif kind == MAXMIN:
        ROWS: tl.constexpr = x.shape[0]
        CHANNELS: tl.constexpr = x.shape[1]
        one, other = tl.split(tl.reshape(x, [ROWS, CHANNELS // 2, 2]))
        larger = tl.maximum(one, other, propagate_nan=tl.PropagateNan.ALL)
        smaller = tl.minimum(one, other, propagate_nan=tl.PropagateNan.ALL)
        x = tl.reshape(tl.join(larger, smaller), [ROWS, CHANNELS])
    return x
