"""What the files of a run directory or a study say, checked: config.yaml and study.json. A mistake in them is found
here, and not where a figure is used. (metrics.jsonl: l2e_ds/training/metrics_lines.py.)"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field

from l2e_ds.config import RunConfig, Section, checked, load_run_config
from l2e_ds.errors import ConfigError, DataError
from l2e_ds.study.definition import INDEX
from l2e_ds.study.state import read_index


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
