"""The figures of an analysis, as PNG and SVG: one function a figure, drawn from the tables alone.

Each takes `results`, a mapping model label -> {table name: DataFrame} in the order of the legend, and `about`, a dict
on the feature set: name (str), features (how many, F), texts, tokens (in all). None touches pyplot or a display, so
they can be drawn in any process. Intervals are those of the tables: 95 % bootstrap over texts.
Shapes: F features, L layers, K shares.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps, font_manager, style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation, Transform

from l2e_ds.analysis.measures import is_edge
from l2e_ds.analysis.tables import REPORTED_SHARE, REPORTED_SHARES
from l2e_ds.data.files import temporary_name

Tables = Mapping[str, pd.DataFrame]
Results = Mapping[str, Tables]

# Paul Tol's "muted" colours, in an order that keeps neighbours apart, and black; told apart by most colour-blind
# readers, and by marker and dash in a black-and-white print.
_COLOURS = [
    "#332288",
    "#CC6677",
    "#117733",
    "#88CCEE",
    "#882255",
    "#DDCC77",
    "#44AA99",
    "#AA4499",
    "#999933",
    "#222222",
]
_MARKERS = "osD^vP<X>ph"
_DASHES = ("-", "--", "-.", (0, (1, 1)))
_OWN, _NEXT, _OTHERS, _INK = "#CC3311", "#0077BB", "#B5B5B5", "#222222"

_STYLE: list[Any] = [
    "default",  # not what the user's matplotlibrc says
    {
        "font.family": ["DejaVu Sans"],  # comes with matplotlib
        "font.size": 9,
        "text.parse_math": False,  # a dollar sign in a feature's name is a dollar sign
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.edgecolor": "#666666",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#E4E4E4",
        "grid.linewidth": 0.7,
        "lines.markersize": 4.5,
        "lines.linewidth": 1.5,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "svg.fonttype": "none",  # text stays text: it can be searched, and read aloud
        "svg.hashsalt": "l2e-ds",  # the same tables give the same bytes
    },
]
_TITLE, _SUBTITLE, _NOTE = 13.0, 9.5, 8.0  # points
_LINE = 1.3  # of the font size
_EM = {_TITLE: 0.63, _SUBTITLE: 0.55, _NOTE: 0.55}  # a character's width of the font size, on the safe side
_LEGEND_INCHES = 2.6
_MOST_PANELS = 12
_INTERVALS = "are 95 % bootstrap intervals over texts"


# --- the figures ------------------------------------------------------------------------------------------------


@style.context(_STYLE)
def feature_distributions(label: str, tables: Tables, about: Mapping[str, Any]) -> Figure:
    """Of one model: activations on each feature's texts, for the best probed neuron of each feature (12 at most)."""
    table = tables["distributions"]
    probes = tables["probes"]
    best = probes[probes["place"] == 1].sort_values("f1_train", ascending=False, kind="stable")["feature"]
    found = set(table["probe_feature"])
    chosen = [feature for feature in best if feature in found][:_MOST_PANELS]
    columns = min(3, len(chosen))
    figure, grid = _frame(
        f"What the best neuron for each feature answers to, {label}",
        "Each panel is one neuron: the one that best tells texts of its feature from all others. A line is the density"
        " of its activations on the texts of one feature. A monosemantic neuron has its own line (red) away from the"
        " others; blue is the feature it answers to next. MS: mean squared distance from the neuron's mean over all"
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
        _draw_distribution(axes, of_neuron, feature, dict(zip(scores["feature"], scores["score_inside"], strict=True)))
        axes.legend(
            title=f"layer {layer}, neuron {neuron}",
            alignment="left",
            title_fontproperties={"weight": "bold"},
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            borderaxespad=0,
            labelspacing=0.25,
        )
    _hide_unused(grid, len(chosen))
    return figure


@style.context(_STYLE)
def neuron_distribution(distribution: pd.DataFrame, own: str, scores: Mapping[str, float]) -> Figure:
    """Of one neuron, narrow and without title, for its page. distribution: feature, left, right, count."""
    figure = _figure((5.0, 3.5), (0, 0, 1, 1))
    axes = figure.subplots()
    _draw_distribution(axes, distribution, own, scores)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), borderaxespad=0, labelspacing=0.25)
    return figure


