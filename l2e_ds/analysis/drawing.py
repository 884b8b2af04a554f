"""Frames, axes, legends and colours of the analysis figures, which `figures` draws."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import font_manager, style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, Locator, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation, Transform

from l2e_ds.analysis.tables import Tables

Results = Mapping[str, Tables]
# Paul Tol's "muted" colours, in an order that makes neighbours differ, and black. Most colour-blind readers can tell
# them apart. In a black-and-white print, marker and dash do.
_COLOURS = (
    *("#332288", "#CC6677", "#117733", "#88CCEE", "#882255"),
    *("#DDCC77", "#44AA99", "#AA4499", "#999933", "#222222"),
)
_MARKERS = "osD^vP<X>ph"
_DASHES = ("-", "--", "-.", (0, (1, 1)))
OWN, _NEXT, _OTHERS, INK = "#CC3311", "#0077BB", "#B5B5B5", "#222222"
STYLE: list[Any] = [
    "default",  # overrides the user's matplotlibrc
    {
        "font.family": ["DejaVu Sans"],  # which matplotlib brings along
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
_LINE = 1.3  # height of a line, in font sizes
_EM = {_TITLE: 0.63, _SUBTITLE: 0.55, _NOTE: 0.55}  # width of a character in font sizes, estimated generously
LEGEND_INCHES = 2.6


@style.context(STYLE)
def svg_of(figure: Figure) -> str:
    """Return a figure as an XML document with a transparent background. The same figure gives the same text."""
    content = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(content, format="svg", metadata=no_metadata, transparent=True)
    return content.getvalue()


@style.context(STYLE)
def save(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as STEM.png (150 dpi) and STEM.svg, and return the paths. Raises OSError."""
    paths = []
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        paths.append(stem.with_name(f"{stem.name}.{kind}"))
        figure.savefig(paths[-1], format=kind, dpi=150, metadata=metadata)
        figure.set_layout_engine("none")  # keeps the layout, which would take seconds to compute again
    return paths


def frame(
    title: str,
    subtitle: str,
    note: str,
    rows: int,
    columns: int,
    panel: tuple[float, float],
    legend: float = 0,
    strip: float = 0,
) -> tuple[Figure, np.ndarray]:
    """Return a figure with title, subtitle and note, and its axes [rows, columns].

    In inches: panel, (width, height) of one of the axes; legend, the width kept free for the legend; strip, the height
    kept free between subtitle and axes.
    """
    width = max(7.4, columns * panel[0] + legend)
    texts = [
        (textwrap.wrap(drawable(text), int((width - 0.3) * 72 / (size * _EM[size]))), size)
        for text, size in ((title, _TITLE), (subtitle, _SUBTITLE), (note, _NOTE))
    ]
    heights = [len(lines) * size * _LINE / 72 for lines, size in texts]  # inches
    above, below = 0.12 + heights[0] + 0.06 + heights[1] + 0.14 + strip, heights[2] + 0.2
    height = above + rows * panel[1] + below
    figure = new_figure((width, height), (0.08 / width, below / height, 1 - 0.16 / width, 1 - (above + below) / height))
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
            color=INK if size == _TITLE else "#555555",
        )
    return figure, figure.subplots(rows, columns, squeeze=False)


def frame_with_legend(
    title: str, subtitle: str, note: str, panels: int, panel: tuple[float, float], results: Results
) -> tuple[Figure, Any]:
    """Return a figure as `frame` does, with a row of axes, of at least the panel's height, and a legend of models."""
    height = max(panel[1], 0.8 + sum(0.07 + 0.165 * (2 + _model_name(label).count("\n")) for label in results))
    figure, grid = frame(title, subtitle, note, 1, panels, (panel[0], height), LEGEND_INCHES)
    return figure, grid[0]


