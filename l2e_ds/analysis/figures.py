"""Draw the figures of an analysis, as PNG and SVG, from its tables alone. Each figure is one function.

Each takes `results`, a mapping of model label to {table name: DataFrame} in the order of the legend, and `about`, a
dict on the feature set: name (str), and how many features, texts and tokens it has. None uses pyplot or a display, so
that figures can be drawn in any process. Intervals are those of the tables: 95 % bootstrap over texts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps, style
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from l2e_ds.analysis.drawing import (
    INK,
    LEGEND_INCHES,
    OWN,
    STYLE,
    Results,
    Tables,
    add_legend,
    depth_axis,
    draw_band,
    draw_distribution,
    draw_over_scale,
    draw_significance,
    frame,
    hide_unused,
    legend_height,
    looks,
    new_figure,
    percent,
    save,
    shown,
    step_axis,
)
from l2e_ds.analysis.measures import is_edge
from l2e_ds.analysis.tables import REPORTED_SHARE, REPORTED_SHARES

_MOST_PANELS = 12
_INTERVALS = "are 95 % bootstrap intervals over texts"


# --- the figures ------------------------------------------------------------------------------------------------


@style.context(STYLE)
def feature_distributions(label: str, tables: Tables, about: Mapping[str, Any]) -> Figure:
    """Draw activations on each feature's texts, for one model's best probed neuron of each feature (12 at most)."""
    table = tables["distributions"]
    probes = tables["probes"]
    best = probes[probes["place"] == 1].sort_values("f1_train", ascending=False, kind="stable")["feature"]
    found = set(table["probe_feature"])
    chosen = [feature for feature in best if feature in found][:_MOST_PANELS]
    columns = min(3, len(chosen))
    figure, grid = frame(
        f"What the best neuron for each feature responds to, {label}",
        "Each panel is one neuron: the one that best tells texts of its feature from all others. A line is the density"
        " of its activations on the texts of one feature. A monosemantic neuron has its own line (red) away from the"
        " others; blue is the feature it responds to next. MS: mean squared distance from the neuron's mean over all"
        " texts, in units of its variance (1 on average).",
        f"{_set_of(about)}. {len(chosen)} of the model's {tables['layers']['neurons'].sum():,} neurons.",
        math.ceil(len(chosen) / columns),
        columns,
        (4.0, 3.1),
    )
    for axes, feature in zip(grid.flat, chosen, strict=False):
        of_neuron = table[table["probe_feature"] == feature]
        layer, neuron = (int(of_neuron[key].iloc[0]) for key in ("layer", "neuron"))
        scores = tables["neuron_features"]
        scores = scores[(scores["layer"] == layer) & (scores["neuron"] == neuron)]
        draw_distribution(axes, of_neuron, feature, dict(zip(scores["feature"], scores["score_inside"], strict=True)))
        axes.legend(
            title=f"layer {layer}, neuron {neuron}",
            alignment="left",
            title_fontproperties={"weight": "bold"},
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            borderaxespad=0,
            labelspacing=0.25,
        )
    hide_unused(grid, len(chosen))
    return figure


@style.context(STYLE)
def neuron_distribution(distribution: pd.DataFrame, own: str, scores: Mapping[str, float]) -> Figure:
    """Draw one neuron's distribution, narrow and without title, for its page.

    distribution: columns feature, left, right, count; own: the own feature; scores: by feature.
    """
    figure = new_figure((5.0, 3.5), (0, 0, 1, 1))
    axes = figure.subplots()
    draw_distribution(axes, distribution, own, scores)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), borderaxespad=0, labelspacing=0.25)
    return figure


@style.context(STYLE)
def monosemantic_vs_random(results: Results, about: Mapping[str, Any]) -> Figure:
    """Draw each model's scores inside a feature, of the probed neurons and of random ones, a row for each feature."""
    columns = min(2, len(results))
    rows = max(len(tables["significance"]) for tables in results.values())
    counts = pd.concat([tables["significance"][["monosemantic", "random"]] for tables in results.values()])
    figure, grid = frame(
        "Monosemantic and random neurons: their score on each feature",
        "Monosemanticity score (MS) on the texts of a feature: mean squared distance of a neuron's activations from its"
        " mean over all texts, in units of its variance (1 on average). Small dots: the monosemantic neurons, those"
        " that best tell the feature from the others, each with its interval. Right: how many times higher, its"
        " interval, and the probability of such a lead by chance (one-sided Mann-Whitney test, Holm-adjusted over"
        " features). Hollow circle: p is 0.05 or more.",
        f"{_set_of(about)}. A feature has {_range(counts['monosemantic'])} monosemantic and"
        f" {_range(counts['random'])} random neurons. Lines {_INTERVALS}.",
        math.ceil(len(results) / columns),
        columns,
        (6.6, 0.8 + 0.34 * rows),
        strip=0.35,
    )
    for axes, (label, tables) in zip(grid.flat, results.items(), strict=False):
        draw_significance(axes, tables)
        axes.set_title(shown(label, 48))
    marks = [
        Line2D([], [], color=OWN, marker="o", linestyle="", markersize=7, label="monosemantic neurons, mean"),
        Line2D([], [], color=OWN, marker=".", linewidth=0.8, alpha=0.5, label="each of them"),
        Line2D([], [], color=INK, marker="D", linestyle="", markersize=5, label="random neurons, mean"),
    ]
    engine = figure.get_layout_engine()
    assert engine is not None  # set by frame
    left, bottom, _, height = engine.get()["rect"]
    figure.legend(handles=marks, ncols=3, loc="lower left", bbox_to_anchor=(left, bottom + height), borderaxespad=0.2)
    hide_unused(grid, len(results))
    return figure


