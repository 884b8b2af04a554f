"""The tables of a report, each as formatted text, as Markdown, and as CSV with all digits.

A run that is not finished is shown as far as it is. A value that a run does not have is left empty.
"""

from __future__ import annotations

import csv
import html
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import compress, groupby
from typing import Any

from l2e_ds.console import markdown
from l2e_ds.report import published
from l2e_ds.report.runs import Collection, Run, Variant, differing
from l2e_ds.report.statistics import (
    Measured,
    Point,
    benchmark,
    benchmark_difference,
    held_out,
    last_common_point,
    last_common_step,
    loss_difference,
    over_seeds,
    paired,
    steady_median,
)
from l2e_ds.run_directory.metric_table import described
from l2e_ds.run_directory.metrics import comparison_key, first_and_last, last_tenth, layer_key, mean, numbers
from l2e_ds.run_directory.results import TaskResult

_TASKS = {
    "mmlu": "MMLU",
    "bigbench_lite": "BIG-bench lite",
    "arc_challenge": "ARC-Challenge",
    "arc_easy": "ARC-Easy",
}
_EMPTY = "–"
_PLACES = ("training.run_directory", "data.cache")


@dataclass(frozen=True)
class Column:
    """A column. form: format of its numbers, empty for text. group: a heading above several columns."""

    head: str
    form: str = ""
    group: str = ""

    @property
    def full_head(self) -> str:
        return f"{self.group}: {self.head}" if self.group else self.head

    @property
    def css(self) -> str:
        return "number" if self.form else "words"


@dataclass(frozen=True)
class Table:
    """A table. name: that of its files. A cell is text, a number, a Measured or None."""

    name: str
    title: str
    note: str
    columns: list[Column]
    rows: list[list[Any]]

    def texts(self) -> list[list[str]]:
        return [
            [text_of(cell, column.form) for cell, column in zip(row, self.columns, strict=True)] for row in self.rows
        ]

    def groups(self) -> list[tuple[str, int]]:
        """Return the headings above the columns' heads, each with its number of columns, or [] if there are none."""
        groups = [
            (name, len(list(columns))) for name, columns in groupby(self.columns, key=lambda column: column.group)
        ]
        return groups if any(name for name, _ in groups) else []

    def markdown(self) -> str:
        heads = [column.full_head for column in self.columns]
        safe = [[html.escape(text, quote=False) for text in row] for row in (heads, *self.texts())]
        note = html.escape(self.note, quote=False)
        return f"## {html.escape(self.title, quote=False)}\n\n{markdown(safe[0], safe[1:])}\n{note}\n"

    def without(self, head: str) -> Table:
        """Return the table without the columns that have this head."""
        return self._only([column.head != head for column in self.columns])

    def without_empty_columns(self) -> Table:
        return self._only([any(row[i] is not None for row in self.rows) for i in range(len(self.columns))])

    def _only(self, kept: Sequence[bool]) -> Table:
        rows = [list(compress(row, kept)) for row in self.rows]
        return replace(self, columns=list(compress(self.columns, kept)), rows=rows)

    def csv(self) -> str:
        """Return the table as CSV with all digits. A column of values with standard errors becomes two."""
        columns: list[list[Any]] = []
        for i, column in enumerate(self.columns):
            cells = [row[i] for row in self.rows]
            columns.append([column.full_head, *(cell.value if isinstance(cell, Measured) else cell for cell in cells)])
            if any(isinstance(cell, Measured) for cell in cells):
                errors = (cell.error if isinstance(cell, Measured) else None for cell in cells)
                columns.append([f"{column.full_head}, standard error", *errors])
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(zip(*columns, strict=True))
        return text.getvalue()


def filled(
    name: str, title: str, note: str, columns: Sequence[tuple[Column, Callable[..., Any]]], items: Iterable[tuple]
) -> Table:
    """Return a table with a row for each item. columns: each with a function that makes its cell from an item."""
    rows = [[cell(*item) for _, cell in columns] for item in items]
    return Table(name, title, note, [column for column, _ in columns], rows)


def text_of(cell: Any, form: str) -> str:
    """Return a cell as formatted text."""
    if cell is None or cell == "":
        return _EMPTY
    if isinstance(cell, Measured):
        value = text_of(cell.value, form)
        return value if cell.error is None else f"{value} ± {format(cell.error, form.removeprefix('+'))}"
    return format(cell, form).replace("-", "−") if form and not isinstance(cell, str) else str(cell)