@style.context(_STYLE)
def monosemantic_vs_random(results: Results, about: Mapping[str, Any]) -> Figure:
    """Of each model: score inside the feature of the probed neurons and of random ones, a row a feature."""
    columns = min(2, len(results))
    rows = max(len(tables["significance"]) for tables in results.values())
    counts = pd.concat([tables["significance"][["monosemantic", "random"]] for tables in results.values()])
    figure, grid = _frame(
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
        _draw_significance(axes, tables)
        axes.set_title(_shown(label, 48))
    marks = [
        Line2D([], [], color=_OWN, marker="o", linestyle="", markersize=7, label="monosemantic neurons, mean"),
        Line2D([], [], color=_OWN, marker=".", linewidth=0.8, alpha=0.5, label="each of them"),
        Line2D([], [], color=_INK, marker="D", linestyle="", markersize=5, label="random neurons, mean"),
    ]
    engine = figure.get_layout_engine()
    assert engine is not None  # set by _frame
    left, bottom, _, height = engine.get()["rect"]
    figure.legend(handles=marks, ncols=3, loc="lower left", bbox_to_anchor=(left, bottom + height), borderaxespad=0.2)
    _hide_unused(grid, len(results))
    return figure


@style.context(_STYLE)
def ks_over_scale(results: Results, about: Mapping[str, Any]) -> Figure:
    """K-S statistic against parameters."""
    figure, grid = _frame(
        "How far own features stand out, over model size",
        "Kolmogorov-Smirnov statistic: the widest gap between the distribution of neurons' scores on their own feature"
        " (where each scores highest) and that of their scores on all features. 0: the own feature is like any other;"
        " 1: always apart. It falls where neurons become less monosemantic.",
        f"{_set_of(about)}. {_sampled(results)}. Bars {_INTERVALS}.",
        1,
        1,
        (6.2, max(4.3, _legend_height(results))),
        _LEGEND_INCHES,
    )
    axes = grid[0, 0]
    _draw_over_scale(axes, results, {label: tables["scale"].iloc[0] for label, tables in results.items()}, "ks")
    axes.set_ylabel("K-S statistic (0 to 1)")
    axes.yaxis.set_major_locator(MaxNLocator(6))
    _legend(axes, axes, results)
    return figure


@style.context(_STYLE)
def own_score_over_layers(results: Results, about: Mapping[str, Any]) -> Figure:
    """Mean phi_l* of each layer over relative depth, and of sampled neurons over scale."""
    figure, grid = _frame(
        "How strongly neurons answer to their own feature, over layers and model size",
        "A neuron's own feature is the one with the highest monosemanticity score (MS): the mean squared distance of"
        " its activations from its mean over all texts, in units of its variance. 1 means no more than on any text;"
        " the more, the more monosemantic.",
        f"{_set_of(about)}. Left: all live neurons, of {_count_of(results.values())}. Right: {_sampled(results)}."
        f" Bands and bars {_INTERVALS}.",
        1,
        2,
        (4.6, max(4.1, _legend_height(results))),
        _LEGEND_INCHES,
    )
    left, right = grid[0]
    for (label, tables), look in zip(results.items(), _looks(results), strict=True):
        _draw_band(left, tables["layers"], "depth", "own_score", label, look)
    _depth_axis(left)
    left.set(title="over layers", ylabel="mean MS on the own feature")
    rows = {label: tables["scale"].iloc[0] for label, tables in results.items()}
    _draw_over_scale(right, results, rows, "own_score")
    right.set(title="over model size", ylabel="mean MS on the own feature")
    _legend(right, left, results)
    return figure


@style.context(_STYLE)
def fkr_over_share(results: Results, about: Mapping[str, Any]) -> Figure:
    """FKR of all layers together against the share k, its least value marked, and at 2 % against parameters."""
    figure, grid = _frame(
        "How often inhibition hits text of the wrong feature, over the inhibited share k",
        "False killing rate (FKR): of the share k of activations with the highest scores, those on text that is not of"
        " the neuron's own feature. Lower is better; activations picked blindly would give about"
        f" {_percent(1 - 1 / about['features'])}. A star marks the k with the lowest rate.",
        f"{_set_of(about)}. All layers together, {_count_of(results.values())}. Bands and bars {_INTERVALS}.",
        1,
        2,
        (4.6, max(4.1, _legend_height(results))),
        _LEGEND_INCHES,
    )
    left, right = grid[0]
    at_two: dict[str, pd.Series] = {}
    lowest: list[str] = []
    for (label, tables), look in zip(results.items(), _looks(results), strict=True):
        rates = _together(tables["fkr"]).sort_values("share")
        _draw_band(left, rates, "share", "fkr", label, look)
        if rates["fkr"].isna().all():  # of dead neurons
            lowest.append("")
        else:
            least = rates.loc[rates["fkr"].idxmin()]
            star = {"marker": "*", "markersize": 13, "color": look["color"], "markeredgecolor": "white"}
            left.plot([least["share"]], [least["fkr"]], **star)
            edge = " or beyond" if is_edge(least["share"]) else ""
            lowest.append(f"\nlowest at {_percent(least['share'])}{edge}")
        at_two[label] = _at_share(rates, REPORTED_SHARE).iloc[0]
    left.set_xscale("log")
    left.xaxis.set_major_locator(FixedLocator([0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2]))
    left.xaxis.set_minor_locator(NullLocator())
    left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:g}"))
    left.set(title="over the share", xlabel="share k of activations inhibited (%, log scale)", ylabel="FKR")
    left.yaxis.set_major_formatter(_PERCENT_AXIS)
    _draw_over_scale(right, results, at_two, "fkr")
    shares = sorted({_percent(row["share"]) for row in at_two.values()})
    right.set(title=f"at k = {' / '.join(shares)}, over model size", ylabel="FKR")
    right.yaxis.set_major_formatter(_PERCENT_AXIS)
    _legend(right, left, results, lowest)
    return figure


