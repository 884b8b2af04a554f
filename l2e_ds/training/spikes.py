"""Which steps are skipped for a gradient norm far above those before them (`training.spike_deviations`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


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
