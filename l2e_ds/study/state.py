"""Find out how far each run of a study is, from the files in the study's folder.

STUDY/
  study.yaml        the study file, as it was read
  study.json        the index: every run with its levels, seed and baseline; written before anything runs
  configs/NAME.yaml the resolved configuration of each run, which is what is started
  runs/NAME/        run directories
  data/             tokenised text, shared by the runs
  logs/NAME.log     what the run printed
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
    """Holds how far a run is.

    step: of the newest checkpoint; trained: whether the last checkpoint is complete; missing: evaluations still to do.
    """

    begun: bool
    step: int
    steps: int
    trained: bool
    missing: tuple[Evaluation, ...]

    @property
    def is_done(self) -> bool:
        """Return whether the run is trained and evaluated."""
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
    """Return the run directory of a run in a study's folder."""
    return study / "runs" / name


def config_file(study: Path, name: str) -> Path:
    """Return the resolved configuration of a run in a study's folder."""
    return study / "configs" / f"{name}.yaml"


def state_of(directory: Path, steps: int, evaluations: Sequence[Evaluation]) -> State:
    """Return how far a run is. directory: the run's; steps: of the whole run; evaluations: those of the study."""
    trained = check_files(directory / "checkpoints" / checkpoint_name(steps)) is None
    lines = evaluation_lines(directory)
    missing = tuple(wanted for wanted in evaluations if not any(answers(line, steps, wanted) for line in lines))
    begun = (directory / "config.yaml").is_file()
    return State(begun, newest_step(directory), steps, trained, missing)


def answers(line: dict[str, Any], step: int, evaluation: Evaluation) -> bool:
    """Return whether this line of evaluations.jsonl holds what an evaluation of the study asks for.

    It must hold all the tasks, with these shots and this limit, at this step, and be computed as `l2e-ds evaluate`
    does: evaluations while training may be in half precision. A line that does not say what it was asked for does not
    count.
    """
    asked = line.get("asked") or {}
    found = (line.get("step"), line.get("precision"), line.get("limit"), asked.get("num_fewshot"))
    wanted = (step, PRECISION, evaluation.limit, evaluation.num_fewshot)
    return found == wanted and set(evaluation.tasks) <= set(asked.get("tasks", ()))


def evaluation_lines(directory: Path) -> list[dict[str, Any]]:
    """Return the mappings in the lines of a run's evaluations.jsonl; none without such a file."""
    path = directory / results.FILE
    return [line.value for line in json_lines(path) if isinstance(line.value, dict)] if path.is_file() else []


def read_index(directory: Path) -> dict[str, Any]:
    """Return the content of study.json. Raises ConfigError if it is missing or cannot be read."""
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
    """Return the evaluations in study.json. Raises ConfigError."""
    return checked(StudyFile, {"evaluate": read_index(directory)["evaluate"]}, str(directory / INDEX)).evaluate


def steps_of(directory: Path, name: str) -> int:
    """Return the number of steps that a run of a study is to have. Raises ConfigError."""
    return load_run_config(config_file(directory, name)).training.steps


class Entry(Section, extra="ignore"):
    """A run in study.json, as far as a report uses it. baseline: the name of another run."""

    name: str
    directory: str
    levels: dict[str, str] = Field({})
    baseline: str | None = None


class Index(Section, extra="ignore"):
    """The content of study.json, as far as a report uses it."""

    title: str
    runs: list[Entry]


def read_study(directory: Path) -> Index:
    """Return the checked content of study.json. Raises DataError."""
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
