"""Start a run through any launcher, stop it without losing a step, and restart it after a failure:

    python -m l2e_ds.supervise [--restarts N] RUN.yaml [section.key=value ...] -- LAUNCHER ...

runs `LAUNCHER ... RUN.yaml section.key=value ...`, e.g. with `-- torchrun --nproc-per-node 8 -m l2e_ds.train`.
Launchers pass signals on badly (docs/deepspeed.md, row 8), so launcher and ranks get a session of their own, which
signals to this process's group do not reach. Instead the file `stop` in the run directory, for which rank 0 looks at
every step, asks the run to stop. Exit codes are those of `l2e-ds train` (docs/run-directory.md).
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from l2e_ds import console
from l2e_ds.config.reading import load_run_config
from l2e_ds.console import split_at_dashes
from l2e_ds.errors import ConfigError, Interrupted, TrainingError
from l2e_ds.run_directory import stop_file
from l2e_ds.run_directory.lock import RunLock
from l2e_ds.run_directory.names import EXIT_FILE, finished_checkpoints, newest_step
from l2e_ds.supervise.launcher import check_hosts, launch_command
from l2e_ds.supervise.processes import SignsOfLife, kill_all, leftovers
from l2e_ds.system import signals
from l2e_ds.system.process import adopt_orphans

STOPPED = Interrupted.exit_code
FINAL = {
    ConfigError.exit_code: "refused: change what the error names, and start again",
    TrainingError.exit_code: "the run cannot continue",
    STOPPED: "stopped as asked",
}
"""Exit codes after which a restart is useless, and what they mean."""
POLL = 0.2  # seconds
ORPHANED_AFTER = 0.5
"""Seconds after the end of the launcher after which the remaining ranks are asked to stop."""


@dataclass(frozen=True)
class End:
    """Holds how a launch ended.

    code: of the launcher; negative: the signal that killed it. noted: exit codes that ranks on this machine noted
    (torchrun turns all codes into 1). asked: whether somebody wanted the run to stop. to_restart: whether a supervisor
    on another host stopped it only to restart it.
    """

    code: int
    noted: Sequence[int]
    asked: bool
    to_restart: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Supervise the run of a command line, and return its exit code."""
    console.open_streams()
    words, launcher = split_at_dashes(sys.argv[1:] if argv is None else argv)
    parser = console.CommandParser(
        usage="python -m l2e_ds.supervise [--restarts N] RUN.yaml [section.key=value ...] -- LAUNCHER ..."
    )
    parser.add_argument("--restarts", metavar="N", default=os.environ.get("L2E_DS_RESTARTS") or "3")
    console.add_run_file_arguments(parser)
    arguments = parser.parse_args(words)
    try:
        if not launcher:
            raise ConfigError("give the launcher after --, e.g. -- torchrun --nproc-per-node 8 -m l2e_ds.train")
        if shutil.which(launcher[0]) is None:
            raise ConfigError(f"no such launcher: {launcher[0]}")
        if not arguments.restarts.isdecimal():
            raise ConfigError(f"--restarts (or L2E_DS_RESTARTS): got {arguments.restarts!r}, allowed: an integer >= 0")
        return supervise(launcher, arguments.run_file, arguments.overrides, int(arguments.restarts))
    except ConfigError as error:
        say(f"error: {error}")
        return error.exit_code


def supervise(launcher: Sequence[str], run_file: str, overrides: Sequence[str], restarts: int) -> int:
    """Start a run, and start it again after failures, at most `restarts` times; return the exit code.

    Raises ConfigError before anything is started.
    """
    training = load_run_config(run_file, overrides).training
    check_hosts(launcher)
    directory, timeout = Path(training.run_directory), 60 * training.timeout
    first = launch_command(launcher, [run_file, *overrides])
    again = launch_command(launcher, [run_file, *overrides, "training.resume=auto"])
    requeued = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0

    adopt_orphans()  # ranks that lose their launcher
    signals.listen()
    if requeued:  # ranks of this very job may be left on a node that SLURM lost contact with
        wait_until_free(directory, timeout)
    elif not any(word.startswith("--nnodes") for word in launcher):  # torchrun: other hosts' ranks may be waiting
        be_alone(directory)

    for attempt in range(1 + restarts):
        if attempt:
            is_asked_to_stop = wait_until_free(directory, timeout)
            if signals.received:
                break
            if is_asked_to_stop:
                say(f"start {attempt + 1}: {FINAL[STOPPED]}, before it began")
                return STOPPED
        # whatever checkpoint this run was to start from, by now it has some of its own
        command = again if (attempt or requeued) and finished_checkpoints(directory) else first
        say(f"start {attempt + 1} of at most {1 + restarts}: {shlex.join(command)}")
        end = run_once(command, run_file, directory, patience=2 * timeout)
        code, why = judge(end, newest_step(directory), training.steps)
        say(f"end of start {attempt + 1}: {why}")
        if code == 0 or code in FINAL or end.asked:
            break
    return code


