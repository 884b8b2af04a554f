"""Compute the method in one pass over the activations forward and one backward, with torch.compile (docs/speed.md).

`losses.py` defines what is computed, in plain tensor operations that each write a temporary of [M, N], and is the
reference of the tests. Here the same sums come from one read of the activations, and the gradient is added in one read
of the incoming gradient: if a site says that its activation is a GELU, in the GELU's own backward. In forward, the GELU
is PyTorch's on a CPU, which is faster than a compiled one, and part of the same kernel on a GPU (`triton_gelu.py`).
Nothing is saved for backward that the network does not save.

Shapes: M samples (tokens) of a micro-batch, N neurons.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from l2e_ds.inhibition.losses import VARIANCE_FLOOR, BackwardTerms, FrozenStatistics, Power, Regulariser
from l2e_ds.inhibition.moments import sample_count
from l2e_ds.inhibition.running_statistics import RunningStatistics
from l2e_ds.system.compiling import compiling

# Samples that are summed together in float32, few enough to stay in a core's cache; such groups are added in float64.
ROWS = 32
# Number of factors |d| / (S sqrt(tau)), each at least 1, of whose product one logarithm is taken, as a logarithm costs
# as much as all the rest. The product exceeds float32 if phi / tau is 2e19 in all of them.
FACTORS = 4
# A float32 product of a smaller number may have lost digits to the smallest exponent.
SMALLEST_DIVISOR = 1e-30


@dataclass(frozen=True)
class ColumnSums:
    """Holds sums over the samples of a micro-batch, [N] float64 each.

    d, d2: of d = z - mean and of d^2. selected: the number of selected samples. score: of their scores. measure: of
    their log(score / tau), or for the powers 1 and 2 of their |d| / S. force: sums of `losses.force`; None if
    the loss is not projected.
    """

    d: Tensor
    d2: Tensor
    selected: Tensor
    score: Tensor
    measure: Tensor
    force: Tensor | None = None

    def inhibition_loss(self, statistics: FrozenStatistics, regulariser: Regulariser, samples: Tensor) -> Tensor:
        """Return what `losses.inhibition_loss` does, [] float64, from the sums alone. samples: [] float64, M."""
        count = self.selected.sum()
        if regulariser.force_power:
            return ((self.measure, self.score / 2)[regulariser.force_power - 1]).sum() - count / regulariser.power
        log_score = self.measure.sum() + count * statistics.tau.squeeze().double().log()
        if regulariser.is_projected:
            return log_score / 2
        variance = statistics.variance.double().clamp(min=VARIANCE_FLOOR)
        if regulariser.loss == "published":
            return log_score + (self.selected * variance.log()).sum()
        relative = self.d2 * statistics.inverse_variance.double() - samples * statistics.alive.double()
        return log_score - (statistics.rate.double() * relative).sum()

    def projection_sums(self, power: Power, samples: Tensor) -> Tensor:
        """Return what `losses.projection_sums` does, [1 + 4 N] float64. samples: [] float64, M."""
        assert self.force is not None
        force_d = (self.selected, self.measure, self.score)[power]
        return torch.cat([samples[None], self.force, force_d, self.d, self.d2])

    def totals(
        self, statistics: FrozenStatistics, regulariser: Regulariser, samples: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return what a hook adds to its sums of the step, [HEADER + 3 N], and its `projection_sums` per sample.

        Both are float64; the second, [1 + 4 N], is None if the loss is not projected. samples: [] float64, M.
        """
        loss = self.inhibition_loss(statistics, regulariser, samples)
        header = torch.stack([samples, loss, self.score.sum()])
        step = torch.cat([header, self.d, self.d2, self.selected])
        if not regulariser.is_projected:
            return step, None
        return step, self.projection_sums(regulariser.power, samples) / samples.clamp(min=1)


def _force(
    d: Tensor, inverse_s: Tensor | float, inverse_variance: Tensor | float, power: Power, factor: float = 1.0
) -> Tensor:
    """Return `losses.force`, [M, N], as if all activations were selected.

    d: [M, N], nowhere 0; factor: `Regulariser.factor`, which only the power 0 needs.
    """
    if power == 0:
        return factor / d
    return d.sign() * inverse_s if power == 1 else d * inverse_variance


