"""`Inhibitor` puts the method into any PyTorch training loop:

    inhibitor = Inhibitor(neuron_sites(model, "mid-2"))
    with inhibitor:                                    # hooks on; removed at the end, also after an exception
        for batch in batches:
            loss = inhibitor.attach_loss(language_model_loss(model(batch)))
            loss.backward()                            # or engine.backward(loss)
            optimizer.step()
            inhibitor.step()                           # one packed all-reduce; moments and tau move

docs/python-api.md has more of it, and whole programs.

Shapes: B micro-batch sequences, T tokens a sequence, M = B * T, N neurons of a layer, L hooked layers.
Statistics and tau are the same on every rank, frozen within an optimizer step, and move only in `step`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import chain, combinations
from typing import Any, Literal

import torch
from torch import Tensor, nn

from l2e_ds.distributed import all_reduce_sum, begin_all_reduce_sum
from l2e_ds.errors import SelfTestError
from l2e_ds.inhibition import losses, memel
from l2e_ds.inhibition.coefficients import Coefficients
from l2e_ds.inhibition.losses import Correction, FrozenStatistics, Inhibition
from l2e_ds.inhibition.moments import Moments, exact_sums, fade_factor, sample_count, shifted_sums
from l2e_ds.inhibition.running_statistics import moved_statistics
from l2e_ds.inhibition.settings import Settings, require
from l2e_ds.inhibition.threshold import initial_threshold

# Activations of a layer and micro-batch from which compiling (ten seconds, once a machine) pays on a CPU; fewer cost a
# few milliseconds in plain operations.
WORTH_COMPILING = 2**20


@dataclass(frozen=True)
class NeuronSite:
    """Where one layer's neurons are: what `module.attribute` returns (activation) or is given (projection).

    function: what an activation computes, where a GPU kernel may compute it in the same pass: the exact GELU.
    Raises ValueError.
    """

    layer: int
    module: nn.Module
    attribute: str
    kind: Literal["activation", "projection"]
    neurons: int
    function: Literal["gelu"] | None = None

    def __post_init__(self) -> None:
        require("NeuronSite.kind", self.kind, lambda kind: kind in _KINDS, " or ".join(_KINDS))


_KINDS = ("activation", "projection")


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


class Inhibitor:
    """Owns the hooks of a model, their running statistics and thresholds. A context manager."""

    STATISTICS = ("observed_share", "tau", "selected_score", "mean_s", "inhibition_loss", "coefficient", "strength")

    def __init__(
        self,
        sites: Sequence[NeuronSite],
        settings: Settings | None = None,
        device: torch.device | str | None = None,
        group: Any = None,
        run_steps: int | None = None,
    ) -> None:
        """`device`: where the model computes (default: where it is now); `group`: the data-parallel process group whose
        tokens count together (default: all ranks); `run_steps`: optimizer steps of the run, for a schedule in shares of
        it. Raises ValueError."""
        if not sites:
            raise ValueError("no neurons to inhibit: sites is empty")
        for one, other in combinations(sites, 2):
            if one.layer == other.layer:
                raise ValueError(f"Inhibitor: two sites have the layer number {one.layer}, allowed: one site a layer")
            if one.module is other.module and one.attribute == other.attribute:
                raise ValueError(
                    f"Inhibitor: the sites of layers {one.layer} and {other.layer} are the same {one.attribute!r} of"
                    " the same module, allowed: one site a layer"
                )
        device = device or _device_of(sites[0].module)
        self.settings = (settings or Settings()).in_steps(run_steps)
        self.group = group
        self.steps = 0  # applied optimizer steps that the statistics have seen
        self.fade = fade_factor(self.settings.statistics_window)
        self.in_backward = False
        self.self_test_pending = True
        self.last: Tensor | None = None  # [L, len(STATISTICS)] float64, of the newest applied step
        self._loss_gradient: Tensor | None = None
        self._micro_batches = self._backwards = 0  # attached, and in backward so far
        self._reduced: Callable[[], None] | None = None  # waits for the reduction that goes on
        self._token_mask: Tensor | None = None
        self._projection: Callable[[], list[Correction]] | None = None  # of the micro-batch that is in backward
        self.coefficients = Coefficients(self.settings, [site.neurons for site in sites], device, group)
        sizes = [NeuronHook.buffer_size(site.neurons) for site in sites]
        self._packed = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        self.hooks = [
            NeuronHook(self, index, site, sums)
            for index, (site, sums) in enumerate(zip(sites, self._packed.split(sizes), strict=True))
        ]
        self._undo: list[Any] = []
        self._decide_on_coming_step()

    def _decide_on_coming_step(self) -> None:
        # flags, because a compiled layer is compiled anew for every value of a number that it looks at
        self.has_history = self.steps > 0
        self.coefficients.decide(self.steps)
        self.is_inhibiting = self.coefficients.is_inhibiting
        self.is_measuring = self.coefficients.is_measuring
        self.is_projecting = self.is_measuring and self.settings.loss == "projected"

    # --- hooks on and off ----------------------------------------------------------------------------------------

    def __enter__(self) -> Inhibitor:
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def attach(self) -> None:
        """Put the hooks into the model (before deepspeed.initialize under ZeRO-3).

        Raises ValueError where hooks are there already, this Inhibitor's or another's: they would act twice.
        """
        if self._undo:
            raise ValueError("Inhibitor.attach: is attached already")
        for hook in self.hooks:
            if _is_hooked(getattr(hook.site.module, hook.site.attribute)):
                raise ValueError(
                    f"Inhibitor.attach: layer {hook.site.layer} has the hook of another Inhibitor; detach that first"
                )
        for hook in self.hooks:
            module, attribute = hook.site.module, hook.site.attribute
            child = getattr(module, attribute)
            if hook.site.kind == "activation":
                setattr(module, attribute, InhibitedActivation(child, hook))
                self._undo.append(
                    lambda module=module, attribute=attribute, child=child: setattr(module, attribute, child)
                )
            else:
                self._undo.append(child.register_forward_pre_hook(_projection_hook(hook)).remove)

    def detach(self) -> None:
        """Leave the model as it was."""
        while self._undo:
            self._undo.pop()()

    # --- every micro-batch ---------------------------------------------------------------------------------------

    def attach_loss(self, loss: Tensor, is_last: bool = False, weight: Tensor | float = 1.0) -> Tensor:
        """The same LM loss []; its backward tells the hooks the scale at which gradients arrive.

        is_last: no other micro-batch of this step follows: its sums are reduced over the ranks behind its backward.
        weight: [], of this micro-batch where the loss is not its mean but already its share of a larger batch's, i.e.
        weight * mean. Raises ValueError and TypeError; ValueError also where one follows the last nonetheless.
        """
        allowed = "allowed: a scalar tensor that requires a gradient"
        if not isinstance(loss, Tensor):
            raise TypeError(f"attach_loss: got a loss of type {type(loss).__name__}, {allowed}")
        if loss.dim() or not loss.requires_grad:
            given = f"of shape {[*loss.shape]}" if loss.dim() else "without a gradient"
            raise ValueError(f"attach_loss: got a loss {given}, {allowed}")
        if not isinstance(weight, Tensor):  # whose value would have to be waited for
            require("attach_loss: weight", weight, lambda share: 0 <= share < math.inf, "0 or more, or a tensor []")
        if self._reduced is not None:
            raise ValueError("attach_loss: the micro-batch before was said to be the last of its step")
        self._micro_batches += 1
        self._check_order()
        projection = self._begin_projection(weight) if self.is_projecting else None
        if is_last:
            self._reduced = begin_all_reduce_sum(self._packed, self.group)
        return losses.note_loss_gradient(loss, lambda gradient: self._begin_backward(gradient * weight, projection))

    def _check_order(self) -> None:
        """The next forward overwrites what hooks keep of a micro-batch. Raises ValueError where that is needed."""
        for hook in self.hooks:
            if self.is_projecting and hook.calls.forward != self._micro_batches:
                raise ValueError(
                    f"attach_loss: layer {hook.site.layer} saw {hook.calls.forward} forward passes for"
                    f" {self._micro_batches} losses of this step; attach each loss directly after its forward pass"
                )
        if self._micro_batches > self._backwards + 1 and (
            self.settings.reduce == "forward" or self._token_mask is not None
        ):
            raise ValueError(
                "attach_loss: the loss before has not been through backward; with a token mask or reduce: forward each"
                " micro-batch must go through backward before the next forward pass"
            )

    def _begin_projection(self, weight: Tensor | float) -> Callable[[], list[Correction]]:
        """Add up over the ranks what the projection of this micro-batch needs, while its backward begins; the returned
        function waits. A rank's tokens count as they do in the gradient: `weight` over their number."""
        sums = torch.cat([hook.projection_sums for hook in self.hooks]) * weight
        wait = begin_all_reduce_sum(sums, self.group)

        @cache
        def corrections() -> list[Correction]:
            wait()
            return [
                losses.projection(part) for part in sums.split([hook.projection_sums.numel() for hook in self.hooks])
            ]

        return corrections

    def projection_here(self, index: int) -> Correction:
        """Of the layer with this index among the hooked ones, in the micro-batch that is in backward."""
        if not self.in_backward or self._projection is None:
            raise SelfTestError("inhibition: backward ran on a loss that did not go through Inhibitor.attach_loss")
        return self._projection()[index]

    def set_token_mask(self, mask: Tensor | None) -> None:
        """Mask of the coming micro-batches, [B, T], nonzero where a token counts. Padding never counts."""
        self._token_mask = mask

    def token_weight(self, z: Tensor) -> Tensor | None:
        """[M, 1] float32 of 0 and 1, or None without padding."""
        if self._token_mask is None:
            return None
        weight = (self._token_mask != 0).reshape(-1, 1).to(z.device, torch.float32)
        if weight.shape[0] != z.shape[0]:
            raise ValueError(f"token mask of {weight.shape[0]} tokens, activations of {z.shape[0]}")
        return weight

    def _begin_backward(self, gradient: Tensor, projection: Callable[[], list[Correction]] | None) -> None:
        self._loss_gradient, self._projection = gradient, projection
        self._backwards += 1
        self.in_backward = True
        # the way that DDP and FSDP learn that a backward pass is over
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        self.in_backward = False

    def loss_gradient_here(self) -> Tensor:
        """[] gradient that arrived at the LM loss (loss scale / accumulation steps)."""
        if not self.in_backward or self._loss_gradient is None:
            raise SelfTestError("inhibition: backward ran on a loss that did not go through Inhibitor.attach_loss")
        return self._loss_gradient

    # --- every step ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, applied: bool = True) -> None:
        """After the optimizer's step: reduce the step's sums over ranks, move moments and tau, start anew.

        `applied` False (an overflow, a non-finite gradient; the same on every rank): the sums are dropped. Where they
        are not finite themselves, moments and tau stay in any case, but the step counts as one.
        Raises SelfTestError in the first step if a hook missed a call, or later if its gradient was zero.
        """
        if self.self_test_pending:
            self._check_calls()
        if self._reduced is not None:
            self._reduced()  # also where they are dropped: every rank takes part
        elif applied:
            all_reduce_sum(self._packed, self.group)
        self._reduced = None
        if applied:
            # of every layer or of none, the same on every rank, and without the host knowing
            finite = self._packed.isfinite().all()
            statistics = torch.stack([hook.update(finite) for hook in self.hooks])
            self.last = torch.cat([statistics, self.coefficients.advance(finite)], dim=1)
            if self.self_test_pending:
                self._check_gradients()
            self.steps += 1
            self._decide_on_coming_step()
        else:
            self.coefficients.drop()
        self._packed.zero_()
        self._micro_batches = self._backwards = 0
        self.in_backward = False
        for hook in self.hooks:
            hook.calls = Calls()

    def _check_calls(self) -> None:
        """Each hook once a micro-batch forward and backward; recomputed never or once a micro-batch."""
        expected = self._micro_batches
        for hook in self.hooks:
            calls = hook.calls
            if expected == 0 or not (calls.forward == calls.backward == expected and calls.recomputed in (0, expected)):
                raise SelfTestError(
                    f"inhibition self-test: layer {hook.site.layer} saw {calls.forward} forward,"
                    f" {calls.recomputed} recomputed and {calls.backward} backward passes in a step of"
                    f" {expected} micro-batches; expected {expected}, 0 or {expected}, and {expected}."
                    " Something between the loss and the model drops the hook or its gradient."
                )

    def _check_gradients(self) -> None:
        """Passed once every layer that selected something has also injected a gradient that is not zero."""
        assert self.last is not None
        if not self.settings.is_regularising:
            self.self_test_pending = False
        if not self.self_test_pending or not self.is_inhibiting:
            return
        # one rank may have selected nothing of a layer in a small batch; over all ranks the gradient must be there
        largest = all_reduce_sum(torch.stack([hook.largest_gradient for hook in self.hooks]), self.group)
        shares, is_on = self.last[:, 0], self.coefficients.values > 0
        values = (shares.tolist(), is_on.tolist(), largest.tolist())
        for hook, share, on, gradient in zip(self.hooks, *values, strict=True):
            if on and share > 0 and gradient == 0:
                raise SelfTestError(
                    f"inhibition self-test: layer {hook.site.layer} selected {share:.2%} of its activations,"
                    " but the gradient it injected is zero on every rank"
                )
        self.self_test_pending = not bool((is_on & (shares > 0)).all())

    def metrics(self) -> dict[str, float]:
        """Of the newest applied step, by the names of docs/metrics.md; empty before the first. Waits for the device."""
        if self.last is None:
            return {}
        columns = dict(zip(self.STATISTICS, self.last.T, strict=True))
        values = {name: float(columns[name].mean()) for name in ("observed_share", "coefficient", "strength")}
        values["inhibition_loss"] = float(columns["inhibition_loss"].sum())
        for hook, row in zip(self.hooks, self.last.tolist(), strict=True):
            named = zip(self.STATISTICS, row, strict=True)
            values |= {f"layer{hook.site.layer}/{name}": value for name, value in named if name != "inhibition_loss"}
        return values

    # --- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the method remembers, as tensors on the CPU (float64 and int64), the same on every rank."""
        state = {"steps": torch.tensor(self.steps)}
        measured = self.coefficients.state_dict()
        for hook in self.hooks:
            state |= {
                f"layers.{hook.site.layer}.{name}": tensor.detach().cpu().clone()
                for name, tensor in {
                    "count": hook.moments.count,
                    "mean": hook.moments.mean,
                    "m2": hook.moments.m2,
                    "tau": hook.tau,
                    "selected": hook.selected,
                    "selectable": hook.selectable,
                    **{name: tensor[hook.index] for name, tensor in measured.items()},
                }.items()
            }
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises ValueError where the state is of other layers or sizes. One that was saved before there was a strength
        lacks what is measured for it, which begins anew."""
        measured = self.coefficients.state_dict()
        new = {
            f"layers.{hook.site.layer}.{name}": measured[name][hook.index] for name in measured for hook in self.hooks
        }
        state = {name: torch.zeros_like(tensor) for name, tensor in new.items()} | state
        expected = {name: tensor.shape for name, tensor in self.state_dict().items()}
        given = {name: tensor.shape for name, tensor in state.items()}
        if expected != given:
            different = sorted(n for n in expected.keys() | given.keys() if expected.get(n) != given.get(n))
            raise ValueError(f"inhibition state does not fit this model's hooked layers: {', '.join(different[:4])}")
        self.steps = int(state["steps"])
        layers = [f"layers.{hook.site.layer}." for hook in self.hooks]
        self.coefficients.load_state_dict(
            {name: torch.stack([state[layer + name] for layer in layers]).to(self._packed.device) for name in measured}
        )
        self._decide_on_coming_step()
        for hook in self.hooks:
            prefix, device = f"layers.{hook.site.layer}.", self._packed.device
            part = {n.removeprefix(prefix): t.to(device) for n, t in state.items() if n.startswith(prefix)}
            hook.moments = Moments(part["count"], part["mean"], part["m2"])
            hook.tau, hook.selected, hook.selectable = part["tau"], part["selected"], part["selectable"]
            hook._freeze()


def _device_of(module: nn.Module) -> torch.device:
    """Of its weights; the CPU where it has none."""
    tensor = next(chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _is_hooked(child: nn.Module) -> bool:
    """Whether an `InhibitedActivation` stands in its place, or a `_projection_hook` before it."""
    before = getattr(child, "_forward_pre_hooks", {}).values()
    return isinstance(child, InhibitedActivation) or any(getattr(f, "__module__", None) == __name__ for f in before)


def _projection_hook(hook: NeuronHook) -> Any:
    def before_forward(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (hook(inputs[0]), *inputs[1:]) if module.training else None

    return before_forward
