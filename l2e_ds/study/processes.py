"""The processes of a study: the devices and launchers of its runs on this machine, and the commands that it starts."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from l2e_ds.console import at_least
from l2e_ds.distributed.launch import free_port
from l2e_ds.errors import ConfigError
from l2e_ds.study.definition import Evaluation
from l2e_ds.system.process import end_with_parent

LEAVE_SECONDS = 10.0  # for an evaluation to end after SIGTERM


@dataclass(frozen=True)
class Place:
    """Holds where a run is computed. environment: the variables that differ from this process's."""

    ranks: int
    environment: Mapping[str, str]

    def launcher(self) -> list[str]:
        """Return the words before a module's name: those of launch/deepspeed.sh, or Python's alone for one rank."""
        if self.ranks == 1:
            return [sys.executable, "-u", "-m"]
        beside = Path(sys.executable).with_name("deepspeed")
        # given a number, the launcher ignores CUDA_VISIBLE_DEVICES; without one it takes all visible devices
        count = [] if "CUDA_VISIBLE_DEVICES" in self.environment else ["--num_accelerators", str(self.ranks)]
        program = str(beside) if beside.is_file() else "deepspeed"
        return [program, "--master_port", str(free_port()), "--log_level", "critical", *count, "--module"]


def places(devices: int | None, ranks: int | None, environment: Mapping[str, str]) -> list[Place]:
    """Return where runs are computed: one place for each run that is computed at the same time.

    devices: how many runs at a time, each on one device. ranks: of one run at a time (default: all GPUs, on CPUs 1).
    environment: this process's variables. Raises ConfigError for more devices than there are, and for both numbers.
    """
    import torch

    if devices is not None and ranks is not None:
        raise ConfigError("--ranks: with --devices every run has one rank; give one of them")
    cores = len(os.sched_getaffinity(0))
    gpus = 0 if environment.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()
    option, count = ("--devices", devices) if devices is not None else ("--ranks", ranks or gpus or 1)
    at_least(option, count, 1, gpus or cores)
    if gpus:
        visible = environment.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        if devices is None:
            return [Place(count, {"CUDA_VISIBLE_DEVICES": ",".join(visible[:count])})]
        return [Place(1, {"CUDA_VISIBLE_DEVICES": visible[index]}) for index in range(count)]
    threads = environment.get("OMP_NUM_THREADS", str(max(1, cores // count)))
    own = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": threads}
    return [Place(count, own)] if devices is None else [Place(1, own)] * count


class Child:
    """A command in a session of its own, which signals to this process's group do not reach.

    The kernel sends it SIGTERM when this process dies.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path | None = None) -> None:
        output: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            output = log.open("ab")
        with output as file:
            self.process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    def kill(self) -> None:
        """End the command, unless it has ended, and all that it started: by SIGTERM, then by SIGKILL."""
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
