"""Draw the figures of an analysis, as PNG and SVG, from its tables alone. Each figure is one function.

Each takes `results`, a mapping of model label to {table name: DataFrame} in the order of the legend, and `about`, a
dict on the feature set: name (str), and how many features, texts and tokens it has. None uses pyplot or a display.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps, style
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from l2e_ds.analysis import drawing
from l2e_ds.analysis.drawing import STYLE, Results
from l2e_ds.analysis.measures import is_edge
from l2e_ds.analysis.tables import REPORTED_SHARE, REPORTED_SHARES, Tables

_MOST_PANELS = 12
_INTERVALS = "are 95 % bootstrap intervals over texts"


@style.context(STYLE)
def feature_distributions(label: str, tables: Tables, about: Mapping[str, Any]) -> Figure:
    """Draw activations on each feature's texts, for one model's best probed neuron of each feature (12 at most)."""
    table = tables["distributions"]
    probes = tables["probes"]
    best = probes[probes["place"] == 1].sort_values("f1_train", ascending=False, kind="stable")["feature"]
    found = set(table["probe_feature"])
    chosen = [feature for feature in best if feature in found][:_MOST_PANELS]
    columns = min(3, len(chosen))
    figure, grid = drawing.frame(
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
        by_feature = dict(zip(scores["feature"], scores["score_inside"], strict=True))
        drawing.draw_distribution(axes, of_neuron, feature, by_feature, f"layer {layer}, neuron {neuron}")
    drawing.hide_unused(grid, len(chosen))
    return figure


@style.context(STYLE)
def neuron_distribution(distribution: pd.DataFrame, own: str, scores: Mapping[str, float]) -> Figure:
    """Draw one neuron's distribution, as `draw_distribution` does, narrow and without title, for its page."""
    figure = drawing.new_figure((5.0, 3.5), (0, 0, 1, 1))
    axes = figure.subplots()
    drawing.draw_distribution(axes, distribution, own, scores)
    return figure


