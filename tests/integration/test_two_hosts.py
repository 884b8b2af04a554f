"""`launch/deepspeed.sh` over two hosts through DeepSpeed's multi-node launcher: pdsh, ssh, launch.py on each.

A host is a network namespace with its own address, sshd, host name, /etc/hosts and processes (PID namespace); both see
one file system, as cluster nodes do. Their own names lead to 127.0.1.1, as Debian sets it up. The launcher starts on
the first host.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.integration.running import PATIENCE, lines
from tests.processes import REPOSITORY, finish
from tests.tolerances import rounding

NEEDED = ("sshd", "ssh", "pdsh", "ip", "unshare", "nsenter")
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])
MISSING = [name for name in NEEDED if shutil.which(name, path=PATH) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"no {MISSING}: apt-get install openssh-server pdsh iproute2 util-linux"),
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root: run as root"),
]


@dataclass
class Host:
    """A host that `hosts` has made; `init` is the process outside whose end is the host's power failure."""

    name: str
    namespace: str
    address: str
    folder: Path
    init: subprocess.Popen | None = None

    def start(self, authorized: Path) -> None:
        self.folder.mkdir()
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / "key"], check=True)
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n")
        (self.folder / "sshd_config").write_text(
            f"ListenAddress {self.address}\nHostKey {self.folder}/key\nAuthorizedKeysFile {authorized}\n"
            f"PidFile none\nUsePAM no\nStrictModes no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\n"
        )
        inside = 'hostname "$1" && mount --bind "$2/hosts" /etc/hosts && exec /usr/sbin/sshd -D -e -f "$2/sshd_config"'
        self.init = subprocess.Popen(
            [
                *("ip", "netns", "exec", self.namespace),
                *("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"),
                *("sh", "-c", inside, "sh", self.name, str(self.folder)),
            ],
            stderr=(self.folder / "sshd.log").open("w"),
        )

    def sshd(self) -> psutil.Process:
        return psutil.Process(self.init.pid).children()[0]

    def processes(self) -> list[tuple[psutil.Process, list[str]]]:
        """Return the processes here beside sshd, with their command lines."""
        found = []
        for process in self.sshd().children(recursive=True):
            try:
                words = process.cmdline()
            except psutil.Error:
                continue
            if words and not words[0].startswith("sshd"):
                found.append((process, words))
        return found

    def launcher(self) -> psutil.Process:
        return next(p for p, words in self.processes() if "deepspeed.launcher.launch" in words and "-u" in words)

    def rank(self) -> psutil.Process:
        return next(p for p, words in self.processes() if "l2e_ds.train" in words and "--no_python" not in words)


@dataclass
class Cluster:
    hosts: list[Host]
    environment: dict[str, str]
    folder: Path
    logs: list[Path] = field(default_factory=list)

    def launch(self, *arguments: object) -> subprocess.Popen:
        """Start launch/deepspeed.sh on the first host, with its network, names and files, as a child of the test."""
        self.logs.append(self.folder / f"launch{len(self.logs)}.log")
        return subprocess.Popen(
            [
                *("nsenter", "--net", "--mount", "--uts", "--target", str(self.hosts[0].sshd().pid)),
                # with the /proc that fits a process outside of the host's PID namespace
                *("unshare", "--mount", "sh", "-c", 'mount -t proc proc /proc && cd "$1" && shift && exec "$@"', "sh"),
                str(self.folder),
                *(str(REPOSITORY / "launch/deepspeed.sh"), "--hostfile", str(self.folder / "hostfile")),
                *map(str, arguments),
            ],
            env=self.environment,
            stdout=self.logs[-1].open("w"),
            stderr=subprocess.STDOUT,
        )

    def said(self) -> str:
        return self.logs[-1].read_text()

    def idle(self) -> bool:
        return not any(host.processes() for host in self.hosts)


