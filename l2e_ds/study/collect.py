"""Collect the results of a study: one line a run, means over seeds, and paired differences to the baseline.

docs/studies.md ("Results") names the columns of the table of runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd

from l2e_ds.console import markdown
from l2e_ds.errors import ConfigError
from l2e_ds.run_directory.metric_table import described
from l2e_ds.run_directory.metrics import FILE as METRICS
from l2e_ds.run_directory.metrics import after_first_intervals, layers_of, number, numbers, of_kind, read_lines
from l2e_ds.run_directory.results import read_results, results_of
from l2e_ds.study.definition import COLUMNS, LAYER_MEANS, RESULT_COLUMNS, Evaluation
from l2e_ds.study.state import answers, config_of, evaluation_lines, read_index, state_of
from l2e_ds.system.files import write_whole

RESULTS = "results.csv"
SHOWN = {"held_out_loss": "{:.4f}", "top_share_score": "{:.3f}", "mean_s": "{:.4f}", "kurtosis": "{:.3f}"}
"""The metrics of evaluations that the summary shows, with the form of their numbers."""
TEXTS = ("text_loss/", "text_bits_per_byte/")
"""Beginnings of the metrics of `evaluation.texts`."""
MEASURED_ON = {
    "top_share_score": ("measured_layers", "measured_share"),
    "mean_s": ("measured_layers",),
    "kurtosis": ("measured_layers",),
}
"""The columns that must be the same in two runs for a column of them to be compared."""


def collect(directory: Path) -> pd.DataFrame:
    """Return the table of runs of a study, in the order of study.json; unfinished runs are read as far as they are.

    Raises ConfigError where there is no study, DataError for a line that is no metrics or no evaluation.
    """
    index = read_index(directory)
    evaluations = index.evaluate
    rows, own, others = [], [], []
    for entry in index.runs:
        run, config = directory / entry.directory, config_of(directory, entry.name)
        steps = config.training.steps
        read_results(run)  # raises for a line that is no evaluation
        state = state_of(run, steps, evaluations)
        rows.append(
            {
                "run": entry.name,
                "combination": ", ".join(entry.levels.values()) or index.name,
                **entry.levels,
                "seed": entry.seed,
                "baseline": entry.baseline,
                "state": str(state),
                "step": state.step,
                "measured_share": config.inhibition.target_share,
                **_metrics(read_lines(run) if (run / METRICS).is_file() else []),
            }
        )
        lines = [line for line in evaluation_lines(run) if line.get("step") == steps]
        own.append(_wanted_results(lines, steps, evaluations))
        # The last one counts: that in the precision of training, which all runs have if they evaluate while they train.
        lines.sort(key=lambda line: line.get("precision") == config.training.precision)
        others.append(_task_results(lines))
    asked = set().union(*own)  # of these no result from other evaluations, which may have used other documents
    for row, ours, theirs in zip(rows, own, others, strict=True):
        row |= ours | {name: value for name, value in theirs.items() if name not in asked}
    table = pd.DataFrame(rows)
    return table.reindex(
        columns=[*dict.fromkeys(["run", "combination", *index.factors, *COLUMNS, *RESULT_COLUMNS, *table.columns])]
    )


def paired_differences(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return one row a combination, in the table's order, from the runs that have a value in `column`.

    Of a table of `collect` first take what is `finished`. MS, mean S and kurtosis are only compared between runs that
    measure the same layers, and MS only of the same share, where the table has these columns.

    runs: their number; mean: over them (seeds); pairs: number of pairs of a run and its baseline; difference: mean of
    (run - baseline) over the pairs, and its stderr: standard deviation (n - 1) over the square root of n, NaN for a
    single pair; relative, relative_stderr: the same of (run - baseline) / baseline. NaN without a pair, as for the
    baseline itself.
    """
    of_run = table.set_index("run")
    base = table["baseline"].map(of_run[column].astype(float)).astype(float)
    for decisive in MEASURED_ON.get(column, ()):
        if decisive in table:
            base = base.where(table[decisive] == table["baseline"].map(of_run[decisive]))
    difference = table[column].astype(float) - base
    found = pd.DataFrame(
        {
            "combination": table["combination"],
            "value": table[column].astype(float),
            "difference": difference,
            "relative": difference / base,
        }
    )
    groups = found.groupby("combination", sort=False)
    return pd.DataFrame(
        {
            "runs": groups["value"].count(),
            "mean": groups["value"].mean(),
            "pairs": groups["difference"].count(),
            "difference": groups["difference"].mean(),
            "stderr": groups["difference"].sem(),
            "relative": groups["relative"].mean(),
            "relative_stderr": groups["relative"].sem(),
        }
    )


def write_results(directory: Path, table: pd.DataFrame) -> None:
    """Write results.csv. Raises ConfigError if the folder cannot be written."""
    try:
        write_whole(directory / RESULTS, table.to_csv(index=False))
    except OSError as error:
        raise ConfigError(f"directory: cannot write {directory / RESULTS}: {error.strerror}") from None


def figures_of(table: pd.DataFrame) -> list[str]:
    """Return the columns of evaluated texts and of evaluation tasks, `TASK/N-shot/METRIC`."""
    tasks = [name for name in table.columns if re.search(r"/\d+-shot/", name) and not name.endswith("_stderr")]
    return [*(name for name in table.columns if name.startswith(TEXTS)), *tasks]


