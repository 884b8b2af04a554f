"""Summarise the results of `l2e-ds analyze` as Markdown (summary.md)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from l2e_ds.analysis.measures import SHARES, is_edge
from l2e_ds.analysis.tables import REPORTED_SHARE, REPORTED_SHARES, Tables
from l2e_ds.console import markdown
from l2e_ds.evaluation.model_source import ModelSource

if TYPE_CHECKING:
    import pandas as pd

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
        markdown(
            ["model", "step", "parameters", "neurons", "K-S", "own MS", "FKR at 1, 2, 5 %", "dead", "kurtosis"],
            [_model_row(result) for result in results],
        ),
        "Own MS: mean monosemanticity score (MS) on the texts of the neurons' own features. K-S: between the MS of own"
        f" and of all features. FKR: false killing rate. 95 % intervals in brackets, by {arguments.resamples} bootstrap"
        f" resamples of the texts. A sample is a {sample_of(arguments)}.\n",
    ]
    last = results[-1]
    parts += [
        f"## Layers of {last.source.label}\n",
        markdown(
            ["layer", "neurons", "dead", "kurtosis", "mean S", "own MS", "FKR at 2 %"],
            [_layer_row(row, last.tables["fkr"]) for _, row in last.tables["layers"].iterrows()],
        ),
        f"## Best probed neuron of each feature, {last.source.label}\n",
        markdown(
            ["feature", "layer", "neuron", "F1 (test)", "MS inside", "MS outside", "ten best against random", "p"],
            _probe_rows(last.tables),
        ),
    ]
    if arguments.suggest_share:
        parts.append(suggested_shares(results))
    return "\n".join(parts)


def suggested_shares(results: Sequence[Result]) -> str:
    """Return the share with the lowest FKR of each model and layer as Markdown, with a mark at the edge of SHARES."""
    rows = [row for result in results for row in _share_rows(result)]
    table = "## Share k with the lowest False Killing Rate\n\n" + markdown(["model", "layer", "k", "FKR there"], rows)
    if any(row[2].endswith(_EDGE) for row in rows):
        table += (
            f"\nk{_EDGE}: the least or the largest of the shares that are tried, {SHARES[0]:.1%} to {SHARES[-1]:.0%};"
            " the rate may be lower beyond it.\n"
        )
    return table


def sample_of(arguments: argparse.Namespace) -> str:
    return "token" if arguments.samples == "token" else f"text by its {arguments.samples}"


def _model_row(result: Result) -> list[str]:
    scale, layers = result.tables["scale"].iloc[0], result.tables["layers"]
    neurons = int(layers["neurons"].sum())
    dead = float((layers["dead_share"] * layers["neurons"]).sum() / neurons)
    return [
        result.source.label,
        "" if result.source.step is None else f"{result.source.step:,}",
        f"{result.parameters:,}",
        f"{neurons:,}",
        _with_interval(scale, "ks"),
        _with_interval(scale, "own_score"),
        ", ".join(f"{_fkr_at(result.tables['fkr'], -1, share)['fkr']:.1%}" for share in REPORTED_SHARES),
        f"{dead:.2%}",
        f"{layers['kurtosis'].median():.1f}",
    ]


def _layer_row(row: pd.Series, fkr: pd.DataFrame) -> list[str]:
    at = _fkr_at(fkr, int(row["layer"]), REPORTED_SHARE)
    return [
        str(int(row["layer"])),
        f"{int(row['neurons']):,}",
        f"{row['dead_share']:.2%}",
        f"{row['kurtosis']:.1f}",
        f"{row['mean_s']:.3g}",
        _with_interval(row, "own_score"),
        f"{at['fkr']:.1%} [{at['fkr_low']:.1%}, {at['fkr_high']:.1%}]",
    ]


def _probe_rows(tables: Tables) -> list[list[str]]:
    best = tables["probes"][tables["probes"]["place"] == 1].merge(tables["significance"], on="feature")
    return [
        [
            str(row["feature"]),
            str(row["layer"]),
            str(row["neuron"]),
            f"{row['f1_test']:.2f}",
            _with_interval(row, "score_inside"),
            _with_interval(row, "score_outside"),
            _with_interval(row, "ratio"),
            f"{row['p_adjusted']:.2g}",
        ]
        for _, row in best.iterrows()
    ]


def _share_rows(result: Result) -> list[list[str]]:
    rows = [("all", result.tables["scale"].iloc[0])]
    rows += [(str(int(row["layer"])), row) for _, row in result.tables["layers"].iterrows()]
    return [
        [
            result.source.label,
            layer,
            f"{row['suggested_share']:.2%} [{row['suggested_share_low']:.2%}, {row['suggested_share_high']:.2%}]"
            f"{_EDGE if is_edge(row['suggested_share']) else ''}",
            f"{row['suggested_fkr']:.1%}",
        ]
        for layer, row in rows
    ]


def _fkr_at(fkr: pd.DataFrame, layer: int, share: float) -> pd.Series:
    return fkr[(fkr["layer"] == layer) & (fkr["share"] == share)].iloc[0]


def _with_interval(row: pd.Series, name: str) -> str:
    return f"{row[name]:.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]"
