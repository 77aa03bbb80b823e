"""A job by Ray Data: a pool of actors, each with a network, on one machine or a cluster."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..certificate import certify
from ..optional import require
from .folder import ResultFolder, ShardRecord
from .job import Outcome, Report, opened
from .operation import Evaluator
from .plan import Plan
from .work import Lost, work

# Ray Data's own tasks need processors beside those of the actors, or a resumed job waits for ever.
_SPARE_CPUS = 2
# Tasks for each actor: more share the work more evenly, and each costs time.
_TASKS = 64


def run_with_ray(
    load: Callable[[], nn.Module],
    plan: Plan,
    out: Path,
    *,
    resume: bool = False,
    address: str | None = None,
    workers: int | None = None,
    threads: int = 1,
    report: Report = lambda found: None,
) -> Outcome:
    """Do a job by actors of Ray, which replaces those that die.

    Args:
        load: makes the network; it is called by every actor, and must be picklable.
        plan: of the job.
        out: folder of results, and inputs as the plan has them, on a file system that all actors see.
        resume: go on with the job in ``out``.
        address: of a cluster, as :func:`ray.init` takes it. Default: what Ray is connected to already, or
            ``$RAY_ADDRESS``, or this machine.
        workers: actors. Default: one for each GPU, or where there is none for each ``threads`` processors.
        threads: of each actor on a CPU.
        report: told of every shard.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ValueError: more workers than GPUs, where there are any.
        BusyError, FileExistsError, ValueError, InputError, OSError: as :func:`iresnet_fast.scale.run`.
    """
    require("the engine ray", "ray")
    import ray  # noqa: PLC0415  (an optional package)

    address = address or os.environ.get("RAY_ADDRESS")
    with _connected(ray, address, (workers or 0) * threads), opened(plan, out, resume=resume) as (folder, _):
        resources = ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        actors = workers or gpus or max(1, (cpus - _SPARE_CPUS) // threads)
        if gpus and actors > gpus:
            raise ValueError(f"{actors} workers need a GPU each, and there are {gpus}. Remedy: --workers {gpus}")
        units = len(list(plan.units()))
        lost: list[Lost] = []
        if units:
            found = (
                ray.data.range(units, override_num_blocks=min(units, _TASKS * actors))
                .map_batches(
                    _Worker,
                    batch_size=1,
                    compute=ray.data.ActorPoolStrategy(size=min(actors, units)),
                    fn_constructor_kwargs={"load": load, "plan": plan, "out": out.absolute(), "threads": threads},
                    num_cpus=1 if gpus else min(threads, max(cpus - _SPARE_CPUS, 1) / actors),
                    num_gpus=1 if gpus else 0,
                )
                .iter_rows()
            )
            for row in found:
                shard = Lost(row["name"], row["reason"]) if row["reason"] else _record(row)
                report(shard)
                if isinstance(shard, Lost):
                    lost.append(shard)
        return Outcome(folder.conclude(plan), tuple(lost))


class _Worker:
    """What an actor does."""

    def __init__(self, load: Callable[[], nn.Module], plan: Plan, out: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        model = load().to("cuda" if torch.cuda.is_available() else "cpu")
        certify(model)
        self._plan, self._units = plan, list(plan.units())
        self._evaluator, self._folder = Evaluator(model, plan.operation), ResultFolder(out)

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, list[Any]]]:
        for unit in batch["id"].tolist():
            for found in work(self._plan, self._units[unit], self._evaluator, self._folder):
                empty = ShardRecord(found.name, 0, 0, 0, "", 0.0)
                reason = found.reason if isinstance(found, Lost) else ""
                row = {**asdict(empty if isinstance(found, Lost) else found), "reason": reason}
                yield {key: [value] for key, value in row.items()}


def _record(row: dict[str, Any]) -> ShardRecord:
    return ShardRecord(**{key: value for key, value in row.items() if key != "reason"})


@contextmanager
def _connected(ray: Any, address: str | None, cpus: int) -> Iterator[None]:
    """Ray as it is, or started for the while."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"address": address}
    with ExitStack() as afterwards:
        if not address:
            options = {"num_cpus": max(os.cpu_count() or 1, cpus, 2) + _SPARE_CPUS, "include_dashboard": False}
            if "RAY_AUTH_TOKEN" not in os.environ:
                # A secret in the environment: Ray would otherwise put one into the home folder.
                os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
                afterwards.callback(os.environ.pop, "RAY_AUTH_TOKEN", None)
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
        afterwards.callback(ray.shutdown)
        yield
