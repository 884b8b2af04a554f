"""The method in one pass over the activations forward and one backward, compiled by torch.compile.

`losses.py` says what is computed, in plain tensor operations that write a temporary of [M, N] for each; it is the
reference of the tests. Here the same sums come from one read of the activations, and the gradient is added while it
passes by: within the GELU's own backward, where a site says that its activation is one. Forward a GELU is PyTorch's on
a CPU (faster than compiled) and part of the same kernel on a GPU (`triton_gelu.py`). Nothing is saved for backward
that the network does not save.

Shapes: M samples (tokens) of a micro-batch, N neurons, G groups of ROWS samples.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

from l2e_ds.errors import CompileError
from l2e_ds.inhibition import running_statistics
from l2e_ds.inhibition.losses import VARIANCE_FLOOR, Correction, FrozenStatistics, Power, Regulariser
from l2e_ds.inhibition.moments import Moments

# Samples whose sums are made together, in float32; groups are added in float64. Few enough to stay in a core's cache.
ROWS = 32
# Factors |d| / (S sqrt(tau)), each at least 1, multiplied before one logarithm is taken of their product (a logarithm
# costs as much as all the rest). Float32 is exceeded where phi / tau is 2e19 in all of them.
FACTORS = 4


@dataclass(frozen=True)
class ColumnSums:
    """Sums over the samples of a micro-batch, float64.

    [N] each. d, d2: of d = z - mean and of d^2; selected: number of the selected; score: of their scores; measure: of
    log(score / tau) over them, with power 1 and 2 of |d| / S instead. force: of what pulls them to their mean
    (`losses.force`); None where the loss is not projected.
    """

    d: Tensor
    d2: Tensor
    selected: Tensor
    score: Tensor
    measure: Tensor
    force: Tensor | None = None

    def inhibition_loss(self, statistics: FrozenStatistics, regulariser: Regulariser, samples: int) -> Tensor:
        """As `losses.inhibition_loss`, [] float64, from the sums alone."""
        count = self.selected.sum()
        if regulariser.force_power:
            return ((self.measure, self.score / 2)[regulariser.force_power - 1]).sum() - count / regulariser.power
        log_score = self.measure.sum() + count * statistics.tau.double().log()
        if regulariser.is_projected:
            return log_score / 2
        variance = statistics.variance.double().clamp(min=VARIANCE_FLOOR)
        if regulariser.loss == "published":
            return log_score + (self.selected * variance.log()).sum()
        relative = self.d2 * statistics.inverse_variance.double() - samples * statistics.alive.double()
        return log_score - (statistics.rate.double() * relative).sum()

    def projection_sums(self, power: Power, samples: int) -> Tensor:
        """As `losses.projection_sums`, [1 + 4 N] float64."""
        assert self.force is not None
        force_d = (self.selected, self.measure, self.score)[power]
        return torch.cat([self.d.new_full((1,), samples), self.force, force_d, self.d, self.d2])


def _force(
    d: Tensor, inverse_s: Tensor | float, inverse_variance: Tensor | float, power: Power, factor: float = 1.0
) -> Tensor:
    """What pulls a selected activation to its mean, sign(u) |u|^(power - 1) / S; factor: of power 0 (see
    `Regulariser.factor`); d is nowhere 0. [M, N] -> [M, N]."""
    if power == 0:
        return factor / d
    return d.sign() * inverse_s if power == 1 else d * inverse_variance


def _grouped_sums(
    z: Tensor,
    mean: Tensor,
    inverse_variance: Tensor,
    inverse_limit: Tensor,
    tau: Tensor,
    power: Power,
    is_projected: bool,
) -> Tensor:
    """[M, N] -> [5 or 6, N] float64, as `scaled` takes it; M a multiple of ROWS."""
    z = z.view(-1, ROWS // FACTORS, FACTORS, z.shape[1])
    parts = [[], [], [], [], [], []]  # type: list[list[Tensor]]
    product = torch.ones_like(mean)
    for row in range(FACTORS):
        d = z[:, :, row].float() - mean
        d2 = d * d
        score = d2 * inverse_variance
        selected = score >= tau
        for part, value in zip(parts, (d, d2, selected.float(), torch.where(selected, score, 0.0)), strict=False):
            part.append(value)
        if power == 0:
            product = product * torch.where(selected, d.abs() * inverse_limit, 1.0)
        else:
            parts[4].append(torch.where(selected, d.abs(), 0.0))
        if is_projected:
            parts[5].append(torch.where(selected, _force(torch.where(selected, d, 1.0), 1.0, 1.0, power), 0.0))
    if power == 0:
        parts[4] = [2 * product.log()]
    return torch.stack([sum(part[1:], part[0]).sum(1).sum(0, dtype=torch.float64) for part in parts if part])


def _add_gradient(
    z: Tensor,
    incoming: Tensor,
    mean: Tensor,
    inverse_s: Tensor,
    inverse_variance: Tensor,
    tau: Tensor,
    shift: Tensor,
    pull: Tensor,
    strength: Tensor,
    factor: float,
    power: Power,
) -> tuple[Tensor, Tensor, Tensor]:
    """incoming + strength * d inhibition_loss / dz, [M, N] each; and sums of squares over the selected, [M] float32:
    of incoming and of the inhibition loss's gradient."""
    d = z.float() - mean
    selected = d * d * inverse_variance >= tau
    force = _force(torch.where(selected, d, 1.0), inverse_s, inverse_variance, power, factor)
    gradient = torch.where(selected, force, 0.0) - shift - pull * d
    squares = [torch.where(selected, g * g, 0.0).sum(1) for g in (incoming.float(), gradient)]
    return incoming + (gradient * strength).to(incoming.dtype), squares[0], squares[1]