def run_once(command: Sequence[str], run_file: str, directory: Path, patience: float) -> End:
    """Start the launcher and wait until it and all processes of the run on this machine have ended.

    patience: seconds that ranks may take to save and leave, once asked, and for which the run may show no sign of life,
    before they are killed. A rank that hangs is ended by the others; this is for the case that all hang.
    """
    with tempfile.NamedTemporaryFile("r", prefix="l2e-ds-exit-codes-") as noted:
        launcher = subprocess.Popen(
            command,
            env={**os.environ, EXIT_FILE: noted.name},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            # launchers would die of this signal and leave their ranks; ranks set their own handler
            preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN),
        )
        life = SignsOfLife(directory)
        ended_at: float | None = None  # when the launcher ended
        asked_at: float | None = None
        killed = to_restart = False
        while launcher.poll() is None or leftovers(launcher.pid, run_file):
            now = time.monotonic()
            if launcher.returncode is not None and ended_at is None:
                ended_at = now
            if asked_at is None:
                to_restart = to_restart or stop_file.is_asked_to_restart(directory)
                orphaned = ended_at is not None and now > ended_at + ORPHANED_AFTER
                if signals.received or orphaned:
                    asked_at = now
                    say("asking the run to save and stop" + (": its launcher has ended" if ended_at else ""))
                    stop_file.ask_to_stop(directory, to_restart=not signals.received)
            if not killed:
                frozen = life.are_missing_for(patience)
                late = asked_at is not None and now > asked_at + patience
                if frozen or late or signals.are_impatient():
                    silence = f": no sign of life for {patience / 60:g} minutes" if frozen else ""
                    say(f"killing all processes of the run{silence}")
                    kill_all(command)
                    killed = True
            time.sleep(POLL)
        if asked_at is not None and not signals.are_impatient():  # else other hosts must still see the file
            stop_file.honour(directory)
        code = -signal.SIGKILL if killed and launcher.returncode == 0 else launcher.returncode
        asked = bool(signals.received) or stop_file.is_asked_to_stop(directory)
        codes = [int(word) for word in noted.read().split()]
        return End(code, codes, asked, to_restart and not signals.received)


def judge(end: End, step: int, steps: int) -> tuple[int, str]:
    """Return the exit code for the end of a launch, and why.

    step: of the newest checkpoint; steps: of the whole run.
    """
    code, noted, asked = end.code, end.noted, end.asked
    if end.to_restart and not asked and step < steps and STOPPED in (code, *noted):
        return 1, "stopped to be restarted"
    for final in (code, ConfigError.exit_code, TrainingError.exit_code):
        if final in FINAL and final in (code, *noted):
            return final, FINAL[final]
    # ranks also leave in agreement when their launcher was killed, which nobody asked for; `deepspeed` then returns 0
    if STOPPED in noted and (asked or code > 0 or -code in signals.ASK_TO_STOP):
        return STOPPED, FINAL[STOPPED]
    if code == 0 and step >= steps:
        return 0, f"finished at step {step}"
    if code == 0:
        said = f"the launcher says 0, but the newest checkpoint is of step {step} of {steps}"
        return (STOPPED, f"stopped as asked; {said}") if asked else (1, said)
    killer = killed_by(code)
    name = f" ({killer.name})" if killer else ""
    return (128 - code if code < 0 else code), f"exit code {code}{name}"


def killed_by(code: int) -> signal.Signals | None:
    """Return the signal that a launcher's exit code stands for, or None.

    A negative code is the launcher's own end. DeepSpeed's launch.py exits with the code of a rank, and of -9 the system
    keeps the lowest byte, 247. There the smallest signals are left out: 251 to 255 are also exit codes of programs, 255
    that of ssh.
    """
    number = -code if code < 0 else 256 - code
    if number not in set(signal.Signals) or (code > 0 and number < signal.SIGABRT):
        return None
    return signal.Signals(number)


def wait_until_free(directory: Path, patience: float) -> bool:
    """Wait until no run holds the directory, asking one that does to stop. Return whether somebody has asked the run to
    stop for good meanwhile.

    Ranks on other hosts, which are not seen from here, may outlive their launcher while they save.
    """
    lock, deadline, is_asked = RunLock(directory), time.monotonic() + patience, False
    while lock.path.exists() and time.monotonic() < deadline and not signals.received:
        if (refusal := lock.why_not_free()) is not None:
            if not is_asked:
                say(f"the run directory is not free yet; asking a run that may be there to stop: {refusal}")
            is_asked = True
            stop_file.ask_to_stop(directory, to_restart=True)
            time.sleep(5)
    is_asked_to_stop = stop_file.is_asked_to_stop(directory)
    stop_file.honour(directory)
    return is_asked_to_stop


def be_alone(directory: Path) -> None:
    """Refuse to start beside a living run, which a signal to this process would stop. Raises ConfigError.

    A stop file that was meant for a run that is over is removed.
    """
    lock = RunLock(directory)
    if not (lock.path.exists() or stop_file.stop_file(directory).exists()):
        return
    with lock:
        stop_file.remove(directory)


def say(line: str) -> None:
    """Print a line of the supervisor on stderr."""
    console.say(f"l2e-ds: {line}")
