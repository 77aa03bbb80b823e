"""What a job will take, from one batch of it."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from .inputs import numbered, read
from .operation import Evaluator
from .plan import Plan


@dataclass(frozen=True)
class Estimate:
    """What a job will take.

    Attributes:
        n_rows: samples of the job.
        n_measured: samples that were measured.
        samples_per_second: of one worker like this one.
        seconds: of one worker, for all of it.
        output_bytes: of all results.
        peak_bytes: of memory, of a worker: on the device, or of the process on a CPU.
        failed: of the measured samples, how many did not converge.
        device: that measured.
    """

    n_rows: int
    n_measured: int
    samples_per_second: float
    seconds: float
    output_bytes: int
    peak_bytes: int
    failed: int
    device: str


def estimate(model: nn.Module, plan: Plan) -> Estimate:
    """Do the first batch of a job twice, and time the second; nothing is written.

    Raises:
        ValueError: the job has no samples.
    """
    file = next((entry for entry in plan.files if entry.n_rows), None)
    if file is None:
        raise ValueError("the files have no samples to measure")
    evaluator = Evaluator(model, plan.operation)
    (table,) = read(file, plan.column, [(0, min(plan.batch_size, file.n_rows))])
    table = numbered(table, 0)
    for _ in range(2):
        began = time.perf_counter()
        result = evaluator(table, column=plan.column, seed=plan.seed)
        seconds = time.perf_counter() - began
    sink = pa.BufferOutputStream()
    pq.write_table(result, sink, compression="none", use_dictionary=False)
    device = next(model.parameters(), torch.empty(0)).device
    rate = result.num_rows / seconds
    return Estimate(
        plan.n_rows,
        result.num_rows,
        rate,
        plan.n_rows / rate,
        round(sink.tell() / result.num_rows * plan.n_rows),
        _peak(device),
        result.column("converged").to_pylist().count(False),
        str(device),
    )


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
