"""Hook one layer: see its activations, sum statistics, select and inhibit.

Shapes: B sequences per micro-batch, T tokens per sequence, M = B * T, N neurons of a layer.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from l2e_ds.distributed.collectives import all_reduce_sum
from l2e_ds.inhibition import losses, memel
from l2e_ds.inhibition.coefficients import Coefficients
from l2e_ds.inhibition.losses import Correction, FrozenStatistics, Inhibition
from l2e_ds.inhibition.moments import Moments, exact_sums, sample_count, shifted_sums
from l2e_ds.inhibition.running_statistics import RunningStatistics, StepSums, row_of, stacked
from l2e_ds.inhibition.settings import NeuronSite, Settings

# Activations of a layer and micro-batch from which compiling is worth it on a CPU: it takes ten seconds per function,
# once per machine, and fewer activations take a few milliseconds in plain operations.
WORTH_COMPILING = 2**20


class Owner(Protocol):
    """What a hook uses of the `Inhibitor` that it belongs to."""

    settings: Settings
    group: Any
    fade: float  # of `fade_factor`
    coefficients: Coefficients
    in_backward: bool  # whether the backward pass of an attached loss is running
    has_history: bool  # whether a step has been applied before
    is_inhibiting: bool  # whether this step's activations or gradients are changed
    is_measuring: bool  # whether this step's gradients are measured: while inhibiting, and some steps before
    is_projecting: bool  # whether this step's micro-batches need a projection
    self_test_pending: bool

    def token_weight(self, z: Tensor) -> Tensor | None: ...

    def loss_gradient_here(self) -> Tensor: ...

    def projection_here(self, index: int) -> Correction: ...


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

    def __init__(self, owner: Owner, index: int, site: NeuronSite, sums: Tensor) -> None:
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
        self.frozen: FrozenStatistics
        self.frozen_now: FrozenStatistics
        self.for_loss: FrozenStatistics
        self.kept_pull: Tensor
        self.calls = Calls()
        self.largest_gradient = torch.zeros((), device=sums.device)
        self.weight: Tensor | None = None
        # `losses.projection_sums` of this rank's micro-batch, per token
        self.projection_sums = torch.zeros(1 + 4 * site.neurons, dtype=torch.float64, device=sums.device)
        self._plain = Plain(self) if self.settings.mechanism == "regulariser" else Deactivation(self)
        self._one_pass, self._gelu, self._gelu_in_kernel = OnePass(self), Gelu(self), GeluInKernel(self)
        self.way: Way = self._plain  # of this micro-batch
        freeze([self], stacked([self.running]))

    @staticmethod
    def buffer_size(neurons: int) -> int:
        """Return the length of `sums` for a layer of so many neurons."""
        return NeuronHook.HEADER + 3 * neurons

    def note_start(self) -> None:
        """Note the scale of each neuron, now that inhibition begins."""
        self.variance_at_start = torch.where(self.frozen.alive, self.running.moments.variance, 0.0)

    # --- forward -------------------------------------------------------------------------------------------------

    def computes(self, x: Tensor) -> bool:
        """Return whether `gelu` is to compute the activation function of x, [B, T, N].

        It is not if nothing is inhibited, as the run is then bit-identical to one without inhibition, nor without
        history, as the moments then need a second pass. Recomputation goes the way that its forward went.
        """
        if not self.owner.in_backward:
            if self.site.function != "gelu" or not self.owner.is_inhibiting:
                return False
            self._check(x)
            self._choose_way(x.reshape(-1, self.site.neurons), before_gelu=True)
        return self.way.computes_gelu

    def gelu(self, x: Tensor) -> Tensor:
        """Return what `__call__` does for the GELU of x. Both are [B, T, N]."""
        return self.way.forward(x.reshape(-1, self.site.neurons)).view_as(x)

    def __call__(self, activations: Tensor) -> Tensor:
        """Return the same activations, [B, T, N], or for a deactivation, those with the selected ones replaced.

        Raises ValueError for activations of another size or on another device.
        """
        self._check(activations)
        z = activations.reshape(-1, self.site.neurons)
        if not self.owner.in_backward:
            self._choose_way(z, before_gelu=False)
        return self.way.forward(z).view_as(activations)

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

    def _choose_way(self, z: Tensor, before_gelu: bool) -> None:
        """Choose the way of a new micro-batch. z: [M, N], its activations, or if before_gelu, their GELU's input."""
        self.weight = self.owner.token_weight(z)
        if not self._is_fused(z):
            self.way = self._plain
        elif before_gelu and _has_kernel(z):
            self.way = self._gelu_in_kernel
        elif before_gelu and z.device.type == "cpu":
            self.way = self._gelu
        else:
            self.way = self._one_pass

    def _is_fused(self, z: Tensor) -> bool:
        """Return whether this micro-batch goes through `fused.py`.

        It knows neither padding nor `reduce: forward`, and of the methods only threshold with regulariser.
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
            self.frozen_now = self.for_loss = self.frozen
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

    def inhibition(self, z: Tensor) -> Inhibition:
        """Return what the backward of this micro-batch needs. z: [M, N]. Raises SelfTestError."""
        tokens = z.shape[0] if self.weight is None else self.weight.sum().clamp(min=1)  # this rank's, without padding
        scale = self.owner.loss_gradient_here().double()
        per_token = torch.where(scale == 0, 0.0, tokens / scale)
        return Inhibition(self.for_loss, self.regulariser, self._correction(), self.strength(tokens), per_token)

    def _correction(self) -> Correction:
        if self.regulariser.is_projected:
            return self.owner.projection_here(self.index)
        return losses.running_correction(self.for_loss, self.regulariser)

    def strength(self, tokens: Tensor | int) -> Tensor:
        """Return the gradient that arrived at the LM loss, times lambda / n, [] float32; n = share * tokens * N."""
        scale = self.owner.loss_gradient_here().float() * self.owner.coefficients.values[self.index].float()
        return scale / (self.settings.target_share * tokens * self.site.neurons)


# --- once a step, for several hooks of one width together: there are many small operations ------------------------


@torch.no_grad()
def freeze(hooks: Sequence[NeuronHook], running: RunningStatistics) -> None:
    """Give the hooks their running statistics, and make float32 constants of them for one optimizer step.

    running: those of all these hooks, of `stacked`.
    """
    # In plain operations: a compiled result would differ by a rounding from that of a resumed run.
    frozen = running.frozen()
    kept = losses.kept_pull(running.moments.variance, torch.stack([hook.variance_at_start for hook in hooks]))
    for index, hook in enumerate(hooks):
        hook.running = row_of(running, index)
        hook.frozen = hook.frozen_now = hook.for_loss = row_of(frozen, index)
        hook.kept_pull = kept[index]


@torch.no_grad()
def update(hooks: Sequence[NeuronHook], finite: Tensor) -> Tensor:
    """Move the hooks' running statistics by this step's sums over all ranks.

    Returns the first five of `Inhibitor.STATISTICS` of each, [len(hooks), 5] float64. finite: [] bool; if False, the
    running statistics stay, and what is returned still shows the step.
    """
    first = hooks[0]
    move: Callable[..., tuple[RunningStatistics, Tensor]] = RunningStatistics.moved
    if first.way.is_compiled:
        from l2e_ds.inhibition import fused

        move = fused.moved
    n, settings = first.site.neurons, first.settings
    sizes = [NeuronHook.HEADER, n, n, n]
    header, d, d2, selected = torch.stack([hook.sums for hook in hooks]).split(sizes, dim=1)
    sums = StepSums(header, d, d2, selected, shift=torch.stack([hook.frozen.mean for hook in hooks]))
    running = stacked([hook.running for hook in hooks])
    seen_before = settings.reduce == "forward"
    running, statistics = move(running, sums, finite, first.owner.fade, settings.target_share, seen_before)
    freeze(hooks, running)
    return statistics


# --- the ways of a micro-batch -------------------------------------------------------------------------------------


class Way(ABC):
    """How a hook's micro-batches go forward and backward. x: [M, N], what forward is given; z: [M, N], activations."""

    computes_gelu = False  # whether x is the input of the GELU; otherwise x is z
    is_compiled = False

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
        """Return incoming + strength * the inhibition loss's gradient, as the gradient of x, [M, N].

        incoming: [M, N], the gradient of the activations. z: passed if the way computes the GELU and keeps its output.
        Raises SelfTestError.
        """
        hook, owner = self.hook, self.owner
        hook.count_backward()
        if not owner.is_measuring:
            return incoming
        inhibition = hook.inhibition(x)
        if owner.self_test_pending:
            hook.note_largest(self.largest_added(incoming, x, z, inhibition))
        outgoing, squares = self.backward(incoming, x, z, inhibition)
        owner.coefficients.squares[hook.index] += squares
        return outgoing if owner.is_inhibiting else incoming

    @abstractmethod
    def backward(self, incoming: Tensor, x: Tensor, z: Tensor | None, inhibition: Inhibition) -> tuple[Tensor, Tensor]:
        """Return the gradient of x including the inhibition loss's, and `Inhibition.measured` of both gradients.

        The gradient is [M, N] in the dtype of incoming.
        """

    def largest_added(self, incoming: Tensor, x: Tensor, z: Tensor | None, inhibition: Inhibition) -> Tensor:
        """Return the largest absolute value that `backward` adds, []."""
        return self.backward(torch.zeros_like(incoming), x, z, inhibition)[0].abs().max()


