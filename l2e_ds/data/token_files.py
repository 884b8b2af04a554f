"""Token files that grow while a corpus is tokenized. A kill at any moment loses only a few seconds of work.

A folder holds, for each part (`train`, `held_out`), the growing `.bin` and a file of lengths; if duplicates are
dropped, the digests of the documents; a lock; and `journal.json`, which says how much of these files is safely on the
disk, where in the input to resume, and what was asked for. The next start cuts off what is not in the journal.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from l2e_ds.data.indexed import write_index
from l2e_ds.errors import DataError
from l2e_ds.system.files import fsync_path, still_named, write_whole

JOURNAL = "journal.json"
LOCK = "lock"
_COMMIT_EVERY = 5.0  # seconds of work that a kill may lose
_LENGTH = np.dtype("<i4")
_DIGEST = np.dtype("<u8")


class TokenFiles:
    """Writes token files into an existing folder, and resumes where the last process stopped. A context manager.

    Hold an `Exclusive` on the folder meanwhile. An exception keeps what was written.

    parts: names of the token files. asked: all that decides the result, a flat dict that can be written as JSON; it
    must equal the journal's. Raises DataError if the journal is damaged, belongs to other work or counts more than the
    files hold, and OSError for a full disk.
    """

    def __init__(self, folder: Path, parts: list[str], dtype: np.dtype, asked: dict[str, Any]) -> None:
        self.folder, self.parts, self.dtype = folder, parts, dtype
        self._asked = asked
        self._names = [f"{part}{suffix}" for part in parts for suffix in (".bin", ".lengths")] + ["digests"]
        self._files: dict[str, BinaryIO] = {}
        self._sizes = dict.fromkeys(self._names, 0)
        self._committed_at = time.monotonic()
        self.position: dict[str, Any] | None = None
        """Where in the input to resume; None is the beginning."""
        self.notes: dict[str, Any] = {}
        """What the caller last gave to `advance`, which the journal keeps."""
        self._journal: dict[str, Any] | None = None

    def __enter__(self) -> TokenFiles:
        self._journal = read_journal(self.folder, self._asked)
        if self._journal is not None:
            self._sizes.update(self._journal["sizes"])
            self.position, self.notes = self._journal["position"], self._journal["notes"]
        with ExitStack() as stack:
            for name, size in self._sizes.items():
                file = self._files[name] = stack.enter_context(open(self.folder / name, "ab", buffering=0))
                if os.fstat(file.fileno()).st_size < size:
                    raise DataError(f"{file.name}: shorter than when it was left; remove {self.folder} to start over")
                file.truncate(size)
            self._open_files = stack.pop_all()
        return self

    @property
    def resumes(self) -> bool:
        """Whether an earlier process left something from which to resume."""
        return self._journal is not None

    def add(self, part: str, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents, given the tokens of all, flat, and the number of tokens of each, [n].

        Raises DataError for a document that is too long, and OSError.
        """
        if len(lengths) and int(lengths.max()) > np.iinfo(_LENGTH).max:
            raise DataError(f"a document of {lengths.max()} tokens; at most {np.iinfo(_LENGTH).max} fit into an .idx")
        self._append(f"{part}.bin", tokens.astype(self.dtype, copy=False))
        self._append(f"{part}.lengths", lengths.astype(_LENGTH))

    def add_digests(self, digests: np.ndarray) -> None:
        self._append("digests", digests.astype(_DIGEST, copy=False))

    def digests(self) -> np.ndarray:
        """Return all digests that were added, uint64 [n]."""
        return np.fromfile(self.folder / "digests", _DIGEST).astype(np.uint64, copy=False)

    def _append(self, name: str, values: np.ndarray) -> None:
        rest = memoryview(values.tobytes())
        while rest:
            written = self._files[name].write(rest)
            self._sizes[name] += written
            rest = rest[written:]

    def advance(self, position: dict[str, Any], notes: dict[str, Any]) -> None:
        """Record that everything before this position of the input was added, so that a restart may resume here."""
        self.position, self.notes = position, notes
        self._journal = {"asked": self._asked, "position": position, "notes": notes, "sizes": dict(self._sizes)}
        if time.monotonic() - self._committed_at > _COMMIT_EVERY:
            self.commit()

    def commit(self) -> None:
        """Make the state of the last `advance` survive a kill and a power cut. Raises OSError."""
        if self._journal is not None:
            for file in self._files.values():
                os.fsync(file.fileno())
            write_whole(self.folder / JOURNAL, json.dumps(self._journal))
        self._committed_at = time.monotonic()

    def finish(self) -> None:
        """Write the .idx of each part. PART.bin and PART.idx in the folder are then complete and on the disk."""
        self.commit()
        for part in self.parts:
            path = self.folder / f"{part}.lengths"
            lengths = np.memmap(path, _LENGTH, "r") if path.stat().st_size else np.empty(0, _LENGTH)
            write_index(self.folder / f"{part}.idx", self.dtype, lengths)
            fsync_path(self.folder / f"{part}.idx")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._open_files:
            if kind is not None and any(self._sizes.values()):
                with suppress(OSError):  # leaves the journal before
                    self.commit()


