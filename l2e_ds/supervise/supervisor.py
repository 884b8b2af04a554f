"""Starts a run through any launcher, stops it without losing a step, and restarts it after a failure:

    python -m l2e_ds.supervise [--restarts N] RUN.yaml [section.key=value ...] -- LAUNCHER ...

runs `LAUNCHER ... RUN.yaml section.key=value ...`, e.g. with `-- torchrun --nproc-per-node 8 -m l2e_ds.train`.
Launchers pass signals on badly (docs/deepspeed.md, row 8), so launcher and ranks get a session of their own,
which signals to this process's group do not reach; the run is asked to stop by the file `stop` in its run directory
instead, which rank 0 looks for at every step. Exit codes are those of `l2e-ds train` (docs/clusters.md).
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

from l2e_ds import console
from l2e_ds.config.reading import load_run_config
from l2e_ds.console import split_at_dashes
from l2e_ds.errors import ConfigError, Interrupted, TrainingError
from l2e_ds.run_directory.lock import RunLock
from l2e_ds.run_directory.names import EXIT_FILE, STOP_FILE, newest_step
from l2e_ds.run_directory.stop_file import RESTART, is_for_restart, remove_stop_file, write_stop_file
from l2e_ds.supervise.processes import PR_SET_CHILD_SUBREAPER, SignsOfLife, kill_all, leftovers

ASK = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STOPPED = Interrupted.exit_code
# what no restart mends
FINAL = {
    ConfigError.exit_code: "something must be changed first",
    TrainingError.exit_code: "the run cannot go on",
    STOPPED: "stopped as asked",
}

_received: list[tuple[float, signal.Signals]] = []  # when, which


def main(argv: Sequence[str] | None = None) -> int:
    console.open_streams()
    words, launcher = split_at_dashes(sys.argv[1:] if argv is None else argv)
    parser = console.CommandParser(
        usage="python -m l2e_ds.supervise [--restarts N] RUN.yaml [section.key=value ...] -- LAUNCHER ..."
    )
    parser.add_argument("--restarts", metavar="N", default=os.environ.get("L2E_DS_RESTARTS") or "3")
    parser.add_argument("run_file", metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args(words)
    try:
        if not launcher:
            raise ConfigError("give the launcher after --, e.g. -- torchrun --nproc-per-node 8 -m l2e_ds.train")
        if shutil.which(launcher[0]) is None:
            raise ConfigError(f"no such launcher: {launcher[0]}")
        if not arguments.restarts.isdecimal():
            raise ConfigError(f"--restarts (or L2E_DS_RESTARTS): got {arguments.restarts!r}, allowed: an integer >= 0")
        return supervise(launcher, arguments.run_file, arguments.overrides, int(arguments.restarts))
    except ConfigError as error:
        say(f"error: {error}")
        return error.exit_code


def supervise(launcher: Sequence[str], run_file: str, overrides: Sequence[str], restarts: int) -> int:
    """Start, and start again after failures; returns the exit code. Raises ConfigError before anything is started."""
    training = load_run_config(run_file, overrides).training
    check_hosts(launcher)
    directory = Path(training.run_directory)
    stop_file = directory / STOP_FILE
    first = launch_command(launcher, [run_file, *overrides])
    again = launch_command(launcher, [run_file, *overrides, "training.resume=auto"])
    requeued = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0

    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # ranks that lose their launcher become our children
    for number in ASK:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, _note)
    if requeued:  # what is left of this very job on a node that SLURM lost sight of
        wait_until_free(directory, stop_file, 60 * training.timeout)
    elif not any(word.startswith("--nnodes") for word in launcher):  # torchrun: other hosts' ranks may be waiting
        be_alone(directory)

    for attempt in range(1 + restarts):
        if attempt:
            wait_until_free(directory, stop_file, 60 * training.timeout)
        if attempt and _received:
            break
        # wherever this run was told to begin, by now it has checkpoints of its own
        command = again if (attempt or requeued) and newest_step(directory) else first
        say(f"start {attempt + 1} of at most {1 + restarts}: {shlex.join(command)}")
        code, noted, restart = run_once(command, run_file, stop_file, 2 * 60 * training.timeout)
        asked = bool(_received) or (stop_file.exists() and not is_for_restart(stop_file))
        outcome, why = judge(code, noted, asked, restart, newest_step(directory), training.steps)
        say(f"end of start {attempt + 1}: {why}")
        if outcome == 0 or outcome in FINAL or asked:
            break
    return outcome


def run_once(command: Sequence[str], run_file: str, stop_file: Path, patience: float) -> tuple[int, list[int], bool]:
    """Start the launcher; wait until it and all its processes have ended.

    patience: seconds that ranks may take to save and leave, once asked, and for which the run may show no sign of life,
    before they are killed. A rank that hangs is ended by the others; this is for the case that all hang.
    Returns the launcher's code (negative: killed by that signal), the exit codes that ranks here noted, and whether a
    supervisor on another host stopped the run only to restart it.
    """
    with tempfile.NamedTemporaryFile("r", prefix="l2e-ds-exit-codes-") as noted:
        launcher = subprocess.Popen(
            command,
            env={**os.environ, EXIT_FILE: noted.name},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            # launchers would die of it and leave their ranks; ranks set their own handler
            preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN),
        )
        asked_at, ended_at, killed, restart = None, None, False, False
        life = SignsOfLife(stop_file.parent)
        while launcher.poll() is None or leftovers(launcher.pid, run_file):
            now = time.monotonic()
            restart = restart or (asked_at is None and is_for_restart(stop_file))
            if launcher.returncode is not None and ended_at is None:
                ended_at = now
            frozen = not killed and life.are_missing_for(patience)
            late = asked_at is not None and now > asked_at + patience
            if (late or frozen or impatient()) and not killed:
                silence = f": no sign of life for {patience / 60:g} minutes" if frozen else ""
                say(f"killing all processes of the run{silence}")
                kill_all()
                killed = True
            if asked_at is None and (_received or (ended_at is not None and now > ended_at + 0.5)):
                asked_at = now
                say("asking the run to save and stop" + ("" if ended_at is None else ": its launcher has ended"))
                write_stop_file(stop_file, "" if _received else RESTART)
            time.sleep(0.2)
        if asked_at is not None and not impatient():  # then ranks on other hosts may still heed it
            remove_stop_file(stop_file)
        code = launcher.returncode
        restart = restart and not _received
        return code if code or not killed else -signal.SIGKILL, [int(word) for word in noted.read().split()], restart


def judge(code: int, noted: Sequence[int], asked: bool, restart: bool, step: int, steps: int) -> tuple[int, str]:
    """What became of a launch: the exit code that says so, and why.

    code: the launcher's, negative: killed by that signal. noted: exit codes of ranks, where they could tell (torchrun
    turns all into 1). asked: whether somebody wanted a stop. restart: whether another host's supervisor did, in order
    to restart. step, steps: of the newest checkpoint, of the whole run.
    """
    if restart and not asked and step < steps and (code == STOPPED or STOPPED in noted):
        return 1, "stopped to be restarted"
    if code in FINAL:
        return code, FINAL[code]
    for final in (ConfigError.exit_code, TrainingError.exit_code):
        if final in noted:
            return final, FINAL[final]
    # ranks also leave in agreement when their launcher was killed, which nobody asked for: `deepspeed` then says 0
    if STOPPED in noted and (asked or code > 0 or -code in ASK):
        return STOPPED, FINAL[STOPPED]
    if code == 0 and step >= steps:
        return 0, f"finished at step {step}"
    if code == 0:
        said = f"the launcher says 0, but the newest checkpoint is of step {step} of {steps}"
        return (STOPPED, f"stopped as asked; {said}") if asked else (1, said)
    killed_by = -code if code < 0 else 256 - code if 192 < code < 251 else 0  # launch.py passes a rank's -9 on as 247
    name = f" ({signal.Signals(killed_by).name})" if killed_by in set(signal.Signals) else ""
    return (128 - code if code < 0 else code), f"exit code {code}{name}"


def launch_command(launcher: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """The launcher's words and the run's. Raises ConfigError for a folder that no other host could be told."""
    if "--force_multi" not in launcher:  # launch/deepspeed.sh gives it exactly when pdsh is used
        return [*launcher, *arguments]
    if re.search(r"[^\w@+=:,./-]", os.getcwd()):
        raise ConfigError(f"the current folder {os.getcwd()!r} holds characters that DeepSpeed cannot pass on by ssh")
    return [*launcher, *map(quoted_for_pdsh, arguments)]


def quoted_for_pdsh(word: str) -> str:
    """DeepSpeed's PDSHRunner hands words to a remote shell: bare, or in double quotes where there is a space (with
    inner double quotes escaped). Written so that the remote shell gives back exactly `word`; pdsh itself replaces
    %h, %n and %u."""
    word = word.replace("%", "%%")
    return re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word)


def check_hosts(launcher: Sequence[str]) -> None:
    """That ssh reaches the hosts of the deepspeed launcher's hostfile: it looks at the first one only, and ends
    in a traceback. Raises ConfigError."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for names in (("--hostfile", "-H"), ("--include", "-i"), ("--exclude", "-e"), ("--num_nodes",), ("--ssh_port",)):
        parser.add_argument(*names, default="")
    parser.add_argument("--launcher", default="pdsh")
    for name in ("--no_ssh_check", "--no_ssh", "--force_multi"):
        parser.add_argument(name, action="store_true")
    options, _ = parser.parse_known_args(list(launcher[1:]))
    if not options.hostfile or options.no_ssh_check or options.no_ssh or options.launcher.lower() != "pdsh":
        return  # another launcher reaches hosts in another way
    try:
        lines = [line.partition("#")[0].split() for line in Path(options.hostfile).read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--hostfile: {options.hostfile}: {error}") from None
    included = {part.partition(":")[0] for part in options.include.split("@") if part}
    excluded = options.exclude.split("@")  # without :SLOTS a whole host
    hosts = [words[0] for words in lines if words and words[0] not in excluded]
    hosts = [host for host in hosts if not included or host in included]
    hosts = hosts[: int(options.num_nodes)] if options.num_nodes.isdecimal() else hosts
    if not options.force_multi and len(hosts) < 2:
        return  # the launcher asks no other host
    if shutil.which("ssh") is None:
        raise ConfigError("--hostfile: several hosts need ssh, which is not on PATH")
    command = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15"]
    command += shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    command += ["-p", options.ssh_port] if options.ssh_port else []

    def ask(host: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, host, "true"], stdin=subprocess.DEVNULL, capture_output=True, text=True)

    with ThreadPoolExecutor(32) as pool:
        lost = [(host, answer) for host, answer in zip(hosts, pool.map(ask, hosts), strict=True) if answer.returncode]
    if lost:
        host, answer = lost[0]
        why = answer.stderr.strip().rpartition("\n")[2] or f"exit code {answer.returncode}"
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        raise ConfigError(f"--hostfile: {options.hostfile}: ssh does not reach {host}{more}: {why.strip()}")


