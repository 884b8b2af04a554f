"""Record the circumstances of a measurement, and write its results and its page."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from l2e_ds.errors import ConfigError
from l2e_ds.system.files import is_free
from l2e_ds.system.provenance import machine, versions


def circumstances(*packages: str) -> dict[str, Any]:
    """Return date, machine, load average and versions, for `heading`.

    The load is that of the minute before: call it first.
    """
    load = os.getloadavg()[0]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "load_before": load,
        "versions": versions("l2e_ds", "python", *packages),
    }


def heading(title: str, command: str, about: dict[str, Any]) -> str:
    """Return the beginning of a page. about: what `circumstances` returned."""
    found = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return "\n".join(
        [
            f"# {title}, {about['date']}\n",
            f"Made by `{command}`. Medians, with the smallest and largest value.\n",
            f"{about['machine']}; load average before: {about['load_before']:.1f}. {found}.\n",
        ]
    )


def add_output(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the option --output, and the one that the deepspeed launcher appends. name: of the benchmark."""
    parser.add_argument("--output", type=Path, metavar="DIR", help=f"new or empty: {name}.json and {name}.md")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)


def publish(output: Path | None, name: str, results: dict[str, Any], page: str) -> None:
    """Print the page; write it to OUTPUT/NAME.md and all that was measured to OUTPUT/NAME.json, if there is an
    output."""
    if output is not None:
        (output / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (output / f"{name}.md").write_text(page, encoding="utf-8")
    print(page, flush=True)


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that an action takes, with all that it starts on the device."""
    _wait(device)
    began = time.perf_counter()
    action()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_and_spread(values: Sequence[float], digits: int = 2) -> str:
    """Return median, smallest and largest value, as `1.20 (1.15 to 1.31)`."""
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
    """Print a line with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
