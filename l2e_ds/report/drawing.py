"""Draw a chart as an SVG element of a page.

Only numbers in it come from files. It is small, so that its text stays readable on a phone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import Locator, LogLocator, MaxNLocator

from l2e_ds.analysis.drawing import STYLE, magnitude, set_ticks, svg_of

_MOST_POINTS = 500  # points of a line; of longer lines, means of neighbouring points are drawn
_ALL_POINTS = 8000  # points of a chart, at most
_LONG = 100  # a line of more points than this may have its beginning cut
_SIZE = (3.6, 2.3)  # inches
_AXES = (0.13, 0.17, 0.85, 0.73)  # left, bottom, width, height as shares of _SIZE; equal, as charts are in rows
AXES_INSET = "10% 2% 17% 13%"  # the same for CSS: distances from top, right, bottom and left
_FONT_SIZE = 8.0  # points
_ROUND = [1, 2, 2.5, 5, 10]  # steps between ticks
_MOST_READINGS = 50  # places of a chart that have readings
_ALL_READINGS = 500  # values in the readings of a chart
_LEAST_READINGS = 15  # with many lines, there are so many places nevertheless

PLAIN = "#333333"  # colour of runs without inhibition
_TEXT, _EDGE, _GRID = "#444444", "#888888", "#e6e6e6"
# Colours that the page chooses: it has others on a dark screen.
_OF_THE_PAGE = {PLAIN: "var(--ink)", _TEXT: "var(--quiet)", _GRID: "var(--line)"}

_STYLE: list[Any] = [
    *STYLE,
    {
        "font.size": _FONT_SIZE,
        "axes.titlesize": _FONT_SIZE,
        "axes.edgecolor": _EDGE,
        "axes.labelcolor": _TEXT,
        "axes.titlecolor": _TEXT,
        "axes.titleweight": "normal",
        "axes.titlepad": 6,
        "axes.xmargin": 0.02,
        "xtick.color": _EDGE,
        "ytick.color": _EDGE,
        "xtick.labelcolor": _TEXT,
        "ytick.labelcolor": _TEXT,
        "grid.color": _GRID,
    },
]


@dataclass(frozen=True)
class Look:
    """Colour and dash of a line. dash: as SVG's stroke-dasharray, or ""."""

    colour: str
    dash: str = ""

    @property
    def css(self) -> str:
        """The colour as the page has it."""
        return _OF_THE_PAGE.get(self.colour, self.colour)


@dataclass(frozen=True)
class Line:
    """A line of a chart. x, y: [points]. name: for readers who cannot see the chart."""

    name: str
    look: Look
    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Axis:
    """The horizontal axis of all charts.

    key: `step`, or `tokens` if the runs' steps have different sizes. end: the largest value of any run.
    """

    key: str
    end: float


@dataclass(frozen=True)
class Reading:
    """What a chart shows while the pointer is in a strip of it.

    left, at, right: the strip and the place of x, in per cent of the axes' width. values: line, x and y of the point of
    each line that is nearest to x, without lines that have none in the strip.
    """

    x: float
    left: float
    at: float
    right: float
    values: list[tuple[Line, float, float]]


def is_thinned(lines: Sequence[Line]) -> bool:
    """Return whether some of the points drawn are means of several."""
    return max(len(line.x) for line in lines) > _most_points(lines)


