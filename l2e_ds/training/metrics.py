"""Write what a run reports: metrics.jsonl, the monitors of the section `logging`, and the progress on the terminal.

`l2e_ds/run_directory/metric_table.yaml` says what each key means; a new key needs an entry there.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from l2e_ds.checkpoint.state import TrainState
from l2e_ds.config.sections import RunConfig
from l2e_ds.console import duration, say
from l2e_ds.run_directory import results
from l2e_ds.run_directory.metrics import FILE, keep_lines
from l2e_ds.run_directory.names import SAMPLES
from l2e_ds.training.monitors import Monitors

_SHOWN = {
    "lm_loss": ("loss", ".3f"),
    "observed_share": ("share", ".2%"),
    "learning_rate": ("lr", ".2e"),
    "gradient_norm": ("grad", ".3g"),
    "tokens_per_second": ("tok/s", ",.0f"),
    "mfu": ("mfu", ".0%"),
}
"""The metrics of `kind: train` that are shown, with their label and format."""


class MetricsWriter:
    """Writes metrics on rank 0: JSON lines, the monitors of `logging`, and a progress bar or plain lines."""

    def __init__(self, config: RunConfig, state: TrainState, main: bool, is_new: bool = False) -> None:
        """Open the files, and remove the lines after the state from which a run resumes, or all lines if it is new:
        those are of an attempt that saved nothing.

        main: whether this is rank 0; on other ranks every method does nothing. is_new: whether the run has no
        checkpoint of its own. Raises OSError.
        """
        self.main = main
        run_directory = Path(config.training.run_directory)
        self.path = run_directory / FILE
        self.bar: tqdm | None = None
        self._clock: tuple[float, int] | None = None  # seconds and step from which the time left is reckoned
        if not main:
            return
        run_directory.mkdir(parents=True, exist_ok=True)
        newest = {"evaluation": state.evaluated, "guard": state.evaluated, "tasks": state.evaluated_on_tasks}

        def is_kept(kind: str, step: int) -> bool:
            # A run that was asked to stop saves its step without the evaluation that is due, and the next start makes
            # it: of a start that was killed before it saved again, this evaluation is removed, too.
            return not is_new and (step < state.step or (step == state.step and newest.get(kind, step) == step))

        keep_lines(self.path, is_kept)
        keep_lines(run_directory / results.FILE, is_kept)  # of no kind: `l2e-ds evaluate` may have appended some
        keep_lines(run_directory / SAMPLES, lambda _, step: is_kept("evaluation", step))
        self._file = self.path.open("ab", buffering=0)
        self._size = self.path.stat().st_size
        self._writable = True
        self._is_shown = config.logging.progress
        if self._is_shown and sys.stderr.isatty():
            self.bar = tqdm(total=config.training.steps, initial=state.step, unit="step", dynamic_ncols=True)
        self._monitors = Monitors(config, is_kept, -1 if is_new else state.step, self.say)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Write one line, and its numbers to the monitors under `kind/key`, except for `kind: start`.

        values: what can be written as JSON, by the keys of `metric_table.KINDS`; a number that is not finite becomes
        null.
        """
        if not self.main:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        line = {"kind": kind, "step": step, **finite}
        self._append((json.dumps(line) + "\n").encode())
        if kind != "start":
            self._monitors.write(kind, step, finite)

    def _append(self, line: bytes) -> None:
        """Append a whole line or nothing. A full disk costs lines, but does not end the run, as a checkpoint may."""
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._file.truncate(self._size)
            if self._writable:
                self.warn(f"{self.path}: {error.strerror}; lines are lost until it can be written again")
            self._writable = False
        else:
            self._size += len(line)
            self._writable = True

    def show(self, step: int, values: dict[str, Any], steps: int) -> None:
        """Show the metrics of `kind: train`: beside the progress bar on a terminal, otherwise as a line. steps: those
        of the whole run. The time left is reckoned from all that was done since the first call."""
        found = [(label, values.get(key), form) for key, (label, form) in _SHOWN.items()]
        shown = {label: format(value, form) for label, value, form in found if value is not None}
        if self.bar is not None:
            self.bar.set_postfix(shown)
        elif self.main and self._is_shown:
            now, seconds = time.perf_counter(), values["step_seconds"]
            if self._clock is None:
                self._clock = now, step  # the first interval has what is done once: compiling, reading ahead
            elif step > self._clock[1]:
                seconds = (now - self._clock[0]) / (step - self._clock[1])
            text = "  ".join(f"{key} {value}" for key, value in shown.items())
            self.say(f"step {step}/{steps}  {text}  {duration((steps - step) * seconds)} left")

    def advance(self) -> None:
        """Move the progress bar by one step."""
        if self.bar is not None:
            self.bar.update()

    def say(self, text: str) -> None:
        """Print a line on rank 0 without tearing the progress bar."""
        if self.main and self.bar is not None:
            with contextlib.suppress(OSError):
                tqdm.write(text, file=sys.stderr)
        elif self.main:
            say(text)

    def warn(self, text: str) -> None:
        """Print a line as a warning, as `say` does."""
        self.say(f"l2e-ds: warning: {text}")

    def close(self) -> None:
        """Close the progress bar, the file and the monitors."""
        if self.bar is not None:
            self.bar.close()
        if self.main:
            self._file.close()
            self._monitors.close()
