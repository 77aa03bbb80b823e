"""Kills jobs at random moments for a while, and holds what comes of them to a job that nothing disturbed.

    python -m benchmarks.soak --minutes 10 --save docs/results/soak.json

starts a job, kills its processes after a random time, and goes on with it by ``--resume`` and any engine until it ends;
then its rows must be those of the undisturbed job, and ``verify`` must find nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

import iresnet_fast as irf
from iresnet_fast.whole_file import write_whole

from .jobs import ENGINES, command, results, shards_done

_ROWS, _SHARD_ROWS, _BATCH = 6000, 64, 32
# Longest time until a kill, in seconds: long enough for work to be done after the start.
_PATIENCE = 3.0
_LONGEST = {"local": 14.0, "torchrun": 18.0, "ray": 40.0}


def _prepare(folder: Path) -> None:
    """A small network of random weights, and latents, one in a hundred of them NaN."""
    torch.manual_seed(0)
    model = irf.models.IResNetClassifier.from_config("digits", blocks=(2, 2), hidden=(8, 8)).train()
    model(torch.rand(64, 1, 8, 8) - 0.5)
    irf.enforce(model.eval())
    model.save_pretrained(folder / "net")
    with torch.no_grad():
        z = model.features(torch.rand(_ROWS, 1, 8, 8) - 0.5)
    z[::100] = float("nan")
    for part in range(3):
        rows = slice(part * _ROWS // 3, (part + 1) * _ROWS // 3)
        np.savez(folder / f"z{part}.npz", z=z[rows].numpy(), id=np.arange(_ROWS)[rows])


def _run(engine: str, folder: Path, out: Path, kill_after: float | None) -> str:
    """How the job ended: ``"finished"``, ``"killed"``, or ``"refused"`` for another process that is still at work."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    sizes = ["--shard-rows", _SHARD_ROWS, "--batch-size", _BATCH]
    job = command(engine, folder / "net", folder / "z*.npz", out, "--resume", *sizes)
    with (folder / "output.txt").open("w+") as output:
        process = subprocess.Popen(job, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            code = process.wait(kill_after)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return "killed"
        output.seek(0)
        text = output.read()
    if not code:
        return "finished"
    if "is being written by process" in " ".join(text.split()):
        time.sleep(_PATIENCE)  # of torchrun's workers one was just starting, and does its part before it ends
        return "refused"
    raise SystemExit(f"{engine} ended with {code}: {text}")


def _wrong(out: Path, whole: Path) -> list[str]:
    """What is other than in the undisturbed job's results."""
    from iresnet_fast import scale  # noqa: PLC0415  (its packages are optional)

    found = scale.verify(out)
    tables = [results(folder) for folder in (out, whole)]
    if tables[0].column("id").to_pylist() != list(range(_ROWS)):
        found.append("the ids are others")
    values = [table.column("x").combine_chunks().to_numpy_ndarray() for table in tables]
    if not np.array_equal(*values, equal_nan=True):
        found.append("the values are others")
    return found


def soak(minutes: float, seed: int = 0) -> dict[str, object]:
    """Do it for so many minutes; returns the record."""
    chance, ends, finished, wrong = random.Random(seed), Counter[str](), Counter[str](), list[str]()
    amid = 0
    engines = [engine for engine in ENGINES if engine != "ray" or find_spec("ray")]
    began = time.monotonic()
    with TemporaryDirectory() as name:
        folder = Path(name)
        _prepare(folder)
        _run("local", folder, folder / "whole", None)
        while time.monotonic() - began < 60 * minutes:
            out = folder / "out"
            shutil.rmtree(out, ignore_errors=True)
            while True:
                engine, before = chance.choice(engines), shards_done(out)
                over = time.monotonic() - began >= 60 * minutes  # then the last job is led to its end
                how = _run(engine, folder, out, None if over else chance.uniform(1, _LONGEST[engine]))
                if how == "finished":
                    break
                ends[f"{engine} {how}"] += 1
                amid += how == "killed" and shards_done(out) > before
            finished[engine] += 1
            wrong += _wrong(out, folder / "whole")
            print(f"{dict(ends)}, {sum(finished.values())} jobs finished, {len(wrong)} faults", flush=True)
    return {
        "minutes": round((time.monotonic() - began) / 60, 1),
        "seed": seed,
        "rows of a job": _ROWS,
        "shards of a job": 3 * -(-_ROWS // 3 // _SHARD_ROWS),
        "ends before the job's": dict(sorted(ends.items())),
        "killed after new shards": amid,
        "jobs finished": sum(finished.values()),
        "faults": wrong,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Kill jobs at random moments, and check what comes of them.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="file for the record")
    options = parser.parse_args()
    record = soak(options.minutes, options.seed)
    text = json.dumps(record, indent=1)
    print(text)
    if options.save:
        write_whole(options.save, text + "\n")
    if record["faults"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
