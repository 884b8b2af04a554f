"""Names of files and folders in a run directory."""

from __future__ import annotations

import os
import re
from pathlib import Path

MANIFEST = "manifest.json"
"""The file of a checkpoint that is written last: a checkpoint without it is unfinished."""
SAMPLES = "samples.jsonl"
"""The file of a run directory with the continuations of `evaluation.samples`."""
EXIT_FILE = "L2E_DS_EXIT_FILE"
"""The environment variable that names the file in which ranks note their exit codes."""
_CHECKPOINT = re.compile(r"step(\d{8})")


def checkpoint_name(step: int) -> str:
    """Return the name of a checkpoint's folder, in `checkpoints/` of a run directory."""
    return f"step{step:08d}"


def is_checkpoint(path: Path) -> bool:
    """Return whether a folder has the name of a published checkpoint."""
    return _CHECKPOINT.fullmatch(path.name) is not None


def step_of(checkpoint: Path) -> int:
    """Return the step in the name of a checkpoint's folder. Raises ValueError for another folder's name."""
    named = _CHECKPOINT.fullmatch(checkpoint.name)
    if named is None:
        raise ValueError(f"{checkpoint}: is no checkpoint")
    return int(named[1])


def published_checkpoints(run_directory: Path) -> list[Path]:
    """Return the checkpoints under their final names, oldest first, damaged or not.

    Raises OSError for a folder that cannot be read, as none in it would be no answer.
    """
    folder = run_directory / "checkpoints"
    try:
        found = [folder / name for name in os.listdir(folder)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(filter(is_checkpoint, found))


def finished_checkpoints(run_directory: Path) -> list[Path]:
    """Return the checkpoints that have a manifest, oldest first, damaged or not."""
    return [path for path in published_checkpoints(run_directory) if (path / MANIFEST).exists()]


def newest_step(run_directory: Path) -> int:
    """Return the step of the newest checkpoint that has a manifest, or 0 if there is none."""
    return max(map(step_of, finished_checkpoints(run_directory)), default=0)
