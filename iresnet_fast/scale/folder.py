"""The folder of a job's results: shards that are there whole with a record each, and what is made of them at the end.

``data/NAME.parquet`` has the results of a shard, ``records/NAME.json`` says that they are whole, and their checksum. A
job that is resumed takes the records for claims, until it has read the results again. ``plan.json`` is what the results
depend on. When all shards are there, ``failures.parquet`` has the rows that did not converge, and ``manifest.json``
every count and checksum.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..whole_file import replacing, sweep, write_whole
from .ids import SCRATCH
from .operation import ID
from .plan import FORMAT, Plan, Shard
from .proofs import Proofs

DATA, RECORDS, CLAIMS, PLAN, LOCK = "data", "records", "claims", "plan.json", "lock"
MANIFEST, FAILURES = "manifest.json", "failures.parquet"


@dataclass(frozen=True)
class ShardRecord:
    """What was written of a shard.

    Attributes:
        name: of the shard.
        rows: how many.
        failed: of them, how many did not converge.
        n_bytes: of the file of results.
        sha256: of the file of results.
        seconds: of the work on it, wall time.
    """

    name: str
    rows: int
    failed: int
    n_bytes: int
    sha256: str
    seconds: float


class ResultFolder:
    """The folder of a job's results.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def data(self, name: str) -> Path:
        """The file of a shard's results."""
        return self.path / DATA / f"{name}.parquet"

    @property
    def begun(self) -> bool:
        """Whether a job has begun in it."""
        return (self.path / PLAN).is_file()

    def join(self, plan: Plan) -> None:
        """Work on the job in the folder.

        Raises:
            ValueError: it has another plan; the message says what differs.
        """
        if (why := plan.difference(self.read_plan())) is not None:
            raise ValueError(f"the job in {self.path} is another: {why}. Remedy: its settings, or another folder")

    def check(self, plan: Plan, *, resume: bool) -> None:
        """Raise where a job cannot begin in the folder, or go on.

        Raises:
            FileExistsError: there is something in it, and ``resume`` is off.
            ValueError: as :meth:`join`.
        """
        if self.begun:
            if not resume:
                raise FileExistsError(f"{self.path} has a job's results. Remedy: --resume to go on, or another folder")
            self.join(plan)
        elif others := [entry.name for entry in self.path.iterdir() if entry.name != LOCK and entry.name[0] != "."]:
            raise FileExistsError(f"{self.path} is not empty: it has {others[0]}. Remedy: another folder")

    def prepare(self, plan: Plan, *, doubt: bool) -> None:
        """Begin a job, or go on with it, where no process is working on it now.

        Args:
            plan: of the job.
            doubt: whether what is there has to be read again before it is believed.
        """
        for leftover in self.path.glob(f"{SCRATCH}*"):
            shutil.rmtree(leftover)
        sweep(self.path)
        if not self.begun:
            write_whole(self.path / PLAN, json.dumps(plan.to_dict(), indent=1) + "\n")
        for part in (DATA, RECORDS, CLAIMS):
            (self.path / part).mkdir(exist_ok=True)
            sweep(self.path / part)
        if doubt:
            for path in (self.path / RECORDS).glob("*.json"):
                path.replace(self.path / CLAIMS / path.name)
            for name in (MANIFEST, FAILURES):
                (self.path / name).unlink(missing_ok=True)

    def read_plan(self) -> dict[str, Any]:
        """What the job in the folder depends on.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, or of a newer version.
        """
        path = self.path / PLAN
        if not path.is_file():
            raise FileNotFoundError(f"{self.path} has no job's results: there is no {PLAN}")
        try:
            document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if document.get("format", 0) > FORMAT:
            raise ValueError(f"{path} is of a newer version. Remedy: pip install --upgrade iresnet_fast")
        return document

    @contextmanager
    def writer(self, shard: Shard, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
        """Write the results of a shard; they are in their place when it ends well."""
        tensors = [field.name for field in schema if isinstance(field.type, pa.FixedShapeTensorType)]
        packed = {field.name: "none" if field.name in tensors else "zstd" for field in schema}
        with (
            replacing(self.data(shard.name)) as beside,
            pq.ParquetWriter(beside, schema, compression=packed, use_dictionary=False) as writer,
        ):
            yield writer

    def commit(self, shard: Shard, failed: int, seconds: float) -> ShardRecord:
        """Record that the results of a shard are whole."""
        path = self.data(shard.name)
        rows = shard.stop - shard.start
        record = ShardRecord(shard.name, rows, failed, path.stat().st_size, checksum(path), seconds)
        write_whole(self.path / RECORDS / f"{shard.name}.json", json.dumps(asdict(record)))
        return record

    def record(self, name: str, part: str = RECORDS) -> ShardRecord | None:
        """What was written of a shard; None where that is missing or damaged."""
        try:
            return ShardRecord(**json.loads((self.path / part / f"{name}.json").read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def regain(self, shard: Shard) -> ShardRecord | None:
        """The record of a shard that was done before, if what it claims still holds."""
        if (record := self.record(shard.name)) is not None:
            return record
        claim = self.record(shard.name, CLAIMS)
        if claim is None or not self.holds(shard, claim):
            return None
        (self.path / CLAIMS / f"{shard.name}.json").replace(self.path / RECORDS / f"{shard.name}.json")
        return claim

    def holds(self, shard: Shard, record: ShardRecord) -> bool:
        """Whether the results of a shard are those of a record."""
        path = self.data(shard.name)
        if record.rows != shard.stop - shard.start or not path.is_file() or path.stat().st_size != record.n_bytes:
            return False
        return checksum(path) == record.sha256

    def conclude(self, plan: Plan) -> dict[str, Any] | None:
        """Write ``failures.parquet`` and ``manifest.json`` where every shard has a record; returns the counts.

        Several processes may do so at once: they write the same.
        """
        records = [record for shard in plan.shards() if (record := self.record(shard.name)) is not None]
        if len(records) < sum(1 for _ in plan.shards()):
            return None
        shutil.rmtree(self.path / CLAIMS, ignore_errors=True)  # of what was made again
        for part in (DATA, RECORDS):  # of workers that were replaced
            sweep(self.path / part)
        self._collect_failures(records)
        rows, failed = sum(record.rows for record in records), sum(record.failed for record in records)
        counts = {
            "rows": rows,
            "converged": rows - failed,
            "failed": failed,
            "shards": len(records),
            "bytes": sum(record.n_bytes for record in records),
            "worker_seconds": round(sum(record.seconds for record in records), 3),
            "proof": self._count_proofs(records),
        }
        files = [{"file": f"{DATA}/{record.name}.parquet", **asdict(record)} for record in records]
        write_whole(
            self.path / MANIFEST, json.dumps({**counts, "plan": plan.to_dict(), "files": files}, indent=1) + "\n"
        )
        return counts

    def _count_proofs(self, records: Sequence[ShardRecord]) -> dict[str, Any] | None:
        proofs = Proofs()
        for record in records:
            proofs.add(self.data(record.name))
        return proofs.to_dict()

    def _collect_failures(self, records: Sequence[ShardRecord]) -> None:
        """The rows that did not converge, a shard at a time."""
        # The first shard is read in any case, for the type of the ids.
        chosen = [record for index, record in enumerate(records) if record.failed or not index]
        tables = (self._failures(record.name) for record in chosen)
        with replacing(self.path / FAILURES) as beside:
            first = next(tables, pa.table({ID: pa.array([], pa.int64()), "reason": pa.array([], pa.string())}))
            with pq.ParquetWriter(beside, first.schema) as writer:
                for table in chain([first], tables):
                    writer.write_table(table)

    def _failures(self, name: str) -> pa.Table:
        table = pq.read_table(self.data(name), columns=[ID, "converged", "reason"])
        rows = table.filter(pc.invert(table.column("converged"))).drop_columns("converged")
        return rows.append_column("shard", pa.array([name] * rows.num_rows, pa.string()))


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