def _most_points(lines: Sequence[Line]) -> int:
    return max(100, min(_MOST_POINTS, _ALL_POINTS // len(lines)))


@style.context(_STYLE)
def draw(
    name: str,
    unit: str,
    lines: Sequence[Line],
    axis: Axis,
    log: bool = False,
    crop: bool = False,
    marks: Sequence[float] = (),
) -> str:
    """Return the element `svg`.

    name: unique in the page. lines: each has at least one point. log: use a logarithmic vertical axis if all values are
    above 0. crop: fit the vertical axis of a long chart to what comes after its first twentieth. marks: values at
    which dotted lines are drawn.
    """
    figure = Figure(figsize=_SIZE)
    FigureCanvasSVG(figure)
    axes = figure.add_axes(_AXES)
    for line in lines:
        x, y = (_thinned(values, _most_points(lines)) for values in (line.x, line.y))
        dashes = tuple(map(float, line.look.dash.split()))
        axes.plot(
            x,
            y,
            color=line.look.colour,
            linestyle=(0, dashes) if dashes else "-",
            linewidth=1.4 if len(lines) <= 6 else 0.9,
            marker="o" if len(x) <= 12 else "",
            markersize=2.5,
        )
    for height in marks:
        axes.axhline(height, color=_EDGE, linewidth=1, linestyle=(0, (1, 2)))
    axes.set_title(unit)
    axes.set_xlabel(axis.key, loc="right")
    axes.set_xlim(_limits(axis))
    set_ticks(axes.xaxis, MaxNLocator(4, integer=True, steps=_ROUND), magnitude)
    if log and all((line.y > 0).all() for line in lines):
        axes.set_yscale("log")
        set_ticks(axes.yaxis, _log_locator(*axes.get_ylim()), magnitude)
    else:
        set_ticks(axes.yaxis, MaxNLocator(5, steps=_ROUND), magnitude)
    if crop and max(len(line.x) for line in lines) > _LONG:
        late = np.concatenate([line.y[line.x >= 0.05 * axis.end] for line in lines])
        space = 0.05 * np.ptp(late)
        axes.set_ylim(late.min() - space, late.max() + space)
    return _inline(svg_of(figure), name)


def _limits(axis: Axis) -> tuple[float, float]:
    """Return the ends of the horizontal axis."""
    return -0.02 * axis.end, 1.02 * max(axis.end, 1)


def readings(lines: Sequence[Line], axis: Axis) -> list[Reading]:
    """Return the readings of a chart from left to right. Their strips cover the axes and do not overlap.

    lines: each has at least one point. Values are those of the lines themselves, also where a drawing shows means.
    """
    most = max(_LEAST_READINGS, min(_MOST_READINGS, _ALL_READINGS // len(lines)))
    x = np.unique(np.concatenate([line.x for line in lines]))
    x = x[np.unique(np.linspace(0, len(x) - 1, most).round().astype(int))]
    low, high = _limits(axis)
    edges = [low, *(x[1:] + x[:-1]) / 2, high]
    found = []
    for place, left, right in zip(x, edges[:-1], edges[1:], strict=True):
        values = []
        for line in lines:
            nearest = np.abs(line.x - place).argmin()
            if left <= line.x[nearest] <= right:
                values.append((line, float(line.x[nearest]), float(line.y[nearest])))
        left, at, right = (100 * (float(one) - low) / (high - low) for one in (left, place, right))
        found.append(Reading(float(place), left, at, right, values))
    return found


def five_digits(value: float) -> str:
    """Return a number with about five digits."""
    return (f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.5g}").replace("-", "−")


def _thinned(values: np.ndarray, most: int) -> np.ndarray:
    """Return at most `most` values, which are means of neighbours if there are more."""
    return values if len(values) <= most else np.array([part.mean() for part in np.array_split(values, most)])


def _log_locator(low: float, high: float) -> Locator:
    """Return a locator that gives about four round numbers."""
    if high < 4 * low:
        return MaxNLocator(4, steps=_ROUND)
    parts = (1, 2, 3, 5) if high < 30 * low else (1, 2, 5) if high < 300 * low else (1,)
    return LogLocator(subs=parts, numticks=8)


def _inline(svg: str, name: str) -> str:
    """Return the element of an SVG file, without width and height, with own ids and the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'^(<svg\b[^>]*?) (?:width|height)="[^"]*"([^>]*?) (?:width|height)="[^"]*"', r"\1\2", svg)
    for colour, variable in _OF_THE_PAGE.items():
        svg = svg.replace(f": {colour}", f": {variable}")
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", svg)
    return re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
