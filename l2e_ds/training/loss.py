"""Compute the language-model loss without ever holding the logits of a whole micro-batch (docs/speed.md).

As in Liger's fused linear cross-entropy (Hsu et al. 2024, arXiv 2410.10989), the output projection, the loss and its
gradient are computed together for some tokens at a time, in forward, and backward only scales. Unlike in Liger, the
gradient of the logits is divided by the number of tokens only in backward: in fp16, most of (softmax - one-hot) / M
would be rounded to zero.

Shapes: B sequences, T tokens per sequence, M = B * T, h hidden size, V vocabulary rows, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from l2e_ds.errors import SelfTestError

# The number of logits up to which PyTorch's cross-entropy computes them in one piece; they are 16 MiB in float32. More
# of them leave a processor's cache (docs/speed.md).
IN_ONE_PIECE = 2**22
# Tokens of a chunk. On a CPU its logits should stay in the last cache. On a GPU every chunk adds to the projection's
# float32 gradient, [V, h], whose traffic should be small beside that of the chunk's own products.
CHUNK = {"cpu": 512, "cuda": 8192}


class LossHead:
    """Makes a network's output projection return losses instead of logits, where it is called through this class;
    within the projection's own forward, so that ZeRO-3 still gathers the weight there."""

    def __init__(self, model: nn.Module) -> None:
        """Take over the forward of the model's `get_output_embeddings()`, which must return its logits."""
        self.projection: Any = model.get_output_embeddings()  # type: ignore[operator]
        self._logits = self.projection.forward
        self._targets: Tensor | None = None
        self._reduction: Literal["mean", "none"] = "mean"
        self._returned: Tensor | None = None  # what the projection gave the network last
        self._is_checked = False
        self.projection.forward = self._forward

    def loss(self, model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of a micro-batch, [] float32 in nats/token.

        model: the network, or the engine around it. inputs, targets: [B, T] int64. Raises SelfTestError if the network
        changes its logits after the projection.
        """
        return self._call(model, inputs, targets, "mean")

    def token_losses(self, model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy of each token, [M] float32 in nats, with the arguments and errors of `loss`. There
        is no gradient if the logits are not computed in one piece."""
        return self._call(model, inputs, targets, "none")

    def _call(self, model: Any, inputs: Tensor, targets: Tensor, reduction: Literal["mean", "none"]) -> Tensor:
        self._targets, self._reduction = targets.flatten(), reduction
        try:
            with _one_text_a_sequence():
                loss = model(input_ids=inputs, use_cache=False).logits
            if not self._is_checked:
                self._check(loss)
            return loss
        finally:
            self._targets = self._returned = None

    def _check(self, found: Tensor) -> None:
        """Check once that the network returns what its projection did: some scale logits. Raises SelfTestError."""
        given = self._returned
        if given is None or found.shape != given.shape or not torch.equal(found.nan_to_num(), given.nan_to_num()):
            raise SelfTestError(
                "LM loss: the network changes its logits after the output projection (scales or caps them); its loss"
                " cannot be computed there, and such model families are not supported"
            )
        self._is_checked = True

    def _forward(self, hidden: Tensor) -> Tensor:
        """Return the loss, [] or [M], or without targets the logits, [B, T, V]. hidden: [B, T, h]."""
        if self._targets is None:
            return self._logits(hidden)
        weight = self.projection.weight
        if self._targets.numel() * weight.shape[0] <= IN_ONE_PIECE or self.projection.bias is not None:
            logits = self._logits(hidden).float().flatten(0, 1)
            loss = functional.cross_entropy(logits, self._targets, reduction=self._reduction)
        else:
            loss = chunked_cross_entropy(hidden.flatten(0, 1), weight, self._targets, self._reduction)
        self._returned = None if self._is_checked else loss.detach()
        return loss


@contextmanager
def _one_text_a_sequence() -> Iterator[None]:
    """Tell transformers that no sequence is packed from several texts that attend to themselves only, for which it
    would look in the positions of every micro-batch, and the host would wait for the device."""
    from transformers import masking_utils

    look = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = look


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, reduction: Literal["mean", "none"] = "mean"
) -> Tensor:
    """Return the cross-entropy of the logits hidden @ weight.T: their mean, [], or that of each token, [M]; float32.
    Only the mean has a gradient. hidden: [M, h]; weight: [V, h]; targets: [M] int64."""
    if reduction == "none":
        with torch.no_grad():
            return torch.cat([_losses(part, weight, wanted)[0] for part, wanted in _chunks(hidden, targets)])
    return _ChunkedMean.apply(hidden, weight, targets)