@style.context(STYLE)
def monosemantic_vs_random(results: Results, about: Mapping[str, Any]) -> Figure:
    """Draw each model's scores inside a feature, of the probed neurons and of random ones, a row for each feature."""
    columns = min(2, len(results))
    rows = max(len(tables["significance"]) for tables in results.values())
    counts = pd.concat([tables["significance"][["monosemantic", "random"]] for tables in results.values()])
    figure, grid = drawing.frame(
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
        drawing.draw_significance(axes, tables)
        axes.set_title(drawing.drawable(label, 48))
    marks = [
        Line2D([], [], color=drawing.OWN, marker="o", linestyle="", markersize=7, label="monosemantic neurons, mean"),
        Line2D([], [], color=drawing.OWN, marker=".", linewidth=0.8, alpha=0.5, label="each of them"),
        Line2D([], [], color=drawing.INK, marker="D", linestyle="", markersize=5, label="random neurons, mean"),
    ]
    engine = figure.get_layout_engine()
    assert engine is not None  # set by frame
    left, bottom, _, height = engine.get()["rect"]
    figure.legend(handles=marks, ncols=3, loc="lower left", bbox_to_anchor=(left, bottom + height), borderaxespad=0.2)
    drawing.hide_unused(grid, len(results))
    return figure


@style.context(STYLE)
def ks_over_scale(results: Results, about: Mapping[str, Any]) -> Figure:
    """Draw the K-S statistic against the number of parameters."""
    figure, (axes,) = drawing.frame_with_legend(
        "How far own features stand out, over model size",
        "Kolmogorov-Smirnov statistic: the widest gap between the distribution of neurons' scores on their own feature"
        " (where each scores highest) and that of their scores on all features. 0: the own feature is like any other;"
        " 1: always apart. It falls where neurons become less monosemantic.",
        f"{_set_of(about)}. {_sampled(results)}. Bars {_INTERVALS}.",
        1,
        (6.2, 4.3),
        results,
    )
    drawing.draw_over_scale(axes, results, {label: tables["scale"].iloc[0] for label, tables in results.items()}, "ks")
    axes.set_ylabel("K-S statistic (0 to 1)")
    axes.yaxis.set_major_locator(MaxNLocator(6))
    drawing.add_legend(axes, axes, results)
    return figure


@style.context(STYLE)
def own_score_over_layers(results: Results, about: Mapping[str, Any]) -> Figure:
    """Draw the mean phi_l* of each layer over relative depth, and of sampled neurons over the number of parameters."""
    figure, (left, right) = drawing.frame_with_legend(
        "How strongly neurons respond to their own feature, over layers and model size",
        "A neuron's own feature is the one with the highest monosemanticity score (MS): the mean squared distance of"
        " its activations from its mean over all texts, in units of its variance. 1 means no more than on any text;"
        " the more, the more monosemantic.",
        f"{_set_of(about)}. Left: all live neurons, of {_count_of(results.values())}. Right: {_sampled(results)}."
        f" Bands and bars {_INTERVALS}.",
        2,
        (4.6, 4.1),
        results,
    )
    for label, look in drawing.looks(results).items():
        drawing.draw_band(left, results[label]["layers"], "depth", "own_score", label, look)
    drawing.depth_axis(left)
    left.set(title="over layers", ylabel="mean MS on the own feature")
    rows = {label: tables["scale"].iloc[0] for label, tables in results.items()}
    drawing.draw_over_scale(right, results, rows, "own_score")
    right.set(title="over model size", ylabel="mean MS on the own feature")
    drawing.add_legend(right, left, results)
    return figure


@style.context(STYLE)
def fkr_over_share(results: Results, about: Mapping[str, Any]) -> Figure:
    """Draw the FKR of all layers together over the share k, with the lowest marked, and at 2 % over parameters."""
    figure, (left, right) = drawing.frame_with_legend(
        "How often inhibition hits text of the wrong feature, over the inhibited share k",
        "False killing rate (FKR): of the share k of activations with the highest scores, those on text that is not of"
        " the neuron's own feature. Lower is better; activations picked blindly would give about"
        f" {drawing.percent(1 - 1 / about['features'])}. A star marks the k with the lowest rate.",
        f"{_set_of(about)}. All layers together, {_count_of(results.values())}. Bands and bars {_INTERVALS}.",
        2,
        (4.6, 4.1),
        results,
    )
    at_two: dict[str, pd.Series] = {}
    lowest: list[str] = []
    for label, look in drawing.looks(results).items():
        fkr = results[label]["fkr"]
        rates = fkr[fkr["layer"] == -1].sort_values("share")
        drawing.draw_band(left, rates, "share", "fkr", label, look)
        if rates["fkr"].isna().all():  # all neurons are dead
            lowest.append("")
        else:
            best = rates.loc[rates["fkr"].idxmin()]
            star = {"marker": "*", "markersize": 13, "color": look["color"], "markeredgecolor": "white"}
            left.plot([best["share"]], [best["fkr"]], **star)
            edge = " or beyond" if is_edge(best["share"]) else ""
            lowest.append(f"\nlowest at {drawing.percent(best['share'])}{edge}")
        at_two[label] = _at_share(rates, REPORTED_SHARE).iloc[0]
    left.set_xscale("log")
    shares = FixedLocator([0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2])
    drawing.set_ticks(left.xaxis, shares, lambda share: f"{share * 100:g}")
    left.set(title="over the share", xlabel="share k of activations inhibited (%, log scale)", ylabel="FKR")
    left.yaxis.set_major_formatter(_PERCENT_AXIS)
    drawing.draw_over_scale(right, results, at_two, "fkr")
    reported = sorted({drawing.percent(row["share"]) for row in at_two.values()})
    right.set(title=f"at k = {' / '.join(reported)}, over model size", ylabel="FKR")
    right.yaxis.set_major_formatter(_PERCENT_AXIS)
    drawing.add_legend(right, left, results, lowest)
    return figure


@style.context(STYLE)
def fkr_over_layers(results: Results, about: Mapping[str, Any]) -> Figure:
    """Draw the FKR of each layer over relative depth, in one panel each for k = 1, 2 and 5 %."""
    figure, grid = drawing.frame_with_legend(
        "How often inhibition hits text of the wrong feature, over layers",
        "False killing rate (FKR): of the share k of a layer's activations with the highest scores, those on text that"
        " is not of the neuron's own feature. Lower is better; activations picked blindly would give about"
        f" {drawing.percent(1 - 1 / about['features'])}.",
        f"{_set_of(about)}. Each layer by itself, {_count_of(results.values())}. Bands {_INTERVALS}.",
        len(REPORTED_SHARES),
        (3.5, 3.9),
        results,
    )
    for axes, share in zip(grid, REPORTED_SHARES, strict=True):
        for label, look in drawing.looks(results).items():
            rates = _layers_with_fkr(results[label], share).sort_values("depth")
            drawing.draw_band(axes, rates, "depth", "fkr", label, look)
        drawing.depth_axis(axes)
        axes.set_title(f"k = {drawing.percent(share)}")
        axes.yaxis.set_major_formatter(_PERCENT_AXIS)
        axes.sharey(grid[0])
    grid[0].set_ylabel("FKR")
    drawing.add_legend(grid[-1], grid[-1], results)
    return figure


@style.context(STYLE)
def over_time(checkpoints: Sequence[tuple[int, Tables]], about: Mapping[str, Any]) -> Figure:
    """Draw each measure over the checkpoints of one run, (step, tables) each, as a line for each layer."""
    ordered = sorted(checkpoints, key=lambda checkpoint: checkpoint[0])
    table = pd.concat([_layers_with_fkr(tables, REPORTED_SHARE).assign(step=step) for step, tables in ordered])
    steps = [step for step, _ in ordered]
    figure, grid = drawing.frame(
        "How neurons change over training, layer by layer",
        "Own-feature score: how strongly a neuron responds to the feature it responds to most (1: no more than to any"
        f" text). FKR: share of the top {drawing.percent(REPORTED_SHARE)} of activations that lie on text of another"
        " feature. Mean S: standard deviation of activations, the layer's scale. Kurtosis: 3 for a normal distribution,"
        " more where a few tokens stand out. Dead: neurons that do not vary.",
        f"{_set_of(about)}. {len(steps)} checkpoints, steps {steps[0]:,} to {steps[-1]:,};"
        f" {_count_of([ordered[-1][1]])}.",
        2,
        3,
        (3.7, 2.9),
    )
    panels = (
        ("own_score", "own-feature score", "mean MS on the own feature"),
        ("fkr", f"FKR at k = {drawing.percent(REPORTED_SHARE)}", "FKR"),
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
        drawing.step_axis(axes, steps)
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

    checkpoints: (step, tables) each, for over_time. The same tables give the same files. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for number, (label, tables) in enumerate(results.items(), 1):
        if len(tables["distributions"]):
            slug = re.sub(r"[^\w.]+", "-", label, flags=re.ASCII).strip("-.")[-60:]
            name = "distributions" if len(results) == 1 else f"distributions_{number}_{slug}"
            paths += drawing.save(feature_distributions(label, tables, about), folder / name)
    tested = {label: tables for label, tables in results.items() if len(tables["significance"])}
    if tested:
        paths += drawing.save(monosemantic_vs_random(tested, about), folder / "monosemantic_vs_random")
    for draw in (ks_over_scale, own_score_over_layers, fkr_over_share, fkr_over_layers):
        paths += drawing.save(draw(results, about), folder / draw.__name__)
    if checkpoints:
        paths += drawing.save(over_time(checkpoints, about), folder / "over_time")
    return paths


def _at_share(rates: pd.DataFrame, share: float) -> pd.DataFrame:
    """Return the rows whose share is nearest to the one asked for."""
    nearest = rates["share"].iloc[int((rates["share"] - share).abs().to_numpy().argmin())]
    return rates[rates["share"] == nearest]


def _layers_with_fkr(tables: Tables, share: float) -> pd.DataFrame:
    """Return the table of layers with the FKR of each at the share nearest to the one asked for."""
    fkr = tables["fkr"]
    rates = _at_share(fkr[fkr["layer"] >= 0], share)
    return tables["layers"].merge(rates[["layer", "fkr", "fkr_low", "fkr_high"]], on="layer")


_PERCENT_AXIS = FuncFormatter(lambda value, _: f"{value * 100:.4g} %")


def _set_of(about: Mapping[str, Any]) -> str:
    return (
        f"Feature set: {about['name']}, {about['features']} features, n = {_range(about['texts'])} texts,"
        f" {_range(about['tokens'])} tokens"
        + (f", a {about['sample']} as one sample" if about.get("sample", "token") != "token" else "")
    )


def _range(values: Any) -> str:
    low, high = int(min(values)), int(max(values))
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _count_of(tables: Any) -> str:
    return f"{_range([each['layers']['neurons'].sum() for each in tables])} neurons a model"


def _sampled(results: Results) -> str:
    return f"{_range([tables['scale']['neurons'].iloc[0] for tables in results.values()])} sampled neurons a model"
