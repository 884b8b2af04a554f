"""The tables of a report. A run is shown as far as it is; a value that it does not have is left empty."""

from __future__ import annotations

import json
import math
from typing import Any

from l2e_ds.report import published, statistics
from l2e_ds.report.runs import Collection, differing
from l2e_ds.report.table import Column, Table, about_errors, table_of
from l2e_ds.report.task_tables import benchmarks, evaluations, without_published
from l2e_ds.run_directory.metric_table import described
from l2e_ds.run_directory.metrics import comparison_key, first_and_last, layer_key, mean_of_last_tenth, numbers

_PLACES = ("training.run_directory", "data.cache")
_SCORES = {"layers/top_share_score": ".2f", "layers/mean_s": ".4f", "layers/kurtosis": ".2f"}


def all_tables(collection: Collection) -> list[Table]:
    """Return the tables that have rows, in the order of the page."""
    makers = (
        *(_variants, benchmarks, _time, _shares, _runs, _layers, _sets, _texts),
        *(differences, machines, evaluations),
    )
    return [table for make in makers if (table := make(collection)).rows]


def _variants(collection: Collection) -> Table:
    """Return a row for each variant, if several runs are compared."""
    loss, against = "held-out loss", "against the baseline"
    rows: list[dict[Column, Any]] = []
    for variant in collection.variants if len(collection.runs) > 1 else ():
        evaluated = [run for run in variant.seeds if run.evaluations]
        step = statistics.last_common([statistics.held_out(run) for run in evaluated])
        lines = [line for run in evaluated for line in run.evaluations if line["step"] == step]
        difference, at = statistics.loss_difference(collection, variant) or (None, None)
        base = collection.baseline_variant(variant)
        rows.append(
            {
                Column("variant"): variant.name,
                Column("size"): variant.shown_size,
                Column("method"): variant.method,
                Column("seeds", "d"): len(variant.seeds),
                Column("mean", ".4f", loss): statistics.over_seeds(numbers(lines, "held_out_loss")),
                Column("step", ",d", loss): step,
                Column("difference", "+.4f", against): difference and difference.difference,
                Column("which", "", against): base and base.name,
                Column("step", ",d", against): at,
                **{
                    Column(described("evaluation", key).title, form): statistics.over_seeds(numbers(lines, key))
                    for key, form in _SCORES.items()
                },
            }
        )
    note = (
        "LM loss on held-out text in nats/token, at the last step that all seeds have evaluated; the difference is that"
        " of runs with the same seed, at the last step that all pairs have. MS, mean S and kurtosis are means over the"
        " layers, on held-out text."
    )
    title = "Loss on held-out text, and what it is compared with"
    return table_of("variants", title, " ".join([note, *_about_errors(rows)]), rows)


def _about_errors(rows: list[dict[Column, Any]]) -> list[str]:
    return about_errors(cell for row in rows for cell in row.values())


def _time(collection: Collection) -> Table:
    rows: list[dict[Column, Any]] = []
    for variant in collection.variants:
        seconds = statistics.over_seeds(statistics.steady_median(run, "step_seconds") for run in variant.seeds)
        if seconds is None:
            continue
        theirs = published.EXTRA_TIME.get((variant.method, variant.size)) if variant.is_published_method else None
        over = statistics.paired(collection, variant, lambda run: statistics.steady_median(run, "step_seconds"))
        extra = over and over.relative
        rows.append(
            {
                Column("variant"): variant.name,
                Column("size"): variant.shown_size,
                Column("seconds a step", ".3f"): seconds,
                Column("tokens/s", ",.0f"): statistics.over_seeds(
                    statistics.steady_median(run, "tokens_per_second") for run in variant.seeds
                ),
                Column("over the baseline", "+.1%"): extra,
                Column("published", "+.1%"): theirs,
                Column("ours − published", "+.1%"): extra.minus(theirs) if extra and theirs is not None else None,
            }
        )
    note = (
        "Medians over the lines of a run but the first after each start, means over seeds. Times compare only between"
        " runs on the same machines with nothing beside them."
    )
    notes = [note, *_about_errors(rows), *without_published(collection)]
    return table_of("time", "Time of a step", " ".join(notes), rows)