def _chunks(hidden: Tensor, *others: Tensor) -> zip[tuple[Tensor, ...]]:
    size = CHUNK["cuda" if hidden.is_cuda else "cpu"]
    return zip(*(tensor.split(size) for tensor in (hidden, *others)), strict=True)


def _losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses, [C], and the log-probabilities, [C, V], of a chunk, both float32."""
    log_p = functional.log_softmax((hidden @ weight.T).float(), dim=1)
    return -log_p.gather(1, targets[:, None])[:, 0], log_p


def _gradients(hidden: Tensor, weight: Tensor, targets: Tensor, of_hidden: Tensor, of_weight: Tensor) -> Tensor:
    """Return the sum of a chunk's losses, [] float64; its gradient is written to of_hidden, [C, h], and added to
    of_weight, [V, h] float32. Raises CompileError on a GPU."""
    if hidden.is_cuda:
        from l2e_ds.inhibition.fused import compiling  # imports PyTorch's compiler, which CPUs do not need here

        with compiling("LM loss"):
            losses, gradient = _compiled_logit_gradient()(hidden @ weight.T, targets)
        # The products are added in float32 as they are computed, without a copy of [V, h] in half precision.
        torch.addmm(of_weight, gradient.T, hidden, out_dtype=torch.float32, out=of_weight)
    else:
        losses, log_p = _losses(hidden, weight, targets)
        gradient = log_p.exp_().scatter_add_(1, targets[:, None], -torch.ones_like(losses)[:, None]).to(hidden.dtype)
        if weight.dtype == torch.float32:
            of_weight.addmm_(gradient.T, hidden)
        else:
            of_weight += gradient.T @ hidden
    torch.mm(gradient, weight, out=of_hidden)
    return losses.sum(dtype=torch.float64)


def _logit_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return each token's loss, [C] float32, and its gradient with respect to the logits, softmax - one-hot, [C, V] in
    their dtype. torch.compile makes one pass for the sums and one for the gradient of this."""
    log_p = functional.log_softmax(logits.float(), dim=1)
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    losses = -log_p.gather(1, targets[:, None])[:, 0]
    return losses, (log_p.exp() - is_target.float()).to(logits.dtype)


@cache
def _compiled_logit_gradient() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    # Only the last chunk of a micro-batch may have another size. With dynamic sizes, the function that is used would
    # depend on the sizes before, which differ in a resumed run.
    return torch.compile(_logit_gradient, fullgraph=True, dynamic=False)


class _ChunkedMean(torch.autograd.Function):
    """Computes the gradients in forward, without the scale that backward multiplies them by."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        if not any(ctx.needs_input_grad):
            for part, wanted in _chunks(hidden, targets):
                total += _losses(part, weight, wanted)[0].sum(dtype=torch.float64)
            return (total / len(targets)).float()
        ctx.of_hidden = torch.empty_like(hidden)
        ctx.of_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for part, wanted, of_part in _chunks(hidden, targets, ctx.of_hidden):
            total += _gradients(part, weight, wanted, of_part, ctx.of_weight)
        return (total / len(targets)).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        of_hidden, of_weight = ctx.of_hidden, ctx.of_weight
        ctx.of_hidden = ctx.of_weight = None  # they are scaled in place, and a second backward must fail
        scale = gradients[0].float() / of_hidden.shape[0]
        return of_hidden.mul_(scale), of_weight.mul_(scale).to(of_hidden.dtype), None
