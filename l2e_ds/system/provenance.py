"""Find out which code, machine and versions of packages made a result."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import l2e_ds
from l2e_ds.system.files import REPOSITORY


def utc_now() -> str:
    """Return the present time, to the second: `2026-01-31T12:00:00Z`."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def commit_and_changes() -> tuple[str | None, list[str]]:
    """Return commit and `git status` lines of the checkout that this package runs from; (None, []) if it is a copy."""
    try:
        _git("ls-files", "--error-unmatch", "l2e_ds/__init__.py")  # else some other checkout around an installed copy
        return _git("rev-parse", "HEAD").strip(), _git("status", "--porcelain").splitlines()
    except (OSError, subprocess.SubprocessError):
        return None, []


def difference() -> str:
    """Return `git diff HEAD` of that checkout. Raises OSError or SubprocessError if there is no checkout."""
    return _git("diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv")


def _git(*words: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, errors="replace").stdout


def installed_version(package: str) -> str | None:
    """Return the version of "l2e_ds", of "python" or of another package; None where it is not installed."""
    if package == "l2e_ds":  # whose folder may be used without having been installed
        return l2e_ds.__version__
    if package == "python":
        return platform.python_version()
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Return the processor's name, or its architecture if the system does not give the name."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.machine()


def machine() -> str:
    """Return what this machine is made of, not what it is called: processor, cores, memory and operating system."""
    import psutil  # here: doctor, which needs this file, starts with the standard library alone

    memory = psutil.virtual_memory().total / 2**30
    return f"{cpu_name()}, {os.cpu_count()} cores, {memory:.0f} GiB memory, {platform.system()}"


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of those packages that are installed, in this order."""
    return {package: version for package in packages if (version := installed_version(package)) is not None}
