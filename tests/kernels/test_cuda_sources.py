"""csrc/cuda compiles for every supported architecture, without spills; the whole extension where torch has CUDA."""

import pytest

from tests.kernels.conftest import ROOT

SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def test_there_are_sources():
    assert SOURCES


@pytest.mark.full
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_compiles_without_spills(nvcc, source, architecture):
    for kernel in nvcc(source, architecture):
        assert kernel.stack == 0
        assert kernel.registers <= 128


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_has_no_torch_headers(source):
    """So that nvcc takes seconds, and can check it on any machine."""
    for path in (source, source.with_suffix(".cuh")):
        text = path.read_text(encoding="utf-8")
        assert "ATen" not in text
        assert "#include <torch" not in text
