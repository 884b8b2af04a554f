"""Find out when a run must stop early: after a signal, the stop file, a time limit, or the end of its launcher.

Each rank only notes what it hears. Every loop asks in a collective, so that all ranks leave it at the same step.
Imports nothing heavy, as `listen` is called before torch is imported, which takes seconds.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import NoReturn

from l2e_ds.errors import Interrupted
from l2e_ds.run_directory import stop_file
from l2e_ds.system import signals

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP)


class _Heard:
    """Holds what this process knows; there is one per process, as of signal handlers."""

    began = time.monotonic()
    parent: int | None = None  # process id of a launcher that must outlive its ranks
    run_directory: Path | None = None  # whose stop file counts
    time_limit: float | None = None  # seconds since `began`


def listen() -> None:
    """Note SIGNALS from now on instead of being killed by them, and begin to count the time limit.

    A process that a library forks from this one is ended by SIGTERM, as usual, and ignores the other SIGNALS.
    """
    _Heard.began = time.monotonic()
    _Heard.run_directory = _Heard.time_limit = None
    # DeepSpeed's launch.py and torchrun collect their ranks; a rank without them is an orphan (docs/deepspeed.md, 8).
    has_launcher = "CROSS_RANK" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    _Heard.parent = os.getppid() if has_launcher else None
    signals.listen(SIGNALS)
    os.register_at_fork(after_in_child=_forget)


def watch(run_directory: Path, time_limit_minutes: float | None) -> None:
    """Also heed a run's stop file and its time limit in minutes, which only rank 0 looks at."""
    _Heard.run_directory = run_directory
    _Heard.time_limit = None if time_limit_minutes is None else 60 * time_limit_minutes


def _forget() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number in (signal.SIGUSR1, signal.SIGHUP):  # a scheduler or terminal may send them to every process of a job
        signal.signal(number, signal.SIG_IGN)


def _reason_here() -> str | None:
    """Return why this rank would stop, or None."""
    from l2e_ds.distributed import collectives

    who = f"rank {collectives.rank()}"
    if signals.received:
        return f"{signals.received[-1][1].name} at {who}"
    if _Heard.parent is not None and os.getppid() != _Heard.parent:
        return f"the launcher of {who} is gone"
    if collectives.is_main():
        if _Heard.time_limit is not None and time.monotonic() - _Heard.began > _Heard.time_limit:
            return "training.time_limit is over"
        if _Heard.run_directory is not None and (path := stop_file.stop_file(_Heard.run_directory)).is_file():
            return f"{path} was written"
    return None


def is_asked() -> bool:
    """Return whether this rank has a reason to stop."""
    return _reason_here() is not None


def stop() -> NoReturn:
    """Raise Interrupted with the first rank's reason; call `honoured` when the run has been saved. Collective."""
    from l2e_ds.distributed import collectives

    reasons = collectives.all_gather_objects(_reason_here())
    reason = next(
        (found for found in reasons if found is not None), "asked to by a stop file that has since been removed"
    )
    raise Interrupted(reason)


def honoured() -> None:
    """Remove the stop file, which the next start must not find."""
    from l2e_ds.distributed import collectives

    if collectives.is_main() and _Heard.run_directory is not None:
        stop_file.honour(_Heard.run_directory)


def stop_if_asked() -> None:
    """Raise Interrupted on every rank if any has a reason to stop. Collective."""
    from l2e_ds.distributed import collectives, heartbeat

    heartbeat.beat()
    if collectives.any_rank(is_asked()):
        stop()