def _shares(collection: Collection) -> Table:
    """Return a row for each size that was trained with several target shares."""
    rows: list[dict[Column, Any]] = []
    group = "best share"
    inhibited = [variant for variant in collection.variants if variant.method != "none"]
    for size in dict.fromkeys(variant.size for variant in inhibited):
        found = statistics.comparable_losses([variant for variant in inhibited if variant.size == size])
        of_variants, _, step = found or ([], [], 0)
        losses: dict[float, statistics.Measured] = {}
        for variant, loss in of_variants:
            share = variant.runs[0].config["inhibition.target_share"]
            if share not in losses or loss.value < losses[share].value:
                losses[share] = loss
        if len(losses) > 1:
            best = min(losses, key=lambda share: losses[share].value)
            rows.append(
                {
                    Column("size"): size,
                    Column("target shares tried"): ", ".join(f"{share:.3g}" for share in sorted(losses)),
                    Column("ours", ".1%", group): best,
                    Column("its held-out loss", ".4f", group): losses[best],
                    Column("step", ",d", group): step,
                    Column("published", ".1%", group): published.BEST_SHARE.get(size),
                }
            )
    note = (
        "Ours is best by the loss on held-out text, over the seeds that all shares of the size have, at the last step"
        " that these runs have evaluated."
    )
    return table_of("shares", "Share to inhibit", " ".join([note, *_about_errors(rows)]), rows)


def _runs(collection: Collection) -> Table:
    rows: list[dict[Column, Any]] = []
    for run in collection.runs:
        lately = {key: mean_of_last_tenth(run.training, key) for key in ("lm_loss", "observed_share", "gradient_norm")}
        first, last = first_and_last(run.evaluations, "held_out_loss")
        observed, target = lately["observed_share"], run.config["inhibition.target_share"]
        rows.append(
            {
                Column("run"): run.name,
                Column("step", ",d"): run.step,
                Column("tokens", ",d"): run.tokens,
                Column("training", ".4f", "LM loss"): lately["lm_loss"],
                Column("held out, first", ".4f", "LM loss"): first,
                Column("held out, last", ".4f", "LM loss"): last,
                Column("observed", ".2%", "share"): observed,
                Column("target", ".2%", "share"): None if observed is None else target,
                Column("gradient norm", ".3g"): lately["gradient_norm"],
                Column("skipped steps", ",d"): run.skipped_steps,
                Column("tokens/s", ",.0f"): statistics.steady_median(run, "tokens_per_second"),
                Column("memory, GiB", ".2f"): max(numbers(run.training, "peak_memory_gib"), default=None),
            }
        )
    note = (
        "LM loss in nats/token; of training, like observed share and gradient norm, the mean over the last tenth of the"
        " steps so far. tokens/s: median. Memory: the largest of a rank."
    )
    return table_of("runs", "Each run", note, rows)


def _layers(collection: Collection) -> Table:
    rows: list[dict[Column, Any]] = []
    are_compared = any(run.comparison_layers for run in collection.runs)
    for run in collection.runs:
        layers = [(layer, layer_key, run.method != "none") for layer in run.layers if run.evaluations]
        layers += [(layer, comparison_key, False) for layer in run.comparison_layers]
        for layer, key_of, is_inhibited in sorted(layers, key=lambda row: row[0]):
            row: dict[Column, Any] = {
                Column("run"): run.name,
                Column("layer", "d"): layer,
                Column("inhibited"): ("yes" if is_inhibited else "no") if are_compared else None,
            }
            for key, form in {
                "top_share_score": ".2f",
                "mean_s": ".4f",
                "kurtosis": ".2f",
                "dead_share": ".1%",
            }.items():
                group = described("evaluation", layer_key(0, key)).title
                row |= _first_and_last(run.evaluations, key_of(layer, key), form, group)
                if key == "mean_s":
                    first, last = first_and_last(run.evaluations, key_of(layer, key))
                    row[Column("last / first", ".0%", group)] = last / first if first and last is not None else None
            tau = first_and_last(run.training, layer_key(layer, "tau"))[1] if run.has_threshold else None
            rows.append(row | {Column("tau, last", ".3g"): tau})
    note = "At the first and the last evaluation on held-out text, inhibition off. tau: of the newest training step."
    if are_compared:
        note += " Layers that are not inhibited stand for comparison."
    return table_of("layers", "Each layer", note, rows)


