"""Checks of GPU kernels on machines without a GPU: interpreter, ahead-of-time compilation, nvcc."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# Shared memory that one program may have, in bytes, by architecture.
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: bytes of shared memory and of stack (spills go there), registers per thread."""

    shared: int
    stack: int
    registers: int


def require_triton():
    return pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture
def interpret():
    """Run a program that launches Triton kernels in the interpreter; it prints one JSON document, which is returned.

    In a process of its own: whether Triton interprets is decided when it is imported. Programs run one after the
    other, so races are invisible, and bfloat16 ``tl.dot`` is not to be trusted.
    """
    require_triton()

    def run(program):
        import os

        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture
def compile_ahead(tmp_path):
    """Compile a Triton kernel for an architecture without a driver, and read what its cubin takes."""
    triton = require_triton()

    def compile_for(kernel, architecture, signature, constants, aligned=False, **options):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        # As a launch specialises where integers and pointers are divisible by 16.
        names = [i for i, name in enumerate(kernel.arg_names) if signature[name] not in ("fp32", "constexpr")]
        attributes = {(index,): [["tt.divisibility", 16]] for index in names} if aligned else None
        source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
        target = GPUTarget("cuda", architecture, 32)
        compiled = triton.compile(source, target=target, options=options)
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run(
            [tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
        number = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
        return Resources(compiled.metadata.shared, number["STACK"] + number["LOCAL"], number["REG"])

    return compile_for


@pytest.fixture
def nvcc(tmp_path):
    """Compile one .cu for an architecture with nvcc, and read ptxas's report for every kernel in it."""
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("no nvcc on the PATH")

    def compile_for(source, architecture):
        command = [compiler, "-std=c++20", "-O3", f"-arch=sm_{architecture}", "-I", ROOT / "csrc", "-Xptxas", "-v"]
        command += ["-Werror", "all-warnings", "-cubin", "-o", tmp_path / "kernel.cubin", source]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        kernels = re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
            r"(?:.*?(\d+) bytes smem)?",
            done.stderr,
            re.DOTALL,
        )
        assert kernels, done.stderr
        return [Resources(int(smem or 0), int(s) + int(a) + int(b), int(r)) for s, a, b, r, smem in kernels]

    return compile_for