@style.context(STYLE)
def ks_over_scale(results: Results, about: Mapping[str, Any]) -> Figure:
    """Draw the K-S statistic against the number of parameters."""
    figure, grid = frame(
        "How far own features stand out, over model size",
        "Kolmogorov-Smirnov statistic: the widest gap between the distribution of neurons' scores on their own feature"
        " (where each scores highest) and that of their scores on all features. 0: the own feature is like any other;"
        " 1: always apart. It falls where neurons become less monosemantic.",
        f"{_set_of(about)}. {_sampled(results)}. Bars {_INTERVALS}.",
        1,
        1,
        (6.2, max(4.3, legend_height(results))),
        LEGEND_INCHES,
    )
    axes = grid[0, 0]
    draw_over_scale(axes, results, {label: tables["scale"].iloc[0] for label, tables in results.items()}, "ks")
    axes.set_ylabel("K-S statistic (0 to 1)")
    axes.yaxis.set_major_locator(MaxNLocator(6))
    add_legend(axes, axes, results)
    return figure


@style.context(STYLE)
def own_score_over_layers(results: Results, about: Mapping[str, Any]) -> Figure:
    """Draw the mean phi_l* of each layer over relative depth, and of sampled neurons over the number of parameters."""
    figure, grid = frame(
        "How strongly neurons respond to their own feature, over layers and model size",
        "A neuron's own feature is the one with the highest monosemanticity score (MS): the mean squared distance of"
        " its activations from its mean over all texts, in units of its variance. 1 means no more than on any text;"
        " the more, the more monosemantic.",
        f"{_set_of(about)}. Left: all live neurons, of {_count_of(results.values())}. Right: {_sampled(results)}."
        f" Bands and bars {_INTERVALS}.",
        1,
        2,
        (4.6, max(4.1, legend_height(results))),
        LEGEND_INCHES,
    )
    left, right = grid[0]
    for (label, tables), look in zip(results.items(), looks(results), strict=True):
        draw_band(left, tables["layers"], "depth", "own_score", label, look)
    depth_axis(left)
    left.set(title="over layers", ylabel="mean MS on the own feature")
    rows = {label: tables["scale"].iloc[0] for label, tables in results.items()}
    draw_over_scale(right, results, rows, "own_score")
    right.set(title="over model size", ylabel="mean MS on the own feature")
    add_legend(right, left, results)
    return figure


