"""Write and read the file `stop` in a run directory, which asks the run to save and end.

Anybody may write it. A supervisor also does, with the word `restart` in it if it will start the run again.
"""

from __future__ import annotations

from pathlib import Path

from l2e_ds.console import say
from l2e_ds.errors import ConfigError
from l2e_ds.system.files import write_whole

_RESTART = "restart\n"


def stop_file(run_directory: Path) -> Path:
    """Return the path of the file."""
    return run_directory / "stop"


def ask_to_stop(run_directory: Path, to_restart: bool = False) -> None:
    """Ask the run to stop for good, or in order to be restarted; print a line if the file cannot be written.

    A wish that it stop for good is not overwritten by the other one.
    """
    path = stop_file(run_directory)
    try:
        if not (to_restart and path.exists()):
            write_whole(path, _RESTART if to_restart else "")
    except OSError as error:
        say(f"l2e-ds: cannot write {path}: {error.strerror}")


def is_asked_to_stop(run_directory: Path) -> bool:
    """Return whether the run is asked to stop for good."""
    return _wish(run_directory) not in (None, _RESTART)


def is_asked_to_restart(run_directory: Path) -> bool:
    """Return whether a supervisor asks the run to stop in order to restart it."""
    return _wish(run_directory) == _RESTART


def _wish(run_directory: Path) -> str | None:
    """Return the content of the file, "" if it cannot be read, or None without one."""
    try:
        return stop_file(run_directory).read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError):
        return ""


def remove(run_directory: Path) -> None:
    """Remove the file, which the next start must not find. Raises ConfigError."""
    path = stop_file(run_directory)
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"training.run_directory: cannot remove {path}: {error.strerror}") from None


def honour(run_directory: Path) -> None:
    """Remove the file after the run has stopped; print a line if that fails: the run is over all the same."""
    try:
        remove(run_directory)
    except ConfigError as error:
        say(f"l2e-ds: {error}")
