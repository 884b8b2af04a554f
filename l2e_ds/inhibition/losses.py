"""Compute score, selection and inhibition loss as pure functions, and inject the loss's gradient.

Shapes: M samples (tokens) of a micro-batch, N neurons. Statistics are float32 [N] and constants of the loss.

The inhibition loss of one layer (docs/method.md, 5), with d = z - mean, u = d / S, n = share * M * N and the power q:

    published:        L = 1/n * sum_ij sel_ij * log d_ij^2
    scale-invariant:  L = 1/n * sum_ij sel_ij * log(d_ij^2 / S_j^2),  S_j^2 = mean_i d_ij^2, with S_j's gradient
    projected:        L = 1/n * sum_ij sel_ij * (|u_ij|^q - 1) / q,  log|u_ij| for q = 0

The gradient of the second is 2/n * (sel_ij / d_ij - rate_j * d_ij / S_j^2), where rate_j is the share of tokens at
which neuron j is selected. `reduce: forward` takes rate and S from the current global micro-batch, so that for each
neuron the inner product of this gradient with d is zero. `reduce: step` must not ask other ranks during forward and
takes both from the running statistics, which replaces log S_j^2 by its tangent at the running S_j^2:

    L = 1/n * sum_ij [sel_ij * log(d_ij^2 / S_j^2) - rate_j * (d_ij^2 / S_j^2 - 1)]

Both are the same expression in (rate, S^2), so one function serves both.

The gradient of the third is that of the loss of standardised activations. Let m_j and s_j be mean and deviation of
neuron j over the global micro-batch, as constants. u is taken to be a function of m_j + s_j * (z_ij - mean_i z_ij) /
deviation_i z_ij, which equals z_ij and whose gradient has no component along z_j and none along 1. With the force
F_ij = sel_ij * sign(u_ij) |u_ij|^(q-1) / S_j, this gradient is

    1/n * (F_ij - shift_j - pull_j * d_ij)

where (shift_j, pull_j) is the line that best fits F_j over the tokens of the global micro-batch (`projection`). To
first order, neither scaling nor shifting a neuron lowers the loss. A neuron whose S has grown since inhibition began
keeps only a part of pull_j (`kept_pull`), so that the force shrinks it again.

All three gradients have the form (force - shift - pull * d); `Correction` is what is subtracted. The gradient enters in
backward: `note_loss_gradient` sits on the LM loss and notes the gradient that arrives there (loss scale / accumulation
steps), and `add_inhibition_gradient` sits on the neurons.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

# A neuron with S up to 1e-6 sqrt(1 + mean^2) counts as dead: there float32 shows rounding, not variance.
VARIANCE_FLOOR = 1e-12
# Top-k selects k activations however low their scores are. The loss leaves out those up to this score, near their mean,
# for which the gradient 2 / d has no bound. The threshold never selects any of them.
SCORE_FLOOR = 1e-6
# How fast the projected loss counteracts growth: a neuron keeps nothing of its pull once its S is e^(1/4) = 1.28 times
# what it was when inhibition began.
GROWTH_GAIN = 4.0

LossName = Literal["published", "scale-invariant", "projected"]
Power = Literal[0, 1, 2]


def is_alive(mean: Any, variance: Any) -> Any:
    """Return which neurons vary at all, [N] bool; the others are never selected. mean, variance: [N].

    All three are tensors, or all three NumPy arrays.
    """
    return variance > VARIANCE_FLOOR * (1 + mean * mean)


@dataclass(frozen=True)
class FrozenStatistics:
    """Holds what a layer's selection and loss are computed from, float32; make it with `of`.

    mean, variance: [N]. tau: [1]. rate: [N], the share of tokens at which each neuron is selected (for the
    scale-invariant loss). alive: [N] bool, from `is_alive`. inverse_variance: [N], 1 / S^2. inverse_s: [N], 1 / S.
    inverse_limit: [N], 1 / (S sqrt(tau)), which times |d| is at least 1 for the selected activations. The last three
    are 0 for dead neurons, so that their score is 0.
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
        """Return these statistics, and what follows from them. mean, variance, rate: [N]; tau: [1]; all float32."""
        alive = is_alive(mean, variance)
        inverse_variance = torch.where(alive, 1 / variance.clamp(min=VARIANCE_FLOOR), 0.0)
        inverse_limit = (inverse_variance / tau).sqrt()
        return cls(mean, variance, tau, rate, alive, inverse_variance, inverse_variance.sqrt(), inverse_limit)


