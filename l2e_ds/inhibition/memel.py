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
        ctx: Any, z: Tensor, mean: Tensor, selected: Tensor, factor: float, arrived: Callable[[], None]
    ) -> Tensor:
        ctx.save_for_backward(selected)
        ctx.factor, ctx.arrived = factor, arrived
        return torch.where(selected, mean.to(z.dtype), z)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (selected,) = ctx.saved_tensors
        ctx.arrived()
        return torch.where(selected, ctx.factor * gradients[0], gradients[0]), None, None, None, None


def deactivate(z: Tensor, mean: Tensor, selected: Tensor, factor: float, arrived: Callable[[], None]) -> Tensor:
    """Return the mean where selected, else z; in backward the gradient of the selected is multiplied by `factor`.

    factor: -1 for reverse deactivation, whose value and gradient are those of mean + (stop_gradient(z) - z); 0 for
    naive deactivation. z: [M, N], any float dtype, which the result has too; mean: [N]; selected: [M, N] bool; arrived:
    called in backward.
    """
    return _Deactivate.apply(z, mean, selected, factor, arrived)
