"""One process at a time on a run directory."""

import contextlib
import fcntl
import json
import os
import socket
import time
import weakref
from pathlib import Path
from types import TracebackType
from typing import Self

from llm.errors import UserError

NAME = 'run.lock'


class RunLock:
    """An exclusive lock on a run directory, from `acquire` (or `with`) to `release` or the end of the process.

    The lock is the kernel's (`flock`): it goes with the process however that dies, so a file left behind means
    nothing. The file's content, pid, host and start time, only serves to name the holder. Jobs of many processes take
    it on process 0 only.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.path = Path(directory) / NAME
        self._descriptor: int | None = None

    def acquire(self) -> Self:
        """Take the lock, making the directory if need be.

        Raises:
            UserError: another process holds it, naming pid and host; the directory is a file; or the lock's file cannot
                be written or locked.
        """
        if self._descriptor is not None:
            raise RuntimeError(f'{self.path} is already locked by this object')
        file = next((path for path in (self.path.parent, *self.path.parent.parents) if path.exists()), None)
        if file is not None and not file.is_dir():
            raise UserError('is a file', where=str(file), fix='Name a directory for what the job writes.')
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise self._failed(error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            holder = {'pid': os.getpid(), 'host': socket.gethostname(), 'started': time.strftime('%Y-%m-%d %H:%M:%S%z')}
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode() + b'\n', 0)
        except BlockingIOError:
            holder_text = self._holder(descriptor)
            os.close(descriptor)
            raise UserError(
                f'another process is using this run directory: {holder_text}',
                where=str(self.path.parent),
                fix='Wait until it ends, stop it, or use another run directory.',
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise self._failed(error) from error
        self._descriptor = descriptor
        _held.add(self)
        return self

    def release(self) -> None:
        """Let the lock go; nothing if it is not held. The file stays: deleting it would race with the next holder."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            _held.discard(self)

    def __enter__(self) -> Self:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def _failed(self, error: OSError) -> UserError:
        return UserError(
            f'cannot lock: {error.strerror}',
            where=str(self.path),
            fix='Check permissions, free space, and that the file system supports flock.',
        )

    @staticmethod
    def _holder(descriptor: int) -> str:
        with contextlib.suppress(ValueError, KeyError, OSError):
            holder = json.loads(os.pread(descriptor, 4096, 0))
            return f'pid {holder["pid"]} on host {holder["host"]}, since {holder["started"]}'
        return 'pid unknown, it has only just started'


_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _release_in_child() -> None:
    # A forked worker inherits the open file, and would keep the lock after its parent was killed.
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_release_in_child)
