"""Fill page.html, the template of a report, which escapes all text that comes from files."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from markupsafe import Markup, escape

import l2e_ds
from l2e_ds.report import GENERATOR, curves
from l2e_ds.report.drawing import AXES_INSET, five_digits
from l2e_ds.report.runs import Collection, Run
from l2e_ds.report.statistics import comparable_losses, loss_difference, steady_median
from l2e_ds.report.table import Table, about_errors, text_of
from l2e_ds.report.warnings import Notice
from l2e_ds.run_directory.configuration import read_config
from l2e_ds.run_directory.metrics import first_and_last, mean_of_last_tenth
from l2e_ds.system.files import REPOSITORY
from l2e_ds.system.templates import template

_AFTER = ("configurations", "machines")  # tables of the last part
_OF_ANALYSES = ("false_killing",)
_FILE_ONLY = ("evaluations",)  # tables that are too long for the page
_MOST_FACTS = 8
_Fact = tuple[str, Any, str]  # label, value and the value's format, as of a cell of a table
_METHODS = {"none": "plain", "l2e": "L2E", "memel": "MEmeL"}


def render(
    collection: Collection,
    tables: Sequence[Table],
    notices: Sequence[Notice],
    analyses: Sequence[Path],
    output: Path,
    tables_folder: str,
) -> str:
    """Return the whole page.

    output: the page's file, to which links are relative. tables_folder: the name of the folder with the tables' files,
    which lies beside the page.
    """

    def linked(path: Path, text: str = "") -> Markup:
        """Return the path, or another text, as a link if there is such a file or folder."""
        words = escape(text or path)
        address = quote(os.path.relpath(path, output.parent))
        return Markup('<a href="{}">{}</a>').format(address, words) if path.exists() else words

    def documented(text: str) -> Markup:
        """Return a text with links to the pages of the documentation, where this is a checkout that has them."""
        return Markup(re.sub(r"docs/[\w-]+\.md", lambda name: linked(REPOSITORY / name[0], name[0]), escape(text)))

    runs, variants = collection.runs, collection.variants
    configs = [(run, read_config(run.directory).model_dump(mode="json")) for run in runs]
    names = [variant.name for variant in variants]
    facts = _facts_of_run(runs[0]) if len(runs) == 1 else _facts_of_runs(collection)
    file = Path(__file__).with_suffix(".html")
    return template(file, linked=linked, documented=documented, five_digits=five_digits).render(
        generator=GENERATOR,
        version=l2e_ds.__version__,
        made=datetime.now(timezone.utc),
        title="; ".join(collection.titles) or (", ".join(names) if len(names) <= 4 else f"{len(runs)} runs"),
        sentence=_sentence(collection),
        facts=[(label, text_of(cell, form)) for label, cell, form in facts],
        about_facts=" ".join(about_errors(cell for _, cell, _ in facts)),
        notices=[(kind, list(group)) for kind, group in groupby(notices, key=lambda notice: notice.kind)],
        legend=list(zip(curves.looks(variants), variants, strict=True)) if len(runs) > 1 else [],
        layers=curves.layer_looks(collection),
        charts=[(chart, Markup(chart.svg)) for chart in curves.all_charts(collection)],
        axes_inset=AXES_INSET,
        tables=[table for table in tables if table.name not in (*_AFTER, *_OF_ANALYSES, *_FILE_ONLY)],
        after=[table for table in tables if table.name in _AFTER],
        tables_folder=tables_folder,
        of_analyses=[table for table in tables if table.name in _OF_ANALYSES],
        analyses=[(folder, _figures(folder)) for folder in analyses],
        configs=[(run, yaml.safe_dump(config, sort_keys=False)) for run, config in configs],
    )


def _sentence(collection: Collection) -> str:
    models = ", ".join(dict.fromkeys(run.model for run in collection.runs))
    methods = ", ".join(dict.fromkeys(_METHODS[variant.method] for variant in collection.variants))
    seeds = sorted({run.seed for run in collection.runs})
    which = f"{len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"
    return f"Pretraining of {models}; {methods}; {which}."


def _facts_of_run(run: Run) -> list[_Fact]:
    first, last = first_and_last(run.evaluations, "held_out_loss")
    share = mean_of_last_tenth(run.training, "observed_share")
    speed = steady_median(run, "tokens_per_second")
    facts: list[_Fact] = [("held-out loss", f"{_loss(first)} → {_loss(last)}" if run.evaluations else None, "")]
    if share is not None:
        target = run.config["inhibition.target_share"]
        facts.append(("observed share", f"{share:.2%} (target {target:.2%})", ""))
    facts += [("steps", f"{run.step:,} of {run.steps:,}", ""), ("tokens", run.tokens, ",d")]
    return facts + ([("tokens/s", speed, ",.0f")] if speed is not None else [])


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def _facts_of_runs(collection: Collection) -> list[_Fact]:
    done = sum(run.step >= run.steps for run in collection.runs)
    tokens = sorted({run.tokens for run in collection.runs})
    facts: list[_Fact] = [
        ("runs finished", f"{done} of {len(collection.runs) + len(collection.waiting)}", ""),
        ("tokens a run", " to ".join(f"{count:,}" for count in dict.fromkeys((tokens[0], tokens[-1]))), ""),
    ]
    found = comparable_losses(collection.variants) if len({run.model for run in collection.runs}) == 1 else None
    losses, seeds, step = found or ([], [], 0)
    if len(losses) > 1:
        variant, loss = min(losses, key=lambda pair: pair[1].value)
        which = f"seed {seeds[0]}" if loss.n == 1 else f"mean over {loss.n} seeds"
        facts.append((f"lowest held-out loss at step {step:,}, {which}: {variant.name}", loss, ".4f"))
    for variant in collection.variants:
        difference = loss_difference(collection, variant)
        base = collection.baseline_variant(variant)
        if difference is not None and base is not None and len(facts) < _MOST_FACTS:
            facts.append((f"held-out loss, {variant.name} − {base.name}", difference[0].difference, "+.4f"))
    return facts


def _figures(folder: Path) -> list[tuple[str, str]]:
    """Return title and image, as a data: address, of each figure of an analysis."""
    figures = []
    for path in sorted((folder / "figures").glob("*.svg")):
        drawing = path.read_text(encoding="utf-8").replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
        data = base64.b64encode(drawing.encode()).decode("ascii")
        figures.append((path.stem.replace("_", " ").replace("-", " "), f"data:image/svg+xml;base64,{data}"))
    return figures
