"""Proven bounds against the norms of dense operators."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import iresnet_fast as irf
from iresnet_fast import _extension
from iresnet_fast.ops import conv_norm
from iresnet_fast.reference import conv_norm as reference
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


def test_never_below_dense_norm_of_300_zero_padded_kernels(route):
    generator = torch.Generator().manual_seed(1)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator, device="cpu"))

    for _ in range(300):
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


@settings(max_examples=40)
@given(st.data())
def test_reflected_and_replicated_padding_never_below_dense_norm(data):
    mode = data.draw(st.sampled_from(["reflect", "replicate"]))
    kernel = [data.draw(st.integers(1, 3)) for _ in range(2)]
    size = [data.draw(st.integers(k, 5)) for k in kernel]
    padding = [data.draw(st.integers(0, min(3, n - 1 if mode == "reflect" else 3))) for n in size]
    stride, dilation = ([data.draw(st.integers(1, 2)) for _ in range(2)] for _ in range(2))
    if any(d * (k - 1) >= n + 2 * p for d, k, n, p in zip(dilation, kernel, size, padding, strict=True)):
        return
    weight = torch.randn(2, 2, *kernel, dtype=torch.float64)
    basis = torch.eye(2 * size[0] * size[1], dtype=torch.float64).view(-1, 2, *size)
    padded = nn.functional.pad(basis, [padding[1]] * 2 + [padding[0]] * 2, mode=mode)
    columns = nn.functional.conv2d(padded, weight, stride=stride, dilation=dilation).flatten(1)
    exact = torch.linalg.matrix_norm(columns, 2)
    options = {"padding": padding, "padding_mode": mode, "stride": stride, "dilation": dilation}
    for input_size in (size, None):
        assert irf.conv_norm_bound(weight, input_size, **options) >= exact * (1 - NORM_ROUNDING)
    assert not irf.conv_norm_certified(weight, 0.999 * float(exact), size, **options)


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
        ({"padding_mode": "mirror"}, "'zeros', 'circular', 'reflect', 'replicate'"),
        ({"padding": 4, "padding_mode": "reflect"}, "too large for reflect .* at most one less than its size"),
        ({"dilation": 4}, "too small"),
        ({"padding": 1.5}, "padding must be an int or 2 ints"),
        ({"padding": 5, "padding_mode": "circular"}, "too large for circular .* at most its size"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        irf.conv_norm_bound(torch.randn(2, 2, 3, 3), (4, 4), **options)


@pytest.mark.parametrize(
    ("shape", "size", "options"),
    [
        ((8, 8, 3, 3), (16, 16), {}),
        ((6, 8, 3, 3), (9, 11), {}),
        ((16, 2, 3, 3), (12, 12), {"groups": 4}),
        ((7, 5, 2, 4), (20, 20), {"dilation": (2, 1)}),
        ((5, 3, 3, 3), (16, 16), {"stride": 2}),
        ((9, 4, 5), (64,), {}),
        ((33, 40, 1, 1), (24, 24), {}),
        ((176, 180, 3, 3), (6, 6), {}),  # more than a thread block of a GPU holds
    ],
)
def test_certificate_decides_within_a_thousandth(device, shape, size, options):
    weight = torch.randn(shape, dtype=torch.float64, device=device)
    options = {"padding_mode": "circular", "padding": "same", **options}
    if options.get("stride", 1) != 1:
        options["padding"] = 1
    bound = float(irf.conv_norm_bound(weight, size, **options))
    for scale in (1.0, 1e-150, 1e120):
        assert irf.conv_norm_certified(scale * weight, 1.001 * scale * bound, size, **options)
        assert not irf.conv_norm_certified(scale * weight, 0.999 * scale * bound, size, **options)


@pytest.mark.parametrize("size", [(3, 3), (20, 20), None])
def test_certificate_never_accepts_less_than_the_dense_norm(size, route):
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    at = size or (6, 6)
    exact = float(dense_norm(weight, at, ((1, 1), (1, 1))))
    assert not irf.conv_norm_certified(weight, 0.9999 * exact, size, padding=1)
    assert irf.conv_norm_certified(
        weight, 1.0001 * float(irf.conv_norm_bound(weight, size, padding=1)), size, padding=1
    )


def test_certificate_takes_any_floating_dtype():
    weight = torch.randn(4, 4, 3, 3)
    bound = float(irf.conv_norm_bound(weight, (24, 24), padding=1))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert irf.conv_norm_certified(weight.to(dtype), 1.1 * bound, (24, 24), padding=1)
        assert not irf.conv_norm_certified(weight.to(dtype), 0.9 * bound, (24, 24), padding=1)


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan"), float("inf"), "1", True])
def test_certificate_needs_a_positive_tau(tau):
    with pytest.raises(ValueError, match="tau must be a positive number"):
        irf.conv_norm_certified(torch.randn(2, 2, 3, 3), tau, (8, 8))


@pytest.mark.skipif(not _extension.defines("conv_norm_below"), reason="needs the compiled extension")
def test_certificate_of_the_extension_agrees_with_the_reference():
    for shape, grid, stride, groups in (((6, 5, 3, 3), (8, 8), (1, 1), 1), ((8, 2, 3, 3), (8, 6), (2, 2), 2)):
        weight = torch.randn(shape, dtype=torch.float64)
        norm = float(irf.conv_singular_values(weight, grid, stride=stride, groups=groups).amax())
        for tau in (0.999 * norm, 1.001 * norm):
            problem = (weight, grid, stride, (1, 1), groups, tau, 1e-12)
            found = torch.ops.iresnet_fast.conv_norm_below(*problem)
            assert bool(found) == bool(reference.conv_norm_below(*problem)) == (tau > norm)
            torch.library.opcheck(torch.ops.iresnet_fast.conv_norm_below.default, problem)


def test_gradient_takes_one_singular_pair():
    """At sizes that are not formed, and with stride and groups: against finite differences."""
    weight = torch.randn(4, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    for options in ({"padding": 1}, {"padding": 1, "padding_mode": "replicate"}, {"stride": 2, "groups": 2}):
        assert torch.autograd.gradcheck(lambda w, o=options: irf.conv_norm_bound(w, (24, 20), **o), weight)
    bound = irf.conv_norm_bound(weight, (24, 20), padding=1)
    bound.backward()
    assert weight.grad.shape == weight.shape


def test_taps_that_wrap_onto_each_other_and_cancel():
    """What is left of them is rounded relative to the taps; the bound allows for it."""
    for seed in range(8):
        torch.manual_seed(seed)
        first, second = torch.randn(2, 8, 8, dtype=torch.float64)
        for delta in (1e-6, 3e-8):
            weight = torch.stack([first, -first + delta * second], dim=-1)
            options = {"padding": 32, "padding_mode": "circular", "dilation": 64}
            exact = torch.linalg.matrix_norm(weight.sum(-1), 2)
            assert irf.conv_norm_bound(weight, (64,), **options) >= exact * (1 - NORM_ROUNDING)
            assert not irf.conv_norm_certified(weight, 0.999 * float(exact), (64,), **options)


@pytest.mark.parametrize("shrink", [1e-20, 1e-39, 1e-78, 1e-100, 1e-160])
def test_groups_of_very_different_size(shrink):
    weight = torch.randn(8, 4, 3, 3, dtype=torch.float64)
    weight[4:] *= shrink
    values = irf.conv_singular_values(weight, (12, 12), groups=2)
    exact = irf.conv_singular_values(weight, (12, 12), groups=2, driver="svd")
    assert (values - exact).abs().max() <= 3e-8 * exact.max()


@pytest.mark.parametrize(("size", "tau"), [(1e-200, 1.0), (1e-30, 1e130), (1e-300, 1e300), (1e-320, 1.0)])
def test_certificate_far_above_the_norm(size, tau):
    weight = size * torch.rand(4, 4, 3, 3, dtype=torch.float64)
    assert irf.conv_norm_certified(weight, tau, (24, 24), padding=1)


def test_largest_numbers():
    weight = torch.zeros(2, 2, 3, 3, dtype=torch.float64)
    weight[0, 0, 1, 1] = 1e308
    assert irf.conv_norm_bound(weight, (40, 40), padding=1) == pytest.approx(1e308)