def read_journal(folder: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """Return the journal of a folder, or None if there is none.

    Raises DataError if it is damaged, or was begun with other input or options than `asked`.
    """
    path = folder / JOURNAL
    try:
        journal = json.loads(path.read_text(encoding="utf-8"))
        before, _, _, _ = (dict(journal[key]) for key in ("asked", "position", "notes", "sizes"))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: damaged; remove {folder} to start over") from None
    asked = json.loads(json.dumps(asked))
    for key in {**before, **asked}:
        if before.get(key) != asked.get(key):
            old, new = (json.dumps(one.get(key)) for one in (before, asked))
            change = f"{key} was {old}, now it is {new}" if len(old + new) <= 120 else f"{key} changed"
            raise DataError(
                f"{folder} holds the beginning of other work: {change}; resume with the first command, or remove the"
                " folder to start over"
            )
    return journal


class Exclusive:
    """A folder that this process alone works in. A context manager, which makes the folder.

    An exception removes the folder again if it holds no journal. Raises DataError if another process works there,
    unless `wait` is set, and if the folder holds files but was not made by this class.
    """

    def __init__(self, folder: Path, wait: bool = False) -> None:
        self.folder, self._wait = folder, wait
        self._descriptor = -1

    def __enter__(self) -> Exclusive:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with suppress(FileExistsError):
                self.folder.mkdir()
            try:
                # .nfs: what NFS keeps of a file that was removed while open
                names = [name for name in os.listdir(self.folder) if not name.startswith(".nfs")]
                if names and LOCK not in names:
                    problem = "is not ours and would be removed; take it away, or give another output"
                    raise DataError(problem, where=str(self.folder))
                self._descriptor = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:
                if self.folder.is_symlink():  # to nothing
                    raise
                continue  # another process has just moved or removed the folder
            if self._is_locked() and still_named(self._descriptor, self.folder / LOCK):
                return self  # else its last holder has removed the folder
            os.close(self._descriptor)
            time.sleep(0.2)

    def _is_locked(self) -> bool:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if self._wait:
                return False
            os.close(self._descriptor)
            raise DataError(f"{self.folder}: another process is writing there; wait for it, or end it") from None
        except OSError as error:
            # else the file system has no locks, so that no other process can be noticed
            return error.errno != errno.ESTALE  # on NFS: another host has removed the file
        return True

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not (self.folder / JOURNAL).exists():
            self.remove()
        os.close(self._descriptor)

    def remove(self) -> None:
        """Remove the folder, unless it was moved: then its name may belong to another process by now.

        The lock goes last: a process that comes meanwhile takes a folder of files without a lock for not ours.
        """
        if not still_named(self._descriptor, self.folder / LOCK):
            return
        with suppress(OSError):  # another process may come before the last step; then the folder is its own
            for path in self.folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name != LOCK:
                    path.unlink(missing_ok=True)
            (self.folder / LOCK).unlink(missing_ok=True)
            self.folder.rmdir()