@style.context(_STYLE)
def fkr_over_layers(results: Results, about: Mapping[str, Any]) -> Figure:
    """FKR of each layer over relative depth, a panel each for k = 1, 2 and 5 %."""
    figure, grid = _frame(
        "How often inhibition hits text of the wrong feature, over layers",
        "False killing rate (FKR): of the share k of a layer's activations with the highest scores, those on text that"
        " is not of the neuron's own feature. Lower is better; activations picked blindly would give about"
        f" {_percent(1 - 1 / about['features'])}.",
        f"{_set_of(about)}. Each layer by itself, {_count_of(results.values())}. Bands {_INTERVALS}.",
        1,
        len(REPORTED_SHARES),
        (3.5, max(3.9, _legend_height(results))),
        _LEGEND_INCHES,
    )
    for axes, share in zip(grid[0], REPORTED_SHARES, strict=True):
        for (label, tables), look in zip(results.items(), _looks(results), strict=True):
            rates = _at_share(_by_layer(tables["fkr"]), share)
            rates = rates.merge(tables["layers"][["layer", "depth"]], on="layer").sort_values("depth")
            _draw_band(axes, rates, "depth", "fkr", label, look)
        _depth_axis(axes)
        axes.set_title(f"k = {_percent(share)}")
        axes.yaxis.set_major_formatter(_PERCENT_AXIS)
        axes.sharey(grid[0, 0])
    grid[0, 0].set_ylabel("FKR")
    _legend(grid[0, -1], grid[0, -1], results)
    return figure


