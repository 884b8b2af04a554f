"""What a measurement must say beside its numbers, and how a table gets into a page."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

import l2e_ds
from l2e_ds.data.files import is_free
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


def circumstances(*packages: str) -> dict[str, Any]:
    """Date, machine, load average (of the minute before: call it first) and versions; what `heading` shows."""
    load = os.getloadavg()[0]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "load_before": load,
        "versions": versions(*packages),
    }


def heading(title: str, command: str, about: dict[str, Any]) -> str:
    """The beginning of a page. about: as `circumstances` gives it."""
    found = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return "\n".join(
        [
            f"# {title}, {about['date']}\n",
            f"Made by `{command}`. Medians, with the smallest and largest value.\n",
            f"{about['machine']}; load average before: {about['load_before']:.1f}. {found}.\n",
        ]
    )


def write_results(output: Path, name: str, results: dict[str, Any], page: str) -> None:
    """OUTPUT/NAME.json with all that was measured, OUTPUT/NAME.md with the tables."""
    (output / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (output / f"{name}.md").write_text(page, encoding="utf-8")


def median_and_spread(values: Sequence[float], digits: int = 2) -> str:
    """`1.20 (1.15 to 1.31)`: median, smallest, largest."""
    low, middle, high = (f"{number:,.{digits}f}" for number in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} to {high})"


def new_folder(option: str, path: Path) -> Path:
    """An empty folder, made if need be. Raises ConfigError."""
    path = path.absolute()
    if not is_free(path):
        raise ConfigError(f"{option}: {path} exists and is not an empty folder")
    path.mkdir(parents=True, exist_ok=True)
    return path


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
