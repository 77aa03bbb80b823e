"""Weights and inverses beside the oldest torch that is supported, in an environment of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENVIRONMENT = ROOT / ".venv-oldest"
PACKAGES = [
    "torch==2.11.0",
    "setuptools>=77,<82",
    "ninja",
    "numpy",
    "pytest",
    "pytest-timeout",
    "hypothesis",
    "typer",
    "rich",
]
TESTS = ["weights", "checkpoint", "transforms", "inverse", "fuse", "spectral_norm", "recompute"]


def run(*command, cwd, **environment):
    # Beside this environment's own: the threads of a build and of a solve would starve each other.
    keep = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "FORCE_CUDA"}}
    done = subprocess.run(
        command, cwd=cwd, env={**keep, **environment}, capture_output=True, text=True, check=False, timeout=800
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def python():
    """An interpreter with that torch; kept for the next run, as .venv is."""
    interpreter, stamp = ENVIRONMENT / "bin" / "python", ENVIRONMENT / ".packages"
    if not stamp.exists():
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
        pip = [interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        code, printed = run(*pip, *PACKAGES, cwd=ROOT)
        if code:
            pytest.skip(f"torch 2.11 cannot be installed here: {printed.strip().splitlines()[-1]}")
        stamp.touch()
    return interpreter


@pytest.mark.full
def test_weights_and_inverses_under_torch_2_11(python, tmp_path):
    copy = tmp_path / "source"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("*.so", "build", ".*", "demo", "__pycache__"))
    install = ["pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--editable", "."]
    code, printed = run(python, "-m", *install, cwd=copy)
    assert code == 0, printed
    code, printed = run(
        python, "-c", "import torch, iresnet_fast; print(torch.__version__, iresnet_fast._extension.loaded)", cwd=copy
    )
    assert printed.startswith("2.11.0"), printed
    assert printed.strip().endswith("True"), printed
    files = [f"tests/nn/test_{name}.py" for name in TESTS]
    code, printed = run(python, "-m", "pytest", "-q", "-m", "not gpu", "--show-capture=no", *files, cwd=copy)
    assert code == 0, printed
