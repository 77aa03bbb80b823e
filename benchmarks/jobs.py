"""Jobs of ``iresnet-fast invert`` over files: their commands, and what they leave."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

ENGINES = ("local", "torchrun", "ray")


def command(
    engine: str, net: Path, files: Path, out: Path, *options: object, workers: int = 2, restarts: int = 0
) -> list[str]:
    """The command for a job, with workers of one thread each; ``local`` has one, torchrun may restart its own."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    launch = [*launch, f"--max-restarts={restarts}"] if engine == "torchrun" else []
    ending = ["--engine", engine, "--threads", 1, *(["--workers", workers] if engine == "ray" else []), *options]
    called = ["-m", "iresnet_fast", "invert", net, "--input", files, "--output", out, *ending]
    return [sys.executable, *launch, *map(str, called)]


def shards_done(out: Path) -> int:
    """Shards with a record, those included that a resumed job has yet to check."""
    return sum(1 for part in ("records", "claims") for _ in (out / part).glob("*.json"))


def results(out: Path) -> pa.Table:
    """All rows, in the order of the files."""
    import pyarrow as pa  # noqa: PLC0415  (of the optional packages)
    import pyarrow.parquet as pq  # noqa: PLC0415

    return pa.concat_tables([pq.read_table(path) for path in sorted((out / "data").glob("*.parquet"))])
