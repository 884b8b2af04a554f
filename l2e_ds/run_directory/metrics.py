"""Read metrics.jsonl, also of a run that is still writing it. metric_table.yaml says what each key means.

A last line that is still being written does not count. Imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from l2e_ds.errors import DataError
from l2e_ds.run_directory.json_lines import json_lines
from l2e_ds.run_directory.metric_table import KINDS, Type, find
from l2e_ds.system.files import write_whole

FILE = "metrics.jsonl"
_READ = ("start", "train", "evaluation", "guard")  # the kinds of lines that report, summary and study take in
_MOST = 2**63  # of a count
_LARGEST = 1e38  # near float32's: the arithmetic of charts and means could overflow with larger numbers
_CHECKS: dict[Type, tuple[Callable[[Any], bool], str]] = {
    "number": (lambda value: type(value) in (int, float, type(None)), "a number or null"),
    "count": (lambda value: type(value) is int and 0 <= value < _MOST, "a whole number"),
    "text": (lambda value: isinstance(value, str), "text"),
    "mapping": (lambda value: isinstance(value, dict), "a mapping"),
    "any": (lambda value: True, "anything"),
}


def read_metrics(path: Path, kind: str) -> list[dict]:
    """Return the lines of one kind, in order. Raises DataError for a line that no run writes, and OSError."""
    found = []
    for place, line in _lines(path):
        if line["kind"] == kind:
            if not isinstance(line.get("step"), int) or line["step"] < 0:
                raise _broken(path, place)
            found.append(line)
    return found


def read_lines(directory: Path) -> list[dict[str, Any]]:
    """Return a run's lines of the kinds start, train, evaluation and guard, in order, checked.

    A number that is not finite, or beyond what float32 holds, is None. Raises DataError naming file and line, and
    OSError.
    """
    path = directory / FILE
    lines = ((place, line) for place, line in _lines(path) if line["kind"] in _READ)
    return [_checked(line, f"{path}:{place}") for place, line in lines]


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the lines with their places in the file, counted from 1. Raises DataError."""
    for place, _, line in json_lines(path):
        if not isinstance(line, dict) or not isinstance(line.get("kind"), str):
            raise _broken(path, place)
        yield place, line


def _broken(path: Path, place: int) -> DataError:
    return DataError(f"{path}:{place}: is no line of a run's metrics")


def _checked(line: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the line with None for numbers that are not finite.

    A key that the table lacks, as in the lines of an older version, must hold a number. Raises DataError.
    """
    kind = line["kind"]
    for metric in KINDS[kind].metrics:
        if metric.needed and metric.key not in line:
            raise DataError(f"{where}: has no {metric.key}")
    for key, value in line.items():
        if key == "kind":
            continue
        metric_of_key = find(kind, key)
        wanted: Type = metric_of_key.type if metric_of_key else "any" if kind == "start" else "number"
        holds, allowed = _CHECKS[wanted]
        if not holds(value):
            raise DataError(f"{where}: {key}: got {value!r}, must be {allowed}")
    return {key: finite(value) for key, value in line.items()}


def finite(value: Any) -> Any:
    """Return a value, but None for a number that no chart and no mean can take."""
    return None if isinstance(value, int | float) and not abs(value) <= _LARGEST else value


# --- values in the lines -----------------------------------------------------------------------------------------


def of_kind(lines: Iterable[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Return the lines of one kind."""
    return [line for line in lines if line["kind"] == kind]


def after_first_intervals(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return lines of training without the first after each start, in which things are compiled and caches filled."""
    kept, is_first = [], True
    for line in lines:
        if line["kind"] == "start":
            is_first = True
        elif line["kind"] == "train":
            if not is_first:
                kept.append(line)
            is_first = False
    return kept


def mean_of_last_tenth(lines: Sequence[dict], key: str) -> float | None:
    """Return the mean of a number over the last tenth of the steps so far, or None if no line of them has it.

    A line counts as often as it has steps there: those since the line before.
    """
    begin = 0.9 * lines[-1]["step"] if lines else 0
    total = count = 0.0
    for before, line in zip([0, *(line["step"] for line in lines)], lines, strict=False):
        steps, value = line["step"] - max(before, begin), number(line, key)
        if steps > 0 and value is not None:
            total, count = total + steps * value, count + steps
    return total / count if count else None


def layer_key(layer: int, name: str) -> str:
    """Return the key of a metric of one of `inhibition.layers`."""
    return f"layer{layer}/{name}"


def comparison_key(layer: int, name: str) -> str:
    """Return the key of a metric of a comparison layer, which no mean over `layers/NAME` includes."""
    return f"comparison_layer{layer}/{name}"


def layers_of(lines: Iterable[Mapping[str, Any]], key: Callable[[int, str], str] = layer_key) -> list[int]:
    """Return the layers of which the lines have metrics under such keys, in order."""
    begin = key(0, "").partition("0/")[0]
    return sorted({int(found[1]) for line in lines for name in line if (found := re.match(rf"{begin}(\d+)/", name))})


def texts_of(line: Mapping[str, Any]) -> list[str]:
    """Return the names of the texts of `evaluation.texts` whose loss a line has."""
    return [key.partition("/")[2] for key in line if key.startswith("text_loss/")]


def number(line: Mapping[str, Any], key: str) -> float | None:
    """Return a number of a line, or None if it has none. `layers/NAME` is the mean over its layers, or None if one of
    them has none."""
    if key.startswith("layers/"):
        ending = key.removeprefix("layers")
        own = [number(line, name) for name in line if name.startswith("layer") and name.endswith(ending)]
        values = [value for value in own if value is not None]
        return mean(values) if len(values) == len(own) else None
    value = line.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def numbers(lines: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    """Return the numbers under a key, of those lines that have one."""
    return [value for line in lines if (value := number(line, key)) is not None]


def mean(values: Iterable[float]) -> float | None:
    """Return the mean, or None of no values."""
    found = list(values)
    return sum(found) / len(found) if found else None


def first_and_last(lines: Sequence[dict], key: str) -> tuple[float | None, float | None]:
    """Return the numbers under a key in the first and the last line, or None for each that is not there."""
    return (number(lines[0], key), number(lines[-1], key)) if lines else (None, None)


def keep_lines(path: Path, is_kept: Callable[[str, int], bool]) -> None:
    """Remove the lines for whose kind ("" if they have none) and step is_kept is False, and a line cut off by a kill.
    Raises OSError."""
    if not path.exists():
        return
    kept = []
    for _, raw, line in json_lines(path):
        with suppress(KeyError, TypeError, AttributeError):
            if is_kept(line.get("kind", ""), line["step"]):
                kept.append(raw.decode() + "\n")
    write_whole(path, "".join(kept))


def evaluated_steps(directory: Path) -> dict[str, set[int]]:
    """Return the steps at which a run has lines of the kinds evaluation and tasks, by kind. Raises OSError."""
    path = directory / FILE
    found: dict[str, set[int]] = {"evaluation": set(), "tasks": set()}
    for _, _, line in json_lines(path) if path.is_file() else ():
        with suppress(KeyError, TypeError):  # a line that no run writes
            if line["kind"] in found:
                found[line["kind"]].add(line["step"])
    return found
