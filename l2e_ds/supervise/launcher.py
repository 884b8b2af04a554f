"""Write a launcher's command line, and check that it reaches its hosts."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from l2e_ds.errors import ConfigError


def launch_command(launcher: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """Return the command line of a launcher and a run. Raises ConfigError for a current folder that ssh cannot pass
    on."""
    if "--force_multi" not in launcher:  # launch/deepspeed.sh gives it exactly when pdsh is used
        return [*launcher, *arguments]
    if re.search(r"[^\w@+=:,./-]", os.getcwd()):
        raise ConfigError(f"the current folder {os.getcwd()!r} holds characters that DeepSpeed cannot pass on by ssh")
    return [*launcher, *map(quoted_for_pdsh, arguments)]


def quoted_for_pdsh(word: str) -> str:
    """Return a word such that the remote shell reads exactly `word`.

    DeepSpeed's PDSHRunner passes words bare, or in double quotes if they contain a space (with inner double quotes
    escaped), and pdsh itself replaces %h, %n and %u.
    """
    word = word.replace("%", "%%")
    return re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word)


def check_hosts(launcher: Sequence[str]) -> None:
    """Check that ssh reaches the hosts of the deepspeed launcher's hostfile. Raises ConfigError.

    The launcher checks the first one only, and ends in a traceback.
    """
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
    excluded = options.exclude.split("@")  # a name without :SLOTS excludes the whole host
    hosts = [words[0] for words in lines if words and words[0] not in excluded]
    hosts = [host for host in hosts if not included or host in included]
    hosts = hosts[: int(options.num_nodes)] if options.num_nodes.isdecimal() else hosts
    if not options.force_multi and len(hosts) < 2:
        return  # the launcher starts nothing on another host
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
