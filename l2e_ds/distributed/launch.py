"""Find out where a launcher put this process: its rank, the number of ranks, and where they meet."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from l2e_ds.errors import ConfigError, L2EError


@dataclass(frozen=True)
class Launch:
    """Holds this process's rank among `size`, its local rank on the node, and the launcher that said so."""

    launcher: str
    rank: int
    size: int
    local_rank: int


def find_launch(environment: dict[str, str] | None = None) -> Launch:
    """Read the launcher's variables, without touching the network. Raises ConfigError if they contradict each other."""
    env = dict(os.environ) if environment is None else environment

    def read(*names: str) -> list[int]:
        try:
            return [int(env[name]) for name in names]
        except KeyError as error:
            raise ConfigError(
                f"launcher: {names[0]} is set but {error.args[0]} is not; start through a launcher, or unset {names[0]}"
            ) from None
        except ValueError:
            given = {name: env[name] for name in names}
            raise ConfigError(f"launcher: expected numbers, got {given}") from None

    if "RANK" in env:
        launch = Launch("torchrun or deepspeed", *read("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    elif "OMPI_COMM_WORLD_SIZE" in env:
        prefix = "OMPI_COMM_WORLD"
        launch = Launch("mpirun", *read(f"{prefix}_RANK", f"{prefix}_SIZE", f"{prefix}_LOCAL_RANK"))
    elif "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:  # inside srun; a bare batch script has no step of its own
        launch = Launch("srun", *read("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))
    elif "PMI_SIZE" in env:  # MPICH, Intel MPI; mpi4py then finds the rest
        rank, size = read("PMI_RANK", "PMI_SIZE")
        launch = Launch("mpirun", rank, size, int(env.get("MPI_LOCALRANKID", rank)))
    elif "PMIX_RANK" in env:
        # several such tasks would each consider themselves the only one (docs/deepspeed.md, row 10)
        raise ConfigError(
            "launcher: PMIX_RANK is set, but the number of ranks is not; set RANK, WORLD_SIZE, LOCAL_RANK"
        )
    else:
        launch = Launch("alone", 0, 1, 0)
    if not 0 <= launch.rank < launch.size:
        raise ConfigError(f"launcher: rank {launch.rank} of {launch.size} ranks ({launch.launcher})")
    if "RANK" in env:
        read("RANK", "MASTER_PORT")
        if not env.get("MASTER_ADDR"):
            raise ConfigError("launcher: RANK is set but MASTER_ADDR is not; start through a launcher, or unset RANK")
    return launch


def free_port() -> int:
    """Return a TCP port of this host on which nobody listens, for a rendezvous.

    It lies below 32768, where Linux begins to take the ports of outgoing connections: one of these will hardly take it
    before it is used.
    """
    while True:
        port = random.SystemRandom().randrange(11_000, 32_768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def run_on_launched_ranks(action: Callable[[Launch], None]) -> int:
    """Run `action` on every rank and return the exit code; an error that all ranks raise alike is raised on rank 0
    only (`is_reported_here`)."""
    launch = find_launch()
    try:
        action(launch)
    except L2EError as error:
        from l2e_ds.distributed import collectives  # with torch, which SLURM's batch script, too, need not wait for

        if is_reported_here(error, launch, have_met=collectives.size() == launch.size):
            raise
        time.sleep(1.0)  # a launcher ends all ranks when one has ended: rank 0 must print its error before
        return error.exit_code
    return 0


def is_reported_here(error: L2EError, launch: Launch, have_met: bool) -> bool:
    """Return whether this rank is to print an error: rank 0, and any rank that has one of its own.

    Before the ranks have met in a process group, an error that all should raise alike may be this host's alone (a file
    system that is not mounted there): one rank of each host prints it.
    """
    return launch.rank == 0 or not error.on_every_rank or (not have_met and launch.local_rank == 0)


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the variables by which a launcher addresses its ranks."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {
        name: value
        for name, value in environment.items()
        if name not in names and not name.startswith(("SLURM_STEP", "SLURM_PROCID", "SLURM_LOCALID"))
    }
