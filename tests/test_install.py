"""Installing: with a compiler, without one, without torch; the build decides what it should."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in {"CXX", "FORCE_CUDA", "PYTHONPATH"}}
PROGRAM = """
import torch, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import iresnet_fast as irf
    for _ in range(2):
        irf.conv_singular_values(torch.randn(2, 2, 3, 3), (4, 4))
print(irf.__file__)
print(irf._extension.loaded)
print([str(warning.message) for warning in caught])
"""


@pytest.fixture
def source(tmp_path):
    """What a clone has: the sources without anything built."""
    copy = tmp_path / "source"
    ignored = shutil.ignore_patterns("*.so", "build", ".venv*", ".git", "*.egg-info", "demo", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


def run(*command, cwd, expect=0, **environment):
    done = subprocess.run(
        command, cwd=cwd, env={**ENVIRONMENT, **environment}, capture_output=True, text=True, check=False
    )
    assert (done.returncode == 0) == (expect == 0), done.stdout + done.stderr
    return done


def install(source, **environment):
    """Install as the README says, into a folder of its own; returns the folder and what was printed."""
    target = source.parent / "site"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-v",
        "--no-build-isolation",
        "--no-deps",
        "--target",
        str(target),
        ".",
    ]
    done = run(*pip, cwd=source, **environment)
    return target, done.stdout + done.stderr


def run_program(site):
    """Run PROGRAM with this installation; -S keeps the development installation's finder out."""
    search = os.pathsep.join([str(site), sysconfig.get_paths()["purelib"]])
    return run(sys.executable, "-S", "-c", PROGRAM, cwd=site.parent, PYTHONPATH=search).stdout.splitlines()


@pytest.mark.full
def test_install_with_a_compiler(source):
    site, _ = install(source)
    path, loaded, warned = run_program(site)
    assert path.startswith(str(site))
    assert (loaded, warned) == ("True", "[]")


@pytest.mark.full
def test_install_without_a_compiler(source):
    site, printed = install(source, CXX="/bin/false")
    assert "no C++20 compiler ('/bin/false') that finds Python.h; installing iresnet_fast without" in printed
    path, loaded, warned = run_program(site)
    assert path.startswith(str(site))
    assert loaded == "False"
    assert warned.count("falls back to a slower path") == 1
    assert "Remedy: install g++" in warned


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"PYTHONPATH": "stub"},
            "there is none here. Remedy: pip install torch, then pip install --no-build-isolation .",
        ),
        ({"FORCE_CUDA": "1"}, "FORCE_CUDA=1, but CUDA code cannot be built"),
    ],
)
def test_build_that_cannot_be_done_is_one_line(source, environment, message):
    import torch

    if "FORCE_CUDA" in environment and torch.version.cuda:
        pytest.skip("this torch has CUDA")
    stub = source / "stub"
    stub.mkdir()
    (stub / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    done = run(sys.executable, "setup.py", "--version", cwd=source, expect=1, **environment)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.full
@pytest.mark.skipif(not (ROOT / ".venv" / ".built").exists(), reason="not set up by make")
def test_second_setup_does_nothing():
    assert "pip" not in run("make", "--dry-run", "setup", cwd=ROOT).stdout