@pytest.fixture
def cluster(tmp_path) -> Iterator[Cluster]:
    Path("/run/sshd").mkdir(exist_ok=True)
    folder = tmp_path / "cluster"
    folder.mkdir()
    hosts = [Host(f"node{n}", f"l2e-{os.getpid()}-{n}", f"10.231.77.{n}", folder / f"node{n}") for n in (1, 2)]
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
    try:
        for host in hosts:
            subprocess.run(["ip", "netns", "add", host.namespace], check=True)
        pair = [
            "eth0",
            "netns",
            hosts[0].namespace,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            hosts[1].namespace,
        ]
        subprocess.run(["ip", "link", "add", *pair], check=True)
        for host in hosts:
            for command in (f"addr add {host.address}/24 dev eth0", "link set eth0 up", "link set lo up"):
                subprocess.run(["ip", "-n", host.namespace, *command.split()], check=True)
            host.start(folder / "key.pub")
        known = [f"{host.address} {(host.folder / 'key.pub').read_text()}" for host in hosts]
        (folder / "known_hosts").write_text("".join(known))
        (folder / "ssh_config").write_text(
            f"Host *\n  IdentityFile {folder}/key\n  UserKnownHostsFile {folder}/known_hosts\n  User root\n"
            "  StrictHostKeyChecking yes\n  BatchMode yes\n"
        )
        ssh = folder / "bin" / "ssh"  # the real one, with our keys instead of root's
        ssh.parent.mkdir()
        ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
        ssh.chmod(0o755)
        (folder / "hostfile").write_text("".join(f"{host.address} slots=1\n" for host in hosts))
        environment = {
            **{k: v for k, v in os.environ.items() if k not in ("MASTER_PORT", "MASTER_ADDR")},
            "PYTHONPATH": str(REPOSITORY),
            "PATH": f"{ssh.parent}:{PATH}",
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "HF_HUB_OFFLINE": "1",
            "PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=2 -o ServerAliveCountMax=2",
        }
        yield Cluster(hosts, environment, folder)
    finally:
        for host in hosts:
            if host.init is not None:
                host.init.kill()  # and with it everything on that host
                host.init.wait()
            subprocess.run(["ip", "netns", "delete", host.namespace])


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    """Wait until the run has made so many steps."""
    while not any(line["step"] >= step for line in lines(run)):
        assert process.poll() is None, f"ended with {process.returncode} before step {step}"
        time.sleep(0.05)


STEPS = 300
"""Enough steps that the run is not finished when it is disturbed."""
FOR_EVER = "training.steps=1000000"
ROUNDING = rounding(STEPS, layers=4, tokens=8 * 16)


@pytest.mark.full
def test_two_hosts(cluster, run_file, tmp_path):
    overrides = [f"training.steps={STEPS}", "checkpoint.every=10", "training.evaluate_every=0", "training.timeout=0.4"]
    alone = tmp_path / "alone"
    # the same micro-batches as on the two hosts: the projected loss depends on that cut (docs/method.md 5.2)
    whole = [f"training.run_directory={alone}", "training.micro_batch=4"]
    codes, said = finish("-m", "l2e_ds.train", run_file, *overrides, *whole)
    assert codes == [0], said
    expected = lines(alone)

    # what the remote shells are given must be these words and nothing else
    odd = cluster.folder / "; touch pwned; $(touch pwned) `touch pwned` \"'%n\\ &"
    odd.mkdir()
    moved = shutil.copy(run_file, odd / "$(touch pwned);'%h.yaml")
    run = odd / "run"
    words = [moved, *overrides, f"training.run_directory={run}"]

    _a_signal_stops_both_hosts(cluster, words, run)
    _a_lost_launcher_is_restarted(cluster, words, run)
    assert [line["step"] for line in lines(run)] == [line["step"] for line in expected]
    for line, other in zip(lines(run), expected, strict=True):
        assert line["lm_loss"] == pytest.approx(other["lm_loss"], rel=ROUNDING), line["step"]
    assert not [path for path in (*cluster.folder.rglob("*"), *Path.home().iterdir()) if path.name == "pwned"]

    _a_dead_host_ends_the_run(cluster, [run_file, *overrides, FOR_EVER], tmp_path / "run")


def _a_signal_stops_both_hosts(cluster, words, run) -> None:
    launch = cluster.launch(*words, FOR_EVER)
    wait_for_step(run, 13, launch)
    assert lines(run, "start")[0]["ranks"] == 2
    assert all(host.rank() for host in cluster.hosts)
    launch.send_signal(signal.SIGTERM)
    assert launch.wait(PATIENCE) == 75, cluster.said()
    assert cluster.idle()
    assert "stop was written" in cluster.said()
    saved = (run / "checkpoints/latest").read_text().strip()
    assert int(saved.removeprefix("step")) == lines(run)[-1]["step"] >= 13
    assert not (run / "stop").exists()


def _a_lost_launcher_is_restarted(cluster, words, run) -> None:
    done = lines(run)[-1]["step"]
    launch = cluster.launch("--restarts", "1", *words)
    wait_for_step(run, done + 2, launch)
    cluster.hosts[1].launcher().kill()
    assert launch.wait(PATIENCE) == 0, cluster.said()
    assert "start 2 of at most 2" in cluster.said()
    assert cluster.idle()


def _a_dead_host_ends_the_run(cluster, words, run) -> None:
    launch = cluster.launch("--restarts", "0", *words)
    wait_for_step(run, 3, launch)
    host = cluster.hosts[1]
    subprocess.run(["ip", "-n", host.namespace, "link", "set", "eth0", "down"], check=True)  # no goodbye is heard
    host.init.kill()
    assert launch.wait(PATIENCE) not in (0, 2, 3, 75), cluster.said()
    assert "host node2" in cluster.said() and "silent" in cluster.said()
    assert not cluster.hosts[0].processes()
