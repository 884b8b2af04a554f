"""Add up what a rank notes of the steps between two lines of `kind: train`, and return their metrics.

Shapes: L hooked layers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from l2e_ds.config.batch import BatchArithmetic
from l2e_ds.distributed import collectives
from l2e_ds.inhibition import Inhibitor
from l2e_ds.run_directory.metric_table import KINDS
from l2e_ds.run_directory.metrics import layer_key
from l2e_ds.system import memory

_LAYER_REDUCTIONS = {
    metric.key.removeprefix("layerI/"): metric.reduction
    for metric in KINDS["train"].metrics
    if metric.key.startswith("layerI/")
}
"""How each of `Inhibitor.STATISTICS` of a layer is reduced over the steps: `mean` or `newest`."""


class Interval:
    """Adds up steps from its creation to the next line of metrics; `values` and `is_loss_finite` wait for the device.

    steps, skipped, spikes: the number of steps, of those that changed no weight, and of these that were spikes.
    """

    def __init__(self, batch: BatchArithmetic, device: torch.device) -> None:
        self._batch, self._device = batch, device
        self.steps = self.skipped = self.spikes = 0
        self._learning_rate = 0.0
        self._begin = time.perf_counter()
        self._paused = self._data_wait = 0.0  # seconds
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=device)  # of each step's mean loss on this rank
        self._z_loss_sum: Tensor | None = None  # the same of the z-loss, if there is one
        self._newest_loss = torch.zeros((), device=device)
        self._statistics: list[Tensor] = []  # one of [L, len(STATISTICS)] for each applied step

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent within from that of the steps, unless an exception ends it."""
        begin = time.perf_counter()
        yield
        self._paused += time.perf_counter() - begin

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time spent within as waiting for a batch, unless an exception ends it."""
        begin = time.perf_counter()
        yield
        self._data_wait += time.perf_counter() - begin

    def add_loss(self, loss: Tensor, z_loss: Tensor | None = None) -> None:
        """Add the LM loss of one micro-batch of the current step, and its z-loss, if there is one: [] in nats/token."""
        self._newest_loss = loss.detach()
        self._loss_sum += self._newest_loss.double() / self._batch.accumulation
        if z_loss is not None:
            share = z_loss.double() / self._batch.accumulation
            self._z_loss_sum = share if self._z_loss_sum is None else self._z_loss_sum + share

    def add_step(self, applied: bool, learning_rate: float, statistics: Tensor | None, is_spike: bool = False) -> None:
        """Add one optimizer step. applied: whether it changed the weights. statistics: `Inhibitor.last`, [L,
        len(Inhibitor.STATISTICS)] float64, or None without inhibition or if the step was not applied."""
        self.steps += 1
        self.skipped += not applied
        self.spikes += is_spike
        self._learning_rate = learning_rate
        if statistics is not None:
            self._statistics.append(statistics)

    def is_loss_finite(self) -> bool:
        """Return whether the loss of this rank's newest micro-batch is finite."""
        return math.isfinite(float(self._newest_loss))

    def values(self, layers: Sequence[int]) -> dict[str, Any]:
        """Return the interval's part of the line `kind: train` (docs/metrics.md); there must be a step. layers: the
        numbers of the hooked layers, in the inhibitor's order. Collective."""
        sums = {"lm_loss": self._loss_sum} | ({} if self._z_loss_sum is None else {"z_loss": self._z_loss_sum})
        losses = collectives.all_reduce_sum(torch.stack([*sums.values()])).tolist()
        seconds = max(time.perf_counter() - self._begin - self._paused, 1e-9)
        costs = collectives.all_gather_objects((self._data_wait, memory.peak_memory_bytes(self._device)))
        waits, peaks = zip(*costs, strict=True)
        return {
            **{name: loss / (self.steps * collectives.size()) for name, loss in zip(sums, losses, strict=True)},
            **self._inhibition_values(layers),
            "learning_rate": self._learning_rate,
            "skipped_steps": self.skipped,
            "tokens_per_second": self.steps * self._batch.tokens_per_step / seconds,
            "step_seconds": seconds / self.steps,
            "data_wait_seconds": max(waits) / self.steps,
            "peak_memory_gib": max(peaks) / 2**30,
        }

    def _inhibition_values(self, layers: Sequence[int]) -> dict[str, float]:
        if not self._statistics:
            return {}
        statistics = torch.stack(self._statistics)  # [steps, L, len(STATISTICS)]
        columns = dict(zip(Inhibitor.STATISTICS, statistics.unbind(2), strict=True))  # [steps, L] each
        losses, coefficients = columns["inhibition_loss"], columns["coefficient"]
        values = {
            "inhibition_loss": losses.sum(1).mean().item(),
            "inhibition_loss_weighted": (coefficients * losses).sum(1).mean().item(),
            "coefficient": coefficients[-1].mean().item(),
            "strength": columns["strength"][-1].mean().item(),
            "observed_share": columns["observed_share"].mean().item(),
        }
        rows_of = {"mean": statistics.mean(0).tolist(), "newest": statistics[-1].tolist()}
        for index, layer in enumerate(layers):
            for name, reduction in _LAYER_REDUCTIONS.items():
                row = rows_of[reduction][index]
                values[layer_key(layer, name)] = row[Inhibitor.STATISTICS.index(name)]
        return values
