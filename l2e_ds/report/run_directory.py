"""What the files of a run directory or a study say, checked: config.yaml, the lines of metrics.jsonl that report and
summary show, and study.json. A mistake in them is found here, and not where a figure is used."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pydantic import Field

from l2e_ds.config import RunConfig, Section, checked, load_run_config
from l2e_ds.errors import ConfigError, DataError
from l2e_ds.study.definition import INDEX
from l2e_ds.study.state import read_index

# Keys of docs/metrics.md that each line must have, by its kind. (An older run lacks some of the others.)
_NEEDED = {
    "start": ("step",),
    "train": ("step", "tokens", "lm_loss", "tokens_per_second"),
    "evaluation": ("step", "tokens", "held_out_loss"),
}
_COUNTS = ("step", "applied_steps", "tokens", "ranks", "hosts", "parameters")  # and tokens/NAME
_MOST = 2**63
_LARGEST = 1e38  # near float32's; of larger ones a chart's and a mean's arithmetic could overflow


class Entry(Section, extra="ignore"):
    """A run of a study, as far as it is used here. baseline: another's name."""

    name: str
    directory: str
    levels: dict[str, str] = Field({})
    baseline: str | None = None


class Index(Section, extra="ignore"):
    title: str
    runs: list[Entry]


def check_folder(path: Path) -> None:
    """Raises DataError."""
    if not os.path.exists(path):
        raise DataError(f"{path}: there is no such folder")
    if not os.path.isdir(path):
        raise DataError(f"{path}: is a file, not a folder")


def read_config(directory: Path) -> RunConfig:
    """Keys that the run's version did not have yet have their defaults. Raises DataError."""
    try:
        return load_run_config(directory / "config.yaml")
    except ConfigError as error:
        raise DataError(str(error)) from None


def read_study(directory: Path) -> Index:
    """Raises DataError."""
    path = directory / INDEX
    try:
        raw = read_index(directory)
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: is no index of a study")
        index = checked(Index, raw, str(path))
    except ConfigError as error:
        raise DataError(str(error)) from None
    if len({entry.name for entry in index.runs}) < len(index.runs):
        raise DataError(f"{path}: runs: two have the same name")
    return index


def read_lines(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """kind (start, train, evaluation) -> its lines, in order; a last one that is still being written does not count.

    A figure that is not finite, or beyond what float32 holds, is None. Raises DataError naming file and line, and
    OSError.
    """
    path = directory / "metrics.jsonl"
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in _NEEDED}
    texts = path.read_bytes().split(b"\n")
    for place, text in enumerate(texts, start=1):
        if not text:
            continue
        try:
            line = json.loads(text)
            kind = str(line["kind"])
        except (ValueError, KeyError, TypeError):
            if place < len(texts):  # it has an end
                raise DataError(f"{path}:{place}: is no line of a run's metrics") from None
            continue
        if kind in found:
            found[kind].append(_checked(line, kind, f"{path}:{place}"))
    return found


def _checked(line: dict[str, Any], kind: str, where: str) -> dict[str, Any]:
    """Raises DataError."""
    for key in _NEEDED[kind]:
        if key not in line:
            raise DataError(f"{where}: has no {key}")
    for key, value in line.items():
        if key.partition("/")[0] in _COUNTS:
            if type(value) is not int or not 0 <= value < _MOST:
                raise DataError(f"{where}: {key}: got {value!r}, must be a whole number")
        elif key in ("git", "versions"):
            if not isinstance(value, dict):
                raise DataError(f"{where}: {key}: got {value!r}, must be a mapping")
        elif kind != "start" and key != "kind" and type(value) not in (int, float, type(None)):
            raise DataError(f"{where}: {key}: got {value!r}, must be a number or null")
    return {key: finite(value) for key, value in line.items()}


def finite(value: Any) -> Any:
    """None for a number that no chart and no mean can take."""
    return None if isinstance(value, int | float) and not abs(value) <= _LARGEST else value
