"""Compute one layer's micro-batches, forward and backward, in plain tensor operations.

`compiled_implementations.py` does the same faster where it can. A `NeuronHook` chooses the implementation of each
micro-batch, and calls it in forward; autograd calls it in backward. What a micro-batch leaves behind for later, it
hands to its hook.

Shapes: M samples (tokens) of a micro-batch, N neurons of a layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from l2e_ds.distributed.collectives import all_reduce_sum
from l2e_ds.inhibition import losses, memel
from l2e_ds.inhibition.losses import BackwardTerms, FrozenStatistics
from l2e_ds.inhibition.moments import Moments, exact_sums, sample_count, shifted_sums
from l2e_ds.inhibition.running_statistics import RunningStatistics

if TYPE_CHECKING:
    from l2e_ds.inhibition.hook import NeuronHook


class Implementation(ABC):
    """Computes a hook's micro-batches. x: [M, N], what forward is given; z: [M, N], activations."""

    computes_gelu = False  # whether x is the input of the GELU; otherwise x is z
    # how the running statistics of several hooks move, once a step
    moved: Callable[..., tuple[RunningStatistics, Tensor]] = staticmethod(RunningStatistics.moved)

    def __init__(self, hook: NeuronHook) -> None:
        self.hook, self.owner = hook, hook.owner

    def forward(self, x: Tensor) -> Tensor:
        """Return the activations, [M, N], after observing them; backward goes through `add_gradient`."""
        if self.hook.count_forward():
            self.observe(x.detach())
        return losses.add_inhibition_gradient(x, self.add_gradient)

    @abstractmethod
    def observe(self, z: Tensor) -> Any:
        """Add a micro-batch to the hook's sums. z: [M, N], without gradient."""

    def add_gradient(self, incoming: Tensor, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Return incoming + gradient_scale * the inhibition loss's gradient, as the gradient of x, [M, N].

        incoming: [M, N], the gradient of the activations. z: passed if the implementation computes the GELU and keeps
        its output. Raises SelfTestError.
        """
        hook, owner = self.hook, self.owner
        hook.count_backward()
        if not owner.is_measuring:
            return incoming
        terms = hook.backward_terms(x)
        if owner.self_test_pending:
            hook.note_largest(self.largest_added(incoming, x, z, terms))
        outgoing, squares = self.backward(incoming, x, z, terms)
        owner.coefficients.squares[hook.index] += squares
        return outgoing if owner.is_inhibiting else incoming

    @abstractmethod
    def backward(self, incoming: Tensor, x: Tensor, z: Tensor | None, terms: BackwardTerms) -> tuple[Tensor, Tensor]:
        """Return the gradient of x including the inhibition loss's, and `per_token_squares` of both gradients.

        The gradient is [M, N] in the dtype of incoming.
        """

    def largest_added(self, incoming: Tensor, x: Tensor, z: Tensor | None, terms: BackwardTerms) -> Tensor:
        """Return the largest absolute value that `backward` adds, []."""
        return self.backward(torch.zeros_like(incoming), x, z, terms)[0].abs().max()


class Plain(Implementation):
    """Uses plain tensor operations, which allow every retrieval, padding, and `reduce: forward`."""

    @torch.no_grad()
    def observe(self, z: Tensor) -> Tensor:
        """Add a micro-batch to the hook's sums, and return what is selected, [M, N] bool.

        Collective with `reduce: forward`.
        """
        hook, settings = self.hook, self.hook.settings
        sums = shifted_sums if self.owner.has_history else exact_sums  # without history the mean may be far away
        sum_d, sum_d2 = sums(z, hook.step_statistics.mean, hook.weight)
        tokens = sample_count(z, hook.weight)
        if settings.reduce == "forward":
            self._freeze_for_micro_batch(tokens, sum_d, sum_d2)
        scores = losses.score(z, hook.selection_statistics)
        selected = self.select(scores)
        count = selected.sum(0).double()
        if settings.reduce == "forward" and settings.loss == "scale-invariant":
            self._freeze_for_exact_loss(count.clone(), tokens, sum_d, sum_d2)
        loss = losses.inhibition_loss(z, selected, hook.loss_statistics, hook.regulariser, hook.weight)
        header = torch.stack([tokens, loss.double(), torch.where(selected, scores, 0.0).sum().double()])
        projection_sums = None
        if self.owner.is_projecting:
            projection_sums = losses.projection_sums(z, selected, hook.loss_statistics, hook.regulariser, hook.weight)
            projection_sums = projection_sums / projection_sums[0].clamp(min=1)
        hook.add_sums(torch.cat([header, sum_d, sum_d2, count]), projection_sums)
        return selected

    def _freeze_for_micro_batch(self, tokens: Tensor, sum_d: Tensor, sum_d2: Tensor) -> None:
        """Freeze the statistics of all earlier steps and of every rank's part of this micro-batch (`reduce: forward`).

        Collective.
        """
        hook, n = self.hook, self.hook.site.neurons
        packed = all_reduce_sum(torch.cat([tokens.reshape(1), sum_d, sum_d2]), self.owner.group)
        count, sum_d, sum_d2 = packed.split([1, n, n])
        batch = Moments.from_sums(count, sum_d, sum_d2, hook.step_statistics.mean.double())
        moments = hook.running.moments.fade(self.owner.fade).merge(batch)
        hook.selection_statistics = hook.loss_statistics = hook.running.frozen(moments)

    def _freeze_for_exact_loss(self, selected: Tensor, tokens: Tensor, sum_d: Tensor, sum_d2: Tensor) -> None:
        """Freeze rate and mean d^2 of this micro-batch over all ranks (scale-invariant loss with `reduce: forward`).

        Collective.
        """
        hook, n = self.hook, self.hook.site.neurons
        packed = all_reduce_sum(torch.cat([tokens.reshape(1), sum_d, sum_d2, selected]), self.owner.group)
        count, sum_d, sum_d2, selected = packed.split([1, n, n, n])
        offset = hook.step_statistics.mean.double() - hook.selection_statistics.mean.double()
        tokens = count.clamp(min=1)  # none count where the token mask leaves none on any rank
        spread = (sum_d2 + 2 * offset * sum_d) / tokens + offset * offset
        now = hook.selection_statistics
        hook.loss_statistics = FrozenStatistics.of(now.mean, spread.float(), now.tau, (selected / tokens).float())

    def select(self, scores: Tensor) -> Tensor:
        """Return what is selected, [M, N] bool. scores: [M, N] float32."""
        hook = self.hook
        if hook.settings.retrieval == "threshold":
            selected = losses.select_by_threshold(scores, hook.selection_statistics)
        else:
            selected = losses.select_top_k(scores, hook.selection_statistics, hook.settings.target_share)
        return selected if hook.weight is None else selected & (hook.weight > 0)

    def _raw(self, z: Tensor, terms: BackwardTerms) -> tuple[Tensor, Tensor]:
        """Return what is selected, [M, N] bool, and the inhibition loss's gradient before its scale, [M, N] float32."""
        selected = self.select(losses.score(z, self.hook.selection_statistics))
        statistics, regulariser = terms.statistics, terms.regulariser
        return selected, losses.inhibition_gradient(z, selected, statistics, regulariser, terms.correction)

    def _weighted(self, raw: Tensor, terms: BackwardTerms) -> Tensor:
        weight = self.hook.weight
        return raw * terms.gradient_scale if weight is None else raw * terms.gradient_scale * weight

    def backward(self, incoming: Tensor, x: Tensor, z: Tensor | None, terms: BackwardTerms) -> tuple[Tensor, Tensor]:
        selected, raw = self._raw(x, terms)
        squares = [torch.where(selected, g * g, 0.0).sum(dtype=torch.float64) for g in (incoming.float(), raw)]
        outgoing = (incoming.float() + self._weighted(raw, terms)).to(incoming.dtype)
        return outgoing, terms.per_token_squares(torch.stack(squares))

    def largest_added(self, incoming: Tensor, x: Tensor, z: Tensor | None, terms: BackwardTerms) -> Tensor:
        # before it is rounded to float16, which may round it to zero
        return self._weighted(self._raw(x, terms)[1], terms).abs().max()


_GRADIENT_FACTORS = {"reverse-deactivation": -1.0, "naive-deactivation": 0.0}


class Deactivation(Plain):
    """Replaces the selected activations, as MEmeL does, and adds no loss."""

    def forward(self, x: Tensor) -> Tensor:
        hook = self.hook
        if hook.count_forward():
            selected = self.observe(x.detach())
        else:
            selected = self.select(losses.score(x.detach(), hook.selection_statistics))
        if not self.owner.is_inhibiting:
            selected = torch.zeros_like(selected)
        factor = _GRADIENT_FACTORS[hook.settings.mechanism]
        return memel.deactivate(x, hook.selection_statistics.mean, selected, factor, hook.count_backward)
