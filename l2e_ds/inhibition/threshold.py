"""Move the threshold tau towards a target share of selected (token, neuron) pairs, in O(1) per step.

With observed share f and target share p, tau <- tau * (ln p / ln f)^(1/2) (docs/method.md, 4). This is exact in one
step if the survival function of the score phi is exp(-a phi^2), and contracts for heavier tails.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST_FACTOR = 2.0  # by which tau moves at most per step, up or down, when the distribution jumps
TAU_RANGE = (1e-4, 1e6)  # keeps tau finite where the target cannot be met, as with nearly all neurons dead


def initial_threshold(target_share: float) -> float:
    """Return tau for normally distributed activations.

    It is the quantile at 1 - target_share of the chi-squared distribution with one degree of freedom.
    """
    return 2 * float(torch.special.erfinv(torch.tensor(1 - target_share, dtype=torch.float64))) ** 2


def moved_threshold(tau: Tensor, selected: Tensor, pairs: Tensor, target_share: float, possible: Tensor) -> Tensor:
    """Return the threshold for the next step, float64, elementwise over layers (docs/method.md, 4).

    tau: float64. selected, pairs: float64, over all ranks: how many (token, neuron) pairs were at or above tau, and how
    many there were. possible: bool, whether anything could be selected at all; if not (no history yet, no token that
    counts, or every neuron is dead) the share says nothing about tau, which stays.
    """
    # a share that is too small to be seen counts as half of the smallest that can be, and never as more than the target
    smallest = (0.5 / pairs.clamp(min=1)).clamp(max=0.5 * target_share)
    share = (selected / pairs.clamp(min=1)).clamp(min=smallest, max=1 - smallest)
    factor = (math.log(target_share) / share.log()).sqrt().clamp(1 / LARGEST_FACTOR, LARGEST_FACTOR)
    return torch.where(possible, (tau * factor).clamp(*TAU_RANGE), tau)
