"""Jobs that are killed, starved and raced, as whole processes; every engine."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import iresnet_fast as irf
from benchmarks.jobs import ENGINES, command, results, shards_done
from iresnet_fast import scale
from tests.helpers import small_classifier
from tests.scale.conftest import table

pytestmark = [pytest.mark.full, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
# The command, and then its peak memory.
MEASURE = """
import resource
from iresnet_fast.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
# Every process that a test starts.
_STARTED = []


@pytest.fixture(autouse=True)
def no_leftovers():
    """A test that fails leaves nothing at work beside the next one."""
    yield
    for process in _STARTED:
        kill(process)
    _STARTED.clear()


def job_command(engine, folder, out, *more, **options):
    sizes = ["--shard-rows", 64, "--batch-size", 32]
    return command(engine, folder / "net", folder / "z*.parquet", out, *sizes, *more, **options)


def environment(folder):
    """With a home folder of its own, so that what is left in it is seen."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "COV"))}
    return {**kept, "HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(engine, folder, out, *more, **options):
    process = subprocess.Popen(
        job_command(engine, folder, out, *more, **options),
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    _STARTED.append(process)
    return process


def finish(engine, folder, out, *more, expect=0, **options):
    process = start(engine, folder, out, *more, **options)
    text, _ = process.communicate(timeout=240)
    assert process.returncode == expect, text
    return text


def kill(process):
    """The process, and workers that were too young to know that they end with it: they would do all that is left."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    out = process.args[process.args.index("--output") + 1]
    for pid, (_, line) in _processes().items():
        if f"--output {out} " in line:
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A folder with a network and 3000 latents of it in three files, and the results of an undisturbed job."""
    folder = tmp_path_factory.mktemp("faults")
    torch.manual_seed(0)
    model = small_classifier(inject=3)
    model.save_pretrained(folder / "net")
    generator = np.random.default_rng(0)
    shape = model.latent_shape

    with torch.no_grad():
        z = model.features(torch.from_numpy(generator.normal(size=(3000, 1, 8, 8)).astype(np.float32) / 4))
    assert z.shape[1:] == shape
    for part in range(3):
        rows = range(1000 * part, 1000 * (part + 1))
        pq.write_table(table([f"s{row}" for row in rows], z[rows]), folder / f"z{part}.parquet", row_group_size=200)
    finish("local", folder, folder / "whole")
    return folder


def check(job, out):
    """Every id once, and every value as of the job that nothing disturbed."""
    whole, found = results(job / "whole"), results(out)
    assert found.column("id").to_pylist() == [f"s{row}" for row in range(3000)]
    assert found.equals(whole)
    assert scale.verify(out) == []
    assert not list(out.rglob("*.part"))


@pytest.mark.parametrize("engine", ["local", *(pytest.param(name, marks=pytest.mark.soak) for name in ENGINES[1:])])
def test_killed_at_random_moments_five_times(job, tmp_path, engine):
    chance, done = random.Random(engine), [0]
    for attempt in range(5):
        process = start(engine, job, tmp_path / "out", "--resume")
        # At any time, and in the midst of the work, in turn.
        seconds = 200 if attempt % 2 else chance.uniform(0, 12 if engine == "ray" else 6)
        _wait_for_shards(process, tmp_path / "out", done[-1] + chance.randint(1, 6), seconds)
        kill(process)
        done.append(shards_done(tmp_path / "out"))
    assert 0 < done[2] < done[4] < 48
    finish(engine, job, tmp_path / "out", "--resume")
    check(job, tmp_path / "out")
    assert list((job / "home").iterdir()) == []


@pytest.mark.soak
@pytest.mark.parametrize("engine", ["torchrun", "ray"])
def test_a_worker_that_is_killed(job, tmp_path, engine):
    """Ray replaces it; torchrun ends the others, and the same command goes on."""
    process = start(engine, job, tmp_path / "out", "--resume")
    _wait_for_shards(process, tmp_path / "out", 3)
    os.kill(_worker(process.pid, "_Worker" if engine == "ray" else "iresnet_fast"), signal.SIGKILL)
    text, _ = process.communicate(timeout=240)
    if engine == "torchrun":
        assert process.returncode != 0
        finish(engine, job, tmp_path / "out", "--resume")
    else:
        assert process.returncode == 0, text
    check(job, tmp_path / "out")


@pytest.mark.soak
def test_torchrun_replaces_a_worker_where_it_is_told_to(job, tmp_path):
    process = start("torchrun", job, tmp_path / "out", restarts=2)
    _wait_for_shards(process, tmp_path / "out", 3)
    os.kill(_worker(process.pid, "iresnet_fast"), signal.SIGKILL)
    text, _ = process.communicate(timeout=240)
    assert process.returncode == 0, text
    check(job, tmp_path / "out")


@pytest.mark.soak
def test_a_worker_that_cannot_read_lets_the_others_finish(job, tmp_path):
    (tmp_path / "net").symlink_to(job / "net")
    for part in range(3):
        shutil.copy(job / f"z{part}.parquet", tmp_path)
    process = start("torchrun", tmp_path, tmp_path / "out")
    _wait_for_shards(process, tmp_path / "out", 1)
    kill(process)
    path = tmp_path / "z1.parquet"
    data = bytearray(path.read_bytes())
    data[3000:200_000] = bytes(197_000)  # between the blocks by which it is recognised, and not in its footer
    samples = [(len(data) - 4096) * index // 15 for index in range(16)]
    whole = path.read_bytes()
    for start_of in samples:
        data[start_of : start_of + 4096] = whole[start_of : start_of + 4096]
    path.write_bytes(data)
    time.sleep(2)
    text = finish("torchrun", tmp_path, tmp_path / "out", "--resume", expect=1)
    assert "z1.parquet cannot be read" in text
    names = {path.stem for path in (tmp_path / "out" / "records").glob("*.json")}
    assert {name for name in names if not name.startswith("00001")} == {
        f"{part:05d}-{first:012d}" for part in (0, 2) for first in range(0, 1000, 64)
    }
    path.write_bytes(whole)
    finish("torchrun", tmp_path, tmp_path / "out", "--resume")
    check(job, tmp_path / "out")


def _wait_for_shards(process, out, count, seconds=200):
    """Until there are so many, or the time is over."""
    deadline = time.monotonic() + seconds
    while shards_done(out) < count and time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)


def _processes():
    """Parent and command line of every process."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit():
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                found[int(entry.name)] = (
                    parent,
                    (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"),
                )
        except OSError:
            continue  # it has ended
    return found


def _worker(parent, name):
    """A process below another whose command line has the name."""
    processes = _processes()
    below = {parent}
    while more := {pid for pid, (of, _) in processes.items() if of in below} - below:
        below |= more
    return next(pid for pid in sorted(below - {parent}, reverse=True) if name in processes[pid][1])


def test_two_jobs_at_once(job, tmp_path):
    first = start("local", job, tmp_path / "out")
    while not (tmp_path / "out" / "plan.json").is_file():
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGSTOP)
    text = finish("local", job, tmp_path / "out", "--resume", expect=1)
    assert f"is being written by process {first.pid}" in text
    os.kill(first.pid, signal.SIGCONT)
    first.communicate(timeout=120)
    assert first.returncode == 0
    check(job, tmp_path / "out")


