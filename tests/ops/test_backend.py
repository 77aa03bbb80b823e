"""Which backend serves an op: chosen, refused with a reason, or fallen back with one warning."""

import warnings

import pytest
import torch

import iresnet_fast as irf
from iresnet_fast import _extension
from iresnet_fast.ops._backend import REGISTRY, VARIABLE, Op

CPU = torch.device("cpu")


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setattr(_extension, "loaded", False)
    monkeypatch.setattr(_extension, "missing_reason", "it is hidden for this test. Remedy: none")


def make_op():
    return Op("conv_singular_values", {"cpu": ("extension", "reference")}, lambda device: 0.0, 1.0)


def test_reference_is_always_there(monkeypatch):
    monkeypatch.setenv(VARIABLE, "reference")
    assert all(op.choose(CPU) == "reference" for op in REGISTRY.values())


def test_unknown_choice(monkeypatch):
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(ValueError, match="'fast'; it must be one of auto, reference, stacked, triton, extension"):
        irf.conv_singular_values(torch.randn(2, 2, 3, 3), (4, 4))


def test_explicit_choice_that_cannot_be_served(monkeypatch, no_extension):
    monkeypatch.setenv(VARIABLE, "extension")
    with pytest.raises(RuntimeError, match=f"{VARIABLE}=extension, but it is hidden"):
        make_op().choose(CPU)
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(RuntimeError, match="no triton implementation for cpu"):
        make_op().choose(CPU)


def test_falls_back_with_one_warning(no_extension):
    op = make_op()
    with pytest.warns(UserWarning, match="falls back to a slower path: it is hidden for this test. Remedy"):
        assert op.choose(CPU) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert op.choose(CPU) == "reference"


@pytest.mark.parametrize("name", REGISTRY)
def test_self_tests_pass(name, device):
    op = REGISTRY[name]
    assert op.self_test(device) <= op.self_test_tolerance
