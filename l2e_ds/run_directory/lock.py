"""Ensure that one run at a time writes to a run directory.

Rank 0 holds a POSIX lock on the file `lock` (which ends with the process, and which child processes do not inherit)
and touches the file every few seconds, for file systems on which other hosts do not see locks.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from l2e_ds.errors import ConfigError
from l2e_ds.system.files import still_named

NAME = "lock"
RENEWED_EVERY = 5.0
"""Seconds between signs of life."""
WATCHED_FOR = 3 * RENEWED_EVERY
"""Seconds for which the lock of another host is watched before its run is considered dead."""


class RunLock:
    """The lock of one run directory, or of a study's folder; hold it (`with`) before anything is written there.

    where: what gave the folder, to begin an error. what: what works there. tick: called every second while the lock of
    another host is watched.
    """

    def __init__(
        self,
        directory: Path,
        where: str = "training.run_directory",
        what: str = "run",
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self.path, self.where, self.what, self.tick = directory / NAME, where, what, tick
        self._descriptor: int | None = None
        self._content: dict[str, str | int] = {}

    def acquire(self) -> None:
        """Take the lock. Raises ConfigError if another run, here or on another host, is alive, or the file cannot be
        made."""
        try:
            self._acquire()
        except OSError as error:
            raise ConfigError(f"cannot write {self.path}: {error.strerror or error}", where=self.where) from None

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def why_not_free(self) -> ConfigError | None:
        """Take the lock and give it back, and return None; or return why it cannot be taken now. This takes up to
        WATCHED_FOR seconds where the lock is of another host."""
        try:
            self.acquire()
        except ConfigError as error:
            return error
        self.release()
        return None

    def _acquire(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while self._descriptor is None:
            with ExitStack() as otherwise:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
                otherwise.callback(os.close, descriptor)
                trusted = [None, socket.gethostname()]  # hosts whose locks this one would have seen
                try:
                    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (BlockingIOError, PermissionError):
                    raise self._refusal(self._holder(descriptor)) from None
                except OSError:
                    trusted = [None]  # a file system without locks (Lustre without -o flock): only signs of life remain
                if not still_named(descriptor, self.path):  # removed by its holder between our open and our lock
                    continue
                holder = self._holder(descriptor)
                if holder.get("host") not in trusted and self._is_renewed(descriptor):
                    raise self._refusal(holder)
                since = time.strftime("%Y-%m-%d %H:%M:%S %z")
                self._content = {"host": socket.gethostname(), "process": os.getpid(), "since": since}
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(self._content).encode(), 0)
                self._descriptor = descriptor
                otherwise.pop_all()

    def renew(self) -> None:
        """Touch the file, as a sign of life. Any thread may call it."""
        descriptor = self._descriptor
        if descriptor is not None:
            os.utime(descriptor)

    def is_taken(self) -> bool:
        """Return whether another run has taken the lock that this one held: where hosts do not see each other's locks,
        a run that was frozen for longer than WATCHED_FOR is considered dead. Any thread may call it. Raises OSError."""
        descriptor = self._descriptor
        if descriptor is None:
            return False
        if not still_named(descriptor, self.path):
            return self.path.exists()
        holder = self._holder(descriptor)  # not by the path: closing the file would give back the lock
        return bool(holder) and holder != self._content

    def release(self) -> None:
        """Give the lock back, if it was taken, and remove the file, unless it is another run's. One that cannot be
        removed is of no consequence, as nobody holds it."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            with suppress(OSError):
                if still_named(descriptor, self.path) and self._holder(descriptor) == self._content:
                    self.path.unlink()
            os.close(descriptor)

    def _is_renewed(self, descriptor: int) -> bool:
        """Return whether another process touches the file while this one watches."""
        before, deadline = os.fstat(descriptor).st_mtime_ns, time.monotonic() + WATCHED_FOR
        while time.monotonic() < deadline:
            time.sleep(1)
            self.tick()
            if not still_named(descriptor, self.path) or os.stat(self.path).st_mtime_ns != before:
                return True
        return False

    @staticmethod
    def _holder(descriptor: int) -> dict:
        try:
            found = json.loads(os.pread(descriptor, 10_000, 0))
            return found if isinstance(found, dict) else {}
        except ValueError:
            return {}

    def _refusal(self, holder: dict) -> ConfigError:
        host, process, since = (holder.get(key, "?") for key in ("host", "process", "since"))
        return ConfigError(
            f"another {self.what} is writing to {self.path.parent} (host {host}, process {process}, since {since});"
            " wait for it, stop it or choose another folder",
            where=self.where,
        )
