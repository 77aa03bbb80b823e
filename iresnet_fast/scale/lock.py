"""One job at a time in a folder; its processes share the lock, which ends with them, however they end."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# A process that has just taken the lock says within this time who it is.
_PATIENCE = 5.0
_POLL = 0.05


class BusyError(OSError):
    """Another job is working in the folder."""


class Lock:
    """The lock of a folder, as one process of a job has it.

    Attributes:
        alone: whether no other process has it now, and none can have it before :meth:`share`.
        rejoined: whether a process of the same job was the last to have it alone.
    """

    def __init__(self, descriptor: int, path: Path, job: str, *, alone: bool, rejoined: bool) -> None:
        self._descriptor, self._path, self._job = descriptor, path, job
        self.alone, self.rejoined = alone, rejoined

    def share(self) -> None:
        """Let the job's other processes in, which wait while this one prepares the folder.

        Raises:
            BusyError: another job was quicker.
        """
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)
        if (owner := _owner(self._descriptor)).get("job") != self._job:  # there is a moment between the two locks
            raise _busy(self._path, owner)

    def outlast(self) -> None:
        """Wait until no other process has the lock."""
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)


@contextmanager
def locked(path: Path, job: str) -> Iterator[Lock]:
    """Have the lock: alone, until :meth:`Lock.share`, where no other process has it, else together with its job's.

    Args:
        path: of the lock's file. It stays, with who had it last.
        job: what the processes of the job have in common.

    Raises:
        BusyError: processes of another job have it; the message names one.
        OSError: the file system has no locks.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield _take(descriptor, path, job)
    finally:
        os.close(descriptor)


def _take(descriptor: int, path: Path, job: str) -> Lock:
    began = time.monotonic()
    while True:
        if _try(descriptor, fcntl.LOCK_EX):
            rejoined = _owner(descriptor).get("job") == job
            _write(descriptor, job)
            return Lock(descriptor, path, job, alone=True, rejoined=rejoined)
        if _try(descriptor, fcntl.LOCK_SH):
            if _owner(descriptor).get("job") == job:
                return Lock(descriptor, path, job, alone=False, rejoined=True)
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        owner = _owner(descriptor)
        if owner.get("job") != job and time.monotonic() - began > _PATIENCE:
            raise _busy(path, owner)
        time.sleep(_POLL)


def _busy(path: Path, owner: dict[str, Any]) -> BusyError:
    who = f"process {owner['pid']} on {owner['host']}, since {owner['since']}" if owner else "another process"
    return BusyError(f"{path.parent} is being written by {who}. Remedy: wait for it, or another folder")


def _try(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _owner(descriptor: int) -> dict[str, Any]:
    try:
        owner: dict[str, Any] = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return owner


def _write(descriptor: int, job: str) -> None:
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    text = json.dumps({"job": job, "host": socket.gethostname(), "pid": os.getpid(), "since": since}).encode()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text, 0)
