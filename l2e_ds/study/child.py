"""Start the commands of a study, in sessions of their own; none outlives the study itself."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from l2e_ds.study.definition import Evaluation

LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1
LEAVE_SECONDS = 10.0  # for an evaluation to end after SIGTERM


class Child:
    """A command in a session of its own, which signals to this process's group do not reach."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path | None = None) -> None:
        with contextlib.ExitStack() as stack:
            file = None
            if log is not None:
                log.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(log.open("ab"))
            self.process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                preexec_fn=lambda: LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0),
            )

    def kill(self) -> None:
        """End the command and all that it started: by SIGTERM, then by SIGKILL.

        It is for commands that lose nothing by it. Nothing happens to one that has ended already.
        """
        if self.process.poll() is not None:
            return
        processes: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            processes.append(psutil.Process(self.process.pid))
            processes += processes[0].children(recursive=True)
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        for process in psutil.wait_procs(processes, timeout=LEAVE_SECONDS)[1]:
            with contextlib.suppress(psutil.Error):
                process.kill()


def evaluation_words(directory: Path, evaluation: Evaluation) -> list[str]:
    """Return the words of `l2e-ds` that evaluate a run."""
    words = ["evaluate", str(directory), "--tasks", *evaluation.tasks]
    if evaluation.num_fewshot is not None:
        words += ["--num-fewshot", str(evaluation.num_fewshot)]
    if evaluation.include_path:
        words += ["--include-path", *evaluation.include_path]
    if evaluation.limit is not None:
        words += ["--limit", str(evaluation.limit)]
    return words