def all_tables(page: Collection) -> list[Table]:
    """Return the tables that have rows, without empty columns, in the order of the page."""
    tables = [
        _variants(page),
        _benchmarks(page),
        _time(page),
        _shares(page),
        _runs(page),
        _layers(page),
        _sets(page),
        _texts(page),
        differences(page),
        machines(page),
        evaluations(page),
    ]
    return [table.without_empty_columns() for table in tables if table.rows and len(table.columns) > 1]


# --- loss --------------------------------------------------------------------------------------------------------


def _variants(page: Collection) -> Table:
    """Return a row for each variant, if several runs are compared."""
    rows = []
    for variant, size in zip(page.variants, _sizes(page), strict=True) if len(page.runs) > 1 else ():
        evaluated = [run for run in variant.seeds if run.evaluations]
        step = last_common_step(evaluated)
        lines = [line for run in evaluated for line in run.evaluations if line["step"] == step]
        difference = loss_difference(page, variant)
        base = page.baseline_variant(variant)
        rows.append(
            [
                variant.name,
                size,
                variant.method,
                len(variant.seeds),
                over_seeds(numbers(lines, "held_out_loss")),
                step,
                difference and difference[0].difference,
                base and base.name,
                difference and difference[1],
                *(over_seeds(numbers(lines, key)) for key in _SCORES),
            ]
        )
    columns = [
        Column("variant"),
        Column("size"),
        Column("method"),
        Column("seeds", "d"),
        Column("mean", ".4f", "held-out loss"),
        Column("step", ",d", "held-out loss"),
        Column("difference", "+.4f", "against the baseline"),
        Column("which", "", "against the baseline"),
        Column("step", ",d", "against the baseline"),
        *(Column(described("evaluation", key).title, form) for key, form in _SCORES.items()),
    ]
    note = (
        "LM loss on held-out text in nats/token, at the last step that all seeds have evaluated; the difference is that"
        " of runs with the same seed, at the last step that all pairs have. ±: standard error over seeds. MS, mean S"
        " and kurtosis are means over the layers, on held-out text."
    )
    return Table("variants", "Loss on held-out text, and what it is compared with", note, columns, rows)


_SCORES = {"layers/top_share_score": ".2f", "layers/mean_s": ".4f", "layers/kurtosis": ".2f"}


# --- evaluation tasks --------------------------------------------------------------------------------------------


def _benchmarks(page: Collection) -> Table:
    """Return a row for each benchmark and number of shots, with columns by size and method, as in the paper."""
    tasks = tasks_of(page.runs)
    columns = [Column("benchmark"), Column("shots", "d")]
    rows: list[list[Any]] = [[task_name(page.runs, task, shots), shots] for task, shots in tasks]
    points: set[Point] = set()
    tokens: set[int] = set()  # seen by the models that are compared with published results
    for variant, size in zip(page.variants, _sizes(page), strict=True):
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


def _sizes(page: Collection) -> list[str | None]:
    """Return each variant's size, or None if all have the same or the variant's name tells it."""
    several = len({variant.size for variant in page.variants}) > 1
    return [variant.size if several and variant.size not in variant.name else None for variant in page.variants]


def _published(variant: Variant, task: str, shots: int) -> float | None:
    if not all(run.is_published_method for run in variant.runs):
        return None
    return published.benchmark(task, shots, variant.size, variant.method)


