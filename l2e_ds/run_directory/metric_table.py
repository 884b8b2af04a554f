"""Read metric_table.yaml, which describes every key of metrics.jsonl: its unit, its reduction and where it comes from.

To add a metric, write its value and add one entry there: docs/metrics.md is made from the entries, `read_lines` checks
lines by them, the report takes its labels and units from them, and the tests refuse a line with a key that has none.
Imports nothing heavy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

Reduction = Literal["mean", "sum", "newest", "so far", ""]
"""How the steps since the line before are reduced; "so far": since the run began; "": there is nothing to reduce."""

Type = Literal["number", "count", "text", "mapping", "any"]
"""The type of a value. A number may be null, where it was not finite; a count is a whole number from 0 on."""


@dataclass(frozen=True)
class Metric:
    """Describes one key, or one pattern of keys, of the lines of a kind.

    `label` is its name in the report (default: the last part of the key); a line without a `needed` key is refused by
    `read_lines`.
    """

    key: str
    description: str
    unit: str = ""
    reduction: Reduction = ""
    source: str = ""
    label: str = ""
    type: Type = "number"
    needed: bool = False

    @property
    def title(self) -> str:
        """The name for readers, in lower case if it begins with a word."""
        return self.label or self.key.rpartition("/")[2].replace("_", " ")


@dataclass(frozen=True)
class Kind:
    """Describes the lines of one kind. `when` says when they are written, `note` what else one must know to read
    them."""

    when: str
    metrics: tuple[Metric, ...]
    note: str = ""


def _kind(when: str, metrics: dict[str, dict[str, Any]], note: str = "") -> Kind:
    return Kind(when, tuple(Metric(key, **fields) for key, fields in metrics.items()), note)


_TABLE = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
KINDS: dict[str, Kind] = {name: _kind(**fields) for name, fields in _TABLE.items()}
"""The kinds of lines by their name, which is the value of a line's key `kind`."""

_PLACEHOLDERS = {"layerI": r"layer\d+", "NAME": ".+", "TASK": ".+", "N": r"\d+", "METRIC": ".+"}


@cache
def _patterns(kind: str) -> list[tuple[re.Pattern[str], Metric]]:
    def pattern(key: str) -> str:
        parts = re.split(r"(layerI|NAME|TASK|METRIC|N(?=-shot))", key)
        return "".join(_PLACEHOLDERS.get(part, re.escape(part)) for part in parts)

    return [(re.compile(pattern(metric.key)), metric) for metric in KINDS[kind].metrics]


@cache
def find(kind: str, key: str) -> Metric | None:
    """Return the entry that describes this key of a line of this kind, or None. Raises KeyError for an unknown kind.

    The report's `layers/NAME`, the mean over the hooked layers, is described as `layerI/NAME`.
    """
    if key.startswith("layers/"):
        key = f"layer0/{key.removeprefix('layers/')}"
    return next((metric for pattern, metric in _patterns(kind) if pattern.fullmatch(key)), None)


def described(kind: str, key: str) -> Metric:
    """Return the entry that describes this key of a line of this kind. Raises KeyError if there is none."""
    metric = find(kind, key)
    if metric is None:
        raise KeyError(f"kind: {kind}, {key}: is not in the table of metrics (l2e_ds/run_directory/metric_table.yaml)")
    return metric