@dataclass(frozen=True)
class Regulariser:
    """Names the inhibition loss; power: q of the projected one."""

    loss: LossName = "projected"
    power: Power = 1

    @property
    def is_projected(self) -> bool:
        """Whether the gradient is projected (docs/method.md, 5.2)."""
        return self.loss == "projected"

    @property
    def force_power(self) -> Power:
        """The q of the force; 0 for the published and the scale-invariant loss, which are logarithms."""
        return self.power if self.is_projected else 0

    @property
    def factor(self) -> float:
        """The factor of the force with q = `force_power`: 2 where the loss has log d^2, which is 2 log|d|."""
        return 1.0 if self.is_projected else 2.0


@dataclass(frozen=True)
class Correction:
    """Holds what is subtracted from the force, shift + pull * d. Both are [N] float32."""

    shift: Tensor
    pull: Tensor


@dataclass(frozen=True)
class BackwardTerms:
    """Holds what a layer's backward needs to add the inhibition loss's gradient, and to measure both gradients.

    gradient_scale: [] float32, the factor of the inhibition loss's gradient, from `NeuronHook.gradient_scale`.
    per_token: [] float64, the factor that makes the gradient which arrives that of the LM loss summed over this rank's
    tokens.
    """

    statistics: FrozenStatistics
    regulariser: Regulariser
    correction: Correction
    gradient_scale: Tensor
    per_token: Tensor

    def per_token_squares(self, squares: Tensor) -> Tensor:
        """Return what `Coefficients.squares` adds up, [2] float64.

        squares: [2] float64, sums over the selected activations of the squared gradient that arrived and of the squared
        gradient of the inhibition loss.
        """
        return torch.stack([squares[0] * self.per_token**2, squares[1]])


def running_correction(statistics: FrozenStatistics, regulariser: Regulariser) -> Correction:
    """Return the correction of a loss that is not projected.

    For the scale-invariant loss it is a pull of 2 rate / S^2, which undoes the shrinking, for the published one 0.
    """
    nothing = torch.zeros_like(statistics.rate)
    is_corrected = regulariser.loss == "scale-invariant"
    return Correction(nothing, 2 * statistics.rate * statistics.inverse_variance if is_corrected else nothing)


def kept_pull(variance: Tensor, variance_at_start: Tensor) -> Tensor:
    """Return the share of its pull that each neuron keeps, [N] float64, from 0 to 1: 1 unless it has grown.

    variance, variance_at_start: [N] float64, S^2 now and when inhibition began; 0 for a neuron that did not vary then,
    whose growth does not count. Source: docs/method.md, 5.2.
    """
    has_grown = (variance_at_start > 0) & (variance > variance_at_start)
    ratio = torch.where(has_grown, variance, 1.0) / torch.where(has_grown, variance_at_start, 1.0)
    return (1 - GROWTH_GAIN / 2 * ratio.log()).clamp(min=0)


def projection(sums: Tensor, kept: Tensor) -> Correction:
    """Return the correction of the projected loss: for each neuron, the line shift + pull * d that best fits the force.

    sums: [1 + 4 N] float64, the `projection_sums` of the global micro-batch, times any number (docs/method.md, 5.2).
    kept: [N] float64, from `kept_pull`. Both may have one more dimension in front, that of several layers.
    """
    tokens = sums[..., :1]
    means = sums[..., 1:] / torch.where(tokens > 0, tokens, 1.0)
    force, force_d, d, d2 = means.chunk(4, dim=-1)
    variance = d2 - d * d
    pull = torch.where(is_alive(d, variance), kept * (force_d - force * d) / variance, 0.0)
    return Correction((force - pull * d).float(), pull.float())


