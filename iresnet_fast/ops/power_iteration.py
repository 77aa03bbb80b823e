"""Power iteration and soft normalisation of many layers at once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import power_iteration as reference
from ..reference.conv_operator import ConvGeometry, conv_weight_gradient
from ._backend import Op, register
from .power_iteration_stacked import stacked_power_iteration

_AXES = 3
# Numbers that encode a geometry: axes (0 for a matrix), then size, stride, dilation, padding, mode, groups.
_WIDTH = 1 + 5 * _AXES + 2
Layers = list[ConvGeometry | None]
_Sizes = tuple[int, ...]


class PowerIteration(NamedTuple):
    """What a grouped power iteration returns, in the order of the layers.

    Attributes:
        weights: the normalised weights W̄ = W/max(1, σ/c), differentiable by the weights.
        u: output vectors of norm 1.
        v: input vectors of norm 1.
        sigma: (L,) σ = ⟨u, W v⟩.
    """

    weights: tuple[Tensor, ...]
    u: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    sigma: Tensor


def power_iteration(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    *,
    coeff: float | Sequence[float],
    geometries: Sequence[ConvGeometry | None] | None = None,
    n_iterations: int = 1,
    layers_per_node: Sequence[int] | None = None,
    in_backward: bool = True,
) -> PowerIteration:
    """Iterate u ← W v/‖W v‖, v ← Wᵀ u/‖Wᵀ u‖ and normalise the weights, for all layers together.

    The numbers are those of ``reference.power_iteration`` layer by layer, up to
    rounding; u and v are held constant in the gradient dW = (1/s)·[G − 1{σ>c}·(⟨G, W̄⟩/c)·∇σ], s = max(1, σ/c) (Gouk
    et al. 2018). On CUDA with Triton, float32 and convolutions of stride and dilation 1, groups 1 and zero padding,
    2n + 1 launches serve any number of layers, and two the gradient of an autograd node; on a CPU the same layers run
    in C++, a layer per thread. Sums are taken in a fixed order. Elsewhere layers of one shape are stacked.

    Args:
        weights: L weights of one dtype (float32 or float64) and device: (out, in), or a convolution's (c_out,
            c_in/groups, *kernel).
        u: for each layer (out,), or (c_out, *output_size).
        v: for each layer (in,), or (c_in, *input_size).
        coeff: the Lipschitz coefficient c > 0, one for all or one for each layer.
        geometries: of the convolutions; None for a matrix, or where all are matrices.
        n_iterations: pairs of half steps; 0 takes u and v as they are.
        layers_per_node: how the layers fall into autograd nodes, in order; default one node. A node's gradients are
            ready when all of its layers' are, so that a node per stage lets data-parallel reduction start early.
        in_backward: whether to iterate inside a backward, too. False for the forward of a model, which a backward only
            runs again, compiled or under ``torch.utils.checkpoint``: there u and v are taken as they are.

    Returns:
        A :class:`PowerIteration`; u and v are new tensors.

    Raises:
        TypeError: weights that are not float32 or float64, or of several dtypes or devices.
        ValueError: lists of different lengths, an empty weight, vectors of a wrong shape, coeff ≤ 0, a negative
            ``n_iterations``, ``layers_per_node`` that do not add up to L.

    Example:
        >>> w = torch.diag(torch.tensor([4.0, 1.0]))
        >>> power_iteration([w], [torch.ones(2)], [torch.ones(2)], coeff=1.0, n_iterations=20).weights[0].diag()
        tensor([1.0000, 0.2500])
    """
    layers: Layers = [None] * len(weights) if geometries is None else list(geometries)
    coeffs = [float(coeff)] * len(weights) if isinstance(coeff, int | float) else [float(c) for c in coeff]
    _check(weights, u, v, coeffs, layers, n_iterations)
    counts = [len(weights)] if layers_per_node is None else list(layers_per_node)
    if sum(counts) != len(weights):
        raise ValueError(f"layers_per_node must add up to the {len(weights)} weights, got {counts}")
    if not weights:
        return PowerIteration((), (), (), torch.empty(0))
    code = encode(layers)
    detached = [weight.detach() for weight in weights]
    flat, flat_u, flat_v, sigma = torch.ops.iresnet_fast.power_iteration(
        detached, [part.detach() for part in u], [part.detach() for part in v], coeffs, code, n_iterations, in_backward
    )
    us, vs = split(flat_u, u), split(flat_v, v)
    if not (torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)):
        return PowerIteration(tuple(split(flat, weights)), tuple(us), tuple(vs), sigma)
    normalized: list[Tensor] = []
    parts = (_by_node(flat, weights, counts), _by_node(flat_u, u, counts), _by_node(flat_v, v, counts))
    for *tensors, sigmas in zip(*parts, sigma.split(counts), strict=True):
        node = slice(len(normalized), len(normalized) + len(sigmas))
        normalized += _Node.apply(coeffs[node], layers[node], *tensors, sigmas, *weights[node])
    return PowerIteration(tuple(normalized), tuple(us), tuple(vs), sigma)


def _by_node(flat: Tensor, parts: Sequence[Tensor], counts: Sequence[int]) -> tuple[Tensor, ...]:
    """The flat tensor in pieces of so many consecutive parts."""
    sizes = iter([part.numel() for part in parts])
    return flat.split([sum(itertools.islice(sizes, count)) for count in counts])


class _Node(torch.autograd.Function):
    """The gradient through the normalisation of some layers."""

    @staticmethod
    def forward(
        ctx: Any,
        coeff: list[float],
        layers: Layers,
        normalized: Tensor,
        u: Tensor,
        v: Tensor,
        sigma: Tensor,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        # Attributes, not saved tensors: a node serves many layers, whose gradients may be asked for one after another,
        # with a step in between. The first gradient needs no weight.
        ctx.coeff, ctx.layers, ctx.vectors = coeff, layers, (normalized, u, v, sigma)
        ctx.weights, ctx.versions = weights, _versions(weights)
        ctx.set_materialize_grads(False)
        outputs = split(normalized, weights)
        ctx.mark_non_differentiable(*(part for part, w in zip(outputs, weights, strict=True) if not w.requires_grad))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        weights, rest = ctx.weights, (None,) * 6
        wanted = [grad is not None and need for grad, need in zip(grads, ctx.needs_input_grad[6:], strict=True)]
        given = [torch.zeros_like(w) if g is None else g for g, w in zip(grads, weights, strict=True)]
        normalized, u, v, sigma = ctx.vectors
        if torch.is_grad_enabled():  # to be differentiated again
            if _versions(weights) != ctx.versions:
                raise RuntimeError("a weight was changed in place since its forward: its second gradient is lost")
            return *rest, *_differentiable_gradient(wanted, weights, given, u, v, ctx.coeff, ctx.layers)
        code = encode(ctx.layers)
        flat = torch.ops.iresnet_fast.power_iteration_backward(given, normalized, u, v, sigma, ctx.coeff, code)
        return *rest, *(part if want else None for part, want in zip(split(flat, weights), wanted, strict=True))


def _versions(weights: Sequence[Tensor]) -> list[int] | None:
    """Which in-place changes the weights have seen; not in compiled code, nor of tensors that do not count them."""
    if torch.compiler.is_compiling() or any(weight.is_inference() for weight in weights):
        return None
    return [weight._version for weight in weights]


def _differentiable_gradient(
    wanted: Sequence[bool],
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    flat_u: Tensor,
    flat_v: Tensor,
    coeff: Sequence[float],
    layers: Layers,
) -> Iterator[Tensor | None]:
    """The gradients by the layer-wise definition, with a graph of their own."""
    u, v = _split_vectors(flat_u, flat_v, weights, layers)
    for i, weight in enumerate(weights):
        if wanted[i]:
            with torch.autocast(weight.device.type, enabled=False):
                image = reference.normalized(weight, reference.estimate(weight, u[i], v[i], layers[i]), coeff[i])
                yield torch.autograd.grad(image, weight, grads[i], create_graph=True)[0]
        else:
            yield None


def split(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The parts of a flat tensor, in the shapes of others."""
    return _shaped(flat, [tuple(part.shape) for part in like])


