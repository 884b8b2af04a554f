"""The file `stop` in a run directory, which asks the run to save and end. A supervisor also writes it, to restart."""

from __future__ import annotations

from pathlib import Path

from l2e_ds.console import say

STOP_FILE = "stop"
RESTART = "restart\n"
"""What a supervisor writes into the stop file when it wants no end of the run."""


def write_stop_file(path: Path, wish: str) -> None:
    """wish: RESTART, which does not take the place of somebody's wish to stop for good, or empty."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not (wish and path.exists()):
            path.write_text(wish)
    except OSError as error:
        say(f"l2e-ds: cannot write {path}: {error.strerror}")


def remove_stop_file(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        say(f"l2e-ds: cannot remove {path}: {error.strerror}")


def is_for_restart(stop_file: Path) -> bool:
    """Whether it is there because a supervisor wants to restart the run."""
    try:
        return stop_file.read_text() == RESTART
    except (OSError, UnicodeDecodeError):
        return False
