"""The moving threshold tau: O(1) a step, converging to a target share of selected (token, neuron) pairs.

docs/method.md, 4. With observed share f and target p: tau <- tau * (ln p / ln f)^(1/2), which is exact in one
step where the survival function of the score is exp(-a * phi^2), and contracts for heavier tails.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST_FACTOR = 2.0  # a jump of the distribution moves tau by at most this a step, in either direction
TAU_RANGE = (1e-4, 1e6)  # where a target cannot be met (nearly all neurons dead) tau stays finite


def initial_threshold(target_share: float) -> float:
    """Return the quantile of the score of normally distributed activations (chi-squared, one degree of freedom)."""
    return 2 * float(torch.special.erfinv(torch.tensor(1 - target_share, dtype=torch.float64))) ** 2


def moved_threshold(tau: Tensor, selected: Tensor, pairs: Tensor, target_share: float, possible: Tensor) -> Tensor:
    """Return the threshold for the next step.

    tau, selected, pairs: [] float64; selected of pairs (token, neuron) pairs were at or above tau, over all ranks.
    possible: [] bool, whether anything could be selected at all; where not (no history yet, every neuron
    dead) the share says nothing about tau, which stays.
    """
    smallest = 0.5 / pairs.clamp(min=1)
    share = (selected / pairs.clamp(min=1)).clamp(min=smallest, max=1 - smallest)
    factor = (math.log(target_share) / share.log()).sqrt().clamp(1 / LARGEST_FACTOR, LARGEST_FACTOR)
    return torch.where(possible, (tau * factor).clamp(*TAU_RANGE), tau)
