"""The tables of evaluation tasks: one in the shape of the paper's, beside its results, and one of every result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from l2e_ds.report import published
from l2e_ds.report.runs import Collection, Run, Variant
from l2e_ds.report.statistics import Measured, Point, benchmark, benchmark_difference, last_common_point
from l2e_ds.report.table import Column, Table, filled, text_of
from l2e_ds.run_directory.results import TaskResult

_TASKS = {
    "mmlu": "MMLU",
    "bigbench_lite": "BIG-bench lite",
    "arc_challenge": "ARC-Challenge",
    "arc_easy": "ARC-Easy",
}


def benchmarks(page: Collection) -> Table:
    """Return a row for each benchmark and number of shots, with columns by size and method, as in the paper."""
    tasks = tasks_of(page.runs)
    columns = [Column("benchmark"), Column("shots", "d")]
    rows: list[list[Any]] = [[task_name(page.runs, task, shots), shots] for task, shots in tasks]
    points: set[Point] = set()
    tokens: set[int] = set()  # seen by the models that are compared with published results
    for variant, size in zip(page.variants, page.shown_sizes(), strict=True):
        if not any(run.results for run in variant.runs):
            continue
        base = page.baseline_variant(variant)
        group = f"{size} {variant.name}" if size else variant.name
        columns += [
            Column("ours", ".4f", group),
            Column("step", ",d", group),
            Column("published", ".4f", group),
            Column("ours − published", "+.4f", group),
        ]
        if base is not None:
            compared = f"{group} − {base.treatment}"
            columns += [
                Column("ours", "+.4f", compared),
                Column("step", ",d", compared),
                Column("published", "+.4f", compared),
            ]
        for cells, (task, shots) in zip(rows, tasks, strict=True):
            ours, point = benchmark(variant, task, shots) or (None, None)
            theirs = _published(variant, task, shots)
            cells += [ours, _step(point), theirs, ours.minus(theirs) if ours and theirs is not None else None]
            points |= {point} if point else set()
            if theirs is not None and point and point.step is not None:
                tokens.add(point.step * variant.runs[0].tokens_per_step)
            if base is not None:
                plain = _published(base, task, shots)
                published_difference = None if theirs is None or plain is None else theirs - plain
                difference, common = benchmark_difference(page, variant, task, shots) or (None, None)
                cells += [difference, _step(common), published_difference]
                points |= {common} if common else set()
    note = _about_tasks(page, tasks, points, tokens)
    table = Table("benchmarks", "Evaluation tasks, in the shape of the paper's table", note, columns, rows)
    return table if _several(points) else table.without("step")


def _several(points: set[Point]) -> bool:
    return len({(point.step, point.limit) for point in points}) > 1


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
    metrics = {point.metric for run in runs if (point := last_common_point([run], task, shots)) is not None}
    other = ", ".join(sorted(metrics - {"acc"}))
    name = _TASKS.get(task, task)
    return f"{name} ({other})" if other else name


def _published(variant: Variant, task: str, shots: int) -> float | None:
    if not all(run.is_published_method for run in variant.runs):
        return None
    return published.benchmark(task, shots, variant.size, variant.method)


def _about_tasks(page: Collection, tasks: list[tuple[str, int]], points: set[Point], tokens: set[int]) -> str:
    parts = [
        "Accuracy (acc, not acc_norm; the paper does not say which it took), a mean at the last step that all seeds"
        " have evaluated, a difference at the last that all pairs have, both of equally many documents. ±: standard"
        " error, over documents and, where there are several (n), over seeds; of a difference of two models it is"
        " sqrt(a² + b²), of several pairs (n) theirs.",
    ]
    if not _several(points):
        for point in list(points)[:1]:
            only = "" if point.limit is None else f", of the first {point.limit:,} documents of each task only"
            parts.append(f"All at step {text_of(point.step, ',d')}{only}.")
    elif any(point.limit is not None for point in points):
        parts.append('"First": of this many documents of each task only.')
    if any(task == "bigbench_lite" for task, _ in tasks):
        parts.append(
            "The acc of BIG-bench lite is here that of 19 of its 24 tasks; the other five are scored by exact_match"
            " (docs/evaluation.md)."
        )
    if tokens:
        parts.append(
            f"Published ({published.SOURCE}): after {published.STEPS:,} steps of {published.GLOBAL_BATCH:,} x"
            f" {published.SEQUENCE_LENGTH:,} tokens ({published.TOKENS:,}) of the Pile, without standard errors: that"
            " of ours − published is ours alone. Ours: after"
            f" {' to '.join(f'{count:,}' for count in dict.fromkeys((min(tokens), max(tokens))))} tokens."
        )
    return " ".join([*parts, *without_published(page)])


def without_published(page: Collection) -> list[str]:
    """Return a sentence if runs of a published size inhibit in another way than those of the paper's tables."""
    others = [
        run for run in page.runs if run.size in published.SIZES and run.method != "none" and not run.is_published_method
    ]
    if not others:
        return []
    shares = ", ".join(f"{share:.0%} at {size}" for size, share in published.BEST_SHARE.items())
    return [
        "Published results are those of L2E on the two middle layers (mid-2) with the share that did best"
        f" ({shares}), and the time of MEmeL. There are none for other layers, shares, losses and ways to retrieve and"
        " to inhibit."
    ]


def evaluations(page: Collection) -> Table:
    """Return a row for each result of every task and part of a task, at every step."""
    columns: list[tuple[Column, Callable[[Run, TaskResult], Any]]] = [
        (Column("run"), lambda run, result: run.name),
        (Column("step", ",d"), lambda run, result: result.step),
        (Column("task"), lambda run, result: result.task),
        (Column("part of"), lambda run, result: result.part_of),
        (Column("shots", ",d"), lambda run, result: result.num_fewshot),
        (Column("metric"), lambda run, result: result.metric),
        (Column("value", ".4f"), lambda run, result: Measured(result.value, result.stderr)),
        (Column("documents", ",d"), lambda run, result: result.samples),
        (Column("limit", ",d"), lambda run, result: result.limit),
    ]
    results = ((run, result) for run in page.runs for result in run.results)
    return filled("evaluations", "All results of the evaluation tasks", "", columns, results)
