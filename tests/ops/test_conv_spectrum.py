"""Exact singular values against the dense operator's, option by option."""

import math
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import iresnet_fast as irf
from iresnet_fast import _extension
from iresnet_fast.reference import conv_spectrum as reference
from tests.tolerances import FLOAT64, SPECTRUM, SPECTRUM_FULL_RANK

needs_extension = pytest.mark.skipif(not _extension.loaded, reason=str(_extension.missing_reason))


def circular_matrix(weight, size, stride, dilation, groups):
    """Dense matrix of the circular convolution with the kernel's first tap at the output pixel, from F.conv alone."""
    axes = len(size)
    shape = (weight.shape[1] * groups, *size)
    x = torch.eye(math.prod(shape), dtype=weight.dtype, device=weight.device).view(-1, *shape)
    for axis in range(axes):
        reach = dilation[axis] * (weight.shape[2 + axis] - 1)
        index = torch.arange(size[axis] + reach, device=weight.device) % size[axis]
        x = x.index_select(2 + axis, index)
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[axes]
    return conv(x, weight, stride=stride, dilation=dilation, groups=groups).flatten(1).T


def check_against_dense(weight, size, stride, dilation, groups, driver, tolerance=None):
    found = irf.conv_singular_values(weight, size, stride=stride, dilation=dilation, groups=groups, driver=driver)
    exact = torch.linalg.svdvals(circular_matrix(weight, size, stride, dilation, groups))
    found = found.flatten().sort(descending=True).values
    assert found.shape == exact.shape
    assert (found - exact).abs().max() <= (tolerance or SPECTRUM[driver]) * exact.max()


@pytest.mark.parametrize("driver", ["gram", "svd"])
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((4, 3, 3, 3), (6, 6)),
        ((3, 5, 3, 3), (5, 7)),
        ((2, 2, 2, 4), (4, 5)),
        ((3, 3, 5, 5), (3, 4)),  # kernel larger than the input: fault 14
        ((4, 4, 1, 1), (3, 3)),
        ((2, 3, 3), (8,)),
        ((2, 2, 3, 2, 3), (3, 4, 2)),
        ((1, 1, 3, 3), (1, 1)),
        ((3, 4, 3, 3), (13, 13)),  # an odd number of groups of frequencies
    ],
)
def test_matches_dense_operator(device, driver, shape, size):
    weight = torch.randn(shape, dtype=torch.float64, device=device)
    ones = (1,) * len(size)
    check_against_dense(weight, size, ones, ones, 1, driver)


@pytest.mark.parametrize("driver", ["gram", "svd"])
def test_many_frequencies_with_stride_and_groups(driver):
    weight = torch.randn(6, 2, 3, 3, dtype=torch.float64)
    check_against_dense(weight, (26, 26), (2, 2), (1, 1), 3, driver)


@given(st.data())
def test_every_option_matches_dense_operator(data):
    axes = data.draw(st.integers(1, 2))
    small = st.integers(1, 3)
    groups = data.draw(st.integers(1, 2))
    kernel = [data.draw(st.integers(1, 4)) for _ in range(axes)]
    stride = [data.draw(st.integers(1, 2)) for _ in range(axes)]
    dilation = [data.draw(st.integers(1, 2)) for _ in range(axes)]
    size = [s * data.draw(small) for s in stride]
    weight = torch.randn(groups * data.draw(small), data.draw(small), *kernel, dtype=torch.float64)
    driver = data.draw(st.sampled_from(["gram", "svd"]))
    check_against_dense(weight, size, stride, dilation, groups, driver)


def test_agrees_with_the_numpy_snippet():
    """Sedghi's fft2 + svd, which this op replaces; its axes are (kh, kw, c_out, c_in)."""
    weight = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    transforms = np.fft.fft2(weight.cpu().permute(2, 3, 0, 1).numpy(), (8, 8), axes=[0, 1])
    snippet = np.linalg.svd(transforms, compute_uv=False)
    found = irf.conv_singular_values(weight, (8, 8), driver="svd")
    assert np.abs(found.cpu().numpy() - snippet).max() <= SPECTRUM["svd"] * snippet.max()