@style.context(_STYLE)
def over_time(checkpoints: Sequence[tuple[int, Tables]], about: Mapping[str, Any]) -> Figure:
    """Of the checkpoints of one run, (step, tables) each: a line a layer for each measure."""
    ordered = sorted(checkpoints, key=lambda one: one[0])
    table = pd.concat([_with_fkr(tables).assign(step=step) for step, tables in ordered])
    steps = [step for step, _ in ordered]
    figure, grid = _frame(
        "How neurons change over training, layer by layer",
        "Own-feature score: how strongly a neuron answers to the feature it answers to most (1: no more than to any"
        f" text). FKR: share of the top {_percent(REPORTED_SHARE)} of activations that lie on text of another feature."
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
        ("fkr", f"FKR at k = {_percent(REPORTED_SHARE)}", "FKR"),
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
            of_layer = table[table["layer"] == layer]
            axes.plot(of_layer["step"], of_layer[column], ".-", color=colour, markersize=4, linewidth=1.2, label=name)
        _step_axis(axes, steps)
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
    """Write every figure whose tables hold something, as NAME.png (150 dpi) and NAME.svg. Returns the files.

    `distributions` is one a model: distributions.png, or distributions_1_LABEL.png, ... for several. checkpoints,
    (step, tables) each, adds over_time. The same tables give the same files. Raises OSError.
    """
    wanted: dict[str, Callable[[], Figure]] = {}
    for place, (label, tables) in enumerate(results.items(), 1):
        if len(tables["distributions"]):
            slug = re.sub(r"[^\w.]+", "-", label, flags=re.ASCII).strip("-.")[-60:]
            name = "distributions" if len(results) == 1 else f"distributions_{place}_{slug}"
            wanted[name] = partial(feature_distributions, label, tables, about)
    tested = {label: tables for label, tables in results.items() if len(tables["significance"])}
    if tested:
        wanted["monosemantic_vs_random"] = partial(monosemantic_vs_random, tested, about)
    for draw in (ks_over_scale, own_score_over_layers, fkr_over_share, fkr_over_layers):
        wanted[draw.__name__] = partial(draw, results, about)
    if checkpoints:
        wanted["over_time"] = partial(over_time, checkpoints, about)
    folder.mkdir(parents=True, exist_ok=True)
    return [path for name, draw_it in wanted.items() for path in _save(draw_it(), folder / name)]


@style.context(_STYLE)
def svg_of(figure: Figure) -> str:
    """As text of an XML document, transparent; the same figure gives the same text."""
    content = io.StringIO()
    figure.savefig(
        content, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")), transparent=True
    )
    return content.getvalue()


@style.context(_STYLE)
def _save(figure: Figure, stem: Path) -> list[Path]:
    paths = []
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        path = stem.with_name(f"{stem.name}.{kind}")
        temporary = temporary_name(path)
        try:
            figure.savefig(temporary, format=kind, dpi=150, metadata=metadata)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        paths.append(path)
        figure.set_layout_engine("none")  # it lies as it shall; laying it out anew for the next would take seconds
    return paths


# --- parts of figures -------------------------------------------------------------------------------------------


def _frame(
    title: str,
    subtitle: str,
    note: str,
    rows: int,
    columns: int,
    panel: tuple[float, float],
    legend: float = 0,
    strip: float = 0,
) -> tuple[Figure, np.ndarray]:
    """A figure with title, subtitle and note, and its axes [rows, columns].

    Inches: panel, width and height; legend, the width kept free for it; strip, the height kept free between subtitle
    and axes.
    """
    width = max(7.4, columns * panel[0] + legend)
    texts = [
        (textwrap.wrap(_shown(text), int((width - 0.3) * 72 / (size * _EM[size]))), size)
        for text, size in ((title, _TITLE), (subtitle, _SUBTITLE), (note, _NOTE))
    ]
    heights = [len(lines) * size * _LINE / 72 for lines, size in texts]  # inches
    above, below = 0.12 + heights[0] + 0.06 + heights[1] + 0.14 + strip, heights[2] + 0.2
    height = above + rows * panel[1] + below
    figure = _figure((width, height), (0.08 / width, below / height, 1 - 0.16 / width, 1 - (above + below) / height))
    tops = (height - 0.12, height - 0.12 - heights[0] - 0.06, below - 0.1)
    for (lines, size), top in zip(texts, tops, strict=True):
        figure.text(
            0.15 / width,
            top / height,
            "\n".join(lines),
            size=size,
            va="top",
            linespacing=_LINE,
            weight="bold" if size == _TITLE else "normal",
            color=_INK if size == _TITLE else "#555555",
        )
    return figure, figure.subplots(rows, columns, squeeze=False)


def _figure(inches: tuple[float, float], rectangle: tuple[float, float, float, float]) -> Figure:
    layout = ConstrainedLayoutEngine(rect=rectangle, w_pad=0.08, h_pad=0.08, wspace=0.03, hspace=0.05)
    figure = Figure(figsize=inches, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _draw_distribution(axes: Axes, table: pd.DataFrame, own: str, scores: Mapping[str, float]) -> None:
    """table: feature, left, right, count. The own feature in red, that of the next highest score in blue."""
    features = list(dict.fromkeys(table["feature"]))
    others = sorted((f for f in features if f != own), key=lambda f: -scores[f])
    for feature in [*([own] if own in features else []), *others]:
        bins = table[table["feature"] == feature].sort_values("left")
        counts, widths = bins["count"].to_numpy(float), (bins["right"] - bins["left"]).to_numpy()
        with np.errstate(invalid="ignore"):
            density = np.where(counts > 0, counts / (counts.sum() * widths), np.nan)
        place = {own: 0, **dict.fromkeys(others[:1], 1)}.get(feature, 2)
        axes.plot(
            (bins["left"] + bins["right"]) / 2,
            density,
            color=(_OWN, _NEXT, _OTHERS)[place],
            linewidth=(2.0, 1.3, 0.8)[place],
            label=_legend_name(feature, scores[feature]) if place < 2 else f"_{feature}",
            zorder=4 - place,
        )
    if len(others) > 1:
        more = f"{len(others) - 1} more feature{'s' if len(others) > 2 else ''}"
        axes.plot([], [], color=_OTHERS, linewidth=0.8, label=more)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 2, 5), numticks=6))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.set(xlabel="activation", ylabel="density (log scale)")


