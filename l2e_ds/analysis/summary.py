"""Summarise the results of `l2e-ds analyze` as Markdown (summary.md)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from l2e_ds.analysis.measures import SHARES, is_edge
from l2e_ds.analysis.tables import REPORTED_SHARE, REPORTED_SHARES, Tables
from l2e_ds.console import markdown
from l2e_ds.evaluation.model_source import ModelSource

_EDGE = " (edge)"


@dataclass(frozen=True)
class Result:
    """The results of one model. tokens: how many the model has seen; report: that of the FeatureSet."""

    source: ModelSource
    tables: Tables
    parameters: int
    tokens: int | None
    report: dict[str, Any]

    def without_features(self) -> Result:
        """Return the result with only those rows of `neuron_features` whose neuron's distribution is shown."""
        shown = self.tables["distributions"][["layer", "neuron"]].drop_duplicates()
        kept = self.tables["neuron_features"].merge(shown, on=["layer", "neuron"])
        return replace(self, tables=self.tables | {"neuron_features": kept})

    def without_neurons(self) -> Result:
        return replace(self, tables={name: table for name, table in self.tables.items() if name != "neurons"})


def summary(arguments: argparse.Namespace, results: Sequence[Result]) -> str:
    """Return the most important results as Markdown."""
    parts = [
        "## Models\n",
        _table([_model_row(result) for result in results]),
        "Own MS: mean monosemanticity score (MS) on the texts of the neurons' own features. K-S: between the MS of own"
        f" and of all features. FKR: false killing rate. 95 % intervals in brackets, by {arguments.resamples} bootstrap"
        f" resamples of the texts. A sample is a {sample_of(arguments)}.\n",
    ]
    last = results[-1]
    parts += [
        f"## Layers of {last.source.label}\n",
        _table([_layer_row(row, last.tables["fkr"]) for _, row in last.tables["layers"].iterrows()]),
        f"## Best probed neuron of each feature, {last.source.label}\n",
        _table(_probe_rows(last.tables)),
    ]
    if arguments.suggest_share:
        parts.append(suggested_shares(results))
    return "\n".join(parts)


def suggested_shares(results: Sequence[Result]) -> str:
    """Return the share with the lowest FKR of each model and layer as Markdown, with a mark at the edge of SHARES."""
    rows = [row for result in results for row in _share_rows(result)]
    table = f"## Share k with the lowest False Killing Rate\n\n{_table(rows)}"
    if any(row["k"].endswith(_EDGE) for row in rows):
        table += (
            f"\nk{_EDGE}: the least or the largest of the shares that are tried, {SHARES[0]:.1%} to {SHARES[-1]:.0%};"
            " the rate may be lower beyond it.\n"
        )
    return table


def sample_of(arguments: argparse.Namespace) -> str:
    return "token" if arguments.samples == "token" else f"text by its {arguments.samples}"


def _table(rows: Sequence[dict[str, str]]) -> str:
    return markdown(list(rows[0]), [list(row.values()) for row in rows])


def _model_row(result: Result) -> dict[str, str]:
    scale, layers = result.tables["scale"].iloc[0], result.tables["layers"]
    neurons = int(layers["neurons"].sum())
    dead = float((layers["dead_share"] * layers["neurons"]).sum() / neurons)
    return {
        "model": result.source.label,
        "step": "" if result.source.step is None else f"{result.source.step:,}",
        "parameters": f"{result.parameters:,}",
        "texts": f"{result.report['total']['kept']:,}",
        "neurons": f"{neurons:,}",
        "K-S": _with_interval(scale, "ks"),
        "own MS": _with_interval(scale, "own_score"),
        "FKR at 1, 2, 5 %": ", ".join(
            f"{_fkr_at(result.tables['fkr'], -1, share)['fkr']:.1%}" for share in REPORTED_SHARES
        ),
        "dead": f"{dead:.2%}",
        "kurtosis": f"{layers['kurtosis'].median():.1f}",
    }


def _layer_row(row: pd.Series, fkr: pd.DataFrame) -> dict[str, str]:
    at = _fkr_at(fkr, int(row["layer"]), REPORTED_SHARE)
    return {
        "layer": str(int(row["layer"])),
        "neurons": f"{int(row['neurons']):,}",
        "dead": f"{row['dead_share']:.2%}",
        "kurtosis": f"{row['kurtosis']:.1f}",
        "mean S": f"{row['mean_s']:.3g}",
        "own MS": _with_interval(row, "own_score"),
        "FKR at 2 %": _with_interval(at, "fkr", ".1%"),
    }


def _probe_rows(tables: Tables) -> list[dict[str, str]]:
    best = tables["probes"][tables["probes"]["place"] == 1].merge(tables["significance"], on="feature")
    return [
        {
            "feature": str(row["feature"]),
            "layer": str(row["layer"]),
            "neuron": str(row["neuron"]),
            "F1 (test)": f"{row['f1_test']:.2f}",
            "MS inside": _with_interval(row, "score_inside"),
            "MS outside": _with_interval(row, "score_outside"),
            "ten best against random": _with_interval(row, "ratio"),
            "p": f"{row['p_adjusted']:.2g}",
        }
        for _, row in best.iterrows()
    ]


def _share_rows(result: Result) -> list[dict[str, str]]:
    rows = [("all", result.tables["scale"].iloc[0])]
    rows += [(str(int(row["layer"])), row) for _, row in result.tables["layers"].iterrows()]
    return [
        {
            "model": result.source.label,
            "layer": layer,
            "k": _with_interval(row, "suggested_share", ".2%") + (_EDGE if is_edge(row["suggested_share"]) else ""),
            "FKR there": f"{row['suggested_fkr']:.1%}",
        }
        for layer, row in rows
    ]


def _fkr_at(fkr: pd.DataFrame, layer: int, share: float) -> pd.Series:
    return fkr[(fkr["layer"] == layer) & (fkr["share"] == share)].iloc[0]


def _with_interval(row: pd.Series, name: str, form: str = ".2f") -> str:
    return f"{row[name]:{form}} [{row[f'{name}_low']:{form}}, {row[f'{name}_high']:{form}}]"