def test_per_frequency_and_descending():
    values = irf.conv_singular_values(torch.randn(6, 4, 3, 3), (5, 8))
    assert values.shape == (5, 8, 4)
    assert (values.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("driver", ["gram", "svd"])
def test_promised_precision(driver):
    full_rank = torch.randn(16, 16, 3, 3, dtype=torch.float64)
    check_against_dense(full_rank, (6, 6), (1, 1), (1, 1), 1, driver, SPECTRUM_FULL_RANK)
    deficient = torch.randn(16, 2, dtype=torch.float64) @ torch.randn(2, 16 * 9, dtype=torch.float64)
    check_against_dense(deficient.view(16, 16, 3, 3), (6, 6), (1, 1), (1, 1), 1, driver)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_computes_in_float64(device, dtype):
    weight = torch.randn(4, 4, 3, 3, device=device).to(dtype)
    values = irf.conv_singular_values(weight, (6, 6))
    assert values.dtype == torch.float64
    torch.testing.assert_close(values, irf.conv_singular_values(weight.double(), (6, 6)), rtol=0, atol=0)


def test_fault_5_scale_is_not_divided_out():
    weight = torch.randn(4, 4, 3, 3, dtype=torch.float64)
    small, large = (irf.conv_singular_values(scale * weight, (6, 6)).amax() for scale in (0.5, 2.0))
    torch.testing.assert_close(large, 4 * small, rtol=FLOAT64, atol=0)


def test_small_numbers_raise_no_alarm():
    """Where the symbol vanishes rounding leaves an indefinite matrix, whose trace can cancel; and tiny columns."""
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        matrix = torch.randn(3, 3, 1, 1, dtype=torch.float64, generator=generator, device="cpu")
        values = irf.conv_singular_values(matrix.expand(3, 3, 1, 2), (16, 16))
        assert values[:, 8].max() <= SPECTRUM["gram"] * values.max()
    column = torch.eye(3, dtype=torch.float64)
    column[2, 0] = 1e-155
    torch.testing.assert_close(
        irf.conv_singular_values(column[:, :, None, None], (1, 1)), torch.ones(1, 1, 3, dtype=torch.float64)
    )


def test_fault_15_groups_take_the_union():
    blocks = [scale * torch.randn(3, 3, 3, 3, dtype=torch.float64) for scale in (1.0, 3.0)]
    values = irf.conv_singular_values(torch.cat(blocks), (5, 5), groups=2)
    apart = torch.cat([irf.conv_singular_values(block, (5, 5)) for block in blocks], dim=-1)
    torch.testing.assert_close(values, apart.sort(dim=-1, descending=True).values, rtol=1e-10, atol=0)
    norms = [irf.conv_singular_values(block, (5, 5)).amax() for block in blocks]
    torch.testing.assert_close(values.amax(), torch.stack(norms).max(), rtol=FLOAT64, atol=0)


def test_layouts_agree(device):
    weight = torch.randn(4, 6, 3, 3, dtype=torch.float64, device=device)
    expected = irf.conv_singular_values(weight, (6, 6))
    strided = weight.transpose(2, 3).contiguous().transpose(2, 3)
    channels_last = weight.contiguous(memory_format=torch.channels_last)
    for variant in (strided, channels_last):
        torch.testing.assert_close(irf.conv_singular_values(variant, (6, 6)), expected, rtol=FLOAT64, atol=0)


@pytest.mark.parametrize("options", [{}, {"stride": (1, 2)}, {"groups": 2}, {"dilation": 2}, {"driver": "svd"}])
def test_gradcheck(options, device):
    weight = torch.randn(4, 2, 3, 2, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: irf.conv_singular_values(w, (4, 6), **options), weight)


@needs_extension
@pytest.mark.parametrize("driver", ["gram", "svd"])
def test_opcheck(driver):
    weight = torch.randn(4, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    op = torch.ops.iresnet_fast.conv_singular_values.default
    torch.library.opcheck(op, (weight, [4, 6], [1, 2], [1, 1], 2, driver))


@needs_extension
@pytest.mark.parametrize("driver", ["gram", "svd"])
@pytest.mark.parametrize(
    ("shape", "grid", "stride", "dilation", "groups"),
    [
        ((6, 4, 3, 3), (8, 6), (2, 1), (1, 2), 2),  # from the symbol
        ((40, 33, 3, 3), (7, 6), (1, 1), (1, 1), 1),  # from the autocorrelation
        ((6, 4, 2, 3), (8, 6), (1, 1), (2, 1), 2),
        ((18, 3, 3, 3), (5, 7), (1, 1), (1, 1), 3),
        ((70, 96, 1, 1), (2, 2), (1, 1), (1, 1), 1),
        ((176, 180, 3, 3), (4, 4), (1, 1), (1, 1), 1),  # more than a thread block of a GPU holds
    ],
)
def test_extension_agrees_with_reference(device, shape, grid, stride, dilation, groups, driver):
    weight = torch.randn(shape, dtype=torch.float64, device=device)
    arguments = (weight, grid, stride, dilation, groups)
    expected = reference.conv_singular_values(*arguments, "svd")
    found = torch.ops.iresnet_fast.conv_singular_values(*arguments, driver)
    torch.testing.assert_close(found, expected, rtol=0, atol=float(SPECTRUM[driver] * expected.max()))


@needs_extension
def test_independent_of_thread_count():
    weight = torch.randn(8, 8, 3, 3, dtype=torch.float64)
    threads = torch.get_num_threads()
    results = []
    for n in (1, 2):
        torch.set_num_threads(n)
        results.append(irf.conv_singular_values(weight, (16, 16)))
    torch.set_num_threads(threads)
    torch.testing.assert_close(*results, rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    ("weight", "size", "options", "error", "message"),
    [
        ("text", (4, 4), {}, TypeError, "torch.Tensor"),
        (torch.ones(2, 2), (4, 4), {}, ValueError, "spatial axes"),
        (torch.ones(2, 2, 3, 3, dtype=torch.int32), (4, 4), {}, TypeError, "floating point"),
        (torch.ones(0, 2, 3, 3), (4, 4), {}, ValueError, "empty"),
        (torch.full((2, 2, 3, 3), float("nan")), (4, 4), {}, ValueError, "36 NaN or infinite"),
        (torch.ones(2, 2, 3, 3), None, {}, ValueError, "input_size must be an int or 2 ints, each ≥ 1, got None"),
        (torch.ones(2, 2, 3, 3), 3.5, {}, ValueError, "got 3.5"),
        (torch.ones(2, 2, 3, 3), (4,), {}, ValueError, "input_size"),
        (torch.ones(2, 2, 3, 3), (4, 0), {}, ValueError, "input_size"),
        (torch.ones(2, 2, 3, 3), (5, 4), {"stride": 2}, ValueError, "must divide"),
        (torch.ones(2, 2, 3, 3), (4, 4), {"dilation": 0}, ValueError, "dilation"),
        (torch.ones(3, 2, 3, 3), (4, 4), {"groups": 2}, ValueError, "groups=2 must divide"),
        (torch.ones(2, 2, 3, 3), (4, 4), {"driver": "qr"}, ValueError, "'gram', 'svd'"),
    ],
)
def test_bad_input(weight, size, options, error, message):
    with pytest.raises(error, match=message):
        irf.conv_singular_values(weight, size, **options)


@pytest.mark.full
@needs_extension
def test_control_c_is_heard_in_the_middle():
    """512 channels at 32×32 take many seconds; the interrupt ends them within a few."""
    program = (
        "import signal, torch, iresnet_fast as irf\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # where the tests run in the background
        "weight = torch.randn(512, 512, 3, 3)\n"
        "print('ready', flush=True)\n"
        "irf.conv_singular_values(weight, (32, 32))\n"
        "print('finished', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert "finished" not in out
    assert "KeyboardInterrupt" in err


@pytest.mark.full
@needs_extension
def test_memory_is_bounded():
    """512 channels at 32×32: 514 complex matrices are 2.2 GB, but few of them exist at a time."""
    program = (
        "import resource, torch, iresnet_fast as irf\n"
        "weight = torch.randn(512, 512, 3, 3)\n"
        "irf.conv_norm_certified(torch.randn(8, 8, 3, 3), 1.0, (32, 32))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "irf.conv_singular_values(weight, (32, 32))\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 2.0
