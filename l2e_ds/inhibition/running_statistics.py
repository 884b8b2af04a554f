"""What a layer remembers, moved by the sums of one step: moments, tau, how often each neuron was selected.

Shapes: N neurons. Everything float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from l2e_ds.inhibition import losses
from l2e_ds.inhibition.moments import Moments
from l2e_ds.inhibition.threshold import moved_threshold


def moved_statistics(
    moments: Moments,
    tau: Tensor,
    selected: Tensor,
    selectable: Tensor,
    sums: tuple[Tensor, Tensor, Tensor, Tensor],
    finite: Tensor,
    shift: Tensor,
    fade: float,
    target_share: float,
    seen_before: bool,
) -> tuple[Moments, Tensor, Tensor, Tensor, Tensor]:
    """The first four after a step, and the layer's `Inhibitor.STATISTICS` of it, [5] (docs/method.md, 3 and 4).

    tau: []; selected: [N], faded count of selections; selectable: [], of tokens. sums, of all ranks: [3] tokens, loss
    and score of the selected; [N] d, [N] d^2, [N] selected. finite: [] bool; where False nothing moves. shift: [N],
    what d was taken from. fade: the share of the past that stays. seen_before: whether the step's own samples were in
    the moments that it selected by (`reduce: forward`).
    """
    header, d, d2, newly_selected = sums
    tokens, loss, score = header.unbind()
    pairs = tokens * d.shape[0]
    batch = Moments.from_sums(tokens, d, d2, shift.double())
    merged = moments.fade(fade).merge(batch)
    before = merged if seen_before else moments
    possible = losses.is_alive(before.mean, before.variance).any()
    total = newly_selected.sum()
    statistics = torch.stack(
        [
            total / pairs.clamp(min=1),
            tau,
            score / total.clamp(min=1),
            merged.variance.sqrt().mean(),
            loss / (target_share * pairs).clamp(min=1),
        ]
    )
    kept = Moments(
        torch.where(finite, merged.count, moments.count),
        torch.where(finite, merged.mean, moments.mean),
        torch.where(finite, merged.m2, moments.m2),
    )
    return (
        kept,
        moved_threshold(tau, total, pairs, target_share, possible & finite),
        torch.where(finite, selected * fade + newly_selected, selected),
        torch.where(finite, selectable * fade + torch.where(possible, tokens, 0.0), selectable),
        statistics,
    )
