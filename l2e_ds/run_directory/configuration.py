"""Read and check the config.yaml of a run directory, so that a mistake in it is found before a value is used."""

from __future__ import annotations

import os
from pathlib import Path

from l2e_ds.config.reading import load_run_config
from l2e_ds.config.sections import RunConfig
from l2e_ds.errors import ConfigError, DataError


def check_folder(path: Path) -> None:
    """Raise DataError if there is no such folder."""
    if not os.path.exists(path):
        raise DataError(f"{path}: there is no such folder")
    if not os.path.isdir(path):
        raise DataError(f"{path}: is a file, not a folder")


def read_config(directory: Path) -> RunConfig:
    """Return the configuration of a run. Keys that its version did not have have their defaults. Raises DataError."""
    try:
        return load_run_config(directory / "config.yaml")
    except ConfigError as error:
        raise DataError(str(error)) from None
