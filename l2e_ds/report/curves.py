"""The charts of a report, one for each quantity. A run has the same colour and dash in all charts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_hex

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

    name: the prefix of the ids of its elements in the page. about: a description for readers who cannot see it. key:
    that of the horizontal axis. readings: what is shown where the pointer is.
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

    kind: which lines of metrics.jsonl; key: which value in them, where `layers/NAME` is the mean over layers, or with a
    single run one line for each layer. title, unit: by default those of the table of metrics. factor: multiplies the
    metric's values to give the chart's. log: use a logarithmic axis. crop: as for `draw`, where a high beginning would
    hide the rest.
    """

    name: str
    kind: str
    key: str
    note: str
    title: str = ""
    unit: str = ""
    factor: float = 1.0
    log: bool = False
    crop: bool = False


_TRAIN, _EVAL = "train", "evaluation"
_SELECTED = "Selected for inhibition; dotted: the target."
_TAU = "Activations whose MS is at least tau are selected."
_DISTANCE = "Squared distance from the neuron's mean, in variances."
_SHRINKS = "Standard deviation of a neuron. A run in which it only falls shrinks its layers."
_HIGHEST = "Of the share with the highest MS, inhibition or not: lower is less monosemantic."
_BELOW = "Paired runs at the same step; below 0 is better than the baseline."
_SCALE = "The layer's scale, inhibition off."
_MEDIAN = "Median over neurons; 3 for a normal distribution."
_DEPTH = "From the first layer, blue, to the last, orange; dark: all other parameters."
_QUANTITIES = (
    Quantity("training-loss", _TRAIN, "lm_loss", "Without the inhibition loss.", "LM loss, training text", crop=True),
    Quantity("held-out-loss", _EVAL, "held_out_loss", "Inhibition off.", "LM loss, held-out text", crop=True),
    Quantity("loss-difference", _EVAL, "held_out_loss", _BELOW, "Held-out loss less the baseline's"),
    Quantity("observed-share", _TRAIN, "layers/observed_share", _SELECTED, "", "% of (token, neuron) pairs", 100),
    Quantity("tau", _TRAIN, "layers/tau", _TAU, "", "MS", log=True),
    Quantity("selected-score", _TRAIN, "layers/selected_score", _DISTANCE, "", "MS", log=True),
    Quantity("training-mean-s", _TRAIN, "layers/mean_s", _SHRINKS, "Mean S, training text", log=True),
    Quantity("top-score", _EVAL, "layers/top_share_score", _HIGHEST, "MS of the top share, held-out text", "MS"),
    Quantity("mean-s", _EVAL, "layers/mean_s", _SCALE, "Mean S, held-out text", log=True),
    Quantity("kurtosis", _EVAL, "layers/kurtosis", _MEDIAN, "Kurtosis, held-out text", "E[MS²]"),
    Quantity("dead-share", _EVAL, "layers/dead_share", "Never vary on the held-out text.", "", "% of neurons", 100),
    Quantity("gradient-norm", _TRAIN, "gradient_norm", "Before clipping, loss scale removed.", "", "2-norm", log=True),
    Quantity("layer-gradients", _TRAIN, "gradient_norm/layerI", _DEPTH, "Gradient norm by layer", "2-norm", log=True),
    Quantity("speed", _TRAIN, "tokens_per_second", "All ranks, evaluation and checkpoints not counted."),
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


def layer_looks(collection: Collection) -> dict[int, Look]:
    """Return the look of each layer of a single run, or {} if there are several runs or too many layers."""
    layers = collection.runs[0].layers if len(collection.runs) == 1 else []
    return dict(zip(layers, map(Look, _COLOURS), strict=False)) if len(layers) <= len(_COLOURS) else {}


def axis_of(runs: Sequence[Run]) -> Axis:
    key = "step" if len({run.tokens_per_step for run in runs}) == 1 else "tokens"
    return Axis(key, max(getattr(run, key) for run in runs))


def all_charts(collection: Collection) -> list[Chart]:
    """Return the charts that have a line."""
    # Plain runs come first, so that they are drawn behind others.
    runs = [run for variant in collection.variants for run in variant.runs]
    axis = axis_of(runs)
    by_layer = layer_looks(collection)
    by_run = {
        run.name: look
        for variant, look in zip(collection.variants, looks(collection.variants), strict=True)
        for run in variant.runs
    }
    charts = []
    for quantity in _quantities(runs):
        own = by_layer if quantity.key.startswith("layers/") else {}
        key, kind = quantity.key, quantity.kind
        if quantity.name == "loss-difference":
            series = [
                (run.name, by_run[run.name], _differences(collection, run), "difference") for run in collection.runs
            ]
        elif quantity.name == "layer-gradients":
            series = _layer_gradients(runs)
        elif own:
            of_run = runs[0].lines(kind)
            series = [(f"layer {i}", look, of_run, key.replace("layers", f"layer{i}")) for i, look in own.items()]
        else:
            shown = [run for run in runs if run.has_threshold or quantity.name != "tau"]
            series = [(run.name, by_run[run.name], run.lines(kind), key) for run in shown]
        lines = [_line(*one, axis, quantity.factor) for one in series]
        if quantity.name == "dead-share" and not any(line.y.any() for line in lines):
            continue
        targets = sorted({100 * run.config["inhibition.target_share"] for run in runs if run.method != "none"})
        marks = {"observed-share": targets, "loss-difference": [0.0]}.get(quantity.name, [])
        charts.append(_chart(quantity, lines, axis, marks, bool(own)))
    for index, (task, shots) in enumerate(tasks_of(runs)):
        charts.append(_task_chart(runs, index, task, shots, axis, by_run))
    return [chart for chart in charts if chart is not None]


def _quantities(runs: Sequence[Run]) -> list[Quantity]:
    """Return all quantities, with one for each set of a mixture and each text after the held-out loss."""
    sets = dict.fromkeys(name for run in runs for name in run.sets)
    texts = dict.fromkeys(name for run in runs for name in run.texts)
    note = "One set of the mixture."
    own = [
        Quantity(f"set-{i}", _EVAL, f"held_out_loss/{name}", note, f"LM loss, held-out text of {name}", crop=True)
        for i, name in enumerate(sets)
    ]
    note = "A text of evaluation.texts."
    own += [
        Quantity(f"text-{i}", _EVAL, f"text_loss/{name}", note, f"LM loss, {name}", crop=True)
        for i, name in enumerate(texts)
    ]
    after = [quantity.name for quantity in _QUANTITIES].index("loss-difference") + 1
    return [*_QUANTITIES[:after], *own, *_QUANTITIES[after:]]


def _line(name: str, look: Look, lines: Iterable[dict], key: str, axis: Axis, factor: float = 1.0) -> Line:
    """Return a line of the finite values under a key, float64 [points]."""
    points = [(line[axis.key], value * factor) for line in lines if (value := number(line, key)) is not None]
    return Line(name, look, *np.array(points, dtype=float).reshape(-1, 2).T)


def _layer_gradients(runs: Sequence[Run]) -> list[tuple[str, Look, list[dict], str]]:
    """Return the name, look, lines and key of each layer of a single run, and of the parameters outside the layers;
    nothing for several runs, or without `logging.layer_gradients`."""
    lines = runs[0].training if len(runs) == 1 else []
    keys = (re.fullmatch(r"gradient_norm/layer(\d+)", key) for line in lines for key in line)
    layers = sorted({int(found[1]) for found in keys if found})
    if not layers:
        return []
    colour = LinearSegmentedColormap.from_list("depth", [_COLOURS[0], _COLOURS[1]])
    looks = [Look(to_hex(colour(place))) for place in np.linspace(0, 1, len(layers))]
    named = [(f"layer {i}", look, lines, f"gradient_norm/layer{i}") for i, look in zip(layers, looks, strict=True)]
    return [("other parameters", Look(PLAIN), lines, "gradient_norm/rest"), *named]


def _differences(collection: Collection, run: Run) -> list[dict]:
    """Return lines of the difference in held-out loss to the run's baseline, at the steps that both have."""
    base = collection.baseline_of(run)
    other = held_out(base) if base is not None else {}
    return [
        line | {"difference": loss - other[line["step"]]}
        for line in run.evaluations
        if line["step"] in other and (loss := number(line, "held_out_loss")) is not None
    ]


def _task_chart(
    runs: Sequence[Run], index: int, task: str, shots: int, axis: Axis, by_run: dict[str, Look]
) -> Chart | None:
    """Return the chart of a task's results of the most frequent limit, or None unless a run has several steps."""
    point = (task, shots, "acc")
    results = [[one for one in run.results if (one.task, one.num_fewshot, one.metric) == point] for run in runs]
    counts = Counter(one.limit for run_results in results for one in run_results)
    limit = max(counts, key=lambda limit: (counts[limit], limit is None), default=None)
    note = "Evaluation task." if limit is None else f"Evaluation task, its first {limit:,} documents."
    title = f"{task_name(runs, task, shots)}, {shots}-shot"
    quantity = Quantity(f"task-{index}", "", "value", note, title, "accuracy")
    lines = []
    for run, run_results in zip(runs, results, strict=True):
        points = [
            {"step": one.step, "tokens": one.step * run.tokens_per_step, "value": one.value}
            for one in run_results
            if one.step is not None and one.limit == limit
        ]
        lines.append(_line(run.name, by_run[run.name], points, "value", axis))
    return None if all(len(line.x) < 2 for line in lines) else _chart(quantity, lines, axis, [])


def _chart(
    quantity: Quantity, lines: Sequence[Line], axis: Axis, marks: Sequence[float], by_layer: bool = False
) -> Chart | None:
    """Return a chart, or None if no line has a point. marks: values that are marked by a dotted line."""
    lines = [line for line in lines if len(line.x)]
    if not lines:
        return None
    title = quantity.title
    if not title:
        label = described(quantity.kind, quantity.key).title
        title = label[0].upper() + label[1:]
    unit = quantity.unit or described(quantity.kind, quantity.key).unit
    about = [f"{line.name} {line.y[0]:.4g} to {line.y[-1]:.4g}" for line in lines[:12]]
    about += [f"and {len(lines) - 12} more"] if len(lines) > 12 else []
    notes = [quantity.note]
    notes += ["Mean over layers."] if quantity.key.startswith("layers/") and not by_layer else []
    notes += ["Points are means of neighbours."] if is_thinned(lines) else []
    return Chart(
        quantity.name,
        title,
        " ".join(notes),
        draw(quantity.name, unit, lines, axis, quantity.log, quantity.crop, marks),
        f"{title}, {unit}, over {axis.key}s: {'; '.join(about)}",
        axis.key,
        readings(lines, axis),
    )
