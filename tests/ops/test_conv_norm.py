"""Proven bounds against the norms of dense operators."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import iresnet_fast as irf
from iresnet_fast.ops import conv_norm
from iresnet_fast.reference.conv_operator import ConvGeometry, conv_matrix
from tests.tolerances import BOUND_TIGHTNESS, NORM_ROUNDING

CHECKERBOARD = torch.tensor([[[[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0], [1.0, -1.0, 1.0]]]], dtype=torch.float64)


@pytest.fixture(params=["formed", "embedded"])
def route(request, monkeypatch):
    """Both ways to the bound: the small operator itself, and the embedding that large ones need."""
    if request.param == "embedded":
        monkeypatch.setattr(conv_norm, "_DENSE", (0, 0))
    return request.param


def dense_norm(weight, size, padding, mode="zeros", stride=(1, 1), dilation=(1, 1), groups=1):
    geometry = ConvGeometry(tuple(size), tuple(stride), tuple(dilation), padding, mode, groups)
    return torch.linalg.matrix_norm(conv_matrix(weight.double(), geometry), 2)


def test_fault_6_checkerboard(route):
    """The transform at the input's own size reads 4.00 where the zero-padded norm is 5.83."""
    exact = dense_norm(CHECKERBOARD, (3, 3), ((1, 1), (1, 1)))
    assert irf.conv_singular_values(CHECKERBOARD, (3, 3)).amax() < 0.7 * exact
    assert irf.conv_norm_bound(CHECKERBOARD, (3, 3), padding=1) >= exact * (1 - NORM_ROUNDING)
    assert irf.conv_norm_bound(CHECKERBOARD, None, padding=1) >= exact


def test_never_below_dense_norm_of_200_zero_padded_kernels(route):
    generator = torch.Generator().manual_seed(1)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator, device="cpu"))

    for _ in range(200):
        groups = draw(1, 2)
        kernel, stride, dilation = ([draw(1, high) for _ in range(2)] for high in (4, 2, 2))
        shape = (groups * draw(1, 3), draw(1, 3), *kernel)
        weight = torch.randn(shape, dtype=torch.float64)
        reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        size = [draw(1, 4) + r for r in reach]
        padding = [draw(0, r) for r in reach]
        exact = dense_norm(weight, size, tuple((p, p) for p in padding), "zeros", stride, dilation, groups)
        options = {"padding": padding, "stride": stride, "dilation": dilation, "groups": groups}
        for input_size in (size, None):
            bound = irf.conv_norm_bound(weight, input_size, **options)
            assert bound >= exact * (1 - NORM_ROUNDING), (weight.shape, size, options)


@settings(max_examples=40)
@given(st.data())
def test_circular_never_below_dense_norm(data):
    kernel = [data.draw(st.integers(1, 3)) for _ in range(2)]
    size = [data.draw(st.integers(k, 5)) for k in kernel]
    padding = [data.draw(st.integers(0, min(3, n))) for n in size]
    stride = [data.draw(st.integers(1, 2)) for _ in range(2)]
    weight = torch.randn(2, 2, *kernel, dtype=torch.float64)
    exact = dense_norm(weight, size, tuple((p, p) for p in padding), "circular", stride)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv_norm, "_DENSE", (0, 0))
        for input_size in (size, None):
            bound = irf.conv_norm_bound(weight, input_size, padding=padding, padding_mode="circular", stride=stride)
            assert bound >= exact * (1 - NORM_ROUNDING)


def test_same_padding_of_even_kernels(route):
    weight = torch.randn(3, 2, 4, 2, dtype=torch.float64)
    exact = dense_norm(weight, (5, 6), ((1, 2), (0, 1)))
    bound = irf.conv_norm_bound(weight, (5, 6), padding="same")
    assert exact * (1 - NORM_ROUNDING) <= bound <= 1.6 * exact


def test_scales_of_any_size(route):
    """Squares of the values neither underflow to a norm of 0 nor overflow."""
    weight = torch.randn(3, 3, 3, 3, dtype=torch.float64)
    norm = irf.conv_norm_bound(weight, (5, 5), padding=1)
    for scale in (1e-165, 1e155):
        scaled = irf.conv_norm_bound(scale * weight, (5, 5), padding=1) / scale
        torch.testing.assert_close(scaled, norm, rtol=1e-9, atol=0)


def test_taps_that_cancel(route):
    """Taps that never touch the input cancel in the embedding; their rounding must not eat the bound."""
    weight = torch.zeros(300, 1, 5, dtype=torch.float64)
    weight[:, 0, 0], weight[:, 0, 2], weight[:, 0, 4] = 1e8, 1 / 300**0.5, -1e8
    exact = dense_norm_1d(weight)
    assert irf.conv_norm_bound(weight, (2,), padding=2) >= exact


def dense_norm_1d(weight):
    return torch.linalg.matrix_norm(conv_matrix(weight, ConvGeometry((2,), (1,), (1,), ((2, 2),))), 2)


def test_formed_operator_gives_its_own_norm():
    weight = torch.randn(4, 3, 3, 3)
    exact = dense_norm(weight, (4, 4), ((1, 1), (1, 1)))
    torch.testing.assert_close(irf.conv_norm_bound(weight, (4, 4), padding=1), exact, rtol=1e-11, atol=0)


def test_tight_at_the_size_of_images(device):
    weight = torch.randn(2, 2, 3, 3, dtype=torch.float64, device=device)
    bound = irf.conv_norm_bound(weight, (32, 32), padding=1)
    v = torch.randn(2, 32, 32, dtype=torch.float64, device=device)
    geometry = ConvGeometry((32, 32), (1, 1), (1, 1), ((1, 1), (1, 1)))
    from iresnet_fast.reference.power_iteration import layer_apply, power_iteration

    u = layer_apply(weight, v, geometry)
    u, v = power_iteration(weight, u / u.norm(), v / v.norm(), 2000, geometry)
    sigma = (u * layer_apply(weight, v, geometry)).sum()
    assert sigma <= bound <= BOUND_TIGHTNESS * sigma
    assert bound.dtype == torch.float64
    assert bound.dim() == 0
    assert irf.conv_norm_bound(weight, None, padding=1) <= 1.02 * bound


def test_gradcheck():
    weight = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    for size in ((3, 3), (20, 20)):
        assert torch.autograd.gradcheck(lambda w, size=size: irf.conv_norm_bound(w, size, padding=1), weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": -1}, "padding"),
        ({"padding": "full"}, "'same' or 'valid'"),
        ({"padding_mode": "reflect"}, "'zeros', 'circular'"),
        ({"dilation": 4}, "too small"),
        ({"padding": 1.5}, "padding must be an int or 2 ints"),
        ({"padding": 5, "padding_mode": "circular"}, "more than once"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        irf.conv_norm_bound(torch.randn(2, 2, 3, 3), (4, 4), **options)
