"""Run and requeue a job of SLURM: batch scripts call this once, on the first node.

    python -m l2e_ds.slurm [--restarts N] RUN.yaml [section.key=value ...] -- srun ... python -m l2e_ds.train
    python -m l2e_ds.slurm [--restarts N] --list LIST -- srun ... python -m l2e_ds.train      (a task of an array job)

It runs the supervisor (l2e_ds.supervise), then decides whether SLURM is to start this job again: docs/slurm.md has the
table. A line of LIST is `RUN.yaml [section.key=value ...]`; array task k takes the k-th one, counted from 0.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from l2e_ds import console
from l2e_ds.config.reading import load_run_config
from l2e_ds.distributed.slurm_step import scontrol, set_first_host, this_job
from l2e_ds.errors import ConfigError, Interrupted, L2EError
from l2e_ds.run_directory import names
from l2e_ds.supervise import supervisor
from l2e_ds.system import signals

PROBE_SECONDS = 120


def main(argv: Sequence[str] | None = None) -> int:
    """Run the supervisor and return its exit code; the job may be requeued by then.

    An error that the user can fix is one line on stderr.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments, launcher = _parse(words)
        run = arguments.run if arguments.list is None else entry_of_this_task(arguments.list)
        return train(run, arguments.restarts, launcher)
    except L2EError as error:
        console.say(f"l2e-ds: error: {error}")
        return error.exit_code


def train(run: Sequence[str], restarts: str | None, launcher: Sequence[str]) -> int:
    """Run the supervisor and requeue this job if that is due; return the supervisor's exit code.

    run: `RUN.yaml` and overrides; restarts: as of l2e_ds.supervise. Raises ConfigError if the address of the first
    node cannot be found.
    """
    prepare_environment()
    step = _newest_step(run)
    options = [] if restarts is None else ["--restarts", restarts]
    code = supervisor.main([*options, *run, "--", *launcher])
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # requeueing a job sends SIGTERM to its batch script, which is this
    # a run that fails whenever it is to stop must not be requeued for ever: it must have new checkpoints
    broke_stopping = bool(signals.received) and not signals.are_impatient() and _newest_step(run) > step
    requeue_if_due(code, broke_stopping)
    return code


def _newest_step(run: Sequence[str]) -> int:
    """Return the step of the newest checkpoint; 0 also if the run file is wrong, which the supervisor reports."""
    try:
        return names.newest_step(Path(load_run_config(run[0], run[1:]).training.run_directory))
    except ConfigError:
        return 0


def _parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    before, launcher = console.split_at_dashes(words)
    parser = console.CommandParser(prog="python -m l2e_ds.slurm", description=__doc__)
    parser.add_argument("--restarts", metavar="N", help="as of l2e_ds.supervise")
    parser.add_argument("--list", type=Path, help="one run a line; this array task's line is run")
    parser.add_argument("run", nargs="*", metavar="RUN.yaml [section.key=value ...]")
    arguments = parser.parse_args(before)
    if (arguments.list is None) == (not arguments.run):
        parser.error("give either RUN.yaml or --list LIST")
    if not launcher:
        parser.error("the launcher is missing: ... RUN.yaml -- srun python -m l2e_ds.train")
    return arguments, launcher


def prepare_environment() -> None:
    """Set for srun what it does not find out by itself, and drop what the submitting shell left over.

    Raises ConfigError if the address of the first node cannot be found.
    """
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    for name in [name for name in os.environ if name.startswith("SLURM_STEP")]:
        del os.environ[name]  # sbatch called within a step passes that step's variables on
    if "SLURM_CPUS_PER_TASK" in os.environ:
        os.environ.setdefault("SRUN_CPUS_PER_TASK", os.environ["SLURM_CPUS_PER_TASK"])  # not inherited since 22.05
    # once here instead of once a rank: a thousand ranks that ask slurmctld at the same moment overload it
    set_first_host()


# --- lists of runs (array jobs) ----------------------------------------------------------------------------------


def list_entry(path: Path, task: int) -> list[str]:
    """Return `RUN.yaml` and overrides of array task `task`. Words are split as by a shell, but not expanded or run.

    Raises ConfigError (file and line) for a line that cannot be read, and for two lines that write to one directory.
    """
    entries: list[list[str]] = []
    directories: dict[Path, int] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or 'is not UTF-8 text'}") from None
    for number, line in enumerate(lines, start=1):
        try:
            if not (words := shlex.split(line, comments=True)):
                continue
            if words[0].startswith("-"):
                raise ConfigError(f"got {words[0]!r}, a line is RUN.yaml [section.key=value ...]")
            directory = Path(load_run_config(words[0], words[1:]).training.run_directory).absolute()
        except (ConfigError, ValueError) as error:
            raise ConfigError(f"{path}:{number}: {error}") from None
        if directory in directories:
            raise ConfigError(
                f"{path}:{number}: writes to {directory}, as line {directories[directory]} does;"
                " give each line its own training.run_directory=..."
            )
        directories[directory] = number
        entries.append(words)
    if task >= len(entries):
        raise ConfigError(f"{path}: has {len(entries)} runs, there is none for array task {task} (counted from 0)")
    return entries[task]


def entry_of_this_task(path: Path) -> list[str]:
    """Return the `list_entry` of this array task. Raises ConfigError."""
    task = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    if not task.isdecimal():
        raise ConfigError("--list: this is no task of an array job; use sbatch --array=0-N")
    return list_entry(path, int(task))


# --- requeueing --------------------------------------------------------------------------------------------------


def requeue_if_due(code: int, broke_stopping: bool) -> None:
    """Requeue this job if the run stopped on request, failed while it was to stop, or lost a node.

    broke_stopping: whether the batch script was asked to stop the run, which failed and was not restarted within this
    job, and has new checkpoints from this start.

    The job is not requeued if the user cancelled it (that would bring it back to life), or if SLURM has requeued it
    already. One line on stderr says what was done and why.
    """
    job = this_job()
    assert job is not None
    if code == Interrupted.exit_code:
        reason = "the run stopped on request"
    elif code == 0 or code in supervisor.FINAL:
        return
    elif broke_stopping:
        reason = "the run failed while it was to stop"
    elif not nodes_answer():
        reason = "a node does not answer"
    else:
        return
    try:
        # a job that is ending is COMPLETING for any cause; only Reason shows a time limit
        shown = dict(re.findall(r"\b(JobState|Reason)=(\S+)", scontrol("show", "job", job, "--oneliner")))
        state, why = (shown.get(key, "unknown") for key in ("JobState", "Reason"))
        if state != "RUNNING" and why != "TimeLimit":
            _say(f"{reason}; job {job} is not requeued: it was cancelled, or SLURM has requeued it (state {state})")
            return
        _say(f"{reason}; requeueing job {job}")
        scontrol("requeue", job)
    except (OSError, subprocess.SubprocessError) as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip()
        _say(f"{reason}, but job {job} could not be requeued ({detail}); submit it again to resume")


def nodes_answer() -> bool:
    """Return whether every node of the job can still start a task. SLURM itself may take minutes to notice."""
    nodes = os.environ.get("SLURM_JOB_NUM_NODES", "1")
    command = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "true"]
    try:
        return subprocess.run(command, capture_output=True, timeout=PROBE_SECONDS).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def _say(line: str) -> None:
    console.say(f"l2e-ds slurm: {line}")
