"""One layer's share of the method: a hook that sees its neurons, sums statistics, selects and inhibits."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from l2e_ds.distributed.collectives import all_reduce_sum
from l2e_ds.inhibition import losses, memel
from l2e_ds.inhibition.losses import Correction, FrozenStatistics, Inhibition
from l2e_ds.inhibition.moments import Moments, exact_sums, sample_count, shifted_sums
from l2e_ds.inhibition.running_statistics import moved_statistics
from l2e_ds.inhibition.settings import NeuronSite
from l2e_ds.inhibition.threshold import initial_threshold

if TYPE_CHECKING:
    from l2e_ds.inhibition.inhibitor import Inhibitor

# Activations of a layer and micro-batch from which compiling (ten seconds, once a machine) pays on a CPU; fewer cost a
# few milliseconds in plain operations.
WORTH_COMPILING = 2**20


@dataclass
class Calls:
    """How often a hook ran within this optimizer step (for the self-test)."""

    forward: int = 0
    recomputed: int = 0
    backward: int = 0


class NeuronHook:
    """One layer's share of the method: sees its neurons, sums statistics, selects, inhibits."""

    HEADER = 3  # tokens, inhibition loss (sum over the selected), score (sum over the selected)

    def __init__(self, owner: Inhibitor, index: int, site: NeuronSite, sums: Tensor) -> None:
        self.owner, self.index, self.site, self.settings = owner, index, site, owner.settings
        self.regulariser = owner.settings.regulariser
        self.sums = sums  # [HEADER + 3 N] float64, a view of the packed buffer: d, d^2, selected per neuron
        self.moments = Moments.empty(site.neurons, sums.device)
        self.tau = torch.tensor(initial_threshold(self.settings.target_share), dtype=torch.float64, device=sums.device)
        self.selected = torch.zeros(site.neurons, dtype=torch.float64, device=sums.device)  # faded count per neuron
        self.selectable = torch.zeros((), dtype=torch.float64, device=sums.device)  # faded count of tokens
        self.calls = Calls()
        self.fused = self.is_gelu = self.in_kernel = False  # this micro-batch
        self.has_triton = getattr(find_spec("triton"), "origin", None) is not None  # a mere folder has none
        self.interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # tests: Triton runs on a CPU, too
        self.largest_gradient = torch.zeros((), device=sums.device)
        self.weight: Tensor | None = None
        # of this rank's micro-batch a token: what `losses.projection` needs, once it is added up over the ranks
        self.projection_sums = torch.zeros(1 + 4 * site.neurons, dtype=torch.float64, device=sums.device)
        self._freeze()

    @staticmethod
    def buffer_size(neurons: int) -> int:
        return NeuronHook.HEADER + 3 * neurons

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Views of the sums: header [3], d [N], d^2 [N], selected [N]."""
        n = self.site.neurons
        header, d, d2, selected = self.sums.split([self.HEADER, n, n, n])
        return header, d, d2, selected

    def _freeze(self) -> None:
        """Make float32 constants of the state, for one optimizer step."""
        # in plain operations: compiled, they would differ by a rounding from those of a resumed run
        self.frozen = self.frozen_now = self.for_loss = self._statistics(self.moments)

    def _is_fused(self, z: Tensor) -> bool:
        """Whether forward and backward of this micro-batch go through fused.py.

        Not padding, nor the methods that cost what top-k or an all-reduce in forward costs.
        """
        settings = self.settings
        if settings.fused is False or (settings.retrieval, settings.mechanism) != ("threshold", "regulariser"):
            return False
        if settings.reduce == "forward" or self.weight is not None:
            return False
        return bool(settings.fused) or z.is_cuda or (z.device.type == "cpu" and z.numel() >= WORTH_COMPILING)

    def computes(self, x: Tensor) -> bool:
        """Whether the activation function of x [B, T, N] is to be computed by `gelu`.

        Not where nothing is inhibited, when a run is to be the same to the bit as without inhibition, and not without
        history, when moments need a second pass. Recomputation goes the way that its forward went.
        """
        if not self.owner.in_backward:
            self.in_kernel = self.is_gelu = False
            if self.site.function == "gelu" and self.owner.is_inhibiting:
                self._check(x)
                self.weight = self.owner.token_weight(x.reshape(-1, self.site.neurons))
                self.in_kernel = self._has_kernel(x) and self._is_fused(x)
                self.is_gelu = self.in_kernel or (x.device.type == "cpu" and self._is_fused(x))
        return self.is_gelu

    def _has_kernel(self, x: Tensor) -> bool:
        """Whether Triton takes it."""
        return self.has_triton and (x.is_cuda or self.interpreted) and x.dtype != torch.float64

    def _statistics(self, moments: Moments) -> FrozenStatistics:
        rate = self.selected / self.selectable.clamp(min=1)
        return FrozenStatistics.of(moments.mean.float(), moments.variance.float(), self.tau.float(), rate.float())

    # --- forward -------------------------------------------------------------------------------------------------

    def _check(self, activations: Tensor) -> None:
        if activations.shape[-1] != self.site.neurons:
            raise ValueError(
                f"Inhibitor: NeuronSite.neurons of layer {self.site.layer} is {self.site.neurons}, found are"
                f" {activations.shape[-1]}"
            )
        if activations.device != self.sums.device:
            raise ValueError(
                f"Inhibitor: is on {self.sums.device}, the activations of layer {self.site.layer} on"
                f" {activations.device}; make it after the model was moved, or give it device="
            )

    def __call__(self, activations: Tensor) -> Tensor:
        """[B, T, N] -> [B, T, N]: the same activations (regulariser), or with the selected ones replaced."""
        self._check(activations)
        z = activations.reshape(-1, self.site.neurons)
        if self.owner.in_backward:  # activation checkpointing runs forward again: same statistics, nothing counted
            self.calls.recomputed += 1
            selected = None
        else:
            self.calls.forward += 1
            self.weight = self.owner.token_weight(z)
            self.fused = self._is_fused(z)
            selected = None
            if self.fused:
                self._observe_in_one_pass(z.detach())
            else:
                selected = self._observe(z.detach())
        if self.settings.mechanism == "regulariser":
            return losses.add_inhibition_gradient(z, self._add_gradient).view_as(activations)
        deactivate = {
            "reverse-deactivation": memel.reverse_deactivation,
            "naive-deactivation": memel.naive_deactivation,
        }[self.settings.mechanism]
        if selected is None:
            selected = self._select(losses.score(z.detach(), self.frozen_now))
        if not self.owner.is_inhibiting:
            selected = torch.zeros_like(selected)
        return deactivate(z, self.frozen_now.mean, selected, self._count_backward).view_as(activations)

    def gelu(self, x: Tensor) -> Tensor:
        """As `__call__` of the GELU of x, [B, T, N] -> [B, T, N]."""
        from l2e_ds.inhibition import fused  # here: with torch's compiler, which takes seconds to import

        flat = x.reshape(-1, self.site.neurons)
        keep = not self.in_kernel
        return fused.with_inhibition(flat, self._compute_gelu, self._gelu_gradient, keep).view_as(x)

    def _compute_gelu(self, x: Tensor) -> Tensor:
        counted = not self.owner.in_backward
        self.calls.forward += counted
        self.calls.recomputed += not counted
        if counted:
            self.fused = True
            self.frozen_now = self.for_loss = self.frozen
        if self.in_kernel:
            from l2e_ds.inhibition import fused, triton_gelu

            z, sums = triton_gelu.forward(x, self.frozen, self.regulariser)
            if counted:
                self._count(*fused.totals(sums, self.frozen, self.regulariser, sample_count(x)))
        else:
            z = nn.functional.gelu(x)
            if counted:
                self._observe_in_one_pass(z)
        return z

    @torch.no_grad()
    def _observe(self, z: Tensor) -> Tensor:
        """Add this micro-batch to the step's sums; with `reduce: forward` ask the other ranks first.

        Returns what is selected, [M, N] bool.
        """
        header, d, d2, selected_per_neuron = self._parts()
        shift = self.frozen.mean
        sums = shifted_sums if self.owner.has_history else exact_sums  # without history the mean may be far away
        sum_d, sum_d2 = sums(z, shift, self.weight)
        tokens = sample_count(z, self.weight)
        self.frozen_now = self.for_loss = self.frozen
        if self.settings.reduce == "forward":
            self._freeze_for_micro_batch(tokens, sum_d, sum_d2)
        scores = losses.score(z, self.frozen_now)
        selected = self._select(scores)
        count = selected.sum(0).double()
        if self.settings.reduce == "forward" and self.settings.loss == "scale-invariant":
            self._freeze_for_exact_loss(count.clone(), tokens, sum_d, sum_d2)
        loss = losses.inhibition_loss(z, selected, self.for_loss, self.regulariser, self.weight)
        header += torch.stack([tokens, loss.double(), torch.where(selected, scores, 0.0).sum().double()])
        d += sum_d
        d2 += sum_d2
        selected_per_neuron += count
        if self.owner.is_projecting:
            projection_sums = losses.projection_sums(z, selected, self.for_loss, self.regulariser, self.weight)
            self.projection_sums = projection_sums / projection_sums[0].clamp(min=1)
        return selected

    def _observe_in_one_pass(self, z: Tensor) -> None:
        """As `_observe`."""
        from l2e_ds.inhibition import fused  # here: with torch's compiler, which takes seconds to import

        self.frozen_now = self.for_loss = self.frozen
        observe = fused.observe if self.owner.has_history else fused.observe_without_history
        self._count(*observe(z, self.frozen, self.regulariser))

    def _count(self, step: Tensor, projection_sums: Tensor | None) -> None:
        """Take in a micro-batch's `fused.ColumnSums.totals`."""
        self.sums += step
        if projection_sums is not None:
            self.projection_sums = projection_sums

    def _freeze_for_micro_batch(self, tokens: Tensor, sum_d: Tensor, sum_d2: Tensor) -> None:
        """`reduce: forward`: statistics of all earlier steps and of this micro-batch of every rank."""
        packed = all_reduce_sum(torch.cat([tokens.reshape(1), sum_d, sum_d2]), self.owner.group)
        count, sum_d, sum_d2 = packed.split([1, self.site.neurons, self.site.neurons])
        batch = Moments.from_sums(count[0], sum_d, sum_d2, self.frozen.mean.double())
        self.frozen_now = self.for_loss = self._statistics(self.moments.fade(self.owner.fade).merge(batch))

    def _freeze_for_exact_loss(self, selected: Tensor, tokens: Tensor, sum_d: Tensor, sum_d2: Tensor) -> None:
        """`reduce: forward`, scale-invariant: rate and mean d^2 of this very micro-batch over all ranks."""
        n = self.site.neurons
        packed = all_reduce_sum(torch.cat([tokens.reshape(1), sum_d, sum_d2, selected]), self.owner.group)
        count, sum_d, sum_d2, selected = packed.split([1, n, n, n])
        offset = self.frozen.mean.double() - self.frozen_now.mean.double()
        spread = (sum_d2 + 2 * offset * sum_d) / count + offset * offset
        now = self.frozen_now
        self.for_loss = FrozenStatistics.of(now.mean, spread.float(), now.tau, (selected / count).float())

    def _select(self, scores: Tensor) -> Tensor:
        if self.settings.retrieval == "threshold":
            selected = losses.select_by_threshold(scores, self.frozen_now)
        else:
            selected = losses.select_top_k(scores, self.frozen_now, self.settings.target_share)
        return selected if self.weight is None else selected & (self.weight > 0)

    # --- backward ------------------------------------------------------------------------------------------------

    def _count_backward(self) -> None:
        self.calls.backward += 1

    def _add_gradient(self, incoming: Tensor, z: Tensor) -> Tensor:
        """The gradient of z [M, N] with the inhibition's: + loss gradient * lambda / n * dL/dz."""
        self._count_backward()
        if not self.owner.is_measuring:
            return incoming
        inhibition = self._inhibition(z)
        if self.fused:
            from l2e_ds.inhibition import fused

            outgoing, squares = fused.add_gradient(incoming, z, inhibition)
            if self.owner.self_test_pending:
                self._note_largest(fused.add_gradient(torch.zeros_like(incoming), z, inhibition)[0])
        else:
            selected = self._select(losses.score(z, self.frozen_now))
            raw = losses.inhibition_gradient(z, selected, self.for_loss, self.regulariser, inhibition.correction)
            gradient = raw * inhibition.strength if self.weight is None else raw * inhibition.strength * self.weight
            squares = inhibition.measured(
                torch.stack(
                    [torch.where(selected, g * g, 0.0).sum(dtype=torch.float64) for g in (incoming.float(), raw)]
                )
            )
            if self.owner.self_test_pending:
                self._note_largest(gradient)
            outgoing = incoming + gradient.to(incoming.dtype)
        self.owner.coefficients.squares[self.index] += squares
        return outgoing if self.owner.is_inhibiting else incoming

    def _gelu_gradient(self, incoming: Tensor, x: Tensor, z: Tensor | None) -> Tensor:
        """The gradient of x [M, N] from that of its GELU z, with the inhibition's."""
        self._count_backward()
        inhibition = self._inhibition(x)

        def gradient(incoming: Tensor) -> tuple[Tensor, Tensor]:
            if z is None:
                from l2e_ds.inhibition import triton_gelu

                return triton_gelu.backward(incoming, x, inhibition)
            from l2e_ds.inhibition import fused

            return fused.gelu_backward(incoming, x, z, inhibition)

        if self.owner.self_test_pending:
            self._note_largest(gradient(torch.zeros_like(incoming))[0])
        outgoing, squares = gradient(incoming)
        self.owner.coefficients.squares[self.index] += squares
        return outgoing

    def _inhibition(self, z: Tensor) -> Inhibition:
        """Of the micro-batch that is in backward; z: [M, N]."""
        # this rank's tokens that count
        tokens = z.shape[0] if self.weight is None else self.weight.sum().clamp(min=1)
        scale = self.owner.loss_gradient_here().double()
        per_token = torch.where(scale == 0, 0.0, tokens / scale)
        return Inhibition(self.for_loss, self.regulariser, self._correction(), self.strength(tokens), per_token)

    def _correction(self) -> Correction:
        if self.regulariser.is_projected:
            return self.owner.projection_here(self.index)
        return losses.running_correction(self.for_loss, self.regulariser)

    def _note_largest(self, gradient: Tensor) -> None:
        self.largest_gradient = torch.maximum(self.largest_gradient, gradient.abs().max().float())

    def strength(self, tokens: Tensor | int) -> Tensor:
        """[] float32: gradient that arrived at the LM loss * lambda / n, n = share * tokens * N."""
        scale = self.owner.loss_gradient_here().float() * self.owner.coefficients.values[self.index].float()
        return scale / (self.settings.target_share * tokens * self.site.neurons)

    # --- once a step ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self, finite: Tensor) -> Tensor:
        """Move moments and tau by the (reduced) sums of this step; returns the layer's `STATISTICS`, [5] float64.

        finite: [] bool; where False they stay, and the statistics show what was seen.
        """
        move: Callable[..., Any] = moved_statistics
        if self.fused:
            from l2e_ds.inhibition import fused

            move = fused.moved_statistics
        settings = self.settings
        self.moments, self.tau, self.selected, self.selectable, statistics = move(
            *(self.moments, self.tau, self.selected, self.selectable, self._parts(), finite),
            *(self.frozen.mean, self.owner.fade, settings.target_share, settings.reduce == "forward"),
        )
        self._freeze()
        return statistics


class InhibitedActivation(nn.Module):
    """Stands in the place of an activation function; survives torch.compile, unlike a forward hook."""

    def __init__(self, activation: nn.Module, hook: NeuronHook) -> None:
        super().__init__()
        self.activation = activation
        self._hook = hook

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self._hook.computes(x):
            return self._hook.gelu(x)
        z = self.activation(x)
        return self._hook(z) if self.training else z
