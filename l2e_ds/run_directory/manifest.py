"""List the files of a complete checkpoint with sizes and SHA-256, in a manifest that is written last.

A checkpoint without a manifest was not finished; one that differs from its manifest was damaged later. DeepSpeed's
shards are pickles: none is read before `verify` has found every file as it was written, and no file beside them. (That
proves the absence of damage, not of malice: whoever can write the folder can write the manifest too.)
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from l2e_ds.console import say
from l2e_ds.distributed import heartbeat
from l2e_ds.run_directory.names import MANIFEST, is_checkpoint, published_checkpoints, step_of
from l2e_ds.system.files import fsync_path

STATE = "state.json"
CANNOT_BE_READ = "cannot be read"  # perhaps for now only, while all else that is found wrong stays wrong
# the rank in the names of DeepSpeed's shards (zero_pp_rank_3_mp_rank_00_optim_states.pt) and of our random states
_OWNER = re.compile(r"(?:pp_rank_|rng-rank)(\d+)")

Entries = dict[str, dict[str, int | str]]
"""name -> {"bytes": size, "sha256": hex digits}"""


def sha256(path: Path) -> str:
    """Return the 64 hex digits that `sha256sum` prints. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
            heartbeat.beat()  # many gigabytes take longer than `training.timeout` may be
    return digest.hexdigest()


def files_of_rank(folder: Path, rank: int) -> list[Path]:
    """Return the files that this rank wrote into a checkpoint; rank 0 also those that are written once."""
    owned = []
    for path in folder.rglob("*"):
        match = _OWNER.search(path.name)
        if rank == (int(match[1]) if match else 0) and path.is_file():
            owned.append(path)
    return sorted(owned)


def complete_checkpoints(run_directory: Path) -> list[Path]:
    """Return the checkpoints that have every file of their manifest, oldest first; print the others."""
    found = []
    for path in published_checkpoints(run_directory):
        if problem := check_files(path):
            say(f"l2e-ds: checkpoint {path}: {problem}; it is not used")
        else:
            found.append(path)
    return found


def flush_and_describe(folder: Path, paths: Iterable[Path]) -> Entries:
    """Flush files to the disk and return their entries in the manifest. Raises OSError."""
    entries: Entries = {}
    for path in paths:
        fsync_path(path)
        entries[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return entries


def write_manifest(folder: Path, entries: Entries) -> None:
    """Write the manifest of a folder and flush it to the disk. Raises OSError."""
    path = folder / MANIFEST
    path.write_text(json.dumps({"files": dict(sorted(entries.items()))}, indent=1) + "\n", encoding="utf-8")
    fsync_path(path)
    fsync_path(folder)


def read_manifest(folder: Path) -> Entries | str:
    """Return the entries, or what is wrong with the manifest."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, entry in files.items():
            if Path(name).is_absolute() or ".." in Path(name).parts or not isinstance(entry["bytes"], int):
                raise ValueError(name)
            if not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
                raise ValueError(name)
    except FileNotFoundError:
        return "has no manifest (it was not finished)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its manifest is not readable"
    return files if files else "its manifest is empty"


def check_files(folder: Path) -> str | None:
    """Return what is wrong with names and sizes, in a few words, or None.

    Reads no content but the step, which the folder is named after.
    """
    files = read_manifest(folder)
    if isinstance(files, str):
        return files
    for name, entry in files.items():
        try:
            status = (folder / name).stat()
        except OSError:
            return f"{name} is missing"
        if not stat.S_ISREG(status.st_mode):
            return f"{name} is no file"
        if status.st_size != entry["bytes"]:
            return f"{name} has {status.st_size} bytes instead of {entry['bytes']}"
    for parent, _, found in os.walk(folder):  # which skips what is removed meanwhile
        for path in (Path(parent, name) for name in found):
            name = str(path.relative_to(folder))
            if name != MANIFEST and name not in files:
                return f"{name} is not in its manifest"
    if is_checkpoint(folder) and STATE in files:
        try:
            step = json.loads((folder / STATE).read_text(encoding="utf-8"))["train"]["step"]
        except (OSError, ValueError, KeyError, TypeError):
            return f"its {STATE} is not readable"
        if step != step_of(folder):
            return f"is the checkpoint of step {step} under another name"
    return None


def check_contents(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """Return what is wrong with the content of every `parts`-th file, or None.

    The largest come first, so that the shares of several readers are alike.
    """
    files = read_manifest(folder)
    if isinstance(files, str):
        return files
    by_size = sorted(files, key=lambda name: (-int(files[name]["bytes"]), name))
    for name in by_size[part::parts]:
        try:
            if sha256(folder / name) != files[name]["sha256"]:
                return f"{name} is not what was written (its checksum differs)"
        except OSError as error:
            return f"{name} {CANNOT_BE_READ} ({error.strerror})"
    return None


def verify(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, in a few words, or None. Reads every byte."""
    return check_files(folder) or check_contents(folder)
