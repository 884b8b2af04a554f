"""Ask SLURM what it knows of this step: the job's id, the address of its first node, and a port of its own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping

from l2e_ds.errors import ConfigError


def this_job() -> str | None:
    """Return this job's id as SLURM's commands take it, or None outside of a job."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:  # one task of an array has the array's own id, which would mean all tasks
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def scontrol(*words: str) -> str:
    """Return what a command of SLURM's scontrol prints. Raises OSError and SubprocessError."""
    return subprocess.run(["scontrol", *words], capture_output=True, text=True, check=True, timeout=60).stdout


def set_first_host() -> None:
    """Set MASTER_ADDR, unless it is set, to the address by which SLURM reaches the first node of this step, or of this
    job. Raises ConfigError."""
    if "MASTER_ADDR" in os.environ:
        return
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    try:
        listed = scontrol("show", "hostnames", nodes).split()
        address = scontrol("show", "node", listed[0], "--oneliner")
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise ConfigError(f"srun: cannot find the first node of {nodes!r} ({error}); set MASTER_ADDR") from None
    # NodeAddr is what SLURM itself connects to; a node's name need not resolve
    found = next((word[9:] for word in address.split() if word.startswith("NodeAddr=")), listed[0])
    os.environ["MASTER_ADDR"] = found


def rendezvous_port(environment: Mapping[str, str]) -> int:
    """Return a port that every task of this job step computes alike, and other steps and jobs on the node do not.

    Jobs on one node have ids close to each other, steps count from 0: all pairs of up to 220 neighbouring jobs with
    up to 100 steps each get ports of their own. Ports are below 32768, where Linux begins to take those of outgoing
    connections. If something else holds the port, the step ends; the supervisor's next step has another id and port.
    """
    job, step = int(environment.get("SLURM_JOB_ID", 0)), environment["SLURM_STEP_ID"]
    return 10_000 + (job * 101 + (int(step) if step.isdigit() else 0)) % 22_501
