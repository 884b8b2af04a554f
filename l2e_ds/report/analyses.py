"""Compare the results of `l2e-ds analyze` with the published False Killing Rates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from l2e_ds.errors import DataError
from l2e_ds.report import published
from l2e_ds.report.table import Column, Table, table_of
from l2e_ds.system.files import one_line

_INDEX = "analysis.json"


def is_analysis(folder: Path) -> bool:
    return (folder / _INDEX).is_file()


def all_tables(folders: Sequence[Path]) -> list[Table]:
    """Return the table of these analyses, or [] if there are none. Raises DataError for an unreadable file."""
    rows = [row | {Column("analysis"): str(folder)} for folder in folders for row in _rows(folder)]
    if len(folders) == 1:
        rows = [row | {Column("analysis"): None} for row in rows]
    note = (
        "FKR: share of the activations above the threshold whose text has not the neuron's own feature, all layers"
        f" together, at the share nearest to {published.FKR_SHARE:.0%}; from, to: 95 % intervals over texts"
        f" (docs/analysis.md). Published ({published.SOURCE}): plain Pythia 70M at {published.FKR_SHARE:.0%}, and near"
        " which share FKR is lowest. Rates of other texts, or of other numbers of features, do not compare."
    )
    return [table_of("false_killing", "False Killing Rate", note, rows)] if rows else []


def _rows(folder: Path) -> list[dict[Column, Any]]:
    """Return a row for each model of an analysis."""
    path = folder / _INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        sources = {report["digest"]: str(report["source"]) for report in index["texts"]}
        models = [(model["label"], model["parameters"], sources[model["texts"]]) for model in index["models"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot be read: {one_line(error)}") from None
    return [_row(folder / "models" / label, parameters, source) for label, parameters, source in models]


def _row(folder: Path, parameters: int, source: str) -> dict[Column, Any]:
    fkr = _read(folder / "fkr.parquet", ["layer", "share", "fkr", "fkr_low", "fkr_high"])
    bounds = ["suggested_share_low", "suggested_share_high"]
    lowest = _read(folder / "scale.parquet", ["suggested_fkr", "suggested_share", *bounds]).iloc[0]
    together = fkr[fkr["layer"] == -1]
    near = together.loc[(together["share"] - published.FKR_SHARE).abs().idxmin()]
    found = {key: None if pd.isna(value) else float(value) for key, value in {**near, **lowest}.items()}
    name = source if "*" in source else Path(source).name.partition(".")[0]
    ours, theirs = found["fkr"], published.fkr(name, parameters)
    at, least = "FKR at that share", "lowest FKR"
    return {
        Column("model"): folder.name,
        Column("feature set"): name,
        Column("share", ".2%"): found["share"],
        Column("ours", ".1%", at): ours,
        Column("from", ".1%", at): found["fkr_low"],
        Column("to", ".1%", at): found["fkr_high"],
        Column("published", ".1%", at): theirs,
        Column("ours − published", "+.1%", at): None if ours is None or theirs is None else ours - theirs,
        Column("FKR", ".1%", least): found["suggested_fkr"],
        Column("share", ".2%", least): found["suggested_share"],
        Column("from", ".2%", least): found["suggested_share_low"],
        Column("to", ".2%", least): found["suggested_share_high"],
        Column("published share, near", ".2%", least): published.LOWEST_FKR_SHARE,
    }


def _read(path: Path, columns: list[str]) -> pd.DataFrame:
    """Return columns of a Parquet file. Raises DataError."""
    try:
        return pd.read_parquet(path, columns=columns)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise DataError(f"{path}: cannot be read: {one_line(error)}") from None
