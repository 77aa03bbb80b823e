"""What a job is: its files, how they are cut into shards, and everything that its results depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import SpectralNorm
from .inputs import InputFile
from .operation import Operation

FORMAT = 1
# Of a group of rows that is larger than a shard, so many shards at most are read one after the other by one worker,
# and at least so many workers can share it.
_SHARDS_TOGETHER, _SHARING = 8, 4


@dataclass(frozen=True)
class Shard:
    """Rows of a file that become one file of results.

    Attributes:
        file: number of the input file.
        start: first row.
        stop: row after the last.
    """

    file: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Of its files, without their endings; determined by the rows alone."""
        return f"{self.file:05d}-{self.start:012d}"


@dataclass(frozen=True)
class Plan:
    """What the results of a job depend on.

    Attributes:
        operation: what is done.
        files: of samples.
        column: of samples, in them.
        shard_rows: rows of a shard.
        batch_size: samples that are evaluated together.
        seed: of the estimates of log-determinants.
        model: SHA-256 of the network's configuration and weights.
        dtype: in which it works.
        certificate: what is proven of it: ``guaranteed``, and the largest proven Lipschitz constant of a block.
        versions: of iresnet_fast and torch.
    """

    operation: Operation
    files: tuple[InputFile, ...]
    column: str
    shard_rows: int
    batch_size: int
    seed: int
    model: str
    dtype: str
    certificate: dict[str, Any]
    versions: dict[str, str]

    def __post_init__(self) -> None:
        for name in ("shard_rows", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def n_rows(self) -> int:
        """Samples of all files."""
        return sum(file.n_rows for file in self.files)

    def shards(self) -> Iterator[Shard]:
        """All shards, in order."""
        for index, file in enumerate(self.files):
            for start in range(0, file.n_rows, self.shard_rows):
                yield Shard(index, start, min(start + self.shard_rows, file.n_rows))

    def units(self) -> Iterator[tuple[Shard, ...]]:
        """The shards, as workers take them: several together where a file can only be read from a group's start."""
        together: list[Shard] = []
        for shard in self.shards():
            size = self.files[shard.file].group_rows // (_SHARING * self.shard_rows)
            if together and (together[0].file != shard.file or len(together) >= min(max(1, size), _SHARDS_TOGETHER)):
                yield tuple(together)
                together = []
            together.append(shard)
        if together:
            yield tuple(together)

    def batches(self, shard: Shard) -> list[tuple[int, int]]:
        """Ranges of rows that are evaluated together."""
        starts = range(shard.start, shard.stop, self.batch_size)
        return [(start, min(start + self.batch_size, shard.stop)) for start in starts]

    def first_number(self, file: int) -> int:
        """Of the file's first sample, counted through all files."""
        return self._first_numbers[file]

    @cached_property
    def _first_numbers(self) -> list[int]:
        return list(accumulate((entry.n_rows for entry in self.files), initial=0))

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON."""
        return {"format": FORMAT, **asdict(self)}

    @cached_property
    def about(self) -> dict[str, str]:
        """What a file of results says of how it was made, but not of the files it was made from."""
        return {"iresnet_fast": json.dumps({**replace(self, files=()).to_dict(), "files": len(self.files)})}

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Plan:
        """What :meth:`to_dict` gave."""
        settings = {key: value for key, value in document.items() if key != "format"}
        files = tuple(InputFile(**file) for file in settings.pop("files"))
        return cls(Operation(**settings.pop("operation")), files, **settings)

    def difference(self, document: dict[str, Any]) -> str | None:
        """What is other in a plan that was written before; None where nothing is."""
        own = json.loads(json.dumps(self.to_dict()))
        for key in {**own, **document}.keys() - {"certificate", "files"}:  # a proof's last digits depend on the machine
            if own.get(key) != document.get(key):
                return f"{key} was {json.dumps(document.get(key))}, and now is {json.dumps(own.get(key))}"
        before, now = ({file["path"]: file for file in files} for files in (document.get("files", []), own["files"]))
        for path in {**before, **now}:
            if before.get(path) != now.get(path):
                return f"{path} {'changed' if path in before and path in now else 'is in one of them only'}"
        return None if list(before) == list(now) else "its files have another order"


def versions() -> dict[str, str]:
    """Of what the results depend on."""
    return {"iresnet_fast": version("iresnet_fast"), "torch": torch.__version__}


def model_hash(model: nn.Module) -> str:
    """SHA-256 of a network's configuration, and of the names, types, shapes and values of its state.

    The vectors of power iterations are left out: evaluation fits them to the weights.
    """
    digest = hashlib.sha256(repr(getattr(model, "config", type(model).__name__)).encode())
    norms = [path for path, part in model.named_modules() if isinstance(part, SpectralNorm)]
    fitted = {f"{path}.{name}" for path in norms for name in ("_u", "_v")}
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor) and name not in fitted:
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
