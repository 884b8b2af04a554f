"""Run a study on this machine: several runs at a time, each on devices of its own.

A run is trained by the supervisor (l2e_ds.supervise), which restarts it after failures and stops it without losing a
step, then evaluated. If this process is killed, its supervisors save and stop.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from l2e_ds import console
from l2e_ds.config.reading import load_run_config
from l2e_ds.distributed.launch import without_launcher
from l2e_ds.errors import ConfigError, Interrupted
from l2e_ds.run_directory.lock import RENEWED_EVERY, RunLock
from l2e_ds.study.definition import Evaluation
from l2e_ds.study.processes import Child, Place, evaluation_words
from l2e_ds.study.state import State, config_file, config_of, run_directory, state_of
from l2e_ds.system import signals

POLL = 0.2  # seconds
LOOK_AGAIN = 2.0  # seconds between two looks at a run directory in which another process works
STOPPED = Interrupted.exit_code


@dataclass
class RunAtWork:
    """Holds a run and the process that works for it.

    begun: "train" and the commands of evaluations, of which the last is under way; log_begins: the size of its log in
    bytes when the process began; waits_since, look_at: times, while another process works in its directory.
    """

    name: str
    place: Place | None = None
    child: Child | None = None
    begun: list[str] = field(default_factory=list)
    began: float = 0.0
    began_at_step: int = 0
    log_begins: int = 0
    waits_since: float | None = None
    look_at: float = 0.0


class Runner:
    """Runs a study; `run` returns when every run is done, has failed, or was stopped."""

    def __init__(
        self,
        directory: Path,
        names: Sequence[str],
        evaluations: Sequence[Evaluation],
        where: Sequence[Place],
        restarts: int,
        renew: Callable[[], None] = lambda: None,
    ) -> None:
        self.directory, self.evaluations, self.restarts = directory, evaluations, restarts
        self.waiting = [RunAtWork(name) for name in names]
        self.running: list[RunAtWork] = []
        self.free = list(where)
        self.failed: dict[str, tuple[int, str]] = {}
        """Exit code and reason, by name."""
        self.stopped: list[str] = []
        self.total, self.place_count = len(names), len(where)
        self.seconds: list[float] = []  # durations of the runs that this call began and finished
        self._renew, self._renewed = renew, 0.0
        self._signals_passed = 0

    def run(self) -> int:
        """Run all and return the exit code: 0; 75 if asked to stop; 2 if the user can fix all that failed, else 1."""
        signals.listen()
        try:
            while self.running or (self.waiting and not signals.received):
                self._pass_signals_on()
                if not signals.received:
                    self._start_waiting()
                for run in [run for run in self.running if run.child and run.child.process.poll() is not None]:
                    self._handle_end(run)
                if time.monotonic() > self._renewed + RENEWED_EVERY:
                    self._renewed = time.monotonic()
                    self._renew()
                time.sleep(POLL)
        finally:
            for run in self.running:  # after an exception in this process
                if run.child is not None:
                    run.child.process.terminate()
            signals.stop_listening()
        if signals.received:
            return STOPPED
        if self.failed:
            codes = {code for code, _ in self.failed.values()}
            return ConfigError.exit_code if codes == {ConfigError.exit_code} else 1
        return STOPPED if self.stopped else 0

    def _pass_signals_on(self) -> None:
        """Pass every signal on; the supervisor kills the run after a second one, some seconds later."""
        if len(signals.received) == self._signals_passed:
            return
        if not self._signals_passed:
            say("asked to stop: the runs under way save and stop; the same command resumes them")
        self._signals_passed = len(signals.received)
        for run in self.running:
            assert run.child is not None
            if run.begun[-1] == "train":
                run.child.process.terminate()
            else:
                run.child.kill()

    def _state(self, run: RunAtWork) -> State:
        steps = config_of(self.directory, run.name).training.steps
        return state_of(run_directory(self.directory, run.name), steps, self.evaluations)

    def _log(self, run: RunAtWork) -> Path:
        return self.directory / "logs" / f"{run.name}.log"

    def _start_waiting(self) -> None:
        for run in list(self.waiting):
            if not self.free:
                return
            if self._is_busy(run):
                continue
            self.waiting.remove(run)
            state = self._state(run)
            if state.is_done:
                continue
            run.place, run.began, run.began_at_step = self.free.pop(0), time.monotonic(), state.step
            self.running.append(run)
            say(f"{run.name}: begins ({state}); log: {self._log(run)}")
            self._continue(run)

    def _is_busy(self, run: RunAtWork) -> bool:
        """Return whether another process writes there. After `training.timeout` the run counts as failed."""
        now = time.monotonic()
        if now < run.look_at:
            return True
        lock = RunLock(run_directory(self.directory, run.name), tick=self._renew)
        if not lock.path.exists():
            return False
        refusal = lock.why_not_free()
        if refusal is None:
            return False
        patience = 60 * load_run_config(config_file(self.directory, run.name)).training.timeout
        if run.waits_since is None:
            run.waits_since = now
            say(f"{run.name}: has to wait: {refusal}")
        if now > run.waits_since + patience:
            self.waiting.remove(run)
            self._fail(run, refusal.exit_code, str(refusal))
        run.look_at = now + LOOK_AGAIN
        return True

    def _continue(self, run: RunAtWork) -> None:
        """Start the next process for a run, or finish the run."""
        assert run.place is not None
        state = self._state(run)
        directory = run_directory(self.directory, run.name)
        if state.is_done:
            self._finish(run)
            return
        if not state.trained:
            doing = "train"
            supervisor = [sys.executable, "-m", "l2e_ds.supervise", "--restarts", str(self.restarts)]
            run_file = str(config_file(self.directory, run.name))
            command = [*supervisor, run_file, "--", *run.place.launcher(), "l2e_ds.train"]
        else:
            words = evaluation_words(directory, state.missing[0])
            doing = " ".join(["l2e-ds", *words])
            command = [*run.place.launcher(), "l2e_ds.cli", *words]
        if doing in run.begun:
            what = f"{doing} left no such results"
            if doing == "train":
                what = "training finished, but its last checkpoint or evaluation is missing"
            self._free_place(run)
            self._fail(run, 1, f"{what}; see {self._log(run)}")
            return
        run.begun.append(doing)
        log = self._log(run)
        run.log_begins = log.stat().st_size if log.is_file() else 0
        run.child = Child(command, {**without_launcher(os.environ), **run.place.environment}, log)

    def _handle_end(self, run: RunAtWork) -> None:
        """Deal with a process that has ended."""
        assert run.child is not None
        code = run.child.process.returncode
        if code == 0 and not signals.received:
            self._continue(run)
            return
        self._free_place(run)
        if signals.received:
            return
        if code == STOPPED:
            self.stopped.append(run.name)
            say(f"{run.name}: was stopped at step {self._state(run).step}")
        else:
            self._fail(run, code, self._reason(run, code))

    def _finish(self, run: RunAtWork) -> None:
        seconds = time.monotonic() - run.began
        self._free_place(run)
        if run.began_at_step == 0:
            self.seconds.append(seconds)
        left = len(self.waiting) + len(self.running)
        done = self.total - left - len(self.failed) - len(self.stopped)
        text = f"{run.name}: done in {console.duration(seconds)}; {done} of {self.total} runs"
        if left and self.seconds:
            text += f", about {console.duration(left * sum(self.seconds) / len(self.seconds) / self.place_count)} left"
        say(text)

    def _free_place(self, run: RunAtWork) -> None:
        assert run.place is not None
        self.running.remove(run)
        self.free.append(run.place)

    def _fail(self, run: RunAtWork, code: int, why: str) -> None:
        self.failed[run.name] = (code, why)
        say(f"{run.name}: failed: {why}")

    def _reason(self, run: RunAtWork, code: int) -> str:
        """Return the last error in the log of a run."""
        with self._log(run).open("rb") as file:
            file.seek(run.log_begins)
            lines = file.read().decode("utf-8", errors="replace").splitlines()
        errors = [line.partition("error: ")[2] for line in lines if line.startswith("l2e-ds: error: ")]
        said = errors[-1] if errors else f"exit code {code}"
        return f"{said} (log: {self._log(run)})"


def say(line: str) -> None:
    """Print a line of `l2e-ds study` on stderr."""
    console.say(f"l2e-ds study: {line}")
