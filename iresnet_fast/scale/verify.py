"""Whether a folder of results is what its plan and its inputs say."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .folder import DATA, FAILURES, MANIFEST, ResultFolder
from .inputs import InputError, describe, read
from .operation import ID
from .plan import Plan, Shard
from .proofs import Proofs


def verify(out: Path, report: Callable[[int, int], None] = lambda done, total: None) -> list[str]:
    """Read a folder of results and its inputs again.

    The inputs have the sizes and samples of bytes that they had. Every shard is there with its checksum, and its ids
    are those of its input's rows, in their order; there is no other file among them; the counts of the manifest and the
    failures are those of the shards.

    Args:
        out: folder of results.
        report: told how many of how many rows were read.

    Returns:
        What is wrong, one sentence each; empty where nothing is.

    Raises:
        FileNotFoundError: the folder has no job's results.
        ValueError: its plan is damaged, or of a newer version.
    """
    folder = ResultFolder(out)
    plan = Plan.from_dict(folder.read_plan())
    wrong = list(_inputs(plan))
    if wrong:
        return wrong
    names: set[str] = set()
    rows = failed = read_rows = 0
    proofs = Proofs()
    for shard in plan.shards():
        names.add(f"{shard.name}.parquet")
        record = folder.record(shard.name)
        if record is None or not folder.holds(shard, record):
            wrong.append(f"{folder.data(shard.name)} is missing or damaged. Remedy: the same command with --resume")
        else:
            table = pq.read_table(folder.data(shard.name), columns=[ID, "converged"])
            proofs.add(folder.data(shard.name))
            rows, failed = rows + table.num_rows, failed + table.column("converged").to_pylist().count(False)
            if not table.column(ID).equals(_ids(plan, shard)):
                wrong.append(f"{folder.data(shard.name)} has other ids than {plan.files[shard.file].path}")
        read_rows += shard.stop - shard.start
        report(read_rows, plan.n_rows)
    strange = sorted(path.name for path in (out / DATA).iterdir() if path.name not in names)
    wrong += [f"{out / DATA / name} is none of the job's files. Remedy: remove it" for name in strange]
    return wrong or list(_totals(out, rows, failed, proofs.to_dict()))


def _inputs(plan: Plan) -> Iterator[str]:
    for file in plan.files:
        try:
            if describe(file.path, plan.column) != file:
                had = f"{file.n_rows} rows in {file.n_bytes} bytes"
                yield f"{file.path} is not what it was: it had {had}, or other values"
        except InputError as error:
            yield str(error)


def _ids(plan: Plan, shard: Shard) -> pa.ChunkedArray:
    file = plan.files[shard.file]
    if file.has_ids:
        (table,) = read(file, ID, [(shard.start, shard.stop)])
        return table.column(ID)
    first = plan.first_number(shard.file)
    return pa.chunked_array([pa.array(range(first + shard.start, first + shard.stop), pa.int64())])


def _totals(out: Path, rows: int, failed: int, proof: dict[str, Any] | None) -> Iterator[str]:
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        failures = pq.read_metadata(out / FAILURES).num_rows
    except (OSError, ValueError) as error:
        yield f"the job is not concluded: {error}. Remedy: the same command with --resume"
        return
    if (manifest["rows"], manifest["failed"]) != (rows, failed):
        said = f"{manifest['rows']} rows and {manifest['failed']} failed"
        yield f"{MANIFEST} counts {said}, there are {rows} and {failed}"
    if manifest.get("proof", proof) != proof:
        yield f"{MANIFEST} says {manifest['proof']} of what is proven, the results say {proof}"
    if failures != failed:
        yield f"{FAILURES} has {failures} rows, and {failed} samples did not converge"
