"""Start a real SLURM of two nodes on this machine (munged, slurmctld, two slurmd), for tests and measurements."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from l2e_ds.distributed.launch import free_port
from l2e_ds.errors import L2EError

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "sinfo")

CONFIGURATION = """\
ClusterName=l2e
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
FirstJobId={first_job}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdTimeout=10
KillWait=10
NodeName=DEFAULT CPUs=2 Boards=1 SocketsPerBoard=1 CoresPerSocket=2 ThreadsPerCore=1 RealMemory=2000
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second}
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=2
"""


def why_not() -> str | None:
    """Return what prevents a SLURM from being started here, or None."""
    if not all(shutil.which(program) for program in PROGRAMS):
        return "SLURM is not installed; on Debian: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "only root can start a SLURM here"
    return None


@contextmanager
def virtual_slurm() -> Iterator[dict[str, str]]:
    """Yield the environment in which srun, sbatch and scontrol reach the cluster; none of it outlives the block.

    Raises L2EError if it does not start.
    """
    folder = Path(tempfile.mkdtemp(prefix="l2e-slurm-", dir="/tmp"))  # a socket's path is limited to 108 bytes
    try:
        _start_munge(folder)
        controller, first, second = (free_port() for _ in range(3))
        configuration, host = folder / "slurm.conf", socket.gethostname().split(".")[0]
        # ranks of a job meet at a port that follows from its id, and another cluster may run on this machine
        first_job = random.randrange(1, 20_000)
        configuration.write_text(
            CONFIGURATION.format(
                host=host, folder=folder, controller=controller, first=first, second=second, first_job=first_job
            )
        )
        environment = {**os.environ, "SLURM_CONF": str(configuration)}
        (folder / "state").mkdir()
        _start(["slurmctld"], environment)
        for node in ("n1", "n2"):
            (folder / f"spool.{node}").mkdir()
            _start(["slurmd", "-N", node], environment)
        deadline = time.monotonic() + 60
        while ready_nodes(environment) != {"n1", "n2"}:
            if time.monotonic() > deadline:
                logs = "\n".join(file.read_text()[-1500:] for file in sorted(folder.glob("slurm*.log")))
                raise L2EError(f"SLURM did not start:\n{logs}")
            time.sleep(0.5)
        yield environment
    finally:
        _stop(folder)
        shutil.rmtree(folder, ignore_errors=True)


def bring_back_node(environment: dict[str, str], name: str) -> None:
    """Start a node's slurmd again, after `kill_node` and once SLURM has missed it. Raises L2EError."""
    # SLURM 22.05 may still consider the requeued job to be completing there; an administrator fixes that in this way
    down = ["scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=killed"]
    subprocess.run(down, env=environment, check=True, capture_output=True)
    _start(["slurmd", "-N", name], environment)


def kill_node(environment: dict[str, str], name: str) -> list[str]:
    """Send SIGKILL to slurmd and to all that it started, as when the power fails (but sockets are closed).

    Returns the names of the killed processes.
    """
    slurmd = psutil.Process(int((Path(environment["SLURM_CONF"]).parent / f"slurmd.{name}.pid").read_text()))
    doomed = {slurmd.pid: slurmd}
    for process in psutil.process_iter():
        try:
            variables = process.environ()
            here = variables.get("SLURM_CONF") == environment["SLURM_CONF"]
            if here and variables.get("SLURMD_NODENAME") == name and "SLURM_JOB_ID" in variables:
                doomed[process.pid] = process
                for parent in process.parents():
                    if parent.name() == "slurmstepd":
                        doomed[parent.pid] = parent
        except psutil.Error:
            continue
    # power fails for all at once: a slurmstepd that outlived the batch script by an instant would still report its end,
    # and SLURM would consider the job failed, instead of without its node
    names = {}
    for pid, process in doomed.items():
        with contextlib.suppress(psutil.Error):
            names[pid] = process.name()
    for action in (psutil.Process.suspend, psutil.Process.kill):
        for pid in sorted(names, key=lambda pid: names[pid] not in ("slurmd", "slurmstepd")):
            with contextlib.suppress(psutil.Error):
                action(doomed[pid])
    return list(names.values())


def _stop(folder: Path) -> None:
    """End the daemons, and what they leave running: slurmstepd, unfinished jobs, slurmctld's own helper."""
    daemons = []
    for file in folder.glob("*.pid"):
        with contextlib.suppress(ValueError, psutil.Error):
            daemons.append(psutil.Process(int(file.read_text())))
            daemons[-1].terminate()
    psutil.wait_procs(daemons, timeout=20)
    configuration = f"SLURM_CONF={folder}/slurm.conf".encode()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            # not process.environ(): slurmstepd overwrites the first part, and psutil reads no further than that
            if configuration in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                process.kill()


def _start_munge(folder: Path) -> None:
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    folder.chmod(0o755)  # munged refuses folders to which others may write
    names = {"key-file": "key", "socket": "socket"}
    files = [f"--{option}={folder}/munge.{name}" for option, name in names.items()]
    files += [f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed")]
    _start(["munged", "--force", *files], dict(os.environ))


def _start(daemon: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(daemon, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise L2EError(f"{' '.join(daemon)}: {done.stdout}{done.stderr}")


def ready_nodes(environment: dict[str, str]) -> set[str]:
    """Return the names of the nodes that respond and take jobs.

    Idle ones are not enough: SLURM 22.05 may list a node for minutes as `mixed` after the job on it is gone.
    """
    command = ["sinfo", "--noheader", "--Node", "--format=%N %T"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True).stdout
    states = [line.split() for line in said.splitlines()]
    return {name for name, state in states if state in ("idle", "mixed", "allocated")}