def _split_vectors(
    flat_u: Tensor, flat_v: Tensor, weights: Sequence[Tensor], layers: Layers
) -> tuple[list[Tensor], list[Tensor]]:
    shapes = [vector_shapes(weight, geometry) for weight, geometry in zip(weights, layers, strict=True)]
    return _shaped(flat_u, [u for u, _ in shapes]), _shaped(flat_v, [v for _, v in shapes])


def _shaped(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _check(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    coeffs: Sequence[float],
    layers: Layers,
    n_iterations: int,
) -> None:
    counts = {"u": len(u), "v": len(v), "coeff": len(coeffs), "geometries": len(layers)}
    for name, count in counts.items():
        if count != len(weights):
            raise ValueError(f"{name} needs one entry for each of the {len(weights)} weights, got {count}")
    if isinstance(n_iterations, bool) or not isinstance(n_iterations, int) or n_iterations < 0:
        raise ValueError(f"n_iterations must be an int that is not negative, got {n_iterations!r}")
    for index, weight in enumerate(weights):
        if weight.numel() == 0:
            raise ValueError(f"weight {index} of shape {tuple(weight.shape)} is empty")
        if weight.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"weight {index} must be float32 or float64, got {weight.dtype}. Remedy: weight.float()")
        for name, part in (("weight", weight), ("u", u[index]), ("v", v[index])):
            if part.dtype != weights[0].dtype or part.device != weights[0].device:
                raise TypeError(
                    f"{name} {index} is {part.dtype} on {part.device}, the first weight {weights[0].dtype} on "
                    f"{weights[0].device}: all must agree"
                )
        if not (0 < coeffs[index] < math.inf):
            raise ValueError(f"coeff must be a positive number, got {coeffs[index]}")
        expected = vector_shapes(weight, layers[index])
        for name, part, shape in (("u", u[index], expected[0]), ("v", v[index], expected[1])):
            if tuple(part.shape) != shape:
                raise ValueError(f"{name} {index} must have shape {shape}, got {tuple(part.shape)}")


