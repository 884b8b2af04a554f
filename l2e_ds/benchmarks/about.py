"""What a measurement must say beside its numbers, and how a table gets into a page."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import time
from importlib.metadata import version
from pathlib import Path

import psutil

import l2e_ds
from l2e_ds.errors import ConfigError


def machine() -> str:
    """What it is made of, not what it is called."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        model = names[0] if names else model
    memory = psutil.virtual_memory().total / 2**30
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB memory, {platform.system()}"


def versions(*packages: str) -> dict[str, str]:
    """Of l2e-ds, Python and installed packages."""
    found = {"l2e-ds": l2e_ds.__version__, "python": platform.python_version()}
    return found | {package: version(package) for package in packages}


def new_folder(option: str, path: Path) -> Path:
    """An empty folder, made if need be. Raises ConfigError."""
    path = path.absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{option}: {path} exists and is not an empty folder")
    path.mkdir(parents=True, exist_ok=True)
    return path


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """A table, the first column to the left, the others to the right."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
