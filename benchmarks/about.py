"""Record the circumstances of a measurement, and write its results and its page."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from l2e_ds.console import at_least
from l2e_ds.errors import ConfigError
from l2e_ds.system.files import is_free
from l2e_ds.system.provenance import machine, versions


class Option(NamedTuple):
    """An option of a benchmark: its default, of the same type as its values, its help, and its least value."""

    default: Any
    help: str
    least: int | None = None

    def add_to(self, parser: argparse.ArgumentParser, key: str) -> None:
        """Add the option to a parser."""
        many = isinstance(self.default, list)
        kind = type(self.default[0] if many else self.default)
        about = f"{self.help} (default: {_shown(self.default)})"
        parser.add_argument(_name(key), type=kind, nargs="+" if many else None, default=self.default, help=about)

    def check(self, key: str, given: Any) -> None:
        """Raise ConfigError if a value is below the least one."""
        for value in given if isinstance(given, list) else [given]:
            if self.least is not None:
                at_least(_name(key), value, self.least)


def _name(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def circumstances(arguments: argparse.Namespace, options: dict[str, Option], packages: Sequence[str]) -> dict[str, Any]:
    """Return date, machine, load average of the minute before, versions, options, and the command that gives them."""
    load, overrides = os.getloadavg()[0], getattr(arguments, "overrides", [])
    given = {key: getattr(arguments, key) for key in options}
    changed = [f"{_name(key)} {_shown(given[key])}" for key in options if given[key] != options[key].default]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "load_before": load,
        "versions": versions("l2e_ds", "python", *packages),
        "options": given | {"overrides": overrides},
        "command": " ".join(["python -m benchmarks", arguments.name, *overrides, *changed]),
    }


def heading(title: str, about: dict[str, Any]) -> str:
    """Return the beginning of a page. about: what `circumstances` returned."""
    found = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return "\n".join(
        [
            f"# {title}, {about['date']}\n",
            f"Made by `{about['command']}`. Medians, with the smallest and largest value.\n",
            f"{about['machine']}; load average before: {about['load_before']:.1f}. {found}.\n",
        ]
    )


def publish(output: Path | None, name: str, results: dict[str, Any], page: str) -> None:
    """Print the page; write it to OUTPUT/NAME.md and all that was measured to OUTPUT/NAME.json, if there is an
    output."""
    if output is not None:
        new_folder(output)
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


@contextmanager
def without_stderr() -> Iterator[None]:
    """Discard what is written to standard error: progress bars, and what C++ prints."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def check_output(path: Path | None) -> None:
    """Check that --output is new or an empty folder. Raises ConfigError."""
    if path is not None and not is_free(path):
        raise ConfigError(f"--output: {path.absolute()} exists and is not an empty folder")


def new_folder(path: Path) -> Path:
    """Return the absolute path of a folder, which is made if need be."""
    path.mkdir(parents=True, exist_ok=True)
    return path.absolute()


def say(line: str) -> None:
    """Print a line with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
