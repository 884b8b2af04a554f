"""What this rank's main thread is doing, and when it last moved on; the watchdog reads it."""

from __future__ import annotations

import time

_doing = "starting"
_progressed = time.monotonic()


def progress(doing: str) -> None:
    """This rank's main thread moves on; `doing` in a few words, for the case that it does not come back."""
    global _doing, _progressed
    _doing, _progressed = doing, time.monotonic()


def beat() -> None:
    """This rank moves on with what it is doing; from any thread."""
    global _progressed
    _progressed = time.monotonic()


def excuse(seconds: float) -> None:
    """Do not count these seconds as lack of progress: this process was suspended and did not run."""
    global _progressed
    _progressed = min(_progressed + seconds, time.monotonic())


def doing() -> str:
    return _doing


def idle_seconds() -> float:
    """Return seconds since the main thread last made progress."""
    return time.monotonic() - _progressed
