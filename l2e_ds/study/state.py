"""What lies in a study's folder, and how far each run is.

STUDY/
  study.yaml        the study file, as it was read
  study.json        the index: every run with its levels, seed and baseline; written before anything runs
  configs/NAME.yaml the resolved configuration of each run, which is what is started
  runs/NAME/        run directories
  data/             tokenised text, shared by the runs
  logs/NAME.log     what the run said
  results.csv       one line a run
  slurm-1/          by --slurm: batch script, list of runs, code version, logs
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from l2e_ds.config.reading import checked, load_run_config
from l2e_ds.config.sections import Section
from l2e_ds.errors import ConfigError, DataError
from l2e_ds.run_directory import results
from l2e_ds.run_directory.json_lines import json_lines
from l2e_ds.run_directory.manifest import check_files
from l2e_ds.run_directory.names import checkpoint_name, newest_step
from l2e_ds.study.definition import INDEX, Evaluation, StudyFile

PRECISION = "fp32"  # of a study's evaluations: the default of `l2e-ds evaluate`


@dataclass(frozen=True)
class State:
    """step: of the newest checkpoint; trained: it is complete and the last one; missing: evaluations to be made yet."""

    begun: bool
    step: int
    steps: int
    trained: bool
    missing: tuple[Evaluation, ...]

    @property
    def is_done(self) -> bool:
        return self.trained and not self.missing

    def __str__(self) -> str:
        if self.is_done:
            return "done"
        if self.trained:
            return "not evaluated"
        if self.step:
            return f"at step {self.step}"
        return "begun" if self.begun else "not begun"


def run_directory(study: Path, name: str) -> Path:
    return study / "runs" / name


def config_file(study: Path, name: str) -> Path:
    return study / "configs" / f"{name}.yaml"


def state_of(directory: Path, steps: int, evaluations: Sequence[Evaluation]) -> State:
    """directory: the run's."""
    trained = check_files(directory / "checkpoints" / checkpoint_name(steps)) is None
    missing = tuple(evaluation for evaluation in evaluations if not is_evaluated(directory, steps, evaluation))
    begun = (directory / "config.yaml").is_file()
    return State(begun, newest_step(directory), steps, trained, missing)


def is_evaluated(directory: Path, step: int, evaluation: Evaluation) -> bool:
    """Return whether a line of evaluations.jsonl answers this at this step."""
    return any(answers(line, step, evaluation) for line in evaluation_lines(directory))


def answers(line: dict[str, Any], step: int, evaluation: Evaluation) -> bool:
    """Return whether this line of evaluations.jsonl was asked for all these tasks, with these shots and this limit, at
    this step, and computed as `l2e-ds evaluate` does it: what was evaluated while training may be in half precision.

    A line that does not say what it was asked for answers nothing.
    """
    asked = line.get("asked") or {}
    found = (line.get("step"), line.get("precision"), line.get("limit"), asked.get("num_fewshot"))
    wanted = (step, PRECISION, evaluation.limit, evaluation.num_fewshot)
    return found == wanted and set(evaluation.tasks) <= set(asked.get("tasks", ()))


def evaluation_lines(directory: Path) -> list[dict[str, Any]]:
    """Return what the lines of a run's evaluations.jsonl say, without those that are no mapping; empty where there is
    no such file."""
    path = directory / results.FILE
    return [line.value for line in json_lines(path) if isinstance(line.value, dict)] if path.is_file() else []


def read_index(directory: Path) -> dict[str, Any]:
    """Of study.json. Raises ConfigError where it is missing or cannot be read."""
    path = directory / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if not all(key in index for key in ("title", "factors", "seeds", "evaluate", "runs")):
            raise ValueError
        return index
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; no study was begun in {directory}") from None
    except (ValueError, TypeError):
        raise ConfigError(f"{path}: is no index of a study") from None


def asked_evaluations(directory: Path) -> list[Evaluation]:
    """Of study.json. Raises ConfigError."""
    return checked(StudyFile, {"evaluate": read_index(directory)["evaluate"]}, str(directory / INDEX)).evaluate


def steps_of(directory: Path, name: str) -> int:
    """That a run of a study is to have. Raises ConfigError."""
    return load_run_config(config_file(directory, name)).training.steps


class Entry(Section, extra="ignore"):
    """A run of a study, as far as it is used here. baseline: another's name."""

    name: str
    directory: str
    levels: dict[str, str] = Field({})
    baseline: str | None = None


class Index(Section, extra="ignore"):
    title: str
    runs: list[Entry]


def read_study(directory: Path) -> Index:
    """Raises DataError."""
    path = directory / INDEX
    try:
        raw = read_index(directory)
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: is no index of a study")
        index = checked(Index, raw, str(path))
    except ConfigError as error:
        raise DataError(str(error)) from None
    if len({entry.name for entry in index.runs}) < len(index.runs):
        raise DataError(f"{path}: runs: two have the same name")
    return index
