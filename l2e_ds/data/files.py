"""Writing files and folders so that nothing half-written ever stands under its final name."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LOCK = "lock"


def fsync_path(path: Path) -> None:
    """Make a file's content, or a folder's list of names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """A new name in the folder of `path`, so that `os.replace` onto `path` stays within one file system."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that a kill or a full disk leaves the one before it. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        fsync_path(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def building(folder: Path, proof: str) -> Iterator[Path]:
    """A temporary sibling folder that becomes `folder` when the block ends without an exception.

    `proof` names the file whose presence says that a folder is complete. If another process published `folder`
    meanwhile, this one's work is thrown away; a `folder` without the proof is replaced. Left-overs of killed
    processes are removed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    temporary = temporary_name(folder)
    temporary.mkdir()
    lock = _lock(temporary)
    try:
        yield temporary
        (temporary / _LOCK).unlink(missing_ok=True)
        for path in temporary.rglob("*"):
            fsync_path(path)
        fsync_path(temporary)
        _publish(temporary, folder, proof)
        fsync_path(folder.parent)
    finally:
        os.close(lock)
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, folder: Path, proof: str) -> None:
    while not (folder / proof).exists():
        try:
            os.rename(temporary, folder)  # refused by the file system where `folder` exists and is not empty
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if not (folder / proof).exists():
                incomplete = temporary_name(folder)
                with suppress(FileNotFoundError):
                    os.rename(folder, incomplete)
                shutil.rmtree(incomplete, ignore_errors=True)


def _lock(temporary: Path) -> int:
    """Hold a lock for as long as this process lives; named `lock` only once it is held."""
    new = temporary / f"{_LOCK}.new"
    descriptor = os.open(new, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # a file system without locks: then nobody may tell an abandoned folder from a living one
        new.unlink()
    else:
        new.rename(temporary / _LOCK)
    return descriptor


def _remove_abandoned(folder: Path) -> None:
    for temporary in folder.parent.glob(f".{folder.name}.*.tmp"):
        try:
            descriptor = os.open(temporary / _LOCK, os.O_RDWR)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(temporary, ignore_errors=True)
        except OSError:  # its builder is alive
            pass
        finally:
            os.close(descriptor)


def one_line(error: BaseException) -> str:
    """The first line of a library's message, for the end of one of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
