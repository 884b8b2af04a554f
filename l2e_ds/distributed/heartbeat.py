"""Note what this rank's main thread is doing, and when any of its threads last made progress; the watchdog reads it."""

from __future__ import annotations

import time

_doing = "starting"
_progressed = time.monotonic()


def progress(doing: str) -> None:
    """Note that the main thread makes progress. doing: what it does next, in a few words, in case it never returns."""
    global _doing, _progressed
    _doing, _progressed = doing, time.monotonic()


def beat() -> None:
    """Note that this rank makes progress with what it is doing. Any thread may call it."""
    global _progressed
    _progressed = time.monotonic()


def excuse(seconds: float) -> None:
    """Do not count these seconds as lack of progress: this process was suspended and did not run."""
    global _progressed
    _progressed = min(_progressed + seconds, time.monotonic())


def doing() -> str:
    """Return what the main thread is doing."""
    return _doing


def idle_seconds() -> float:
    """Return seconds since this rank last made progress."""
    return time.monotonic() - _progressed
