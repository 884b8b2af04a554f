"""Score, selection and inhibition loss as pure functions, and the two autograd functions that inject its gradient.

Shapes: M samples (tokens) of a micro-batch, N neurons. Statistics are float32 [N] and constants of the loss.

The inhibition loss of one layer (METHOD, sections 3 and 5), with d = z - mean and n = share * M * N:

    published:        L = 1/n * sum_ij sel_ij * log d_ij^2
    scale-invariant:  L = 1/n * sum_ij sel_ij * log(d_ij^2 / S_j^2),  S_j^2 = mean_i d_ij^2, with S_j's gradient

The gradient of the second is 2/n * (sel_ij / d_ij - rate_j * d_ij / S_j^2), rate_j being neuron j's share of
selected tokens. `reduce: forward` knows rate and S of this very (global) micro-batch, so its inner product with d
is zero for each neuron. `reduce: step` must not ask other ranks during forward: it takes both from the running
statistics, which is the same loss with log S_j^2 replaced by its tangent at the running S_j^2:

    L = 1/n * sum_ij [sel_ij * log(d_ij^2 / S_j^2) - rate_j * (d_ij^2 / S_j^2 - 1)]

Both are the same expression in (rate, S^2), so there is one function for both. The gradient enters in backward
(DEEPSPEED.md, "The inhibition gradient", way B): `note_loss_gradient` sits on the LM loss and notes the gradient
that arrives there (loss scale / accumulation steps), `add_inhibition_gradient` sits on the neurons.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

# A neuron whose S is below 1e-6 of (1 + |mean|) counts as dead: below that float32 sees rounding, not variance.
VARIANCE_FLOOR = 1e-12
# Top-k takes k activations whatever they are. The loss passes over one this near to its mean, whose gradient 2 / d
# would know no bound; the threshold never selects such.
SCORE_FLOOR = 1e-6


def is_alive(mean: Tensor, variance: Tensor) -> Tensor:
    """[N], [N] -> [N] bool: neurons that vary at all; no other is ever selected."""
    return variance > VARIANCE_FLOOR * (1 + mean * mean)


@dataclass(frozen=True)
class FrozenStatistics:
    """What a layer's selection and loss are computed from; float32, constant within an optimizer step.

    mean, variance: [N]; tau: []; rate: [N] share of selected tokens per neuron (scale-invariant loss).
    """

    mean: Tensor
    variance: Tensor
    tau: Tensor
    rate: Tensor

    @cached_property
    def alive(self) -> Tensor:
        """[N] bool, see `is_alive`."""
        return is_alive(self.mean, self.variance)

    @cached_property
    def inverse_variance(self) -> Tensor:
        """[N] 1 / S^2, 0 for dead neurons (whose score is then 0)."""
        return torch.where(self.alive, 1 / self.variance.clamp(min=VARIANCE_FLOOR), 0.0)

    @cached_property
    def inverse_limit(self) -> Tensor:
        """[N] 1 / (S sqrt(tau)): selected are those with |d| times this of at least 1; 0 for dead neurons."""
        return (self.inverse_variance / self.tau).sqrt()

    def pull(self, scale_invariant: bool) -> Tensor:
        """[N] what d is multiplied by in the part of the gradient that undoes shrinking: rate / S^2, or 0."""
        return self._pull if scale_invariant else torch.zeros_like(self.rate)

    @cached_property
    def _pull(self) -> Tensor:
        return 2 * self.rate * self.inverse_variance


def score(z: Tensor, statistics: FrozenStatistics) -> Tensor:
    """Monosemanticity score phi = (z - mean)^2 / S^2 (eq. 1); z [M, N] -> [M, N] float32; 0 for dead neurons."""
    d = z.float() - statistics.mean
    return d * d * statistics.inverse_variance


def select_by_threshold(scores: Tensor, statistics: FrozenStatistics) -> Tensor:
    """phi >= tau, live neurons only; [M, N] -> [M, N] bool."""
    return (scores >= statistics.tau) & statistics.alive


def select_top_k(scores: Tensor, statistics: FrozenStatistics, target_share: float) -> Tensor:
    """The ceil(share * N) highest scores of each token, live neurons only (MEmeL); [M, N] -> [M, N] bool."""
    # the subtraction keeps products such as 0.02 * 50 = 1.0000000000000002 from rounding up to one more
    k = max(1, math.ceil(target_share * scores.shape[1] - 1e-9))
    top = torch.where(statistics.alive, scores, -1.0).topk(k, dim=1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, top, True) & statistics.alive


def _counted(d2: Tensor, selected: Tensor, statistics: FrozenStatistics) -> Tensor:
    """Of the selected, those that the loss counts: all but activations at their mean; [M, N], [M, N] -> [M, N] bool."""
    return selected & (d2 * statistics.inverse_variance > SCORE_FLOOR)


def inhibition_loss(
    z: Tensor, selected: Tensor, statistics: FrozenStatistics, scale_invariant: bool, weight: Tensor | None = None
) -> Tensor:
    """Sum over the selected, before the division by n; [M, N], [M, N] bool, [M, 1] of 0 and 1 -> [] float32."""
    d = z.float() - statistics.mean
    d2 = d * d
    selected = _counted(d2, selected, statistics)
    # log of 1 outside the selection: `where` after a log of 0 would still give NaN gradients
    log_d2 = torch.where(selected, d2, 1.0).log()
    if not scale_invariant:
        return log_d2.sum()
    log_variance = statistics.variance.clamp(min=VARIANCE_FLOOR).log()
    tangent = statistics.rate * (d2 * statistics.inverse_variance - statistics.alive.float())
    if weight is not None:
        tangent = tangent * weight
    return (torch.where(selected, log_d2 - log_variance, 0.0) - tangent).sum()


def inhibition_gradient(z: Tensor, selected: Tensor, statistics: FrozenStatistics, scale_invariant: bool) -> Tensor:
    """d inhibition_loss / dz, written out; [M, N], [M, N] bool -> [M, N] float32."""
    d = z.float() - statistics.mean
    selected = _counted(d * d, selected, statistics)
    gradient = torch.where(selected, 2 / torch.where(selected, d, 1.0), 0.0)
    if scale_invariant:
        gradient = gradient - 2 * statistics.rate * statistics.inverse_variance * d
    return gradient


class _NoteLossGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, arrived: Callable[[Tensor], None]) -> Tensor:
        ctx.arrived = arrived
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.arrived(gradients[0].detach())
        return gradients[0], None


def note_loss_gradient(loss: Tensor, arrived: Callable[[Tensor], None]) -> Tensor:
    """The same loss; in backward `arrived(gradient)` is called first of all. [] -> []."""
    return _NoteLossGradient.apply(loss, arrived)


class _AddGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, add_to: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(z)  # the next layer keeps z anyway
        ctx.add_to = add_to
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        return ctx.add_to(gradients[0], z), None


def add_inhibition_gradient(z: Tensor, add_to: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The same activations; their gradient becomes `add_to(gradient, z)` in backward."""
    return _AddGradient.apply(z, add_to)
