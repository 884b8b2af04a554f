"""What a measurement must say beside its numbers, and how a table gets into a page."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from l2e_ds.errors import ConfigError
from l2e_ds.system.files import is_free
from l2e_ds.system.provenance import machine, versions


def circumstances(*packages: str) -> dict[str, Any]:
    """Date, machine, load average (of the minute before: call it first) and versions; what `heading` shows."""
    load = os.getloadavg()[0]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "load_before": load,
        "versions": versions("l2e_ds", "python", *packages),
    }


def heading(title: str, command: str, about: dict[str, Any]) -> str:
    """Return the beginning of a page. about: as `circumstances` gives it."""
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
    """Return an empty folder, made if need be. Raises ConfigError."""
    path = path.absolute()
    if not is_free(path):
        raise ConfigError(f"{option}: {path} exists and is not an empty folder")
    path.mkdir(parents=True, exist_ok=True)
    return path


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
