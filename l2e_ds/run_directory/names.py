"""Names of files in a run directory."""

from __future__ import annotations

from pathlib import Path


def newest_step(run_directory: Path) -> int:
    """Of the newest published checkpoint; 0 if there is none."""
    found = (run_directory / "checkpoints").glob("step" + "[0-9]" * 8 + "/manifest.json")
    return max((int(path.parent.name.removeprefix("step")) for path in found), default=0)


STOP_FILE = "stop"
EXIT_FILE = "L2E_DS_EXIT_FILE"  # variable that names the file in which ranks note the exit codes that they chose


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step"))
