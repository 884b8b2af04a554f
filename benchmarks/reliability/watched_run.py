"""Watch a run in the background: every start, and every line of metrics, which is compared with the undisturbed run's.

A start is one launch of the ranks by the supervisor. `metrics.jsonl` is cut at every resume, so it is read as it grows.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from l2e_ds.errors import L2EError
from l2e_ds.run_directory.metrics import read_metrics
from l2e_ds.run_directory.names import is_checkpoint, published_checkpoints, step_of

TIMINGS = ("tokens_per_second", "step_seconds", "data_wait_seconds", "mfu", "peak_memory_gib")
"""Keys of a metrics line that depend on the machine, not on the run."""
PATIENCE = 600.0
"""Seconds without a first new step after which a run counts as lost."""
POLL = 0.004


class RunLost(Exception):
    """The run did not continue."""


class RunEnded(Exception):
    """The run is finished."""


@dataclass
class Start:
    """Holds one launch of the ranks, and what came of it."""

    at: float  # seconds since the epoch, as all times here
    resumed: int = 0  # step of the checkpoint that it resumed from; 0: none
    newest_good: int | None = None  # step of the newest good checkpoint at that time
    first_step_at: float | None = None
    last_step: int = 0
    compared: int = 0  # lines
    wrong: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)  # errors and warnings


class WatchedRun:
    """Watches a run. log: where supervisor and ranks write; reference: the undisturbed lines by step (`comparable`)."""

    def __init__(self, directory: Path, log: Path, reference: dict[int, dict]) -> None:
        self.directory, self.log, self.reference = directory, log, reference
        self.starts: list[Start] = []
        self.process: psutil.Popen | None = None
        self._damaged: set[tuple[str, int, int]] = set()
        self._seen: set[bytes] = set()
        self._metrics_file, self._metrics_read = 0, 0  # inode, bytes
        self._log_read = 0

    # --- processes -----------------------------------------------------------------------------------------------

    def start(self, command: Sequence[str]) -> None:
        """Start the supervisor in the background. (SLURM starts its own; then there is no `process`.)"""
        with self.log.open("ab") as file:  # in a session of its own: Ctrl-C is for the benchmark, which ends the run
            streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
            self.process = psutil.Popen(command, start_new_session=True, **streams)

    def processes(self) -> list[psutil.Process]:
        """Return all processes that the supervisor started: launcher, its helpers, ranks."""
        found = []
        with contextlib.suppress(psutil.Error):
            for process in self.process.children(recursive=True) if self.process else []:
                with contextlib.suppress(psutil.Error):
                    if process.status() != psutil.STATUS_ZOMBIE:
                        found.append(process)
        return found

    def ranks(self) -> dict[int, psutil.Process]:
        """Return the ranks' own processes, without those that they started."""
        found: dict[int, psutil.Process] = {}
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                environment, line = process.environ(), process.cmdline()
                if "l2e_ds.train" in line and "deepspeed.launcher.launch" not in line and "RANK" in environment:
                    found.setdefault(int(environment["RANK"]), process)
        return found

    def end(self) -> None:
        """Kill all that is left of the run."""
        if self.process is None:
            return
        for process in [*self.processes(), self.process]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait()

    # --- watching ------------------------------------------------------------------------------------------------

    def poll(self) -> None:
        """Read what has been written meanwhile: what a start printed comes before the lines that it wrote."""
        lines = self._new_metrics()
        self._read_log()
        for line in lines:
            start = self.starts[-1]
            self._note_step(start, line["step"])
            start.compared += 1
            if problem := difference(line, self.reference):
                start.wrong.append(problem)

    def wait(self, condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
        """Wait for a condition. Raises RunLost if it takes too long, or RunEnded or RunLost if the run ends instead.

        what: the end of "waited N s ...".
        """
        deadline = time.time() + seconds
        while True:
            code = self.process.poll() if self.process is not None else None  # before all is read that was written
            self.poll()
            if condition():
                return
            if code == 0:
                raise RunEnded("the run was finished")
            if code is not None or time.time() > deadline:
                how = f"waited {seconds:.0f} s" if code is None else f"exit code {code}"
                raise RunLost(f"{how} {what}: {' / '.join(self.tail())}")
            time.sleep(POLL)

    def goes_on(self) -> bool:
        """Return whether the newest start has made a step."""
        return bool(self.starts) and self.starts[-1].first_step_at is not None

    @property
    def step(self) -> int:
        """Return the last step of the newest start."""
        return self.starts[-1].last_step if self.starts else 0

    def tail(self) -> list[str]:
        """Return the last errors and warnings of the newest start."""
        return self.starts[-1].said[-3:] if self.starts else self.log.read_text(errors="replace").splitlines()[-3:]

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def _new_metrics(self) -> list[dict]:
        path = self.directory / "metrics.jsonl"
        try:
            with path.open("rb") as file:
                found = os.fstat(file.fileno())
                if found.st_ino != self._metrics_file or found.st_size < self._metrics_read:
                    self._metrics_file, self._metrics_read = found.st_ino, 0  # cut at a resume: old lines come again
                file.seek(self._metrics_read)
                content = file.read()
        except OSError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self._metrics_read += len(whole)
        new = [raw for raw in whole.splitlines() if raw not in self._seen]  # timings make each line unique
        self._seen.update(new)
        return [line for line in map(json.loads, new) if line["kind"] == "train"]

    def _note_step(self, start: Start, step: int) -> None:
        start.last_step = max(start.last_step, step)
        if start.first_step_at is None:
            start.first_step_at = time.time()
            if start.newest_good is None:  # it did not print that it resumed
                self._resumed_from(start, 0)

    def _resumed_from(self, start: Start, step: int) -> None:
        start.resumed, start.last_step = step, max(start.last_step, step)
        start.newest_good = self.newest_good()
        if start.newest_good != step:
            start.wrong.append(f"resumed from step {step}, the newest good checkpoint is of {start.newest_good}")

    def _read_log(self) -> None:
        try:
            with self.log.open("rb") as file:
                file.seek(self._log_read)
                content = file.read()
        except OSError:
            return
        whole = content[: content.rfind(b"\n") + 1]
        self._log_read += len(whole)
        for line in whole.decode("utf-8", errors="replace").splitlines():
            if re.match(r"l2e-ds: start \d+ of at most", line):
                self.starts.append(Start(time.time()))
            elif not self.starts:
                continue
            elif line.startswith("resumed from "):
                self._resumed_from(self.starts[-1], step_of(Path(line.removeprefix("resumed from "))))
            elif step := re.match(r"step (\d+)/", line):  # if the disk is full, there is only this line
                self._note_step(self.starts[-1], int(step[1]))
            elif line.startswith("l2e-ds: "):
                self.starts[-1].said.append(line.removeprefix("l2e-ds: "))

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def good(self) -> list[Path]:
        """Return the published checkpoints, oldest first, without those that the benchmark has damaged."""
        return [path for path in published_checkpoints(self.directory) if _identity(path) not in self._damaged]

    def newest_good(self) -> int:
        """Return the step of the newest undamaged checkpoint, or 0."""
        return max(map(step_of, self.good()), default=0)

    def is_saving(self) -> bool:
        """Return whether a checkpoint is being written that is not published yet."""
        for path in (self.directory / "checkpoints").glob("step*.tmp"):
            with contextlib.suppress(OSError):
                # an older one is what a kill has left; the next save removes it
                if is_checkpoint(path.with_suffix("")) and self.starts and path.stat().st_ctime > self.starts[-1].at:
                    return True
        return False

    def note_damage(self, checkpoint: Path) -> None:
        """Note that the benchmark has damaged a checkpoint."""
        self._damaged.add(_identity(checkpoint))


def _identity(folder: Path) -> tuple[str, int, int]:
    """Return what distinguishes a folder from a later one of the same name."""
    try:
        found = folder.stat()
    except OSError:  # pruned meanwhile
        return folder.name, 0, 0
    return folder.name, found.st_ino, found.st_mtime_ns


def comparable(line: dict) -> dict:
    """Return the part of a line that must be bit-identical in every run of the same configuration."""
    return {key: value for key, value in line.items() if key not in TIMINGS}


def difference(line: dict, reference: dict[int, dict]) -> str | None:
    """Return in what a line differs from the undisturbed run's of the same step, or None."""
    here, there = comparable(line), reference.get(line["step"], {})
    for key in sorted(here.keys() | there.keys()):
        if here.get(key) != there.get(key):
            return f"step {line['step']}: {key} {here.get(key)}, undisturbed {there.get(key)}"
    return None


def read_reference(run: Path, steps: int) -> dict[int, dict]:
    """Return the lines of the undisturbed run by step. Raises L2EError if it is not complete."""
    found = [comparable(line) for line in read_metrics(run / "metrics.jsonl", "train")]
    if [line["step"] for line in found] != list(range(1, steps + 1)):
        raise L2EError(f"{run}: the undisturbed run has {len(found)} lines instead of {steps}")
    return {line["step"]: line for line in found}
