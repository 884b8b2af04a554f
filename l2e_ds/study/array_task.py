"""Run one task of a study's array job, on its first node:

    python -m l2e_ds.study.array_task [--restarts N] STUDY/slurm-1/list -- srun ... python -m l2e_ds.train

It trains the run of this task's line as any array task (l2e_ds.slurm: signals, restarts, requeueing), then evaluates it
by the same srun, then updates results.csv.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from l2e_ds.config.reading import load_run_config
from l2e_ds.console import CommandParser, say, split_at_dashes
from l2e_ds.errors import Interrupted, L2EError
from l2e_ds.slurm import job
from l2e_ds.study.collect import collect, write_results
from l2e_ds.study.definition import Evaluation
from l2e_ds.study.processes import Child, evaluation_words
from l2e_ds.study.state import read_index, state_of
from l2e_ds.system import signals


def main(argv: Sequence[str] | None = None) -> int:
    """Run the task and return its exit code, as of l2e_ds.slurm; the job may be requeued by then."""
    words, launcher = split_at_dashes(sys.argv[1:] if argv is None else argv)
    parser = CommandParser(prog="python -m l2e_ds.study.array_task", description=__doc__)
    parser.add_argument("--restarts", metavar="N", default="3")
    parser.add_argument("list", type=Path, metavar="LIST")
    arguments = parser.parse_args(words)
    try:
        entry = job.entry_of_this_task(arguments.list)
        training = load_run_config(entry[0]).training
        study, run = arguments.list.parent.parent, Path(training.run_directory)
        evaluations = read_index(study).evaluate
        if not state_of(run, training.steps, evaluations).trained:
            code = job.train(entry, arguments.restarts, launcher)
            if code != 0:
                return code
        code = _evaluate(run, state_of(run, training.steps, evaluations).missing, launcher)
        table = None
        while table is None or not _of_ended_runs(collect(study)).equals(_of_ended_runs(table)):
            table = collect(study)  # tasks that end together may overwrite each other's
            write_results(study, table)
    except L2EError as error:
        say(f"l2e-ds: error: {error}")
        return error.exit_code
    return code


def _of_ended_runs(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that do not change as other tasks train."""
    return table[table["state"].isin(("done", "not evaluated"))]


def _evaluate(run: Path, evaluations: Sequence[Evaluation], launcher: Sequence[str]) -> int:
    """Make the evaluations in turn, by the launcher of training. If it is asked to stop, the job is requeued."""
    job.prepare_environment()
    signals.listen((signal.SIGUSR1, signal.SIGTERM))
    for evaluation in evaluations:
        child = Child([*launcher[:-1], "l2e_ds.cli", *evaluation_words(run, evaluation)], os.environ)
        while child.process.poll() is None and not signals.received:
            time.sleep(0.2)
        if signals.received:
            child.kill()
            job.requeue_if_due(Interrupted.exit_code, broke_stopping=False)
            return Interrupted.exit_code
        if child.process.returncode != 0:
            return child.process.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