def score(z: Tensor, statistics: FrozenStatistics) -> Tensor:
    """Return the monosemanticity score phi = (z - mean)^2 / S^2, [M, N] float32; 0 for dead neurons.

    z: [M, N], any float dtype. Source: eq. 1 of arXiv 2503.23298; docs/method.md, 3.
    """
    d = z.float() - statistics.mean
    return d * d * statistics.inverse_variance


def select_by_threshold(scores: Tensor, statistics: FrozenStatistics) -> Tensor:
    """Return where phi >= tau, for live neurons only, [M, N] bool (docs/method.md, 4). scores: [M, N]."""
    return (scores >= statistics.tau) & statistics.alive


def select_top_k(scores: Tensor, statistics: FrozenStatistics, target_share: float) -> Tensor:
    """Return where the ceil(share * N) highest scores of each token are, for live neurons only, [M, N] bool.

    scores: [M, N]. Source: MEmeL, arXiv 2312.11560; docs/method.md, 6.
    """
    # The subtraction keeps products such as 0.07 * 100 = 7.000000000000001 from being rounded up to one neuron more.
    k = max(1, math.ceil(target_share * scores.shape[1] - 1e-9))
    top = torch.where(statistics.alive, scores, -1.0).topk(k, dim=1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, top, True) & statistics.alive


def _counted(d2: Tensor, selected: Tensor, statistics: FrozenStatistics) -> Tensor:
    """Return the selected activations without those at their mean, which the loss leaves out, [M, N] bool.

    d2: [M, N] squares of z - mean; selected: [M, N] bool.
    """
    return selected & (d2 * statistics.inverse_variance > SCORE_FLOOR)


def inhibition_loss(
    z: Tensor, selected: Tensor, statistics: FrozenStatistics, regulariser: Regulariser, weight: Tensor | None = None
) -> Tensor:
    """Return the inhibition loss before its division by n, [] float32 (docs/method.md, 5; eq. 5 of arXiv 2503.23298).

    z: [M, N]; selected: [M, N] bool; weight: [M, 1], 0 for padding and else 1 (default: no padding).
    """
    d = z.float() - statistics.mean
    d2 = d * d
    selected = _counted(d2, selected, statistics)
    if regulariser.is_projected and regulariser.power:
        phi = torch.where(selected, d2 * statistics.inverse_variance, 1.0)
        return ((phi ** (regulariser.power / 2) - 1) / regulariser.power).sum()
    # The log is taken of 1 outside the selection: `where` after a log of 0 would still give NaN gradients.
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
    """Return the force that pulls the selected activations to their mean, 0 for the others, [M, N] float32.

    It is factor * sign(u) |u|^(force_power - 1) / S (docs/method.md, 5.2). z: [M, N]; selected: [M, N] bool.
    """
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
    """Return the number of tokens and, over them, each neuron's sums of the force F, F * d, d and d^2.

    The result is [1 + 4 N] float64, in this order. The arguments are those of `inhibition_loss`.
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
    """Return the gradient of `inhibition_loss` with respect to z, written out, [M, N] float32.

    z: [M, N]; selected: [M, N] bool; correction: from `running_correction` or `projection`.
    """
    d = z.float() - statistics.mean
    return force(z, selected, statistics, regulariser) - correction.shift - correction.pull * d


def note_loss_gradient(loss: Tensor, arrived: Callable[[Tensor], None]) -> Tensor:
    """Return the same loss, []; `arrived` is called with its gradient, [], before backward reaches the network."""
    noted = loss.clone()  # a view would lose its hook where the caller multiplies in place
    noted.register_hook(lambda gradient: arrived(gradient.detach()))
    return noted


class _AddGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, add_to: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(z)  # costs no memory: the next layer keeps z anyway
        ctx.add_to = add_to
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        return ctx.add_to(gradients[0], z), None


def add_inhibition_gradient(z: Tensor, add_to: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return the same activations, [M, N]; in backward their gradient becomes `add_to(gradient, z)`, [M, N] each."""
    return _AddGradient.apply(z, add_to)
