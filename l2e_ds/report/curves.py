"""The charts of a report, one for each quantity, with all runs in one chart.

A run has the same colour and dash in all charts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from l2e_ds.report.drawing import PLAIN, Axis, Line, Look, Reading, draw, is_thinned, readings
from l2e_ds.report.runs import Collection, Run, Variant
from l2e_ds.report.statistics import held_out
from l2e_ds.report.task_tables import task_name, tasks_of
from l2e_ds.run_directory.metric_table import described
from l2e_ds.run_directory.metrics import number

# Okabe and Ito's colours without the light ones, and two of Paul Tol's. Most colour-blind readers can tell them apart,
# and all can be seen on white and on black.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#AA3377", "#999933")
_DASHES = ("", "6 2", "2 2", "6 2 2 2", "10 3")


@dataclass(frozen=True)
class Chart:
    """A chart.

    name: that of its elements in the page. about: a description for readers who cannot see it. key: of its horizontal
    axis. readings: what is shown where the pointer is.
    """

    name: str
    title: str
    note: str
    svg: str
    about: str
    key: str
    readings: list[Reading]


@dataclass(frozen=True)
class Quantity:
    """What a chart shows.

    key: that of a line of metrics.jsonl; `layers/NAME` is the mean over layers, or with a single run one line for each
    layer. kind: attribute of Run that holds the lines. scale: linear or log. factor: from the metric's unit to the
    chart's. falls: whether its high beginning would hide the rest.
    """

    name: str
    title: str
    unit: str
    note: str
    kind: str
    key: str
    scale: str = "linear"
    factor: float = 1.0
    falls: bool = False


_LINES = {"train": "training", "evaluation": "evaluations"}  # attributes of Run


def _quantity(name: str, kind: str, key: str, note: str, title: str = "", unit: str = "", **form: Any) -> Quantity:
    """Return the quantity of a metric. By default title and unit are those of the table of metrics."""
    metric = described(kind, key)
    title = title or metric.title[0].upper() + metric.title[1:]
    return Quantity(name, title, unit or metric.unit, note, _LINES[kind], key, **form)


_DIFFERENCE = Quantity(
    "loss-difference",
    "Held-out loss less the baseline's",
    described("evaluation", "held_out_loss").unit,
    "Paired runs at the same step; below 0 is better than the baseline.",
    "",
    "",
)
_QUANTITIES = (
    _quantity(
        "training-loss", "train", "lm_loss", "Without the inhibition loss.", "LM loss, training text", falls=True
    ),
    _quantity("held-out-loss", "evaluation", "held_out_loss", "Inhibition off.", "LM loss, held-out text", falls=True),
    _quantity(
        "observed-share",
        "train",
        "layers/observed_share",
        "Selected for inhibition; dotted: the target.",
        unit="% of (token, neuron) pairs",
        factor=100,
    ),
    _quantity(
        "tau",
        "train",
        "layers/tau",
        "Activations whose MS is at least tau are selected.",
        unit="MS",
        scale="log",
    ),
    _quantity(
        "selected-score",
        "train",
        "layers/selected_score",
        "Squared distance from the neuron's mean, in variances.",
        unit="MS",
        scale="log",
    ),
    _quantity(
        "training-mean-s",
        "train",
        "layers/mean_s",
        "Standard deviation of a neuron. A run in which it only falls shrinks its layers.",
        "Mean S, training text",
        scale="log",
    ),
    _quantity(
        "top-score",
        "evaluation",
        "layers/top_share_score",
        "Of the share with the highest MS, inhibition or not: lower is less monosemantic.",
        "MS of the top share, held-out text",
        "MS",
    ),
    _quantity(
        "mean-s",
        "evaluation",
        "layers/mean_s",
        "The layer's scale, inhibition off.",
        "Mean S, held-out text",
        scale="log",
    ),
    _quantity(
        "kurtosis",
        "evaluation",
        "layers/kurtosis",
        "Median over neurons; 3 for a normal distribution.",
        "Kurtosis, held-out text",
        "E[MS²]",
    ),
    _quantity(
        "dead-share",
        "evaluation",
        "layers/dead_share",
        "Never vary on the held-out text.",
        unit="% of neurons",
        factor=100,
    ),
    _quantity(
        "gradient-norm",
        "train",
        "gradient_norm",
        "Before clipping, loss scale removed.",
        unit="2-norm",
        scale="log",
    ),
    _quantity("speed", "train", "tokens_per_second", "All ranks, evaluation and checkpoints not counted."),
)


def looks(variants: Sequence[Variant]) -> list[Look]:
    """Return the look of each variant: the colour shows the treatment, dark without inhibition, the dash the size."""
    sizes = list(dict.fromkeys(variant.size for variant in variants))
    if len(variants) == 1 and len(variants[0].runs) == 1:
        return [Look(PLAIN)]  # the colours are for its layers
    coloured = list(dict.fromkeys(variant.treatment for variant in variants if variant.method != "none"))
    found = []
    for variant in variants:
        index = coloured.index(variant.treatment) if variant.treatment in coloured else 0
        colour = _COLOURS[index % len(_COLOURS)] if variant.method != "none" else PLAIN
        dash = sizes.index(variant.size) + index // len(_COLOURS)
        found.append(Look(colour, _DASHES[dash % len(_DASHES)]))
    return found


def layer_looks(page: Collection) -> dict[int, Look]:
    """Return the look of each layer of a single run, or {} if there are several runs or too many layers."""
    layers = page.runs[0].layers if len(page.runs) == 1 else []
    return dict(zip(layers, map(Look, _COLOURS), strict=False)) if len(layers) <= len(_COLOURS) else {}


def axis_of(runs: Sequence[Run]) -> Axis:
    key = "step" if len({run.tokens_per_step for run in runs}) == 1 else "tokens"
    return Axis(key, max(getattr(run, key) for run in runs))


def all_charts(page: Collection) -> list[Chart]:
    """Return the charts that have a line."""
    runs = [run for variant in page.variants for run in variant.runs]  # plain runs are drawn first, so behind others
    axis = axis_of(runs)
    by_layer = layer_looks(page)
    by_run = {
        run.name: look
        for variant, look in zip(page.variants, looks(page.variants), strict=True)
        for run in variant.runs
    }
    charts = []
    for quantity in _quantities(runs):
        own = by_layer if quantity.key.startswith("layers/") else {}
        lines = _layer_lines(runs[0], quantity, axis, own) if own else _run_lines(runs, quantity, axis, by_run)
        if quantity.name == "dead-share" and not any(line.y.any() for line in lines):
            continue
        targets = _targets(runs) if quantity.name == "observed-share" else []
        charts.append(_chart(quantity, lines, axis, targets, bool(own)))
        if quantity.name == "held-out-loss":
            charts.append(_chart(_DIFFERENCE, _difference_lines(page, axis, by_run), axis, [0.0]))
    for index, (task, shots) in enumerate(tasks_of(runs)):
        charts.append(_task_chart(runs, index, task, shots, axis, by_run))
    return [chart for chart in charts if chart is not None]


# --- lines -------------------------------------------------------------------------------------------------------


def _quantities(runs: Sequence[Run]) -> list[Quantity]:
    """Return all quantities, with one for each set of a mixture and each text after the held-out loss."""
    names = dict.fromkeys(name for run in runs for name in run.sets)
    texts = dict.fromkeys(name for run in runs for name in run.texts)
    quantities = []
    for quantity in _QUANTITIES:
        quantities.append(quantity)
        if quantity.name == "held-out-loss":
            for index, name in enumerate(names):
                title, note = f"LM loss, held-out text of {name}", "One set of the mixture."
                key = f"held_out_loss/{name}"
                quantities.append(replace(quantity, name=f"set-{index}", title=title, note=note, key=key))
            for index, name in enumerate(texts):
                title, note, key = f"LM loss, {name}", "A text of evaluation.texts.", f"text_loss/{name}"
                quantities.append(replace(quantity, name=f"text-{index}", title=title, note=note, key=key))
    return quantities


def _points(lines: Iterable[dict], key: str, axis: Axis, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of the lines that have a finite value, float64 [points] each."""
    points = [(line[axis.key], value * factor) for line in lines if (value := number(line, key)) is not None]
    x, y = np.array(points, dtype=float).reshape(-1, 2).T
    return x, y


