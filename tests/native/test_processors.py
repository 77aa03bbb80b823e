"""The compiled ops on the other kinds of processor that this one can stand for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from iresnet_fast import _extension

ROOT = Path(__file__).parents[2]
TESTS = ["power_iteration", "mlp_inverse", "conv_spectrum"]
VECTORS = {"default": "baseline", "avx2": "AVX2", "avx512": "AVX-512"}
FOUND = _extension.build_info().get("vectors", "baseline")
FEWER = list(VECTORS)[: list(VECTORS.values()).index(FOUND)]


@pytest.mark.full
@pytest.mark.skipif(not FEWER, reason="the processor's vectors are the baseline's, or there is no extension")
@pytest.mark.parametrize("capability", FEWER)
def test_ops_with_fewer_instructions(capability):
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    ask = "from iresnet_fast import _extension; print(_extension.build_info()['vectors'])"
    found = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == VECTORS[capability]
    files = [ROOT / "tests" / "ops" / f"test_{name}.py" for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not full and not gpu", *files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