def finished(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `collect` with the values of runs that are trained to their end, at their end, only.

    It keeps a run's baseline only if that has as many steps.
    """
    table = table.copy()
    evaluated = [*SHOWN, *(name for name in table.columns if name.startswith(TEXTS))]
    table.loc[~table["state"].isin(("done", "not evaluated")), [*SHOWN, "step_seconds", *figures_of(table)]] = math.nan
    table.loc[table["evaluated_step"] != table["step"], evaluated] = math.nan
    step_of = table.set_index("run")["step"]
    return table.assign(baseline=table["baseline"].where(table["baseline"].map(step_of) == table["step"]))


def summary(table: pd.DataFrame) -> str:
    """Return means over seeds and paired differences of what is `finished`, as Markdown."""
    table = finished(table)
    states = table.groupby("combination", sort=False)["state"].apply(lambda column: (column == "done").sum())
    heads, rows = ["combination", "done"], [[name, str(count)] for name, count in states.items()]
    for name, form in {**SHOWN, "step_seconds": "{:.4f}"}.items():
        metric = paired_differences(table, name)
        if not metric["runs"].any():
            continue
        if name == "step_seconds":
            heads += ["s a step", "more"]
        else:
            key = f"layers/{name}" if name in LAYER_MEANS else name
            heads += [described("evaluation", key).title, "difference"]
        for row, done, (_, found) in zip(rows, states, metric.iterrows(), strict=True):
            difference = _plus_minus(found["difference"], found["stderr"], found["pairs"], form)
            if name == "step_seconds":
                relative, error = 100 * found["relative"], 100 * found["relative_stderr"]
                difference = _plus_minus(relative, error, found["pairs"], "{:.1f}", " %")
            mean = "" if pd.isna(found["mean"]) else form.format(found["mean"])
            row += [mean if found["runs"] in (0, done) else f"{mean} (n = {found['runs']:.0f})", difference]
    parts = [markdown(heads, rows)]
    form = "{:.4f}"
    tasks = [
        [
            *(name, str(combination), str(int(found["runs"])), form.format(found["mean"])),
            _plus_minus(found["difference"], found["stderr"], found["pairs"], form),
        ]
        for name in figures_of(table)
        for combination, found in paired_differences(table, name).iterrows()
        if found["runs"]
    ]
    if tasks:
        parts.append(markdown(["metric", "combination", "runs", "mean", "difference"], tasks))
    parts.append(
        "Means over seeds, of finished runs (with n where these are not all and only those that are done, as where a"
        " number is not finite); differences to the baseline of the same seed and as many steps, with their standard"
        " error over n pairs. MS, mean S and kurtosis have one only where both measure the same layers, MS only"
        " where they have the same target share.\n"
    )
    return "\n".join(parts)


def _plus_minus(value: float, error: float, pairs: float, form: str, unit: str = "") -> str:
    """Return a difference with its standard error, which a single pair does not have."""
    if pd.isna(value):
        return ""
    signed = form.replace(":", ":+").format(value)
    return f"{signed}{unit}" if pd.isna(error) else f"{signed} ± {form.format(error)}{unit} (n = {pairs:.0f})"


def _metrics(lines: list[dict[str, Any]]) -> dict[str, Any]:
    training, evaluations = of_kind(lines, "train"), of_kind(lines, "evaluation")
    steady = after_first_intervals(lines)
    values: dict[str, Any] = {}
    if training:
        values["observed_share"] = training[-1].get("observed_share")
        values["peak_memory_gib"] = max(numbers(training, "peak_memory_gib"), default=None)
        values["tokens"] = training[-1]["tokens"]
    if evaluations:
        last = evaluations[-1]
        values |= {"evaluated_step": last["step"], "held_out_loss": last["held_out_loss"]}
        values["measured_layers"] = " ".join(map(str, layers_of([last])))
        values |= {name: number(last, f"layers/{name}") for name in LAYER_MEANS}
        values |= {key: number(last, key) for key in last if key.startswith(TEXTS)}
    speeds = {key: numbers(steady, key) for key in ("step_seconds", "tokens_per_second")}
    return values | {key: median(given) for key, given in speeds.items() if given}


def _wanted_results(
    lines: Sequence[dict[str, Any]], step: int, evaluations: Sequence[Evaluation]
) -> dict[str, float | None]:
    """Return the results that the study asks for; if it asks for a task twice, those of more documents."""
    values: dict[str, float | None] = {}
    for evaluation in sorted(evaluations, key=lambda evaluation: _documents(evaluation.limit)):
        for line in lines:
            if answers(line, step, evaluation):
                values |= _task_results([line], without=set(line["asked"]["tasks"]) - set(evaluation.tasks))
    return values


def _task_results(lines: Iterable[dict[str, Any]], without: Collection[str] = ()) -> dict[str, float | None]:
    """Return the results of each task: those of most documents, of these the newest. without: tasks to leave out."""
    values: dict[str, float | None] = {}
    for line in sorted(lines, key=lambda line: _documents(line.get("limit"))):
        for result in results_of(line):
            if result.part_of is None and result.task not in without:
                name = result.key
                values |= {name: result.value, f"{name}_stderr": result.stderr}
    return values


def _documents(limit: int | None) -> float:
    return math.inf if limit is None else limit