def _run_lines(runs: Sequence[Run], quantity: Quantity, axis: Axis, by_run: dict[str, Look]) -> list[Line]:
    if quantity.name == "tau":
        runs = [run for run in runs if run.has_threshold]
    return [
        Line(run.name, by_run[run.name], *_points(getattr(run, quantity.kind), quantity.key, axis, quantity.factor))
        for run in runs
    ]


def _layer_lines(run: Run, quantity: Quantity, axis: Axis, by_layer: dict[int, Look]) -> list[Line]:
    lines = getattr(run, quantity.kind)
    return [
        Line(
            f"layer {layer}",
            look,
            *_points(lines, quantity.key.replace("layers", f"layer{layer}"), axis, quantity.factor),
        )
        for layer, look in by_layer.items()
    ]


def _difference_lines(page: Collection, axis: Axis, by_run: dict[str, Look]) -> list[Line]:
    lines = []
    for run in page.runs:
        base = page.baseline_of(run)
        other = held_out(base) if base is not None else {}
        both = [
            {axis.key: line[axis.key], "difference": loss - other[line["step"]]}
            for line in run.evaluations
            if line["step"] in other and (loss := number(line, "held_out_loss")) is not None
        ]
        lines.append(Line(run.name, by_run[run.name], *_points(both, "difference", axis, 1.0)))
    return lines


