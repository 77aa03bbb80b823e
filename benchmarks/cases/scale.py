"""Jobs over files: what they cost over a bare loop, and what a second worker brings."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

import iresnet_fast as irf

from ..case import Case, Problem, Promise, Provider
from ..jobs import command, results

_TOL, _BATCH = 1e-5, 128
_APART = 0.01  # seconds; a worker's last and next shard, whose times are rounded, never overlap by so much
_STEADY, _START = "steady ms a sample", "start-up s"


@dataclass(frozen=True)
class _Set:
    """Images, their latents, and a file of these."""

    x: Tensor
    z: Tensor
    file: Path


def _network(device: torch.device) -> irf.models.IResNetClassifier:
    """The network of ``mnist-small``, initialised by data and with its constants proven."""
    torch.manual_seed(0)
    model = irf.models.IResNetClassifier.from_config("mnist-small").to(device).train()
    model(torch.rand(64, 1, 28, 28, device=device) - 0.5)
    irf.enforce(model.eval())
    return model


def _sets(model: irf.models.IResNetClassifier, n: int, count: int, folder: Path) -> Iterator[_Set]:
    import numpy as np  # noqa: PLC0415

    device = next(model.parameters()).device
    for index in range(count):
        x = torch.rand(n, 1, 28, 28, device=device) - 0.5
        with torch.no_grad():
            z = torch.cat([model.features(part) for part in x.split(_BATCH)])
        np.save(folder / f"z{index}.npy", z.cpu().numpy())
        yield _Set(x, z, folder / f"z{index}.npy")


def _overhead(device: torch.device, n: int, folder: Path) -> Problem:
    """In one process: the loop that everyone writes, and a job from file to files."""
    model = _network(device)
    missing = None if find_spec("pyarrow") else "pyarrow is not installed"

    def loop(given: _Set) -> Tensor:
        with torch.no_grad():
            return torch.cat([model.solve_inverse(z, tol=_TOL).x for z in given.z.split(_BATCH)]).cpu()

    def job(given: _Set) -> Path:
        from iresnet_fast import scale  # noqa: PLC0415  (its packages are optional)

        out = folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        plan = scale.make_plan(model, scale.Operation("invert", _TOL), [str(given.file)], batch_size=_BATCH)
        scale.run(model, plan, out)
        return out

    return Problem(
        name=f"{n} samples, one process, {device.type}",
        inputs=list(_sets(model, n, 3, folder)),
        oracle=lambda given: given.x.cpu(),
        providers=[
            Provider("bare loop", loop, 1e-4),
            Provider("iresnet_fast, job on files", job, 1e-4, result=_read, missing=missing),
        ],
        promises=[Promise("iresnet_fast, job on files", "bare loop", 1.1, 1.05, quantity="share")] * (not missing),
        threads=1,
    )


def _read(out: Path) -> Tensor:
    return torch.from_numpy(results(out).column("x").combine_chunks().to_numpy_ndarray().copy())


def _launch(engine: str, workers: int, folder: Path) -> Callable[[_Set], dict[str, Any]]:
    """A whole command, with what of its time is start-up and what is work."""

    def run(given: _Set) -> dict[str, Any]:
        out = folder / f"{engine}-{workers}"
        shutil.rmtree(out, ignore_errors=True)
        sizes = ["--tol", _TOL, "--batch-size", _BATCH, "--shard-rows", 3 * _BATCH]
        job = command(engine, folder / "net", given.file, out, *sizes, workers=workers)
        began = time.time()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(job, check=True, capture_output=True, env=environment)
        records = [(path.stat().st_mtime, json.loads(path.read_text())) for path in (out / "records").iterdir()]
        assert not any(record["failed"] for _, record in records)
        spans = [(end - record["seconds"], end, record["rows"]) for end, record in records]
        return {"out": out, _START: min(spans)[0] - began, _STEADY: 1e3 * _pace(spans, workers)}

    return run


def _pace(spans: Sequence[tuple[float, float, int]], workers: int) -> float:
    """Seconds for each sample while all workers were at work, from beginnings, ends and sizes of what they did."""

    def at_work(moment: float) -> int:
        return sum(start <= moment <= end for start, end, _ in spans)

    first = min(start for start, _, _ in spans if at_work(start + _APART) >= workers)
    last = max(end for _, end, _ in spans if at_work(end - _APART) >= workers)
    shares = ((min(end, last) - max(start, first)) / (end - start) for start, end, _ in spans)
    return (last - first) / sum(max(0.0, share) * rows for share, (_, _, rows) in zip(shares, spans, strict=True))


def _workers(n: int, folder: Path) -> Problem:
    """The same file by one worker and by two, of one thread each."""
    model = _network(torch.device("cpu"))
    model.save_pretrained(folder / "net")
    engines = [("torchrun", None), ("ray", None if find_spec("ray") else "Ray is not installed")]
    providers = [
        Provider(
            f"{engine}, {workers} worker{'s' * (workers > 1)}",
            _launch(engine, workers, folder),
            1e-4,
            result=lambda output: _read(output["out"]),
            counts=lambda output: {key: output[key] for key in (_START, _STEADY)},
            missing=missing,
            outside=True,
        )
        for engine, missing in engines
        for workers in (1, 2)
    ]
    return Problem(
        name=f"{n} samples, whole commands, cpu",
        inputs=list(_sets(model, n, 1, folder)),
        oracle=lambda given: given.x,
        providers=providers,
        promises=[
            Promise(f"{engine}, 2 workers", f"{engine}, 1 worker", 1 / 1.8, 1 / 1.9, quantity="share", of=_STEADY)
            for engine, missing in engines
            if not missing
        ],
        threads=1,
    )


def _problems(device: torch.device, quick: bool) -> Iterator[Problem]:
    with TemporaryDirectory() as folder:
        yield _overhead(device, 256 if quick else 2048, Path(folder))
        if device.type == "cpu" and not quick:
            yield _workers(96 * _BATCH, Path(folder))


CASE = Case("Jobs over files of latents: inverse with bounds, read and written", _problems)