class Plain(Way):
    """Uses plain tensor operations, which allow every retrieval, padding, and `reduce: forward`."""

    @torch.no_grad()
    def observe(self, z: Tensor) -> Tensor:
        """Add a micro-batch to the hook's sums, and return what is selected, [M, N] bool.

        Collective with `reduce: forward`.
        """
        hook, settings = self.hook, self.hook.settings
        sums = shifted_sums if self.owner.has_history else exact_sums  # without history the mean may be far away
        sum_d, sum_d2 = sums(z, hook.frozen.mean, hook.weight)
        tokens = sample_count(z, hook.weight)
        if settings.reduce == "forward":
            self._freeze_for_micro_batch(tokens, sum_d, sum_d2)
        scores = losses.score(z, hook.frozen_now)
        selected = self.select(scores)
        count = selected.sum(0).double()
        if settings.reduce == "forward" and settings.loss == "scale-invariant":
            self._freeze_for_exact_loss(count.clone(), tokens, sum_d, sum_d2)
        loss = losses.inhibition_loss(z, selected, hook.for_loss, hook.regulariser, hook.weight)
        header = torch.stack([tokens, loss.double(), torch.where(selected, scores, 0.0).sum().double()])
        projection_sums = None
        if self.owner.is_projecting:
            projection_sums = losses.projection_sums(z, selected, hook.for_loss, hook.regulariser, hook.weight)
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
        batch = Moments.from_sums(count, sum_d, sum_d2, hook.frozen.mean.double())
        moments = hook.running.moments.fade(self.owner.fade).merge(batch)
        hook.frozen_now = hook.for_loss = hook.running.frozen(moments)

    def _freeze_for_exact_loss(self, selected: Tensor, tokens: Tensor, sum_d: Tensor, sum_d2: Tensor) -> None:
        """Freeze rate and mean d^2 of this micro-batch over all ranks (scale-invariant loss with `reduce: forward`).

        Collective.
        """
        hook, n = self.hook, self.hook.site.neurons
        packed = all_reduce_sum(torch.cat([tokens.reshape(1), sum_d, sum_d2, selected]), self.owner.group)
        count, sum_d, sum_d2, selected = packed.split([1, n, n, n])
        offset = hook.frozen.mean.double() - hook.frozen_now.mean.double()
        spread = (sum_d2 + 2 * offset * sum_d) / count + offset * offset
        now = hook.frozen_now
        hook.for_loss = FrozenStatistics.of(now.mean, spread.float(), now.tau, (selected / count).float())

    def select(self, scores: Tensor) -> Tensor:
        """Return what is selected, [M, N] bool. scores: [M, N] float32."""
        hook = self.hook
        if hook.settings.retrieval == "threshold":
            selected = losses.select_by_threshold(scores, hook.frozen_now)
        else:
            selected = losses.select_top_k(scores, hook.frozen_now, hook.settings.target_share)
        return selected if hook.weight is None else selected & (hook.weight > 0)

    def _raw(self, z: Tensor, inhibition: Inhibition) -> tuple[Tensor, Tensor]:
        """Return what is selected, [M, N] bool, and the inhibition loss's gradient before strength, [M, N] float32."""
        selected = self.select(losses.score(z, self.hook.frozen_now))
        statistics, regulariser = inhibition.statistics, inhibition.regulariser
        return selected, losses.inhibition_gradient(z, selected, statistics, regulariser, inhibition.correction)

    def _weighted(self, raw: Tensor, inhibition: Inhibition) -> Tensor:
        weight = self.hook.weight
        return raw * inhibition.strength if weight is None else raw * inhibition.strength * weight

    def backward(self, incoming: Tensor, x: Tensor, z: Tensor | None, inhibition: Inhibition) -> tuple[Tensor, Tensor]:
        selected, raw = self._raw(x, inhibition)
        squares = [torch.where(selected, g * g, 0.0).sum(dtype=torch.float64) for g in (incoming.float(), raw)]
        outgoing = (incoming.float() + self._weighted(raw, inhibition)).to(incoming.dtype)
        return outgoing, inhibition.measured(torch.stack(squares))

    def largest_added(self, incoming: Tensor, x: Tensor, z: Tensor | None, inhibition: Inhibition) -> Tensor:
        # before it is rounded to float16, which may round it to zero
        return self._weighted(self._raw(x, inhibition)[1], inhibition).abs().max()


