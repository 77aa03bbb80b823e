"""The operator, its adjoint and its matrix agree with each other and with torch's own layers."""

import pytest
import torch
from torch import nn

from iresnet_fast.reference.conv_operator import ConvGeometry, conv_adjoint, conv_apply, conv_matrix
from tests.tolerances import FLOAT64

CASES = [
    (nn.Conv2d(3, 4, 3, padding=1), (5, 6)),
    (nn.Conv2d(4, 6, 3, padding=1, groups=2, stride=2), (6, 5)),
    (nn.Conv2d(2, 3, (2, 4), padding=(1, 2), dilation=2), (9, 7)),
    (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (4, 5)),
    (nn.Conv2d(2, 2, 3, padding=2, padding_mode="circular", stride=2), (5, 4)),
    (nn.Conv1d(3, 2, 4), (7,)),
    (nn.Conv3d(1, 2, 2, padding=1), (3, 2, 3)),
]


def geometry_of(conv, size):
    padding = tuple((p, p) for p in conv.padding)
    return ConvGeometry(size, conv.stride, conv.dilation, padding, conv.padding_mode, conv.groups)


@pytest.mark.parametrize(("conv", "size"), CASES, ids=[str(conv) for conv, _ in CASES])
def test_operator_and_adjoint(device, conv, size):
    conv = conv.to(device, torch.float64)
    weight, geometry = conv.weight.detach(), geometry_of(conv, size)
    x = torch.randn(2, conv.in_channels, *size, dtype=torch.float64, device=device)
    y = conv_apply(weight, x, geometry)
    bias = conv.bias.view(1, -1, *[1] * len(size))
    torch.testing.assert_close(y, (conv(x) - bias).detach(), rtol=FLOAT64, atol=FLOAT64)
    assert tuple(y.shape[2:]) == geometry.output_size(tuple(weight.shape[2:]))

    u = torch.randn_like(y)
    back = conv_adjoint(weight, u, geometry)
    assert back.shape == x.shape
    torch.testing.assert_close((y * u).sum(), (x * back).sum(), rtol=FLOAT64, atol=FLOAT64)

    matrix = conv_matrix(weight, geometry)
    torch.testing.assert_close((matrix @ x.flatten(1).T).T, y.flatten(1), rtol=FLOAT64, atol=FLOAT64)
