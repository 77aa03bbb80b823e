"""The grouped power iteration's Triton kernels without a GPU: values in the interpreter, launches, resources."""

import itertools

import pytest
import torch

from iresnet_fast.reference.conv_operator import ConvGeometry
from tests.kernels.conftest import SHARED_MEMORY, require_triton
from tests.tolerances import GROUPED

PROGRAM = """
import json, torch
from iresnet_fast.kernels import power_iteration as kernels
from iresnet_fast.ops.power_iteration import _layer_by_layer, kernel_sizes, vector_shapes
from iresnet_fast.reference import power_iteration as reference
from iresnet_fast.reference.conv_operator import ConvGeometry
torch.manual_seed(0)

def geometry(height, width, pad_h, pad_w):
    return ConvGeometry((height, width), (1, 1), (1, 1), ((pad_h, pad_h), (pad_w, pad_w)))

def unit(shape):
    x = torch.randn(shape)
    return x / x.norm()

def double(parts):
    return [part.double() for part in parts]

def split(flat, like):
    return [part.view(other.shape) for part, other in zip(flat.split([o.numel() for o in like]), like)]

def distance(found, exact):
    return float((found - exact).abs().max() / exact.abs().max())

convolutions = [
    ((5, 3, 3, 3), geometry(6, 7, 1, 1)), ((34, 40, 1, 1), None), ((7, 9), None), ((3, 35, 3, 3), geometry(4, 5, 1, 1)),
    ((4, 4, 2, 4), geometry(6, 6, 1, 0)), ((2, 2, 3, 3), geometry(9, 8, 0, 2)), ((3, 2, 1, 1), geometry(4, 4, 0, 0)),
]
matrices = [((70, 33), None), ((1, 1), None), ((6, 2, 3), None)]
errors, launches = [], []
for cases in (convolutions, matrices):
    weights, layers = [torch.randn(shape) for shape, _ in cases], [layer for _, layer in cases]
    weights[-1] *= 0.01  # below its coefficient
    shapes = [vector_shapes(weight, layer) for weight, layer in zip(weights, layers)]
    u, v = [unit(a) for a, _ in shapes], [unit(b) for _, b in shapes]
    coeff = [0.5 + 0.1 * i for i in range(len(cases))]
    sizes = [kernel_sizes(tuple(w.shape), layer, w.dtype) for w, layer in zip(weights, layers)]
    assert kernels.serves(sizes)
    for n in (0, 1, 4):
        found = kernels.launch_power_iteration(weights, u, v, coeff, sizes, n)
        exact = _layer_by_layer(double(weights), double(u), double(v), coeff, layers, n)
        errors += [distance(a, b) for a, b in zip(found, exact)]
    wide = [weight.double().requires_grad_() for weight in weights]
    grads = [torch.randn_like(weight) for weight in weights]
    vectors = split(exact[1], u), split(exact[2], v)
    images = [
        reference.normalized(w, reference.estimate(w, a, b, layer), c)
        for w, a, b, layer, c in zip(wide, *vectors, layers, coeff)
    ]
    expected = torch.cat([part.flatten() for part in torch.autograd.grad(images, wide, double(grads))])
    found = kernels.launch_gradient(grads, *(part.float() for part in exact), coeff, sizes)
    errors.append(distance(found, expected))

# A weight that became zero keeps its vectors; one that is not finite shows it, and spoils no other's.
weights[0].zero_()
weights[1].fill_(float("nan"))
flat, new_u, new_v, sigma = kernels.launch_power_iteration(weights, u, v, coeff, sizes, 2)
bad = split(flat, weights)
kept = [torch.allclose(a, b) for a, b in zip(split(new_u, u)[:2] + split(new_v, v)[:2], u[:2] + v[:2])]
states = [bool((bad[0] == 0).all()), float(sigma[0]) == 0, bool(bad[1].isnan().all()), bool(sigma[1].isnan()), *kept]
states.append(bool(bad[2].isfinite().all()))
weights[1].fill_(3e30)  # its squares overflow
flat, *_ = kernels.launch_power_iteration(weights, u, v, coeff, sizes, 1)
states.append(bool(split(flat, weights)[1].isnan().all()))
print(json.dumps([errors, states]))
"""


def test_interpreter_agrees_with_reference(interpret):
    errors, states = interpret(PROGRAM)
    assert len(errors) == 26
    assert max(errors) <= GROUPED
    assert all(states), states


def same(height, width):
    return ConvGeometry((height, width), (1, 1), (1, 1), ((1, 1), (1, 1)))


def layers_of(depth):
    """(shape, geometry) of the layers of the papers' stages with so many blocks each."""
    found = []
    for channels, hidden, size in [(16, 32, 32), (64, 64, 16), (256, 128, 8)]:
        block = [
            ((hidden, channels, 3, 3), same(size, size)),
            ((hidden, hidden, 1, 1), None),
            ((channels, hidden, 3, 3), same(size, size)),
        ]
        found += depth * block
    return found


