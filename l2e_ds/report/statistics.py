"""Figures with standard errors: means over seeds, and differences of paired runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from l2e_ds.evaluation.results import TaskResult
from l2e_ds.report.runs import Collection, Run, Variant, number
from l2e_ds.study.collect import paired_differences


@dataclass(frozen=True)
class Measured:
    """error: standard error; None where there is nothing to tell it from."""

    value: float
    error: float | None = None

    def minus(self, constant: float) -> Measured:
        return Measured(self.value - constant, self.error)


def over_seeds(values: Sequence[float]) -> Measured | None:
    """The mean, and its standard error where there are two or more."""
    if not values:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Measured(statistics.fmean(values), error)


def pairs(page: Collection, variant: Variant) -> list[tuple[Run, Run]]:
    """Each run of a variant with its baseline, where it has one."""
    return [(run, base) for run in variant.runs if (base := page.baseline_of(run)) is not None]


@dataclass(frozen=True)
class Paired:
    """Means over the pairs of a run and its baseline. relative: difference / baseline."""

    difference: Measured
    relative: Measured
    pairs: int


def paired(page: Collection, variant: Variant, value: Callable[[Run], float | None]) -> Paired | None:
    """None where no run and its baseline both have the value."""
    rows: dict[str, dict] = {}
    for run in variant.runs:
        base = page.baseline_of(run)
        rows[run.name] = {"combination": "own", "baseline": base.name if base else None, "value": value(run)}
        if base is not None:
            rows.setdefault(base.name, {"combination": "other", "baseline": None, "value": value(base)})
    table = pd.DataFrame([{"run": name, **row} for name, row in rows.items()])
    found = paired_differences(table, "value").loc["own"]
    if not found["pairs"]:
        return None

    def measured(name: str, error: str) -> Measured:
        return Measured(float(found[name]), None if pd.isna(found[error]) else float(found[error]))

    return Paired(measured("difference", "stderr"), measured("relative", "relative_stderr"), int(found["pairs"]))


# --- held-out loss -----------------------------------------------------------------------------------------------


def held_out(run: Run) -> dict[int, float]:
    """step -> held-out LM loss"""
    return {line["step"]: loss for line in run.evaluations if (loss := number(line, "held_out_loss")) is not None}


def last_common_step(runs: Sequence[Run]) -> int | None:
    """That all of them have evaluated."""
    common = set.intersection(*(set(held_out(run)) for run in runs)) if runs else set()
    return max(common, default=None)


def loss_difference(page: Collection, variant: Variant) -> tuple[Paired, int] | None:
    """Held-out loss less that of the paired baseline, and at which step: the last that all pairs have evaluated."""
    evaluated = [pair for pair in pairs(page, variant) if all(run.evaluations for run in pair)]
    members = [run for pair in evaluated for run in pair]
    step = last_common_step(members)
    if step is None:
        return None
    found = paired(page, variant, lambda run: held_out(run)[step] if run in members else None)
    return None if found is None else (found, step)


# --- evaluation tasks --------------------------------------------------------------------------------------------


def newest_result(run: Run, task: str, shots: int) -> TaskResult | None:
    """The accuracy of the newest step, on all documents rather than on the first; of a task without one its first
    metric."""
    found = [result for result in run.results if (result.task, result.num_fewshot) == (task, shots)]

    def worth(result: TaskResult) -> tuple:
        limit = float("inf") if result.limit is None else result.limit
        return result.step is not None, result.step or 0, limit, result.metric == "acc"

    return max(found, key=worth, default=None)


def benchmark(variant: Variant, task: str, shots: int) -> Measured | None:
    """Mean over seeds. Its error: the documents', and with several seeds theirs too."""
    found = [result for run in variant.runs if (result := newest_result(run, task, shots)) is not None]
    seeds = over_seeds([result.value for result in found])
    if seeds is None:
        return None
    errors = [result.stderr for result in found if result.stderr is not None]
    if not errors:
        return seeds
    return Measured(seeds.value, math.hypot(statistics.fmean(errors), seeds.error or 0.0))


def benchmark_difference(page: Collection, variant: Variant, task: str, shots: int) -> Measured | None:
    """To the paired baseline: the error is that of the pairs, or of one pair sqrt(error^2 + error of the other^2)."""

    def accuracy(run: Run) -> float | None:
        result = newest_result(run, task, shots)
        return None if result is None else result.value

    found = paired(page, variant, accuracy)
    if found is None:
        return None
    if found.pairs > 1:
        return found.difference
    run, base = next(pair for pair in pairs(page, variant) if None not in map(accuracy, pair))
    errors = [result.stderr for one in (run, base) if (result := newest_result(one, task, shots)) is not None]
    known = [error for error in errors if error is not None]
    return Measured(found.difference.value, math.hypot(*known) if len(known) == 2 else None)


# --- time --------------------------------------------------------------------------------------------------------


def steady_median(run: Run, key: str) -> float | None:
    """Over its lines of training but the first after each start, in which things are compiled and caches filled."""
    first = {
        min((line["step"] for line in run.training if line["step"] > start["step"]), default=0) for start in run.starts
    }
    found = [value for line in run.training if line["step"] not in first and (value := number(line, key)) is not None]
    return statistics.median(found) if found else None
