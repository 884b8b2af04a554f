"""What a layer remembers, moved by the sums of one step: moments, tau, how often each neuron was selected.

Shapes: N neurons. Everything float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from l2e_ds.inhibition.losses import FrozenStatistics, is_alive
from l2e_ds.inhibition.moments import Moments
from l2e_ds.inhibition.threshold import initial_threshold, moved_threshold


@dataclass(frozen=True)
class StepSums:
    """A layer's sums of one step, over the tokens of all ranks.

    header: [3] tokens, inhibition loss and score of the selected; d, d2: [N] of d = z - shift and of d^2; selected: [N]
    number of the selected; shift: [N].
    """

    header: Tensor
    d: Tensor
    d2: Tensor
    selected: Tensor
    shift: Tensor


@dataclass(frozen=True)
class RunningStatistics:
    """What a layer remembers of all steps so far; nothing is updated in place.

    tau: []; selected: [N], faded count of selections; selectable: [], of the tokens that could be selected.
    """

    moments: Moments
    tau: Tensor
    selected: Tensor
    selectable: Tensor

    @classmethod
    def initial(cls, neurons: int, target_share: float, device: torch.device) -> RunningStatistics:
        """Return those of a layer that has seen nothing yet."""
        return cls(
            Moments.empty(neurons, device),
            torch.tensor(initial_threshold(target_share), dtype=torch.float64, device=device),
            torch.zeros(neurons, dtype=torch.float64, device=device),
            torch.zeros((), dtype=torch.float64, device=device),
        )

    def frozen(self, moments: Moments | None = None) -> FrozenStatistics:
        """Float32 constants to select and inhibit by; with other moments than its own where some are given."""
        moments = self.moments if moments is None else moments
        rate = self.selected / self.selectable.clamp(min=1)
        return FrozenStatistics.of(moments.mean.float(), moments.variance.float(), self.tau.float(), rate.float())

    def moved(
        self, sums: StepSums, finite: Tensor, fade: float, target_share: float, seen_before: bool
    ) -> tuple[RunningStatistics, Tensor]:
        """These statistics after a step, and what the step showed: the first five of `Inhibitor.STATISTICS`, [5]
        (docs/method.md, sections 3 and 4).

        finite: [] bool; where False nothing moves. fade: the share of the past that stays. seen_before: whether the
        step's own samples were in the moments that it selected by (`reduce: forward`).
        """
        tokens, loss, score = sums.header.unbind()
        pairs = tokens * sums.d.shape[0]
        batch = Moments.from_sums(tokens, sums.d, sums.d2, sums.shift.double())
        merged = self.moments.fade(fade).merge(batch)
        before = merged if seen_before else self.moments
        possible = is_alive(before.mean, before.variance).any()
        total = sums.selected.sum()
        shown = torch.stack(
            [
                total / pairs.clamp(min=1),
                self.tau,
                score / total.clamp(min=1),
                merged.variance.sqrt().mean(),
                loss / (target_share * pairs).clamp(min=1),
            ]
        )
        kept = Moments(
            torch.where(finite, merged.count, self.moments.count),
            torch.where(finite, merged.mean, self.moments.mean),
            torch.where(finite, merged.m2, self.moments.m2),
        )
        newly_selectable = torch.where(possible, tokens, 0.0)
        moved = RunningStatistics(
            kept,
            moved_threshold(self.tau, total, pairs, target_share, possible & finite),
            torch.where(finite, self.selected * fade + sums.selected, self.selected),
            torch.where(finite, self.selectable * fade + newly_selectable, self.selectable),
        )
        return moved, shown
