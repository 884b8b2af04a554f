"""The tables of evaluation tasks: one in the shape of the paper's, beside its results, and one of every result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from l2e_ds.report import published
from l2e_ds.report.runs import Collection, Run, Variant
from l2e_ds.report.statistics import Measured, Point, benchmark, benchmark_difference, results_of
from l2e_ds.report.table import Column, Table, table_of, text_of

_TASKS = {
    "mmlu": "MMLU",
    "bigbench_lite": "BIG-bench lite",
    "arc_challenge": "ARC-Challenge",
    "arc_easy": "ARC-Easy",
}


def benchmarks(collection: Collection) -> Table:
    """Return a row for each benchmark and number of shots, with columns by size and method, as in the paper."""
    tasks = tasks_of(collection.runs)
    evaluated = [variant for variant in collection.variants if any(run.results for run in variant.runs)]
    rows: list[dict[Column, Any]] = []
    points: set[Point] = set()
    tokens: set[int] = set()  # seen by the models that are compared with published results
    for task, shots in tasks:
        row = {Column("benchmark"): task_name(collection.runs, task, shots), Column("shots", "d"): shots}
        for variant in evaluated:
            group = f"{variant.shown_size} {variant.name}" if variant.shown_size else variant.name
            ours, point = benchmark(variant, task, shots) or (None, None)
            theirs = _published(variant, task, shots)
            row |= {
                Column("ours", ".4f", group): ours,
                Column("step", ",d", group): _step(point),
                Column("published", ".4f", group): theirs,
                Column("ours − published", "+.4f", group): ours.minus(theirs) if ours and theirs is not None else None,
            }
            if theirs is not None and point and point.step is not None:
                tokens.add(point.step * variant.runs[0].tokens_per_step)
            points |= {point} if point else set()
            base = collection.baseline_variant(variant)
            if base is None:
                continue
            compared = f"{group} − {base.treatment}"
            plain = _published(base, task, shots)
            difference, common = benchmark_difference(collection, variant, task, shots) or (None, None)
            row |= {
                Column("ours", "+.4f", compared): difference,
                Column("step", ",d", compared): _step(common),
                Column("published", "+.4f", compared): None if theirs is None or plain is None else theirs - plain,
            }
            points |= {common} if common else set()
        rows.append(row)
    note = _about_tasks(collection, tasks, points, tokens)
    return table_of("benchmarks", "Evaluation tasks, in the shape of the paper's table", note, rows)


def _step(point: Point | None) -> int | str | None:
    """Return the cell of a step, which also says of how many documents the result is, unless it is of all."""
    if point is None:
        return None
    if point.limit is None:
        return point.step
    return f"{text_of(point.step, ',d')}, first {point.limit:,}"


def tasks_of(runs: Sequence[Run]) -> list[tuple[str, int]]:
    """Return (task, shots) of all results, without parts of a group (subjects of MMLU), those of the paper first."""
    found = {(result.task, result.num_fewshot) for run in runs for result in run.results if result.part_of is None}
    known = list(published.BENCHMARKS)
    return [task for task in known if task in found] + sorted(found - set(known))


def task_name(runs: Sequence[Run], task: str, shots: int) -> str:
    """Return what the report calls a task, with its metric if that is not the accuracy."""
    found = [results_of(run, task, shots) for run in runs]
    metrics = {max(results, key=Point.rank).metric for results in found if results}
    other = ", ".join(sorted(metrics - {"acc"}))
    name = _TASKS.get(task, task)
    return f"{name} ({other})" if other else name


def _published(variant: Variant, task: str, shots: int) -> float | None:
    return published.benchmark(task, shots, variant.size, variant.method) if variant.is_published_method else None


def _about_tasks(collection: Collection, tasks: list[tuple[str, int]], points: set[Point], tokens: set[int]) -> str:
    parts = [
        "Accuracy (acc, not acc_norm; the paper does not say which it took), a mean at the last step that all seeds"
        " have evaluated, a difference at the last that all pairs have, both of equally many documents and in the same"
        " precision. ±: standard"
        " error, over documents and, where there are several (n), over seeds; of a difference of two models it is"
        " sqrt(a² + b²), of several pairs (n) theirs.",
    ]
    if any(point.limit is not None for point in points):
        parts.append('"First": of this many documents of each task only.')
    if any(task == "bigbench_lite" for task, _ in tasks):
        parts.append(
            "The acc of BIG-bench lite is here that of 18 of its 24 tasks; the other six are scored by exact_match"
            " (docs/evaluation.md)."
        )
    if tokens:
        parts.append(
            f"Published ({published.SOURCE}): after {published.STEPS:,} steps of {published.GLOBAL_BATCH:,} x"
            f" {published.SEQUENCE_LENGTH:,} tokens ({published.TOKENS:,}) of the Pile, without standard errors: that"
            " of ours − published is ours alone. Ours: after"
            f" {' to '.join(f'{count:,}' for count in dict.fromkeys((min(tokens), max(tokens))))} tokens."
        )
    return " ".join([*parts, *without_published(collection)])


def without_published(collection: Collection) -> list[str]:
    """Return a sentence if runs of a published size inhibit in another way than those of the paper's tables."""
    others = [
        run
        for run in collection.runs
        if run.size in published.SIZES and run.method != "none" and not run.is_published_method
    ]
    if not others:
        return []
    shares = ", ".join(f"{share:.0%} at {size}" for size, share in published.BEST_SHARE.items())
    return [
        "Published results are those of L2E on the two middle layers (mid-2) with the share that did best"
        f" ({shares}), and the time of MEmeL. There are none for other layers, shares, losses and ways to retrieve and"
        " to inhibit."
    ]


def evaluations(collection: Collection) -> Table:
    """Return a row for each result of every task and part of a task, at every step."""
    rows = [
        {
            Column("run"): run.name,
            Column("step", ",d"): result.step,
            Column("task"): result.task,
            Column("part of"): result.part_of,
            Column("shots", ",d"): result.num_fewshot,
            Column("metric"): result.metric,
            Column("value", ".4f"): Measured(result.value, result.stderr),
            Column("documents", ",d"): result.samples,
            Column("limit", ",d"): result.limit,
            Column("precision"): result.precision,
        }
        for run in collection.runs
        for result in run.results
    ]
    return table_of("evaluations", "All results of the evaluation tasks", "", rows)
