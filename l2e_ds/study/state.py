"""Find out how far each run of a study is, from the files in the study's folder (docs/studies.md, "The folder")."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2e_ds.config.reading import checked, load_run_config
from l2e_ds.config.sections import RunConfig
from l2e_ds.errors import ConfigError
from l2e_ds.run_directory import results
from l2e_ds.run_directory.json_lines import json_lines
from l2e_ds.run_directory.manifest import check_files
from l2e_ds.run_directory.metrics import evaluated_steps
from l2e_ds.run_directory.names import checkpoint_name, newest_step
from l2e_ds.study.definition import INDEX, Evaluation, Index

PRECISION = "fp32"  # of a study's evaluations: the default of `l2e-ds evaluate`


@dataclass(frozen=True)
class State:
    """Holds how far a run is.

    step: of the newest checkpoint; trained: whether the last checkpoint is complete, and what the run itself evaluates
    is evaluated there; missing: evaluations of the study still to do.
    """

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
    """Return the run directory of a run in a study's folder."""
    return study / "runs" / name


def config_file(study: Path, name: str) -> Path:
    """Return the resolved configuration of a run in a study's folder."""
    return study / "configs" / f"{name}.yaml"


def state_of(directory: Path, steps: int, evaluations: Sequence[Evaluation]) -> State:
    """Return how far a run is. directory: the run's; steps: of the whole run; evaluations: those of the study."""
    is_complete = check_files(directory / "checkpoints" / checkpoint_name(steps)) is None
    trained = is_complete and _is_evaluated(directory, steps)
    lines = evaluation_lines(directory)
    missing = tuple(wanted for wanted in evaluations if not any(answers(line, steps, wanted) for line in lines))
    begun = (directory / "config.yaml").is_file()
    return State(begun, newest_step(directory), steps, trained, missing)


def _is_evaluated(directory: Path, steps: int) -> bool:
    """Return whether a run that evaluates while it trains has done so at its last step. One that is asked to stop there
    saves first, and leaves the evaluation to its next start."""
    missing = [kind for kind, made in evaluated_steps(directory).items() if made and steps not in made]
    if not missing:
        return True
    config = config_of(directory.parent.parent, directory.name)  # by which the next start would go
    return not (
        ("evaluation" in missing and config.training.evaluate_every) or ("tasks" in missing and config.evaluation.every)
    )


def answers(line: dict[str, Any], step: int, evaluation: Evaluation) -> bool:
    """Return whether this line of evaluations.jsonl holds what an evaluation of the study asks for.

    It must hold all the tasks, from these folders, with these shots and this limit, at this step, in the precision of
    `l2e-ds evaluate`.
    """
    asked = line.get("asked") or {}
    how = (line.get("step"), line.get("precision"), line.get("limit"))
    found = (*how, asked.get("num_fewshot"), asked.get("include_path", []))
    wanted = (step, PRECISION, evaluation.limit, evaluation.num_fewshot, evaluation.include_path)
    return found == wanted and set(evaluation.tasks) <= set(asked.get("tasks", ()))


def evaluation_lines(directory: Path) -> list[dict[str, Any]]:
    """Return the mappings in the lines of a run's evaluations.jsonl; none without such a file."""
    path = directory / results.FILE
    return [line.value for line in json_lines(path) if isinstance(line.value, dict)] if path.is_file() else []


def config_of(directory: Path, name: str) -> RunConfig:
    """Return the configuration of a run of a study. Raises ConfigError."""
    return load_run_config(config_file(directory, name))


def read_index(directory: Path) -> Index:
    """Return the checked content of study.json. Raises ConfigError."""
    path = directory / INDEX
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; no study was begun in {directory}") from None
    except ValueError:
        raw = None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: is no index of a study")
    index = checked(Index, raw, str(path))
    if len({entry.name for entry in index.runs}) < len(index.runs):
        raise ConfigError(f"{path}: runs: two have the same name")
    return index
