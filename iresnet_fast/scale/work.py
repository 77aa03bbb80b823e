"""One worker's work: units of shards, read ahead of the network and written behind it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import pyarrow as pa

from .folder import ResultFolder, ShardRecord
from .inputs import InputError, numbered, read
from .operation import Evaluator
from .plan import Plan, Shard

_T = TypeVar("_T")


@dataclass(frozen=True)
class Lost:
    """A shard that could not be read.

    Attributes:
        name: of the shard.
        reason: why.
    """

    name: str
    reason: str


def work(
    plan: Plan, unit: tuple[Shard, ...], evaluator: Evaluator, folder: ResultFolder
) -> Iterator[ShardRecord | Lost]:
    """Do the shards of a unit that are not there yet, and tell of each as it is done.

    Raises:
        OSError: results cannot be written; what was written before is kept.
    """
    wanted = []
    for shard in unit:
        if (record := folder.regain(shard)) is not None:
            yield record
        else:
            wanted.append(shard)
    if not wanted:
        return
    batches = [(shard, batch) for shard in wanted for batch in plan.batches(shard)]
    file = plan.files[wanted[0].file]
    done = 0
    try:
        tables = _ahead(read(file, plan.column, [batch for _, batch in batches]))
        for shard in wanted:
            yield _do(plan, shard, evaluator, folder, tables)
            done += 1
    except InputError as error:
        yield from (Lost(shard.name, str(error)) for shard in wanted[done:])


def _do(
    plan: Plan, shard: Shard, evaluator: Evaluator, folder: ResultFolder, tables: Iterator[pa.Table]
) -> ShardRecord:
    began, failed = time.perf_counter(), 0
    results = _evaluated(plan, shard, evaluator, tables)
    first = next(results)
    with folder.writer(shard, first.schema.with_metadata(plan.about)) as writer, ThreadPoolExecutor(1) as thread:
        written: Future[None] | None = None
        for result in chain([first], results):
            failed += result.column("converged").to_pylist().count(False)
            if written is not None:
                written.result()
            written = thread.submit(writer.write_table, result.replace_schema_metadata(plan.about))
        if written is not None:
            written.result()
    return folder.commit(shard, failed, round(time.perf_counter() - began, 3))


def _evaluated(plan: Plan, shard: Shard, evaluator: Evaluator, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    number = plan.first_number(shard.file)
    for start, _ in plan.batches(shard):
        table = numbered(next(tables), number + start)
        yield evaluator(table, column=plan.column, seed=plan.seed + number + start)


def _ahead(items: Iterator[_T]) -> Iterator[_T]:
    """The same items, the next of which is made while one is used."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, items, None)
            yield item


def work_through(
    plan: Plan,
    units: Iterable[tuple[Shard, ...]],
    evaluator: Evaluator,
    folder: ResultFolder,
    report: Callable[[ShardRecord | Lost], None],
) -> list[Lost]:
    """Do units in turn; returns the shards that could not be read."""
    lost = []
    for unit in units:
        for found in work(plan, unit, evaluator, folder):
            report(found)
            if isinstance(found, Lost):
                lost.append(found)
    return lost
