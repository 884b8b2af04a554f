"""What the files of a run directory or a study say, checked: config.yaml and study.json. A mistake in them is found
here, and not where a figure is used. (metrics.jsonl: l2e_ds/run_directory/metrics.py.)"""

from __future__ import annotations

import os
from pathlib import Path

from l2e_ds.config.reading import load_run_config
from l2e_ds.config.sections import RunConfig
from l2e_ds.errors import ConfigError, DataError


def check_folder(path: Path) -> None:
    """Raises DataError."""
    if not os.path.exists(path):
        raise DataError(f"{path}: there is no such folder")
    if not os.path.isdir(path):
        raise DataError(f"{path}: is a file, not a folder")


def read_config(directory: Path) -> RunConfig:
    """Return keys that the run's version did not have yet have their defaults. Raises DataError."""
    try:
        return load_run_config(directory / "config.yaml")
    except ConfigError as error:
        raise DataError(str(error)) from None
