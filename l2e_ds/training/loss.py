"""The language-model loss. Shapes: B sequences, T tokens a sequence, V vocabulary rows, M = B * T."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in float32 of each position; [B, T, V] any float, [B, T] int64 -> [M] float32, nats."""
    return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")


def language_model_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the micro-batch's tokens, []; shapes as in `token_losses`."""
    return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
