"""Results with standard errors: means over seeds, and differences of paired runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from l2e_ds.report.runs import Collection, Run, Variant
from l2e_ds.run_directory.metrics import number, numbers
from l2e_ds.run_directory.results import TaskResult
from l2e_ds.study.collect import paired_differences


@dataclass(frozen=True)
class Measured:
    """A value and its standard error, which is None if it cannot be estimated. n: number of its seeds or pairs."""

    value: float
    error: float | None = None
    n: int = 1

    def minus(self, constant: float) -> Measured:
        return replace(self, value=self.value - constant)


def over_seeds(values: Iterable[float | None]) -> Measured | None:
    """Return the mean of those that are not None, with its standard error if there are several; None if all are."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    error = statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else None
    return Measured(statistics.fmean(known), error, len(known))


def pairs(page: Collection, variant: Variant) -> list[tuple[Run, Run]]:
    """Return each run of a variant that has a baseline, with that baseline."""
    return [(run, base) for run in variant.seeds if (base := page.baseline_of(run)) is not None]


@dataclass(frozen=True)
class Paired:
    """Means over the pairs of a run and its baseline. relative: difference / baseline."""

    difference: Measured
    relative: Measured


def paired(page: Collection, variant: Variant, value: Callable[[Run], float | None]) -> Paired | None:
    """Return the paired differences of a value, or None if no run and its baseline both have it."""
    rows: dict[str, dict] = {}
    for run in variant.seeds:
        base = page.baseline_of(run)
        rows[run.name] = {"combination": "own", "baseline": base.name if base else None, "value": value(run)}
        if base is not None:
            rows.setdefault(base.name, {"combination": "other", "baseline": None, "value": value(base)})
    table = pd.DataFrame([{"run": name, **row} for name, row in rows.items()])
    found = paired_differences(table, "value").loc["own"]
    if not found["pairs"]:
        return None

    def measured(name: str, error: str) -> Measured:
        error_of = None if pd.isna(found[error]) else float(found[error])
        return Measured(float(found[name]), error_of, int(found["pairs"]))

    return Paired(measured("difference", "stderr"), measured("relative", "relative_stderr"))


# --- held-out loss -----------------------------------------------------------------------------------------------


def held_out(run: Run) -> dict[int, float]:
    """Return the held-out LM loss by step."""
    return {line["step"]: loss for line in run.evaluations if (loss := number(line, "held_out_loss")) is not None}


def last_common_step(runs: Sequence[Run]) -> int | None:
    """Return the last step at which every run was evaluated, or None."""
    common = set.intersection(*(set(held_out(run)) for run in runs)) if runs else set()
    return max(common, default=None)


def loss_difference(page: Collection, variant: Variant) -> tuple[Paired, int] | None:
    """Return the difference in held-out loss to the paired baselines, and the last step that all pairs have evaluated.

    Returns None if there is no such step.
    """
    evaluated = [pair for pair in pairs(page, variant) if all(run.evaluations for run in pair)]
    members = [run for pair in evaluated for run in pair]
    step = last_common_step(members)
    if step is None:
        return None
    found = paired(page, variant, lambda run: held_out(run)[step] if run in members else None)
    return None if found is None else (found, step)


@dataclass(frozen=True)
class Comparable:
    """Held-out losses of variants, each a mean over the same seeds at the same step."""

    step: int
    seeds: list[int]
    losses: list[tuple[Variant, Measured]]


def comparable_losses(variants: Sequence[Variant]) -> Comparable | None:
    """Return the losses of the variants that have any, over the seeds that all of these have.

    They are of the last step at which all of these runs were evaluated. Returns None if there is no such seed or step.
    """
    by_seed = [{run.seed: losses for run in variant.seeds if (losses := held_out(run))} for variant in variants]
    found = [(variant, losses) for variant, losses in zip(variants, by_seed, strict=True) if losses]
    seeds = sorted(set.intersection(*(set(losses) for _, losses in found))) if found else []
    steps = [set(losses[seed]) for _, losses in found for seed in seeds]
    step = max(set.intersection(*steps), default=None) if steps else None
    if step is None:
        return None
    means = [(variant, over_seeds([losses[seed][step] for seed in seeds])) for variant, losses in found]
    return Comparable(step, seeds, [(variant, mean) for variant, mean in means if mean is not None])


# --- evaluation tasks --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """What results of a task must share to be compared. limit: how many of the first documents they are of, or None."""

    step: int | None
    limit: int | None
    metric: str

    @property
    def rank(self) -> tuple:
        """A key to sort by: the newest step is the highest, then all documents, then the accuracy."""
        limit = float("inf") if self.limit is None else self.limit
        return self.step is not None, self.step or 0, limit, self.metric == "acc"


def results_of(run: Run, task: str, shots: int) -> dict[Point, TaskResult]:
    """Return a run's results of a task by the point of each."""
    found = (result for result in run.results if (result.task, result.num_fewshot) == (task, shots))
    return {Point(result.step, result.limit, result.metric): result for result in found}


def last_common_point(runs: Sequence[Run], task: str, shots: int) -> Point | None:
    """Return the highest point at which every run has a result of a task, or None."""
    found = [results_of(run, task, shots) for run in runs]
    common = [point for point in found[0] if all(point in other for other in found)] if found else []
    return max(common, key=lambda point: point.rank, default=None)


def benchmark(variant: Variant, task: str, shots: int) -> tuple[Measured, Point] | None:
    """Return the mean over the seeds that were evaluated, and the last point that they all have, or None.

    Its error is that over documents and, with several seeds, over seeds.
    """
    evaluated = [run for run in variant.seeds if results_of(run, task, shots)]
    point = last_common_point(evaluated, task, shots)
    if point is None:
        return None
    found = [results_of(run, task, shots)[point] for run in evaluated]
    seeds = over_seeds([result.value for result in found])
    if seeds is None:
        return None
    errors = [result.stderr for result in found if result.stderr is not None]
    if not errors:
        return seeds, point
    return replace(seeds, error=math.hypot(statistics.fmean(errors), seeds.error or 0.0)), point


def benchmark_difference(page: Collection, variant: Variant, task: str, shots: int) -> tuple[Measured, Point] | None:
    """Return the difference to the paired baselines, and the last point that all evaluated pairs have, or None.

    The error is that over pairs, or for one pair sqrt(error^2 + error of the other^2).
    """
    evaluated = [pair for pair in pairs(page, variant) if all(results_of(run, task, shots) for run in pair)]
    members = [run for pair in evaluated for run in pair]
    point = last_common_point(members, task, shots)
    if point is None:
        return None
    results = {run.name: results_of(run, task, shots)[point] for run in members}
    found = paired(page, variant, lambda run: results[run.name].value if run.name in results else None)
    if found is None:
        return None
    if found.difference.n > 1:
        return found.difference, point
    known = [results[run.name].stderr for run in evaluated[0]]
    errors = [error for error in known if error is not None]
    return Measured(found.difference.value, math.hypot(*errors) if len(errors) == 2 else None), point


# --- time --------------------------------------------------------------------------------------------------------


def steady_median(run: Run, key: str) -> float | None:
    """Return the median over a run's training lines, without the first after each start (compilation, cold caches)."""
    found = numbers(run.steady, key)
    return statistics.median(found) if found else None
