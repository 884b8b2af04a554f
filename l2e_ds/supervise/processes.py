"""Find out whether a run's processes are alive, and end them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from l2e_ds.distributed.slurm_step import this_job
from l2e_ds.run_directory.lock import NAME

SUSPENDED = 5.0
"""Seconds between two looks at a run, beyond which the supervisor itself must have been suspended."""


class SignsOfLife:
    """Watches a run's signs of life: rank 0 renews its lock, and its processes on this machine use processor time."""

    def __init__(self, run_directory: Path) -> None:
        self._lock = run_directory / NAME
        self._renewed: int | None = None
        self._renewals = 0
        self._used, self._looked_at = 0.0, 0.0
        self._seen_at = self._asked_at = time.monotonic()

    def are_missing_for(self, patience: float) -> bool:
        """Return whether no sign was seen for so many seconds. Call it often.

        It is False until the lock was renewed a few times: the run may be starting, or its file system may not keep
        times.
        """
        now = time.monotonic()
        if now > self._asked_at + SUSPENDED:
            self._seen_at += now - self._asked_at  # nobody watched the run meanwhile
        self._asked_at = now
        try:
            renewed = self._lock.stat().st_mtime_ns
        except OSError:
            renewed = None
        if renewed != self._renewed:
            self._renewed, self._seen_at = renewed, now
            self._renewals = 0 if renewed is None else self._renewals + 1
        pause = patience / 20
        if now > self._looked_at + pause:
            used = processor_seconds()
            if used > self._used + 0.01 * pause:
                self._seen_at = now
            self._used, self._looked_at = used, now
        return self._renewals >= 3 and now > self._seen_at + patience


def processor_seconds() -> float:
    """Return the processor time that the living descendants of this process have used."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def leftovers(session: int, run_file: str) -> list[psutil.Process]:
    """Return the living processes of the launch, but not such as ssh's master connection, which went its own way.

    They are in its session, or in sessions of torchrun's own with the run file as an argument.
    """
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            ours = os.getsid(process.pid) == session or run_file in process.cmdline()
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (OSError, psutil.Error):
            pass  # gone meanwhile
    return found


def kill_all(command: Sequence[str]) -> None:
    """Kill all descendants of this process and, if the launch's command has srun start the ranks, this job's steps."""
    job = this_job()
    if job is not None and any(Path(word).name == "srun" for word in command) and shutil.which("squeue"):
        kill_steps(job)
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            process.kill()


def kill_steps(job: str) -> None:
    """Kill the steps of a job of SLURM, but not the one that this process may be in (a shell by `srun --pty`). Tasks
    are not children of srun: without it they would stay, and hold resources."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        listing = ["squeue", "--steps", f"--jobs={job}", "--noheader", "--format=%i"]
        steps = subprocess.run(listing, capture_output=True, text=True, timeout=60).stdout.split()
        own = os.environ.get("SLURM_STEP_ID")
        steps = [step for step in steps if (number := step.rpartition(".")[2]).isdigit() and number != own]
        if steps:
            subprocess.run(["scancel", "--signal=KILL", *steps], capture_output=True, timeout=60)
