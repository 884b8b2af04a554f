"""A real SLURM of two nodes on this machine: munged, slurmctld and two slurmd, started and stopped by a fixture."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sinfo")
INSTALL = "SLURM is not installed; on Debian: apt-get install slurm-wlm munge"

CONFIGURATION = """\
ClusterName=l2e
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
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


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _start_munge(folder: Path) -> None:
    """As a user of its own: munged refuses root's folders only where others may write to them."""
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    folder.chmod(0o755)
    subprocess.run(
        [
            *("munged", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"),
            *(
                f"--pid-file={folder}/munged.pid",
                f"--log-file={folder}/munged.log",
                f"--seed-file={folder}/munged.seed",
            ),
        ],
        check=True,
        capture_output=True,
    )


def _start(daemon: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(daemon, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{daemon}: {done.stdout}{done.stderr}"


def _idle_nodes(environment: dict[str, str]) -> int:
    listed = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N"],
        env=environment,
        capture_output=True,
        text=True,
    )
    return len(listed.stdout.split())


def _stop(folder: Path) -> None:
    """The daemons, and what they leave running: slurmstepd and the jobs of a test that failed."""
    for file in folder.glob("*.pid"):
        try:
            os.kill(int(file.read_text()), signal.SIGTERM)
        except (ValueError, ProcessLookupError):
            continue
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ours = process.environ().get("SLURM_CONF") == str(folder / "slurm.conf")
            if ours and process.name() not in ("slurmctld", "slurmd"):
                process.kill()


@pytest.fixture(scope="session")
def slurm() -> Iterator[dict[str, str]]:
    """The environment in which srun, sbatch and scontrol reach the cluster."""
    if not all(shutil.which(program) for program in PROGRAMS):
        pytest.skip(INSTALL)
    if os.geteuid() != 0:
        pytest.skip("the SLURM of the tests is started as root")
    folder = (
        Path("/tmp") / f"l2e-slurm-{os.getpid()}"
    )  # short: a socket's path is limited, and munged checks its parents
    folder.mkdir()
    try:
        _start_munge(folder)
        controller, first, second = _free_ports(3)
        host = socket.gethostname().split(".")[0]
        configuration = folder / "slurm.conf"
        configuration.write_text(
            CONFIGURATION.format(host=host, folder=folder, controller=controller, first=first, second=second)
        )
        environment = {**os.environ, "SLURM_CONF": str(configuration)}
        (folder / "state").mkdir()
        _start(["slurmctld"], environment)
        for node in ("n1", "n2"):
            (folder / f"spool.{node}").mkdir()
            _start(["slurmd", "-N", node], environment)
        deadline = time.monotonic() + 60
        while _idle_nodes(environment) < 2:
            if time.monotonic() > deadline:
                logs = "\n".join(file.read_text()[-1500:] for file in folder.glob("*.log"))
                pytest.fail(f"SLURM did not start:\n{logs}")
            time.sleep(0.5)
        yield environment
    finally:
        _stop(folder)
        time.sleep(1)
        shutil.rmtree(folder, ignore_errors=True)
