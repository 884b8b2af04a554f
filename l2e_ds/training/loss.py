"""Compute the language-model loss without ever holding the logits of a whole micro-batch (docs/speed.md).

As in Liger's fused linear cross-entropy (Hsu et al. 2024, arXiv 2410.10989), the output projection, the loss and its
gradient are computed together for some tokens at a time, in forward, and backward only scales. Unlike in Liger, the
gradient of the logits is divided by the number of tokens only in backward: in fp16, most of (softmax - one-hot) / M
would be rounded to zero.

The z-loss of PaLM (Chowdhery et al. 2022, section 5) is `coefficient` times the mean square of log Z, where Z is the
denominator of a token's softmax. Its gradient is part of the LM loss's, whose value stays the cross-entropy: a token's
gradient is (1 + 2 coefficient log Z) softmax - one-hot.

Shapes: B sequences, T tokens per sequence, M = B * T, h hidden size, V vocabulary rows, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
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
    """Computes the LM loss inside the model's output projection, so that the logits never exist as a whole.

    Calls through this class return losses; other calls of the model return logits as before. The loss is computed in
    the projection's own forward because ZeRO-3 gathers the weight there.
    """

    def __init__(self, model: nn.Module, z_loss: float = 0.0) -> None:
        """Take over the forward of the model's `get_output_embeddings()`, which must return its logits.

        z_loss: the coefficient.
        """
        self._coefficient = z_loss
        self.projection: Any = model.get_output_embeddings()  # type: ignore[operator]
        self._logits = self.projection.forward
        self._targets: Tensor | None = None
        self._reduction: Literal["mean", "none"] = "mean"
        self._returned: Tensor | None = None  # what the projection gave the network last
        self._z_loss: Tensor | None = None  # which it computed beside it
        self._is_checked = False
        self.projection.forward = self._forward

    def loss(self, model: Any, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the mean cross-entropy of a micro-batch and its z-loss, [] float32 in nats/token each.

        The gradient of the first is also the z-loss's. The z-loss has none, and is None if its coefficient is 0. model:
        the network, or the engine around it. inputs, targets: [B, T] int64. Raises SelfTestError if the network changes
        its logits after the projection.
        """
        return self._call(model, inputs, targets, "mean")

    def token_losses(self, model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy of each token, [M] float32 in nats, with the arguments and errors of `loss`.

        There is no gradient if the logits are not computed in one piece.
        """
        return self._call(model, inputs, targets, "none")[0]

    def _call(
        self, model: Any, inputs: Tensor, targets: Tensor, reduction: Literal["mean", "none"]
    ) -> tuple[Tensor, Tensor | None]:
        self._targets, self._reduction = targets.flatten(), reduction
        try:
            with _without_packing_check():
                loss = model(input_ids=inputs, use_cache=False).logits
            if not self._is_checked:
                self._check(loss)
            return loss, self._z_loss
        finally:
            self._targets = self._returned = self._z_loss = None

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
        coefficient = self._coefficient if self._reduction == "mean" else 0.0
        if self._targets.numel() * weight.shape[0] <= IN_ONE_PIECE or self.projection.bias is not None:
            logits = self._logits(hidden).float().flatten(0, 1)
            loss = functional.cross_entropy(logits, self._targets, reduction=self._reduction)
            if coefficient:
                z_loss = coefficient * logits.logsumexp(1).square().mean()
                self._z_loss = z_loss.detach()
                loss = loss + (z_loss - self._z_loss)  # its gradient without its value
        elif coefficient:
            loss, self._z_loss = _ChunkedMean.apply(hidden.flatten(0, 1), weight, self._targets, coefficient)
        else:
            loss = chunked_cross_entropy(hidden.flatten(0, 1), weight, self._targets, self._reduction)
        self._returned = None if self._is_checked else loss.detach()
        return loss


@contextmanager
def _without_packing_check() -> Iterator[None]:
    """Skip transformers' search for packed sequences, which reads position ids and makes the host wait for the device.

    Here every sequence attends to all of its own tokens.
    """
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

    Only the mean has a gradient. hidden: [M, h]; weight: [V, h]; targets: [M] int64.
    """
    if reduction == "none":
        with torch.no_grad():
            return torch.cat([_losses(part, weight, wanted)[0] for part, wanted in _chunks(hidden, targets)])
    return _ChunkedMean.apply(hidden, weight, targets, 0.0)[0]


def _chunks(hidden: Tensor, *others: Tensor) -> zip[tuple[Tensor, ...]]:
    size = CHUNK["cuda" if hidden.is_cuda else "cpu"]
    return zip(*(tensor.split(size) for tensor in (hidden, *others)), strict=True)


def _losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses and log Z, [C], and the log-probabilities, [C, V], of a chunk, all float32."""
    logits = (hidden @ weight.T).float()
    log_p = functional.log_softmax(logits, dim=1)
    losses = -log_p.gather(1, targets[:, None])[:, 0]
    return losses, _log_z(losses, logits, targets), log_p


def _log_z(losses: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Return log Z of each token, [C] float32: its loss, log Z less the target's logit, plus that."""
    return losses + logits.gather(1, targets[:, None])[:, 0].float()


def _gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, coefficient: float, of_hidden: Tensor, of_weight: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return a chunk's losses and log Z, [C] float32 each; the latter may be None if the coefficient is 0.

    coefficient: of the z-loss. The gradient of the sum of losses and z-losses is written to of_hidden, [C, h], and
    added to of_weight, [V, h] float32. Raises CompileError on a GPU.
    """
    log_z: Tensor | None
    if hidden.is_cuda:
        from l2e_ds.system.compiling import compiling  # imports PyTorch's compiler, which CPUs do not need here

        logits = hidden @ weight.T
        with compiling("LM loss"):
            losses, gradient = _compiled_logit_gradient(coefficient)(logits, targets)
        log_z = _log_z(losses, logits, targets) if coefficient else None
        # The products are added in float32 as they are computed, without a copy of [V, h] in half precision.
        torch.addmm(of_weight, gradient.T, hidden, out_dtype=torch.float32, out=of_weight)
    else:
        losses, log_z, log_p = _losses(hidden, weight, targets)
        softmax = log_p.exp_()
        if coefficient:
            softmax.mul_((1 + 2 * coefficient * log_z)[:, None])
        gradient = softmax.scatter_add_(1, targets[:, None], -torch.ones_like(losses)[:, None]).to(hidden.dtype)
        if weight.dtype == torch.float32:
            of_weight.addmm_(gradient.T, hidden)
        else:
            of_weight += gradient.T @ hidden
    torch.mm(gradient, weight, out=of_hidden)
    return losses, log_z


def _logit_gradient(logits: Tensor, targets: Tensor, coefficient: float) -> tuple[Tensor, Tensor]:
    """Return each token's loss, [C] float32, and the logits' gradient of it and of its z-loss, [C, V] in their dtype.

    torch.compile makes one pass for the sums and one for the gradient of this.
    """
    log_p = functional.log_softmax(logits.float(), dim=1)
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    losses = -log_p.gather(1, targets[:, None])[:, 0]
    softmax = log_p.exp()
    if coefficient:
        softmax = softmax * (1 + 2 * coefficient * _log_z(losses, logits, targets))[:, None]
    return losses, (softmax - is_target.float()).to(logits.dtype)


@cache
def _compiled_logit_gradient(coefficient: float) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    # Only the last chunk of a micro-batch may have another size. With dynamic sizes, the function that is used would
    # depend on the sizes before, which differ in a resumed run.
    return torch.compile(partial(_logit_gradient, coefficient=coefficient), fullgraph=True, dynamic=False)


class _ChunkedMean(torch.autograd.Function):
    """Computes the gradients in forward, without the scale that backward multiplies them by.

    Returns the mean loss, whose gradient is also the z-loss's, and the z-loss, which has none; [] float32 each.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, coefficient: float) -> tuple[Tensor, Tensor]:
        total, squares = torch.zeros(2, dtype=torch.float64, device=hidden.device)
        found: Iterator[tuple[Tensor, Tensor | None]]
        if any(ctx.needs_input_grad):
            ctx.of_hidden = torch.empty_like(hidden)
            ctx.of_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
            chunks = _chunks(hidden, targets, ctx.of_hidden)
            found = (_gradients(part, weight, wanted, coefficient, of, ctx.of_weight) for part, wanted, of in chunks)
        else:
            found = (_losses(part, weight, wanted)[:2] for part, wanted in _chunks(hidden, targets))
        for losses, log_z in found:
            total += losses.sum(dtype=torch.float64)
            if log_z is not None:
                squares += log_z.square().sum(dtype=torch.float64)
        z_loss = (coefficient * squares / len(targets)).float()
        ctx.mark_non_differentiable(z_loss)
        return (total / len(targets)).float(), z_loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        of_hidden, of_weight = ctx.of_hidden, ctx.of_weight
        ctx.of_hidden = ctx.of_weight = None  # they are scaled in place, and a second backward must fail
        scale = gradients[0].float() / of_hidden.shape[0]
        return of_hidden.mul_(scale), of_weight.mul_(scale).to(of_hidden.dtype), None, None
