"""Fill page.html, the template of a report, which escapes all text that comes from files."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

import l2e_ds
from l2e_ds.report import GENERATOR, curves
from l2e_ds.report.runs import Collection, Run, Variant
from l2e_ds.report.statistics import held_out, last_common_step, loss_difference, steady_median
from l2e_ds.report.tables import Table, text_of
from l2e_ds.report.warnings import Notice
from l2e_ds.run_directory.metrics import first_and_last, last_tenth, mean, numbers
from l2e_ds.system.templates import template

_AFTER = ("configurations", "machines")  # tables of the last part
_OF_ANALYSES = ("false_killing",)
_FILE_ONLY = ("evaluations",)
_MOST_FACTS = 8
_METHODS = {"none": "plain", "l2e": "L2E", "memel": "MEmeL"}


@dataclass(frozen=True)
class Figure:
    """A figure of an analysis. source: the image as a data: address."""

    title: str
    source: str


@dataclass(frozen=True)
class Analysis:
    """The figures of an analysis. folder: that of its tables."""

    folder: Path
    figures: list[Figure]


def render(
    page: Collection,
    tables: Sequence[Table],
    notices: Sequence[Notice],
    analyses: Sequence[Path],
    beside: str,
    now: datetime,
) -> str:
    """Return the whole page. beside: the name of the folder of the tables' files; now: the time to show."""
    return template(Path(__file__).with_suffix(".html")).render(
        generator=GENERATOR,
        version=l2e_ds.__version__,
        made=now,
        title=_title(page),
        sentence=_sentence(page),
        facts=_facts(page),
        notices=[(kind, list(group)) for kind, group in groupby(notices, key=lambda notice: notice.kind)],
        legend=_legend(page),
        layers=curves.layer_looks(page),
        charts=[(chart, Markup(chart.svg)) for chart in curves.all_charts(page)],
        tables=[table for table in tables if table.name not in (*_AFTER, *_OF_ANALYSES, *_FILE_ONLY)],
        after=[table for table in tables if table.name in _AFTER],
        beside=beside,
        of_analyses=[table for table in tables if table.name in _OF_ANALYSES],
        analyses=[_analysis(folder) for folder in analyses],
        configs=[(run, yaml.safe_dump(_nested(run.config), sort_keys=False)) for run in page.runs],
    )


# --- head --------------------------------------------------------------------------------------------------------


def _title(page: Collection) -> str:
    if page.titles:
        return "; ".join(page.titles)
    names = [variant.name for variant in page.variants]
    return ", ".join(names) if len(names) <= 4 else f"{len(page.runs)} runs"


def _sentence(page: Collection) -> str:
    models = ", ".join(dict.fromkeys(run.model for run in page.runs))
    methods = ", ".join(dict.fromkeys(_METHODS[variant.method] for variant in page.variants))
    seeds = sorted({run.seed for run in page.runs})
    which = f"{len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"
    return f"Pretraining of {models}; {methods}; {which}."


def _facts(page: Collection) -> list[tuple[str, str]]:
    """Return (label, text) of the results that a reader looks for first."""
    return _facts_of_run(page.runs[0]) if len(page.runs) == 1 else _facts_of_runs(page)


def _facts_of_run(run: Run) -> list[tuple[str, str]]:
    first, last = first_and_last(run.evaluations, "held_out_loss")
    shares = numbers(last_tenth(run.training), "observed_share")
    speed = steady_median(run, "tokens_per_second")
    facts = [("held-out loss", f"{_loss(first)} → {_loss(last)}" if run.evaluations else "–")]
    if shares:
        facts.append(("observed share", f"{mean(shares):.2%} (target {run.config['inhibition.target_share']:.2%})"))
    facts += [("steps", f"{run.step:,} of {run.steps:,}"), ("tokens", f"{run.tokens:,}")]
    return facts + ([("tokens/s", f"{speed:,.0f}")] if speed is not None else [])


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def _facts_of_runs(page: Collection) -> list[tuple[str, str]]:
    done = sum(run.step >= run.steps for run in page.runs)
    tokens = sorted({run.tokens for run in page.runs})
    facts = [
        ("runs finished", f"{done} of {len(page.runs) + len(page.waiting)}"),
        ("tokens a run", " to ".join(f"{count:,}" for count in dict.fromkeys((tokens[0], tokens[-1])))),
    ]
    step = last_common_step([run for run in page.runs if held_out(run)])
    if step is not None and len({run.model for run in page.runs}) == 1:
        loss, name = min((losses[step], run.name) for run in page.runs if (losses := held_out(run)))
        facts.append((f"lowest held-out loss at step {step:,}, {name}", f"{loss:.4f}"))
    for variant in page.variants:
        difference = loss_difference(page, variant)
        base = page.baseline_variant(variant)
        if difference is not None and base is not None and len(facts) < _MOST_FACTS:
            text = text_of(difference[0].difference, "+.4f")
            facts.append((f"held-out loss, {variant.name} − {base.name}", text))
    return facts


def _legend(page: Collection) -> list[tuple[curves.Look, Variant]]:
    """Return the look of each variant, or nothing if there is only one run."""
    looks = curves.looks(page.variants)
    return list(zip(looks, page.variants, strict=True)) if len(page.runs) > 1 else []


# --- the rest ----------------------------------------------------------------------------------------------------


def _analysis(folder: Path) -> Analysis:
    figures = []
    for path in sorted((folder / "figures").glob("*.svg")):
        drawing = path.read_text(encoding="utf-8").replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
        data = base64.b64encode(drawing.encode()).decode("ascii")
        figures.append(Figure(path.stem.replace("_", " ").replace("-", " "), f"data:image/svg+xml;base64,{data}"))
    return Analysis(folder, figures)


def _nested(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with dotted keys as sections."""
    sections: dict[str, Any] = {}
    for key, value in config.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return sections
