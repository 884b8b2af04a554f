"""Writing files and folders so that nothing half-written ever stands under its final name."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
REPOSITORY = PACKAGE.parent


def fsync_path(path: Path) -> None:
    """Make a file's content, or a folder's list of names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """Return a new name in the folder of `path`, so that `os.replace` onto `path` stays within one file system."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that a kill or a full disk leaves the one before it. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    with _errors_naming(path, temporary):
        try:
            temporary.write_text(text, encoding="utf-8")
            fsync_path(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _errors_naming(path: Path, temporary: Path) -> Iterator[None]:
    """Have errors of the system name the path that was asked for, in place of the temporary one beside it."""
    try:
        yield
    except OSError as error:
        if error.filename == str(temporary):
            error.filename = str(path)
        raise


def still_named(descriptor: int, path: Path) -> bool:
    """Return whether the file that was opened has still this name, and was not removed meanwhile."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):  # the latter on NFS, where another host removed the file
            return False
        raise


def is_free(path: Path) -> bool:
    """Return whether a folder may be made there: nothing stands there, or an empty folder."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path` (`is_free`) that takes its name at the end, or is removed after an exception.

    Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    with _errors_naming(path, temporary):
        temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            path.rmdir()
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def file_stamp(path: Path) -> list[str | int]:
    """Return what a file of the input is recognised by, as JSON: name, bytes, time of its last change in ns."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def one_line(error: BaseException) -> str:
    """Return the first line of a library's error message, to be the end of an error's line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def error_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message."""
    return f"{type(error).__name__}: {one_line(error)[:200]}"
