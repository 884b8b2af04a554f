"""Skip steps whose gradient norm is far above those before, and end a run that skips too many steps of any kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from l2e_ds.checkpoint.state import TrainState
from l2e_ds.config.sections import TrainingConfig
from l2e_ds.distributed import collectives
from l2e_ds.engine.engine import loss_scale, norm_within_step, skip_steps_when
from l2e_ds.errors import TrainingError


@dataclass(frozen=True)
class Spike:
    """Holds the global gradient norm of a step that is skipped, and the mean and standard deviation of those before."""

    norm: float
    mean: float
    deviation: float

    def __str__(self) -> str:
        return f"{self.norm:.4g}, of the steps before {self.mean:.4g} +- {self.deviation:.2g}"


def find_spike(norm: float, before: Sequence[float], deviations: float, window: int) -> Spike | None:
    """Return a Spike if the gradient norm of a step is too large, else None.

    Too large is more than `deviations` standard deviations above the mean of `before`, the norms of the last `window`
    applied steps; of fewer steps nothing is too large, nor is a norm that is not finite, which is skipped as such.
    """
    if len(before) < window or not math.isfinite(norm):
        return None
    mean = math.fsum(before) / len(before)
    deviation = math.sqrt(math.fsum((one - mean) ** 2 for one in before) / len(before))  # the same on every processor
    return Spike(norm, mean, deviation) if norm > mean + deviations * deviation else None


class SkippedSteps:
    """Has the engine skip spikes (`training.spike_deviations`), and counts the skipped steps in a row. spike: that of
    the newest step, if it was one."""

    def __init__(self, engine: Any, section: TrainingConfig, state: TrainState) -> None:
        """state: that of the run, once it is loaded; `gradient_norms` of it is kept here."""
        self._engine, self._section, self._state = engine, section, state
        self.spike: Spike | None = None
        self._norm: float | None = None  # of the step that is taken, as rank 0 knows it
        self._in_row = 0
        if section.spike_deviations is None:
            state.gradient_norms = []  # if it is set again later, these would be too old to compare with
        else:
            skip_steps_when(engine, self._is_spike)

    def begin_step(self) -> None:
        """Forget the step before this one."""
        self._norm = self.spike = None

    def _is_spike(self) -> bool:
        """Return whether the optimizer is to skip the step that it is about to take. Collective."""
        if self._norm is None:  # the first time in this step
            # rank 0's, or ranks could part from each other
            self._norm = collectives.broadcast_object(norm_within_step(self._engine))
            section = self._section
            assert section.spike_deviations is not None
            self.spike = find_spike(
                self._norm, self._state.gradient_norms, section.spike_deviations, section.spike_window
            )
        return self.spike is not None

    def count(self, applied: bool, is_loss_finite: Callable[[], bool]) -> None:
        """Count a step. is_loss_finite: of this rank's newest loss. Collective. Raises TrainingError after
        `training.max_skipped_steps` steps in a row that were not applied."""
        if applied and self._norm is not None:
            norms = [*self._state.gradient_norms, self._norm]
            self._state.gradient_norms = norms[-self._section.spike_window :]
        self._in_row = 0 if applied else self._in_row + 1
        if self._in_row < self._section.max_skipped_steps:
            return
        skipped = f"training: {self._in_row} steps in a row changed no weight; the last one, step {self._state.step},"
        limit = "the limit is training.max_skipped_steps"
        if self.spike is not None:
            raise TrainingError(
                f"{skipped} was skipped for its gradient norm ({self.spike}); {limit}; if the norm has risen for"
                " good, resume with another training.spike_deviations, or with null, and name that key in"
                " training.allow_changes"
            )
        all_finite = collectives.all_gather_objects(is_loss_finite())
        bad = [rank for rank, finite in enumerate(all_finite) if not finite]
        where = f"loss not finite on rank {', '.join(map(str, bad))}" if bad else "every rank's loss is finite"
        raise TrainingError(
            f"{skipped} had non-finite gradients (loss scale {loss_scale(self._engine):g}; {where}); {limit}; start"
            " from an earlier checkpoint in a new run directory (training.resume=CHECKPOINT) with a lower"
            " optimizer.peak_learning_rate"
        )
