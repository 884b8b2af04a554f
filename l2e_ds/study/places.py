"""Choose the devices and the launcher for the runs of a study on this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from l2e_ds.console import at_least
from l2e_ds.distributed.launch import free_port
from l2e_ds.errors import ConfigError


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
    """Return a place for each run at a time. Raises ConfigError for more devices than there are."""
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