_DEACTIVATIONS = {
    "reverse-deactivation": memel.reverse_deactivation,
    "naive-deactivation": memel.naive_deactivation,
}


class Deactivation(Plain):
    """Replaces the selected activations, as MEmeL does, and adds no loss."""

    def forward(self, x: Tensor) -> Tensor:
        hook = self.hook
        if hook.count_forward():
            selected = self.observe(x.detach())
        else:
            selected = self.select(losses.score(x.detach(), hook.frozen_now))
        if not self.owner.is_inhibiting:
            selected = torch.zeros_like(selected)
        deactivate = _DEACTIVATIONS[hook.settings.mechanism]
        return deactivate(x, hook.frozen_now.mean, selected, hook.count_backward)


# `fused` is imported only where it is used, as it imports torch's compiler, which takes seconds.
class OnePass(Way):
    """Uses one compiled pass over the activations in forward, and one in backward."""

    is_compiled = True

    def observe(self, z: Tensor) -> None:
        from l2e_ds.inhibition import fused

        observe = fused.observe if self.owner.has_history else fused.observe_without_history
        self.hook.add_sums(*observe(z, self.hook.frozen, self.hook.regulariser))

    def backward(self, incoming: Tensor, x: Tensor, z: Tensor | None, inhibition: Inhibition) -> tuple[Tensor, Tensor]:
        from l2e_ds.inhibition import fused

        return fused.add_gradient(incoming, x, inhibition)


