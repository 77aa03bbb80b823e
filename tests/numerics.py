"""For the conftest of a folder of numerics: ``from tests.numerics import default_device``."""

import pytest
import torch


@pytest.fixture(autouse=True)
def default_device(device):
    """Every test runs on each device: tensors made without naming one are on that of the test's half."""
    if device.type == "cpu":
        yield
        return
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)