def _targets(runs: Sequence[Run]) -> list[float]:
    return sorted({100 * run.config["inhibition.target_share"] for run in runs if run.method != "none"})


def _task_chart(
    runs: Sequence[Run], index: int, task: str, shots: int, axis: Axis, by_run: dict[str, Look]
) -> Chart | None:
    """Return the chart of a task's accuracy, or None unless a run was evaluated at several steps.

    Shows only the results that are of as many documents as most results are.
    """
    point = (task, shots, "acc")
    results = [[one for one in run.results if (one.task, one.num_fewshot, one.metric) == point] for run in runs]
    counts = Counter(one.limit for run_results in results for one in run_results)
    limit = max(counts, key=lambda limit: (counts[limit], limit is None), default=None)
    note = "Evaluation task." if limit is None else f"Evaluation task, its first {limit:,} documents."
    title = f"{task_name(runs, task, shots)}, {shots}-shot"
    quantity = Quantity(f"task-{index}", title, "accuracy", note, "", "value")
    lines = []
    for run, run_results in zip(runs, results, strict=True):
        points = [
            {"step": one.step, "tokens": one.step * run.tokens_per_step, "value": one.value}
            for one in run_results
            if one.step is not None and one.limit == limit
        ]
        lines.append(Line(run.name, by_run[run.name], *_points(points, "value", axis, 1.0)))
    if all(len(line.x) < 2 for line in lines):
        return None
    return _chart(quantity, lines, axis, [])


# --- charts ------------------------------------------------------------------------------------------------------


def _chart(
    quantity: Quantity, lines: Sequence[Line], axis: Axis, marks: Sequence[float], by_layer: bool = False
) -> Chart | None:
    """Return a chart, or None if no line has a point. marks: values that are marked by a dotted line."""
    lines = [line for line in lines if len(line.x)]
    if not lines:
        return None
    svg = draw(quantity.name, quantity.unit, lines, axis, quantity.scale == "log", quantity.falls, marks)
    about = [f"{line.name} {line.y[0]:.4g} to {line.y[-1]:.4g}" for line in lines[:12]]
    about += [f"and {len(lines) - 12} more"] if len(lines) > 12 else []
    notes = [quantity.note]
    notes += ["Mean over layers."] if quantity.key.startswith("layers/") and not by_layer else []
    notes += ["Points are means of neighbours."] if is_thinned(lines) else []
    return Chart(
        quantity.name,
        quantity.title,
        " ".join(notes),
        svg,
        f"{quantity.title}, {quantity.unit}, over {axis.key}s: {'; '.join(about)}",
        axis.key,
        readings(lines, axis),
    )
