"""The C++ algorithms on their own, and the whole extension, under sanitizers of memory, behaviour and races."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

# Shapes with every option, both drivers and the certificate; exits with an error where a value is wrong.
EXERCISE = """
import torch
import iresnet_fast as irf
from iresnet_fast import _extension
assert _extension.loaded, _extension.missing_reason
torch.manual_seed(0)
for shape, size, options in [
    ((4, 3, 3, 3), (6, 5), {}), ((3, 5, 2, 4), (7, 7), {"dilation": 2}), ((6, 2, 3, 3), (4, 6), {"groups": 2}),
    ((5, 4, 3, 3), (6, 6), {"stride": 2}), ((2, 2, 9), (5,), {}), ((3, 2, 2, 2, 2), (3, 3, 2), {}),
    ((70, 33, 1, 1), (4, 4), {}), ((1, 1, 1), (1,), {}), ((4, 3, 3, 3), (13, 13), {}),
    ((6, 2, 3, 3), (26, 26), {"stride": 2, "groups": 3}),
]:
    weight = torch.randn(shape, dtype=torch.float64)
    values = irf.conv_singular_values(weight, size, **options)
    exact = irf.conv_singular_values(weight, size, driver="svd", **options)
    assert (values - exact).abs().max() <= 3e-8 * exact.max(), shape
    irf.ops.conv_symbol(weight, size, **options)
    norm = float(exact.max())
    for tau in (0.999 * norm, 1.001 * norm):
        unit = (weight, list(size), *([options.get(key, 1)] * len(size) for key in ("stride", "dilation")))
        proven = torch.ops.iresnet_fast.conv_norm_below(*unit, options.get("groups", 1), tau, 1e-12)
        assert bool(proven) == (tau > norm), (shape, tau, norm)
layers = [(5, 3, 6, 7, 6, 7, 3, 3, 1, 1), (9, 7, 1, 1, 1, 1, 1, 1, 0, 0), (4, 6, 6, 6, 7, 3, 2, 4, 1, 0),
          (1, 2, 2, 2, 2, 2, 5, 5, 2, 2), (16, 16, 8, 8, 8, 8, 3, 3, 1, 1), (40, 26, 7, 9, 7, 9, 3, 3, 1, 1),
          (4, 9, 40, 40, 40, 40, 3, 3, 1, 1)]
weights, u, v = [], [], []
for c_in, c_out, h_in, w_in, h_out, w_out, kh, kw, *_ in layers:
    weights.append(torch.randn(c_out, c_in, kh, kw))
    u.append(torch.randn(c_out, h_out, w_out))
    v.append(torch.randn(c_in, h_in, w_in))
sizes = [number for layer in layers for number in layer]
for n in (0, 3):
    found = torch.ops.iresnet_fast.power_iteration_cpu(weights, u, v, [0.5] * len(layers), sizes, n)
    out = torch.ops.iresnet_fast.power_iteration_backward_cpu(weights, *found, [0.5] * len(layers), sizes)
    assert all(bool(part.isfinite().all()) for part in (*found, out))
from iresnet_fast.reference.branches import ACTIVATIONS
for dtype in (torch.float32, torch.float64):
    for name in ACTIVATIONS:
        for widths, rows in (((2, 6, 2), 1), ((34, 130, 34), 60), ((4, 4), 0), ((6, 2, 10, 6), 25)):
            weights = [torch.randn(b, a, dtype=dtype) for a, b in zip(widths, widths[1:])]
            weights = [0.9 * w / torch.linalg.matrix_norm(w, 2) for w in weights]
            y = torch.randn(rows, widths[0], dtype=dtype) * 10 ** torch.randn(rows, 1, dtype=dtype)
            y[rows // 2 :, 0] *= float("nan") if rows == 25 else 1
            found = irf.ops.mlp_inverse(y, weights, None, [name] * len(widths), lipschitz=0.9, tol=1e-4)
            assert bool(found.converged[: rows // 2].all()), (name, widths)
irf.nn.InvertibleResidualBlock(irf.nn.LipschitzMLP(3)).eval().inverse(torch.randn(2, 3))
"""


@pytest.mark.full
@pytest.mark.parametrize(("name", "sanitizers"), [("hermitian", SANITIZE), ("hermitian_team", ["-fsanitize=thread"])])
def test_algorithms(tmp_path, name, sanitizers):
    """The team's are those of a GPU's thread block: a barrier that it lacks is a race here."""
    program = tmp_path / name
    source = ROOT / "tests" / "native" / f"{name}_test.cpp"
    flags = ["-O1", "-g", "-std=c++20", "-fno-math-errno", "-Wno-psabi", "-pthread", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", *flags, *sanitizers, str(source), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.full
def test_extension(tmp_path):
    """The package, built with the sanitizers in a folder of its own."""
    build, objects = tmp_path / "build", tmp_path / "objects"
    plain = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "iresnet_fast", build / "iresnet_fast", ignore=plain)
    flags = " ".join(SANITIZE)
    # In place of the optimisation that setup.py asks for, which takes twice as long to compile.
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O1\n')
    compiler.chmod(0o755)
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        build,
        "--build-temp",
        objects,
    ]
    environment = {
        **os.environ,
        "CFLAGS": flags,
        "CXXFLAGS": flags,
        "LDFLAGS": flags,
        "CXX": str(compiler),
        "MAX_JOBS": "2",
    }
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    (library,) = (build / "iresnet_fast").glob("*.so")
    assert b"__asan_init" in library.read_bytes()
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {**os.environ, "LD_PRELOAD": ":".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [sys.executable, "-c", EXERCISE], cwd=build, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