@style.context(STYLE)
def fkr_over_share(results: Results, about: Mapping[str, Any]) -> Figure:
    """Draw the FKR of all layers together over the share k, with the lowest marked, and at 2 % over parameters."""
    figure, grid = frame(
        "How often inhibition hits text of the wrong feature, over the inhibited share k",
        "False killing rate (FKR): of the share k of activations with the highest scores, those on text that is not of"
        " the neuron's own feature. Lower is better; activations picked blindly would give about"
        f" {percent(1 - 1 / about['features'])}. A star marks the k with the lowest rate.",
        f"{_set_of(about)}. All layers together, {_count_of(results.values())}. Bands and bars {_INTERVALS}.",
        1,
        2,
        (4.6, max(4.1, legend_height(results))),
        LEGEND_INCHES,
    )
    left, right = grid[0]
    at_two: dict[str, pd.Series] = {}
    lowest: list[str] = []
    for (label, tables), look in zip(results.items(), looks(results), strict=True):
        rates = _of_all_layers(tables["fkr"]).sort_values("share")
        draw_band(left, rates, "share", "fkr", label, look)
        if rates["fkr"].isna().all():  # all neurons are dead
            lowest.append("")
        else:
            best = rates.loc[rates["fkr"].idxmin()]
            star = {"marker": "*", "markersize": 13, "color": look["color"], "markeredgecolor": "white"}
            left.plot([best["share"]], [best["fkr"]], **star)
            edge = " or beyond" if is_edge(best["share"]) else ""
            lowest.append(f"\nlowest at {percent(best['share'])}{edge}")
        at_two[label] = _at_share(rates, REPORTED_SHARE).iloc[0]
    left.set_xscale("log")
    left.xaxis.set_major_locator(FixedLocator([0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2]))
    left.xaxis.set_minor_locator(NullLocator())
    left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:g}"))
    left.set(title="over the share", xlabel="share k of activations inhibited (%, log scale)", ylabel="FKR")
    left.yaxis.set_major_formatter(_PERCENT_AXIS)
    draw_over_scale(right, results, at_two, "fkr")
    shares = sorted({percent(row["share"]) for row in at_two.values()})
    right.set(title=f"at k = {' / '.join(shares)}, over model size", ylabel="FKR")
    right.yaxis.set_major_formatter(_PERCENT_AXIS)
    add_legend(right, left, results, lowest)
    return figure


@style.context(STYLE)
def fkr_over_layers(results: Results, about: Mapping[str, Any]) -> Figure:
    """Draw the FKR of each layer over relative depth, in one panel each for k = 1, 2 and 5 %."""
    figure, grid = frame(
        "How often inhibition hits text of the wrong feature, over layers",
        "False killing rate (FKR): of the share k of a layer's activations with the highest scores, those on text that"
        " is not of the neuron's own feature. Lower is better; activations picked blindly would give about"
        f" {percent(1 - 1 / about['features'])}.",
        f"{_set_of(about)}. Each layer by itself, {_count_of(results.values())}. Bands {_INTERVALS}.",
        1,
        len(REPORTED_SHARES),
        (3.5, max(3.9, legend_height(results))),
        LEGEND_INCHES,
    )
    for axes, share in zip(grid[0], REPORTED_SHARES, strict=True):
        for (label, tables), look in zip(results.items(), looks(results), strict=True):
            rates = _at_share(_by_layer(tables["fkr"]), share)
            rates = rates.merge(tables["layers"][["layer", "depth"]], on="layer").sort_values("depth")
            draw_band(axes, rates, "depth", "fkr", label, look)
        depth_axis(axes)
        axes.set_title(f"k = {percent(share)}")
        axes.yaxis.set_major_formatter(_PERCENT_AXIS)
        axes.sharey(grid[0, 0])
    grid[0, 0].set_ylabel("FKR")
    add_legend(grid[0, -1], grid[0, -1], results)
    return figure


@style.context(STYLE)
def over_time(checkpoints: Sequence[tuple[int, Tables]], about: Mapping[str, Any]) -> Figure:
    """Draw each measure over the checkpoints of one run, (step, tables) each, as a line for each layer."""
    ordered = sorted(checkpoints, key=lambda checkpoint: checkpoint[0])
    table = pd.concat([_with_fkr(tables).assign(step=step) for step, tables in ordered])
    steps = [step for step, _ in ordered]
    figure, grid = frame(
        "How neurons change over training, layer by layer",
        "Own-feature score: how strongly a neuron responds to the feature it responds to most (1: no more than to any"
        f" text). FKR: share of the top {percent(REPORTED_SHARE)} of activations that lie on text of another feature."
        " Mean S: standard deviation of activations, the layer's scale. Kurtosis: 3 for a normal distribution, more"
        " where a few tokens stand out. Dead: neurons that do not vary.",
        f"{_set_of(about)}. {len(steps)} checkpoints, steps {steps[0]:,} to {steps[-1]:,};"
        f" {_count_of([ordered[-1][1]])}.",
        2,
        3,
        (3.7, 2.9),
    )
    panels = (
        ("own_score", "own-feature score", "mean MS on the own feature"),
        ("fkr", f"FKR at k = {percent(REPORTED_SHARE)}", "FKR"),
        ("mean_s", "scale of activations", "mean S (units of activation)"),
        ("kurtosis", "kurtosis", "median over live neurons"),
        ("dead_share", "dead neurons", "share of the layer"),
    )
    layers = sorted(table["layer"].unique())
    labelled = {layers[i] for i in np.linspace(0, len(layers) - 1, min(len(layers), 10)).round().astype(int)}
    colours = colormaps["viridis"](np.linspace(0, 0.92, max(len(layers), 2)))
    for axes, (column, title, unit) in zip(grid.flat, panels, strict=False):
        for colour, layer in zip(colours, layers, strict=False):
            name = f"layer {layer}" if layer in labelled else f"_layer {layer}"  # the legend leaves out _names
            rows = table[table["layer"] == layer]
            axes.plot(rows["step"], rows[column], ".-", color=colour, markersize=4, linewidth=1.2, label=name)
        step_axis(axes, steps)
        axes.set(title=title, ylabel=unit)
        if column in ("fkr", "dead_share"):
            axes.yaxis.set_major_formatter(_PERCENT_AXIS)
    corner = grid.flat[len(panels)]
    corner.set_axis_off()
    corner.legend(handles=grid.flat[0].get_legend_handles_labels()[0], loc="upper left", ncols=2)
    return figure


