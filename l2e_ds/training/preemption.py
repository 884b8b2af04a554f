"""When a run must stop early: signals, a file, a time limit, a launcher that is gone.

Each rank only notes what it hears; in a collective all ranks learn whether any of them heard something, so that they
leave the same loop at the same step. Asked in every loop: steps, evaluation rounds, ticks of data preparation.
Imports nothing heavy: `listen` comes before torch, which takes seconds to import.
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
    """What this process knows. One a process, as signal handlers are."""

    began = time.monotonic()
    parent: int | None = None  # of a launcher that is to outlive its ranks
    run_directory: Path | None = None  # whose stop file is heeded
    time_limit: float | None = None  # seconds since `began`


def listen() -> None:
    """Note SIGNALS from now on instead of dying of them; count the time limit from here.

    Processes forked from this one (data workers) get the default handlers back.
    """
    _Heard.began = time.monotonic()
    _Heard.run_directory = _Heard.time_limit = None
    # launch.py and torchrun collect their ranks; whoever loses them would be an orphan (docs/deepspeed.md, row 8)
    has_launcher = "CROSS_RANK" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    _Heard.parent = os.getppid() if has_launcher else None
    signals.listen(SIGNALS)
    os.register_at_fork(after_in_child=_forget)


def watch(run_directory: Path, time_limit_minutes: float | None) -> None:
    """Also heed the run's stop file and its time limit (on rank 0, which decides them)."""
    _Heard.run_directory = run_directory
    _Heard.time_limit = None if time_limit_minutes is None else 60 * time_limit_minutes


def _forget() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number in (signal.SIGUSR1, signal.SIGHUP):  # a scheduler, a terminal may send it to every process of the job
        signal.signal(number, signal.SIG_IGN)


def _reason_here() -> str | None:
    """Why this rank would stop, or None."""
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
    """Return whether this rank has heard something."""
    return _reason_here() is not None


def stop() -> NoReturn:
    """Collective, once the ranks know that one of them has heard something: raises Interrupted with its reason.

    When the run is saved, call `honoured`."""
    from l2e_ds.distributed import collectives

    reasons = collectives.all_gather_objects(_reason_here())
    reason = next((found for found in reasons if found is not None), "the stop file came and went")
    raise Interrupted(reason)


def honoured() -> None:
    """The stop file has done its work: the next start must not find it."""
    from l2e_ds.distributed import collectives

    if collectives.is_main() and _Heard.run_directory is not None:
        stop_file.honour(_Heard.run_directory)


def stop_if_asked() -> None:
    """Collective: raises Interrupted on every rank if any has heard something."""
    from l2e_ds.distributed import collectives, heartbeat

    heartbeat.beat()
    if collectives.any_rank(is_asked()):
        stop()