def new_figure(inches: tuple[float, float], rectangle: tuple[float, float, float, float]) -> Figure:
    layout = ConstrainedLayoutEngine(rect=rectangle, w_pad=0.08, h_pad=0.08, wspace=0.03, hspace=0.05)
    figure = Figure(figsize=inches, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def draw_distribution(
    axes: Axes, table: pd.DataFrame, own: str, scores: Mapping[str, float], title: str | None = None
) -> None:
    """Draw a neuron's distribution on each feature, in red for the own one, in blue for that of the next highest score.

    table: columns feature, left, right, count. title: of the legend.
    """
    features = list(dict.fromkeys(table["feature"]))
    others = sorted((f for f in features if f != own), key=lambda f: -scores[f])
    for feature in [*([own] if own in features else []), *others]:
        bins = table[table["feature"] == feature].sort_values("left")
        counts, widths = bins["count"].to_numpy(float), (bins["right"] - bins["left"]).to_numpy()
        with np.errstate(invalid="ignore"):
            density = np.where(counts > 0, counts / (counts.sum() * widths), np.nan)
        rank = 0 if feature == own else 1 if feature in others[:1] else 2
        axes.plot(
            (bins["left"] + bins["right"]) / 2,
            density,
            color=(OWN, _NEXT, _OTHERS)[rank],
            linewidth=(2.0, 1.3, 0.8)[rank],
            label=f"{drawable(feature, 28)}, MS {scores[feature]:.3g}" if rank < 2 else f"_{feature}",
            zorder=4 - rank,
        )
    if len(others) > 1:
        more = f"{len(others) - 1} more feature{'s' if len(others) > 2 else ''}"
        axes.plot([], [], color=_OTHERS, linewidth=0.8, label=more)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    set_ticks(axes.yaxis, LogLocator(subs=(1,) if high > 100 * low else (1, 2, 5), numticks=6), "{:g}".format)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.set(xlabel="activation", ylabel="density (log scale)")
    place: dict[str, Any] = {
        "loc": "lower left",
        "bbox_to_anchor": (-0.02, 1.0),
        "borderaxespad": 0,
        "labelspacing": 0.25,
    }
    axes.legend(title=title, alignment="left", title_fontproperties={"weight": "bold"}, **place)


def draw_significance(axes: Axes, tables: Tables) -> None:
    """Draw a row for each feature: the probed neurons, their mean, that of random neurons, and the test's result."""
    rows = tables["significance"].reset_index(drop=True)
    for y, row in rows.iterrows():
        each = tables["probes"][tables["probes"]["feature"] == row["feature"]].sort_values("place")
        offsets = y + np.linspace(-0.3, 0.3, len(each)) if len(each) > 1 else np.array([y])
        axes.hlines(offsets, each["score_inside_low"], each["score_inside_high"], color=OWN, alpha=0.35, linewidth=0.8)
        axes.plot(each["score_inside"], offsets, ".", color=OWN, alpha=0.45, markersize=4, label="_each")
        is_significant = row["p_adjusted"] < 0.05
        axes.plot(
            [row["monosemantic_score"]],
            [y],
            "o",
            color=OWN,
            markersize=7,
            zorder=4,
            label="_probed",
            markerfacecolor=OWN if is_significant else "white",
        )
        p = "p < 0.001" if row["p_adjusted"] < 0.001 else f"p = {row['p_adjusted']:.2g}"
        ratio = f"{row['ratio']:.3g}x ({row['ratio_low']:.3g} to {row['ratio_high']:.3g})"
        right = axes.get_yaxis_transform()
        axes.text(1.02, y, f"{ratio}, {p}", transform=right, va="center", size=8, color=INK)
    axes.plot(rows["random_score"], rows.index, "D", color=INK, markersize=5, zorder=3, label="_random")
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = (1, 2, 5) if high > 4 * low else (1, 1.2, 1.5, 2, 3, 4, 5, 6, 8)
    set_ticks(axes.xaxis, LogLocator(subs=ticks, numticks=20), "{:g}".format)
    axes.set_yticks(list(rows.index), [drawable(name, 26) for name in rows["feature"]])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("MS on the feature's texts (log scale)")


def draw_over_scale(axes: Axes, results: Results, rows: Mapping[str, pd.Series], column: str) -> None:
    """Draw a value with its interval for each model over its number of parameters, those of one size side by side."""
    parameters = {label: float(tables["scale"]["parameters"].iloc[0]) for label, tables in results.items()}
    families: dict[str, list[str]] = {}  # the models whose labels differ in their size only, in ascending order
    for label in sorted(results, key=lambda label: parameters[label]):
        families.setdefault(re.sub(r"\d+(\.\d+)?[kmb](?![a-z])", "", label, flags=re.IGNORECASE), []).append(label)
    by_size = {count: [label for label in results if parameters[label] == count] for count in parameters.values()}
    most = max(map(len, by_size.values()))

    def shifted(label: str) -> Transform:
        """Return the transform that draws a model beside the others of its size."""
        same_size = by_size[parameters[label]]
        points = (same_size.index(label) - (len(same_size) - 1) / 2) * min(7.0, 42 / most)
        return axes.transData + ScaledTranslation(points / 72, 0, axes.figure.dpi_scale_trans)

    axes.set_xscale("log")
    for family in families.values():
        if len({parameters[label] for label in family}) == len(family) > 1:
            sizes = [parameters[label] for label in family]
            values = [rows[label][column] for label in family]
            (line,) = axes.plot(sizes, values, color="#AAAAAA", linewidth=1, zorder=1, label="_family")
            line.set_transform(shifted(family[0]))
    for label, look in looks(results).items():
        row, x, transform = rows[label], parameters[label], shifted(label)
        ends = [row[f"{column}_low"]], [row[f"{column}_high"]]
        axes.vlines([x], *ends, color=look["color"], linewidth=1.6, zorder=2, transform=transform)
        point = {"color": look["color"], "marker": look["marker"], "markersize": 7, "label": label}
        axes.plot([x], [row[column]], linestyle="", transform=transform, **point)
    low, high = min(by_size), max(by_size)
    margin = 1.5 if high > low else 4.0
    axes.set_xlim(low / margin, high * margin)
    set_ticks(axes.xaxis, LogLocator(subs=(1, 2, 5) if high / low < 40 else (1, 3), numticks=20), magnitude)
    axes.set_xlabel(
        "parameters (log scale)" if most == 1 else "parameters (log scale; models of one size side by side)"
    )


def draw_band(axes: Axes, table: pd.DataFrame, x: str, column: str, label: str, look: Mapping[str, Any]) -> None:
    """Draw a line and the band of its interval."""
    axes.plot(table[x], table[column], label=label, **look)
    low, high = table[f"{column}_low"], table[f"{column}_high"]
    axes.fill_between(table[x], low, high, color=look["color"], alpha=0.09, linewidth=0)


def depth_axis(axes: Axes) -> None:
    axes.set_xlim(-0.04, 1.04)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    axes.set_xlabel("relative depth (0: first layer, 1: last)")


def step_axis(axes: Axes, steps: Sequence[int]) -> None:
    positive = [step for step in steps if step > 0]
    if positive and positive[-1] >= 100 * positive[0]:
        axes.set_xscale("symlog", linthresh=positive[0], linscale=0.5)
        first, last = math.ceil(math.log10(positive[0])), math.floor(math.log10(positive[-1]))
        decades = [10.0**power for power in range(first, last + 1)]
        set_ticks(axes.xaxis, FixedLocator([*([0] if steps[0] == 0 else []), *decades]), magnitude)
        axes.set_xlabel("step (log scale)")
    else:
        set_ticks(axes.xaxis, MaxNLocator(5, integer=True), magnitude)
        axes.set_xlabel("step")


def set_ticks(axis: Axis, locator: Locator, text: Callable[[float], str]) -> None:
    axis.set_major_locator(locator)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def add_legend(axes: Axes, source: Axes, results: Results, endings: Sequence[str] = ()) -> None:
    """Add the legend of the models right of `axes`, where it covers nothing. Its handles are those of `source`."""
    axes.legend(
        source.get_legend_handles_labels()[0],
        [name + end for name, end in zip(map(_model_name, results), endings or [""] * len(results), strict=True)],
        loc="upper left",
        bbox_to_anchor=(1.03, 1.0),
        borderaxespad=0,
        handlelength=2.6,
    )


def _model_name(label: str) -> str:
    return "\n".join(textwrap.wrap(drawable(label, 84), 30))


def hide_unused(grid: np.ndarray, used: int) -> None:
    for axes in grid.flat[used:]:
        axes.set_axis_off()


def looks(results: Results) -> dict[str, dict[str, Any]]:
    """Return colour, marker and dash of each model, the same in every figure."""
    styles = zip(cycle(_COLOURS), cycle(_MARKERS), cycle(_DASHES), strict=False)
    return {
        label: {"color": colour, "marker": marker, "linestyle": dash}
        for label, (colour, marker, dash) in zip(results, styles, strict=False)
    }


def percent(share: float) -> str:
    return f"{share * 100:.3g} %"


def magnitude(value: float) -> str:
    """Return a number as text, a large one with a unit, such as 70M or 1.4B."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit * 0.9995:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.4g}".replace("-", "−")


@cache
def _glyphs() -> frozenset[int]:
    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    return frozenset(font.get_charmap())


def drawable(text: str, most: int | None = None) -> str:
    """Return a text, longer ones without their middle, with escapes for characters that the font cannot show."""
    text = "".join(c if c.isprintable() and ord(c) in _glyphs() else c.encode("unicode_escape").decode() for c in text)
    if most is not None and len(text) > most:
        return f"{text[: most // 2]}…{text[-(most - most // 2 - 1) :]}"
    return text
