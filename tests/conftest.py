"""Fixtures shared by all tests: the seed, the device, and memory that shows when it is read uninitialised."""

import os
import sys
from importlib.util import find_spec

import pytest

# Before torch is imported: deterministic cuBLAS, which deterministic algorithms ask for.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from hypothesis import settings

# Its packages are optional.
collect_ignore = [] if find_spec("pyarrow") else ["scale", "test_cli_scale.py"]

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


@pytest.fixture(autouse=True, scope="session")
def _full_float32():
    """TF32 convolutions are another function, 1e-3 away: the tests are of float32."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Every test of numerics runs on both; the CUDA half is marked gpu."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _nothing_compiled_before(request):
    """What one test compiled, or gave up to compile, is nothing to the next."""
    yield
    if request.node.get_closest_marker("full") and (dynamo := sys.modules.get("torch._dynamo")):
        dynamo.reset()
