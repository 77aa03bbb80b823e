"""A job from its files to its folder, by the processes of one launch."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..certificate import Certificate, certify
from .folder import LOCK, ResultFolder, ShardRecord
from .ids import check_ids
from .inputs import InputError, describe, find
from .lock import Lock, locked
from .operation import Evaluator, Operation
from .plan import Plan, model_hash, versions
from .work import Lost, work_through

Report = Callable[[ShardRecord | Lost], None]
# Samples of a file of results, and of a batch: at most so many, and so many bytes.
_SHARD, _BATCH = (8192, 256 << 20), (1024, 64 << 20)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Outcome:
    """What a process of a job did.

    Attributes:
        counts: of the whole job, as its manifest has them; None while shards are missing.
        lost: shards that could not be read here.
    """

    counts: dict[str, Any] | None
    lost: tuple[Lost, ...]


@dataclass(frozen=True)
class Place:
    """Which process of a job this is.

    Attributes:
        rank: its number.
        count: of processes.
        local: its number on this machine.
        job: what the processes of the launch have in common.
    """

    rank: int = 0
    count: int = 1
    local: int = 0
    job: str = ""

    @classmethod
    def of_torchrun(cls, environment: Mapping[str, str] = os.environ) -> Place:
        """As ``torchrun`` says by environment variables; no process group is formed.

        Raises:
            ValueError: it does not.
        """
        try:
            rank, count, local = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
            names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
            return cls(rank, count, local, ":".join(environment[name] for name in names))
        except KeyError as error:
            raise ValueError(
                f"the engine torchrun needs the environment variable {error.args[0]}. Remedy: torchrun "
                "--nproc-per-node N -m iresnet_fast invert ... --engine torchrun"
            ) from None


def end_with_parent() -> None:
    """Have this process end when the one that started it does, where the system can: orphans would keep the lock."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    except AttributeError:  # no Linux
        return


def make_plan(
    model: nn.Module,
    operation: Operation,
    inputs: Sequence[str],
    *,
    column: str | None = None,
    shard_rows: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> Plan:
    """What a job of these files by this network is; certifies the network.

    Args:
        model: in evaluation mode.
        operation: what is done.
        inputs: paths and patterns of files.
        column: of samples, in the files. Default: ``z`` to invert, else ``x``.
        shard_rows: rows of a file of results. Default: 8192, or 256 MiB of samples.
        batch_size: samples that are evaluated together, fewer where memory runs out. Default: 1024, or 64 MiB of them.
        seed: of the estimates of log-determinants.

    Raises:
        InputError: files that are missing or cannot be read; all of them are named.
    """
    name = column or operation.column
    shape = Evaluator(model, operation).shape
    files, errors = [], []
    for path in find(inputs):
        try:
            files.append(describe(path, name, shape))
        except InputError as error:
            errors.append(str(error))
    if errors:
        raise InputError("; ".join(errors))
    digest, certificate = model_hash(model), certify(model)
    weight = next(model.parameters(), torch.empty(0))
    size = math.prod(shape or (1,)) * weight.element_size()
    rows = _at_most(_SHARD, size) if shard_rows is None else shard_rows
    together = _at_most(_BATCH, size) if batch_size is None else batch_size
    return Plan(
        operation,
        tuple(files),
        name,
        rows,
        min(together, rows),
        seed,
        digest,
        str(weight.dtype).removeprefix("torch."),
        _proven(certificate),
        versions(),
    )


def _at_most(limits: tuple[int, int], sample_bytes: int) -> int:
    return max(1, min(limits[0], limits[1] // sample_bytes))


def _proven(certificate: Certificate) -> dict[str, Any]:
    return {"guaranteed": certificate.guaranteed, "largest_lipschitz": certificate.largest_lipschitz}


@contextmanager
def opened(plan: Plan, out: Path, *, resume: bool = False, job: str = "") -> Iterator[tuple[ResultFolder, Lock]]:
    """The folder of a job and its lock, prepared once by the first of its processes, locked until the last has left.

    Raises:
        BusyError: another job is working there.
        FileExistsError: it has something, and ``resume`` is off.
        ValueError: it has the results of another job.
        InputError: duplicate ids.
    """
    out.mkdir(parents=True, exist_ok=True)
    folder = ResultFolder(out)
    with locked(out / LOCK, job or uuid.uuid4().hex) as lock:
        _prepare(plan, folder, lock, resume)
        yield folder, lock


def _prepare(plan: Plan, folder: ResultFolder, lock: Lock, resume: bool) -> None:
    if not lock.alone:
        folder.join(plan)
        return
    folder.check(plan, resume=resume or lock.rejoined)
    if not folder.begun:
        check_ids(plan.files, folder.path)
    folder.prepare(plan, doubt=not lock.rejoined)  # what processes of this launch did, they have just done
    lock.share()


def run(
    model: nn.Module,
    plan: Plan,
    out: Path,
    *,
    resume: bool = False,
    place: Place | None = None,
    report: Report = lambda found: None,
) -> Outcome:
    """Do this process's part of a job: all of it, or every so many-th unit.

    Args:
        model: in evaluation mode, on the device where it is to work; certified, as :func:`make_plan` does.
        plan: of the job.
        out: folder of results.
        resume: go on with the job in ``out``; results that are damaged are made again.
        place: which process this is. Default: the only one.
        report: told of every shard.

    Raises:
        BusyError, FileExistsError, ValueError, InputError: as :func:`opened`.
        OSError: results cannot be written. What was written is kept.
    """
    place = place or Place()
    evaluator = Evaluator(model, plan.operation)
    with opened(plan, out, resume=resume, job=place.job) as (folder, lock):
        units = (unit for index, unit in enumerate(plan.units()) if index % place.count == place.rank)
        lost = work_through(plan, units, evaluator, folder, report)
        if lost:
            lock.outlast()  # a process that fails would end the others of its launch
        return Outcome(folder.conclude(plan), tuple(lost))