def vector_shapes(weight: Tensor, geometry: ConvGeometry | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of u and v of a layer."""
    shapes = _vector_shapes.__wrapped__ if torch.compiler.is_compiling() else _vector_shapes
    return shapes(tuple(weight.shape), geometry)


@lru_cache(maxsize=1024)
def _vector_shapes(shape: tuple[int, ...], geometry: ConvGeometry | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if geometry is None:
        return (shape[0],), (math.prod(shape[1:]),)
    return (shape[0], *geometry.output_size(shape[2:])), (shape[1] * geometry.groups, *geometry.input_size)


@lru_cache(maxsize=1024)
def kernel_sizes(shape: tuple[int, ...], geometry: ConvGeometry | None, dtype: torch.dtype) -> _Sizes | None:
    """A layer as the kernels take it, Triton's and C++'s; None where it is not plain enough, or not float32."""
    if dtype != torch.float32:
        return None
    if geometry is None:
        return math.prod(shape[1:]), shape[0], 1, 1, 1, 1, 1, 1, 0, 0
    plain = geometry.groups == 1 and geometry.padding_mode == "zeros" and len(geometry.input_size) == 2
    if not plain or {*geometry.stride, *geometry.dilation} != {1} or any(a != b for a, b in geometry.padding):
        return None
    pads = tuple(before for before, _ in geometry.padding)
    if any(pad >= k for pad, k in zip(pads, shape[2:], strict=True)):
        return None
    return shape[1], shape[0], *geometry.input_size, *geometry.output_size(shape[2:]), *shape[2:], *pads


def encode(layers: Sequence[ConvGeometry | None]) -> list[int]:
    """Geometries as the ints that an op's schema can take."""
    row = _encode_row.__wrapped__ if torch.compiler.is_compiling() else _encode_row  # dynamo warns of caches
    return [number for geometry in layers for number in row(geometry)]


@lru_cache(maxsize=256)
def _encode_row(geometry: ConvGeometry | None) -> tuple[int, ...]:
    if geometry is None:
        return (0,) * _WIDTH
    axes = len(geometry.input_size)
    row = [axes]
    for entries in (geometry.input_size, geometry.stride, geometry.dilation):
        row += [*entries, *[0] * (_AXES - axes)]
    row += [side for pair in geometry.padding for side in pair] + [0] * (2 * (_AXES - axes))
    return (*row, int(geometry.padding_mode == "circular"), geometry.groups)


@lru_cache(maxsize=256)
def _decode_row(row: tuple[int, ...]) -> ConvGeometry | None:
    axes = row[0]
    if axes == 0:
        return None
    size, stride, dilation = (row[1 + i * _AXES : 1 + i * _AXES + axes] for i in range(3))
    sides = row[1 + 3 * _AXES : 1 + 3 * _AXES + 2 * axes]
    padding = tuple(zip(sides[::2], sides[1::2], strict=True))
    return ConvGeometry(size, stride, dilation, padding, "circular" if row[-2] else "zeros", row[-1])


def decode(code: Sequence[int]) -> Layers:
    """The geometries that :func:`encode` wrote."""
    return [_decode_row(tuple(code[i : i + _WIDTH])) for i in range(0, len(code), _WIDTH)]


_Found = tuple[Tensor, Tensor, Tensor, Tensor]


def _power_iteration(
    weights: list[Tensor],
    u: list[Tensor],
    v: list[Tensor],
    coeff: list[float],
    geometries: list[int],
    n_iterations: int,
    in_backward: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layers = decode(geometries)
    n = n_iterations if in_backward or torch._C._current_graph_task_id() == -1 else 0

    def run(backend: str, members: list[int], sizes: list[_Sizes]) -> _Found:
        own, own_u, own_v = ([parts[i] for i in members] for parts in (weights, u, v))
        bounds = [coeff[i] for i in members]
        if backend == "extension":
            flat_sizes = [*itertools.chain(*sizes)]
            found: _Found = torch.ops.iresnet_fast.power_iteration_cpu(own, own_u, own_v, bounds, flat_sizes, n)
            return found
        if backend == "triton":
            from ..kernels.power_iteration import launch_power_iteration  # noqa: PLC0415  (needs Triton)

            with torch.cuda.device(own[0].device):
                return launch_power_iteration(own, own_u, own_v, bounds, sizes, n)
        compute = _layer_by_layer if backend == "reference" else stacked_power_iteration
        with torch.autocast(own[0].device.type, enabled=False):
            return compute(own, own_u, own_v, bounds, [layers[i] for i in members], n)

    shares = list(_share_out(weights, layers))
    if len(shares) == 1:
        return run(*shares[0])
    found = _power_iteration_fake(weights, u, v)
    targets = [split(flat, like) for flat, like in zip(found[:3], (weights, u, v), strict=True)]
    for backend, members, sizes in shares:
        *flats, sigma = run(backend, members, sizes)
        for flat, target in zip(flats, targets, strict=True):
            own = [target[i] for i in members]
            torch._foreach_copy_(own, split(flat, own))
        found[3][members] = sigma
    return found


def _share_out(weights: list[Tensor], layers: Layers) -> Iterator[tuple[str, list[int], list[_Sizes]]]:
    """Which backend serves which layers; their sizes where they are plain enough for a kernel."""
    backend = OP.choose(weights[0].device)
    everything = list(range(len(weights)))
    if backend not in ("triton", "extension"):
        yield backend, everything, []
        return
    sizes = [kernel_sizes(tuple(w.shape), g, w.dtype) for w, g in zip(weights, layers, strict=True)]
    plain = [i for i in everything if sizes[i] is not None]
    if backend == "triton":
        from ..kernels.power_iteration import serves  # noqa: PLC0415  (needs Triton)

        plain = [i for i in plain if (size := sizes[i]) is not None and serves([size])]
    others = [i for i in everything if i not in set(plain)]
    if plain:
        yield backend, plain, [size for i in plain if (size := sizes[i]) is not None]
    if others:
        yield "stacked", others, []


def _power_iteration_fake(
    weights: list[Tensor], u: list[Tensor], v: list[Tensor], *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    flat, flat_u, flat_v = (parts[0].new_empty(sum(part.numel() for part in parts)) for parts in (weights, u, v))
    return flat, flat_u, flat_v, weights[0].new_empty(len(weights))


def _layer_by_layer(
    weights: list[Tensor], u: list[Tensor], v: list[Tensor], coeff: list[float], layers: Layers, n: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = []
    for weight, u_, v_, c, geometry in zip(weights, u, v, coeff, layers, strict=True):
        new_u, new_v = reference.power_iteration(weight, u_, v_, n, geometry)
        sigma = reference.estimate(weight, new_u, new_v, geometry)
        found.append((reference.normalized(weight, sigma, c), new_u, new_v, sigma))
    flat, flat_u, flat_v, sigmas = (
        torch.cat([part.reshape(-1) for part in parts]) for parts in zip(*found, strict=True)
    )
    return flat, flat_u, flat_v, sigmas


def _power_iteration_backward(
    grads: list[Tensor],
    normalized: Tensor,
    u: Tensor,
    v: Tensor,
    sigma: Tensor,
    coeff: list[float],
    geometries: list[int],
) -> Tensor:
    layers = decode(geometries)

    def run(backend: str, members: list[int], sizes: list[_Sizes]) -> Tensor:
        own, flat, flat_u, flat_v, norms, bounds = grads, normalized, u, v, sigma, coeff
        if len(members) < len(grads):
            separate = (split(normalized, grads), *_split_vectors(u, v, grads, layers))
            flat, flat_u, flat_v = (torch.cat([parts[i].reshape(-1) for i in members]) for parts in separate)
            own, norms, bounds = [grads[i] for i in members], sigma[members], [coeff[i] for i in members]
        if backend == "extension":
            numbers = [*itertools.chain(*sizes)]
            op = torch.ops.iresnet_fast.power_iteration_backward_cpu
            gradient: Tensor = op(own, flat, flat_u, flat_v, norms, bounds, numbers)
            return gradient
        if backend == "triton":
            from ..kernels.power_iteration import launch_gradient  # noqa: PLC0415  (needs Triton)

            with torch.cuda.device(sigma.device):
                return launch_gradient(own, flat, flat_u, flat_v, norms, bounds, sizes)
        with torch.autocast(sigma.device.type, enabled=False):
            return _gradient(own, flat, flat_u, flat_v, norms, bounds, [layers[i] for i in members])

    shares = list(_share_out(grads, layers))
    if len(shares) == 1:
        return run(*shares[0])
    out = torch.empty_like(normalized)
    target = split(out, grads)
    for backend, members, sizes in shares:
        own = [target[i] for i in members]
        torch._foreach_copy_(own, split(run(backend, members, sizes), own))
    return out


def _gradient(
    grads: Sequence[Tensor],
    normalized: Tensor,
    u: Tensor,
    v: Tensor,
    sigma: Tensor,
    coeff: Sequence[float],
    layers: Layers,
) -> Tensor:
    """The flat gradient without kernels of our own."""
    out = torch.empty_like(normalized)
    bounds = sigma.new_tensor(coeff)
    scale = (sigma / bounds).clamp_min(1.0)
    along = torch.stack([(g * w).sum() for g, w in zip(grads, split(normalized, grads), strict=True)])
    along = torch.where(sigma > bounds, along / bounds, 0.0)
    # Where σ is below c its gradient is not needed; a GPU would have to wait to know.
    needed = along.ne(0).tolist() if sigma.device.type == "cpu" else [True] * len(grads)
    us, vs = _split_vectors(u, v, grads, layers)
    for i, (target, geometry) in enumerate(zip(split(out, grads), layers, strict=True)):
        torch.div(grads[i], scale[i], out=target)
        if not needed[i]:
            continue
        if geometry is None:
            slope = torch.outer(us[i], vs[i]).view(target.shape)
        else:
            slope = conv_weight_gradient(target, vs[i].unsqueeze(0), us[i].unsqueeze(0), geometry)
        target.sub_(slope.mul_(along[i] / scale[i]))
    return out


def _power_iteration_backward_fake(
    grads: list[Tensor],
    normalized: Tensor,
    u: Tensor,
    v: Tensor,
    sigma: Tensor,
    coeff: list[float],
    geometries: list[int],
) -> Tensor:
    return torch.empty_like(normalized)


# Not by torch.library.custom_op, which imports the compiler at its first call.
_LIBRARY = torch.library.Library("iresnet_fast", "FRAGMENT")
_LIBRARY.define(
    "power_iteration(Tensor[] weights, Tensor[] u, Tensor[] v, float[] coeff, int[] geometries, int n_iterations, "
    "bool in_backward=True) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "power_iteration_backward(Tensor[] grads, Tensor normalized, Tensor u, Tensor v, Tensor sigma, float[] coeff, "
    "int[] geometries) -> Tensor"
)
for _name, _kernel, _fake in (
    ("power_iteration", _power_iteration, _power_iteration_fake),
    ("power_iteration_backward", _power_iteration_backward, _power_iteration_backward_fake),
):
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"iresnet_fast::{_name}", _fake, lib=_LIBRARY)


def _self_test(device: torch.device) -> float:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu")

    geometry = ConvGeometry((5, 4), (1, 1), (1, 1), ((1, 1), (1, 1)))
    weights = [draw(4, 3, 3, 3), draw(6, 5)]
    u, v = [draw(4, 5, 4), draw(6)], [draw(3, 5, 4), draw(5)]
    wide = [[part.double() for part in parts] for parts in (weights, u, v)]
    here = [[part.to(device) for part in parts] for parts in (weights, u, v)]
    exact = _layer_by_layer(wide[0], wide[1], wide[2], [1.0, 1.0], [geometry, None], 2)
    found = power_iteration(*here, coeff=1.0, geometries=[geometry, None], n_iterations=2)
    flat = torch.cat([part.flatten() for part in found.weights]).cpu().double()
    return float((flat - exact[0]).abs().max() / exact[0].abs().max())


OP = register(
    Op(
        "power_iteration",
        {"cpu": ("extension", "stacked", "reference"), "cuda": ("triton", "stacked", "reference")},
        _self_test,
        self_test_tolerance=1e-5,
        compiled="power_iteration_cpu",
    )
)