def _legend_name(feature: str, score: float) -> str:
    return f"{_shown(feature, 28)}, MS {score:.3g}"


def _draw_significance(axes: Axes, tables: Tables) -> None:
    rows = tables["significance"].reset_index(drop=True)
    for y, row in rows.iterrows():
        each = tables["probes"][tables["probes"]["feature"] == row["feature"]].sort_values("place")
        offsets = y + np.linspace(-0.3, 0.3, len(each)) if len(each) > 1 else np.array([y])
        axes.hlines(offsets, each["score_inside_low"], each["score_inside_high"], color=_OWN, alpha=0.35, linewidth=0.8)
        axes.plot(each["score_inside"], offsets, ".", color=_OWN, alpha=0.45, markersize=4, label="_each")
        clear = row["p_adjusted"] < 0.05
        axes.plot(
            [row["monosemantic_score"]],
            [y],
            "o",
            color=_OWN,
            markersize=7,
            zorder=4,
            label="_probed",
            markerfacecolor=_OWN if clear else "white",
        )
        ratio = f"{row['ratio']:.3g}x ({row['ratio_low']:.3g} to {row['ratio_high']:.3g})"
        right = axes.get_yaxis_transform()
        axes.text(1.02, y, f"{ratio}, {_p(row['p_adjusted'])}", transform=right, va="center", size=8, color=_INK)
    axes.plot(rows["random_score"], rows.index, "D", color=_INK, markersize=5, zorder=3, label="_random")
    axes.set_xscale("log")
    _plain_log_ticks(axes, "x")
    axes.set_yticks(list(rows.index), [_shown(name, 26) for name in rows["feature"]])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("MS on the feature's texts (log scale)")


def _draw_over_scale(axes: Axes, results: Results, rows: Mapping[str, pd.Series], column: str) -> None:
    """A point with its interval a model; a thin line joins models whose labels differ in nothing but their size.

    Models of one size stand at one place of the axis, and are drawn side by side there, a few points apart.
    """
    parameters = {label: float(tables["scale"]["parameters"].iloc[0]) for label, tables in results.items()}
    families: dict[str, list[str]] = {}
    for label in sorted(results, key=lambda one: parameters[one]):
        families.setdefault(re.sub(r"\d+(\.\d+)?[kmb](?![a-z])", "", label, flags=re.IGNORECASE), []).append(label)
    alike = {count: [one for one in results if parameters[one] == count] for count in parameters.values()}
    most = max(map(len, alike.values()))

    def aside(label: str) -> Transform:
        """Where it is drawn: from the middle of those of its size, in points."""
        same = alike[parameters[label]]
        points = (same.index(label) - (len(same) - 1) / 2) * min(7.0, 42 / most)
        return axes.transData + ScaledTranslation(points / 72, 0, axes.figure.dpi_scale_trans)

    axes.set_xscale("log")
    for family in families.values():
        if len({parameters[label] for label in family}) == len(family) > 1:
            axes.plot(
                [parameters[one] for one in family],
                [rows[one][column] for one in family],
                color="#AAAAAA",
                linewidth=1,
                zorder=1,
                label="_family",
                transform=aside(family[0]),
            )
    for label, look in zip(results, _looks(results), strict=True):
        row, x, transform = rows[label], parameters[label], aside(label)
        ends = [row[f"{column}_low"]], [row[f"{column}_high"]]
        axes.vlines([x], *ends, color=look["color"], linewidth=1.6, zorder=2, transform=transform)
        point = {"color": look["color"], "marker": look["marker"], "markersize": 7, "label": label}
        axes.plot([x], [row[column]], linestyle="", transform=transform, **point)
    low, high = min(alike), max(alike)
    around = 1.5 if high > low else 4.0
    axes.set_xlim(low / around, high * around)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 40 else (1, 3), numticks=20))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _magnitude(value)))
    axes.set_xlabel(
        "parameters (log scale)" if most == 1 else "parameters (log scale; models of one size side by side)"
    )


def _draw_band(axes: Axes, table: pd.DataFrame, x: str, column: str, label: str, look: Mapping[str, Any]) -> None:
    """A line with its interval."""
    axes.plot(table[x], table[column], label=label, **look)
    low, high = table[f"{column}_low"], table[f"{column}_high"]
    axes.fill_between(table[x], low, high, color=look["color"], alpha=0.09, linewidth=0)


