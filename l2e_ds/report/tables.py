"""The tables of a report.

A run that is not finished is shown as far as it is. A value that a run does not have is left empty.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from l2e_ds.report import published
from l2e_ds.report.runs import Collection, Run, differing
from l2e_ds.report.statistics import (
    Measured,
    comparable_losses,
    last_common_step,
    loss_difference,
    over_seeds,
    paired,
    steady_median,
)
from l2e_ds.report.table import Column, Table, about_errors, filled
from l2e_ds.report.task_tables import benchmarks, evaluations, without_published
from l2e_ds.run_directory.metric_table import described
from l2e_ds.run_directory.metrics import comparison_key, first_and_last, last_tenth, layer_key, mean, numbers

_PLACES = ("training.run_directory", "data.cache")


def all_tables(page: Collection) -> list[Table]:
    """Return the tables that have rows, without empty columns, in the order of the page."""
    tables = [
        _variants(page),
        benchmarks(page),
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
    for variant, size in zip(page.variants, page.shown_sizes(), strict=True) if len(page.runs) > 1 else ():
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
        " of runs with the same seed, at the last step that all pairs have. MS, mean S and kurtosis are means over the"
        " layers, on held-out text."
    )
    title = "Loss on held-out text, and what it is compared with"
    return Table("variants", title, " ".join([note, *about_errors(rows)]), columns, rows)


_SCORES = {"layers/top_share_score": ".2f", "layers/mean_s": ".4f", "layers/kurtosis": ".2f"}


# --- time, shares ------------------------------------------------------------------------------------------------


def _time(page: Collection) -> Table:
    rows = []
    for variant, size in zip(page.variants, page.shown_sizes(), strict=True):
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
        "Medians over the lines of a run but the first after each start, means over seeds. Times compare only between"
        " runs on the same machines with nothing beside them."
    )
    notes = [note, *about_errors(rows), *without_published(page)]
    return Table("time", "Time of a step", " ".join(notes), columns, rows)


def _shares(page: Collection) -> Table:
    """Return a row for each size that was trained with several target shares."""
    rows = []
    inhibited = [variant for variant in page.variants if variant.method != "none"]
    for size in dict.fromkeys(variant.size for variant in inhibited):
        found = comparable_losses([variant for variant in inhibited if variant.size == size])
        if found is None:
            continue
        losses: dict[float, Measured] = {}
        for variant, loss in found.losses:
            share = variant.runs[0].config["inhibition.target_share"]
            if share not in losses or loss.value < losses[share].value:
                losses[share] = loss
        if len(losses) > 1:
            best = min(losses, key=lambda share: losses[share].value)
            tried = ", ".join(f"{share:.3g}" for share in sorted(losses))
            rows.append([size, tried, best, losses[best], found.step, published.BEST_SHARE.get(size)])
    columns = [
        Column("size"),
        Column("target shares tried"),
        Column("ours", ".1%", "best share"),
        Column("its held-out loss", ".4f", "best share"),
        Column("step", ",d", "best share"),
        Column("published", ".1%", "best share"),
    ]
    note = (
        "Ours is best by the loss on held-out text, over the seeds that all shares of the size have, at the last step"
        " that these runs have evaluated."
    )
    return Table("shares", "Share to inhibit", " ".join([note, *about_errors(rows)]), columns, rows)


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
