"""The whole-block inverse of bottlenecks: values, layouts and errors; on a CPU its reference serves."""

import pytest
import torch

import iresnet_fast as irf
from iresnet_fast.ops.block_inverse import BOTTLENECK as OP
from iresnet_fast.reference.branches import ACTIVATIONS, chain
from tests.tolerances import WHOLE_BLOCK

SHAPES = ((6, 4, 3, 3), (10, 6, 1, 1), (4, 10, 3, 3))
ELU = ("elu", "elu", "elu", "identity")


def bottleneck(activations=ELU, dtype=torch.float64, device="cpu"):
    """Convolutions of norm at most 0.9 as the op takes them: the sum of the taps' norms bounds that of the operator."""
    weights = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    weights = [0.9 * weight / torch.linalg.matrix_norm(weight, 2, dim=(0, 1)).sum() for weight in weights]
    weights = [weight.to(device, dtype) for weight in weights]
    biases = [torch.randn(len(weight), dtype=dtype, device=device) for weight in weights]
    biases[1] = None
    return weights, biases, activations, torch.tensor([[0.7, 20.0]] * 4).to(device, dtype)


def solve(y, branch, **options):
    *layers, numbers = branch
    return irf.ops.bottleneck_inverse(y, *layers, parameters=numbers, **options)


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (5, 7), (1, 1), (3, 1)])
@pytest.mark.parametrize("activations", [(name,) * 3 + ("identity",) for name in ACTIVATIONS] + [("maxmin",) * 4])
def test_values(device, activations, size, circular):
    dtype = torch.float32
    branch = bottleneck(activations, dtype, device)
    y = 3 * torch.randn(3, 4, *size, device=device)
    found = solve(y, branch, circular=circular)
    weights, biases, _, numbers = branch
    exact = [part if part is None else part.double() for part in biases]
    image = chain(found.x.double(), [w.double() for w in weights], exact, activations, numbers.double(), circular)
    residual = (found.x.double() + image - y.double()).flatten(1).norm(dim=1) / y.double().flatten(1).norm(dim=1)
    assert (residual <= WHOLE_BLOCK[dtype]).all()
    assert found.converged.all()
    assert found.x.is_contiguous()


def test_is_the_inverse_of_the_module(device):
    """The definition in plain PyTorch is that of the modules."""
    for padding_mode in ("zeros", "circular"):
        weights, _, _, numbers = bottleneck(dtype=torch.float32, device=device)
        layers = []
        for weight in weights:
            size = weight.shape[-1]
            conv = torch.nn.Conv2d(
                *weight.shape[1::-1], size, padding=size // 2, padding_mode=padding_mode, bias=False, device=device
            )
            conv.weight = torch.nn.Parameter(weight, requires_grad=False)
            layers += [torch.nn.ELU(0.7), conv]
        x = torch.randn(2, 4, 5, 6, device=device)
        y = x + torch.nn.Sequential(*layers)(x)
        found = solve(y, (weights, None, ELU, numbers), circular=padding_mode == "circular", lipschitz=0.73)
        torch.testing.assert_close(found.x, x, rtol=0, atol=1e-5)


def test_layouts_and_empty_batch(device):
    branch = bottleneck(dtype=torch.float32, device=device)
    y = torch.randn(3, 4, 5, 6, device=device)
    expected = solve(y, branch)
    for variant in (y.contiguous(memory_format=torch.channels_last), y.transpose(2, 3).contiguous().transpose(2, 3)):
        torch.testing.assert_close(solve(variant, branch).x, expected.x, rtol=0, atol=1e-5)
    assert all(len(part) == 0 for part in solve(y[:0], branch))


def test_opcheck(device):
    weights, biases, activations, numbers = bottleneck(dtype=torch.float32, device=device)
    codes = [ACTIVATIONS.index(name) for name in activations]
    y = torch.randn(2, 4, 3, 5, device=device)
    arguments = (y, torch.zeros_like(y), weights, biases, codes, numbers, True, 1e-5, 0.9, 0, 20, True, False)
    torch.library.opcheck(torch.ops.iresnet_fast.bottleneck_inverse.default, arguments)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_fullgraph_compile(device, backend):
    branch = bottleneck(dtype=torch.float32, device=device)
    y = torch.randn(2, 4, 3, 5, device=device)

    @torch.compile(fullgraph=True, backend=backend)
    def generate(z):
        return 2 * solve(z + 1, branch, lipschitz=0.9).x

    torch.testing.assert_close(generate(y), 2 * solve(y + 1, branch, lipschitz=0.9).x, rtol=0, atol=1e-5)


def test_self_test(device):
    assert OP.self_test(device) <= OP.self_test_tolerance


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (lambda y, w, b, a: (y[0], w, b, a), {}, ValueError, r"\(B, C, H, W\), got \(4, 5, 6\)"),
        (lambda y, w, b, a: (y.int(), w, b, a), {}, TypeError, "floating point, got torch.int32"),
        (lambda y, w, b, a: (y, w[:2], b[:2], a), {}, ValueError, "a 3×3, a 1×1 and a 3×3 convolution, got shapes"),
        (lambda y, w, b, a: (y, [w[1], w[1], w[2]], b, a), {}, ValueError, r"got shapes \[\(10, 6, 1, 1\)"),
        (lambda y, w, b, a: (y[:, :3], w, b, a), {}, ValueError, "weight 0 must take 3 channels"),
        (lambda y, w, b, a: (y, w, b, a[:3]), {}, ValueError, "3 layers need 4 activations"),
        (lambda y, w, b, a: (y, w, b, a), {"low_precision": True}, ValueError, "needs the CUDA kernel"),
        (lambda y, w, b, a: (y, w, b, a), {"patience": 0}, ValueError, "patience must be at least 1, got 0"),
    ],
)
def test_bad_input(change, options, error, message):
    weights, biases, activations, _ = bottleneck(dtype=torch.float32)
    with pytest.raises(error, match=message):
        irf.ops.bottleneck_inverse(*change(torch.randn(2, 4, 5, 6), weights, biases, activations), **options)