def _note(number: int, _frame: FrameType | None) -> None:
    _received.append((time.monotonic(), signal.Signals(number)))


def impatient() -> bool:
    """Whether SIGINT or SIGTERM came again; two within two seconds are one wish, sent by two ways."""
    wishes = [when for when, number in _received if number in (signal.SIGINT, signal.SIGTERM)]
    return bool(wishes) and wishes[-1] > wishes[0] + 2


def wait_until_free(directory: Path, stop_file: Path, patience: float) -> None:
    """Ranks on other hosts, which are not seen from here, may outlive their launcher for as long as they save."""
    lock, deadline = RunLock(directory), time.monotonic() + patience
    while lock.path.exists() and time.monotonic() < deadline and not _received:
        try:
            lock.acquire()
        except ConfigError as error:
            say(f"asking the run that is still there to stop: {error}")
            write_stop_file(stop_file, RESTART)
            time.sleep(5)
        else:
            lock.release()
    remove_stop_file(stop_file)


def be_alone(directory: Path) -> None:
    """Refuse to start beside a living run, which a signal to this process would stop; forget a stop file that was meant
    for a run that is over. Raises ConfigError."""
    lock, stop_file = RunLock(directory), directory / STOP_FILE
    if not (lock.path.exists() or stop_file.exists()):
        return
    lock.acquire()
    try:
        stop_file.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"training.run_directory: {stop_file}: {error.strerror}") from None
    finally:
        lock.release()


def was_asked() -> bool:
    """Whether a signal asked this process to stop the run."""
    return bool(_received)


def say(line: str) -> None:
    console.say(f"l2e-ds: {line}")