def write_figures(
    results: Results,
    about: Mapping[str, Any],
    folder: Path,
    checkpoints: Sequence[tuple[int, Tables]] = (),
) -> list[Path]:
    """Write every figure whose tables are not empty, as NAME.png (150 dpi) and NAME.svg. Returns the files.

    Each model has its own `distributions`: distributions.png, or distributions_1_LABEL.png, ... for several. With
    checkpoints, (step, tables) each, over_time is drawn, too. The same tables give the same files. Raises OSError.
    """
    figures: dict[str, Callable[[], Figure]] = {}
    for number, (label, tables) in enumerate(results.items(), 1):
        if len(tables["distributions"]):
            slug = re.sub(r"[^\w.]+", "-", label, flags=re.ASCII).strip("-.")[-60:]
            name = "distributions" if len(results) == 1 else f"distributions_{number}_{slug}"
            figures[name] = partial(feature_distributions, label, tables, about)
    tested = {label: tables for label, tables in results.items() if len(tables["significance"])}
    if tested:
        figures["monosemantic_vs_random"] = partial(monosemantic_vs_random, tested, about)
    for draw in (ks_over_scale, own_score_over_layers, fkr_over_share, fkr_over_layers):
        figures[draw.__name__] = partial(draw, results, about)
    if checkpoints:
        figures["over_time"] = partial(over_time, checkpoints, about)
    folder.mkdir(parents=True, exist_ok=True)
    return [path for name, draw_figure in figures.items() for path in save(draw_figure(), folder / name)]


# --- numbers out of the tables ----------------------------------------------------------------------------------


def _of_all_layers(rates: pd.DataFrame) -> pd.DataFrame:
    return rates[rates["layer"] == -1]


def _by_layer(rates: pd.DataFrame) -> pd.DataFrame:
    return rates[rates["layer"] >= 0]


def _at_share(rates: pd.DataFrame, share: float) -> pd.DataFrame:
    """Return the rows whose share is nearest to the one asked for."""
    nearest = rates["share"].iloc[int((rates["share"] - share).abs().to_numpy().argmin())]
    return rates[rates["share"] == nearest]


def _with_fkr(tables: Tables) -> pd.DataFrame:
    return tables["layers"].merge(_at_share(_by_layer(tables["fkr"]), REPORTED_SHARE)[["layer", "fkr"]], on="layer")


# --- words ------------------------------------------------------------------------------------------------------


_PERCENT_AXIS = FuncFormatter(lambda value, _: f"{value * 100:.4g} %")


def _set_of(about: Mapping[str, Any]) -> str:
    return (
        f"Feature set: {about['name']}, {about['features']} features, n = {about['texts']:,} texts,"
        f" {about['tokens']:,} tokens"
        + (f", a {about['sample']} as one sample" if about.get("sample", "token") != "token" else "")
    )


def _range(values: Any) -> str:
    low, high = int(min(values)), int(max(values))
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _count_of(tables: Any) -> str:
    return f"{_range([each['layers']['neurons'].sum() for each in tables])} neurons a model"


def _sampled(results: Results) -> str:
    return f"{_range([tables['scale']['neurons'].iloc[0] for tables in results.values()])} sampled neurons a model"
