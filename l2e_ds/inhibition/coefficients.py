"""Compute lambda, the weight of the inhibition loss, for each hooked layer and step (docs/method.md, 5.3).

It is either the same for all layers (`coefficient`), or relative to the LM loss and different for each (`strength`):

    lambda = strength * RMS(gradient of the LM loss) / RMS(gradient of the inhibition loss)

Both root mean squares are taken at the selected activations of all tokens, and the logarithm of their ratio is averaged
over about WINDOW steps. Backward makes the sums of a step, they are reduced over the ranks while the next step
computes, and they take effect in the step after that. Either kind of lambda is multiplied by the schedule. Within a
step lambda is constant and the same on every rank.

Shapes: L hooked layers. Sums are float64 on the device, and nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from l2e_ds.distributed.collectives import begin_all_reduce_sum
from l2e_ds.inhibition.settings import Settings

WINDOW = 20  # steps after which a step's ratio weighs 1/e of what it did
FADE = math.exp(-1 / WINDOW)


class Coefficients:
    """Holds lambda of each hooked layer, and measures the strength that it amounts to.

    squares: [L, 2] float64, this rank's sums of a step over the selected activations, to which the hooks add in
    backward. The first is of the squared gradient of the LM loss summed over tokens, the second of the squared gradient
    of the inhibition loss before its division by n.
    """

    def __init__(
        self, settings: Settings, neurons: Sequence[int], device: torch.device | str, group: Any = None
    ) -> None:
        """Begin without any history.

        settings: after `Settings.in_steps`; neurons: N of each layer; group: the process group of the all-reduces
        (default: all ranks).
        """
        self._settings, self._group = settings, group
        self._strength = settings.relative_strength if settings.is_regularising else None
        self._fixed = (settings.coefficient or 0.0) if settings.mechanism == "regulariser" else 0.0
        # the inhibition loss is divided by share * tokens * N
        self._expected = settings.target_share * torch.tensor(neurons, dtype=torch.float64, device=device)
        self.squares = torch.zeros(len(neurons), 2, dtype=torch.float64, device=device)
        self._averages = torch.zeros_like(self.squares)  # faded sums of the logarithm of the ratio, and of 1 per step
        # squares of the newest applied step, summed over all ranks once `_wait` has been called
        self._newest = torch.zeros_like(self.squares)
        self._arrive: Callable[[], None] | None = None
        self._newest_values = torch.zeros(len(neurons), dtype=torch.float64, device=device)
        self.values = torch.zeros(len(neurons), dtype=torch.float64, device=device)
        """Lambda of the coming step, [L] float64."""
        self.is_measuring = self.is_inhibiting = False
        self.decide(0)

    def decide(self, steps: int) -> None:
        """Set lambda and both flags for the step that comes after `steps` applied ones.

        A regulariser does nothing in the first step: nothing is selected without history.
        """
        settings = self._settings
        share = settings.schedule(steps)
        if settings.mechanism == "regulariser":
            is_on = steps > 0 and settings.is_regularising
            is_before = settings.start - 3 * WINDOW <= steps < settings.start
            self.is_inhibiting = is_on and share > 0
            self.is_measuring = self.is_inhibiting or (is_on and is_before)
        else:
            self.is_inhibiting = share > 0
        if self._strength is None:
            self.values = torch.full_like(self.values, self._fixed * share)
            return
        logarithm, weight = self._averages.unbind(1)
        ratio = torch.where(weight > 0, (logarithm / torch.where(weight > 0, weight, 1.0)).exp(), 0.0)
        self.values = self._strength * share * self._expected * ratio

    def advance(self, finite: Tensor) -> Tensor:
        """Average in what the step before an applied step measured, and begin to reduce what this step measured.

        finite: [] bool; if False, the averages stay and this step's measurements are dropped. Returns lambda of this
        step, and of the step before it the strength that was reached and the 2-norm of the LM loss's gradient at the
        selected activations (0 if not measured), [L, 3] float64. The caller calls `decide` next. Collective.
        """
        self._wait()
        lm, inhibition = self._newest.unbind(1)
        measured = (lm > 0) & (inhibition > 0) & self._newest.isfinite().all(1)  # others keep their average
        ratio = (torch.where(measured, lm, 1.0) / torch.where(measured, inhibition, 1.0)).sqrt()
        reached = torch.where(measured, self._newest_values / self._expected / ratio, 0.0)
        moved = self._averages * FADE + torch.stack([ratio.log(), torch.ones_like(ratio)], dim=1)
        self._averages = torch.where((finite & measured)[:, None], moved, self._averages)
        statistics = torch.stack([self.values, reached, torch.where(measured, lm, 0.0).sqrt()], dim=1)
        self._newest, self._newest_values = torch.where(finite, self.squares, 0.0), self.values
        self.squares.zero_()
        # `is_measuring` is the same on every rank, and so is the order of the collectives.
        if self.is_measuring:
            self._arrive = begin_all_reduce_sum(self._newest, self._group)
        return statistics

    def _wait(self) -> None:
        if self._arrive is not None:
            self._arrive()
        self._arrive = None

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages, [L, 2], and of the newest step squares, [L, 2], and lambda, [L]; on the device."""
        self._wait()
        return {"averages": self._averages, "newest": self._newest, "newest_coefficient": self._newest_values}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` returned. The caller calls `decide` next."""
        self._arrive = None
        self._averages, self._newest = state["averages"], state["newest"]
        self._newest_values = state["newest_coefficient"]
