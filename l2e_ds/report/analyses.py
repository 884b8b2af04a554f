"""Compare the results of `l2e-ds analyze` with the published False Killing Rates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from l2e_ds.errors import DataError
from l2e_ds.report import published
from l2e_ds.report.table import Column, Table
from l2e_ds.system.files import one_line

_INDEX = "analysis.json"


def is_analysis(folder: Path) -> bool:
    return (folder / _INDEX).is_file()


def all_tables(folders: Sequence[Path]) -> list[Table]:
    """Return the tables of these analyses, none without one. Raises DataError for a missing or unreadable file."""
    rows = [row for folder in folders for row in _rows(folder, len(folders) > 1)]
    at, lowest = "FKR at that share", "lowest FKR"
    columns = [
        Column("model"),
        Column("feature set"),
        Column("share", ".2%"),
        Column("ours", ".1%", at),
        Column("from", ".1%", at),
        Column("to", ".1%", at),
        Column("published", ".1%", at),
        Column("ours − published", "+.1%", at),
        Column("FKR", ".1%", lowest),
        Column("share", ".2%", lowest),
        Column("from", ".2%", lowest),
        Column("to", ".2%", lowest),
        Column("published share, near", ".2%", lowest),
        Column("analysis"),
    ]
    note = (
        "FKR: share of the activations above the threshold whose text has not the neuron's own feature, all layers"
        f" together, at the share nearest to {published.FKR_SHARE:.0%}; from, to: 95 % intervals over texts"
        f" (docs/analysis.md). Published ({published.SOURCE}): plain Pythia 70M at {published.FKR_SHARE:.0%}, and near"
        " which share FKR is lowest. Rates of other texts, or of other numbers of features, do not compare."
    )
    table = Table("false_killing", "False Killing Rate", note, columns, rows)
    return [table.without_empty_columns()] if rows else []


def _rows(folder: Path, several: bool) -> list[list[Any]]:
    """Return a row for each model of an analysis. several: name the analysis in the last cell."""
    path = folder / _INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        sources = {report["digest"]: str(report["source"]) for report in index["texts"]}
        models = [(model["label"], model["parameters"], sources[model["texts"]]) for model in index["models"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot be read: {one_line(error)}") from None
    return [
        _row(folder / "models" / label, parameters, source, str(folder) if several else None)
        for label, parameters, source in models
    ]


def _row(folder: Path, parameters: int, source: str, analysis: str | None) -> list[Any]:
    fkr = _read(folder / "fkr.parquet", ["layer", "share", "fkr", "fkr_low", "fkr_high"])
    bounds = ["suggested_share_low", "suggested_share_high"]
    lowest = _read(folder / "scale.parquet", ["suggested_fkr", "suggested_share", *bounds]).iloc[0]
    together = fkr[fkr["layer"] == -1]
    at = together.loc[(together["share"] - published.FKR_SHARE).abs().idxmin()]
    name = source if "*" in source else Path(source).name.partition(".")[0]
    ours, theirs = _number(at["fkr"]), published.fkr(name, parameters)
    difference = None if ours is None or theirs is None else ours - theirs
    row = [folder.name, name, *map(_number, at[["share", "fkr", "fkr_low", "fkr_high"]]), theirs, difference]
    return [*row, *map(_number, lowest), published.LOWEST_FKR_SHARE, analysis]


def _read(path: Path, columns: list[str]) -> pd.DataFrame:
    """Return columns of a Parquet file. Raises DataError."""
    try:
        return pd.read_parquet(path, columns=columns)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise DataError(f"{path}: cannot be read: {one_line(error)}") from None


def _number(value: float) -> float | None:
    """Return a number, or None for NaN."""
    return None if pd.isna(value) else float(value)
