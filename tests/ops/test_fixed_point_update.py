"""The fused step of the inverse: values, layouts, gradients, and the Triton kernel without a GPU."""

import pytest
import torch

import iresnet_fast as irf
from tests.tolerances import UPDATE

SHAPES = [(3, 7), (2, 3, 5, 4), (1, 1), (5, 1000), (2, 3, 33, 31)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def tensors(shape, dtype, device):
    return [torch.randn(shape, device=device).to(dtype) for _ in range(3)]


def check(found, inputs):
    y, image, x = inputs
    following, residual = found
    assert torch.equal(following, y - image)
    exact = (following.double() - x.double()).flatten(1).norm(dim=1)
    assert residual.dtype == torch.promote_types(y.dtype, torch.float32)
    torch.testing.assert_close(residual.double(), exact, rtol=UPDATE[residual.dtype], atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values(device, shape, dtype):
    inputs = tensors(shape, dtype, device)
    check(irf.ops.fixed_point_update(*inputs), inputs)


def test_layouts(device):
    y, image, x = tensors((2, 3, 5, 4), torch.float32, device)
    for variant in (y.contiguous(memory_format=torch.channels_last), y.transpose(2, 3).contiguous().transpose(2, 3)):
        inputs = (variant, image, x)
        check(irf.ops.fixed_point_update(*inputs), inputs)
    last = y.contiguous(memory_format=torch.channels_last)
    following, _ = irf.ops.fixed_point_update(last, image, x)
    assert following.is_contiguous(memory_format=torch.channels_last)


def test_repeats_bit_for_bit(device):
    inputs = tensors((4, 3, 64, 64), torch.float32, device)
    first, second = (irf.ops.fixed_point_update(*inputs)[1] for _ in range(2))
    assert torch.equal(first, second)


def test_empty_batch(device):
    following, residual = irf.ops.fixed_point_update(*tensors((0, 3, 2), torch.float32, device))
    assert following.shape == (0, 3, 2)
    assert residual.shape == (0,)


def test_gradcheck_and_opcheck(device):
    inputs = [part.requires_grad_() for part in tensors((3, 4, 2), torch.float64, device)]
    op = torch.ops.iresnet_fast.fixed_point_update.default
    assert torch.autograd.gradcheck(op, inputs)
    assert torch.autograd.gradcheck(irf.ops.fixed_point_update, inputs)
    torch.library.opcheck(op, inputs)
    last = [
        part.detach().contiguous(memory_format=torch.channels_last)
        for part in tensors((2, 3, 4, 5), torch.float32, device)
    ]
    torch.library.opcheck(op, last)


def test_gradient_at_zero_residual(device):
    y, image, _ = tensors((3, 4), torch.float64, device)
    x = (y - image).requires_grad_()
    _, residual = torch.ops.iresnet_fast.fixed_point_update(y, image, x)
    residual.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda y, g, x: (y.long(), g, x), TypeError, "floating point, got torch.int64"),
        (lambda y, g, x: (y[:, 0], g, x), ValueError, r"\(B, ...\)"),
        (lambda y, g, x: (y, g[:, :2], x), ValueError, r"image must match y: \(2, 3\)"),
        (lambda y, g, x: (y, g, x.double()), ValueError, r"x must match y.*torch.float64"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        irf.ops.fixed_point_update(*change(*tensors((2, 3), torch.float32, "cpu")))
