"""One line of doctor, and how hosts, ranks and commands are worded in it. Standard library only."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import l2e_ds
from l2e_ds.system.files import PACKAGE, one_line


@dataclass(frozen=True)
class Finding:
    """state: ok; note: worth knowing, or missing for some runs; missing: no run can start. mend: a line for a shell."""

    state: str
    name: str
    text: str
    mend: str = ""

    def __str__(self) -> str:
        line = f"{self.state:<9}{self.name:<15}{self.text}"
        return f"{line}\n  -> {self.mend}" if self.mend else line


def verdict(name: str, is_good: bool, good: str, bad: str, mend: str, otherwise: str = "note") -> Finding:
    """Return an ok finding with the good text, or one of another state with the bad text and what mends it."""
    return Finding("ok", name, good) if is_good else Finding(otherwise, name, bad, mend)


def checked(name: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """Return what a check finds. One that fails is a finding itself, and no reason to skip the others."""
    try:
        return check()
    except Exception as error:
        return [Finding("note", name, f"could not be checked: {described(error)}")]


def conclude(findings: Sequence[Finding]) -> int:
    """Print the verdict and return the exit code."""
    missing = list(dict.fromkeys(finding.name for finding in findings if finding.state == "missing"))
    print(f"a run cannot start here; missing: {', '.join(missing)}" if missing else "a run can start here", flush=True)
    return 1 if missing else 0


def host() -> str:
    """Return SLURM's name of the node, or the machine's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def on_gpu() -> bool:
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().device_name() == "cuda"


def own_version() -> str:
    """Return version and a checksum of the code: two hosts may have copies of different days."""
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(PACKAGE.rglob("*.py"))))
    return f"{l2e_ds.__version__} (code {digest.hexdigest()[:8]})"


def output_of(command: Sequence[str], seconds: float = 30) -> str | None:
    """Return what a program prints, or None where it is not there, fails, or takes longer."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def check_program(name: str, command: Sequence[str], use: str, install: str) -> Finding:
    """Find out whether a program runs. command: prints its version; use: what needs it; install: what brings it."""
    said = output_of(command)
    beside = Path(sys.executable).parent  # of a Python that was called by its path
    if shutil.which(command[0]) is None and (beside / command[0]).is_file():
        install = f"export PATH={shlex.quote(str(beside))}:$PATH"
    bad = f"{command[0]} does not run (not on PATH, or broken); needed for {use} only"
    return verdict(name, said is not None, (said or command[0]).splitlines()[0].strip(), bad, install)


def few(items: Sequence[Any], what: str = "") -> str:
    """`rank 3`, `ranks 0-7`, `n2, n3, n4, n5 and 12 more`."""
    if what and len(items) > 2 and list(items) == list(range(items[0], items[-1] + 1)):
        return f"{what}s {items[0]}-{items[-1]}"
    listed = ", ".join(map(str, items[:4])) + (f" and {len(items) - 4} more" if len(items) > 4 else "")
    return f"{what}{'s' if len(items) > 1 else ''} {listed}" if what else listed


def described(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)[:200]}"
