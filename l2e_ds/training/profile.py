"""A trace of a few steps by torch.profiler, as `logging.profile` asks for, and on GPUs a snapshot of their memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import profile, record_function

from l2e_ds.distributed import collectives, heartbeat
from l2e_ds.run_directory.names import checkpoint_name
from l2e_ds.system.files import one_line

MEMORY_EVENTS = 100_000
"""Allocations and frees that a snapshot of the memory goes back by, at most."""


class Profile:
    """Traces the steps from `first` to `last` on this rank.

    The step before the first warms the profiler up, which takes its own start out of the trace. A process that begins
    later warms it up in its own first step. What cannot be written costs the trace and never the run.
    """

    def __init__(
        self, steps: Sequence[int] | None, run_directory: Path, device: torch.device, say: Callable[[str], None]
    ) -> None:
        """steps: first and last, or None to trace nothing; say: shows the user a line."""
        self._first, self._last = steps or (0, 0)
        self._folder, self._device, self._say = run_directory / "profile", device, say
        self._profiler: profile | None = None
        self._traced: list[int] = []

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Trace the step within, whose number it is, if it is to be traced."""
        if self._profiler is None:
            if self._first - 1 <= step < self._last:
                self._profiler = profile(record_shapes=True, acc_events=True)
                self._profiler.prepare_trace()
            yield
            return
        if not self._traced:
            self._profiler.start_trace()
            if self._device.type == "cuda":
                torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        self._traced.append(step)
        with record_function(f"ProfilerStep#{step}"):  # the name that tools look for
            yield

    def is_complete(self, step: int) -> bool:
        """Return whether the trace is there, once this step was taken, and is to be written."""
        return self._profiler is not None and step >= self._last

    def write(self) -> None:
        """Write what has been traced, if there is anything, and trace no more."""
        profiler, self._profiler, traced = self._profiler, None, self._traced
        if profiler is None:
            return
        if not traced:
            profiler.start_trace()  # what was prepared ends in no other way
        heartbeat.progress("writing a profile")
        try:
            profiler.stop_trace()
            if traced:
                self._write(profiler, f"{checkpoint_name(traced[0])}-rank{collectives.rank()}")
        except (OSError, RuntimeError) as error:
            self._say(f"l2e-ds: warning: logging.profile: {one_line(error)}; the run continues without it")
        finally:
            if self._device.type == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, profiler: profile, name: str) -> None:
        self._folder.mkdir(exist_ok=True)
        path, unfinished = self._folder / f"{name}.json.gz", self._folder / "unfinished.json.gz"
        try:
            profiler.export_chrome_trace(str(unfinished))
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
        snapshot = self._folder / f"{name}-memory.pickle"
        if self._device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(snapshot))
        files = f"{path} and {snapshot.name}" if snapshot.exists() else path
        self._say(f"profile of steps {self._traced[0]} to {self._traced[-1]}: {files}")
