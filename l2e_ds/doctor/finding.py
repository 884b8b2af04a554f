"""One line of doctor, and how numbers, sizes and commands are worded in it. Standard library only."""

from __future__ import annotations

import argparse
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

from l2e_ds.system.files import PACKAGE

GB = 1e9


@dataclass(frozen=True)
class Finding:
    state: str
    """ok; note: worth knowing, or missing for some runs; missing: no run can start."""
    name: str
    text: str
    mend: str = ""

    def __str__(self) -> str:
        line = f"{self.state:<9}{self.name:<15}{self.text}"
        return f"{line}\n  -> {self.mend}" if self.mend else line


def checked(name: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """A check that fails is a finding itself, and no reason to skip the others."""
    try:
        return check()
    except Exception as error:
        return [Finding("note", name, f"could not be checked: {one_line(error)}")]


def conclude(findings: list[Finding], unseen: list[Finding] | None = None) -> int:
    """Print what was not printed yet and the verdict; return the exit code."""
    for finding in findings if unseen is None else unseen:
        print(finding)
    missing = list(dict.fromkeys(finding.name for finding in findings if finding.state == "missing"))
    print(f"a run cannot start here; missing: {', '.join(missing)}" if missing else "a run can start here", flush=True)
    return 1 if missing else 0


def host() -> str:
    """SLURM's name of the node, or the machine's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def on_gpu() -> bool:
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().device_name() == "cuda"


def own_version() -> str:
    """Version and a checksum of the code: two hosts may have copies of different days."""
    import l2e_ds

    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(file.read_bytes())
    return f"{l2e_ds.__version__} (code {digest.hexdigest()[:8]})"


def output_of(command: list[str], seconds: float = 30) -> str | None:
    """What a program prints, or None where it is not there, fails, or takes longer."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def install_line(apt: str, dnf: str) -> str:
    return f"dnf install {dnf}" if shutil.which("dnf") else f"apt-get install {apt}"


def on_path(program: str, otherwise: str) -> str:
    """What brings a program on PATH: often it lies beside a Python that was called by its path."""
    folder = Path(sys.executable).parent
    return f"export PATH={shlex.quote(str(folder))}:$PATH" if (folder / program).is_file() else otherwise


def few(items: Sequence[Any], what: str = "") -> str:
    """`rank 3`, `ranks 0-7`, `n2, n3, n4 and 12 more`."""
    if what and len(items) > 2 and list(items) == list(range(items[0], items[-1] + 1)):
        return f"{what}s {items[0]}-{items[-1]}"
    listed = ", ".join(map(str, items[:4])) + (f" and {len(items) - 4} more" if len(items) > 4 else "")
    return f"{what}{'s' if len(items) > 1 else ''} {listed}" if what else listed


def number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def size_in_words(count: int) -> str:
    for unit, size in (("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count // size} {unit}"
    return f"{count} B"


def one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= 600:
        raise argparse.ArgumentTypeError(f"got {text}, allowed: above 0, at most 600")
    return value
