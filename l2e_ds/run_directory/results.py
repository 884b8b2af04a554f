"""Read and write the results of evaluation tasks: `evaluations.jsonl` of a run directory, one evaluation a line.

docs/evaluation.md describes the keys of a line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2e_ds.errors import DataError
from l2e_ds.run_directory.json_lines import BROKEN, json_lines
from l2e_ds.system.provenance import utc_now, versions

FILE = "evaluations.jsonl"


@dataclass(frozen=True)
class TaskResult:
    """Holds one metric of one task at one step. stderr: of the mean over the task's documents, if there is one."""

    step: int | None
    task: str
    num_fewshot: int
    metric: str
    value: float
    stderr: float | None
    samples: int
    part_of: str | None
    limit: int | None
    cut: int
    precision: str | None

    @property
    def key(self) -> str:
        """The name of the metric in metrics.jsonl and results.csv: TASK/N-shot/METRIC."""
        return f"{self.task}/{self.num_fewshot}-shot/{self.metric}"


def read_results(run: Path) -> list[TaskResult]:
    """Return every metric of every task, ordered by step: of those in the same way the newest, if that is finite.

    The list is empty without a file. A line that was cut off, or is still being written, does not count. Raises
    DataError for a line that is no evaluation.
    """
    path = run / FILE
    if not path.is_file():
        return []
    newest: dict[tuple, TaskResult] = {}
    for number, _, evaluation in json_lines(path):
        if evaluation is BROKEN:  # the line before one that was appended after a kill
            continue
        try:
            found = results_of(evaluation)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise DataError(f"{path}:{number}: is no evaluation; remove the line") from None
        for result in found:
            way = (result.step, result.num_fewshot, result.limit, result.precision)
            newest[way, result.task, result.metric] = result
    known = [result for result in newest.values() if not math.isnan(result.value)]
    return sorted(known, key=lambda result: -1 if result.step is None else result.step)


def results_of(evaluation: dict[str, Any]) -> list[TaskResult]:
    """Return the results of one line; NaN is one that is not finite. Raises AttributeError, KeyError, TypeError or
    ValueError if it is no evaluation."""
    return [
        TaskResult(
            step=evaluation["step"],
            task=name,
            num_fewshot=task["num_fewshot"],
            metric=metric,
            value=math.nan if result["value"] is None else float(result["value"]),
            stderr=None if result["stderr"] is None else float(result["stderr"]),
            samples=task["samples"],
            part_of=task["part_of"],
            limit=evaluation["limit"],
            cut=task["cut"],
            precision=evaluation.get("precision"),
        )
        for name, task in evaluation["tasks"].items()
        for metric, result in task["metrics"].items()
    ]


def about(
    step: int | None,
    tokens: int | None,
    precision: str,
    tasks: Sequence[str],
    num_fewshot: int | None,
    include_path: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Return what a line says beside the results. tasks, num_fewshot, include_path: as they were asked for."""
    folders = [str(Path(folder).absolute()) for folder in include_path]
    asked = {"tasks": list(tasks), "num_fewshot": num_fewshot, "include_path": folders}
    common = {"step": step, "tokens": tokens, "time": utc_now(), "precision": precision}
    return {**common, "asked": asked, "versions": versions("l2e_ds", "lm_eval", "transformers", "torch", "datasets")}


def table(results: Sequence[TaskResult]) -> list[list[str]]:
    """Return rows of text for a terminal: task, shots, metric, value, standard error, documents."""
    return [
        [
            f"  {result.task}" if result.part_of else result.task,
            str(result.num_fewshot),
            result.metric,
            f"{result.value:.4f}",
            "" if result.stderr is None else f"{result.stderr:.4f}",
            f"{result.samples:,}",
        ]
        for result in results
    ]
