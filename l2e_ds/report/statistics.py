"""Results with standard errors: means over seeds, and differences of paired runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pandas as pd

from l2e_ds.report.runs import Collection, Run, Variant
from l2e_ds.run_directory.metrics import number, numbers
from l2e_ds.run_directory.results import TaskResult
from l2e_ds.study.collect import paired_differences

Key = TypeVar("Key")


@dataclass(frozen=True)
class Measured:
    """A value and its standard error, which is None if it cannot be estimated. n: number of its seeds or pairs."""

    value: float
    error: float | None = None
    n: int = 1

    def minus(self, constant: float) -> Measured:
        return replace(self, value=self.value - constant)


def over_seeds(values: Iterable[float | None]) -> Measured | None:
    """Return the mean of the values that are not None, with its standard error if there are several; None if there is
    no value."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    error = statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else None
    return Measured(statistics.fmean(known), error, len(known))


def pairs(collection: Collection, variant: Variant) -> list[tuple[Run, Run]]:
    """Return each run of a variant that has a baseline, with that baseline."""
    return [(run, base) for run in variant.seeds if (base := collection.baseline_of(run)) is not None]


@dataclass(frozen=True)
class Paired:
    """Means over the pairs of a run and its baseline. relative: difference / baseline."""

    difference: Measured
    relative: Measured


def paired(collection: Collection, variant: Variant, value: Callable[[Run], float | None]) -> Paired | None:
    """Return the paired differences of a value, or None if no run and its baseline both have it."""
    both = pairs(collection, variant)
    rows = [(run.name, "own", base.name, value(run)) for run, base in both]
    rows += [(base.name, "other", "", value(base)) for _, base in both]
    table = pd.DataFrame(rows, columns=["run", "combination", "baseline", "value"]).drop_duplicates("run")
    found = paired_differences(table, "value")
    if not found["pairs"].sum():
        return None
    own = found.loc["own"]

    def measured(name: str, error: str) -> Measured:
        return Measured(float(own[name]), None if pd.isna(own[error]) else float(own[error]), int(own["pairs"]))

    return Paired(measured("difference", "stderr"), measured("relative", "relative_stderr"))


def last_common(found: Sequence[Mapping[Key, Any]], rank: Callable[[Key], Any] = lambda key: key) -> Key | None:
    """Return the last key, by `rank`, that all of these have, or None."""
    return max(set.intersection(*map(set, found)), key=rank, default=None) if found else None


def difference_at_last(
    collection: Collection,
    variant: Variant,
    values: Callable[[Run], Mapping[Key, float]],
    rank: Callable[[Key], Any] = lambda key: key,
) -> tuple[Paired, Key] | None:
    """Return the paired differences at the last key (a step) that all pairs with values have, and that key, or None."""
    known = {run.name: values(run) for pair in pairs(collection, variant) for run in pair}
    whole = [pair for pair in pairs(collection, variant) if all(known[run.name] for run in pair)]
    names = {run.name for pair in whole for run in pair}
    key = last_common([known[name] for name in names], rank)
    if key is None:
        return None
    at = {name: known[name][key] for name in names}
    found = paired(collection, variant, lambda run: at.get(run.name))
    return None if found is None else (found, key)


def held_out(run: Run) -> dict[int, float]:
    """Return the held-out LM loss by step."""
    return {line["step"]: loss for line in run.evaluations if (loss := number(line, "held_out_loss")) is not None}


def loss_difference(collection: Collection, variant: Variant) -> tuple[Paired, int] | None:
    """Return the difference in held-out loss to the paired baselines, and the last step of all pairs, or None."""
    return difference_at_last(collection, variant, held_out)


def comparable_losses(variants: Sequence[Variant]) -> tuple[list[tuple[Variant, Measured]], list[int], int] | None:
    """Return the held-out losses of the variants that have any, over their common seeds at their last common step.

    Returns them with these seeds and the step, or None if there is no such seed or step.
    """
    by_seed = [(one, {run.seed: losses for run in one.seeds if (losses := held_out(run))}) for one in variants]
    found = [(variant, losses) for variant, losses in by_seed if losses]
    seeds = sorted(set.intersection(*(set(losses) for _, losses in found))) if found else []
    step = last_common([losses[seed] for _, losses in found for seed in seeds])
    if step is None:
        return None
    means = ((variant, over_seeds([losses[seed][step] for seed in seeds])) for variant, losses in found)
    return [(variant, mean) for variant, mean in means if mean is not None], seeds, step


@dataclass(frozen=True)
class Point:
    """What results of a task must share to be compared. limit: how many of the first documents they are of, or None.
    precision: of the evaluation; that of training may differ from that of `l2e-ds evaluate`."""

    step: int | None
    limit: int | None
    metric: str
    precision: str | None

    def rank(self) -> tuple:
        """A key to sort by: the newest step is the highest, then all documents, the accuracy, and fp32."""
        limit = float("inf") if self.limit is None else self.limit
        return self.step is not None, self.step or 0, limit, self.metric == "acc", self.precision == "fp32"


def results_of(run: Run, task: str, shots: int) -> dict[Point, TaskResult]:
    """Return a run's results of a task by the point of each."""
    found = (result for result in run.results if (result.task, result.num_fewshot) == (task, shots))
    return {Point(result.step, result.limit, result.metric, result.precision): result for result in found}


def benchmark(variant: Variant, task: str, shots: int) -> tuple[Measured, Point] | None:
    """Return the mean over the seeds that were evaluated, and the last point that they all have, or None.

    Its error is that over documents and, with several seeds, over seeds.
    """
    evaluated = [results for run in variant.seeds if (results := results_of(run, task, shots))]
    point = last_common(evaluated, Point.rank)
    if point is None:
        return None
    found = [results[point] for results in evaluated]
    seeds = over_seeds([result.value for result in found])
    assert seeds is not None  # of at least one result
    errors = [result.stderr for result in found if result.stderr is not None]
    if not errors:
        return seeds, point
    return replace(seeds, error=math.hypot(statistics.fmean(errors), seeds.error or 0.0)), point


def benchmark_difference(
    collection: Collection, variant: Variant, task: str, shots: int
) -> tuple[Measured, Point] | None:
    """Return the difference to the paired baselines, and the last point that all evaluated pairs have, or None.

    The error is that over pairs, or for one pair sqrt(error^2 + error of the other^2).
    """

    def values(run: Run) -> dict[Point, float]:
        return {point: result.value for point, result in results_of(run, task, shots).items()}

    found = difference_at_last(collection, variant, values, Point.rank)
    if found is None:
        return None
    difference, point = found[0].difference, found[1]
    if difference.n > 1:
        return difference, point
    (one,) = [pair for pair in pairs(collection, variant) if all(values(run) for run in pair)]
    errors = [results_of(run, task, shots)[point].stderr for run in one]
    known = [error for error in errors if error is not None]
    return Measured(difference.value, math.hypot(*known) if len(known) == 2 else None), point


def steady_median(run: Run, key: str) -> float | None:
    """Return the median over a run's training lines, without the first after each start (compilation, cold caches)."""
    found = numbers(run.steady, key)
    return statistics.median(found) if found else None
