"""Hook one layer: see its activations, sum statistics, select and inhibit.

Shapes: B sequences per micro-batch, T tokens per sequence, M = B * T, N neurons of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from l2e_ds.inhibition import losses
from l2e_ds.inhibition.implementations import Deactivation, Implementation, Plain
from l2e_ds.inhibition.losses import BackwardTerms, Correction, FrozenStatistics
from l2e_ds.inhibition.running_statistics import RunningStatistics, StepSums, row_of, stacked
from l2e_ds.inhibition.settings import NeuronSite

if TYPE_CHECKING:
    from l2e_ds.inhibition.inhibitor import Inhibitor

# Activations of a layer and micro-batch from which compiling is worth it on a CPU: it takes ten seconds per function,
# once per machine, and fewer activations take a few milliseconds in plain operations.
WORTH_COMPILING = 2**20


@dataclass
class Calls:
    """Counts how often a hook ran in the current optimizer step, for the self-test."""

    forward: int = 0
    recomputed: int = 0
    backward: int = 0


class NeuronHook:
    """Sees one layer's activations, sums statistics, selects and inhibits.

    It is called with the activations, or, if `computes` says so, `gelu` is called with the input of their GELU.
    """

    HEADER = 3  # tokens, inhibition loss (sum over the selected), score (sum over the selected)

    def __init__(self, owner: Inhibitor, index: int, site: NeuronSite, sums: Tensor) -> None:
        """Begin without history.

        index: the hook's place among the owner's. sums: [HEADER + 3 N] float64, its part of the packed buffer.
        """
        self.owner, self.index, self.site, self.settings = owner, index, site, owner.settings
        self.regulariser = owner.settings.regulariser
        self.sums = sums  # of this step: header, and for each neuron d, d^2 and selected
        self.running = RunningStatistics.initial(site.neurons, self.settings.target_share, sums.device)
        # S^2 of each neuron when inhibition began; 0 before that, and for neurons that did not vary
        self.variance_at_start = torch.zeros(site.neurons, dtype=torch.float64, device=sums.device)
        # set by `freeze`, and constant within an optimizer step
        self.step_statistics: FrozenStatistics
        self.kept_pull: Tensor
        # of the micro-batch: those of the step, unless `reduce: forward` adds the micro-batch's own samples
        self.selection_statistics: FrozenStatistics
        self.loss_statistics: FrozenStatistics
        self.calls = Calls()
        self.largest_gradient = torch.zeros((), device=sums.device)
        self.weight: Tensor | None = None
        # `losses.projection_sums` of this rank's micro-batch, per token
        self.projection_sums = torch.zeros(1 + 4 * site.neurons, dtype=torch.float64, device=sums.device)
        self._plain = Plain(self) if self.settings.mechanism == "regulariser" else Deactivation(self)
        self.implementation: Implementation = self._plain  # of this micro-batch
        freeze([self], stacked([self.running]))

    @staticmethod
    def buffer_size(neurons: int) -> int:
        """Return the length of `sums` for a layer of so many neurons."""
        return NeuronHook.HEADER + 3 * neurons

    def note_start(self) -> None:
        """Note the scale of each neuron, now that inhibition begins."""
        self.variance_at_start = torch.where(self.step_statistics.alive, self.running.moments.variance, 0.0)

    # --- forward -------------------------------------------------------------------------------------------------

    def begins_with_gelu(self, x: Tensor) -> bool:
        """Choose how a new micro-batch is computed, and return whether `gelu` is to compute the activation function of
        x, [B, T, N].

        It is not if nothing is inhibited, as the run is then bit-identical to one without inhibition, nor without
        history, as the moments then need a second pass. Recomputation computes what its forward did. Raises ValueError
        for an x of another size or on another device.
        """
        if not self.owner.in_backward:
            if self.site.function != "gelu" or not self.owner.is_inhibiting:
                return False
            self._check(x)
            self._choose_implementation(x.reshape(-1, self.site.neurons), before_gelu=True)
        return self.implementation.computes_gelu

    def gelu(self, x: Tensor) -> Tensor:
        """Return what `__call__` does for the GELU of x. Both are [B, T, N]."""
        return self.implementation.forward(x.reshape(-1, self.site.neurons)).view_as(x)

    def __call__(self, activations: Tensor) -> Tensor:
        """Return the same activations, [B, T, N], or for a deactivation, those with the selected ones replaced.

        Raises ValueError for activations of another size or on another device.
        """
        self._check(activations)
        z = activations.reshape(-1, self.site.neurons)
        if not self.owner.in_backward:
            self._choose_implementation(z, before_gelu=False)
        return self.implementation.forward(z).view_as(activations)

    def _check(self, activations: Tensor) -> None:
        if activations.shape[-1] != self.site.neurons:
            raise ValueError(
                f"Inhibitor: NeuronSite.neurons of layer {self.site.layer} is {self.site.neurons}, but there are"
                f" {activations.shape[-1]}"
            )
        if activations.device != self.sums.device:
            raise ValueError(
                f"Inhibitor: is on {self.sums.device}, but the activations of layer {self.site.layer} are on"
                f" {activations.device}; create it after the model was moved, or give it device="
            )

    def _choose_implementation(self, z: Tensor, before_gelu: bool) -> None:
        """Choose how a new micro-batch is computed.

        z: [M, N], its activations, or if before_gelu, the input of their GELU.
        """
        self.weight = self.owner.token_weight(z)
        if not self._is_fused(z):
            self.implementation = self._plain
            return
        # here, as it imports PyTorch's compiler, which takes seconds
        from l2e_ds.inhibition import compiled_implementations

        self.implementation = compiled_implementations.choose_implementation(self, z, before_gelu)

    def _is_fused(self, z: Tensor) -> bool:
        """Return whether this micro-batch is computed by one of `compiled_implementations.py`.

        They know neither padding nor `reduce: forward`, and of the methods only threshold with regulariser.
        """
        settings = self.settings
        if settings.fused is False or (settings.retrieval, settings.mechanism) != ("threshold", "regulariser"):
            return False
        if settings.reduce == "forward" or self.weight is not None:
            return False
        return bool(settings.fused) or z.is_cuda or (z.device.type == "cpu" and z.numel() >= WORTH_COMPILING)

    def count_forward(self) -> bool:
        """Count a forward pass, and return whether it is the micro-batch's first one, which is to be observed.

        Activation checkpointing runs forward again in backward, with the same statistics and without adding to sums.
        """
        is_first = not self.owner.in_backward
        self.calls.forward += is_first
        self.calls.recomputed += not is_first
        if is_first:
            self.selection_statistics = self.loss_statistics = self.step_statistics
        return is_first

    def add_sums(self, step: Tensor, projection_sums: Tensor | None) -> None:
        """Add a micro-batch's sums, as `fused.ColumnSums.totals` returns them."""
        self.sums += step
        if projection_sums is not None:
            self.projection_sums = projection_sums

    # --- backward ------------------------------------------------------------------------------------------------

    def count_backward(self) -> None:
        """Count a backward pass."""
        self.calls.backward += 1

    def note_largest(self, gradient: Tensor) -> None:
        """Note for the self-test the largest absolute value that was added to a gradient, []."""
        self.largest_gradient = torch.maximum(self.largest_gradient, gradient.float())

    def backward_terms(self, z: Tensor) -> BackwardTerms:
        """Return what the backward of this micro-batch needs. z: [M, N]. Raises SelfTestError."""
        tokens = z.shape[0] if self.weight is None else self.weight.sum().clamp(min=1)  # this rank's, without padding
        arrived = self.owner.loss_gradient_here().double()
        per_token = torch.where(arrived == 0, 0.0, tokens / arrived)
        scale = self.gradient_scale(tokens)
        return BackwardTerms(self.loss_statistics, self.regulariser, self._correction(), scale, per_token)

    def _correction(self) -> Correction:
        if self.regulariser.is_projected:
            return self.owner.projection_here(self.index)
        return losses.running_correction(self.loss_statistics, self.regulariser)

    def gradient_scale(self, tokens: Tensor | int) -> Tensor:
        """Return the gradient that arrived at the LM loss, times lambda / n, [] float32; n = share * tokens * N."""
        arrived = self.owner.loss_gradient_here().float()
        weighted = arrived * self.owner.coefficients.values[self.index].float()
        return weighted / (self.settings.target_share * tokens * self.site.neurons)