@pytest.mark.parametrize("depth", [1, 18])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_launches_do_not_grow_with_depth(monkeypatch, depth, n):
    """2n + 1 forward, two backward: counted where they are launched, with nothing run."""
    require_triton()
    from iresnet_fast.kernels import power_iteration as kernels
    from iresnet_fast.ops.power_iteration import kernel_sizes, vector_shapes

    count = 0

    class Counting:
        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                nonlocal count
                count += 1

            return launch

    for name in ("half_step_kernel", "finish_kernel", "dots_kernel", "gradient_kernel"):
        monkeypatch.setattr(kernels, name, Counting())
    shapes, layers = zip(*layers_of(depth), strict=True)
    weights = [torch.empty(shape) for shape in shapes]
    vectors = [vector_shapes(weight, layer) for weight, layer in zip(weights, layers, strict=True)]
    u, v = ([torch.empty(shape) for shape in parts] for parts in zip(*vectors, strict=True))
    coeff = [0.9] * len(layers)
    sizes = [kernel_sizes(shape, geometry, torch.float32) for shape, geometry in zip(shapes, layers, strict=True)]
    flat, new_u, new_v, sigma = kernels.launch_power_iteration(weights, u, v, coeff, sizes, n)
    assert count == (2 * n + 1 if n else 2)
    kernels.launch_gradient(weights, flat, new_u, new_v, sigma, coeff, sizes)
    assert count == (2 * n + 1 if n else 2) + 2


def test_plan_covers_every_element_once():
    require_triton()
    from iresnet_fast.kernels import power_iteration as kernels
    from iresnet_fast.ops.power_iteration import kernel_sizes

    shapes, layers = zip(*layers_of(1), ((7, 300), None), ((5, 3, 3, 3), same(33, 7)), strict=True)
    sizes = [kernel_sizes(shape, geometry, torch.float32) for shape, geometry in zip(shapes, layers, strict=True)]
    plan = kernels._plan(tuple(sizes))
    block_m, block_n = plan.tile.m, plan.tile.n
    # What is compiled ahead of time below is all that can be chosen.
    assert plan.tile == kernels.TILE
    assert plan.slots <= kernels.MAX_SLOTS
    assert plan.slots & (plan.slots - 1) == 0
    seen = set()
    for layer, kind, start, end in plan.finish:
        seen |= {(layer, kind, element) for element in range(start, end)}
    assert len(seen) == sum(end - start for *_, start, end in plan.finish) == sum(plan.sizes)
    for tiles, channels, size in ((plan.forward, 1, (4, 5)), (plan.adjoint, 0, (2, 3))):
        assert [slot for *_, slot in tiles] == list(range(len(tiles)))
        for layer, row in enumerate(plan.table):
            pixels = row[size[0]] * row[size[1]]
            corners = {(m, p) for at, m, p, _ in tiles if at == layer}
            assert corners == set(itertools.product(range(0, row[channels], block_m), range(0, pixels, block_n)))


def test_what_the_kernels_leave_to_others():
    require_triton()
    from iresnet_fast.kernels import power_iteration as kernels
    from iresnet_fast.ops.power_iteration import kernel_sizes

    one, two = (1, 1), (2, 2)
    none = ((0, 0), (0, 0))
    for shape, geometry in [
        ((2, 2, 3, 3), ConvGeometry((8, 8), two, one, none)),
        ((2, 2, 3, 3), ConvGeometry((8, 8), one, two, none)),
        ((2, 1, 3, 3), ConvGeometry((8, 8), one, one, none, groups=2)),
        ((2, 2, 3, 3), ConvGeometry((8, 8), one, one, ((1, 1), (1, 1)), "circular")),
        ((2, 2, 2, 2), ConvGeometry((8, 8), one, one, ((0, 1), (0, 1)))),
        ((2, 2, 3), ConvGeometry((8,), (1,), (1,), ((1, 1),))),
    ]:
        assert kernel_sizes(shape, geometry, torch.float32) is None
    assert kernel_sizes((2, 2), None, torch.float64) is None
    # More slots than a program adds up.
    assert not kernels.serves([kernel_sizes((64, 3, 3, 3), same(2048, 2048), torch.float32)])


@pytest.mark.full
@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_compiles_without_spills(compile_ahead, architecture):
    """Every configuration: the ends of the range of slots stand for all of it."""
    from iresnet_fast.kernels import power_iteration as kernels

    plain = {"num_warps": 4}
    slots = [{"SLOTS": size, "ROW": kernels._ROW} for size in (1, 64, kernels.MAX_SLOTS)]
    modes = [(False, True, False), (True, False, False), (False, False, False), (False, True, True)]
    configurations = [
        (
            kernels.half_step_kernel,
            dict(zip(("ADJOINT", "FIRST", "DOT"), mode, strict=True)) | tile.constants | size,
            tile,
        )
        for mode, tile, size in itertools.product(modes, [kernels.TILE], slots)
    ]
    configurations += [
        (kernels.gradient_kernel, tile.constants | size, tile)
        for tile, size in itertools.product([kernels.TILE], slots)
    ]
    configurations += [
        (kernels.finish_kernel, {"ITERATED": iterated, "CHUNK": kernels.CHUNK, **size}, None)
        for iterated, size in itertools.product((True, False), slots)
    ]
    configurations.append((kernels.dots_kernel, {"CHUNK": kernels.CHUNK, "ROW": kernels._ROW}, None))
    integers = {"addresses", "table", "tiles", "chunks"}
    for kernel, constants, tile in configurations:
        signature = {name: "*i64" if name in integers else "*fp32" for name in kernel.arg_names}
        signature |= {"n_u": "i32"} if "n_u" in signature else {}
        signature |= dict.fromkeys(constants, "constexpr")
        options = plain if tile is None else tile.options
        used = compile_ahead(kernel, architecture, signature, constants, **options)
        assert used.stack == 0, (kernel.__name__, constants)
        assert used.shared <= SHARED_MEMORY[architecture]