class Gelu(OnePass):
    """Computes the gradient of the GELU in the same pass in backward."""

    computes_gelu = True
    keeps_activations = True  # which costs no memory: the next layer keeps them anyway

    def forward(self, x: Tensor) -> Tensor:
        from l2e_ds.inhibition import fused

        return fused.WithInhibition.apply(x, self._compute, self.add_gradient, self.keeps_activations)

    def _compute(self, x: Tensor) -> Tensor:
        is_first = self.hook.count_forward()
        z = nn.functional.gelu(x)
        if is_first:
            self.observe(z)
        return z

    def backward(self, incoming: Tensor, x: Tensor, z: Tensor | None, inhibition: Inhibition) -> tuple[Tensor, Tensor]:
        from l2e_ds.inhibition import fused

        assert z is not None
        return fused.gelu_backward(incoming, x, z, inhibition)


class GeluInKernel(Gelu):
    """Computes the GELU in the same pass in forward, too, with one Triton kernel each way."""

    keeps_activations = False

    def _compute(self, x: Tensor) -> Tensor:
        from l2e_ds.inhibition import fused, triton_gelu

        hook = self.hook
        is_first = hook.count_forward()
        z, sums = triton_gelu.forward(x, hook.frozen, hook.regulariser)
        if is_first:
            hook.add_sums(*fused.totals(sums, hook.frozen, hook.regulariser, sample_count(x)))
        return z

    def backward(self, incoming: Tensor, x: Tensor, z: Tensor | None, inhibition: Inhibition) -> tuple[Tensor, Tensor]:
        from l2e_ds.inhibition import triton_gelu

        return triton_gelu.backward(incoming, x, inhibition)


_HAS_TRITON = getattr(find_spec("triton"), "origin", None) is not None  # None for a mere folder of that name
_IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # in tests: Triton then runs on a CPU, too


def _has_kernel(x: Tensor) -> bool:
    """Return whether the Triton kernels take x."""
    return _HAS_TRITON and (x.is_cuda or _IS_INTERPRETED) and x.dtype != torch.float64


class InhibitedActivation(nn.Module):
    """Takes the place of an activation module; unlike a forward hook, it survives torch.compile (docs/deepspeed.md)."""

    def __init__(self, activation: nn.Module, hook: NeuronHook) -> None:
        super().__init__()
        self.activation = activation
        self._hook = hook

    # What a hook does depends on the step's state and changes it: traced, it would be compiled anew for each state, and
    # the graph would not see the changes. torch.compiler.disable would import the compiler here, for everybody.
    @_disable_dynamo
    def forward(self, x: Tensor) -> Tensor:
        if self.training and self._hook.computes(x):
            return self._hook.gelu(x)
        z = self.activation(x)
        return self._hook(z) if self.training else z