def _gelu_backward(x: Tensor, z: Tensor, incoming: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As `_add_gradient`; the gradient is that of x, where z = GELU(x)."""
    of_z, *squares = _add_gradient(z, incoming, *arguments)
    return torch.ops.aten.gelu_backward(of_z, x), squares[0], squares[1]


_COMPILED = {
    function: torch.compile(function, dynamic=False)
    for function in (_grouped_sums, _add_gradient, _gelu_backward, running_statistics.moved_statistics)
}


def _run(function: Callable[..., Any], device: torch.device, *arguments: Any) -> Any:
    """The function, compiled. Raises CompileError.

    Not on an x86 processor without vector instructions (or told so by ATEN_CPU_CAPABILITY=default): Inductor of
    torch 2.13 writes C++ for it that does not compile.
    """
    if device.type == "cpu" and not _has_vectors():
        return function(*arguments)
    with _explained():
        return _COMPILED[function](*arguments)


@cache
def _has_vectors() -> bool:
    # on other architectures "DEFAULT" has them
    return platform.machine() not in ("x86_64", "AMD64") or torch.backends.cpu.get_cpu_capability() != "DEFAULT"


# A function compiled while gradients are recorded and while they are not (checkpointing's first pass) is two.
@torch.no_grad()
def column_sums(z: Tensor, statistics: FrozenStatistics, regulariser: Regulariser) -> ColumnSums:
    """What forward needs of [M, N] activations (threshold retrieval, every sample counts). Raises CompileError."""
    whole = z.shape[0] - z.shape[0] % ROWS
    sums = torch.zeros(5 + regulariser.is_projected, z.shape[1], dtype=torch.float64, device=z.device)
    s = statistics
    arguments = (s.mean, s.inverse_variance, s.inverse_limit, s.tau)
    chosen = (regulariser.force_power, regulariser.is_projected)
    if whole:
        sums += _run(_grouped_sums, z.device, z[:whole], *arguments, *chosen)
    if whole < z.shape[0]:
        sums += _plain_sums(z[whole:], statistics, *chosen)
    return scaled(sums, statistics, regulariser.force_power)


def scaled(sums: Tensor, statistics: FrozenStatistics, power: Power) -> ColumnSums:
    """[5 or 6, N] float64, in the order of the fields; the force and, with power 1 and 2, `measure` still lack their
    power of S."""
    if power:
        sums[4] *= statistics.inverse_s
        sums[5] *= statistics.inverse_s if power == 1 else statistics.inverse_variance
    return ColumnSums(*sums)


def exact_column_sums(z: Tensor, statistics: FrozenStatistics, regulariser: Regulariser) -> ColumnSums:
    """As `column_sums` without history, when nothing is selected and the mean may be far away.

    A second pass goes around the samples' own mean, as in `moments.exact_sums`.
    """
    samples = z.shape[0]
    offset = (column_sums(z, statistics, regulariser).d / samples).float().double()
    shifted = replace(statistics, mean=(statistics.mean.double() + offset).float())
    around_mean = column_sums(z, shifted, regulariser)
    d, d2 = around_mean.d, around_mean.d2
    return replace(around_mean, d=d + samples * offset, d2=d2 + 2 * offset * d + samples * offset * offset)


def add_gradient(
    incoming: Tensor,
    z: Tensor,
    statistics: FrozenStatistics,
    regulariser: Regulariser,
    correction: Correction,
    strength: Tensor,
) -> tuple[Tensor, Tensor]:
    """incoming + strength * losses.inhibition_gradient, in incoming's dtype, [M, N] each; and the sums of squares over
    the selected of both, before strength, [2] float64. Raises CompileError."""
    constants = _constants(statistics, regulariser, correction, strength)
    outgoing, *squares = _run(_add_gradient, z.device, z, incoming, *constants)
    return outgoing, _summed(squares)


def gelu_backward(
    x: Tensor,
    z: Tensor,
    incoming: Tensor,
    statistics: FrozenStatistics,
    regulariser: Regulariser,
    correction: Correction,
    strength: Tensor,
) -> tuple[Tensor, Tensor]:
    """As `add_gradient`; the gradient is that of x, where z = GELU(x). Raises CompileError."""
    constants = _constants(statistics, regulariser, correction, strength)
    outgoing, *squares = _run(_gelu_backward, x.device, x, z, incoming, *constants)
    return outgoing, _summed(squares)


def _constants(
    statistics: FrozenStatistics, regulariser: Regulariser, correction: Correction, strength: Tensor
) -> tuple[Any, ...]:
    s = statistics
    tensors = (s.mean, s.inverse_s, s.inverse_variance, s.tau, correction.shift, correction.pull, strength)
    return (*tensors, regulariser.factor, regulariser.force_power)


def _summed(squares: list[Tensor]) -> Tensor:
    return torch.stack([part.sum(dtype=torch.float64) for part in squares])


class _WithInhibition(torch.autograd.Function):
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


# What compute and gradient do depends on the step's state and changes it, which a graph, traced once, would not see.
@torch.compiler.disable
def with_inhibition(
    x: Tensor,
    compute: Callable[[Tensor], Tensor],
    gradient: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    keep: bool,
) -> Tensor:
    """`compute(x)`, whose gradient in backward is `gradient(incoming, x, z)`; all [M, N].

    keep: whether z is kept for it (the next layer keeps it anyway); else it is given as None.
    """
    return _WithInhibition.apply(x, compute, gradient, keep)


def moved_statistics(*arguments: Any) -> tuple[Moments, Tensor, Tensor, Tensor, Tensor]:
    """`running_statistics.moved_statistics` in a few kernels instead of fifty. Raises CompileError."""
    return _run(running_statistics.moved_statistics, arguments[1].device, *arguments)


def _plain_sums(z: Tensor, statistics: FrozenStatistics, power: Power, is_projected: bool) -> Tensor:
    """As `_grouped_sums`, of a few samples."""
    d = z.float() - statistics.mean
    score = d * d * statistics.inverse_variance
    selected = score >= statistics.tau
    ratio = torch.where(selected, score / statistics.tau, 1.0)
    measure = torch.where(selected, d.abs(), 0.0) if power else ratio.log()
    parts = [d, d * d, selected.float(), torch.where(selected, score, 0.0), measure]
    if is_projected:
        parts.append(torch.where(selected, _force(torch.where(selected, d, 1.0), 1.0, 1.0, power), 0.0))
    return torch.stack([part.sum(0, dtype=torch.float64) for part in parts])


@contextmanager
def _explained() -> Iterator[None]:
    """What a compiler says runs over many lines, and it may be missing."""
    try:
        yield
    except (TorchDynamoException, InductorError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CompileError(
            f"inhibition.fused: torch.compile failed ({reason[:200]}); it needs a C++ compiler (CPU) or Triton (GPU);"
            " inhibition.fused: false goes without"
        ) from error
