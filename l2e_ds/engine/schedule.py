"""The learning rate of each step: a pure function of the number of steps that changed the weights, so that there is no
state of a schedule to save or to lose."""

from __future__ import annotations

import math
from dataclasses import dataclass

from l2e_ds.config.sections import OptimizerConfig, RunConfig


@dataclass(frozen=True)
class Schedule:
    """The learning-rate schedule of one run.

    steps: its length. warmup: steps of the linear rise at the start. decay: steps of the fall at the end
    (warmup-stable-decay only). Both need not be whole numbers.
    """

    optimizer: OptimizerConfig
    steps: int
    warmup: float
    decay: float

    @property
    def peak(self) -> float:
        """The highest learning rate."""
        assert self.optimizer.peak_learning_rate is not None  # filled in by engine.configuration.resolve
        return self.optimizer.peak_learning_rate

    def rate(self, step: int) -> float:
        """Return the learning rate of the step with this index, from 0 on; as in Megatron and GPT-NeoX the first is
        above 0 and the warm-up reaches the peak with its last step."""
        peak, lowest = self.peak, self.optimizer.final_ratio
        done = step + 1
        if done < self.warmup:
            return peak * done / self.warmup
        progress = min(1.0, (done - self.warmup) / max(1.0, self.steps - self.warmup))
        match self.optimizer.schedule:
            case "cosine":
                return peak * (lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * progress)))
            case "linear":
                return peak * (lowest + (1 - lowest) * (1 - progress))
            case "inverse-square-root":
                return peak * math.sqrt(max(1.0, self.warmup) / done)
            case "warmup-stable-decay":
                left = min(1.0, max(0, self.steps - done) / self.decay) if self.decay else 1.0
                return peak * (lowest + (1 - lowest) * left)
            case "constant":
                return peak

    def __str__(self) -> str:
        lowest, end = self.optimizer.final_ratio, f"{self.steps:,}"
        after = {
            "cosine": f"cosine to {lowest:g} of it at step {end}",
            "linear": f"linear to {lowest:g} of it at step {end}",
            "inverse-square-root": "falling with the inverse square root of the step",
            "warmup-stable-decay": f"constant, linear to {lowest:g} of it in the last {self.decay:,.0f} of {end} steps",
            "constant": "constant",
        }[self.optimizer.schedule]
        return f"peak {self.peak:g} after {self.warmup:,.0f} steps of warm-up, then {after}"


def schedule_of(config: RunConfig) -> Schedule:
    """Return the schedule of a run whose configuration `engine.configuration.resolve` has completed."""
    return Schedule(config.optimizer, *config.optimizer.schedule_lengths(config.training.steps))
