"""Evaluate on tasks of lm-evaluation-harness while training, as the section `evaluation` of a run file says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2e_ds.checkpoint.state import TrainState
from l2e_ds.config.sections import RunConfig
from l2e_ds.console import warn
from l2e_ds.data import PreparedData, tokenizer_of
from l2e_ds.data.tokenizer import end_of_text_id
from l2e_ds.distributed import collectives
from l2e_ds.errors import renaming
from l2e_ds.run_directory import results
from l2e_ds.run_directory.json_lines import append_line
from l2e_ds.training import preemption

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from l2e_ds.evaluation.harness import Tasks


_KEYS = {key: f"evaluation.{key}" for key in ("tasks", "include_path", "num_fewshot")}
"""The run file's keys for what errors of the harness name."""


@dataclass(frozen=True)
class TaskEvaluation:
    """Holds the tasks (on rank 0, else None), the tokenizer, and the number of requests in a rank's batch."""

    config: RunConfig
    tasks: Tasks | None
    tokenizer: PreTrainedTokenizerFast
    batch_size: int

    def evaluate(self, engine: Any, state: TrainState) -> dict[str, float]:
        """Append to evaluations.jsonl, and return the metrics of `kind: tasks`, the same on every rank. Training's
        state stays. Collective. Raises DataError for tasks that fail, and Interrupted."""
        from l2e_ds.evaluation import harness  # needs the package lm-eval, an extra

        section, values = self.config.evaluation, dict[str, float]()
        path = Path(self.config.training.run_directory) / results.FILE
        for shots in section.shots:
            asked = (section.tasks, shots, section.include_path)
            evaluation = results.about(state.step, state.tokens, self.config.training.precision, *asked)
            with renaming(_KEYS):
                evaluation |= harness.evaluate(
                    engine, self.tokenizer, self.tasks, shots, self.batch_size, section.limit, preemption.stop_if_asked
                )
            try:
                if collectives.is_main():
                    append_line(path, evaluation)
            except OSError as error:  # as in metrics.jsonl, a full disk costs lines, but not the run
                warn(f"{path}: {error.strerror}; the results are lost")
            values |= {result.key: result.value for result in results.results_of(evaluation) if result.part_of is None}
        return values


def load_tasks_of(config: RunConfig) -> Tasks | None:
    """Load the tasks that a run evaluates on while training, on rank 0; None on other ranks, and for a run without.
    Collective. Raises ConfigError and DataError."""
    section = config.evaluation
    if not section.every:
        return None

    def load() -> Tasks:
        from l2e_ds.evaluation.harness import load_tasks  # needs the package lm-eval, an extra

        return load_tasks(section.tasks, section.include_path, section.shots)

    with renaming(_KEYS):
        return collectives.run_on_main(load, preemption.stop_if_asked)


def task_evaluation(config: RunConfig, tasks: Tasks | None, data: Sequence[PreparedData]) -> TaskEvaluation | None:
    """Return the evaluation on the tasks of `load_tasks_of`, or None for a run without. Collective. Raises
    DataError."""
    if not config.evaluation.every:
        return None
    tokenizer = tokenizer_of(data)
    assert tokenizer is not None  # the run file's checks ask for one
    collectives.run_on_all(lambda: end_of_text_id(tokenizer))  # tasks use it to begin a text and to end an answer
    micro_batch = config.training.micro_batch
    assert isinstance(micro_batch, int)  # `auto` has been replaced by a number
    return TaskEvaluation(config, tasks, tokenizer, config.evaluation.batch_size or micro_batch)
