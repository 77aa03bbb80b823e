"""Fixtures shared by all tests: the seed, the device, and memory that shows when it is read uninitialised."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("iresnet_fast", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("iresnet_fast")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _poison_uninitialised_memory():
    """torch.empty is filled with NaN, so that a kernel which reads what it never wrote fails its comparison."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Every test of numerics runs on both; the CUDA half is marked gpu."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)
