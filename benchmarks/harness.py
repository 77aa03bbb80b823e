"""Measures a problem: every provider checked against the oracle first, then timed in turn."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from . import machine
from .case import Problem, Promise, Provider, Work

# Rounds in which every provider runs once; more until the budget of seconds is spent.
_MIN_ROUNDS, _MAX_ROUNDS = 3, 200


@dataclass
class Row:
    """One provider on one problem; times are in seconds, and absent where none may be printed.

    Attributes:
        case: name of the case.
        problem: name of the problem.
        provider: name of the provider.
        status: "measured", "inexact" (its error exceeds its tolerance), "missing" or "failed".
        error: achieved error against the float64 oracle; None where it did not run.
        tolerance: the largest error that is timed.
        reason: why there is no timing.
        wall: median wall time; on a GPU the time between events on the stream.
        wall_iqr: interquartile range of it.
        cpu: median CPU time of all threads; None where other processes do the work.
        rounds: timed runs.
        peak_bytes: memory needed beyond the inputs; None like ``cpu``.
        speedup: over the baseline, the first provider that was measured.
        work: the least work (flops, bytes, dtype) with the ceilings (flops_per_s, bytes_per_s) that it was held
            against; None where it is not stated.
        floor: the least time for that work at the measured ceilings.
        floor_ratio: wall over floor.
        threads: of the CPU.
        counts: what it took besides time, by name.
        peer: whether it is another library.
        promises: each with what was promised and achieved, and whether it is met.
        study: the problem's place in a study of scaling, or None.
    """

    case: str
    problem: str
    provider: str
    status: str
    error: float | None
    tolerance: float
    reason: str | None = None
    wall: float | None = None
    wall_iqr: float | None = None
    cpu: float | None = None
    rounds: int = 0
    peak_bytes: int | None = None
    speedup: float | None = None
    work: dict[str, Any] | None = None
    floor: float | None = None
    floor_ratio: float | None = None
    threads: int = 0
    counts: dict[str, float] = field(default_factory=dict)
    peer: bool = False
    promises: list[dict[str, Any]] = field(default_factory=list)
    study: dict[str, Any] | None = None


def measure(case: str, problem: Problem, device: torch.device, budget: float) -> list[Row]:
    """Check and time all providers of a problem within about ``budget`` seconds of timed rounds."""
    # Each problem compiles afresh: what another left would make torch.compile give up and run eagerly.
    torch._dynamo.reset()
    compiling = torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=64)
    with compiling, machine.limited_threads(problem.threads if device.type == "cpu" else None):
        rows = [check_provider(case, problem, provider, device) for provider in problem.providers]
        able = [
            (row, provider) for row, provider in zip(rows, problem.providers, strict=True) if row.status == "measured"
        ]
        _time(able, problem, device, budget)
        works = [_held_against_ceilings(provider.work or problem.work, device) for provider in problem.providers]
    baseline = next((row.wall for row in rows if row.wall is not None), None)
    for row, work in zip(rows, works, strict=True):
        row.threads = problem.threads or torch.get_num_threads()
        row.study = asdict(problem.study) if problem.study else None
        row.work = work
        row.floor = max(work["flops"] / work["flops_per_s"], work["bytes"] / work["bytes_per_s"]) if work else None
        if row.wall is not None:
            row.speedup = baseline / row.wall if baseline is not None else None
            row.floor_ratio = row.wall / row.floor if row.floor else None
    by_name = {row.provider: row for row in rows}
    for promise in problem.promises:
        by_name[promise.provider].promises.append(_judge(promise, by_name))
    return rows


def check_provider(case: str, problem: Problem, provider: Provider, device: torch.device) -> Row:
    """Run the provider once on every input, which warms it up, and compare with the oracle."""
    row = Row(case, problem.name, provider.name, "measured", None, provider.tolerance, peer=provider.peer)
    if provider.missing is not None:
        row.status, row.reason = "missing", provider.missing
        return row
    try:
        oracle = provider.oracle or problem.oracle
        errors = []
        for inputs in problem.inputs:
            output = provider.run(inputs)
            errors.append(problem.error(provider.result(output), oracle(inputs)))
        if not provider.outside:
            row.peak_bytes = machine.peak_memory(lambda: provider.run(problem.inputs[0]), device)
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "no message")
        row.status, row.reason = "failed", f"{type(error).__name__}: {first}"
        return row
    row.error = max(errors)
    if not math.isfinite(row.error):
        row.status, row.error, row.reason = "inexact", None, "its result has NaN, infinite values or another shape"
        return row
    if not row.error <= provider.tolerance:
        row.status, row.reason = "inexact", f"error {row.error:.1e} above {provider.tolerance:.0e}"
    return row


def _time(able: Sequence[tuple[Row, Provider]], problem: Problem, device: torch.device, budget: float) -> None:
    """Time the providers in turn, A B C A B C …, each run on the next input and with cold caches."""
    walls: dict[str, list[float]] = {row.provider: [] for row, _ in able}
    cpus: dict[str, list[float]] = {row.provider: [] for row, _ in able}
    counts: dict[str, list[dict[str, float]]] = {row.provider: [] for row, _ in able}
    started, rounds = time.perf_counter(), 0
    while able and rounds < _MAX_ROUNDS and (rounds < _MIN_ROUNDS or time.perf_counter() - started < budget):
        inputs = problem.inputs[rounds % len(problem.inputs)]
        for row, provider in able:
            wall, cpu, found = _timed_run(provider, inputs, device)
            walls[row.provider].append(wall)
            cpus[row.provider].append(cpu)
            counts[row.provider].append(found)
        rounds += 1
    for row, provider in able:
        lower, row.wall, upper = statistics.quantiles(walls[row.provider], n=4)
        row.wall_iqr = upper - lower
        row.cpu = None if provider.outside else statistics.median(cpus[row.provider])
        row.counts = {
            name: statistics.median(found[name] for found in counts[row.provider]) for name in counts[row.provider][0]
        }
        row.rounds = rounds


def _timed_run(provider: Provider, inputs: Any, device: torch.device) -> tuple[float, float, dict[str, float]]:
    machine.flush_caches(device)
    cpu = time.process_time()
    if device.type == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        output = provider.run(inputs)
        last.record()
        last.synchronize()
        wall = first.elapsed_time(last) / 1e3
    else:
        started = time.perf_counter()
        output = provider.run(inputs)
        wall = time.perf_counter() - started
    return wall, time.process_time() - cpu, provider.counts(output)


def _held_against_ceilings(work: Work | None, device: torch.device) -> dict[str, Any] | None:
    if work is None:
        return None
    threads = torch.get_num_threads()
    return {
        "flops": work.flops,
        "bytes": work.bytes,
        "dtype": str(work.dtype).removeprefix("torch."),
        "flops_per_s": machine.rate(device.type, threads, work.dtype),
        "bytes_per_s": machine.bandwidth(device.type, threads),
    }


def _judge(promise: Promise, rows: dict[str, Row]) -> dict[str, Any]:
    """What was promised, what was achieved, and whether that meets it."""
    ours = _figure(rows[promise.provider], promise.of)
    other = _figure(rows[promise.against], promise.of) if promise.against else None
    achieved = None
    if promise.quantity == "value":
        achieved = ours
    elif ours is not None and other is not None:
        achieved = other / ours if promise.quantity == "speedup" else ours / other
    verdict = "not measured"
    if achieved is not None:
        sign = 1 if promise.quantity == "speedup" else -1
        met, aimed = (sign * achieved >= sign * target for target in (promise.must, promise.aim))
        verdict = "aim met" if aimed else "met" if met else "not met"
    return {**asdict(promise), "achieved": achieved, "verdict": verdict}


def _figure(row: Row, name: str) -> float | None:
    """A time, the error, or a count of a row that was measured."""
    if row.status != "measured":
        return None
    figure: float | None = row.counts[name] if name in row.counts else getattr(row, name)
    return figure
