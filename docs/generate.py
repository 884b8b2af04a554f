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

from l2e_ds.config.sections import RunConfig, SetConfig, SourceConfig, TextConfig
from l2e_ds.run_directory.metric_table import KINDS, Metric

DOCS = Path(__file__).resolve().parent
SIGNS = {Gt: ">", Ge: ">=", Lt: "<", Le: "<="}


def run_files() -> str:
    parts = [
        "# Run files\n",
        "A run file describes one run; `l2e-ds init` writes one. Keys that it does not give have the defaults below:\n",
        "```yaml",
        "model: {name: pythia-70m}",
        "data: {source: indexed, path: PREFIX, tokenizer: tokenizer.json}",
        "training: {steps: 14300, micro_batch: auto}",
        "inhibition: {start: 0.3, warmup: 0.2}",
        "```\n",
        "A run file is YAML 1.2 (`0100` is 100; `no`, `24:00:00` and dates are text), with merge keys (`<<: *common`)",
        "and `_` between digits. Unknown keys, wrong types and values out of range are refused.\n",
        "`section.key=value` on the command line overrides one value. Where the type below is text, the value is taken",
        "literally; where the key allows it, `null` or an empty value unsets it, and `[a, b]` is a list. The values of",
        "all other keys are read as YAML.\n",
        "Paths may begin with `~` and hold `$VARIABLES`; relative ones count from the working directory.\n",
    ]
    models = {section: field.annotation for section, field in RunConfig.model_fields.items()}
    names = list(models)
    models["data.sets"] = SetConfig
    names.insert(names.index("data") + 1, "data.sets")
    models["evaluation.texts"] = TextConfig
    names.append("evaluation.texts")
    for section in names:
        model = models[section]
        fields = dict(model.model_fields)
        parts += [f"## {section}\n", f"{model.__doc__}\n"]
        if section in ("data.sets", "evaluation.texts"):
            fields = {key: entry for key, entry in fields.items() if key not in SourceConfig.model_fields}
            parts += ["The keys `source` to `max_tokens` of [data](#data), and:\n"]
        parts += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key, entry in fields.items():
            default = "required" if entry.is_required() else f"`{_yaml(entry.default)}`"
            meaning = " ".join(entry.description.split()).replace("|", "\\|")
            limits = _limits(entry.metadata)
            kind = _type(entry.annotation) + (f", {' and '.join(limits)}" if limits else "")
            parts.append(f"| `{key}` | {kind} | {default} | {meaning} |")
        parts.append("")
    return _linked("\n".join(parts))


def _linked(text: str) -> str:
    return re.sub(r"\bdocs/([\w-]+\.md)", r"[\1](\1)", text)


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
        "`metrics.jsonl` in the run directory has one JSON object per line, with `kind`, `step` (the global batches",
        "consumed so far) and the keys of its kind; evaluations and tasks also have `tokens`.",
        '"Over steps" says how the steps since the line before are reduced: their mean, their sum, or the newest one',
        'alone; "so far": since the run began.\n',
    ]
    for name, kind in KINDS.items():
        told_above = () if name == "train" else ("step", "tokens")
        metrics = [m for m in kind.metrics if m.key not in told_above and not m.key.startswith("comparison_")]
        is_reduced = any(metric.reduction for metric in metrics)
        heads = ["key", "unit", *(["over steps"] if is_reduced else []), "what"]
        has_sources = any(metric.source for metric in metrics)
        heads += ["where it comes from"] if has_sources else []
        parts += [f"## kind: {name}\n", textwrap.fill(f"Written {kind.when}. {kind.note}", 120) + "\n"]
        parts += [_row(heads), "|---" * len(heads) + "|"]
        parts += [_row(_metric_cells(metric, is_reduced)[: len(heads)]) for metric in metrics]
        parts.append("")
    parts += [
        "## Monitors\n",
        "Numbers of all kinds but `start` also go to the CSV files, TensorBoard and Weights & Biases that the section",
        "`logging` asks for, as `KIND/KEY` at x = step. Where a run resumes from an earlier checkpoint, all files are",
        "cut back to it; Weights & Biases keeps what it was sent, so it has repeated steps twice.",
        "",
    ]
    return _linked("\n".join(parts))


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def _metric_cells(metric: Metric, is_reduced: bool) -> list[str]:
    reduction = [metric.reduction] if is_reduced else []
    return [f"`{metric.key}`", metric.unit, *reduction, metric.description, metric.source]


PAGES = {"run-files.md": run_files, "metrics.md": metrics_page}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (DOCS / name).write_text(make(), encoding="utf-8")
