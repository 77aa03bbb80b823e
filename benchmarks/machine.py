"""The machine a figure was measured on, and its measured ceilings."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
import shlex
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import iresnet_fast
from iresnet_fast import _extension

_ROOT = Path(__file__).parent.parent
_SOURCE = Path(__file__).with_name("multiply_adds.cpp")
# Written before every timed run, so that no provider finds its inputs in a cache. Larger than any last level here.
_FLUSH_BYTES = {"cpu": 96 << 20, "cuda": 256 << 20}
_COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
_MATRIX = {"cpu": 1536, "cuda": 8192}
_DTYPES = {
    "cpu": (torch.float64, torch.float32),
    "cuda": (torch.float64, torch.float32, torch.float16, torch.bfloat16),
}


def facts(device: torch.device) -> dict[str, Any]:
    """Device, versions, commit and date, for the meta of a result file."""
    return {
        "device": device_name(device),
        "machine": slug(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "iresnet_fast": iresnet_fast.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "vectors": _extension.build_info().get("vectors") if device.type == "cpu" else None,
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def device_name(device: torch.device) -> str:
    """What the hardware calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    # Clouds hide the model behind one name for processors that differ by a factor of three; its numbers are left.
    found = [re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE) for key in ("model name", "cpu family", "model")]
    if not all(found):
        return platform.processor() or platform.machine()
    name, family, model = (match[1].strip() for match in found if match)
    return f"{name} (family {family}, model {model})"


def slug(device: torch.device) -> str:
    """Folder of this kind of machine's results."""
    name = device_name(device)
    if device.type == "cpu":
        name = f"cpu {name} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@functools.cache
def _flush_buffer(kind: str) -> torch.Tensor:
    return torch.empty(_FLUSH_BYTES[kind] // 8, dtype=torch.float64, device=kind)


def flush_caches(device: torch.device) -> None:
    """Push everything out of the last-level cache."""
    _flush_buffer(device.type).zero_()
    synchronize(device)


@contextmanager
def limited_threads(count: int | None) -> Iterator[None]:
    """Within it torch, and the BLAS that NumPy uses, have this many threads."""
    if count is None:
        yield
        return
    import threadpoolctl  # noqa: PLC0415  (needed where a case asks for it)

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpoolctl.threadpool_limits(count):
            yield
    finally:
        torch.set_num_threads(before)


def peak_memory(run: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that a call needs beyond what was resident before it; None where the system does not tell."""
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(match[1]) * 1024 if match else 0


@functools.cache
def bandwidth(kind: str, threads: int) -> float:
    """Measured copy bandwidth, bytes read and written per second, with this many threads."""
    device = torch.device(kind)
    source = torch.zeros(_COPY_BYTES[kind] // 8, dtype=torch.float64, device=device)
    target = torch.empty_like(source)
    with limited_threads(threads if kind == "cpu" else None):
        return 2 * _COPY_BYTES[kind] / best_time(lambda: target.copy_(source), device)


@functools.cache
def matrix_rate(kind: str, threads: int, dtype: torch.dtype) -> float:
    """Measured rate of a large matrix product on random data, floating-point operations per second."""
    device, n = torch.device(kind), _MATRIX[kind]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    with limited_threads(threads if kind == "cpu" else None):
        return 2 * n**3 / best_time(lambda: a @ b, device)


@functools.cache
def _multiply_adds() -> ctypes.CDLL | None:
    """The loop of multiply-adds in registers, compiled for this processor; None without a compiler."""
    with TemporaryDirectory() as folder:
        library = Path(folder) / "multiply_adds.so"
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        command = [*compiler, "-O2", "-march=native", "-shared", "-fPIC", "-Wno-psabi", "-o", str(library)]
        try:
            subprocess.run([*command, str(_SOURCE)], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            warnings.warn(
                f"{' '.join(compiler)} does not compile {_SOURCE.name}: this CPU's ceilings are of matrix products "
                "alone, and floors may be too slow. Remedy: a C++ compiler, or CXX",
                stacklevel=2,
            )
            return None
        return ctypes.CDLL(str(library))


@functools.cache
def vector_rate(threads: int, dtype: torch.dtype) -> float:
    """Measured rate of multiply-adds in a CPU's registers, floating-point operations per second; 0 without a compiler.

    A matrix product need not come near it: BLAS may not use all that a processor of another maker has.
    """
    library, rounds = _multiply_adds(), 2_000_000
    if library is None:
        return 0.0
    run = getattr(library, str(dtype).removeprefix("torch."))
    run.argtypes, run.restype = [ctypes.c_long], ctypes.c_float if dtype == torch.float32 else ctypes.c_double
    operations = 2 * threads * rounds * library.per_round(dtype.itemsize)
    with ThreadPoolExecutor(threads) as pool:
        return operations / best_time(lambda: list(pool.map(run, [rounds] * threads)), torch.device("cpu"))


def rate(kind: str, threads: int, dtype: torch.dtype) -> float:
    """The highest that was measured, of a matrix product and on a CPU in registers, operations per second."""
    return max(matrix_rate(kind, threads, dtype), vector_rate(threads, dtype) if kind == "cpu" else 0.0)


def ceilings(device: torch.device) -> dict[str, float]:
    """Copy bandwidth (bytes/s) and highest rate per dtype (operations/s), with torch's number of threads."""
    kind, threads = device.type, torch.get_num_threads()
    rates = {str(dtype).removeprefix("torch."): rate(kind, threads, dtype) for dtype in _DTYPES[kind]}
    return {"copy": bandwidth(kind, threads), **rates}


def best_time(run: Callable[[], Any], device: torch.device, repeats: int = 7) -> float:
    """Fastest of some runs after a warm-up: ceilings are what the machine can do."""
    run()
    times = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def _commit() -> str | None:
    """The commit, marked where the tree has changes beside results; None outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changes else commit
