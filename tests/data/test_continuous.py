"""From integers to what networks take."""

import pytest
import torch

from iresnet_fast.data import centered, dequantize, midpoints


def test_dequantize():
    images = torch.randint(256, (100, 3, 4, 4), dtype=torch.uint8)
    x = dequantize(images)
    assert x.dtype == torch.float32
    assert x.min() >= 0
    assert x.max() <= 1
    assert torch.equal((x * 256).floor().clamp_max(255).to(torch.uint8), images)
    noise = x * 256 - images
    assert float(noise.mean()) == pytest.approx(0.5, abs=0.02)
    assert dequantize(torch.full((1000,), 16), 17).max() <= 1
    assert dequantize(images[:0]).shape == (0, 3, 4, 4)


def test_midpoints_and_centered():
    images = torch.randint(17, (100, 1, 4, 4), dtype=torch.uint8)
    images[0, 0, 0, :2] = torch.tensor([0, 16])
    middle, x = midpoints(images, 17), centered(images, 17)
    assert middle.dtype == x.dtype == torch.float32
    assert (middle - (images.double() + 0.5) / 17).abs().max() < 1e-7
    assert (x - (images.double() / 16 - 0.5)).abs().max() < 1e-7
    assert (float(x.min()), float(x.max())) == (-0.5, 0.5)
    torch.testing.assert_close(
        torch.stack([dequantize(images, 17) for _ in range(1000)]).mean(0), middle, atol=4e-3, rtol=0
    )
    assert midpoints(images[:0], 17).shape == centered(images[:0], 17).shape == (0, 1, 4, 4)


@pytest.mark.parametrize("function", [dequantize, midpoints, centered])
def test_what_is_not_of_the_levels(function):
    with pytest.raises(TypeError, match=f"{function.__name__} takes integers, got torch.float32"):
        function(torch.rand(3))
    with pytest.raises(ValueError, match=r"integers of 32 levels are in \[0, 31\], got 0 to 40"):
        function(torch.tensor([0, 40]), 32)