def _depth_axis(axes: Axes) -> None:
    axes.set_xlim(-0.04, 1.04)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    axes.set_xlabel("relative depth (0: first layer, 1: last)")


def _step_axis(axes: Axes, steps: Sequence[int]) -> None:
    positive = [step for step in steps if step > 0]
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _magnitude(value)))
    if positive and positive[-1] >= 100 * positive[0]:
        axes.set_xscale("symlog", linthresh=positive[0], linscale=0.5)
        first, last = math.ceil(math.log10(positive[0])), math.floor(math.log10(positive[-1]))
        decades = [10.0**power for power in range(first, last + 1)]
        axes.xaxis.set_major_locator(FixedLocator([*([0] if steps[0] == 0 else []), *decades]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _magnitude(value)))
        axes.set_xlabel("step (log scale)")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel("step")


def _plain_log_ticks(axes: Axes, which: str) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    axis.set_major_locator(
        LogLocator(subs=(1, 2, 5) if high > 4 * low else (1, 1.2, 1.5, 2, 3, 4, 5, 6, 8), numticks=20)
    )
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _legend(axes: Axes, source: Axes, results: Results, endings: Sequence[str] = ()) -> None:
    """Of the models, right of the axes, so that it covers nothing."""
    axes.legend(
        source.get_legend_handles_labels()[0],
        [name + end for name, end in zip(map(_model_name, results), endings or [""] * len(results), strict=True)],
        loc="upper left",
        bbox_to_anchor=(1.03, 1.0),
        borderaxespad=0,
        handlelength=2.6,
    )


def _legend_height(results: Results) -> float:
    """Inches that `_legend` may need, axis labels and titles included."""
    return 0.8 + sum(0.07 + 0.165 * (2 + _model_name(label).count("\n")) for label in results)


def _model_name(label: str) -> str:
    return "\n".join(textwrap.wrap(_shown(label, 84), 30))


def _hide_unused(grid: np.ndarray, used: int) -> None:
    for axes in grid.flat[used:]:
        axes.set_axis_off()


def _looks(results: Results) -> list[dict[str, Any]]:
    """Colour, marker and dash a model, the same in every figure."""
    return [
        {
            "color": _COLOURS[place % len(_COLOURS)],
            "marker": _MARKERS[place % len(_MARKERS)],
            "linestyle": _DASHES[place % len(_DASHES)],
        }
        for place in range(len(results))
    ]


# --- numbers out of the tables ----------------------------------------------------------------------------------


def _together(rates: pd.DataFrame) -> pd.DataFrame:
    return rates[rates["layer"] == -1]


def _by_layer(rates: pd.DataFrame) -> pd.DataFrame:
    return rates[rates["layer"] >= 0]


def _at_share(rates: pd.DataFrame, share: float) -> pd.DataFrame:
    """The rows whose share is nearest to the one asked for."""
    nearest = rates["share"].iloc[int((rates["share"] - share).abs().to_numpy().argmin())]
    return rates[rates["share"] == nearest]


def _with_fkr(tables: Tables) -> pd.DataFrame:
    return tables["layers"].merge(_at_share(_by_layer(tables["fkr"]), REPORTED_SHARE)[["layer", "fkr"]], on="layer")


# --- words ------------------------------------------------------------------------------------------------------


_PERCENT_AXIS = FuncFormatter(lambda value, _: f"{value * 100:.4g} %")


def _percent(share: float) -> str:
    return f"{share * 100:.3g} %"


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"


def _magnitude(value: float) -> str:
    """70M, 1.4B."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit * 0.9995:
            return f"{value / unit:.3g}{letter}"
    return f"{value:g}"


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
    return f"{_range([one['layers']['neurons'].sum() for one in tables])} neurons a model"


def _sampled(results: Results) -> str:
    return f"{_range([tables['scale']['neurons'].iloc[0] for tables in results.values()])} sampled neurons a model"


@cache
def _glyphs() -> frozenset[int]:
    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    return frozenset(font.get_charmap())


def _shown(text: str, most: int | None = None) -> str:
    """What the font has no glyph for, or cannot be seen, is escaped; a longer text than `most` loses its middle."""
    text = "".join(c if c.isprintable() and ord(c) in _glyphs() else c.encode("unicode_escape").decode() for c in text)
    if most is not None and len(text) > most:
        return f"{text[: most // 2]}…{text[-(most - most // 2 - 1) :]}"
    return text