# --- once a step, for several hooks of one width together: there are many small operations ------------------------


@torch.no_grad()
def freeze(hooks: Sequence[NeuronHook], running: RunningStatistics) -> None:
    """Give the hooks their running statistics, and make float32 constants of them for one optimizer step.

    running: their running statistics, stacked by `stacked`.
    """
    # In plain operations: a compiled result would differ by a rounding from that of a resumed run.
    frozen = running.frozen()
    kept = losses.kept_pull(running.moments.variance, torch.stack([hook.variance_at_start for hook in hooks]))
    for index, hook in enumerate(hooks):
        hook.running = row_of(running, index)
        hook.step_statistics = row_of(frozen, index)
        hook.kept_pull = kept[index]


@torch.no_grad()
def update(hooks: Sequence[NeuronHook], finite: Tensor) -> Tensor:
    """Move the hooks' running statistics by this step's sums over all ranks.

    Returns the first five of `Inhibitor.STATISTICS` of each, [len(hooks), 5] float64. finite: [] bool; if False, the
    running statistics stay, and what is returned still shows the step.
    """
    first = hooks[0]
    n, settings = first.site.neurons, first.settings
    sizes = [NeuronHook.HEADER, n, n, n]
    header, d, d2, selected = torch.stack([hook.sums for hook in hooks]).split(sizes, dim=1)
    sums = StepSums(header, d, d2, selected, shift=torch.stack([hook.step_statistics.mean for hook in hooks]))
    running = stacked([hook.running for hook in hooks])
    seen_before, selects_by_threshold = settings.reduce == "forward", settings.retrieval == "threshold"
    running, statistics = first.implementation.moved(
        running, sums, finite, first.owner.fade, settings.target_share, seen_before, selects_by_threshold
    )
    freeze(hooks, running)
    return statistics


class InhibitedActivation(nn.Module):
    """Takes the place of an activation module; unlike a forward hook, it survives torch.compile (docs/deepspeed.md)."""

    def __init__(self, activation: nn.Module, hook: NeuronHook) -> None:
        super().__init__()
        self.activation = activation
        self.train(activation.training)
        self._hook = hook

    # What a hook does depends on the step's state and changes it: traced, it would be compiled anew for each state, and
    # the graph would not see the changes. torch.compiler.disable would import the compiler here, for everybody.
    @_disable_dynamo
    def forward(self, x: Tensor) -> Tensor:
        if self.training and self._hook.begins_with_gelu(x):
            return self._hook.gelu(x)
        z = self.activation(x)
        return self._hook(z) if self.training else z
