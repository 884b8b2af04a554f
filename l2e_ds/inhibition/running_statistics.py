"""Move what a layer remembers by the sums of one step: moments, tau, and how often each neuron was selected.

Shapes: N neurons; what is one number a layer is [1]. All may have one more dimension in front, that of several layers
of N neurons each. Everything float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from l2e_ds.inhibition.losses import FrozenStatistics, is_alive
from l2e_ds.inhibition.moments import Moments
from l2e_ds.inhibition.threshold import initial_threshold, moved_threshold


def stacked(layers: Sequence[Any]) -> Any:
    """Return the statistics of several layers of N neurons as one, with a dimension more."""
    if isinstance(layers[0], Tensor):
        return torch.stack(tuple(layers))
    names = [field.name for field in fields(layers[0])]
    return type(layers[0])(*(stacked([getattr(layer, name) for layer in layers]) for name in names))


def row_of(layers: Any, index: int) -> Any:
    """Return the statistics of one layer of those that `stacked` returned."""
    if isinstance(layers, Tensor):
        return layers[index]
    return type(layers)(*(row_of(getattr(layers, field.name), index) for field in fields(layers)))


@dataclass(frozen=True)
class StepSums:
    """Holds a layer's sums of one step, over the tokens of all ranks.

    header: [3], the number of tokens, and inhibition loss and score summed over the selected. d, d2: [N], of
    d = z - shift and of d^2. selected: [N], at how many tokens each neuron was selected. shift: [N] float32.
    """

    header: Tensor
    d: Tensor
    d2: Tensor
    selected: Tensor
    shift: Tensor


@dataclass(frozen=True)
class RunningStatistics:
    """Holds what a layer remembers of all steps so far; nothing is updated in place.

    tau: [1]. selected: [N], faded number of tokens at which each neuron was selected. selectable: [1], faded number of
    tokens at which it could be.
    """

    moments: Moments
    tau: Tensor
    selected: Tensor
    selectable: Tensor

    @classmethod
    def initial(cls, neurons: int, target_share: float, device: torch.device) -> RunningStatistics:
        """Return the statistics of a layer that has seen nothing yet."""
        return cls(
            Moments.empty(neurons, device),
            torch.tensor([initial_threshold(target_share)], dtype=torch.float64, device=device),
            torch.zeros(neurons, dtype=torch.float64, device=device),
            torch.zeros(1, dtype=torch.float64, device=device),
        )

    def frozen(self, moments: Moments | None = None) -> FrozenStatistics:
        """Return float32 constants to select and inhibit by. moments: to use in place of its own."""
        moments = self.moments if moments is None else moments
        rate = self.selected / self.selectable.clamp(min=1)
        return FrozenStatistics.of(moments.mean.float(), moments.variance.float(), self.tau.float(), rate.float())

    def moved(
        self,
        sums: StepSums,
        finite: Tensor,
        fade: float,
        target_share: float,
        seen_before: bool,
        selects_by_threshold: bool,
    ) -> tuple[RunningStatistics, Tensor]:
        """Return the statistics after a step, and the first five of `Inhibitor.STATISTICS` in it, [5].

        finite: [] bool; if False, nothing moves. fade: from `fade_factor`, the weight that earlier samples keep.
        target_share: the share of pairs to select. seen_before: whether the moments that the step selected by included
        its own samples (`reduce: forward`). selects_by_threshold: if False, tau stays. Source: docs/method.md, 3 and 4.
        """
        tokens, loss, score = sums.header.split(1, dim=-1)
        pairs = tokens * sums.d.shape[-1]
        batch = Moments.from_sums(tokens, sums.d, sums.d2, sums.shift.double())
        merged = self.moments.fade(fade).merge(batch)
        before = merged if seen_before else self.moments
        possible = is_alive(before.mean, before.variance).any(-1, keepdim=True)
        total = sums.selected.sum(-1, keepdim=True)
        shown = torch.cat(
            [
                total / pairs.clamp(min=1),
                self.tau,
                score / total.clamp(min=1),
                merged.variance.sqrt().mean(-1, keepdim=True),
                loss / (target_share * pairs).clamp(min=1),
            ],
            dim=-1,
        )
        kept = Moments(
            torch.where(finite, merged.count, self.moments.count),
            torch.where(finite, merged.mean, self.moments.mean),
            torch.where(finite, merged.m2, self.moments.m2),
        )
        newly_selectable = torch.where(possible, tokens, 0.0)
        moves_tau = possible & finite & (tokens > 0)
        moved = RunningStatistics(
            kept,
            moved_threshold(self.tau, total, pairs, target_share, moves_tau) if selects_by_threshold else self.tau,
            torch.where(finite, self.selected * fade + sums.selected, self.selected),
            torch.where(finite, self.selectable * fade + newly_selectable, self.selectable),
        )
        return moved, shown