def _about_tasks(page: Collection, tasks: list[tuple[str, int]], points: set[Point], tokens: set[int]) -> str:
    parts = [
        "Accuracy (acc, not acc_norm; the paper does not say which it took), a mean at the last step that all seeds"
        " have evaluated, a difference at the last that all pairs have, both of equally many documents. ±: standard"
        " error, over documents and, where there are several, over seeds; of a difference of two models it is"
        " sqrt(a² + b²), of several pairs theirs.",
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
    return " ".join([*parts, *_without_published(page)])


def _without_published(page: Collection) -> list[str]:
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


# --- time, shares ------------------------------------------------------------------------------------------------


def _time(page: Collection) -> Table:
    rows = []
    for variant, size in zip(page.variants, _sizes(page), strict=True):
        seconds = over_seeds(steady_median(run, "step_seconds") for run in variant.seeds)
        if seconds is None:
            continue
        theirs = published.EXTRA_TIME.get((variant.method, variant.size))
        if not all(run.is_published_method for run in variant.runs):
            theirs = None
        over = paired(page, variant, lambda run: steady_median(run, "step_seconds"))
        extra = None if over is None else over.relative
        difference = extra.minus(theirs) if extra is not None and theirs is not None else None
        speed = over_seeds(steady_median(run, "tokens_per_second") for run in variant.seeds)
        rows.append([variant.name, size, seconds, speed, extra, theirs, difference])
    columns = [
        Column("variant"),
        Column("size"),
        Column("seconds a step", ".3f"),
        Column("tokens/s", ",.0f"),
        Column("over the baseline", "+.1%"),
        Column("published", "+.1%"),
        Column("ours − published", "+.1%"),
    ]
    note = (
        "Medians over the lines of a run but the first after each start, means over seeds; ±: standard error over"
        " seeds. Times compare only between runs on the same machines with nothing beside them."
    )
    return Table("time", "Time of a step", " ".join([note, *_without_published(page)]), columns, rows)


def _shares(page: Collection) -> Table:
    """Return a row for each size that was trained with several target shares."""
    rows = []
    inhibited = [variant for variant in page.variants if variant.method != "none"]
    for size in dict.fromkeys(variant.size for variant in inhibited):
        variants = [variant for variant in inhibited if variant.size == size]
        step = last_common_step([run for variant in variants for run in variant.seeds if held_out(run)])
        if step is None:
            continue
        losses: dict[float, Measured] = {}
        for variant in variants:
            loss = over_seeds([losses_of[step] for run in variant.seeds if (losses_of := held_out(run))])
            share = variant.runs[0].config["inhibition.target_share"]
            if loss is not None and (share not in losses or loss.value < losses[share].value):
                losses[share] = loss
        if len(losses) > 1:
            best = min(losses, key=lambda share: losses[share].value)
            tried = ", ".join(f"{share:.3g}" for share in sorted(losses))
            rows.append([size, tried, best, losses[best], step, published.BEST_SHARE.get(size)])
    columns = [
        Column("size"),
        Column("target shares tried"),
        Column("ours", ".1%", "best share"),
        Column("its held-out loss", ".4f", "best share"),
        Column("step", ",d", "best share"),
        Column("published", ".1%", "best share"),
    ]
    note = (
        "Ours is best by the loss on held-out text at the last step that all runs of the size have evaluated."
        " ±: standard error over seeds."
    )
    return Table("shares", "Share to inhibit", note, columns, rows)


# --- each run ----------------------------------------------------------------------------------------------------


def _runs(page: Collection) -> Table:
    def lately(key: str) -> Callable[[Run], float | None]:
        return lambda run: mean(numbers(last_tenth(run.training), key))

    def target(run: Run) -> float | None:
        return None if lately("observed_share")(run) is None else run.config["inhibition.target_share"]

    columns: list[tuple[Column, Callable[[Run], Any]]] = [
        (Column("run"), lambda run: run.name),
        (Column("step", ",d"), lambda run: run.step),
        (Column("tokens", ",d"), lambda run: run.tokens),
        (Column("training", ".4f", "LM loss"), lately("lm_loss")),
        (Column("held out, first", ".4f", "LM loss"), lambda run: first_and_last(run.evaluations, "held_out_loss")[0]),
        (Column("held out, last", ".4f", "LM loss"), lambda run: first_and_last(run.evaluations, "held_out_loss")[1]),
        (Column("observed", ".2%", "share"), lately("observed_share")),
        (Column("target", ".2%", "share"), target),
        (Column("gradient norm", ".3g"), lately("gradient_norm")),
        (Column("skipped steps", ",d"), skipped_steps),
        (Column("tokens/s", ",.0f"), lambda run: steady_median(run, "tokens_per_second")),
        (Column("memory, GiB", ".2f"), lambda run: max(numbers(run.training, "peak_memory_gib"), default=None)),
    ]
    note = (
        "LM loss in nats/token; of training, like observed share and gradient norm, the mean over the last tenth of the"
        " steps so far. tokens/s: median. Memory: the largest of a rank."
    )
    return filled("runs", "Each run", note, columns, ((run,) for run in page.runs))


def skipped_steps(run: Run) -> int:
    """Return how many batches were consumed without changing a weight."""
    line = run.training[-1] if run.training else {}
    return line.get("step", 0) - line.get("applied_steps", line.get("step", 0))


def _layers(page: Collection) -> Table:
    keys = {"top_share_score": ".2f", "mean_s": ".4f", "kurtosis": ".2f", "dead_share": ".1%"}
    rows = []
    are_compared = any(run.comparison_layers for run in page.runs)
    for run in page.runs:
        inhibited = "no" if run.method == "none" else "yes"
        layers = [(layer, layer_key, inhibited) for layer in run.layers if run.evaluations]
        layers += [(layer, comparison_key, "no") for layer in run.comparison_layers]
        for layer, key_of, is_inhibited in sorted(layers, key=lambda row: row[0]):
            pairs = [first_and_last(run.evaluations, key_of(layer, key)) for key in keys]
            first_s, last_s = pairs[1]
            ratio = last_s / first_s if first_s and last_s is not None else None
            tau = first_and_last(run.training, layer_key(layer, "tau"))[1] if run.has_threshold else None
            values = [value for pair in pairs for value in pair]
            rows.append([run.name, layer, is_inhibited if are_compared else None, *values[:4], ratio, *values[4:], tau])
    columns = [Column("run"), Column("layer", "d"), Column("inhibited")]
    for key, form in keys.items():
        group = described("evaluation", layer_key(0, key)).title
        columns += [Column("first", form, group), Column("last", form, group)]
        if key == "mean_s":
            columns.append(Column("last / first", ".0%", group))
    columns.append(Column("tau, last", ".3g"))
    note = "At the first and the last evaluation on held-out text, inhibition off. tau: of the newest training step."
    if are_compared:
        note += " Layers that are not inhibited stand for comparison (inhibition.guard)."
    return Table("layers", "Each layer", note, columns, rows)


def _sets(page: Collection) -> Table:
    """Return a row for each run and set of a mixture."""
    rows = []
    for run in page.runs:
        line = run.training[-1] if run.training else {}
        for name in run.sets:
            losses = first_and_last(run.evaluations, f"held_out_loss/{name}")
            rows.append([run.name, name, *losses, line.get(f"tokens/{name}"), line.get(f"epochs/{name}")])
    columns = [
        Column("run"),
        Column("set"),
        Column("first", ".4f", "held-out loss"),
        Column("last", ".4f", "held-out loss"),
        Column("tokens", ",d"),
        Column("epochs", ".3g"),
    ]
    note = "LM loss on the held-out text of each set of the mixture, nats/token; tokens and epochs of it trained on."
    return Table("sets", "Each set of the mixture", note, columns, rows)


def _texts(page: Collection) -> Table:
    """Return a row for each run and text of `evaluation.texts`."""
    rows = []
    for run in page.runs:
        for name in run.texts:
            lines = [line for line in run.evaluations if f"text_loss/{name}" in line]  # a resumed run may have added it
            losses = first_and_last(lines, f"text_loss/{name}")
            bits = first_and_last(lines, f"text_bits_per_byte/{name}")
            perplexity = None if losses[1] is None or losses[1] > 700 else math.exp(losses[1])
            rows.append([run.name, name, *losses, perplexity, *bits])
    columns = [
        Column("run"),
        Column("text"),
        Column("first", ".4f", "LM loss"),
        Column("last", ".4f", "LM loss"),
        Column("perplexity, last", ".4g"),
        Column("first", ".4f", "bits a byte"),
        Column("last", ".4f", "bits a byte"),
    ]
    note = "Texts of evaluation.texts, at the first and the last held-out evaluation. LM loss in nats/token."
    return Table("texts", "Each evaluated text", note, columns, rows)


# --- what was run ------------------------------------------------------------------------------------------------


def differences(page: Collection) -> Table:
    """Return a row for each run, with the keys of the configuration that differ between runs."""
    keys = [key for key in differing([run.config for run in page.runs]) if key not in _PLACES]
    rows = [[run.name, *(_plain(run.config.get(key)) for key in keys)] for run in page.runs]
    note = "Keys of docs/run-files.md; all others are the same in all runs."
    return Table("configurations", "What differs between the runs", note, [Column("run"), *map(Column, keys)], rows)


def machines(page: Collection) -> Table:
    """Return a row for each start or resume."""

    def logged(key: str) -> Callable[[Run, dict], Any]:
        return lambda run, line: line.get(key)

    def commit(run: Run, line: dict) -> str | None:
        git = line.get("git") or {}
        return f"{git['commit'][:12]}{' and changes' if git.get('changed') else ''}" if git.get("commit") else None

    def versions(run: Run, line: dict) -> str:
        return ", ".join(f"{name} {version}" for name, version in line.get("versions", {}).items())

    columns: list[tuple[Column, Callable[[Run, dict], Any]]] = [
        (Column("run"), lambda run, line: run.name),
        (Column("from step", ",d"), lambda run, line: line["step"]),
        *((Column(key), logged(key)) for key in ("time", "host")),
        *((Column(key, ",d"), logged(key)) for key in ("hosts", "ranks")),
        *((Column(key), logged(key)) for key in ("device", "launcher")),
        (Column("precision"), lambda run, line: run.config.get("training.precision")),
        (Column("parameters", ",d"), logged("parameters")),
        (Column("git commit"), commit),
        (Column("versions"), versions),
    ]
    note = "A line for each time that a run was started or resumed."
    starts = ((run, line) for run in page.runs for line in run.starts)
    return filled("machines", "Machines and versions", note, columns, starts)


def _plain(value: Any) -> str | None:
    return None if value is None else json.dumps(value) if isinstance(value, list | dict) else str(value)


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
