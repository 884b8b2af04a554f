"""Writes what a run reports: metrics.jsonl, the monitors of the section `logging`, and the progress on the terminal.

What each key means stands in `l2e_ds/run_directory/metric_table.py`, where one that is new needs an entry.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from l2e_ds.config.sections import RunConfig
from l2e_ds.console import say
from l2e_ds.run_directory import results
from l2e_ds.run_directory.metrics import FILE, drop_lines_after
from l2e_ds.run_directory.names import SAMPLES
from l2e_ds.training.monitors import Monitors


class MetricsWriter:
    """Writes metrics on rank 0: JSON lines, the monitors of `logging`, and a progress bar or plain lines."""

    def __init__(self, config: RunConfig, first_step: int, main: bool) -> None:
        self.main = main
        run_directory = Path(config.training.run_directory)
        self.path = run_directory / FILE
        self.bar: tqdm | None = None
        self.plain = False
        if not main:
            return
        run_directory.mkdir(parents=True, exist_ok=True)
        for path in (self.path, run_directory / results.FILE, run_directory / SAMPLES):
            drop_lines_after(path, first_step)
        self._file = self.path.open("ab", buffering=0)
        self._size = self.path.stat().st_size
        self._writable = True
        if config.logging.progress:
            self.plain = not sys.stderr.isatty()
            if not self.plain:
                self.bar = tqdm(total=config.training.steps, initial=first_step, unit="step", dynamic_ncols=True)
        self._monitors = Monitors(config, first_step, self.say)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Write one line; its numbers also go to the monitors, under `kind/key`.

        values: by the keys that `metric_table.KINDS` has for this kind, JSON; a number that is not finite becomes null.
        """
        if not self.main:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        line = {"kind": kind, "step": step, **finite}  # NaN is no JSON
        self._append((json.dumps(line) + "\n").encode())
        if kind != "start":
            self._monitors.write(kind, step, finite)

    def _append(self, line: bytes) -> None:
        """Whole lines only. A full disk costs lines, not the run: whether that goes on, its checkpoints decide."""
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._file.truncate(self._size)
            if self._writable:
                self.say(
                    f"l2e-ds: warning: {self.path}: {error.strerror}; lines are lost until it can be written again"
                )
            self._writable = False
        else:
            self._size += len(line)
            self._writable = True

    def show(self, step: int, values: dict[str, Any], steps: int) -> None:
        """Progress: on a terminal a bar, else a line, so that log files stay readable."""
        shown = {
            "loss": f"{values['lm_loss']:.3f}",
            **({"share": f"{values['observed_share']:.2%}"} if "observed_share" in values else {}),
            "tok/s": f"{values['tokens_per_second']:,.0f}",
        }
        if self.bar is not None:
            self.bar.set_postfix(shown)
        elif self.plain and self.main:
            minutes = (steps - step) * values["step_seconds"] / 60
            text = "  ".join(f"{key} {value}" for key, value in shown.items())
            self.say(f"step {step}/{steps}  {text}  {minutes:.1f} min left")

    def advance(self) -> None:
        """One step further on the progress bar."""
        if self.bar is not None:
            self.bar.update()

    def say(self, text: str) -> None:
        """A line for the user that does not tear the progress bar."""
        if self.main and self.bar is not None:
            with contextlib.suppress(OSError):
                tqdm.write(text, file=sys.stderr)
        elif self.main:
            say(text)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.main:
            self._file.close()
            self._monitors.close()
