"""Score, selection and inhibition loss as pure functions, and the two autograd functions that inject its gradient.

Shapes: M samples (tokens) of a micro-batch, N neurons. Statistics are float32 [N] and constants of the loss.

The inhibition loss of one layer (docs/method.md, 5), with d = z - mean, u = d / S, n = share * M * N and q the
power:

    published:        L = 1/n * sum_ij sel_ij * log d_ij^2
    scale-invariant:  L = 1/n * sum_ij sel_ij * log(d_ij^2 / S_j^2),  S_j^2 = mean_i d_ij^2, with S_j's gradient
    projected:        L = 1/n * sum_ij sel_ij * (|u_ij|^q - 1) / q,  log|u_ij| for q = 0

The gradient of the second is 2/n * (sel_ij / d_ij - rate_j * d_ij / S_j^2), rate_j being neuron j's share of
selected tokens. `reduce: forward` knows rate and S of this very (global) micro-batch, so its inner product with d
is zero for each neuron. `reduce: step` must not ask other ranks during forward: it takes both from the running
statistics, which is the same loss with log S_j^2 replaced by its tangent at the running S_j^2:

    L = 1/n * sum_ij [sel_ij * log(d_ij^2 / S_j^2) - rate_j * (d_ij^2 / S_j^2 - 1)]

Both are the same expression in (rate, S^2), so there is one function for both.

The gradient of the third is that of the loss of standardised activations: with m_j and s_j the mean and deviation of
neuron j over the global micro-batch, u is a function of m_j + s_j * (z_ij - mean_i z_ij) / deviation_i z_ij, whose
value is z_ij and whose gradient has neither a part along z_j nor one along 1. Written out, with the force
F_ij = sel_ij * sign(u_ij) |u_ij|^(q-1) / S_j, it is

    1/n * (F_ij - shift_j - pull_j * d_ij)

(shift_j, pull_j) being the line that fits F_j best over the tokens of the global micro-batch (`projection`). So
neither scaling nor shifting a neuron lowers the loss, to first order.

All three gradients have the form (force - shift - pull * d), and `Correction` is the part that is taken away. The
gradient enters in backward (docs/deepspeed.md): `note_loss_gradient` sits on the LM loss and notes the gradient that
arrives there (loss scale / accumulation steps), `add_inhibition_gradient` sits on the neurons.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

# A neuron whose S is below 1e-6 of (1 + |mean|) counts as dead: below that float32 sees rounding, not variance.
VARIANCE_FLOOR = 1e-12
# Top-k takes k activations whatever they are. The loss passes over one this near to its mean, whose gradient 2 / d
# would know no bound; the threshold never selects such.
SCORE_FLOOR = 1e-6


LossName = Literal["published", "scale-invariant", "projected"]
Power = Literal[0, 1, 2]


def is_alive(mean: Tensor, variance: Tensor) -> Tensor:
    """[N], [N] -> [N] bool: neurons that vary at all; no other is ever selected."""
    return variance > VARIANCE_FLOOR * (1 + mean * mean)


@dataclass(frozen=True)
class FrozenStatistics:
    """What a layer's selection and loss are computed from; float32, constant within an optimizer step. Made by `of`.

    mean, variance: [N]; tau: []; rate: [N] share of selected tokens per neuron (scale-invariant loss). alive: [N] bool,
    see `is_alive`. inverse_variance: [N] 1 / S^2; inverse_s: [N] 1 / S; inverse_limit: [N] 1 / (S sqrt(tau)), selected
    are those with |d| times this of at least 1. These three are 0 for dead neurons, whose score is then 0.
    """

    mean: Tensor
    variance: Tensor
    tau: Tensor
    rate: Tensor
    alive: Tensor
    inverse_variance: Tensor
    inverse_s: Tensor
    inverse_limit: Tensor

    @classmethod
    def of(cls, mean: Tensor, variance: Tensor, tau: Tensor, rate: Tensor) -> FrozenStatistics:
        """With what follows from the four."""
        alive = is_alive(mean, variance)
        inverse_variance = torch.where(alive, 1 / variance.clamp(min=VARIANCE_FLOOR), 0.0)
        inverse_limit = (inverse_variance / tau).sqrt()
        return cls(mean, variance, tau, rate, alive, inverse_variance, inverse_variance.sqrt(), inverse_limit)


@dataclass(frozen=True)
class Regulariser:
    """Which inhibition loss; power: q of the projected one."""

    loss: LossName = "projected"
    power: Power = 1

    @property
    def is_projected(self) -> bool:
        return self.loss == "projected"

    @property
    def force_power(self) -> Power:
        """q of the force: the logarithms of the published and the scale-invariant loss pull as q = 0 does."""
        return self.power if self.is_projected else 0

    @property
    def factor(self) -> float:
        """What the force of `force_power` is multiplied by: log d^2 is 2 log|d|."""
        return 1.0 if self.is_projected else 2.0


@dataclass(frozen=True)
class Correction:
    """What is taken from the force: shift + pull * d; float32 [N] each."""

    shift: Tensor
    pull: Tensor


@dataclass(frozen=True)
class Inhibition:
    """What backward of a micro-batch adds to the gradient of a layer's neurons, and measures.

    strength: [] float32, what the inhibition loss's gradient is multiplied by (`NeuronHook.strength`); per_token: []
    float64, what the gradient that arrives is multiplied by to be that of the LM loss's sum over this rank's tokens.
    """

    statistics: FrozenStatistics
    regulariser: Regulariser
    correction: Correction
    strength: Tensor
    per_token: Tensor

    def measured(self, squares: Tensor) -> Tensor:
        """Return what `Coefficients.squares` adds up, [2] float64, from sums of squares over the selected, [2] float64:
        of the gradient that arrived and of the inhibition loss's.
        """
        return torch.stack([squares[0] * self.per_token**2, squares[1]])


def running_correction(statistics: FrozenStatistics, regulariser: Regulariser) -> Correction:
    """That of a loss that is not projected: rate / S^2 undoes shrinking in the scale-invariant one, else nothing."""
    nothing = torch.zeros_like(statistics.rate)
    is_corrected = regulariser.loss == "scale-invariant"
    return Correction(nothing, 2 * statistics.rate * statistics.inverse_variance if is_corrected else nothing)


def projection(sums: Tensor) -> Correction:
    """That of the projected loss: the line shift + pull * d that fits the force best, for each neuron.

    sums: [1 + 4 N] float64, of `projection_sums` over the whole micro-batch, however it is scaled.
    """
    tokens, sums = sums[0], sums[1:].view(4, -1)
    force, force_d, d, d2 = sums / torch.where(tokens > 0, tokens, 1.0)
    variance = d2 - d * d
    pull = torch.where(is_alive(d, variance), (force_d - force * d) / variance, 0.0)
    return Correction((force - pull * d).float(), pull.float())


def score(z: Tensor, statistics: FrozenStatistics) -> Tensor:
    """Monosemanticity score phi = (z - mean)^2 / S^2 (eq. 1); z [M, N] -> [M, N] float32; 0 for dead neurons."""
    d = z.float() - statistics.mean
    return d * d * statistics.inverse_variance


def select_by_threshold(scores: Tensor, statistics: FrozenStatistics) -> Tensor:
    """phi >= tau, live neurons only; [M, N] -> [M, N] bool."""
    return (scores >= statistics.tau) & statistics.alive


def select_top_k(scores: Tensor, statistics: FrozenStatistics, target_share: float) -> Tensor:
    """Return the ceil(share * N) highest scores of each token, live neurons only (MEmeL); [M, N] -> [M, N] bool."""
    # the subtraction keeps products such as 0.02 * 50 = 1.0000000000000002 from rounding up to one more
    k = max(1, math.ceil(target_share * scores.shape[1] - 1e-9))
    top = torch.where(statistics.alive, scores, -1.0).topk(k, dim=1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, top, True) & statistics.alive


def _counted(d2: Tensor, selected: Tensor, statistics: FrozenStatistics) -> Tensor:
    """Of the selected, those that the loss counts: all but activations at their mean; [M, N], [M, N] -> [M, N] bool."""
    return selected & (d2 * statistics.inverse_variance > SCORE_FLOOR)


def inhibition_loss(
    z: Tensor, selected: Tensor, statistics: FrozenStatistics, regulariser: Regulariser, weight: Tensor | None = None
) -> Tensor:
    """Return sum over the selected, before the division by n; [M, N], [M, N] bool, [M, 1] of 0 and 1 -> [] float32."""
    d = z.float() - statistics.mean
    d2 = d * d
    selected = _counted(d2, selected, statistics)
    if regulariser.is_projected and regulariser.power:
        phi = torch.where(selected, d2 * statistics.inverse_variance, 1.0)
        return ((phi ** (regulariser.power / 2) - 1) / regulariser.power).sum()
    # log of 1 outside the selection: `where` after a log of 0 would still give NaN gradients
    log_d2 = torch.where(selected, d2, 1.0).log()
    if regulariser.loss == "published":
        return log_d2.sum()
    log_variance = statistics.variance.clamp(min=VARIANCE_FLOOR).log()
    log_score = torch.where(selected, log_d2 - log_variance, 0.0)
    if regulariser.is_projected:
        return log_score.sum() / 2
    tangent = statistics.rate * (d2 * statistics.inverse_variance - statistics.alive.float())
    if weight is not None:
        tangent = tangent * weight
    return (log_score - tangent).sum()


def force(z: Tensor, selected: Tensor, statistics: FrozenStatistics, regulariser: Regulariser) -> Tensor:
    """Return what pulls the selected activations to their mean, 0 for others; [M, N], [M, N] bool -> [M, N] float32."""
    d = z.float() - statistics.mean
    selected = _counted(d * d, selected, statistics)
    if regulariser.force_power == 0:
        return torch.where(selected, regulariser.factor / torch.where(selected, d, 1.0), 0.0)
    if regulariser.force_power == 1:
        return torch.where(selected, d.sign() * statistics.inverse_s, 0.0)
    return torch.where(selected, d * statistics.inverse_variance, 0.0)


def projection_sums(
    z: Tensor, selected: Tensor, statistics: FrozenStatistics, regulariser: Regulariser, weight: Tensor | None = None
) -> Tensor:
    """Return tokens, and for each neuron the sums of the force F, of F * d, of d and of d^2 over them.

    [M, N], [M, N] bool, [M, 1] of 0 and 1 -> [1 + 4 N] float64.
    """
    d = z.float() - statistics.mean
    if weight is not None:
        d = d * weight
    pulls = force(z, selected, statistics, regulariser)
    tokens = d.new_full((1,), d.shape[0]) if weight is None else weight.sum().view(1)
    sums = [part.sum(0, dtype=torch.float64) for part in (pulls, pulls * d, d, d * d)]
    return torch.cat([tokens.double(), *sums])


def inhibition_gradient(
    z: Tensor, selected: Tensor, statistics: FrozenStatistics, regulariser: Regulariser, correction: Correction
) -> Tensor:
    """d inhibition_loss / dz, written out; [M, N], [M, N] bool -> [M, N] float32."""
    d = z.float() - statistics.mean
    return force(z, selected, statistics, regulariser) - correction.shift - correction.pull * d


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
    """Return the same loss; in backward `arrived(gradient)` is called first of all. [] -> []."""
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
    """Return the same activations; their gradient becomes `add_to(gradient, z)` in backward."""
    return _AddGradient.apply(z, add_to)
