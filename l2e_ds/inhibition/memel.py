"""Replace selected activations by their mean: the baseline MEmeL (docs/method.md, 6; arXiv 2312.11560).

Shapes: M samples (tokens), N neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Deactivate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, mean: Tensor, selected: Tensor, sign: float, arrived: Callable[[], None]
    ) -> Tensor:
        ctx.save_for_backward(selected)
        ctx.sign, ctx.arrived = sign, arrived
        return torch.where(selected, mean.to(z.dtype), z)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (selected,) = ctx.saved_tensors
        ctx.arrived()
        return torch.where(selected, ctx.sign * gradients[0], gradients[0]), None, None, None, None


def reverse_deactivation(z: Tensor, mean: Tensor, selected: Tensor, arrived: Callable[[], None]) -> Tensor:
    """Return mean + (stop_gradient(z) - z) where selected, else z: the mean, with a reversed gradient.

    z: [M, N], any float dtype, which the result has too; mean: [N]; selected: [M, N] bool; arrived: called in backward.
    """
    return _Deactivate.apply(z, mean, selected, -1.0, arrived)


def naive_deactivation(z: Tensor, mean: Tensor, selected: Tensor, arrived: Callable[[], None]) -> Tensor:
    """Return the mean where selected, without a gradient, else z. The arguments are those of `reverse_deactivation`."""
    return _Deactivate.apply(z, mean, selected, 0.0, arrived)