def _grouped_sums(z: Tensor, statistics: FrozenStatistics, regulariser: Regulariser) -> Tensor:
    """Return the sums that `column_sums_of` takes, [5 or 6, N] float64. z: [M, N], where M is a multiple of ROWS."""
    power = regulariser.force_power
    z = z.view(-1, ROWS // FACTORS, FACTORS, z.shape[1])
    parts = [[], [], [], [], [], []]  # type: list[list[Tensor]]
    product = torch.ones_like(statistics.mean)
    for row in range(FACTORS):
        d = z[:, :, row].float() - statistics.mean
        d2 = d * d
        score = d2 * statistics.inverse_variance
        selected = score >= statistics.tau
        for part, value in zip(parts, (d, d2, selected.float(), torch.where(selected, score, 0.0)), strict=False):
            part.append(value)
        if power == 0:
            product = product * torch.where(selected, d.abs() * statistics.inverse_limit, 1.0)
        else:
            parts[4].append(torch.where(selected, d.abs(), 0.0))
        if regulariser.is_projected:
            parts[5].append(torch.where(selected, _force(torch.where(selected, d, 1.0), 1.0, 1.0, power), 0.0))
    if power == 0:
        parts[4] = [2 * product.log()]
    return torch.stack([sum(part[1:], part[0]).sum(1).sum(0, dtype=torch.float64) for part in parts if part])


def _observe(
    z: Tensor, rest: Tensor | None, statistics: FrozenStatistics, regulariser: Regulariser, samples: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return `ColumnSums.totals` of z, [M, N], and of a few other samples. rest: the `_plain_sums` of these."""
    sums = _grouped_sums(z, statistics, regulariser)
    return _totals_of_sums(sums if rest is None else sums + rest, statistics, regulariser, samples)


def _totals_of_sums(
    sums: Tensor, statistics: FrozenStatistics, regulariser: Regulariser, samples: Tensor
) -> tuple[Tensor, Tensor | None]:
    return column_sums_of(sums, statistics, regulariser).totals(statistics, regulariser, samples)


def _sum_of_gradients(incoming: Tensor, z: Tensor, terms: BackwardTerms) -> tuple[Tensor, Tensor]:
    """Return what `add_gradient` does, but with a float32 gradient.

    In fp16, what is added would be among the subnormal numbers and lose most of its digits before it is added.
    """
    s, correction, regulariser = terms.statistics, terms.correction, terms.regulariser
    d = z.float() - s.mean
    selected = d * d * s.inverse_variance >= s.tau
    kept = torch.where(selected, d, 1.0)
    force = _force(kept, s.inverse_s, s.inverse_variance, regulariser.force_power, regulariser.factor)
    gradient = torch.where(selected, force, 0.0) - correction.shift - correction.pull * d
    squares = [torch.where(selected, g * g, 0.0).sum(1).sum(dtype=torch.float64) for g in (incoming.float(), gradient)]
    return incoming.float() + gradient * terms.gradient_scale, terms.per_token_squares(torch.stack(squares))


def _add_gradient(incoming: Tensor, z: Tensor, terms: BackwardTerms) -> tuple[Tensor, Tensor]:
    """Compute `add_gradient`."""
    outgoing, squares = _sum_of_gradients(incoming, z, terms)
    return outgoing.to(incoming.dtype), squares


def _gelu_backward(incoming: Tensor, x: Tensor, z: Tensor, terms: BackwardTerms) -> tuple[Tensor, Tensor]:
    """Compute `gelu_backward`."""
    of_z, squares = _sum_of_gradients(incoming, z, terms)
    # Half-precision z is too coarse for the formula below. The other losses keep the operation that they always had, so
    # that their numbers stay the same to the bit.
    if x.dtype != torch.float32 or not terms.regulariser.is_projected:
        return torch.ops.aten.gelu_backward(of_z, x.float()).to(x.dtype), squares
    # As d GELU / dx = cdf(x) + x pdf(x) and z = x cdf(x), z saves the error function, which takes half of the time.
    cdf = torch.where(x.abs() < SMALLEST_DIVISOR, 0.5, z / x)
    pdf = (-0.5 * x * x).exp() / math.sqrt(2 * math.pi)
    return of_z * (cdf + x * pdf), squares


_FUNCTIONS = (_grouped_sums, _observe, _totals_of_sums, _add_gradient, _gelu_backward, RunningStatistics.moved)
_COMPILED = {function: torch.compile(function, dynamic=False) for function in _FUNCTIONS}


def _run(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what the compiled function returns. Raises CompileError."""
    with compiling("inhibition.fused", "; it is not needed with inhibition.fused: false, or Settings(fused=False)"):
        return _COMPILED[function](*arguments)


# Without `no_grad`, a function would be compiled twice: with gradients being recorded, and without, as in the first
# pass of activation checkpointing. The number of samples is a tensor because a function is compiled anew for every
# value of an integer.
@torch.no_grad()
def observe(z: Tensor, statistics: FrozenStatistics, regulariser: Regulariser) -> tuple[Tensor, Tensor | None]:
    """Return `ColumnSums.totals` of a micro-batch, for threshold retrieval and without padding.

    z: [M, N], float32, bfloat16 or float16. Raises CompileError.
    """
    whole = z.shape[0] - z.shape[0] % ROWS
    samples = sample_count(z)
    if not whole:
        return _totals_of_sums(_plain_sums(z, statistics, regulariser), statistics, regulariser, samples)
    rest = _plain_sums(z[whole:], statistics, regulariser) if whole < z.shape[0] else None
    return _run(_observe, z[:whole], rest, statistics, regulariser, samples)


@torch.no_grad()
def observe_without_history(
    z: Tensor, statistics: FrozenStatistics, regulariser: Regulariser
) -> tuple[Tensor, Tensor | None]:
    """Return what `observe` does, for the first step, in which nothing is selected and the mean may be far away.

    A second pass takes the sums around the samples' own mean, as in `moments.exact_sums`. Raises CompileError.
    """
    s, samples = statistics, sample_count(z)
    offset = (column_sums(z, s, regulariser).d / samples).float().double()
    mean = (s.mean.double() + offset).float()
    around_mean = column_sums(z, FrozenStatistics.of(mean, s.variance, s.tau, s.rate), regulariser)
    d, d2 = around_mean.d, around_mean.d2
    sums = replace(around_mean, d=d + samples * offset, d2=d2 + 2 * offset * d + samples * offset * offset)
    return sums.totals(statistics, regulariser, samples)


@torch.no_grad()
def column_sums(z: Tensor, statistics: FrozenStatistics, regulariser: Regulariser) -> ColumnSums:
    """Return the sums over the samples of z, [M, N]. Raises CompileError."""
    whole = z.shape[0] - z.shape[0] % ROWS
    sums = _plain_sums(z[whole:], statistics, regulariser)
    if whole:
        sums += _run(_grouped_sums, z[:whole], statistics, regulariser)
    return column_sums_of(sums, statistics, regulariser)


def column_sums_of(sums: Tensor, statistics: FrozenStatistics, regulariser: Regulariser) -> ColumnSums:
    """Return the sums as `ColumnSums`, with the factors that are the same for all samples.

    sums: [5 or 6, N] float64, in the order of the fields. For the powers 1 and 2, `measure` and `force` come without
    their power of S.
    """
    parts = list(sums)
    if regulariser.force_power:
        parts[4] = parts[4] * statistics.inverse_s
        parts[5] = parts[5] * (statistics.inverse_s if regulariser.force_power == 1 else statistics.inverse_variance)
    return ColumnSums(*parts)


def compiled_totals(
    sums: Tensor, statistics: FrozenStatistics, regulariser: Regulariser, samples: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return `ColumnSums.totals` of the sums that `column_sums_of` takes, in a few kernels. Raises CompileError."""
    return _run(_totals_of_sums, sums, statistics, regulariser, samples)


def add_gradient(incoming: Tensor, z: Tensor, terms: BackwardTerms) -> tuple[Tensor, Tensor]:
    """Return incoming + gradient_scale * `losses.inhibition_gradient`, and `BackwardTerms.per_token_squares`.

    The first is [M, N] in the dtype of incoming, the gradient of the activations z. What is measured is the gradient
    that comes in and that of the inhibition loss, before its scale. Raises CompileError.
    """
    return _run(_add_gradient, incoming, z, terms)


def gelu_backward(incoming: Tensor, x: Tensor, z: Tensor, terms: BackwardTerms) -> tuple[Tensor, Tensor]:
    """Return what `add_gradient` does, but the gradient of x, where z = GELU(x). Raises CompileError."""
    return _run(_gelu_backward, incoming, x, z, terms)


class WithInhibition(torch.autograd.Function):
    """Computes z = compute(x); in backward, the gradient of x is `gradient(incoming, x, z)`. All are [M, N].

    keep: whether z is kept for that, which costs nothing if the next layer keeps it; otherwise None is passed for it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        compute: Callable[[Tensor], Tensor],
        gradient: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        keep: bool,
    ) -> Tensor:
        z = compute(x)
        ctx.save_for_backward(x, z if keep else None)
        ctx.gradient = gradient
        return z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.gradient(gradients[0], *ctx.saved_tensors), None, None, None


def moved(statistics: RunningStatistics, *given: Any) -> tuple[RunningStatistics, Tensor]:
    """Return what `statistics.moved(*given)` does, in a few kernels instead of fifty. Raises CompileError."""
    return _run(RunningStatistics.moved, statistics, *given)


def _plain_sums(z: Tensor, statistics: FrozenStatistics, regulariser: Regulariser) -> Tensor:
    """Return what `_grouped_sums` does, for a few samples, in plain operations. z: [M, N], for any M."""
    power = regulariser.force_power
    d = z.float() - statistics.mean
    score = d * d * statistics.inverse_variance
    selected = score >= statistics.tau
    ratio = torch.where(selected, score / statistics.tau, 1.0)
    measure = torch.where(selected, d.abs(), 0.0) if power else ratio.log()
    parts = [d, d * d, selected.float(), torch.where(selected, score, 0.0), measure]
    if regulariser.is_projected:
        parts.append(torch.where(selected, _force(torch.where(selected, d, 1.0), 1.0, 1.0, power), 0.0))
    return torch.stack([part.sum(0, dtype=torch.float64) for part in parts])
