"""The method in one pass over the activations forward and one backward, compiled by torch.compile.

`losses.py` says what is computed, in plain tensor operations that write a temporary of [M, N] for each; it is the
reference of the tests. Here the same sums come from one read of the activations, and the gradient is added while it
passes by: within the GELU's own backward, where a site says that its activation is one. Forward a GELU is PyTorch's on
a CPU (faster than compiled) and part of the same kernel on a GPU (`triton_gelu.py`). Nothing is saved for backward
that the network does not save.

Shapes: M samples (tokens) of a micro-batch, N neurons, G groups of ROWS samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

from l2e_ds.errors import CompileError
from l2e_ds.inhibition import running_statistics
from l2e_ds.inhibition.losses import VARIANCE_FLOOR, FrozenStatistics
from l2e_ds.inhibition.moments import Moments

# Samples whose sums are made together, in float32; groups are added in float64. Few enough to stay in a core's cache.
ROWS = 32
# Factors |d| / (S sqrt(tau)), each at least 1, multiplied before one logarithm is taken of their product (a logarithm
# costs as much as all the rest). Float32 is exceeded where phi / tau is 2e19 in all of them.
FACTORS = 4


@dataclass(frozen=True)
class ColumnSums:
    """Sums over the samples of a micro-batch, float64.

    d, d2, selected: [N], of d = z - mean, of d^2 and of the selected; score: [] of the selected scores; log_ratio: []
    of log(score / tau) over the selected.
    """

    d: Tensor
    d2: Tensor
    selected: Tensor
    score: Tensor
    log_ratio: Tensor

    def inhibition_loss(self, statistics: FrozenStatistics, scale_invariant: bool, samples: int) -> Tensor:
        """As `losses.inhibition_loss`, [] float64, from the sums alone."""
        log_score = self.log_ratio + self.selected.sum() * statistics.tau.double().log()
        variance = statistics.variance.double().clamp(min=VARIANCE_FLOOR)
        if not scale_invariant:
            return log_score + (self.selected * variance.log()).sum()
        relative = self.d2 * statistics.inverse_variance.double() - samples * statistics.alive.double()
        return log_score - (statistics.rate.double() * relative).sum()


def _grouped_sums(z: Tensor, mean: Tensor, inverse_variance: Tensor, inverse_limit: Tensor, tau: Tensor) -> Tensor:
    """[M, N] -> [5, N] float64; M a multiple of ROWS."""
    z = z.view(-1, ROWS // FACTORS, FACTORS, z.shape[1])
    parts = [[], [], [], [], []]  # type: list[list[Tensor]]
    product = torch.ones_like(mean)
    for row in range(FACTORS):
        d = z[:, :, row].float() - mean
        d2 = d * d
        score = d2 * inverse_variance
        selected = score >= tau
        product = product * torch.where(selected, d.abs() * inverse_limit, 1.0)
        for part, value in zip(parts, (d, d2, selected.float(), torch.where(selected, score, 0.0)), strict=False):
            part.append(value)
    parts[4] = [2 * product.log()]
    return torch.stack([sum(part[1:], part[0]).sum(1).sum(0, dtype=torch.float64) for part in parts])


def _add_gradient(
    z: Tensor, incoming: Tensor, mean: Tensor, inverse_variance: Tensor, tau: Tensor, pull: Tensor, strength: Tensor
) -> Tensor:
    """incoming + strength * d inhibition_loss / dz; all [M, N]; pull: [N], rate / S^2 or 0."""
    d = z.float() - mean
    selected = d * d * inverse_variance >= tau
    gradient = torch.where(selected, 2 / torch.where(selected, d, 1.0), 0.0) - pull * d
    return incoming + (gradient * strength).to(incoming.dtype)


def _gelu_backward(
    x: Tensor,
    z: Tensor,
    incoming: Tensor,
    mean: Tensor,
    inverse_variance: Tensor,
    tau: Tensor,
    pull: Tensor,
    strength: Tensor,
) -> Tensor:
    """The gradient of x from that of z = GELU(x), with the inhibition's; all [M, N]."""
    of_z = _add_gradient(z, incoming, mean, inverse_variance, tau, pull, strength)
    return torch.ops.aten.gelu_backward(of_z, x)


_compiled_sums = torch.compile(_grouped_sums, dynamic=False)
_compiled_gradient = torch.compile(_add_gradient, dynamic=False)
_compiled_gelu_backward = torch.compile(_gelu_backward, dynamic=False)
_compiled_move = torch.compile(running_statistics.moved_statistics, dynamic=False)


# A function compiled while gradients are recorded and while they are not (checkpointing's first pass) is two.
@torch.no_grad()
def column_sums(z: Tensor, statistics: FrozenStatistics) -> ColumnSums:
    """What forward needs of [M, N] activations (threshold retrieval, every sample counts). Raises CompileError."""
    whole = z.shape[0] - z.shape[0] % ROWS
    sums = torch.zeros(5, z.shape[1], dtype=torch.float64, device=z.device)
    constants = (statistics.mean, statistics.inverse_variance, statistics.inverse_limit, statistics.tau)
    if whole:
        with _explained():
            sums += _compiled_sums(z[:whole], *constants)
    if whole < z.shape[0]:
        sums += _plain_sums(z[whole:], *constants)
    return ColumnSums(sums[0], sums[1], sums[2], sums[3].sum(), sums[4].sum())


def exact_column_sums(z: Tensor, statistics: FrozenStatistics) -> ColumnSums:
    """As `column_sums` without history, when nothing is selected and the mean may be far away.

    A second pass goes around the samples' own mean, as in `moments.exact_sums`.
    """
    samples = z.shape[0]
    offset = (column_sums(z, statistics).d / samples).float().double()
    around_mean = column_sums(z, replace(statistics, mean=(statistics.mean.double() + offset).float()))
    d, d2 = around_mean.d, around_mean.d2
    return replace(around_mean, d=d + samples * offset, d2=d2 + 2 * offset * d + samples * offset * offset)


def add_gradient(
    incoming: Tensor, z: Tensor, statistics: FrozenStatistics, scale_invariant: bool, strength: Tensor
) -> Tensor:
    """incoming + strength * losses.inhibition_gradient, in incoming's dtype; [M, N] each. Raises CompileError."""
    constants = (statistics.mean, statistics.inverse_variance, statistics.tau, statistics.pull(scale_invariant))
    with _explained():
        return _compiled_gradient(z, incoming, *constants, strength)


def gelu_backward(
    x: Tensor, z: Tensor, incoming: Tensor, statistics: FrozenStatistics, scale_invariant: bool, strength: Tensor
) -> Tensor:
    """The gradient of x where z = GELU(x) and `add_gradient` is that of z; [M, N] each. Raises CompileError."""
    constants = (statistics.mean, statistics.inverse_variance, statistics.tau, statistics.pull(scale_invariant))
    with _explained():
        return _compiled_gelu_backward(x, z, incoming, *constants, strength)


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
    with _explained():
        return _compiled_move(*arguments)


def _plain_sums(z: Tensor, mean: Tensor, inverse_variance: Tensor, _: Tensor, tau: Tensor) -> Tensor:
    """As `_grouped_sums`, of a few samples."""
    d = z.float() - mean
    score = d * d * inverse_variance
    selected = score >= tau
    ratio = torch.where(selected, score / tau, 1.0)
    parts = (d, d * d, selected.float(), torch.where(selected, score, 0.0), ratio.log())
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
