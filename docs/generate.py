"""Writes docs/run-files.md from the docstrings and docs/metrics.md from the table of metrics; a test compares them.

usage: python docs/generate.py
"""

from __future__ import annotations

import re
import textwrap
import typing
from pathlib import Path
from types import UnionType

import yaml
from annotated_types import Ge, Gt, Le, Lt

from l2e_ds.config.sections import RunConfig, SetConfig, TextConfig
from l2e_ds.run_directory.metric_table import KINDS, Metric

DOCS = Path(__file__).resolve().parent
SIGNS = {Gt: ">", Ge: ">=", Lt: "<", Le: "<="}


def run_files() -> str:
    parts = [
        "# Run files\n",
        "A run file is YAML with the sections below. Unknown keys, wrong types and values out of range are refused.",
        "The rules are those of YAML 1.2 (`0100` is 100; `no`, `24:00:00` and dates are text), with merge keys",
        "(`<<: *common`) and `_` between digits; the same in study files.\n",
        "`section.key=value` on the command line overrides one value. Where the type below is text, the value is taken",
        "as it stands, with `#`, quotes and blanks, but for `null` or nothing where the default is `null`, and",
        "`[a, b]` where a list is allowed. All else is read as YAML.\n",
        "Paths may begin with `~` and hold `$VARIABLES`; relative ones count from the working directory.",
        "Made by `docs/generate.py`.\n",
    ]
    models = {section: field.annotation for section, field in RunConfig.model_fields.items()}
    names = list(models)
    models["data.sets"] = SetConfig
    names.insert(names.index("data") + 1, "data.sets")
    models["evaluation.texts"] = TextConfig
    names.append("evaluation.texts")
    for section in names:
        model = models[section]
        parts += [f"## {section}\n", f"{model.__doc__}\n", "| key | type | default | meaning |", "|---|---|---|---|"]
        for key, entry in model.model_fields.items():
            default = "required" if entry.is_required() else f"`{_yaml(entry.default)}`"
            meaning = " ".join(entry.description.split()).replace("|", "\\|")
            limits = _limits(entry.metadata)
            kind = _type(entry.annotation) + (f", {' and '.join(limits)}" if limits else "")
            parts.append(f"| `{key}` | {kind} | {default} | {meaning} |")
        parts.append("")
    return re.sub(r"\bdocs/([\w-]+\.md)", r"[\1](\1)", "\n".join(parts))


def _limits(metadata: list) -> list[str]:
    return [f"{SIGNS[type(m)]} {getattr(m, type(m).__name__.lower())}" for m in metadata if type(m) in SIGNS]


def _type(annotation: typing.Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        kind, *fields = typing.get_args(annotation)
        signs = _limits([limit for field in fields for limit in getattr(field, "metadata", ())])
        return f"{_type(kind)} {' and '.join(signs)}".rstrip()
    if origin in (typing.Union, UnionType):
        return " or ".join(_type(part) for part in typing.get_args(annotation) if part is not type(None))
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    if origin is list:
        return f"list of {_type(typing.get_args(annotation)[0])}"
    names = {int: "integer", float: "number", str: "text", bool: "true or false"}
    return names.get(annotation, "mapping")


def _yaml(value: object) -> str:
    """As it would stand in a run file."""
    if value == "":
        return "runs/NAME"
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def metrics_page() -> str:
    parts = [
        "# Metrics\n",
        "Names, units, reductions and where each number comes from. Lines of `metrics.jsonl`, one JSON object a line,",
        'with `kind` and the keys of its kind. "Over steps" says what becomes of the steps since the line before:',
        'their mean, their sum, or the newest one alone; "so far": since the run began.',
        "Made by `docs/generate.py` from `l2e_ds/run_directory/metric_table.yaml`.\n",
    ]
    for name, kind in KINDS.items():
        is_reduced = any(metric.reduction not in ("", "so far") for metric in kind.metrics)
        heads = ["key", "unit", *(["over steps"] if is_reduced else []), "what", "where it comes from"]
        parts += [f"## kind: {name}\n", textwrap.fill(f"Written {kind.when}. {kind.note}", 120) + "\n"]
        parts += [_row(heads), "|---" * len(heads) + "|"]
        parts += [_row(_metric_cells(metric, is_reduced)) for metric in kind.metrics]
        parts.append("")
    parts += [
        "## Monitors\n",
        "Numbers of all kinds but `start` also go to what the section `logging` asks for, as `KIND/KEY` at x = step:",
        "CSV files (one for each), TensorBoard, Weights & Biases. Where a run resumes from an earlier checkpoint, all",
        "files are cut back to it. What Weights & Biases was sent stays there: it has repeated steps twice. A run",
        "directory is one run of it, whose id the file `wandb-id` holds.",
        "",
    ]
    return "\n".join(parts)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def _metric_cells(metric: Metric, is_reduced: bool) -> list[str]:
    what = metric.description
    if not is_reduced and metric.reduction:
        what = f"{what} {metric.reduction}"
    return [f"`{metric.key}`", metric.unit, *([metric.reduction] if is_reduced else []), what, metric.source]


PAGES = {"run-files.md": run_files, "metrics.md": metrics_page}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (DOCS / name).write_text(make(), encoding="utf-8")
