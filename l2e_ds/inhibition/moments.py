"""Keep a running mean and variance per neuron, merged by the pairwise formula of Chan, Golub and LeVeque (1983).

Shapes: M samples (tokens), N neurons of a layer. Where a shape ends in N, more dimensions may come before it, as of
several layers; what is one number a layer is [1], or [..., 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Moments:
    """Holds mean and sum of squared deviations of samples, float64; nothing is updated in place.

    count: [1] sum of the samples' weights, which is their number if none has faded
    mean:  [N]
    m2:    [N] weighted sum of (z - mean)^2
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    @classmethod
    def empty(cls, neurons: int, device: torch.device | str | None = None) -> Moments:
        """Return the moments of no samples."""
        zeros = torch.zeros(neurons, dtype=torch.float64, device=device)
        return cls(torch.zeros(1, dtype=torch.float64, device=device), zeros, zeros.clone())

    @classmethod
    def from_sums(cls, count: Tensor, sum_d: Tensor, sum_d2: Tensor, shift: Tensor) -> Moments:
        """Return the moments of samples z from their number [1] and their sums of d = z - shift and of d^2, [N] each.

        shift: [N]; all are float64.
        """
        safe = count.clamp(min=_TINY)  # weights may add up to less than 1
        return cls(count, shift + sum_d / safe, (sum_d2 - sum_d * sum_d / safe).clamp(min=0))

    def fade(self, factor: float) -> Moments:
        """Return the same moments with the weight of every sample multiplied by `factor`."""
        return Moments(self.count * factor, self.mean, self.m2 * factor)

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets of samples together."""
        count = self.count + other.count
        weight = other.count / count.clamp(min=_TINY)
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * weight,
            self.m2 + other.m2 + delta * delta * self.count * weight,
        )

    @property
    def variance(self) -> Tensor:
        """The sample variance S^2, [N] float64, with the denominator count - 1; 0 before two samples were seen."""
        return torch.where(self.count >= 2, self.m2 / (self.count - 1).clamp(min=1), torch.zeros_like(self.m2))


def sample_count(z: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the sum of the samples' weights, or without weights their number, [] float64 on the device of z.

    z: [M, N]; weight: [M, 1]. It is made on the device, so that the host waits for nothing.
    """
    if weight is None:
        return torch.full((), z.shape[0], dtype=torch.float64, device=z.device)
    return weight.double().sum()


def shifted_sums(z: Tensor, shift: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the sums over samples of d = z - shift and of d^2, [N] float64 each.

    z: [M, N], any float dtype; shift: [N]; weight: [M, 1], how many samples each one counts as (default: 1). The
    differences are float32, which loses nothing to cancellation if the shift is near the mean. Use `exact_sums` for
    samples whose mean is not known yet.
    """
    d = z.float() - shift.float()
    weighted = d if weight is None else d * weight
    return weighted.sum(0).double(), (weighted * d).sum(0).double()


def exact_sums(z: Tensor, shift: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return what `shifted_sums` does, for any shift, in two passes.

    The sums are taken around the samples' own mean and moved to the shift in float64.
    """
    z = z.float()
    count = sample_count(z, weight)
    weighted = z if weight is None else z * weight
    mean = (weighted.sum(0).double() / count.clamp(min=_TINY)).float()
    sum_d, sum_d2 = shifted_sums(z, mean, weight)
    offset = mean.double() - shift.double()
    return sum_d + count * offset, sum_d2 + 2 * offset * sum_d + count * offset * offset


def fade_factor(window: int | None) -> float:
    """Return the share of its weight that a sample keeps per step, exp(-1 / window), or 1 without a window.

    window: in steps; None: samples never fade (`statistics_window: cumulative`).
    """
    return 1.0 if window is None else float(torch.exp(torch.tensor(-1.0 / window, dtype=torch.float64)))