def test_a_disk_that_is_full(job, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        assert "No space left on device" in finish("local", job, disk / "out", expect=1)
        assert list((disk / "out" / "records").glob("*.json"))
        subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
        finish("local", job, disk / "out", "--resume")
        check(job, disk / "out")
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("engine", ENGINES)
def test_bad_samples_and_empty_files(job, tmp_path, engine):
    (tmp_path / "net").symlink_to(job / "net")
    given = pq.read_table(job / "z0.parquet")
    values = given.column("z").combine_chunks().to_numpy_ndarray().copy()
    values[[0, 500, 999]] = np.nan
    fixed = given.set_column(1, "z", pa.FixedShapeTensorArray.from_numpy_ndarray(values))
    pq.write_table(fixed, tmp_path / "z0.parquet")
    pq.write_table(given.slice(0, 0), tmp_path / "z1.parquet")
    text = finish(engine, tmp_path, tmp_path / "out", "--strict", expect=1)
    if engine != "torchrun":  # whose last process may be one that does not speak
        assert "997 converged, 3 failed" in text
    assert scale.verify(tmp_path / "out") == []
    failures = pq.read_table(tmp_path / "out" / "failures.parquet").to_pylist()
    assert [row["id"] for row in failures] == ["s0", "s500", "s999"]


@pytest.mark.soak
def test_memory_does_not_grow_with_the_number_of_samples(tmp_path):
    """Ten times the samples are 400 MB more to read, and as many to write."""
    peaks = []
    torch.manual_seed(0)
    shape = (3, 32, 32)
    model = irf.models.IResNetClassifier.from_config("digits", in_shape=shape, blocks=(1,), hidden=(2,)).train()
    model(torch.randn(8, *shape))
    model.eval().save_pretrained(tmp_path / "net")
    samples = np.random.default_rng(0).normal(size=(4000, *shape)).astype(np.float32)
    for factor in (1, 10):
        folder = tmp_path / str(factor)
        folder.mkdir()
        (folder / "net").symlink_to(tmp_path / "net")
        ids = np.random.default_rng(0).permutation(4000 * factor)
        with pq.ParquetWriter(folder / "z.parquet", table(ids[:1], torch.from_numpy(samples[:1])).schema) as writer:
            for part in range(factor):
                rows = ids[4000 * part : 4000 * (part + 1)]
                writer.write_table(table(rows, torch.from_numpy(samples)), row_group_size=500)
        # With a tolerance that the first iteration meets: it is the memory that is measured.
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, *job_command("local", folder, folder / "out", "--tol", "10")[3:]],
            env=environment(folder),
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout.split("peak ")[1]))
        assert json.loads((folder / "out" / "manifest.json").read_text())["rows"] == 4000 * factor
    assert peaks[1] < 1.1 * peaks[0]