def _first_and_last(lines: list[dict], key: str, form: str, group: str) -> dict[Column, Any]:
    first, last = first_and_last(lines, key)
    return {Column("first", form, group): first, Column("last", form, group): last}


def _sets(collection: Collection) -> Table:
    """Return a row for each run and set of a mixture."""
    rows: list[dict[Column, Any]] = []
    for run in collection.runs:
        line = run.training[-1] if run.training else {}
        for name in run.sets:
            rows.append(
                {
                    Column("run"): run.name,
                    Column("set"): name,
                    **_first_and_last(run.evaluations, f"held_out_loss/{name}", ".4f", "held-out loss"),
                    Column("tokens", ",d"): line.get(f"tokens/{name}"),
                    Column("epochs", ".3g"): line.get(f"epochs/{name}"),
                }
            )
    note = "LM loss on the held-out text of each set of the mixture, nats/token; tokens and epochs of it trained on."
    return table_of("sets", "Each set of the mixture", note, rows)


def _texts(collection: Collection) -> Table:
    """Return a row for each run and text of `evaluation.texts`."""
    rows: list[dict[Column, Any]] = []
    for run in collection.runs:
        for name in run.texts:
            lines = [line for line in run.evaluations if f"text_loss/{name}" in line]  # a resumed run may have added it
            loss = lines[-1][f"text_loss/{name}"]
            rows.append(
                {
                    Column("run"): run.name,
                    Column("text"): name,
                    **_first_and_last(lines, f"text_loss/{name}", ".4f", "LM loss"),
                    Column("perplexity, last", ".4g"): None if loss is None or loss > 700 else math.exp(loss),
                    **_first_and_last(lines, f"text_bits_per_byte/{name}", ".4f", "bits a byte"),
                }
            )
    note = "Texts of evaluation.texts, at the first and the last held-out evaluation. LM loss in nats/token."
    return table_of("texts", "Each evaluated text", note, rows)


def differences(collection: Collection) -> Table:
    """Return a row for each run, with the keys of the configuration that differ between runs."""
    keys = [key for key in differing([run.config for run in collection.runs]) if key not in _PLACES]
    rows = [
        {Column("run"): run.name, **{Column(key): _plain(run.config.get(key)) for key in keys}}
        for run in collection.runs
    ]
    note = "Keys of docs/run-files.md; all others are the same in all runs."
    return table_of("configurations", "What differs between the runs", note, rows if keys else [])


def machines(collection: Collection) -> Table:
    """Return a row for each start or resume."""
    rows = [
        {
            Column("run"): run.name,
            Column("from step", ",d"): line["step"],
            **{Column(key): line.get(key) for key in ("time", "host")},
            **{Column(key, ",d"): line.get(key) for key in ("hosts", "ranks")},
            **{Column(key): line.get(key) for key in ("device", "launcher")},
            Column("precision"): run.config["training.precision"],
            Column("parameters", ",d"): line.get("parameters"),
            Column("git commit"): _commit(line.get("git") or {}),
            Column("versions"): ", ".join(f"{name} {version}" for name, version in line.get("versions", {}).items()),
        }
        for run in collection.runs
        for line in run.starts
    ]
    return table_of(
        "machines", "Machines and versions", "A line for each time that a run was started or resumed.", rows
    )


def _commit(git: dict[str, Any]) -> str | None:
    return f"{git['commit'][:12]}{' and changes' if git.get('changed') else ''}" if git.get("commit") else None


def _plain(value: Any) -> str | None:
    return None if value is None else json.dumps(value) if isinstance(value, list | dict) else str(value)
