"""One job at a time in a folder."""

import multiprocessing
import os
import signal
import time

import pytest

from iresnet_fast.scale import BusyError
from iresnet_fast.scale.lock import locked


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr("iresnet_fast.scale.lock._PATIENCE", 0.2)


def hold(path, job, shared, ready):
    with locked(path, job) as lock:
        if shared:
            lock.share()
        ready.set()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """Starts another process that has the lock."""
    context = multiprocessing.get_context("fork")
    started = []

    def start(job, *, shared):
        ready = context.Event()
        started.append(context.Process(target=hold, args=(tmp_path / "lock", job, shared, ready)))
        started[-1].start()
        assert ready.wait(30)
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.mark.parametrize("shared", [False, True])
def test_another_job_is_refused_and_the_first_is_named(tmp_path, holder, shared):
    process = holder("first", shared=shared)
    with (
        pytest.raises(BusyError, match=f"is being written by process {process.pid} on .*Remedy"),
        locked(tmp_path / "lock", "second"),
    ):
        pass


def test_processes_of_one_job_share_it(tmp_path, holder):
    holder("job", shared=True)
    with locked(tmp_path / "lock", "job") as lock:
        assert not lock.alone
        assert lock.rejoined


def test_it_ends_with_the_process_however_that_ends(tmp_path, holder):
    process = holder("first", shared=False)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with locked(tmp_path / "lock", "second") as lock:
        assert lock.alone
        assert not lock.rejoined
        lock.share()
    with locked(tmp_path / "lock", "second") as lock:
        assert lock.alone
        assert lock.rejoined
